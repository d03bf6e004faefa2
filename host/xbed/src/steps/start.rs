//! Instance-Starting: the domain is made and boots, and gets its files.

use std::time::SystemTime;

use xbee_agent::protocol::{BootConfig, GENERATION, MountRoot, Network, Secret, StartMode};
use xbee_engine::Failure;
use xbee_hypervisor::{DomainSpec, Interface};

use super::stage_in::BootFiles;
use super::{agent, agent_failure, fail, files, hypervisor_failure, run_scripts, session};
use crate::config::{Backend, Prefix, SameOwner};
use crate::plan::When;
use crate::ssh;
use crate::task::StepContext;

/// vsock context identifiers below this are reserved (virtio 1.2, section 5.10.4).
const FIRST_CID: i64 = 3;
/// Context identifiers are 32 bits wide, and the largest one means "any".
const CIDS: i64 = (u32::MAX as i64) - FIRST_CID;

/// Makes the domain and waits until its agent has taken all files.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    let hypervisor = &context.host.hypervisor;
    let id = context.task.record.id;
    let boot = BootFiles::load(&context.task.spool)?;
    // After an interruption half a domain may be there.
    let failed = |error| hypervisor_failure(&error);
    hypervisor.destroy(id).await.map_err(failed)?;
    let spec = spec(context, &boot);
    hypervisor.create(&spec).await.map_err(failed)?;
    let console = hypervisor.console(id).await.map_err(failed)?;
    context.task.console.send_replace(Some(console));
    hypervisor.start(id).await.map_err(failed)?;
    session(context).await?;
    let agent = agent(context).await?;
    furnish(context, &agent, &boot).await
}

async fn furnish(
    context: &StepContext,
    agent: &xbee_agent::Agent,
    boot: &BootFiles,
) -> Result<(), Failure> {
    let plan = &context.task.record.plan;
    let said = |what: &'static str| move |error| agent_failure(what, &error);
    agent
        .time_sync(SystemTime::now())
        .await
        .map_err(said("the guest's clock could not be set"))?;
    if boot.disk.is_some() {
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
    agent
        .start(StartMode::Auto)
        .await
        .map_err(said("the image's init could not be started"))?;
    Ok(())
}

fn spec(context: &StepContext, boot: &BootFiles) -> DomainSpec {
    let task = &context.task;
    let plan = &task.record.plan;
    let hostname = hostname(context);
    let cid = u32::try_from(FIRST_CID + task.number % CIDS).unwrap_or(u32::MAX - 1);
    let interface = interface(context, cid);
    let config = BootConfig {
        generation: GENERATION,
        domain: task.record.id,
        hostname: hostname.clone(),
        secret: Secret(task.record.secret),
        transport: context.host.hypervisor.transport(),
        network: interface.map(|interface| Network {
            mac: interface.mac,
            address: interface.address,
            prefix_length: Prefix::BITS,
            gateway: None,
        }),
    };
    DomainSpec {
        id: task.record.id,
        name: hostname,
        owner: task.record.owner.uid.to_string(),
        vcpus: plan.vcpus,
        memory_bytes: plan.memory_bytes,
        kernel: boot.kernel.clone(),
        initramfs: Some(boot.initramfs.clone()),
        kernel_args: boot.kernel_args.clone(),
        disks: boot.disk.iter().cloned().collect(),
        cid,
        interface,
        boot_config: config.encode(),
        run_dir: context.host.run_dir(task),
    }
}

/// The domain's place on the network, where domains have one: like the context identifier, from a
/// number that no other task has. The first two numbers of a network are the host's own.
fn interface(context: &StepContext, number: u32) -> Option<Interface> {
    let config = &context.host.config;
    let prefix = config.prefix.filter(|_| config.backend == Backend::Xen)?;
    let [a, b, c, d] = number.to_be_bytes();
    Some(Interface {
        // Locally administered, and of one card (IEEE 802, clause 8).
        mac: [0x02, 0xbe, a, b, c, d],
        address: prefix.address(number),
        peers: config.same_owner == SameOwner::Connected,
    })
}

/// `xbee-` and the beginning of the task's id.
fn hostname(context: &StepContext) -> String {
    let id = context.task.record.id.simple().to_string();
    format!("xbee-{}", &id[..8])
}

/// So that `xbe ssh` finds its key in place and the host key it expects, before any service starts.
async fn put_ssh_keys(
    context: &StepContext,
    agent: &xbee_agent::Agent,
    boot: &BootFiles,
) -> Result<(), Failure> {
    let user = boot.ssh_user.as_str();
    let keys = ssh::prepare(&context.task.spool, user, &hostname(context))
        .map_err(|error| fail("ssh-keys", xbee_api::chain(&error)))?;
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
