//! What the ranks tell each other before NCCL starts, so that what cannot work is refused by all, with one message.

use super::library::Version;
use crate::Topology;

/// Several ranks of a communicator on one GPU came with this version, behind [`VARIABLE`].
pub(super) const SHARING: Version = Version(23000);

/// Allows several ranks on one GPU.
const VARIABLE: &str = "NCCL_MULTI_RANK_GPU_ENABLE";

/// What one rank has to say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) version: u32,
    /// Identity of the GPU.
    pub(super) gpu: String,
    /// Whether the environment allows several ranks on one GPU.
    pub(super) shares: bool,
    /// Why this rank cannot start; the rest means nothing then.
    pub(super) problem: Option<String>,
}

impl Told {
    pub(super) fn good(version: Version, gpu: &str) -> Self {
        let shares =
            std::env::var(VARIABLE).is_ok_and(|value| value.trim().parse::<i64>().is_ok_and(|n| n != 0));
        Self { version: version.0, gpu: gpu.to_owned(), shares, problem: None }
    }

    pub(super) fn bad(problem: &str) -> Self {
        Self { version: 0, gpu: String::new(), shares: false, problem: Some(problem.to_owned()) }
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let Self { version, gpu, shares, problem } = self;
        let mut text = format!("{version}\n{gpu}\n{}", u8::from(*shares));
        if let Some(problem) = problem {
            text += "\n";
            text += problem;
        }
        text.into_bytes()
    }

    /// The inverse of `encode`; text of another program version is a problem.
    pub(super) fn decode(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let mut parts = text.splitn(4, '\n');
        let (version, gpu, shares) = (parts.next(), parts.next(), parts.next());
        match (version.and_then(|version| version.parse().ok()), gpu, shares) {
            (Some(version), Some(gpu), Some(shares)) => Self {
                version,
                gpu: gpu.to_owned(),
                shares: shares == "1",
                problem: parts.next().map(str::to_owned),
            },
            _ => Self::bad("says something else than this version of the program"),
        }
    }
}

/// Whether these ranks can start NCCL together.
///
/// # Errors
/// Why not, and what to do: the same text on all ranks.
pub(super) fn judge(told: &[Told], topology: &Topology) -> Result<(), String> {
    let name = |rank: usize| format!("rank {rank} on {}", topology.hosts[rank]);
    if let Some((rank, problem)) =
        told.iter().enumerate().find_map(|(rank, told)| Some((rank, told.problem.as_ref()?)))
    {
        return Err(if told.len() == 1 { problem.clone() } else { format!("{}: {problem}", name(rank)) });
    }
    let version = Version(told[0].version);
    if let Some(other) = told.iter().position(|told| told.version != version.0) {
        return Err(format!(
            "{} has NCCL {version} and {} has NCCL {}: use the same version everywhere",
            name(0),
            name(other),
            Version(told[other].version)
        ));
    }
    for (rank, this) in told.iter().enumerate() {
        let Some(first) = told[..rank].iter().position(|other| other.gpu == this.gpu) else { continue };
        let apart = format!(
            "{} and rank {rank} are on the same GPU: start no more ranks on a host than it has GPUs",
            name(first)
        );
        if version < SHARING {
            return Err(format!(
                "{apart} (sharing one needs NCCL {SHARING} or later, and this is NCCL {version})"
            ));
        }
        if !this.shares || !told[first].shares {
            return Err(format!(
                "{apart}, or let them share it by {VARIABLE}=1 in the environment of all ranks, with \
                 NCCL_NVLS_ENABLE=0 and NCCL_MAX_CTAS=4"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn topology(hosts: &[&str]) -> Topology {
        let hosts = hosts.iter().map(|&host| host.to_owned()).collect();
        Topology { hosts, ..Topology::single() }
    }

    fn told(version: u32, gpu: &str, shares: bool) -> Told {
        Told { version, gpu: gpu.to_owned(), shares, problem: None }
    }

    #[test]
    fn told_survives_the_wire() {
        for told in [told(23003, "abc", true), Told::bad("no driver\nnone at all"), told(21805, "", false)] {
            assert_eq!(Told::decode(&told.encode()), told);
        }
        assert!(Told::decode(b"3\nx").problem.is_some());
    }

    #[test]
    fn one_rank_that_cannot_stops_all() {
        let ranks = [told(23003, "a", false), Told::bad("no driver")];
        assert_eq!(judge(&ranks, &topology(&["x", "y"])), Err("rank 1 on y: no driver".to_owned()));
        assert_eq!(judge(&ranks[1..], &topology(&["x"])), Err("no driver".to_owned()));
    }

    #[test]
    fn versions_have_to_agree() {
        let ranks = [told(23003, "a", false), told(22705, "b", false)];
        let problem = judge(&ranks, &topology(&["x", "y"])).expect_err("other versions");
        assert!(problem.contains("rank 0 on x has NCCL 2.30.3 and rank 1 on y has NCCL 2.27.5"), "{problem}");
    }

    #[test]
    fn a_gpu_is_shared_only_where_nccl_can_and_may() {
        let hosts = topology(&["x", "x", "x"]);
        let ranks = |version, shares| {
            [told(version, "a", true), told(version, "b", true), told(version, "a", shares)]
        };
        assert_eq!(judge(&ranks(23003, true), &hosts), Ok(()));
        let problem = judge(&ranks(23003, false), &hosts).expect_err("not allowed");
        assert!(problem.contains("rank 0 on x and rank 2 are on the same GPU"), "{problem}");
        assert!(problem.contains("NCCL_MULTI_RANK_GPU_ENABLE=1"), "{problem}");
        let problem = judge(&ranks(22705, true), &hosts).expect_err("too old");
        assert!(problem.contains("needs NCCL 2.30.0 or later, and this is NCCL 2.27.5"), "{problem}");
        // Without company the variable does not matter.
        assert_eq!(
            judge(&[told(21805, "a", false), told(21805, "b", false)], &topology(&["x", "x"])),
            Ok(())
        );
    }
}
