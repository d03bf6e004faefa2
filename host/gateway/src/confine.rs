//! The process gives up what it does not need: its user, files, other processes, and all system calls but a few.
//!
//! What stays is what it is for: connections of IPv4 and IPv6 to elsewhere. The rules are checked by this process itself, so
//! they bind its guest, and not one who has taken the process over; landlock, where the kernel has it for TCP (Linux 6.7),
//! binds that one to the ports that the rules name.

use std::collections::BTreeMap;
use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, NetPort, Ruleset,
    RulesetAttr, RulesetCreatedAttr, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use crate::Plan;
use crate::gateway::{CONNECTIONS_MAX, DATAGRAM_FLOWS_MAX};
use crate::rules::Outbound;

/// Most address space, in bytes: all buffers of all connections, the program, and as much again.
const ADDRESS_SPACE_MAX_BYTES: u64 = 512 << 20;

/// Open files beside those of flows.
const FILES_EXTRA: u64 = 16;

/// The newest landlock that is asked for: what a kernel does not know of it is left out.
const WANTED: ABI = ABI::V6;

/// Why the process is not confined. It must not serve then.
#[derive(Debug, thiserror::Error)]
pub enum ConfineError {
    /// The kernel refused.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The kernel's word.
        #[source]
        source: io::Error,
    },
    /// Landlock refused.
    #[error("landlock: the rules are refused")]
    Landlock(#[source] landlock::RulesetError),
    /// The filter of system calls was refused.
    #[error("seccomp: the filter of system calls cannot be installed")]
    Filter(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl ConfineError {
    /// A stable name for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Step { .. } => "confine-step",
            Self::Landlock(_) => "confine-landlock",
            Self::Filter(_) => "confine-seccomp",
        }
    }
}

/// Confines the process for good. It must have one thread, and all open that it needs beside connections.
///
/// # Errors
/// What could not be done; some of the rest is done by then.
pub fn confine(plan: &Plan) -> Result<(), ConfineError> {
    limit()?;
    if let Some(id) = plan.uid {
        become_user(id)?;
    }
    rustix::thread::set_no_new_privs(true).map_err(|e| ConfineError::Step {
        step: "give up new privileges",
        source: e.into(),
    })?;
    fence(&plan.outbound).map_err(ConfineError::Landlock)?;
    let filter = filter().map_err(|e| ConfineError::Filter(e.into()))?;
    apply_filter(&filter).map_err(|e| ConfineError::Filter(e.into()))
}

fn limit() -> Result<(), ConfineError> {
    let files = (CONNECTIONS_MAX + DATAGRAM_FLOWS_MAX) as u64 + FILES_EXTRA;
    for (resource, most) in [
        (Resource::Nofile, files),
        (Resource::As, ADDRESS_SPACE_MAX_BYTES),
        (Resource::Core, 0),
        (Resource::Fsize, 1 << 20),
    ] {
        let limit = Rlimit {
            current: Some(most),
            maximum: Some(most),
        };
        setrlimit(resource, limit).map_err(|e| ConfineError::Step {
            step: "set a limit",
            source: e.into(),
        })?;
    }
    Ok(())
}

fn become_user(id: u32) -> Result<(), ConfineError> {
    let done = |result: libc::c_int, step| match result {
        0 => Ok(()),
        _ => Err(ConfineError::Step {
            step,
            source: io::Error::last_os_error(),
        }),
    };
    // SAFETY: no groups are read from the null pointer, since there are none.
    let groups = unsafe { libc::setgroups(0, std::ptr::null()) };
    done(groups, "give up groups")?;
    // SAFETY: numbers only. All capabilities go with the last of root's identities.
    done(unsafe { libc::setresgid(id, id, id) }, "change the group")?;
    // SAFETY: as above.
    done(unsafe { libc::setresuid(id, id, id) }, "change the user")
}

/// No files, no listening, no signals or abstract sockets outside.
fn fence(outbound: &Outbound) -> Result<(), landlock::RulesetError> {
    let mut net: BitFlags<AccessNet> = AccessNet::BindTcp.into();
    let ports: Option<Vec<u16>> = match outbound {
        Outbound::List(rules) => rules.iter().map(|rule| rule.port()).collect(),
        Outbound::Off => Some(vec![]),
        Outbound::Open => None,
    };
    if ports.is_some() {
        net |= AccessNet::ConnectTcp;
    }
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(net)?
        .scope(Scope::from_all(WANTED))?
        .create()?;
    for port in ports.into_iter().flatten() {
        ruleset = ruleset.add_rule(NetPort::new(port, AccessNet::ConnectTcp))?;
    }
    ruleset.restrict_self()?;
    Ok(())
}

/// All that is called once it serves.
const ALLOWED: &[libc::c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getpeername,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_getrandom,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|call| (*call, vec![])).collect();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let of_family = SeccompCondition::new(0, Len::Dword, Op::Eq, family.unsigned_abs().into())?;
        let rule = SeccompRule::new(vec![of_family])?;
        rules.entry(libc::SYS_socket).or_default().push(rule);
    }
    // No new code.
    let executable = libc::PROT_EXEC.unsigned_abs().into();
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let data = SeccompCondition::new(2, Len::Dword, Op::MaskedEq(executable), 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![data])?]);
    }
    let refused = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    SeccompFilter::new(rules, refused, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
