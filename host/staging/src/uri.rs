//! URIs that never print their credentials.

use std::path::PathBuf;
use std::str::FromStr;

use percent_encoding::percent_decode_str;
use url::Url;

use crate::error::{Error, ErrorKind, tame};

/// The schemes, as error messages list them.
pub(crate) const SUPPORTED: &str = "file, ftp, http, https";

/// Scheme of a [`Uri`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// A file of this host (RFC 8089).
    File,
    /// FTP (RFC 959, URI form RFC 1738).
    Ftp,
    /// HTTP.
    Http,
    /// HTTP over TLS.
    Https,
}

/// A URI of a supported scheme. `Display` and `Debug` leave out user, password, query and fragment:
/// each may be a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Uri {
    url: Url,
    scheme: Scheme,
}

impl Uri {
    /// Its scheme.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The URI with its secrets, for the request itself.
    pub(crate) fn secret(&self) -> &Url {
        &self.url
    }

    /// Path of a `file` URI on this host.
    pub fn file_path(&self) -> Option<PathBuf> {
        match self.scheme {
            Scheme::File => self.url.to_file_path().ok(),
            _ => None,
        }
    }

    /// Percent-decoded user and password.
    pub(crate) fn credentials(&self) -> Result<Option<(String, String)>, ErrorKind> {
        match self.url.username() {
            "" => Ok(None),
            user => Ok(Some((
                decode(user, "user name")?,
                decode(self.url.password().unwrap_or(""), "password")?,
            ))),
        }
    }

    /// Path of an `ftp` URI as a server takes it: relative to the login directory, and absolute if
    /// it starts with `%2F` or a second slash (RFC 1738 section 3.2.2). A type code other than
    /// `;type=i` is refused.
    pub(crate) fn ftp_path(&self) -> Result<String, ErrorKind> {
        let raw = self.url.path();
        let raw = raw.strip_prefix('/').unwrap_or(raw);
        let (raw, kind) = match raw.rsplit_once(";type=") {
            Some((path, kind)) => (path, kind),
            None => (raw, "i"),
        };
        if !kind.eq_ignore_ascii_case("i") {
            return Err(ErrorKind::Unsupported {
                what: "FTP transfers other than binary (;type=i)",
            });
        }
        let path = decode(raw, "path")?;
        if path.is_empty() || path.ends_with('/') {
            return Err(ErrorKind::InvalidUri {
                reason: "the path names no file".into(),
            });
        }
        Ok(path)
    }
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let invalid =
            |reason: String| Error::for_text(redact(text), ErrorKind::InvalidUri { reason });
        let url = match Url::parse(text) {
            Ok(url) => url,
            Err(url::ParseError::RelativeUrlWithoutBase) => {
                return Err(invalid(format!(
                    "it has no scheme; supported are {SUPPORTED}"
                )));
            }
            Err(error) => return Err(invalid(error.to_string())),
        };
        let scheme = match url.scheme() {
            "file" => Scheme::File,
            "ftp" => Scheme::Ftp,
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            other => {
                let scheme = tame(other);
                return Err(Error::for_text(
                    redact(text),
                    ErrorKind::UnknownScheme { scheme },
                ));
            }
        };
        if scheme == Scheme::File {
            let path = url.to_file_path().map_err(|()| {
                invalid("a file URI names an absolute path of this host, as in file:///path".into())
            })?;
            if std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()).contains(&0) {
                return Err(invalid("the path contains a zero byte".into()));
            }
        }
        Ok(Self { url, scheme })
    }
}

impl std::fmt::Display for Uri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&redact_url(&self.url))
    }
}

impl std::fmt::Debug for Uri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Uri({self})")
    }
}

/// Decodes `%XX`. Control characters are refused: in a command line they would be a second command.
fn decode(text: &str, what: &str) -> Result<String, ErrorKind> {
    let text = percent_decode_str(text)
        .decode_utf8()
        .map_err(|_| ErrorKind::InvalidUri {
            reason: format!("the {what} is not UTF-8"),
        })?;
    if text.chars().any(char::is_control) {
        return Err(ErrorKind::InvalidUri {
            reason: format!("the {what} contains a control character"),
        });
    }
    Ok(text.into_owned())
}

/// A parsed URL without its secrets.
pub(crate) fn redact_url(url: &Url) -> String {
    let mut text = format!("{}://", url.scheme());
    if !url.username().is_empty() || url.password().is_some() {
        text.push_str("***@");
    }
    if let Some(host) = url.host_str() {
        text.push_str(host);
    }
    if let Some(port) = url.port() {
        text.push_str(&format!(":{port}"));
    }
    text.push_str(url.path());
    if url.query().is_some() {
        text.push_str("?***");
    }
    tame(&text)
}

/// Text that may or may not be a URI, without what may be its secrets. Where the text is odd, it
/// hides too much rather than too little.
pub(crate) fn redact(text: &str) -> String {
    let (head, tail) = match text.find(':') {
        Some(colon) => text.split_at(colon + 1),
        None => ("", text),
    };
    let slashes = tail.len() - tail.trim_start_matches('/').len();
    let (slashes, tail) = tail.split_at(slashes);
    let (hidden, tail) = match tail.rfind('@') {
        Some(at) => ("***", &tail[at..]),
        None => ("", tail),
    };
    let tail = match tail.find(['?', '#']) {
        Some(end) => format!("{}?***", &tail[..end]),
        None => tail.to_owned(),
    };
    tame(&format!("{head}{slashes}{hidden}{tail}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn secrets_are_never_printed() {
        for text in [
            "http://bob:hunter2@example.org/a?hunter2",
            "ftp://hunter2@example.org/a",
            "https://example.org/a?token=hunter2#hunter2",
            "http://bob:hun%74er2hunter2@example.org/",
        ] {
            let uri = uri(text);
            for shown in [uri.to_string(), format!("{uri:?}"), redact(text)] {
                assert!(!shown.contains("hunter2"), "{shown}");
                assert!(shown.contains("example.org"), "{shown}");
            }
        }
        for text in [
            "sftp://bob:hunter2@example.org/a",
            "http://bob:hunter2@exa mple/a",
            "http://bob:hunter2/hunter2@host:99999999/",
            "bob:hunter2@example.org",
        ] {
            let error = text.parse::<Uri>().unwrap_err();
            assert!(!error.to_string().contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn unknown_scheme_names_the_supported_ones() {
        let error = "gopher://example.org/1".parse::<Uri>().unwrap_err();
        assert_eq!(error.code(), "unknown-scheme");
        assert_eq!(
            error.to_string(),
            "gopher://example.org/1: unknown URI scheme \"gopher\"; supported are file, ftp, http, https"
        );
        let error = "scene.pov".parse::<Uri>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "scene.pov: invalid URI: it has no scheme; supported are file, ftp, http, https"
        );
    }

    #[test]
    fn file_uris_are_of_this_host() {
        assert_eq!(
            uri("file:///a%20b/c").file_path().unwrap(),
            PathBuf::from("/a b/c")
        );
        assert_eq!(
            uri("file://localhost/a").file_path().unwrap(),
            PathBuf::from("/a")
        );
        for text in ["file://elsewhere/a", "file:///a%00b"] {
            assert_eq!(text.parse::<Uri>().unwrap_err().code(), "invalid-uri");
        }
    }

    #[test]
    fn ftp_paths() {
        assert_eq!(uri("ftp://h/d/f%23").ftp_path().unwrap(), "d/f#");
        assert_eq!(uri("ftp://h/%2Fetc/f").ftp_path().unwrap(), "/etc/f");
        assert_eq!(uri("ftp://h/f;type=i").ftp_path().unwrap(), "f");
        for text in ["ftp://h/f%0D%0ADELE%20g", "ftp://h/", "ftp://h/d/"] {
            assert_eq!(
                uri(text).ftp_path().unwrap_err().code(),
                "invalid-uri",
                "{text}"
            );
        }
        assert_eq!(
            uri("ftp://h/f;type=a").ftp_path().unwrap_err().code(),
            "unsupported"
        );
        assert_eq!(
            uri("ftp://u%40x:p%3Aw@h/f").credentials().unwrap(),
            Some(("u@x".into(), "p:w".into()))
        );
        assert!(uri("ftp://u:p%0Aw@h/f").credentials().is_err());
    }
}
