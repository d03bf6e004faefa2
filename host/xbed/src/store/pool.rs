//! What a member of a pool keeps: who it is, and which tasks of the pool have been here.

use rusqlite::{Connection, OptionalExtension, params};
use uuid::Uuid;

use super::{Entry, Owner, Store, StoreError, TaskRecord, insert_rows};
use crate::fault;

/// Added when the other tables were in use already.
pub(super) const SCHEMA: &str = "
CREATE TABLE IF NOT EXISTS pool_member (
    id       TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS pool_task (
    id       TEXT PRIMARY KEY,
    at_ms    INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
";

impl Store {
    /// Which one of a pool this is: the same for ever, and no other's. Durable on return.
    pub fn pool_member(&self) -> Result<Uuid, StoreError> {
        let connection = self.lock();
        let find = |connection: &Connection| {
            let known: Option<String> = connection
                .query_row("SELECT id FROM pool_member", [], |row| row.get(0))
                .optional()?;
            if let Some(id) = known.and_then(|id| id.parse().ok()) {
                return Ok(id);
            }
            let id = Uuid::new_v4();
            connection.execute("INSERT INTO pool_member (id) VALUES (?1)", [id.to_string()])?;
            Ok(id)
        };
        find(&connection).map_err(|e| self.failed(e))
    }

    /// Accepts a task of the pool that was offered at this time, once: `None` if it has been here, whatever has become of it.
    /// Those of before `forget_ms` are no longer known. Durable on return.
    pub fn insert_offered(
        &self,
        record: &TaskRecord,
        first: &Entry,
        offered_ms: u64,
        forget_ms: u64,
    ) -> Result<Option<i64>, StoreError> {
        let text = serde_json::to_string(record).map_err(|e| self.damaged(record.id, e))?;
        let rows = [(record.id.to_string(), text)];
        let state = serde_json::to_string(&first.state).map_err(|e| self.damaged("new", e))?;
        fault::point("accept");
        let mut connection = self.lock();
        let insert = |connection: &mut Connection| {
            let transaction = connection.transaction()?;
            let forget = "DELETE FROM pool_task WHERE at_ms < ?1";
            transaction.execute(forget, [forget_ms.cast_signed()])?;
            let is_new = transaction.execute(
                "INSERT OR IGNORE INTO pool_task (id, at_ms) VALUES (?1, ?2)",
                params![rows[0].0, offered_ms.cast_signed()],
            )?;
            if is_new == 0 {
                return Ok(None);
            }
            let numbers = insert_rows(&transaction, &rows, first.at_ms, &state)?;
            transaction.commit()?;
            Ok(numbers.first().copied())
        };
        let number = insert(&mut connection).map_err(|e| self.failed(e))?;
        fault::point("accepted");
        Ok(number)
    }

    /// Whether a task that was offered has been here, whatever has become of it.
    pub fn was_offered(&self, id: Uuid) -> Result<bool, StoreError> {
        self.lock()
            .query_row(
                "SELECT 1 FROM pool_task WHERE id = ?1",
                [id.to_string()],
                |_| Ok(()),
            )
            .optional()
            .map(|found| found.is_some())
            .map_err(|e| self.failed(e))
    }

    /// The subject of a user with a certificate.
    pub fn subject(&self, owner: Owner) -> Result<Option<String>, StoreError> {
        self.lock()
            .query_row(
                "SELECT subject FROM subject WHERE uid = ?1",
                [owner.uid],
                |row| row.get(0),
            )
            .optional()
            .map_err(|e| self.failed(e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use xbee_engine::Task;

    #[test]
    fn a_task_of_the_pool_is_taken_once_though_it_was_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("t")).unwrap();
        let member = store.pool_member().unwrap();
        let record = TaskRecord {
            id: Uuid::from_u128(1),
            owner: store.remote("CN=alice").unwrap(),
            secret: [0; 32],
            member: None,
            reservation: None,
            job: None,
        };
        let first = Entry {
            at_ms: 10,
            state: Task::default(),
        };
        let insert = |offered_ms, forget_ms| {
            let number = store.insert_offered(&record, &first, offered_ms, forget_ms);
            number.unwrap()
        };
        assert!(insert(10, 0).is_some());
        assert_eq!(insert(10, 10), None);
        store.remove(record.id).unwrap();
        assert_eq!(insert(10, 10), None);
        // What is too old to come again is not kept for ever.
        assert!(insert(12, 11).is_some());
        let subject = store.subject(record.owner).unwrap();
        assert_eq!(subject.as_deref(), Some("CN=alice"));
        drop(store);
        let store = Store::open(&dir.path().join("t")).unwrap();
        assert_eq!(store.pool_member().unwrap(), member);
        assert_eq!(store.load().unwrap().len(), 1);
    }
}
