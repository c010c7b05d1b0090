//! The parent of a differencing image.
//!
//! An image stores no name of its parent, but two UUIDs: that of the parent, and that of the parent's content
//! at the time when the child was made. VirtualBox keeps a registry of its images. The driver looks among the
//! files that the user allowed instead.

use imgtool_core::{Disk, Error, Input, OpenOptions, Reference, Remedy, Result};
use uuid::Uuid;

use crate::image::Image;
use crate::layout::{Header, ImageType, MAX_HEADER_LEN};

/// Returns the reference to the parent, for `info`; empty if the image has no parent.
pub(crate) fn references(image: &Image) -> Vec<Reference> {
    let is_child = image.header.image_type == ImageType::Differencing;
    let name = format!("{{{}}}", image.header.parent_uuid);
    let reference = Reference { role: "parent", name, format: Some(crate::FORMAT.to_owned()) };
    is_child.then_some(reference).into_iter().collect()
}

/// Opens the parent of an image: the first candidate with the UUIDs that the image names.
///
/// # Errors
/// `Refused` if the user allowed no files; `Corrupt` if the parent was found, but its content has changed
/// since; `Io` if no candidate is the parent.
pub(crate) fn open(image: &Image, options: &OpenOptions) -> Result<Disk> {
    let uuid = image.header.parent_uuid;
    let content = image.header.parent_modification_uuid;
    let from = image.input.location();
    let mut changed = None;
    for name in options.externals.candidates("parent", &format!("{{{uuid}}}"), from, crate::FORMAT)? {
        let Ok(input) = options.externals.open_file("parent", &name, from) else { continue };
        let Some(found) = header(input).filter(|found| found.uuid == uuid && !uuid.is_nil()) else {
            continue;
        };
        if !content.is_nil() && found.modification_uuid != content {
            changed = changed.or(Some((name, found.modification_uuid)));
            continue;
        }
        let source = options.externals.open_image("parent", &name, from, Some(crate::FORMAT), options)?;
        return Disk::only(source, &format!("parent '{name}'"));
    }
    Err(match changed {
        Some((name, found)) => changed_parent(&name, found, content),
        None => Error::refused(format!("no allowed file is the parent, the VDI image {{{uuid}}}"))
            .remedied_by(Remedy::AllowExternal { name: format!("{{{uuid}}}") }),
    })
}

fn changed_parent(name: &str, found: Uuid, expected: Uuid) -> Error {
    Error::corrupt(format!(
        "parent '{name}' has changed since the image was made: its content has the UUID {found}, not {expected}"
    ))
    .hint("find the original of the parent, or a backup of it")
}

/// Reads the header of a candidate; `None` if the file is not a VDI image.
fn header(input: Input) -> Option<Header> {
    let input = input.into_random().ok()?;
    let len = input.len().min(MAX_HEADER_LEN as u64) as usize;
    Header::decode(&input.read_vec(0, len).ok()?).ok()
}
