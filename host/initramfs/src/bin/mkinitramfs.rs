//! `mkinitramfs`: writes the base image's initramfs.
//!
//! Called by `images/base/build`. The result holds the agent as `/xbee/xbeinstd` (and `/init`),
//! busybox with a link for each applet, the kernel modules asked for with all they depend on, and
//! `/xbee/modules`: their absolute paths, one a line, in the order to load them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use xbee_initramfs::{Writer, modules};

/// Writes the base image's initramfs (uncompressed newc cpio).
#[derive(Parser)]
struct Arguments {
    /// Where to write the archive
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// The guest agent, becomes /init
    #[arg(long, value_name = "FILE")]
    agent: PathBuf,
    /// Static busybox, becomes /bin/busybox
    #[arg(long, value_name = "FILE")]
    busybox: PathBuf,
    /// Output of `busybox --list-full`: the links to make
    #[arg(long, value_name = "FILE")]
    applets: PathBuf,
    /// Kernel module directory (lib/modules/VERSION) with its modules.dep; none where all is built in
    #[arg(long, value_name = "DIR")]
    modules: Option<PathBuf>,
    /// Names of the modules to include
    #[arg(value_name = "MODULE", requires = "modules")]
    names: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("cannot create {}", path.display())]
    Create {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("the module directory {} does not end in a kernel version", .0.display())]
    ModulesDirectory(PathBuf),
    #[error(transparent)]
    Modules(#[from] modules::Error),
    #[error(transparent)]
    Archive(#[from] xbee_initramfs::Error),
}

const DIRECTORIES: &[(&str, u32)] = &[
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("lib", 0o755),
    ("mnt", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/sbin", 0o755),
    ("var", 0o755),
    ("xbee", 0o700),
];

const FILES: &[(&str, &str)] = &[
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    (
        "etc/hosts",
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n",
    ),
    ("etc/resolv.conf", ""),
];

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprint!("mkinitramfs: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                eprint!(": {cause}");
                source = cause.source();
            }
            eprintln!();
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Error> {
    let output = File::create(&arguments.output).map_err(|source| Error::Create {
        path: arguments.output.clone(),
        source,
    })?;
    let mut writer = Writer::new(BufWriter::new(output));
    for &(path, mode) in DIRECTORIES {
        writer.dir(path, mode)?;
    }
    // The kernel opens /dev/console for init before anything can mount devtmpfs.
    writer.node("dev/console", 0o600, 5, 1)?;
    writer.node("dev/null", 0o666, 1, 3)?;
    for &(path, content) in FILES {
        writer.file(path, 0o644, content.as_bytes())?;
    }
    writer.file("xbee/xbeinstd", 0o755, &read(&arguments.agent)?)?;
    writer.symlink("init", "xbee/xbeinstd")?;
    add_busybox(&mut writer, &arguments.busybox, &arguments.applets)?;
    let list = match &arguments.modules {
        Some(directory) => add_modules(&mut writer, directory, &arguments.names)?,
        None => String::new(),
    };
    writer.file("xbee/modules", 0o644, list.as_bytes())?;
    writer.finish()?;
    Ok(())
}

fn add_busybox<W: Write>(
    writer: &mut Writer<W>,
    busybox: &Path,
    applets: &Path,
) -> Result<(), Error> {
    writer.file("bin/busybox", 0o755, &read(busybox)?)?;
    for link in read_text(applets)?.lines() {
        if link != "bin/busybox" {
            writer.symlink(link, "/bin/busybox")?;
        }
    }
    Ok(())
}

/// Returns the absolute paths of the module files, one a line, in load order.
fn add_modules<W: Write>(
    writer: &mut Writer<W>,
    directory: &Path,
    names: &[String],
) -> Result<String, Error> {
    let version = directory
        .file_name()
        .and_then(|name| name.to_str())
        .ok_or_else(|| Error::ModulesDirectory(directory.to_owned()))?;
    let root = format!("lib/modules/{version}");
    let dep = read_text(&directory.join("modules.dep"))?;
    let order = modules::load_order(&dep, names)?;

    // Sorted, so that parents come before children.
    let mut parents = BTreeSet::from(["lib/modules".to_owned(), root.clone()]);
    for file in &order {
        for (end, _) in file.match_indices('/') {
            parents.insert(format!("{root}/{}", &file[..end]));
        }
    }
    for parent in &parents {
        writer.dir(parent, 0o755)?;
    }
    let mut list = String::new();
    for file in order {
        writer.file(
            &format!("{root}/{file}"),
            0o644,
            &read(&directory.join(file))?,
        )?;
        list.push_str(&format!("/{root}/{file}\n"));
    }
    Ok(list)
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    fs::read(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}

fn read_text(path: &Path) -> Result<String, Error> {
    fs::read_to_string(path).map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })
}
