//! Archives: what a good one becomes, and what a hostile one cannot do.

#![allow(clippy::unwrap_used)]

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Bench, file_uri, noise, pack};
use xbee_staging::{Compression, EntryKind, Error, Limits};

/// A tar archive written byte by byte, so that it may be as wrong as it likes.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn header(name: &[u8], kind: u8, link: &[u8], size: u64) -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name);
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link);
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(0o644);
        header.set_uid(1000);
        header.set_gid(100);
        header.set_mtime(1_700_000_000);
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn entry(mut self, name: &str, kind: u8, link: &str, data: &[u8]) -> Self {
        let header = Self::header(name.as_bytes(), kind, link.as_bytes(), data.len() as u64);
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name, b'0', "", data)
    }

    fn dir(self, name: &str) -> Self {
        self.entry(name, b'5', "", b"")
    }

    fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, b'2', target, b"")
    }

    fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(name, b'1', target, b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

/// Unpacks `archive` and returns the error; nothing may be left of it.
async fn refused(archive: &[u8]) -> Error {
    refused_with(Limits::default(), archive, Compression::Tar).await
}

async fn refused_with(limits: Limits, archive: &[u8], compression: Compression) -> Error {
    let bench = Bench::with_limits(limits);
    let source = bench.write("archive", archive);
    let error = bench
        .unpack(&file_uri(&source), compression)
        .await
        .unwrap_err();
    assert_eq!(bench.names(), ["archive"], "{error}");
    error
}

#[track_caller]
fn assert_unsafe(error: &Error, reason: &str) {
    assert_eq!(error.code(), "unsafe-archive-entry", "{error}");
    assert!(error.to_string().ends_with(reason), "{error}");
}

fn shell(script: &str, dir: &Path) {
    let status = Command::new("sh")
        .args(["-euc", script])
        .current_dir(dir)
        .status()
        .unwrap();
    assert!(status.success(), "{script}");
}

#[tokio::test]
async fn archives_of_gnu_tar_in_every_packing() {
    let packings = [
        (Compression::Tar, "--create --format=gnu --sparse"),
        (Compression::Tbz, "--create --format=ustar --bzip2"),
        (Compression::Tgz, "--create --format=pax --gzip"),
        (Compression::Txz, "--create --format=gnu --xz"),
        (Compression::Tzst, "--create --format=pax --zstd"),
    ];
    for (compression, options) in packings {
        let bench = Bench::new();
        let long = "n".repeat(97);
        let script = format!(
            "mkdir -p in/sub/{long} && cd in
             echo hello > sub/hello && chmod 4755 sub/hello && ln sub/hello same && ln -s sub/hello link
             ln -s nowhere dangling && echo deep > sub/{long}/f
             truncate -s 4M sparse && printf data | dd of=sparse bs=1 seek=2M conv=notrunc status=none
             touch -d @1600000000 sub/hello && cd ..
             tar {options} --file=archive --owner=1234 --group=4321 -C in ."
        );
        shell(&script, bench.dir.path());
        let source = bench.path("archive");
        let done = bench.unpack(&file_uri(&source), compression).await.unwrap();
        shell("diff -r --no-dereference in tree", bench.dir.path());

        let tree = bench.path("tree");
        let hello = std::fs::metadata(tree.join("sub/hello")).unwrap();
        assert_eq!(hello.permissions().mode() & 0o7777, 0o755, "no set-user-ID");
        assert_eq!(hello.nlink(), 2);
        let sparse = std::fs::metadata(tree.join("sparse")).unwrap();
        assert_eq!(sparse.len(), 4 << 20);
        assert!(sparse.blocks() * 512 <= 8192, "{}", sparse.blocks());
        let mode = std::fs::metadata(&tree).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o700);

        let paths: Vec<_> = done.entries.iter().map(|e| e.path.clone()).collect();
        let expected = [
            "dangling",
            "link",
            "same",
            "sparse",
            "sub",
            "sub/hello",
            &format!("sub/{long}"),
            &format!("sub/{long}/f"),
        ];
        assert_eq!(paths, expected.map(PathBuf::from));
        for entry in &done.entries {
            assert_eq!((entry.uid, entry.gid), (1234, 4321));
        }
        // tar stores the first name it meets as the file and the other as the link.
        let (file, link) = match &done.entries[2].kind {
            EntryKind::File { .. } => (&done.entries[2], &done.entries[5]),
            _ => (&done.entries[5], &done.entries[2]),
        };
        assert_eq!(file.kind, EntryKind::File { size_bytes: 6 });
        assert_eq!((file.mode, file.mtime_s), (0o4755, 1_600_000_000));
        let target = file.path.clone();
        assert_eq!(link.kind, EntryKind::HardLink { target });
        let target = "sub/hello".into();
        assert_eq!(done.entries[1].kind, EntryKind::Symlink { target });
        assert_eq!(bench.names(), ["archive", "in", "tree"]);
    }
}

#[tokio::test]
async fn directories_not_listed_are_made_and_told() {
    let bench = Bench::new();
    let archive = Tar::default().file("a/b/c", b"x").dir("a").end();
    let source = bench.write("archive", &archive);
    let done = bench
        .unpack(&file_uri(&source), Compression::Tar)
        .await
        .unwrap();
    let told: Vec<_> = done
        .entries
        .iter()
        .map(|e| (e.path.to_str().unwrap(), e.mode, e.uid))
        .collect();
    assert_eq!(
        told,
        [
            ("a", 0o644, 1000),
            ("a/b", 0o755, 0),
            ("a/b/c", 0o644, 1000)
        ]
    );
    // The owner may always enter and read on the host.
    let mode = std::fs::metadata(bench.path("tree/a")).unwrap().mode();
    assert_eq!(mode & 0o777, 0o744);
}

#[tokio::test]
async fn the_last_of_two_files_with_one_name_stays() {
    let bench = Bench::new();
    let archive = Tar::default()
        .file("a", b"old")
        .symlink("b", "a")
        .file("b", b"new, not through the link")
        .file("a", b"new")
        .end();
    let source = bench.write("archive", &archive);
    bench
        .unpack(&file_uri(&source), Compression::Tar)
        .await
        .unwrap();
    let read = |name| std::fs::read(bench.path("tree").join(name)).unwrap();
    assert_eq!(read("a"), b"new");
    assert_eq!(read("b"), b"new, not through the link");
}

#[tokio::test]
async fn an_empty_directory_may_be_there_but_not_a_full_one() {
    let bench = Bench::new();
    let source = bench.write("archive", &Tar::default().file("a", b"x").end());
    std::fs::create_dir(bench.path("tree")).unwrap();
    let uri = file_uri(&source);
    bench.unpack(&uri, Compression::Tar).await.unwrap();
    let error = bench.unpack(&uri, Compression::Tar).await.unwrap_err();
    assert_eq!(error.code(), "local-io");
    assert_eq!(bench.names(), ["archive", "tree"]);
}

#[tokio::test]
async fn paths_that_lead_out_are_refused() {
    for name in ["../a", "a/../../b", "..", "a/.."] {
        let error = refused(&Tar::default().file(name, b"x").end()).await;
        assert_unsafe(&error, "\"..\" in the path");
    }
    let error = refused(&Tar::default().file("/etc/passwd", b"x").end()).await;
    assert_unsafe(
        &error,
        "unsafe archive entry \"/etc/passwd\": an absolute path",
    );
    let error = refused(&Tar::default().file("./", b"x").end()).await;
    assert_eq!(error.code(), "unsafe-archive-entry");
}

#[tokio::test]
async fn links_that_lead_out_are_refused() {
    let error = refused(&Tar::default().symlink("a", "/etc").end()).await;
    assert_unsafe(&error, "it links to an absolute path");
    let error = refused(&Tar::default().symlink("d/a", "../../x").end()).await;
    assert_unsafe(&error, "it links out of the directory");
    // Each link stays inside by its own text; together they lead out.
    let archive = Tar::default()
        .dir("x/y")
        .symlink("x/y/top", "../..")
        .symlink("out", "x/y/top/..")
        .end();
    assert_unsafe(&refused(&archive).await, "it leads out of the directory");
    for target in ["/etc/passwd", "../secret"] {
        let error = refused(&Tar::default().hard_link("a", target).end()).await;
        assert_eq!(error.code(), "unsafe-archive-entry", "{error}");
    }
    // A hard link to a symbolic link could name anything.
    let archive = Tar::default().symlink("s", "t").hard_link("h", "s").end();
    assert_unsafe(
        &refused(&archive).await,
        "its link target is no file that came before it",
    );
}

#[tokio::test]
async fn nothing_is_placed_through_a_link() {
    let archive = Tar::default()
        .dir("real")
        .symlink("link", "real")
        .file("link/a", b"x")
        .end();
    assert_unsafe(&refused(&archive).await, "a link is in its path");
    let archive = Tar::default().symlink("link", "real").dir("link").end();
    assert_eq!(refused(&archive).await.code(), "unsafe-archive-entry");
    let archive = Tar::default().file("f", b"").file("f/a", b"").end();
    assert_unsafe(&refused(&archive).await, "a file is in its path");
    let archive = Tar::default().dir("d").file("d", b"").end();
    assert_unsafe(&refused(&archive).await, "it would replace a directory");
    let archive = Tar::default().file(&"n".repeat(100), b"");
    let archive = archive.entry("././@LongLink", b'L', "", &[b'n'; 300]);
    let error = refused(&archive.file("x", b"").end()).await;
    assert_unsafe(&error, "its name is too long");
}

#[tokio::test]
async fn only_files_directories_and_links_are_taken() {
    for (kind, reason) in [
        (b'3', "it is a device"),
        (b'4', "it is a device"),
        (b'6', "it is a pipe"),
        (b'V', "it is of an unknown type"),
    ] {
        let error = refused(&Tar::default().entry("a", kind, "", b"").end()).await;
        assert_unsafe(&error, reason);
    }
}

#[tokio::test]
async fn counts_and_sizes_are_bounded() {
    let limits = |change: fn(&mut Limits)| {
        let mut limits = Limits::default();
        change(&mut limits);
        limits
    };
    let many = (0..50).fold(Tar::default(), |tar, n| tar.file(&format!("d{n}/f"), b""));
    let error = refused_with(
        limits(|limits| limits.entries = 60),
        &many.end(),
        Compression::Tar,
    )
    .await;
    assert!(
        error
            .to_string()
            .ends_with("too large: more than 60 entries in the archive"),
        "{error}"
    );

    // 8 EiB by its header, and a hole.
    let mut header = Tar::header(b"huge", b'S', b"", 0);
    let gnu = header.as_gnu_mut().unwrap();
    for (field, text) in [
        (&mut gnu.realsize, "77777777777"),
        (&mut gnu.sparse[0].offset, "77777777777"),
        (&mut gnu.sparse[0].numbytes, "00000000000"),
    ] {
        field[..11].copy_from_slice(text.as_bytes());
    }
    header.set_cksum();
    let archive = Tar(header.as_bytes().to_vec()).end();
    let error = refused_with(
        limits(|limits| limits.unpacked_bytes = 1 << 30),
        &archive,
        Compression::Tar,
    )
    .await;
    assert!(
        error
            .to_string()
            .ends_with("too large: more than 1073741824 bytes in the archive's files"),
        "{error}"
    );

    // Headers that would be taken into memory.
    for kind in [b'L', b'K', b'x'] {
        let name = vec![b'n'; 64 << 20];
        let archive = Tar::default().entry("x", kind, "", &name).end();
        let packed = pack(Compression::Tzst, &archive);
        let error = refused_with(Limits::default(), &packed, Compression::Tzst).await;
        assert_eq!(error.code(), "corrupt-archive");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("headers exceed 1048576 bytes"), "{source}");
    }
}

#[tokio::test]
async fn bombs_do_not_go_off() {
    let limits = Limits {
        unpacked_bytes: 64 << 20,
        max_ratio: 100,
        ratio_floor_bytes: 1 << 20,
        ..Limits::default()
    };
    // Zeros cost nothing on disk and are stopped by the size; others by what they would store.
    let stored = "more than 100 bytes stored for each byte transferred";
    let decoded = "more than 67108864 bytes after decompression";
    let listed = "more than 67108864 bytes in the archive's files";
    for (byte, in_tar, plain) in [(0, listed, decoded), (b'A', stored, stored)] {
        let inside = Tar::default()
            .file("a", &vec![byte; 50 << 20])
            .file("b", &vec![byte; 50 << 20])
            .end();
        let packed = pack(Compression::Tbz, &inside);
        assert!(packed.len() < 100_000);
        let error = refused_with(limits.clone(), &packed, Compression::Tbz).await;
        assert_eq!(error.code(), "size-limit");
        assert!(error.to_string().ends_with(in_tar), "{error}");

        let bench = Bench::with_limits(limits.clone());
        let bomb = pack(Compression::Zstd, &vec![byte; 80 << 20]);
        let source = bench.write("bomb", &bomb);
        let error = bench
            .fetch_as(&file_uri(&source), None, Some(Compression::Zstd))
            .await
            .unwrap_err();
        assert!(error.to_string().ends_with(plain), "{error}");
        assert_eq!(bench.names(), ["bomb"]);
    }
}

/// With the limits that jobs have.
#[tokio::test]
async fn a_million_entries_in_a_small_archive() {
    let entries = Tar::default().dir("d").0.repeat(10_000);
    let packed = pack(Compression::Tzst, &entries).repeat(100);
    assert!(packed.len() < 1 << 20, "{}", packed.len());
    let error = refused_with(Limits::default(), &packed, Compression::Tzst).await;
    assert!(
        error
            .to_string()
            .ends_with("too large: more than 500000 entries in the archive"),
        "{error}"
    );
}

/// 10 GiB in 13 KiB: of zeros it costs no space; of anything else it is refused with the limits that jobs have.
#[tokio::test]
async fn ten_gibibytes_in_thirteen_kibibytes() {
    for (byte, refused) in [(0, false), (b'A', true)] {
        let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::best());
        // One block holds as much.
        std::io::Write::write_all(&mut encoder, &vec![byte; 40 << 20]).unwrap();
        let bomb = encoder.finish().unwrap().repeat(256);
        assert!(bomb.len() <= 13 << 10, "{}", bomb.len());
        let bench = Bench::new();
        let source = bench.write("bomb", &bomb);
        let done = bench
            .fetch_as(&file_uri(&source), None, Some(Compression::Bzip2))
            .await;
        if refused {
            let error = done.unwrap_err();
            assert!(
                error
                    .to_string()
                    .ends_with("more than 2000 bytes stored for each byte transferred"),
                "{error}"
            );
            assert_eq!(bench.names(), ["bomb"]);
        } else {
            assert_eq!(done.unwrap().bytes_stored, 0);
            let out = std::fs::metadata(bench.path("out")).unwrap();
            assert_eq!((out.len(), out.blocks()), (10 << 30, 0));
        }
    }
}

#[tokio::test]
async fn damaged_archives_are_refused() {
    let good = Tar::default()
        .file("a", &noise(5000, 1))
        .file("b", b"x")
        .end();
    let damaged = [
        ("empty", Vec::new()),
        ("noise", noise(5000, 2)),
        ("cut in data", good[..3000].to_vec()),
        ("cut in a header", good[..200].to_vec()),
        ("checksum", {
            let mut bad = good.clone();
            bad[5] ^= 1;
            bad
        }),
    ];
    for (what, archive) in damaged {
        let error = refused(&archive).await;
        assert_eq!(error.code(), "corrupt-archive", "{what}: {error}");
        assert!(
            error.to_string().ends_with("corrupt or truncated tar data"),
            "{what}: {error}"
        );
    }
    for compression in [
        Compression::Tbz,
        Compression::Tgz,
        Compression::Txz,
        Compression::Tzst,
    ] {
        let packed = pack(compression, &good);
        let mut flipped = packed.clone();
        let end = flipped.len() - 6;
        flipped[end] ^= 0x55;
        for archive in [&packed[..packed.len() - 3], &flipped, b"", &noise(3000, 9)] {
            let error = refused_with(Limits::default(), archive, compression).await;
            assert_eq!(error.code(), "corrupt-archive", "{compression:?}");
        }
    }
    // POSIX sparse entries are named, not unpacked wrongly.
    let bench = Bench::new();
    shell(
        "truncate -s 1M s && echo x >> s && tar --create --format=pax --sparse --file=archive s",
        bench.dir.path(),
    );
    let error = bench
        .unpack(&file_uri(&bench.path("archive")), Compression::Tar)
        .await
        .unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(source.contains("tar --format=gnu"), "{source}");
}

/// Archives with a few bytes changed, their checksums repaired: whatever comes of it, it comes as a
/// result, and what lies beside the directory is as before.
#[tokio::test]
async fn changed_archives_do_no_harm() {
    let good = Tar::default()
        .dir("d")
        .file("d/f", &noise(600, 1))
        .symlink("d/s", "f")
        .hard_link("h", "d/f")
        .entry("././@LongLink", b'L', "", &[b'l'; 200])
        .file("x", b"y")
        .end();
    let mut outcomes = std::collections::BTreeMap::<&str, usize>::new();
    for seed in 0..400 {
        let dice = noise(16, seed * 7919 + 1);
        let mut archive = good.clone();
        for pair in dice.chunks(4).take(1 + usize::from(dice[0] % 4)) {
            let at = (usize::from(pair[0]) << 8 | usize::from(pair[1])) % (good.len() - 1024);
            archive[at] = *[b'/', b'.', b'0', b'7', 0xff, 0, pair[2]]
                .get(usize::from(pair[3] % 7))
                .unwrap();
        }
        for block in archive.chunks_mut(512) {
            if block[257..262] == *b"ustar" {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        let bench = Bench::new();
        let source = bench.write("archive", &archive);
        let done = bench.unpack(&file_uri(&source), Compression::Tar).await;
        let code = done.as_ref().map_or_else(Error::code, |_| "ok");
        *outcomes.entry(code).or_default() += 1;
        let left: &[&str] = match done.is_ok() {
            true => &["archive", "tree"],
            false => &["archive"],
        };
        assert_eq!(bench.names(), left, "{seed}");
        assert!(std::fs::read(&source).unwrap() == archive);
    }
    for code in ["ok", "corrupt-archive", "unsafe-archive-entry"] {
        assert!(outcomes.contains_key(code), "{outcomes:?}");
    }
    assert_eq!(outcomes.len(), 3, "{outcomes:?}");
}
