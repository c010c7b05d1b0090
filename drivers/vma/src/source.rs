//! Reading archives: what is in one, and the three ways to its content.
//!
//! A file is indexed and read at random; a stream, or a file too scattered to be indexed, in one
//! pass ([`crate::stream`]); a damaged archive in one pass that looks for what is whole
//! ([`crate::salvage`]).

use std::ops::Range;
use std::sync::Arc;

use imgtool_toolkit::{
    Access, BufferPool, DeviceId, Doubt, Error, Extent, ExtentKind, ExtentList, FileRange, ImageInfo,
    ImageSource, Input, Loss, OpenOptions, Piece, RandomAccess, RandomInput, Result, SequentialAccess,
};

use crate::bytes::Cursor;
use crate::facts;
use crate::header::ArchiveHeader;
use crate::index::{Index, MAX_RUNS, Run};
use crate::layout::{CLUSTER, CLUSTERS_PER_EXTENT, SUB_BLOCK};
use crate::masks::MaskCache;
use crate::salvage::Salvage;
use crate::stream::ArchiveStream;

/// An opened archive.
pub struct VmaSource {
    header: Arc<ArchiveHeader>,
    info: ImageInfo,
    /// What is wrong, where only facts are wanted.
    damage: Option<Error>,
    body: Body,
}

enum Body {
    /// Only facts were wanted.
    Facts(NoContent),
    Indexed(Box<IndexedArchive>),
    Stream(Box<ArchiveStream>),
    Salvage(Box<Salvage>),
}

impl VmaSource {
    /// Opens an archive: by index if `input` is a file, else in one pass.
    ///
    /// # Errors
    /// When the header is wrong; for a file also when anything else but the data itself is, unless
    /// only facts are wanted ([`ImageSource::damage`] has it then).
    pub fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        Self::open_limited(input, options, MAX_RUNS)
    }

    pub(crate) fn open_limited(input: Input, options: &OpenOptions, max_runs: usize) -> Result<Self> {
        if options.salvage {
            let (header, salvage) = Salvage::open(input)?;
            return Ok(Self::new(header, Body::Salvage(Box::new(salvage))));
        }
        if options.info_only {
            return Self::facts(input, options);
        }
        if input.is_stream() {
            let mut stream = input.into_stream()?;
            let header = Arc::new(ArchiveHeader::from_bytes(&mut stream)?);
            let body = Body::Stream(Box::new(ArchiveStream::new(stream, &header, options)));
            return Ok(Self::new(header, body));
        }
        let input = input.into_random()?;
        let header = Arc::new(ArchiveHeader::from_bytes(&mut Cursor::new(input.clone()))?);
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
                let mut stream = Cursor::new(input).into_stream()?;
                let header = Arc::new(ArchiveHeader::from_bytes(&mut stream)?);
                let body = Body::Stream(Box::new(ArchiveStream::new(stream, &header, options)));
                Ok(Self::new(header, body))
            }
        }
    }

    /// What can be known without content: of a file what the headers say, of a stream as much of
    /// that as the options grant.
    fn facts(input: Input, options: &OpenOptions) -> Result<Self> {
        let path = input.path().to_owned();
        let (header, counted) = if input.is_stream() {
            let mut stream = input.into_stream()?;
            let header = Arc::new(ArchiveHeader::from_bytes(&mut stream)?);
            let counted = Index::count(stream, &header, options, options.info_stream_len);
            (header, counted)
        } else {
            let mut cursor = Cursor::new(input.into_random()?);
            let header = Arc::new(ArchiveHeader::from_bytes(&mut cursor)?);
            let counted = Index::count(cursor, &header, options, u64::MAX);
            (header, counted)
        };
        let (index, damage) = match counted {
            Ok(index) => (index, None),
            Err(error) => (None, Some(error.path(&path))),
        };
        let mut info = facts::info(&header, index.as_ref());
        if index.is_none() && damage.is_none() {
            info.notes.push(facts::not_counted(options.info_stream_len));
        }
        Ok(Self { header, info, damage, body: Body::Facts(NoContent) })
    }

    fn new(header: Arc<ArchiveHeader>, body: Body) -> Self {
        let index = match &body {
            Body::Indexed(archive) => Some(&archive.index),
            _ => None,
        };
        let info = facts::info(&header, index);
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
            Body::Facts(nothing) => Access::Sequential(nothing),
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

/// Content that nobody asked for.
struct NoContent;

impl SequentialAccess for NoContent {
    fn next_piece(&mut self, _pool: &BufferPool) -> Result<Option<Piece>> {
        Err(Error::usage("the archive was opened for what it says about itself, not for its content"))
    }
}

/// An archive in a file, with its index.
struct IndexedArchive {
    header: Arc<ArchiveHeader>,
    input: RandomInput,
    index: Index,
    masks: MaskCache,
}

/// A part of a device within one run.
struct Part<'a> {
    run: &'a Run,
    /// Guest bytes.
    guest: Range<u64>,
}

impl Part<'_> {
    /// First guest byte of the run.
    fn run_start(&self) -> u64 {
        u64::from(self.run.first) * CLUSTER
    }

    /// The sub-blocks that the part touches, counted from the run's first cluster.
    fn blocks(&self) -> Range<u64> {
        let base = self.run_start();
        (self.guest.start - base) / SUB_BLOCK..(self.guest.end - base).div_ceil(SUB_BLOCK)
    }
}

impl IndexedArchive {
    /// The part of `range` that lies in the run of its first byte.
    fn part(&self, device: DeviceId, range: Range<u64>) -> Result<Part<'_>> {
        let run = self.index.device(device).and_then(|known| known.run_of(range.start / CLUSTER));
        let Some(run) = run else {
            return Err(Error::out_of_bounds("the archive has nothing there").guest(range));
        };
        Ok(Part { run, guest: range.start..range.end.min(run.end() * CLUSTER) })
    }

    /// Calls `each` for every stretch of a part: guest bytes, and where they are stored if they are.
    fn stretches(
        &self,
        device: DeviceId,
        part: &Part<'_>,
        mut each: impl FnMut(Range<u64>, Option<u64>) -> Result<()>,
    ) -> Result<()> {
        if part.run.is_zero() {
            return each(part.guest.clone(), None);
        }
        let extent_offset = self.index.extent_offset(part.run);
        let map = self.masks.extent(&self.input, part.run, device.0, extent_offset)?;
        let base = part.run_start();
        for stretch in map.stretches(part.run, part.blocks()) {
            let start = base + stretch.blocks.start * SUB_BLOCK;
            let end = base + stretch.blocks.end * SUB_BLOCK;
            let clipped = start.max(part.guest.start)..end.min(part.guest.end);
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
            let part = self.part(device, position..range.end)?;
            self.stretches(device, &part, |guest, file_offset| {
                let kind = if file_offset.is_some() { ExtentKind::Data } else { ExtentKind::Zero };
                extents.push(guest.start, guest.end - guest.start, kind);
                Ok(())
            })
            .map_err(|e| e.device(self.name(device)))?;
            position = part.guest.end;
        }
        Ok(extents.into_vec())
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let size = self.header.device(device).map_or(0, |device| device.size);
        let end = guest_offset.checked_add(buf.len() as u64).filter(|end| *end <= size);
        let Some(end) = end else {
            return Err(Error::out_of_bounds(format!(
                "{} bytes at {guest_offset} leave the device of {size} bytes",
                buf.len()
            ))
            .device(self.name(device)));
        };
        let mut position = guest_offset;
        while position < end {
            let part = self.part(device, position..end)?;
            self.stretches(device, &part, |guest, file_offset| {
                let within = (guest.start - guest_offset) as usize..(guest.end - guest_offset) as usize;
                match file_offset {
                    Some(offset) => self.input.read_exact_at(&mut buf[within], offset),
                    None => {
                        buf[within].fill(0);
                        Ok(())
                    }
                }
            })
            .map_err(|e| e.device(self.name(device)).guest(position..part.guest.end))?;
            position = part.guest.end;
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        // Where reading is only cheap in large units, an extent is decoded as a whole.
        if self.input.granule() > 1 { CLUSTER * CLUSTERS_PER_EXTENT as u64 } else { CLUSTER }
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        let file = self.input.file()?;
        let part = self.part(device, range).ok().filter(|part| !part.run.is_zero())?;
        let map =
            self.masks.extent(&self.input, part.run, device.0, self.index.extent_offset(part.run)).ok()?;
        let base = part.run_start();
        let first = map.stretches(part.run, part.blocks()).into_iter().next()?;
        let within = part.guest.start - (base + first.blocks.start * SUB_BLOCK);
        let end = (base + first.blocks.end * SUB_BLOCK).min(part.guest.end);
        Some(FileRange { file, file_offset: first.file_offset? + within, len: end - part.guest.start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{ArchiveBuilder, Slot, guest_content, slot};

    const SIZE: u64 = 200 * CLUSTER;

    /// Every other cluster has data, and the order is as bad as can be.
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
    fn an_archive_too_scattered_to_be_indexed_is_read_in_one_pass() {
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
    fn stored_runs_are_located_in_the_file() {
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
    fn a_file_that_changes_is_noticed() {
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
        assert_eq!(error.message(), "the extent header has changed while the archive was being read");
        assert_eq!((error.device_name(), error.file_offset()), (Some("a"), Some(12_800)));
    }
}
