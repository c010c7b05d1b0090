//! A digest of guest content that does not depend on how the content is cut into pieces.
//!
//! Every 4 KiB of a device that are not all zero are hashed together with their number; the digest
//! of the device is the sum of these hashes. Zeros therefore cost nothing, pieces may come in any
//! order and from many threads, and the same content has the same digest in every format. It guards
//! against faults of memory, disk and program, not against forgery: for that, see `checksum`.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use twox_hash::XxHash3_128;

use crate::buffer::BufferPool;
use crate::device::DeviceId;
use crate::error::Result;
use crate::pipeline::{self, Job, Route};
use crate::progress::{CancelToken, Progress};
use crate::sink::{Geometry, ImageSink, Prepared, WriteList};
use crate::source::{ImageSource, Piece};
use crate::storage::Output;
use crate::zero::{ZERO_GRANULARITY, is_zero};

/// Digests by device. Shared by the workers of a pipeline.
#[derive(Debug, Default)]
pub struct ContentDigest {
    sums: Mutex<BTreeMap<DeviceId, u128>>,
}

impl ContentDigest {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The digest of a device: equal for equal content, whatever the size of trailing zeros.
    pub fn of(&self, device: DeviceId) -> u128 {
        self.sums.lock().unwrap_or_else(PoisonError::into_inner).get(&device).copied().unwrap_or(0)
    }

    /// Adds a piece, which starts at a multiple of 4 KiB.
    pub fn add(&self, piece: &Piece) {
        let Some(data) = &piece.data else { return };
        let mut sum = 0u128;
        for run in piece.nonzero_runs(ZERO_GRANULARITY) {
            for (index, page) in data[run.clone()].chunks(ZERO_GRANULARITY).enumerate() {
                if !is_zero(page) {
                    let number = (piece.start + run.start as u64) / ZERO_GRANULARITY as u64 + index as u64;
                    sum = sum.wrapping_add(hash_page(number, page));
                }
            }
        }
        let mut sums = self.sums.lock().unwrap_or_else(PoisonError::into_inner);
        let known = sums.entry(piece.device).or_insert(0);
        *known = known.wrapping_add(sum);
    }
}

/// A short last page hashes like the whole page that it becomes where sizes are rounded up.
fn hash_page(number: u64, page: &[u8]) -> u128 {
    if page.len() == ZERO_GRANULARITY {
        return XxHash3_128::oneshot_with_seed(number, page);
    }
    let mut whole = [0; ZERO_GRANULARITY];
    whole[..page.len()].copy_from_slice(page);
    XxHash3_128::oneshot_with_seed(number, &whole)
}

/// Digests everything that passes on its way into another sink.
pub struct DigestSink<'a> {
    inner: &'a dyn ImageSink,
    digest: &'a ContentDigest,
}

impl<'a> DigestSink<'a> {
    /// In front of `inner`, into `digest`, by the numbers that devices have in `inner`.
    pub fn new(inner: &'a dyn ImageSink, digest: &'a ContentDigest) -> Self {
        Self { inner, digest }
    }
}

impl ImageSink for DigestSink<'_> {
    /// Pieces start at multiples of 4 KiB at least.
    fn geometry(&self, device: DeviceId) -> Geometry {
        let inner = self.inner.geometry(device);
        Geometry { granule: inner.granule.max(ZERO_GRANULARITY as u64), ..inner }
    }

    fn output(&self, device: DeviceId) -> &Output {
        self.inner.output(device)
    }

    fn preamble(&self) -> Result<Vec<u8>> {
        self.inner.preamble()
    }

    fn begin(&self) -> Result<()> {
        self.inner.begin()
    }

    fn append_only(&self) -> bool {
        self.inner.append_only()
    }

    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        self.digest.add(&piece);
        self.inner.prepare(piece, pool)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        self.inner.place(prepared, writes)
    }

    fn resize(&self, device: DeviceId, size: u64) -> Result<()> {
        self.inner.resize(device, size)
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()
    }

    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}

/// Reads all content of `source` and digests it, by the source's own device numbers.
///
/// # Errors
/// When the source can't be read; or [`crate::ErrorKind::Cancelled`].
pub fn digest_source(
    source: &mut dyn ImageSource,
    threads: usize,
    progress: &dyn Progress,
    cancel: CancelToken,
) -> Result<ContentDigest> {
    let digest = ContentDigest::new();
    let routes =
        source.info().devices.iter().map(|device| Route { from: device.id, to: device.id }).collect();
    let nowhere = Nowhere { output: Output::from_writer("", Box::new(std::io::sink())), digest: &digest };
    pipeline::copy(source, &nowhere, &Job { routes, threads, progress, cancel })?;
    Ok(digest)
}

/// A sink that keeps nothing but the digest.
struct Nowhere<'a> {
    output: Output,
    digest: &'a ContentDigest,
}

impl ImageSink for Nowhere<'_> {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        Geometry {
            granule: ZERO_GRANULARITY as u64,
            granule_required: false,
            piece_len: 256 * 1024,
            max_zero_len: u64::MAX,
            ordered: false,
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.output
    }

    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        self.digest.add(&piece);
        Ok(Prepared::taken(piece))
    }

    fn place(&self, _prepared: &Prepared, _writes: &mut WriteList) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _device: DeviceId, _size: u64) -> Result<()> {
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64, bytes: &[u8]) -> Piece {
        let mut buffer = BufferPool::new().take(bytes.len());
        buffer.copy_from_slice(bytes);
        Piece::data(DeviceId(0), start, buffer)
    }

    #[test]
    fn cutting_and_order_do_not_matter_but_places_and_bytes_do() {
        let mut bytes = vec![0u8; 4096 * 5 + 100];
        bytes[5] = 1;
        bytes[4096 * 2] = 2;
        bytes[4096 * 5 + 99] = 3;
        let whole = ContentDigest::new();
        whole.add(&piece(0, &bytes));
        let parts = ContentDigest::new();
        parts.add(&piece(8192, &bytes[8192..]));
        parts.add(&piece(0, &bytes[..8192]));
        assert_eq!(whole.of(DeviceId(0)), parts.of(DeviceId(0)));
        let moved = ContentDigest::new();
        moved.add(&piece(4096, &bytes));
        assert_ne!(whole.of(DeviceId(0)), moved.of(DeviceId(0)));
        bytes[6] ^= 1;
        let flipped = ContentDigest::new();
        flipped.add(&piece(0, &bytes));
        assert_ne!(whole.of(DeviceId(0)), flipped.of(DeviceId(0)));
    }
}
