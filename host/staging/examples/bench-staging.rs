//! `make bench-staging`: stage-in of a packed sparse image against the pipes one would type.
//!
//! `bench all [RESULTS]` makes the image and its packed forms once in `target/bench-staging` (or `$XBEE_BENCH_DIR`),
//! runs each pipe and our fetch in turn, and puts the section Staging into RESULTS. `bench fetch FORMAT FROM TO` is
//! one fetch of a `file` URI, as a job's stage-in does it, in a process of its own.
//!
//! What counts is the ratio of the medians; the machine may be noisy.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a benchmark that cannot measure ends"
)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use xbee_staging::{Destination, FetchRequest, Identity, Limits, Progress, Stager};

/// Length of the image, and about how much of it is used.
const IMAGE_BYTES: u64 = 8 << 30;
const USED_BYTES: u64 = 1_100_000_000;
/// Rounds of each interleaved comparison.
const ROUNDS: usize = 5;

/// A format: its name, how the image is packed, the pipe that unpacks `$1` to `$2`, and the ratio aimed at.
struct Format {
    name: &'static str,
    pack: &'static str,
    pipe: &'static str,
    aim: f64,
}

const FORMATS: [Format; 3] = [
    Format {
        name: "bzip2",
        pack: "lbzip2 -9 -c",
        pipe: "lbzip2 -dc \"$1\" | cp --sparse=always /dev/stdin \"$2\"",
        aim: 0.8,
    },
    Format {
        name: "gzip",
        pack: "pigz -6 -c",
        pipe: "pigz -dc \"$1\" | cp --sparse=always /dev/stdin \"$2\"",
        aim: 0.6,
    },
    Format {
        name: "zstd",
        pack: "zstd -q -3 -T0 -c",
        pipe: "zstd -q -f -d --sparse \"$1\" -o \"$2\"",
        aim: 1.0,
    },
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["all"] => all(),
        ["fetch", format, from, to] => fetch(format, Path::new(from), Path::new(to)),
        _ => {
            eprintln!("usage: bench all | bench fetch FORMAT FROM TO");
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// Fetches, and prints the most memory that this process had resident, in KiB.
fn fetch(format: &str, from: &Path, to: &Path) {
    let from = fs::canonicalize(from).unwrap();
    let request = FetchRequest {
        uri: format!("file://{}", from.display()).parse().unwrap(),
        hash: None,
        compression: Some(format.parse().unwrap()),
        destination: Destination::File(to.to_path_buf()),
        identity: Identity::current(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let stager = Stager::new(Limits::default());
    let progress = watch::channel(Progress::default()).0;
    let never = CancellationToken::new();
    runtime
        .block_on(stager.fetch(request, progress, &never))
        .unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let most = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .unwrap();
    println!("{}", most.trim().trim_end_matches(" kB"));
}

/// One side's runs.
#[derive(Default)]
struct Runs {
    seconds: Vec<f64>,
    blocks: u64,
    resident_kib: u64,
}

impl Runs {
    fn median(&self) -> f64 {
        let mut seconds = self.seconds.clone();
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }
}

fn all() {
    let directory = std::env::var_os("XBEE_BENCH_DIR")
        .map_or_else(|| PathBuf::from("target/bench-staging"), PathBuf::from);
    fs::create_dir_all(&directory).unwrap();
    let image = directory.join("image");
    if !image.exists() {
        eprintln!("making the image");
        let making = directory.join("image.new");
        make_image(&making);
        fs::rename(making, &image).unwrap();
    }
    let image_blocks = fs::metadata(&image).unwrap().blocks();
    let rounds = std::env::var("XBEE_BENCH_ROUNDS")
        .map_or(ROUNDS, |rounds| rounds.parse().expect("a number of rounds"));
    let only = std::env::var("XBEE_BENCH_FORMATS").ok();
    let mut rows = String::new();
    for format in &FORMATS {
        if only
            .as_ref()
            .is_some_and(|only| !only.contains(format.name))
        {
            continue;
        }
        let packed = directory.join(format!("image.{}", format.name));
        if !packed.exists() {
            eprintln!("packing: {}", format.pack);
            let making = directory.join("packed.new");
            let script = format!("{} \"$1\" >\"$2\"", format.pack);
            shell(&script, &image, &making);
            fs::rename(making, &packed).unwrap();
        }
        let (mut pipe, mut ours) = (Runs::default(), Runs::default());
        for round in 0..=rounds {
            // The first round warms the page cache for both sides and compares what came out.
            let (first, second) = (directory.join("pipe.out"), directory.join("ours.out"));
            timed(&mut pipe, round, &first, || {
                shell(format.pipe, &packed, &first);
                0
            });
            timed(&mut ours, round, &second, || {
                let fetch = Command::new(std::env::current_exe().unwrap())
                    .args(["fetch", format.name])
                    .args([&packed, &second])
                    .output()
                    .unwrap();
                assert!(fetch.status.success(), "{fetch:?}");
                String::from_utf8(fetch.stdout)
                    .unwrap()
                    .trim()
                    .parse()
                    .unwrap()
            });
            if round == 0 {
                shell("cmp \"$1\" \"$2\"", &image, &second);
            }
            fs::remove_file(first).unwrap();
            fs::remove_file(second).unwrap();
        }
        let (theirs_s, ours_s) = (pipe.median(), ours.median());
        writeln!(
            rows,
            "| {} | {theirs_s:.2} | {ours_s:.2} | **{:.2}** | {} | {} | {} | {} MiB |",
            format.name,
            ours_s / theirs_s,
            format.aim,
            pipe.blocks,
            ours.blocks,
            ours.resident_kib / 1024,
        )
        .unwrap();
        eprintln!(
            "{}: pipe {:.2?}, ours {:.2?}, ratio {:.2}, {} and {} blocks",
            format.name,
            pipe.seconds,
            ours.seconds,
            ours_s / theirs_s,
            pipe.blocks,
            ours.blocks
        );
    }
    let section = format!(
        "## Staging\n\nBy `make bench-staging`, {}: a sparse image of {} GiB, {image_blocks} blocks of 512 bytes used, fetched by a \
         `file` URI and unpacked, against `lbzip2 -dc | cp --sparse=always`, `pigz -dc | cp --sparse=always` and `zstd -d --sparse`. \
         Medians of {rounds} interleaved rounds, page cache warm, on {} × {}.\n\n\
         | format | pipe, s | fetch, s | ratio | aim | blocks, pipe | blocks, fetch | most memory, fetch |\n|---|---|---|---|---|---|---|---|\n{rows}",
        said("date", &["-u", "+%F"]),
        IMAGE_BYTES >> 30,
        std::thread::available_parallelism().unwrap(),
        said(
            "sed",
            &["-n", "s/^model name[[:space:]]*: //p;T;q", "/proc/cpuinfo"]
        ),
    );
    print!("{section}");
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn shell(script: &str, first: &Path, second: &Path) {
    let script = format!("set -eo pipefail; {script}");
    let status = Command::new("bash")
        .args(["-c", &script, "bench"])
        .args([first, second])
        .status()
        .unwrap();
    assert!(status.success(), "{script}: {status}");
}

/// Runs one side; round 0 is not counted. Waits before and after until what is written is on the disk, so that neither
/// side pays for the other.
fn timed(runs: &mut Runs, round: usize, made: &Path, work: impl FnOnce() -> u64) {
    let started = Instant::now();
    let resident_kib = work();
    let seconds = started.elapsed().as_secs_f64();
    let file = File::open(made).unwrap();
    file.sync_all().unwrap();
    runs.blocks = file.metadata().unwrap().blocks();
    runs.resident_kib = runs.resident_kib.max(resident_kib);
    if round > 0 {
        runs.seconds.push(seconds);
    }
}

/// Numbers that are the same each time (Marsaglia's xorshift64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Below `end`, small numbers more often.
    fn skewed(&mut self, end: u64) -> u64 {
        let (first, second) = (self.next() >> 40, self.next() >> 40);
        (((first * second) >> 24) * end) >> 24
    }
}

/// Writes an image as a file system has it: extents of text, records, what does not compress, and zeros that were
/// written, between holes.
fn make_image(path: &Path) {
    let file = File::create_new(path).unwrap();
    file.set_len(IMAGE_BYTES).unwrap();
    let mut dice = Dice(0x5eed);
    let words: Vec<Vec<u8>> = (0..4096)
        .map(|_| {
            let length = 2 + dice.skewed(12);
            (0..length).map(|_| b'a' + dice.skewed(26) as u8).collect()
        })
        .collect();
    let sentences: Vec<Vec<u8>> = (0..4096).map(|_| sentence(&mut dice, &words)).collect();
    let (mut offset, mut used) = (1 << 20, 0);
    while used < USED_BYTES {
        let length = 4096 * (16 + dice.next() % 2048);
        let bytes = match dice.next() % 20 {
            0..9 => text(&mut dice, &sentences, length as usize),
            9..17 => records(&mut dice, length as usize),
            17..19 => noise(&mut dice, length as usize),
            _ => vec![0; length as usize],
        };
        file.write_all_at(&bytes, offset).unwrap();
        used += length;
        // Six times as long as the data, on average.
        offset += length + dice.next() % (12 * length) / 4096 * 4096;
        assert!(offset < IMAGE_BYTES);
    }
    file.sync_all().unwrap();
}

fn sentence(dice: &mut Dice, words: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..2 + dice.next() % 8 {
        bytes.extend_from_slice(&words[dice.skewed(words.len() as u64) as usize]);
        bytes.push(b' ');
    }
    bytes
}

/// Sentences and numbers: compresses about as much as source code does.
fn text(dice: &mut Dice, sentences: &[Vec<u8>], length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 128);
    while bytes.len() < length {
        bytes.extend_from_slice(&sentences[dice.skewed(sentences.len() as u64) as usize]);
        if dice.next().is_multiple_of(4) {
            bytes.extend_from_slice(format!("{}\n", dice.skewed(100_000)).as_bytes());
        }
    }
    bytes.truncate(length);
    bytes
}

/// Like machine code and tables: few opcodes, addresses that grow, small numbers.
fn records(dice: &mut Dice, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 16);
    let mut address = 0x40_0000_u32;
    while bytes.len() < length {
        bytes.push(dice.skewed(64) as u8 ^ 0x48);
        match dice.next() % 3 {
            0 => bytes.extend_from_slice(&address.to_le_bytes()),
            1 => bytes.extend_from_slice(&(dice.skewed(4096) as u16).to_le_bytes()),
            _ => bytes.push(dice.skewed(256) as u8),
        }
        address += dice.skewed(512) as u32;
    }
    bytes.truncate(length);
    bytes
}

fn noise(dice: &mut Dice, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend_from_slice(&dice.next().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
