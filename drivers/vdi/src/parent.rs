//! The parent of a differencing image.
//!
//! An image stores no name of its parent, but two UUIDs: that of the parent, and that of the parent's content
//! at the time when the child was made. VirtualBox keeps a registry of its images. The driver looks among the
//! files that the user allowed instead.

use imgtool_core::{Disk, Error, ErrorKind, Input, OpenOptions, Reference, Remedy, Result};
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

/// Returns the name of the parent of an image: the first candidate with the UUIDs that the image names. In a salvage,
/// the parent's content may have changed, if no candidate is as it was: who repairs a chain needs what is left of it.
/// Returns that fault with it.
///
/// # Errors
/// `Refused` if the user allowed no files, or if none of them is the parent; `Corrupt` if the parent was found, but
/// its content has changed since; the first error of a candidate if one could not be read.
pub(crate) fn find(image: &Image, options: &OpenOptions) -> Result<(String, Option<String>)> {
    let uuid = image.header.parent_uuid;
    let content = image.header.parent_modification_uuid;
    let from = image.input.location();
    let (mut changed, mut unreadable) = (None, None);
    for name in options.externals.candidates("parent", &format!("{{{uuid}}}"), from, crate::FORMAT)? {
        let found = match options.externals.open_file("parent", &name, from).and_then(header) {
            Ok(found) => found,
            Err(error) => {
                unreadable = unreadable.or(Some(error).filter(|error| error.kind() == ErrorKind::Io));
                continue;
            }
        };
        let Some(found) = found.filter(|found| found.uuid == uuid && !uuid.is_nil()) else { continue };
        if !content.is_nil() && found.modification_uuid != content {
            changed = changed.or(Some((name, found.modification_uuid)));
            continue;
        }
        return Ok((name, None));
    }
    Err(match (changed, unreadable) {
        (Some((name, found)), _) if options.salvage => {
            let doubt = format!("unverified: {}", changed_parent(&name, found, content).message());
            return Ok((name, Some(doubt)));
        }
        (Some((name, found)), _) => changed_parent(&name, found, content),
        // It may be the parent.
        (None, Some(error)) => error,
        (None, None) => Error::refused(format!("no allowed file is the parent, the VDI image {{{uuid}}}"))
            .remedied_by(Remedy::AllowExternal { name: format!("{{{uuid}}}") }),
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
