//! `stomp://` and `stomp+ssl://`.

use std::fmt;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use url::Url;

/// Where a broker is, and who one is there: `stomp://[USER[:PASSWORD]@]HOST[:PORT][/VHOST]`, or `stomp+ssl://` for TLS.
/// Shown without the password.
#[derive(Clone, PartialEq, Eq)]
pub struct BrokerUri {
    /// Whether by TLS.
    pub tls: bool,
    /// Name or address.
    pub host: String,
    /// TCP port; 61613 unless it is said, with TLS 61614.
    pub port: u16,
    /// The header `login`.
    pub login: Option<String>,
    /// The header `passcode`.
    pub passcode: Option<String>,
    /// The header `host`: a virtual host of the broker. `/` unless it is said, which is RabbitMQ's default one, and no matter
    /// to others.
    pub virtual_host: String,
}

/// Why a text is no such URI. It is not repeated, for it may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not of the form stomp://[USER:PASSWORD@]HOST[:PORT] or stomp+ssl://…: {0}")]
pub struct BadBrokerUri(&'static str);

impl FromStr for BrokerUri {
    type Err = BadBrokerUri;

    fn from_str(text: &str) -> Result<BrokerUri, BadBrokerUri> {
        let url = Url::parse(text).map_err(|_| BadBrokerUri("no URI"))?;
        let (tls, port) = match url.scheme() {
            "stomp" => (false, 61613),
            "stomp+ssl" => (true, 61614),
            _ => return Err(BadBrokerUri("another scheme")),
        };
        if url.query().is_some() || url.fragment().is_some() {
            return Err(BadBrokerUri("a query or a fragment"));
        }
        let decoded = |text: &str| -> Result<Option<String>, BadBrokerUri> {
            let text = percent_decode_str(text).decode_utf8();
            let text = text.map_err(|_| BadBrokerUri("text that is not UTF-8"))?;
            Ok((!text.is_empty()).then(|| text.into_owned()))
        };
        let host = decoded(url.host_str().unwrap_or_default())?.ok_or(BadBrokerUri("no host"))?;
        let path = url.path();
        Ok(BrokerUri {
            tls,
            host: host.trim_matches(['[', ']']).to_owned(),
            port: url.port().unwrap_or(port),
            login: decoded(url.username())?,
            passcode: decoded(url.password().unwrap_or_default())?,
            virtual_host: decoded(path.strip_prefix('/').unwrap_or(path))?
                .unwrap_or_else(|| "/".to_owned()),
        })
    }
}

impl fmt::Display for BrokerUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "stomp+ssl" } else { "stomp" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}://[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}://{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Debug for BrokerUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_parts_are_read_and_the_password_is_not_shown() {
        let uri: BrokerUri = "stomp://a%40b:p%2Fw@example:1234/v".parse().unwrap();
        assert_eq!(uri.login.as_deref(), Some("a@b"));
        assert_eq!(uri.passcode.as_deref(), Some("p/w"));
        assert_eq!(
            (uri.host.as_str(), uri.port, uri.tls),
            ("example", 1234, false)
        );
        assert_eq!(uri.virtual_host, "v");
        assert_eq!(
            format!("{uri} {uri:?}"),
            "stomp://example:1234 stomp://example:1234"
        );
        let uri: BrokerUri = "stomp+ssl://[::1]".parse().unwrap();
        assert_eq!(
            (uri.to_string(), uri.virtual_host.as_str()),
            ("stomp+ssl://[::1]:61614".into(), "/")
        );
        for wrong in [
            "",
            "http://a",
            "stomp:a",
            "stomp://",
            "stomp://a?b",
            "stomp://a:99999",
        ] {
            assert!(wrong.parse::<BrokerUri>().is_err(), "{wrong}");
        }
    }
}
