//! Persistent messages on the disk, in SQLite, written by one thread.
//!
//! The thread takes all groups of changes that have gathered while it was busy into one transaction, so that one wait for
//! the disk serves them all. A message that has come and gone among them is not written at all. WAL with
//! `synchronous = FULL`: what is reported as stored is on the disk.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, params};
use tokio::sync::watch;

use crate::broker::{Change, Ticket};
use crate::frame::Headers;
use crate::message::Message;

/// Name of the data base in its directory.
const FILE: &str = "broker.sqlite";
/// Version of the table below.
const SCHEMA_VERSION: i32 = 1;
const SCHEMA: &str = "
CREATE TABLE message (
    id          INTEGER PRIMARY KEY,
    destination TEXT NOT NULL,
    headers     BLOB NOT NULL,
    body        BLOB NOT NULL
) STRICT;
";
/// Groups that are written together at most.
const GROUPS_TOGETHER: usize = 1024;
/// Pause after a write that has failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What goes wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory cannot be made.
    #[error("cannot make the broker's directory {path}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else has it.
    #[error(
        "the messages in {path} are another broker's that runs: stop it, or use another directory"
    )]
    InUse {
        /// The data base.
        path: PathBuf,
    },
    /// SQLite's word.
    #[error("the messages in {path} cannot be read or written")]
    Sqlite {
        /// The data base.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// Made by another version.
    #[error(
        "the messages in {path} have version {found}, this broker knows version {SCHEMA_VERSION}"
    )]
    Version {
        /// The data base.
        path: PathBuf,
        /// Its version.
        found: i32,
    },
    /// Not what this program writes.
    #[error("the message {id} in {path} is damaged")]
    Damaged {
        /// The data base.
        path: PathBuf,
        /// Which message.
        id: i64,
    },
    /// No thread.
    #[error("cannot start the thread that writes messages")]
    Thread(#[source] std::io::Error),
}

impl StoreError {
    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            StoreError::InUse { .. } => "broker-store-in-use",
            _ => "broker-store-failed",
        }
    }
}

type Group = (Ticket, Vec<Change>);

/// Messages on the disk.
#[derive(Debug)]
pub(crate) struct Store {
    groups: Option<Sender<Group>>,
    stored: watch::Receiver<Ticket>,
    writer: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens the store in this directory; `take` is given all messages, oldest first.
    pub(crate) fn open(
        directory: &Path,
        mut take: impl FnMut(Message),
    ) -> Result<Store, StoreError> {
        std::fs::create_dir_all(directory).map_err(|source| StoreError::Directory {
            path: directory.into(),
            source,
        })?;
        let path = directory.join(FILE);
        let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                StoreError::InUse { path: path.clone() }
            }
            _ => StoreError::Sqlite {
                path: path.clone(),
                source,
            },
        };
        let db = open(&path).map_err(failed)?;
        let version: i32 = db
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(failed)?;
        match version {
            SCHEMA_VERSION => {}
            0 => {
                let make =
                    format!("BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;");
                db.execute_batch(&make).map_err(failed)?;
            }
            found => return Err(StoreError::Version { path, found }),
        }
        load(&db, &path, &mut take, failed)?;

        let (groups, receiver) = channel();
        let (sender, stored) = watch::channel(0);
        let writer = std::thread::Builder::new()
            .name("mq-store".into())
            .spawn(move || write(db, receiver, sender))
            .map_err(StoreError::Thread)?;
        Ok(Store {
            groups: Some(groups),
            stored,
            writer: Some(writer),
        })
    }

    /// Gives a group of changes to the writer.
    pub(crate) fn put(&self, group: Group) {
        if let Some(groups) = &self.groups
            && groups.send(group).is_err()
        {
            // The thread ends only after this end of the channel, unless it has panicked; then nothing is stored any more,
            // and no receipt is given.
            tracing::error!("the thread that writes messages has ended");
        }
    }

    /// The number of the last group that is on the disk, as it grows.
    pub(crate) fn stored(&self) -> watch::Receiver<Ticket> {
        self.stored.clone()
    }

    /// Waits until all is written; on a disk that takes nothing, gives up after one more try.
    pub(crate) fn close(mut self) {
        self.groups = None;
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            tracing::error!("the thread that writes messages has panicked");
        }
    }
}

fn open(path: &Path) -> Result<Connection, rusqlite::Error> {
    let db = Connection::open(path)?;
    // Exclusive, so that no second broker serves the same messages, and the index of the WAL is in this process alone.
    db.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE;
         PRAGMA journal_mode = WAL;
         PRAGMA synchronous = FULL;
         PRAGMA cache_size = -2048;
         PRAGMA wal_autocheckpoint = 4000;
         PRAGMA journal_size_limit = 33554432;
         BEGIN EXCLUSIVE; COMMIT;",
    )?;
    Ok(db)
}

fn load(
    db: &Connection,
    path: &Path,
    take: &mut impl FnMut(Message),
    failed: impl Fn(rusqlite::Error) -> StoreError,
) -> Result<(), StoreError> {
    let mut names: HashMap<String, Arc<str>> = HashMap::new();
    let mut statement = db
        .prepare("SELECT id, destination, headers, body FROM message ORDER BY id")
        .map_err(&failed)?;
    let mut rows = statement.query([]).map_err(&failed)?;
    while let Some(row) = rows.next().map_err(&failed)? {
        let read = || -> rusqlite::Result<(i64, String, Vec<u8>, Vec<u8>)> {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?))
        };
        let (id, destination, headers, body) = read().map_err(&failed)?;
        let damaged = || StoreError::Damaged {
            path: path.into(),
            id,
        };
        let destination = names
            .entry(destination)
            .or_insert_with_key(|name| Arc::from(name.as_str()))
            .clone();
        take(Message {
            id: u64::try_from(id).map_err(|_| damaged())?,
            destination,
            headers: Headers::from_lines(&headers).map_err(|_| damaged())?,
            body: Bytes::from(body),
            stored: true,
        });
    }
    Ok(())
}

fn write(mut db: Connection, groups: Receiver<Group>, stored: watch::Sender<Ticket>) {
    while let Ok((mut ticket, mut changes)) = groups.recv() {
        for (later, more) in groups.try_iter().take(GROUPS_TOGETHER) {
            ticket = later;
            changes.extend(more);
        }
        let mut changes = without_passing(changes);
        let mut last_try = false;
        while let Err(error) = commit(&mut db, &changes) {
            if last_try {
                tracing::error!(%error, "messages without a receipt are lost");
                return;
            }
            tracing::error!(%error, "persistent messages cannot be written; trying again, their senders wait");
            std::thread::sleep(RETRY_AFTER);
            // What has come meanwhile is written with it.
            loop {
                match groups.try_recv() {
                    Ok((later, more)) => {
                        ticket = later;
                        changes.extend(more);
                    }
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        last_try = true;
                        break;
                    }
                }
            }
        }
        stored.send_replace(ticket);
    }
}

/// Leaves out the messages that come and go within.
fn without_passing(changes: Vec<Change>) -> Vec<Change> {
    if changes.len() < 2 {
        return changes;
    }
    let put: std::collections::HashSet<u64> = changes
        .iter()
        .filter_map(|change| match change {
            Change::Put(message) => Some(message.id),
            Change::Delete(_) => None,
        })
        .collect();
    let passing: std::collections::HashSet<u64> = changes
        .iter()
        .filter_map(|change| match change {
            Change::Delete(id) if put.contains(id) => Some(*id),
            _ => None,
        })
        .collect();
    if passing.is_empty() {
        return changes;
    }
    changes
        .into_iter()
        .filter(|change| match change {
            Change::Put(message) => !passing.contains(&message.id),
            Change::Delete(id) => !passing.contains(id),
        })
        .collect()
}

fn commit(db: &mut Connection, changes: &[Change]) -> rusqlite::Result<()> {
    if changes.is_empty() {
        return Ok(());
    }
    let transaction = db.transaction()?;
    {
        let mut put = transaction.prepare_cached(
            "INSERT OR REPLACE INTO message (id, destination, headers, body) VALUES (?1, ?2, ?3, ?4)",
        )?;
        let mut delete = transaction.prepare_cached("DELETE FROM message WHERE id = ?1")?;
        for change in changes {
            match change {
                Change::Put(message) => put.execute(params![
                    message.id as i64,
                    &*message.destination,
                    message.headers.to_lines(),
                    &message.body[..]
                ])?,
                Change::Delete(id) => delete.execute(params![*id as i64])?,
            };
        }
    }
    transaction.commit()
}
