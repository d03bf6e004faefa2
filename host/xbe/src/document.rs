//! The JSDL document of `run`'s command line.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use url::Url;
use xbee_api::CACHE_SCHEME;
use xbee_jsdl::{
    Application, ApplicationKind, DataStaging, EnvironmentVariable, IMAGE_SCHEME, Identification,
    InstanceDefinition, InstanceSource, Job, Limits, Located, Location, Process, RangeValue,
    Resources,
};

use crate::cli;
use crate::error::Error;

/// The document.
///
/// # Errors
/// Files that are not there, values that no document can hold.
pub fn of(args: &cli::Run) -> Result<String, Error> {
    let mut staging = Vec::new();
    for stage_in in &args.stage_in {
        let source = source(&stage_in.file)?;
        let file = located(&stage_in.path);
        staging.push(DataStaging {
            file,
            source: Some(source),
            ..DataStaging::default()
        });
    }
    for stage_out in &args.stage_out {
        let target = Some(target(&stage_out.file)?);
        let file = located(&stage_out.path);
        staging.push(DataStaging {
            file,
            target,
            ..DataStaging::default()
        });
    }
    let mut words = args.command.iter().map(|word| located(word));
    let process = Process {
        executable: words.next().unwrap_or_default(),
        arguments: words.collect(),
        working_directory: args.workdir.as_deref().map(located),
        environment: args
            .env
            .iter()
            .map(|(name, value)| EnvironmentVariable {
                name: name.clone(),
                value: located(value),
            })
            .collect(),
        limits: Limits {
            wall_time_s: args.time,
            ..Limits::default()
        },
        ..Process::default()
    };
    let job = Job {
        identification: Identification {
            name: args.name.clone(),
            ..Identification::default()
        },
        application: Application {
            kind: ApplicationKind::Posix(process),
            ..Application::default()
        },
        resources: Resources {
            individual_cpu_count: args.cpus.map(|cpus| RangeValue::exactly(cpus.into())),
            // Exact up to 2^53 bytes.
            individual_physical_memory: args.memory.map(|bytes| RangeValue::exactly(bytes as f64)),
            ..Resources::default()
        },
        staging,
        instance: args.image.as_deref().map(instance).transpose()?,
        ..Job::default()
    };
    Ok(xbee_jsdl::write(&job)?)
}

fn located(value: &str) -> Located {
    Located {
        value: value.to_owned(),
        file_system: None,
    }
}

fn is_uri(text: &str) -> bool {
    text.contains("://") || text.starts_with(CACHE_SCHEME)
}

/// The image: a URI as it is, what has a `/` is a path, everything else an image of the host.
fn instance(image: &str) -> Result<InstanceDefinition, Error> {
    let location = if is_uri(image) || image.starts_with(IMAGE_SCHEME) {
        Location {
            uri: image.to_owned(),
            ..Location::default()
        }
    } else if image.contains('/') {
        Location {
            mode: None,
            ..source(image)?
        }
    } else {
        Location {
            uri: format!("{IMAGE_SCHEME}{image}"),
            ..Location::default()
        }
    };
    Ok(InstanceDefinition {
        source: InstanceSource::Package(location),
        scripts: Vec::new(),
    })
}

/// A file of this side, with its permission bits, so that a program stays one.
fn source(file: &str) -> Result<Location, Error> {
    if is_uri(file) {
        return Ok(Location {
            uri: file.to_owned(),
            ..Location::default()
        });
    }
    let path = PathBuf::from(file);
    let unreadable = |source| Error::Read {
        path: path.clone(),
        source,
    };
    let metadata = fs::metadata(&path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(Error::NotAFile { path });
    }
    // The user learns now what xbed would find out later.
    fs::File::open(&path).map_err(unreadable)?;
    let mode = Some(metadata.permissions().mode() & 0o777);
    Ok(Location {
        uri: file_uri(&path)?,
        mode,
        ..Location::default()
    })
}

/// Where a result goes.
fn target(file: &str) -> Result<String, Error> {
    if is_uri(file) {
        return Ok(file.to_owned());
    }
    let path = PathBuf::from(file);
    if path.is_dir() || file.ends_with('/') {
        return Err(Error::NotAFile { path });
    }
    match path.parent() {
        Some(parent) if parent == Path::new("") || parent.is_dir() => file_uri(&path),
        _ => Err(Error::NoDirectory { path }),
    }
}

fn file_uri(path: &Path) -> Result<String, Error> {
    let path = std::path::absolute(path).map_err(|source| Error::System {
        action: "find out the current directory",
        source,
    })?;
    match Url::from_file_path(&path) {
        Ok(url) => Ok(url.into()),
        // Only for relative paths.
        Err(()) => Err(Error::NotAFile { path }),
    }
}
