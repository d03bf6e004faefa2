//! Xen's side of [`crate::peer`]: a thread that has this process's connection to xenstore. It says
//! there whom the program wants to reach and where it listens, makes the channels, and closes them
//! when the domain is to be saved, whatever the program is doing then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::lock::Numbers;
use crate::peer::{BACKLOG, PeerAddress};
use crate::rendezvous::{self, ACCEPT, ANSWER, Answer, DIAL, Dial, LISTEN, STREAM, StreamName};
use crate::stream::{Bell, Slot};
use crate::suspend::{News, Suspension};
use crate::vchan::{self, RingSize, Vchan};
use crate::xenstore::{self, Xenstore};

/// How long after a word of the tool stack's no channel is made. Then the domain was not saved.
const SUSPEND_PAUSE: Duration = Duration::from_secs(5);
/// Pause before xenstore is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);
/// Where the numbers of dials begin among those that processes take; ports are below.
const DIAL_NUMBERS: i64 = 1 << 32;

/// Which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Dialled(u32),
    Accepted(StreamName),
}

/// What the program wants.
#[derive(Debug)]
enum Command {
    Listen {
        port: u32,
        door: Arc<Door>,
        done: SyncSender<io::Result<()>>,
    },
    Unlisten(u32),
    Dial {
        number: u32,
        to: Dial,
        slot: Arc<Slot>,
    },
    Close(Key, Arc<Slot>),
}

/// What the program and the thread share.
#[derive(Debug)]
struct Hub {
    desk: Mutex<Desk>,
    bell: Bell,
    numbers: Numbers,
}

#[derive(Debug, Default)]
struct Desk {
    commands: Vec<Command>,
    /// Of this process.
    dials: BTreeSet<u32>,
}

/// A listener's streams until they are accepted.
#[derive(Debug)]
struct Door {
    bell: Bell,
    arrived: Mutex<VecDeque<(PeerStream, PeerAddress)>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The program's end of a stream.
#[derive(Debug)]
pub(crate) struct PeerStream {
    key: Key,
    slot: Arc<Slot>,
    hub: Arc<Hub>,
}

impl PeerStream {
    pub(crate) fn connected(&self) -> io::Result<bool> {
        self.slot.connected()
    }

    pub(crate) fn is_ready(&self, wants_to_write: bool) -> bool {
        self.slot.is_ready(wants_to_write)
    }

    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.slot.read(buffer)
    }

    pub(crate) fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.slot.write(bytes)
    }
}

impl AsFd for PeerStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.slot.as_fd()
    }
}

impl Drop for PeerStream {
    fn drop(&mut self) {
        self.slot.fail(io::ErrorKind::NotConnected);
        let slot = Arc::clone(&self.slot);
        self.hub.want(Command::Close(self.key, slot));
    }
}

/// A listener.
#[derive(Debug)]
pub(crate) struct PeerQueue {
    port: u32,
    door: Arc<Door>,
    hub: Arc<Hub>,
}

impl PeerQueue {
    pub(crate) fn accept(&mut self) -> Option<(PeerStream, PeerAddress)> {
        let mut arrived = lock(&self.door.arrived);
        let next = arrived.pop_front();
        if arrived.is_empty() {
            self.door.bell.hush();
        }
        next
    }
}

impl AsFd for PeerQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.door.bell.as_fd()
    }
}

impl Drop for PeerQueue {
    fn drop(&mut self) {
        self.hub.want(Command::Unlisten(self.port));
    }
}

/// Begins to reach a port of another guest's.
pub(crate) fn dial(cid: u32, port: u32) -> io::Result<PeerStream> {
    let hub = Hub::of_this_process()?;
    let slot = Arc::new(Slot::dialling()?);
    let number = hub.take_number()?;
    let key = Key::Dialled(number);
    let (to, shared) = (Dial { cid, port }, Arc::clone(&slot));
    hub.want(Command::Dial {
        number,
        to,
        slot: shared,
    });
    Ok(PeerStream { key, slot, hub })
}

/// Listens at a port. Returns once others can dial it.
pub(crate) fn listen(port: u32) -> io::Result<PeerQueue> {
    let hub = Hub::of_this_process()?;
    let door = Arc::new(Door {
        bell: Bell::new()?,
        arrived: Mutex::default(),
    });
    let (done, result) = sync_channel(1);
    let shared = Arc::clone(&door);
    hub.want(Command::Listen {
        port,
        door: shared,
        done,
    });
    let unreachable = |_| io::Error::other("xenstore did not take the port");
    result.recv().map_err(unreachable)??;
    Ok(PeerQueue { port, door, hub })
}

impl Hub {
    fn of_this_process() -> io::Result<Arc<Hub>> {
        static HUB: Mutex<Option<Arc<Hub>>> = Mutex::new(None);
        let mut known = lock(&HUB);
        if let Some(hub) = &*known {
            return Ok(Arc::clone(hub));
        }
        let hub = Arc::new(Hub {
            desk: Mutex::default(),
            bell: Bell::new()?,
            numbers: Numbers::open(xenstore::DEVICE)?,
        });
        let mut worker = Worker {
            hub: Arc::clone(&hub),
            view: View::open()?,
            doors: BTreeMap::new(),
            slots: BTreeMap::new(),
            pause_until: None,
        };
        worker.sweep()?;
        std::thread::Builder::new()
            .name("xbee-peer".to_owned())
            .spawn(move || worker.run())?;
        *known = Some(Arc::clone(&hub));
        Ok(hub)
    }

    fn want(&self, command: Command) {
        lock(&self.desk).commands.push(command);
        self.bell.ring();
    }

    /// A number that no dial of this guest has.
    fn take_number(&self) -> io::Result<u32> {
        let mut desk = lock(&self.desk);
        if desk.dials.len() >= rendezvous::DIALS_MAX {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        loop {
            let mut bytes = [0; 4];
            let length =
                rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
            let number = u32::from_ne_bytes(bytes);
            if length == bytes.len()
                && !desk.dials.contains(&number)
                && self.numbers.take(DIAL_NUMBERS + i64::from(number))?
            {
                desk.dials.insert(number);
                return Ok(number);
            }
        }
    }
}

/// The connection to xenstore, and what has been seen of it.
struct View {
    store: Xenstore,
    suspension: Suspension,
    /// Xen's number of this domain.
    own: u16,
    dirty: Dirty,
}

/// What is to be looked at.
#[derive(Debug, Clone, Copy, Default)]
struct Dirty {
    answers: bool,
    offers: bool,
    streams: bool,
}

impl View {
    fn open() -> Result<View, xenstore::Error> {
        let mut store = Xenstore::open()?;
        let suspension = Suspension::watch(&mut store)?;
        for path in [ANSWER, ACCEPT, STREAM] {
            store.watch(path, path)?;
        }
        let own = store.read("domid")?.and_then(|own| own.parse().ok());
        Ok(View {
            store,
            suspension,
            own: own.ok_or(xenstore::Error::Malformed)?,
            dirty: Dirty::default(),
        })
    }

    /// Takes the events that have come; whether there were any.
    fn take_events(&mut self) -> Result<bool, xenstore::Error> {
        let mut any = false;
        while let Some(event) = self.store.next_event()? {
            any = true;
            self.suspension.note(&event);
            match event.token.as_str() {
                ANSWER => self.dirty.answers = true,
                ACCEPT => self.dirty.offers = true,
                STREAM => self.dirty.streams = true,
                _ => {}
            }
        }
        Ok(any)
    }

    /// The names below a path that are as they should be.
    fn names<T: std::str::FromStr + ToString>(
        &mut self,
        path: &str,
    ) -> Result<Vec<T>, xenstore::Error> {
        let names = self.store.list(path)?.unwrap_or_default();
        Ok(names
            .iter()
            .filter_map(|name| rendezvous::number(name).ok())
            .collect())
    }
}

struct Worker {
    hub: Arc<Hub>,
    view: View,
    doors: BTreeMap<u32, Arc<Door>>,
    slots: BTreeMap<Key, Arc<Slot>>,
    /// Until then no channel may be made.
    pause_until: Option<Instant>,
}

impl Worker {
    /// Takes away what processes have left that ended without.
    fn sweep(&mut self) -> Result<(), xenstore::Error> {
        for (directory, numbers) in [(DIAL, DIAL_NUMBERS), (LISTEN, 0)] {
            for name in self.view.names::<u32>(directory)? {
                if !(self.hub.numbers).is_taken(numbers + i64::from(name))? {
                    self.view.store.remove(&format!("{directory}/{name}"))?;
                }
            }
        }
        Ok(())
    }

    fn run(mut self) {
        loop {
            let turned = self.turn().and_then(|()| Ok(self.wait()?));
            if turned.is_err() {
                // What was asked of the store may have been done or not.
                for slot in self.slots.values() {
                    slot.fail(io::ErrorKind::ConnectionReset);
                }
                self.begin_again();
            }
        }
    }

    /// A new connection to the store, where the listeners are said again.
    fn begin_again(&mut self) {
        loop {
            if let Ok(view) = View::open() {
                self.view = view;
                let ports: Vec<u32> = self.doors.keys().copied().collect();
                let said = ports
                    .into_iter()
                    .try_for_each(|port| self.view.store.write(&format!("{LISTEN}/{port}"), ""));
                if said.is_ok() {
                    return;
                }
            }
            std::thread::sleep(RETRY_PAUSE);
        }
    }

    /// Does all there is to do.
    fn turn(&mut self) -> Result<(), xenstore::Error> {
        loop {
            let commands = std::mem::take(&mut lock(&self.hub.desk).commands);
            let idle = commands.is_empty();
            for command in commands {
                self.obey(command)?;
            }
            // Events come with replies, too, and then the descriptor does not tell of them.
            let any = self.view.take_events()?;
            match self.view.suspension.news(&mut self.view.store)? {
                Some(News::Suspending) => {
                    self.slots.values().for_each(|slot| slot.cut());
                    self.pause_until = Some(Instant::now() + SUSPEND_PAUSE);
                }
                Some(News::Restored) => {
                    for slot in self.slots.values() {
                        slot.abandon();
                    }
                    self.pause_until = None;
                    self.begin_again();
                }
                None => {}
            }
            if self.pause_until.is_some_and(|until| Instant::now() < until) {
                if idle && !any {
                    return Ok(());
                }
                continue;
            }
            if self.pause_until.take().is_some() {
                self.slots.values().for_each(|slot| slot.tell());
            }
            let dirty = std::mem::take(&mut self.view.dirty);
            if dirty.answers {
                self.look_at_answers()?;
            }
            if dirty.offers {
                self.look_at_offers()?;
            }
            if dirty.streams {
                self.look_at_streams()?;
            }
            if idle && !any && !dirty.answers && !dirty.offers && !dirty.streams {
                return Ok(());
            }
        }
    }

    fn wait(&self) -> Result<(), io::Error> {
        let timeout = self.pause_until.map(|until| {
            let rest = until.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: rest.as_secs() as i64,
                tv_nsec: rest.subsec_nanos().into(),
            }
        });
        let mut fds = [
            PollFd::new(&self.hub.bell, PollFlags::IN),
            PollFd::new(&self.view.store, PollFlags::IN),
        ];
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        self.hub.bell.hush();
        Ok(())
    }

    fn obey(&mut self, command: Command) -> Result<(), xenstore::Error> {
        match command {
            Command::Listen { port, door, done } => {
                let result = self.listen(port, door);
                // Nobody waits for it where the program has ended.
                let _ended = done.send(result);
            }
            Command::Unlisten(port) => {
                self.doors.remove(&port);
                self.view.store.remove(&format!("{LISTEN}/{port}"))?;
                // Those who have just dialled are refused by this.
                self.view.store.remove(&format!("{ACCEPT}/{port}"))?;
                self.hub.numbers.give_back(port.into())?;
            }
            Command::Dial { number, to, slot } => {
                self.slots.insert(Key::Dialled(number), slot);
                let node = format!("{DIAL}/{number}");
                self.view.store.write(&node, &to.to_string())?;
            }
            Command::Close(key, slot) => {
                match self.slots.remove(&key) {
                    // Another stream of that name has taken its place.
                    Some(other) if !Arc::ptr_eq(&other, &slot) => {
                        self.slots.insert(key, other);
                        return Ok(());
                    }
                    _ => {}
                }
                match key {
                    Key::Dialled(number) => {
                        for directory in [DIAL, ANSWER] {
                            self.view.store.remove(&format!("{directory}/{number}"))?;
                        }
                        let mut desk = lock(&self.hub.desk);
                        (self.hub.numbers).give_back(DIAL_NUMBERS + i64::from(number))?;
                        desk.dials.remove(&number);
                    }
                    Key::Accepted(name) => self.view.store.remove(&format!("{STREAM}/{name}"))?,
                }
            }
        }
        Ok(())
    }

    fn listen(&mut self, port: u32, door: Arc<Door>) -> io::Result<()> {
        if self.doors.contains_key(&port) || !self.hub.numbers.take(port.into())? {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        // What the one before has left is not for this one.
        let fresh = (self.view.store.remove(&format!("{ACCEPT}/{port}")))
            .and_then(|()| self.view.store.write(&format!("{LISTEN}/{port}"), ""));
        if let Err(error) = fresh {
            self.hub.numbers.give_back(port.into())?;
            return Err(error.into());
        }
        self.doors.insert(port, door);
        Ok(())
    }

    fn look_at_answers(&mut self) -> Result<(), xenstore::Error> {
        let answered: BTreeSet<u32> = self.view.names(ANSWER)?.into_iter().collect();
        for (key, slot) in &self.slots {
            let Key::Dialled(number) = *key else { continue };
            match (slot.is_dialling(), answered.contains(&number)) {
                (true, true) => {
                    let node = format!("{ANSWER}/{number}");
                    let text = self.view.store.read(&node)?.unwrap_or_default();
                    let failure = match text.parse() {
                        Ok(Answer::Open { domain }) => {
                            let own = self.view.own;
                            connect(&mut self.view.store, slot, domain, own, number)?
                        }
                        Ok(Answer::Refused) => Some(io::ErrorKind::ConnectionRefused),
                        Ok(Answer::Unreachable) => Some(io::ErrorKind::ConnectionReset),
                        Ok(Answer::Busy) => Some(io::ErrorKind::ResourceBusy),
                        Ok(Answer::TimedOut) => Some(io::ErrorKind::TimedOut),
                        Err(_) => Some(io::ErrorKind::InvalidData),
                    };
                    if let Some(kind) = failure {
                        slot.fail(kind);
                    }
                }
                (false, false) => slot.end(),
                _ => {}
            }
        }
        Ok(())
    }

    fn look_at_offers(&mut self) -> Result<(), xenstore::Error> {
        for (port, door) in &self.doors {
            let directory = format!("{ACCEPT}/{port}");
            for name in self.view.store.list(&directory)?.unwrap_or_default() {
                let node = format!("{directory}/{name}");
                let cid = self.view.store.read(&node)?;
                let cid = cid.and_then(|cid| rendezvous::number(&cid).ok());
                if let (Ok(name), Some(cid)) = (name.parse(), cid)
                    && lock(&door.arrived).len() < BACKLOG
                    && let Some(slot) = serve(&mut self.view.store, name)?
                {
                    let key = Key::Accepted(name);
                    if let Some(before) = self.slots.insert(key, Arc::clone(&slot)) {
                        before.fail(io::ErrorKind::ConnectionReset);
                    }
                    let hub = Arc::clone(&self.hub);
                    let from = PeerAddress {
                        cid,
                        port: name.dial,
                    };
                    let stream = PeerStream { key, slot, hub };
                    lock(&door.arrived).push_back((stream, from));
                    door.bell.ring();
                }
                // Without a stream this is a refusal.
                self.view.store.remove(&node)?;
            }
        }
        Ok(())
    }

    fn look_at_streams(&mut self) -> Result<(), xenstore::Error> {
        let names = self.view.store.list(STREAM)?.unwrap_or_default();
        let there: BTreeSet<StreamName> =
            names.iter().filter_map(|name| name.parse().ok()).collect();
        for (key, slot) in &self.slots {
            if let Key::Accepted(name) = key
                && !there.contains(name)
            {
                slot.end();
            }
        }
        Ok(())
    }
}

/// Becomes the client of the channel that was dialled for; why not.
fn connect(
    store: &mut Xenstore,
    slot: &Slot,
    domain: u16,
    own: u16,
    dial: u32,
) -> Result<Option<io::ErrorKind>, xenstore::Error> {
    let name = StreamName { domain: own, dial };
    let path = format!("/local/domain/{domain}/{STREAM}/{name}");
    let Some(vchan) = unless_lost(Vchan::connect(store, domain, &path))?.flatten() else {
        return Ok(Some(io::ErrorKind::ConnectionReset));
    };
    Ok(slot.fill(vchan).err().map(|error| error.kind()))
}

/// Serves a stream; `None` where this kernel has no room for its channel.
fn serve(store: &mut Xenstore, name: StreamName) -> Result<Option<Arc<Slot>>, xenstore::Error> {
    let path = format!("{STREAM}/{name}");
    let served = Vchan::serve(store, name.domain, &path, RingSize::default());
    let Some(vchan) = unless_lost(served)? else {
        store.remove(&path)?;
        return Ok(None);
    };
    Ok(Slot::open(vchan).ok().map(Arc::new))
}

/// `None` where it did not work, an error where the store does not.
fn unless_lost<T>(result: Result<T, vchan::Error>) -> Result<Option<T>, xenstore::Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(vchan::Error::Xenstore(error)) if !matches!(error, xenstore::Error::Refused { .. }) => {
            Err(error)
        }
        Err(_) => Ok(None),
    }
}
