//! Reading images by position: their facts, and the parent of a snapshot.

use std::sync::Arc;

use imgtool_core::layered::LayeredSource;
use imgtool_core::{Device, ImageInfo, ImageSource, Input, OpenOptions, Reference, Result};
use serde_json::{Value, json};

use crate::descriptor::identity::{ParentId, Uuids};
use crate::descriptor::{Access, Kind, NO_PARENT};
use crate::grains::GrainFile;
use crate::image::{Content, DISK, DISK_NAME, Extent, Image};
use crate::layout::SECTOR_SIZE;
use crate::parent::{self, Parent};

/// Key of the fact that contains an image's content identifier.
pub(crate) const CID: &str = "cid";

/// Key of the fact that contains the variant of an image.
pub(crate) const CREATE_TYPE: &str = "create-type";

/// Key of the fact that contains an image's UUID.
pub(crate) const UUID: &str = "uuid";

/// Key of the fact that contains the UUID of an image's content.
pub(crate) const MODIFICATION_UUID: &str = "modification-uuid";

/// Maximum number of extents that the facts list. Our limit, for the length of the output.
const MAX_LISTED_EXTENTS: usize = 1000;

/// Opens an image and, unless only information is needed, its parent.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let mut image = Image::open(input, options)?;
    let damage = image.damage.take();
    let contradiction = match image.contradiction() {
        Some(error) if !options.salvage && !options.info_only => return Err(error),
        contradiction => contradiction.map(|error| format!("unverified: {}", error.message())),
    };
    let (parent, name, doubt) = match image.parent_id() {
        Some((descriptor, id)) if !options.info_only => {
            let parent = parent::open(&image, descriptor, id, options);
            let Parent { disk, name, doubt } =
                parent.map_err(|error| error.path(image.files[0].location()))?;
            (Some(disk), Some(name), doubt)
        }
        Some((descriptor, id)) => (None, parent::name(&image, descriptor, id, options), None),
        None => (None, None, contradiction.clone()),
    };
    let mut info = describe(&image);
    info.references.splice(0..0, parent::reference(&image, name));
    info.notes.extend(contradiction.filter(|_| options.info_only));
    Ok(Arc::new(LayeredSource::new(info, image, parent, options.salvage).doubted(doubt).damaged(damage)))
}

/// Collects the facts of an image, with the names of qemu-img where it has them.
fn describe(image: &Image) -> ImageInfo {
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(DISK.0, DISK_NAME, image.virtual_size)],
        ..ImageInfo::default()
    };
    describe_descriptor(image, &mut info);
    let listed: Vec<Value> =
        image.extents.iter().take(MAX_LISTED_EXTENTS).map(|e| extent(image, e)).collect();
    if !image.single {
        info.fact("extent-count", "extents", image.extents.len());
    }
    info.fact("extents", "extent list", Value::from(listed));
    for extent in &image.extents {
        if let Some((size, _)) = shape(extent) {
            info.cluster_size = Some(info.cluster_size.unwrap_or(0).max(size));
        }
        if let Content::Grains { file, .. } = &extent.content {
            note_header(file, &mut info);
        }
    }
    info.notes.extend(image.faults.iter().cloned());
    info.references.extend(extent_references(image));
    note_rounding(image, &mut info);
    if image.single && image.descriptor.is_none() {
        info.notes.push(
            "the file has no descriptor: if it is one extent of a split disk or snapshot, name the disk's \
             descriptor instead"
                .to_owned(),
        );
    }
    info
}

fn describe_descriptor(image: &Image, info: &mut ImageInfo) {
    let Some(descriptor) = &image.descriptor else { return };
    if let Some(create_type) = &descriptor.create_type {
        info.fact(CREATE_TYPE, "type", create_type.clone());
    }
    if let Some(cid) = descriptor.cid {
        info.worded_fact(CID, "content identifier", cid, format!("{cid:08x}"));
    }
    info.parent_identifier = descriptor.parent_id().map(|id| match id {
        ParentId::Cid(cid) => (CID, cid.into()),
        ParentId::Uuid { image, .. } => (UUID, image.to_string().into()),
    });
    let parent = descriptor.parent_cid.unwrap_or(NO_PARENT);
    let text = if parent == NO_PARENT { "none".to_owned() } else { format!("{parent:08x}") };
    info.worded_fact("parent-cid", "content identifier of the parent", parent, text);
    describe_uuids(&descriptor.uuids, info);
    if let Some(adapter) = &descriptor.adapter {
        info.fact("adapter-type", "adapter", adapter.clone());
    }
    if let Some(version) = &descriptor.hardware_version {
        info.fact("hwversion", "hardware version", version.clone());
    }
}

/// Adds the UUIDs that VirtualBox stores.
fn describe_uuids(uuids: &Uuids, info: &mut ImageInfo) {
    let all = [
        (UUID, "UUID", uuids.image),
        (MODIFICATION_UUID, "UUID of the content", uuids.modification),
        ("parent-uuid", "UUID of the parent", uuids.parent),
        ("parent-modification-uuid", "UUID of the parent's content", uuids.parent_modification),
    ];
    for (key, label, uuid) in all {
        if let Some(uuid) = uuid {
            info.fact(key, label, uuid.to_string());
        }
    }
}

/// Notes that the header of a single file has another size than the disk.
fn note_rounding(image: &Image, info: &mut ImageInfo) {
    let Some(Extent { content: Content::Grains { file, .. }, .. }) = image.extents.first() else { return };
    let capacity = file.hosted.as_ref().map_or(0, |header| header.capacity.saturating_mul(SECTOR_SIZE));
    if image.single && capacity > image.virtual_size {
        info.notes.push(format!(
            "QEMU takes the {capacity} bytes of the header for the size of the disk, which are rounded up; it has {}",
            image.virtual_size
        ));
    }
}

/// Adds notes about the header of a sparse file.
fn note_header(file: &GrainFile, info: &mut ImageInfo) {
    let Some(header) = &file.hosted else { return };
    let mut note = |text: String| {
        if !info.notes.contains(&text) {
            info.notes.push(text);
        }
    };
    if header.unknown_flags != 0 {
        note(format!("the header has unknown flags ({:#x}), which are not required", header.unknown_flags));
    }
    if header.unclean_shutdown {
        note("the image was not closed: its tables may be incomplete".to_owned());
    }
    if header.version == 3 && !header.compressed {
        note("the header has version 3, which VMware uses with a change tracking file".to_owned());
    }
}

/// Returns the size of a grain of a sparse extent, and true if grains are compressed.
fn shape(extent: &Extent) -> Option<(u64, bool)> {
    match &extent.content {
        Content::Grains { file, .. } => {
            let compressed = file.hosted.as_ref().is_some_and(|header| header.compressed);
            Some((file.grain_size, compressed))
        }
        Content::Closed(shape) => *shape,
        _ => None,
    }
}

/// Describes an extent as qemu-img does.
fn extent(image: &Image, extent: &Extent) -> Value {
    let grains = match &extent.content {
        Content::Grains { file, .. } => Some(file),
        _ => None,
    };
    let line = image.descriptor.as_ref().filter(|_| !image.single);
    let line = line.and_then(|descriptor| descriptor.extents.get(extent.line));
    let own = image.files[0].location();
    let (format, file) = match (line, grains) {
        // The name in a single file need not be that of the file. qemu-img has no format for it; it opens no file of
        // the other kinds alone.
        (None, Some(file)) => (if file.hosted.is_some() { "" } else { file.kind }, Some(own.to_string())),
        (Some(line), _) if line.access == Access::None => ("NOACCESS", None),
        (Some(line), _) if line.kind == Kind::Zero => ("ZERO", None),
        (Some(line), _) => (&*line.type_name, own.beside(&line.name).map(|file| file.to_string())),
        (None, None) => ("", None),
    };
    let mut value = json!({ "virtual-size": extent.len, "format": format });
    if let Some(file) = file {
        value["filename"] = file.into();
    }
    if let Some((grain_size, compressed)) = shape(extent) {
        value["cluster-size"] = grain_size.into();
        if compressed {
            value["compressed"] = true.into();
        }
    }
    value
}

/// Returns the files that the descriptor names.
fn extent_references(image: &Image) -> Vec<Reference> {
    let Some(descriptor) = image.descriptor.as_ref().filter(|_| !image.single) else { return Vec::new() };
    let mut names: Vec<&str> = Vec::new();
    for line in descriptor.extents.iter().take(MAX_LISTED_EXTENTS) {
        if line.access == Access::Readable && line.kind != Kind::Zero && names.last() != Some(&&*line.name) {
            names.push(&line.name);
        }
    }
    let reference = |name: &str| Reference { role: "extent", name: name.to_owned(), format: None };
    names.into_iter().map(reference).collect()
}
