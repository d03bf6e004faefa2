//! `xbeinstd`, the XenBEE guest agent.
//!
//! As PID 1 of the initial RAM file system it needs no arguments: `/xbee/boot` has all. As a
//! service of an image: `xbeinstd --service [BOOT-CONFIG]`, by default what is at `/etc/xbee/boot` or else on the
//! disk that the host adds for it. Beside a host manager, for tests:
//! `xbeinstd --no-mount --boot-config FILE [--connect unix:PATH] [--root DIR]`.

#![cfg_attr(test, allow(clippy::unwrap_used))]
#![cfg_attr(not(test), no_main)]

mod agent;
mod arguments;
mod boot;
mod boot_disk;
mod console;
mod failure;
mod forward;
mod machine;
mod modules;
mod mount;
mod network;
mod power;
mod process;
mod pump;
mod reap;
mod remove;
mod request;
mod root;
mod session;
mod spawn;
mod task;
mod transfer;
mod tree;
mod users;
mod xen;

use std::ffi::{CStr, c_char, c_int};

/// The C library calls this. The agent needs the arguments' own memory to change its name in it,
/// and nothing of what Rust's own entry prepares.
///
/// # Safety
/// `argv` points to `argc` strings that live as long as the process, as the C library promises.
// SAFETY: there is one `main` in the program, and its type is what the C library calls.
#[cfg_attr(not(test), unsafe(no_mangle))]
pub unsafe extern "C" fn main(argc: c_int, argv: *mut *mut c_char) -> c_int {
    let count = usize::try_from(argc).unwrap_or(0);
    // SAFETY: the C library passes `argc` pointers to strings that end with a NUL and live as long
    // as the process; nothing else refers to them.
    let strings: Vec<&CStr> = unsafe {
        (0..count)
            .map(|index| CStr::from_ptr(*argv.add(index)))
            .collect()
    };
    let arguments: Vec<String> = strings
        .iter()
        .skip(1)
        .map(|s| s.to_string_lossy().into_owned())
        .collect();
    if count > 0 {
        // SAFETY: the first string has at least its NUL, and is written to as a byte only if it has
        // one more before that; `strings` is not used any more.
        unsafe {
            let name = *argv;
            if *name != 0 {
                // systemd leaves processes with this mark alone when it kills the rest at shutdown
                // (see "Root Storage Daemons" in its documentation): the host hears from the guest
                // until the end.
                *name = b'@' as c_char;
            }
        }
    }
    boot::main(&arguments)
}

#[cfg(test)]
#[test]
fn main_has_the_type_that_c_expects() {
    let _entry: unsafe extern "C" fn(c_int, *mut *mut c_char) -> c_int = main;
}
