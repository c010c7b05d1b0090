//! Reading images by position: their facts, and the parent of a differencing image.

use std::sync::Arc;

use imgtool_core::layered::LayeredSource;
use imgtool_core::{Device, ImageInfo, ImageSource, Input, OpenOptions, Result};

use crate::image::{DISK, DISK_NAME, Image};
use crate::layout::footer::{DiskType, Footer};
use crate::parent;

/// Key of the fact that contains an image's UUID.
pub(crate) const UUID: &str = "uuid";

/// Key of the fact that contains the time of an image's footer.
pub(crate) const TIMESTAMP: &str = "timestamp";

/// Opens an image and, unless only information is needed, its parent.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let (depth, memory) = (options.externals.depth(), &options.memory);
    let image = match options.salvage {
        true => Image::salvage(input, depth, memory)?,
        false => Image::open(input, depth, memory)?,
    };
    let (parent, fault) = match &image.blocks {
        Some(blocks) if image.footer.disk_type == DiskType::Differencing && !options.info_only => {
            let parent = parent::open(&image, blocks, options);
            let (parent, fault) = parent.map_err(|e| e.path(image.input.location()))?;
            (Some(parent), fault)
        }
        _ => (None, None),
    };
    let mut info = describe(&image.footer);
    describe_blocks(&image, &mut info);
    let doubt = image.doubt.clone().or(fault);
    Ok(Arc::new(LayeredSource::new(info, image, parent, options.salvage).doubted(doubt)))
}

/// Collects the facts of a footer.
pub(crate) fn describe(footer: &Footer) -> ImageInfo {
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(DISK.0, DISK_NAME, footer.current_size)],
        ..ImageInfo::default()
    };
    info.fact("subformat", "type", footer.disk_type.name());
    info.fact("creator", "creator", String::from_utf8_lossy(&footer.creator).trim_end().to_owned());
    info.fact(UUID, "UUID", footer.uuid.to_string());
    info.fact(TIMESTAMP, "created, seconds since 2000", footer.time);
    let geometry = footer.geometry;
    let shown = format!("{}/{}/{}", geometry.cylinders, geometry.heads, geometry.sectors);
    info.fact("geometry", "cylinders/heads/sectors", shown);
    if geometry.size() != footer.current_size && !geometry.is_largest() && by_geometry(footer) {
        info.notes.push(format!(
            "QEMU reads only the {} bytes of the geometry; the disk has {}",
            geometry.size(),
            footer.current_size
        ));
    }
    if footer.saved_state {
        info.notes.push("the guest's session was saved: its file systems may be in use".to_owned());
    }
    info
}

/// True for the creators for which QEMU takes the geometry for the size.
fn by_geometry(footer: &Footer) -> bool {
    matches!(&footer.creator, b"vpc " | b"qemu")
}

fn describe_blocks(image: &Image, info: &mut ImageInfo) {
    info.references = parent::references(image);
    if image.used_copy {
        info.notes
            .push("the footer at the end is missing or damaged; using its copy at the start".to_owned());
    }
    let Some(blocks) = &image.blocks else {
        if let Some(rest) = image.gap().filter(|rest| *rest > 0) {
            info.notes.push(format!(
                "{rest} bytes lie between the disk and its footer, which do not belong to the disk"
            ));
        }
        return;
    };
    info.cluster_size = Some(blocks.header.block_size);
    info.fact("block-size", "block size", blocks.header.block_size);
    if image.footer.disk_type == DiskType::Differencing {
        info.parent_identifier = Some((UUID, blocks.header.parent_uuid.to_string().into()));
        info.fact("parent-uuid", "UUID of the parent", blocks.header.parent_uuid.to_string());
        info.fact("parent-name", "name of the parent", blocks.header.parent_name.clone());
    }
}
