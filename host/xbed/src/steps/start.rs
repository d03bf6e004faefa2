//! Instance-Starting: the domain is made and boots, and gets its files.

use std::net::Ipv6Addr;
use std::time::{Duration, SystemTime};

use uuid::Uuid;
use xbee_agent::protocol::{BootConfig, GENERATION, MountRoot, Network, Secret, StartMode};
use xbee_api::chain;
use xbee_engine::Failure;
use xbee_hypervisor::qemu::{self, Outbound};
use xbee_hypervisor::{DomainInfo, DomainSpec, DomainState, Interface};

use super::attempt::Attempt;
use super::stage_in::BootFiles;
use super::{agent, agent_failure, fail, files, hypervisor_failure, run_scripts};
use crate::config::{Config, Prefix, SameOwner};
use crate::fault;
use crate::host::Host;
use crate::plan::{Plan, When};
use crate::session::Session;
use crate::ssh;
use crate::store::Owner;
use crate::task::{StepContext, TaskHandle};

/// vsock context identifiers below this are reserved (virtio 1.2, section 5.10.4).
const FIRST_CID: i64 = 3;
/// Context identifiers are 32 bits wide, and the largest one means "any".
const CIDS: i64 = (u32::MAX as i64) - FIRST_CID;

/// Makes the domain, or takes up one that boots already, and waits until its agent has taken all files.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    let spool = &context.task.spool;
    let boot = BootFiles::load(spool)?;
    let spec = spec(context, &boot);
    let before = Attempt::load(spool)?;
    let (mut attempt, limit) = match taken_up(context, before.as_ref(), &spec).await? {
        Some(taken_up) => taken_up,
        None => make(context, before.as_ref(), &spec).await?,
    };
    let open = || Session::open(context.host.clone(), context.task.clone(), Some(limit));
    context.session.get_or_try_init(open).await?;
    let agent = agent(context).await?;
    fault::point("agent came");
    attempt.furnishing(spool)?;
    furnish(context, &agent, &boot).await
}

/// The domain that an earlier `xbed` had started, if nothing is missing but its agent's first word; with the time it has left for
/// that.
async fn taken_up(
    context: &StepContext,
    before: Option<&Attempt>,
    spec: &DomainSpec,
) -> Result<Option<(Attempt, Duration)>, Failure> {
    let (hypervisor, spool) = (&context.host.hypervisor, &context.task.spool);
    let Some(mut attempt) = before.cloned() else {
        return Ok(None);
    };
    let list = hypervisor.list().await;
    let list = list.map_err(|error| hypervisor_failure(&error))?;
    let runs = |domain: &DomainInfo| {
        domain.id == spec.id && matches!(domain.state, DomainState::Running | DomainState::Paused)
    };
    if !list.iter().any(runs) {
        return Ok(None);
    }
    // Of a domain that is there, this says whether it is the same in all, the secret of its boot included.
    if let Err(error) = hypervisor.create(spec).await {
        tracing::warn!(task = %spec.id, error = chain(&error), "its domain is another");
        return Ok(None);
    }
    let left = attempt.take_up(spool)?;
    if let Some(left) = left {
        tracing::info!(task = %spec.id, ?left, "its domain boots already");
        fault::point("boots already");
    }
    Ok(left.map(|left| (attempt, left)))
}

/// Makes a domain and starts it, and says how long its agent may take.
async fn make(
    context: &StepContext,
    before: Option<&Attempt>,
    spec: &DomainSpec,
) -> Result<(Attempt, Duration), Failure> {
    let (hypervisor, spool) = (&context.host.hypervisor, &context.task.spool);
    let failed = |error| hypervisor_failure(&error);
    let mut attempt = Attempt::begin(before, spool)?;
    // After an interruption half a domain may be there.
    hypervisor.destroy(spec.id).await.map_err(failed)?;
    fault::point("create");
    hypervisor.create(spec).await.map_err(failed)?;
    fault::point("created");
    let console = hypervisor.console(spec.id).await.map_err(failed)?;
    context.task.console.send_replace(Some(console));
    hypervisor.start(spec.id).await.map_err(failed)?;
    let limit = context.host.config.boot_timeout;
    attempt.booting(limit, spool)?;
    fault::point("started");
    Ok((attempt, limit))
}

async fn furnish(
    context: &StepContext,
    agent: &xbee_agent::Agent,
    boot: &BootFiles,
) -> Result<(), Failure> {
    let plan = context.task.plan();
    let said = |what: &'static str| move |error| agent_failure(what, &error);
    agent
        .time_sync(SystemTime::now())
        .await
        .map_err(said("the guest's clock could not be set"))?;
    // An image with its own boot loader has mounted its root before its agent began.
    if boot.disk.is_some() && boot.kernel.is_some() {
        agent
            .mount_root(MountRoot::default())
            .await
            .map_err(said("the image's root file system could not be mounted"))?;
    }
    run_scripts(context, agent, When::PreSetup).await?;
    for directory in &plan.directories {
        files::make_directory(agent, directory).await?;
    }
    put_ssh_keys(context, agent, boot).await?;
    for (index, file) in plan.stage_in.iter().enumerate() {
        files::stage_into_guest(context, agent, index, file).await?;
    }
    run_scripts(context, agent, When::Setup).await?;
    fault::point("furnished");
    agent
        .start(StartMode::Auto)
        .await
        .map_err(said("the image's init could not be started"))?;
    Ok(())
}

/// Who a domain is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    /// Its own id, which is its task's.
    pub id: Uuid,
    /// Whose it is.
    pub owner: Owner,
    /// Its place on the network and on the switch, which no other has.
    pub number: u32,
}

impl Identity {
    /// Of a task's domain.
    pub fn of_task(task: &TaskHandle) -> Self {
        Identity {
            id: task.record.id,
            owner: task.record.owner,
            number: u32::try_from(FIRST_CID + task.number % CIDS).unwrap_or(u32::MAX - 1),
        }
    }

    /// `xbee-` and the beginning of the id.
    fn hostname(&self) -> String {
        format!("xbee-{}", &self.id.simple().to_string()[..8])
    }
}

/// The domain of a plan, without the configuration of its boot.
pub fn domain(host: &Host, identity: Identity, plan: &Plan, boot: &BootFiles) -> DomainSpec {
    DomainSpec {
        id: identity.id,
        name: identity.hostname(),
        owner: identity.owner.uid.to_string(),
        vcpus: plan.vcpus,
        vcpus_max: None,
        memory_bytes: plan.memory_bytes,
        memory_max_bytes: None,
        kernel: boot.kernel.clone(),
        initramfs: boot.initramfs.clone(),
        kernel_args: boot.kernel_args.clone(),
        disks: boot.disk.iter().cloned().collect(),
        cid: identity.number,
        interface: interface(&host.config, identity.number),
        boot_config: Vec::new(),
        run_dir: host.run_dir(identity.id),
    }
}

fn spec(context: &StepContext, boot: &BootFiles) -> DomainSpec {
    let (host, task) = (&context.host, &context.task);
    let mut spec = domain(host, Identity::of_task(task), task.plan(), boot);
    let config = BootConfig {
        generation: GENERATION,
        domain: spec.id,
        hostname: spec.name.clone(),
        secret: Secret(task.record.secret),
        transport: host.hypervisor.transport(),
        network: spec.interface.map(|interface| Network {
            mac: interface.mac,
            address: interface.address,
            prefix_length: Prefix::BITS,
            gateway: (host.config.outbound != Outbound::Off).then(qemu::router),
        }),
    };
    spec.boot_config = config.encode();
    spec
}

/// The domain's place on the network, where domains have one: like the context identifier, from a
/// number that no other task has. The first two numbers of a network are the host's own.
fn interface(config: &Config, number: u32) -> Option<Interface> {
    let [a, b, c, d] = number.to_be_bytes();
    Some(Interface {
        // Locally administered, and of one card (IEEE 802, clause 8).
        mac: [0x02, 0xbe, a, b, c, d],
        address: address(config, number)?,
        peers: config.same_owner == SameOwner::Connected,
    })
}

/// The address of the domain with this number, where domains have a network.
pub fn address(config: &Config, number: u32) -> Option<Ipv6Addr> {
    Some(config.prefix?.address(number))
}

/// So that `xbe ssh` finds its key in place and the host key it expects, before any service starts.
async fn put_ssh_keys(
    context: &StepContext,
    agent: &xbee_agent::Agent,
    boot: &BootFiles,
) -> Result<(), Failure> {
    let user = boot.ssh_user.as_str();
    let keys = ssh::prepare(
        &context.task.spool,
        user,
        &Identity::of_task(&context.task).hostname(),
    )
    .map_err(|error| fail("ssh-keys", chain(&error)))?;
    let home = if user == "root" {
        "/root".to_owned()
    } else {
        format!("/home/{user}")
    };
    let private = files::Text {
        mode: 0o600,
        // Not by name: an image need not have a list of users.
        user: Some(user).filter(|user| *user != "root"),
    };
    let system = |mode| files::Text { mode, user: None };
    let authorized = format!("{home}/.ssh/authorized_keys");
    files::put_text(agent, &authorized, &keys.authorized_key, private).await?;
    let host_key = "/etc/ssh/ssh_host_ed25519_key";
    files::put_text(agent, host_key, &keys.host_key, system(0o600)).await?;
    let public = format!("{host_key}.pub");
    files::put_text(agent, &public, &keys.host_key_public, system(0o644)).await
}
