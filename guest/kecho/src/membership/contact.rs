//! What a channel's contact does: it keeps the list of who is in it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;

use super::{Contact, Desk, Membership, STRANGER};
use crate::control::Control;
use crate::message::{Joined, MAX_CHANNEL_PORTS, MAX_PARTICIPANTS, Notice, Participant, Reply};
use crate::node::Shared;

impl Shared {
    /// Makes this node the contact of a channel that it has made.
    pub(crate) fn found(self: &Arc<Self>, m: &mut Membership) {
        let own = m.own(&self.address);
        m.contact = Contact::Me(Desk {
            next: 1,
            seats: HashMap::new(),
            handing: false,
        });
        self.change(m, 0, Some(own));
    }

    pub(crate) fn serve_join(
        self: &Arc<Self>,
        control: Option<&Arc<Control>>,
        channel: &str,
        participant: Participant,
        epoch: Option<u64>,
    ) -> Reply {
        let refuse = |code: &str, text: String| Reply::Refused {
            code: code.to_owned(),
            text,
        };
        if control.is_some_and(|control| control.node != participant.node.node) {
            return refuse("participant", "a node joins for itself only".to_owned());
        }
        let mut state = self.state();
        let Some(m) = state.channels.get_mut(channel) else {
            return Reply::Refused {
                code: STRANGER.to_owned(),
                text: format!("this node is not in the channel '{channel}'"),
            };
        };
        let desk = match &mut m.contact {
            Contact::Me(Desk { handing: true, .. }) => {
                return Reply::NotContact { contact: None };
            }
            Contact::Me(desk) => desk,
            Contact::Other { address, control } => {
                return Reply::NotContact {
                    contact: control.as_ref().map(|_| address.clone()),
                };
            }
        };
        if epoch.is_some_and(|epoch| epoch > m.epoch) {
            // There was another contact after this one: the registry will say which.
            self.registry_wake();
            return Reply::NotContact { contact: None };
        }
        let node = participant.node.node;
        let known = m.participants.iter().find(|(_, p)| p.node.node == node);
        let known = known.map(|(number, p)| (*number, *p == participant));
        let number = known.map_or(desk.next, |(number, _)| number);
        if known.is_none() && m.participants.len() >= MAX_PARTICIPANTS {
            return refuse(
                "limit",
                format!("the channel has {MAX_PARTICIPANTS} participants"),
            );
        }
        let ports = m.participants.iter().filter(|(other, _)| **other != number);
        let ports = ports.map(|(_, p)| p.ports.len()).sum::<usize>() + participant.ports.len();
        if ports > MAX_CHANNEL_PORTS {
            return refuse(
                "limit",
                format!("the channel has {MAX_CHANNEL_PORTS} sources and sinks"),
            );
        }
        desk.next = desk.next.max(number + 1);
        if let Some(control) = control {
            let seat = desk.seats.entry(number).or_default();
            seat.control = Some(control.clone());
            seat.turns += 1;
        }
        if known != Some((number, true)) {
            let (channel, epoch) = (m.name.clone(), m.epoch);
            let participant = Some(participant);
            self.change(m, number, participant.clone());
            let notice = Notice::Changed {
                channel,
                epoch,
                number,
                participant,
            };
            m.broadcast(Some(number), &notice);
        }
        Reply::Joined(Joined {
            epoch: m.epoch,
            number,
            options: m.options.clone(),
            participants: m.list(),
            known: known.is_some(),
        })
    }

    /// Takes a participant off the list.
    pub(super) fn remove(self: &Arc<Self>, m: &mut Membership, number: u32) {
        if let Contact::Me(desk) = &mut m.contact {
            desk.seats.remove(&number);
        }
        self.change(m, number, None);
        let (channel, epoch) = (m.name.clone(), m.epoch);
        let notice = Notice::Changed {
            channel,
            epoch,
            number,
            participant: None,
        };
        m.broadcast(None, &notice);
    }

    pub(crate) fn serve_destroy(self: &Arc<Self>, channel: &str) -> Reply {
        let mut state = self.state();
        let Some(m) = state.channels.get_mut(channel) else {
            return Reply::Done;
        };
        if let Contact::Other { address, .. } = &m.contact {
            let contact = Some(address.clone());
            return Reply::NotContact { contact };
        }
        m.broadcast(
            None,
            &Notice::Destroyed {
                channel: channel.to_owned(),
            },
        );
        self.registry_forget(m);
        self.destroyed(&mut state.channels, channel);
        Reply::Done
    }

    /// Gives a participant that has gone some time to come back.
    pub(super) fn expire(self: &Arc<Self>, m: &Membership, number: u32, after: Duration) {
        let Contact::Me(desk) = &m.contact else {
            return;
        };
        let Some(turns) = desk.seats.get(&number).map(|seat| seat.turns) else {
            return;
        };
        let (node, name, instance) = (self.clone(), m.name.clone(), m.instance);
        self.runtime.spawn(async move {
            sleep(after).await;
            let mut state = node.state();
            let Some(m) = state.find(&name, instance) else {
                return;
            };
            let Contact::Me(desk) = &m.contact else {
                return;
            };
            if desk
                .seats
                .get(&number)
                .is_some_and(|seat| seat.turns == turns)
            {
                tracing::info!(channel = name, number, "a participant is gone");
                node.remove(m, number);
            }
        });
    }
}
