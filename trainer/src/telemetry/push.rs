//! Metrics that are sent to a Pushgateway, for sites where nothing can ask the ranks.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusHandle;
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, Url};
use tokio::runtime::Runtime;
use tokio::sync::oneshot::{self, Receiver, Sender};
use tokio::time::timeout;

use super::exporter::Identity;
use super::server::TEXT;

/// How long a push may take, and the end of a run wait for the last one.
const LONGEST: Duration = Duration::from_secs(5);

/// The job by which Prometheus' configuration, rules and dashboards know ranks.
const JOB: &str = "repa-dist";

/// A Pushgateway's address.
///
/// # Errors
/// Why the text is none.
pub(crate) fn parse(url: &str) -> Result<Url, String> {
    let parsed = Url::parse(url).map_err(|e| e.to_string());
    match parsed {
        Ok(url) if ["http", "https"].contains(&url.scheme()) => Ok(url),
        Ok(url) => Err(format!("{} is neither http nor https", url.scheme())),
        Err(problem) => Err(problem),
    }
    .map_err(|problem| format!("it must be an address such as http://gateway:9091: {problem}"))
}

/// Where a rank's metrics go: a group of its own, so that ranks, and runs on one host, do not replace each other's.
fn group(mut url: Url, identity: &Identity) -> Url {
    let instance = format!("{}:{}", identity.host, identity.run);
    let rank = identity.rank.to_string();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(["metrics", "job", JOB, "instance", &instance, "rank", &rank]);
    }
    url
}

/// What asks for a last push, and is told when it is over.
#[derive(Debug)]
pub(super) struct Pusher {
    last: Option<Sender<SyncSender<()>>>,
}

impl Pusher {
    /// Pushes now and then from here on. Failures are told once, by rank 0, and change nothing else.
    ///
    /// # Errors
    /// The address is none, or there are no roots of trust for TLS.
    pub(super) fn start(
        url: &str,
        period: Duration,
        identity: &Identity,
        handle: PrometheusHandle,
        runtime: &Runtime,
    ) -> Result<Self, String> {
        let url = group(parse(url)?, identity);
        // The process may have a provider already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let builder = Client::builder().timeout(LONGEST).redirect(reqwest::redirect::Policy::none());
        // Without TLS, a host without certificates will do.
        let builder = if url.scheme() == "http" { builder.tls_certs_only([]) } else { builder };
        let client = builder.build().map_err(|error| causes(&error))?;
        let (last, asked) = oneshot::channel();
        let push = Push { client, url, period, handle };
        runtime.spawn(push.keep_on(asked, identity.rank == 0));
        Ok(Self { last: Some(last) })
    }

    /// Pushes once more, and waits for it.
    pub(super) fn finish(&mut self) {
        let (done, over) = sync_channel(1);
        if self.last.take().is_some_and(|last| last.send(done).is_ok()) {
            // At worst Prometheus lacks the last seconds.
            let _ = over.recv_timeout(LONGEST + Duration::from_secs(1));
        }
    }
}

struct Push {
    client: Client,
    url: Url,
    period: Duration,
    handle: PrometheusHandle,
}

impl Push {
    async fn keep_on(self, mut asked: Receiver<SyncSender<()>>, mut tells: bool) {
        loop {
            let ended = timeout(self.period, &mut asked).await;
            if let Err(problem) = self.once().await {
                let host = self.url.host_str().unwrap_or_default();
                if std::mem::take(&mut tells) {
                    tracing::warn!(
                        "metrics cannot be pushed to {host} (telemetry.push_url): {problem}. Training goes on, and so do \
                         attempts"
                    );
                } else {
                    tracing::debug!("metrics cannot be pushed to {host}: {problem}");
                }
            }
            match ended {
                Err(_) => {}
                Ok(Ok(done)) => {
                    // Nobody waits any more if it took too long.
                    let _ = done.send(());
                    return;
                }
                Ok(Err(_)) => return,
            }
        }
    }

    /// Replaces the group by what there is now.
    async fn once(&self) -> Result<(), String> {
        let request = self.client.put(self.url.clone()).header(CONTENT_TYPE, TEXT).body(self.handle.render());
        let answer = request.send().await.map_err(|error| causes(&error.without_url()))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let text = answer.text().await.unwrap_or_default();
        let line: String = text.lines().next().unwrap_or_default().chars().take(200).collect();
        Err(format!("the answer is {status} {line}"))
    }
}

/// An error with what is behind it.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_leads_to_a_group_of_the_rank() {
        let identity = Identity {
            rank: 3,
            local_rank: 1,
            world_size: 4,
            host: "n1".into(),
            device: "cpu".into(),
            run: "a run/b".into(),
            model: String::new(),
            job_id: String::new(),
            restarts: 0,
        };
        let expected = "http://gateway:9091/x/metrics/job/repa-dist/instance/n1:a%20run%2Fb/rank/3";
        for url in ["http://gateway:9091/x", "http://gateway:9091/x/"] {
            assert_eq!(group(parse(url).expect("an address"), &identity).as_str(), expected);
        }
        for wrong in ["gateway", "gateway:9091", "ftp://gateway", "http://"] {
            assert!(parse(wrong).expect_err(wrong).contains("http://gateway:9091"));
        }
    }
}
