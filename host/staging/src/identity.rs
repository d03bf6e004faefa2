//! Access to local files with a user's rights.

use std::path::Path;

use rustix::thread::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use tokio::sync::oneshot;

use crate::error::ErrorKind;

/// The user a `file` URI is opened for.
///
/// Where the process runs as root, file access happens on a thread that has taken this identity.
/// Elsewhere the process has only its own rights, and those are used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

impl Identity {
    /// The identity of this process.
    pub fn current() -> Self {
        Self {
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            groups: rustix::process::getgroups()
                .map(|groups| groups.into_iter().map(Gid::as_raw).collect())
                .unwrap_or_default(),
        }
    }

    /// Takes this identity for the calling thread alone, for good.
    ///
    /// The effective ids are changed, not only the file system ids: that drops every effective
    /// capability, so quotas and reserved blocks hold too. The real and saved ids stay root's, so the
    /// user cannot signal or trace the thread. A side effect is that the process no longer dumps core.
    fn take(&self) -> rustix::io::Result<()> {
        if !rustix::process::geteuid().is_root() || self.uid == 0 {
            return Ok(());
        }
        // To the kernel -1 means "leave as it is", which here would mean root.
        let ids = self.groups.iter().chain([&self.uid, &self.gid]);
        if ids.into_iter().any(|id| *id == u32::MAX) {
            return Err(rustix::io::Errno::INVAL);
        }
        let groups: Vec<Gid> = self.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
        set_thread_groups(&groups)?;
        set_thread_res_gid(None, Gid::from_raw(self.gid), None)?;
        set_thread_res_uid(None, Uid::from_raw(self.uid), None)
    }

    /// Runs `work` on a thread of its own that has this identity.
    pub(crate) fn run<T: Send + 'static>(
        self,
        work: impl FnOnce() -> Result<T, ErrorKind> + Send + 'static,
    ) -> oneshot::Receiver<Result<T, ErrorKind>> {
        on_thread("stage-user", move || {
            self.take().map_err(|errno| {
                ErrorKind::local(
                    "cannot take the identity of the job's owner",
                    Path::new(""),
                    errno.into(),
                )
            })?;
            work()
        })
    }
}

/// Runs `work` on a thread of its own. Not on the runtime's blocking pool: the stages of a transfer wait
/// for one another, and in a bounded pool many transfers could wait for stages that never start.
pub(crate) fn on_thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> Result<T, ErrorKind> + Send + 'static,
) -> oneshot::Receiver<Result<T, ErrorKind>> {
    let (done, receiver) = oneshot::channel();
    let done = std::sync::Arc::new(std::sync::Mutex::new(Some(done)));
    let send = |done: &std::sync::Mutex<Option<oneshot::Sender<_>>>, result| {
        let done = done
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        // A caller that has gone away wants no result.
        let _ = done.map(|done| done.send(result));
    };
    let at_end = done.clone();
    let spawned = std::thread::Builder::new()
        .name(name.into())
        .spawn(move || send(&at_end, work()));
    if let Err(source) = spawned {
        let error = ErrorKind::local("cannot start a thread", Path::new(""), source);
        send(&done, Err(error));
    }
    receiver
}
