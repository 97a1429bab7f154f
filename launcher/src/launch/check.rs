//! Whether hosts can run ranks: asked before each attempt.

use std::path::Path;

use super::agent::{Agent, Refusal};
use super::hosts::{Host, is_here};
use super::processes::reap;

/// A host that cannot run ranks now.
#[derive(Debug, Clone)]
pub struct Missing {
    /// Which.
    pub host: Host,
    /// Why not, for people.
    pub problem: String,
    /// Whether trying again cannot help.
    pub wrong: bool,
}

/// Asks every host at the same time to end what earlier attempts have left there, which shows that it answers and has
/// the program. This host does so itself.
pub fn hosts(hosts: &[Host], agent: &Agent, program: &Path, job: &str) -> Vec<Missing> {
    let ask = |host: &Host| -> Option<Missing> {
        if is_here(&host.host) {
            reap(job);
            return None;
        }
        let program = program.to_string_lossy().into_owned();
        let words = [program.clone(), "reap".into(), job.to_owned()];
        let refusal = agent.run(&host.host, &words).err()?;
        let Refusal { text, answered, wrong } = refusal;
        let problem = match answered {
            true => format!(
                "{} cannot run {program} ({text}): install it at the same path on every host",
                host.host
            ),
            false => format!("{} does not answer: {text}", host.host),
        };
        Some(Missing { host: host.clone(), problem, wrong })
    };
    std::thread::scope(|scope| {
        let asked: Vec<_> = hosts.iter().map(|host| scope.spawn(move || ask(host))).collect();
        // A thread that panicked has found nothing.
        asked.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    })
}
