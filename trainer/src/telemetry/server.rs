//! A page over HTTP, on TCP or on a Unix socket, and how to read one from there.

use std::convert::Infallible;
use std::pin::pin;
use std::time::Duration;

use http_body_util::{BodyExt, Empty, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::service::service_fn;
use hyper::{Request, Response, client, server};
use hyper_util::rt::{TokioIo, TokioTimer};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::time::{sleep, timeout};

/// How long a client may take to ask.
const ASKING: Duration = Duration::from_secs(30);

/// How long a connection may last, so that clients which never read an answer do not pile up. Prometheus makes a new
/// one.
const LONGEST: Duration = Duration::from_secs(300);

/// How long a connection has to come to its end after that, and how long to wait where none can be had.
const PAUSE: Duration = Duration::from_secs(1);

/// The largest page that is read.
const MOST: usize = 64 << 20;

/// What a page's text is, in the version that every Prometheus reads.
pub(super) const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is served.
pub(super) trait Page: Clone + Send + 'static {
    /// Its text at this moment.
    fn text(&self) -> impl Future<Output = String> + Send;
}

/// A process's own metrics.
impl Page for PrometheusHandle {
    async fn text(&self) -> String {
        self.render()
    }
}

/// What clients connect to.
pub(super) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Serves a page for ever, under every path but /health.
pub(super) async fn serve(listener: Listener, page: impl Page) {
    loop {
        let accepted = match &listener {
            Listener::Tcp(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(connection(stream, page.clone()));
            }),
            Listener::Unix(listener) => listener.accept().await.map(|(stream, _)| {
                tokio::spawn(connection(stream, page.clone()));
            }),
        };
        if let Err(error) = accepted {
            // Descriptors, say, come back as connections end.
            tracing::debug!("no connection for metrics: {error}");
            sleep(PAUSE).await;
        }
    }
}

async fn connection<S, P>(stream: S, page: P)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    P: Page,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let page = page.clone();
        async move {
            let text = match request.uri().path() {
                "/health" => "OK".to_owned(),
                _ => page.text().await,
            };
            let mut answer = Response::new(Full::new(Bytes::from(text)));
            answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
            Ok::<_, Infallible>(answer)
        }
    });
    let mut builder = server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(ASKING);
    let mut serving = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let ended = match timeout(LONGEST, serving.as_mut()).await {
        Ok(ended) => ended,
        Err(_) => {
            serving.as_mut().graceful_shutdown();
            timeout(PAUSE, serving).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection for metrics ended early: {error}");
    }
}

/// Reads the page that is served on a Unix socket. The caller sets the deadline.
pub(super) async fn read(socket: &str) -> Result<String, Box<dyn std::error::Error + Send + Sync>> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get("/metrics").header(HOST, "localhost").body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await?;
    if !answer.status().is_success() {
        return Err(format!("the answer is {}", answer.status()).into());
    }
    let body = Limited::new(answer.into_body(), MOST).collect().await?.to_bytes();
    Ok(String::from_utf8(body.into())?)
}
