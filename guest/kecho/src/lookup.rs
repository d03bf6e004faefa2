//! This node's connection to the registry.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};

use crate::address::{Address, NodeAddress};
use crate::control::Control;
use crate::error::Error;
use crate::membership::{ANSWER, Membership, RETRY, SEARCH};
use crate::message::{Purpose, Reply, Request};
use crate::node::Shared;

/// Between two registrations of the same channel.
const RENEWAL: Duration = Duration::from_secs(3);
/// How long to wait after the first failure to connect; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// How long to wait at most.
const LAST_PAUSE: Duration = Duration::from_secs(1);
/// After this time a registry has heard of all channels that there were before it was started.
const SETTLED: Duration = Duration::from_secs(2);

/// A connection that is made again whenever it ends.
#[derive(Debug)]
pub(crate) struct Lookup {
    pub address: Address,
    control: watch::Sender<Option<Arc<Control>>>,
    /// Why there is no connection.
    why: Mutex<String>,
    /// There is something to register.
    wake: Notify,
}

impl Lookup {
    pub(crate) fn new(address: Address) -> Lookup {
        Lookup {
            address,
            control: watch::Sender::new(None),
            why: Mutex::new("not tried yet".to_owned()),
            wake: Notify::new(),
        }
    }

    fn lost(&self) -> Error {
        Error::Registry {
            address: self.address.clone(),
            why: self.why().clone(),
        }
    }

    fn why(&self) -> MutexGuard<'_, String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks, over the next connection where one breaks.
    async fn ask(&self, request: &Request) -> Result<Reply, Error> {
        let asking = async {
            let mut control = self.control.subscribe();
            loop {
                let current = control.wait_for(Option::is_some).await;
                let current = current.ok().and_then(|current| current.clone());
                let current = current.ok_or_else(|| self.lost())?;
                match current.request(request.clone()).await {
                    Ok(Some(reply)) => return Ok::<_, Error>(reply),
                    _ => current.wait().await,
                }
                sleep(RETRY).await;
            }
        };
        let reply = timeout(ANSWER, asking).await.map_err(|_| self.lost())??;
        match reply {
            Reply::Refused { code, text } => Err(Error::Refused { code, text }),
            reply => Ok(reply),
        }
    }
}

impl Shared {
    /// Keeps the connection up and the registrations alive.
    pub(crate) async fn keep_registered(self: Arc<Self>) {
        let Some(lookup) = &self.lookup else { return };
        let mut pause = FIRST_PAUSE;
        loop {
            let at = NodeAddress::at(lookup.address.clone());
            match self.dial(&at, &Purpose::Registry).await {
                Ok((stream, node)) => {
                    pause = FIRST_PAUSE;
                    *lookup.why() = "no answer in time".to_owned();
                    let control = Control::start(stream, node, self.clone(), self.pulse, ());
                    lookup.control.send_replace(Some(control.clone()));
                    loop {
                        self.register_all(&control);
                        tokio::select! {
                            () = sleep(RENEWAL) => {}
                            () = lookup.wake.notified() => {}
                            () = control.wait() => break,
                        }
                    }
                    *lookup.why() = "the connection has ended".to_owned();
                    lookup.control.send_replace(None);
                }
                Err(error) => {
                    *lookup.why() = error.to_string();
                    tracing::debug!(registry = %lookup.address, %error, "cannot reach the registry");
                }
            }
            sleep(pause).await;
            pause = (2 * pause).min(LAST_PAUSE);
        }
    }

    fn register_all(self: &Arc<Self>, control: &Arc<Control>) {
        let requests: Vec<Request> = {
            let state = self.state();
            let own = state.channels.values().filter(|m| m.is_contact());
            own.map(|m| self.registration(m)).collect()
        };
        for request in requests {
            let Request::Register { channel, .. } = &request else {
                continue;
            };
            let (node, channel) = (self.clone(), channel.clone());
            control.request_then(request, move |reply| match reply {
                Some(Reply::Taken { contact, epoch }) => node.yield_to(&channel, contact, epoch),
                Some(Reply::Refused { code, text }) => {
                    tracing::warn!(channel, code, text, "the registry refuses a channel");
                }
                _ => {}
            });
        }
    }

    /// Registers soon.
    pub(crate) fn registry_wake(&self) {
        if let Some(lookup) = &self.lookup {
            lookup.wake.notify_one();
        }
    }

    /// A channel is no more whose contact this node is.
    pub(crate) fn registry_forget(&self, m: &Membership) {
        if let Some(lookup) = &self.lookup
            && let Some(control) = lookup.control.borrow().clone()
        {
            // What is registered may be of the contact before this one, which only its successor can replace. Where
            // this does not get there, the lease runs out.
            control.request_then(self.registration(m), |_| {});
            let channel = m.name.clone();
            control.request_then(Request::Unregister { channel }, |_| {});
        }
    }

    fn registration(&self, m: &Membership) -> Request {
        Request::Register {
            channel: m.name.clone(),
            contact: self.address.clone(),
            epoch: m.epoch,
            create: false,
            age_ms: m.born.elapsed().as_millis() as u64,
        }
    }

    /// Waits until the registry, if it is there, has heard what it was told of a channel.
    pub(crate) async fn registry_heard(&self, channel: &str) {
        let control = self
            .lookup
            .as_ref()
            .and_then(|lookup| lookup.control.borrow().clone());
        if let Some(control) = control {
            let channel = channel.to_owned();
            // Answered after it. Whoever does not answer hears of it when the lease runs out.
            let _ = timeout(ANSWER, control.request(Request::Lookup { channel })).await;
        }
    }

    /// Registers a new channel. If there is one, it is told whose.
    pub(crate) async fn register_new(&self, name: &str) -> Result<Option<NodeAddress>, Error> {
        let Some(lookup) = &self.lookup else {
            return Ok(None);
        };
        let request = Request::Register {
            channel: name.to_owned(),
            contact: self.address.clone(),
            epoch: 1,
            create: true,
            age_ms: 0,
        };
        match lookup.ask(&request).await? {
            Reply::Registered { .. } => Ok(None),
            Reply::Taken { contact, .. } => Ok(Some(contact)),
            _ => Err(Error::AlreadyExists(name.to_owned())),
        }
    }

    /// Who is to be asked about a channel.
    pub(crate) async fn look_up(&self, name: &str) -> Result<NodeAddress, Error> {
        let none = || Error::NoSuchChannel(name.to_owned());
        let lookup = self.lookup.as_ref().ok_or_else(none)?;
        let request = Request::Lookup {
            channel: name.to_owned(),
        };
        let deadline = Instant::now() + SEARCH;
        loop {
            match lookup.ask(&request).await? {
                Reply::Found { contact, .. } => return Ok(contact),
                Reply::Unknown { since_ms }
                    if Duration::from_millis(since_ms) < SETTLED && Instant::now() < deadline => {}
                _ => return Err(none()),
            }
            sleep(RETRY).await;
        }
    }

    /// The names of all channels.
    pub(crate) async fn list(&self) -> Result<Vec<String>, Error> {
        let mut all: Vec<String> = Vec::new();
        let Some(lookup) = &self.lookup else {
            return Ok(all);
        };
        loop {
            let after = all.last().cloned().unwrap_or_default();
            match lookup.ask(&Request::List { after }).await? {
                Reply::Channels { names } if !names.is_empty() => all.extend(names),
                _ => return Ok(all),
            }
            if all.len() > crate::registry::MAX_CHANNELS {
                return Ok(all);
            }
        }
    }
}
