//! Who is in a channel. The contact keeps the list; all others follow it, and replace it when it dies.

mod contact;
mod farewell;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::address::NodeAddress;
use crate::attach::Link;
use crate::channel::{ChannelOptions, Participation};
use crate::control::{Control, End};
use crate::error::Error;
use crate::message::{Joined, Notice, Participant, Port, Reply, Request, Role};
use crate::node::{DialError, Shared};
use crate::sink::SinkCore;
use crate::source::{Gone, SourceCore};

/// How long a participant may stay away whose process seems to have died.
const GONE_AFTER: Duration = Duration::from_secs(2);
/// How long participants have to come to a new contact, and how long those are kept of whom it does not know.
const REJOIN: Duration = Duration::from_secs(5);
/// Between two tries to find out who is the contact.
pub(crate) const RETRY: Duration = Duration::from_millis(50);
/// How long somebody is looked for who answers for a channel.
pub(crate) const SEARCH: Duration = Duration::from_secs(5);
/// How long an answer may take.
pub(crate) const ANSWER: Duration = Duration::from_secs(5);
/// How long a change of ports may take, a new contact being found meanwhile.
const UPDATE: Duration = Duration::from_secs(15);

/// This node's part of a channel.
#[derive(Debug)]
pub(crate) struct Membership {
    pub name: String,
    /// Which of this node's memberships of that name.
    pub instance: u64,
    pub options: ChannelOptions,
    pub epoch: u64,
    /// The least that this node's epoch must be should it become the contact.
    pub seen_epoch: u64,
    pub born: Instant,
    pub participants: BTreeMap<u32, Participant>,
    pub contact: Contact,
    /// Somebody looks for the contact.
    pub searching: bool,
    /// The application has left it; this node is in it until another one knows.
    pub leaving: bool,
    pub sources: HashMap<Uuid, SourcePort>,
    pub sinks: HashMap<Uuid, SinkPort>,
    /// What the application holds; `None` until it has it.
    pub held: Option<Weak<Participation>>,
}

#[derive(Debug)]
pub(crate) struct SourcePort {
    pub core: Arc<SourceCore>,
    /// The handle of the channel that made it.
    pub handle: u64,
}

#[derive(Debug)]
pub(crate) struct SinkPort {
    pub core: Arc<SinkCore>,
    pub handle: u64,
    /// By source.
    pub links: HashMap<Uuid, Link>,
}

/// Who keeps the list.
#[derive(Debug)]
pub(crate) enum Contact {
    Me(Desk),
    Other {
        address: NodeAddress,
        /// `None` while it is to be found.
        control: Option<Arc<Control>>,
    },
}

/// What a contact knows beside the list.
#[derive(Debug, Default)]
pub(crate) struct Desk {
    next: u32,
    seats: HashMap<u32, Seat>,
    /// A participant was asked to be the contact, and has not answered.
    handing: bool,
}

/// A participant's connection.
#[derive(Debug, Default)]
struct Seat {
    control: Option<Arc<Control>>,
    /// How often it has come or gone.
    turns: u64,
}

/// How asking somebody went who should be the contact.
enum Asked {
    Joined,
    /// It is in the channel, and the contact is another or not known.
    Not(Option<NodeAddress>),
    /// It is not in the channel.
    Stranger,
    Refused {
        code: String,
        text: String,
    },
    Unreachable(String),
}

type Ports = HashMap<Uuid, Role>;

impl Membership {
    pub(crate) fn new(name: String, instance: u64, options: ChannelOptions) -> Membership {
        Membership {
            name,
            instance,
            options,
            epoch: 1,
            seen_epoch: 1,
            born: Instant::now(),
            participants: BTreeMap::new(),
            contact: Contact::Me(Desk::default()),
            searching: false,
            leaving: false,
            sources: HashMap::new(),
            sinks: HashMap::new(),
            held: None,
        }
    }

    pub(crate) fn is_contact(&self) -> bool {
        matches!(self.contact, Contact::Me(_))
    }

    /// Whether the application has left it.
    pub(crate) fn is_left(&self) -> bool {
        self.leaving
            || self
                .held
                .as_ref()
                .is_some_and(|held| held.strong_count() == 0)
    }

    fn ports(&self) -> Ports {
        let ports = self.participants.values().flat_map(|p| &p.ports);
        ports.map(|port| (port.id, port.role)).collect()
    }

    /// Who has this port.
    pub(crate) fn owner(&self, port: Uuid) -> Option<&NodeAddress> {
        let has = |p: &&Participant| p.ports.iter().any(|other| other.id == port);
        self.participants.values().find(has).map(|p| &p.node)
    }

    /// All ports of one role.
    pub(crate) fn all(&self, role: Role) -> Vec<Uuid> {
        let ports = self.ports().into_iter();
        ports
            .filter(|port| port.1 == role)
            .map(|port| port.0)
            .collect()
    }

    /// This node, with its ports.
    fn own(&self, node: &NodeAddress) -> Participant {
        let sources = self.sources.keys().map(|id| Port {
            id: *id,
            role: Role::Source,
        });
        let sinks = self.sinks.keys().map(|id| Port {
            id: *id,
            role: Role::Sink,
        });
        let mut ports: Vec<Port> = sources.chain(sinks).collect();
        ports.sort_by_key(|port| port.id);
        Participant {
            node: node.clone(),
            ports,
        }
    }

    fn number_of(&self, node: Uuid) -> Option<u32> {
        let mut all = self.participants.iter();
        all.find(|(_, p)| p.node.node == node)
            .map(|(number, _)| *number)
    }

    /// Tells all participants but one.
    fn broadcast(&self, except: Option<u32>, notice: &Notice) {
        let Contact::Me(desk) = &self.contact else {
            return;
        };
        for (number, seat) in &desk.seats {
            if let (true, Some(control)) = (Some(*number) != except, &seat.control) {
                control.notify(notice.clone());
            }
        }
    }

    pub(crate) fn list(&self) -> Vec<(u32, Participant)> {
        self.participants
            .iter()
            .map(|(number, p)| (*number, p.clone()))
            .collect()
    }

    /// Another node is the contact. Its list may lack those who have not come to it yet, also where it has the epoch of
    /// this one, both having taken over: so it is not that of the epoch that was known.
    fn follow(&mut self, address: NodeAddress) {
        self.seen_epoch = self.seen_epoch.max(self.epoch);
        self.epoch = 0;
        self.contact = Contact::Other {
            address,
            control: None,
        };
    }

    /// Ends all of this node's sources and sinks.
    fn close(&mut self, destroyed: bool) {
        for (_, source) in self.sources.drain() {
            source.core.close();
        }
        for (_, sink) in self.sinks.drain() {
            drop(sink.links);
            if destroyed {
                sink.core.end();
            }
        }
    }
}

impl Shared {
    /// Replaces the list. Who is not in the new one is gone, at once or, if a contact does not know
    /// all participants yet, unless they come in time.
    fn replace(
        self: &Arc<Self>,
        m: &mut Membership,
        participants: BTreeMap<u32, Participant>,
        at_once: bool,
    ) {
        let before = m.ports();
        m.participants = participants;
        let after = m.ports();
        let gone: Vec<Uuid> = before
            .into_keys()
            .filter(|id| !after.contains_key(id))
            .collect();
        if at_once {
            self.forget(m, &gone);
        } else if !gone.is_empty() {
            let (node, name, instance) = (self.clone(), m.name.clone(), m.instance);
            self.runtime.spawn(async move {
                sleep(REJOIN).await;
                let mut state = node.state();
                let Some(m) = state.find(&name, instance) else {
                    return;
                };
                let now = m.ports();
                let gone: Vec<Uuid> = gone
                    .into_iter()
                    .filter(|id| !now.contains_key(id))
                    .collect();
                node.forget(m, &gone);
            });
        }
        self.start_links(m);
        self.changed.notify_waiters();
    }

    /// Ends what this node has to do with these ports of others.
    fn forget(&self, m: &mut Membership, gone: &[Uuid]) {
        for id in gone {
            for sink in m.sinks.values_mut() {
                if let Some(link) = sink.links.remove(id) {
                    link.leave();
                    sink.core.gone(*id);
                }
            }
            for source in m.sources.values() {
                if let Some(watch) = self.watchers().remove(&(source.core.id, *id)) {
                    watch.abort();
                }
                source.core.detach(*id, Gone::Left);
            }
        }
    }

    /// A participant came, changed or went.
    fn change(self: &Arc<Self>, m: &mut Membership, number: u32, participant: Option<Participant>) {
        let mut participants = m.participants.clone();
        match participant {
            Some(participant) => participants.insert(number, participant),
            None => participants.remove(&number),
        };
        self.replace(m, participants, true);
    }

    /// A connection to another node has ended.
    pub(crate) fn connection_ended(self: &Arc<Self>, control: &Arc<Control>, end: End) {
        let mut state = self.state();
        if state
            .controls
            .get(&control.node)
            .is_some_and(|known| Arc::ptr_eq(known, control))
        {
            state.controls.remove(&control.node);
        }
        let same = |other: &Option<Arc<Control>>| {
            other
                .as_ref()
                .is_some_and(|other| Arc::ptr_eq(other, control))
        };
        for m in state.channels.values_mut() {
            match &mut m.contact {
                Contact::Other { control, .. } if same(control) => {
                    *control = None;
                    self.search(m);
                }
                Contact::Other { .. } => {}
                Contact::Me(desk) => {
                    let seat = desk.seats.iter_mut().find(|(_, seat)| same(&seat.control));
                    if let Some((number, seat)) = seat {
                        seat.control = None;
                        seat.turns += 1;
                        let number = *number;
                        let after = match end {
                            End::Closed => GONE_AFTER,
                            End::Silent => self.pulse.dead_after,
                        };
                        self.expire(m, number, after);
                    }
                }
            }
        }
    }

    /// What a contact, or who was one, tells.
    pub(crate) fn noticed(self: &Arc<Self>, control: &Arc<Control>, notice: Notice) {
        let mut state = self.state();
        let (Notice::Changed { channel, .. }
        | Notice::Destroyed { channel }
        | Notice::Moved { channel, .. }) = &notice;
        let Some(m) = state.channels.get_mut(channel) else {
            return;
        };
        let Contact::Other { control: known, .. } = &m.contact else {
            return;
        };
        if !known
            .as_ref()
            .is_some_and(|known| Arc::ptr_eq(known, control))
        {
            return;
        }
        match notice {
            Notice::Changed {
                epoch,
                number,
                participant,
                ..
            } => {
                if epoch == m.epoch {
                    self.change(m, number, participant);
                }
            }
            Notice::Destroyed { channel } => self.destroyed(&mut state.channels, &channel),
            Notice::Moved { contact, epoch, .. } => {
                m.seen_epoch = m.seen_epoch.max(epoch);
                match contact.node == self.id {
                    true => self.take_over(m),
                    false => {
                        m.follow(contact);
                        self.search(m);
                    }
                }
            }
        }
    }

    fn destroyed(&self, channels: &mut HashMap<String, Membership>, channel: &str) {
        if let Some(mut m) = channels.remove(channel) {
            m.close(true);
            self.changed.notify_waiters();
        }
    }

    /// Asks a node to let this one in, or to take note of its ports.
    async fn ask(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
        who: &NodeAddress,
        entering: bool,
    ) -> Asked {
        let control = match self.control_to(who).await {
            Ok(control) => control,
            Err(DialError::Unreachable(error)) => return Asked::Unreachable(error.to_string()),
            Err(DialError::Refused { code, text }) => return Asked::Refused { code, text },
        };
        self.ask_over(name, instance, who, &control, entering).await
    }

    async fn ask_over(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
        who: &NodeAddress,
        control: &Arc<Control>,
        entering: bool,
    ) -> Asked {
        let (channel, (own, epoch)) = (name.to_owned(), {
            let mut state = self.state();
            match state.find(name, instance) {
                Some(m) => (m.own(&self.address), Some(m.seen_epoch)),
                None if !entering => return Asked::Unreachable("it was left".to_owned()),
                None => (
                    Participant {
                        node: self.address.clone(),
                        ports: Vec::new(),
                    },
                    None,
                ),
            }
        });
        let request = Request::Join {
            channel,
            participant: own,
            epoch,
        };
        let (sender, receiver) = oneshot::channel();
        let (node, name, from) = (self.clone(), name.to_owned(), control.clone());
        // With its identifier, should only its address have been known.
        let who = NodeAddress {
            node: control.node,
            ..who.clone()
        };
        // In the order in which the contact has said it: later notices build on this.
        control.request_then(request, move |reply| {
            let asked = match reply {
                Some(Reply::Joined(joined)) => {
                    node.joined(&name, instance, who, from, joined, entering);
                    Asked::Joined
                }
                Some(Reply::NotContact { contact }) => Asked::Not(contact),
                Some(Reply::Refused { code, .. }) if code == STRANGER => Asked::Stranger,
                Some(Reply::Refused { code, text }) => Asked::Refused { code, text },
                Some(_) => Asked::Unreachable("an answer to another question".to_owned()),
                None => Asked::Unreachable("the connection has ended".to_owned()),
            };
            // Who asked may have gone.
            let _ = sender.send(asked);
        });
        match timeout(ANSWER, receiver).await {
            Ok(Ok(asked)) => asked,
            Ok(Err(_)) => Asked::Unreachable("the connection has ended".to_owned()),
            Err(_) => Asked::Unreachable("no answer".to_owned()),
        }
    }

    fn joined(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
        who: NodeAddress,
        control: Arc<Control>,
        joined: Joined,
        entering: bool,
    ) {
        let mut state = self.state();
        // What was left while the contact answered stays left: nobody would leave it again.
        if state.down || !entering && state.find(name, instance).is_none() {
            return;
        }
        let m = state
            .channels
            .entry(name.to_owned())
            .or_insert_with(|| Membership::new(name.to_owned(), instance, joined.options.clone()));
        if m.instance != instance {
            return;
        }
        let same = match &m.contact {
            // One that has become the contact meanwhile, or was all the time, stays it.
            Contact::Me(_) if !m.participants.is_empty() => return,
            Contact::Me(_) => true,
            Contact::Other { address, .. } => address.node == who.node && m.epoch == joined.epoch,
        };
        // A contact that it has asked without knowing its addresses is in the list with them.
        let list: BTreeMap<u32, Participant> = joined.participants.into_iter().collect();
        let listed = list.values().find(|p| p.node.node == who.node);
        let address = listed.map_or(who, |p| p.node.clone());
        m.contact = Contact::Other {
            address,
            control: Some(control),
        };
        m.epoch = joined.epoch;
        m.seen_epoch = m.seen_epoch.max(joined.epoch);
        if !joined.known {
            // All have forgotten this node: its sinks must come anew, and would not notice where nobody reads them.
            let sinks = m.sinks.values();
            sinks
                .flat_map(|sink| sink.links.values())
                .for_each(Link::again);
        }
        self.replace(m, list, same);
    }

    /// Enters a channel, beginning with somebody who should know.
    ///
    /// # Errors
    /// What the last one said who was asked, in words.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
        first: NodeAddress,
    ) -> Result<(), Error> {
        let failed = |why: String| Error::NoContact {
            channel: name.to_owned(),
            why,
        };
        let mut next = first;
        // From one to the next, not in circles.
        for _ in 0..4 {
            match self.ask(name, instance, &next, true).await {
                Asked::Joined => return Ok(()),
                Asked::Not(Some(contact)) => next = contact,
                Asked::Not(None) => return Err(failed("its contact is being replaced".to_owned())),
                Asked::Stranger => return Err(Error::NoSuchChannel(name.to_owned())),
                Asked::Refused { code, text } => return Err(Error::Refused { code, text }),
                Asked::Unreachable(why) => return Err(failed(why)),
            }
        }
        Err(failed("each sends to another".to_owned()))
    }

    /// Tells the contact, whoever it is now, which ports this node has.
    pub(crate) async fn update(self: &Arc<Self>, name: &str, instance: u64) -> Result<(), Error> {
        let deadline = Instant::now() + UPDATE;
        let mut why = "its contact is being replaced".to_owned();
        while Instant::now() < deadline {
            let contact = {
                let mut state = self.state();
                // Who leaves must not come back by what it says of its ports.
                let Some(m) = state.find_held(name, instance) else {
                    return Err(Error::Destroyed(name.to_owned()));
                };
                match &m.contact {
                    Contact::Me(_) => None,
                    Contact::Other { address, control } => Some((address.clone(), control.clone())),
                }
            };
            match contact {
                None => {
                    let own = {
                        let mut state = self.state();
                        state.find(name, instance).map(|m| m.own(&self.address))
                    };
                    let Some(own) = own else {
                        return Err(Error::Destroyed(name.to_owned()));
                    };
                    match self.serve_join(None, name, own, None) {
                        Reply::Refused { code, text } => return Err(Error::Refused { code, text }),
                        _ => return Ok(()),
                    }
                }
                Some((address, Some(control))) => {
                    match self
                        .ask_over(name, instance, &address, &control, false)
                        .await
                    {
                        Asked::Joined => return Ok(()),
                        Asked::Refused { code, text } => return Err(Error::Refused { code, text }),
                        Asked::Unreachable(text) => why = text,
                        // It has gone over to another: a notice says so.
                        Asked::Not(_) => {}
                        Asked::Stranger => self.lose_contact(name, instance, &control),
                    }
                }
                Some((_, None)) => {}
            }
            sleep(RETRY).await;
        }
        Err(Error::NoContact {
            channel: name.to_owned(),
            why,
        })
    }

    /// Begins to look for the contact.
    fn search(self: &Arc<Self>, m: &mut Membership) {
        if !m.searching {
            m.searching = true;
            let (node, name, instance) = (self.clone(), m.name.clone(), m.instance);
            self.runtime.spawn(async move {
                node.find_contact(&name, instance).await;
                if let Some(m) = node.state().find(&name, instance) {
                    m.searching = false;
                    // What was lost again before anybody could be told of it.
                    if matches!(m.contact, Contact::Other { control: None, .. }) {
                        node.search(m);
                    }
                }
            });
        }
    }

    /// Asks the contact, then the participants in the order in which they came, until one lets this
    /// node in or this node is the one to take over.
    async fn find_contact(self: &Arc<Self>, name: &str, instance: u64) {
        let mut tried = HashSet::new();
        loop {
            let (contact, candidates) = {
                let mut state = self.state();
                let Some(m) = state.find(name, instance) else {
                    return;
                };
                let Contact::Other {
                    address,
                    control: None,
                } = &m.contact
                else {
                    return;
                };
                let all = m.participants.values().map(|p| p.node.clone());
                let others = all.filter(|node| node.node != address.node);
                (address.clone(), others.collect::<Vec<_>>())
            };
            if tried.insert(contact.node) {
                match self.ask(name, instance, &contact, false).await {
                    Asked::Joined => return,
                    Asked::Not(Some(other)) if other.node != self.id => {
                        if let Asked::Joined = self.ask(name, instance, &other, false).await {
                            return;
                        }
                    }
                    Asked::Refused { code, text } => {
                        tracing::warn!(channel = name, code, text, "the contact refuses this node");
                    }
                    _ => {}
                }
            }
            for candidate in candidates {
                if candidate.node == self.id {
                    let mut state = self.state();
                    if let Some(m) = state.find(name, instance)
                        && matches!(m.contact, Contact::Other { control: None, .. })
                    {
                        self.take_over(m);
                    }
                    return;
                }
                match self.ask(name, instance, &candidate, false).await {
                    Asked::Joined => return,
                    Asked::Not(hint) => {
                        // It will be the contact, or knows better who is.
                        if let Some(hint) = hint {
                            tried.remove(&hint.node);
                            if hint.node != contact.node
                                && let Asked::Joined = self.ask(name, instance, &hint, false).await
                            {
                                return;
                            }
                        }
                        break;
                    }
                    Asked::Stranger | Asked::Refused { .. } | Asked::Unreachable(_) => {}
                }
            }
            sleep(RETRY).await;
        }
    }

    /// Becomes the contact.
    fn take_over(self: &Arc<Self>, m: &mut Membership) {
        let Contact::Other { address, .. } = &m.contact else {
            return;
        };
        let before = address.node;
        m.epoch = m.epoch.max(m.seen_epoch) + 1;
        m.seen_epoch = m.epoch;
        let next = m.participants.keys().next_back().map_or(0, |last| last + 1);
        let mut participants = m.participants.clone();
        participants.retain(|_, p| p.node.node != before);
        let others = participants.iter().filter(|(_, p)| p.node.node != self.id);
        let numbers: Vec<u32> = others.map(|(number, _)| *number).collect();
        let seats = numbers
            .iter()
            .map(|number| (*number, Seat::default()))
            .collect();
        m.contact = Contact::Me(Desk {
            next,
            seats,
            handing: false,
        });
        tracing::info!(
            channel = m.name,
            epoch = m.epoch,
            "this node is the contact now"
        );
        self.replace(m, participants, true);
        if m.number_of(self.id).is_none() {
            // The list was that of a contact that had not heard of this node yet.
            let own = m.own(&self.address);
            let Contact::Me(desk) = &mut m.contact else {
                return;
            };
            let number = desk.next;
            desk.next += 1;
            self.change(m, number, Some(own));
        }
        for number in numbers {
            self.expire(m, number, REJOIN);
        }
        self.registry_wake();
    }

    /// Another node is the contact, says the registry: goes there with all participants.
    pub(crate) fn yield_to(self: &Arc<Self>, name: &str, contact: NodeAddress, epoch: u64) {
        let mut state = self.state();
        let Some(m) = state.channels.get_mut(name) else {
            return;
        };
        if !m.is_contact() || contact.node == self.id || epoch < m.epoch {
            return;
        }
        tracing::info!(channel = name, %contact, "the channel has another contact: going there");
        m.seen_epoch = m.seen_epoch.max(epoch);
        let (channel, address) = (name.to_owned(), contact.clone());
        m.broadcast(
            None,
            &Notice::Moved {
                channel,
                contact,
                epoch,
            },
        );
        m.follow(address);
        self.search(m);
    }

    /// Destroys a channel for all.
    pub(crate) async fn destroy(self: &Arc<Self>, name: &str, instance: u64) -> Result<(), Error> {
        let deadline = Instant::now() + UPDATE;
        while Instant::now() < deadline {
            let control = {
                let mut state = self.state();
                match state.find(name, instance).map(|m| &m.contact) {
                    None => return Ok(()),
                    Some(Contact::Me(_)) => None,
                    Some(Contact::Other { control, .. }) => Some(control.clone()),
                }
            };
            let own = control.is_none();
            let reply = match control {
                None => Some(self.serve_destroy(name)),
                Some(Some(control)) => {
                    let request = Request::Destroy {
                        channel: name.to_owned(),
                    };
                    let reply = timeout(ANSWER, control.request(request)).await;
                    reply.ok().and_then(Result::ok).flatten()
                }
                Some(None) => None,
            };
            if let Some(Reply::Done) = reply {
                // The notice to this node may still be on its way.
                self.destroyed(&mut self.state().channels, name);
                if own {
                    // The name is free when this returns.
                    self.registry_heard(name).await;
                }
                return Ok(());
            }
            sleep(RETRY).await;
        }
        let why = "its contact is being replaced".to_owned();
        Err(Error::NoContact {
            channel: name.to_owned(),
            why,
        })
    }
}

/// Says of a refusal that the node asked is not in the channel.
pub(crate) const STRANGER: &str = "no-such-channel";
