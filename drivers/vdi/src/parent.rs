//! The parent of a differencing image.
//!
//! An image stores no name of its parent, but two UUIDs: that of the parent, and that of the parent's content
//! at the time when the child was made. VirtualBox keeps a registry of its images. The driver looks among the
//! files that the user allowed instead.

use imgtool_core::candidates::{Match, find_parent};
use imgtool_core::{Disk, Error, Input, OpenOptions, Reference, Remedy, Result};
use uuid::Uuid;

use crate::image::Image;
use crate::layout::{Header, MAX_HEADER_LEN};

/// Returns the reference to the parent with the name that [`find`] returned, or its UUID.
pub(crate) fn reference(image: &Image, found: Option<&str>) -> Reference {
    let name = found.map_or_else(|| format!("{{{}}}", image.header.parent_uuid), str::to_owned);
    Reference { role: "parent", name, format: Some(crate::FORMAT.to_owned()) }
}

/// Opens the parent that [`find`] returned.
pub(crate) fn open(name: &str, image: &Image, options: &OpenOptions) -> Result<Disk> {
    let from = image.input.location();
    let source = options.externals.open_image("parent", name, from, Some(crate::FORMAT), options)?;
    Disk::only(source, &format!("parent '{name}'"))
}

/// Returns the name of the parent of an image, and in a salvage its fault; see [`find_parent`].
///
/// # Errors
/// Same as [`find_parent`].
pub(crate) fn find(image: &Image, options: &OpenOptions) -> Result<(String, Option<String>)> {
    let uuid = image.header.parent_uuid;
    let content = image.header.parent_modification_uuid;
    let identity = format!("{{{uuid}}}");
    find_parent(options, &identity, image.input.location(), crate::FORMAT, |name, input| {
        Ok(match header(input)?.filter(|found| found.uuid == uuid && !uuid.is_nil()) {
            None => Match::Other,
            Some(found) if !content.is_nil() && found.modification_uuid != content => {
                Match::Changed(changed_parent(name, found.modification_uuid, content))
            }
            Some(_) => Match::Parent,
        })
    })
}

fn changed_parent(name: &str, found: Uuid, expected: Uuid) -> Error {
    Error::corrupt(format!(
        "parent '{name}' has changed since the image was made: its content has the UUID {found}, not {expected}"
    ))
    .remedied_by(Remedy::Salvage("find the original of the parent, or a backup of it".into()))
}

/// Reads the header of a candidate; `None` if the file is not a VDI image.
fn header(input: Input) -> Result<Option<Header>> {
    let input = input.into_random()?;
    Ok(Header::decode(&input.read_head(MAX_HEADER_LEN)?).ok())
}
