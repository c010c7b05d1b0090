//! Opened archives, and the three ways to read them.
//!
//! A file is indexed and read at random. A stream, or a file too scattered for the index, is read in
//! one pass ([`crate::stream`]). Salvage of a damaged archive is another kind of pass
//! ([`crate::salvage`]).

use std::ops::Range;
use std::sync::Arc;

use imgtool_toolkit::{
    Access, BufferPool, DeviceId, Doubt, Error, Extent, ExtentKind, ExtentList, FileRange, ImageInfo,
    ImageSource, Input, Loss, OpenOptions, Piece, RandomAccess, RandomInput, Result, SequentialAccess,
};

use crate::bytes::FileCursor;
use crate::header::ArchiveHeader;
use crate::index::{Index, MAX_RUNS, Run};
use crate::info;
use crate::layout::{CLUSTER, CLUSTERS_PER_EXTENT, SUB_BLOCK};
use crate::mask_cache::MaskCache;
use crate::salvage::Salvage;
use crate::stream::ArchiveStream;

/// An opened archive.
pub struct VmaSource {
    header: Arc<ArchiveHeader>,
    info: ImageInfo,
    /// The first fault, if the archive was opened for information only.
    damage: Option<Error>,
    body: Body,
}

/// Access to the content, by the way the archive was opened.
enum Body {
    /// Opened for information only.
    InfoOnly(NoContent),
    Indexed(Box<IndexedArchive>),
    Stream(Box<ArchiveStream>),
    Salvage(Box<Salvage>),
}

impl VmaSource {
    /// Opens an archive: with an index if `input` is a file, else for one pass.
    ///
    /// # Errors
    /// Fails if the archive header is invalid. For a file it also fails if an extent header is invalid
    /// or a cluster is missing; if the options ask for information only, [`ImageSource::damage`]
    /// returns that error instead.
    pub fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        Self::open_limited(input, options, MAX_RUNS)
    }

    /// Like [`VmaSource::open`], with the most runs that the index may have.
    fn open_limited(input: Input, options: &OpenOptions, max_runs: usize) -> Result<Self> {
        if options.salvage {
            let (header, salvage) = Salvage::open(input)?;
            return Ok(Self::new(header, Body::Salvage(Box::new(salvage))));
        }
        if options.info_only {
            return Self::open_info_only(input, options);
        }
        if input.is_stream() {
            let mut stream = input.into_stream()?;
            let header = Arc::new(ArchiveHeader::read_from(&mut stream)?);
            let body = Body::Stream(Box::new(ArchiveStream::new(stream, &header, options)));
            return Ok(Self::new(header, body));
        }
        let input = input.into_random()?;
        let header = Arc::new(ArchiveHeader::read_from(&mut FileCursor::new(input.clone()))?);
        match Index::build(&input, &header, options, max_runs)? {
            Some(index) => {
                let masks = MaskCache::new(*header.uuid.as_bytes());
                let body = Body::Indexed(Box::new(IndexedArchive {
                    header: Arc::clone(&header),
                    input,
                    index,
                    masks,
                }));
                Ok(Self::new(header, body))
            }
            None => {
                let mut stream = FileCursor::new(input).into_stream()?;
                let header = Arc::new(ArchiveHeader::read_from(&mut stream)?);
                let body = Body::Stream(Box::new(ArchiveStream::new(stream, &header, options)));
                Ok(Self::new(header, body))
            }
        }
    }

    /// Opens an archive for information only: counts what all extents of a file hold, or those of a stream
    /// up to [`OpenOptions::info_stream_len`].
    fn open_info_only(input: Input, options: &OpenOptions) -> Result<Self> {
        let path = input.path().to_owned();
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
            Err(error) => (None, Some(error.path(&path))),
        };
        let mut info = info::info(&header, index.as_ref());
        if index.is_none() && damage.is_none() {
            info.notes.push(info::not_counted(options.info_stream_len));
        }
        Ok(Self { header, info, damage, body: Body::InfoOnly(NoContent) })
    }

    fn new(header: Arc<ArchiveHeader>, body: Body) -> Self {
        let index = match &body {
            Body::Indexed(archive) => Some(&archive.index),
            _ => None,
        };
        let info = info::info(&header, index);
        Self { header, info, damage: None, body }
    }

    /// The archive's header.
    pub fn header(&self) -> &ArchiveHeader {
        &self.header
    }
}

impl ImageSource for VmaSource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        match &mut self.body {
            Body::InfoOnly(no_content) => Access::Sequential(no_content),
            Body::Indexed(archive) => Access::Random(&**archive),
            Body::Stream(stream) => Access::Sequential(&mut **stream),
            Body::Salvage(salvage) => Access::Sequential(&mut **salvage),
        }
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        match &self.body {
            Body::Indexed(archive) => Some(&**archive),
            _ => None,
        }
    }

    fn losses(&self) -> Vec<Loss> {
        match &self.body {
            Body::Salvage(salvage) => salvage.losses(),
            _ => Vec::new(),
        }
    }

    fn doubts(&self) -> Vec<Doubt> {
        match &self.body {
            Body::Salvage(salvage) => salvage.doubts(),
            _ => Vec::new(),
        }
    }

    fn damage(&self) -> Option<&Error> {
        self.damage.as_ref()
    }
}

/// Stands in for the content of an archive opened for information only; every read fails.
struct NoContent;

impl SequentialAccess for NoContent {
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
}

/// A part of a device within one run of the index.
struct RunSlice<'a> {
    run: &'a Run,
    /// Guest bytes of the device.
    guest: Range<u64>,
}

impl RunSlice<'_> {
    /// First guest byte of the whole run.
    fn run_start(&self) -> u64 {
        u64::from(self.run.first) * CLUSTER
    }

    /// Sub-blocks that the slice touches, counted from the run's first cluster.
    fn blocks(&self) -> Range<u64> {
        let base = self.run_start();
        (self.guest.start - base) / SUB_BLOCK..(self.guest.end - base).div_ceil(SUB_BLOCK)
    }
}

impl IndexedArchive {
    /// The part of `range`, guest bytes, that lies in the run of its first byte.
    fn run_slice(&self, device: DeviceId, range: Range<u64>) -> Result<RunSlice<'_>> {
        let run = self.index.device(device).and_then(|index| index.run_of(range.start / CLUSTER));
        let Some(run) = run else {
            return Err(
                Error::out_of_bounds("the range lies outside the devices of the archive").guest(range)
            );
        };
        Ok(RunSlice { run, guest: range.start..range.end.min(run.end() * CLUSTER) })
    }

    /// Calls `each` for every stretch of a slice, with its guest bytes, and its file offset if they are
    /// stored.
    fn stretches(
        &self,
        device: DeviceId,
        slice: &RunSlice<'_>,
        mut each: impl FnMut(Range<u64>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        if slice.run.is_zero() {
            return each(slice.guest.clone(), None);
        }
        let extent_offset = self.index.extent_offset(slice.run);
        let map = self.masks.extent(&self.input, slice.run, device.0, extent_offset)?;
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

    fn name(&self, device: DeviceId) -> &str {
        self.header.device(device).map_or("", |device| &device.name)
    }
}

impl RandomAccess for IndexedArchive {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        let mut extents = ExtentList::new();
        let mut position = range.start;
        while position < range.end && !extents.is_full() {
            let slice = self.run_slice(device, position..range.end)?;
            self.stretches(device, &slice, |guest, file_offset| {
                let kind = if file_offset.is_some() { ExtentKind::Data } else { ExtentKind::Zero };
                extents.push(guest.start, guest.end - guest.start, kind);
                Ok(())
            })
            .map_err(|e| e.device(self.name(device)))?;
            position = slice.guest.end;
        }
        Ok(extents.into_vec())
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let size = self.header.device(device).map_or(0, |device| device.size);
        let end = guest_offset.checked_add(buf.len() as u64).filter(|end| *end <= size);
        let Some(end) = end else {
            return Err(Error::out_of_bounds(format!(
                "{} bytes at {guest_offset} reach past the end of the device of {size} bytes",
                buf.len()
            ))
            .device(self.name(device)));
        };
        let mut position = guest_offset;
        while position < end {
            let slice = self.run_slice(device, position..end)?;
            self.stretches(device, &slice, |guest, file_offset| {
                let within = (guest.start - guest_offset) as usize..(guest.end - guest_offset) as usize;
                match file_offset {
                    Some(offset) => self.input.read_exact_at(&mut buf[within], offset),
                    None => {
                        buf[within].fill(0);
                        Ok(())
                    }
                }
            })
            .map_err(|e| e.device(self.name(device)).guest(position..slice.guest.end))?;
            position = slice.guest.end;
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        // A decoder reads cheaply only in large units, so ask for a whole extent at a time.
        if self.input.granule() > 1 { CLUSTER * CLUSTERS_PER_EXTENT as u64 } else { CLUSTER }
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        let file = self.input.file()?;
        let slice = self.run_slice(device, range).ok().filter(|slice| !slice.run.is_zero())?;
        let map =
            self.masks.extent(&self.input, slice.run, device.0, self.index.extent_offset(slice.run)).ok()?;
        let base = slice.run_start();
        let first = map.stretches(slice.run, slice.blocks()).into_iter().next()?;
        let within = slice.guest.start - (base + first.blocks.start * SUB_BLOCK);
        let end = (base + first.blocks.end * SUB_BLOCK).min(slice.guest.end);
        Some(FileRange { file, file_offset: first.file_offset? + within, len: end - slice.guest.start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ArchiveBuilder, Slot, guest_content, slot};

    const SIZE: u64 = 200 * CLUSTER;

    /// Clusters in an order without two neighbours, a third of them zero.
    fn scattered() -> (Vec<Slot>, Input) {
        let slots: Vec<Slot> = (0..200)
            .map(|cluster| slot(1, cluster * 7 % 200, if cluster % 3 == 0 { 0 } else { 0x0ff1 }))
            .collect();
        let archive = ArchiveBuilder::new().device(1, "a", SIZE).extents(&slots, 59).build();
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a.vma");
        std::fs::write(&path, archive).expect("write");
        (slots, Input::open(&path).expect("open"))
    }

    #[test]
    fn reads_in_one_pass_above_the_run_limit() {
        let (slots, input) = scattered();
        let mut source = VmaSource::open_limited(input, &OpenOptions::default(), 100).expect("open");
        assert!(source.random().is_none());
        let Access::Sequential(stream) = source.access() else { panic!("read in one pass") };
        let mut whole = vec![0; usize::try_from(SIZE).expect("small")];
        let pool = BufferPool::new();
        while let Some(piece) = stream.next_piece(&pool).expect("sound") {
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
        let random = source.random().expect("indexed");
        let truth = guest_content(1, SIZE, &slots);
        let device = DeviceId(1);
        let mut located = 0;
        for start in (0..SIZE).step_by(5000) {
            let Some(found) = random.locate(device, start..SIZE) else {
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
        let input = Input::open(file.path()).expect("open");
        let source = VmaSource::open(input, &OpenOptions::default()).expect("open");
        let mut changed = archive;
        changed[12_800 + 47] ^= 1;
        std::fs::write(file.path(), changed).expect("write");
        let random = source.random().expect("indexed");
        let error = random.read_at(DeviceId(1), &mut [0; 10], 0).expect_err("changed");
        assert_eq!(error.message(), "the extent header changed while the archive was being read");
        assert_eq!((error.device_name(), error.file_offset()), (Some("a"), Some(12_800)));
    }
}
