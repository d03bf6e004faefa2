//! Where a daemon is: `stomp://[USER:PASSWORD@]HOST[:PORT][/QUEUE][?vhost=NAME]`, or `stomp+ssl://` for TLS.

use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use url::Url;
use xbee_mq::uri::{BadBrokerUri, BrokerUri};

/// The queue, where the address does not say one.
pub const DEFAULT_QUEUE: &str = "xbed";
/// Longest name of a queue, bytes.
const MAX_QUEUE_BYTES: usize = 200;

/// A queue of a broker. Shown without the password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The broker.
    pub broker: BrokerUri,
    /// The queue's name.
    pub queue: String,
}

/// Why a text is no address. It is not repeated, for it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BadAddress {
    /// The broker's part.
    #[error(transparent)]
    Broker(#[from] BadBrokerUri),
    /// The rest.
    #[error("expected stomp://[USER:PASSWORD@]HOST[:PORT]/QUEUE or stomp+ssl://…: {0}")]
    Form(&'static str),
}

impl Address {
    /// Whether a text is meant to be one.
    pub fn is_meant(text: &str) -> bool {
        text.starts_with("stomp://") || text.starts_with("stomp+ssl://")
    }

    /// As STOMP has it.
    pub fn destination(&self) -> String {
        format!("/queue/{}", self.queue)
    }

    /// Where all members of a pool hear who looks for a task.
    pub(crate) fn pool_topic(&self) -> String {
        format!("/topic/xbee.pool.{}", self.queue)
    }
}

impl FromStr for Address {
    type Err = BadAddress;

    fn from_str(text: &str) -> Result<Address, BadAddress> {
        let mut url = Url::parse(text).map_err(|_| BadAddress::Form("no URI"))?;
        let path = url.path().to_owned();
        let queue = percent_decode_str(path.strip_prefix('/').unwrap_or(&path)).decode_utf8();
        let queue = queue.map_err(|_| BadAddress::Form("a queue that is not in UTF-8"))?;
        let wrong = |c: char| c.is_control() || c.is_whitespace() || c == '/';
        if queue.contains(wrong) || queue.len() > MAX_QUEUE_BYTES {
            return Err(BadAddress::Form(
                "a queue's name has up to 200 bytes, and no / or space",
            ));
        }
        let mut vhost = String::new();
        for (name, value) in url.query_pairs() {
            match &*name {
                "vhost" => vhost = value.into_owned(),
                _ => return Err(BadAddress::Form("another parameter than vhost")),
            }
        }
        url.set_query(None);
        url.set_path("");
        let mut broker: BrokerUri = url.as_str().parse()?;
        if !vhost.is_empty() {
            broker.virtual_host = vhost;
        }
        Ok(Address {
            broker,
            queue: match &*queue {
                "" => DEFAULT_QUEUE.to_owned(),
                queue => queue.to_owned(),
            },
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.broker, self.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_and_virtual_host_are_read_and_the_password_is_not_shown() {
        let address: Address = "stomp+ssl://me:se%2Fcret@b:1/jobs.eu?vhost=%2Fa"
            .parse()
            .unwrap();
        assert_eq!(address.destination(), "/queue/jobs.eu");
        assert_eq!(address.broker.virtual_host, "/a");
        assert_eq!(address.broker.passcode.as_deref(), Some("se/cret"));
        assert_eq!(format!("{address}"), "stomp+ssl://b:1/jobs.eu");
        assert!(!format!("{address:?}").contains("cret"));
        let address: Address = "stomp://[::1]".parse().unwrap();
        assert_eq!(address.to_string(), "stomp://[::1]:61613/xbed");
        assert_eq!(address.broker.virtual_host, "/");
        for wrong in [
            "stomp://h/a/b",
            "stomp://h/a%20b",
            "stomp://h/a?b=c",
            "http://h/a",
            "stomp:///a",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }
}
