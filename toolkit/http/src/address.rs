//! Rules for the addresses that a redirect may lead to, applied to the address that is connected to.
//!
//! A server that the user names may redirect to any other one. If that could be a private address, every
//! server could make this machine read from the services of its own network, such as those that give
//! credentials to virtual machines (169.254.169.254).

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use imgtool_core::Error;
use imgtool_core::sync::lock;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// Resolver of the names of one source. It looks up each name once: the address that was checked is the one
/// that is connected to, and a confined process can't look up names any more. Clones share the state.
#[derive(Debug, Clone, Default)]
pub(crate) struct Guard(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Hosts that the user named.
    named: Mutex<HashSet<String>>,
    /// Hosts and ports of proxies. They are connected to wherever they are, but no redirect leads there.
    proxies: Mutex<HashSet<String>>,
    /// True if a host that the user named is in a private network: its redirects may stay there.
    permits_private: AtomicBool,
    /// Addresses by host and port.
    known: Mutex<HashMap<String, Vec<SocketAddr>>>,
}

impl Guard {
    /// Trusts a host that the user named.
    pub(crate) fn trust(&self, host: &str) {
        lock(&self.0.named).insert(host.to_ascii_lowercase());
        let is_private = literal(host).is_some_and(|address| !is_public(address));
        self.0.permits_private.fetch_or(is_private, Ordering::Relaxed);
    }

    /// Trusts a proxy.
    pub(crate) fn trust_proxy(&self, host: &str, port: u16) {
        lock(&self.0.proxies).insert(format!("{host}:{port}").to_ascii_lowercase());
    }

    /// True for the host and port of a proxy.
    fn is_proxy(&self, uri: &Uri) -> bool {
        let key = uri.scheme().zip(uri.authority()).and_then(|(scheme, authority)| {
            Some(DefaultResolver::host_and_port(scheme, authority)?.to_ascii_lowercase())
        });
        key.is_some_and(|key| lock(&self.0.proxies).contains(&key))
    }

    /// Checks the URL of a redirect: a proxy would look its host up, so an address in the URL is checked before.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] for a private address, and for a proxy.
    pub(crate) fn check_redirect(&self, uri: &Uri) -> Result<(), Error> {
        if self.is_proxy(uri) {
            return Err(Error::refused("the server redirects to a proxy"));
        }
        let host = uri.host().unwrap_or_default();
        literal(host).map_or(Ok(()), |address| self.check(host, [address]))
    }

    fn check(&self, host: &str, addresses: impl IntoIterator<Item = IpAddr>) -> Result<(), Error> {
        let private = addresses.into_iter().find(|address| !is_public(*address));
        let host = host.to_ascii_lowercase();
        if lock(&self.0.named).contains(&host) {
            self.0.permits_private.fetch_or(private.is_some(), Ordering::Relaxed);
            return Ok(());
        }
        match private.filter(|_| !self.0.permits_private.load(Ordering::Relaxed)) {
            Some(address) => {
                Err(Error::refused(format!("the server redirects to the private address {address}"))
                    .hint("if that is right, name the URL of the redirect"))
            }
            None => Ok(()),
        }
    }

    fn addresses(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<Vec<SocketAddr>, ureq::Error> {
        let scheme = uri.scheme().ok_or(ureq::Error::HostNotFound)?;
        let authority = uri.authority().ok_or(ureq::Error::HostNotFound)?;
        let key = DefaultResolver::host_and_port(scheme, authority).ok_or(ureq::Error::HostNotFound)?;
        if let Some(known) = lock(&self.0.known).get(&key) {
            return Ok(known.clone());
        }
        let found = DefaultResolver::default().resolve(uri, config, timeout)?.to_vec();
        lock(&self.0.known).insert(key, found.clone());
        Ok(found)
    }
}

impl Resolver for Guard {
    fn resolve(
        &self,
        uri: &Uri,
        config: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let host = uri.host().unwrap_or_default();
        let found = self.addresses(uri, config, timeout).map_err(|error| unknown_host(host, error))?;
        if !self.is_proxy(uri) {
            self.check(host, found.iter().map(SocketAddr::ip)).map_err(io::Error::from)?;
        }
        let mut addresses = self.empty();
        found.into_iter().for_each(|address| addresses.push(address));
        Ok(addresses)
    }
}

/// Words the failure to look up a host. The text of the system may contain more than the host.
fn unknown_host(host: &str, error: ureq::Error) -> ureq::Error {
    match error {
        ureq::Error::Io(_) | ureq::Error::HostNotFound => io::Error::from(
            Error::unavailable(format!("host '{host}' is not known")).hint("check its name and the network"),
        )
        .into(),
        other => other,
    }
}

/// Parses the host of a URL that is an address.
fn literal(host: &str) -> Option<IpAddr> {
    host.trim_start_matches('[').trim_end_matches(']').parse().ok()
}

/// True if an address is that of a host of the internet: not of this machine, a private network, or a group.
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

/// The reserved blocks of the IANA registry (RFC 6890) that no server of the internet has.
fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    let is_reserved = address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || a == 0
        || a >= 240
        // Carrier-grade NAT, protocol assignments, benchmarks.
        || (a == 100 && b & 0xc0 == 64)
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && b & 0xfe == 18);
    !is_reserved
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // Mapped and compatible IPv4, among them the unspecified and the loopback address.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => embedded(high, low),
        // NAT64 and 6to4 lead to the IPv4 address in them.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => embedded(high, low),
        // Local NAT64.
        [0x64, 0xff9b, ..] => false,
        [first, ..] => {
            !address.is_unique_local() && !address.is_unicast_link_local() && first & 0xff00 != 0xff00
                // Site-local, deprecated.
                && first & 0xffc0 != 0xfec0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().expect("a URL")
    }

    fn is_public_text(text: &str) -> bool {
        is_public(text.parse().expect("an address"))
    }

    #[test]
    fn knows_private_addresses_in_every_form() {
        let private = [
            "127.0.0.1",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "0.0.0.0",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00:ec2::254",
            "ff02::1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:a9fe:a9fe::1",
        ];
        for text in private {
            assert!(!is_public_text(text), "{text}");
        }
        for text in ["93.184.215.14", "2606:2800:21f::1", "::ffff:93.184.215.14", "172.32.0.1"] {
            assert!(is_public_text(text), "{text}");
        }
    }

    #[test]
    fn refuses_private_addresses_unless_the_user_named_one() {
        let guard = Guard::default();
        guard.trust("example.com");
        let private: IpAddr = "169.254.169.254".parse().expect("an address");
        let error = guard.check("elsewhere.example", [private]).expect_err("private");
        assert_eq!(error.message(), "the server redirects to the private address 169.254.169.254");
        assert!(guard.check_redirect(&uri("http://[::ffff:127.0.0.1]/")).is_err());
        assert!(guard.check_redirect(&uri("http://elsewhere.example/")).is_ok());
        // The host that the user named is in a private network itself.
        guard.check("EXAMPLE.com", [private]).expect("named");
        guard.check("elsewhere.example", [private]).expect("as private as the named host");
    }

    #[test]
    fn a_private_proxy_permits_no_private_redirect() {
        let guard = Guard::default();
        guard.trust("example.com");
        guard.trust_proxy("127.0.0.1", 3128);
        guard.trust_proxy("proxy.example", 80);
        assert!(
            guard.is_proxy(&uri("http://127.0.0.1:3128")) && guard.is_proxy(&uri("http://Proxy.example"))
        );
        assert!(!guard.is_proxy(&uri("http://127.0.0.1:3129/")));
        for private in [
            "http://169.254.169.254/",
            "http://127.0.0.1:8080/",
            "http://127.0.0.1:3128/",
            "http://proxy.example/",
        ] {
            assert!(guard.check_redirect(&uri(private)).is_err(), "{private}");
        }
        assert!(guard.check("127.0.0.1", ["127.0.0.1".parse().expect("an address")]).is_err());
    }
}
