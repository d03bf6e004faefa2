//! A domain is saved to a file by libvirt, and restored from it, with every step noted before.
//!
//! libvirt goes on with either when this process has ended. A save is complete when the domain is
//! gone, and a restored domain is halted until it has been noted that the file is used up: so a
//! restart of this process finds one of two states, never a guest that has gone on in both.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use xbee_link::xenstore;

use super::channel::{self, Streams};
use super::config::XenConfig;
use super::domain::Domain;
use super::libvirt::Seen;
use super::memory::Promises;
use super::xml;
use crate::domain::{DomainState, StopReason};
use crate::error::{Error, chain};
use crate::kept::Transfer;
use crate::save_file;
use crate::work::blocking;

/// Pause between questions to a libvirt that does not answer them.
const ASK_PAUSE: Duration = Duration::from_secs(1);

/// So long a guest has, when it hears of a save, to close its channels, and again to end what ends with its
/// agent's connection. Many times what it takes, and both shorter than the pause in which it opens none.
const SETTLE_PAUSE: Duration = Duration::from_millis(500);

/// What a file holds beyond the guest's memory, at most, in bytes. Measured: 8.4 MB for 192 MiB.
const ROOM_BYTES: u64 = 64 << 20;

/// What a complete file ends with: type and length of a record (Xen, docs/specs/libxl-migration-stream).
const END_RECORD: [u8; 8] = [0; 8];

impl Domain {
    /// Saves the domain. The caller holds `operation`.
    pub(crate) async fn save(self: &Arc<Self>, file: &Path, limit: Duration) -> Result<(), Error> {
        let paused = match self.life.get() {
            DomainState::Running => false,
            DomainState::Paused => true,
            _ => return Err(self.life.wrong("save")),
        };
        let file = file.to_owned();
        if let Err(error) = self.write(&file, paused).await {
            self.not_saved(&file, paused).await?;
            return Err(Error::NotSaved {
                id: self.spec.id,
                source: Box::new(error),
            });
        }
        self.saving.send_replace(false);
        let control = |source| Error::Control {
            id: self.spec.id,
            operation: "save",
            source,
        };
        let reason = tokio::time::timeout(limit, self.life.stopped())
            .await
            .map_err(|elapsed| control(elapsed.into()))?;
        match reason {
            StopReason::Saved => Ok(()),
            reason => Err(Error::Gone {
                id: self.spec.id,
                reason,
            }),
        }
    }

    async fn write(&self, file: &Path, paused: bool) -> Result<(), Error> {
        let saving = Transfer::Saving {
            file: file.to_owned(),
            paused,
        };
        self.kept.set_transfer(saving).await?;
        let (begun, room_bytes) = (file.to_owned(), self.hardware().memory_bytes + ROOM_BYTES);
        blocking(move || {
            let opened = save_file::begin(&begun)?;
            // Afterwards it takes a minute until the guest goes on.
            match rustix::fs::fallocate(&opened, FallocateFlags::empty(), 0, room_bytes) {
                // A file system that cannot tell beforehand.
                Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
                Err(error) => Err(Error::io("make room for", begun)(error.into())),
            }
        })
        .await?;
        self.saving.send_replace(true);
        // A guest's kernel fails when a process closes a channel that was open while it was saved. And it
        // waits for itself without end where a process that has watches in xenstore ends while it suspends
        // (Linux, `unregister_xenbus_watch`), as what the agent runs may when its connection is cut.
        self.announce().await?;
        if paused {
            // It saves itself: a halted guest's kernel does not hear that it shall.
            self.libvirt.resume(self.spec.id).await?;
        }
        tokio::time::sleep(SETTLE_PAUSE).await;
        self.streams.send_replace(Streams::Cut);
        tokio::time::sleep(SETTLE_PAUSE).await;
        self.libvirt
            .save(self.spec.id, text(&save_file::partial(file))?)
            .await
    }

    /// Has the guest hear of a save that is near: a word of no meaning to its kernel, and any word makes its
    /// processes close their channels.
    async fn announce(&self) -> Result<(), Error> {
        let Some(domid) = self.libvirt.domid(self.spec.id).await? else {
            // It ends, and libvirt is going to say so.
            return Ok(());
        };
        let path = format!("/local/domain/{domid}/control/shutdown");
        blocking(move || {
            let said = channel::store()?.transaction::<_, xenstore::Error>(|store| {
                match store.read(&path)?.as_deref() {
                    // A word that the kernel has not taken yet is heard as well.
                    None | Some("") => store.write(&path, ""),
                    Some(_) => Ok(()),
                }
            });
            said.map_err(|error| channel::broken(&error))
        })
        .await
    }

    /// Undoes a save that did not come to its end.
    async fn not_saved(self: &Arc<Self>, file: &Path, paused: bool) -> Result<(), Error> {
        if self.kept.transfer() == Transfer::None {
            return Ok(());
        }
        let (partial, name) = (save_file::partial(file), xml::name(self.spec.id));
        // First, since what follows may need its room.
        let forgotten = blocking(move || save_file::forget(&partial)).await;
        if let Err(error) = blocking(move || wake(&name)).await {
            // It has ended, most likely; if not, it may be halted for good.
            tracing::error!(domain = %self.spec.id, error = chain(&error), "not saved");
        }
        if paused && let Err(error) = self.libvirt.pause(self.spec.id).await {
            tracing::warn!(domain = %self.spec.id, error = chain(&error), "not halted again");
        }
        let noted = self.kept.set_transfer(Transfer::None).await;
        self.open_streams();
        self.saving.send_replace(false);
        forgotten.and(noted)
    }

    /// What becomes of a domain that is gone while it was being saved: it has been.
    pub(super) async fn saved(&self, file: PathBuf, paused: bool) -> Result<StopReason, Error> {
        let sealed = file.clone();
        let known_by = blocking(move || {
            let known_by = save_file::seal(&sealed)?;
            let whole = save_file::ends_with(&sealed, &END_RECORD)?;
            if !whole {
                save_file::forget(&save_file::partial(&sealed))?;
            }
            Ok(whole.then_some(known_by))
        })
        .await?;
        let Some(known_by) = known_by else {
            self.kept.set_transfer(Transfer::None).await?;
            return Ok(StopReason::Failed {
                detail: "it was destroyed while it was being saved, and not by the host manager"
                    .to_owned(),
            });
        };
        self.kept
            .set_transfer(Transfer::Saved {
                file: file.clone(),
                known_by,
                paused,
            })
            .await?;
        blocking(move || save_file::publish(&file)).await?;
        Ok(StopReason::Saved)
    }

    /// Restores the domain. The caller holds `operation`.
    pub(crate) async fn restore(
        self: &Arc<Self>,
        file: &Path,
        config: &XenConfig,
        boot_id: &str,
        promises: &Arc<Promises>,
    ) -> Result<(), Error> {
        let id = self.spec.id;
        let (known_by, paused) = match (self.life.get(), self.kept.transfer()) {
            (DomainState::Running | DomainState::Paused, _) => return Ok(()),
            (
                DomainState::Stopped {
                    reason: StopReason::Saved,
                },
                Transfer::Saved {
                    known_by, paused, ..
                },
            ) => (known_by, paused),
            _ => return Err(self.life.wrong("restore")),
        };
        self.gone(config.command_limit).await?;
        let _promise = promises.promise(self.needed_bytes(), &self.libvirt).await?;
        let checked = (file.to_owned(), known_by.clone());
        blocking(move || save_file::check(&checked.0, id, &checked.1)).await?;
        let path = text(file)?;
        let file = file.to_owned();
        self.kept
            .set_transfer(Transfer::Restoring {
                file: file.clone(),
                known_by: known_by.clone(),
                paused,
            })
            .await?;
        if let Err(error) = self.libvirt.restore(path).await {
            if let Err(error) = self.libvirt.destroy(id).await {
                tracing::warn!(domain = %id, error = chain(&error), "half a restored domain");
            }
            self.kept
                .set_transfer(Transfer::Saved {
                    file,
                    known_by,
                    paused,
                })
                .await?;
            return Err(Error::Control {
                id,
                operation: "restore",
                source: error.into(),
            });
        }
        self.restored(file, paused, config, boot_id).await
    }

    /// The domain is there again, halted.
    async fn restored(
        self: &Arc<Self>,
        file: PathBuf,
        paused: bool,
        config: &XenConfig,
        boot_id: &str,
    ) -> Result<(), Error> {
        let (used, boot_id) = (file.clone(), boot_id.to_owned());
        self.kept
            .change(move |record| {
                record.transfer = Transfer::Restored { file: used, paused };
                record.boot_id = boot_id;
            })
            .await?;
        self.go_on(file, paused, config).await
    }

    /// Lets a restored domain go on.
    async fn go_on(
        self: &Arc<Self>,
        file: PathBuf,
        paused: bool,
        config: &XenConfig,
    ) -> Result<(), Error> {
        let dir = self.dir.clone();
        blocking(move || dir.clear_stop_reason()).await?;
        if let Err(error) = self.join_network().await {
            // The next change tries again.
            tracing::warn!(domain = %self.spec.id, error = chain(&error), "restored, and cut off");
        }
        self.limit_vcpus().await;
        if !paused && let Err(error) = self.libvirt.resume(self.spec.id).await {
            // What it does instead is seen.
            tracing::warn!(domain = %self.spec.id, error = chain(&error), "restored, and does not go on");
        }
        self.ended_by_itself.store(false, Ordering::Release);
        self.open_streams();
        self.attend(config);
        self.life
            .left(&DomainState::Stopped {
                reason: StopReason::Saved,
            })
            .await;
        blocking(move || save_file::forget(&file)).await?;
        self.kept.set_transfer(Transfer::None).await
    }

    fn open_streams(&self) {
        self.streams_opened.fetch_add(1, Ordering::AcqRel);
        let number = self.streams_opened.load(Ordering::Acquire);
        self.streams.send_replace(Streams::Open(number));
    }

    /// Completes or undoes what was under way when the process before this one ended. The caller
    /// holds `operation`.
    pub(crate) async fn settle(
        self: &Arc<Self>,
        config: &XenConfig,
        boot_id: &str,
    ) -> Result<(), Error> {
        match self.kept.transfer() {
            Transfer::None => match self.idle().await {
                Seen::Running | Seen::Paused => self.agree().await,
                _ => Ok(()),
            },
            Transfer::Saved { .. } => Ok(()),
            Transfer::Saving { file, paused } => {
                match self.idle().await {
                    // The supervisor does the rest.
                    Seen::Gone => {
                        self.saving.send_replace(false);
                        let completed =
                            tokio::time::timeout(config.command_limit, self.life.stopped());
                        completed.await.map(drop).map_err(|elapsed| Error::Control {
                            id: self.spec.id,
                            operation: "save",
                            source: elapsed.into(),
                        })
                    }
                    _ => self.not_saved(&file, paused).await,
                }
            }
            Transfer::Restoring {
                file,
                known_by,
                paused,
            } => match self.idle().await {
                Seen::Gone => {
                    self.kept
                        .set_transfer(Transfer::Saved {
                            file,
                            known_by,
                            paused,
                        })
                        .await
                }
                _ => self.restored(file, paused, config, boot_id).await,
            },
            Transfer::Restored { file, paused } => self.go_on(file, paused, config).await,
        }
    }

    /// What the domain does once libvirt has come to the end of what it does with it.
    async fn idle(&self) -> Seen {
        loop {
            // First of all: what the process before this one asked for last may be on its way still.
            tokio::time::sleep(ASK_PAUSE).await;
            let idle = self.libvirt.wait(self.spec.id).await;
            match idle {
                Ok(true) => match self.libvirt.see(self.spec.id).await {
                    Ok(seen) => return seen,
                    Err(error) => {
                        tracing::warn!(domain = %self.spec.id, error = chain(&error), "out of sight");
                    }
                },
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(domain = %self.spec.id, error = chain(&error), "out of sight");
                }
            }
        }
    }
}

/// Lets a guest go on that has suspended itself for a save which then failed. libvirt (9.0) leaves it so
/// and takes it for running; Xen's own tool lets it go on after a save that goes nowhere.
fn wake(name: &str) -> Result<(), Error> {
    const TOOL: &str = "xl";
    let run = |args: &[&str]| {
        let output = Command::new(TOOL)
            .args(args)
            .stdin(Stdio::null())
            .output()
            .map_err(Error::io("run", TOOL))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(Error::HypervisorBroken {
                detail: format!("xl {}: {}", args.join(" "), text(&output.stderr)),
            }),
        }
    };
    let list = run(&["list", name])?;
    // Name, number, memory, processors, states, time.
    let states = list
        .lines()
        .nth(1)
        .and_then(|line| line.split_whitespace().nth(4));
    if states.is_some_and(|states| states.contains('s')) {
        run(&["save", "-c", name, "/dev/null"])?;
    }
    Ok(())
}

fn text(path: &Path) -> Result<String, Error> {
    match path.to_str() {
        Some(text) if !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(Error::io("name to libvirt", path)(
            std::io::ErrorKind::InvalidInput.into(),
        )),
    }
}
