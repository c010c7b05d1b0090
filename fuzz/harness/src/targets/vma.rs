//! VMA archives, as files and as streams. Their checksums are corrected first.

use std::sync::Arc;

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, DeviceId, DeviceKind, Driver, Error, ErrorKind, ImageSource, Input, Loss, OpenOptions, ReadAt,
    Result,
};
use imgtool_vma::{ArchiveHeader, VmaDriver, layout};

use super::{by_position, file, from_pipe};
use crate::exercise;
use crate::sparse::{SECTOR, SparseFile};

/// Flag: keeps the checksums.
const LEAVE_CHECKSUMS: u8 = 1;
/// Flag: keeps the UUIDs of the extents.
const LEAVE_UUIDS: u8 = 2;
/// Flag: allows bytes after the end.
const IGNORE_TRAILING: u8 = 4;

/// Maximum length in bytes of an archive. Our limit: streams are read to their end, and salvage searches
/// every
/// byte.
const MAX_LEN: u64 = 512 << 10;
/// Maximum total size in bytes of the devices to salvage. Our limit: missing ranges are pieces of 1 GiB.
const MAX_SALVAGED: u64 = 64 << 30;
/// Maximum length in bytes of a header whose checksum is corrected. Our limit, for the time per input.
const MAX_HEADER: u64 = 256 << 10;
/// Maximum number of extents whose checksums are corrected. Our limit, for the time per input.
const MAX_EXTENTS: usize = 256;

pub(super) fn image(input: &[u8]) -> SparseFile {
    sealed(input).1
}

fn sealed(input: &[u8]) -> (u8, SparseFile) {
    let (flags, mut file) = file(input, MAX_LEN);
    if flags & LEAVE_CHECKSUMS != 0 {
        return (flags, file);
    }
    let header_size = u64::from(be32(&file, 56));
    if (layout::HEADER_FIXED as u64..=MAX_HEADER.min(file.len())).contains(&header_size) {
        let md5 = layout::header_md5(&file.bytes(0..header_size));
        file.write(32, &md5);
    }
    // First the chain of extents, which may start anywhere, then the extents that a search by sector finds.
    let mut at = header_size;
    for _ in 0..MAX_EXTENTS {
        if !seal_extent(&mut file, at, flags) {
            break;
        }
        let block_count = u64::from(be32(&file, at + 4) & 0xffff);
        at += layout::EXTENT_HEADER as u64 + block_count * layout::SUB_BLOCK;
    }
    let sectors: Vec<u64> = file.written(header_size..MAX_LEN).take(MAX_EXTENTS).collect();
    for at in sectors {
        seal_extent(&mut file, at, flags);
    }
    (flags, file)
}

/// True if the archive's data contains bytes that look like an extent. `check` and salvage, which go on after
/// damage, treat them as one, because bytes before them may be missing. No real backup contains a part of
/// itself.
fn holds_itself(file: &SparseFile) -> bool {
    let mut chain = std::collections::BTreeSet::new();
    let mut at = u64::from(be32(file, 56));
    while file.bytes(at..at + 4) == layout::EXTENT_MAGIC && chain.insert(at) {
        let block_count = u64::from(be32(file, at + 4) & 0xffff);
        at += layout::EXTENT_HEADER as u64 + block_count * layout::SUB_BLOCK;
    }
    file.written(0..MAX_LEN).any(|sector| {
        let bytes = file.bytes(sector..sector + SECTOR + 3);
        let mut found = bytes.windows(4).enumerate().filter(|(_, word)| *word == layout::EXTENT_MAGIC);
        found.any(|(index, _)| !chain.contains(&(sector + index as u64)))
    })
}

/// Corrects the UUID and the MD5 of an extent header. Returns false if there is none at `at`.
fn seal_extent(file: &mut SparseFile, at: u64, flags: u8) -> bool {
    let mut header = [0; layout::EXTENT_HEADER];
    file.read(&mut header, at);
    if !header.starts_with(&layout::EXTENT_MAGIC) {
        return false;
    }
    if flags & LEAVE_UUIDS == 0 {
        let uuid = file.bytes(8..24);
        header[8..24].copy_from_slice(&uuid);
    }
    let md5 = layout::extent_md5(&header);
    header[24..40].copy_from_slice(&md5);
    file.write(at, &header);
    true
}

fn be32(file: &SparseFile, at: u64) -> u32 {
    file.bytes(at..at + 4).iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// An archive in a file or a pipe.
struct Archive {
    file: Arc<SparseFile>,
    options: OpenOptions,
}

impl Archive {
    fn new(input: &[u8]) -> Self {
        let (flags, file) = sealed(input);
        let options = OpenOptions { ignore_trailing: flags & IGNORE_TRAILING != 0, ..OpenOptions::default() };
        Self { file: Arc::new(file), options }
    }

    fn salvage(&self) -> OpenOptions {
        OpenOptions { salvage: true, ..self.options.clone() }
    }

    fn by_position(&self) -> Result<Input> {
        Ok(by_position(&self.file))
    }

    fn as_stream(&self) -> Result<Input> {
        // Decompresses if the stream starts like a compressed file.
        Ok(from_pipe("-", self.file.stream())?.input)
    }

    fn open(&self, input: Result<Input>, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        VmaDriver.open(input?, options)
    }
}

/// Reads an archive from a file: by index, with salvage, and with `check`.
pub(super) fn run_file(input: &[u8]) {
    let archive = Archive::new(input);
    let _ = exercise::opened(archive.by_position().and_then(ArchiveHeader::read));
    if !holds_itself(&archive.file) {
        exercise::image("vma", &archive.options, &|| by_position(&archive.file));
    } else if let Some(source) = exercise::opened(archive.open(archive.by_position(), &archive.options)) {
        exercise::random(&source, false);
    }
    pieces(&archive, archive.by_position(), &archive.salvage());
}

/// Reads an archive from a pipe.
pub(super) fn run_stream(input: &[u8]) {
    let archive = Archive::new(input);
    let _ = exercise::opened(archive.as_stream().and_then(ArchiveHeader::read));
    pieces(&archive, archive.as_stream(), &archive.options);
    pieces(&archive, archive.as_stream(), &archive.salvage());
    let _ = exercise::opened(archive.as_stream().and_then(|input| VmaDriver.check(input, &archive.options)));
}

/// Reads all pieces one by one, and checks the losses.
fn pieces(archive: &Archive, input: Result<Input>, options: &OpenOptions) {
    let Some(source) = exercise::opened(archive.open(input, options)) else { return };
    let devices = source.info().devices.clone();
    if let Access::Stream(stream) = source.access() {
        let done = exercise::stream(&devices, &mut *lock(stream));
        if options.salvage
            && let Err(error) = done
        {
            assert_eq!(error.kind(), ErrorKind::LimitExceeded, "salvage gives up: {error}");
        }
    }
    for loss in source.losses() {
        let size = devices.iter().find(|device| device.id == loss.device).map_or(0, |device| device.size);
        assert!(!loss.guest.is_empty() && loss.guest.end <= size, "{loss:?} of a device of {size} bytes");
    }
}

/// Content of an archive, read in one way.
#[derive(Debug)]
struct Content {
    info: String,
    digests: Vec<(DeviceId, u64, u128)>,
    losses: Vec<Loss>,
    /// States of guests, with their sizes in bytes.
    states: Vec<(DeviceId, u64)>,
}

/// Reads an archive by position and as a stream. Both must accept or refuse it, with the same content and
/// losses, and `check` must agree.
pub(super) fn run_agree(input: &[u8]) {
    let archive = Archive::new(input);
    if imgtool_storage::outer::detect(&archive.file.bytes(0..16)).is_some() {
        return;
    }
    let file = content(&archive, archive.by_position(), &archive.options);
    let stream = content(&archive, archive.as_stream(), &archive.options);
    agree(&file, &stream, "the archive");
    if holds_itself(&archive.file) {
        return;
    }
    for (input, what) in [(archive.by_position(), "file"), (archive.as_stream(), "stream")] {
        let report = input.and_then(|input| VmaDriver.check(input, &archive.options));
        let sound = report.as_ref().is_ok_and(|report| report.corruptions == 0 && report.check_errors == 0);
        assert_eq!(sound, file.is_ok(), "check of the {what}: {report:?}, but reading: {file:?}");
    }
    let salvaged = content(&archive, archive.by_position(), &archive.salvage());
    let salvaged_stream = content(&archive, archive.as_stream(), &archive.salvage());
    agree(&salvaged, &salvaged_stream, "what salvage makes of the archive");
    if let (Ok(whole), Ok(salvaged)) = (&file, &salvaged) {
        // The length of a guest's state is an estimate: its end may be missing, which salvage lists.
        let ends_state = |loss: &Loss| whole.states.contains(&(loss.device, loss.guest.end));
        let losses = &salvaged.losses;
        assert!(losses.iter().all(ends_state), "salvage loses {losses:?} of a sound archive");
        assert_eq!(whole.digests, salvaged.digests, "salvage reads a sound archive differently");
    }
}

fn content(archive: &Archive, input: Result<Input>, options: &OpenOptions) -> Result<Content> {
    let source = archive.open(input, options)?;
    let info = source.info();
    let total = info.devices.iter().fold(0u64, |sum, device| sum.saturating_add(device.size));
    if options.salvage && total > MAX_SALVAGED {
        return Err(Error::limit("more zeros than are counted here"));
    }
    let states = info.devices.iter().filter(|device| device.kind == DeviceKind::VmState);
    let states = states.map(|device| (device.id, device.size)).collect();
    let info = format!("{:?} {:?} {:?}", info.devices, info.attachments, info.references);
    let digests = exercise::digested(&*source)?;
    Ok(Content { info, digests, losses: source.losses(), states })
}

fn agree(file: &Result<Content>, stream: &Result<Content>, what: &str) {
    match (file, stream) {
        (Ok(file), Ok(stream)) => {
            assert_eq!(file.info, stream.info, "{what} is described differently");
            assert_eq!(file.digests, stream.digests, "{what} is read differently");
            assert_eq!(file.losses, stream.losses, "{what} loses different things");
        }
        (Err(file), Err(stream)) => {
            let place = |error: &Error| (error.kind(), error.message().to_owned(), error.file_offset());
            assert_eq!(place(file), place(stream), "{what} is refused differently");
        }
        _ => panic!("{what} is taken one way and refused the other: {file:?} and {stream:?}"),
    }
}
