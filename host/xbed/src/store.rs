//! What survives `kill -9` and a power cut: tasks and their journal, in SQLite.
//!
//! A task's row never changes; its journal only grows. The last journal entry *is* the task's
//! state, and the entries that change the BES state are its history: one place for each fact.
//! WAL with `synchronous = FULL`: what was written when a call returns is on the disk.

mod pool;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use rusqlite::{Connection, Transaction, params};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xbee_api::{ArrayMember, SubmitRequest};
use xbee_engine::{Demand, Task};

use crate::fault;
use crate::plan::Plan;

/// Version of the tables below.
const SCHEMA_VERSION: i32 = 1;
const SCHEMA: &str = "
CREATE TABLE task (
    number  INTEGER PRIMARY KEY AUTOINCREMENT,
    id      TEXT NOT NULL UNIQUE,
    record  TEXT NOT NULL
) STRICT;
CREATE TABLE journal (
    task    INTEGER NOT NULL REFERENCES task(number) ON DELETE CASCADE,
    seq     INTEGER NOT NULL,
    at_ms   INTEGER NOT NULL,
    state   TEXT NOT NULL,
    PRIMARY KEY (task, seq)
) STRICT, WITHOUT ROWID;
";

/// Users on other machines, added when the tables above were in use already.
const SUBJECTS: &str = "
CREATE TABLE IF NOT EXISTS subject (
    uid      INTEGER PRIMARY KEY AUTOINCREMENT,
    subject  TEXT NOT NULL UNIQUE
) STRICT;
";

/// Fetched files that are kept, added likewise.
const CACHED: &str = "
CREATE TABLE IF NOT EXISTS cache (
    id       TEXT PRIMARY KEY,
    record   TEXT NOT NULL,
    used_ms  INTEGER NOT NULL
) STRICT;
";

/// A task as it was accepted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TaskRecord {
    /// Its id.
    pub id: Uuid,
    /// Its owner.
    pub owner: Owner,
    /// The secret that its domain's agent proves to know.
    pub secret: [u8; 32],
    /// The array it is of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<ArrayMember>,
    /// What is held for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reservation: Option<Reservation>,
    /// What it is to do; a reservation that is not confirmed does not say.
    #[serde(flatten)]
    pub job: Option<Job>,
}

/// What a task is to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// The request, word for word.
    pub request: SubmitRequest,
    /// What it means on this host.
    pub plan: Plan,
}

/// Capacity held for a task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reservation {
    /// SHA-256 of the ticket, which is its owner's alone.
    pub ticket: [u8; 32],
    /// The name it was given.
    pub name: Option<String>,
    /// How much.
    pub vcpus: u32,
    /// How much, bytes.
    pub memory_bytes: u64,
    /// How much, bytes.
    pub disk_bytes: u64,
    /// From when, milliseconds since the Unix epoch.
    pub from_ms: u64,
    /// Until when.
    pub until_ms: u64,
}

impl Reservation {
    /// What is held.
    pub fn demand(&self) -> Demand {
        Demand {
            vcpus: self.vcpus,
            memory_bytes: self.memory_bytes,
            disk_bytes: self.disk_bytes,
        }
    }
}

/// Who a task belongs to, in the kernel's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
}

impl Owner {
    /// Numbers from here on are not of the kernel's users but of those who ask through a message queue.
    pub const FIRST_REMOTE: u32 = 1 << 31;

    /// The user alone, where the group is no matter.
    pub fn of(uid: u32) -> Owner {
        Owner { uid, gid: uid }
    }

    /// Nobody on this host: none of its files are this owner's.
    pub fn is_remote(self) -> bool {
        self.uid >= Owner::FIRST_REMOTE
    }
}

/// An entry of a task's journal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The state entered.
    pub state: Task,
}

/// A task read back.
#[derive(Debug)]
pub struct StoredTask {
    /// Number, never used twice; the domain's vsock context identifier comes from it.
    pub number: i64,
    /// What was accepted.
    pub record: TaskRecord,
    /// All that happened, oldest first; never empty.
    pub journal: Vec<Entry>,
}

/// What goes wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite's word.
    #[error("the task store {path} failed")]
    Sqlite {
        /// The data base.
        path: PathBuf,
        /// Why.
        #[source]
        source: rusqlite::Error,
    },
    /// No room.
    #[error(
        "the disk of the task store {path} is full: make room there; accepted tasks wait for it and lose nothing"
    )]
    Full {
        /// The data base.
        path: PathBuf,
        /// SQLite's word.
        #[source]
        source: rusqlite::Error,
    },
    /// The file system's word.
    #[error("cannot open the task store {path}")]
    File {
        /// The data base.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Made by another version.
    #[error(
        "the task store {path} has version {found}, this xbed knows version {SCHEMA_VERSION}: start the xbed that made it, or use another --data directory"
    )]
    Version {
        /// The data base.
        path: PathBuf,
        /// Its version.
        found: i32,
    },
    /// A row is not what this program writes.
    #[error("the task store {path} holds a damaged entry for task {task}")]
    Damaged {
        /// The data base.
        path: PathBuf,
        /// Which task.
        task: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    fn sqlite(path: &Path, source: rusqlite::Error) -> Self {
        let path = path.into();
        match source.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => StoreError::Full { path, source },
            _ => StoreError::Sqlite { path, source },
        }
    }

    /// Stable code for programs.
    pub fn code(&self) -> &'static str {
        match self {
            StoreError::Full { .. } => "disk-full",
            _ => "store-failed",
        }
    }
}

/// The data base.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    connection: Mutex<Connection>,
}

impl Store {
    /// Opens or makes the data base.
    pub fn open(path: &Path) -> Result<Store, StoreError> {
        let failed = |source| StoreError::sqlite(path, source);
        // Holds the secrets of boots and the credentials in documents' URIs. SQLite gives its
        // other files the same mode.
        let private = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path);
        private.map_err(|source| StoreError::File {
            path: path.into(),
            source,
        })?;
        let connection = Connection::open(path).map_err(failed)?;
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON; PRAGMA busy_timeout = 5000;",
            )
            .map_err(failed)?;
        let found: i32 = connection
            .query_row("PRAGMA user_version", [], |row| row.get(0))
            .map_err(failed)?;
        match found {
            0 => connection
                .execute_batch(&format!(
                    "BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
                ))
                .map_err(failed)?,
            SCHEMA_VERSION => {}
            found => {
                return Err(StoreError::Version {
                    path: path.into(),
                    found,
                });
            }
        }
        connection.execute_batch(SUBJECTS).map_err(failed)?;
        connection.execute_batch(CACHED).map_err(failed)?;
        connection.execute_batch(pool::SCHEMA).map_err(failed)?;
        Ok(Store {
            path: path.into(),
            connection: Mutex::new(connection),
        })
    }

    /// The number of the user with this certificate: the same for ever, and never another's. Durable on return.
    pub fn remote(&self, subject: &str) -> Result<Owner, StoreError> {
        let mut connection = self.lock();
        let find = |connection: &mut Connection| {
            let known = "SELECT uid FROM subject WHERE subject = ?1";
            let known = connection
                .prepare_cached(known)?
                .query_row([subject], |row| row.get::<_, u32>(0));
            match known {
                Err(rusqlite::Error::QueryReturnedNoRows) => {}
                known => return known,
            }
            let transaction = connection.transaction()?;
            let next: i64 = transaction.query_row(
                "SELECT coalesce(max(uid) + 1, ?1) FROM subject",
                [Owner::FIRST_REMOTE],
                |row| row.get(0),
            )?;
            // The last one means nobody to the kernel.
            let uid = u32::try_from(next).ok().filter(|uid| *uid < u32::MAX);
            let uid = uid.ok_or(rusqlite::Error::IntegralValueOutOfRange(0, next))?;
            let insert = "INSERT INTO subject (uid, subject) VALUES (?1, ?2)";
            transaction.execute(insert, params![uid, subject])?;
            transaction.commit()?;
            Ok(uid)
        };
        let uid = find(&mut connection).map_err(|e| self.failed(e))?;
        Ok(Owner { uid, gid: uid })
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        // A panic while the lock is held leaves SQLite's own transaction rolled back: go on.
        self.connection
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn failed(&self, source: rusqlite::Error) -> StoreError {
        StoreError::sqlite(&self.path, source)
    }

    fn damaged(&self, task: impl ToString, source: serde_json::Error) -> StoreError {
        StoreError::Damaged {
            path: self.path.clone(),
            task: task.to_string(),
            source,
        }
    }

    /// Accepts tasks with their first journal entry, all or none; returns their numbers. Durable on return.
    pub fn insert(&self, records: &[TaskRecord], first: &Entry) -> Result<Vec<i64>, StoreError> {
        let mut texts = vec![];
        for record in records {
            let text = serde_json::to_string(record).map_err(|e| self.damaged(record.id, e))?;
            texts.push((record.id.to_string(), text));
        }
        let state = serde_json::to_string(&first.state).map_err(|e| self.damaged("new", e))?;
        fault::point("accept");
        let mut connection = self.lock();
        let insert = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            let numbers = insert_rows(&transaction, &texts, first.at_ms, &state)?;
            transaction.commit()?;
            Ok(numbers)
        };
        let numbers = insert(&mut connection).map_err(|e| self.failed(e))?;
        fault::point("accepted");
        Ok(numbers)
    }

    /// Adds entry `seq` to a task's journal. Durable on return.
    pub fn append(&self, number: i64, seq: usize, entry: &Entry) -> Result<(), StoreError> {
        let state = serde_json::to_string(&entry.state).map_err(|e| self.damaged(number, e))?;
        fault::point("journal");
        self.lock()
            .execute(
                "INSERT INTO journal (task, seq, at_ms, state) VALUES (?1, ?2, ?3, ?4)",
                params![
                    number,
                    i64::try_from(seq).unwrap_or(i64::MAX),
                    entry.at_ms.cast_signed(),
                    state
                ],
            )
            .map_err(|e| self.failed(e))?;
        fault::point("journaled");
        Ok(())
    }

    /// Adds entry `seq` to a task's journal, with which it is told what it is to do. Durable on return.
    pub fn confirm(
        &self,
        number: i64,
        record: &TaskRecord,
        seq: usize,
        entry: &Entry,
    ) -> Result<(), StoreError> {
        let text = serde_json::to_string(record).map_err(|e| self.damaged(number, e))?;
        let state = serde_json::to_string(&entry.state).map_err(|e| self.damaged(number, e))?;
        fault::point("confirm");
        let mut connection = self.lock();
        let confirm = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            transaction.execute(
                "UPDATE task SET record = ?2 WHERE number = ?1",
                params![number, text],
            )?;
            transaction.execute(
                "INSERT INTO journal (task, seq, at_ms, state) VALUES (?1, ?2, ?3, ?4)",
                params![
                    number,
                    i64::try_from(seq).unwrap_or(i64::MAX),
                    entry.at_ms.cast_signed(),
                    state
                ],
            )?;
            transaction.commit()
        };
        confirm(&mut connection).map_err(|e| self.failed(e))?;
        fault::point("confirmed");
        Ok(())
    }

    /// Forgets a task.
    pub fn remove(&self, id: Uuid) -> Result<(), StoreError> {
        fault::point("forget");
        self.lock()
            .execute("DELETE FROM task WHERE id = ?1", [id.to_string()])
            .map_err(|e| self.failed(e))?;
        fault::point("forgotten");
        Ok(())
    }

    /// Notes a file of the cache. Durable on return.
    pub fn cache(&self, id: &str, record: &str, used_ms: u64) -> Result<(), StoreError> {
        let insert = "INSERT INTO cache (id, record, used_ms) VALUES (?1, ?2, ?3)";
        let values = params![id, record, used_ms.cast_signed()];
        let inserted = self.lock().execute(insert, values);
        inserted.map(drop).map_err(|e| self.failed(e))
    }

    /// Notes when a file of the cache was used last.
    pub fn cache_used(&self, id: &str, used_ms: u64) -> Result<(), StoreError> {
        let update = "UPDATE cache SET used_ms = ?2 WHERE id = ?1";
        let values = params![id, used_ms.cast_signed()];
        let updated = self.lock().execute(update, values);
        updated.map(drop).map_err(|e| self.failed(e))
    }

    /// Forgets a file of the cache. Durable on return.
    pub fn uncache(&self, id: &str) -> Result<(), StoreError> {
        let deleted = self.lock().execute("DELETE FROM cache WHERE id = ?1", [id]);
        deleted.map(drop).map_err(|e| self.failed(e))
    }

    /// All files of the cache: id, record, when used last.
    pub fn cached(&self) -> Result<Vec<(String, String, u64)>, StoreError> {
        let connection = self.lock();
        let read = || -> rusqlite::Result<Vec<(String, String, u64)>> {
            connection
                .prepare("SELECT id, record, used_ms FROM cache")?
                .query_map([], |row| {
                    let used_ms: i64 = row.get(2)?;
                    Ok((row.get(0)?, row.get(1)?, used_ms.cast_unsigned()))
                })?
                .collect()
        };
        read().map_err(|e| self.failed(e))
    }

    /// All tasks, in the order in which they were accepted.
    pub fn load(&self) -> Result<Vec<StoredTask>, StoreError> {
        let connection = self.lock();
        let mut tasks: Vec<StoredTask> = vec![];
        let rows = || -> rusqlite::Result<Vec<(i64, String)>> {
            connection
                .prepare("SELECT number, record FROM task ORDER BY number")?
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect()
        };
        for (number, text) in rows().map_err(|e| self.failed(e))? {
            let record = serde_json::from_str(&text).map_err(|e| self.damaged(number, e))?;
            let entries = || -> rusqlite::Result<Vec<(i64, String)>> {
                connection
                    .prepare_cached(
                        "SELECT at_ms, state FROM journal WHERE task = ?1 ORDER BY seq",
                    )?
                    .query_map([number], |row| Ok((row.get(0)?, row.get(1)?)))?
                    .collect()
            };
            let mut journal = vec![];
            for (at_ms, state) in entries().map_err(|e| self.failed(e))? {
                journal.push(Entry {
                    at_ms: at_ms.cast_unsigned(),
                    state: serde_json::from_str(&state).map_err(|e| self.damaged(number, e))?,
                });
            }
            tasks.push(StoredTask {
                number,
                record,
                journal,
            });
        }
        Ok(tasks)
    }
}

/// Adds tasks, by id and record, with their first journal entry; gives their numbers.
fn insert_rows(
    transaction: &Transaction<'_>,
    tasks: &[(String, String)],
    at_ms: u64,
    state: &str,
) -> rusqlite::Result<Vec<i64>> {
    let mut numbers = vec![];
    for (id, text) in tasks {
        transaction
            .prepare_cached("INSERT INTO task (id, record) VALUES (?1, ?2)")?
            .execute(params![id, text])?;
        let number = transaction.last_insert_rowid();
        transaction
            .prepare_cached("INSERT INTO journal (task, seq, at_ms, state) VALUES (?1, 0, ?2, ?3)")?
            .execute(params![number, at_ms.cast_signed(), state])?;
        numbers.push(number);
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use xbee_engine::Input;

    fn job() -> Job {
        Job {
            request: SubmitRequest {
                jsdl: "<x/>".into(),
                ..SubmitRequest::default()
            },
            plan: Plan::example(),
        }
    }

    fn record() -> TaskRecord {
        TaskRecord {
            id: Uuid::new_v4(),
            owner: Owner { uid: 1, gid: 2 },
            secret: [7; 32],
            member: None,
            reservation: None,
            job: Some(job()),
        }
    }

    #[test]
    fn what_was_written_is_read_back_after_a_reopen() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tasks.sqlite");
        let record = record();
        let mut state = Task::default();
        let first = Entry {
            at_ms: 10,
            state: state.clone(),
        };
        state.apply(Input::Admitted).unwrap();
        let second = Entry { at_ms: 11, state };
        {
            let store = Store::open(&path).unwrap();
            let number = store.insert(std::slice::from_ref(&record), &first).unwrap()[0];
            store.append(number, 1, &second).unwrap();
            assert!(
                store.append(number, 1, &second).is_err(),
                "one entry a place"
            );
        }
        let store = Store::open(&path).unwrap();
        let tasks = store.load().unwrap();
        assert_eq!(tasks.len(), 1);
        assert_eq!(tasks[0].record.id, record.id);
        assert_eq!(tasks[0].record.secret, record.secret);
        assert_eq!(tasks[0].journal, [first, second]);
        store.remove(record.id).unwrap();
        assert!(store.load().unwrap().is_empty());
    }

    #[test]
    fn a_confirmed_reservation_knows_its_job() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let mut record = TaskRecord {
            job: None,
            reservation: Some(Reservation {
                ticket: [1; 32],
                name: None,
                vcpus: 1,
                memory_bytes: 2,
                disk_bytes: 3,
                from_ms: 4,
                until_ms: 5,
            }),
            ..record()
        };
        let mut state = Task::reserved();
        let first = Entry {
            at_ms: 1,
            state: state.clone(),
        };
        let store = Store::open(&path).unwrap();
        let number = store.insert(std::slice::from_ref(&record), &first).unwrap()[0];
        assert_eq!(store.load().unwrap()[0].record.job, None);
        record.job = Some(job());
        state.apply(Input::Confirmed { start: false }).unwrap();
        let second = Entry { at_ms: 2, state };
        store.confirm(number, &record, 1, &second).unwrap();
        assert!(store.confirm(number, &record, 1, &second).is_err());
        drop(store);
        let tasks = Store::open(&path).unwrap().load().unwrap();
        assert_eq!(tasks[0].record.job, record.job);
        assert_eq!(tasks[0].record.reservation, record.reservation);
        assert_eq!(tasks[0].journal, [first, second]);
    }

    #[test]
    fn a_number_is_never_used_twice() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("t")).unwrap();
        let entry = Entry {
            at_ms: 0,
            state: Task::default(),
        };
        let one = record();
        let first = store.insert(std::slice::from_ref(&one), &entry).unwrap()[0];
        store.remove(one.id).unwrap();
        let second = store.insert(&[record()], &entry).unwrap()[0];
        assert!(second > first);
    }

    /// What a power cut may leave of the last writes: none, a part, or other bytes than were written.
    #[test]
    fn a_log_that_breaks_off_anywhere_gives_what_was_written_before() {
        // https://www.sqlite.org/fileformat2.html#the_write_ahead_log
        const HEADER_BYTES: usize = 32;
        const FRAME_BYTES: usize = 24 + 4096;
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (dir.path().join("t"), dir.path().join("copy"));
        let wal_of = |path: &Path| PathBuf::from(format!("{}-wal", path.display()));
        let store = Store::open(&path).unwrap();
        let mut accepted = vec![];
        for at_ms in 0..8 {
            let record = record();
            let mut state = Task::default();
            let entry = |state: &Task| Entry {
                at_ms,
                state: state.clone(),
            };
            let number = store
                .insert(std::slice::from_ref(&record), &entry(&state))
                .unwrap()[0];
            state.apply(Input::Admitted).unwrap();
            store.append(number, 1, &entry(&state)).unwrap();
            accepted.push(record.id);
        }
        let (data, wal) = (
            std::fs::read(&path).unwrap(),
            std::fs::read(wal_of(&path)).unwrap(),
        );
        let frames = (wal.len() - HEADER_BYTES) / FRAME_BYTES;
        assert!(frames > 16, "{frames} frames");
        let mut most = 0;
        for frame in 0..=frames {
            let whole = HEADER_BYTES + frame * FRAME_BYTES;
            let mut garbled = wal.clone();
            garbled[whole..].iter_mut().for_each(|byte| *byte ^= 0x5a);
            let part = wal.len().min(whole + FRAME_BYTES / 2);
            for left in [&wal[..whole], &wal[..part], &garbled] {
                std::fs::write(&copy, &data).unwrap();
                std::fs::write(wal_of(&copy), left).unwrap();
                let tasks = Store::open(&copy).unwrap().load().unwrap();
                let ids: Vec<_> = tasks.iter().map(|task| task.record.id).collect();
                assert!(accepted.starts_with(&ids), "frame {frame}: {ids:?}");
                assert!(tasks.iter().all(|task| !task.journal.is_empty()));
                assert!(
                    ids.len() >= most,
                    "frame {frame}: fewer than with less of the log"
                );
                most = ids.len();
                for file in [copy.clone(), wal_of(&copy), dir.path().join("copy-shm")] {
                    // SQLite removes some of them itself.
                    let _ = std::fs::remove_file(file);
                }
            }
        }
        assert_eq!(most, accepted.len());
    }

    #[test]
    fn a_store_of_another_version_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        drop(Store::open(&path).unwrap());
        Connection::open(&path)
            .unwrap()
            .execute_batch("PRAGMA user_version = 99")
            .unwrap();
        let error = Store::open(&path).unwrap_err().to_string();
        assert!(error.contains("version 99"), "{error}");
    }

    #[test]
    fn a_subject_has_its_number_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tasks.sqlite");
        let number = |store: &Store, subject: &str| {
            let owner = store.remote(subject).unwrap();
            assert!(owner.is_remote());
            (owner.uid - Owner::FIRST_REMOTE, owner.gid == owner.uid)
        };
        let store = Store::open(&path).unwrap();
        assert_eq!(number(&store, "CN=a"), (0, true));
        assert_eq!(number(&store, "CN=b"), (1, true));
        drop(store);
        let store = Store::open(&path).unwrap();
        assert_eq!(number(&store, "CN=c"), (2, true));
        assert_eq!(number(&store, "CN=a"), (0, true));
        // The last number means nobody to the kernel.
        let last = "INSERT INTO subject (uid, subject) VALUES (?1, 'CN=z')";
        store.lock().execute(last, [u32::MAX - 1]).unwrap();
        store.remote("CN=z").unwrap();
        assert!(store.remote("CN=d").is_err());
    }
}
