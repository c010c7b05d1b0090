//! [`LayeredSource`], a reader of images that map runs of guest bytes to places in files, possibly on top of
//! a parent image.
//!
//! A driver implements [`SegmentMap`], the lookup of one run. The source derives everything else from it:
//! extents, the map, reads, places for block sharing, the content of the parent, and the losses of a salvage.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::device::DeviceId;
use crate::disk::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::extent::{
    Extent, ExtentKind, ExtentList, MAX_EXTENTS_PER_ANSWER, MapExtent, MapPlace, push_map_extent,
};
use crate::input::{FileRun, RandomInput};
use crate::location::Location;
use crate::losses::Losses;
use crate::remedy::Remedy;
use crate::source::{Access, Doubt, FileRange, ImageInfo, ImageSource, Loss, RandomAccess};

/// A run of guest bytes with one origin. The caller knows its guest offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Length in bytes, never 0.
    pub len: u64,
    /// Origin of all bytes.
    pub origin: Origin,
}

/// Origin of guest bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Stored as they are.
    File {
        /// Index of the file; see [`SegmentMap::file`].
        index: usize,
        /// File offset of the first byte.
        file_offset: u64,
    },
    /// Stored in a compressed form that [`SegmentMap::read_encoded`] decodes.
    Encoded,
    /// Stored encrypted; [`SegmentMap::read_encoded`] decrypts it.
    Encrypted,
    /// Explicit zeros, which hide the parent.
    Zero,
    /// Zeros, because nothing is stored and there is no parent.
    Hole,
    /// The parent, at the same guest offset.
    Parent,
}

/// The lookup of guest ranges in one image, without its parent.
pub trait SegmentMap: Send + Sync {
    /// Looks up the segment at `guest_offset`, at most `max_len` bytes of it. The caller keeps the range
    /// within the disk.
    ///
    /// # Errors
    /// If the tables of the image can't be read or are not valid. The error contains the guest range.
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment>;

    /// Returns the number of bytes from `guest_offset` to the end of its allocation unit, at most `max_len`:
    /// the range that is lost in a salvage if [`SegmentMap::segment`] fails.
    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64;

    /// Returns the file of an [`Origin::File`]. File 0 is the image's own.
    fn file(&self, index: usize) -> &dyn StoredBytes;

    /// Fills `buf` with the content of an [`Origin::Encoded`] or [`Origin::Encrypted`] segment, from `guest_offset`
    /// on. The range is within the segment.
    ///
    /// # Errors
    /// If the content can't be read or decoded; [`crate::ErrorKind::Unsupported`] by default, for formats
    /// that store no such segments.
    fn read_encoded(&self, _buf: &mut [u8], _guest_offset: u64) -> Result<()> {
        Err(Error::unsupported("the format stores no encoded data"))
    }

    /// Verifies the checksums that cover more than one unit, as far as all that they cover has been read. Calls
    /// `failed` with the guest range of each wrong one, which salvage lists as unverified; an error of `failed`
    /// ends the verification.
    ///
    /// # Errors
    /// Any error of `failed`.
    fn verify(&self, _failed: &mut dyn FnMut(Range<u64>, Error) -> Result<()>) -> Result<()> {
        Ok(())
    }

    /// Returns the reason why a salvage can't prove what it has read so far, if there is one.
    fn doubt(&self) -> Option<String> {
        None
    }

    /// Returns the unit, in bytes, in which reads are cheapest.
    fn read_granule(&self) -> u64 {
        self.file(0).granule()
    }

    /// Returns the memory in bytes that a thread needs for a read besides its buffer: a decoder.
    fn reader_memory(&self) -> u64 {
        0
    }
}

/// Checks that `file` contains the `used` bytes at `file_offset` that the disk uses of a unit ("cluster").
///
/// # Errors
/// [`crate::ErrorKind::Corrupt`] if the file ends before them.
pub fn check_stored(file: &RandomInput, unit: &str, file_offset: u64, used: u64) -> Result<()> {
    if file_offset.checked_add(used).is_some_and(|end| end <= file.len()) {
        return Ok(());
    }
    Err(Error::corrupt(format!(
        "the {unit} needs {used} bytes at {file_offset}, but the file ends at {}",
        file.len()
    ))
    .at(file_offset)
    .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())))
}

/// The bytes of a file that stores guest data.
pub trait StoredBytes: Send + Sync {
    /// Returns the location, for messages and for the map.
    fn location(&self) -> &Location;

    /// Fills `buf` with the bytes starting at `file_offset`.
    ///
    /// # Errors
    /// If the file ends early or can't be read.
    fn read_exact_at(&self, buf: &mut [u8], file_offset: u64) -> Result<()>;

    /// Like [`StoredBytes::read_exact_at`], but fills `buf` with zeros where a read fails. Calls `lost` with each
    /// range of `buf` that could not be read, and with the error; see [`RandomInput::read_salvage`].
    fn read_salvage(&self, buf: &mut [u8], file_offset: u64, lost: &mut dyn FnMut(Range<usize>, Error));

    /// Returns the run of data or hole that contains `file_offset`, which must be less than the length.
    ///
    /// # Errors
    /// If the file system can't tell.
    fn run(&self, file_offset: u64) -> Result<FileRun>;

    /// Like [`StoredBytes::run`], but possibly ended at `until`; see [`crate::ReadAt::rough_run`].
    ///
    /// # Errors
    /// Same as [`StoredBytes::run`].
    fn rough_run(&self, file_offset: u64, until: u64) -> Result<FileRun>;

    /// Returns the range as a range of the underlying file, if that file stores exactly these bytes.
    fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>>;

    /// Returns the unit, in bytes, in which reads are cheapest.
    fn granule(&self) -> u64;
}

impl StoredBytes for RandomInput {
    fn location(&self) -> &Location {
        self.location()
    }

    fn read_exact_at(&self, buf: &mut [u8], file_offset: u64) -> Result<()> {
        self.read_exact_at(buf, file_offset)
    }

    fn read_salvage(&self, buf: &mut [u8], file_offset: u64, lost: &mut dyn FnMut(Range<usize>, Error)) {
        self.read_salvage(buf, file_offset, lost);
    }

    fn run(&self, file_offset: u64) -> Result<FileRun> {
        self.run(file_offset)
    }

    fn rough_run(&self, file_offset: u64, until: u64) -> Result<FileRun> {
        self.rough_run(file_offset, until)
    }

    fn locate(&self, range: Range<u64>) -> Option<FileRange<'_>> {
        let file = self.file().filter(|_| range.end <= self.len())?;
        Some(FileRange { file, file_offset: range.start, len: range.end - range.start })
    }

    fn granule(&self) -> u64 {
        self.granule()
    }
}

/// An open image with one disk, read through a [`SegmentMap`] and its parent.
pub struct LayeredSource<M> {
    info: ImageInfo,
    map: M,
    parent: Option<Disk>,
    losses: Option<Losses>,
    /// Reason why a salvage can't prove the content complete.
    doubt: Option<String>,
    /// Fault of an image that was opened for information only.
    damage: Option<Error>,
}

impl<M> fmt::Debug for LayeredSource<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayeredSource").field("info", &self.info).finish_non_exhaustive()
    }
}

impl<M: SegmentMap> LayeredSource<M> {
    /// Combines the lookup of an image with its parent. `info` describes the image's only disk.
    ///
    /// `parent` is `None` if the image has no parent or was opened for information only. A parent may be
    /// smaller than the disk: its content past its end counts as zeros. With `salvage`, a range that can't be
    /// read is filled with zeros and recorded as a loss.
    pub fn new(info: ImageInfo, map: M, parent: Option<Disk>, salvage: bool) -> Self {
        Self { info, map, parent, losses: salvage.then(Losses::default), doubt: None, damage: None }
    }

    /// Adds the reason why a salvage can't prove the content complete, if there is one.
    #[must_use]
    pub fn doubted(self, doubt: Option<String>) -> Self {
        Self { doubt, ..self }
    }

    /// Adds the fault of an image that is open only for information; see [`ImageSource::damage`].
    #[must_use]
    pub fn damaged(self, damage: Option<Error>) -> Self {
        Self { damage, ..self }
    }

    fn device(&self) -> DeviceId {
        self.info.devices.first().map_or(DeviceId(0), |device| device.id)
    }

    fn parent(&self) -> Result<&Disk> {
        self.parent.as_ref().ok_or_else(|| {
            Error::unsupported("the parent is not open: the image was opened for information only")
                .path(self.map.file(0).location())
        })
    }

    /// Fills `buf` with the content of the segment at `guest_offset`, which is as long as `buf`.
    fn read_segment(&self, buf: &mut [u8], guest_offset: u64, origin: Origin) -> Result<()> {
        match origin {
            Origin::File { index, file_offset } => self.map.file(index).read_exact_at(buf, file_offset),
            Origin::Encoded | Origin::Encrypted => self.map.read_encoded(buf, guest_offset),
            Origin::Zero | Origin::Hole => {
                buf.fill(0);
                Ok(())
            }
            Origin::Parent => {
                let parent = self.parent()?;
                let in_parent = parent.size().saturating_sub(guest_offset).min(buf.len() as u64);
                let (from_parent, past_end) = buf.split_at_mut(in_parent as usize);
                past_end.fill(0);
                if from_parent.is_empty() {
                    return Ok(());
                }
                parent.read_at(from_parent, guest_offset)
            }
        }
    }

    /// Fills `part`, whose read has failed, with what can still be read of it, and with zeros. `origin` is `None`
    /// for a range without a valid segment.
    fn salvage_part(
        &self,
        part: &mut [u8],
        guest_offset: u64,
        origin: Option<Origin>,
        error: &Error,
        losses: &Losses,
    ) {
        if let Some(Origin::File { index, file_offset }) = origin {
            // A sector that can't be read takes no other with it.
            return self.map.file(index).read_salvage(part, file_offset, &mut |lost, error| {
                losses.add(guest_offset + lost.start as u64..guest_offset + lost.end as u64, &error);
            });
        }
        part.fill(0);
        let len = part.len() as u64;
        let rest = self.info.devices.first().map_or(len, |device| device.size.saturating_sub(guest_offset));
        let is_encoded = origin == Some(Origin::Encoded);
        let lost = if is_encoded { self.map.to_unit_end(guest_offset, rest) } else { len };
        losses.add(guest_offset..guest_offset + lost, error);
    }

    /// Lists the extents of `range`, exactly or for a caller that reads in pieces of `resolution` bytes. In
    /// salvage, records a range without a valid segment as lost and lists it as zeros, so that no caller reads
    /// it: a small table can claim terabytes.
    fn list_extents(&self, range: Range<u64>, resolution: Option<u64>) -> Result<Vec<Extent>> {
        let mut extents = ExtentList::new();
        let mut at = range.start;
        while at < range.end && !extents.is_full() {
            let max_len = range.end - at;
            let Segment { len, origin } = match self.map.segment(at, max_len) {
                Ok(segment) => segment,
                Err(error) => {
                    let Some(losses) = &self.losses else { return Err(error) };
                    let len = self.map.to_unit_end(at, max_len);
                    losses.add(at..at + len, &error);
                    Segment { len, origin: Origin::Zero }
                }
            };
            at = match origin {
                Origin::File { index, file_offset } => {
                    self.push_file_runs(&mut extents, at..at + len, (index, file_offset), resolution)?
                }
                Origin::Parent => self.push_parent_extents(&mut extents, at..at + len, resolution)?,
                Origin::Encoded | Origin::Encrypted => push(&mut extents, at, len, ExtentKind::Data),
                Origin::Zero => push(&mut extents, at, len, ExtentKind::Zero),
                Origin::Hole => push(&mut extents, at, len, ExtentKind::Hole),
            };
        }
        Ok(extents.into_vec())
    }

    /// Adds the runs of data and holes of `guest`, stored in a file from an offset on, until the list is
    /// full. Returns the guest offset of their end.
    fn push_file_runs(
        &self,
        extents: &mut ExtentList,
        guest: Range<u64>,
        (index, file_offset): (usize, u64),
        resolution: Option<u64>,
    ) -> Result<u64> {
        let file = self.map.file(index);
        let mut at = guest.start;
        while at < guest.end && !extents.is_full() {
            let run_at = file_offset + (at - guest.start);
            let run = match resolution {
                Some(resolution) => {
                    file.rough_run(run_at, run_at.saturating_add(resolution - at % resolution))?
                }
                None => file.run(run_at)?,
            };
            let len = run.end.saturating_sub(run_at).clamp(1, guest.end - at);
            at = push(extents, at, len, if run.is_data { ExtentKind::Data } else { ExtentKind::Zero });
        }
        Ok(at)
    }

    /// Adds the parent's extents of `guest`, as many as the parent lists in one answer. Returns the guest
    /// offset of their end.
    fn push_parent_extents(
        &self,
        extents: &mut ExtentList,
        guest: Range<u64>,
        resolution: Option<u64>,
    ) -> Result<u64> {
        let parent = self.parent()?;
        let mut at = guest.start;
        if at >= parent.size() {
            return Ok(push(extents, at, guest.end - at, ExtentKind::Hole));
        }
        let in_parent = at..guest.end.min(parent.size());
        let parent_extents = match resolution {
            Some(resolution) => parent.rough_extents(in_parent, resolution)?,
            None => parent.extents(in_parent)?,
        };
        for extent in parent_extents {
            at = push(extents, at, extent.len, extent.kind);
        }
        Ok(at)
    }

    /// Maps a segment to its runs.
    fn map_segment(&self, start: u64, Segment { len, origin }: Segment) -> Result<Vec<MapExtent>> {
        let uniform = |kind| MapExtent::of(Extent { start, len, kind });
        Ok(match origin {
            Origin::Zero => vec![uniform(ExtentKind::Zero)],
            Origin::Hole => vec![uniform(ExtentKind::Hole)],
            Origin::Encoded => vec![MapExtent { compressed: true, ..uniform(ExtentKind::Data) }],
            Origin::Encrypted => vec![uniform(ExtentKind::Data)],
            Origin::File { index, file_offset } => self.map_file(start..start + len, index, file_offset)?,
            Origin::Parent => self.map_parent(start, len)?,
        })
    }

    /// Maps a segment stored in a file to its runs of data and holes.
    fn map_file(&self, guest: Range<u64>, index: usize, file_offset: u64) -> Result<Vec<MapExtent>> {
        let file = Arc::new(self.map.file(index).location().clone());
        let start = guest.start;
        let mut extents = ExtentList::new();
        self.push_file_runs(&mut extents, guest, (index, file_offset), None)?;
        let describe = |extent: Extent| MapExtent {
            data: true,
            place: Some(MapPlace {
                file: Arc::clone(&file),
                file_offset: file_offset + (extent.start - start),
            }),
            ..MapExtent::of(extent)
        };
        Ok(extents.into_vec().into_iter().map(describe).collect())
    }

    /// Maps a segment of the parent, one level deeper in the chain.
    fn map_parent(&self, start: u64, len: u64) -> Result<Vec<MapExtent>> {
        let parent = self.parent()?;
        if start >= parent.size() {
            return Ok(vec![MapExtent::of(Extent { start, len, kind: ExtentKind::Hole })]);
        }
        let runs = parent.map(start..(start + len).min(parent.size()))?;
        Ok(runs.into_iter().map(|run| MapExtent { depth: run.depth + 1, ..run }).collect())
    }
}

impl<M: SegmentMap> ImageSource for LayeredSource<M> {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        let mut losses = self.losses.as_ref().map(|losses| losses.list(self.device())).unwrap_or_default();
        if let Some(parent) = &self.parent {
            losses.extend(parent.image().losses());
        }
        losses
    }

    fn damage(&self) -> Option<&Error> {
        self.damage.as_ref()
    }

    fn doubts(&self) -> Vec<Doubt> {
        let mut doubts = self.parent.as_ref().map_or_else(Vec::new, |parent| parent.image().doubts());
        let reasons = [self.doubt.clone(), self.map.doubt()].into_iter().flatten();
        doubts.extend(reasons.map(|reason| Doubt { device: self.device(), reason }));
        doubts
    }

    fn verify(&self) -> Result<()> {
        if let Some(parent) = &self.parent {
            parent.image().verify()?;
        }
        self.map.verify(&mut |guest, error| match &self.losses {
            Some(losses) if error.kind() != ErrorKind::Cancelled => {
                losses.add_unverified(guest, &error);
                Ok(())
            }
            _ => Err(error.guest(guest)),
        })
    }
}

impl<M: SegmentMap> RandomAccess for LayeredSource<M> {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.list_extents(range, None)
    }

    fn rough_extents(&self, _device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.list_extents(range, Some(resolution.max(1)))
    }

    fn map(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        let mut list = Vec::new();
        let mut at = range.start;
        while at < range.end && list.len() < MAX_EXTENTS_PER_ANSWER {
            let max_len = range.end - at;
            let segment = match (self.map.segment(at, max_len), &self.losses) {
                (Err(error), Some(losses)) => {
                    let len = self.map.to_unit_end(at, max_len);
                    losses.add(at..at + len, &error);
                    Segment { len, origin: Origin::Zero }
                }
                (segment, _) => segment?,
            };
            for run in self.map_segment(at, segment)? {
                at = run.end();
                push_map_extent(&mut list, run);
            }
        }
        Ok(list)
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            let at = guest_offset + filled as u64;
            let max_len = (buf.len() - filled) as u64;
            let segment = self.map.segment(at, max_len);
            let len = match &segment {
                // A run of encoded units is read as a whole, but each of them can be lost alone.
                Ok(Segment { len, origin: Origin::Encoded | Origin::Encrypted }) if self.losses.is_some() => {
                    self.map.to_unit_end(at, max_len).min(*len)
                }
                Ok(segment) => segment.len.min(max_len),
                Err(_) => self.map.to_unit_end(at, max_len),
            };
            // `len` is at most `max_len`, the length of the rest of `buf`.
            let part = &mut buf[filled..][..len as usize];
            filled += part.len();
            // What is known to be lost is not tried again: a long unit would be decoded for every part of it.
            if self.losses.as_ref().is_some_and(|losses| losses.cover(&(at..at + len))) {
                part.fill(0);
                continue;
            }
            let origin = segment.as_ref().ok().map(|segment| segment.origin);
            if let Err(error) = segment.and_then(|segment| self.read_segment(part, at, segment.origin)) {
                let error = error.guest(at..at + len);
                let Some(losses) = &self.losses else { return Err(error) };
                self.salvage_part(part, at, origin, &error, losses);
            }
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        self.map.read_granule()
    }

    fn reader_memory(&self, _device: DeviceId) -> u64 {
        self.map.reader_memory().max(self.parent.as_ref().map_or(0, Disk::reader_memory))
    }

    fn locate(&self, _device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        match self.map.segment(range.start, range.end - range.start).ok()? {
            Segment { len, origin: Origin::File { index, file_offset } } => {
                self.map.file(index).locate(file_offset..file_offset.checked_add(len)?)
            }
            _ => None,
        }
    }
}

/// Adds an extent. Returns the guest offset of its end.
fn push(extents: &mut ExtentList, start: u64, len: u64, kind: ExtentKind) -> u64 {
    extents.push(start, len, kind);
    start + len
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::device::Device;
    use crate::input::{Input, ReadAt};

    const PAGE: u64 = 4096;
    const DISK_SIZE: u64 = 16 * PAGE;

    /// A medium that can't read some pages.
    struct Medium {
        bad_pages: &'static [u64],
    }

    fn byte_at(position: u64) -> u8 {
        (position % 251) as u8 + 1
    }

    impl ReadAt for Medium {
        fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
            let pages = position / PAGE..(position + buf.len() as u64).div_ceil(PAGE);
            if self.bad_pages.iter().any(|page| pages.contains(page)) {
                return Err(io::Error::other("the medium is broken"));
            }
            buf.iter_mut().zip(position..).for_each(|(byte, position)| *byte = byte_at(position));
            Ok(())
        }

        fn len(&self) -> u64 {
            2 * DISK_SIZE
        }
    }

    /// A disk that is one segment, stored from [`DISK_SIZE`] on.
    struct OneSegment(RandomInput);

    impl SegmentMap for OneSegment {
        fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
            let origin = Origin::File { index: 0, file_offset: DISK_SIZE + guest_offset };
            Ok(Segment { len: max_len, origin })
        }

        fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
            (DISK_SIZE - guest_offset).min(max_len)
        }

        fn file(&self, _index: usize) -> &dyn StoredBytes {
            &self.0
        }
    }

    fn disk(bad_pages: &'static [u64], salvage: bool) -> LayeredSource<OneSegment> {
        let input =
            Input::from_read_at("disk", Arc::new(Medium { bad_pages })).into_random().expect("random");
        let info = ImageInfo { devices: vec![Device::disk(0, "disk", DISK_SIZE)], ..ImageInfo::default() };
        LayeredSource::new(info, OneSegment(input), None, salvage)
    }

    #[test]
    fn a_bad_sector_loses_nothing_else() {
        let bad_pages = &[16 + 3, 16 + 9, 16 + 10];
        let mut buf = vec![0xee; (DISK_SIZE - 100) as usize];
        assert!(disk(bad_pages, false).read_at(DeviceId(0), &mut buf, 100).is_err());
        let source = disk(bad_pages, true);
        // A second read adds nothing to the list.
        for _ in 0..2 {
            source.read_at(DeviceId(0), &mut buf, 100).expect("read");
            for (byte, guest) in buf.iter().zip(100..) {
                let is_lost = [3, 9, 10].contains(&(guest / PAGE));
                assert_eq!(*byte, if is_lost { 0 } else { byte_at(DISK_SIZE + guest) }, "{guest}");
            }
            let losses = source.losses();
            let lost: Vec<_> =
                losses.iter().map(|loss| loss.guest.start / PAGE..loss.guest.end / PAGE).collect();
            assert_eq!(lost, [3..4, 9..11]);
            assert!(losses[0].reason.contains("the medium is broken"), "{losses:?}");
        }
    }
}
