//! Jobs that may run on any host: where they could, and taking those that were placed here.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use sha2::{Digest, Sha256};
use uuid::Uuid;
use xbee_api::{Place, PlaceRequest, Places, SubmitRequest, TaskStatus, chain};
use xbee_engine::Load;

use super::{Caller, CommandError, Commands};
use crate::anywhere::{AnywhereError, Begins, Bid, Needs, Outcome};
use crate::message_queue::blocking;
use crate::plan::Plan;
use crate::pool::{self, PoolError};
use crate::reach::Purpose;
use crate::store::Owner;
use crate::translate::Planned;

/// Keys under which a job is being taken.
#[derive(Debug, Default)]
pub struct Placing(Mutex<HashSet<Uuid>>);

/// One of them, until it is dropped.
struct Taking<'a>(&'a Placing, Uuid);

impl Placing {
    fn begin(&self, id: Uuid) -> Option<Taking<'_>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Made only then: to drop one gives the key back.
        all.insert(id).then(|| Taking(self, id))
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let mut all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(&self.1);
    }
}

impl Commands {
    /// Where a job could be placed: here, if it begins here at once; else wherever somebody offers to.
    pub async fn places(
        &self,
        caller: Caller,
        request: SubmitRequest,
    ) -> Result<Places, CommandError> {
        if self.pool.is_some() {
            return Err(PoolError::Anywhere.into());
        }
        let anywhere = self.host.anywhere().ok_or(AnywhereError::Off)?;
        let (host, of_request) = (self.host.clone(), request.clone());
        let needs = blocking(move || Needs::read(&of_request, &host.images)).await?;
        let own = Place {
            server: None,
            host: anywhere.name().to_owned(),
            at_once: false,
        };
        let here = match self.begins_here(caller, request).await {
            Ok((Begins::AtOnce, _)) => {
                let own = Place {
                    at_once: true,
                    ..own
                };
                return Ok(Places {
                    places: vec![own],
                    ..Places::default()
                });
            }
            Ok((Begins::Later, load)) => Ok(load),
            Ok((Begins::Never, _)) => Err("it runs no domains".to_owned()),
            Err(error) if pool::is_of_this_host(&error) => Err(chain(&error)),
            Err(error) => return Err(error),
        };
        let (outcome, note) = match anywhere.ask(needs, caller.owner.is_remote()).await {
            Ok(outcome) => (outcome, None),
            Err(error) if here.is_ok() => (Outcome::default(), Some(chain(&error))),
            Err(error) => return Err(error.into()),
        };
        let asked = outcome.places.len() + outcome.refusals.len();
        let mut bids = outcome.places;
        let mut before = bids.len();
        if let Ok(load) = &here {
            // Who has to wait waits here, unless there is less to wait for elsewhere.
            let longer =
                |bid: &Bid| bid.begins == Begins::Later && bid.waiting as usize >= load.waiting;
            before = bids.iter().position(longer).unwrap_or(before);
        }
        let after = bids.split_off(before);
        let offered = |bid: Bid| Place {
            server: Some(bid.server),
            host: bid.host,
            at_once: bid.begins == Begins::AtOnce,
        };
        let mut places: Vec<Place> = bids.into_iter().map(offered).collect();
        places.extend(here.is_ok().then_some(own));
        places.extend(after.into_iter().map(offered));
        if let (true, Err(here)) = (places.is_empty(), here) {
            let others = outcome.refusals.iter();
            let others = others.map(|bid| format!("{}: {}", bid.host, bid.why));
            return Err(AnywhereError::Nobody {
                here,
                asked,
                others: others.take(SAID).collect(),
            }
            .into());
        }
        Ok(Places {
            places,
            asked,
            note,
        })
    }

    /// When a job could begin on this host.
    async fn begins_here(
        &self,
        caller: Caller,
        request: SubmitRequest,
    ) -> Result<(Begins, Load), CommandError> {
        self.check_wishes(caller, &request)?;
        let planned = self.plan(caller, request, Purpose::Look).await?.0;
        let demand = one(&planned)?.demand();
        self.host.could(caller.owner, demand)?;
        Ok(self.host.standing(demand)?)
    }

    /// Takes a job under a key of the client's. When this returns, the task is durable; the same key gives the same task.
    pub async fn place(
        &self,
        caller: Caller,
        place: PlaceRequest,
    ) -> Result<TaskStatus, CommandError> {
        if self.pool.is_some() {
            return Err(PoolError::Anywhere.into());
        }
        let this = self.clone();
        // Once begun it is brought to its end, though the client may hang up: what it is told later must be true.
        let taken = tokio::spawn(async move { this.take(caller, place).await });
        taken
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    async fn take(&self, caller: Caller, place: PlaceRequest) -> Result<TaskStatus, CommandError> {
        let id = task_id(caller.owner, place.key);
        let placing = self.host.placing.begin(id);
        let _placing = placing.ok_or(AnywhereError::Placing)?;
        if let Some(task) = self.host.task(id) {
            return Ok(task.status());
        }
        // A host that once had it does not say that it has no room for it: the client would go on to another.
        let host = self.host.clone();
        if blocking(move || host.store.was_offered(id)).await? {
            return Err(AnywhereError::Gone(id).into());
        }
        let job = self.plan_one(caller, place.request).await?;
        let uploads = job.plan.uploads().collect();
        let claim = self.host.uploads.claim(caller.owner, uploads)?;
        let owner = caller.owner;
        self.host.place((id, owner), job, place.at_once).await?;
        claim.keep();
        let task = self.host.task(id);
        let task = task.ok_or_else(|| CommandError::NotFound(id.to_string()))?;
        Ok(task.status())
    }
}

/// Most hosts of which it is said why they could not.
const SAID: usize = 5;

fn one(planned: &Planned) -> Result<&Plan, CommandError> {
    match planned {
        Planned::One(job) => Ok(&job.plan),
        Planned::Sweep(_) => Err(PoolError::Sweep.into()),
    }
}

/// The id of a task that was placed. Nobody can choose one: another's task, or a domain of somebody else's on this host, may
/// have it.
fn task_id(owner: Owner, key: Uuid) -> Uuid {
    let digest = Sha256::new()
        .chain_update(b"xbee placement")
        .chain_update(owner.uid.to_le_bytes())
        .chain_update(key.as_bytes())
        .finalize();
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::tests::{caller, commands_with, request};

    const JOB: &str = r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"><j:JobDescription/></j:JobDefinition>"#;

    fn place(key: u128, at_once: bool) -> PlaceRequest {
        PlaceRequest {
            key: Uuid::from_u128(key),
            at_once,
            request: request(JOB),
        }
    }

    #[tokio::test]
    async fn a_job_is_placed_once_however_often_it_is_asked_for() {
        // None begins.
        let (_dir, commands) = commands_with(&["domains = 0"]).await;
        let alice = caller(7);
        let (one, again) = tokio::join!(
            commands.place(alice, place(1, false)),
            commands.place(alice, place(1, false))
        );
        // One of them has it; the other may have come while it was taken.
        let placed: Vec<_> = [&one, &again].into_iter().flatten().collect();
        for error in [&one, &again].into_iter().filter_map(|r| r.as_ref().err()) {
            assert_eq!(error.code(), "placing");
        }
        let id = placed[0].id;
        assert_eq!(commands.place(alice, place(1, true)).await.unwrap().id, id);
        assert_eq!(commands.list(alice, true).len(), 1);
        // Another user's job under the same key is another one.
        let bobs = commands.place(caller(8), place(1, false)).await.unwrap();
        assert_ne!(bobs.id, id);
        assert_eq!(commands.list(caller(8), true).len(), 1);
        // What was here and is forgotten does not come again.
        let found = commands.find(alice, &id.to_string()).unwrap();
        commands.terminate(&found).await.unwrap();
        while !commands.host.task(id).unwrap().is_final() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        commands.remove(&found).await.unwrap();
        let gone = commands.place(alice, place(1, false)).await.unwrap_err();
        assert_eq!(gone.code(), "placed-before");
        let gone = commands.place(alice, place(1, true)).await.unwrap_err();
        assert_eq!(gone.code(), "placed-before");
        assert_eq!(commands.list(alice, true).len(), 0);
    }

    #[tokio::test]
    async fn what_was_to_begin_at_once_does_not_wait() {
        let (_dir, commands) = commands_with(&["domains = 1"]).await;
        let alice = caller(7);
        commands.place(alice, place(1, true)).await.unwrap();
        let refused = commands.place(alice, place(2, true)).await.unwrap_err();
        assert_eq!(refused.code(), "not-at-once");
        assert_eq!(commands.list(alice, true).len(), 1);
        // It may still wait, and nothing was left in the queue of it before.
        commands.place(alice, place(2, false)).await.unwrap();
        let standing = commands.host.standing(xbee_engine::Demand {
            vcpus: 1,
            memory_bytes: 1,
            disk_bytes: 0,
        });
        let (begins, load) = standing.unwrap();
        assert_eq!((begins, load.waiting), (Begins::Later, 1));
    }

    #[tokio::test]
    async fn who_is_alone_says_so() {
        let (_dir, commands) = commands_with(&[]).await;
        let refused = commands.places(caller(7), request(JOB)).await;
        assert_eq!(refused.unwrap_err().code(), "anywhere-off");
    }
}
