//! The checksums of the content, which a reader compares after it has decoded the chunks.
//!
//! A table has one checksum for all its chunks, which threads decode in any order. So each decoded chunk leaves
//! its own checksum, and those of a table are combined at the end.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crc32fast::Hasher;
use imgtool_core::layered::check_stored;
use imgtool_core::{Error, Lease, Memory, Remedy, Result};

use crate::chunks::{Chunk, Chunks, Kind, Part};
use crate::image::Image;
use crate::layout::TRAILER_LEN;
use crate::stored::StoredChunks;

/// Length in bytes of a read for a checksum.
pub(crate) const READ_LEN: u64 = 1 << 20;

/// Value of a chunk that nobody has decoded.
const UNKNOWN: u64 = u64::MAX;

/// Checksums of the chunks that were decoded.
pub(crate) struct Checksums {
    /// CRC-32 of the content of each chunk, or [`UNKNOWN`].
    chunks: Vec<AtomicU64>,
    _lease: Lease,
}

impl Checksums {
    /// Prepares for these chunks. Borrows from `memory`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if `memory` can't lend what the checksums need.
    pub(crate) fn new(chunks: &Chunks, memory: &Memory) -> Result<Self> {
        let count = chunks.iter().count();
        let lease = memory.lease((count * size_of::<AtomicU64>()) as u64, "the checksums of a DMG image")?;
        Ok(Self { chunks: (0..count).map(|_| AtomicU64::new(UNKNOWN)).collect(), _lease: lease })
    }

    /// Remembers the checksum of a decoded chunk.
    pub(crate) fn record(&self, index: usize, content: &[u8]) {
        if let Some(chunk) = self.chunks.get(index).filter(|chunk| chunk.load(Ordering::Relaxed) == UNKNOWN) {
            chunk.store(u64::from(crc32fast::hash(content)), Ordering::Relaxed);
        }
    }

    fn of(&self, index: usize) -> Option<u32> {
        // Only `UNKNOWN` does not fit.
        u32::try_from(self.chunks.get(index)?.load(Ordering::Relaxed)).ok()
    }

    /// Compares the checksum of each table whose compressed chunks were all decoded. If a table has none, compares
    /// that of the chunks as stored too. Calls `failed` with the guest range of a wrong one.
    ///
    /// # Errors
    /// Any error of `failed`.
    pub(crate) fn verify(
        &self,
        image: &Image,
        stored: &StoredChunks,
        failed: &mut dyn FnMut(Range<u64>, Error) -> Result<()>,
    ) -> Result<()> {
        let wrong = |why: String| {
            let advice = "the image is damaged: copy it again, or use a backup";
            Error::corrupt(why).path(image.input.location()).remedied_by(Remedy::Salvage(advice.into()))
        };
        let (mut end, mut is_covered) = (0, true);
        for part in image.chunks.parts.iter().filter(|part| part.len > 0) {
            let Some(expected) = part.crc.filter(|_| part.start >= end) else {
                is_covered = false;
                continue;
            };
            end = part.start + part.len;
            match self.of_part(image, stored, part) {
                Ok(Some(found)) if found != expected => {
                    failed(part.start..end, wrong(mismatch(part, found, expected)))?;
                }
                Ok(_) => {}
                Err(error) => failed(part.start..end, error)?,
            }
        }
        let encoded = |chunk: &Chunk| chunk.kind.compression().is_some();
        let is_read =
            || image.chunks.iter().enumerate().all(|(at, chunk)| !encoded(chunk) || self.of(at).is_some());
        if is_covered || !is_read() {
            return Ok(());
        }
        match stored_mismatch(image, |from, len, digest| stored.digest(from, len, digest)) {
            Ok(Some(why)) => failed(0..image.virtual_size(), wrong(why)),
            Ok(None) => Ok(()),
            Err(error) => failed(0..image.virtual_size(), error),
        }
    }

    /// Returns the checksum of a table's content; `None` if a chunk was not decoded, or a part has no chunk.
    fn of_part(&self, image: &Image, stored: &StoredChunks, part: &Part) -> Result<Option<u32>> {
        let (mut digest, mut zeros) = (Hasher::new(), 0);
        let (mut at, end) = (part.start, part.start + part.len);
        while at < end {
            let Some((index, chunk)) = image.chunks.indexed_at(at) else { return Ok(None) };
            if chunk.start != at || chunk.end() > end {
                return Ok(None);
            }
            at = chunk.end();
            match chunk.kind {
                Kind::Ignored => continue,
                Kind::Zero => {
                    zeros += chunk.len;
                    continue;
                }
                _ => combine_zeros(&mut digest, std::mem::take(&mut zeros)),
            }
            if chunk.kind == Kind::Raw {
                if check_stored(&image.input, "chunk", chunk.file_offset, chunk.len).is_err() {
                    // Reading it was an error already.
                    return Ok(None);
                }
                stored.digest(chunk.file_offset, chunk.len, &mut digest)?;
                continue;
            }
            let Some(crc) = self.of(index) else { return Ok(None) };
            digest.combine(&Hasher::new_with_initial_len(crc, chunk.len));
        }
        combine_zeros(&mut digest, zeros);
        Ok(Some(digest.finalize()))
    }
}

/// Describes a table with a wrong checksum.
pub(crate) fn mismatch(part: &Part, found: u32, expected: u32) -> String {
    let sector = part.start / 512;
    format!("the sectors from {sector} on have the checksum {found:08x}, not {expected:08x}")
}

/// Compares the checksum of all chunks as stored. `add` adds a number of bytes from a file offset on to a checksum.
/// Returns what is wrong.
pub(crate) fn stored_mismatch(
    image: &Image,
    add: impl FnOnce(u64, u64, &mut Hasher) -> Result<()>,
) -> Result<Option<String>> {
    let (start, len) = (image.trailer.data_offset, image.trailer.data_len);
    let Some(expected) = image.trailer.data_crc else { return Ok(None) };
    let limit = image.input.len().saturating_sub(TRAILER_LEN);
    if start.checked_add(len).is_none_or(|end| end > limit) {
        let why = format!("the trailer states {len} bytes of chunks at {start}, beyond the file");
        return Ok(Some(why));
    }
    let mut digest = Hasher::new();
    add(start, len, &mut digest)?;
    let found = digest.finalize();
    let differs = found != expected;
    Ok(differs.then(|| format!("the chunks have the checksum {found:08x}, not {expected:08x}")))
}

/// Adds `len` zeros to a checksum, in a number of steps that is logarithmic in `len`.
pub(crate) fn combine_zeros(digest: &mut Hasher, len: u64) {
    let mut unit = Hasher::new();
    unit.update(&[0]);
    let mut rest = len;
    while rest > 0 {
        if rest & 1 == 1 {
            digest.combine(&unit);
        }
        let double = unit.clone();
        unit.combine(&double);
        rest >>= 1;
    }
}
