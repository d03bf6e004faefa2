//! HTTP and HTTPS: GET and PUT.

use std::convert::Infallible;

use bytes::Bytes;
use reqwest::header::{
    CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, HeaderValue, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED,
    LOCATION, RANGE,
};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, Response, StatusCode};
use tokio::sync::mpsc;

use crate::Stager;
use crate::error::{ErrorKind, tame};
use crate::inflow::{Feed, Halt, Piece};
use crate::limits::Limits;
use crate::meter::Meter;
use crate::put::Creation;
use crate::resume::{Resume, changed};
use crate::uri::{Uri, redact, redact_url};
use crate::version::Versions;

/// A redirect that the policy refuses. Travels through the HTTP client's error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refused(String);

impl Stager {
    /// The client for downloads, made once.
    pub(crate) fn fetch_client(&self) -> Result<Client, ErrorKind> {
        if let Some(client) = self.fetch_client.get() {
            return Ok(client.clone());
        }
        let redirects = self.limits.redirects;
        let client = self.client(Policy::custom(move |attempt| follow(attempt, redirects)))?;
        Ok(self.fetch_client.get_or_init(|| client).clone())
    }

    /// The client for uploads, made once. It follows no redirects: the body is gone by then.
    pub(crate) fn put_client(&self) -> Result<Client, ErrorKind> {
        if let Some(client) = self.put_client.get() {
            return Ok(client.clone());
        }
        let client = self.client(Policy::none())?;
        Ok(self.put_client.get_or_init(|| client).clone())
    }

    fn client(&self, policy: Policy) -> Result<Client, ErrorKind> {
        let Limits { connect, idle, .. } = *self.limits;
        Client::builder()
            .tls_backend_preconfigured(crate::tls::client_config(self.ca_file.as_deref())?)
            .redirect(policy)
            // The query of the first URI is no business of the second server.
            .referer(false)
            .connect_timeout(connect)
            // Ends what the client still has open with a server that no longer reads.
            .tcp_user_timeout(idle)
            .user_agent(concat!("xbed/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| ErrorKind::Connect {
                source: error.into(),
            })
    }
}

/// Follows within HTTP, and never from TLS to plain text.
fn follow(attempt: Attempt<'_>, limit: usize) -> reqwest::redirect::Action {
    if attempt.previous().len() > limit {
        return attempt.error(Refused(format!("more than {limit} redirects")));
    }
    let from = attempt.previous().last().map(|url| url.scheme().to_owned());
    match (from.as_deref(), attempt.url().scheme()) {
        (_, "https") | (Some("http"), "http") => attempt.follow(),
        (_, scheme) => {
            let reason = match scheme {
                "http" => "it leads from https to http",
                _ => "it leads to another scheme",
            };
            let target = redact_url(attempt.url());
            attempt.error(Refused(format!("{reason}: {target}")))
        }
    }
}

/// Downloads `uri` into `feed`. Goes on with further connections if one breaks (RFC 9110 section 14).
pub(crate) async fn get(
    client: &Client,
    uri: &Uri,
    limits: &Limits,
    versions: &Versions,
    feed: &Feed,
) -> Result<(), Halt> {
    let mut resume = Resume::new(limits);
    let mut version = None;
    loop {
        let halt = match get_once(client, uri, feed, versions, &mut resume, &mut version).await {
            Ok(()) => return Ok(()),
            Err(halt) => halt,
        };
        resume.again(version.is_some(), halt, &feed.meter).await?;
    }
}

/// A representation that can be recognised.
#[derive(PartialEq, Eq)]
struct Version {
    /// A strong validator: it goes into If-Range.
    validator: HeaderValue,
    total_bytes: u64,
}

impl Version {
    fn of(response: &Response, total_bytes: Option<u64>) -> Option<Self> {
        let header = |name| response.headers().get(name);
        let validator = match (header(ETAG), header(LAST_MODIFIED), header(DATE)) {
            (Some(tag), _, _) if tag.as_bytes().starts_with(b"\"") => tag,
            // A date is strong if the answer was made in a later second (RFC 9110 section 8.8.2.2).
            (None, Some(modified), Some(now)) if modified != now => modified,
            _ => return None,
        };
        Some(Self {
            validator: validator.clone(),
            total_bytes: total_bytes?,
        })
    }
}

/// One connection's part of a download. Notes the version that the first connection brings.
async fn get_once(
    client: &Client,
    uri: &Uri,
    feed: &Feed,
    versions: &Versions,
    resume: &mut Resume,
    version: &mut Option<Version>,
) -> Result<(), Halt> {
    let mut request = client.get(uri.secret().clone());
    if let Some(version) = version {
        request = request
            .header(RANGE, format!("bytes={}-", resume.received_bytes()))
            .header(IF_RANGE, &version.validator);
    } else {
        request = request.headers(versions.conditions());
    }
    let response = request.send().await.map_err(failed)?;
    if version.is_none() && versions.asked() && response.status() == StatusCode::NOT_MODIFIED {
        return Err(Halt::Failed(ErrorKind::Unchanged));
    }
    let mut response = accept(response)?;
    let partial = response.status() == StatusCode::PARTIAL_CONTENT;
    match version {
        Some(version) if partial => {
            let range = response.headers().get(CONTENT_RANGE);
            let expected = format!(
                "bytes {}-{}/{}",
                resume.received_bytes(),
                version.total_bytes.saturating_sub(1),
                version.total_bytes
            );
            if range.is_none_or(|range| range.as_bytes() != expected.as_bytes())
                || Version::of(&response, Some(version.total_bytes))
                    .is_some_and(|now| now.validator != version.validator)
            {
                return Err(changed());
            }
            resume.goes_on();
        }
        // All of it once more: the server knows no ranges, or another file.
        Some(version) => {
            if Version::of(&response, response.content_length()).as_ref() != Some(&*version) {
                return Err(changed());
            }
            resume.begins_anew();
        }
        None if partial => {
            return Err(Halt::Failed(ErrorKind::HttpStatus {
                status: response.status().as_u16(),
            }));
        }
        None => {
            if let Some(total) = response.content_length() {
                feed.meter.expect(total)?;
            }
            *version = Version::of(&response, response.content_length());
            versions.note(response.headers());
        }
    }
    feed.meter.peer_turn();
    while let Some(chunk) = response.chunk().await.map_err(failed)? {
        resume.push(feed, chunk).await?;
    }
    Ok(())
}

/// Uploads the `len` bytes from `pieces` to `uri`.
pub(crate) async fn put(
    client: &Client,
    uri: &Uri,
    creation: Creation,
    len: u64,
    mut pieces: mpsc::Receiver<Piece>,
    meter: &Meter,
) -> Result<(), ErrorKind> {
    // The client's connection may outlive this call, with a server that answers but reads no further.
    // It gets a channel of its own, so that the local source is let go whatever the server does.
    let (chunks, mut body) = mpsc::channel::<std::io::Result<Bytes>>(1);
    let body = futures::stream::poll_fn(move |context| body.poll_recv(context));
    let relay = async move {
        loop {
            let chunk = match pieces.recv().await {
                Some(Piece::Data(chunk)) => Ok(chunk),
                Some(Piece::End) => break,
                None => Err(std::io::Error::other("the source was cut off")),
            };
            if chunks.send(chunk).await.is_err() {
                break;
            }
            meter.peer_turn();
        }
        drop(chunks);
        std::future::pending::<Infallible>().await
    };
    let mut request = client
        .put(uri.secret().clone())
        .header(CONTENT_LENGTH, len)
        .body(reqwest::Body::wrap_stream(body));
    match creation {
        Creation::Overwrite => {}
        Creation::DontOverwrite => request = request.header(IF_NONE_MATCH, "*"),
        Creation::Append => {
            return Err(ErrorKind::Unsupported {
                what: "appending over HTTP",
            });
        }
    }
    let response = tokio::select! {
        response = request.send() => response.map_err(failed)?,
        never = relay => match never {},
    };
    match response.status() {
        StatusCode::PRECONDITION_FAILED if creation == Creation::DontOverwrite => {
            Err(ErrorKind::Exists)
        }
        _ => accept(response).map(|_| ()),
    }
}

/// Turns a status other than success into an error.
fn accept(response: Response) -> Result<Response, ErrorKind> {
    let status = response.status();
    let detail = || format!("HTTP status {}", status.as_u16());
    Err(match status {
        _ if status.is_success() => return Ok(response),
        StatusCode::NOT_FOUND | StatusCode::GONE => ErrorKind::NotFound { detail: detail() },
        StatusCode::UNAUTHORIZED
        | StatusCode::FORBIDDEN
        | StatusCode::PROXY_AUTHENTICATION_REQUIRED => ErrorKind::AccessDenied { detail: detail() },
        _ if status.is_redirection() => {
            let target = response
                .headers()
                .get(LOCATION)
                .map(|target| redact(&String::from_utf8_lossy(target.as_bytes())))
                .unwrap_or_default();
            ErrorKind::Redirect {
                reason: format!("{} to {target:?}", detail()),
            }
        }
        _ => ErrorKind::HttpStatus {
            status: status.as_u16(),
        },
    })
}

/// Sorts the client's errors. The URL is taken out: it is in the outer error, and redacted there.
fn failed(error: reqwest::Error) -> ErrorKind {
    let error = error.without_url();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(inner) = cause {
        if let Some(Refused(reason)) = inner.downcast_ref() {
            return ErrorKind::Redirect {
                reason: tame(reason),
            };
        }
        cause = inner.source();
    }
    match error.is_connect() {
        true => ErrorKind::Connect {
            source: error.into(),
        },
        false => ErrorKind::Transfer {
            source: error.into(),
        },
    }
}
