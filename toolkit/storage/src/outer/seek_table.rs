//! The seek table of the Zstandard seekable format, version 0.1.0 (zstd's `contrib/seekable_format`).
//!
//! The table is a skippable frame at the end of the file. All numbers are little-endian:
//!
//! * header: magic 184D2A5E, length of the rest;
//! * an entry for each frame: stored length, plain length and, if the descriptor's checksum flag is set, the
//!   lower half of the XXH64 of the plain bytes;
//! * footer: number of frames, descriptor, magic 8F92EAB1.

use std::io;

use imgtool_core::ReadAt;

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

/// Maximum length of a frame, stored or plain, in bytes. Our limit, since most frames are decoded whole.
const MAX_FRAME_LEN: u32 = 16 << 20;

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
}

impl SeekTable {
    /// Reads the table of `source`. Returns `None` if there is no table, or it is unreadable, does not match
    /// the file's length, or exceeds the limits.
    pub(super) fn read(source: &dyn ReadAt) -> Option<Self> {
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
        let mut table = Self::empty();
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

    fn empty() -> Self {
        Self { lens: Vec::new(), checksums: Vec::new(), marks: Vec::new(), plain_len: 0, longest_plain: 0 }
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

/// Encodes the table for frames of these stored and plain lengths, without checksums. It must directly follow
/// the frames.
///
/// # Errors
/// `InvalidInput` if there are more frames than a table can describe.
pub(crate) fn encode(frames: &[[u32; 2]]) -> io::Result<Vec<u8>> {
    let too_many = || io::Error::new(io::ErrorKind::InvalidInput, format!("{} frames", frames.len()));
    let count = u32::try_from(frames.len()).map_err(|_| too_many())?;
    let rest_len = u64::from(count) * 8 + FOOTER_LEN;
    let rest_len = u32::try_from(rest_len).map_err(|_| too_many())?;
    let mut table = Vec::with_capacity(FRAME_HEADER_LEN as usize + rest_len as usize);
    table.extend(TABLE_MAGIC.to_le_bytes());
    table.extend(rest_len.to_le_bytes());
    frames.iter().flatten().for_each(|number| table.extend(number.to_le_bytes()));
    table.extend(count.to_le_bytes());
    table.push(0);
    table.extend(FOOTER_MAGIC.to_le_bytes());
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Memory(Vec<u8>);

    impl ReadAt for Memory {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            let start = position as usize;
            buf.copy_from_slice(self.0.get(start..start + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }

        fn len(&self) -> u64 {
            self.0.len() as u64
        }
    }

    fn file(frames: &[[u32; 2]]) -> Vec<u8> {
        let stored: u32 = frames.iter().map(|[stored, _]| stored).sum();
        let mut bytes = vec![1; stored as usize];
        bytes.extend(encode(frames).expect("a few frames"));
        bytes
    }

    #[test]
    fn finds_every_position_across_marks() {
        let frames: Vec<[u32; 2]> = (0..500).map(|n| [n % 7 + 1, n % 11 + 1]).collect();
        let table = SeekTable::read(&Memory(file(&frames))).expect("a table");
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
        assert!(SeekTable::read(&Memory(good.clone())).is_some());
        assert!(
            SeekTable::read(&Memory([vec![0], good.clone()].concat())).is_none(),
            "a byte too many before"
        );
        assert!(
            SeekTable::read(&Memory([good.clone(), vec![0]].concat())).is_none(),
            "a byte too many after"
        );
        assert!(SeekTable::read(&Memory(good[1..].to_vec())).is_none(), "a byte too few");
        for at in good.len() - 33..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x40;
            let is_plain_len =
                (good.len() - 33 + 8..good.len() - 9).contains(&at) && (at - (good.len() - 25)) % 8 >= 4;
            let read = SeekTable::read(&Memory(bad));
            // A wrong plain length shows only when its frame is decoded, unless it exceeds the limit.
            assert!(read.is_none() || is_plain_len, "byte {at}");
        }
    }

    #[test]
    fn enforces_limits() {
        assert!(SeekTable::read(&Memory(file(&[[1, MAX_FRAME_LEN]]))).is_some());
        assert!(SeekTable::read(&Memory(file(&[[1, MAX_FRAME_LEN + 1]]))).is_none());
        assert!(SeekTable::read(&Memory(file(&[[MAX_FRAME_LEN + 1, 1]]))).is_none());
        assert!(SeekTable::read(&Memory(file(&[[1, 1], [1, 0], [1, 1]]))).is_none());
        assert!(SeekTable::read(&Memory(file(&[]))).is_none());
        for len in 0..40 {
            assert!(SeekTable::read(&Memory(vec![0; len])).is_none());
        }
        let mut many = file(&[[1, 1]]);
        let at = many.len() - 9;
        many[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(SeekTable::read(&Memory(many)).is_none());
    }
}
