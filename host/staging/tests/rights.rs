//! `file` URIs are opened with the rights of the job's owner. Needs root, to take another identity.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use common::{Bench, file_uri};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{Creation, Digest, Error, Identity, Progress, PutRequest};

const USER: u32 = 65_533;
const GROUP: u32 = 65_532;
const OTHER_GROUP: u32 = 65_531;

fn user(groups: &[u32]) -> Identity {
    Identity {
        uid: USER,
        gid: GROUP,
        groups: groups.to_vec(),
    }
}

/// A directory that everybody may enter; `None`, with the reason printed, if the test is not run by root.
fn bench() -> Option<Bench> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: needs root, to take the identity of another user");
        return None;
    }
    let bench = Bench::new();
    allow(bench.dir.path(), 0o755);
    Some(bench)
}

fn allow(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

async fn fetch(bench: &Bench, path: &Path, identity: Identity) -> Result<(), Error> {
    // Once by copying within the kernel, once through the stages.
    let mut request = bench.request(&file_uri(path));
    request.identity = identity;
    let copied = bench.run(request.clone()).await.map(|_| ());
    request.hash = Some(
        Digest::from_hex(
            xbee_staging::Algorithm::Md5,
            "900150983cd24fb0d6963f7d28e17f72",
        )
        .unwrap(),
    );
    let staged = bench.run(request).await.map(|_| ());
    assert_eq!(copied.is_ok(), staged.is_ok());
    copied
}

async fn put(bench: &Bench, to: &Path, creation: Creation) -> Result<u64, Error> {
    let request = PutRequest {
        uri: file_uri(to).parse().unwrap(),
        source: bench.path("source"),
        creation,
        identity: user(&[]),
        repeatable: None,
    };
    let progress = watch::channel(Progress::default()).0;
    let never = CancellationToken::new();
    bench.stager.put(request, progress, &never).await
}

#[tokio::test]
async fn reading_takes_the_rights_of_the_user() {
    let Some(bench) = bench() else { return };
    let secret = bench.write("secret", b"abc");
    allow(&secret, 0o600);
    let error = fetch(&bench, &secret, user(&[])).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("{}: access denied", file_uri(&secret))
    );
    assert_eq!(bench.names(), ["secret"]);
    // A link is followed with the user's rights too.
    std::os::unix::fs::symlink(&secret, bench.path("link")).unwrap();
    let error = fetch(&bench, &bench.path("link"), user(&[])).await;
    assert_eq!(error.unwrap_err().code(), "access-denied");

    allow(&secret, 0o640);
    chown(&secret, Some(0), Some(OTHER_GROUP)).unwrap();
    assert!(fetch(&bench, &secret, user(&[])).await.is_err());
    fetch(&bench, &secret, user(&[OTHER_GROUP])).await.unwrap();
    chown(&secret, Some(0), Some(GROUP)).unwrap();
    fetch(&bench, &secret, user(&[])).await.unwrap();
    chown(&secret, Some(USER), Some(0)).unwrap();
    fetch(&bench, &secret, user(&[])).await.unwrap();
    // Root's own group must not be left over.
    chown(&secret, Some(0), Some(0)).unwrap();
    assert!(fetch(&bench, &secret, user(&[])).await.is_err());
    // The destination is the process's own, and so is this thread.
    assert_eq!(std::fs::metadata(bench.path("out")).unwrap().uid(), 0);
    assert!(rustix::process::geteuid().is_root());

    // Ids that would mean "stay root" to the kernel.
    for identity in [
        Identity {
            uid: u32::MAX,
            ..user(&[])
        },
        Identity {
            gid: u32::MAX,
            ..user(&[])
        },
    ] {
        let error = fetch(&bench, &secret, identity).await.unwrap_err();
        assert_eq!(error.code(), "local-io");
    }
}

#[tokio::test]
async fn the_process_itself_is_not_reachable() {
    let Some(bench) = bench() else { return };
    // Everybody may read the file, but only root may enter its directory; the process has it open.
    let hidden = bench.path("hidden");
    std::fs::create_dir(&hidden).unwrap();
    allow(&hidden, 0o700);
    let database = hidden.join("database");
    std::fs::write(&database, b"abc").unwrap();
    allow(&database, 0o644);
    let open = std::fs::File::open(&database).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&open);
    for path in [
        format!("/proc/self/fd/{number}"),
        format!("/dev/fd/{number}"),
        "/proc/self/maps".to_owned(),
        database.to_str().unwrap().to_owned(),
    ] {
        let error = fetch(&bench, Path::new(&path), user(&[])).await;
        assert_eq!(error.unwrap_err().code(), "access-denied", "{path}");
    }
    bench.write("source", b"x");
    let directory = std::fs::File::open(&hidden).unwrap();
    allow(&hidden, 0o703);
    let number = std::os::fd::AsRawFd::as_raw_fd(&directory);
    let outer = bench.path("outer");
    std::fs::create_dir(&outer).unwrap();
    std::fs::rename(&hidden, outer.join("hidden")).unwrap();
    allow(&outer, 0o700);
    let through = format!("/proc/self/fd/{number}/new");
    let error = put(&bench, Path::new(&through), Creation::Overwrite).await;
    assert_eq!(error.unwrap_err().code(), "access-denied");
}

#[tokio::test]
async fn writing_takes_the_rights_of_the_user() {
    let Some(bench) = bench() else { return };
    allow(&bench.write("source", b"abc"), 0o600);
    let error = put(&bench, &bench.path("new"), Creation::Overwrite).await;
    assert_eq!(error.unwrap_err().code(), "access-denied");

    let home = bench.path("home");
    std::fs::create_dir(&home).unwrap();
    chown(&home, Some(USER), Some(GROUP)).unwrap();
    let target = home.join("new");
    put(&bench, &target, Creation::DontOverwrite).await.unwrap();
    let metadata = std::fs::metadata(&target).unwrap();
    assert_eq!((metadata.uid(), metadata.gid()), (USER, GROUP));
    put(&bench, &target, Creation::Append).await.unwrap();
    assert_eq!(std::fs::read(&target).unwrap(), b"abcabc");

    // A link of the user's making does not lead to root's files.
    let passwd = bench.write("passwd", b"root");
    std::os::unix::fs::symlink(&passwd, home.join("link")).unwrap();
    for creation in [Creation::Overwrite, Creation::Append] {
        let error = put(&bench, &home.join("link"), creation).await;
        assert_eq!(error.unwrap_err().code(), "access-denied", "{creation:?}");
    }
    assert_eq!(std::fs::read(&passwd).unwrap(), b"root");
}
