//! This host among others: hosts that share an event channel tell each other what they could run, so that a client places a job
//! where it begins soonest ([`crate::command`], `xbe submit --anywhere`).
//!
//! Nothing of a job is on the channel but what it needs, and no host takes one from another: the client places it, by the API of
//! the host that it chose, as who it is there. An offer holds nothing, and a host that has filled up since says so.

mod auction;
mod message;
mod talk;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tracing::debug;
use uuid::Uuid;
use xbee_api::{ChannelState, chain};
use xbee_engine::Demand;
use xbee_kecho::TypeError;

use crate::config::Kecho;
use crate::host::Host;
use crate::message_queue::blocking;
use crate::translate;
use auction::{Answered, Auction};
use message::{Kinds, Message, Offer, Question};
use talk::Talk;

pub use auction::{Begins, Bid, Outcome};
pub use message::{Needs, SERVER_BYTES};
pub use talk::{StartError, start};

/// Questions of this host that are open at a time.
const MAX_QUESTIONS: usize = 64;
/// Offers that wait to be looked at, for each question; more are lost.
const OFFERS_WAITING: usize = 256;

/// Why a job is not placed.
#[derive(Debug, thiserror::Error)]
pub enum AnywhereError {
    /// It is alone.
    #[error(
        "this xbed knows no other hosts: submit without --anywhere, or put a table [kecho] into its configuration"
    )]
    Off,
    /// The channel is away.
    #[error("other hosts cannot be asked, for this xbed is not on their channel now: {0}")]
    Away(String),
    /// Too many ask.
    #[error("{MAX_QUESTIONS} questions to other hosts are open: try again in a second")]
    Busy,
    /// It does not fit into a question.
    #[error("what the job needs cannot be asked of other hosts")]
    Long(#[source] TypeError),
    /// Nobody could run it.
    #[error(
        "no host can run this job. This one: {here}. Of the others {asked} answered{}",
        list(others)
    )]
    Nobody {
        /// Why not here.
        here: String,
        /// How many others answered.
        asked: usize,
        /// Why not there, of some.
        others: Vec<String>,
    },
    /// It was to begin at once.
    #[error("the job cannot begin at once on this host any more")]
    NotAtOnce,
    /// It is being looked at.
    #[error("this job is just being placed here: ask again")]
    Placing,
    /// It was here.
    #[error("this job was placed here before, as task {0}, which is over and removed")]
    Gone(Uuid),
}

fn list(others: &[String]) -> String {
    match others {
        [] => String::new(),
        others => format!(": {}", others.join("; ")),
    }
}

impl AnywhereError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            AnywhereError::Off => "anywhere-off",
            AnywhereError::Away(_) => "anywhere-away",
            AnywhereError::Busy => "anywhere-busy",
            AnywhereError::Long(_) => "anywhere-long",
            AnywhereError::Nobody { .. } => "no-offer",
            AnywhereError::NotAtOnce => "not-at-once",
            AnywhereError::Placing => "placing",
            AnywhereError::Gone(_) => "placed-before",
        }
    }
}

/// This host among others.
pub struct Anywhere {
    host: Weak<Host>,
    config: Kecho,
    kinds: Kinds,
    /// Who it is on the channel, as long as this process runs.
    me: Uuid,
    /// The machine's boot.
    machine: Uuid,
    name: String,
    questions: Mutex<HashMap<Uuid, mpsc::Sender<Bid>>>,
    answered: Mutex<Answered>,
    /// The channel, or why there is none.
    talk: Mutex<Result<Arc<Talk>, String>>,
}

/// A question, until it is dropped.
struct Open<'a>(&'a Anywhere, Uuid);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        lock(&self.0.questions).remove(&self.1);
    }
}

impl Anywhere {
    /// Not on the channel yet.
    ///
    /// # Errors
    /// None, unless the types of messages are wrong.
    pub fn new(host: &Arc<Host>, config: Kecho) -> Result<Arc<Anywhere>, TypeError> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        let boot = boot.ok().and_then(|boot| boot.trim().parse().ok());
        Ok(Arc::new(Anywhere {
            host: Arc::downgrade(host),
            config,
            kinds: Kinds::new()?,
            me: Uuid::new_v4(),
            // Where the kernel does not say, no other host is on the same machine.
            machine: boot.unwrap_or_else(Uuid::new_v4),
            name: translate::host_name(),
            questions: Mutex::default(),
            answered: Mutex::default(),
            talk: Mutex::new(Err("it has just been started".to_owned())),
        }))
    }

    /// Its name, for people.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How it stands with the channel.
    pub fn state(&self) -> ChannelState {
        ChannelState {
            channel: self.config.channel.clone(),
            registry: self.config.registry.to_string(),
            away: lock(&self.talk).as_ref().err().cloned(),
        }
    }

    /// Asks the others, and waits for what they offer. To one who is not on this machine, hosts that are reached by a socket
    /// on it are none.
    ///
    /// # Errors
    /// [`AnywhereError::Away`], [`AnywhereError::Busy`], [`AnywhereError::Long`].
    pub async fn ask(&self, needs: Needs, is_remote: bool) -> Result<Outcome, AnywhereError> {
        let talk = lock(&self.talk).clone().map_err(AnywhereError::Away)?;
        let id = Uuid::new_v4();
        let question = Message::Question(Question {
            id,
            asker: self.me,
            needs,
        });
        let written = self.kinds.write(&question).map_err(AnywhereError::Long)?;
        let (kind, attribute, payload) = (written.kind.clone(), written.attribute, written.payload);
        let (tells, mut hears) = mpsc::channel(OFFERS_WAITING);
        let _open = self.open(id, tells).ok_or(AnywhereError::Busy)?;
        let begun = Instant::now();
        let mut auction = Auction::new(id, talk.others(), 0);
        let submitted = blocking(move || talk.say(&kind, attribute, &payload)).await;
        submitted.map_err(|error| AnywhereError::Away(chain(&error)))?;
        loop {
            let now_ms = millis(begun.elapsed());
            let left = Duration::from_millis(auction.until_ms().saturating_sub(now_ms));
            let Ok(Some(bid)) = tokio::time::timeout(left, hears.recv()).await else {
                break;
            };
            let bid = match is_remote && is_path(&bid.server) {
                true => out_of_reach(bid),
                false => bid,
            };
            let heard = auction.offer(bid, millis(begun.elapsed()));
            debug!(question = %id, ?heard, "an offer");
        }
        Ok(auction.end())
    }

    fn open(&self, id: Uuid, tells: mpsc::Sender<Bid>) -> Option<Open<'_>> {
        let mut questions = lock(&self.questions);
        if questions.len() >= MAX_QUESTIONS {
            return None;
        }
        questions.insert(id, tells);
        Some(Open(self, id))
    }

    /// What is to be said to a message.
    fn hear(&self, message: Message) -> Option<Message> {
        match message {
            Message::Question(question) => self.answer(question).map(Message::Offer),
            Message::Offer(offer) => {
                self.heed(offer);
                None
            }
        }
    }

    /// Answers a question of another host, once.
    fn answer(&self, question: Question) -> Option<Offer> {
        if question.asker == self.me || !lock(&self.answered).is_new(question.id) {
            return None;
        }
        Some(Offer {
            question: question.id,
            asker: question.asker,
            machine: self.machine,
            bid: self.bid(&question.needs)?,
        })
    }

    /// What this host offers.
    fn bid(&self, needs: &Needs) -> Option<Bid> {
        let host = self.host.upgrade()?;
        let judge = || {
            translate::is_candidate(&needs.hosts).map_err(|error| error.to_string())?;
            if let Some(image) = &needs.image
                && host.images.get(image).is_err()
            {
                return Err(format!("it has no image {image:?}"));
            }
            let demand = Demand {
                vcpus: needs.vcpus,
                memory_bytes: needs.memory_bytes,
                disk_bytes: 0,
            };
            host.standing(demand).map_err(|error| error.to_string())
        };
        let bid = Bid {
            server: self.config.address.clone(),
            host: self.name.clone(),
            begins: Begins::Never,
            waiting: 0,
            load_permille: 0,
            free_vcpus: 0,
            free_memory_bytes: 0,
            why: String::new(),
        };
        Some(match judge() {
            Err(why) => Bid { why, ..bid },
            Ok((begins, load)) => Bid {
                begins,
                waiting: u32::try_from(load.waiting).unwrap_or(u32::MAX),
                load_permille: load.permille,
                free_vcpus: load.free_vcpus,
                free_memory_bytes: load.free_memory_bytes,
                why: match begins {
                    Begins::Never => "it runs no domains".to_owned(),
                    Begins::Later | Begins::AtOnce => String::new(),
                },
                ..bid
            },
        })
    }

    /// Hands an offer to who waits for it.
    fn heed(&self, offer: Offer) {
        if offer.asker != self.me {
            return;
        }
        let elsewhere = is_path(&offer.bid.server) && offer.machine != self.machine;
        let bid = match elsewhere {
            true => out_of_reach(offer.bid),
            false => offer.bid,
        };
        if let Some(tells) = lock(&self.questions).get(&offer.question)
            && tells.try_send(bid).is_err()
        {
            debug!(question = %offer.question, "an offer too many");
        }
    }
}

/// Whether an address is a socket of the machine that its host is on.
fn is_path(server: &str) -> bool {
    !xbee_carry::Address::is_meant(server)
}

/// The same, as a refusal.
fn out_of_reach(bid: Bid) -> Bid {
    Bid {
        begins: Begins::Never,
        why: "it is reached from its own machine only: see `address` in [kecho]".to_owned(),
        ..bid
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{caller, commands_with, host_of, request};

    const JOB: &str = r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"><j:JobDescription>
        <j:Resources><j:CandidateHosts>HOSTS</j:CandidateHosts><j:TotalCPUCount><j:Exact>CPUS</j:Exact></j:TotalCPUCount>
        </j:Resources></j:JobDescription></j:JobDefinition>"#;

    fn config(address: &str) -> Kecho {
        Kecho {
            registry: "tcp:[::1]:1".parse().unwrap(),
            listen: None,
            channel: "c".into(),
            address: address.into(),
            identity: None,
        }
    }

    fn needs(image: &str, vcpus: u32) -> Needs {
        Needs {
            image: Some(image.into()),
            vcpus,
            memory_bytes: 1 << 20,
            hosts: vec![],
        }
    }

    fn question(id: u128, asker: u128, needs: Needs) -> Question {
        Question {
            id: Uuid::from_u128(id),
            asker: Uuid::from_u128(asker),
            needs,
        }
    }

    #[tokio::test]
    async fn a_host_starts_though_it_cannot_be_on_the_channel() {
        let (_dir, commands) = commands_with(&[]).await;
        let host = host_of(&commands);
        let taken = std::net::TcpListener::bind("[::1]:0").unwrap();
        let listen = format!("tcp:{}", taken.local_addr().unwrap());
        let part = start(
            &host,
            Kecho {
                listen: Some(listen.parse().unwrap()),
                ..config("unix:///s")
            },
        );
        let stopped = tokio_util::sync::CancellationToken::new();
        stopped.cancel();
        part.unwrap().run(stopped).await;
    }

    #[tokio::test]
    async fn a_host_offers_what_it_has() {
        let (_dir, commands) = commands_with(&["vcpus = 4", "domains = 1"]).await;
        let host = host_of(&commands);
        let anywhere = Anywhere::new(&host, config("unix:///s")).unwrap();
        let bid = |needs: &Needs| anywhere.bid(needs).unwrap();
        let offered = bid(&needs("base", 4));
        assert_eq!(
            (offered.begins, offered.server.as_str()),
            (Begins::AtOnce, "unix:///s")
        );
        assert_eq!((offered.load_permille, offered.free_vcpus), (0, 4));
        for (wanted, why) in [
            (needs("base", 5), "at most 4"),
            (needs("other", 1), "no image \"other\""),
            (
                Needs {
                    hosts: vec!["elsewhere".into()],
                    ..needs("base", 1)
                },
                "CandidateHosts",
            ),
        ] {
            let refused = bid(&wanted);
            assert_eq!(refused.begins, Begins::Never);
            assert!(refused.why.contains(why), "{}", refused.why);
        }
        // With one that runs, another has to wait; with one that waits, more do.
        let any = JOB.replace("<j:CandidateHosts>HOSTS</j:CandidateHosts>", "");
        let job = request(&any.replace("CPUS", "1"));
        for waiting in 0..2 {
            commands.submit(caller(7), job.clone()).await.unwrap();
            let offered = bid(&needs("base", 1));
            assert_eq!((offered.begins, offered.waiting), (Begins::Later, waiting));
            assert_eq!((offered.load_permille, offered.free_vcpus), (1000, 3));
        }
    }

    #[tokio::test]
    async fn a_question_is_answered_once_and_not_the_own() {
        let (_dir, commands) = commands_with(&[]).await;
        let host = host_of(&commands);
        let anywhere = Anywhere::new(&host, config("unix:///s")).unwrap();
        let ask = |id, asker| anywhere.answer(question(id, asker, needs("base", 1)));
        let offer = ask(1, 2).unwrap();
        assert_eq!((offer.question.as_u128(), offer.asker.as_u128()), (1, 2));
        assert_eq!(ask(1, 2), None);
        assert!(ask(2, 2).is_some());
        assert_eq!(ask(3, anywhere.me.as_u128()), None);
    }

    #[tokio::test]
    async fn an_offer_reaches_who_asked_and_a_socket_elsewhere_is_none() {
        let (_dir, commands) = commands_with(&[]).await;
        let host = host_of(&commands);
        let one = Anywhere::new(&host, config("unix:///s")).unwrap();
        let other = Anywhere::new(&host, config("unix:///o")).unwrap();
        let (tells, mut hears) = mpsc::channel(8);
        let id = Uuid::from_u128(1);
        let open = one.open(id, tells).unwrap();
        let asked = question(1, one.me.as_u128(), needs("base", 1));
        let offer = other.answer(asked).unwrap();
        one.heed(offer.clone());
        assert_eq!(hears.try_recv().unwrap().begins, Begins::AtOnce);
        // A queue is reached from everywhere, a socket is not.
        let mut elsewhere = offer.clone();
        elsewhere.machine = Uuid::from_u128(9);
        one.heed(elsewhere.clone());
        let refused = hears.try_recv().unwrap();
        assert_eq!(refused.begins, Begins::Never);
        assert!(refused.why.contains("its own machine"));
        elsewhere.bid.server = "stomp://h/q".into();
        one.heed(elsewhere);
        assert_eq!(hears.try_recv().unwrap().begins, Begins::AtOnce);
        // To somebody else, or to a question that is over.
        let mut foreign = offer.clone();
        foreign.asker = other.me;
        one.heed(foreign);
        drop(open);
        one.heed(offer);
        assert!(hears.try_recv().is_err());
    }

    #[tokio::test]
    async fn questions_are_bounded() {
        let (_dir, commands) = commands_with(&[]).await;
        let host = host_of(&commands);
        let anywhere = Anywhere::new(&host, config("unix:///s")).unwrap();
        let open = |id| anywhere.open(Uuid::from_u128(id), mpsc::channel(1).0);
        let mut all: Vec<_> = (0..MAX_QUESTIONS as u128).map(open).collect();
        assert!(all.iter().all(Option::is_some));
        assert!(open(1000).is_none());
        all.pop();
        assert!(open(1000).is_some());
    }

    #[tokio::test]
    async fn what_a_job_needs_is_known_though_this_host_cannot_run_it() {
        let (_dir, commands) = commands_with(&[]).await;
        let host = host_of(&commands);
        let images = &host.images;
        let job = JOB.replace("HOSTS", "<j:HostName>elsewhere</j:HostName>");
        let job = request(&job.replace("CPUS", "1000"));
        let needs = Needs::read(&job, images).unwrap();
        assert_eq!((needs.vcpus, needs.image.as_deref()), (1000, Some("base")));
        assert_eq!(needs.hosts, ["elsewhere"]);
        assert!(Needs::read(&request("<a/>"), images).is_err());
    }
}
