//! Messages sealed for the way over a broker that nobody trusts: signed by the sender, then encrypted to the receiver, in
//! CMS (RFC 5652): `SignedData` inside `AuthEnvelopedData` (RFC 5083, AES-256-GCM), both in DER. What `openssl cms -sign
//! -nodetach -binary -outform DER` and then `openssl cms -encrypt -binary -aes-256-gcm -outform DER` make is the same.
//!
//! Certificates are exchanged once, unsealed ([`Endpoint::hello`], [`Endpoint::meet`]); a certificate is no secret, and is
//! only taken from somebody to be believed. From then on a signature must be by that certificate's key.
//!
//! A message is taken once, in the order in which it was sealed, and at most [`WINDOW_MS`] after or before the time it
//! says. What a broker drops is not noticed: that takes an answer. How far each stream has come is kept in a file and
//! written before a message is handed out, so that a restart opens nothing to replays. Messages within a connection are not
//! written down: the one that opened it is, and after a restart no connection is open.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use openssl::cms::{CMSOptions, CmsContentInfo};
use openssl::error::ErrorStack;
use openssl::pkey::{PKey, Private};
use openssl::stack::Stack;
use openssl::symm::Cipher;
use openssl::x509::{X509, X509Ref};
use uuid::Uuid;

use crate::message::{self, Body, Fault, Header, MAX_MESSAGE_BYTES, Message, Millis};
use crate::trust::{self, Role, Trust, subject};

/// A sealed message has at most so many bytes: certificate and signature are beside the message.
pub const MAX_SEALED_BYTES: usize = MAX_MESSAGE_BYTES + (64 << 10);
/// A message is refused when its time differs so much from the receiver's, milliseconds.
pub const WINDOW_MS: u64 = 300_000;
/// Whom an endpoint knows at most.
pub const MAX_PEERS: usize = 4096;
/// Streams of one sender within the window.
pub const MAX_STREAMS_OF_ONE: usize = 4096;
/// Streams of all senders within the window.
pub const MAX_STREAMS: usize = 16_384;

/// Lines of the streams' file that matter no more, before it is written anew.
const OLD_LINES: usize = 1024;

/// `id-ct-authEnvelopedData` (RFC 5083) as DER has it. Without authentication, what comes out of a decryption that was
/// tampered with would tell about the text (a padding oracle), so nothing else is decrypted.
const AUTH_ENVELOPED: &[u8] = &[
    0x06, 0x0b, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x10, 0x01, 0x17,
];

/// Why a message was refused, or cannot be sealed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Over [`MAX_SEALED_BYTES`].
    #[error("the sealed message has {0} bytes, expected at most {MAX_SEALED_BYTES}")]
    Large(usize),
    /// Not one whole `AuthEnvelopedData` in DER.
    #[error("not a sealed message, or not a whole one")]
    Form,
    /// Not encrypted to this receiver, or altered.
    #[error("the sealed message cannot be decrypted: it was altered, or is for somebody else")]
    Decrypt(#[source] ErrorStack),
    /// Not signed, or the signature says that it was altered.
    #[error("the signature is not that of {sender:?}")]
    Signature {
        /// Who is said to have signed.
        sender: String,
        /// OpenSSL's words.
        source: ErrorStack,
    },
    /// There is no `SignedData` with a message inside.
    #[error("what is inside is not signed")]
    Unsigned(#[source] ErrorStack),
    /// Not a message.
    #[error("what is inside is no message")]
    Message(#[from] message::Error),
    /// The receiver that is signed is another one.
    #[error("the message is for {0:?}")]
    Receiver(String),
    /// It is for another of those that share the receiver's certificate, or for none that shares one.
    #[error("the message is for another daemon with this certificate")]
    Member,
    /// What only daemons that share the receiver's certificate say to each other is of somebody else.
    #[error("the message is of {0:?}, not of a daemon with this certificate")]
    NotOwn(String),
    /// Nobody who was met.
    #[error("{0:?} has not shown a certificate")]
    Stranger(String),
    /// A certificate that is not believed (any more).
    #[error("not to be believed")]
    Trust(#[from] trust::Error),
    /// Outside of the window.
    #[error("the message is of {0}, more than {WINDOW_MS} ms from now")]
    Time(Millis),
    /// Replayed, or after a later one.
    #[error("message {got} of a stream that is at {last}: replayed, or out of order")]
    Order {
        /// The last one taken.
        last: u64,
        /// The one refused.
        got: u64,
    },
    /// More streams or peers than are kept.
    #[error("too many {0}")]
    Full(&'static str),
    /// A certificate is not in PEM.
    #[error("not a certificate in PEM")]
    Pem(#[source] ErrorStack),
    /// Only a certificate may come unsealed.
    #[error("a message that is not sealed, and no certificate")]
    Unsealed,
    /// The key is not that of the certificate.
    #[error("the key is not that of the certificate")]
    Key,
    /// How far the streams are cannot be kept.
    #[error("cannot keep {}", path.display())]
    Keep {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file of the streams is damaged.
    #[error("line {line} of {} is not as it was written", path.display())]
    Kept {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// OpenSSL failed.
    #[error("OpenSSL failed")]
    OpenSsl(#[from] ErrorStack),
}

impl Error {
    /// What a sender may be told.
    pub fn fault(&self) -> Fault {
        match self {
            Error::Stranger(_) | Error::Trust(_) | Error::Pem(_) => Fault::Unauthorized,
            Error::Full(_) => Fault::Busy,
            Error::Keep { .. } | Error::Kept { .. } | Error::OpenSsl(_) | Error::Key => {
                Fault::Internal
            }
            _ => Fault::Security,
        }
    }

    /// Stable: 502 for the sender, 503 for the message.
    pub fn code(&self) -> u16 {
        self.fault().code()
    }
}

/// A certificate and its key.
pub struct Identity {
    certificate: X509,
    key: PKey<Private>,
    subject: String,
}

impl Identity {
    /// Both in PEM, the key without a password.
    pub fn from_pem(certificate: &[u8], key: &[u8]) -> Result<Self, Error> {
        let certificate = X509::from_pem(certificate).map_err(Error::Pem)?;
        // Without the callback, OpenSSL would ask at the terminal for a password.
        let key = PKey::private_key_from_pem_callback(key, |_| Ok(0)).map_err(Error::Pem)?;
        if !certificate.public_key()?.public_eq(&key) {
            return Err(Error::Key);
        }
        let subject = subject(certificate.subject_name())?;
        Ok(Identity {
            certificate,
            key,
            subject,
        })
    }

    /// The certificate's subject.
    pub fn subject(&self) -> &str {
        &self.subject
    }
}

/// One end: seals what is sent, opens what comes.
pub struct Endpoint {
    identity: Identity,
    trust: Trust,
    stream: Uuid,
    member: Option<Uuid>,
    state: Mutex<State>,
}

struct State {
    sequence: u64,
    peers: HashMap<String, X509>,
    streams: Streams,
}

impl Endpoint {
    /// `streams` is the file in which the streams of others are kept; it need not exist yet. One that takes nothing but
    /// answers and what is within its own connections needs none.
    pub fn new(
        identity: Identity,
        trust: Trust,
        streams: impl Into<Option<PathBuf>>,
    ) -> Result<Self, Error> {
        Ok(Endpoint {
            identity,
            trust,
            stream: Uuid::new_v4(),
            member: None,
            state: Mutex::new(State {
                sequence: 0,
                peers: HashMap::new(),
                streams: Streams::open(streams.into())?,
            }),
        })
    }

    /// The same as one of several that share the certificate. What is not sealed to this one it refuses, so that nobody can
    /// have two of them take the same message.
    pub fn of_member(mut self, member: Uuid) -> Self {
        self.member = Some(member);
        self
    }

    /// Which one it is, of several that share the certificate.
    pub fn member(&self) -> Option<Uuid> {
        self.member
    }

    /// The message with the own certificate for somebody not met yet. It is not sealed.
    pub fn hello(&self, to: &str, answers: Option<Uuid>) -> Result<Vec<u8>, Error> {
        let pem = String::from_utf8_lossy(&self.identity.certificate.to_pem()?).into_owned();
        let mut message = self.message(to, Body::Certificate(pem), answers);
        message.header.member = self.member;
        Ok(message.to_xml()?)
    }

    /// A message, not sealed, to somebody to whom none can be sealed: a hint why.
    pub fn refusal(
        &self,
        to: &str,
        fault: Fault,
        text: String,
        answers: Option<Uuid>,
    ) -> Result<Vec<u8>, Error> {
        let body = Body::Error { fault, text };
        Ok(self.message(to, body, answers).to_xml()?)
    }

    /// The own subject.
    pub fn subject(&self) -> &str {
        self.identity.subject()
    }

    /// Takes the certificate from another's [`Endpoint::hello`], if it is to be believed; says whose it is. It replaces
    /// an older one of the same subject.
    pub fn meet(&self, hello: &[u8]) -> Result<(String, Role), Error> {
        self.try_meet(hello)
            .inspect_err(|error| log(error, "hello"))
    }

    fn try_meet(&self, hello: &[u8]) -> Result<(String, Role), Error> {
        let Body::Certificate(pem) = Message::from_xml(hello)?.body else {
            return Err(Error::Unsealed);
        };
        let certificate = X509::from_pem(pem.as_bytes()).map_err(Error::Pem)?;
        let role = self.trust.check(&certificate)?;
        let subject = subject(certificate.subject_name())?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.peers.len() == MAX_PEERS && !state.peers.contains_key(&subject) {
            return Err(Error::Full("peers"));
        }
        // A broker could bring back an older one, and its owner's messages would be refused.
        let is_newer = state
            .peers
            .get(&subject)
            .is_none_or(|known| certificate.not_before() > known.not_before());
        if is_newer {
            state.peers.insert(subject.clone(), certificate);
        }
        Ok((subject, role))
    }

    /// Seals a message to somebody who was met; to one member, if several share that certificate.
    pub fn seal(
        &self,
        to: &str,
        member: Option<Uuid>,
        body: Body,
        answers: Option<Uuid>,
    ) -> Result<Vec<u8>, Error> {
        let certificate = self.peer(to)?;
        self.trust.check(&certificate)?;
        let mut message = self.message(to, body, answers);
        message.header.member = member;
        seal_bytes(&self.identity, &certificate, &message.to_xml()?)
    }

    /// Seals a message to whoever has the own certificate and key, itself and others, for [`Endpoint::open_own`].
    pub fn seal_own(&self, body: Body, answers: Option<Uuid>) -> Result<Vec<u8>, Error> {
        let message = self.message(self.subject(), body, answers);
        seal_bytes(
            &self.identity,
            &self.identity.certificate,
            &message.to_xml()?,
        )
    }

    /// Opens what was sealed with [`Endpoint::seal_own`], however long ago, and as often as it is given: only the caller can
    /// know whether it has come before.
    pub fn open_own(&self, sealed: &[u8]) -> Result<Message, Error> {
        self.try_open_own(sealed)
            .inspect_err(|error| log(error, "message"))
    }

    fn try_open_own(&self, sealed: &[u8]) -> Result<Message, Error> {
        if sealed.len() > MAX_SEALED_BYTES {
            return Err(Error::Large(sealed.len()));
        }
        self.trust.check(&self.identity.certificate)?;
        let signed = decrypt(&self.identity, sealed)?;
        // The same key signs what members say to users, too: whom it is for counts here as well.
        let message = self.signed(&signed, &self.identity.certificate, &self.identity.subject)?;
        if message.header.from != self.identity.subject {
            return Err(Error::NotOwn(message.header.from));
        }
        Ok(message)
    }

    /// The message that a sender has signed to this receiver.
    fn signed(&self, signed: &[u8], certificate: &X509Ref, sender: &str) -> Result<Message, Error> {
        let verified = verify(signed, certificate).map_err(|source| Error::Signature {
            sender: sender.to_owned(),
            source,
        })?;
        let message = Message::from_xml(&verified)?;
        match message.header.to == self.identity.subject {
            true => Ok(message),
            false => Err(Error::Receiver(message.header.to)),
        }
    }

    pub(crate) fn message(&self, to: &str, body: Body, answers: Option<Uuid>) -> Message {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.sequence += 1;
        Message {
            header: Header {
                to: to.into(),
                from: self.identity.subject.clone(),
                id: Uuid::new_v4(),
                answers,
                time: Millis::now(),
                stream: self.stream,
                sequence: state.sequence,
                member: None,
            },
            body,
        }
    }

    fn peer(&self, name: &str) -> Result<X509, Error> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = state.peers.get(name).cloned();
        peer.ok_or_else(|| Error::Stranger(name.into()))
    }

    /// Opens a sealed message, and says what its sender may do. What is refused is logged.
    pub fn open(&self, sealed: &[u8]) -> Result<(Message, Role), Error> {
        self.open_at(sealed, Millis::now())
            .inspect_err(|error| log(error, "message"))
    }

    pub(crate) fn open_at(&self, sealed: &[u8], now: Millis) -> Result<(Message, Role), Error> {
        if sealed.len() > MAX_SEALED_BYTES {
            return Err(Error::Large(sealed.len()));
        }
        let signed = decrypt(&self.identity, sealed)?;
        // First without a look at the signature, to learn whose it should be. Nothing else is made of this.
        let sender = Message::from_xml(&content(&signed)?)?.header.from;
        let certificate = self.peer(&sender)?;
        let role = self.trust.check(&certificate)?;
        let message = self.signed(&signed, &certificate, &sender)?;
        let header = &message.header;
        if header.member != self.member {
            return Err(Error::Member);
        }
        if header.time.get().abs_diff(now.get()) > WINDOW_MS {
            return Err(Error::Time(header.time));
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let is_kept = message.body.within().is_none();
        state.streams.take(header, now, is_kept)?;
        drop(state);
        Ok((message, role))
    }
}

fn log(error: &Error, what: &str) {
    let mut causes = String::new();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        // A String takes everything.
        let _ = write!(causes, ": {cause}");
        source = cause.source();
    }
    tracing::warn!(code = error.code(), "{what} refused: {error}{causes}");
}

pub(crate) fn seal_bytes(from: &Identity, to: &X509Ref, xml: &[u8]) -> Result<Vec<u8>, Error> {
    let flags = CMSOptions::BINARY | CMSOptions::NOSMIMECAP;
    let signed = CmsContentInfo::sign(
        Some(&from.certificate),
        Some(&from.key),
        None,
        Some(xml),
        flags,
    )?;
    let mut to_all = Stack::new()?;
    to_all.push(to.to_owned())?;
    let sealed = CmsContentInfo::encrypt(
        &to_all,
        &signed.to_der()?,
        Cipher::aes_256_gcm(),
        CMSOptions::BINARY,
    )?;
    Ok(sealed.to_der()?)
}

pub(crate) fn decrypt(to: &Identity, sealed: &[u8]) -> Result<Vec<u8>, Error> {
    let inner = der_sequence(sealed).ok_or(Error::Form)?;
    if !inner.starts_with(AUTH_ENVELOPED) {
        return Err(Error::Form);
    }
    let cms = CmsContentInfo::from_der(sealed).map_err(|_| Error::Form)?;
    cms.decrypt(&to.key, &to.certificate)
        .map_err(Error::Decrypt)
}

/// What is in a sequence in DER that is all there is: nothing is missing, nothing follows.
fn der_sequence(bytes: &[u8]) -> Option<&[u8]> {
    let (&[tag, first], rest) = bytes.split_first_chunk()?;
    let (length, inner) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (length, inner) = rest.split_at_checked(usize::from(first & 0x7f))?;
            let length = length.iter().fold(0, |sum, &b| (sum << 8) | usize::from(b));
            (length, inner)
        }
        _ => return None,
    };
    (tag == 0x30 && inner.len() == length).then_some(inner)
}

/// The content of `SignedData`, whoever signed it.
fn content(signed: &[u8]) -> Result<Vec<u8>, Error> {
    der_sequence(signed).ok_or(Error::Form)?;
    let mut content = Vec::new();
    let flags = CMSOptions::BINARY
        | CMSOptions::NO_SIGNER_CERT_VERIFY
        | CMSOptions::NO_CONTENT_VERIFY
        | CMSOptions::NOSIGS;
    CmsContentInfo::from_der(signed)
        .and_then(|mut cms| cms.verify(None, None, None, Some(&mut content), flags))
        .map_err(Error::Unsigned)?;
    Ok(content)
}

/// The content of `SignedData`, if all who signed it are the one with the certificate. The certificates inside are not
/// looked at; [`Trust`] has looked at this one.
///
/// It is parsed again: OpenSSL would keep the signer that [`content`] let it find.
fn verify(signed: &[u8], certificate: &X509Ref) -> Result<Vec<u8>, ErrorStack> {
    let mut signers = Stack::new()?;
    signers.push(certificate.to_owned())?;
    let mut content = Vec::new();
    let flags = CMSOptions::BINARY | CMSOptions::NOINTERN | CMSOptions::NO_SIGNER_CERT_VERIFY;
    CmsContentInfo::from_der(signed)?.verify(
        Some(&signers),
        None,
        None,
        Some(&mut content),
        flags,
    )?;
    Ok(content)
}

/// How far the streams of others have come. The file has a line for each step; the last of a stream counts.
struct Streams {
    file: Option<Kept>,
    at: HashMap<(String, Uuid), At>,
}

struct Kept {
    path: PathBuf,
    file: File,
    lines: usize,
    /// Its last line may be half a one.
    torn: bool,
}

#[derive(Clone, Copy)]
struct At {
    sequence: u64,
    /// The latest time in the stream: after the window no message of it is taken anyhow.
    latest_ms: u64,
}

impl Streams {
    fn open(path: Option<PathBuf>) -> Result<Self, Error> {
        let mut at = HashMap::new();
        let Some(path) = path else {
            return Ok(Streams { file: None, at });
        };
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(Error::Keep { path, source }),
        };
        // A line that was not written to its end was not acted upon.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        for (n, line) in text[..whole].lines().enumerate() {
            let mut words = line.splitn(4, ' ');
            let mut parse = || {
                let stream = words.next()?.parse().ok()?;
                let sequence = words.next()?.parse().ok()?;
                let latest_ms = words.next()?.parse().ok()?;
                let key = (words.next()?.to_owned(), stream);
                Some((
                    key,
                    At {
                        sequence,
                        latest_ms,
                    },
                ))
            };
            let Some((key, entry)) = parse() else {
                return Err(Error::Kept { path, line: n + 1 });
            };
            at.insert(key, entry);
        }
        match write_all(&path, &at) {
            Ok(file) => {
                let kept = Kept {
                    path,
                    file,
                    lines: at.len(),
                    torn: false,
                };
                Ok(Streams {
                    file: Some(kept),
                    at,
                })
            }
            Err(source) => Err(Error::Keep { path, source }),
        }
    }

    /// Takes a message's place in its stream, or refuses it; then nothing has changed.
    fn take(&mut self, header: &Header, now: Millis, is_kept: bool) -> Result<(), Error> {
        let key = (header.from.clone(), header.stream);
        let old = self.at.get(&key).copied();
        let last = old.map_or(0, |at| at.sequence);
        if header.sequence <= last {
            return Err(Error::Order {
                last,
                got: header.sequence,
            });
        }
        if old.is_none() {
            self.at
                .retain(|_, at| at.latest_ms.saturating_add(WINDOW_MS) >= now.get());
            let of_one = self.at.keys().filter(|(from, _)| *from == header.from);
            if of_one.count() >= MAX_STREAMS_OF_ONE || self.at.len() >= MAX_STREAMS {
                return Err(Error::Full("streams"));
            }
        }
        let new = At {
            sequence: header.sequence,
            latest_ms: header.time.get().max(old.map_or(0, |at| at.latest_ms)),
        };
        self.at.insert(key.clone(), new);
        let (true, Some(kept)) = (is_kept, &mut self.file) else {
            return Ok(());
        };
        kept.save(&key, &self.at).map_err(|source| {
            match old {
                Some(old) => self.at.insert(key, old),
                None => self.at.remove(&key),
            };
            Error::Keep {
                path: kept.path.clone(),
                source,
            }
        })
    }
}

impl Kept {
    /// Adds the stream's line, or writes the file anew when most of it is old. On the disk on return.
    fn save(&mut self, key: &(String, Uuid), at: &HashMap<(String, Uuid), At>) -> io::Result<()> {
        if self.torn || self.lines > at.len() + OLD_LINES {
            self.file = write_all(&self.path, at)?;
            (self.lines, self.torn) = (at.len(), false);
            return Ok(());
        }
        let mut text = String::new();
        if let Some(entry) = at.get(key) {
            put_line(&mut text, key, entry);
        }
        self.torn = true;
        self.file.write_all(text.as_bytes())?;
        self.file.sync_data()?;
        (self.lines, self.torn) = (self.lines + 1, false);
        Ok(())
    }
}

fn put_line(text: &mut String, (from, stream): &(String, Uuid), at: &At) {
    // A String takes everything.
    let _ = writeln!(text, "{stream} {} {} {from}", at.sequence, at.latest_ms);
}

/// Writes the file as a whole, and opens it for more.
fn write_all(path: &Path, at: &HashMap<(String, Uuid), At>) -> io::Result<File> {
    let mut text = String::new();
    for (key, entry) in at {
        put_line(&mut text, key, entry);
    }
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    let file = file.persist(path).map_err(|error| error.error)?;
    File::open(dir)?.sync_all()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(from: &str, stream: u128, sequence: u64, time: u64) -> Header {
        Header {
            to: String::new(),
            from: from.into(),
            id: Uuid::from_u128(0),
            answers: None,
            time: Millis::new(time).unwrap(),
            stream: Uuid::from_u128(stream),
            sequence,
            member: None,
        }
    }

    #[test]
    fn streams_are_kept_as_long_as_they_matter_and_no_longer() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("streams");
        let mut streams = Streams::open(Some(file.clone())).unwrap();
        let now = Millis::new(1_000_000).unwrap();
        let most = MAX_STREAMS_OF_ONE as u128;
        for stream in 0..most {
            let header = header("CN=a b", stream, 7, now.get());
            streams.take(&header, now, true).unwrap();
        }
        let one_more = header("CN=a b", most, 1, now.get());
        let error = streams.take(&one_more, now, true).unwrap_err();
        assert!(matches!(error, Error::Full("streams")), "{error}");
        let other = header("CN=c", most, 1, now.get());
        streams.take(&other, now, true).unwrap();

        let mut streams = Streams::open(Some(file.clone())).unwrap();
        assert_eq!(streams.at.len(), MAX_STREAMS_OF_ONE + 1);
        let again = header("CN=a b", 0, 7, now.get());
        let error = streams.take(&again, now, true).unwrap_err();
        assert!(matches!(error, Error::Order { last: 7, got: 7 }), "{error}");
        let end = Millis::new(now.get() + WINDOW_MS).unwrap();
        assert!(streams.take(&again, end, true).is_err());
        let later = Millis::new(end.get() + 1).unwrap();
        let one_more = header("CN=a b", most, 1, later.get());
        streams.take(&one_more, later, true).unwrap();
        assert_eq!(streams.at.len(), 1);

        // Half a line was not acted upon; what was kept is not lost by it, nor by what comes after it.
        let mut text = std::fs::read_to_string(&file).unwrap();
        text.push_str("half a li");
        std::fs::write(&file, text).unwrap();
        let mut streams = Streams::open(Some(file.clone())).unwrap();
        assert_eq!(streams.at.len(), 1);
        for sequence in 2..(2 * OLD_LINES as u64) {
            let step = header("CN=a b", most, sequence, later.get());
            streams
                .take(&step, later, sequence < 5 || sequence % 2 == 0)
                .unwrap();
        }
        let lines = std::fs::read_to_string(&file).unwrap().lines().count();
        assert!(lines <= OLD_LINES + 2, "{lines}");
        let mut streams = Streams::open(Some(file.clone())).unwrap();
        // The last one was not to be kept.
        let last = 2 * OLD_LINES as u64 - 1;
        let before = header("CN=a b", most, last - 1, later.get());
        assert!(streams.take(&before, later, true).is_err());
        let last = header("CN=a b", most, last, later.get());
        streams.take(&last, later, true).unwrap();

        std::fs::write(&file, "not a stream\n").unwrap();
        assert!(matches!(
            Streams::open(Some(file)),
            Err(Error::Kept { line: 1, .. })
        ));
    }
}
