//! The seek table of the Zstandard seekable format, version 0.1.0 (zstd's `contrib/seekable_format`).
//!
//! The table is a skippable frame at the end of the file. All numbers are little-endian:
//!
//! * header: magic 184D2A5E, length of the rest;
//! * an entry for each frame: stored length, plain length and, if the descriptor's checksum flag is set, the
//!   lower half of the XXH64 of the plain bytes;
//! * footer: number of frames, descriptor, magic 8F92EAB1.

use imgtool_core::{Lease, Memory, ReadAt, Result, TableMemory};

/// Magic of the skippable frame that contains the table (`Skippable_Magic_Number`).
const TABLE_MAGIC: u32 = 0x184d_2a5e;
/// Last four bytes of the file (`Seekable_Magic_Number`).
const FOOTER_MAGIC: u32 = 0x8f92_eab1;
/// Size in bytes of a skippable frame's magic and length.
const FRAME_HEADER_LEN: u64 = 8;
/// Length in bytes of the footer: number of frames (4), descriptor (1), magic (4).
const FOOTER_LEN: u64 = 9;
/// Bit 7 of the descriptor (`Checksum_Flag`): entries have checksums.
const HAS_CHECKSUMS: u8 = 0x80;
/// Bits 2 to 6 of the descriptor (`Reserved_Bits`): must be zero.
const RESERVED: u8 = 0x7c;

/// Maximum number of frames. Our limit: a full table takes 48 MiB of memory and covers 15 TiB of a VMA
/// archive. The toolkit reads longer files as streams.
const MAX_FRAMES: u32 = 1 << 22;

/// Minimum memory in bytes of a list of frames that is being written. Our choice: 10 GiB of an archive, or the
/// tails of 254 disks with the archive's header.
const MIN_LIST: u64 = 32 << 10;

/// Maximum length of a frame, stored or plain, in bytes. Our limit, since most frames are decoded whole.
pub(super) const MAX_FRAME_LEN: u32 = 16 << 20;

/// Number of entries from one mark to the next: the maximum that a search scans.
const MARK_EVERY: usize = 64;

/// Number of entries read from the file at a time.
const READ_ENTRIES: usize = 4096;

/// A frame of the file, as the table describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    /// Index in the table.
    pub(super) index: u32,
    /// Offset of the frame in the compressed file, in bytes.
    pub(super) stored_at: u64,
    /// Length of the frame in the compressed file, in bytes.
    pub(super) stored_len: u32,
    /// Offset of the content in the plain bytes of the file.
    pub(super) plain_at: u64,
    /// Length of the content, in bytes.
    pub(super) plain_len: u32,
    /// Lower half of the XXH64 of the content; `None` if the table has no checksums.
    pub(super) checksum: Option<u32>,
}

/// A table in memory: 8 bytes for each frame, 12 with checksums.
pub(super) struct SeekTable {
    /// Stored and plain length of each frame, in bytes.
    lens: Vec<[u32; 2]>,
    /// One checksum for each frame; empty if the table has no checksums.
    checksums: Vec<u32>,
    /// Stored and plain offset of every [`MARK_EVERY`]-th frame, in bytes.
    marks: Vec<[u64; 2]>,
    plain_len: u64,
    longest_plain: u32,
    longest_stored: u32,
    _lease: Lease,
}

impl SeekTable {
    /// Reads the table of `source`. Returns `None` if there is no table, or it is unreadable, does not match
    /// the file's length, or exceeds the limits or the memory.
    pub(super) fn read(source: &dyn ReadAt, memory: &Memory) -> Option<Self> {
        let footer_at = source.len().checked_sub(FOOTER_LEN)?;
        let mut footer = [0; FOOTER_LEN as usize];
        source.read_exact_at(&mut footer, footer_at).ok()?;
        let [c0, c1, c2, c3, descriptor, m0, m1, m2, m3] = footer;
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let well_formed = u32::from_le_bytes([m0, m1, m2, m3]) == FOOTER_MAGIC && descriptor & RESERVED == 0;
        if !well_formed || count == 0 || count > MAX_FRAMES {
            return None;
        }
        let has_checksums = descriptor & HAS_CHECKSUMS != 0;
        let entry_len = if has_checksums { 12 } else { 8 };
        let entries_len = u64::from(count) * entry_len;
        let entries_at = footer_at.checked_sub(entries_len)?;
        let table_at = entries_at.checked_sub(FRAME_HEADER_LEN)?;
        let mut header = [0; FRAME_HEADER_LEN as usize];
        source.read_exact_at(&mut header, table_at).ok()?;
        let expected =
            [TABLE_MAGIC.to_le_bytes(), u32::try_from(entries_len + FOOTER_LEN).ok()?.to_le_bytes()];
        if header != *expected.as_flattened() {
            return None;
        }
        // A mark takes 16 bytes for 64 entries.
        let mut table =
            Self::empty(count as usize, has_checksums, memory.try_lease(entries_len + entries_len / 16)?);
        let mut stored_at = 0;
        let mut chunk = vec![0; READ_ENTRIES * entry_len as usize];
        let mut at = entries_at;
        while at < footer_at {
            let len = chunk.len().min(usize::try_from(footer_at - at).ok()?);
            source.read_exact_at(&mut chunk[..len], at).ok()?;
            for entry in chunk[..len].chunks_exact(entry_len as usize) {
                table.push(entry, &mut stored_at)?;
            }
            at += len as u64;
        }
        // The table must directly follow the last frame.
        (stored_at == table_at).then_some(table)
    }

    fn empty(count: usize, has_checksums: bool, lease: Lease) -> Self {
        Self {
            lens: Vec::with_capacity(count),
            checksums: Vec::with_capacity(if has_checksums { count } else { 0 }),
            marks: Vec::new(),
            plain_len: 0,
            longest_plain: 0,
            longest_stored: 0,
            _lease: lease,
        }
    }

    /// Adds the frame at `stored_at` from its entry, and advances `stored_at` to its end. Returns `None` if
    /// the frame is empty or too long.
    fn push(&mut self, entry: &[u8], stored_at: &mut u64) -> Option<()> {
        let (numbers, _) = entry.as_chunks::<4>();
        let [stored, plain] = [*numbers.first()?, *numbers.get(1)?].map(u32::from_le_bytes);
        // An empty frame would never be decoded, so a wrong length would go unnoticed.
        if stored > MAX_FRAME_LEN || plain > MAX_FRAME_LEN || plain == 0 {
            return None;
        }
        if self.lens.len().is_multiple_of(MARK_EVERY) {
            self.marks.push([*stored_at, self.plain_len]);
        }
        self.lens.push([stored, plain]);
        self.checksums.extend(numbers.get(2).copied().map(u32::from_le_bytes));
        // No overflow: at most 2^22 frames of at most 2^24 bytes.
        *stored_at += u64::from(stored);
        self.plain_len += u64::from(plain);
        self.longest_plain = self.longest_plain.max(plain);
        self.longest_stored = self.longest_stored.max(stored);
        Some(())
    }

    /// Returns the plain length of the file in bytes.
    pub(super) fn plain_len(&self) -> u64 {
        self.plain_len
    }

    /// Returns the plain length of the longest frame in bytes.
    pub(super) fn longest_plain(&self) -> u32 {
        self.longest_plain
    }

    /// Returns the stored length of the longest frame in bytes.
    pub(super) fn longest_stored(&self) -> u32 {
        self.longest_stored
    }

    /// Returns the frame that contains the plain byte at `position`; `None` beyond the end.
    pub(super) fn find(&self, position: u64) -> Option<Frame> {
        let mark = self.marks.partition_point(|[_, plain_at]| *plain_at <= position).checked_sub(1)?;
        let [mut stored_at, mut plain_at] = self.marks[mark];
        for (index, [stored_len, plain_len]) in self.lens.iter().enumerate().skip(mark * MARK_EVERY) {
            if position < plain_at + u64::from(*plain_len) {
                return Some(Frame {
                    index: u32::try_from(index).ok()?,
                    stored_at,
                    stored_len: *stored_len,
                    plain_at,
                    plain_len: *plain_len,
                    checksum: self.checksums.get(index).copied(),
                });
            }
            stored_at += u64::from(*stored_len);
            plain_at += u64::from(*plain_len);
        }
        None
    }
}

/// The frames of a file that is being written. Equal frames in a row, as zeros give them, take one entry.
#[derive(Debug, Default)]
pub(super) struct FrameList {
    runs: Vec<FrameRun>,
    /// Number of frames.
    count: u64,
    /// Maximum number of runs.
    max_runs: usize,
}

/// Frames of equal lengths, one after the other.
#[derive(Debug, Clone, Copy)]
struct FrameRun {
    stored: u32,
    plain: u32,
    count: u32,
}

/// Number of encoded bytes that are written at a time.
const WRITE_LEN: usize = 256 << 10;

impl FrameList {
    /// Creates an empty list that takes at most `memory` bytes; `None` for as much as a list may take. A longer
    /// list is given up.
    pub(super) fn within(memory: Option<u64>) -> Self {
        let max_runs = memory.map_or(u64::MAX, |memory| memory / size_of::<FrameRun>() as u64);
        let max_runs = max_runs.min(MAX_FRAMES.into()) as usize;
        Self { max_runs, ..Self::default() }
    }

    /// Returns the memory for a list of `frames` frames.
    pub(super) fn memory(frames: u64) -> TableMemory {
        let most = frames.min(MAX_FRAMES.into()) * size_of::<FrameRun>() as u64;
        TableMemory { least: MIN_LIST, most: most.max(MIN_LIST) }
    }

    /// Adds a frame of this stored and plain length in bytes.
    pub(super) fn push(&mut self, stored: u32, plain: u32) {
        self.count += 1;
        let is_full = self.runs.len() >= self.max_runs;
        match self.runs.last_mut() {
            Some(last) if (last.stored, last.plain) == (stored, plain) && last.count < u32::MAX => {
                last.count += 1;
            }
            _ if !is_full => self.runs.push(FrameRun { stored, plain, count: 1 }),
            // A table without all frames is of no use.
            _ => self.max_runs = 0,
        }
    }

    /// Encodes the table, without checksums, and passes it to `write` in parts. It must directly follow the
    /// frames. Encodes nothing if the list was given up, or has more frames than readers of the toolkit take.
    pub(super) fn encode(&self, mut write: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let count = u32::try_from(self.count).ok();
        let count = count.filter(|count| self.max_runs > 0 && *count <= MAX_FRAMES);
        let rest_len = self.count.saturating_mul(8).saturating_add(FOOTER_LEN);
        let (Some(count), Ok(rest_len)) = (count, u32::try_from(rest_len)) else { return Ok(()) };
        let mut part = Vec::with_capacity(WRITE_LEN + FOOTER_LEN as usize);
        part.extend(TABLE_MAGIC.to_le_bytes());
        part.extend(rest_len.to_le_bytes());
        for run in &self.runs {
            for _ in 0..run.count {
                part.extend(run.stored.to_le_bytes());
                part.extend(run.plain.to_le_bytes());
                if part.len() >= WRITE_LEN {
                    write(&part)?;
                    part.clear();
                }
            }
        }
        part.extend(count.to_le_bytes());
        part.push(0);
        part.extend(FOOTER_MAGIC.to_le_bytes());
        write(&part)
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    struct Bytes(Vec<u8>);

    impl ReadAt for Bytes {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            let start = position as usize;
            buf.copy_from_slice(self.0.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }

        fn len(&self) -> u64 {
            self.0.len() as u64
        }
    }

    fn encode(frames: &[[u32; 2]], memory: Option<u64>) -> Vec<u8> {
        let mut list = FrameList::within(memory);
        frames.iter().for_each(|[stored, plain]| list.push(*stored, *plain));
        let mut bytes = Vec::new();
        let write = |part: &[u8]| {
            bytes.extend_from_slice(part);
            Ok(())
        };
        list.encode(write).expect("in memory");
        bytes
    }

    /// A table that the reader refuses would only lengthen the file.
    #[test]
    fn a_list_of_too_many_frames_is_not_encoded() {
        let mut list = FrameList::within(None);
        (0..=MAX_FRAMES).for_each(|_| list.push(9, 5));
        list.encode(|_| Err(imgtool_core::Error::usage("a table is written"))).expect("nothing is written");
    }

    #[test]
    fn equal_frames_take_no_memory() {
        let mut frames = vec![[30, 40]; 100_000];
        let few = encode(&frames, Some(12));
        assert_eq!(few.len(), 8 + 100_000 * 8 + 9);
        assert!(few == encode(&frames, None));
        frames.push([30, 41]);
        assert!(encode(&frames, Some(12)).is_empty(), "two runs");
        assert_eq!(encode(&frames, Some(24)).len(), few.len() + 8);
    }

    #[test]
    fn the_list_of_a_small_file_has_space_for_tails() {
        let memory = FrameList::memory(1);
        assert_eq!(memory.least, memory.most);
        let frames: Vec<[u32; 2]> = (1..=600).map(|len| [len, len]).collect();
        assert!(!encode(&frames, Some(memory.least)).is_empty());
    }

    fn read(source: &Bytes) -> Option<SeekTable> {
        SeekTable::read(source, &Memory::default())
    }

    fn file(frames: &[[u32; 2]]) -> Vec<u8> {
        let stored: u32 = frames.iter().map(|[stored, _]| stored).sum();
        let mut bytes = vec![1; stored as usize];
        bytes.extend(encode(frames, None));
        bytes
    }

    #[test]
    fn finds_every_position_across_marks() {
        let frames: Vec<[u32; 2]> = (0..500).map(|n| [n % 7 + 1, n % 11 + 1]).collect();
        let table = read(&Bytes(file(&frames))).expect("a table");
        let (mut stored_at, mut plain_at) = (0, 0);
        for (number, [stored_len, plain_len]) in frames.iter().enumerate() {
            for position in plain_at..plain_at + u64::from(*plain_len) {
                let found = table.find(position).expect("within");
                assert_eq!(
                    (found.index as usize, found.stored_at, found.plain_at),
                    (number, stored_at, plain_at)
                );
            }
            stored_at += u64::from(*stored_len);
            plain_at += u64::from(*plain_len);
        }
        assert_eq!(table.plain_len(), plain_at);
        assert_eq!(table.find(plain_at), None);
        assert_eq!(table.find(u64::MAX), None);
    }

    #[test]
    fn rejects_a_table_that_does_not_match_the_file() {
        let good = file(&[[10, 20], [30, 40]]);
        assert!(read(&Bytes(good.clone())).is_some());
        assert!(read(&Bytes([vec![0], good.clone()].concat())).is_none(), "a byte too many before");
        assert!(read(&Bytes([good.clone(), vec![0]].concat())).is_none(), "a byte too many after");
        assert!(read(&Bytes(good[1..].to_vec())).is_none(), "a byte too few");
        for at in good.len() - 33..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            let is_plain_len =
                (good.len() - 33 + 8..good.len() - 9).contains(&at) && (at - (good.len() - 25)) % 8 >= 4;
            let read = read(&Bytes(bad));
            // A wrong plain length shows only when its frame is decoded, unless it exceeds the limit.
            assert!(read.is_none() || is_plain_len, "byte {at}");
        }
    }

    #[test]
    fn enforces_limits() {
        assert!(read(&Bytes(file(&[[1, MAX_FRAME_LEN]]))).is_some());
        assert!(read(&Bytes(file(&[[1, MAX_FRAME_LEN + 1]]))).is_none());
        assert!(read(&Bytes(file(&[[MAX_FRAME_LEN + 1, 1]]))).is_none());
        assert!(read(&Bytes(file(&[[1, 1], [1, 0], [1, 1]]))).is_none());
        assert!(read(&Bytes(file(&[]))).is_none());
        for len in 0..40 {
            assert!(read(&Bytes(vec![0; len])).is_none());
        }
        let mut many = file(&[[1, 1]]);
        let at = many.len() - 9;
        many[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(read(&Bytes(many)).is_none());
    }
}
