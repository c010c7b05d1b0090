//! Opened archives, and the three ways to read them.
//!
//! A file is indexed for random access. A stream, or a file too scattered for the index, is read in one pass
//! ([`crate::stream`]). Salvage reads a damaged archive in a different kind of pass ([`crate::salvage`]).

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Device, DeviceId, Doubt, Error, Extent, ExtentKind, ExtentList, FileRange, ImageInfo,
    ImageSource, Input, Loss, Memory, OpenOptions, Piece, RandomAccess, RandomInput, Remedy, Result,
    ResultExt, StreamAccess, StreamOrder,
};

use crate::bytes::FileCursor;
use crate::header::ArchiveHeader;
use crate::index::{DeviceIndex, Index, MAX_RUNS, Run};
use crate::info;
use crate::layout::{CLUSTER, CLUSTERS_PER_EXTENT, SUB_BLOCK};
use crate::mask_cache::{ExtentMap, MaskCache};
use crate::salvage::Salvage;
use crate::stream::{ArchiveOrder, ArchiveStream};

/// An opened archive.
pub struct VmaSource {
    header: Arc<ArchiveHeader>,
    info: ImageInfo,
    /// The first fault of the archive, if it was opened for information only.
    damage: Option<Error>,
    body: Body,
}

impl fmt::Debug for VmaSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VmaSource").field("info", &self.info).finish_non_exhaustive()
    }
}

/// Access to the content, which depends on how the archive was opened.
enum Body {
    /// Opened for information only.
    InfoOnly(Mutex<NoContent>),
    Indexed(IndexedArchive),
    Stream(Mutex<ArchiveStream>),
    Salvage(Mutex<Salvage>),
}

impl VmaSource {
    /// Opens an archive, for random access if `input` is a file that is not too scattered, otherwise for one
    /// pass.
    ///
    /// # Errors
    /// Fails if the archive header is invalid. For a file it also fails if an extent header is invalid
    /// or a cluster is missing; if the options ask for information only, [`ImageSource::damage`]
    /// returns that error instead.
    pub fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        Self::open_limited(input, options, MAX_RUNS)
    }

    /// Like [`VmaSource::open`], but allows at most `max_runs` runs in the index.
    fn open_limited(input: Input, options: &OpenOptions, max_runs: usize) -> Result<Self> {
        if options.salvage {
            let (header, salvage) = Salvage::open(input, &options.memory)?;
            return Ok(Self::new(header, Body::Salvage(Mutex::new(salvage))));
        }
        if options.info_only {
            return Self::open_info_only(input, options);
        }
        if input.is_stream() {
            let mut stream = input.into_stream()?;
            let header = Arc::new(ArchiveHeader::read_from(&mut stream)?);
            let body = Body::Stream(Mutex::new(ArchiveStream::new(stream, &header, options)?));
            return Ok(Self::new(header, body));
        }
        let input = input.into_random()?;
        let header = Arc::new(ArchiveHeader::read_from(&mut FileCursor::new(input.clone()))?);
        match Index::build(&input, &header, options, max_runs)? {
            Some(index) => {
                let masks = MaskCache::new(*header.uuid.as_bytes());
                let archive = IndexedArchive {
                    header: Arc::clone(&header),
                    input,
                    index,
                    masks,
                    ignore_trailing: options.ignore_trailing,
                    memory: options.memory.clone(),
                };
                Ok(Self::new(header, Body::Indexed(archive)))
            }
            None => {
                let mut stream = FileCursor::new(input).into_stream()?;
                let header = Arc::new(ArchiveHeader::read_from(&mut stream)?);
                let body = Body::Stream(Mutex::new(ArchiveStream::new(stream, &header, options)?));
                Ok(Self::new(header, body))
            }
        }
    }

    /// Opens an archive for information only: counts the clusters of a file, or of a stream that ends within
    /// [`OpenOptions::info_stream_len`] bytes.
    fn open_info_only(input: Input, options: &OpenOptions) -> Result<Self> {
        let location = input.location().clone();
        let (header, counted) = if input.is_stream() {
            let mut stream = input.into_stream()?;
            let header = Arc::new(ArchiveHeader::read_from(&mut stream)?);
            let counted = Index::count(stream, &header, options, options.info_stream_len);
            (header, counted)
        } else {
            let mut cursor = FileCursor::new(input.into_random()?);
            let header = Arc::new(ArchiveHeader::read_from(&mut cursor)?);
            let counted = Index::count(cursor, &header, options, u64::MAX);
            (header, counted)
        };
        let (index, damage) = match counted {
            Ok(index) => (index, None),
            Err(error) => (None, Some(error.path(location))),
        };
        let mut info = info::info(&header, index.as_ref());
        if index.is_none() && damage.is_none() {
            info.notes.push(info::not_counted(options.info_stream_len));
            info.remedy = Some(Remedy::ReadAll);
        }
        Ok(Self { header, info, damage, body: Body::InfoOnly(Mutex::new(NoContent)) })
    }

    fn new(header: Arc<ArchiveHeader>, body: Body) -> Self {
        let index = match &body {
            Body::Indexed(archive) => Some(&archive.index),
            _ => None,
        };
        let info = info::info(&header, index);
        Self { header, info, damage: None, body }
    }

    /// Returns the archive's header.
    pub fn header(&self) -> &ArchiveHeader {
        &self.header
    }

    /// Returns the unstored ends of guest state, which read as zeros: the device and the guest range. The
    /// list is complete after all content has been read. Like [`ImageSource::losses`], it waits for a pass in
    /// progress.
    pub fn short_states(&self) -> Vec<(DeviceId, Range<u64>)> {
        match &self.body {
            Body::Indexed(archive) => archive.index.short_states.clone(),
            Body::Stream(stream) => lock(stream).short_states().to_vec(),
            Body::InfoOnly(_) | Body::Salvage(_) => Vec::new(),
        }
    }
}

impl ImageSource for VmaSource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        match &self.body {
            Body::InfoOnly(no_content) => Access::Stream(no_content),
            Body::Indexed(archive) => Access::Random(archive),
            Body::Stream(stream) => Access::Stream(stream),
            Body::Salvage(salvage) => Access::Stream(salvage),
        }
    }

    fn losses(&self) -> Vec<Loss> {
        match &self.body {
            Body::Salvage(salvage) => lock(salvage).losses(),
            _ => Vec::new(),
        }
    }

    fn doubts(&self) -> Vec<Doubt> {
        match &self.body {
            Body::Salvage(salvage) => lock(salvage).doubts(),
            _ => Vec::new(),
        }
    }

    fn damage(&self) -> Option<&Error> {
        self.damage.as_ref()
    }

    fn notes(&self) -> Vec<String> {
        let short = self.short_states();
        short.iter().map(|(device, guest)| info::short_state(&self.header, *device, guest)).collect()
    }
}

/// Placeholder for the content of an archive opened for information only; every read fails.
struct NoContent;

impl StreamAccess for NoContent {
    fn next_piece(&mut self, _pool: &BufferPool) -> Result<Option<Piece>> {
        Err(Error::usage("the archive was opened for information only, without its content"))
    }
}

/// Random access to an archive in a file.
struct IndexedArchive {
    header: Arc<ArchiveHeader>,
    input: RandomInput,
    index: Index,
    masks: MaskCache,
    /// True if bytes after a complete archive are allowed.
    ignore_trailing: bool,
    /// Ledger from which a second pass over the extent headers borrows.
    memory: Memory,
}

/// A part of a device within one run of the index.
struct RunSlice<'a> {
    run: &'a Run,
    /// Guest range of the part.
    guest: Range<u64>,
}

impl RunSlice<'_> {
    /// Returns the guest offset at which the whole run begins.
    fn run_start(&self) -> u64 {
        u64::from(self.run.first) * CLUSTER
    }

    /// Returns the range of sub-blocks that the slice touches, counted from the run's first cluster.
    fn blocks(&self) -> Range<u64> {
        let base = self.run_start();
        (self.guest.start - base) / SUB_BLOCK..(self.guest.end - base).div_ceil(SUB_BLOCK)
    }
}

/// A device of an indexed archive.
struct IndexedDevice<'a> {
    archive: &'a IndexedArchive,
    device: &'a Device,
    index: &'a DeviceIndex,
}

impl IndexedArchive {
    fn device(&self, id: DeviceId) -> Result<IndexedDevice<'_>> {
        let found = self.header.ids.index_of(id).and_then(|index| {
            let (device, index) = (self.header.devices.get(index)?, self.index.devices.get(index)?);
            Some(IndexedDevice { archive: self, device, index })
        });
        found.ok_or_else(|| Error::usage(format!("the archive has no device {id}")))
    }
}

impl<'a> IndexedDevice<'a> {
    /// Returns the part of the guest range `range` that is within the run of its first byte.
    fn run_slice(&self, range: Range<u64>) -> Result<RunSlice<'a>> {
        let Some(run) = self.index.run_of(range.start / CLUSTER) else {
            return Err(Error::out_of_bounds(format!(
                "the range begins past the end of the device of {} bytes",
                self.device.size
            ))
            .device(&self.device.name)
            .guest(range));
        };
        Ok(RunSlice { run, guest: range.start..range.end.min(run.end() * CLUSTER) })
    }

    /// Returns the map of the extent that contains `run`, which must not be a zero run.
    fn extent_map(&self, run: &Run) -> Result<Arc<ExtentMap>> {
        let IndexedArchive { input, index, masks, .. } = self.archive;
        masks.extent(input, run, self.device.id, index.extent_offset(run))
    }

    /// Calls `each` for every stretch of a slice, with its guest range and, if it is stored, its file
    /// offset.
    fn stretches(
        &self,
        slice: &RunSlice<'_>,
        mut each: impl FnMut(Range<u64>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        if slice.run.is_zero() {
            return each(slice.guest.clone(), None);
        }
        let map = self.extent_map(slice.run)?;
        let base = slice.run_start();
        for stretch in map.stretches(slice.run, slice.blocks()) {
            let start = base + stretch.blocks.start * SUB_BLOCK;
            let end = base + stretch.blocks.end * SUB_BLOCK;
            let clipped = start.max(slice.guest.start)..end.min(slice.guest.end);
            let file_offset = stretch.file_offset.map(|offset| offset + (clipped.start - start));
            each(clipped, file_offset)?;
        }
        Ok(())
    }
}

impl RandomAccess for IndexedArchive {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let device = self.device(device)?;
        let mut extents = ExtentList::new();
        let mut position = range.start;
        while position < range.end && !extents.is_full() {
            let slice = device.run_slice(position..range.end)?;
            let collected = device.stretches(&slice, |guest, file_offset| {
                let kind = if file_offset.is_some() { ExtentKind::Data } else { ExtentKind::Zero };
                extents.push(guest.start, guest.end - guest.start, kind);
                Ok(())
            });
            collected.on_device(&device.device.name)?;
            position = slice.guest.end;
        }
        Ok(extents.into_vec())
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let device = self.device(device)?;
        let end = guest_offset.saturating_add(buf.len() as u64);
        let mut position = guest_offset;
        while position < end {
            let slice = device.run_slice(position..end)?;
            let read = device.stretches(&slice, |guest, file_offset| {
                let within = (guest.start - guest_offset) as usize..(guest.end - guest_offset) as usize;
                match file_offset {
                    Some(offset) => self.input.read_exact_at(&mut buf[within], offset),
                    None => {
                        buf[within].fill(0);
                        Ok(())
                    }
                }
            });
            read.map_err(|e| e.device(&device.device.name).guest(position..slice.guest.end))?;
            position = slice.guest.end;
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        // Reading through a decoder is cheap only in large units, so ask for a whole extent at a time.
        if self.input.granule() > 1 { CLUSTER * CLUSTERS_PER_EXTENT as u64 } else { CLUSTER }
    }

    fn stream_order(&self, devices: &[DeviceId]) -> Result<Option<Box<dyn StreamOrder + '_>>> {
        if self.index.is_sequential(devices) {
            return Ok(None);
        }
        let (ignore_trailing, memory) = (self.ignore_trailing, self.memory.clone());
        let options = OpenOptions { ignore_trailing, memory, ..OpenOptions::default() };
        Ok(Some(Box::new(ArchiveOrder::new(&self.input, &self.header, &options)?)))
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        let file = self.input.file()?;
        let device = self.device(device).ok()?;
        let slice = device.run_slice(range).ok().filter(|slice| !slice.run.is_zero())?;
        let map = device.extent_map(slice.run).ok()?;
        let base = slice.run_start();
        let first = map.stretches(slice.run, slice.blocks()).into_iter().next()?;
        let within = slice.guest.start - (base + first.blocks.start * SUB_BLOCK);
        let end = (base + first.blocks.end * SUB_BLOCK).min(slice.guest.end);
        Some(FileRange { file, file_offset: first.file_offset? + within, len: end - slice.guest.start })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use imgtool_core::Memory;
    use imgtool_storage::Opening;
    use imgtool_testing::vma::{ArchiveBuilder, Slot, guest_content, slot};

    use super::*;

    const SIZE: u64 = 200 * CLUSTER;

    fn open_file(path: &Path) -> Input {
        imgtool_storage::open::open(&path.into(), Opening::Plain, &Memory::default()).expect("open").input
    }

    fn random(source: &VmaSource) -> &dyn RandomAccess {
        source.access().random().expect("indexed")
    }

    /// Returns the slots of an archive, and the archive. No cluster is next to its successor; a third are
    /// zero.
    fn scattered() -> (Vec<Slot>, Input) {
        let slots: Vec<Slot> = (0..200)
            .map(|cluster| slot(1, cluster * 7 % 200, if cluster % 3 == 0 { 0 } else { 0x0ff1 }))
            .collect();
        let archive = ArchiveBuilder::new().device(1, "a", SIZE).extents(&slots, 59).build();
        let file = tempfile::NamedTempFile::new().expect("tempfile");
        std::fs::write(file.path(), archive).expect("write");
        (slots, open_file(file.path()))
    }

    #[test]
    fn reads_in_one_pass_above_the_run_limit() {
        let (slots, input) = scattered();
        let source = VmaSource::open_limited(input, &OpenOptions::default(), 100).expect("open");
        let Access::Stream(stream) = source.access() else { panic!("read in one pass") };
        let mut whole = vec![0; usize::try_from(SIZE).expect("small")];
        let pool = BufferPool::new();
        while let Some(piece) = lock(stream).next_piece(&pool).expect("sound") {
            if let Some(data) = &piece.data {
                let start = usize::try_from(piece.start).expect("small");
                whole[start..start + data.len()].copy_from_slice(data);
            }
        }
        assert!(whole == guest_content(1, SIZE, &slots));
    }

    #[test]
    fn locate_finds_stored_runs_in_the_file() {
        let (slots, input) = scattered();
        let source = VmaSource::open(input, &OpenOptions::default()).expect("open");
        let truth = guest_content(1, SIZE, &slots);
        let device = DeviceId(1);
        let mut located = 0;
        for start in (0..SIZE).step_by(5000) {
            let Some(found) = random(&source).locate(device, start..SIZE) else {
                assert_eq!(truth[start as usize], 0);
                continue;
            };
            let mut bytes = vec![0; usize::try_from(found.len).expect("small")];
            std::os::unix::fs::FileExt::read_exact_at(found.file, &mut bytes, found.file_offset)
                .expect("read");
            assert!(truth[start as usize..].starts_with(&bytes), "at {start}");
            located += 1;
        }
        assert!(located > 100);
    }

    #[test]
    fn detects_an_extent_header_that_changed_after_opening() {
        let slots = [slot(1, 0, 1), slot(1, 1, 1)];
        let archive = ArchiveBuilder::new().device(1, "a", 2 * CLUSTER).extents(&slots, 59).build();
        let file = tempfile::NamedTempFile::new().expect("tempfile");
        std::fs::write(file.path(), &archive).expect("write");
        let source = VmaSource::open(open_file(file.path()), &OpenOptions::default()).expect("open");
        let mut changed = archive;
        changed[12_800 + 47] ^= 1;
        std::fs::write(file.path(), changed).expect("write");
        let error = random(&source).read_at(DeviceId(1), &mut [0; 10], 0).expect_err("changed");
        assert_eq!(error.message(), "the extent header changed while the archive was being read");
        assert_eq!((error.device_name(), error.file_offset()), (Some("a"), Some(12_800)));
    }
}
