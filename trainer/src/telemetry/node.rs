//! One endpoint for all ranks of a host, for sites that open one port: its lowest rank serves what it reads from the
//! others' sockets.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::future::join_all;
use metrics::gauge;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::time::timeout;

use super::names;
use super::server::{self, Page};

/// How long a rank may take to answer: below what Prometheus waits for.
const READING: Duration = Duration::from_secs(1);

/// The sockets of a host's other ranks, once they are known.
pub(super) type Others = Arc<OnceLock<Vec<String>>>;

/// The metrics of all ranks of a host.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) own: PrometheusHandle,
    pub(super) others: Others,
}

impl Page for Node {
    async fn text(&self) -> String {
        let others = self.others.get().map_or(&[][..], Vec::as_slice);
        let answers = join_all(others.iter().map(|socket| timeout(READING, server::read(socket)))).await;
        let pages: Vec<String> = answers.into_iter().filter_map(|answer| answer.ok()?.ok()).collect();
        gauge!(names::NODE_RANKS_MISSING).set((others.len() - pages.len()) as f64);
        let own = self.own.render();
        merge(std::iter::once(&own).chain(&pages))
    }
}

/// What is told of one metric.
#[derive(Debug, Default)]
struct Family<'a> {
    help: Option<&'a str>,
    kind: Option<&'a str>,
    samples: Vec<&'a str>,
}

/// One page of several ranks': each metric has its help and type once, and the samples of all, which carry their rank.
fn merge<'a>(pages: impl IntoIterator<Item = &'a String>) -> String {
    let mut families: BTreeMap<&str, Family> = BTreeMap::new();
    for page in pages {
        let mut name = "";
        for line in page.lines().filter(|line| !line.is_empty()) {
            let named = |rest: &'a str| rest.split(' ').next().unwrap_or(rest);
            if let Some(rest) = line.strip_prefix("# HELP ") {
                name = named(rest);
                families.entry(name).or_default().help.get_or_insert(line);
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                name = named(rest);
                families.entry(name).or_default().kind.get_or_insert(line);
            } else if !line.starts_with('#') {
                families.entry(name).or_default().samples.push(line);
            }
        }
    }
    let lines =
        families.values().flat_map(|family| family.help.iter().chain(&family.kind).chain(&family.samples));
    lines.flat_map(|line| [line, "\n"]).collect()
}

#[cfg(test)]
mod tests {
    use metrics_exporter_prometheus::PrometheusBuilder;
    use tokio::net::UnixListener;

    use super::super::server::Listener;
    use super::*;

    #[test]
    fn each_metric_is_described_once_and_no_sample_is_lost() {
        let page = |rank: usize, more: &str| {
            format!(
                "# HELP b_total Things\n# TYPE b_total counter\nb_total{{rank=\"{rank}\"}} 3\n\n# TYPE a_seconds \
                 histogram\na_seconds_bucket{{rank=\"{rank}\",le=\"1\"}} 2\na_seconds_sum{{rank=\"{rank}\"}} \
                 1.5\na_seconds_count{{rank=\"{rank}\"}} 2\n\n{more}"
            )
        };
        let only = "# HELP c Of rank 1\n# TYPE c gauge\nc{rank=\"1\",part=\"x y\"} NaN\n";
        let merged = merge(&[page(0, ""), page(1, only)]);
        let expected = "# TYPE a_seconds histogram\n\
            a_seconds_bucket{rank=\"0\",le=\"1\"} 2\na_seconds_sum{rank=\"0\"} 1.5\na_seconds_count{rank=\"0\"} 2\n\
            a_seconds_bucket{rank=\"1\",le=\"1\"} 2\na_seconds_sum{rank=\"1\"} 1.5\na_seconds_count{rank=\"1\"} 2\n\
            # HELP b_total Things\n# TYPE b_total counter\nb_total{rank=\"0\"} 3\nb_total{rank=\"1\"} 3\n\
            # HELP c Of rank 1\n# TYPE c gauge\nc{rank=\"1\",part=\"x y\"} NaN\n";
        assert_eq!(merged, expected);
        assert_eq!(merge(&[]), "");
    }

    /// One rank answers, one is gone, and one takes connections and does nothing more.
    #[test]
    fn ranks_that_do_not_answer_are_left_out_in_time() {
        let recorder = |rank: &str| {
            let recorder = PrometheusBuilder::new().add_global_label("rank", rank).build_recorder();
            metrics::with_local_recorder(&recorder, || metrics::counter!("steps_total").increment(7));
            recorder.handle()
        };
        let names =
            ["answers", "gone", "hangs"].map(|name| format!("\0repa-test-{name}-{}", std::process::id()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let text = runtime.block_on(async {
            let [answers, _, hangs] = &names;
            let listener = UnixListener::bind(answers).expect("a socket");
            tokio::spawn(server::serve(Listener::Unix(listener), recorder("1")));
            let _hangs = UnixListener::bind(hangs).expect("a socket");
            let node = Node { own: recorder("0"), others: Others::default() };
            node.others.set(names.to_vec()).expect("set once");
            timeout(3 * READING, node.text()).await.expect("in time")
        });
        for rank in ["0", "1"] {
            assert!(text.contains(&format!("steps_total{{rank=\"{rank}\"}} 7\n")), "{text}");
        }
        assert_eq!(text.matches("# TYPE").count(), 1, "{text}");
    }
}
