//! A stream to another guest of Xen's: a vchan that comes, and goes, while the program holds it.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};

use crate::vchan::{RingSize, Vchan};

/// How long a dial waits for domain 0, which has a shorter limit of its own for the other guest.
const DIAL_LIMIT: Duration = Duration::from_secs(30);

/// What the program and the thread that knows xenstore share.
#[derive(Debug)]
pub(crate) struct Slot {
    /// Of the two below: what the program polls.
    either: OwnedFd,
    news: Bell,
    state: Mutex<State>,
}

#[derive(Debug)]
enum State {
    Dialling {
        since: Instant,
    },
    Open(Vchan),
    /// Closed for this domain to be saved; the program is told later.
    Cut {
        connected: bool,
    },
    /// The other guest is no more, or has given the stream up.
    Ended {
        /// What it has sent before and has not been read.
        rest: VecDeque<u8>,
        /// It has closed the channel.
        closed: bool,
    },
    Failed(io::ErrorKind),
}

/// A descriptor that is readable when there is something to look for.
#[derive(Debug)]
pub(crate) struct Bell(OwnedFd);

impl Bell {
    pub(crate) fn new() -> io::Result<Bell> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Bell(eventfd(0, flags)?))
    }

    pub(crate) fn ring(&self) {
        // It fails only where it is full, and then it is readable.
        let _full = rustix::io::write(&self.0, &1_u64.to_ne_bytes());
    }

    pub(crate) fn hush(&self) {
        // It fails only where it is empty.
        let _empty = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Slot {
    pub(crate) fn dialling() -> io::Result<Slot> {
        let since = Instant::now();
        Self::new(State::Dialling { since })
    }

    pub(crate) fn open(vchan: Vchan) -> io::Result<Slot> {
        let slot = Self::dialling()?;
        slot.fill(vchan)?;
        Ok(slot)
    }

    fn new(state: State) -> io::Result<Slot> {
        let either = epoll::create(CreateFlags::CLOEXEC)?;
        let news = Bell::new()?;
        epoll::add(&either, &news, EventData::new_u64(0), EventFlags::IN)?;
        Ok(Slot {
            either,
            news,
            state: Mutex::new(state),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_dialling(&self) -> bool {
        matches!(*self.lock(), State::Dialling { .. })
    }

    /// Here is what was dialled for. Closed at once where the program has lost interest.
    pub(crate) fn fill(&self, vchan: Vchan) -> io::Result<()> {
        let mut state = self.lock();
        if let State::Dialling { .. } = *state {
            epoll::add(&self.either, &vchan, EventData::new_u64(1), EventFlags::IN)?;
            *state = State::Open(vchan);
            self.news.ring();
        }
        Ok(())
    }

    /// The other guest is no more. Its memory, which a channel keeps from being freed, is let go of at
    /// once, whatever the program does; what was sent can be read still.
    pub(crate) fn end(&self) {
        let mut state = self.lock();
        *state = match &mut *state {
            State::Open(vchan) => {
                let (rest, closed) = what_is_left(vchan);
                State::Ended { rest, closed }
            }
            State::Dialling { .. } => State::Failed(io::ErrorKind::ConnectionReset),
            State::Cut { .. } | State::Ended { .. } | State::Failed(_) => return,
        };
        self.news.ring();
    }

    /// Closes it, unless it has failed before.
    pub(crate) fn fail(&self, kind: io::ErrorKind) {
        let mut state = self.lock();
        if !matches!(*state, State::Failed(_)) {
            *state = State::Failed(kind);
            self.news.ring();
        }
    }

    /// Closes it, and says nothing of it until [`Slot::tell`]: a program that ends now takes its connection
    /// to xenstore with it, and a kernel (Linux, `unregister_xenbus_watch`) that gives up a watch while it
    /// suspends waits for itself without end.
    pub(crate) fn cut(&self) {
        let mut state = self.lock();
        let connected = match *state {
            State::Dialling { .. } => false,
            State::Open(_) => true,
            State::Cut { .. } | State::Ended { .. } | State::Failed(_) => return,
        };
        *state = State::Cut { connected };
        // What it has rung for is no more: a program that polls is to sleep.
        self.news.hush();
    }

    /// If it has been cut, it fails.
    pub(crate) fn tell(&self) {
        let mut state = self.lock();
        if let State::Cut { .. } = *state {
            *state = State::Failed(io::ErrorKind::ConnectionReset);
            self.news.ring();
        }
    }

    /// After a restore of this domain: see [`Vchan::abandon`].
    pub(crate) fn abandon(&self) {
        let failed = State::Failed(io::ErrorKind::ConnectionReset);
        if let State::Open(vchan) = std::mem::replace(&mut *self.lock(), failed) {
            vchan.abandon();
        }
        self.news.ring();
    }

    pub(crate) fn connected(&self) -> io::Result<bool> {
        match &*self.lock() {
            State::Dialling { since } if since.elapsed() >= DIAL_LIMIT => {
                Err(io::ErrorKind::TimedOut.into())
            }
            State::Dialling { .. } => Ok(false),
            State::Cut { connected } => Ok(*connected),
            State::Open(_) | State::Ended { .. } => Ok(true),
            State::Failed(kind) => Err((*kind).into()),
        }
    }

    pub(crate) fn is_ready(&self, wants_to_write: bool) -> bool {
        match &*self.lock() {
            State::Dialling { .. } | State::Cut { .. } => false,
            State::Open(vchan) => {
                // What it has rung for is looked at here, so that polling ends with the next news.
                self.news.hush();
                vchan.is_ready(wants_to_write)
            }
            State::Ended { .. } | State::Failed(_) => true,
        }
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut *self.lock() {
            State::Dialling { .. } | State::Cut { connected: false } => {
                Err(io::ErrorKind::NotConnected.into())
            }
            State::Cut { connected: true } => Err(io::ErrorKind::WouldBlock.into()),
            State::Open(vchan) => vchan.read_after_events(buffer),
            State::Ended { rest, closed } => match rest.read(buffer)? {
                // There was no close that a vchan tells of.
                0 if !*closed && !buffer.is_empty() => Err(io::ErrorKind::ConnectionReset.into()),
                length => Ok(length),
            },
            State::Failed(kind) => Err((*kind).into()),
        }
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *self.lock() {
            State::Dialling { .. } | State::Cut { connected: false } => {
                Err(io::ErrorKind::NotConnected.into())
            }
            State::Cut { connected: true } => Err(io::ErrorKind::WouldBlock.into()),
            State::Open(vchan) => vchan.write(bytes),
            State::Ended { .. } => Err(io::ErrorKind::BrokenPipe.into()),
            State::Failed(kind) => Err((*kind).into()),
        }
    }
}

/// What can still be read, no more than a ring holds, and whether the other end has closed.
fn what_is_left(vchan: &mut Vchan) -> (VecDeque<u8>, bool) {
    let mut rest = VecDeque::new();
    let mut buffer = vec![0; 1 << RingSize::default() as u32];
    while rest.len() < buffer.len() {
        let room = buffer.len() - rest.len();
        match vchan.read(&mut buffer[..room]) {
            Ok(0) | Err(_) => break,
            Ok(length) => rest.extend(&buffer[..length]),
        }
    }
    (rest, !vchan.is_connected())
}

impl AsFd for Slot {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.either.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;

    fn rings(slot: &Slot) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(slot, PollFlags::IN)], Some(&now)).unwrap() > 0
    }

    #[test]
    fn a_dial_waits_until_it_fails_and_then_says_so() {
        type End = fn(&Slot);
        let ends: [(End, io::ErrorKind); 3] = [
            (
                |slot| slot.fail(io::ErrorKind::ConnectionRefused),
                io::ErrorKind::ConnectionRefused,
            ),
            (Slot::end, io::ErrorKind::ConnectionReset),
            (Slot::abandon, io::ErrorKind::ConnectionReset),
        ];
        for (end, kind) in ends {
            let slot = Slot::dialling().unwrap();
            assert!(slot.is_dialling() && !slot.connected().unwrap());
            assert!(!slot.is_ready(true) && !rings(&slot));
            let early = slot.read(&mut [0]).unwrap_err();
            assert_eq!(early.kind(), io::ErrorKind::NotConnected);
            end(&slot);
            assert!(rings(&slot) && slot.is_ready(false));
            assert_eq!(slot.connected().unwrap_err().kind(), kind);
            assert_eq!(slot.read(&mut [0]).unwrap_err().kind(), kind);
            assert_eq!(slot.write(b"x").unwrap_err().kind(), kind);
            // The first reason stays.
            slot.fail(io::ErrorKind::TimedOut);
            assert_eq!(slot.connected().unwrap_err().kind(), kind);
        }
    }

    #[test]
    fn what_is_cut_is_silent_until_it_is_told() {
        let slot = Slot::dialling().unwrap();
        slot.tell();
        assert!(slot.is_dialling() && !rings(&slot));
        slot.news.ring();
        slot.cut();
        assert!(!slot.is_dialling() && !slot.connected().unwrap());
        slot.end();
        assert!(!slot.is_ready(true) && !rings(&slot));
        slot.tell();
        assert!(rings(&slot) && slot.is_ready(false));
        let kind = slot.connected().unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::ConnectionReset);
        slot.cut();
        assert_eq!(slot.connected().unwrap_err().kind(), kind);
    }
}
