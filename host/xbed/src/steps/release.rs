//! Takes back all that a task holds: the domain, its connections, its temporary files, half a result at its destination.

use std::io;
use std::path::{Path, PathBuf};

use tokio::fs;
use xbee_engine::Phase;

use crate::cache::{self, Room};
use crate::fault;
use crate::host::log_teardown;
use crate::task::{StepContext, TaskHandle, kept_console};

/// How much of the console is kept, bytes from its end.
const KEPT_CONSOLE_BYTES: u64 = 1 << 20;
/// How long to wait before a failed destroy is tried again.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// Does not fail: a domain that does not go is tried again until it does, for its capacity must
/// not be given to another while it holds it.
pub async fn release(context: &StepContext) {
    let task = &context.task;
    keep_console(task).await;
    fault::point("release domain");
    while let Err(error) = context.host.hypervisor.destroy(task.record.id).await {
        log_teardown("domain not destroyed; trying again", &error);
        tokio::time::sleep(RETRY).await;
    }
    fault::point("domain released");
    if let Some(session) = context.session.get() {
        session.close().await;
    }
    super::stage_out::take_back(context).await;
    task.console.send_replace(None);
    task.agent.send_replace(None);
    task.address.send_replace(None);
    remove_temporary(&task.spool).await;
    fault::point("temporary removed");
    // What it had of the cache is not in use any more.
    cache::make_room(&context.host, Room::Limits).await;
    // One that is tried again needs it again.
    if matches!(task.state().phase, Phase::Releasing { .. })
        && let Some(removing) = context.host.release_uploads(task)
        && let Err(error) = removing.await
    {
        log_teardown("uploads not removed", &error);
    }
}

fn temporary(spool: &Path) -> impl Iterator<Item = PathBuf> {
    let names = super::files::TEMPORARY
        .into_iter()
        .chain(crate::ssh::DRAFTS);
    names.map(|name| spool.join(name))
}

/// Whether files are in a spool that only a task under way has there. Their removal is not forced to the disk, so after a
/// power cut a final task may have them again.
pub fn has_temporary(spool: &Path) -> bool {
    temporary(spool).any(|path| path.symlink_metadata().is_ok())
}

/// Removes what a spool holds only while its task is under way.
pub async fn remove_temporary(spool: &Path) {
    for path in temporary(spool) {
        fault::point("remove temporary");
        let removed = match fs::symlink_metadata(&path).await {
            Ok(meta) if meta.is_dir() => fs::remove_dir_all(&path).await,
            Ok(_) => fs::remove_file(&path).await,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            log_teardown("temporary files not removed", &error);
        }
    }
}

/// Keeps the end of the console, if the domain is still there with it.
pub async fn keep_console(task: &TaskHandle) {
    let live = task.console.borrow().clone();
    if let Some(live) = live.filter(|path| path.exists())
        && let Err(error) = keep_end(&live, &kept_console(&task.spool)).await
    {
        log_teardown("console not kept", &error);
    }
}

async fn keep_end(from: &Path, to: &Path) -> io::Result<()> {
    use tokio::io::{AsyncReadExt, AsyncSeekExt};
    let mut file = fs::File::open(from).await?;
    let length = file.metadata().await?.len();
    let start = length.saturating_sub(KEPT_CONSOLE_BYTES);
    file.seek(io::SeekFrom::Start(start)).await?;
    let mut kept = fs::File::create(to).await?;
    tokio::io::copy(&mut file.take(KEPT_CONSOLE_BYTES), &mut kept).await?;
    Ok(())
}
