//! Files between a task's spool on the host and its domain, through the agent.
//!
//! The host never mounts a guest's disk: what goes in and comes out is sent as bytes.

use std::path::{Path, PathBuf};

use tokio::fs;
use tokio::io::AsyncWriteExt;
use xbee_agent::protocol::{MakeDirectory, MakeSymlink, code};
use xbee_agent::{Agent, Error as AgentError, FileMeta};
use xbee_engine::Failure;

use super::execute::drop_contact;
use super::{agent, agent_failure, fail, io_failure};
use crate::plan::{Creation, Plan, StageIn, StageOut};
use crate::task::StepContext;

/// What a spool holds only while its task is under way.
pub const TEMPORARY: [&str; 8] = [
    "in",
    "out",
    "boot",
    "scripts",
    "boot.json",
    super::stage_in::BOOT_DRAFT,
    super::attempt::FILE,
    super::attempt::DRAFT,
];
/// Largest file that comes out of a domain, bytes.
const MAX_RESULT_BYTES: u64 = 1 << 40;
/// How often a result is begun, as long as each time only the connection broke.
const TAKE_ATTEMPTS: u32 = 5;
/// Deepest directory of an unpacked archive.
const MAX_DEPTH: usize = 64;

/// Where a staged-in file or unpacked archive is kept.
pub fn staged(spool: &Path, index: usize) -> PathBuf {
    spool.join("in").join(index.to_string())
}

/// Where a result is kept on its way out.
pub fn result(spool: &Path, index: usize) -> PathBuf {
    spool.join("out").join(index.to_string())
}

/// What is noted while a result is sent.
pub fn put_note(spool: &Path, index: usize) -> PathBuf {
    spool.join("out").join(format!("{index}.put"))
}

/// Where a result stays until its owner fetches it.
pub fn kept(spool: &Path, number: u32) -> PathBuf {
    spool.join("results").join(number.to_string())
}

/// Has a result stay, which is on the disk. Done again, it does nothing.
pub fn keep(spool: &Path, index: usize) -> std::io::Result<()> {
    let number = u32::try_from(index).map_err(std::io::Error::other)?;
    let (from, to) = (result(spool, index), kept(spool, number));
    let results = spool.join("results");
    std::fs::create_dir_all(&results)?;
    if from.exists() {
        std::fs::rename(from, to)?;
    } else {
        std::fs::metadata(to)?;
    }
    std::fs::File::open(results)?.sync_all()?;
    std::fs::File::open(spool)?.sync_all()
}

/// What of a task's results is kept, or is to be, bytes.
pub fn result_bytes(spool: &Path, plan: &Plan) -> u64 {
    let keeps = |(_, file): &(u32, &StageOut)| file.keep;
    let kept = (0..).zip(&plan.stage_out).filter(keeps);
    kept.map(|(number, _)| {
        let places = [result(spool, number as usize), self::kept(spool, number)];
        let there = places
            .iter()
            .find_map(|place| std::fs::metadata(place).ok());
        there.map_or(0, |meta| meta.len())
    })
    .sum()
}

/// Says that all results are in the spool, and on the disk.
const RESULTS_MARK: &str = "out/complete";

/// Whether all results were taken out of the domain.
pub fn has_results(spool: &Path) -> bool {
    spool.join(RESULTS_MARK).exists()
}

/// Makes the results in the spool durable, and notes that these are all.
pub async fn results_taken(spool: &Path) -> Result<(), Failure> {
    let spool = spool.to_path_buf();
    let sync = {
        let spool = spool.clone();
        move || -> std::io::Result<()> {
            use std::fs::{File, create_dir_all, read_dir};
            let out = spool.join("out");
            create_dir_all(&out)?;
            for entry in read_dir(&out)? {
                File::open(entry?.path())?.sync_all()?;
            }
            File::open(&out)?.sync_all()?;
            File::open(&spool)?.sync_all()?;
            // Only now: after a power cut it must not be there without the others.
            File::create(spool.join(RESULTS_MARK))?;
            File::open(&out)?.sync_all()
        }
    };
    let synced = tokio::task::spawn_blocking(sync).await;
    let synced = synced.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
    synced.map_err(|error| io_failure(spool.display(), &error))
}

/// Where a script is kept.
pub fn script(spool: &Path, index: usize) -> PathBuf {
    spool.join("scripts").join(index.to_string())
}

/// Attributes of a text put into the guest.
#[derive(Debug, Clone, Copy)]
pub struct Text<'a> {
    /// Permission bits.
    pub mode: u32,
    /// Owner; root without.
    pub user: Option<&'a str>,
}

/// Makes a directory with those above it; one that is there stays as it is.
pub async fn make_directory(agent: &Agent, path: &str) -> Result<(), Failure> {
    if path == "/" {
        return Ok(());
    }
    let directory = MakeDirectory {
        path: path.into(),
        mode: None,
        user: None,
        group: None,
    };
    let what = || format!("the directory {path} could not be made in the domain");
    match agent.mkdir(directory).await {
        Err(error) => Err(agent_failure(&what(), &error)),
        Ok(()) => Ok(()),
    }
}

/// Puts a short text.
pub async fn put_text(
    agent: &Agent,
    path: &str,
    text: &str,
    attributes: Text<'_>,
) -> Result<(), Failure> {
    let meta = FileMeta {
        path: path.into(),
        mode: attributes.mode,
        user: attributes.user.map(Into::into),
        group: None,
        size: Some(text.len() as u64),
    };
    agent
        .put_file(meta, text.as_bytes())
        .await
        .map_err(|error| put_failure(path, &error))?;
    Ok(())
}

fn put_failure(path: &str, error: &AgentError) -> Failure {
    agent_failure(&format!("{path} could not be put into the domain"), error)
}

/// Puts a file of the host.
pub async fn put(agent: &Agent, from: &Path, path: &str, mode: u32) -> Result<(), Failure> {
    let unreadable = |error| io_failure(from.display(), &error);
    let file = fs::File::open(from).await.map_err(unreadable)?;
    let size = file.metadata().await.map_err(unreadable)?.len();
    let meta = FileMeta {
        path: path.into(),
        mode,
        user: None,
        group: None,
        size: Some(size),
    };
    agent
        .put_file(meta, file)
        .await
        .map_err(|error| put_failure(path, &error))?;
    Ok(())
}

/// Puts what one DataStaging element fetched: a file, or the tree of an archive.
pub async fn stage_into_guest(
    context: &StepContext,
    agent: &Agent,
    index: usize,
    file: &StageIn,
) -> Result<(), Failure> {
    let from = staged(&context.task.spool, index);
    let meta = fs::symlink_metadata(&from)
        .await
        .map_err(|error| io_failure(from.display(), &error))?;
    if meta.is_dir() {
        return put_tree(agent, &from, &file.path).await;
    }
    match file.creation {
        Creation::Overwrite => {}
        Creation::DontOverwrite if exists(agent, &file.path).await? => return Ok(()),
        Creation::DontOverwrite => {}
        Creation::Append => {
            let joined = after_guests_own(agent, &file.path, &from).await?;
            return put(agent, &joined, &file.path, file.mode).await;
        }
    }
    put(agent, &from, &file.path, file.mode).await
}

/// The protocol has no question for this alone; the file is read and dropped.
async fn exists(agent: &Agent, path: &str) -> Result<bool, Failure> {
    match agent
        .get_file(path, tokio::io::sink(), MAX_RESULT_BYTES)
        .await
    {
        Ok(_) => Ok(true),
        Err(AgentError::Failed { code, .. }) if code == code::FILE_NOT_FOUND => Ok(false),
        Err(error) => Err(agent_failure(
            &format!("{path} could not be looked for in the domain"),
            &error,
        )),
    }
}

/// What the guest's file becomes by appending, as a file beside the staged one, which stays as it is: this may be
/// done again.
async fn after_guests_own(agent: &Agent, path: &str, staged: &Path) -> Result<PathBuf, Failure> {
    let failed = |error| io_failure(staged.display(), &error);
    let joined = staged.with_extension("joined");
    let mut own = fs::File::create(&joined).await.map_err(failed)?;
    match agent.get_file(path, &mut own, MAX_RESULT_BYTES).await {
        Ok(_) => {}
        Err(AgentError::Failed { code, .. }) if code == code::FILE_NOT_FOUND => {}
        Err(error) => {
            return Err(agent_failure(
                &format!("{path} could not be read in the domain"),
                &error,
            ));
        }
    }
    let mut new = fs::File::open(staged).await.map_err(failed)?;
    tokio::io::copy(&mut new, &mut own).await.map_err(failed)?;
    own.flush().await.map_err(failed)?;
    Ok(joined)
}

/// Puts a directory of the host with all that is in it.
async fn put_tree(agent: &Agent, from: &Path, to: &str) -> Result<(), Failure> {
    use std::os::unix::fs::PermissionsExt;
    make_directory(agent, to).await?;
    let mut todo = vec![(from.to_path_buf(), to.trim_end_matches('/').to_owned(), 0)];
    while let Some((directory, guest, depth)) = todo.pop() {
        let failed = |error| io_failure(directory.display(), &error);
        if depth > MAX_DEPTH {
            return Err(fail(
                "archive-too-deep",
                format!("{guest} lies more than {MAX_DEPTH} directories deep in its archive"),
            ));
        }
        let mut entries = fs::read_dir(&directory).await.map_err(failed)?;
        while let Some(entry) = entries.next_entry().await.map_err(failed)? {
            let name = entry.file_name().into_string().map_err(|name| {
                fail(
                    "archive-name",
                    format!(
                        "{guest}/{} in the archive: the name is not UTF-8",
                        name.display()
                    ),
                )
            })?;
            let path = format!("{guest}/{name}");
            let kind = entry.file_type().await.map_err(failed)?;
            let mode = entry.metadata().await.map_err(failed)?.permissions().mode() & 0o7777;
            if kind.is_dir() {
                let made = MakeDirectory {
                    path: path.clone(),
                    mode: Some(mode),
                    user: None,
                    group: None,
                };
                agent
                    .mkdir(made)
                    .await
                    .map_err(|error| put_failure(&path, &error))?;
                todo.push((entry.path(), path, depth + 1));
            } else if kind.is_symlink() {
                let target = fs::read_link(entry.path()).await.map_err(failed)?;
                let link = MakeSymlink {
                    path: path.clone(),
                    target: target.to_string_lossy().into_owned(),
                    user: None,
                    group: None,
                };
                agent
                    .symlink(link)
                    .await
                    .map_err(|error| put_failure(&path, &error))?;
            } else {
                put(agent, &entry.path(), &path, mode).await?;
            }
        }
    }
    Ok(())
}

/// Takes a result out of the guest to the spool; from its beginning again over a new connection, if the one breaks.
pub async fn take_from_guest(
    context: &StepContext,
    index: usize,
    file: &StageOut,
) -> Result<(), Failure> {
    let to = result(&context.task.spool, index);
    let failed = |error| io_failure(to.display(), &error);
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).await.map_err(failed)?;
    }
    let path = &file.path;
    let mut attempt = 1;
    loop {
        let agent = agent(context).await?;
        let mut sink = fs::File::create(&to).await.map_err(failed)?;
        return match agent.get_file(path, &mut sink, MAX_RESULT_BYTES).await {
            Ok(_) => sink.flush().await.map_err(failed),
            Err(AgentError::Failed { code, .. }) if code == code::FILE_NOT_FOUND => Err(fail(
                "result-missing",
                format!("{path}, to be staged out, is not there: the task did not make it"),
            )),
            Err(error) if error.is_lost() && attempt < TAKE_ATTEMPTS => {
                attempt += 1;
                drop_contact(context, agent).await?;
                continue;
            }
            Err(error) => Err(agent_failure(
                &format!("{path} could not be taken out of the domain"),
                &error,
            )),
        };
    }
}
