//! Reading images: their facts, and the parent of a differencing image.

use std::sync::Arc;

use imgtool_core::layered::LayeredSource;
use imgtool_core::{Device, ImageInfo, ImageSource, Input, OpenOptions, Result};

use crate::image::{DISK, DISK_NAME, Image};
use crate::layout::{ImageType, SECTOR_SIZE};
use crate::parent;

/// Key of the fact that contains an image's UUID.
pub(crate) const UUID: &str = "uuid";
/// Key of the fact that contains the UUID of an image's content.
pub(crate) const MODIFICATION_UUID: &str = "modification-uuid";

/// Opens an image and, unless only information is needed, its parent.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let image = Image::open(input, options.externals.depth(), &options.memory)?;
    let mut info = describe(&image);
    let (mut parent, mut doubt) = (None, None);
    if image.header.image_type == ImageType::Differencing {
        let found = parent::find(&image, options).map_err(|e| e.path(image.input.location()));
        let name = found.as_ref().ok().map(|(name, _)| name.as_str());
        info.references = vec![parent::reference(&image, name)];
        if !options.info_only {
            let (name, fault) = found?;
            let opened = parent::open(&name, &image, options);
            doubt = fault;
            parent = Some(opened.map_err(|e| e.path(image.input.location()))?);
        }
    }
    Ok(Arc::new(LayeredSource::new(info, image, parent, options.salvage).doubted(doubt)))
}

/// Collects the facts and notes of an image.
fn describe(image: &Image) -> ImageInfo {
    let header = &image.header;
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(DISK.0, DISK_NAME, header.virtual_size)],
        cluster_size: Some(header.block_size),
        ..ImageInfo::default()
    };
    info.fact("subformat", "type", header.image_type.name());
    info.fact("version", "version", format!("{}.{}", header.version >> 16, header.version & 0xffff));
    info.fact("block-size", "block size", header.block_size);
    if header.block_extra > 0 {
        info.fact("block-extra", "bytes before each block", header.block_extra);
    }
    info.fact("blocks", "blocks of the disk", header.disk_blocks());
    info.fact("allocated-blocks", "blocks in the file", header.allocated);
    info.fact(UUID, "UUID", header.uuid.to_string());
    info.fact(MODIFICATION_UUID, "UUID of the content", header.modification_uuid.to_string());
    if header.image_type == ImageType::Differencing {
        info.fact("parent-uuid", "UUID of the parent", header.parent_uuid.to_string());
        info.fact(
            "parent-modification-uuid",
            "UUID of the parent's content",
            header.parent_modification_uuid.to_string(),
        );
    }
    if !header.comment.is_empty() {
        info.fact("comment", "comment", header.comment.clone());
    }
    if !header.virtual_size.is_multiple_of(SECTOR_SIZE) {
        info.notes.push(format!("the virtual size is no multiple of a sector of {SECTOR_SIZE} bytes"));
    }
    info
}
