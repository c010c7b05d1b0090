//! A sink that keeps nothing: it compares each piece with the same part of another image.

use std::ops::Range;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use imgtool_toolkit::zero::is_zero;
use imgtool_toolkit::{
    BufferPool, CancelToken, Device, DeviceId, Error, Geometry, ImageSink, Output, Piece, Prepared,
    RandomAccess, Result, ResultExt, WriteList,
};

/// Bytes in a piece. Ours: both images' parts fit a core's cache.
const PIECE_LEN: u64 = 256 * 1024;

/// The longest piece of zeros: short enough for many threads and for a quick end.
const MAX_ZERO_LEN: u64 = 1 << 30;

/// Two devices to be compared.
#[derive(Debug, Clone)]
pub(super) struct Pair {
    pub(super) name: String,
    pub(super) first: Device,
    pub(super) second: Device,
}

impl Pair {
    pub(super) fn swapped(&self) -> Self {
        Self { name: self.name.clone(), first: self.second.clone(), second: self.first.clone() }
    }
}

pub(super) struct CompareSink<'a> {
    other: &'a dyn RandomAccess,
    path: &'a Path,
    pairs: &'a [Pair],
    nowhere: Output,
    pool: BufferPool,
    /// The least pair and offset that differ. All pieces before the one that ends the work have been
    /// handed out by then and are looked at to their end, so that it is the first of all.
    difference: Mutex<Option<(usize, u64)>>,
}

impl<'a> CompareSink<'a> {
    /// Compares with the second device of each pair in `other`.
    pub(super) fn new(other: &'a dyn RandomAccess, path: &'a Path, pairs: &'a [Pair]) -> Self {
        let nowhere = Output::from_writer("", Box::new(std::io::sink()));
        Self { other, path, pairs, nowhere, pool: BufferPool::new(), difference: Mutex::new(None) }
    }

    /// The first difference so far.
    pub(super) fn difference(&self) -> Option<(usize, u64)> {
        *self.difference.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the second of a pair is longer, its tail must be zero.
    pub(super) fn tails(&self, cancel: &CancelToken) -> Result<Option<(usize, u64)>> {
        for (index, pair) in self.pairs.iter().enumerate() {
            let mut position = pair.first.size;
            while position < pair.second.size {
                cancel.check()?;
                let end = position.saturating_add(PIECE_LEN).min(pair.second.size);
                if let Some(offset) = self.first_nonzero(pair, position..end)? {
                    return Ok(Some((index, offset)));
                }
                position = self.skip_zeros(pair, end)?;
            }
        }
        Ok(None)
    }

    /// The end of the zeros that are known to begin at `position`.
    fn skip_zeros(&self, pair: &Pair, position: u64) -> Result<u64> {
        if position >= pair.second.size {
            return Ok(position);
        }
        let extents = self.other.extents(pair.second.id, position..pair.second.size).in_file(self.path)?;
        let zeros = extents.iter().take_while(|extent| !extent.is_data());
        Ok(zeros.last().map_or(position, |extent| extent.end()))
    }

    fn found(&self, pair: usize, offset: u64) {
        let mut known = self.difference.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none_or(|known| (pair, offset) < known) {
            *known = Some((pair, offset));
        }
    }

    /// The first difference between a piece and the other image.
    fn compare(&self, pair: &Pair, piece: &Piece) -> Result<Option<u64>> {
        let common = piece.end().min(pair.second.size);
        let Some(data) = piece.data.as_deref() else {
            return if piece.start < common {
                self.first_nonzero(pair, piece.start..common)
            } else {
                Ok(None)
            };
        };
        let mut position = piece.start;
        while position < common {
            let extents = self.other.extents(pair.second.id, position..common).in_file(self.path)?;
            for extent in extents {
                // Within the piece, which is in memory.
                let ours =
                    &data[(extent.start - piece.start) as usize..(extent.end() - piece.start) as usize];
                let different = if extent.is_data() {
                    let theirs = self.read(pair, extent.range())?;
                    first_difference(ours, &theirs)
                } else {
                    first_difference_from_zero(ours)
                };
                if let Some(at) = different {
                    return Ok(Some(extent.start + at as u64));
                }
                position = extent.end();
            }
        }
        // Beyond the other's end everything must be zero.
        let beyond = (common.max(piece.start) - piece.start) as usize;
        Ok(first_difference_from_zero(&data[beyond..]).map(|at| piece.start + (beyond + at) as u64))
    }

    fn first_nonzero(&self, pair: &Pair, range: Range<u64>) -> Result<Option<u64>> {
        let mut position = range.start;
        while position < range.end {
            for extent in self.other.extents(pair.second.id, position..range.end).in_file(self.path)? {
                let mut at = extent.start;
                while extent.is_data() && at < extent.end() {
                    let end = at.saturating_add(PIECE_LEN).min(extent.end());
                    let theirs = self.read(pair, at..end)?;
                    if let Some(index) = first_difference_from_zero(&theirs) {
                        return Ok(Some(at + index as u64));
                    }
                    at = end;
                }
                position = extent.end();
            }
        }
        Ok(None)
    }

    fn read(&self, pair: &Pair, range: Range<u64>) -> Result<imgtool_toolkit::Buffer> {
        let len = usize::try_from(range.end - range.start)
            .map_err(|_| Error::limit("a piece does not fit into memory"))?;
        let mut buffer = self.pool.take(len);
        self.other
            .read_at(pair.second.id, &mut buffer, range.start)
            .in_file(self.path)
            .on_device(&pair.second.name)?;
        Ok(buffer)
    }
}

fn first_difference(ours: &[u8], theirs: &[u8]) -> Option<usize> {
    if ours == theirs {
        return None;
    }
    ours.iter().zip(theirs).position(|(a, b)| a != b)
}

fn first_difference_from_zero(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}

impl ImageSink for CompareSink<'_> {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len: PIECE_LEN,
            max_zero_len: MAX_ZERO_LEN,
            ordered: false,
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.nowhere
    }

    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        let index = piece.device.0 as usize;
        if let Some(offset) = self.compare(&self.pairs[index], &piece)? {
            self.found(index, offset);
            return Err(Error::cancelled("the contents differ"));
        }
        Ok(Prepared::taken(piece))
    }

    fn place(&self, _prepared: &Prepared, _writes: &mut WriteList) -> Result<()> {
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}
