//! Whether a guest may reach an address, and which one that is for the host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::own::{Lookup, Place};
use crate::rules::{Outbound, of_nat64};

/// What becomes of what a guest sends somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    /// It goes on to this address.
    Allowed(SocketAddr),
    /// No rule lets it.
    Prohibited,
    /// The host has no way there.
    NoRoute,
}

/// The rules, and what no rule changes.
#[derive(Debug)]
pub struct Policy {
    router: Ipv6Addr,
    outbound: Outbound,
    lookup: Lookup,
}

impl Policy {
    /// Of a guest with this router.
    ///
    /// # Errors
    /// Where the kernel cannot be asked which addresses are the host's own.
    pub fn new(router: Ipv6Addr, outbound: Outbound) -> std::io::Result<Self> {
        Ok(Self {
            router,
            outbound,
            lookup: Lookup::new()?,
        })
    }

    /// Judges what is for this address of the guest's world.
    pub fn judge(&self, destination: Ipv6Addr, port: u16) -> Judgement {
        let Some(address) = self.translate(destination).filter(|_| port != 0) else {
            return Judgement::Prohibited;
        };
        let to = SocketAddr::new(address, port);
        let by_prefix = match &self.outbound {
            Outbound::Off => false,
            Outbound::Open => true,
            Outbound::List(rules) => {
                let naming = || rules.iter().filter(|rule| rule.names(address, port));
                if naming().any(|rule| rule.is_of_one_address()) {
                    return Judgement::Allowed(to);
                }
                naming().next().is_some()
            }
        };
        if !by_prefix || is_special(address) {
            return Judgement::Prohibited;
        }
        // Asked each time: the host's addresses come and go.
        match self.lookup.place(address) {
            Ok(Place::Elsewhere) => Judgement::Allowed(to),
            Ok(Place::Nowhere) => Judgement::NoRoute,
            // What cannot be told is taken for the host's own.
            Ok(Place::Here) | Err(_) => Judgement::Prohibited,
        }
    }

    /// What an address of the guest's world is to the host. `None`: nothing that can be listed.
    fn translate(&self, address: Ipv6Addr) -> Option<IpAddr> {
        if address == self.router {
            return Some(Ipv6Addr::LOCALHOST.into());
        }
        if let Some(address) = of_nat64(address) {
            let nobody =
                address.is_multicast() || address.is_broadcast() || address.octets()[0] == 0;
            return (!nobody).then_some(address.into());
        }
        let network = |address: Ipv6Addr| address.to_bits() >> 64;
        // An address of IPv4 in disguise would be one of IPv4 to the kernel, and link-local ones need an interface.
        let nothing = address.is_multicast()
            || address.is_unspecified()
            || address.is_loopback()
            || address.is_unicast_link_local()
            || address.to_ipv4().is_some()
            || network(address) == network(self.router);
        (!nothing).then_some(address.into())
    }
}

/// Addresses that only a rule of their own opens, whatever the kernel says of them.
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            address.is_loopback() || address.is_link_local() || address == Ipv4Addr::UNSPECIFIED
        }
        IpAddr::V6(address) => address.is_loopback(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROUTER: &str = "fd00:1::1";

    fn policy(outbound: &str) -> Policy {
        let outbound = serde_json::from_str(outbound).unwrap();
        Policy::new(ROUTER.parse().unwrap(), outbound).unwrap()
    }

    fn judge(policy: &Policy, address: &str) -> Judgement {
        policy.judge(address.parse().unwrap(), 80)
    }

    /// What is the host's own, or nobody's, for every host.
    const NEVER_BY_PREFIX: [&str; 16] = [
        ROUTER,
        "::1",
        "::",
        "::ffff:127.0.0.1",
        "::ffff:192.0.2.1",
        "::127.0.0.1",
        "fe80::1",
        "ff02::1",
        "fd00:1::2",
        "fd00:1::ffff:2",
        "64:ff9b::127.0.0.1",
        "64:ff9b::127.9.9.9",
        "64:ff9b::169.254.169.254",
        "64:ff9b::255.255.255.255",
        "64:ff9b::224.0.0.1",
        "64:ff9b::0.0.0.0",
    ];

    #[test]
    fn the_hosts_own_is_not_reached_however_wide_a_rule_is() {
        for outbound in [
            "\"off\"",
            "\"open\"",
            "[\"::/0:*\", \"0.0.0.0/0:*\", \"127.0.0.0/8:80\"]",
        ] {
            let policy = policy(outbound);
            for address in NEVER_BY_PREFIX {
                assert_eq!(
                    judge(&policy, address),
                    Judgement::Prohibited,
                    "{outbound} {address}"
                );
            }
        }
    }

    #[test]
    fn interfaces_of_the_host_are_its_own() {
        // Those that it has, whatever they are.
        let output = std::process::Command::new("ip")
            .args(["-o", "addr"])
            .output();
        let Ok(output) = output else {
            println!("skipped: no program ip (iproute2)");
            return;
        };
        let text = String::from_utf8(output.stdout).unwrap();
        let words = text
            .lines()
            .filter_map(|line| line.split_whitespace().nth(3));
        let mut tried = 0;
        for address in words.filter_map(|word| word.split('/').next()) {
            let address = match address.parse().unwrap() {
                IpAddr::V4(address) => format!("64:ff9b::{address}"),
                IpAddr::V6(address) => address.to_string(),
            };
            assert_eq!(
                judge(&policy("\"open\""), &address),
                Judgement::Prohibited,
                "{address}"
            );
            tried += 1;
        }
        assert!(tried > 0, "no address in: {text}");
    }

    #[test]
    fn a_rule_for_one_address_opens_it() {
        let policy = policy("[\"[::1]:80\", \"127.0.0.1:80\"]");
        let allowed = |text: &str| Judgement::Allowed(text.parse().unwrap());
        assert_eq!(judge(&policy, ROUTER), allowed("[::1]:80"));
        assert_eq!(
            judge(&policy, "64:ff9b::127.0.0.1"),
            allowed("127.0.0.1:80")
        );
        assert_eq!(judge(&policy, "64:ff9b::127.0.0.2"), Judgement::Prohibited);
        // The guest's own loopback never comes by here.
        assert_eq!(judge(&policy, "::1"), Judgement::Prohibited);
        assert_eq!(
            policy.judge(ROUTER.parse().unwrap(), 81),
            Judgement::Prohibited
        );
    }
}
