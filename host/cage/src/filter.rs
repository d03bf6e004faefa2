//! A filter of system calls for what a device model never does, whoever steers it.
//!
//! QEMU's own (`-sandbox`) comes on top of it and knows QEMU better; but QEMU switches it on itself, and it is as old as
//! QEMU. What is refused here fails with EPERM, as it would for want of rights, so a QEMU that tries something and does
//! without goes on.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, apply_filter, sock_filter,
};

use crate::Error;

/// Never called, with whatever arguments.
const REFUSED: &[libc::c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pidfd_send_signal,
    libc::SYS_kcmp,
    libc::SYS_kill,
    libc::SYS_tkill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_fork,
    libc::SYS_vfork,
    // Namespaces and mounts.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_fanotify_init,
    // Rights.
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    libc::SYS_personality,
    // Parts of the kernel that a device model has no business with.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    libc::SYS_msgget,
    libc::SYS_semget,
    libc::SYS_shmget,
    libc::SYS_mq_open,
    libc::SYS_vmsplice,
    libc::SYS_lookup_dcookie,
    libc::SYS_modify_ldt,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    // The machine.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_vhangup,
];

/// New ways out. It is handed the connections that it has, unless its plan says otherwise.
const WAYS_OUT: [libc::c_long; 3] = [libc::SYS_socket, libc::SYS_connect, libc::SYS_bind];

/// The bit in a call's number that says x32, another ABI of the same processor (arch/x86/include/uapi/asm/unistd.h).
const X32_BIT: u32 = 0x4000_0000;

/// Installs the filter. The process has no way back, and so need its threads and what they start.
pub(crate) fn install(sockets: bool) -> Result<(), Error> {
    let programs = programs(sockets).map_err(|error| Error::Filter(error.into()))?;
    for program in &programs {
        apply_filter(program).map_err(|error| Error::Filter(error.into()))?;
    }
    Ok(())
}

fn programs(sockets: bool) -> Result<[BpfProgram; 3], seccompiler::BackendError> {
    let arch = TargetArch::x86_64;
    let errno = |errno: i32| SeccompAction::Errno(errno.unsigned_abs());
    let filter = |rules, action| -> Result<BpfProgram, seccompiler::BackendError> {
        SeccompFilter::new(rules, SeccompAction::Allow, action, arch)?.try_into()
    };
    let mut refused: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().map(|call| (*call, vec![])).collect();
    if !sockets {
        refused.extend(WAYS_OUT.map(|call| (call, vec![])));
    }
    let mut refuse_if = |call: libc::c_long, condition| -> Result<(), seccompiler::BackendError> {
        let rules = refused.entry(call).or_default();
        rules.push(SeccompRule::new(vec![condition?])?);
        Ok(())
    };
    // Threads, but no processes.
    let thread = libc::CLONE_THREAD.unsigned_abs().into();
    refuse_if(
        libc::SYS_clone,
        SeccompCondition::new(0, Len::Qword, Op::MaskedEq(thread), 0),
    )?;
    if sockets {
        let unix = libc::AF_UNIX.unsigned_abs().into();
        refuse_if(
            libc::SYS_socket,
            SeccompCondition::new(0, Len::Dword, Op::Ne, unix),
        )?;
    }
    // A thread's signal goes to this process only: that is how virtual CPUs are interrupted.
    let own = rustix::process::getpid().as_raw_nonzero().get();
    for call in [libc::SYS_tgkill, libc::SYS_rt_tgsigqueueinfo] {
        let own = own.unsigned_abs().into();
        refuse_if(call, SeccompCondition::new(0, Len::Dword, Op::Ne, own))?;
    }
    // Typing on somebody's terminal.
    for request in [libc::TIOCSTI, libc::TIOCLINUX] {
        refuse_if(
            libc::SYS_ioctl,
            SeccompCondition::new(1, Len::Dword, Op::Eq, request),
        )?;
    }
    // Its flags are in memory, where no filter sees them. The C library then takes clone.
    let hidden = BTreeMap::from([(libc::SYS_clone3, vec![])]);
    Ok([
        no_x32(),
        filter(hidden, errno(libc::ENOSYS))?,
        filter(refused, errno(libc::EPERM))?,
    ])
}

/// `if (nr >= X32_BIT) return EPERM`; the other filters know calls by the numbers without that bit.
fn no_x32() -> BpfProgram {
    let code = |code: u32| u16::try_from(code).unwrap_or(0);
    let ins = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let errno = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    vec![
        // The number is the first field of `struct seccomp_data`.
        ins(code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), 0, 0, 0),
        ins(
            code(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K),
            0,
            1,
            X32_BIT,
        ),
        ins(code(libc::BPF_RET | libc::BPF_K), 0, 0, errno),
        ins(
            code(libc::BPF_RET | libc::BPF_K),
            0,
            0,
            libc::SECCOMP_RET_ALLOW,
        ),
    ]
}
