//! bzip2 on several processors.
//!
//! Blocks begin at any bit, and nothing tells where but 48 bits that may also stand inside a block, by chance or malice. So each
//! place that has them is taken for the beginning of a block and decoded ahead, with the bits up to the next such place.
//! Which of the results are blocks is known when all before them are: a block begins where the one before ended. What is
//! decoded for nothing is never more than the input; a block that was cut short by a false beginning is decoded again.

use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::bzip2_block::{BLOCK_MAGIC, Bad, Block, END_MAGIC, Links, TOGETHER, finish, read};

/// Threads that decode blocks, if there are so many processors. Each uses at most 20 MB, and 10 MB for what waits for it.
const MAX_THREADS: usize = 4;

/// Longest packed block taken: 900,000 symbols of 20 bits are 2.25 MB, the tables before them 35 KB.
const MAX_PACKED_BYTES: usize = 3 << 20;

/// Input taken at once.
const INPUT_BYTES: usize = 64 << 10;

/// Decodes concatenated bzip2 streams.
pub(crate) struct Decoder<R> {
    input: R,
    input_ended: bool,
    /// Input from byte `first_byte` of the whole on.
    window: Vec<u8>,
    first_byte: u64,
    /// Bytes of the window that were looked through for magics.
    scanned: usize,
    /// Places with a magic that may yet be reached, in order.
    places: VecDeque<Place>,
    /// How many of the first places need not be given to the threads any more.
    given: usize,
    /// Results that the threads owe or that were not looked at.
    in_flight: usize,
    pool: Pool,
    /// Blocks for the threads, up to [`TOGETHER`]: they are decoded faster together.
    batch: Vec<Task>,
    /// Up to here all is decoded.
    at_bit: u64,
    expected: Expected,
    /// Decoded data that was not read yet.
    current: Option<Current>,
}

/// What comes at [`Decoder::at_bit`].
#[derive(Clone, Copy)]
enum Expected {
    /// The header of a stream, or the end of the data.
    Header { first: bool },
    /// A block or the end of the stream.
    Block { max_bytes: usize, sums: u32 },
    /// Nothing.
    End,
}

/// Where a magic stands.
struct Place {
    bit: u64,
    is_block: bool,
    /// Where the block's result will come, once it was given to the threads.
    result: Option<Receiver<Result<Block, Bad>>>,
}

/// A block that is being read.
struct Current {
    block: Block,
    piece: usize,
    /// Bytes of the piece that were read, its run included.
    done: usize,
}

impl<R: BufRead> Decoder<R> {
    pub(crate) fn new(input: R) -> io::Result<Self> {
        Ok(Self {
            input,
            input_ended: false,
            window: Vec::new(),
            first_byte: 0,
            scanned: 0,
            places: VecDeque::new(),
            given: 0,
            in_flight: 0,
            pool: Pool::new()?,
            batch: Vec::new(),
            at_bit: 0,
            expected: Expected::Header { first: true },
            current: None,
        })
    }

    /// Where `bit` of the whole lies in the window.
    fn index(&self, bit: u64) -> usize {
        (bit / 8 - self.first_byte) as usize
    }

    /// Reads more input and looks through it for magics. Returns whether there was any.
    fn more(&mut self) -> io::Result<bool> {
        if self.input_ended {
            return Ok(false);
        }
        let done = self.index(self.at_bit).min(self.scanned);
        if done > self.window.len() / 2 {
            self.window.drain(..done);
            self.first_byte += done as u64;
            self.scanned -= done;
        }
        let available = self.input.fill_buf()?;
        let amount = available.len().min(INPUT_BYTES);
        self.window.extend_from_slice(&available[..amount]);
        self.input.consume(amount);
        self.input_ended = amount == 0;
        let first_bit = (self.first_byte + self.scanned as u64) * 8;
        let places = &mut self.places;
        self.scanned += find_magics(&self.window[self.scanned..], |bit, is_block| {
            places.push_back(Place {
                bit: first_bit + bit,
                is_block,
                result: None,
            });
        });
        Ok(amount > 0)
    }

    /// Reads until `bytes` of the window follow [`Decoder::at_bit`], or the input ends. Returns those there are.
    fn ahead(&mut self, bytes: usize) -> io::Result<&[u8]> {
        while self.window.len() < self.index(self.at_bit) + bytes && self.more()? {}
        let from = self.index(self.at_bit).min(self.window.len());
        let to = self.window.len().min(from + bytes);
        Ok(&self.window[from..to])
    }

    /// Gives blocks of which the end is known to the threads.
    fn give(&mut self) {
        while self.in_flight < self.pool.in_flight()
            && let Some(place) = self.places.get(self.given)
        {
            if place.is_block {
                let from = self.index(place.bit);
                let most = from + MAX_PACKED_BYTES;
                let end = match self.places.get(self.given + 1) {
                    Some(next) => self.index(next.bit + 7),
                    None if self.input_ended || self.window.len() > most => self.window.len(),
                    None => return,
                };
                let (sender, receiver) = sync_channel(1);
                self.batch.push(Task {
                    data: self.window[from..end.min(most)].to_vec(),
                    skip: (place.bit % 8) as u32,
                    result: sender,
                });
                if self.batch.len() == TOGETHER {
                    self.flush();
                }
                self.places[self.given].result = Some(receiver);
                self.in_flight += 1;
            }
            self.given += 1;
        }
    }

    /// Gives the threads what was collected.
    fn flush(&mut self) {
        if !self.batch.is_empty() {
            self.pool.give(std::mem::take(&mut self.batch));
        }
    }

    /// Makes the next block the current one. Returns whether there is one.
    fn advance(&mut self) -> io::Result<bool> {
        loop {
            match self.expected {
                Expected::End => return Ok(false),
                Expected::Header { first } => self.header(first)?,
                Expected::Block { max_bytes, sums } => {
                    if let Some(block) = self.block(max_bytes, sums)? {
                        self.current = Some(Current {
                            block,
                            piece: 0,
                            done: 0,
                        });
                        return Ok(true);
                    }
                }
            }
        }
    }

    fn header(&mut self, first: bool) -> io::Result<()> {
        self.expected = match *self.ahead(4)? {
            [] if !first => Expected::End,
            [b'B', b'Z', b'h', level @ b'1'..=b'9'] => Expected::Block {
                max_bytes: usize::from(level - b'0') * 100_000,
                sums: 0,
            },
            _ => return Err(Bad::Corrupt("there is no bzip2 stream").into()),
        };
        self.at_bit += 32;
        Ok(())
    }

    /// The block that comes next, or none if the stream ends.
    fn block(&mut self, max_bytes: usize, sums: u32) -> io::Result<Option<Block>> {
        let skip = (self.at_bit % 8) as u32;
        let head = self.ahead(11)?;
        let length = head.len() as u32;
        let mut bits = [0; 16];
        bits[..head.len()].copy_from_slice(head);
        let bits = u128::from_be_bytes(bits) << skip;
        match (bits >> 80) as u64 {
            // A magic and a checksum.
            _ if length * 8 < 80 + skip => return Err(Bad::Short.into()),
            BLOCK_MAGIC => {}
            END_MAGIC if (bits >> 48) as u32 == sums => {
                self.at_bit = (self.at_bit + 80).next_multiple_of(8);
                self.expected = Expected::Header { first: false };
                return Ok(None);
            }
            END_MAGIC => return Err(Bad::Corrupt("a stream's checksum is wrong").into()),
            _ => return Err(Bad::Corrupt("neither a block nor the stream's end").into()),
        }
        let block = match self.decoded()? {
            Err(Bad::Short) => self.again()?,
            decoded => decoded?,
        };
        if block.bytes.len() > max_bytes {
            return Err(Bad::Corrupt("a block that is too long").into());
        }
        self.at_bit += block.packed_bits;
        self.expected = Expected::Block {
            max_bytes,
            sums: sums.rotate_left(1) ^ block.crc,
        };
        Ok(Some(block))
    }

    /// What a thread makes of the block that comes next. Keeps the threads busy meanwhile.
    fn decoded(&mut self) -> io::Result<Result<Block, Bad>> {
        loop {
            while let Some(place) = self.places.front()
                && place.bit < self.at_bit
            {
                self.pop();
            }
            self.give();
            let busy = self.in_flight == self.pool.in_flight() || self.input_ended;
            if busy {
                self.flush();
            }
            let Some(place) = self.places.front() else {
                return Err(Bad::Short.into());
            };
            let received = match &place.result {
                Some(result) if busy => Some(result.recv().map_err(|_| ended())?),
                Some(result) => match result.try_recv() {
                    Ok(received) => Some(received),
                    Err(TryRecvError::Empty) => None,
                    Err(TryRecvError::Disconnected) => return Err(ended()),
                },
                None => None,
            };
            if let Some(received) = received {
                self.pop();
                return Ok(received);
            }
            self.more()?;
        }
    }

    fn pop(&mut self) {
        if let Some(place) = self.places.pop_front() {
            self.in_flight -= usize::from(place.result.is_some());
            self.given = self.given.saturating_sub(1);
        }
    }

    /// Decodes the block that comes next with all that may belong to it.
    fn again(&mut self) -> io::Result<Block> {
        let skip = (self.at_bit % 8) as u32;
        let transformed = read(self.ahead(MAX_PACKED_BYTES)?, skip)?;
        let block = finish(vec![transformed], &mut Links::default()).pop();
        Ok(block.ok_or_else(ended)??)
    }
}

fn ended() -> io::Error {
    io::Error::other("a decoder's thread ended unexpectedly")
}

impl<R: BufRead> Read for Decoder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let amount = self
                .current
                .as_mut()
                .map_or(0, |current| current.read(buffer));
            if amount > 0 || buffer.is_empty() || !self.advance()? {
                return Ok(amount);
            }
        }
    }
}

impl Current {
    fn read(&mut self, buffer: &mut [u8]) -> usize {
        let mut filled = 0;
        while let Some(piece) = self.block.pieces.get(self.piece) {
            let rest = &mut buffer[filled..];
            let literal = piece.literal as usize;
            let bytes = &self.block.bytes[piece.from as usize..][..literal];
            let amount = match bytes.get(self.done..) {
                Some(bytes) if !bytes.is_empty() => {
                    let amount = bytes.len().min(rest.len());
                    rest[..amount].copy_from_slice(&bytes[..amount]);
                    amount
                }
                _ => {
                    let amount = (literal + piece.run as usize - self.done).min(rest.len());
                    rest[..amount].fill(bytes[literal - 1]);
                    amount
                }
            };
            filled += amount;
            self.done += amount;
            if self.done == literal + piece.run as usize {
                self.piece += 1;
                self.done = 0;
            } else if filled == buffer.len() {
                break;
            }
        }
        filled
    }
}

/// Tells `found` each bit of `bytes` at which a magic begins, and whether it is a block's. Returns how many bytes need not be
/// looked at again when more follow.
fn find_magics(bytes: &[u8], mut found: impl FnMut(u64, bool)) -> usize {
    // For the values of the third and fourth byte from where a magic begins: which of 16 cases they fit.
    static THIRD: [u16; 256] = cases(2);
    static FOURTH: [u16; 256] = cases(3);
    for (at, seven) in bytes.windows(7).enumerate() {
        let mut fits = THIRD[usize::from(seven[2])] & FOURTH[usize::from(seven[3])];
        if fits == 0 {
            continue;
        }
        let value = seven
            .iter()
            .fold(0, |value, byte| value << 8 | u64::from(*byte));
        while fits != 0 {
            let case = fits.trailing_zeros();
            fits &= fits - 1;
            let (skip, is_block) = (case % 8, case < 8);
            let magic = if is_block { BLOCK_MAGIC } else { END_MAGIC };
            if value << (8 + skip) >> 16 == magic {
                found(at as u64 * 8 + u64::from(skip), is_block);
            }
        }
    }
    bytes.len().saturating_sub(6)
}

/// For each value of a byte: a bit for each case in which the magic has it as its byte `nth`. The first eight cases are a block's magic that
/// begins 0 to 7 bits into the first byte, the others the same of a stream's end.
const fn cases(nth: u32) -> [u16; 256] {
    let mut fits = [0; 256];
    let mut case = 0;
    while case < 16 {
        let magic = if case < 8 { BLOCK_MAGIC } else { END_MAGIC };
        let byte = (magic << (8 - case % 8) >> (48 - 8 * nth)) & 0xff;
        fits[byte as usize] |= 1 << case;
        case += 1;
    }
    fits
}

/// A block to decode.
struct Task {
    /// From the byte in which it begins.
    data: Vec<u8>,
    /// Bits of the first byte that do not belong to it.
    skip: u32,
    result: SyncSender<Result<Block, Bad>>,
}

/// The threads that decode blocks.
struct Pool {
    queue: Arc<Queue>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    batches: VecDeque<Vec<Task>>,
    closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    fn new() -> io::Result<Self> {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        let mut pool = Self {
            queue: Arc::default(),
            threads: Vec::new(),
        };
        for _ in 0..count.min(MAX_THREADS) {
            let queue = pool.queue.clone();
            let thread = std::thread::Builder::new().name("stage-bzip2".into());
            pool.threads.push(thread.spawn(move || work(&queue))?);
        }
        Ok(pool)
    }

    /// Results that may be waited for: for each thread what it works at, and as much again.
    fn in_flight(&self) -> usize {
        self.threads.len() * TOGETHER * 2
    }

    fn give(&self, batch: Vec<Task>) {
        self.queue.lock().batches.push_back(batch);
        self.queue.changed.notify_one();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.queue.lock();
        state.closed = true;
        state.batches.clear();
        drop(state);
        self.queue.changed.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that decodes bzip2 panicked");
            }
        }
    }
}

/// Decodes what is in the queue until it is closed.
fn work(queue: &Queue) {
    let mut links = Links::default();
    loop {
        let mut state = queue.lock();
        let batch = loop {
            if state.closed {
                return;
            }
            match state.batches.pop_front() {
                Some(batch) => break batch,
                None => {
                    state = queue
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        drop(state);
        let (mut blocks, mut results) = (Vec::new(), Vec::new());
        for task in batch {
            match read(&task.data, task.skip) {
                Ok(block) => {
                    blocks.push(block);
                    results.push(task.result);
                }
                // Nobody waits for it if it was no block.
                Err(bad) => drop(task.result.send(Err(bad))),
            }
        }
        for (block, result) in finish(blocks, &mut links).into_iter().zip(results) {
            drop(result.send(block));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn ours(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut data = Vec::new();
        Decoder::new(packed)?.read_to_end(&mut data).map(|_| data)
    }

    fn theirs(packed: &[u8]) -> io::Result<Vec<u8>> {
        let mut data = Vec::new();
        let mut decoder = ::bzip2::read::MultiBzDecoder::new(packed);
        decoder.read_to_end(&mut data).map(|_| data)
    }

    fn pack(level: u32, data: &[u8]) -> Vec<u8> {
        let level = ::bzip2::Compression::new(level);
        let mut encoder = ::bzip2::write::BzEncoder::new(Vec::new(), level);
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    struct Dice(u64);

    impl Dice {
        fn below(&mut self, end: usize) -> usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            (self.0 >> 20) as usize % end
        }

        /// Bytes of which `kinds` occur, in runs up to `run` long.
        fn bytes(&mut self, length: usize, kinds: usize, run: usize) -> Vec<u8> {
            let mut bytes = Vec::new();
            while bytes.len() < length {
                let byte = (self.below(kinds) * 37) as u8;
                let run = 1 + self.below(run);
                bytes.resize(bytes.len() + run.min(length - bytes.len()), byte);
            }
            bytes
        }
    }

    #[test]
    fn all_kinds_of_data_come_back() {
        let mut dice = Dice(1);
        for (length, kinds, run) in [
            (0, 1, 1),
            (1, 1, 1),
            (5, 1, 5),
            (259, 1, 259),
            (1000, 256, 1),
            (250_000, 2, 1),
            (1_000_000, 256, 1),
            (1_100_000, 7, 9),
            (3_000_000, 20, 600),
            (30_000_000, 1, 1),
            (2_000_000, 256, 6),
        ] {
            let data = dice.bytes(length, kinds, run);
            for level in [1, 9] {
                let packed = pack(level, &data);
                assert!(ours(&packed).unwrap() == data, "{length} {kinds} {run}");
            }
        }
        let many: Vec<u8> = (0..50)
            .flat_map(|n| pack(1, &vec![n; usize::from(n) * 5000]))
            .collect();
        assert!(ours(&many).unwrap() == theirs(&many).unwrap());
    }

    #[test]
    fn what_is_damaged_is_judged_as_by_the_library() {
        let mut dice = Dice(2);
        let data = [
            dice.bytes(120_000, 256, 1),
            dice.bytes(150_000, 4, 300),
            dice.bytes(1000, 30, 2),
        ]
        .concat();
        let packed = [pack(1, &data), pack(1, b""), pack(2, b"more")].concat();
        let mut refused = 0;
        for round in 0..600 {
            let mut damaged = packed.clone();
            match round % 3 {
                0 => damaged.truncate(dice.below(packed.len())),
                1 => damaged[dice.below(packed.len())] ^= 1 << dice.below(8),
                // Headers and footers.
                _ => {
                    let at = [dice.below(200), packed.len() - 1 - dice.below(90)][dice.below(2)];
                    damaged[at] ^= 1 << dice.below(8);
                }
            }
            match (ours(&damaged), theirs(&damaged)) {
                (Ok(ours), Ok(theirs)) => assert!(ours == theirs, "{round}"),
                (Err(_), Err(_)) => refused += 1,
                // Which bits of a wrong code mean something, is the library's own affair.
                (Err(_), Ok(theirs)) => assert!(theirs.len() < data.len(), "{round}"),
                (Ok(_), Err(error)) => panic!("{round}: {error}"),
            }
        }
        assert!(refused > 500, "{refused}");
    }

    /// Writes bits, the first the highest.
    #[derive(Default)]
    struct Writer(Vec<bool>);

    impl Writer {
        fn bits(&mut self, value: u64, count: u32) {
            self.0
                .extend((0..count).rev().map(|bit| value >> bit & 1 == 1));
        }

        fn bytes(&self) -> Vec<u8> {
            let byte = |bits: &[bool]| {
                (0..8).fold(0, |byte, bit| {
                    byte << 1 | u8::from(bits.get(bit) == Some(&true))
                })
            };
            self.0.chunks(8).map(byte).collect()
        }
    }

    /// A stream of one block whose tables hold, after the selectors that are used, the bits of `hidden`, which must be
    /// numbers below 3 in unary. Its data is `aaa`.
    fn with_hidden(hidden: &[u64]) -> Vec<u8> {
        let mut out = Writer::default();
        out.bits(u64::from(u32::from_be_bytes(*b"BZh9")), 32);
        let sum = !crc_of(b"aaa");
        out.bits(BLOCK_MAGIC, 48);
        out.bits(u64::from(sum), 32);
        out.bits(0, 1 + 24);
        // The byte `a` is used: group 6, member 1.
        out.bits(1 << 9, 16);
        out.bits(1 << 14, 16);
        out.bits(3, 3);
        let mut selectors = vec![false];
        for value in hidden {
            for bit in (0..48).rev() {
                selectors.push(value >> bit & 1 == 1);
            }
            selectors.push(false);
        }
        let count = selectors.iter().filter(|bit| !**bit).count();
        out.bits(count as u64, 15);
        out.0.extend(selectors);
        for _ in 0..3 {
            // Three symbols of lengths 1, 2, 2.
            out.bits(1, 5);
            out.bits(0b0_1000, 5);
        }
        // A run of three is the digits 1 and 1; then the end.
        out.bits(0b0011, 4);
        out.bits(END_MAGIC, 48);
        out.bits(u64::from(sum), 32);
        out.bytes()
    }

    fn crc_of(bytes: &[u8]) -> u32 {
        bytes.iter().fold(!0, |sum, byte| {
            (0..8).fold(sum ^ u32::from(*byte) << 24, |sum: u32, _| {
                (sum << 1) ^ ((sum >> 31) * 0x04c1_1db7)
            })
        })
    }

    /// The bits of a magic inside a block do not end it, however many there are.
    #[test]
    fn magics_inside_of_blocks_are_seen_through() {
        for hidden in [&[][..], &[BLOCK_MAGIC], &[BLOCK_MAGIC; 200]] {
            let packed = with_hidden(hidden);
            let mut found = 0;
            find_magics(&packed, |_, is_block| found += usize::from(is_block));
            assert_eq!(found, 1 + hidden.len());
            assert_eq!(theirs(&packed).unwrap(), b"aaa");
            assert_eq!(ours(&packed).unwrap(), b"aaa");
            let both = [&pack(9, b"before")[..], &packed, &pack(9, b"after")].concat();
            assert_eq!(ours(&both).unwrap(), b"beforeaaaafter");
        }
    }

    #[test]
    fn magics_are_found_at_every_bit() {
        let mut dice = Dice(3);
        for (skip, magic, is_block) in
            (0..8).flat_map(|skip| [(skip, BLOCK_MAGIC, true), (skip, END_MAGIC, false)])
        {
            let mut bytes = dice.bytes(100, 256, 1);
            let place = u64::from_be_bytes(bytes[50..58].try_into().unwrap());
            let mask = (u64::MAX >> 16 << 16) >> skip;
            let place = place & !mask | (magic << 16) >> skip;
            bytes[50..58].copy_from_slice(&place.to_be_bytes());
            let mut found = Vec::new();
            let done = find_magics(&bytes, |bit, block| found.push((bit, block)));
            assert_eq!((found, done), (vec![(400 + skip, is_block)], 94));
        }
    }
}
