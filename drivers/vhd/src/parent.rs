//! The parent of a differencing image.
//!
//! The dynamic header names the parent in several ways. The driver tries each name that can be a path on this
//! system, and the user's policy for external files decides which of them it may open. The file must be the
//! image that the child was made from: its UUID must be the parent UUID of the child. The parent's time is
//! not compared, since copies and time zones change it.

use imgtool_core::external::local_name;
use imgtool_core::{Disk, Error, OpenOptions, Reference, Remedy, Result};
use uuid::Uuid;

use crate::image::{Blocks, Image};
use crate::layout::footer::DiskType;
use crate::layout::header::{Locator, utf16};
use crate::source::UUID;

/// Returns the reference to the parent, for `info`; empty if the image has no parent.
pub(crate) fn references(image: &Image) -> Vec<Reference> {
    let blocks = image.blocks.as_ref().filter(|_| image.footer.disk_type == DiskType::Differencing);
    let Some(blocks) = blocks else { return Vec::new() };
    let names = names(image, blocks);
    let name = names.first().cloned().unwrap_or_else(|| blocks.header.parent_name.clone());
    vec![Reference { role: "parent", name, format: Some(crate::FORMAT.to_owned()) }]
}

/// Opens the parent of an image: the first of its names that leads to the image that the child was made from. In a
/// salvage, the parent may have another UUID, if no file has the right one: who repairs a chain needs what is left of
/// it. Returns that fault with it.
///
/// # Errors
/// `Unsupported` if no name is a path on this system; `Corrupt` if the files that can be opened are other images;
/// the error for the first name if none can be opened.
pub(crate) fn open(image: &Image, blocks: &Blocks, options: &OpenOptions) -> Result<(Disk, Option<String>)> {
    let (mut first_error, mut mismatch) = (None, None);
    for name in names(image, blocks) {
        let from = image.input.location();
        // Never by content: the parent may be a fixed image, which any raw disk can imitate.
        match options.externals.open_image("parent", &name, from, Some(crate::FORMAT), options) {
            Ok(source) => {
                let fact = source.info().facts.iter().find(|fact| fact.key == UUID);
                let found = fact.and_then(|fact| fact.value.as_str()).map(Uuid::try_parse);
                if found != Some(Ok(blocks.header.parent_uuid)) {
                    let error = wrong_parent(&name, fact.and_then(|fact| fact.value.as_str()), blocks);
                    mismatch = mismatch.or(Some((source, name, error)));
                    continue;
                }
                return Ok((Disk::only(source, &format!("parent '{name}'"))?, None));
            }
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    if let Some((source, name, error)) = mismatch {
        if !options.salvage {
            return Err(error);
        }
        let doubt = format!("unverified: {}", error.message());
        return Ok((Disk::only(source, &format!("parent '{name}'"))?, Some(doubt)));
    }
    Err(first_error.unwrap_or_else(|| {
        Error::unsupported(format!(
            "no name of the parent '{}' is a path on this system",
            blocks.header.parent_name
        ))
        .hint("put the parent beside the image, under the name that the image has for it")
    }))
}

fn wrong_parent(name: &str, found: Option<&str>, blocks: &Blocks) -> Error {
    Error::corrupt(format!(
        "parent '{name}' is not the image that this one was made from: its UUID is {}, not {}",
        found.unwrap_or("none"),
        blocks.header.parent_uuid
    ))
    .remedied_by(Remedy::Salvage(
        "the parent was replaced after the image was made: find the original".into(),
    ))
}

/// Returns the names of the parent that are paths on this system, in the order in which they are tried: the
/// relative path, the last component of the stored name in the image's directory, the absolute path.
fn names(image: &Image, blocks: &Blocks) -> Vec<String> {
    let by_code = |code: &[u8; 4]| {
        let found = blocks.header.locators.iter().filter(move |locator| locator.code == *code);
        found.filter_map(|locator| read_name(image, locator)).collect::<Vec<_>>()
    };
    let last = blocks.header.parent_name.rsplit(['\\', '/']).next().map(str::to_owned);
    let mut names = by_code(b"W2ru");
    names.extend(last);
    names.extend(by_code(b"W2ku"));
    let mut known: Vec<String> = Vec::new();
    for name in names.iter().filter_map(|name| local_name(name)) {
        if !known.contains(&name) {
            known.push(name);
        }
    }
    known
}

/// Reads a name in UTF-16LE; `None` if the file does not contain it.
fn read_name(image: &Image, locator: &Locator) -> Option<String> {
    let bytes = image.input.read_vec(locator.file_offset, locator.len).ok()?;
    let (units, _) = bytes.as_chunks::<2>();
    let units: Vec<u16> = units.iter().map(|unit| u16::from_le_bytes(*unit)).collect();
    Some(utf16(&units))
}
