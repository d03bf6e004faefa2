//! The API of `xbed`: the types on the wire, each defined once, and the client that `xbe` uses.
//!
//! HTTP/1.1 with JSON over a unix socket. The routes:
//!
//! | method and path | body or query | answer |
//! |---|---|---|
//! | `GET /v1/host` | | [`HostInfo`] |
//! | `POST /v1/check` | [`SubmitRequest`] | [`CheckReport`] |
//! | `POST /v1/export` | [`SubmitRequest`]; `?form=` of [`ExportForm`] | [`DomainExport`]: the domain the job would get |
//! | `POST /v1/tasks` | [`SubmitRequest`] | 201 [`TaskStatus`] (durable) |
//! | `POST /v1/places` | [`SubmitRequest`] | [`Places`]: the hosts that could take the job, the best first |
//! | `POST /v1/placements` | [`PlaceRequest`] | 201 [`TaskStatus`] (durable); the same again for the same key |
//! | `POST /v1/reservations` | [`ReserveRequest`] | 201 [`Reserved`] (durable) |
//! | `POST /v1/reservations/confirm` | [`ConfirmRequest`] | [`TaskStatus`] (durable) |
//! | `POST /v1/reservations/start` | [`TicketRequest`] | [`TaskStatus`] (durable) |
//! | `POST /v1/reservations/cancel` | [`TicketRequest`] | 202 [`TaskStatus`] (durable) |
//! | `GET /v1/cache` | | `[CacheEntry]`, oldest first |
//! | `POST /v1/cache` | [`CacheRequest`] | lines of [`CacheNews`] JSON, the last of which is the entry (durable) or an error; hanging up cancels |
//! | `DELETE /v1/cache/{id}` | | 204; tasks that have the file keep it |
//! | `POST /v1/uploads` | bytes, with a length or in chunks | 201 [`Upload`] (durable) |
//! | `DELETE /v1/uploads/{id}` | | 204; only while no task uses it |
//! | `GET /v1/tasks` | `?all=true` includes final ones; `?array={id}` lists the tasks of an array, which are one entry otherwise | `[TaskStatus]` |
//! | `GET /v1/tasks/{id}` | | [`TaskStatus`] |
//! | `GET /v1/tasks/{id}/events` | [`FollowQuery`] | lines of [`TaskEvent`] JSON |
//! | `GET /v1/tasks/{id}/logs/{stream}` | [`FollowQuery`]; stream is `stdout`, `stderr` or `console` | bytes; with `follow=true` until the task is final |
//! | `GET /v1/tasks/{id}/results` | | [`ResultFile`]s: those that are kept for the client |
//! | `GET /v1/tasks/{id}/results/{number}` | `?from=` a byte | bytes |
//! | `POST /v1/tasks/{id}/terminate` | | 202 [`TaskStatus`] |
//! | `DELETE /v1/tasks/{id}` | | 204; only in a final state |
//! | `GET /v1/tasks/{id}/ssh` | | [`SshAccess`] |
//! | `GET /v1/tasks/{id}/export` | `?form=` of [`ExportForm`] | [`DomainExport`]: the domain the task has |
//! | `POST /v1/tasks/{id}/exec` | header [`EXEC_HEADER`] with an [`ExecRequest`] as JSON; upgrade to [`UPGRADE_EXEC`] | 101, then frames (see [`exec`]) |
//! | `POST /v1/tasks/{id}/forward` | `?port=N`; upgrade to [`UPGRADE_TCP`] | 101, then raw bytes to `127.0.0.1:N` or `[::1]:N` in the guest |
//!
//! `{id}` is a task's id or any unambiguous prefix of at least 4 characters. An array of tasks, which a parameter sweep
//! becomes, has an id as a task has, and is asked for its status and events, terminated and deleted like one; `{id}.{number}` is
//! one of its tasks, counted from 1.
//! Every error answer is an [`ErrorBody`] with a stable `code`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod chain;
pub mod client;
pub mod exec;
mod types;
mod upload;

pub use chain::chain;
pub use types::*;

use std::path::PathBuf;

/// Where root's `xbed` listens.
pub const SYSTEM_SOCKET: &str = "/run/xbee/xbed.sock";

/// Where `xbed` listens and `xbe` connects if nothing else is said: `/run/xbee/xbed.sock` for root,
/// else `$XDG_RUNTIME_DIR/xbee/xbed.sock`, and `/tmp/xbee-UID/xbed.sock` where there is no such directory.
pub fn default_socket() -> PathBuf {
    let uid = rustix::process::geteuid();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    match runtime {
        _ if uid.is_root() => PathBuf::from(SYSTEM_SOCKET),
        Some(runtime) => PathBuf::from(runtime).join("xbee/xbed.sock"),
        None => PathBuf::from(format!("/tmp/xbee-{}/xbed.sock", uid.as_raw())),
    }
}
