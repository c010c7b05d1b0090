//! A digest of guest content that does not depend on how the content is cut into pieces.
//!
//! The digest of a device is the sum of the hashes of its nonzero 4 KiB pages, each hashed together with its
//! index. So zeros cost nothing, many threads may add pieces in any order, and the same content has the same
//! digest in every format. The digest detects faults in memory, on disk and in the program, but not forgery:
//! for that, see `checksum`.

use std::collections::BTreeMap;
use std::sync::Mutex;

use imgtool_core::sync::lock;
use imgtool_core::zero::{ZERO_GRANULARITY, is_zero};
use imgtool_core::{
    BufferPool, CancelToken, Consumer, DeviceId, Geometry, ImageSource, Lane, Memory, Prepared, Progress,
    RandomAccess, Result, SinkDevice, SinkPiece,
};
use twox_hash::XxHash3_128;

use crate::pipeline::{self, Job, Route, Tap, Target};

/// Length in bytes of a piece. Our choice: a piece fits into the cache of one core.
const PIECE_LEN: u64 = 256 * 1024;

/// Digests of devices, by lane. The workers of a pipeline share them.
#[derive(Debug, Default)]
pub struct ContentDigest {
    sums: Mutex<BTreeMap<Lane, u128>>,
}

impl ContentDigest {
    /// Creates the digests of empty devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the digest of a device. Trailing zeros do not change it.
    pub fn of(&self, lane: Lane) -> u128 {
        lock(&self.sums).get(&lane).copied().unwrap_or(0)
    }

    /// Adds a piece, which must start at a multiple of 4 KiB.
    pub fn add(&self, lane: Lane, piece: &SinkPiece) {
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
        let mut sums = lock(&self.sums);
        let known = sums.entry(lane).or_insert(0);
        *known = known.wrapping_add(sum);
    }
}

/// Hashes a page with its index. A short last page is padded with zeros, as in a format that rounds sizes up.
fn hash_page(number: u64, page: &[u8]) -> u128 {
    if page.len() == ZERO_GRANULARITY {
        return XxHash3_128::oneshot_with_seed(number, page);
    }
    let mut whole = [0; ZERO_GRANULARITY];
    whole[..page.len()].copy_from_slice(page);
    XxHash3_128::oneshot_with_seed(number, &whole)
}

impl Tap for ContentDigest {
    fn granule(&self) -> u64 {
        ZERO_GRANULARITY as u64
    }

    fn piece(&self, lane: Lane, piece: &SinkPiece) {
        self.add(lane, piece);
    }
}

/// Reads and digests all content of `source`. Its devices get consecutive lanes from `first_lane` on.
///
/// # Errors
/// If the source can't be read; [`imgtool_core::ErrorKind::Cancelled`].
pub fn digest_source(
    source: &dyn ImageSource,
    first_lane: Lane,
    threads: usize,
    progress: &dyn Progress,
    cancel: CancelToken,
    memory: &Memory,
) -> Result<ContentDigest> {
    let digest = ContentDigest::new();
    read_all(source, first_lane, &[&digest], threads, progress, cancel, memory)?;
    Ok(digest)
}

/// Returns the resolution in bytes with which [`digest_source`] queries the extents of a device.
pub(crate) fn resolution(random: &dyn RandomAccess, device: DeviceId) -> u64 {
    pipeline::piece_len(PIECE_LEN, random.read_granule(device))
}

/// Reads all content of `source` and passes it to `taps`. Its devices get consecutive lanes from `first_lane`
/// on.
///
/// # Errors
/// If the source can't be read; [`imgtool_core::ErrorKind::Cancelled`].
pub fn read_all(
    source: &dyn ImageSource,
    first_lane: Lane,
    taps: &[&dyn Tap],
    threads: usize,
    progress: &dyn Progress,
    cancel: CancelToken,
    memory: &Memory,
) -> Result<()> {
    let devices = (0..).zip(&source.info().devices);
    let routes = devices
        .map(|(number, device)| Route {
            from: device.id,
            target: 0,
            to: SinkDevice(number),
            lane: Lane(first_lane.0.saturating_add(number)),
        })
        .collect();
    let targets = vec![Target::Consumer(&Discard)];
    let (taps, memory) = (taps.to_vec(), memory.clone());
    pipeline::copy(source, &Job { targets, routes, taps, threads, progress, cancel, memory }).map(drop)
}

/// Consumer that discards all pieces, for reading an image to its end.
struct Discard;

impl Consumer for Discard {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: ZERO_GRANULARITY as u64,
            granule_required: false,
            piece_len: PIECE_LEN,
            max_zero_len: u64::MAX,
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        Ok(Prepared::consumed(piece))
    }

    fn resize(&self, _device: SinkDevice, _size: u64) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(start: u64, bytes: &[u8]) -> SinkPiece {
        let mut buffer = BufferPool::new().take(bytes.len());
        buffer.copy_from_slice(bytes);
        SinkPiece::data(SinkDevice(0), start, buffer)
    }

    #[test]
    fn digest_depends_on_positions_but_not_splits_or_order() {
        let mut bytes = vec![0u8; 4096 * 5 + 100];
        bytes[5] = 1;
        bytes[4096 * 2] = 2;
        bytes[4096 * 5 + 99] = 3;
        let whole = ContentDigest::new();
        whole.add(Lane(0), &piece(0, &bytes));
        let parts = ContentDigest::new();
        parts.add(Lane(0), &piece(8192, &bytes[8192..]));
        parts.add(Lane(0), &piece(0, &bytes[..8192]));
        assert_eq!(whole.of(Lane(0)), parts.of(Lane(0)));
        let moved = ContentDigest::new();
        moved.add(Lane(0), &piece(4096, &bytes));
        assert_ne!(whole.of(Lane(0)), moved.of(Lane(0)));
        bytes[6] ^= 1;
        let flipped = ContentDigest::new();
        flipped.add(Lane(0), &piece(0, &bytes));
        assert_ne!(whole.of(Lane(0)), flipped.of(Lane(0)));
    }
}
