//! Reading images: guest ranges are cut into segments, each in one place.

use std::ops::Range;

use imgtool_toolkit::{
    Access, Device, DeviceId, Error, Extent, ExtentKind, ExtentList, FileRange, ImageInfo, ImageSource,
    Input, Loss, Losses, MapExtent, OpenOptions, RandomAccess, Result,
};
use serde_json::{Map, Value, json};

use crate::image::{Image, UnreadableHeader};
use crate::layout::bat::{
    BatEntry, ENTRY_LEN, PayloadState, SECTOR_BITMAP_LEN, SECTORS_PER_BITMAP, SectorBitmapState,
};
use crate::parent::{self, DATA_WRITE_GUID, Parent};

mod map;

/// The only device.
const DISK: DeviceId = DeviceId(0);
/// Its name.
const DISK_NAME: &str = "disk";

pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Box<dyn ImageSource>> {
    let unreadable = if options.salvage { UnreadableHeader::Damaged } else { UnreadableHeader::Error };
    let image = Image::open(input, unreadable, options.externals.depth())?;
    let parent = if image.metadata.has_parent && !options.info_only {
        Some(parent::open(&image, options).map_err(|e| e.path(image.file.path()))?)
    } else {
        None
    };
    let info = describe(&image);
    Ok(Box::new(VhdxImage { info, image, parent, losses: options.salvage.then(Losses::default) }))
}

fn describe(image: &Image) -> ImageInfo {
    let metadata = &image.metadata;
    let mut info = ImageInfo {
        format: "vhdx",
        devices: vec![Device::disk(DISK.0, DISK_NAME, metadata.virtual_size)],
        cluster_size: Some(metadata.block_size.into()),
        references: parent::references(image),
        ..ImageInfo::default()
    };
    let subformat = match (metadata.has_parent, metadata.leave_blocks_allocated) {
        (true, _) => "differencing",
        (false, true) => "fixed",
        (false, false) => "dynamic",
    };
    info.fact("subformat", "type", subformat);
    info.fact("block-size", "block size", metadata.block_size);
    info.fact("logical-sector-size", "logical sector size", metadata.logical_sector_size);
    if metadata.physical_sector_size != 0 {
        info.fact("physical-sector-size", "physical sector size", metadata.physical_sector_size);
    }
    let numbers: Vec<Value> = image
        .headers
        .iter()
        .map(|header| header.as_ref().map_or(Value::Null, |header| header.sequence_number.into()))
        .collect();
    info.fact("header-sequence-numbers", "header sequence numbers", numbers);
    let log = match image.replayed {
        None => "empty".to_owned(),
        Some(replayed) => {
            format!("replayed in memory ({} entries, {} pages of 4 KiB)", replayed.entries, replayed.pages)
        }
    };
    info.fact("log", "log", log);
    info.fact("creator", "creator", image.creator.clone());
    info.fact("disk-id", "page 83 identifier", metadata.virtual_disk_id.to_string());
    info.fact("file-write-guid", "file write GUID", image.header.file_write_guid.to_string());
    info.fact(DATA_WRITE_GUID, "data write GUID", image.header.data_write_guid.to_string());
    if metadata.has_parent {
        let locator: Map<String, Value> =
            image.parent_locator.iter().map(|(key, value)| (key.clone(), json!(value))).collect();
        info.fact("parent-locator", "parent locator", locator);
    }
    add_notes(image, &mut info.notes);
    info
}

fn add_notes(image: &Image, notes: &mut Vec<String>) {
    for (number, header) in ["first", "second"].iter().zip(&image.headers) {
        if let Err(why) = header {
            notes.push(format!("the {number} header {why}; the other one is used"));
        }
    }
    for (number, fault) in ["first", "second"].iter().zip(&image.region_faults) {
        if let Some(why) = fault {
            notes.push(format!("the {number} region table {why}; the other one is used"));
        }
    }
    if image.replayed.is_some() {
        notes.push(
            "the image was not closed properly; its log is replayed in memory, the file stays as it is"
                .to_owned(),
        );
    }
}

/// An opened image.
struct VhdxImage {
    info: ImageInfo,
    image: Image,
    parent: Option<Parent>,
    /// What could not be restored; `Some` when opened for salvage.
    losses: Option<Losses>,
}

/// A guest range from where it was asked for, all of it in one place.
#[derive(Debug, Clone, Copy)]
struct Segment {
    /// Guest bytes, not 0.
    len: u64,
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// At this offset in the file.
    File(u64),
    /// Explicit zeros.
    Zero,
    /// Nothing is allocated: zeros.
    Hole,
    /// In the parent, at the same guest offset.
    Parent,
}

impl ImageSource for VhdxImage {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        Access::Random(self)
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        Some(self)
    }

    fn losses(&self) -> Vec<Loss> {
        let mut losses = self.losses.as_ref().map(|losses| losses.list(DISK)).unwrap_or_default();
        if let Some(parent) = &self.parent {
            losses.extend(parent.source().losses());
        }
        losses
    }
}

impl RandomAccess for VhdxImage {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.list_extents(device, range, None)
    }

    fn rough_extents(&self, device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.list_extents(device, range, Some(resolution))
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.check_range(device, range.start, range.end - range.start)?;
        self.map_extents(range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.check_range(device, guest_offset, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let position = guest_offset + done as u64;
            let left = (buf.len() - done) as u64;
            let segment = self.segment(position, left);
            let len =
                segment.as_ref().map_or_else(|_| self.to_block_end(position, left), |segment| segment.len);
            // `len` is at most what is left of `buf`.
            let part = &mut buf[done..][..len as usize];
            let read = segment.and_then(|segment| self.read_segment(part, position, segment.place));
            if let Err(error) = read {
                let error = error.guest(position..position + len);
                let Some(losses) = &self.losses else { return Err(error) };
                part.fill(0);
                losses.add(position..position + len, &error);
            }
            done += part.len();
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        self.image.file.granule()
    }

    fn locate(&self, _device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        if range.is_empty() || range.end > self.image.metadata.virtual_size {
            return None;
        }
        match self.segment(range.start, range.end - range.start).ok()? {
            Segment { len, place: Place::File(file_offset) } => {
                self.image.file.locate(file_offset..file_offset + len)
            }
            _ => None,
        }
    }
}

/// Adds an extent; tells where it ends.
fn push(extents: &mut ExtentList, start: u64, len: u64, kind: ExtentKind) -> u64 {
    extents.push(start, len, kind);
    start + len
}

impl VhdxImage {
    /// The extents of `range`, or what is said of them in pieces of `resolution`.
    fn list_extents(
        &self,
        device: DeviceId,
        range: Range<u64>,
        resolution: Option<u64>,
    ) -> Result<Vec<Extent>> {
        self.check_range(device, range.start, range.end - range.start)?;
        let mut extents = ExtentList::new();
        let mut position = range.start;
        while position < range.end && !extents.is_full() {
            let wanted = range.end - position;
            let (len, place) = match self.segment(position, wanted) {
                Ok(Segment { len, place }) => (len, place),
                // Reading it will fill in zeros and tell the loss.
                Err(_) if self.losses.is_some() => {
                    extents.push(position, self.to_block_end(position, wanted), ExtentKind::Data);
                    position += self.to_block_end(position, wanted);
                    continue;
                }
                Err(e) => return Err(e),
            };
            position = match place {
                Place::File(file_offset) => {
                    self.push_file_runs(&mut extents, position, len, file_offset, resolution)?
                }
                Place::Zero => push(&mut extents, position, len, ExtentKind::Zero),
                Place::Hole => push(&mut extents, position, len, ExtentKind::Hole),
                Place::Parent => self.push_parent_extents(&mut extents, position, len, resolution)?,
            };
        }
        Ok(extents.into_vec())
    }

    fn check_range(&self, device: DeviceId, start: u64, len: u64) -> Result<()> {
        let size = self.image.metadata.virtual_size;
        if device != DISK {
            return Err(Error::out_of_bounds(format!("there is no device {device}")));
        }
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::out_of_bounds(format!(
                "{len} bytes at {start} leave the disk of {size} bytes"
            )));
        }
        Ok(())
    }

    /// Bytes from `position` to the end of its payload block, at most `wanted`.
    fn to_block_end(&self, position: u64, wanted: u64) -> u64 {
        let block_size = self.image.shape.block_size;
        (block_size - position % block_size).min(wanted)
    }

    /// Where the bytes from `position` on are; at most `wanted` of them.
    fn segment(&self, position: u64, wanted: u64) -> Result<Segment> {
        let shape = &self.image.shape;
        let payload_block = position / shape.block_size;
        let entry_at =
            self.image.regions.bat.file_offset + shape.payload_bat_index(payload_block) * ENTRY_LEN;
        let page = self.image.file.table_page(entry_at)?;
        if page.is_zero() {
            // Nothing is present as far as this page of the table goes.
            let next = (page.end() - self.image.regions.bat.file_offset) / ENTRY_LEN;
            let end = shape.payload_block_from(next).saturating_mul(shape.block_size);
            return Ok(Segment { len: end.saturating_sub(position).min(wanted), place: self.not_present() });
        }
        let entry = BatEntry(page.u64_at(entry_at));
        let len = self.to_block_end(position, wanted);
        let place = match entry.payload_state() {
            PayloadState::NotPresent => self.not_present(),
            PayloadState::Zero => Place::Zero,
            PayloadState::Undefined | PayloadState::Unmapped => Place::Hole,
            PayloadState::FullyPresent => {
                let block_at = self.check_block(payload_block, entry)?;
                Place::File(block_at + position % shape.block_size)
            }
            PayloadState::PartiallyPresent if self.image.metadata.has_parent => {
                let block_at = self.check_block(payload_block, entry)?;
                return self.partial_segment(payload_block, block_at, position, len);
            }
            PayloadState::PartiallyPresent => {
                return Err(self.block_error(
                    payload_block,
                    Error::malformed("the block is partially present, but the disk has no parent"),
                ));
            }
            PayloadState::Reserved(state) => {
                return Err(self.block_error(
                    payload_block,
                    Error::malformed(format!("the BAT entry has the reserved state {state}")),
                ));
            }
        };
        Ok(Segment { len, place })
    }

    /// What "not in this file" means.
    fn not_present(&self) -> Place {
        if self.image.metadata.has_parent { Place::Parent } else { Place::Hole }
    }

    /// Where a present block stands: behind the header section, clear of the tables, and in the file
    /// as far as the guest uses it (the last block of a disk may be cut).
    fn check_block(&self, payload_block: u64, entry: BatEntry) -> Result<u64> {
        let shape = &self.image.shape;
        let file_offset = entry.file_offset();
        let guest_start = payload_block * shape.block_size;
        let used = shape.block_size.min(self.image.metadata.virtual_size - guest_start);
        for (name, region) in self.image.reserved_places() {
            if region.overlaps(file_offset, used) {
                return Err(self.block_error(
                    payload_block,
                    Error::malformed(format!("the block stands in the file's {name}")).at(file_offset),
                ));
            }
        }
        if file_offset.checked_add(used).is_none_or(|end| end > self.image.file.len()) {
            return Err(self.block_error(
                payload_block,
                Error::corrupt(format!(
                    "the block needs {used} bytes at {file_offset}, but the file ends at {}",
                    self.image.file.len()
                ))
                .at(file_offset)
                .hint("the file is cut short: copy it again, or use a backup; --salvage reads the rest"),
            ));
        }
        Ok(file_offset)
    }

    /// Adds the guest range of a block to an error.
    fn block_error(&self, payload_block: u64, error: Error) -> Error {
        let start = payload_block * self.image.shape.block_size;
        let end = start.saturating_add(self.image.shape.block_size).min(self.image.metadata.virtual_size);
        let entry_at = self.image.regions.bat.file_offset
            + self.image.shape.payload_bat_index(payload_block) * ENTRY_LEN;
        error.path(self.image.file.path()).device(DISK_NAME).guest(start..end).at(entry_at)
    }

    /// The run of sectors with the same bit in the sector bitmap.
    fn partial_segment(&self, payload_block: u64, block_at: u64, position: u64, len: u64) -> Result<Segment> {
        let shape = &self.image.shape;
        let bitmap_entry = self.image.bat_entry(shape.sector_bitmap_bat_index(payload_block))?;
        let bitmap_at = bitmap_entry.file_offset();
        if bitmap_entry.sector_bitmap_state() != SectorBitmapState::Present {
            return Err(self.block_error(
                payload_block,
                Error::malformed("the block is partially present, but its sector bitmap is not there"),
            ));
        }
        let bitmap_end = bitmap_at.checked_add(SECTOR_BITMAP_LEN);
        if bitmap_end.is_none_or(|end| end > self.image.file.len()) || bitmap_at == 0 {
            return Err(self.block_error(
                payload_block,
                Error::corrupt(format!(
                    "the sector bitmap at {bitmap_at} leaves the file, which ends at {}",
                    self.image.file.len()
                )),
            ));
        }
        let sector_size = shape.logical_sector_size;
        let end = position + len;
        // The page of the bitmap looked at last: neighbours share it.
        let mut page = self.image.file.table_page(bitmap_at)?;
        let mut is_here = |sector: u64| -> Result<bool> {
            let bit = sector % SECTORS_PER_BITMAP;
            let byte_at = bitmap_at + bit / 8;
            if !page.contains(byte_at) {
                page = self.image.file.table_page(byte_at)?;
            }
            Ok(page.byte_at(byte_at) >> (bit % 8) & 1 == 1)
        };
        let first_sector = position / sector_size;
        let here = is_here(first_sector)?;
        let mut sector = first_sector + 1;
        while sector * sector_size < end && is_here(sector)? == here {
            sector += 1;
        }
        let len = (sector * sector_size).min(end) - position;
        let place = if here { Place::File(block_at + position % shape.block_size) } else { Place::Parent };
        Ok(Segment { len, place })
    }

    fn read_segment(&self, part: &mut [u8], position: u64, place: Place) -> Result<()> {
        match place {
            Place::File(file_offset) => self.image.file.read_exact_at(part, file_offset),
            Place::Zero | Place::Hole => {
                part.fill(0);
                Ok(())
            }
            Place::Parent => {
                let Some(parent) = &self.parent else { return Err(self.no_parent()) };
                let in_parent = parent.virtual_size.saturating_sub(position).min(part.len() as u64);
                let (from_parent, behind) = part.split_at_mut(in_parent as usize);
                behind.fill(0);
                if from_parent.is_empty() {
                    return Ok(());
                }
                let (random, device) = parent.random()?;
                random.read_at(device, from_parent, position)
            }
        }
    }

    fn no_parent(&self) -> Error {
        Error::unsupported("the parent was not opened: only facts were asked for")
            .path(self.image.file.path())
    }

    /// The runs of data and holes of blocks in the file; answers where they end.
    fn push_file_runs(
        &self,
        extents: &mut ExtentList,
        start: u64,
        len: u64,
        file_offset: u64,
        resolution: Option<u64>,
    ) -> Result<u64> {
        let mut done = 0;
        while done < len && !extents.is_full() {
            let position = file_offset + done;
            let run = match resolution {
                Some(resolution) => {
                    let to_cut = resolution - (start + done) % resolution;
                    self.image.file.rough_run(position, position.saturating_add(to_cut))?
                }
                None => self.image.file.run(position)?,
            };
            let run_len = run.end.saturating_sub(file_offset + done).clamp(1, len - done);
            let kind = if run.is_data { ExtentKind::Data } else { ExtentKind::Zero };
            extents.push(start + done, run_len, kind);
            done += run_len;
        }
        Ok(start + done)
    }

    /// The extents of the parent; answers where they end.
    fn push_parent_extents(
        &self,
        extents: &mut ExtentList,
        start: u64,
        len: u64,
        resolution: Option<u64>,
    ) -> Result<u64> {
        let Some(parent) = &self.parent else { return Err(self.no_parent()) };
        let end = start + len;
        if start >= parent.virtual_size {
            return Ok(push(extents, start, len, ExtentKind::Hole));
        }
        let (random, device) = parent.random()?;
        let mut position = start;
        let in_parent = start..end.min(parent.virtual_size);
        let answer = match resolution {
            Some(resolution) => random.rough_extents(device, in_parent, resolution)?,
            None => random.extents(device, in_parent)?,
        };
        for extent in answer {
            position = push(extents, position, extent.len, extent.kind);
        }
        Ok(position)
    }
}
