//! Sinks on other machines that hold their sources up: whether they are slow, or cannot be reached. The system would find
//! out in a quarter of an hour.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use tokio::task::JoinSet;
use tokio::time::sleep;
use uuid::Uuid;

use crate::address::NodeAddress;
use crate::log::{HEAD, WANTED};
use crate::node::{DialError, Shared};
use crate::socket::SocketSink;
use crate::source::{Gone, SourceCore};

/// A sink that has much to read.
struct Behind {
    source: Arc<SourceCore>,
    sink: Uuid,
    node: NodeAddress,
    /// Up to where it has read.
    acked: u64,
}

/// Whether a source waits for a sink, or soon will. One that has read all may have half as much unacknowledged as the
/// log holds, and no more.
fn holds_up(source: &SourceCore, sink: &SocketSink) -> bool {
    let ring = source.ring();
    let (head, acked) = (ring.cell(HEAD).load(Ordering::Acquire), sink.acked());
    let wanted = ring.cell(WANTED).load(Ordering::Relaxed);
    acked + ring.capacity() as u64 / 2 < head || acked + 1 < wanted
}

impl Shared {
    /// Looks at them again and again.
    pub(crate) async fn keep_reaching(self: Arc<Self>) {
        let mut still: HashMap<(Uuid, Uuid), (u64, Instant)> = HashMap::new();
        loop {
            sleep(self.pulse.heartbeat).await;
            let behind = self.behind();
            let now = Instant::now();
            let keys: HashSet<_> = behind.iter().map(|b| (b.source.id, b.sink)).collect();
            still.retain(|key, _| keys.contains(key));
            let mut suspects: HashMap<Uuid, (NodeAddress, Vec<Behind>)> = HashMap::new();
            for one in behind {
                let known = still.entry((one.source.id, one.sink));
                let (acked, since) = known.or_insert((one.acked, now));
                if *acked != one.acked {
                    (*acked, *since) = (one.acked, now);
                }
                if now.duration_since(*since) >= self.pulse.dead_after {
                    let node = one.node.clone();
                    let of_node = suspects.entry(node.node).or_insert((node, Vec::new()));
                    of_node.1.push(one);
                }
            }
            let mut asking = JoinSet::new();
            for (node, sinks) in suspects.into_values() {
                let shared = self.clone();
                asking.spawn(async move {
                    // Whoever is there keeps a connection alive; a dead one ends by itself.
                    if let Err(DialError::Unreachable(error)) = shared.control_to(&node).await {
                        for Behind { source, sink, .. } in sinks {
                            tracing::info!(source = %source.id, %sink, %error, "a sink cannot be reached");
                            source.detach(sink, Gone::Broken);
                        }
                    }
                });
            }
            while asking.join_next().await.is_some() {}
        }
    }

    fn behind(&self) -> Vec<Behind> {
        let state = self.state();
        let mut behind = Vec::new();
        for m in state.channels.values() {
            for source in m.sources.values().map(|port| &port.core) {
                for sink in source.sockets().iter().filter(|s| holds_up(source, s)) {
                    // One that the contact has taken off the list is detached anyway.
                    if let Some(node) = m.owner(sink.id) {
                        behind.push(Behind {
                            source: source.clone(),
                            sink: sink.id,
                            node: node.clone(),
                            acked: sink.acked(),
                        });
                    }
                }
            }
        }
        behind
    }
}
