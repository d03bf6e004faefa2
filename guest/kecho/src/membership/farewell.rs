//! How a node leaves a channel. It stays in it until somebody else has taken note, so that of those who leave
//! at the same moment one is the last, knows it, and frees the name.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::{Contact, Membership, STRANGER};
use crate::control::Control;
use crate::message::{Notice, Reply, Request};
use crate::node::Shared;

/// How long a farewell may take. Who has not been heard by then is missed as if it had died.
const FAREWELL: Duration = Duration::from_secs(1);
/// Between two looks at who might hear it.
const LOOK: Duration = Duration::from_millis(5);
/// Says of a refusal to become the contact that the node asked is leaving too.
const LEAVING: &str = "leaving";

/// What a node that leaves does next.
enum Next {
    /// It was the last one.
    Last,
    /// Asks the contact to take it off the list.
    Ask(Arc<Control>),
    /// Asks this participant to be the contact from this epoch on.
    Hand(u32, Arc<Control>, u64),
    /// Nobody is there to ask yet.
    Wait,
}

impl Membership {
    /// Of a contact: the participant that is to be it next, of those that are connected and have not refused.
    fn heir(&self, refused: &HashSet<Uuid>) -> Option<(u32, Arc<Control>)> {
        let Contact::Me(desk) = &self.contact else {
            return None;
        };
        let seats = desk.seats.iter();
        let there = seats.filter_map(|(number, seat)| Some((*number, seat.control.clone()?)));
        let willing = there.filter(|(_, control)| !refused.contains(&control.node));
        willing.min_by_key(|(number, _)| *number)
    }

    /// Tells all participants who is the contact now.
    fn tell_heir(&self, heir: u32) {
        if let Some(heir) = self.participants.get(&heir) {
            let moved = Notice::Moved {
                channel: self.name.clone(),
                contact: heir.node.clone(),
                epoch: self.epoch,
            };
            self.broadcast(None, &moved);
        }
    }
}

impl Shared {
    /// Leaves a channel and says so. What is to be waited for is told; nothing, where it is left already.
    pub(crate) fn leave(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        {
            let mut state = self.state();
            let m = state.find(name, instance)?;
            if std::mem::replace(&mut m.leaving, true) {
                return None;
            }
            m.close(false);
        }
        self.changed.notify_waiters();
        let (node, name) = (self.clone(), name.to_owned());
        Some(async move {
            if timeout(FAREWELL, node.depart(&name, instance))
                .await
                .is_err()
            {
                let mut state = node.state();
                if let Some(m) = state.find(&name, instance) {
                    // Who is connected and does not answer learns it when it goes on; who is not finds out by itself.
                    match m.heir(&HashSet::new()) {
                        Some((heir, _)) => m.tell_heir(heir),
                        None if m.is_contact() => node.registry_forget(m),
                        None => {}
                    }
                    state.channels.remove(&name);
                    node.changed.notify_waiters();
                }
            }
        })
    }

    /// Until somebody has taken note that this node leaves, or nobody is there.
    async fn depart(self: &Arc<Self>, name: &str, instance: u64) {
        let mut refused = HashSet::new();
        while let Some(next) = self.next_to_leave(name, instance, &mut refused) {
            let leave = |epoch| Request::Leave {
                channel: name.to_owned(),
                epoch,
            };
            match next {
                Next::Last => return self.registry_heard(name).await,
                Next::Wait => {}
                Next::Ask(control) => match control.request(leave(None)).await {
                    Ok(Some(Reply::Done)) => {
                        let mut state = self.state();
                        if state.find(name, instance).is_some() {
                            state.channels.remove(name);
                            self.changed.notify_waiters();
                        }
                        return;
                    }
                    // It has left itself: another one is to be found, or this node is the next.
                    Ok(Some(Reply::Refused { code, .. })) if code == STRANGER => {
                        self.lose_contact(name, instance, &control);
                    }
                    // It is leaving, or the connection's end has begun a search.
                    _ => {}
                },
                Next::Hand(heir, control, epoch) => {
                    let answer = control.request(leave(Some(epoch))).await;
                    let answer = answer.ok().flatten();
                    match self.handed(name, instance, heir, answer) {
                        Some(controls) => {
                            for control in controls {
                                control.flushed().await;
                            }
                            return;
                        }
                        None => {
                            refused.insert(control.node);
                            continue;
                        }
                    }
                }
            }
            sleep(LOOK).await;
        }
    }

    /// `None` when it is left.
    fn next_to_leave(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
        refused: &mut HashSet<Uuid>,
    ) -> Option<Next> {
        let mut state = self.state();
        let m = state.find(name, instance)?;
        if let Contact::Other { control, .. } = &m.contact {
            return Some(control.clone().map_or(Next::Wait, Next::Ask));
        }
        if m.participants.values().all(|p| p.node.node == self.id) {
            self.registry_forget(m);
            state.channels.remove(name);
            self.changed.notify_waiters();
            return Some(Next::Last);
        }
        let Some((heir, control)) = m.heir(refused) else {
            // Those that are not connected come or are missed; those that leave too are just about to say so.
            refused.clear();
            return Some(Next::Wait);
        };
        if let Contact::Me(desk) = &mut m.contact {
            desk.handing = true;
        }
        Some(Next::Hand(heir, control, m.epoch))
    }

    /// What the participant has said that is to be the contact. If it is, all are told; by whom is to be waited for.
    fn handed(
        self: &Arc<Self>,
        name: &str,
        instance: u64,
        heir: u32,
        answer: Option<Reply>,
    ) -> Option<Vec<Arc<Control>>> {
        let mut state = self.state();
        let m = state.find(name, instance)?;
        let Contact::Me(desk) = &mut m.contact else {
            return None;
        };
        desk.handing = false;
        match answer {
            Some(Reply::Done) => {}
            Some(Reply::Refused { code, .. }) if code == STRANGER => {
                self.remove(m, heir);
                return None;
            }
            _ => return None,
        }
        let seats = desk.seats.values();
        let controls = seats.filter_map(|seat| seat.control.clone()).collect();
        // The new one too: it may be of a version that only hears this.
        m.tell_heir(heir);
        state.channels.remove(name);
        self.changed.notify_waiters();
        Some(controls)
    }

    /// Who was asked is not in the channel any more.
    pub(super) fn lose_contact(self: &Arc<Self>, name: &str, instance: u64, asked: &Arc<Control>) {
        let mut state = self.state();
        let Some(m) = state.find(name, instance) else {
            return;
        };
        if let Contact::Other { control, .. } = &mut m.contact
            && control.as_ref().is_some_and(|c| Arc::ptr_eq(c, asked))
        {
            *control = None;
            self.search(m);
        }
    }

    /// A participant leaves. If it was the contact, until this epoch, this node is it now.
    pub(crate) fn serve_leave(
        self: &Arc<Self>,
        control: &Control,
        channel: &str,
        epoch: Option<u64>,
    ) -> Reply {
        let mut state = self.state();
        let Some(m) = state.channels.get_mut(channel) else {
            return Reply::Refused {
                code: STRANGER.to_owned(),
                text: format!("this node is not in the channel '{channel}'"),
            };
        };
        match (&m.contact, epoch) {
            (Contact::Me(desk), None) if desk.handing => Reply::NotContact { contact: None },
            (Contact::Me(_), _) => {
                if let Some(number) = m.number_of(control.node) {
                    self.remove(m, number);
                }
                Reply::Done
            }
            (Contact::Other { address, .. }, Some(epoch)) if address.node == control.node => {
                if m.leaving {
                    return Reply::Refused {
                        code: LEAVING.to_owned(),
                        text: format!("this node leaves the channel '{channel}' too"),
                    };
                }
                m.seen_epoch = m.seen_epoch.max(epoch);
                self.take_over(m);
                Reply::Done
            }
            (Contact::Other { address, .. }, _) => Reply::NotContact {
                contact: Some(address.clone()),
            },
        }
    }
}
