//! What a server says of the version of a file, by which it can be asked later whether that is still the one it has.

use std::sync::OnceLock;

use reqwest::header::{
    DATE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED,
};

/// Longest validator that is kept, bytes.
const MAX_VALIDATOR_BYTES: usize = 1024;

/// Validators of a file (RFC 9110, section 8.8), as the server wrote them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Validators {
    /// `ETag`.
    pub etag: Option<String>,
    /// `Last-Modified`, if it is a strong one: the file may have changed in the second it was sent in.
    pub last_modified: Option<String>,
}

impl Validators {
    /// There is nothing that a server could be asked.
    pub fn is_empty(&self) -> bool {
        self.etag.is_none() && self.last_modified.is_none()
    }

    fn of(headers: &HeaderMap) -> Self {
        let text = |name: HeaderName| {
            let value = headers.get(name)?.to_str().ok()?;
            (value.len() <= MAX_VALIDATOR_BYTES).then(|| value.to_owned())
        };
        let (modified, now) = (text(LAST_MODIFIED), text(DATE));
        Self {
            etag: text(ETAG),
            last_modified: modified.filter(|modified| now.is_some_and(|now| now != *modified)),
        }
    }
}

/// The version that is known before a fetch, and the one seen by it.
#[derive(Debug)]
pub(crate) struct Versions {
    known: Validators,
    seen: OnceLock<Validators>,
}

impl Versions {
    pub(crate) fn new(known: Validators) -> Self {
        Self {
            known,
            seen: OnceLock::new(),
        }
    }

    /// The server is asked whether it has another one.
    pub(crate) fn asked(&self) -> bool {
        !self.known.is_empty()
    }

    /// Headers that ask it (RFC 9110, section 13.1).
    pub(crate) fn conditions(&self) -> HeaderMap {
        let known = [
            (IF_NONE_MATCH, &self.known.etag),
            (IF_MODIFIED_SINCE, &self.known.last_modified),
        ];
        let header = |(name, value): (HeaderName, &Option<String>)| {
            let value = HeaderValue::from_str(value.as_deref()?).ok()?;
            Some((name, value))
        };
        known.into_iter().filter_map(header).collect()
    }

    /// Notes what comes with the file.
    pub(crate) fn note(&self, headers: &HeaderMap) {
        // Only the first answer is a whole one.
        let _ = self.seen.set(Validators::of(headers));
    }

    pub(crate) fn seen(self) -> Validators {
        self.seen.into_inner().unwrap_or_default()
    }
}
