//! A real Prometheus on the loopback address, and plain HTTP to talk to it and to the ranks.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Running;

/// Which of Debian's programs are not there, as a reason to skip a test.
pub fn missing() -> Option<String> {
    let there = |program: &str| {
        let version =
            Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
        version.is_ok()
    };
    let absent: Vec<&str> =
        ["prometheus", "promtool"].into_iter().filter(|program| !there(program)).collect();
    match absent.is_empty() {
        true => None,
        false => Some(format!("{} not found: install Debian's package prometheus", absent.join(", "))),
    }
}

/// Sends bytes and reads what comes back until the other side ends it, or the deadline. `None` where nothing came.
pub fn exchange(address: SocketAddr, bytes: &[u8], deadline: Duration) -> Option<Vec<u8>> {
    let started = Instant::now();
    let mut stream = TcpStream::connect_timeout(&address, deadline).ok()?;
    // The other side may close before it has read all.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let mut part = vec![0; 1 << 16];
    while let Some(left) = deadline.checked_sub(started.elapsed()).filter(|left| !left.is_zero()) {
        stream.set_read_timeout(Some(left)).ok()?;
        match stream.read(&mut part) {
            Ok(0) | Err(_) => break,
            Ok(n) => answer.extend_from_slice(&part[..n]),
        }
    }
    (!answer.is_empty()).then_some(answer)
}

/// The status code of an HTTP answer.
pub fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|&b| b == b'\r').next()?;
    std::str::from_utf8(line).ok()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()
}

/// The body of a page.
///
/// # Errors
/// No answer within the deadline, or not that of success.
pub fn get(address: SocketAddr, path: &str, deadline: Duration) -> Result<String, String> {
    // HTTP/1.0: the body is sent whole, and the connection closed.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    let answer = exchange(address, request.as_bytes(), deadline).ok_or("no answer")?;
    let text = String::from_utf8_lossy(&answer).into_owned();
    match (status(&answer), text.split_once("\r\n\r\n")) {
        (Some(200), Some((_, body))) => Ok(body.to_owned()),
        _ => Err(text),
    }
}

/// One series' value now.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// Its labels, the name (`__name__`) among them.
    pub labels: BTreeMap<String, String>,
    /// Its value.
    pub value: f64,
}

/// A server that ends with the value.
#[derive(Debug)]
pub struct Prometheus {
    address: SocketAddr,
    _running: Running,
}

impl Prometheus {
    /// Starts a server on a free port, and waits until it is ready.
    #[track_caller]
    pub fn start(config: &Path, data: &Path) -> Self {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let address = free.expect("a free port");
        let mut running = Running::start(
            Command::new("prometheus")
                .arg(format!("--config.file={}", config.display()))
                .arg(format!("--storage.tsdb.path={}", data.display()))
                .arg(format!("--web.listen-address={address}"))
                .arg("--log.level=warn"),
        );
        let begun = Instant::now();
        while get(address, "/-/ready", Duration::from_secs(1)).is_err() {
            if running.has_ended() {
                panic!("Prometheus ended: {:?}", running.wait(Duration::from_secs(1)));
            }
            assert!(begun.elapsed() < Duration::from_secs(30), "Prometheus is not ready");
            std::thread::sleep(Duration::from_millis(50));
        }
        Self { address, _running: running }
    }

    /// What the API answers to a path.
    ///
    /// # Errors
    /// It answers with an error.
    pub fn api(&self, path: &str) -> Result<Value, String> {
        let text = get(self.address, &format!("/api/v1/{path}"), Duration::from_secs(10))?;
        let answer: Value = serde_json::from_str(&text).map_err(|e| e.to_string())?;
        Ok(answer["data"].clone())
    }

    /// The value of an expression now; a scalar has no labels.
    ///
    /// # Errors
    /// The expression is not sound.
    pub fn query(&self, expression: &str) -> Result<Vec<Sample>, String> {
        let data = self.api(&format!("query?query={}", encoded(expression)))?;
        let number = |value: &Value| value[1].as_str().and_then(|text| text.parse().ok());
        if data["resultType"] == "scalar" {
            let value = number(&data["result"]).ok_or("no number")?;
            return Ok(vec![Sample { labels: BTreeMap::new(), value }]);
        }
        let series = data["result"].as_array().ok_or("no result")?;
        series
            .iter()
            .map(|series| {
                let labels = serde_json::from_value(series["metric"].clone()).map_err(|e| e.to_string())?;
                Ok(Sample { labels, value: number(&series["value"]).ok_or("no number")? })
            })
            .collect()
    }

    /// What was scraped of each series, as time and value; for an expression such as `up[20s]`.
    ///
    /// # Errors
    /// The expression is not sound.
    pub fn history(&self, expression: &str) -> Result<Vec<Vec<(f64, f64)>>, String> {
        let data = self.api(&format!("query?query={}", encoded(expression)))?;
        let sample = |sample: &Value| Some((sample[0].as_f64()?, sample[1].as_str()?.parse().ok()?));
        let samples = |series: &Value| series["values"].as_array()?.iter().map(sample).collect();
        let series = data["result"].as_array().ok_or("no result")?;
        series.iter().map(samples).collect::<Option<_>>().ok_or_else(|| "no samples".to_owned())
    }

    /// The one value of an expression; `None` where there is not just one.
    pub fn value(&self, expression: &str) -> Option<f64> {
        match self.query(expression).ok()?.as_slice() {
            [one] => Some(one.value),
            _ => None,
        }
    }
}

/// Text as a part of a URL.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(|b| match b {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => char::from(b).to_string(),
            _ => format!("%{b:02X}"),
        })
        .collect()
}
