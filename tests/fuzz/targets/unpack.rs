//! An archive or a compressed file from a stranger, staged as a job's is: it becomes something below its
//! destination or nothing at all, within the limits, and touches nothing beside it.
#![no_main]

use std::path::Path;
use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{Compression, Destination, FetchRequest, Identity, Limits, Progress, Stager};

const CONTENT: &[u8] = b"not the archive's";

struct Fixture {
    runtime: Runtime,
    stager: Stager,
    directory: tempfile::TempDir,
}

fn fixture() -> &'static Fixture {
    static FIXTURE: OnceLock<Fixture> = OnceLock::new();
    FIXTURE.get_or_init(|| {
        let limits = Limits {
            unpacked_bytes: 1 << 20,
            ratio_floor_bytes: 64 << 10,
            max_ratio: 100,
            entries: 64,
            ..Limits::default()
        };
        // In memory where there is such a place: thousands of small files a second are made.
        let shm = Path::new("/dev/shm");
        let directory = match shm.is_dir() {
            true => tempfile::tempdir_in(shm),
            false => tempfile::tempdir(),
        };
        Fixture {
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime"),
            stager: Stager::new(limits),
            directory: directory.expect("a directory"),
        }
    })
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("the directory");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    names.sort();
    names
}

fuzz_target!(|input: (u8, &[u8])| {
    // Archives inside of a compression would hide from the fuzzer what it changes.
    const FORMATS: [Compression; 8] = [
        Compression::Tar,
        Compression::Tar,
        Compression::Tgz,
        Compression::Tzst,
        Compression::Gzip,
        Compression::Bzip2,
        Compression::Xz,
        Compression::Zstd,
    ];
    let (format, bytes) = input;
    let compression = FORMATS[usize::from(format) % FORMATS.len()];
    let fixture = fixture();
    let at = |name: &str| fixture.directory.path().join(name);
    std::fs::write(at("source"), bytes).expect("the source");
    std::fs::write(at("beside"), CONTENT).expect("the file beside");
    let out = at("out");
    let request = FetchRequest {
        uri: format!("file://{}", at("source").display())
            .parse()
            .expect("a URI"),
        hash: None,
        compression: Some(compression),
        destination: match compression.is_archive() {
            true => Destination::Unpack(out.clone()),
            false => Destination::File(out.clone()),
        },
        identity: Identity::current(),
    };
    let progress = watch::channel(Progress::default()).0;
    let fetched = fixture.runtime.block_on(fixture.stager.fetch(
        request,
        progress,
        &CancellationToken::new(),
    ));
    assert_eq!(std::fs::read(at("beside")).ok().as_deref(), Some(CONTENT));
    match fetched {
        Ok(fetched) => {
            assert_eq!(names(fixture.directory.path()), ["beside", "out", "source"]);
            assert!(fetched.bytes_written <= 1 << 20 && fetched.entries.len() <= 64);
            if compression.is_archive() {
                std::fs::remove_dir_all(&out).expect("what was unpacked can be removed");
            } else {
                assert_eq!(
                    out.metadata().expect("the file").len(),
                    fetched.bytes_written
                );
                std::fs::remove_file(&out).expect("the file can be removed");
            }
        }
        Err(_) => assert_eq!(names(fixture.directory.path()), ["beside", "source"]),
    }
});
