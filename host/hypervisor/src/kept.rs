//! What changes of a domain while it exists, and must be known after a restart of this process.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::domain::Hardware;
use crate::error::Error;
use crate::rundir::{Record, RunDir};
use crate::save_file::Fingerprint;
use crate::work;

/// How far a save or a restore is. Noted before it is acted on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "step")]
pub(crate) enum Transfer {
    /// None is under way.
    #[default]
    None,
    /// The partial file is being written, or its domain goes on.
    Saving {
        /// The file's name when it is complete.
        file: PathBuf,
        /// The domain was halted.
        paused: bool,
    },
    /// The file is complete, if perhaps still under its other name, and the domain is gone or of no use.
    Saved {
        file: PathBuf,
        known_by: Fingerprint,
        paused: bool,
    },
    /// The domain is being restored, halted: as long as this stands here, its guest has not gone on.
    Restoring {
        file: PathBuf,
        known_by: Fingerprint,
        paused: bool,
    },
    /// The domain is there again; it is to be let go on, and the file to be removed.
    Restored { file: PathBuf, paused: bool },
}

/// A domain's record, on disk and in memory.
#[derive(Debug)]
pub(crate) struct Kept {
    dir: RunDir,
    record: Mutex<Record>,
}

impl Kept {
    pub(crate) fn new(dir: RunDir, record: Record) -> Arc<Self> {
        Arc::new(Self {
            dir,
            record: Mutex::new(record),
        })
    }

    pub(crate) fn get<T>(&self, look: impl FnOnce(&Record) -> T) -> T {
        look(&self.record.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Changes the record, first on disk.
    pub(crate) async fn change(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Record) + Send + 'static,
    ) -> Result<(), Error> {
        let this = Arc::clone(self);
        work::blocking(move || {
            let mut record = this.record.lock().unwrap_or_else(PoisonError::into_inner);
            let mut new = record.clone();
            change(&mut new);
            this.dir.write_record(&new)?;
            *record = new;
            Ok(())
        })
        .await
    }

    pub(crate) fn hardware(&self) -> Hardware {
        self.get(hardware)
    }

    pub(crate) async fn change_hardware(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Hardware) + Send + 'static,
    ) -> Result<(), Error> {
        self.change(|record| {
            let mut new = hardware(record);
            change(&mut new);
            record.hardware = Some(new);
        })
        .await
    }

    #[cfg(feature = "xen")]
    pub(crate) fn transfer(&self) -> Transfer {
        self.get(|record| record.transfer.clone())
    }

    #[cfg(feature = "xen")]
    pub(crate) async fn set_transfer(self: &Arc<Self>, transfer: Transfer) -> Result<(), Error> {
        self.change(move |record| record.transfer = transfer).await
    }
}

fn hardware(record: &Record) -> Hardware {
    let known = record.hardware.clone();
    known.unwrap_or_else(|| Hardware::of(&record.spec))
}
