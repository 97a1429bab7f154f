//! The addresses of this host.

use std::ffi::CStr;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One address of an interface that is up, and the mask of its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) address: IpAddr,
    pub(super) mask: IpAddr,
}

/// So many addresses of a host are worth trying: those of container bridges come last, and can be many.
const MOST: usize = 8;

impl Interface {
    /// All of this host; none where the kernel does not say.
    pub(super) fn all() -> Vec<Self> {
        let mut found = Vec::new();
        each(|_, interface| found.push(interface));
        found
    }

    /// Whether an address is in this network, so that no router is needed.
    pub(super) fn reaches(&self, other: IpAddr) -> bool {
        match (self.address, self.mask, other) {
            (IpAddr::V4(a), IpAddr::V4(mask), IpAddr::V4(b)) => {
                a.to_bits() & mask.to_bits() == b.to_bits() & mask.to_bits()
            }
            (IpAddr::V6(a), IpAddr::V6(mask), IpAddr::V6(b)) => {
                a.to_bits() & mask.to_bits() == b.to_bits() & mask.to_bits()
            }
            _ => false,
        }
    }
}

/// The addresses of this host with the names of their interfaces, of those that are up; none where the kernel does not
/// say.
#[must_use]
pub fn host_addresses() -> Vec<(String, IpAddr)> {
    let mut found = Vec::new();
    each(|name, interface| found.push((name.to_string_lossy().into_owned(), interface.address)));
    found
}

fn each(mut tell: impl FnMut(&CStr, Interface)) {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the address is live for the call, which writes a list that is freed below.
    if unsafe { libc::getifaddrs(&mut list) } != 0 {
        return;
    }
    let mut next = list;
    // SAFETY: the list's entries are valid until it is freed; the last one's link is null.
    while let Some(entry) = unsafe { next.as_ref() } {
        next = entry.ifa_next;
        let up = entry.ifa_flags & libc::IFF_UP as libc::c_uint != 0;
        // SAFETY: an entry's addresses are null or valid, for its lifetime.
        let (address, mask) = unsafe { (ip(entry.ifa_addr), ip(entry.ifa_netmask)) };
        if let (true, Some(address), Some(mask)) = (up, address, mask) {
            // SAFETY: an entry's name ends in zero and lives as long as the entry.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            tell(name, Interface { address, mask });
        }
    }
    // SAFETY: made by getifaddrs, freed once; nothing of it was kept.
    unsafe { libc::freeifaddrs(list) };
}

/// # Safety
/// `address` is null, or valid for its family.
unsafe fn ip(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: the caller's word. The structures of the kernel need not be aligned as Rust wants them.
    unsafe {
        if address.is_null() {
            return None;
        }
        match i32::from((&raw const (*address).sa_family).read_unaligned()) {
            libc::AF_INET => {
                let v4 = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr)).into())
            }
            libc::AF_INET6 => {
                let v6 = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(Ipv6Addr::from(v6.sin6_addr.s6_addr).into())
            }
            _ => None,
        }
    }
}

/// Where others may find this host, all of one family, and where to listen for that: IPv4, or IPv6 where there is no
/// IPv4, or the loopback where there is no network.
pub(super) fn reachable(interfaces: &[Interface]) -> (IpAddr, Vec<IpAddr>) {
    let local = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let outside =
        interfaces.iter().map(|interface| interface.address).filter(|address| !address.is_loopback());
    let (mut v4, mut v6): (Vec<_>, Vec<_>) = outside.partition(IpAddr::is_ipv4);
    v4.sort_by_key(local);
    // These need the number of an interface with them, which is another one on each host.
    v6.retain(|address| !local(address));
    let (listen, mut found) = match (v4.is_empty(), v6.is_empty()) {
        (false, _) => (Ipv4Addr::UNSPECIFIED.into(), v4),
        (true, false) => (Ipv6Addr::UNSPECIFIED.into(), v6),
        (true, true) => (Ipv4Addr::LOCALHOST.into(), vec![Ipv4Addr::LOCALHOST.into()]),
    };
    found.truncate(MOST);
    (listen, found)
}

/// In the order in which to try them from here: first those of networks that this host is in, last those that this
/// host has itself, such as that of a bridge for containers, which looks the same on all hosts.
pub(super) fn in_order(
    mut addresses: Vec<std::net::SocketAddr>,
    here: &[Interface],
) -> Vec<std::net::SocketAddr> {
    addresses.sort_by_key(|address| {
        let ip = address.ip();
        if here.iter().any(|interface| interface.address == ip) {
            2
        } else {
            u8::from(!here.iter().any(|interface| interface.reaches(ip)))
        }
    });
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(address: &str, mask: &str) -> Interface {
        Interface { address: address.parse().expect("an address"), mask: mask.parse().expect("a mask") }
    }

    #[test]
    fn this_host_has_a_loopback() {
        let all = Interface::all();
        assert!(all.iter().any(|i| i.address.is_loopback() && i.reaches(i.address)), "{all:?}");
        let named = host_addresses();
        assert!(named.iter().any(|(name, address)| name == "lo" && address.is_loopback()), "{named:?}");
    }

    #[test]
    fn one_family_is_told() {
        let lo = interface("127.0.0.1", "255.0.0.0");
        let v6 =
            [interface("fe80::1", "ffff:ffff:ffff:ffff::"), interface("fd00::2", "ffff:ffff:ffff:ffff::")];
        let v4 = [interface("169.254.1.1", "255.255.0.0"), interface("10.0.0.2", "255.255.255.0")];
        let told = |interfaces: &[Interface]| {
            let (listen, found) = reachable(interfaces);
            (listen.to_string(), found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
        };
        let expect = |listen: &str, found: &str| (listen.to_owned(), found.to_owned());
        assert_eq!(told(&[]), expect("127.0.0.1", "127.0.0.1"));
        assert_eq!(told(&[lo, v6[0]]), expect("127.0.0.1", "127.0.0.1"));
        assert_eq!(told(&[lo, v6[0], v6[1]]), expect("::", "fd00::2"));
        assert_eq!(told(&[lo, v6[1], v4[0], v4[1]]), expect("0.0.0.0", "10.0.0.2 169.254.1.1"));
        assert_eq!(reachable(&[v4[1]; 20]).1.len(), MOST);
    }

    #[test]
    fn near_addresses_are_tried_first() {
        let here = [interface("172.17.0.1", "255.255.0.0"), interface("10.0.0.2", "255.255.255.0")];
        let all = ["172.17.0.1:5", "192.168.0.1:5", "10.0.0.7:5"].map(|a| a.parse().expect("an address"));
        let ordered: Vec<String> = in_order(all.to_vec(), &here).iter().map(ToString::to_string).collect();
        assert_eq!(ordered, ["10.0.0.7:5", "192.168.0.1:5", "172.17.0.1:5"]);
    }
}
