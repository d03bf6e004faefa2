//! Stage-In: image and files come to the host.
//!
//! A local image that needs no unpacking is used where it is; domains write to overlays only.

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tokio::fs;
use tokio::sync::watch;
use xbee_api::{Progress, chain};
use xbee_engine::Failure;
use xbee_hypervisor::{Disk, DiskFormat};
use xbee_staging::{Compression, Destination, Digest, FetchRequest, Identity, Uri};

use super::{cached, fail, files, io_failure};
use crate::cache::{self, Room, Wanted};
use crate::fault;
use crate::images::{DEFAULT_IMAGE, Image};
use crate::plan::{Boot, Source, redacted};
use crate::task::StepContext;

/// Name of the file for the next step, until it is complete.
pub const BOOT_DRAFT: &str = "boot.new";
/// First bytes of a qcow2 image.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
/// Name of a root file system, kernel and initial RAM file system in an XSDL package.
const PACKAGE_IMAGE: [&str; 2] = ["image", "root.img"];
const PACKAGE_KERNEL: [&str; 2] = ["kernel", "vmlinuz"];
const PACKAGE_INITRD: [&str; 2] = ["initrd", "initramfs.cpio"];

/// What the domain boots, as files of the host. Kept in the spool for the step that starts it.
#[derive(Debug, Serialize, Deserialize)]
pub struct BootFiles {
    /// Kernel; `None`: the disk has its own boot loader.
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system that holds the agent; there if the kernel is.
    pub initramfs: Option<PathBuf>,
    /// Root file system.
    pub disk: Option<Disk>,
    /// Kernel arguments.
    pub kernel_args: Vec<String>,
    /// User for SSH.
    pub ssh_user: String,
}

/// What stage-in leaves for the next step.
#[derive(Debug, Serialize, Deserialize)]
struct StagedIn {
    /// The host's boot in which it was done. What it wrote is not forced to the disk, which may be many times
    /// more than all else: after a power cut it is done again.
    host_boot: String,
    files: BootFiles,
}

/// Identifies this boot of the host (Linux, Documentation/admin-guide/sysctl/kernel.rst, `random`).
fn host_boot() -> Result<String, Failure> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    if let Some(pretended) = fault::host_boot() {
        return Ok(pretended);
    }
    let text = std::fs::read_to_string(PATH).map_err(|error| io_failure(PATH, &error))?;
    Ok(text.trim().to_owned())
}

impl BootFiles {
    fn path(spool: &Path) -> PathBuf {
        spool.join("boot.json")
    }

    /// Reads what stage-in found.
    pub fn load(spool: &Path) -> Result<BootFiles, Failure> {
        let path = Self::path(spool);
        let text = std::fs::read(&path).map_err(|error| io_failure(path.display(), &error))?;
        let damaged = |why| fail("spool-damaged", format!("{}: {why}", path.display()));
        let staged: StagedIn =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if staged.host_boot != host_boot()? {
            return Err(damaged("made before the host was booted".into()));
        }
        Ok(staged.files)
    }

    fn save(self, spool: &Path) -> Result<(), Failure> {
        let path = Self::path(spool);
        let draft = spool.join(BOOT_DRAFT);
        let staged = StagedIn {
            host_boot: host_boot()?,
            files: self,
        };
        let saved = serde_json::to_vec(&staged)
            .map_err(io::Error::other)
            .and_then(|text| std::fs::write(&draft, text))
            .inspect(|()| fault::point("staged in"))
            .and_then(|()| std::fs::rename(&draft, &path));
        saved.map_err(|error| io_failure(path.display(), &error))
    }
}

/// Stages in again what a power cut may have damaged since.
pub async fn renew(context: &StepContext) -> Result<(), Failure> {
    match BootFiles::load(&context.task.spool) {
        Ok(_) => Ok(()),
        Err(failure) => {
            tracing::warn!(task = %context.task.record.id, reason = failure.reason, "staged in again");
            perform(context).await
        }
    }
}

/// Fetches everything. Begins anew when repeated.
pub async fn perform(context: &StepContext) -> Result<(), Failure> {
    let spool = &context.task.spool;
    for directory in ["in", "boot", "scripts"] {
        fault::point("stage in");
        let path = spool.join(directory);
        let cleared = match fs::remove_dir_all(&path).await {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => fs::create_dir_all(&path).await,
        };
        cleared.map_err(|error| io_failure(path.display(), &error))?;
    }
    let plan = context.task.plan();
    let found = resolve(context, &plan.boot).await?;
    for (index, script) in plan.scripts.iter().enumerate() {
        let to = files::script(spool, index);
        fetch(context, &script.source, Destination::File(to)).await?;
    }
    for (index, file) in plan.stage_in.iter().enumerate() {
        let to = files::staged(spool, index);
        fault::point("fetch");
        fetch(context, &file.source, destination(&file.source, to)?).await?;
        fault::point("fetched");
    }
    // Last: who finds it, finds all.
    found.save(spool)
}

fn destination(source: &Source, to: PathBuf) -> Result<Destination, Failure> {
    let archive = compression(source)?.is_some_and(Compression::is_archive);
    Ok(if archive {
        Destination::Unpack(to)
    } else {
        Destination::File(to)
    })
}

async fn resolve(context: &StepContext, boot: &Boot) -> Result<BootFiles, Failure> {
    let store = |name: &str| {
        let image = context.host.images.get(name);
        image.map_err(|error| fail("image-unusable", chain(&error)))
    };
    let directory = context.task.spool.join("boot");
    match boot {
        Boot::Store { name } => Ok(store(name)?.into()),
        Boot::Instance {
            kernel,
            kernel_args,
            initrd,
            image,
        } => {
            let base = store(DEFAULT_IMAGE)?;
            let kernel = match kernel {
                Some(kernel) => Some(local(context, kernel, directory.join("kernel")).await?),
                None => None,
            };
            let initrd = match initrd {
                Some(initrd) => Some(local(context, initrd, directory.join("initrd")).await?),
                None => None,
            };
            let image = local(context, image, directory.join("image")).await?;
            assemble(base, kernel, initrd, image, kernel_args, &directory)
        }
        Boot::Package { package } => {
            let unpacked = directory.join("package");
            let archive = directory.join("archive");
            let through_cache = match cacheable(context, package)? {
                Some(wanted) => {
                    cached::package(context, wanted, &archive, unpacked.clone()).await?
                }
                None => false,
            };
            if !through_cache {
                fetch(context, package, Destination::Unpack(unpacked.clone())).await?;
            }
            let find = |names: &[&str]| {
                let path = names.iter().map(|name| unpacked.join(name));
                path.into_iter().find(|path| path.is_file())
            };
            let image = find(&PACKAGE_IMAGE).ok_or_else(|| {
                fail(
                    "package-incomplete",
                    format!(
                        "{} holds no file called {}: expected a root file system and, beside it, optionally {} and {}",
                        redacted(&package.uri),
                        PACKAGE_IMAGE.join(" or "),
                        PACKAGE_KERNEL.join(" or "),
                        PACKAGE_INITRD.join(" or "),
                    ),
                )
            })?;
            let base = store(DEFAULT_IMAGE)?;
            let (kernel, initrd) = (find(&PACKAGE_KERNEL), find(&PACKAGE_INITRD));
            assemble(base, kernel, initrd, image, &[], &directory)
        }
    }
}

impl From<Image> for BootFiles {
    fn from(image: Image) -> Self {
        BootFiles {
            kernel: image.kernel,
            initramfs: image.initramfs,
            disk: image.disk,
            kernel_args: image.kernel_args,
            ssh_user: image.ssh_user,
        }
    }
}

/// The user's parts, completed by those of the base image. The agent travels in the initial RAM
/// file system, so the image itself needs none: it is appended to the user's own.
fn assemble(
    base: Image,
    kernel: Option<PathBuf>,
    initrd: Option<PathBuf>,
    image: PathBuf,
    kernel_args: &[String],
    directory: &Path,
) -> Result<BootFiles, Failure> {
    let (Some(base_kernel), Some(base_initramfs)) = (base.kernel, base.initramfs) else {
        return Err(fail(
            "image-unusable",
            format!(
                "the image {DEFAULT_IMAGE:?} has no kernel for the job's own image to boot with"
            ),
        ));
    };
    let format = if has_magic(&image, QCOW2_MAGIC)? {
        DiskFormat::Qcow2
    } else {
        DiskFormat::Raw
    };
    let mut kernel_args = kernel_args.to_vec();
    let initramfs = match initrd {
        None => base_initramfs,
        Some(initrd) => {
            let joined = directory.join("initramfs");
            join(&[&initrd, &base_initramfs], &joined)?;
            // The user's `/init` would boot the image without us.
            kernel_args.push("rdinit=/xbee/xbeinstd".into());
            joined
        }
    };
    Ok(BootFiles {
        kernel: Some(kernel.unwrap_or(base_kernel)),
        initramfs: Some(initramfs),
        disk: Some(Disk {
            image,
            format,
            read_only: false,
        }),
        kernel_args,
        ssh_user: "root".into(),
    })
}

/// Archives of an initial RAM file system one after another, each at a multiple of four bytes
/// (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).
fn join(parts: &[&Path], to: &Path) -> Result<(), Failure> {
    let write = || -> io::Result<()> {
        let mut joined = std::fs::File::create(to)?;
        for part in parts {
            let length = io::copy(&mut std::fs::File::open(part)?, &mut joined)?;
            let padding = usize::try_from(length.next_multiple_of(4) - length).unwrap_or(0);
            io::Write::write_all(&mut joined, &[0; 4][..padding])?;
        }
        Ok(())
    };
    write().map_err(|error| io_failure(to.display(), &error))
}

fn has_magic(path: &Path, magic: &[u8]) -> Result<bool, Failure> {
    let read = || -> io::Result<bool> {
        let mut head = vec![];
        let file = std::fs::File::open(path)?;
        file.take(magic.len() as u64).read_to_end(&mut head)?;
        Ok(head == magic)
    };
    read().map_err(|error| io_failure(path.display(), &error))
}

/// A file of the host with the source's content: the source itself if that will do.
async fn local(context: &StepContext, source: &Source, to: PathBuf) -> Result<PathBuf, Failure> {
    if let Some(wanted) = cacheable(context, source)?
        && cached::image(context, wanted, &to).await?
    {
        return Ok(to);
    }
    let here = match cache::named(&source.uri) {
        Some(_) => None,
        None => place(context, source)?.0.file_path(),
    };
    match here {
        Some(path) if source.compression.is_none() => {
            // Checks the owner's right to read it, and the digest.
            fetch(context, source, Destination::Verify).await?;
            Ok(path)
        }
        _ => {
            fetch(context, source, Destination::File(to.clone())).await?;
            Ok(to)
        }
    }
}

/// What is asked of the cache for an image, if it is one for the cache.
fn cacheable(context: &StepContext, source: &Source) -> Result<Option<Wanted>, Failure> {
    if !context.host.cache.is_on() || source.upload.is_some() || cache::named(&source.uri).is_some()
    {
        return Ok(None);
    }
    let wanted = Wanted {
        owner: context.task.record.owner,
        text: source.uri.clone(),
        uri: parse_uri(&source.uri)?,
        hash: digest(source)?,
        compression: compression(source)?,
    };
    Ok(cache::serves(&wanted.uri, wanted.hash.as_ref()).then_some(wanted))
}

/// Where a source is, and with whose rights it is read: what was sent for it is `xbed`'s own.
fn place(context: &StepContext, source: &Source) -> Result<(Uri, Identity), Failure> {
    let Some(upload) = source.upload else {
        return Ok((parse_uri(&source.uri)?, identity(context)));
    };
    let path = context.host.uploads.path(context.task.record.owner, upload);
    Ok((file_uri(&path)?, Identity::current()))
}

/// Of a file of `xbed`'s own.
pub(super) fn file_uri(path: &Path) -> Result<Uri, Failure> {
    let uri = url::Url::from_file_path(path).map_err(|()| {
        let what = format!("{} is no absolute path", path.display());
        fail("host-io", what)
    })?;
    parse_uri(uri.as_str())
}

pub(super) fn parse_uri(uri: &str) -> Result<Uri, Failure> {
    uri.parse()
        .map_err(|error: xbee_staging::Error| fail(error.code(), chain(&error)))
}

fn compression(source: &Source) -> Result<Option<Compression>, Failure> {
    let parse = |name: &String| name.parse::<Compression>();
    let parsed = source.compression.as_ref().map(parse).transpose();
    parsed.map_err(|error| fail("unknown-compression", chain(&error)))
}

fn digest(source: &Source) -> Result<Option<Digest>, Failure> {
    let Some((algorithm, hex)) = &source.hash else {
        return Ok(None);
    };
    let invalid = |reason: String| {
        let what = format!("{}: {reason}", redacted(&source.uri));
        fail("invalid-hash", what)
    };
    let algorithm = algorithm.parse().map_err(|e| invalid(chain(&e)))?;
    let digest = Digest::from_hex(algorithm, hex).map_err(|e| invalid(chain(&e)))?;
    Ok(Some(digest))
}

async fn fetch(
    context: &StepContext,
    source: &Source,
    destination: Destination,
) -> Result<(), Failure> {
    let (hash, compression) = (digest(source)?, compression(source)?);
    if let Some(id) = cache::named(&source.uri) {
        return cached::entry(context, id, hash, compression, destination).await;
    }
    let (uri, identity) = place(context, source)?;
    let request = FetchRequest {
        uri,
        hash,
        compression,
        destination,
        identity,
    };
    let fetched = transfer(context, &source.uri, request).await;
    fetched.map_err(|error| {
        let reason = match source.upload {
            // By the name that its owner knows.
            Some(_) => format!("{}, as it was sent: {}", source.uri, chain(error.kind())),
            None => chain(&error),
        };
        fail(error.code(), reason)
    })
}

/// Fetches, and shows how far it is. A full disk is made room on by the cache, once.
pub(super) async fn transfer(
    context: &StepContext,
    uri: &str,
    request: FetchRequest,
) -> Result<(), xbee_staging::Error> {
    let host = &context.host;
    let once = async |request| {
        let (progress, seen) = watch::channel(xbee_staging::Progress::default());
        let transfer = host.stager.fetch(request, progress, &context.cancel);
        with_progress(context, uri, seen, transfer).await
    };
    match once(request.clone()).await {
        Err(error)
            if error.code() == "disk-full" && cache::make_room(host, Room::Disk(None)).await =>
        {
            once(request).await.map(drop)
        }
        fetched => fetched.map(drop),
    }
}

/// Whose rights open `file:` URIs.
pub(super) fn identity(context: &StepContext) -> Identity {
    let owner = context.task.record.owner;
    Identity {
        uid: owner.uid,
        gid: owner.gid,
        groups: vec![],
    }
}

/// Shows a transfer's progress in the task's status while it runs.
pub(super) async fn with_progress<T>(
    context: &StepContext,
    uri: &str,
    mut seen: watch::Receiver<xbee_staging::Progress>,
    transfer: impl Future<Output = T>,
) -> T {
    let what = redacted(uri);
    let show = async {
        while seen.changed().await.is_ok() {
            let now = *seen.borrow_and_update();
            context.task.progress.send_replace(Some(Progress {
                what: what.clone(),
                done_bytes: now.transferred_bytes,
                total_bytes: now.total_bytes,
            }));
        }
        std::future::pending::<()>().await;
    };
    let ended = tokio::select! {
        ended = transfer => ended,
        () = show => unreachable!("`show` does not end"),
    };
    context.task.progress.send_replace(None);
    ended
}
