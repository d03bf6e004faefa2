//! A client of Xen's configuration store (`docs/misc/xenstore.txt` and `io/xs_wire.h` of Xen).
//!
//! Requests wait for their reply, for at most [`REPLY_LIMIT_MS`]; watch events that come meanwhile
//! are kept for [`Xenstore::next_event`], which never waits.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl, open};
use rustix::io::{Errno, read, write};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect as connect_socket, socket_with,
};

/// The kernel's way to the store, in every domain.
pub(crate) const DEVICE: &str = "/dev/xen/xenbus";
/// The daemon's own socket, where it runs in this domain.
const SOCKET: &str = "/run/xenstored/socket";

/// The longest payload of a message, in bytes (`XENSTORE_PAYLOAD_MAX`).
pub const MAX_PAYLOAD_BYTES: usize = 4096;
/// How long a reply may take, in milliseconds.
pub const REPLY_LIMIT_MS: u64 = 10_000;
/// How often a transaction is tried that others' changes keep from being committed.
pub const MAX_TRANSACTION_TRIES: u32 = 32;
/// Events kept. When so many wait, one of a token stands for all of that token.
const MAX_EVENTS: usize = 256;
const HEADER_BYTES: usize = 16;

/// Kinds of messages (`enum xsd_sockmsg_type`).
mod kind {
    pub(super) const DIRECTORY: u32 = 1;
    pub(super) const READ: u32 = 2;
    pub(super) const WATCH: u32 = 4;
    pub(super) const UNWATCH: u32 = 5;
    pub(super) const TRANSACTION_START: u32 = 6;
    pub(super) const TRANSACTION_END: u32 = 7;
    pub(super) const WRITE: u32 = 11;
    pub(super) const MKDIR: u32 = 12;
    pub(super) const RM: u32 = 13;
    pub(super) const SET_PERMS: u32 = 14;
    pub(super) const WATCH_EVENT: u32 = 15;
    pub(super) const ERROR: u32 = 16;
}

/// Why the store did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no way to the store: not a Xen domain, or not with enough rights.
    #[error("cannot open {DEVICE}, and no daemon listens at {SOCKET}: is this a Xen domain?")]
    Unavailable(#[source] io::Error),
    /// The connection does not work any more.
    #[error("the connection to xenstore failed")]
    Io(#[from] io::Error),
    /// The store said no.
    #[error("xenstore refuses {operation} of {path:?}: {reason}")]
    Refused {
        /// What was asked for.
        operation: &'static str,
        /// Of which path.
        path: String,
        /// The error's name, as `EACCES`.
        reason: String,
    },
    /// The path or the value cannot be sent: too long, or a NUL in a path.
    #[error(
        "xenstore cannot take {path:?}: a NUL in it, or it and its value are longer than {MAX_PAYLOAD_BYTES} bytes"
    )]
    Unsendable {
        /// The path.
        path: String,
    },
    /// What came is no message of this protocol, or no text.
    #[error("xenstore sent something malformed")]
    Malformed,
    /// No reply came in time.
    #[error("xenstore has not answered for {} s", REPLY_LIMIT_MS / 1000)]
    TimedOut,
    /// Others changed what a transaction had read, every time.
    #[error("a xenstore transaction was overtaken {MAX_TRANSACTION_TRIES} times")]
    Contended,
}

impl Error {
    /// The error's stable name.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Unavailable(_) => "xenstore-unavailable",
            Error::Io(_) => "xenstore-io",
            Error::Refused { .. } => "xenstore-refused",
            Error::Unsendable { .. } => "xenstore-unsendable",
            Error::Malformed => "xenstore-malformed",
            Error::TimedOut => "xenstore-timed-out",
            Error::Contended => "xenstore-contended",
        }
    }

    fn is_refusal(&self, name: &str) -> bool {
        matches!(self, Error::Refused { reason, .. } if reason == name)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = match &error {
            Error::Unavailable(source) | Error::Io(source) => source.kind(),
            Error::TimedOut => io::ErrorKind::TimedOut,
            Error::Malformed => io::ErrorKind::InvalidData,
            _ => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

/// What a domain may do with a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing.
    None,
    /// Read.
    Read,
    /// Write.
    Write,
    /// Read and write.
    Both,
}

/// A change at a watched path or below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WatchEvent {
    /// The path that changed: relative where the watch's was.
    pub path: String,
    /// The watch's token.
    pub token: String,
}

/// A connection to the store. Paths that do not begin with `/` or `@` are below the domain's own.
#[derive(Debug)]
pub struct Xenstore {
    fd: OwnedFd,
    input: Vec<u8>,
    events: VecDeque<WatchEvent>,
    last_request: u32,
    /// 0 outside of transactions.
    transaction: u32,
}

/// A message that has come.
struct Message {
    kind: u32,
    request: u32,
    payload: Vec<u8>,
}

impl Xenstore {
    /// Connects.
    ///
    /// # Errors
    /// [`Error::Unavailable`].
    pub fn open() -> Result<Xenstore, Error> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
        open(DEVICE, flags, Mode::empty())
            .or_else(|error| daemon().map_err(|_| error))
            .map(Xenstore::over)
            .map_err(|error| Error::Unavailable(error.into()))
    }

    /// Over a stream that is non-blocking.
    fn over(fd: OwnedFd) -> Xenstore {
        Xenstore {
            fd,
            input: Vec::new(),
            events: VecDeque::new(),
            last_request: 0,
            transaction: 0,
        }
    }

    /// The value of a node; `None` where it is not there.
    ///
    /// # Errors
    /// [`Error::Malformed`] for a value that is not UTF-8, and any other but [`Error::Contended`].
    pub fn read(&mut self, path: &str) -> Result<Option<String>, Error> {
        match self.request(kind::READ, "reading", path, &[]) {
            Ok(value) => String::from_utf8(value)
                .map(Some)
                .map_err(|_| Error::Malformed),
            Err(error) if error.is_refusal("ENOENT") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets the value of a node, which is made, with those above it, where it is not there.
    ///
    /// # Errors
    /// Any but [`Error::Contended`].
    pub fn write(&mut self, path: &str, value: &str) -> Result<(), Error> {
        self.request(kind::WRITE, "writing", path, value.as_bytes())
            .map(drop)
    }

    /// Makes a node without a value, with those above it, where it is not there.
    ///
    /// # Errors
    /// Any but [`Error::Contended`].
    pub fn mkdir(&mut self, path: &str) -> Result<(), Error> {
        self.request(kind::MKDIR, "making", path, &[]).map(drop)
    }

    /// Removes a node and all below it. That there is none is no error.
    ///
    /// # Errors
    /// Any but [`Error::Contended`].
    pub fn remove(&mut self, path: &str) -> Result<(), Error> {
        match self.request(kind::RM, "removing", path, &[]) {
            Err(error) if error.is_refusal("ENOENT") => Ok(()),
            result => result.map(drop),
        }
    }

    /// The names of the nodes right below; `None` where there is no such node.
    ///
    /// # Errors
    /// Refused with `E2BIG` where they are more than [`MAX_PAYLOAD_BYTES`], and any other but
    /// [`Error::Contended`].
    pub fn list(&mut self, path: &str) -> Result<Option<Vec<String>>, Error> {
        match self.request(kind::DIRECTORY, "listing", path, &[]) {
            Ok(names) => texts(&names).map(Some),
            Err(error) if error.is_refusal("ENOENT") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets who may do what with a node: its owner and what everybody else may do, then single
    /// domains.
    ///
    /// # Errors
    /// Any but [`Error::Contended`].
    pub fn set_permissions(
        &mut self,
        path: &str,
        owner: (u16, Access),
        others: &[(u16, Access)],
    ) -> Result<(), Error> {
        let mut list = String::new();
        for (domain, access) in std::iter::once(&owner).chain(others) {
            let letter = match access {
                Access::None => 'n',
                Access::Read => 'r',
                Access::Write => 'w',
                Access::Both => 'b',
            };
            list.push_str(&format!("{letter}{domain}\0"));
        }
        self.request(
            kind::SET_PERMS,
            "setting permissions",
            path,
            list.as_bytes(),
        )
        .map(drop)
    }

    /// Does all of `work` or nothing of it, as seen by others. `work` is called again where others
    /// got in between.
    ///
    /// # Errors
    /// What `work` says, and any of the store's. Nothing has changed then.
    pub fn transaction<T, E: From<Error>>(
        &mut self,
        mut work: impl FnMut(&mut Xenstore) -> Result<T, E>,
    ) -> Result<T, E> {
        for _ in 0..MAX_TRANSACTION_TRIES {
            let id = self.request(kind::TRANSACTION_START, "a transaction", "", &[])?;
            self.transaction = texts(&id)?
                .first()
                .and_then(|id| id.parse().ok())
                .ok_or(Error::Malformed)?;
            let result = work(self);
            let verdict = if result.is_ok() { "T" } else { "F" };
            let ended = self.request(kind::TRANSACTION_END, "a transaction", verdict, &[]);
            self.transaction = 0;
            match (result, ended) {
                (Ok(_), Err(error)) if error.is_refusal("EAGAIN") => {}
                (Ok(_), Err(error)) => return Err(error.into()),
                (result, _) => return result,
            }
        }
        Err(Error::Contended.into())
    }

    /// Asks for events of `path` and all below it. The first comes at once.
    ///
    /// # Errors
    /// Any but [`Error::Contended`].
    pub fn watch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        self.request(kind::WATCH, "watching", path, &terminated(token))
            .map(drop)
    }

    /// Wants no more events of `path`. Those that have come stay.
    ///
    /// # Errors
    /// Any but [`Error::Contended`].
    pub fn unwatch(&mut self, path: &str, token: &str) -> Result<(), Error> {
        self.request(kind::UNWATCH, "not watching", path, &terminated(token))
            .map(drop)
    }

    /// The next event, if one has come. The descriptor says when to look, but only after this has
    /// said `None`. Equal events that wait are one.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`].
    pub fn next_event(&mut self) -> Result<Option<WatchEvent>, Error> {
        while self.events.is_empty() {
            match self.next_message()? {
                // A reply that nobody waits for any more.
                Some(message) if message.kind != kind::WATCH_EVENT => {}
                Some(event) => self.keep(&event.payload)?,
                None => return Ok(None),
            }
        }
        Ok(self.events.pop_front())
    }

    fn keep(&mut self, payload: &[u8]) -> Result<(), Error> {
        let mut words = texts(payload)?.into_iter();
        let (Some(path), Some(token)) = (words.next(), words.next()) else {
            return Err(Error::Malformed);
        };
        let full = self.events.len() >= MAX_EVENTS;
        let event = WatchEvent { path, token };
        let known = |kept: &WatchEvent| *kept == event || full && kept.token == event.token;
        if !self.events.iter().any(known) {
            self.events.push_back(event);
        }
        Ok(())
    }

    /// Sends `path`, a NUL and `rest`, and waits for the reply.
    fn request(
        &mut self,
        kind: u32,
        operation: &'static str,
        path: &str,
        rest: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let length = path.len() + 1 + rest.len();
        if length > MAX_PAYLOAD_BYTES || path.contains('\0') {
            return Err(Error::Unsendable { path: path.into() });
        }
        self.last_request = self.last_request.wrapping_add(1);
        let transaction = match kind {
            // Watches are outside of transactions.
            kind::WATCH | kind::UNWATCH => 0,
            _ => self.transaction,
        };
        let mut message = Vec::with_capacity(HEADER_BYTES + length);
        for word in [kind, self.last_request, transaction, length as u32] {
            message.extend_from_slice(&word.to_le_bytes());
        }
        message.extend_from_slice(path.as_bytes());
        message.push(0);
        message.extend_from_slice(rest);

        let deadline = Instant::now() + Duration::from_millis(REPLY_LIMIT_MS);
        self.send(&message, deadline)?;
        let reply = loop {
            match self.next_message()? {
                Some(event) if event.kind == kind::WATCH_EVENT => self.keep(&event.payload)?,
                Some(reply) if reply.request == self.last_request => break reply,
                // The reply to a request that was given up.
                Some(_) => {}
                None => self.wait(PollFlags::IN, deadline)?,
            }
        };
        match reply.kind {
            kind::ERROR => Err(Error::Refused {
                operation,
                path: path.into(),
                reason: texts(&reply.payload)?
                    .into_iter()
                    .next()
                    .unwrap_or_default(),
            }),
            answered if answered == kind => Ok(reply.payload),
            _ => Err(Error::Malformed),
        }
    }

    fn send(&mut self, mut bytes: &[u8], deadline: Instant) -> Result<(), Error> {
        while !bytes.is_empty() {
            match write(&self.fd, bytes) {
                Ok(length) => bytes = &bytes[length..],
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, deadline)?,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
        Ok(())
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), Error> {
        let rest = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: rest.as_secs() as i64,
            tv_nsec: rest.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.fd, flags)], Some(&timeout)) {
            Ok(0) => Err(Error::TimedOut),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(Error::Io(error.into())),
        }
    }

    /// The next message, if it has come as a whole.
    fn next_message(&mut self) -> Result<Option<Message>, Error> {
        loop {
            if let Some(header) = self.input.first_chunk::<HEADER_BYTES>() {
                let word = |at: usize| {
                    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
                };
                let (kind, request, length) = (word(0), word(4), word(12) as usize);
                if length > MAX_PAYLOAD_BYTES {
                    return Err(Error::Malformed);
                }
                let end = HEADER_BYTES + length;
                if self.input.len() >= end {
                    let payload = self.input[HEADER_BYTES..end].to_vec();
                    self.input.drain(..end);
                    return Ok(Some(Message {
                        kind,
                        request,
                        payload,
                    }));
                }
            }
            let mut chunk = [0; HEADER_BYTES + MAX_PAYLOAD_BYTES];
            match read(&self.fd, &mut chunk) {
                Ok(0) => return Err(Error::Io(io::ErrorKind::UnexpectedEof.into())),
                Ok(length) => self.input.extend_from_slice(&chunk[..length]),
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::Io(error.into())),
            }
        }
    }
}

impl AsFd for Xenstore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn daemon() -> Result<OwnedFd, Errno> {
    let fd = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    connect_socket(&fd, &SocketAddrUnix::new(SOCKET)?)?;
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

fn terminated(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

/// The texts of a payload, each of which a NUL ends.
fn texts(payload: &[u8]) -> Result<Vec<String>, Error> {
    let payload = payload.strip_suffix(b"\0").unwrap_or(payload);
    if payload.is_empty() {
        return Ok(Vec::new());
    }
    payload
        .split(|byte| *byte == 0)
        .map(|text| String::from_utf8(text.to_vec()).map_err(|_| Error::Malformed))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    /// A store with the wire format of `io/xs_wire.h`, for one connection.
    #[derive(Default)]
    struct Daemon {
        nodes: BTreeMap<String, Vec<u8>>,
        permissions: BTreeMap<String, String>,
        watches: Vec<(String, String)>,
        /// What each transaction under way would leave.
        transactions: BTreeMap<u32, BTreeMap<String, Vec<u8>>>,
        last_transaction: u32,
        /// So many commits are refused yet.
        conflicts: u32,
    }

    fn message(kind: u32, request: u32, transaction: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [kind, request, transaction, payload.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(payload);
        bytes
    }

    impl Daemon {
        /// Serves until the client has gone; gives what is left.
        fn run(mut self, mut stream: UnixStream) -> Daemon {
            let mut header = [0; 16];
            while stream.read_exact(&mut header).is_ok() {
                let word =
                    |at: usize| u32::from_le_bytes(header[4 * at..4 * at + 4].try_into().unwrap());
                let (kind, request, transaction) = (word(0), word(1), word(2));
                let mut payload = vec![0; word(3) as usize];
                stream.read_exact(&mut payload).unwrap();
                let mut events = Vec::new();
                let reply = self.answer(kind, transaction, &payload, &mut events);
                let bytes = match reply {
                    Ok(value) => message(kind, request, transaction, &value),
                    Err(name) => {
                        let text = format!("{name}\0");
                        message(kind::ERROR, request, transaction, text.as_bytes())
                    }
                };
                // Events first, a reply that nobody has asked for, and all of it in pieces.
                let mut out: Vec<u8> = events
                    .iter()
                    .flat_map(|(path, token)| {
                        let text = format!("{path}\0{token}\0");
                        message(kind::WATCH_EVENT, 0, 0, text.as_bytes())
                    })
                    .collect();
                out.extend(message(kind::READ, request.wrapping_sub(1), 0, b"late"));
                out.extend(bytes);
                for piece in out.chunks(11) {
                    stream.write_all(piece).unwrap();
                }
            }
            self
        }

        fn answer(
            &mut self,
            kind: u32,
            transaction: u32,
            payload: &[u8],
            events: &mut Vec<(String, String)>,
        ) -> Result<Vec<u8>, &'static str> {
            let end = payload.iter().position(|byte| *byte == 0).unwrap();
            let path = String::from_utf8(payload[..end].to_vec()).unwrap();
            let rest = &payload[end + 1..];
            let ok = || Ok(b"OK\0".to_vec());
            if kind == kind::TRANSACTION_END {
                let nodes = self.transactions.remove(&transaction).ok_or("ENOENT")?;
                if path == "T" {
                    if self.conflicts > 0 {
                        self.conflicts -= 1;
                        return Err("EAGAIN");
                    }
                    self.nodes = nodes;
                }
                return ok();
            }
            let nodes = match transaction {
                0 => &mut self.nodes,
                id => self.transactions.get_mut(&id).ok_or("EINVAL")?,
            };
            match kind {
                kind::READ => nodes.get(&path).cloned().ok_or("ENOENT"),
                kind::WRITE | kind::MKDIR => {
                    if path.starts_with("locked") {
                        return Err("EACCES");
                    }
                    nodes.insert(path.clone(), rest.to_vec());
                    events.extend(
                        (self.watches.iter())
                            .filter(|(watched, _)| path.starts_with(watched))
                            .map(|(_, token)| (path.clone(), token.clone())),
                    );
                    ok()
                }
                kind::RM => {
                    let before = nodes.len();
                    nodes.retain(|node, _| !node.starts_with(&path));
                    if nodes.len() == before {
                        Err("ENOENT")
                    } else {
                        ok()
                    }
                }
                kind::DIRECTORY => {
                    let prefix = format!("{path}/");
                    let names: String = nodes
                        .keys()
                        .filter_map(|node| node.strip_prefix(&prefix))
                        .map(|name| format!("{name}\0"))
                        .collect();
                    let there = !names.is_empty() || nodes.contains_key(&path);
                    there.then_some(names.into_bytes()).ok_or("ENOENT")
                }
                kind::SET_PERMS => {
                    let text = String::from_utf8(rest.to_vec()).unwrap();
                    self.permissions.insert(path, text);
                    ok()
                }
                kind::WATCH => {
                    let token = rest.strip_suffix(b"\0").unwrap();
                    let token = String::from_utf8(token.to_vec()).unwrap();
                    self.watches.push((path.clone(), token.clone()));
                    events.push((path, token));
                    ok()
                }
                kind::UNWATCH => {
                    self.watches.retain(|(watched, _)| *watched != path);
                    ok()
                }
                kind::TRANSACTION_START => {
                    self.last_transaction += 1;
                    let id = self.last_transaction;
                    self.transactions.insert(id, self.nodes.clone());
                    Ok(format!("{id}\0").into_bytes())
                }
                _ => Err("EINVAL"),
            }
        }
    }

    /// Talks to a daemon; gives what the daemon has in the end.
    fn with(daemon: Daemon, work: impl FnOnce(&mut Xenstore)) -> Daemon {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let served = thread::spawn(|| daemon.run(theirs));
        let mut store = Xenstore::over(ours.into());
        work(&mut store);
        drop(store);
        served.join().unwrap()
    }

    #[test]
    fn values_names_and_permissions() {
        let daemon = with(Daemon::default(), |store| {
            assert_eq!(store.read("a/b").unwrap(), None);
            store.write("a/b", "1").unwrap();
            store.write("a/c", "").unwrap();
            store.mkdir("a/d").unwrap();
            assert_eq!(store.read("a/b").unwrap().as_deref(), Some("1"));
            assert_eq!(store.read("a/c").unwrap().as_deref(), Some(""));
            assert_eq!(store.list("a").unwrap().unwrap(), ["b", "c", "d"]);
            assert_eq!(store.list("a/c").unwrap().unwrap(), [""; 0]);
            assert_eq!(store.list("x").unwrap(), None);
            store.remove("a/b").unwrap();
            store.remove("a/b").unwrap();
            assert_eq!(store.read("a/b").unwrap(), None);
            store
                .set_permissions("a/c", (5, Access::None), &[(0, Access::Read)])
                .unwrap();
            let error = store.write("locked", "1").unwrap_err();
            assert_eq!(error.code(), "xenstore-refused");
            assert!(error.to_string().contains("EACCES"), "{error}");
        });
        assert_eq!(daemon.permissions["a/c"], "n5\0r0\0");
    }

    #[test]
    fn what_cannot_be_sent_is_refused_before() {
        with(Daemon::default(), |store| {
            for (path, value) in [("a\0b", ""), ("a", &*"x".repeat(MAX_PAYLOAD_BYTES - 1))] {
                let error = store.write(path, value).unwrap_err();
                assert_eq!(error.code(), "xenstore-unsendable");
            }
            let longest = "x".repeat(MAX_PAYLOAD_BYTES - 2);
            store.write("a", &longest).unwrap();
            assert_eq!(store.read("a").unwrap().unwrap(), longest);
        });
    }

    #[test]
    fn a_transaction_is_tried_again_but_not_for_ever() {
        let overtaken = |conflicts| Daemon {
            conflicts,
            ..Daemon::default()
        };
        let mut tries = 0;
        let daemon = with(overtaken(3), |store| {
            let result: Result<u32, Error> = store.transaction(|store| {
                tries += 1;
                store.write("t", &tries.to_string())?;
                Ok(tries)
            });
            assert_eq!(result.unwrap(), 4);
        });
        assert_eq!(daemon.nodes["t"], b"4");

        let daemon = with(overtaken(u32::MAX), |store| {
            let result: Result<(), Error> = store.transaction(|store| store.write("t", "x"));
            assert_eq!(result.unwrap_err().code(), "xenstore-contended");
            assert_eq!(store.read("t").unwrap(), None);
        });
        assert!(daemon.transactions.is_empty(), "one was left open");
    }

    #[test]
    fn a_transaction_whose_work_fails_changes_nothing() {
        let daemon = with(Daemon::default(), |store| {
            let result: Result<(), Error> = store.transaction(|store| {
                store.write("t", "x")?;
                store.write("locked", "x")
            });
            assert_eq!(result.unwrap_err().code(), "xenstore-refused");
        });
        assert!(daemon.nodes.is_empty() && daemon.transactions.is_empty());
    }

    #[test]
    fn events_that_come_before_a_reply_are_kept() {
        with(Daemon::default(), |store| {
            store.watch("w", "token").unwrap();
            store.write("w/1", "").unwrap();
            store.write("w/1", "").unwrap();
            store.write("w/2", "").unwrap();
            let mut paths = Vec::new();
            while let Some(event) = store.next_event().unwrap() {
                assert_eq!(event.token, "token");
                paths.push(event.path);
            }
            assert_eq!(paths, ["w", "w/1", "w/2"]);
            store.unwatch("w", "token").unwrap();
            store.write("w/3", "").unwrap();
            assert_eq!(store.next_event().unwrap(), None);
        });
    }

    #[test]
    fn however_many_events_come_memory_is_bounded_and_every_watch_heard() {
        with(Daemon::default(), |store| {
            store.watch("flood", "1").unwrap();
            for number in 0..2 * MAX_EVENTS {
                store.write(&format!("flood/{number}"), "").unwrap();
            }
            store.watch("quiet", "2").unwrap();
            assert_eq!(store.events.len(), MAX_EVENTS + 1);
            assert_eq!(store.events.back().unwrap().token, "2");
        });
    }

    #[test]
    fn a_daemon_that_breaks_the_protocol_is_an_error() {
        let answered = |bytes: &[u8]| {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            ours.set_nonblocking(true).unwrap();
            theirs.write_all(bytes).unwrap();
            let mut store = Xenstore::over(ours.into());
            store.read("a").unwrap_err().code()
        };
        let too_long = message(kind::READ, 1, 0, &vec![0; MAX_PAYLOAD_BYTES + 1]);
        assert_eq!(answered(&too_long), "xenstore-malformed");
        assert_eq!(
            answered(&message(kind::WRITE, 1, 0, b"OK\0")),
            "xenstore-malformed"
        );
        assert_eq!(
            answered(&message(kind::WATCH_EVENT, 0, 0, b"only-a-path\0")),
            "xenstore-malformed"
        );
        assert_eq!(
            answered(&message(kind::READ, 1, 0, &[0xff])),
            "xenstore-malformed"
        );
    }

    #[test]
    fn a_daemon_that_hangs_up_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        drop(theirs);
        let mut store = Xenstore::over(ours.into());
        assert_eq!(store.read("a").unwrap_err().code(), "xenstore-io");
        assert_eq!(store.next_event().unwrap_err().code(), "xenstore-io");
    }
}
