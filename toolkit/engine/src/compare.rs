//! Comparison of the guest content of two images.
//!
//! The pipeline copies one image into a consumer that compares each piece with the same part of the other.
//! Ranges that are known to be zero in both images are not read.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::zero::is_zero;
use imgtool_core::{
    Buffer, BufferPool, CancelToken, Consumer, Device, Disk, Error, Geometry, Lane, Location, Memory,
    Prepared, RandomAccess, Result, ResultExt, SinkDevice, SinkPiece,
};

use crate::monitor::{Counter, Monitor, Phase, Reach};
use crate::open::Opened;
use crate::pipeline::{self, Job, Route, Target};
use crate::survey::SurveyedDevice;
use crate::work::{Gauge, LaneInfo, Part};

mod differences;

pub use differences::Differences;
use differences::Tally;

/// Length in bytes of a piece. Our choice: the pieces of both images fit into the cache of one core.
const PIECE_LEN: u64 = 256 * 1024;

/// Maximum length in bytes of a piece of zeros. Our limit: short enough to share among threads, and to cancel
/// quickly.
const MAX_ZERO_LEN: u64 = 1 << 30;

/// Two devices to compare.
#[derive(Debug, Clone)]
pub struct DevicePair {
    /// Name of the first device.
    pub name: String,
    /// Device of the first image.
    pub first: Device,
    /// Device of the second image.
    pub second: Device,
}

impl DevicePair {
    fn swapped(&self) -> Self {
        Self { name: self.name.clone(), first: self.second.clone(), second: self.first.clone() }
    }
}

/// Result of pairing the devices of two images.
#[derive(Debug, Clone)]
pub enum Pairing {
    /// Every selected device has a partner.
    Pairs(Vec<DevicePair>),
    /// This device is only in the image at this location.
    Missing(Device, Location),
}

/// Pairs the devices of two images by name, or regardless of names if there is one device on each side. If
/// `names` is not empty, pairs only these devices of the first image.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a name that no device has.
pub fn pair_devices(first: &Opened, second: &Opened, names: &[String]) -> Result<Pairing> {
    let a = first.select(names)?;
    let b = second.image.info().devices.clone();
    if let ([a], [b]) = (a.as_slice(), b.as_slice()) {
        let pair = DevicePair { name: a.name.clone(), first: a.clone(), second: b.clone() };
        return Ok(Pairing::Pairs(vec![pair]));
    }
    let mut left: Vec<Option<Device>> = b.into_iter().map(Some).collect();
    let mut pairs = Vec::new();
    for device in a {
        let same = left.iter_mut().find(|other| other.as_ref().is_some_and(|o| o.name == device.name));
        match same.and_then(Option::take) {
            Some(other) => pairs.push(DevicePair { name: device.name.clone(), first: device, second: other }),
            None => return Ok(Pairing::Missing(device, first.location.clone())),
        }
    }
    match left.into_iter().flatten().next() {
        Some(device) if names.is_empty() => Ok(Pairing::Missing(device, second.location.clone())),
        _ => Ok(Pairing::Pairs(pairs)),
    }
}

/// Settings of a comparison.
#[derive(Debug, Clone, Copy)]
pub struct CompareRun<'a> {
    /// Number of worker threads; 0 for one per processor.
    pub threads: usize,
    /// Display of the progress.
    pub monitor: &'a dyn Monitor,
    /// Token that cancels the comparison.
    pub cancel: &'a CancelToken,
    /// Ledger from which the comparison borrows.
    pub memory: &'a Memory,
}

/// Returns all differences in content, for each pair. Otherwise like [`first_difference`].
///
/// # Errors
/// Same as [`first_difference`].
pub fn differences(
    first: &Opened,
    second: &Opened,
    pairs: &[DevicePair],
    run: CompareRun<'_>,
) -> Result<Vec<Differences>> {
    let tally = Tally::new(pairs.len());
    let CompareRun { threads, monitor, cancel, memory } = run;
    if second.image.access().is_stream() {
        let pairs: Vec<DevicePair> = pairs.iter().map(DevicePair::swapped).collect();
        compare(second, first, &pairs, Some(&tally), threads, monitor, cancel, memory)?;
    } else {
        compare(first, second, pairs, Some(&tally), threads, monitor, cancel, memory)?;
    }
    Ok(tally.finish())
}

/// Returns the index of the pair and the guest offset of the first difference in content, if any. One of the
/// images may be a stream. The comparison borrows from `memory`. If the devices of a pair differ in size, the
/// tail of the longer one must be zero.
///
/// # Errors
/// If an image can't be read, or both are streams.
pub fn first_difference(
    first: &Opened,
    second: &Opened,
    pairs: &[DevicePair],
    threads: usize,
    monitor: &dyn Monitor,
    cancel: &CancelToken,
    memory: &Memory,
) -> Result<Option<(usize, u64)>> {
    if second.image.access().is_stream() {
        let pairs: Vec<DevicePair> = pairs.iter().map(DevicePair::swapped).collect();
        return compare(second, first, &pairs, None, threads, monitor, cancel, memory);
    }
    compare(first, second, pairs, None, threads, monitor, cancel, memory)
}

/// Compares `stepped`, which the pipeline reads, with `other`, which needs random access. With a tally,
/// counts all differences, and returns none.
#[expect(clippy::too_many_arguments, reason = "the arguments of the two functions above")]
fn compare(
    stepped: &Opened,
    other: &Opened,
    pairs: &[DevicePair],
    tally: Option<&Tally>,
    threads: usize,
    monitor: &dyn Monitor,
    cancel: &CancelToken,
    memory: &Memory,
) -> Result<Option<(usize, u64)>> {
    monitor.opened(&Reach::default());
    let lanes =
        pairs.iter().map(|pair| LaneInfo { name: pair.name.clone(), total: Some(pair.first.size) }).collect();
    let copied: Vec<_> = (0..).map(Lane).zip(pairs.iter().map(|pair| pair.first.id)).collect();
    let part = Part::new(&*stepped.image, &copied, stepped.consumed.clone(), stepped.stored_len, false);
    let gauge = Gauge::new(lanes, vec![part], Box::new(|| 0));
    let counter = Counter::begin(monitor, Phase::Compare, gauge, None);
    counter.survey(surveyed(stepped, other, pairs));
    let comparer = Comparer::new(other, pairs, tally, cancel.child(), &counter)?;
    let route = |(number, pair): (u32, &DevicePair)| Route {
        from: pair.first.id,
        target: 0,
        to: SinkDevice(number),
        lane: Lane(number),
    };
    let job = Job {
        targets: vec![Target::Consumer(&comparer)],
        routes: (0..).zip(pairs).map(route).collect(),
        taps: Vec::new(),
        threads: stepped.workers(threads).max(other.workers(threads)),
        progress: &counter,
        cancel: comparer.cancel.clone(),
        memory: memory.clone(),
    };
    let copied = pipeline::copy(&*stepped.image, &job).in_file(&stepped.location);
    let found = match (comparer.difference(), copied) {
        (Some(found), _) => Some(found),
        (None, Err(error)) => return Err(error),
        (None, Ok(_)) => {
            let found = comparer.tails(cancel)?;
            if found.is_none() {
                other.image.verify().in_file(&other.location)?;
            }
            found
        }
    };
    counter.end_part();
    monitor.end();
    Ok(found)
}

/// Returns the devices whose data a comparison reads: of each pair, both.
fn surveyed(stepped: &Opened, other: &Opened, pairs: &[DevicePair]) -> Vec<SurveyedDevice> {
    let of_pair = |(lane, pair): (Lane, &DevicePair)| {
        let resolution =
            |random: &dyn RandomAccess| pipeline::piece_len(PIECE_LEN, random.read_granule(pair.first.id));
        let resolution = stepped.image.access().random().map(resolution);
        let device = |image: &Opened, device: &Device, resolution| SurveyedDevice {
            lane,
            image: Arc::clone(&image.image),
            device: device.id,
            size: device.size,
            resolution,
        };
        [device(stepped, &pair.first, resolution), device(other, &pair.second, None)]
    };
    (0..).map(Lane).zip(pairs).flat_map(of_pair).collect()
}

/// Consumer that compares each piece with the same part of another image.
struct Comparer<'a> {
    disks: Vec<Disk>,
    location: &'a Location,
    pairs: &'a [DevicePair],
    pool: BufferPool,
    /// First difference: index of the pair and guest offset. A piece with a difference ends the copy, but
    /// workers finish all earlier pieces, so an earlier difference replaces this one.
    difference: Mutex<Option<(usize, u64)>>,
    /// Collector of all differences, unless the first one suffices.
    tally: Option<&'a Tally>,
    /// Ends the copy after a difference.
    cancel: CancelToken,
    counter: &'a Counter<'a>,
}

impl<'a> Comparer<'a> {
    /// Compares with the second device of each pair in `other`.
    fn new(
        other: &'a Opened,
        pairs: &'a [DevicePair],
        tally: Option<&'a Tally>,
        cancel: CancelToken,
        counter: &'a Counter<'a>,
    ) -> Result<Self> {
        let disk =
            |pair: &DevicePair| Disk::new(other.image.clone(), pair.second.id).in_file(&other.location);
        let disks = pairs.iter().map(disk).collect::<Result<_>>()?;
        let (pool, difference) = (BufferPool::new(), Mutex::new(None));
        Ok(Self { disks, location: &other.location, pairs, pool, difference, tally, cancel, counter })
    }

    fn difference(&self) -> Option<(usize, u64)> {
        *lock(&self.difference)
    }

    /// Finds the first nonzero byte in a second device beyond the end of the first device of its pair.
    fn tails(&self, cancel: &CancelToken) -> Result<Option<(usize, u64)>> {
        for (index, pair) in self.pairs.iter().enumerate() {
            let mut position = pair.first.size;
            while position < pair.second.size {
                cancel.check()?;
                let end = position.saturating_add(PIECE_LEN).min(pair.second.size);
                if let Some(tally) = self.tally {
                    tally.add(index, &self.all_in(index, position..end, None)?);
                } else if let Some(offset) = self.first_nonzero(index, position..end)? {
                    return Ok(Some((index, offset)));
                }
                position = self.skip_zeros(index, end)?;
            }
        }
        Ok(None)
    }

    /// Returns the guest offset at which the known zeros from `position` on end.
    fn skip_zeros(&self, pair: usize, position: u64) -> Result<u64> {
        let disk = &self.disks[pair];
        if position >= disk.size() {
            return Ok(position);
        }
        let extents = disk.extents(position..disk.size()).in_file(self.location)?;
        let zeros = extents.iter().take_while(|extent| !extent.is_data());
        Ok(zeros.last().map_or(position, |extent| extent.end()))
    }

    fn found(&self, pair: usize, offset: u64) {
        let mut known = lock(&self.difference);
        if known.is_none_or(|known| (pair, offset) < known) {
            *known = Some((pair, offset));
        }
    }

    /// Returns the guest offset of the first difference between a piece and the other image.
    fn compare(&self, pair: usize, piece: &SinkPiece) -> Result<Option<u64>> {
        let common = piece.end().min(self.disks[pair].size());
        let Some(data) = piece.data.as_deref() else {
            return if piece.start < common {
                self.first_nonzero(pair, piece.start..common)
            } else {
                Ok(None)
            };
        };
        let mut position = piece.start;
        while position < common {
            let extents = self.disks[pair].extents(position..common).in_file(self.location)?;
            for extent in extents {
                // The extent is within a piece in memory, so it fits a usize.
                let ours =
                    &data[(extent.start - piece.start) as usize..(extent.end() - piece.start) as usize];
                let different = if extent.is_data() {
                    let theirs = self.read(pair, extent.range())?;
                    first_mismatch(ours, &theirs)
                } else {
                    first_nonzero_byte(ours)
                };
                if let Some(at) = different {
                    return Ok(Some(extent.start + at as u64));
                }
                position = extent.end();
            }
        }
        // Beyond the end of the other device, all bytes must be zero.
        let beyond = (common.max(piece.start) - piece.start) as usize;
        Ok(first_nonzero_byte(&data[beyond..]).map(|at| piece.start + (beyond + at) as u64))
    }

    /// Returns all differences between `ours`, the content of a range, and the other image. `None` is zeros.
    fn all_in(&self, pair: usize, range: Range<u64>, ours: Option<&[u8]>) -> Result<Differences> {
        let mut found = Differences::default();
        let common = range.end.min(self.disks[pair].size());
        let part = |from: u64, to: u64| {
            // The range is within a piece in memory, so it fits a usize.
            ours.map(|ours| &ours[(from - range.start) as usize..(to - range.start) as usize])
        };
        let mut position = range.start;
        while position < common {
            for extent in self.disks[pair].extents(position..common).in_file(self.location)? {
                let mut at = extent.start;
                while at < extent.end() {
                    let end = at.saturating_add(PIECE_LEN).min(extent.end());
                    let theirs = extent.is_data().then(|| self.read(pair, at..end)).transpose()?;
                    found.compare(at, part(at, end), theirs.as_deref());
                    at = if ours.is_none() && theirs.is_none() { extent.end() } else { end };
                }
                position = extent.end();
            }
        }
        let beyond = common.max(range.start);
        found.compare(beyond, part(beyond, range.end), None);
        Ok(found)
    }

    fn first_nonzero(&self, pair: usize, range: Range<u64>) -> Result<Option<u64>> {
        let mut position = range.start;
        while position < range.end {
            for extent in self.disks[pair].extents(position..range.end).in_file(self.location)? {
                let mut at = extent.start;
                while extent.is_data() && at < extent.end() {
                    let end = at.saturating_add(PIECE_LEN).min(extent.end());
                    let theirs = self.read(pair, at..end)?;
                    if let Some(index) = first_nonzero_byte(&theirs) {
                        return Ok(Some(at + index as u64));
                    }
                    at = end;
                }
                position = extent.end();
            }
        }
        Ok(None)
    }

    fn read(&self, pair: usize, range: Range<u64>) -> Result<Buffer> {
        let len = usize::try_from(range.end - range.start)
            .map_err(|_| Error::limit("a piece does not fit into memory"))?;
        let mut buffer = self.pool.take(len);
        self.disks[pair]
            .read_at(&mut buffer, range.start)
            .in_file(self.location)
            .on_device(&self.pairs[pair].second.name)?;
        self.counter.read_beside(pair, len as u64);
        Ok(buffer)
    }
}

fn first_mismatch(ours: &[u8], theirs: &[u8]) -> Option<usize> {
    if ours == theirs {
        return None;
    }
    ours.iter().zip(theirs).position(|(a, b)| a != b)
}

fn first_nonzero_byte(bytes: &[u8]) -> Option<usize> {
    if is_zero(bytes) { None } else { bytes.iter().position(|byte| *byte != 0) }
}

impl Consumer for Comparer<'_> {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len: PIECE_LEN,
            max_zero_len: MAX_ZERO_LEN,
            ordered: false,
        }
    }

    fn worker_memory(&self) -> u64 {
        let reader = self.disks.iter().map(Disk::reader_memory).max().unwrap_or(0);
        // The other disk is read in the pieces of the first.
        self.disks.iter().map(Disk::read_granule).fold(PIECE_LEN, u64::max) + reader
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        let index = piece.device.index();
        if let Some(tally) = self.tally {
            tally.add(index, &self.all_in(index, piece.start..piece.end(), piece.data.as_deref())?);
        } else if let Some(offset) = self.compare(index, &piece)? {
            self.found(index, offset);
            self.cancel.cancel();
        }
        Ok(Prepared::consumed(piece))
    }

    fn resize(&self, _device: SinkDevice, _size: u64) -> Result<()> {
        Ok(())
    }
}
