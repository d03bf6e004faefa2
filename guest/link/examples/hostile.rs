//! A guest's program that does what it may not: ci/xen/isolation and ci/xen/flood run it as root in
//! guests, and look what comes of it.
//!
//! `look` reads paths of xenstore and prints for each what this domain may do there; `store`,
//! `announce` and `channel` take SECONDS and attack xenstore, who waits for the agent, and the agent's
//! own channel; `claim` takes an interface, an address and a hardware address and says, as a
//! neighbour and as a router, that the one is at the other.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{self, BufRead};
use std::mem::size_of;
use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, SendFlags, SocketType, ipproto, netdevice::name_to_index, sendto, socket,
    sockopt,
};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use xbee_link::xenstore::{Error, Xenstore};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let end = |seconds: &str| Instant::now() + Duration::from_secs(seconds.parse().unwrap());
    match words[..] {
        ["look"] => look(),
        ["store", seconds] => store(end(seconds)),
        ["announce", seconds] => announce(end(seconds)),
        ["channel", seconds] => channel(end(seconds)),
        ["claim", interface, address, mac] => claim(interface, address, mac),
        _ => panic!("what?"),
    }
}

/// Tells the permissions of each path, by trying, without leaving anything.
fn look() {
    let mut store = Xenstore::open().unwrap();
    for path in io::stdin().lock().lines() {
        let path = path.unwrap();
        // A transaction that is given up changes nothing.
        let mut tried = String::new();
        let _ = store.transaction::<(), Error>(|store| {
            let value = store.read(&path);
            let text = match &value {
                Ok(Some(text)) => text.clone(),
                _ => String::new(),
            };
            for (letter, may) in [
                // What is not there any more says nothing.
                ('r', matches!(value, Ok(Some(_)))),
                ('l', matches!(store.list(&path), Ok(Some(_)))),
                ('w', store.write(&path, &text).is_ok()),
            ] {
                if may {
                    tried.push(letter);
                }
            }
            Err(Error::Malformed)
        });
        println!("{path} {tried}");
    }
}

/// Writes, watches and starts transactions as fast as it can, and fills the quota meanwhile.
fn store(end: Instant) {
    let threads: Vec<_> = (0..4)
        .map(|number| {
            std::thread::spawn(move || {
                let mut store = Xenstore::open().unwrap();
                let (mut watches, mut changes) = (0u64, 0u64);
                while Instant::now() < end {
                    let path = format!("data/flood/{number}");
                    let watch = format!("{number} {watches}");
                    watches += u64::from(store.watch("data", &watch).is_ok());
                    changes += u64::from(store.write(&path, &changes.to_string()).is_ok());
                    let _ = store.transaction::<(), Error>(|store| {
                        store.write(&path, "in a transaction")?;
                        changes += 1;
                        Ok(())
                    });
                    // What comes for the watches must be taken, or this guest's own kernel fills up.
                    while let Ok(Some(_)) = store.next_event() {}
                }
                (watches, changes)
            })
        })
        .collect();
    let mut store = Xenstore::open().unwrap();
    let value = "x".repeat(2000);
    let mut nodes = 0;
    while Instant::now() < end {
        nodes += u32::from(store.write(&format!("data/flood/n{nodes}"), &value).is_ok());
    }
    let (mut watches, mut changes) = (0, 0);
    for thread in threads {
        let (watched, changed) = thread.join().unwrap();
        watches += watched;
        changes += changed;
    }
    println!("{nodes} nodes, {watches} watches, {changes} changes");
}

/// Announces channels that are none, where the host waits for the agent's.
fn announce(end: Instant) {
    let mut store = Xenstore::open().unwrap();
    let mut done = 0u32;
    while Instant::now() < end {
        for (name, value) in [
            ("ring-ref", done.wrapping_mul(0x9e37_79b9).to_string()),
            ("event-channel", (done % 4096).to_string()),
            ("ring-ref", "none".to_owned()),
            ("ipv6", done.to_string()),
        ] {
            let _ = store.write(&format!("data/xbee/agent/{name}"), &value);
        }
        done += 1;
    }
    println!("{done} announcements");
}

/// Writes garbage into the pages that the agent shares with the host, and sends events by its own
/// event channel.
fn channel(end: Instant) {
    let memory = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/1/mem")
        .unwrap();
    let (mut done, mut events, mut found) = (0u64, 0u64, 0u32);
    let mut known = String::new();
    while Instant::now() < end {
        let maps = fs::read_to_string("/proc/1/maps").unwrap();
        let shared: Vec<&str> = maps
            .lines()
            .filter(|line| line.ends_with("/dev/xen/gntalloc"))
            .collect();
        if shared.is_empty() {
            // The agent makes a new one.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        if shared.concat() != known {
            known = shared.concat();
            found += 1;
        }
        let ports = ports();
        for round in 0..2000u32 {
            for line in &shared {
                let start = line.split('-').next().unwrap();
                let start = u64::from_str_radix(start, 16).unwrap();
                let noise = round.wrapping_mul(0x9e37_79b9).to_le_bytes();
                // The indices, both ways, and what either end waits for; every now and then all else.
                let offset = u64::from(round % if round % 100 == 0 { 4096 } else { 26 });
                if memory.write_all_at(&noise, start + offset).is_ok() {
                    done += 1;
                }
            }
            for (fd, port) in &ports {
                events += u64::from(notify(fd, *port));
            }
        }
    }
    println!("{done} writes into {found} channels, {events} events");
}

/// The agent's event channels, taken from it.
fn ports() -> Vec<(OwnedFd, u32)> {
    let agent = pidfd_open(Pid::from_raw(1).unwrap(), PidfdFlags::empty()).unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc/1/fd").unwrap().flatten() {
        if fs::read_link(entry.path()).is_ok_and(|to| to.ends_with("xen/evtchn")) {
            let number = entry.file_name().to_str().unwrap().parse().unwrap();
            let Ok(fd) = pidfd_getfd(&agent, number, PidfdGetfdFlags::empty()) else {
                continue;
            };
            // Its number is in no file: those that are not its own are refused.
            let port = (1..1024).find(|port| notify(&fd, *port));
            found.extend(port.map(|port| (fd, port)));
        }
    }
    found
}

fn notify(fd: &OwnedFd, port: u32) -> bool {
    /// `IOCTL_EVTCHN_NOTIFY` of Linux' public header `xen/evtchn.h`.
    const NOTIFY: u32 = 0x0004_4504;
    let mut port = port;
    // SAFETY: the argument is a port, which is as large as the request says.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), NOTIFY as _, &raw mut port) };
    assert!(size_of::<u32>() == 4);
    result == 0
}

/// Says to all on the network that `address` is at `mac` (RFC 4861, 4.4), and that this is a router
/// of a prefix (4.2). Written by itself, since no kernel says so of others.
fn claim(interface: &str, address: &str, mac: &str) {
    let socket = socket(AddressFamily::INET6, SocketType::RAW, Some(ipproto::ICMPV6)).unwrap();
    let index = name_to_index(&socket, interface).unwrap();
    sockopt::set_ipv6_multicast_hops(&socket, 255).unwrap();
    let all = SocketAddrV6::new(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1), 0, 0, index);
    let address: Ipv6Addr = address.parse().unwrap();
    let mac: Vec<u8> = mac
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    // Of a neighbour that overrides what is known.
    let mut neighbour = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    neighbour.extend(address.octets());
    neighbour.extend([2, 1]);
    neighbour.extend(&mac);
    // Of a router, for half an hour, with a prefix to take addresses from.
    let mut router = vec![134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    router.extend([
        3, 4, 64, 0xc0, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10, 0, 0, 0, 0,
    ]);
    router.extend(Ipv6Addr::new(0xfd66, 0x6666, 0, 0, 0, 0, 0, 0).octets());
    for _ in 0..20 {
        for message in [&neighbour, &router] {
            sendto(&socket, message, SendFlags::empty(), &all).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
