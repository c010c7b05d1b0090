//! Reading images: their facts, and the content and extents of any guest range.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{
    Access, Device, DeviceId, Extent, FileRange, ImageInfo, ImageSource, Input, Loss, Losses, MapExtent,
    OpenOptions, RandomAccess, Result,
};
use serde_json::{Map, Value, json};

use crate::image::{DISK, DISK_NAME, Image, UnreadableHeader};
use crate::parent::{self, DATA_WRITE_GUID};

mod chain;
mod segment;

use chain::Chain;
use segment::{Origin, Segment};

/// Opens an image and, unless only information is needed, its parent.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let unreadable_header = if options.salvage { UnreadableHeader::UseOther } else { UnreadableHeader::Fail };
    let image = Image::open(input, unreadable_header, options.externals.depth(), &options.memory)?;
    let parent = if image.metadata.has_parent && !options.info_only {
        Some(parent::open(&image, options).map_err(|e| e.path(image.file.location()))?)
    } else {
        None
    };
    let info = describe(&image);
    let losses = options.salvage.then(Losses::default);
    Ok(Arc::new(VhdxSource { info, chain: Chain { image, parent }, losses }))
}

/// Collects the facts and notes of an image.
fn describe(image: &Image) -> ImageInfo {
    let metadata = &image.metadata;
    let mut info = ImageInfo {
        format: crate::FORMAT,
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
    let sequence_numbers: Vec<Value> = image
        .headers
        .iter()
        .map(|header| header.as_ref().map_or(Value::Null, |header| header.sequence_number.into()))
        .collect();
    info.fact("header-sequence-numbers", "header sequence numbers", sequence_numbers);
    let log = match image.replay_stats {
        None => "empty".to_owned(),
        Some(stats) => {
            format!("replayed in memory ({} entries, {} pages of 4 KiB)", stats.entries, stats.pages)
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

/// Adds a note for each invalid header or region table, and one if the log was replayed.
fn add_notes(image: &Image, notes: &mut Vec<String>) {
    for (ordinal, header) in ["first", "second"].iter().zip(&image.headers) {
        if let Err(why) = header {
            notes.push(format!("the {ordinal} header {why}; using the other one"));
        }
    }
    for (ordinal, fault) in ["first", "second"].iter().zip(&image.region_faults) {
        if let Some(why) = fault {
            notes.push(format!("the {ordinal} region table {why}; using the other one"));
        }
    }
    if image.replay_stats.is_some() {
        notes.push(
            "the image was not closed properly; its log is replayed in memory, and the file is unchanged"
                .to_owned(),
        );
    }
}

/// An opened image.
struct VhdxSource {
    info: ImageInfo,
    chain: Chain,
    /// Ranges that could not be read; `Some` if the image was opened for salvage.
    losses: Option<Losses>,
}

impl ImageSource for VhdxSource {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        let mut losses = self.losses.as_ref().map(|losses| losses.list(DISK)).unwrap_or_default();
        if let Some(parent) = &self.chain.parent {
            losses.extend(parent.losses());
        }
        losses
    }
}

impl RandomAccess for VhdxSource {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.chain.extents(range, None, self.losses.is_some())
    }

    fn rough_extents(&self, _device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.chain.extents(range, Some(resolution), self.losses.is_some())
    }

    fn map(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.chain.map(range)
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let mut filled = 0;
        while filled < buf.len() {
            let position = guest_offset + filled as u64;
            let max_len = (buf.len() - filled) as u64;
            let segment = self.chain.image.segment(position, max_len);
            let len = segment
                .as_ref()
                .map_or_else(|_| self.chain.image.to_block_end(position, max_len), |segment| segment.len);
            // `len` is at most `max_len`, the length of the rest of `buf`.
            let part = &mut buf[filled..][..len as usize];
            let read = segment.and_then(|segment| self.chain.read_segment(part, position, segment.origin));
            if let Err(error) = read {
                let error = error.guest(position..position + len);
                let Some(losses) = &self.losses else { return Err(error) };
                part.fill(0);
                losses.add(position..position + len, &error);
            }
            filled += part.len();
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        self.chain.image.file.granule()
    }

    fn locate(&self, _device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        match self.chain.image.segment(range.start, range.end - range.start).ok()? {
            Segment { len, origin: Origin::File(file_offset) } => {
                self.chain.image.file.locate(file_offset..file_offset + len)
            }
            _ => None,
        }
    }
}
