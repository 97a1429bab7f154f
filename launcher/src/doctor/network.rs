//! Ports, addresses and names.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::mpsc;
use std::time::Duration;

use repa_comm::board::host_addresses;
use repa_trainer::telemetry::exporter::PORTS_TRIED;

use super::Line;
use super::mpi::fabric;
use super::subject::Subject;
use crate::launch::this_host;

const PORTS: &str = "metrics ports";
const INTERFACES: &str = "interfaces";
const NAME: &str = "host name";

/// How long a name server may take.
const RESOLVING: Duration = Duration::from_secs(5);

/// The ports that ranks serve metrics on.
pub fn ports(subject: &Subject) -> Vec<Line> {
    let telemetry = &subject.config.telemetry;
    if !telemetry.metrics {
        return vec![Line::absent(PORTS, "telemetry.metrics=false")];
    }
    let taken = |port| TcpListener::bind(SocketAddr::new(telemetry.bind, port)).err();
    vec![judge_ports(telemetry.bind, telemetry.port, subject, &taken)]
}

/// Each rank takes the first free port from its own on. `taken` says why a port cannot be had.
fn judge_ports(bind: IpAddr, base: u16, subject: &Subject, taken: &dyn Fn(u16) -> Option<io::Error>) -> Line {
    let (mut used, mut moved, mut had) = (Vec::new(), 0, Vec::new());
    for rank in 0..subject.here as u16 {
        let own = base.saturating_add(rank);
        let last = own.saturating_add(PORTS_TRIED);
        let mut port = own;
        loop {
            let problem = if had.contains(&port) { None } else { taken(port) };
            match problem {
                None if !had.contains(&port) => break,
                Some(error) if error.kind() != io::ErrorKind::AddrInUse => {
                    let fix = match error.kind() {
                        io::ErrorKind::PermissionDenied => "set telemetry.port to 1024 or above",
                        _ => "set telemetry.bind to an address of this host (0.0.0.0 is all of them)",
                    };
                    return Line::error(PORTS, format!("{bind}:{port}: {error}"), fix);
                }
                Some(_) if !used.contains(&port) => used.push(port),
                _ => {}
            }
            if port == last {
                let found = format!("none of {bind}:{own} to {last} is free");
                let fix = "set telemetry.port to the first of a free range, or telemetry.metrics=false";
                return Line::error(PORTS, found, fix);
            }
            port += 1;
        }
        moved += usize::from(port != own);
        had.push(port);
    }
    let list = |ports: &[u16]| match ports {
        [one] => format!("{one}"),
        [first, .., last] => format!("{first} to {last}"),
        [] => "none".into(),
    };
    if moved > 0 {
        let found =
            format!("{bind}:{} in use (by another run?); ranks will take {}", list(&used), list(&had));
        let fix = "nothing, if Prometheus reads the run's prometheus-targets.json; else set telemetry.port";
        return Line::warning(PORTS, found, fix);
    }
    let found = format!("{bind}:{} free", list(&had));
    if subject.nodes > 1 && bind.is_loopback() {
        let fix = "telemetry.bind=0.0.0.0, where the network is one that you trust";
        return Line::warning(PORTS, format!("{found}, and each host's are for itself alone"), fix);
    }
    Line::ok(PORTS, found)
}

/// Addresses of the host, and what its name means.
pub fn names(subject: &Subject) -> Vec<Line> {
    let several = subject.nodes > 1;
    let speed = |name: &str| {
        let text = std::fs::read_to_string(format!("/sys/class/net/{name}/speed")).ok()?;
        text.trim().parse::<i64>().ok().filter(|&mbit| mbit > 0)
    };
    let host = this_host();
    vec![
        judge_interfaces(&host_addresses(), &speed, &fabric(), several),
        judge_name(&host, &resolve(&host), several),
    ]
}

/// `speed` is in Mbit/s.
fn judge_interfaces(
    addresses: &[(String, IpAddr)],
    speed: &dyn Fn(&str) -> Option<i64>,
    fabric: &[String],
    several: bool,
) -> Line {
    let link_local = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let outside: Vec<&(String, IpAddr)> =
        addresses.iter().filter(|(_, address)| !address.is_loopback() && !link_local(address)).collect();
    let mut names: Vec<&str> = outside.iter().map(|(name, _)| name.as_str()).collect();
    // The kernel lists all addresses of one family before those of the other.
    names.sort_by_key(|name| outside.iter().position(|(known, _)| known == name));
    names.dedup();
    let describe = |name: &&str| {
        let of_it = outside.iter().filter(|(known, _)| known == name);
        let addresses: Vec<String> = of_it.map(|(_, address)| address.to_string()).collect();
        let rate = speed(name).map(|mbit| format!(" ({} Gbit/s)", mbit as f64 / 1e3)).unwrap_or_default();
        format!("{name} {}{rate}", addresses.join(" "))
    };
    let mut parts: Vec<String> = names.iter().map(describe).collect();
    if !fabric.is_empty() {
        parts.push(format!("InfiniBand or RoCE {}", fabric.join(", ")));
    }
    if outside.is_empty() {
        let found = "the loopback alone";
        return match several {
            true => Line::warning(INTERFACES, found, "bring the network up: other hosts cannot be reached"),
            false => Line::ok(INTERFACES, format!("{found}: enough for one host")),
        };
    }
    let found = parts.join(", ");
    if several && names.len() > 1 && std::env::var_os("OMPI_MCA_btl_tcp_if_include").is_none() {
        let fix = format!(
            "name the one between the hosts, as OpenMPI tries all: OMPI_MCA_btl_tcp_if_include={0}, \
             OMPI_MCA_oob_tcp_if_include={0}, NCCL_SOCKET_IFNAME={0}",
            names[0]
        );
        return Line::warning(INTERFACES, found, fix);
    }
    Line::ok(INTERFACES, found)
}

/// What a name means; the text says why it means nothing.
fn resolve(name: &str) -> Result<Vec<IpAddr>, String> {
    let (send, receive) = mpsc::channel();
    let owned = name.to_owned();
    std::thread::spawn(move || {
        let found = (owned.as_str(), 0).to_socket_addrs();
        send.send(found.map(|all| all.map(|address| address.ip()).collect()).map_err(|e| e.to_string()))
    });
    let late = |_| format!("no answer within {} s", RESOLVING.as_secs());
    let mut found: Vec<IpAddr> = receive.recv_timeout(RESOLVING).map_err(late)??;
    found.dedup();
    Ok(found)
}

fn judge_name(host: &str, means: &Result<Vec<IpAddr>, String>, several: bool) -> Line {
    let hosts = format!("give {host} its address in /etc/hosts (or in the name server)");
    match means {
        Err(problem) => Line::problem(NAME, several, format!("{host} is not known here: {problem}"), hosts),
        Ok(addresses) => {
            let list: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            let found = format!("{host} is {}", list.join(", "));
            match addresses.iter().all(IpAddr::is_loopback) {
                true if several => {
                    let fix = format!("{hosts}, in place of the line with {}", list[0]);
                    Line::warning(NAME, format!("{found}, where other hosts cannot reach it"), fix)
                }
                true => Line::ok(NAME, format!("{found} (several hosts would need its address)")),
                false => Line::ok(NAME, found),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use repa_trainer::config::Config;

    fn subject(here: usize, nodes: usize) -> Subject {
        Subject { nodes, ..Subject::alone(Config::default(), here, true) }
    }

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn ranks_take_the_next_free_port() {
        let judge = |here, nodes, used: &'static [u16]| {
            let taken = move |port| used.contains(&port).then(|| io::Error::from(io::ErrorKind::AddrInUse));
            judge_ports(address("127.0.0.1"), 9400, &subject(here, nodes), &taken)
        };
        assert_eq!(judge(2, 1, &[]).found, "127.0.0.1:9400 to 9401 free");
        assert_eq!(judge(1, 1, &[9401]).state, State::Ok);
        let moved = judge(2, 1, &[9400]);
        assert_eq!(moved.state, State::Warning);
        assert!(moved.found.contains("9400 in use") && moved.found.contains("9401 to 9402"), "{moved:?}");
        assert_eq!(judge(2, 2, &[]).state, State::Warning, "the loopback of several hosts");
    }

    #[test]
    fn ports_that_cannot_be_had_are_errors() {
        let judge = |kind: io::ErrorKind| {
            let taken = move |_| Some(io::Error::from(kind));
            judge_ports(address("127.0.0.1"), 9400, &subject(2, 1), &taken)
        };
        let full = judge(io::ErrorKind::AddrInUse);
        assert!(full.state == State::Error && full.found.contains("9400 to 9464"), "{full:?}");
        let foreign = judge(io::ErrorKind::AddrNotAvailable);
        assert!(
            foreign.state == State::Error && foreign.fix.is_some_and(|fix| fix.contains("telemetry.bind"))
        );
        let low = judge(io::ErrorKind::PermissionDenied);
        assert!(low.fix.is_some_and(|fix| fix.contains("1024")));
    }

    #[test]
    fn interfaces_matter_to_several_hosts() {
        let lo = ("lo".to_owned(), address("127.0.0.1"));
        let eth = ("eth0".to_owned(), address("10.0.0.2"));
        let bridge = ("docker0".to_owned(), address("172.17.0.1"));
        let speed = |name: &str| (name == "eth0").then_some(100_000);
        let judge = |all: &[(String, IpAddr)], several| judge_interfaces(all, &speed, &[], several);
        assert_eq!(judge(std::slice::from_ref(&lo), false).state, State::Ok);
        assert_eq!(judge(std::slice::from_ref(&lo), true).state, State::Warning);
        assert_eq!(judge(&[lo.clone(), eth.clone()], true).found, "eth0 10.0.0.2 (100 Gbit/s)");
        let two = judge(&[lo, eth, bridge], true);
        assert!(two.state == State::Warning && two.fix.is_some_and(|fix| fix.contains("if_include=eth0")));
    }

    #[test]
    fn names_should_mean_addresses_that_others_reach() {
        let state = |means: Result<Vec<IpAddr>, String>, several| judge_name("n1", &means, several).state;
        assert_eq!(state(Ok(vec![address("10.0.0.2")]), true), State::Ok);
        assert_eq!(state(Ok(vec![address("127.0.1.1")]), false), State::Ok);
        assert_eq!(state(Ok(vec![address("127.0.1.1")]), true), State::Warning);
        assert_eq!(state(Err("unknown".into()), false), State::Warning);
        assert_eq!(state(Err("unknown".into()), true), State::Error);
        assert!(resolve("localhost").is_ok_and(|found| found.iter().all(IpAddr::is_loopback)));
    }
}
