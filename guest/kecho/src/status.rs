//! Who is in a channel and how its events fare, as an operator asks for it.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;
use uuid::Uuid;

use crate::address::NodeAddress;
use crate::error::Error;
use crate::membership::{ANSWER, Contact, STRANGER};
use crate::message::{Counted, Described, Participant, Reply, Request, Role, is_channel_name};
use crate::node::{Node, Shared};
use crate::source::{SourceCounters, Way};

/// How often somebody else is asked who is said to be the contact.
const REFERRALS: usize = 3;

/// A channel at some moment.
#[derive(Debug, Clone, PartialEq)]
pub struct Status {
    /// Its contact: whom others ask to join.
    pub contact: NodeAddress,
    /// Grows each time another node becomes the contact.
    pub epoch: u64,
    /// The nodes in it, the one that has been there longest first.
    pub nodes: Vec<NodeStatus>,
}

/// A node in a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeStatus {
    /// Where it is.
    pub address: NodeAddress,
    /// How many sinks it has.
    pub sinks: usize,
    /// Its sources; `None` if it did not answer.
    pub sources: Option<Vec<SourceStatus>>,
}

/// A source of a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceStatus {
    /// Its opaque name.
    pub id: Uuid,
    /// How many sinks are attached, by the way to them.
    pub sinks: Vec<(Way, u32)>,
    /// What the slowest of them has not read yet, in bytes.
    pub behind: u64,
    /// What it has done.
    pub counters: SourceCounters,
}

impl From<Counted> for SourceStatus {
    fn from(counted: Counted) -> SourceStatus {
        SourceStatus {
            id: counted.source,
            sinks: counted.sinks,
            behind: counted.behind,
            counters: counted.counters,
        }
    }
}

impl Node {
    /// Asks all nodes of a channel how it is with them, without entering it. Those that do not
    /// answer within some seconds are listed without their sources.
    ///
    /// # Errors
    /// [`Error::Name`]; [`Error::NoSuchChannel`]; [`Error::NoContact`]; [`Error::Registry`].
    pub fn status(&self, channel: &str) -> Result<Status, Error> {
        if !is_channel_name(channel) {
            return Err(Error::Name(channel.chars().take(128).collect()));
        }
        let (node, channel) = (self.owner.shared.clone(), channel.to_owned());
        self.owner
            .wait(async move { node.channel_status(&channel).await })
    }
}

impl Shared {
    pub(crate) fn serve_describe(&self, channel: &str) -> Reply {
        let state = self.state();
        let Some(m) = state.channels.get(channel).filter(|m| !m.is_left()) else {
            let text = format!("this node is not in the channel '{channel}'");
            return Reply::Refused {
                code: STRANGER.to_owned(),
                text,
            };
        };
        let sources = m.sources.values().map(|source| {
            let (sinks, behind) = source.core.sinks();
            Counted {
                source: source.core.id,
                sinks: sinks.into_iter().collect(),
                behind,
                counters: source.core.counters(),
            }
        });
        Reply::Described(Described {
            epoch: m.epoch,
            contact: match &m.contact {
                Contact::Me(_) => self.address.clone(),
                Contact::Other { address, .. } => address.clone(),
            },
            participants: m.list(),
            sources: sources.collect(),
        })
    }

    /// What one node knows of a channel.
    async fn ask_status(
        self: &Arc<Self>,
        channel: &str,
        node: &NodeAddress,
    ) -> Result<Described, String> {
        if node.node == self.id {
            return match self.serve_describe(channel) {
                Reply::Described(described) => Ok(described),
                _ => Err("this node is not in it".to_owned()),
            };
        }
        let control = self.control_to(node).await.map_err(|e| e.to_string())?;
        let request = Request::Describe {
            channel: channel.to_owned(),
        };
        match timeout(ANSWER, control.request(request)).await {
            Ok(Ok(Some(Reply::Described(described)))) => Ok(described),
            Ok(Ok(Some(Reply::Refused { text, .. }))) => Err(text),
            Ok(_) => Err("the connection has ended".to_owned()),
            Err(_) => Err(format!("no answer in {} s", Duration::as_secs(&ANSWER))),
        }
    }

    async fn channel_status(self: &Arc<Self>, channel: &str) -> Result<Status, Error> {
        let no_contact = |why| Error::NoContact {
            channel: channel.to_owned(),
            why,
        };
        let member = {
            let state = self.state();
            state.channels.get(channel).is_some_and(|m| !m.is_left())
        };
        let mut asked = match member {
            true => self.address.clone(),
            false => self.look_up(channel).await?,
        };
        let mut known = self.ask_status(channel, &asked).await.map_err(no_contact)?;
        for _ in 0..REFERRALS {
            if known.contact.node == asked.node {
                break;
            }
            asked = known.contact;
            known = self.ask_status(channel, &asked).await.map_err(no_contact)?;
        }
        let mut asking = JoinSet::new();
        for (at, (_, participant)) in known.participants.iter().enumerate() {
            let (node, channel) = (self.clone(), channel.to_owned());
            let address = participant.node.clone();
            if address.node != asked.node {
                asking.spawn(async move { (at, node.ask_status(&channel, &address).await) });
            }
        }
        let own = known.sources.into_iter();
        let mut answers = vec![None; known.participants.len()];
        let first = known.participants.iter();
        if let Some(at) = first.clone().position(|(_, p)| p.node.node == asked.node) {
            answers[at] = Some(own.map(SourceStatus::from).collect());
        }
        while let Some(answer) = asking.join_next().await {
            if let Ok((at, Ok(described))) = answer {
                let sources = described.sources.into_iter().map(SourceStatus::from);
                answers[at] = Some(sources.collect());
            }
        }
        let nodes = first.zip(answers).map(|((_, participant), sources)| {
            let Participant { node, ports } = participant;
            let is_sink = |port: &&crate::message::Port| port.role == Role::Sink;
            NodeStatus {
                address: node.clone(),
                sinks: ports.iter().filter(is_sink).count(),
                sources,
            }
        });
        Ok(Status {
            contact: asked,
            epoch: known.epoch,
            nodes: nodes.collect(),
        })
    }
}
