//! Reading images: their facts, and the content and extents of any guest range.

use std::sync::Arc;

use imgtool_core::layered::{LayeredSource, Segment, SegmentMap, StoredBytes};
use imgtool_core::{Device, ImageInfo, ImageSource, Input, OpenOptions, Result};
use serde_json::{Map, Value, json};

use crate::image::{DISK, DISK_NAME, Image, UnreadableHeader};
use crate::parent::{self, DATA_WRITE_GUID};

mod segment;

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
    Ok(Arc::new(LayeredSource::new(info, image, parent, options.salvage)))
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

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        self.look_up(guest_offset, max_len)
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        self.to_block_end(guest_offset, max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.file
    }
}
