//! One block of a bzip2 stream, decoded for speed. There is no standard; the format is what bzip2 1.0 writes.
//!
//! A block is Huffman codes of a move-to-front list of the Burrows-Wheeler transform of the data, in which runs were
//! shortened before. Undoing the transform is a walk through memory where each step must wait for the one before, so
//! several blocks are walked at once.

use std::io;
use std::sync::LazyLock;

/// First 48 bits of a block: the digits of pi.
pub(crate) const BLOCK_MAGIC: u64 = 0x3141_5926_5359;
/// First 48 bits of a stream's end: the digits of its square root.
pub(crate) const END_MAGIC: u64 = 0x1772_4538_5090;

/// Bytes in the largest block, before runs are made long again.
const MAX_BLOCK_BYTES: usize = 900_000;
/// Symbols of an alphabet: two for runs, 255 places in the list, the block's end.
const MAX_SYMBOLS: usize = 258;
const MAX_CODE_BITS: u8 = 20;
/// Codes up to this length are looked up at once.
const FAST_BITS: u8 = 10;
const MAX_TABLES: usize = 6;
/// Symbols that use one table.
const GROUP_SYMBOLS: usize = 50;
/// Selectors that a block may need. A stream may have more, which are not used.
const MAX_SELECTORS: usize = MAX_BLOCK_BYTES / GROUP_SYMBOLS + 2;

/// Why a block cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bad {
    /// The bits end before the block does.
    Short,
    /// No encoder writes this.
    Corrupt(&'static str),
}

impl From<Bad> for io::Error {
    fn from(bad: Bad) -> Self {
        match bad {
            Bad::Short => io::ErrorKind::UnexpectedEof.into(),
            Bad::Corrupt(what) => Self::new(io::ErrorKind::InvalidData, what),
        }
    }
}

/// Part of a block's data: bytes, then the last of them `run` times more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Where the bytes begin in [`Block::bytes`].
    pub(crate) from: u32,
    /// How many there are.
    pub(crate) literal: u32,
    /// Length of the run after them.
    pub(crate) run: u32,
}

/// A decoded block.
pub(crate) struct Block {
    /// Length of the packed block in bits.
    pub(crate) packed_bits: u64,
    /// Its checksum, which is right.
    pub(crate) crc: u32,
    /// Its data with runs still short.
    pub(crate) bytes: Vec<u8>,
    /// How to make the data of `bytes`.
    pub(crate) pieces: Vec<Piece>,
}

/// Reads bits, the first the highest. Beyond the end there are zeros, which [`Bits::used`] tells.
struct Bits<'a> {
    data: &'a [u8],
    next: usize,
    /// The next bits, left-aligned.
    window: u64,
    held: u32,
}

impl<'a> Bits<'a> {
    /// Begins `skip` bits into `data`.
    fn new(data: &'a [u8], skip: u32) -> Self {
        let mut bits = Self {
            data,
            next: 0,
            window: 0,
            held: 0,
        };
        bits.refill();
        bits.drop(skip);
        bits
    }

    /// Makes at least 56 bits ready.
    #[inline(always)]
    fn refill(&mut self) {
        if let Some(Ok(eight)) = self
            .data
            .get(self.next..self.next.wrapping_add(8))
            .map(<[u8; 8]>::try_from)
        {
            self.window |= u64::from_be_bytes(eight) >> self.held;
            self.next += ((63 - self.held) / 8) as usize;
            self.held |= 56;
        } else {
            while self.held <= 56 {
                let byte = self.data.get(self.next).copied().unwrap_or(0);
                self.window |= u64::from(byte) << (56 - self.held);
                self.next += 1;
                self.held += 8;
            }
        }
    }

    /// Drops up to 56 bits that were made ready.
    #[inline(always)]
    fn drop(&mut self, count: u32) {
        self.window <<= count;
        self.held = self.held.wrapping_sub(count);
    }

    /// Takes 1 to 48 bits.
    fn take(&mut self, count: u32) -> u64 {
        self.refill();
        let value = self.window >> (64 - count);
        self.drop(count);
        value
    }

    /// Bits taken so far, those skipped included.
    fn used(&self) -> u64 {
        self.next as u64 * 8 - u64::from(self.held)
    }

    fn short(&self) -> bool {
        self.used() > self.data.len() as u64 * 8
    }
}

/// A Huffman code. Codes are numbered by length and symbol, as in deflate.
struct Code {
    /// For the next [`FAST_BITS`] bits: the symbol, shifted by 4, and the length of its code; 0 if it is longer.
    fast: [u16; 1 << FAST_BITS],
    /// For each length, left-aligned in [`MAX_CODE_BITS`]: the end of its codes.
    end: [u32; MAX_CODE_BITS as usize + 1],
    /// For each length: what to subtract from a code for its place in `symbols`.
    offset: [i32; MAX_CODE_BITS as usize + 1],
    symbols: [u16; MAX_SYMBOLS],
}

impl Code {
    fn new(lengths: &[u8]) -> Result<Self, Bad> {
        let mut counts = [0_u32; MAX_CODE_BITS as usize + 1];
        for &length in lengths {
            counts[usize::from(length)] += 1;
        }
        let mut code = Self {
            fast: [0; 1 << FAST_BITS],
            end: [0; MAX_CODE_BITS as usize + 1],
            offset: [0; MAX_CODE_BITS as usize + 1],
            symbols: [0; MAX_SYMBOLS],
        };
        let (mut next, mut place) = (0_u32, 0_u32);
        let mut places = [0_u32; MAX_CODE_BITS as usize + 1];
        for length in 1..=MAX_CODE_BITS {
            let at = usize::from(length);
            next <<= 1;
            places[at] = place;
            code.offset[at] = next as i32 - place as i32;
            next += counts[at];
            place += counts[at];
            if next > 1 << length {
                return Err(Bad::Corrupt("a Huffman code has too many symbols"));
            }
            code.end[at] = next << (MAX_CODE_BITS - length);
        }
        for (symbol, &length) in lengths.iter().enumerate() {
            let at = usize::from(length);
            let place = places[at];
            places[at] += 1;
            code.symbols[place as usize] = symbol as u16;
            if length <= FAST_BITS {
                let first = (place as i32 + code.offset[at]) as usize;
                let spread = FAST_BITS - length;
                code.fast[first << spread..(first + 1) << spread]
                    .fill((symbol as u16) << 4 | u16::from(length));
            }
        }
        Ok(code)
    }

    /// The next symbol. At least [`MAX_CODE_BITS`] bits are ready.
    #[inline(always)]
    fn symbol(&self, bits: &mut Bits<'_>) -> Result<u16, Bad> {
        let fast = self.fast[(bits.window >> (64 - FAST_BITS)) as usize];
        if fast != 0 {
            bits.drop(u32::from(fast & 15));
            return Ok(fast >> 4);
        }
        self.long_symbol(bits)
    }

    #[cold]
    fn long_symbol(&self, bits: &mut Bits<'_>) -> Result<u16, Bad> {
        let ahead = (bits.window >> (64 - MAX_CODE_BITS)) as u32;
        for length in FAST_BITS + 1..=MAX_CODE_BITS {
            let at = usize::from(length);
            if ahead < self.end[at] {
                let value = (ahead >> (MAX_CODE_BITS - length)) as i32;
                bits.drop(u32::from(length));
                return Ok(self.symbols[(value - self.offset[at]) as usize]);
            }
        }
        // So that bits beyond the end are noticed.
        bits.drop(u32::from(MAX_CODE_BITS));
        Err(Bad::Corrupt("a Huffman code that stands for nothing"))
    }
}

/// A block whose transform is not undone yet.
pub(crate) struct Transformed {
    /// Bits from the block's magic to its end.
    packed_bits: u64,
    crc: u32,
    /// Row of the transform with which the data begins.
    start: u32,
    /// The transform; later the data.
    bytes: Vec<u8>,
    counts: [u32; 256],
}

/// Decodes the block that begins `skip` (less than 8) bits into `data`, its magic included, as far as its transform.
pub(crate) fn read(data: &[u8], skip: u32) -> Result<Transformed, Bad> {
    let mut bits = Bits::new(data, skip);
    let read = read_bits(&mut bits);
    // What is wrong after the end is no fault of the block.
    if bits.short() {
        return Err(Bad::Short);
    }
    let mut block = read?;
    block.packed_bits = bits.used() - u64::from(skip);
    Ok(block)
}

fn read_bits(bits: &mut Bits<'_>) -> Result<Transformed, Bad> {
    if bits.take(48) != BLOCK_MAGIC {
        return Err(Bad::Corrupt("there is no block"));
    }
    let crc = bits.take(32) as u32;
    if bits.take(1) == 1 {
        return Err(Bad::Corrupt(
            "a randomised block, as bzip2 wrote before version 0.9.5",
        ));
    }
    let start = bits.take(24) as u32;
    let groups = bits.take(16);
    let mut list = [0; 256];
    let mut used = 0;
    for group in 0..16_u32 {
        if groups >> (15 - group) & 1 == 0 {
            continue;
        }
        let members = bits.take(16);
        for member in 0..16 {
            if members >> (15 - member) & 1 == 1 {
                list[used] = (group * 16 + member) as u8;
                used += 1;
            }
        }
    }
    if used == 0 {
        return Err(Bad::Corrupt("a block that uses no bytes"));
    }
    let symbols = used + 2;
    let tables = bits.take(3) as usize;
    if !(2..=MAX_TABLES).contains(&tables) {
        return Err(Bad::Corrupt("a wrong number of Huffman codes"));
    }
    let selectors = read_selectors(bits, tables)?;
    let mut codes = Vec::with_capacity(tables);
    for _ in 0..tables {
        codes.push(read_code(bits, symbols)?);
    }
    let (bytes, counts) = read_symbols(bits, &selectors, &codes, list, symbols)?;
    if start as usize >= bytes.len() {
        return Err(Bad::Corrupt("a block that begins outside of itself"));
    }
    Ok(Transformed {
        packed_bits: 0,
        crc,
        start,
        bytes,
        counts,
    })
}

/// Which table each group of symbols uses.
fn read_selectors(bits: &mut Bits<'_>, tables: usize) -> Result<Vec<u8>, Bad> {
    let count = bits.take(15) as usize;
    let mut selectors = Vec::with_capacity(count.min(MAX_SELECTORS));
    let mut recent = [0, 1, 2, 3, 4, 5];
    for _ in 0..count {
        let mut place = 0;
        while bits.take(1) == 1 {
            place += 1;
            if place >= tables {
                return Err(Bad::Corrupt("a Huffman code that is not there"));
            }
        }
        recent[..=place].rotate_right(1);
        if selectors.len() < MAX_SELECTORS {
            selectors.push(recent[0]);
        }
    }
    Ok(selectors)
}

/// A code's lengths: each is the one before, up or down by steps.
fn read_code(bits: &mut Bits<'_>, symbols: usize) -> Result<Code, Bad> {
    let mut lengths = [0; MAX_SYMBOLS];
    let mut length = bits.take(5) as u8;
    for place in &mut lengths[..symbols] {
        loop {
            if !(1..=MAX_CODE_BITS).contains(&length) {
                return Err(Bad::Corrupt("a Huffman code of a wrong length"));
            }
            if bits.take(1) == 0 {
                break;
            }
            length = match bits.take(1) {
                0 => length + 1,
                _ => length - 1,
            };
            if bits.short() {
                return Err(Bad::Short);
            }
        }
        *place = length;
    }
    Code::new(&lengths[..symbols])
}

fn read_symbols(
    bits: &mut Bits<'_>,
    selectors: &[u8],
    codes: &[Code],
    mut list: [u8; 256],
    symbols: usize,
) -> Result<(Vec<u8>, [u32; 256]), Bad> {
    const TOO_LONG: Bad = Bad::Corrupt("a block that is too long");
    let end = symbols as u16 - 1;
    let mut bytes: Vec<u8> = Vec::with_capacity(MAX_BLOCK_BYTES);
    let mut counts = [0_u32; 256];
    // Symbols 0 and 1 are digits of a run's length, the lowest first, in bijective base 2.
    let (mut run, mut digit) = (0_usize, 1_usize);
    for &selector in selectors {
        let code = codes
            .get(usize::from(selector))
            .ok_or(Bad::Corrupt("a Huffman code that is not there"))?;
        if bits.short() {
            return Err(Bad::Short);
        }
        for _ in 0..GROUP_SYMBOLS {
            bits.refill();
            let symbol = code.symbol(bits)?;
            if symbol <= 1 {
                run += digit << symbol;
                digit <<= 1;
                if run > MAX_BLOCK_BYTES {
                    return Err(TOO_LONG);
                }
                continue;
            }
            if run > 0 {
                if bytes.len() + run > MAX_BLOCK_BYTES {
                    return Err(TOO_LONG);
                }
                bytes.resize(bytes.len() + run, list[0]);
                counts[usize::from(list[0])] += run as u32;
                (run, digit) = (0, 1);
            }
            if symbol == end {
                return Ok((bytes, counts));
            }
            if bytes.len() == MAX_BLOCK_BYTES {
                return Err(TOO_LONG);
            }
            let place = usize::from(symbol - 1) & 0xff;
            let byte = list[place];
            if place < 8 {
                for at in (0..place).rev() {
                    list[at + 1] = list[at];
                }
            } else {
                list.copy_within(..place, 1);
            }
            list[0] = byte;
            counts[usize::from(byte)] = counts[usize::from(byte)].wrapping_add(1);
            bytes.push(byte);
        }
    }
    Err(Bad::Corrupt("a block without an end"))
}

/// Blocks whose transforms are undone at the same time.
pub(crate) const TOGETHER: usize = 4;

/// Memory for [`finish`], to be used again.
#[derive(Default)]
pub(crate) struct Links(Vec<u32>);

impl Links {
    /// A part for each of `count` blocks.
    fn parts(&mut self, count: usize) -> impl Iterator<Item = &mut [u32]> {
        let length = count * MAX_BLOCK_BYTES;
        if self.0.len() < length {
            self.0 = Vec::with_capacity(length);
            ask_for_large_pages(&self.0);
            self.0.resize(length, 0);
        }
        self.0.chunks_mut(MAX_BLOCK_BYTES)
    }
}

/// Asks the kernel to back `memory` with large pages. The walks go to and fro in it, and a processor remembers few pages.
fn ask_for_large_pages(memory: &Vec<u32>) {
    const PAGE: usize = 4096;
    let start = (memory.as_ptr() as usize).next_multiple_of(PAGE);
    let end = (memory.as_ptr() as usize + memory.capacity() * size_of::<u32>()) / PAGE * PAGE;
    if start < end {
        // SAFETY: the pages are this vector's own, and the advice does not change what is in them.
        let asked = unsafe { libc::madvise(start as *mut _, end - start, libc::MADV_HUGEPAGE) };
        if asked != 0 {
            tracing::debug!("no large pages: bzip2 will be decoded more slowly");
        }
    }
}

/// Undoes the transforms of up to [`TOGETHER`] blocks, checks their sums, and finds their runs.
pub(crate) fn finish(mut blocks: Vec<Transformed>, links: &mut Links) -> Vec<Result<Block, Bad>> {
    let count = blocks.len();
    let mut walks = Vec::with_capacity(blocks.len());
    for (block, links) in blocks.iter_mut().zip(links.parts(count)) {
        let links = &mut links[..block.bytes.len()];
        link(block, links);
        walks.push(Walk {
            links,
            at: block.start,
            left: &mut block.bytes,
        });
    }
    while !walks.is_empty() {
        let steps = walks.iter().map(|walk| walk.left.len()).min().unwrap_or(0);
        match walks.as_mut_slice() {
            [a, b, c, d] => step([a, b, c, d], steps),
            [a, b, c] => step([a, b, c], steps),
            [a, b] => step([a, b], steps),
            walks => walks.iter_mut().for_each(|walk| step([walk], steps)),
        }
        walks.retain(|walk| !walk.left.is_empty());
    }
    drop(walks);
    blocks.into_iter().map(find_runs).collect()
}

/// For each row of the sorted transform: the row after it, shifted by 8, and the byte there.
fn link(block: &Transformed, links: &mut [u32]) {
    let mut next = [0_u32; 256];
    let mut sum = 0;
    for (next, count) in next.iter_mut().zip(block.counts) {
        *next = sum;
        sum += count;
    }
    for (row, &byte) in (0_u32..).zip(&block.bytes) {
        let place = &mut next[usize::from(byte)];
        links[*place as usize] = row << 8 | u32::from(byte);
        *place = place.wrapping_add(1);
    }
}

/// A transform being undone.
struct Walk<'a> {
    links: &'a [u32],
    at: u32,
    /// What is still to be written.
    left: &'a mut [u8],
}

fn step<const N: usize>(walks: [&mut Walk<'_>; N], steps: usize) {
    let mut at = walks.each_ref().map(|walk| walk.at);
    let links = walks.each_ref().map(|walk| walk.links);
    let mut out = walks.map(|walk| {
        let (now, later) = std::mem::take(&mut walk.left).split_at_mut(steps);
        walk.left = later;
        (now, &mut walk.at)
    });
    for step in 0..steps {
        for n in 0..N {
            let link = links[n][at[n] as usize];
            out[n].0[step] = link as u8;
            at[n] = link >> 8;
        }
    }
    for (n, (_, place)) in out.iter_mut().enumerate() {
        **place = at[n];
    }
}

/// Four equal bytes are followed by the number of further ones.
fn find_runs(block: Transformed) -> Result<Block, Bad> {
    let bytes = block.bytes;
    let mut pieces: Vec<Piece> = Vec::new();
    let mut crc = !0;
    let (mut from, mut at) = (0, 0);
    while at + 4 <= bytes.len() {
        let four = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if four != four.rotate_left(8) {
            at += 1;
            continue;
        }
        let byte = bytes[at];
        at += 4;
        let Some(&more) = bytes.get(at) else {
            return Err(Bad::Corrupt("a run without its length"));
        };
        crc = crc_run(
            crc_bytes(crc, &bytes[from..at - 4]),
            byte,
            4 + u32::from(more),
        );
        match pieces.last_mut() {
            // One long run, as of zeros.
            Some(last)
                if at - from == 4
                    && bytes[last.from as usize + last.literal as usize - 1] == byte =>
            {
                last.run += 4 + u32::from(more);
            }
            _ => pieces.push(Piece {
                from: from as u32,
                literal: (at - from) as u32,
                run: u32::from(more),
            }),
        }
        at += 1;
        from = at;
    }
    crc = crc_bytes(crc, &bytes[from..]);
    if from < bytes.len() {
        pieces.push(Piece {
            from: from as u32,
            literal: (bytes.len() - from) as u32,
            run: 0,
        });
    }
    match !crc == block.crc {
        true => Ok(Block {
            packed_bits: block.packed_bits,
            crc: block.crc,
            bytes,
            pieces,
        }),
        false => Err(Bad::Corrupt("a block's checksum is wrong")),
    }
}

/// The longest run that is written as one: 4 bytes and 255 more.
const LONG_RUN: u32 = 259;

/// Tables for the CRC-32 of ISO 3309 with the highest bit first, as bzip2 has it.
struct Crc {
    /// The sum of a byte that is followed by 0 to 7 zeros.
    after: [[u32; 256]; 8],
    /// What [`LONG_RUN`] zeros make of each of a sum's four bytes.
    long: [[u32; 256]; 4],
    /// The sum of [`LONG_RUN`] times the same byte, begun at 0.
    run: [u32; 256],
}

static CRC: LazyLock<Box<Crc>> = LazyLock::new(|| {
    let mut crc = Box::new(Crc {
        after: [[0; 256]; 8],
        long: [[0; 256]; 4],
        run: [0; 256],
    });
    for byte in 0..256_u32 {
        let mut sum = byte << 24;
        for _ in 0..8 {
            sum = (sum << 1) ^ ((sum >> 31) * 0x04c1_1db7);
        }
        crc.after[0][byte as usize] = sum;
    }
    let first = crc.after[0];
    let shift = |sum: u32, byte: u8| sum << 8 ^ first[usize::from((sum >> 24) as u8 ^ byte)];
    for zeros in 1..8 {
        for byte in 0..256 {
            crc.after[zeros][byte] = shift(crc.after[zeros - 1][byte], 0);
        }
    }
    for byte in 0..=255_u8 {
        for place in 0..4 {
            let sum = u32::from(byte) << (8 * place);
            crc.long[place][usize::from(byte)] = (0..LONG_RUN).fold(sum, |sum, _| shift(sum, 0));
        }
        crc.run[usize::from(byte)] = (0..LONG_RUN).fold(0, |sum, _| shift(sum, byte));
    }
    crc
});

fn crc_bytes(mut sum: u32, bytes: &[u8]) -> u32 {
    let after = &CRC.after;
    let (eights, rest) = bytes.as_chunks::<8>();
    for eight in eights {
        let value = u64::from_be_bytes(*eight) ^ u64::from(sum) << 32;
        sum = (0..8).fold(0, |sum, n| {
            sum ^ after[n][(value >> (8 * n)) as usize & 0xff]
        });
    }
    for byte in rest {
        sum = sum << 8 ^ after[0][usize::from((sum >> 24) as u8 ^ byte)];
    }
    sum
}

fn crc_run(sum: u32, byte: u8, length: u32) -> u32 {
    if length == LONG_RUN {
        let long = |place: usize| CRC.long[place][(sum >> (8 * place)) as usize & 0xff];
        return long(0) ^ long(1) ^ long(2) ^ long(3) ^ CRC.run[usize::from(byte)];
    }
    crc_bytes(sum, &[byte; LONG_RUN as usize][..length as usize])
}
