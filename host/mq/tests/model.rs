//! The broker's state machine under random sessions: nothing is lost, delivered to two at a time, delivered again without a
//! mark, or out of order; and the disk has what the queues have.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use proptest::prelude::*;
use xbee_mq::broker::{Broker, Change, ConnectionId, Effect, Ticket};
use xbee_mq::destination::Rights;
use xbee_mq::frame::{Command, Frame, Version};
use xbee_mq::limits::Limits;

const QUEUES: [&str; 2] = ["/queue/a", "/queue/b"];
const MODES: [&str; 3] = ["auto", "client", "client-individual"];

#[derive(Debug, Clone)]
enum Action {
    Connect,
    Gone(u8),
    Disconnect(u8),
    Subscribe {
        client: u8,
        queue: bool,
        mode: u8,
        prefetch: u8,
    },
    Unsubscribe {
        client: u8,
        which: u8,
    },
    Send {
        client: u8,
        queue: bool,
        persistent: bool,
        transaction: bool,
    },
    Answer {
        client: u8,
        which: u8,
        nack: bool,
        transaction: bool,
    },
    Begin(u8),
    End {
        client: u8,
        commit: bool,
    },
    Stored,
    Written {
        client: u8,
        left: u16,
    },
}

fn action() -> impl Strategy<Value = Action> {
    let client = 0..4u8;
    let b = any::<bool>;
    prop_oneof![
        2 => Just(Action::Connect),
        1 => client.clone().prop_map(Action::Gone),
        1 => client.clone().prop_map(Action::Disconnect),
        4 => (client.clone(), b(), 0..3u8, 1..4u8).prop_map(|(client, queue, mode, prefetch)| {
            Action::Subscribe { client, queue, mode, prefetch }
        }),
        2 => (client.clone(), any::<u8>()).prop_map(|(client, which)| Action::Unsubscribe { client, which }),
        12 => (client.clone(), b(), b(), b()).prop_map(|(client, queue, persistent, transaction)| {
            Action::Send { client, queue, persistent, transaction }
        }),
        10 => (client.clone(), any::<u8>(), b(), b()).prop_map(|(client, which, nack, transaction)| {
            Action::Answer { client, which, nack, transaction }
        }),
        2 => client.clone().prop_map(Action::Begin),
        2 => (client.clone(), b()).prop_map(|(client, commit)| Action::End { client, commit }),
        3 => Just(Action::Stored),
        3 => (client, 0..600u16).prop_map(|(client, left)| Action::Written { client, left }),
    ]
}

/// What is sent in it, and what is acknowledged.
type Transaction = (Vec<(String, bool)>, Vec<Vec<(u64, u64)>>);

#[derive(Debug, Default)]
struct ClientModel {
    subscriptions: Vec<(String, u8)>,
    /// What it has and has not settled: acknowledgement, subscription, body.
    held: BTreeMap<(u64, u64), (String, String)>,
    /// Bodies that were sent, and acknowledgements given, in the open transaction.
    transaction: Option<Transaction>,
}

struct Model {
    broker: Broker,
    clients: BTreeMap<u64, ClientModel>,
    next_client: u64,
    next_name: u64,
    /// Bodies that were accepted, and whether they are persistent.
    accepted: BTreeMap<String, bool>,
    consumed: BTreeSet<String>,
    /// Bodies that are with somebody.
    out: HashMap<String, u64>,
    delivered: BTreeSet<String>,
    newest_first: HashMap<String, u64>,
    disk: BTreeSet<u64>,
    under_way: Vec<(Ticket, Vec<Change>)>,
    /// Persistent bodies whose receipts have not come.
    promised: BTreeSet<String>,
    /// Bodies that have been on the disk.
    written: BTreeSet<String>,
}

impl Model {
    fn new() -> Model {
        let limits = Limits {
            outgoing_bytes: 800,
            redeliveries: 2,
            ..Limits::default()
        };
        Model {
            broker: Broker::new(limits, 1, true),
            clients: BTreeMap::new(),
            next_client: 1,
            next_name: 1,
            accepted: BTreeMap::new(),
            consumed: BTreeSet::new(),
            out: HashMap::new(),
            delivered: BTreeSet::new(),
            newest_first: HashMap::new(),
            disk: BTreeSet::new(),
            under_way: Vec::new(),
            promised: BTreeSet::new(),
            written: BTreeSet::new(),
        }
    }

    fn client(&self, which: u8) -> Option<u64> {
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        ids.get(usize::from(which) % ids.len().max(1)).copied()
    }

    fn name(&mut self) -> String {
        self.next_name += 1;
        self.next_name.to_string()
    }

    fn connect(&mut self) -> u64 {
        let id = self.next_client;
        self.next_client += 1;
        let rights = Arc::new(Rights::all());
        self.broker.connect(ConnectionId(id), Version::V1_2, rights);
        self.clients.insert(id, ClientModel::default());
        id
    }

    fn frame(&mut self, client: u64, frame: Frame) {
        self.broker.frame(ConnectionId(client), frame);
        self.follow();
    }

    /// A client's end: what it held can be delivered again.
    fn forget(&mut self, client: u64) {
        let model = self.clients.remove(&client).unwrap();
        for (_, body) in model.held.values() {
            self.out.remove(body);
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Connect if self.clients.len() < 4 => {
                self.connect();
            }
            Action::Connect => {}
            Action::Gone(which) => {
                let Some(client) = self.client(which) else {
                    return;
                };
                self.forget(client);
                self.broker.gone(ConnectionId(client));
                self.follow();
            }
            Action::Disconnect(which) => {
                let Some(client) = self.client(which) else {
                    return;
                };
                self.forget(client);
                self.frame(client, Frame::new(Command::Disconnect));
            }
            Action::Subscribe {
                client,
                queue,
                mode,
                prefetch,
            } => {
                let Some(client) = self.client(client) else {
                    return;
                };
                let id = self.name();
                let model = self.clients.get_mut(&client).unwrap();
                model.subscriptions.push((id.clone(), mode));
                let frame = Frame::new(Command::Subscribe)
                    .header("id", &id)
                    .header("destination", QUEUES[usize::from(queue)])
                    .header("ack", MODES[usize::from(mode)])
                    .header("prefetch-count", &prefetch.to_string());
                self.frame(client, frame);
            }
            Action::Unsubscribe { client, which } => {
                let Some(client) = self.client(client) else {
                    return;
                };
                let model = self.clients.get_mut(&client).unwrap();
                if model.subscriptions.is_empty() {
                    return;
                }
                let at = usize::from(which) % model.subscriptions.len();
                let (id, _) = model.subscriptions.remove(at);
                model.held.retain(|_, (subscription, body)| {
                    let stays = *subscription != id;
                    if !stays {
                        self.out.remove(body);
                    }
                    stays
                });
                self.frame(client, Frame::new(Command::Unsubscribe).header("id", &id));
            }
            Action::Send {
                client,
                queue,
                persistent,
                transaction,
            } => {
                let Some(client) = self.client(client) else {
                    return;
                };
                let body = self.name();
                let mut frame = Frame::new(Command::Send)
                    .header("destination", QUEUES[usize::from(queue)])
                    .header("persistent", if persistent { "true" } else { "false" })
                    .body(body.as_str());
                let model = self.clients.get_mut(&client).unwrap();
                match &mut model.transaction {
                    Some((sent, _)) if transaction => {
                        sent.push((body, persistent));
                        frame.headers.push("transaction", "t");
                    }
                    _ => {
                        frame.headers.push("receipt", &body);
                        if persistent {
                            self.promised.insert(body.clone());
                        }
                        self.accepted.insert(body, persistent);
                    }
                }
                self.frame(client, frame);
            }
            Action::Answer {
                client,
                which,
                nack,
                transaction,
            } => {
                let Some(client) = self.client(client) else {
                    return;
                };
                let model = self.clients.get_mut(&client).unwrap();
                let in_transaction: BTreeSet<(u64, u64)> = match &model.transaction {
                    Some((_, acks)) => acks.iter().flatten().copied().collect(),
                    None => BTreeSet::new(),
                };
                let free: Vec<_> = model
                    .held
                    .keys()
                    .filter(|k| !in_transaction.contains(k))
                    .copied()
                    .collect();
                if free.is_empty() {
                    return;
                }
                let (slot, tag) = free[usize::from(which) % free.len()];
                let subscription = &model.held[&(slot, tag)].0;
                let mode = model
                    .subscriptions
                    .iter()
                    .find(|(id, _)| id == subscription)
                    .unwrap()
                    .1;
                let all: Vec<(u64, u64)> = match MODES[usize::from(mode)] {
                    "client" => free
                        .into_iter()
                        .filter(|(s, t)| *s == slot && *t <= tag)
                        .collect(),
                    _ => vec![(slot, tag)],
                };
                let mut frame = Frame::new(if nack { Command::Nack } else { Command::Ack })
                    .header("id", &format!("{slot}-{tag}"));
                match &mut model.transaction {
                    // Those that are sent back in a transaction are not followed: both ways give them up.
                    Some((_, acks)) if transaction && !nack => {
                        acks.push(all);
                        frame.headers.push("transaction", "t");
                    }
                    _ => self.settle(client, &all, nack),
                }
                self.frame(client, frame);
            }
            Action::Begin(client) => {
                let Some(client) = self.client(client) else {
                    return;
                };
                let model = self.clients.get_mut(&client).unwrap();
                if model.transaction.is_none() {
                    model.transaction = Some(Default::default());
                    self.frame(
                        client,
                        Frame::new(Command::Begin).header("transaction", "t"),
                    );
                }
            }
            Action::End { client, commit } => {
                let Some(client) = self.client(client) else {
                    return;
                };
                let model = self.clients.get_mut(&client).unwrap();
                let Some((sent, acks)) = model.transaction.take() else {
                    return;
                };
                let command = match commit {
                    true => {
                        self.accepted.extend(sent);
                        for all in acks {
                            self.settle(client, &all, false);
                        }
                        Command::Commit
                    }
                    false => Command::Abort,
                };
                self.frame(client, Frame::new(command).header("transaction", "t"));
            }
            Action::Stored => self.store(),
            Action::Written { client, left } => {
                let Some(client) = self.client(client) else {
                    return;
                };
                self.broker.unsent(ConnectionId(client), left.into());
                self.follow();
            }
        }
    }

    fn settle(&mut self, client: u64, all: &[(u64, u64)], nack: bool) {
        let model = self.clients.get_mut(&client).unwrap();
        for key in all {
            // It may have gone back with its subscription.
            if let Some((_, body)) = model.held.remove(key) {
                self.out.remove(&body);
                if !nack {
                    assert!(self.consumed.insert(body), "acknowledged twice");
                }
            }
        }
    }

    fn store(&mut self) {
        self.under_way.extend(self.broker.take_changes());
        let mut last = 0;
        for (ticket, changes) in self.under_way.drain(..) {
            last = ticket;
            for change in changes {
                match change {
                    Change::Put(message) => {
                        assert!(self.disk.insert(message.id));
                        self.written
                            .insert(String::from_utf8(message.body.to_vec()).unwrap());
                    }
                    Change::Delete(id) => assert!(self.disk.remove(&id)),
                }
            }
        }
        self.broker.stored(last);
        self.follow();
    }

    fn follow(&mut self) {
        let effects: Vec<Effect> = self.broker.effects().collect();
        for effect in effects {
            match effect {
                Effect::Message { to, delivery, .. } => {
                    let message = &delivery.message;
                    let body = String::from_utf8(message.body.to_vec()).unwrap();
                    let known = self.accepted.contains_key(&body);
                    assert!(known, "{body} was never accepted");
                    assert!(
                        !self.consumed.contains(&body),
                        "{body} comes after it was consumed"
                    );
                    assert!(!self.out.contains_key(&body), "{body} is with two");
                    let again = !self.delivered.insert(body.clone());
                    let buried = &*message.destination == "/queue/dead-letter";
                    assert!(
                        delivery.redelivered || !again || buried,
                        "{body} comes again without a mark"
                    );
                    if !again {
                        let newest = self
                            .newest_first
                            .entry(message.destination.to_string())
                            .or_default();
                        assert!(message.id > *newest, "{body} is out of order");
                        *newest = message.id;
                    }
                    let subscription = delivery.subscription.unwrap().to_string();
                    match delivery.ack {
                        Some(ack) => {
                            let client = self.clients.get_mut(&to.0).unwrap();
                            client
                                .held
                                .insert((ack.slot, ack.tag), (subscription, body.clone()));
                            self.out.insert(body, to.0);
                        }
                        None => {
                            self.consumed.insert(body);
                        }
                    }
                }
                Effect::Receipt { receipt, .. } => {
                    if self.promised.remove(&*receipt) {
                        assert!(
                            self.written.contains(&*receipt),
                            "a receipt for {receipt}, which is not on the disk"
                        );
                    }
                }
                Effect::Error { refused, .. } => panic!("{refused}"),
                Effect::Discarded { .. } => panic!("discarded"),
                Effect::Close { .. } => {}
            }
        }
    }

    /// All is taken out by one who has time.
    fn finish(mut self) {
        for client in self.clients.keys().copied().collect::<Vec<_>>() {
            self.forget(client);
            self.broker.gone(ConnectionId(client));
            self.follow();
        }
        self.store();
        let left = self.accepted.len() - self.consumed.len();
        assert_eq!(self.broker.messages(), left);
        let persistent = self
            .accepted
            .iter()
            .filter(|(body, p)| **p && !self.consumed.contains(*body));
        assert_eq!(self.disk.len(), persistent.count());
        for queue in [QUEUES[0], QUEUES[1], "/queue/dead-letter"] {
            let client = self.connect();
            let frame = Frame::new(Command::Subscribe)
                .header("id", "last")
                .header("destination", queue);
            self.frame(client, frame);
            for _ in 0..self.accepted.len() {
                self.broker.unsent(ConnectionId(client), 0);
                self.follow();
            }
        }
        self.store();
        let accepted: BTreeSet<String> = self.accepted.keys().cloned().collect();
        assert_eq!(self.consumed, accepted);
        assert_eq!(
            (self.broker.messages(), self.broker.bytes(), self.disk.len()),
            (0, 0, 0)
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

    #[test]
    fn nothing_is_lost_doubled_or_out_of_order(actions in proptest::collection::vec(action(), 1..120)) {
        let mut model = Model::new();
        for action in actions {
            model.act(action);
        }
        model.finish();
    }
}
