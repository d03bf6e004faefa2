//! The image store: one directory an image, described by its `image.toml`, made by `make images`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use xbee_hypervisor::{Disk, DiskFormat};

/// The image of a job that names none.
pub const DEFAULT_IMAGE: &str = "base";
/// Memory of a domain where neither job nor image says, MiB.
pub const DEFAULT_MEMORY_MIB: u64 = 192;

/// `image.toml`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Manifest {
    #[serde(default)]
    #[allow(dead_code, reason = "for people who read the file")]
    description: String,
    #[serde(default)]
    boot: BootedBy,
    kernel: Option<PathBuf>,
    initramfs: Option<PathBuf>,
    disk: Option<PathBuf>,
    #[serde(default = "raw")]
    disk_format: DiskFormat,
    #[serde(default)]
    kernel_args: Vec<String>,
    #[serde(default = "root")]
    ssh_user: String,
    memory_mib: Option<u64>,
}

/// What an image is booted by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum BootedBy {
    /// Its kernel, which the hypervisor starts.
    #[default]
    Kernel,
    /// The boot loader on its disk, which firmware starts.
    Disk,
}

fn raw() -> DiskFormat {
    DiskFormat::Raw
}

fn root() -> String {
    "root".into()
}

/// What a domain boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Kernel; `None`: the disk has its own boot loader.
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system with the agent as `/init`; there if the kernel is.
    pub initramfs: Option<PathBuf>,
    /// Root file system, where it is not the initramfs itself.
    pub disk: Option<Disk>,
    /// Kernel arguments.
    pub kernel_args: Vec<String>,
    /// User for SSH.
    pub ssh_user: String,
    /// Memory where the job does not say, bytes.
    pub memory_bytes: u64,
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No such image.
    #[error(
        "no image {name:?} in {directory}: {}; build the images with `make images`",
        there_are(known)
    )]
    Unknown {
        /// Asked for.
        name: String,
        /// Where it was looked for.
        directory: PathBuf,
        /// What there is.
        known: Vec<String>,
    },
    /// `image.toml` cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `image.toml` makes no sense.
    #[error("{path} is not as expected")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// What `image.toml` says does not fit together.
    #[error("{path}: {detail}")]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// What, and what to do.
        detail: String,
    },
}

fn there_are(known: &[String]) -> String {
    if known.is_empty() {
        "there are none".into()
    } else {
        format!("there are {}", known.join(", "))
    }
}

/// The directory of images.
#[derive(Debug, Clone)]
pub struct ImageStore {
    directory: PathBuf,
    simulated: bool,
}

impl ImageStore {
    /// A store in this directory, which need not exist.
    pub fn new(directory: PathBuf) -> Self {
        ImageStore {
            directory,
            simulated: false,
        }
    }

    /// For simulated domains, which read no files: the default image is there in any case.
    pub fn with_simulated_base(mut self) -> Self {
        self.simulated = true;
        self
    }

    /// Names of the images, sorted.
    pub fn names(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(&self.directory) else {
            return vec![];
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().join("image.toml").is_file())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| !name.starts_with('.'))
            .collect();
        names.sort();
        names
    }

    /// The kernel of the default image, where it is built.
    pub fn kernel(&self) -> Option<PathBuf> {
        let image = self.get(DEFAULT_IMAGE).ok()?;
        image.kernel.filter(|kernel| kernel.exists())
    }

    /// Reads an image's description.
    pub fn get(&self, name: &str) -> Result<Image, ImageError> {
        // A name is one component: `image:../../etc` is no image.
        let plain = !name.is_empty() && !name.starts_with('.') && !name.contains('/');
        let directory = self.directory.join(name);
        let there = plain && directory.join("image.toml").is_file();
        if !there && self.simulated && name == DEFAULT_IMAGE {
            return Ok(Image {
                kernel: Some(directory.join("kernel")),
                initramfs: Some(directory.join("initramfs")),
                disk: None,
                kernel_args: vec![],
                ssh_user: root(),
                memory_bytes: DEFAULT_MEMORY_MIB << 20,
            });
        }
        if !there {
            return Err(ImageError::Unknown {
                name: name.into(),
                directory: self.directory.clone(),
                known: self.names(),
            });
        }
        read(&directory)
    }
}

/// Reads `image.toml` of a directory; paths in it are relative to the directory.
fn read(directory: &Path) -> Result<Image, ImageError> {
    let path = directory.join("image.toml");
    let text = std::fs::read_to_string(&path).map_err(|source| ImageError::Read {
        path: path.clone(),
        source,
    })?;
    let manifest: Manifest = toml::from_str(&text).map_err(|source| ImageError::Parse {
        path: path.clone(),
        source: Box::new(source),
    })?;
    if let Some(detail) = manifest.contradiction() {
        return Err(ImageError::Contradiction { path, detail });
    }
    Ok(Image {
        kernel: manifest.kernel.map(|kernel| directory.join(kernel)),
        initramfs: manifest
            .initramfs
            .map(|initramfs| directory.join(initramfs)),
        disk: manifest.disk.map(|disk| Disk {
            image: directory.join(disk),
            format: manifest.disk_format,
            read_only: false,
        }),
        kernel_args: manifest.kernel_args,
        ssh_user: manifest.ssh_user,
        memory_bytes: manifest.memory_mib.unwrap_or(DEFAULT_MEMORY_MIB) << 20,
    })
}

impl Manifest {
    /// What is too much or missing for the way that the image is booted.
    fn contradiction(&self) -> Option<String> {
        let parts = [
            ("kernel", self.kernel.is_some()),
            ("initramfs", self.initramfs.is_some()),
        ];
        match self.boot {
            BootedBy::Kernel => {
                let (missing, _) = parts.into_iter().find(|(_, there)| !there)?;
                Some(format!(
                    "no `{missing}`; a disk with its own boot loader is booted by `boot = \"disk\"`"
                ))
            }
            BootedBy::Disk if self.disk.is_none() => {
                Some("no `disk`, which `boot = \"disk\"` wants to boot".into())
            }
            BootedBy::Disk => {
                let arguments = ("kernel_args", !self.kernel_args.is_empty());
                let (extra, _) = parts
                    .into_iter()
                    .chain([arguments])
                    .find(|(_, there)| *there)?;
                Some(format!(
                    "`{extra}` beside `boot = \"disk\"`, by which the disk's own boot loader decides: leave one of them out"
                ))
            }
        }
    }
}

/// Where `make images` puts images.
pub fn default_directory() -> PathBuf {
    std::env::var_os("XBEE_IMAGES")
        .map(PathBuf::from)
        .unwrap_or_else(|| home_directory("XDG_CACHE_HOME", ".cache").join("xbee/images"))
}

/// A directory of the XDG base directory specification.
pub fn home_directory(variable: &str, below_home: &str) -> PathBuf {
    std::env::var_os(variable)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| {
            let home = std::env::var_os("HOME").unwrap_or_else(|| "/".into());
            PathBuf::from(home).join(below_home)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_found_by_its_plain_name_only() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("tiny");
        std::fs::create_dir(&image).unwrap();
        std::fs::write(
            image.join("image.toml"),
            "kernel = \"../kernel/vmlinux\"\ninitramfs = \"i.cpio\"\ndisk = \"root.img\"\nmemory_mib = 64\n",
        )
        .unwrap();
        let store = ImageStore::new(dir.path().into());
        assert_eq!(store.names(), ["tiny"]);
        let found = store.get("tiny").unwrap();
        assert_eq!(found.memory_bytes, 64 << 20);
        assert_eq!(found.disk.unwrap().image, image.join("root.img"));
        assert_eq!(found.kernel.unwrap(), image.join("../kernel/vmlinux"));
        for name in ["", "..", "../tiny", "tiny/", "huge"] {
            let error = store.get(name).unwrap_err().to_string();
            assert!(error.contains("there are tiny"), "{error}");
        }
    }

    #[test]
    fn a_disk_with_a_boot_loader_has_no_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("whole");
        std::fs::create_dir(&image).unwrap();
        let store = ImageStore::new(dir.path().into());
        let get = |text: &str| {
            std::fs::write(image.join("image.toml"), text).unwrap();
            store.get("whole")
        };
        let found = get("boot = \"disk\"\ndisk = \"whole.img\"\n").unwrap();
        assert_eq!((found.kernel, found.initramfs), (None, None));
        assert_eq!(found.disk.unwrap().image, image.join("whole.img"));
        let path = image.join("image.toml");
        for (text, detail) in [
            (
                "disk = \"d\"",
                "no `kernel`; a disk with its own boot loader is booted by `boot = \"disk\"`",
            ),
            (
                "kernel = \"k\"",
                "no `initramfs`; a disk with its own boot loader is booted by `boot = \"disk\"`",
            ),
            (
                "boot = \"disk\"",
                "no `disk`, which `boot = \"disk\"` wants to boot",
            ),
            (
                "boot = \"disk\"\ndisk = \"d\"\nkernel = \"k\"",
                "`kernel` beside `boot = \"disk\"`, by which the disk's own boot loader decides: leave one of them out",
            ),
            (
                "boot = \"disk\"\ndisk = \"d\"\nkernel_args = [\"a\"]",
                "`kernel_args` beside `boot = \"disk\"`, by which the disk's own boot loader decides: leave one of them out",
            ),
        ] {
            let error = get(text).unwrap_err().to_string();
            assert_eq!(error, format!("{}: {detail}", path.display()));
        }
        get("boot = \"cd\"").unwrap_err();
    }
}
