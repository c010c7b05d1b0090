//! [`ImageSource`], an open image, and the two ways to read it.
//!
//! [`RandomAccess`] lets many threads read any part at once. [`StreamAccess`] returns the content in one
//! pass, in pieces in the order of the stream.

use std::fs::File;
use std::ops::Range;
use std::sync::Mutex;

use serde_json::Value;

use crate::bitmap::Bitmap;
use crate::buffer::{Buffer, BufferPool};
use crate::device::{Attachment, Device, DeviceId, SinkDevice};
use crate::error::{Error, Result};
use crate::extent::{Extent, ExtentKind, MapExtent, check_answer};
use crate::machine::Machine;
use crate::remedy::Remedy;
use crate::zero;

/// An open image.
pub trait ImageSource: Send + Sync {
    /// Returns the devices, the attachments and facts about the image, without reading data.
    fn info(&self) -> &ImageInfo;

    /// Returns the access to the content.
    fn access(&self) -> Access<'_>;

    /// Returns the guest ranges that salvage could not restore or verify. The list is complete after all
    /// content has been read. Waits for a pass in progress to end, so a consumer must not call it during a
    /// copy from this image.
    fn losses(&self) -> Vec<Loss> {
        Vec::new()
    }

    /// Returns the persistent bitmaps, if the caller asked for them ([`crate::OpenOptions::bitmaps`]); `None`
    /// if the format has none.
    fn bitmaps(&self) -> Option<&[Bitmap]> {
        None
    }

    /// Returns the devices that salvage can't prove complete. The list is complete after all content has been
    /// read.
    fn doubts(&self) -> Vec<Doubt> {
        Vec::new()
    }

    /// Returns notes for the user about what was read, one sentence each. The list is complete after all
    /// content has been read.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Verifies the checksums that cover more than one read, as far as all that they cover has been read. The
    /// caller reads the content first. In salvage, adds the ranges with a wrong checksum to
    /// [`ImageSource::losses`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] for a wrong checksum.
    fn verify(&self) -> Result<()> {
        Ok(())
    }

    /// Returns the fault of a damaged image that the driver opened anyway because the caller needs only facts
    /// ([`crate::OpenOptions::info_only`]).
    fn damage(&self) -> Option<&Error> {
        None
    }
}

/// Access to the content of an image.
#[derive(Debug, Clone, Copy)]
pub enum Access<'a> {
    /// Reads of any part, from many threads at once.
    Random(&'a dyn RandomAccess),
    /// One pass in the stream's order. The mutex gives the pass to one thread.
    Stream(&'a Mutex<dyn StreamAccess>),
}

impl<'a> Access<'a> {
    /// Returns the random access, if the image has it.
    pub fn random(self) -> Option<&'a dyn RandomAccess> {
        match self {
            Self::Random(random) => Some(random),
            Self::Stream(_) => None,
        }
    }

    /// True if the image can only be read in one pass.
    pub fn is_stream(self) -> bool {
        matches!(self, Self::Stream(_))
    }
}

/// Reads any part of an image, from many threads at once.
///
/// The caller must keep ranges within the device. [`crate::Disk`] and the pipeline check them, so drivers
/// need not.
pub trait RandomAccess: Send + Sync {
    /// Returns the extents of `range`: ascending, contiguous, at least one, starting at `range.start`. The
    /// answer never exceeds `range.end`, but may end before it (see
    /// [`crate::extent::MAX_EXTENTS_PER_ANSWER`]).
    ///
    /// `range` must not be empty and must be within the device.
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>>;

    /// Like [`RandomAccess::extents`], but also returns the image of the chain, and the place in its file,
    /// that each extent comes from.
    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        Ok(self.extents(device, range)?.into_iter().map(MapExtent::of).collect())
    }

    /// Like [`RandomAccess::extents`], for a caller that reads in pieces ending at multiples of `resolution`
    /// bytes: may report zeros as data if data follows before the next multiple. This is cheaper on file
    /// systems that walk over a whole run to find its end.
    fn rough_extents(&self, device: DeviceId, range: Range<u64>, _resolution: u64) -> Result<Vec<Extent>> {
        self.extents(device, range)
    }

    /// Fills `buf` with guest bytes, starting at `guest_offset`. Unallocated ranges read as zeros.
    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()>;

    /// Returns the unit, in bytes, in which reads are cheapest (a compressed cluster is decoded whole). The
    /// pipeline reads pieces of at least this length, aligned to it.
    fn read_granule(&self, _device: DeviceId) -> u64 {
        1
    }

    /// Returns the memory in bytes that a thread in [`RandomAccess::read_at`] needs besides the buffer: a
    /// decoder.
    fn reader_memory(&self, _device: DeviceId) -> u64 {
        0
    }

    /// Returns the order in which a stream of the same image delivers its content, if this is not one of
    /// `devices` after another in guest order. A sink whose layout follows the order of the pieces then makes
    /// the same bytes from a file as from a pipe.
    fn stream_order(&self, _devices: &[DeviceId]) -> Result<Option<Box<dyn StreamOrder + '_>>> {
        Ok(None)
    }

    /// Returns a file range that stores guest bytes from `range.start` on, contiguous and uncompressed, for
    /// copies inside the kernel. It may be shorter than `range`. Returns `None` if no file stores them in
    /// this form.
    fn locate(&self, _device: DeviceId, _range: Range<u64>) -> Option<FileRange<'_>> {
        None
    }
}

/// A range of a file that stores guest bytes uncompressed.
#[derive(Debug, Clone, Copy)]
pub struct FileRange<'a> {
    /// The file.
    pub file: &'a File,
    /// File offset of the first byte.
    pub file_offset: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Order of the content in a stream: see [`RandomAccess::stream_order`].
pub trait StreamOrder: Send {
    /// Returns the next part, with the same device, guest range and presence of data as the piece that
    /// [`StreamAccess::next_piece`] returns; `None` at the end.
    fn next_part(&mut self) -> Result<Option<StreamPart>>;
}

/// A part of a device, without its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamPart {
    /// The device.
    pub device: DeviceId,
    /// Guest range in bytes, never empty.
    pub guest: Range<u64>,
    /// True if the part contains data; all its bytes are zero otherwise.
    pub has_data: bool,
}

/// Reads an image in one pass.
pub trait StreamAccess: Send {
    /// Returns the next piece, or `None` when the stream has ended *and* nothing was missing. The pieces
    /// contain every byte of every device exactly once, zeros included. After `None`, every further call
    /// fails with [`second_pass`], because a second reader must not take the stream for an empty disk.
    ///
    /// # Errors
    /// If the stream is damaged, ends early or continues after the end of its content. After an error, the
    /// caller must not call it again.
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>>;

    /// True if the pieces of each device come in ascending order and without gaps, so that no piece has to be
    /// kept until its neighbours arrive.
    fn in_order(&self) -> bool {
        false
    }

    /// Returns the size in bytes of an open-ended device ([`Device::open_ended`]), after the stream has
    /// ended.
    fn final_size(&self, _device: DeviceId) -> Option<u64> {
        None
    }
}

/// Length in bytes of a sector, the unit in which machines read and write disks.
pub const SECTOR: u64 = 512;

/// A contiguous part of a device on its way from source to sink. It belongs to a device of the source
/// ([`DeviceId`]) until the pipeline routes it to a device of the sink ([`SinkPiece`]).
#[derive(Debug)]
pub struct Piece<D = DeviceId> {
    /// The device.
    pub device: D,
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in bytes, never 0.
    pub len: u64,
    /// Content, `len` bytes; `None` if all bytes are zero.
    pub data: Option<Buffer>,
    /// Ranges of `data` that may be nonzero, ascending and disjoint. The other bytes are known to be zero.
    pub runs: Vec<Range<usize>>,
}

/// A piece of a sink's device.
pub type SinkPiece = Piece<SinkDevice>;

impl<D> Piece<D> {
    /// Creates a piece of zeros.
    pub fn zero(device: D, start: u64, len: u64) -> Self {
        Self { device, start, len, data: None, runs: Vec::new() }
    }

    /// Creates a piece of data. Any of its bytes may be nonzero.
    pub fn data(device: D, start: u64, data: Buffer) -> Self {
        let len = data.len();
        Self { device, start, len: len as u64, data: Some(data), runs: std::iter::once(0..len).collect() }
    }

    /// Returns the guest offset one past the last byte.
    pub fn end(&self) -> u64 {
        self.start + self.len
    }

    /// Assigns the piece to another device.
    pub fn routed<E>(self, device: E) -> Piece<E> {
        Piece { device, start: self.start, len: self.len, data: self.data, runs: self.runs }
    }

    /// Returns the nonzero runs, in units of `granularity` bytes counted from the piece's start: ranges of
    /// `data`, ascending, disjoint and not adjacent. Only the last may end within a unit, at the piece's end.
    /// The result depends on the content alone, not on [`Piece::runs`].
    pub fn nonzero_runs(&self, granularity: usize) -> Vec<Range<usize>> {
        self.dense_runs(granularity, granularity)
    }

    /// Like [`Piece::nonzero_runs`], but tests the bytes of [`Piece::runs`] in units of `unit` bytes, a
    /// multiple of `granularity`, so zeros shorter than a unit count as data. Bytes outside the runs are
    /// still left out in units of `granularity` bytes. The result depends on the source's holes, so only a
    /// sink whose output has the same bytes with and without zeros (raw) may use it.
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

    /// Extends a piece that ends within a sector, the last one of its device, by zeros up to the end of the sector,
    /// but not beyond `limit`. An image that exists may be larger than the disk, and would keep old bytes there.
    #[must_use]
    pub fn padded_to_sector(mut self, limit: u64, pool: &BufferPool) -> Self {
        let end = self.end();
        let padded = end.checked_next_multiple_of(SECTOR).unwrap_or(end).min(limit);
        let Some(more) = padded.checked_sub(end).filter(|more| *more > 0) else { return self };
        self.len = padded - self.start;
        if let Some(data) = self.data.take() {
            // Less than a sector more.
            let mut longer = pool.take(data.len() + more as usize);
            let (front, rest) = longer.split_at_mut(data.len());
            front.copy_from_slice(&data);
            rest.fill(0);
            self.data = Some(longer);
        }
        self
    }

    /// Converts zeros into data, for sinks that store zeros like data. A piece of zeros must fit into memory:
    /// [`crate::Geometry::max_zero_len`] bounds its length.
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

/// Devices and attachments of an image, and facts about it.
#[derive(Debug, Clone, Default)]
pub struct ImageInfo {
    /// Name of the driver ("qcow2").
    pub format: &'static str,
    /// Devices, in the image's order.
    pub devices: Vec<Device>,
    /// Attachments, in the image's order.
    pub attachments: Vec<Attachment>,
    /// The machine that the image describes, if it describes one that could be understood.
    pub machine: Option<Box<Machine>>,
    /// Allocation unit in bytes, for formats that have one (`cluster-size` in the output of `info`).
    pub cluster_size: Option<u64>,
    /// Facts about the image, in the order in which the program shows them.
    pub facts: Vec<Fact>,
    /// Warnings for the user to read before relying on the content, one sentence each.
    pub notes: Vec<String>,
    /// Action that reveals missing facts, if there are any ([`Remedy::ReadAll`]).
    pub remedy: Option<Remedy>,
    /// External files that the image names. The driver opens them only if the user allows it.
    pub references: Vec<Reference>,
    /// Key and value of the fact by which the image knows its parent. A parent with another value was written to
    /// since, or is another image.
    pub parent_identifier: Option<(&'static str, Value)>,
}

impl ImageInfo {
    /// Returns the device with this ID.
    pub fn device(&self, id: DeviceId) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }

    /// Returns the only device, for formats that store exactly one. `format` names such an image in the error
    /// ("a raw image").
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if there is no device or more than one.
    pub fn single(&self, format: &str) -> Result<&Device> {
        match self.devices.as_slice() {
            [device] => Ok(device),
            devices => Err(Error::unsupported(format!("{format} stores one device, not {}", devices.len()))),
        }
    }

    /// Adds a fact that is specific to the format.
    pub fn fact(&mut self, key: &'static str, label: &'static str, value: impl Into<Value>) {
        self.facts.push(Fact { scope: FactScope::Format, key, label, value: value.into(), text: None });
    }

    /// Like [`ImageInfo::fact`], with the form of the value that people know.
    pub fn worded_fact(
        &mut self,
        key: &'static str,
        label: &'static str,
        value: impl Into<Value>,
        text: String,
    ) {
        let (scope, value, text) = (FactScope::Format, value.into(), Some(text));
        self.facts.push(Fact { scope, key, label, value, text });
    }

    /// Adds a fact that `qemu-img info` prints at the top level.
    pub fn top_fact(&mut self, key: &'static str, label: &'static str, value: impl Into<Value>) {
        self.facts.push(Fact { scope: FactScope::Image, key, label, value: value.into(), text: None });
    }
}

/// One fact about an image.
#[derive(Debug, Clone)]
pub struct Fact {
    /// Place in the JSON document.
    pub scope: FactScope,
    /// Key in JSON: the same as in `qemu-img info` for a fact of the same meaning.
    pub key: &'static str,
    /// Name for the user.
    pub label: &'static str,
    /// Value.
    pub value: Value,
    /// Value for people, if they know it in another form than programs.
    pub text: Option<String>,
}

/// Place of a fact in the JSON document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FactScope {
    /// At the top level.
    Image,
    /// Under `format-specific.data`.
    Format,
}

/// An external file that an image names.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Role of the file: "backing file", "data file", "parent".
    pub role: &'static str,
    /// Name stored in the image; untrusted.
    pub name: String,
    /// Format stored in the image, if any; untrusted.
    pub format: Option<String>,
}

/// A device that can't be proven complete although no range of it is known to be lost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubt {
    /// The device.
    pub device: DeviceId,
    /// Reason, for the user.
    pub reason: String,
}

/// Kind of damage to a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum LossClass {
    /// Its content is gone: the range reads as zeros.
    Lost,
    /// It was restored, but may be wrong.
    Unverified,
    /// The image has nothing for it, though what should hold it is intact: the program that wrote the image
    /// left it out. The range reads as zeros.
    NeverStored,
}

impl LossClass {
    /// Returns the name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost",
            Self::Unverified => "unverified",
            Self::NeverStored => "never stored",
        }
    }
}

/// A guest range that salvage could not restore and filled with zeros, or that it restored from unverified
/// data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loss {
    /// Kind of the damage.
    pub class: LossClass,
    /// Position of the damage in the image, in bytes, if known. If the file is compressed, the position is
    /// that in the decompressed data.
    pub offset: Option<u64>,
    /// Position of the damage in the compressed file, if the file is compressed and the position is known:
    /// that which the decoder had reached, or the start of the damaged frame.
    pub compressed_offset: Option<u64>,
    /// The device.
    pub device: DeviceId,
    /// Guest range in bytes. An empty range at the end of a device means that the device as a whole can't be
    /// proven complete.
    pub guest: Range<u64>,
    /// Reason, for the user.
    pub reason: String,
}

/// Returns the error for a second pass over a stream.
pub fn second_pass() -> Error {
    Error::usage("the stream has been read already").hint("open it again, or save it to a file first")
}

/// Calls `visit` for every extent of `range`, in order, and checks the driver's answers.
///
/// # Errors
/// Any error of [`RandomAccess::extents`] or `visit`; [`crate::ErrorKind::Malformed`] if the driver's answer
/// is invalid.
pub fn for_each_extent(
    random: &dyn RandomAccess,
    device: DeviceId,
    range: Range<u64>,
    mut visit: impl FnMut(Extent) -> Result<()>,
) -> Result<()> {
    let mut position = range.start;
    while position < range.end {
        for extent in check_answer(random.extents(device, position..range.end)?, position..range.end)? {
            position = extent.end();
            visit(extent)?;
        }
    }
    Ok(())
}

/// Returns the number of bytes in a device's data extents; 0 for a stream, whose extents are unknown.
///
/// # Errors
/// Same as [`RandomAccess::extents`].
pub fn data_bytes(source: &dyn ImageSource, device: &Device) -> Result<u64> {
    let Some(random) = source.access().random() else { return Ok(0) };
    let mut bytes = 0;
    for_each_extent(random, device.id, 0..device.size, |extent| {
        bytes += if extent.is_data() { extent.len } else { 0 };
        Ok(())
    })?;
    Ok(bytes)
}

/// Returns a list with one extent of `kind` that covers `range`, for drivers and tests.
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
    fn dense_runs_keep_short_zeros_but_not_source_holes() {
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
    fn zeros_as_data_form_one_run() {
        let pool = BufferPool::new();
        let piece = Piece::zero(DeviceId(0), 512, 1000).with_zeros_as_data(&pool);
        assert_eq!(piece.data.as_deref(), Some(&[0; 1000][..]));
        assert_eq!((piece.runs.len(), &piece.runs[0]), (1, &(0..1000)));
    }
}
