//! What can be asked of `xbed`, whatever the front door: the local socket or a message queue.
//!
//! A front door turns its requests into calls of [`Commands`] with the [`Caller`] it has
//! authenticated, and answers or [`CommandError`]s into its own words.

mod error;
mod found;
mod placing;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use futures::Stream;
use sha2::{Digest, Sha256};
use uuid::Uuid;
use xbee_agent::Agent;
use xbee_api::{
    CACHE_SCHEME, CacheEntry, CacheRequest, CheckReport, ConfirmRequest, DomainExport, ExportForm,
    HostInfo, ReserveRequest, Reserved, ResultFile, SshAccess, SubmitRequest, TaskStatus, Upload,
    chain,
};
use xbee_engine::Phase;

use crate::array::Array;
use crate::cache::{self, Asked, CacheError, Held, Room, Wanted};
use crate::export;
use crate::host::{Host, fill_random};
use crate::plan::Plan;
use crate::pool::{Pool, PoolError};
use crate::reach::{Purpose, Reach, is_file};
use crate::steps;
use crate::store::{Job, Owner, Reservation};
use crate::task::TaskHandle;
use crate::translate::{PlanError, Planned};
use crate::uploads::{Claim, UploadError};
use crate::view;

pub use error::CommandError;
pub use found::Found;
pub use placing::Placing;

/// Shortest prefix of an id that names a task.
const MIN_PREFIX: usize = 4;
/// How long an answer waits for the journal.
const WRITE_LIMIT: Duration = Duration::from_secs(10);

/// Who asks, as the front door knows for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user.
    pub owner: Owner,
}

impl Caller {
    /// Root and the user `xbed` runs as may do everything; others only what is theirs.
    fn may(self, owner: Owner) -> bool {
        self.is_operator() || self.owner.uid == owner.uid
    }

    fn is_operator(self) -> bool {
        let uid = self.owner.uid;
        !self.owner.is_remote() && (uid == 0 || uid == rustix::process::geteuid().as_raw())
    }
}

/// The command layer.
#[derive(Clone)]
pub struct Commands {
    host: Arc<Host>,
    /// Tasks that are submitted are left to it.
    pool: Option<Arc<Pool>>,
}

impl Commands {
    /// Commands of this host.
    pub fn new(host: Arc<Host>) -> Self {
        Commands::of_pool(host, None)
    }

    /// The same as a member of a pool.
    pub fn of_pool(host: Arc<Host>, pool: Option<Arc<Pool>>) -> Self {
        Commands { host, pool }
    }

    /// Reservations are of a host, and not for those who ask a pool.
    fn check_no_pool(&self) -> Result<(), CommandError> {
        match self.pool {
            Some(_) => Err(PoolError::Reservation.into()),
            None => Ok(()),
        }
    }

    /// What the host is.
    pub fn host(&self) -> HostInfo {
        self.host.info()
    }

    /// Whether a job would be taken.
    pub async fn check(&self, caller: Caller, request: SubmitRequest) -> CheckReport {
        let purpose = match self.pool {
            // What is not sent with it cannot be sent at all.
            Some(_) => Purpose::Take,
            None => Purpose::Look,
        };
        let planned = self.plan(caller, request.clone(), purpose).await;
        let (mut refused, warnings) = match planned {
            Ok((Planned::Sweep(_), warnings)) if self.pool.is_some() => {
                (Some(PoolError::Sweep.into()), warnings)
            }
            Ok((planned, warnings)) => {
                let mut demands = planned.plans().map(Plan::demand);
                let refused = demands.find_map(|demand| self.host.fits(demand).err());
                (refused.map(CommandError::from), warnings)
            }
            Err(error) => (Some(error), vec![]),
        };
        if let (Some(pool), Some(error)) = (&self.pool, &refused)
            && pool.is_for_another(caller, &request, error).await
        {
            refused = None;
        }
        CheckReport {
            accepted: refused.is_none(),
            reasons: refused.iter().map(|error| chain(error)).collect(),
            warnings,
        }
    }

    /// What a request means on this host, with warnings. A sweep of a thousand jobs is work.
    async fn plan(
        &self,
        caller: Caller,
        mut request: SubmitRequest,
        purpose: Purpose,
    ) -> Result<(Planned, Vec<String>), CommandError> {
        let host = self.host.clone();
        let read = move || {
            let reach = Reach::take(caller, &mut request, purpose);
            let mut planned = Planned::read(request, &host.images)?;
            for plan in planned.0.plans_mut() {
                reach.apply(plan)?;
                find_cached(&host, caller, plan)?;
            }
            Ok(planned)
        };
        tokio::task::spawn_blocking(read)
            .await
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))
    }

    /// What a request for one job means on this host.
    pub async fn plan_one(
        &self,
        caller: Caller,
        request: SubmitRequest,
    ) -> Result<Job, CommandError> {
        self.check_wishes(caller, &request)?;
        match self.plan(caller, request, Purpose::Take).await?.0 {
            Planned::One(job) => Ok(*job),
            Planned::Sweep(_) => Err(PoolError::Sweep.into()),
        }
    }

    /// Takes a job. When this returns, the task is durable.
    pub async fn submit(
        &self,
        caller: Caller,
        request: SubmitRequest,
    ) -> Result<TaskStatus, CommandError> {
        if let Some(pool) = &self.pool {
            return pool.submit(caller, request).await;
        }
        self.check_wishes(caller, &request)?;
        let planned = self.plan(caller, request, Purpose::Take).await?.0;
        let claim = self.claim(caller, &planned)?;
        let status = match planned {
            Planned::One(job) => self.host.accept(caller.owner, *job).await?.status(),
            Planned::Sweep(jobs) => self.host.accept_array(caller.owner, jobs).await?.status(),
        };
        claim.keep();
        Ok(status)
    }

    /// Makes what jobs take of what was sent theirs.
    fn claim(&self, caller: Caller, planned: &Planned) -> Result<Claim<'_>, UploadError> {
        let ids = planned.plans().flat_map(Plan::uploads).collect();
        self.host.uploads.claim(caller.owner, ids)
    }

    /// Takes a file for a job to come. When this returns, it is durable.
    pub async fn upload(
        &self,
        caller: Caller,
        bytes: Option<u64>,
        pieces: impl Stream<Item = Result<Bytes, axum::Error>> + Unpin,
    ) -> Result<Upload, CommandError> {
        if self.pool.is_some() {
            return Err(PoolError::Files.into());
        }
        let uploads = &self.host.uploads;
        Ok(uploads.receive(caller.owner, bytes, pieces).await?)
    }

    /// Removes a file that was sent and that no job uses.
    pub async fn remove_upload(&self, caller: Caller, id: Uuid) -> Result<(), CommandError> {
        let host = self.host.clone();
        // A large file takes its time.
        let removed =
            tokio::task::spawn_blocking(move || host.uploads.discard(caller.owner, id)).await;
        let removed = removed.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()));
        Ok(removed?)
    }

    /// The results that are kept with a task.
    pub async fn results(&self, task: &TaskHandle) -> Vec<ResultFile> {
        steps::kept_results(task).await
    }

    /// Where one of them is.
    pub async fn result(&self, task: &TaskHandle, number: u32) -> Result<PathBuf, CommandError> {
        let kept = self.results(task).await;
        match kept.iter().any(|result| result.number == number) {
            true => Ok(steps::kept_result(&task.spool, number)),
            false => Err(CommandError::NoResult {
                task: task.record.id,
                number,
            }),
        }
    }

    fn check_wishes(&self, caller: Caller, request: &SubmitRequest) -> Result<(), CommandError> {
        if request.priority > 0 && !caller.is_operator() {
            return Err(CommandError::Priority(request.priority));
        }
        let most = self.host.config.retries_max;
        if let Some(wanted) = request.retries.filter(|wanted| *wanted > most) {
            return Err(CommandError::Retries { wanted, most });
        }
        Ok(())
    }

    /// Holds capacity. When this returns, the reservation is durable.
    pub async fn reserve(
        &self,
        caller: Caller,
        request: ReserveRequest,
    ) -> Result<Reserved, CommandError> {
        self.check_no_pool()?;
        let mut bytes = [0; 16];
        fill_random(&mut bytes);
        let ticket = Uuid::from_bytes(bytes).simple().to_string();
        let from_ms = request.from_ms.unwrap_or_else(view::now_ms);
        let held = Reservation {
            ticket: digest(&ticket),
            name: request.name,
            vcpus: request.cpus,
            memory_bytes: request.memory_bytes,
            disk_bytes: request.disk_bytes,
            from_ms,
            until_ms: from_ms.saturating_add(request.duration_s.saturating_mul(1000)),
        };
        let task = self.host.reserve(caller.owner, held).await?;
        Ok(Reserved {
            ticket,
            task: task.status(),
        })
    }

    /// The task that is reserved under a ticket. Its owner alone may use it; who may do everything else may not.
    fn by_ticket(&self, caller: Caller, ticket: &str) -> Result<Arc<TaskHandle>, CommandError> {
        self.check_no_pool()?;
        let digest = digest(ticket);
        let mut tasks = self.host.tasks();
        tasks.retain(|task| {
            let held = task.record.reservation.as_ref();
            held.is_some_and(|held| held.ticket == digest)
                && task.record.owner.uid == caller.owner.uid
                && !task.is_final()
        });
        tasks.pop().ok_or(CommandError::TicketInvalid)
    }

    /// Tells a reserved task what to do. When this returns, that is durable.
    pub async fn confirm(
        &self,
        caller: Caller,
        request: ConfirmRequest,
    ) -> Result<TaskStatus, CommandError> {
        let task = self.by_ticket(caller, &request.ticket)?;
        let id = task.record.id;
        self.check_wishes(caller, &request.request)?;
        let planned = self.plan(caller, request.request, Purpose::Take).await?.0;
        let claim = self.claim(caller, &planned)?;
        let Planned::One(job) = planned else {
            return Err(CommandError::SweepReserved);
        };
        let job = Arc::new(*job);
        if task.job().is_some() {
            return Err(CommandError::AlreadyConfirmed(id));
        }
        let demand = job.plan.demand();
        if !self.host.covers(&task, demand) {
            let held = task.demand().unwrap_or(demand);
            return Err(CommandError::NotCovered {
                vcpus: demand.vcpus,
                memory_bytes: demand.memory_bytes,
                held_vcpus: held.vcpus,
                held_memory_bytes: held.memory_bytes,
            });
        }
        task.confirm(job.clone(), request.start);
        written(id, task.left(Phase::Reserved)).await?;
        match task.job() {
            Some(taken) if Arc::ptr_eq(taken, &job) => {
                claim.keep();
                Ok(task.status())
            }
            Some(_) => Err(CommandError::AlreadyConfirmed(id)),
            // It was over meanwhile.
            None => Err(CommandError::TicketInvalid),
        }
    }

    /// Lets a confirmed task start when its reservation begins. When this returns, that is durable.
    pub async fn start(&self, caller: Caller, ticket: &str) -> Result<TaskStatus, CommandError> {
        let task = self.by_ticket(caller, ticket)?;
        if task.job().is_none() {
            return Err(CommandError::NotConfirmed(task.record.id));
        }
        task.start();
        written(task.record.id, task.left(Phase::Held)).await?;
        Ok(task.status())
    }

    /// Gives a reservation back, and ends its task if that runs. When this returns, the wish is durable.
    pub async fn cancel(&self, caller: Caller, ticket: &str) -> Result<TaskStatus, CommandError> {
        let task = self.by_ticket(caller, ticket)?;
        self.end(&task, "its reservation was cancelled").await
    }

    /// The domain that a job would get.
    pub fn export(
        &self,
        caller: Caller,
        mut request: SubmitRequest,
        form: ExportForm,
    ) -> Result<DomainExport, CommandError> {
        let reach = Reach::take(caller, &mut request, Purpose::Look);
        let (mut plan, _) = Plan::from_request(&request, &self.host.images)?;
        reach.apply(&mut plan)?;
        export::of_job(&self.host, caller.owner, &plan, form)
    }

    /// The domain that a task has now.
    pub async fn export_task(
        &self,
        task: &TaskHandle,
        form: ExportForm,
    ) -> Result<DomainExport, CommandError> {
        export::of_task(&self.host, task, form).await
    }

    /// Tasks of the caller, oldest first; those of an array are one entry.
    pub fn list(&self, caller: Caller, all: bool) -> Vec<TaskStatus> {
        let mut list = vec![];
        for task in self.host.tasks() {
            let is_seen = task.array().is_none() && (all || !task.is_final());
            if is_seen && caller.may(task.record.owner) {
                list.push((task.number, task.status()));
            }
        }
        for array in self.host.arrays() {
            if caller.may(array.owner) && (all || !array.is_final()) {
                list.push((array.number, array.status()));
            }
        }
        list.sort_by_key(|(number, _)| *number);
        list.into_iter().map(|(_, status)| status).collect()
    }

    /// Tasks of an array, in its order.
    pub fn list_array(
        &self,
        caller: Caller,
        id: &str,
        all: bool,
    ) -> Result<Vec<TaskStatus>, CommandError> {
        let Found::Array(array) = self.find(caller, id)? else {
            return Err(CommandError::NotFound(id.into()));
        };
        let mut tasks = self.tasks_of(&array);
        tasks.retain(|task| all || !task.is_final());
        Ok(tasks.iter().map(|task| task.status()).collect())
    }

    fn tasks_of(&self, array: &Array) -> Vec<Arc<TaskHandle>> {
        let tasks = array.members().into_iter();
        tasks.filter_map(|id| self.host.task(id)).collect()
    }

    /// A task or an array, by its id or the beginning of it; a task of an array also by the array's and its number.
    pub fn find(&self, caller: Caller, id: &str) -> Result<Found, CommandError> {
        let not_found = || CommandError::NotFound(id.into());
        let (prefix, number) = match id.split_once('.') {
            Some((prefix, number)) => (prefix, Some(number.parse().map_err(|_| not_found())?)),
            None => (id, None),
        };
        let prefix = prefix.to_ascii_lowercase();
        if prefix.len() < MIN_PREFIX {
            return Err(not_found());
        }
        let mut found: Vec<Found> = match Uuid::parse_str(&prefix) {
            Ok(id) => {
                let array = self.host.array(id).map(Found::Array);
                let task = self.host.task(id).map(Found::Task);
                array.into_iter().chain(task).collect()
            }
            Err(_) => {
                let arrays = self.host.arrays().into_iter();
                let arrays = arrays.filter(|array| array.id.to_string().starts_with(&prefix));
                let tasks = self.host.tasks_with_prefix(&prefix).into_iter();
                tasks
                    .map(Found::Task)
                    .chain(arrays.map(Found::Array))
                    .collect()
            }
        };
        found.retain(|found| caller.may(found.owner()));
        let found = match found.len() {
            1 => found.pop().ok_or_else(not_found)?,
            0 => return Err(not_found()),
            count => {
                return Err(CommandError::Ambiguous {
                    prefix: id.into(),
                    count,
                });
            }
        };
        let Some(number) = number else {
            return Ok(found);
        };
        let Found::Array(array) = found else {
            return Err(not_found());
        };
        let member = array.member(number).and_then(|id| self.host.task(id));
        member.map(Found::Task).ok_or_else(not_found)
    }

    /// One task.
    pub fn task(&self, caller: Caller, id: &str) -> Result<Arc<TaskHandle>, CommandError> {
        match self.find(caller, id)? {
            Found::Task(task) => Ok(task),
            Found::Array(_) => Err(CommandError::IsArray(id.into())),
        }
    }

    /// Asks for the end of a task, or of all of an array. When this returns, the wish is durable.
    pub async fn terminate(&self, found: &Found) -> Result<TaskStatus, CommandError> {
        const REASON: &str = "terminated on request";
        match found {
            Found::Task(task) => self.end(task, REASON).await,
            Found::Array(array) => {
                let tasks = self.tasks_of(array);
                tasks.iter().for_each(|task| task.terminate(REASON));
                let all = async {
                    for task in &tasks {
                        task.ending().await;
                    }
                };
                written(array.id, all).await?;
                Ok(array.status())
            }
        }
    }

    async fn end(&self, task: &TaskHandle, reason: &str) -> Result<TaskStatus, CommandError> {
        task.terminate(reason);
        written(task.record.id, task.ending()).await?;
        Ok(task.status())
    }

    /// Forgets a task that is over, or an array all of whose tasks are, with their spools.
    pub async fn remove(&self, found: &Found) -> Result<(), CommandError> {
        if !found.is_final() {
            return Err(CommandError::NotFinal(found.id()));
        }
        match found {
            Found::Task(task) => self.host.forget(task).await?,
            Found::Array(array) => {
                for task in self.tasks_of(array) {
                    self.host.forget(&task).await?;
                }
            }
        }
        Ok(())
    }

    /// Entries of the cache, oldest first: the caller's; all, to an operator.
    pub fn cached(&self, caller: Caller) -> Vec<CacheEntry> {
        let mut list = self.host.cache.list();
        list.retain(|held| caller.may(Owner::of(held.entry.owner)));
        list.iter().map(|held| self.show(held)).collect()
    }

    fn show(&self, held: &Held) -> CacheEntry {
        let in_use = self.host.cache.is_linked(held.entry.id);
        view::cached(held, in_use)
    }

    /// Has a file fetched into the cache, unless it is there.
    pub async fn cache(
        &self,
        caller: Caller,
        request: CacheRequest,
    ) -> Result<Asked, CommandError> {
        let uri = request.uri.parse().map_err(PlanError::Uri)?;
        if caller.owner.is_remote() && is_file(&request.uri) {
            return Err(CommandError::LocalFile(request.uri));
        }
        let hash = request.digest.as_deref().map(cache::digest).transpose()?;
        let wanted = Wanted {
            owner: caller.owner,
            text: request.uri,
            uri,
            hash,
            compression: None,
        };
        Ok(cache::ask(&self.host, wanted, true).await?)
    }

    /// The entry that was asked for, when it is there.
    pub async fn settle(&self, asked: &Asked) -> Result<CacheEntry, CommandError> {
        let id = match asked {
            Asked::Here(id) => *id,
            Asked::Coming(waiter) => waiter.ended().await?,
        };
        let gone = || CacheError::NotFound(id.to_string());
        let held = self.host.cache.get(id).ok_or_else(gone)?;
        let host = self.host.clone();
        let fits = cache::blocking(move || {
            let fits = host.cache.fits(&held.entry);
            match fits {
                Ok(()) => host.cache.touch(&host.store, id),
                Err(_) => host.cache.forget(&host.store, id),
            }
            fits.map(|()| held)
        });
        let held = fits.await?;
        cache::make_room(&self.host, Room::Limits).await;
        Ok(self.show(&held))
    }

    /// Removes an entry of the cache. Tasks that have its file keep it; of those that have not, none may name it.
    pub async fn uncache(&self, caller: Caller, name: &str) -> Result<(), CommandError> {
        let may = |owner| caller.may(Owner::of(owner));
        let id = self.host.cache.find(name, may)?.entry.id;
        if let Some(&task) = self.host.cached_names().get(&id) {
            return Err(CacheError::InUse { entry: id, task }.into());
        }
        let host = self.host.clone();
        cache::blocking(move || host.cache.forget(&host.store, id)).await;
        Ok(())
    }

    /// The agent in a task's domain.
    pub fn agent(&self, task: &TaskHandle) -> Result<Agent, CommandError> {
        task.agent().ok_or(CommandError::NoDomain(task.record.id))
    }

    /// How to reach a domain by SSH.
    pub fn ssh(&self, task: &TaskHandle) -> Result<SshAccess, CommandError> {
        self.agent(task)?;
        crate::ssh::access(task).ok_or(CommandError::NoSsh(task.record.id))
    }
}

/// Waits until it is written down what was asked of a task or an array.
async fn written(id: Uuid, written: impl Future<Output = ()>) -> Result<(), CommandError> {
    let waited = tokio::time::timeout(WRITE_LIMIT, written).await;
    waited.map_err(|_| CommandError::NotWritten(id))
}

/// Finds the cache entries that a plan names by the beginnings of their ids: their owner's own, whoever else sees them.
fn find_cached(host: &Host, caller: Caller, plan: &mut Plan) -> Result<(), CommandError> {
    for source in plan.sources_mut() {
        let Some(name) = source.uri.strip_prefix(CACHE_SCHEME) else {
            continue;
        };
        let owner = caller.owner.uid;
        let id = host.cache.find(name, |of| of == owner)?.entry.id;
        let whole = host.cache.whole(&host.store, owner, id);
        whole.ok_or_else(|| CacheError::NotFound(name.into()))?;
        host.cache.touch(&host.store, id);
        source.uri = format!("{CACHE_SCHEME}{id}");
    }
    Ok(())
}

/// What is kept of a ticket.
fn digest(ticket: &str) -> [u8; 32] {
    Sha256::digest(ticket.trim().to_ascii_lowercase()).into()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use clap::Parser;
    use xbee_hypervisor::sim::{SimConfig, SimHost, SimHypervisor};
    use xbee_staging::{Limits, Stager};

    use crate::config::{Config, Options};

    async fn commands() -> (tempfile::TempDir, Commands) {
        commands_with(&[]).await
    }

    /// Of a simulated host with further lines in its configuration.
    pub async fn commands_with(lines: &[&str]) -> (tempfile::TempDir, Commands) {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().to_str().unwrap();
        let path = dir.path().join("xbed.toml");
        std::fs::write(&path, lines.join("\n")).unwrap();
        let path = path.to_str().unwrap();
        let options =
            Options::parse_from(["xbed", "--backend", "sim", "--data", data, "--config", path]);
        let config = Config::load(options).unwrap();
        let sim = SimHost::new(SimConfig::new(config.domains()));
        let hypervisor = Arc::new(SimHypervisor::new(sim));
        let host = Host::open(config, hypervisor, Stager::new(Limits::default())).await;
        (dir, Commands::new(host.unwrap()))
    }

    /// The host that they are of.
    pub fn host_of(commands: &Commands) -> Arc<Host> {
        commands.host.clone()
    }

    pub fn caller(uid: u32) -> Caller {
        Caller {
            owner: Owner { uid, gid: uid },
        }
    }

    pub fn request(jsdl: &str) -> SubmitRequest {
        SubmitRequest {
            jsdl: jsdl.into(),
            ..SubmitRequest::default()
        }
    }

    #[tokio::test]
    async fn more_than_others_is_the_operators_to_give() {
        let (_dir, commands) = commands().await;
        let stranger = rustix::process::geteuid().as_raw() + 1;
        for (priority, retries, code) in
            [(1, None, "priority"), (0, Some(1000), "too-many-retries")]
        {
            let asked = SubmitRequest {
                priority,
                retries,
                ..request("")
            };
            let refused = commands.submit(caller(stranger), asked.clone()).await;
            assert_eq!(refused.unwrap_err().code(), code);
            // To root priority is no matter: the document is.
            let refused = commands.submit(caller(0), asked).await.unwrap_err();
            assert_eq!(matches!(refused, CommandError::Plan(_)), priority > 0);
        }
    }

    #[tokio::test]
    async fn what_a_file_uri_means_depends_on_who_asks_and_what_was_sent() {
        const URI: &str = "file:///there/in";
        let (_dir, commands) = commands().await;
        let staging = |rest: &str| {
            request(&format!(
                r#"<j:JobDefinition xmlns:j="http://schemas.ggf.org/jsdl/2005/11/jsdl"><j:JobDescription><j:DataStaging>
                <j:FileName>f</j:FileName><j:CreationFlag>overwrite</j:CreationFlag>{rest}
                </j:DataStaging></j:JobDescription></j:JobDefinition>"#
            ))
        };
        let source = staging(&format!("<j:Source><j:URI>{URI}</j:URI></j:Source>"));
        let target = staging(&format!("<j:Target><j:URI>{URI}</j:URI></j:Target>"));
        let (local, remote) = (caller(7), caller(Owner::FIRST_REMOTE));
        let plan_of = |status: &TaskStatus| {
            let task = commands.host.task(status.id).unwrap();
            task.plan().clone()
        };
        // On this host, as ever.
        let plan = plan_of(&commands.submit(local, source.clone()).await.unwrap());
        assert_eq!(plan.uploads().count(), 0);
        let plan = plan_of(&commands.submit(local, target.clone()).await.unwrap());
        assert!(!plan.stage_out[0].keep);
        // Nothing of this host's for others.
        for request in [&source, &target] {
            let refused = commands.submit(remote, request.clone()).await.unwrap_err();
            assert_eq!(refused.code(), "local-file");
            assert!(!commands.check(remote, request.clone()).await.accepted);
        }
        let of_client = |request: &SubmitRequest, uploads: &[Uuid]| SubmitRequest {
            client_files: true,
            uploads: uploads.iter().map(|id| (URI.to_owned(), *id)).collect(),
            ..request.clone()
        };
        for caller in [local, remote] {
            // What is to come is right to ask about, but not enough for a task.
            assert!(
                commands
                    .check(caller, of_client(&source, &[]))
                    .await
                    .accepted
            );
            let refused = commands
                .submit(caller, of_client(&source, &[]))
                .await
                .unwrap_err();
            assert_eq!(refused.code(), "local-file");
            let plan = plan_of(
                &commands
                    .submit(caller, of_client(&target, &[]))
                    .await
                    .unwrap(),
            );
            assert!(plan.stage_out[0].keep);
            let sent = futures::stream::iter([Ok(Bytes::from_static(b"content"))]);
            let sent = commands.upload(caller, None, sent).await.unwrap().id;
            let request = of_client(&source, &[sent]);
            // Somebody else's.
            let other = self::caller(caller.owner.uid + 1);
            let refused = commands.submit(other, request.clone()).await.unwrap_err();
            assert_eq!(refused.code(), "upload-unknown");
            let plan = plan_of(&commands.submit(caller, request.clone()).await.unwrap());
            assert_eq!(plan.uploads().collect::<Vec<_>>(), [sent]);
            assert_eq!(plan.sources().next().unwrap().uri, URI);
            // Used is used.
            let refused = commands.submit(caller, request).await.unwrap_err();
            assert_eq!(refused.code(), "upload-unknown");
            let refused = commands.remove_upload(caller, sent).await.unwrap_err();
            assert_eq!(refused.code(), "upload-unknown");
        }
    }

    #[tokio::test]
    async fn a_reservation_that_cannot_be_is_answered_with_dates() {
        let (_dir, commands) = commands().await;
        let host = commands.host();
        let wanted = |from_ms, duration_s| ReserveRequest {
            name: None,
            from_ms: Some(from_ms),
            duration_s,
            cpus: 1,
            memory_bytes: host.memory_bytes,
            disk_bytes: 0,
        };
        let day = 86_400_000;
        let begin = view::now_ms() / day * day + 2 * day;
        commands
            .reserve(caller(7), wanted(begin, 3600))
            .await
            .unwrap();
        let refused = commands.reserve(caller(8), wanted(begin + 1000, 60)).await;
        let refused = refused.unwrap_err();
        let free = view::rfc3339(begin + 3_600_000);
        assert!(refused.to_string().contains(&free), "{refused}");
        assert_eq!(refused.code(), "no-room");
        let refused = commands
            .reserve(caller(8), wanted(day, 60))
            .await
            .unwrap_err();
        assert!(
            refused.to_string().contains("1970-01-02T00:01:00"),
            "{refused}"
        );
        assert_eq!(refused.code(), "invalid-reservation");
    }

    #[tokio::test]
    async fn a_ticket_is_its_owners_alone() {
        let (_dir, commands) = commands().await;
        let request = ReserveRequest {
            name: None,
            from_ms: None,
            duration_s: 60,
            cpus: 1,
            memory_bytes: 1 << 20,
            disk_bytes: 0,
        };
        let reserved = commands.reserve(caller(1000), request).await.unwrap();
        let ticket = reserved.ticket.as_str();
        // Root sees the task, and may end it by its id, but has no ticket.
        for other in [0, 1001] {
            let refused = commands.cancel(caller(other), ticket).await.unwrap_err();
            assert!(refused.to_string().starts_with("501 TICKET_INVALID"));
        }
        let mut wrong = ticket.to_owned();
        wrong.replace_range(..1, if ticket.starts_with('0') { "1" } else { "0" });
        let refused = commands.start(caller(1000), &wrong).await.unwrap_err();
        assert_eq!(refused.code(), "ticket-invalid");
        let refused = commands.start(caller(1000), ticket).await.unwrap_err();
        assert_eq!(refused.code(), "not-confirmed");
        let status = commands.cancel(caller(1000), ticket).await.unwrap();
        assert_eq!(status.state, xbee_api::State::Terminated);
    }
}
