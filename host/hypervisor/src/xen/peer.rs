//! Brings guests of one owner together: what `vswitch` does for QEMU's. A guest writes to its own
//! part of xenstore whom it wants to reach; here it is decided, and the other guest is told, which
//! then serves a vchan that the first connects to (see [`xbee_link::rendezvous`]). The bytes pass
//! between the two without domain 0.
//!
//! All that is known here stands in xenstore too, so that a new process takes up where the one
//! before has ended. What guests write is hostile: it is read at a limited rate, and a guest that
//! keeps on changing things is not looked at for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::broadcast::error::RecvError;
use xbee_link::rendezvous::{
    ACCEPT, ANSWER, Answer, CID, DIAL, DIALS_MAX, Dial, LISTEN, STREAM, StreamName, number,
};
use xbee_link::xenstore::{self, Xenstore};

use super::Inner;
use super::channel::broken;
use crate::domain::{DomainId, DomainState};
use crate::error::{Error, chain};
use crate::readable::readable;
use crate::work::blocking;

/// How long a guest may take to serve a stream, or not.
const OFFER_LIMIT: Duration = Duration::from_secs(10);

/// Streams that a guest has been offered and has not said anything of yet.
const OFFERS_MAX: usize = 32;

/// A guest's changes that are looked at: at once, and for each second.
const LOOKS_BURST: u32 = 500;
const LOOKS_PER_SECOND: u32 = 100;

/// How long a guest is not looked at that has changed more.
const DEAF_FOR: Duration = Duration::from_secs(10);

/// Pause after xenstore failed.
const RETRY_PAUSE: Duration = Duration::from_secs(5);

/// The nodes of xenstore, as far as they are used here.
trait Nodes {
    fn read(&mut self, path: &str) -> Result<Option<String>, xenstore::Error>;
    fn list(&mut self, path: &str) -> Result<Option<Vec<String>>, xenstore::Error>;
    fn write(&mut self, path: &str, value: &str) -> Result<(), xenstore::Error>;
    fn remove(&mut self, path: &str) -> Result<(), xenstore::Error>;
    fn watch(&mut self, path: &str, token: &str) -> Result<(), xenstore::Error>;
    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), xenstore::Error>;
}

impl Nodes for Xenstore {
    fn read(&mut self, path: &str) -> Result<Option<String>, xenstore::Error> {
        self.read(path)
    }

    fn list(&mut self, path: &str) -> Result<Option<Vec<String>>, xenstore::Error> {
        self.list(path)
    }

    fn write(&mut self, path: &str, value: &str) -> Result<(), xenstore::Error> {
        self.write(path, value)
    }

    fn remove(&mut self, path: &str) -> Result<(), xenstore::Error> {
        self.remove(path)
    }

    fn watch(&mut self, path: &str, token: &str) -> Result<(), xenstore::Error> {
        self.watch(path, token)
    }

    fn unwatch(&mut self, path: &str, token: &str) -> Result<(), xenstore::Error> {
        self.unwatch(path, token)
    }
}

/// What a guest may have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Dials,
    Offers,
    Streams,
}

const PARTS: [(Part, &str); 3] = [
    (Part::Dials, DIAL),
    (Part::Offers, ACCEPT),
    (Part::Streams, STREAM),
];

/// A guest that runs.
#[derive(Debug)]
struct Guest {
    cid: u32,
    owner: String,
    /// Dials that have been looked at and are there still.
    dials: BTreeSet<u32>,
    looks: Looks,
    /// Something it wrote has been complained of.
    complained: bool,
}

/// How often a guest may still be looked at.
#[derive(Debug)]
struct Looks {
    left: u32,
    since: Instant,
    /// Not before then.
    deaf_until: Option<Instant>,
}

impl Looks {
    fn new(now: Instant) -> Self {
        Self {
            left: LOOKS_BURST,
            since: now,
            deaf_until: None,
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        let seconds = now.saturating_duration_since(self.since).as_secs();
        let earned = u32::try_from(seconds).unwrap_or(u32::MAX);
        if earned > 0 {
            self.since = now;
            let more = earned.saturating_mul(LOOKS_PER_SECOND);
            self.left = self.left.saturating_add(more).min(LOOKS_BURST);
        }
        let some = self.left > 0;
        self.left = self.left.saturating_sub(1);
        some
    }
}

/// A stream between two guests, by its [`StreamName`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stream {
    /// Who serves it.
    to: u16,
    port: u32,
    /// Until when it is to be served; `None` once it is.
    offered_until: Option<Instant>,
}

/// All guests and streams of this host.
#[derive(Debug, Default)]
struct Broker {
    guests: BTreeMap<u16, Guest>,
    streams: BTreeMap<StreamName, Stream>,
}

fn path(domain: u16, node: &str) -> String {
    format!("/local/domain/{domain}/{node}")
}

/// What a guest wrote cannot be read, or what is for it cannot be written: its own affair. `None`
/// then; an error where the store itself does not work.
fn lenient<T>(result: Result<T, xenstore::Error>) -> Result<Option<T>, xenstore::Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(
            xenstore::Error::Refused { .. }
            | xenstore::Error::Malformed
            | xenstore::Error::Unsendable { .. },
        ) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Broker {
    /// A guest runs.
    fn add(
        &mut self,
        nodes: &mut impl Nodes,
        domain: u16,
        cid: u32,
        owner: &str,
        now: Instant,
    ) -> Result<(), xenstore::Error> {
        if self.guests.contains_key(&domain) {
            return Ok(());
        }
        lenient(nodes.write(&path(domain, CID), &cid.to_string()))?;
        self.guests.insert(
            domain,
            Guest {
                cid,
                owner: owner.to_owned(),
                dials: BTreeSet::new(),
                looks: Looks::new(now),
                complained: false,
            },
        );
        for (_, node) in PARTS {
            lenient(nodes.watch(&path(domain, node), &token(domain, node)))?;
        }
        Ok(())
    }

    /// Takes up the streams that a process before this one has brought about. To be called once
    /// all guests that run have been added.
    fn adopt(&mut self, nodes: &mut impl Nodes) -> Result<(), xenstore::Error> {
        let domains: Vec<u16> = self.guests.keys().copied().collect();
        for domain in domains {
            let names = lenient(nodes.list(&path(domain, ANSWER)))?.flatten();
            for name in names.unwrap_or_default().iter().take(DIALS_MAX) {
                let Ok(dial) = number::<u32>(name) else {
                    continue;
                };
                let answer = lenient(nodes.read(&path(domain, &format!("{ANSWER}/{name}"))))?;
                let asked = lenient(nodes.read(&path(domain, &format!("{DIAL}/{name}"))))?;
                let Some(asked) = asked.flatten() else {
                    continue;
                };
                let name = StreamName { domain, dial };
                self.note(name);
                if let (Some(Ok(Answer::Open { domain: to })), Ok(Dial { port, .. })) =
                    (answer.flatten().map(|text| text.parse()), asked.parse())
                {
                    let stream = Stream {
                        to,
                        port,
                        offered_until: None,
                    };
                    if self.are_of_one_owner(domain, to) {
                        self.streams.insert(name, stream);
                    } else {
                        self.end(nodes, name, stream)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// From now on the dial has been looked at.
    fn note(&mut self, name: StreamName) {
        if let Some(guest) = self.guests.get_mut(&name.domain) {
            guest.dials.insert(name.dial);
        }
    }

    fn are_of_one_owner(&self, one: u16, other: u16) -> bool {
        let (Some(one), Some(other)) = (self.guests.get(&one), self.guests.get(&other)) else {
            return false;
        };
        !one.owner.is_empty() && one.owner == other.owner
    }

    /// A guest has ended. Those it had streams with hear of it.
    fn remove(&mut self, nodes: &mut impl Nodes, domain: u16) -> Result<(), xenstore::Error> {
        if self.guests.remove(&domain).is_none() {
            return Ok(());
        }
        for (_, node) in PARTS {
            // The watches outlive what they are for.
            lenient(nodes.unwatch(&path(domain, node), &token(domain, node)))?;
        }
        self.end_those(nodes, |name, stream| {
            name.domain == domain || stream.to == domain
        })
    }

    /// Ends a stream for the one who serves it or was to.
    fn withdraw(
        &mut self,
        nodes: &mut impl Nodes,
        name: StreamName,
        stream: Stream,
    ) -> Result<(), xenstore::Error> {
        self.streams.remove(&name);
        if self.guests.contains_key(&stream.to) {
            for node in [
                format!("{ACCEPT}/{}/{name}", stream.port),
                format!("{STREAM}/{name}"),
            ] {
                lenient(nodes.remove(&path(stream.to, &node)))?;
            }
        }
        Ok(())
    }

    /// Ends a stream for both.
    fn end(
        &mut self,
        nodes: &mut impl Nodes,
        name: StreamName,
        stream: Stream,
    ) -> Result<(), xenstore::Error> {
        self.withdraw(nodes, name, stream)?;
        if self.guests.contains_key(&name.domain) {
            for directory in [ANSWER, DIAL] {
                let node = format!("{directory}/{}", name.dial);
                lenient(nodes.remove(&path(name.domain, &node)))?;
            }
        }
        Ok(())
    }

    fn end_those(
        &mut self,
        nodes: &mut impl Nodes,
        are: impl Fn(&StreamName, &Stream) -> bool,
    ) -> Result<(), xenstore::Error> {
        let ended: Vec<_> = (self.streams.iter())
            .filter(|(name, stream)| are(name, stream))
            .map(|(name, stream)| (*name, *stream))
            .collect();
        for (name, stream) in ended {
            self.end(nodes, name, stream)?;
        }
        Ok(())
    }

    /// Looks at what guests have changed, each part once.
    fn look(
        &mut self,
        nodes: &mut impl Nodes,
        changed: BTreeSet<(u16, Part)>,
        now: Instant,
    ) -> Result<(), xenstore::Error> {
        for (domain, part) in changed {
            if !self.may_look(nodes, domain, now)? {
                continue;
            }
            match part {
                Part::Dials => self.look_at_dials(nodes, domain, now)?,
                Part::Offers => self.look_at_offers(nodes, domain)?,
                Part::Streams => self.look_at_streams(nodes, domain)?,
            }
        }
        Ok(())
    }

    /// Says what a guest does that it should not, once.
    fn complain(&mut self, domain: u16, what: &str) {
        if let Some(guest) = self.guests.get_mut(&domain)
            && !std::mem::replace(&mut guest.complained, true)
        {
            tracing::warn!(domain, cid = guest.cid, "a guest {what}");
        }
    }

    /// Whether a guest is to be looked at now; one that has been too often is not for a while.
    fn may_look(
        &mut self,
        nodes: &mut impl Nodes,
        domain: u16,
        now: Instant,
    ) -> Result<bool, xenstore::Error> {
        let Some(guest) = self.guests.get_mut(&domain) else {
            return Ok(false);
        };
        if guest.looks.deaf_until.is_some() {
            return Ok(false);
        }
        if guest.looks.take(now) {
            return Ok(true);
        }
        guest.looks.deaf_until = Some(now + DEAF_FOR);
        self.complain(domain, "floods its part of xenstore: not heard for a while");
        for (_, node) in PARTS {
            lenient(nodes.unwatch(&path(domain, node), &token(domain, node)))?;
        }
        Ok(false)
    }

    /// What is due by time.
    fn tick(&mut self, nodes: &mut impl Nodes, now: Instant) -> Result<(), xenstore::Error> {
        for (domain, guest) in &mut self.guests {
            if guest.looks.deaf_until.is_some_and(|until| until <= now) {
                guest.looks = Looks::new(now);
                for (_, node) in PARTS {
                    // The first event of a watch has all looked at.
                    lenient(nodes.watch(&path(*domain, node), &token(*domain, node)))?;
                }
            }
        }
        let late: Vec<_> = (self.streams.iter())
            .filter(|(_, stream)| stream.offered_until.is_some_and(|until| until <= now))
            .map(|(name, stream)| (*name, *stream))
            .collect();
        for (name, stream) in late {
            self.refuse(nodes, name, stream, Answer::TimedOut)?;
        }
        Ok(())
    }

    /// When there is something due by time.
    fn due(&self) -> Option<Instant> {
        let deaf = (self.guests.values()).filter_map(|guest| guest.looks.deaf_until);
        let offered = (self.streams.values()).filter_map(|stream| stream.offered_until);
        deaf.chain(offered).min()
    }

    fn look_at_dials(
        &mut self,
        nodes: &mut impl Nodes,
        domain: u16,
        now: Instant,
    ) -> Result<(), xenstore::Error> {
        // A list that is too long to be had is a guest's own affair; nothing of it is heard.
        let names = lenient(nodes.list(&path(domain, DIAL)))?.unwrap_or(None);
        let there: BTreeSet<u32> = (names.unwrap_or_default().iter())
            .filter_map(|name| number(name).ok())
            .collect();
        let Some(guest) = self.guests.get_mut(&domain) else {
            return Ok(());
        };
        let gone: Vec<u32> = guest.dials.difference(&there).copied().collect();
        let new: Vec<u32> = there.difference(&guest.dials).copied().collect();
        guest.dials.retain(|dial| there.contains(dial));
        for dial in gone {
            let name = StreamName { domain, dial };
            match self.streams.get(&name).copied() {
                Some(stream) => self.end(nodes, name, stream)?,
                None => drop(lenient(
                    nodes.remove(&path(domain, &format!("{ANSWER}/{dial}"))),
                )?),
            }
        }
        for dial in new {
            let known = self
                .guests
                .get(&domain)
                .map_or(0, |guest| guest.dials.len());
            if known >= DIALS_MAX {
                // They are looked at when others have gone.
                break;
            }
            if !self.may_look(nodes, domain, now)? {
                break;
            }
            let name = StreamName { domain, dial };
            self.note(name);
            let text = lenient(nodes.read(&path(domain, &format!("{DIAL}/{dial}"))))?;
            let Some(Ok(to)) = text.flatten().map(|text| text.parse::<Dial>()) else {
                self.complain(domain, "dials nobody: ignored");
                continue;
            };
            if let Some(answer) = self.dial(nodes, name, to, now)? {
                self.answer(nodes, name, answer)?;
            }
        }
        Ok(())
    }

    /// Offers the stream to whom it is for; what to answer at once.
    fn dial(
        &mut self,
        nodes: &mut impl Nodes,
        name: StreamName,
        to: Dial,
        now: Instant,
    ) -> Result<Option<Answer>, xenstore::Error> {
        let found = (self.guests.iter()).find(|(_, guest)| guest.cid == to.cid);
        let Some((&domain, guest)) = found else {
            return Ok(Some(Answer::Unreachable));
        };
        // A guest has no channel to itself.
        if domain == name.domain || !self.are_of_one_owner(name.domain, domain) {
            return Ok(Some(Answer::Unreachable));
        }
        let deaf = guest.looks.deaf_until.is_some();
        let offered = (self.streams.values())
            .filter(|stream| stream.to == domain && stream.offered_until.is_some())
            .count();
        if deaf || offered >= OFFERS_MAX {
            return Ok(Some(Answer::Busy));
        }
        let Dial { port, .. } = to;
        let listens = lenient(nodes.read(&path(domain, &format!("{LISTEN}/{port}"))))?;
        if listens.flatten().is_none() {
            return Ok(Some(Answer::Refused));
        }
        let Some(cid) = self.guests.get(&name.domain).map(|guest| guest.cid) else {
            return Ok(None);
        };
        let offer = path(domain, &format!("{ACCEPT}/{port}/{name}"));
        if lenient(nodes.write(&offer, &cid.to_string()))?.is_none() {
            return Ok(Some(Answer::Busy));
        }
        let stream = Stream {
            to: domain,
            port,
            offered_until: Some(now + OFFER_LIMIT),
        };
        self.streams.insert(name, stream);
        Ok(None)
    }

    fn answer(
        &mut self,
        nodes: &mut impl Nodes,
        name: StreamName,
        answer: Answer,
    ) -> Result<(), xenstore::Error> {
        let node = path(name.domain, &format!("{ANSWER}/{}", name.dial));
        lenient(nodes.write(&node, &answer.to_string())).map(drop)
    }

    /// An offered stream does not come about.
    fn refuse(
        &mut self,
        nodes: &mut impl Nodes,
        name: StreamName,
        stream: Stream,
        answer: Answer,
    ) -> Result<(), xenstore::Error> {
        self.withdraw(nodes, name, stream)?;
        self.answer(nodes, name, answer)
    }

    /// A guest has said something of the streams that it was offered.
    fn look_at_offers(
        &mut self,
        nodes: &mut impl Nodes,
        domain: u16,
    ) -> Result<(), xenstore::Error> {
        let offered: Vec<_> = (self.streams.iter())
            .filter(|(_, stream)| stream.to == domain && stream.offered_until.is_some())
            .map(|(name, stream)| (*name, *stream))
            .collect();
        for (name, stream) in offered {
            let node = format!("{ACCEPT}/{}/{name}", stream.port);
            if lenient(nodes.read(&path(domain, &node)))?
                .flatten()
                .is_some()
            {
                continue;
            }
            let served = lenient(nodes.list(&path(domain, &format!("{STREAM}/{name}"))))?;
            if served.flatten().is_none() {
                self.refuse(nodes, name, stream, Answer::Refused)?;
                continue;
            }
            if let Some(stream) = self.streams.get_mut(&name) {
                stream.offered_until = None;
            }
            self.answer(nodes, name, Answer::Open { domain })?;
        }
        Ok(())
    }

    /// A guest has given up streams that it served.
    fn look_at_streams(
        &mut self,
        nodes: &mut impl Nodes,
        domain: u16,
    ) -> Result<(), xenstore::Error> {
        let serves = |stream: &Stream| stream.to == domain && stream.offered_until.is_none();
        // As a rule the change is a stream that is about to be served.
        if !self.streams.values().any(serves) {
            return Ok(());
        }
        // One that cannot be listed has streams by whatever names.
        let Some(names) = lenient(nodes.list(&path(domain, STREAM)))? else {
            return Ok(());
        };
        let there: BTreeSet<StreamName> = (names.unwrap_or_default().iter())
            .filter_map(|name| name.parse().ok())
            .collect();
        self.end_those(nodes, |name, stream| {
            serves(stream) && !there.contains(name)
        })
    }
}

/// Says of a watch what it is for.
fn token(domain: u16, node: &str) -> String {
    format!("{domain} {node}")
}

fn part_of(token: &str) -> Option<(u16, Part)> {
    let (domain, node) = token.split_once(' ')?;
    let (part, _) = PARTS.iter().find(|(_, known)| *known == node)?;
    Some((number(domain).ok()?, *part))
}

/// A domain of this back end that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Running {
    id: DomainId,
    domain: u16,
    cid: u32,
    owner: String,
}

/// Brings guests together for as long as the back end is there.
pub(crate) async fn run(inner: Arc<Inner>) {
    loop {
        if let Err(error) = try_run(&inner).await {
            tracing::warn!(
                error = chain(&error),
                "guests do not reach each other for now"
            );
        }
        tokio::time::sleep(RETRY_PAUSE).await;
    }
}

async fn try_run(inner: &Arc<Inner>) -> Result<(), Error> {
    let mut life = inner.events.subscribe();
    let mut running = running(inner).await?;
    let first = running.clone();
    let (mut broker, mut store) = blocking(move || {
        let mut store = Xenstore::open().map_err(|error| broken(&error))?;
        let mut broker = Broker::default();
        first
            .iter()
            .try_for_each(|guest| {
                let Running { domain, cid, .. } = *guest;
                broker.add(&mut store, domain, cid, &guest.owner, Instant::now())
            })
            .and_then(|()| broker.adopt(&mut store))
            .map_err(|error| broken(&error))?;
        Ok((broker, store))
    })
    .await?;
    let failed = |error| Error::io("await events of", "/dev/xen/xenbus")(error);
    let fd = store.as_fd().try_clone_to_owned().map_err(failed)?;
    let events = readable(fd).map_err(failed)?;
    loop {
        let known = running.clone();
        (broker, store) = blocking(move || {
            turn(&mut broker, &mut store, &known).map_err(|error| broken(&error))?;
            Ok((broker, store))
        })
        .await?;
        let due = broker.due();
        tokio::select! {
            ready = events.readable() => ready.map_err(failed)?.clear_ready(),
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now).into()), if due.is_some() => {}
            changed = life.recv() => match changed {
                Ok(event) => follow(inner, &mut running, &event.id, &event.state).await?,
                Err(RecvError::Lagged(_)) => running = self::running(inner).await?,
                Err(RecvError::Closed) => return Ok(()),
            }
        }
    }
}

async fn follow(
    inner: &Inner,
    running: &mut Vec<Running>,
    id: &DomainId,
    state: &DomainState,
) -> Result<(), Error> {
    running.retain(|known| known.id != *id);
    if matches!(state, DomainState::Running | DomainState::Paused) {
        running.extend(guest(inner, *id).await?);
    }
    Ok(())
}

async fn guest(inner: &Inner, id: DomainId) -> Result<Option<Running>, Error> {
    let Some(found) = inner.find(id) else {
        return Ok(None);
    };
    let domain = inner.libvirt.domid(id).await?;
    Ok(domain
        .and_then(|domain| u16::try_from(domain).ok())
        .map(|domain| Running {
            id,
            domain,
            cid: found.spec.cid,
            owner: found.spec.owner.clone(),
        }))
}

async fn running(inner: &Inner) -> Result<Vec<Running>, Error> {
    let ids: Vec<DomainId> = (inner.lock().iter())
        .filter(|(_, domain)| {
            matches!(
                domain.life.get(),
                DomainState::Running | DomainState::Paused
            )
        })
        .map(|(id, _)| *id)
        .collect();
    let mut running = Vec::new();
    for id in ids {
        running.extend(guest(inner, id).await?);
    }
    Ok(running)
}

/// Does all there is to do.
fn turn(
    broker: &mut Broker,
    store: &mut Xenstore,
    running: &[Running],
) -> Result<(), xenstore::Error> {
    let ended: Vec<u16> = (broker.guests.keys())
        .filter(|domain| !running.iter().any(|guest| guest.domain == **domain))
        .copied()
        .collect();
    for domain in ended {
        broker.remove(store, domain)?;
    }
    for guest in running {
        let Running { domain, cid, .. } = *guest;
        broker.add(store, domain, cid, &guest.owner, Instant::now())?;
    }
    loop {
        let mut changed = BTreeSet::new();
        // Events come with replies, too, and then the descriptor does not tell of them.
        while let Some(event) = store.next_event()? {
            changed.extend(part_of(&event.token));
        }
        broker.tick(store, Instant::now())?;
        if changed.is_empty() {
            return Ok(());
        }
        broker.look(store, changed, Instant::now())?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A store in memory.
    #[derive(Debug, Default)]
    struct Fake {
        nodes: BTreeMap<String, String>,
        watched: BTreeSet<String>,
        /// Where something was written or removed.
        touched: BTreeSet<String>,
        requests: usize,
    }

    impl Nodes for Fake {
        fn read(&mut self, path: &str) -> Result<Option<String>, xenstore::Error> {
            self.requests += 1;
            match self.nodes.get(path) {
                // As a value that is no text.
                Some(value) if value == "?" => Err(xenstore::Error::Malformed),
                value => Ok(value.cloned()),
            }
        }

        fn list(&mut self, path: &str) -> Result<Option<Vec<String>>, xenstore::Error> {
            self.requests += 1;
            let prefix = format!("{path}/");
            let names: BTreeSet<String> = (self.nodes.keys())
                .filter_map(|node| node.strip_prefix(&prefix))
                .filter_map(|rest| rest.split('/').next())
                .map(str::to_owned)
                .collect();
            let there = !names.is_empty() || self.nodes.contains_key(path);
            Ok(there.then(|| names.into_iter().collect()))
        }

        fn write(&mut self, path: &str, value: &str) -> Result<(), xenstore::Error> {
            self.requests += 1;
            self.touched.insert(path.to_owned());
            self.nodes.insert(path.to_owned(), value.to_owned());
            Ok(())
        }

        fn remove(&mut self, path: &str) -> Result<(), xenstore::Error> {
            self.requests += 1;
            self.touched.insert(path.to_owned());
            let below = format!("{path}/");
            self.nodes
                .retain(|node, _| node != path && !node.starts_with(&below));
            Ok(())
        }

        fn watch(&mut self, _: &str, token: &str) -> Result<(), xenstore::Error> {
            self.watched.insert(token.to_owned());
            Ok(())
        }

        fn unwatch(&mut self, _: &str, token: &str) -> Result<(), xenstore::Error> {
            self.watched.remove(token);
            Ok(())
        }
    }

    /// Guests 1 and 2 are Alice's, 3 is Bob's, 4 and 5 are nobody's. CIDs are 100 more.
    struct Host {
        broker: Broker,
        store: Fake,
        now: Instant,
    }

    const OWNERS: [&str; 5] = ["alice", "alice", "bob", "", ""];

    impl Host {
        fn new() -> Self {
            let mut host = Self {
                broker: Broker::default(),
                store: Fake::default(),
                now: Instant::now(),
            };
            host.add_all();
            host
        }

        fn add_all(&mut self) {
            for (domain, owner) in (1..).zip(OWNERS) {
                let cid = 100 + u32::from(domain);
                self.broker
                    .add(&mut self.store, domain, cid, owner, self.now)
                    .unwrap();
            }
        }

        fn set(&mut self, domain: u16, node: &str, value: &str) {
            let node = path(domain, node);
            self.store.nodes.insert(node, value.to_owned());
        }

        fn unset(&mut self, domain: u16, node: &str) {
            let node = path(domain, node);
            let below = format!("{node}/");
            (self.store.nodes).retain(|known, _| *known != node && !known.starts_with(&below));
        }

        fn get(&self, domain: u16, node: &str) -> Option<&str> {
            self.store
                .nodes
                .get(&path(domain, node))
                .map(String::as_str)
        }

        /// All guests have changed everything.
        fn look(&mut self) {
            let changed = (1..=5).flat_map(|domain| PARTS.map(|(part, _)| (domain, part)));
            let watched = changed.filter(|(domain, part)| {
                let (_, node) = PARTS.iter().find(|(known, _)| known == part).unwrap();
                self.store.watched.contains(&token(*domain, node))
            });
            let changed = watched.collect();
            self.broker
                .look(&mut self.store, changed, self.now)
                .unwrap();
        }

        fn dial(&mut self, from: u16, number: u32, to: &str) -> Option<String> {
            self.set(from, &format!("{DIAL}/{number}"), to);
            self.look();
            self.get(from, &format!("{ANSWER}/{number}"))
                .map(str::to_owned)
        }

        /// A stream from 1 to port 7 of 2.
        fn open(&mut self, number: u32) {
            self.set(2, &format!("{LISTEN}/7"), "");
            assert_eq!(self.dial(1, number, "102 7"), None);
            assert_eq!(self.get(2, &format!("{ACCEPT}/7/1-{number}")), Some("101"));
            self.set(2, &format!("{STREAM}/1-{number}/ring-ref"), "8");
            self.unset(2, &format!("{ACCEPT}/7/1-{number}"));
            self.look();
            let answer = self.get(1, &format!("{ANSWER}/{number}"));
            assert_eq!(answer, Some("open 2"));
        }

        fn tick(&mut self, time: Duration) {
            self.now += time;
            self.broker.tick(&mut self.store, self.now).unwrap();
        }
    }

    #[test]
    fn guests_learn_their_identifier() {
        let host = Host::new();
        assert_eq!(host.get(3, CID), Some("103"));
    }

    #[test]
    fn a_stream_comes_about_and_goes_with_either_end() {
        let mut host = Host::new();
        host.open(5);
        // The one who serves closes.
        host.unset(2, &format!("{STREAM}/1-5"));
        host.look();
        assert_eq!(host.get(1, &format!("{ANSWER}/5")), None);
        assert_eq!(host.get(1, &format!("{DIAL}/5")), None);
        // The one who has dialled closes.
        host.open(6);
        host.unset(1, &format!("{DIAL}/6"));
        host.look();
        assert_eq!(host.get(1, &format!("{ANSWER}/6")), None);
        assert_eq!(host.store.list(&path(2, STREAM)).unwrap(), None);
        // The same number again.
        host.open(6);
        assert_eq!(host.broker.streams.len(), 1);
    }

    #[test]
    fn the_end_of_a_guest_ends_its_streams() {
        for ended in [1, 2] {
            let mut host = Host::new();
            host.open(5);
            host.broker.remove(&mut host.store, ended).unwrap();
            let there = [
                host.get(1, &format!("{ANSWER}/5")),
                host.get(2, &format!("{STREAM}/1-5/ring-ref")),
            ];
            // What the guest itself has written goes with its part of the store.
            assert_eq!(there[usize::from(ended % 2)], None);
            assert!(host.broker.streams.is_empty());
            assert!(!host.store.watched.contains(&token(ended, DIAL)));
        }
    }

    #[test]
    fn others_guests_are_as_if_there_were_none() {
        let mut host = Host::new();
        for domain in 1..=5 {
            host.set(domain, &format!("{LISTEN}/7"), "");
        }
        let cases = [
            (1, "103 7"),
            (1, "102 8"),
            (1, "999 7"),
            (1, "2 7"),
            (1, "101 7"),
            (3, "101 7"),
            // Of no owner is not of one owner.
            (4, "105 7"),
        ];
        for (number, (from, to)) in (1..).zip(cases) {
            let answer = host.dial(from, number, to);
            let expected = if to == "102 8" {
                "refused"
            } else {
                "unreachable"
            };
            assert_eq!(answer.as_deref(), Some(expected), "{from} to {to}");
        }
        // And nothing has been looked for there, which would take its time.
        let requests = |host: &mut Host, number, to| {
            let before = host.store.requests;
            host.dial(1, number, to);
            host.store.requests - before
        };
        let other = requests(&mut host, 20, "103 7");
        assert_eq!(other, requests(&mut host, 21, "999 7"));
        assert!(host.store.touched.iter().all(|path| !path.contains(ACCEPT)));
    }

    #[test]
    fn a_refusal_and_silence_are_answered() {
        let mut host = Host::new();
        host.set(2, &format!("{LISTEN}/7"), "");
        assert_eq!(host.dial(1, 1, "102 7"), None);
        assert_eq!(host.dial(1, 2, "102 7"), None);
        host.unset(2, &format!("{ACCEPT}/7/1-1"));
        host.look();
        assert_eq!(host.get(1, &format!("{ANSWER}/1")), Some("refused"));
        assert_eq!(host.get(1, &format!("{ANSWER}/2")), None);
        host.tick(OFFER_LIMIT);
        assert_eq!(host.get(1, &format!("{ANSWER}/2")), Some("timed-out"));
        assert_eq!(host.get(2, &format!("{ACCEPT}/7/1-2")), None);
        assert_eq!(host.broker.due(), None);
    }

    #[test]
    fn a_guest_has_so_many_dials_and_offers() {
        let mut host = Host::new();
        host.set(2, &format!("{LISTEN}/7"), "");
        for number in 0..DIALS_MAX as u32 + 10 {
            host.set(1, &format!("{DIAL}/{number}"), "102 7");
        }
        host.look();
        assert_eq!(host.broker.streams.len(), OFFERS_MAX);
        assert_eq!(host.broker.guests[&1].dials.len(), DIALS_MAX);
        let busy = (host.store.nodes.values()).filter(|value| *value == "busy");
        assert_eq!(busy.count(), DIALS_MAX - OFFERS_MAX);
        // Those beyond come when others have gone.
        for number in 0..20 {
            host.unset(1, &format!("{DIAL}/{number}"));
        }
        host.look();
        host.look();
        assert_eq!(host.broker.guests[&1].dials.len(), DIALS_MAX - 10);
    }

    #[test]
    fn nonsense_is_ignored_and_does_not_spread() {
        let mut host = Host::new();
        for (node, value) in [
            ("dial/1", "102"),
            ("dial/2", "102 7 7"),
            ("dial/3", "?"),
            ("dial/4", "-1 7"),
            ("dial/5", "102 4294967296"),
            ("dial/6", ""),
            ("dial/x", "102 7"),
            ("dial/07", "102 7"),
            ("dial/4294967296", "102 7"),
            ("dial/8/deeper/still", "102 7"),
            ("answer/9", "open 2"),
            ("accept/7/2-1", "102"),
            ("accept/7", "x"),
            ("stream/2-1", "x"),
            ("stream/x", "x"),
            ("listen", "x"),
        ] {
            host.set(1, &format!("{}/{node}", xbee_link::rendezvous::ROOT), value);
        }
        host.store.touched.clear();
        host.look();
        assert!(host.broker.streams.is_empty());
        let own = path(1, "");
        let strange: Vec<_> = (host.store.touched.iter())
            .filter(|path| !path.starts_with(&own))
            .collect();
        assert!(strange.is_empty(), "{strange:?}");
        // It can go on as if nothing had been.
        host.open(50);
    }

    #[test]
    fn a_flood_is_not_heard_for_a_while_and_costs_a_bounded_time() {
        let mut host = Host::new();
        for _ in 0..LOOKS_BURST {
            host.look();
        }
        // All of them, here; but another one that has done nothing is heard.
        assert!(host.store.watched.is_empty());
        let mut calm = Host::new();
        for number in 0..LOOKS_BURST {
            let dials = BTreeSet::from([(3, Part::Dials)]);
            calm.set(3, &format!("{DIAL}/{number}"), "");
            (calm.broker.look(&mut calm.store, dials, calm.now)).unwrap();
            calm.unset(3, &format!("{DIAL}/{number}"));
        }
        let before = calm.store.requests;
        calm.set(3, &format!("{DIAL}/1"), "101 7");
        calm.look();
        assert!(calm.store.requests - before < 20);
        assert!(!calm.store.watched.contains(&token(3, DIAL)));
        calm.open(5);
        calm.tick(DEAF_FOR);
        assert!(calm.store.watched.contains(&token(3, DIAL)));
        assert_eq!(calm.dial(3, 2, "102 7").as_deref(), Some("unreachable"));
    }

    #[test]
    fn another_process_takes_up_the_streams() {
        let mut host = Host::new();
        host.open(5);
        // Under way.
        assert_eq!(host.dial(1, 6, "102 7"), None);
        // With a guest that ends meanwhile.
        host.set(1, &format!("{DIAL}/7"), "109 7");
        host.set(1, &format!("{ANSWER}/7"), "open 9");
        host.broker = Broker::default();
        host.add_all();
        host.broker.adopt(&mut host.store).unwrap();
        host.look();
        assert_eq!(host.get(1, &format!("{ANSWER}/7")), None);
        assert_eq!(host.get(1, &format!("{ANSWER}/5")), Some("open 2"));
        assert_eq!(host.get(2, &format!("{ACCEPT}/7/1-6")), Some("101"));
        host.unset(2, &format!("{STREAM}/1-5"));
        host.look();
        assert_eq!(host.get(1, &format!("{ANSWER}/5")), None);
    }

    #[test]
    fn tokens_name_what_they_are_for() {
        for (part, node) in PARTS {
            assert_eq!(part_of(&token(7, node)), Some((7, part)));
        }
        assert_eq!(part_of("7 data"), None);
    }
}
