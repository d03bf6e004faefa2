//! The way to the channel: a thread hears what is said on it and answers. Questions are asked from wherever they come.

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};
use xbee_api::chain;
use xbee_kecho::{
    ChannelOptions, Config, Error, EventType, Node, Policy, SinkOptions, Source, Submission,
    SubmitError, TypeError, TypeSelector, Value,
};

use super::message::{ASKED, TO};
use super::{Anywhere, Kecho, lock};
use crate::host::Host;
use crate::message_queue::blocking;

/// What a host has said and others have not read yet is kept up to so many bytes: some hundred messages.
const LOG_BYTES: usize = 1 << 20;
/// How long it takes until the channel is tried again, at first and at most.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Directory in the data directory: a socket by which others on this machine come.
const SOCKETS: &str = "kecho";

/// Why this host cannot be on the channel.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The types of messages are wrong.
    #[error("what hosts say to each other is not described as it should be")]
    Kinds(#[from] TypeError),
    /// Its certificates.
    #[error("`identity` in [kecho] of the configuration")]
    Identity(#[source] Error),
    /// The thread.
    #[error("its thread cannot be started")]
    Thread(#[source] io::Error),
}

/// The channel, while this host is on it.
pub struct Talk(Source);

impl Talk {
    /// How many others hear what is said.
    pub fn others(&self) -> usize {
        // This host hears itself, too.
        self.0.sinks().saturating_sub(1)
    }

    /// Says something to the others. Nobody who is slow holds this host up.
    ///
    /// # Errors
    /// It is no event, or the channel was left.
    pub fn say(
        &self,
        kind: &EventType,
        attribute: (&'static str, Value),
        payload: &[u8],
    ) -> Result<(), SubmitError> {
        self.0.try_submit(&Submission {
            kind,
            attributes: &[attribute],
            payload,
        })
    }
}

/// This host's part in the channel.
pub struct Part {
    hearing: Arc<Hearing>,
    thread: JoinHandle<()>,
}

/// Has this host take part. Where the registry or the others are away, it joins when they are there.
///
/// # Errors
/// [`StartError`].
pub fn start(host: &Arc<Host>, config: Kecho) -> Result<Part, StartError> {
    let node = node_config(&config, &host.config.data);
    let first = match Node::start(node.clone()) {
        Err(error @ Error::Tls { .. }) => return Err(StartError::Identity(error)),
        // It is tried again, and said then.
        first => first.ok(),
    };
    let anywhere = Anywhere::new(host, config)?;
    host.join(anywhere.clone());
    let hearing = Arc::new(Hearing {
        anywhere,
        config: node,
        state: Mutex::new(State {
            node: first,
            ended: false,
        }),
        changed: Condvar::new(),
    });
    let hears = hearing.clone();
    let thread = std::thread::Builder::new().name("anywhere".to_owned());
    let thread = thread.spawn(move || hears.run());
    Ok(Part {
        hearing,
        thread: thread.map_err(StartError::Thread)?,
    })
}

fn node_config(config: &Kecho, data: &Path) -> Config {
    Config {
        registry: Some(config.registry.clone()),
        listen: config.listen.iter().cloned().collect(),
        // Whoever can be a user of this machine is not one of the hosts.
        strict: config.identity.is_some(),
        tls: config.identity.clone(),
        directory: Some(data.join(SOCKETS)),
        log_bytes: LOG_BYTES,
        ..Config::default()
    }
}

impl Part {
    /// Takes part until `stopped`.
    pub async fn run(self, stopped: CancellationToken) {
        stopped.cancelled().await;
        blocking(move || {
            self.hearing.end();
            if self.thread.join().is_err() {
                error!("the thread on the channel of hosts has panicked");
            }
        })
        .await;
    }
}

/// Who hears what is said.
struct Hearing {
    anywhere: Arc<Anywhere>,
    config: Config,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    node: Option<Node>,
    ended: bool,
}

impl Hearing {
    fn run(&self) {
        let mut pause = PAUSE;
        let mut said = String::new();
        loop {
            let Err(error) = self.take_part();
            let why = chain(&error);
            let was_there =
                std::mem::replace(&mut *lock(&self.anywhere.talk), Err(why.clone())).is_ok();
            if was_there {
                pause = PAUSE;
            }
            let state = lock(&self.state);
            if state.ended {
                return;
            }
            let channel = &self.anywhere.config.channel;
            // Once, however often it is tried.
            if was_there || why != said {
                warn!("not on the channel {channel} with other hosts, tried again: {why}");
            }
            said = why;
            let waited = self
                .changed
                .wait_timeout_while(state, pause, |state| !state.ended);
            if waited.unwrap_or_else(PoisonError::into_inner).0.ended {
                return;
            }
            pause = (2 * pause).min(PAUSE_MAX);
        }
    }

    /// The node, which is started if there is none.
    fn node(&self) -> Result<Node, Error> {
        let mut state = lock(&self.state);
        if state.ended {
            return Err(Error::Shutdown);
        }
        if let Some(node) = &state.node {
            return Ok(node.clone());
        }
        let node = Node::start(self.config.clone())?;
        state.node = Some(node.clone());
        Ok(node)
    }

    /// Is on the channel until something goes wrong with it.
    fn take_part(&self) -> Result<Infallible, Error> {
        let anywhere = &self.anywhere;
        let options = ChannelOptions {
            policy: Policy::DropOldest,
            log_bytes: Some(LOG_BYTES),
            ..ChannelOptions::default()
        };
        let channel = self
            .node()?
            .open_or_create(&anywhere.config.channel, options)?;
        let source = channel.source()?;
        let kind = |kind: &EventType| TypeSelector {
            name: kind.name().to_owned(),
            version: Some(kind.version()),
        };
        // Offers to others stay where they are made.
        let sink = channel.sink(SinkOptions {
            types: vec![kind(&anywhere.kinds.question), kind(&anywhere.kinds.offer)],
            filter: Some(format!(
                "has(@{ASKED}) || has(@{TO}) && @{TO} == \"{}\"",
                anywhere.me
            )),
            policy: Some(Policy::DropOldest),
            ..SinkOptions::default()
        })?;
        let talk = Arc::new(Talk(source));
        *lock(&anywhere.talk) = Ok(talk.clone());
        info!(
            "on the channel {} with other hosts",
            anywhere.config.channel
        );
        loop {
            let event = sink.receive()?;
            let message = match anywhere.kinds.read(&event.get()) {
                Ok(message) => message,
                Err(error) => {
                    debug!(%error, "an event says nothing");
                    continue;
                }
            };
            let Some(answer) = anywhere.hear(message) else {
                continue;
            };
            let said = match anywhere.kinds.write(&answer) {
                Ok(written) => talk
                    .say(written.kind, written.attribute, &written.payload)
                    .map_err(|error| chain(&error)),
                Err(error) => Err(chain(&error)),
            };
            // The asker has others to choose from.
            if let Err(why) = said {
                warn!(why, "an offer was not sent");
            }
        }
    }

    fn end(&self) {
        let node = {
            let mut state = lock(&self.state);
            state.ended = true;
            state.node.take()
        };
        self.changed.notify_all();
        if let Some(node) = node {
            node.shutdown();
        }
    }
}

#[cfg(test)]
mod tests {
    use xbee_kecho::TlsFiles;

    use super::*;

    #[test]
    fn who_has_certificates_takes_nothing_without_tls() {
        let mut config = Kecho {
            registry: "tcp:[::1]:1".parse().unwrap(),
            listen: Some("tcp:[::1]:2".parse().unwrap()),
            channel: "c".into(),
            address: "unix:///s".into(),
            identity: None,
        };
        let node = node_config(&config, Path::new("/d"));
        assert!(!node.strict && !node.plaintext && node.tls.is_none());
        assert_eq!(node.listen, [config.listen.clone().unwrap()]);
        assert_eq!(node.directory.as_deref(), Some(Path::new("/d/kecho")));
        config.identity = Some(TlsFiles {
            ca: "/ca".into(),
            certificate: "/c".into(),
            key: "/k".into(),
            crl: None,
        });
        let node = node_config(&config, Path::new("/d"));
        assert!(node.strict && !node.plaintext && node.tls.is_some());
    }
}
