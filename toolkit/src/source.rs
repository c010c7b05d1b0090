//! Sources: images that are read.
//!
//! A source is either *random* (many threads read any part at once) or *sequential* (one pass,
//! pieces in the order in which the stream brings them). Both must give the same bytes.

use std::fs::File;
use std::ops::Range;

use serde_json::Value;

use crate::buffer::{Buffer, BufferPool};
use crate::device::{Attachment, Device, DeviceId};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentKind, MapExtent};
use crate::zero;

/// An opened image.
pub trait ImageSource: Send + Sync {
    /// What the image holds; known after opening, without reading data.
    fn info(&self) -> &ImageInfo;

    /// How its content is read.
    fn access(&mut self) -> Access<'_>;

    /// The random half of [`ImageSource::access`] without `&mut`; `None` for a stream.
    fn random(&self) -> Option<&dyn RandomAccess>;

    /// What was lost, when it was opened for salvage: complete once all content has been read.
    fn losses(&self) -> Vec<Loss> {
        Vec::new()
    }

    /// What can't be relied on of a device as a whole, when it was opened for salvage: complete once all
    /// content has been read.
    fn doubts(&self) -> Vec<Doubt> {
        Vec::new()
    }

    /// What is wrong with an image that could be opened all the same, because only facts were
    /// wanted ([`crate::OpenOptions::info_only`]).
    fn damage(&self) -> Option<&Error> {
        None
    }
}

/// The two ways to read an image.
pub enum Access<'a> {
    /// Any part, by many threads at once.
    Random(&'a dyn RandomAccess),
    /// One pass in the stream's order.
    Sequential(&'a mut dyn SequentialAccess),
}

/// Reading any part of an image through a shared reference.
pub trait RandomAccess: Sync {
    /// The extents of `range`: ascending, contiguous, at least one, the first starts at
    /// `range.start`. The answer may stop before `range.end` (see
    /// [`crate::extent::MAX_EXTENTS_PER_ANSWER`]) and never goes beyond it.
    ///
    /// `range` is not empty and lies within the device.
    ///
    /// # Errors
    /// When the image's tables can't be read or contradict themselves.
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>>;

    /// The same for `imgtool map`, with what a person or script wants to know beyond: which image of
    /// a chain, where in its file. Under the rules of [`RandomAccess::extents`].
    ///
    /// # Errors
    /// Those of [`RandomAccess::extents`].
    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        Ok(self.extents(device, range)?.into_iter().map(MapExtent::of).collect())
    }

    /// [`RandomAccess::extents`] for somebody who reads in pieces that end at multiples of
    /// `resolution`: may call a part data that reads as zeros, if there is data too before the
    /// next multiple. For file systems that walk over all of the data to find its end.
    ///
    /// # Errors
    /// Those of [`RandomAccess::extents`].
    fn rough_extents(&self, device: DeviceId, range: Range<u64>, _resolution: u64) -> Result<Vec<Extent>> {
        self.extents(device, range)
    }

    /// Fills `buf` with the guest's bytes from `guest_offset`; zeros for what is not allocated.
    ///
    /// # Errors
    /// When the range leaves the device or can't be read in full.
    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()>;

    /// Reads cost least in multiples of this many bytes (a compressed cluster is decoded whole).
    /// The pipeline reads pieces of at least this length, aligned to it.
    fn read_granule(&self, _device: DeviceId) -> u64 {
        1
    }

    /// Where the bytes at `range.start` stand in a file as they are (not compressed, not in need
    /// of assembling), and for how long: for copies inside the kernel. `None`: nowhere.
    fn locate(&self, _device: DeviceId, _range: Range<u64>) -> Option<FileRange<'_>> {
        None
    }
}

/// A part of a file that holds guest bytes as they are.
#[derive(Debug, Clone, Copy)]
pub struct FileRange<'a> {
    /// The file.
    pub file: &'a File,
    /// Offset in the file, bytes.
    pub file_offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Reading an image in one pass.
pub trait SequentialAccess: Send {
    /// The next piece, or `None` when the stream has ended *and* everything that must be there was
    /// there. Every byte of every device is handed out exactly once, zeros included.
    ///
    /// # Errors
    /// When the stream is damaged, ends early or goes on after its end.
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>>;

    /// The size of a device that was open-ended ([`Device::open_ended`]), after the end.
    fn final_size(&self, _device: DeviceId) -> Option<u64> {
        None
    }
}

/// A contiguous part of a device on its way from source to sink.
#[derive(Debug)]
pub struct Piece {
    /// The device.
    pub device: DeviceId,
    /// First guest byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// The content, `len` bytes; `None`: all zero.
    pub data: Option<Buffer>,
    /// The parts of `data` that may hold something, ascending and disjoint; the rest of `data` is
    /// zero and known to be.
    pub runs: Vec<Range<usize>>,
}

impl Piece {
    /// Zeros.
    pub fn zero(device: DeviceId, start: u64, len: u64) -> Self {
        Self { device, start, len, data: None, runs: Vec::new() }
    }

    /// Data; all of it may hold something.
    pub fn data(device: DeviceId, start: u64, data: Buffer) -> Self {
        let len = data.len();
        Self { device, start, len: len as u64, data: Some(data), runs: std::iter::once(0..len).collect() }
    }

    /// One past the last guest byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// The runs that hold something, in units of `granularity` bytes counted from the piece's
    /// start: ranges of `data`, ascending, disjoint and not adjacent. The last may end with the
    /// piece.
    pub fn nonzero_runs(&self, granularity: usize) -> Vec<Range<usize>> {
        self.dense_runs(granularity, granularity)
    }

    /// The same with zeros told apart in units of `unit` bytes, a multiple of `granularity`, within
    /// [`Piece::runs`] only: what is known to be zero without looking stays outside, to `granularity`
    /// bytes.
    pub fn dense_runs(&self, granularity: usize, unit: usize) -> Vec<Range<usize>> {
        let mut found: Vec<Range<usize>> = Vec::new();
        let Some(data) = &self.data else { return found };
        let mut looked_at = 0;
        for run in &self.runs {
            let start = (run.start / granularity * granularity).max(looked_at);
            let end = run.end.div_ceil(granularity).saturating_mul(granularity).min(data.len());
            if start < end {
                zero::push_nonzero_runs(data, start..end, unit, &mut found);
                looked_at = end;
            }
        }
        found
    }

    /// The same piece with its zeros as bytes: for sinks that store zeros like data. A piece of zeros
    /// must be short enough for memory (see [`crate::Geometry::max_zero_len`]).
    #[must_use]
    pub fn with_zeros_as_data(mut self, pool: &BufferPool) -> Self {
        let len = usize::try_from(self.len).unwrap_or(usize::MAX);
        if self.data.is_none() {
            let mut zeros = pool.take(len);
            zeros.fill(0);
            self.data = Some(zeros);
        }
        self.runs = std::iter::once(0..len).collect();
        self
    }
}

/// What an image holds.
#[derive(Debug, Clone, Default)]
pub struct ImageInfo {
    /// The driver's name ("qcow2").
    pub format: &'static str,
    /// The devices, in the image's order.
    pub devices: Vec<Device>,
    /// The blobs that travel with them.
    pub attachments: Vec<Attachment>,
    /// The allocation unit in bytes, for formats that have one (`cluster-size` of `info`).
    pub cluster_size: Option<u64>,
    /// What else there is to know, in the order in which a person reads it.
    pub facts: Vec<Fact>,
    /// What a person should know before relying on the content: one sentence each.
    pub notes: Vec<String>,
    /// Files outside the image that it names: shown by `info`, opened only where allowed.
    pub references: Vec<Reference>,
}

impl ImageInfo {
    /// The device with this id.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }

    /// Adds a fact about the format.
    pub fn fact(&mut self, key: &'static str, label: &'static str, value: impl Into<Value>) {
        self.facts.push(Fact { scope: FactScope::Format, key, label, value: value.into() });
    }

    /// Adds a fact that `qemu-img info` prints at the top level.
    pub fn top_fact(&mut self, key: &'static str, label: &'static str, value: impl Into<Value>) {
        self.facts.push(Fact { scope: FactScope::Image, key, label, value: value.into() });
    }
}

/// One thing that `info` prints.
#[derive(Debug, Clone)]
pub struct Fact {
    /// Where it stands in JSON.
    pub scope: FactScope,
    /// Its JSON name; qemu-img's where it means the same.
    pub key: &'static str,
    /// Its name for a person.
    pub label: &'static str,
    /// Its value.
    pub value: Value,
}

/// Where a fact stands in the JSON of `info`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactScope {
    /// At the top level.
    Image,
    /// Under `format-specific.data`.
    Format,
}

/// A file outside the image that the image names.
#[derive(Debug, Clone)]
pub struct Reference {
    /// What it is to the image: "backing file", "data file", "parent".
    pub role: &'static str,
    /// The name as the image gives it; not trusted.
    pub name: String,
    /// The format as the image gives it.
    pub format: Option<String>,
}

/// A device of which no range is known to be lost, and which can't pass for whole all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    /// The device.
    pub device: DeviceId,
    /// Why, for a person.
    pub reason: String,
}

/// A guest range that salvage could not restore and filled with zeros, or restored from something that
/// may be wrong, as the reason then says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// The device.
    pub device: DeviceId,
    /// The guest range, bytes; not empty.
    pub guest: Range<u64>,
    /// Why, for a person.
    pub reason: String,
}

/// Bytes of a device's data extents; 0 where they are not known, as in a stream.
///
/// # Errors
/// Those of reading the extents.
pub fn data_bytes(source: &dyn ImageSource, device: &Device) -> Result<u64> {
    let Some(random) = source.random() else { return Ok(0) };
    let (mut bytes, mut position) = (0, 0);
    while position < device.size {
        for extent in random.extents(device.id, position..device.size)? {
            position = extent.end();
            bytes += if extent.is_data() { extent.len } else { 0 };
        }
    }
    Ok(bytes)
}

/// The extents of a device that is all of one kind: a building block for drivers and tests.
pub fn uniform_extent(range: Range<u64>, kind: ExtentKind) -> Vec<Extent> {
    vec![Extent { start: range.start, len: range.end - range.start, kind }]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nonzero_runs_align_outward_and_join() {
        let pool = BufferPool::new();
        let mut buffer = pool.take(4096 * 4 + 10);
        buffer.fill(0);
        buffer[600] = 1;
        buffer[4096 * 2 + 1] = 1;
        buffer[4096 * 4 + 9] = 1;
        let mut piece = Piece::data(DeviceId(0), 0, buffer);
        piece.runs = vec![512..1024, 2048..4096, 4096 * 2..4096 * 4 + 10];
        assert_eq!(piece.nonzero_runs(4096), [0..4096, 8192..12288, 16384..16394]);
    }

    #[test]
    fn zeros_shorter_than_the_unit_are_kept_but_not_what_the_source_left_out() {
        let pool = BufferPool::new();
        let mut buffer = pool.take(4096 * 16);
        buffer.fill(0);
        buffer[0] = 1;
        buffer[4096 * 9] = 1;
        let mut piece = Piece::data(DeviceId(0), 0, buffer);
        assert_eq!(piece.dense_runs(4096, 4096 * 4), [0..4096 * 4, 4096 * 8..4096 * 12]);
        piece.runs = vec![0..4096 * 2, 4096 * 9..4096 * 10 + 1];
        assert_eq!(piece.dense_runs(4096, 4096 * 4), [0..4096 * 2, 4096 * 9..4096 * 11]);
    }

    #[test]
    fn zeros_as_data_are_all_one_run() {
        let pool = BufferPool::new();
        let piece = Piece::zero(DeviceId(0), 512, 1000).with_zeros_as_data(&pool);
        assert_eq!(piece.data.as_deref(), Some(&[0; 1000][..]));
        assert_eq!((piece.runs.len(), &piece.runs[0]), (1, &(0..1000)));
    }
}
