//! Channels as applications see them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use minicbor::{Decode, Encode};
use tokio::time::{sleep, timeout, timeout_at};
use uuid::Uuid;

use crate::address::NodeAddress;
use crate::attach::{ATTACH_TIME, Progress, refused};
use crate::error::Error;
use crate::filter::SinkFilter;
use crate::membership::{ANSWER, Membership, RETRY, SEARCH, SinkPort, SourcePort};
use crate::message::{MAX_PORTS, Reply, Request, Role, is_channel_name};
use crate::node::{MAX_CHANNELS, Node, Owner, Shared, State, local_node};
use crate::sink::{Sink, SinkCore, SinkHome, SinkOptions};
use crate::source::{Flush, Policy, Source, SourceCore, SourceOptions};
use crate::value::Value;

/// What a channel is created with.
#[derive(Debug, Clone, Default, PartialEq, Encode, Decode)]
pub struct ChannelOptions {
    /// For sinks that have no policy of their own.
    #[n(0)]
    pub policy: Policy,
    /// Bytes of a source's log; `None` for what the source's node is configured with.
    #[n(1)]
    pub log_bytes: Option<usize>,
    /// Who sends events to sinks over sockets.
    #[n(2)]
    pub flush: Flush,
}

/// A node's part in a channel, while the application holds anything of it.
#[derive(Debug)]
pub(crate) struct Participation {
    owner: Arc<Owner>,
    name: String,
    instance: u64,
    handles: AtomicU64,
}

impl Drop for Participation {
    fn drop(&mut self) {
        let (node, name, instance) = (self.shared().clone(), self.name.clone(), self.instance);
        self.shared().farewell(async move {
            if let Some(farewell) = node.leave(&name, instance) {
                farewell.await;
            }
        });
    }
}

/// A channel that this node is in. The node leaves it with the last channel, source and sink.
#[derive(Debug)]
pub struct Channel {
    participation: Arc<Participation>,
    /// Which of the handles it is.
    handle: u64,
}

/// A source or a sink, which leaves with its last handle.
struct PortHold {
    participation: Arc<Participation>,
    id: Uuid,
}

impl Drop for PortHold {
    fn drop(&mut self) {
        self.participation.remove_ports(|id, _| id == self.id);
    }
}

impl Node {
    /// Creates a channel.
    ///
    /// # Errors
    /// [`Error::AlreadyExists`]; [`Error::Registry`].
    pub fn create(&self, name: &str, options: ChannelOptions) -> Result<Channel, Error> {
        let (node, channel) = (self.owner.shared.clone(), checked(name)?);
        let instance = self
            .owner
            .wait(async move { node.create(&channel, options).await })?;
        self.hold(name, instance)
            .ok_or_else(|| Error::Destroyed(name.to_owned()))
    }

    /// Enters a channel that there is.
    ///
    /// # Errors
    /// [`Error::NoSuchChannel`]; [`Error::NoContact`]; [`Error::Registry`].
    pub fn open(&self, name: &str) -> Result<Channel, Error> {
        self.open_from(name, None)
    }

    /// Enters a channel that the node at this address is in, without asking the registry.
    ///
    /// # Errors
    /// [`Error::NoSuchChannel`]; [`Error::NoContact`].
    pub fn open_at(&self, name: &str, at: &NodeAddress) -> Result<Channel, Error> {
        self.open_from(name, Some(at.clone()))
    }

    fn open_from(&self, name: &str, at: Option<NodeAddress>) -> Result<Channel, Error> {
        let checked = checked(name)?;
        let deadline = Instant::now() + SEARCH;
        loop {
            let (node, channel, at) = (self.owner.shared.clone(), checked.clone(), at.clone());
            let instance = self
                .owner
                .wait(async move { node.open(&channel, at).await })?;
            match self.hold(name, instance) {
                Some(channel) => return Ok(channel),
                // It was left just now by what it would have been shared with.
                None if Instant::now() < deadline => {}
                None => return Err(Error::Destroyed(name.to_owned())),
            }
        }
    }

    /// Enters a channel, and creates it if there is none.
    ///
    /// # Errors
    /// [`Error::NoContact`]; [`Error::Registry`].
    pub fn open_or_create(&self, name: &str, options: ChannelOptions) -> Result<Channel, Error> {
        let deadline = Instant::now() + SEARCH;
        loop {
            match self.create(name, options.clone()) {
                Err(Error::AlreadyExists(_)) => {}
                created => return created,
            }
            match self.open(name) {
                // It has gone meanwhile.
                Err(Error::NoSuchChannel(_)) if Instant::now() < deadline => {}
                opened => return opened,
            }
        }
    }

    /// The application's hold on a membership, the one that it has or a new one.
    fn hold(&self, name: &str, instance: u64) -> Option<Channel> {
        let mut state = self.owner.shared.state();
        let m = state.find(name, instance)?;
        let participation = match &m.held {
            None => {
                let participation = Arc::new(Participation {
                    owner: self.owner.clone(),
                    name: name.to_owned(),
                    instance,
                    handles: AtomicU64::new(0),
                });
                m.held = Some(Arc::downgrade(&participation));
                participation
            }
            Some(held) => held.upgrade()?,
        };
        drop(state);
        let handle = participation.handles.fetch_add(1, Ordering::Relaxed);
        Some(Channel {
            participation,
            handle,
        })
    }
}

fn checked(name: &str) -> Result<String, Error> {
    match is_channel_name(name) {
        true => Ok(name.to_owned()),
        false => Err(Error::Name(name.chars().take(128).collect())),
    }
}

/// Whether there is room for one more channel.
fn room(state: &State) -> Result<(), Error> {
    match state.channels.len() {
        _ if state.down => Err(Error::Shutdown),
        MAX_CHANNELS.. => Err(Error::Limit {
            what: "channels of a node",
            limit: MAX_CHANNELS,
        }),
        _ => Ok(()),
    }
}

impl Shared {
    async fn create(self: Arc<Self>, name: &str, options: ChannelOptions) -> Result<u64, Error> {
        let exists = || Error::AlreadyExists(name.to_owned());
        // One that is being left is in nobody's way for long.
        let deadline = Instant::now() + SEARCH;
        while let Some(left) = self.is_being_left(name) {
            if !left || Instant::now() > deadline {
                return Err(exists());
            }
            sleep(RETRY).await;
        }
        // So is one whose contact has just left it.
        while let Some(contact) = self.register_new(name).await? {
            if Instant::now() > deadline || self.is_in(name, &contact).await {
                return Err(exists());
            }
            sleep(RETRY).await;
        }
        let mut state = self.state();
        room(&state)?;
        if state.channels.contains_key(name) {
            return Err(exists());
        }
        let instance = state.next_instance();
        let mut m = Membership::new(name.to_owned(), instance, options);
        self.found(&mut m);
        state.channels.insert(name.to_owned(), m);
        Ok(instance)
    }

    /// Whether the application holds nothing any more of this membership; `None` if there is none.
    fn is_being_left(&self, name: &str) -> Option<bool> {
        let state = self.state();
        Some(state.channels.get(name)?.is_left())
    }

    /// Whether this node is in the channel, and stays, as far as it can be asked.
    async fn is_in(self: &Arc<Self>, name: &str, node: &NodeAddress) -> bool {
        if node.node == self.id {
            return self.is_being_left(name) == Some(false);
        }
        let Ok(control) = self.control_to(node).await else {
            return false;
        };
        let channel = name.to_owned();
        let answer = timeout(ANSWER, control.request(Request::Describe { channel })).await;
        matches!(answer, Ok(Ok(Some(Reply::Described(_)))))
    }

    async fn open(self: Arc<Self>, name: &str, at: Option<NodeAddress>) -> Result<u64, Error> {
        let deadline = Instant::now() + SEARCH;
        loop {
            if let Some(left) = self.is_being_left(name) {
                match left {
                    true => sleep(RETRY).await,
                    false => {
                        let state = self.state();
                        if let Some(m) = state.channels.get(name) {
                            return Ok(m.instance);
                        }
                    }
                }
                continue;
            }
            let instance = {
                let mut state = self.state();
                room(&state)?;
                state.next_instance()
            };
            let contact = match &at {
                Some(at) => at.clone(),
                None => self.look_up(name).await?,
            };
            let entered = match contact.node == self.id {
                // The registry has not heard yet that this node has left it.
                true => Err(Error::NoSuchChannel(name.to_owned())),
                false => self.enter(name, instance, contact).await,
            };
            match entered {
                Ok(()) => {
                    if let Some(m) = self.state().channels.get(name) {
                        return Ok(m.instance);
                    }
                }
                Err(error @ Error::Refused { .. }) => return Err(error),
                Err(error) if Instant::now() > deadline => return Err(error),
                // Who is known as the contact has gone: the next one will have registered soon.
                Err(Error::NoSuchChannel(_)) if at.is_some() => {
                    return Err(Error::NoSuchChannel(name.to_owned()));
                }
                Err(_) => {}
            }
            sleep(RETRY).await;
        }
    }
}

impl Participation {
    fn shared(&self) -> &Arc<Shared> {
        &self.owner.shared
    }

    fn gone(&self) -> Error {
        Error::Destroyed(self.name.clone())
    }

    /// Takes sources and sinks of this node out of the channel.
    fn remove_ports(&self, which: impl Fn(Uuid, u64) -> bool) {
        let shared = self.shared();
        {
            let mut state = shared.state();
            let Some(m) = state.find(&self.name, self.instance) else {
                return;
            };
            let before = m.sources.len() + m.sinks.len();
            m.sources.retain(|id, port| {
                let goes = which(*id, port.handle);
                if goes {
                    port.core.close();
                }
                !goes
            });
            m.sinks.retain(|id, port| !which(*id, port.handle));
            if before == m.sources.len() + m.sinks.len() {
                return;
            }
        }
        let (node, name, instance) = (shared.clone(), self.name.clone(), self.instance);
        shared.runtime.spawn(async move {
            // Whatever has come between: the next contact is told what there is then.
            if let Err(error) = node.update(&name, instance).await {
                tracing::debug!(channel = name, %error, "a port has left unheard");
            }
        });
    }
}

impl Channel {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.participation.name
    }

    /// A new source of this channel. When it returns, all sinks are attached that are in the channel
    /// and can be reached.
    ///
    /// # Errors
    /// [`Error::Destroyed`]; [`Error::Limit`]; [`Error::NoContact`]; what the system says.
    pub fn source(&self) -> Result<Source, Error> {
        let participation = self.participation.clone();
        let shared = participation.shared().clone();
        let id = Uuid::new_v4();
        let options = {
            let mut state = shared.state();
            let m = state.find_held(&participation.name, participation.instance);
            let m = m.ok_or_else(|| participation.gone())?;
            room_for_port(m)?;
            SourceOptions {
                log_bytes: m.options.log_bytes.unwrap_or(shared.log_bytes),
                policy: m.options.policy,
                flush: m.options.flush,
            }
        };
        let core = SourceCore::create(id, &options, shared.sender.clone());
        let core = core.map_err(Error::system("make a source's log"))?;
        let hold = PortHold {
            participation: participation.clone(),
            id,
        };
        let (name, instance) = (participation.name.clone(), participation.instance);
        let (port, handle) = (core.clone(), self.handle);
        participation.owner.wait(async move {
            {
                let mut state = shared.state();
                let m = state.find_held(&name, instance);
                let m = m.ok_or_else(|| Error::Destroyed(name.clone()))?;
                m.sources.insert(
                    id,
                    SourcePort {
                        core: port.clone(),
                        handle,
                    },
                );
            }
            shared.update(&name, instance).await?;
            let wanted = shared
                .state()
                .find(&name, instance)
                .map(|m| m.all(Role::Sink));
            let wanted = wanted.unwrap_or_default();
            // Those that do not come in time come later.
            let _ = timeout(
                ATTACH_TIME,
                shared.all_attached(&name, instance, &port, wanted),
            )
            .await;
            Ok(())
        })?;
        Ok(Source::new(core, Arc::new(hold)))
    }

    /// A new sink of this channel. When it returns, it is attached to all sources that are in the
    /// channel and can be reached.
    ///
    /// # Errors
    /// [`Error::Filter`]; [`Error::Destroyed`]; [`Error::Limit`]; [`Error::Refused`] by a source;
    /// [`Error::NoContact`]; what the system says.
    pub fn sink(&self, options: SinkOptions) -> Result<Sink, Error> {
        if let Some(filter) = &options.filter {
            SinkFilter::compile(filter)?;
        }
        let participation = self.participation.clone();
        let shared = participation.shared().clone();
        let id = Uuid::new_v4();
        let core =
            SinkCore::create(id, self.name(), options).map_err(Error::system("make a sink"))?;
        let hold = PortHold {
            participation: participation.clone(),
            id,
        };
        let (name, instance) = (participation.name.clone(), participation.instance);
        let (port, handle) = (core.clone(), self.handle);
        participation.owner.wait(async move {
            {
                let mut state = shared.state();
                let m = state.find_held(&name, instance);
                let m = m.ok_or_else(|| Error::Destroyed(name.clone()))?;
                room_for_port(m)?;
                let links = Default::default();
                m.sinks.insert(
                    id,
                    SinkPort {
                        core: port,
                        handle,
                        links,
                    },
                );
            }
            shared.update(&name, instance).await?;
            let links: Vec<_> = {
                let mut state = shared.state();
                let Some(m) = state.find(&name, instance) else {
                    return Ok(());
                };
                shared.start_links(m);
                let links = m
                    .sinks
                    .get(&id)
                    .into_iter()
                    .flat_map(|sink| sink.links.values());
                links.map(|link| link.progress()).collect()
            };
            let deadline = tokio::time::Instant::now() + ATTACH_TIME;
            for mut progress in links {
                let decided = progress.wait_for(|progress| *progress != Progress::Trying);
                // Otherwise the source has left, or comes later.
                if let Ok(Ok(progress)) = timeout_at(deadline, decided).await
                    && let Progress::Refused { code, text } = &*progress
                {
                    return Err(refused(code.clone(), text.clone()));
                }
            }
            Ok(())
        })?;
        Ok(Sink::new(core, Arc::new(hold)))
    }

    /// Leaves: the sources and sinks end that this handle has made.
    pub fn leave(self) {
        let handle = self.handle;
        let participation = &self.participation;
        {
            let mut state = participation.shared().state();
            if let Some(m) = state.find(&participation.name, participation.instance) {
                for sink in m.sinks.values().filter(|sink| sink.handle == handle) {
                    sink.core.end();
                }
            }
        }
        participation.remove_ports(|_, other| other == handle);
    }

    /// Destroys the channel for all who are in it.
    ///
    /// # Errors
    /// [`Error::NoContact`].
    pub fn destroy(self) -> Result<(), Error> {
        let (node, name) = (
            self.participation.shared().clone(),
            self.participation.name.clone(),
        );
        let instance = self.participation.instance;
        self.participation
            .owner
            .wait(async move { node.destroy(&name, instance).await })
    }
}

fn room_for_port(m: &Membership) -> Result<(), Error> {
    match m.sources.len() + m.sinks.len() {
        MAX_PORTS.. => Err(Error::Limit {
            what: "sources and sinks of a node in a channel",
            limit: MAX_PORTS,
        }),
        _ => Ok(()),
    }
}

impl Shared {
    /// Waits until these sinks are attached, or have left.
    async fn all_attached(
        &self,
        name: &str,
        instance: u64,
        core: &SourceCore,
        mut wanted: Vec<Uuid>,
    ) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let there = core.attached();
            let listed = self.state().find(name, instance).map(|m| m.all(Role::Sink));
            let listed = listed.unwrap_or_default();
            wanted.retain(|sink| !there.contains(sink) && listed.contains(sink));
            if wanted.is_empty() {
                return;
            }
            changed.await;
        }
    }

    /// Asks the nodes of all sources for something.
    async fn ask_sources(
        self: Arc<Self>,
        name: &str,
        instance: u64,
        request: impl Fn(Uuid) -> Request + Send,
        local: impl Fn(&SourceCore) -> Result<(), Error> + Send,
    ) -> Result<(), Error> {
        let sources: Vec<(Uuid, NodeAddress)> = {
            let mut state = self.state();
            let m = state.find(name, instance);
            let m = m.ok_or_else(|| Error::Destroyed(name.to_owned()))?;
            let all = m.all(Role::Source).into_iter();
            all.filter_map(|source| Some((source, m.owner(source)?.clone())))
                .collect()
        };
        let mut answers = Vec::new();
        for (source, address) in sources {
            if self.transports.same_process
                && let Some(node) = local_node(address.node)
            {
                if let Ok(core) = node.find_source(name, source) {
                    local(&core)?;
                }
                continue;
            }
            // One that cannot be reached is told when the sink is attached to it.
            if let Ok(control) = self.control_to(&address).await {
                answers.push(control.request(request(source)));
            }
        }
        for answer in answers {
            if let Ok(Ok(Some(Reply::Refused { code, text }))) = timeout(ANSWER, answer).await
                && code != "no-such-source"
            {
                return Err(refused(code, text));
            }
        }
        Ok(())
    }
}

impl SinkHome for PortHold {
    fn relink(&self, source: Uuid) {
        let participation = &self.participation;
        let mut state = participation.shared().state();
        let m = state.find(&participation.name, participation.instance);
        let sink = m.and_then(|m| m.sinks.get(&self.id));
        if let Some(link) = sink.and_then(|sink| sink.links.get(&source)) {
            link.again();
        }
    }

    fn filter(&self, filter: Option<&str>) -> Result<(), Error> {
        let participation = &self.participation;
        let (node, sink) = (participation.shared().clone(), self.id);
        let (name, instance) = (participation.name.clone(), participation.instance);
        let filter = filter.map(str::to_owned);
        participation.owner.wait(async move {
            let channel = name.clone();
            let set = filter.clone();
            let request = move |source| Request::SetFilter {
                channel: channel.clone(),
                source,
                sink,
                filter: filter.clone(),
            };
            let local = move |core: &SourceCore| Ok(core.set_filter(sink, set.as_deref())?);
            node.ask_sources(&name, instance, request, local).await
        })
    }

    fn state(&self, name: &str, value: &Value) -> Result<(), Error> {
        let participation = &self.participation;
        let (node, sink) = (participation.shared().clone(), self.id);
        let (channel, instance) = (participation.name.clone(), participation.instance);
        let (key, value) = (name.to_owned(), value.clone());
        participation.owner.wait(async move {
            let (to, set) = (channel.clone(), (key.clone(), value.clone()));
            let request = move |source| Request::SetState {
                channel: to.clone(),
                source,
                sink,
                name: key.clone(),
                value: value.clone(),
            };
            let local = move |core: &SourceCore| {
                // A sink that is not attached now brings its state when it comes.
                core.set_state(sink, &set.0, set.1.clone());
                Ok(())
            };
            node.ask_sources(&channel, instance, request, local).await
        })
    }
}
