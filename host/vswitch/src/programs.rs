//! Host programs' way to guests of their own: one unix socket for all users of the host.
//!
//! Whose program it is, the kernel says, so nobody proves anything, and no name of a file comes from a program. A program says
//! one line:
//!
//! - `CONNECT <cid> <port>\n`, and reads `OK <port>\n`; then it has a stream to that port of a guest of its user's, or, where the
//!   context identifier is the host's, to another program of its user's that listens;
//! - `LISTEN <port>\n`, and reads `OK <port>\n`; then, as long as the connection lasts, each guest of its user's that connects to
//!   that port of the host's comes as a line `<cid> <port>\n` with a descriptor.
//!
//! What is refused gets `ERR <code> <text>\n`; a guest where nobody listens is the end of the stream.
//!
//! All this is one thread, which waits for no program. A stream becomes the guest's port's own when it is asked for, and a guest
//! that connects is handed over by its port, so nothing is copied here.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, send, sendmsg, sockopt};
use serde::{Deserialize, Serialize};

use crate::link::{Line, read_line};
use crate::packet::HOST_CID;
use crate::switch::Switch;

/// Most connections of one user that have not said their line, or listen.
pub const PROGRAMS_PER_USER_MAX: usize = 256;
/// Most such connections of all users.
pub const PROGRAMS_MAX: usize = 4096;
/// Ports of the host's below this one are not for users' programs.
pub const PORT_FIRST: u32 = 1024;
/// How long a program may take for its line.
const LINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Connections that wait to be accepted here.
const BACKLOG: i32 = 128;
/// What the kernel keeps for a program that does not take its guests' connections, in bytes: some dozens of them. Further ones are
/// refused.
const PENDING_BYTES: usize = 16 << 10;

const WAKE: u64 = 0;
const LISTENER: u64 = 1;
/// Tokens of programs start here; none is used twice.
const PROGRAMS: u64 = 2;

/// Who and what is let in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramsSpec {
    /// User ids from here on are no users of this host's: owners of guests have such numbers for another reason.
    pub users_end: u32,
    /// The user id that the kernel says of processes whose own it cannot say here.
    pub unknown_user: u32,
    /// Ports of the host's that no program listens at, beside those below [`PORT_FIRST`].
    pub reserved_ports: Vec<u32>,
}

/// Why a program is not served. It is told so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The kernel does not say who it is, or it is no owner of guests.
    #[error("not-a-user your user id has no guests here")]
    NotAUser,
    /// Too many at a time.
    #[error("limit too many connections wait or listen: close some and try again")]
    Limit,
    /// Not one of the lines.
    #[error("bad-line expected CONNECT CID PORT or LISTEN PORT")]
    BadLine,
    /// There is no such guest, or not for this user, or it has too much to do.
    #[error("unreachable no guest of yours has this context identifier and takes connections")]
    Unreachable,
    /// Not a program's to have.
    #[error("reserved-port use a port from {PORT_FIRST} on that is not the agent's")]
    ReservedPort,
    /// Another program of the user's listens.
    #[error("in-use a program of yours listens at this port already")]
    InUse,
}

/// Who listens, by user id and port.
type Doors = HashMap<(String, u32), Arc<UnixStream>>;

/// What the thread of a socket for programs shares with guests' ports.
#[derive(Debug)]
pub struct Programs {
    doors: Mutex<Doors>,
    wake: OwnedFd,
    stop: AtomicBool,
}

/// Each critical section is a single operation on a map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Programs {
    /// Begins to serve a socket that is bound to its name.
    ///
    /// # Errors
    /// No descriptors or threads are left, or it is no such socket.
    pub fn start(
        switch: Weak<Switch>,
        socket: OwnedFd,
        spec: ProgramsSpec,
    ) -> io::Result<Arc<Programs>> {
        // Here, and not by who has made it, so that the socket tells who serves it.
        rustix::net::listen(&socket, BACKLOG)?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        let programs = Arc::new(Programs {
            doors: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
        });
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let watch = |source: &dyn AsFd, token, flags| {
            let data = epoll::EventData::new_u64(token);
            epoll::add(&epoll, source.as_fd(), data, flags)
        };
        watch(&programs.wake, WAKE, EventFlags::IN)?;
        // Edge-triggered: without free descriptors who waits must not keep the thread busy.
        watch(&listener, LISTENER, EventFlags::IN | EventFlags::ET)?;
        let mut desk = Desk {
            switch,
            shared: programs.clone(),
            reserved: spec.reserved_ports.iter().copied().collect(),
            spec,
            epoll,
            listener,
            callers: HashMap::new(),
            of_user: HashMap::new(),
            deadlines: BTreeSet::new(),
            next_token: PROGRAMS,
        };
        std::thread::Builder::new()
            .name("programs".to_owned())
            .spawn(move || {
                if let Err(error) = desk.run() {
                    tracing::error!(%error, "host programs are not served any more");
                }
            })?;
        Ok(programs)
    }

    /// Ends the thread; nobody listens any more.
    pub fn end(&self) {
        self.stop.store(true, Ordering::Release);
        // EAGAIN means that the counter is full, so the thread wakes up all the same.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        lock(&self.doors).clear();
    }

    fn door(&self, owner: &str, port: u32) -> Option<Arc<UnixStream>> {
        lock(&self.doors).get(&(owner.to_owned(), port)).cloned()
    }

    /// A stream to who listens at a port for this owner's guests; `None` where nobody does, or takes no more.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn offer(
        &self,
        owner: &str,
        port: u32,
        from: (u32, u32),
    ) -> io::Result<Option<UnixStream>> {
        let Some(door) = self.door(owner, port) else {
            return Ok(None);
        };
        let (here, there) = UnixStream::pair()?;
        Ok(hand_over(&door, &there, from).then_some(here))
    }
}

/// Gives who listens a stream and says who is at its other end. Never waits: one that takes nothing gets no more.
fn hand_over(door: &UnixStream, stream: &UnixStream, (cid, port): (u32, u32)) -> bool {
    let fds = [stream.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let line = format!("{cid} {port}\n");
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = rustix::io::retry_on_intr(|| {
        sendmsg(door, &[IoSlice::new(line.as_bytes())], &mut control, flags)
    });
    sent == Ok(line.len())
}

/// Tells a program something that fits in its socket's buffer, which is empty. It may be gone; then nobody misses it.
fn say(stream: &UnixStream, text: &str) {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let _ = rustix::io::retry_on_intr(|| send(stream, text.as_bytes(), flags));
}

/// A connection that waits for its line, or listens.
struct Caller {
    stream: Arc<UnixStream>,
    user: u32,
    /// Of its line.
    deadline: Option<Instant>,
    /// Where it listens.
    port: Option<u32>,
}

/// The thread's own.
struct Desk {
    switch: Weak<Switch>,
    shared: Arc<Programs>,
    spec: ProgramsSpec,
    reserved: HashSet<u32>,
    epoll: OwnedFd,
    listener: UnixListener,
    callers: HashMap<u64, Caller>,
    of_user: HashMap<u32, usize>,
    deadlines: BTreeSet<(Instant, u64)>,
    next_token: u64,
}

impl Desk {
    fn run(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        while !self.shared.stop.load(Ordering::Acquire) {
            self.wait(&mut events)?;
            for event in std::mem::take(&mut events) {
                match event.data.u64() {
                    WAKE => {}
                    LISTENER => self.accept(),
                    token => self.on_program(token),
                }
            }
            self.expire();
        }
        Ok(())
    }

    fn wait(&self, events: &mut Vec<epoll::Event>) -> io::Result<()> {
        let next = self.deadlines.first().map(|next| next.0);
        let timeout = next.map(|next| {
            let left = next.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: left.as_secs() as i64,
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        events.reserve(64);
        let space = rustix::buffer::spare_capacity(events);
        match epoll::wait(&self.epoll, space, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn accept(&mut self) {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => match self.admit(stream) {
                    Ok(()) => {}
                    Err((stream, refusal)) => say(&stream, &format!("ERR {refusal}\n")),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a host program");
                    return;
                }
            }
        }
    }

    fn admit(&mut self, stream: UnixStream) -> Result<(), (Arc<UnixStream>, Refusal)> {
        let stream = Arc::new(stream);
        let refused = |refusal| (stream.clone(), refusal);
        let user = sockopt::socket_peercred(&*stream).map(|who| who.uid.as_raw());
        let user = user.map_err(|_| refused(Refusal::NotAUser))?;
        if user >= self.spec.users_end || user == self.spec.unknown_user {
            return Err(refused(Refusal::NotAUser));
        }
        let of_user = self.of_user.get(&user).copied().unwrap_or(0);
        if self.callers.len() >= PROGRAMS_MAX || of_user >= PROGRAMS_PER_USER_MAX {
            return Err(refused(Refusal::Limit));
        }
        let token = self.next_token;
        self.next_token += 1;
        let flags = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(
            &self.epoll,
            &stream,
            epoll::EventData::new_u64(token),
            flags,
        )
        .map_err(|_| refused(Refusal::Limit))?;
        let deadline = Instant::now() + LINE_TIMEOUT;
        self.deadlines.insert((deadline, token));
        self.callers.insert(
            token,
            Caller {
                stream,
                user,
                deadline: Some(deadline),
                port: None,
            },
        );
        *self.of_user.entry(user).or_default() += 1;
        Ok(())
    }

    /// Forgets a connection, which is closed if nobody else has it.
    fn remove(&mut self, token: u64) -> Option<Caller> {
        let caller = self.callers.remove(&token)?;
        if let Some(deadline) = caller.deadline {
            self.deadlines.remove(&(deadline, token));
        }
        if let Some(port) = caller.port {
            lock(&self.shared.doors).remove(&(caller.user.to_string(), port));
        }
        if let Some(count) = self.of_user.get_mut(&caller.user) {
            *count -= 1;
            if *count == 0 {
                self.of_user.remove(&caller.user);
            }
        }
        // Its guest's port watches it from here on, if it lives.
        let _ = epoll::delete(&self.epoll, &caller.stream);
        Some(caller)
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(&(deadline, token)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            self.refuse(token, Refusal::BadLine);
        }
    }

    fn refuse(&mut self, token: u64, refusal: Refusal) {
        if let Some(caller) = self.remove(token) {
            say(&caller.stream, &format!("ERR {refusal}\n"));
        }
    }

    fn on_program(&mut self, token: u64) {
        let Some(caller) = self.callers.get(&token) else {
            return;
        };
        if caller.port.is_some() {
            // It has nothing more to say: this is its end, or nonsense.
            self.remove(token);
            return;
        }
        let line = match read_line(&caller.stream) {
            Ok(Line::Partial) => return,
            Ok(Line::Text(line)) => line,
            Ok(Line::Invalid) => return self.refuse(token, Refusal::BadLine),
            Err(_) => return drop(self.remove(token)),
        };
        let words: Vec<&str> = line.split(' ').collect();
        let number = |word: &str| word.parse::<u32>().ok();
        let done = match words[..] {
            ["CONNECT", cid, port] => match (number(cid), number(port)) {
                (Some(cid), Some(port)) => self.connect(token, cid, port),
                _ => Err(Refusal::BadLine),
            },
            ["LISTEN", port] => match number(port) {
                Some(port) => self.listen(token, port),
                None => Err(Refusal::BadLine),
            },
            _ => Err(Refusal::BadLine),
        };
        if let Err(refusal) = done {
            self.refuse(token, refusal);
        }
    }

    fn connect(&mut self, token: u64, cid: u32, port: u32) -> Result<(), Refusal> {
        let caller = self.callers.get(&token).ok_or(Refusal::Unreachable)?;
        let (stream, owner) = (caller.stream.clone(), caller.user.to_string());
        if cid == HOST_CID {
            let door = self.shared.door(&owner, port).ok_or(Refusal::Unreachable)?;
            // Before it is handed over: from then on it is another's.
            say(&stream, &format!("OK {port}\n"));
            let taken = hand_over(&door, &stream, (HOST_CID, port));
            self.remove(token);
            if !taken {
                tracing::debug!(owner, port, "a program does not take its connections");
            }
            return Ok(());
        }
        let switch = self.switch.upgrade().ok_or(Refusal::Unreachable)?;
        let own = stream.try_clone().map_err(|_| Refusal::Limit)?;
        match switch.dial_from_host(&owner, cid, port, own) {
            true => drop(self.remove(token)),
            false => return Err(Refusal::Unreachable),
        }
        Ok(())
    }

    fn listen(&mut self, token: u64, port: u32) -> Result<(), Refusal> {
        if port < PORT_FIRST || port == u32::MAX || self.reserved.contains(&port) {
            return Err(Refusal::ReservedPort);
        }
        let caller = self.callers.get_mut(&token).ok_or(Refusal::Unreachable)?;
        let mut doors = lock(&self.shared.doors);
        let key = (caller.user.to_string(), port);
        if doors.contains_key(&key) {
            return Err(Refusal::InUse);
        }
        sockopt::set_socket_send_buffer_size(&*caller.stream, PENDING_BYTES)
            .map_err(|_| Refusal::Limit)?;
        if let Some(deadline) = caller.deadline.take() {
            self.deadlines.remove(&(deadline, token));
        }
        caller.port = Some(port);
        // Said first, so that no guest's connection comes before it.
        say(&caller.stream, &format!("OK {port}\n"));
        doors.insert(key, caller.stream.clone());
        Ok(())
    }
}
