//! [`StoredChunks`], the file of an image, which remembers the checksums of the plain chunks that were read.
//!
//! The verification at the end of a read compares them with those of the tables. It reads only what no reader has
//! read, and no holes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Mutex;

use crc32fast::Hasher;
use imgtool_core::layered::StoredBytes;
use imgtool_core::sync::lock;
use imgtool_core::{Error, FileRange, FileRun, Lease, Location, Memory, RandomInput, Result};

use crate::checksums::{READ_LEN, combine_zeros};
use crate::chunks::Kind;
use crate::image::Image;

/// Maximum number of separate runs. Our limit: a reader of whole disks leaves a run for each chunk and hole, or less;
/// what is not remembered is read again.
const MAX_RUNS: usize = 16_384;

/// Memory in bytes of a run: an entry of 24 bytes in a tree, which has space for twice as many.
const RUN_MEMORY: usize = 48;

/// The file of an image. Reads of plain chunks leave their checksums.
pub(crate) struct StoredChunks {
    input: RandomInput,
    /// File offsets of the plain chunks, in ascending order. A run never extends over one, so that each chunk has
    /// the checksum of its own.
    starts: Vec<u64>,
    runs: Mutex<Runs>,
    _lease: Lease,
}

impl StoredChunks {
    /// Prepares for the plain chunks of an image. Borrows from `memory`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if `memory` can't lend what the runs need.
    pub(crate) fn new(image: &Image, memory: &Memory) -> Result<Self> {
        let plain = || image.chunks.iter().filter(|chunk| chunk.kind == Kind::Raw);
        let count = plain().count();
        let most_runs = if count == 0 { 0 } else { MAX_RUNS };
        let bytes = count * size_of::<u64>() + most_runs * RUN_MEMORY;
        let lease = memory.lease(bytes as u64, "the checksums of a DMG image")?;
        let mut starts = Vec::with_capacity(count);
        starts.extend(plain().map(|chunk| chunk.file_offset));
        starts.sort_unstable();
        Ok(Self { input: image.input.clone(), starts, runs: Mutex::default(), _lease: lease })
    }

    /// Remembers the checksum of bytes that were read. Continues that of the bytes before them if they belong to
    /// the same chunk: the usual case, and cheaper than combining two.
    fn record(&self, bytes: &[u8], file_offset: u64) {
        let end = file_offset.saturating_add(bytes.len() as u64);
        let before = {
            let mut runs = lock(&self.runs);
            if bytes.is_empty() || runs.cover(&(file_offset..end)) {
                return;
            }
            if self.begins_chunk(file_offset) { None } else { runs.take_ending_at(file_offset) }
        };
        let (start, crc) = before.unwrap_or((file_offset, 0));
        let mut digest = Hasher::new_with_initial_len(crc, file_offset - start);
        digest.update(bytes);
        let mut runs = lock(&self.runs);
        match runs.0.get(&end).copied().filter(|_| !self.begins_chunk(end)) {
            Some(next) => {
                digest.combine(&Hasher::new_with_initial_len(next.crc, next.end - end));
                runs.insert(start, Run { end: next.end, crc: digest.finalize() });
            }
            None => runs.insert(start, Run { end, crc: digest.finalize() }),
        }
    }

    fn begins_chunk(&self, file_offset: u64) -> bool {
        self.starts.binary_search(&file_offset).is_ok()
    }

    /// Adds `len` bytes of the file to a checksum. Reads only what no reader has read.
    ///
    /// # Errors
    /// Those of the reads.
    pub(crate) fn digest(&self, file_offset: u64, len: u64, digest: &mut Hasher) -> Result<()> {
        digest_range(&self.input, &lock(&self.runs), file_offset, len, digest)
    }
}

impl StoredBytes for StoredChunks {
    fn location(&self) -> &Location {
        self.input.location()
    }

    fn read_exact_at(&self, buf: &mut [u8], file_offset: u64) -> Result<()> {
        self.input.read_exact_at(buf, file_offset)?;
        self.record(buf, file_offset);
        Ok(())
    }

    fn read_salvage(&self, buf: &mut [u8], file_offset: u64, lost: &mut dyn FnMut(Range<usize>, Error)) {
        self.input.read_salvage(buf, file_offset, lost);
    }

    fn run(&self, file_offset: u64) -> Result<FileRun> {
        self.input.run(file_offset)
    }

    fn rough_run(&self, file_offset: u64, until: u64) -> Result<FileRun> {
        self.input.rough_run(file_offset, until)
    }

    fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        self.input.locate(range)
    }

    fn granule(&self) -> u64 {
        self.input.granule()
    }
}

/// A run of bytes that were read, without its start.
#[derive(Debug, Clone, Copy)]
struct Run {
    end: u64,
    crc: u32,
}

/// Runs of bytes that were read, by their file offsets. They do not overlap.
#[derive(Debug, Default)]
struct Runs(BTreeMap<u64, Run>);

impl Runs {
    /// True if one run contains all of `range`.
    fn cover(&self, range: &Range<u64>) -> bool {
        self.0.range(..=range.start).next_back().is_some_and(|(_, run)| run.end >= range.end)
    }

    /// Removes the run that ends at `end`. Returns its start and checksum.
    fn take_ending_at(&mut self, end: u64) -> Option<(u64, u32)> {
        let (&start, &Run { crc, .. }) = self.0.range(..end).next_back().filter(|(_, run)| run.end == end)?;
        self.0.remove(&start);
        Some((start, crc))
    }

    /// Adds a run in place of those inside it. Drops it if it overlaps another, or if there are too many.
    fn insert(&mut self, start: u64, run: Run) {
        let before = self.0.range(..start).next_back();
        let last = self.0.range(..run.end).next_back();
        if before.is_some_and(|(_, before)| before.end > start)
            || last.is_some_and(|(_, last)| last.end > run.end)
        {
            return;
        }
        while let Some((&inside, _)) = self.0.range(start..run.end).next() {
            self.0.remove(&inside);
        }
        if self.0.len() < MAX_RUNS {
            self.0.insert(start, run);
        }
    }
}

/// Adds bytes of a file to a checksum. Does not read holes.
///
/// # Errors
/// Those of the reads.
pub(crate) fn digest_stored(
    input: &RandomInput,
    file_offset: u64,
    len: u64,
    digest: &mut Hasher,
) -> Result<()> {
    digest_range(input, &Runs::default(), file_offset, len, digest)
}

/// Adds bytes of a file to a checksum. Reads neither the bytes of `runs` nor holes.
fn digest_range(
    input: &RandomInput,
    runs: &Runs,
    file_offset: u64,
    len: u64,
    digest: &mut Hasher,
) -> Result<()> {
    let (mut at, end) = (file_offset, file_offset.saturating_add(len));
    while at < end {
        let mut until = end;
        if let Some((&start, run)) = runs.0.range(at..end).next() {
            if start == at && run.end <= end {
                digest.combine(&Hasher::new_with_initial_len(run.crc, run.end - at));
                at = run.end;
                continue;
            }
            // A run that ends behind the range is of no use.
            until = if start == at { end } else { start };
        }
        // Reading past the end of the file is an error.
        let run = if at < input.len() { input.run(at)? } else { FileRun { end: until, is_data: true } };
        let part_end = run.end.clamp(at + 1, until.max(at + 1));
        if run.is_data {
            // At most `READ_LEN`, so it fits.
            let bytes = input.read_vec(at, (part_end - at).min(READ_LEN) as usize)?;
            digest.update(&bytes);
            at += bytes.len() as u64;
        } else {
            combine_zeros(digest, part_end - at);
            at = part_end;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use imgtool_core::{Input, ReadAt};

    use super::*;

    const LEN: u64 = 100_000;

    /// A file that counts the bytes that are read.
    struct Counted {
        bytes: Vec<u8>,
        read: AtomicU64,
    }

    impl ReadAt for Counted {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            buf.copy_from_slice(&self.bytes[position as usize..][..buf.len()]);
            self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
            Ok(())
        }

        fn len(&self) -> u64 {
            LEN
        }
    }

    /// Plain chunks begin at these offsets, the last ends with the file.
    fn stored(starts: &[u64]) -> (Arc<Counted>, StoredChunks) {
        let bytes = (0..LEN).map(|at| (at * at % 251) as u8).collect();
        let file = Arc::new(Counted { bytes, read: AtomicU64::new(0) });
        let input =
            Input::from_read_at("x.dmg", Arc::clone(&file) as Arc<dyn ReadAt>).into_random().expect("random");
        let lease = Memory::new(64 << 20).lease(0, "a test").expect("free");
        (file, StoredChunks { input, starts: starts.to_vec(), runs: Mutex::default(), _lease: lease })
    }

    /// Compares the checksums of all chunks with those of their bytes. Returns the number of bytes that were read.
    fn verify(file: &Counted, stored: &StoredChunks) -> u64 {
        let before = file.read.load(Ordering::Relaxed);
        for (index, &start) in stored.starts.iter().enumerate() {
            let end = stored.starts.get(index + 1).copied().unwrap_or(LEN);
            let mut digest = Hasher::new();
            stored.digest(start, end - start, &mut digest).expect("read");
            let expected = crc32fast::hash(&file.bytes[start as usize..end as usize]);
            assert_eq!(digest.finalize(), expected, "{start}..{end}");
        }
        file.read.load(Ordering::Relaxed) - before
    }

    #[test]
    fn what_was_read_is_not_read_again() {
        let starts = [0, 5_000, 5_512, 70_000];
        let ends = [5_000, 5_512, 70_000, LEN];
        for step in [512, 999, 4096, LEN] {
            for backwards in [false, true] {
                let (file, stored) = stored(&starts);
                assert_eq!(verify(&file, &stored), LEN, "nothing was read");
                // As readers do, each call within a chunk.
                let parts = starts.iter().zip(ends).flat_map(|(&start, end)| {
                    (start..end).step_by(step as usize).map(move |at| at..end.min(at + step))
                });
                let mut parts: Vec<_> = parts.collect();
                if backwards {
                    parts.reverse();
                }
                for part in parts {
                    stored
                        .read_exact_at(&mut vec![0; (part.end - part.start) as usize], part.start)
                        .expect("read");
                }
                assert_eq!(lock(&stored.runs).0.len(), 4, "a run for each chunk");
                assert_eq!(verify(&file, &stored), 0, "steps of {step}");
            }
        }
    }

    #[test]
    fn reads_in_any_order_give_the_same_checksums() {
        let (file, stored) = stored(&[0, 30_000, 30_001, 99_999]);
        let mut random = 1_u64;
        for _ in 0..2000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let at = (random >> 33) % LEN;
            let len = ((random >> 20) % 3000).min(LEN - at);
            stored.read_exact_at(&mut vec![0; len as usize], at).expect("read");
        }
        verify(&file, &stored);
    }

    #[test]
    fn runs_are_bounded() {
        let mut runs = Runs::default();
        for index in 0..MAX_RUNS as u64 + 10 {
            runs.insert(2 * index, Run { end: 2 * index + 1, crc: 0 });
        }
        assert_eq!(runs.0.len(), MAX_RUNS);
    }
}
