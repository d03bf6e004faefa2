//! What may be reached, as the configuration says it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most rules of a list.
pub const RULES_MAX: usize = 256;

/// What guests may reach beyond their own network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub enum Outbound {
    /// Nothing.
    #[default]
    Off,
    /// Everything but the host itself.
    Open,
    /// What one of these rules names. Addresses of the host's own only by a rule for that one address.
    List(Vec<Rule>),
}

/// How it is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Text {
    Word(String),
    List(Vec<String>),
}

impl TryFrom<Text> for Outbound {
    type Error = RuleError;

    fn try_from(text: Text) -> Result<Self, RuleError> {
        match text {
            Text::Word(word) if word == "off" => Ok(Self::Off),
            Text::Word(word) if word == "open" => Ok(Self::Open),
            Text::Word(word) => Err(RuleError::Word(word)),
            Text::List(rules) if rules.len() > RULES_MAX => Err(RuleError::TooMany(rules.len())),
            Text::List(rules) => {
                let rules: Result<_, _> = rules.iter().map(|rule| rule.parse()).collect();
                Ok(Self::List(rules?))
            }
        }
    }
}

impl From<Outbound> for Text {
    fn from(outbound: Outbound) -> Self {
        match outbound {
            Outbound::Off => Self::Word("off".to_owned()),
            Outbound::Open => Self::Word("open".to_owned()),
            Outbound::List(rules) => Self::List(rules.iter().map(Rule::to_string).collect()),
        }
    }
}

/// Why something is no rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// Neither of the two words.
    #[error("{0:?} is neither \"off\" nor \"open\" nor a list of rules")]
    Word(String),
    /// Not a rule.
    #[error(
        "{0:?} is no rule: write [ADDRESS]:PORT or PREFIX/BITS:PORT, with * for every port, as \"2001:db8::/32:443\""
    )]
    Rule(String),
    /// The prefix has more bits than it says.
    #[error("{0:?} has bits behind its prefix")]
    BitsBehind(String),
    /// The limit.
    #[error("{0} rules: at most {RULES_MAX}")]
    TooMany(usize),
}

impl RuleError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Word(_) => "outbound-word",
            Self::Rule(_) => "outbound-rule",
            Self::BitsBehind(_) => "outbound-bits",
            Self::TooMany(_) => "outbound-too-many",
        }
    }
}

/// Addresses that begin alike, and one port of theirs or all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    address: IpAddr,
    bits: u8,
    port: Option<u16>,
}

/// An address as bits from the left, and how many it has.
fn bits_of(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

fn mask(bits: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0)
}

impl Rule {
    /// Whether it names this address and port.
    pub fn names(&self, address: IpAddr, port: u16) -> bool {
        let ((own, own_bits), (other, other_bits)) = (bits_of(self.address), bits_of(address));
        own_bits == other_bits
            && (own ^ other) & mask(self.bits) == 0
            && self.port.is_none_or(|own| own == port)
    }

    /// The port; `None`: every port.
    pub fn port(&self) -> Option<u16> {
        self.port
    }

    /// Whether it is for one address only.
    pub fn is_of_one_address(&self) -> bool {
        self.bits == bits_of(self.address).1
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let invalid = || RuleError::Rule(text.to_owned());
        let (prefix, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let port = match port {
            "*" => None,
            port => Some(
                port.parse()
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(invalid)?,
            ),
        };
        let bracketed = prefix
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'));
        let (address, bits) = match bracketed.unwrap_or(prefix).split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            // Without brackets, who knows what is the port?
            None if bracketed.is_none() && prefix.contains(':') => return Err(invalid()),
            None => (bracketed.unwrap_or(prefix), None),
        };
        let address: IpAddr = match bracketed {
            Some(_) => IpAddr::V6(address.parse::<Ipv6Addr>().map_err(|_| invalid())?),
            None => address.parse().map_err(|_| invalid())?,
        };
        let (value, most) = bits_of(address);
        let bits = match bits {
            Some(bits) => bits
                .parse()
                .ok()
                .filter(|bits| *bits <= most)
                .ok_or_else(invalid)?,
            None => most,
        };
        if value & !mask(bits) != 0 {
            return Err(RuleError::BitsBehind(text.to_owned()));
        }
        Ok(Self {
            address,
            bits,
            port,
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}:", self.address, self.bits)?;
        match self.port {
            Some(port) => port.fmt(f),
            None => f.write_str("*"),
        }
    }
}

/// The prefix under which IPv6 names addresses of IPv4 (RFC 6052, section 2.1).
const NAT64: u128 = 0x0064_ff9b << 96;

/// The address of IPv4 that one of IPv6 stands for, if it does.
pub fn of_nat64(address: Ipv6Addr) -> Option<Ipv4Addr> {
    let bits = address.to_bits();
    (bits >> 32 == NAT64 >> 32).then(|| Ipv4Addr::from_bits(bits as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        text.parse().unwrap()
    }

    #[test]
    fn rules_name_what_they_say() {
        let yes = [
            ("2001:db8::/32:443", "2001:db8:1::5", 443),
            ("[2001:db8::/32]:443", "2001:db8:1::5", 443),
            ("[2001:db8::5]:80", "2001:db8::5", 80),
            ("2001:db8::5/128:*", "2001:db8::5", 65535),
            ("::/0:53", "fd00::1", 53),
            ("192.0.2.0/24:22", "192.0.2.255", 22),
            ("192.0.2.9:22", "192.0.2.9", 22),
            ("0.0.0.0/0:*", "198.51.100.1", 1),
        ];
        for (text, address, port) in yes {
            assert!(rule(text).names(address.parse().unwrap(), port), "{text}");
        }
        let no = [
            ("2001:db8::/32:443", "2001:db9::5", 443),
            ("2001:db8::/32:443", "2001:db8::5", 444),
            ("[2001:db8::5]:80", "2001:db8::4", 80),
            ("::/0:*", "192.0.2.1", 80),
            ("0.0.0.0/0:*", "2001:db8::1", 80),
            ("192.0.2.0/24:22", "192.0.3.1", 22),
        ];
        for (text, address, port) in no {
            assert!(!rule(text).names(address.parse().unwrap(), port), "{text}");
        }
        assert!(rule("[::1]:80").is_of_one_address());
        assert!(rule("127.0.0.1/32:*").is_of_one_address());
        assert!(!rule("::/0:*").is_of_one_address());
    }

    #[test]
    fn what_is_no_rule_is_refused() {
        for text in [
            "",
            "::1",
            "::1:80",
            "2001:db8::/129:80",
            "192.0.2.0/33:1",
            "192.0.2.1",
            "192.0.2.1:0",
            "192.0.2.1:65536",
            "example.org:80",
            "[192.0.2.1]:80",
            "[::1]",
            "[::1:80",
            "fe80::1%eth0/128:80",
        ] {
            let error = text.parse::<Rule>().unwrap_err();
            assert_eq!(error, RuleError::Rule(text.to_owned()));
        }
        let error = "2001:db8::1/64:80".parse::<Rule>().unwrap_err();
        assert_eq!(error.code(), "outbound-bits");
    }

    #[test]
    fn outbound_is_a_word_or_a_list() {
        let read = |text: &str| serde_json::from_str::<Outbound>(text);
        assert_eq!(read("\"off\"").unwrap(), Outbound::Off);
        assert_eq!(read("\"open\"").unwrap(), Outbound::Open);
        let list = read("[\"[::1]:80\", \"192.0.2.0/24:*\"]").unwrap();
        let text = serde_json::to_string(&list).unwrap();
        assert_eq!(text, "[\"::1/128:80\",\"192.0.2.0/24:*\"]");
        assert_eq!(read(&text).unwrap(), list);
        assert!(read("\"all\"").is_err());
        let many = serde_json::to_string(&vec!["[::1]:80"; RULES_MAX + 1]).unwrap();
        assert!(read(&many).is_err());
    }

    #[test]
    fn addresses_of_ipv4_are_found_in_theirs_of_ipv6() {
        let of = |text: &str| of_nat64(text.parse().unwrap()).map(|address| address.to_string());
        assert_eq!(of("64:ff9b::192.0.2.33").as_deref(), Some("192.0.2.33"));
        assert_eq!(of("64:ff9b:1::192.0.2.33"), None);
        assert_eq!(of("::ffff:192.0.2.33"), None);
    }
}
