//! The parent of a differencing disk (section 2.6.2.6).
//!
//! The parent locator names the parent in several ways. The driver tries each name that can be a path on
//! this system, and the user's policy for external files decides which of them it may open. The file
//! must be the disk that the child was made from: its data-write GUID must equal the child's parent
//! linkage.

use std::sync::Arc;

use imgtool_core::external::local_name;
use imgtool_core::layered::StoredBytes;
use imgtool_core::{Disk, Error, ImageSource, OpenOptions, Reference, Result};
use uuid::Uuid;

use crate::image::Image;

/// Key of the fact that contains a source's data-write GUID.
pub(crate) const DATA_WRITE_GUID: &str = "data-write-guid";

/// Keys of the parent's names, in the order in which [`open`] tries them (section 2.6.2.6.3).
const NAME_KEYS: [&str; 3] = ["relative_path", "absolute_win32_path", "volume_path"];

/// Keys of the parent's data-write GUID (section 2.6.2.6.3). The second is set while a program changes the
/// parent.
const LINKAGE_KEYS: [&str; 2] = ["parent_linkage", "parent_linkage2"];

/// Returns the reference to the parent, for `info`; empty if the image has no parent.
pub(crate) fn references(image: &Image) -> Vec<Reference> {
    // Prefer the name that `open` tries first. If no name is a path on this system, use the first as it is.
    let names = || NAME_KEYS.iter().filter_map(|key| value(image, key));
    let name = names().find_map(local_name).or_else(|| names().next().map(str::to_owned));
    name.map(|name| Reference { role: "parent", name, format: Some("vhdx".to_owned()) }).into_iter().collect()
}

/// Returns the value of a key of the parent locator; `None` if the locator does not have the key.
fn value<'a>(image: &'a Image, key: &str) -> Option<&'a str> {
    image.parent_locator.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
}

/// Opens the parent of an image by the first of its names that can be opened.
///
/// # Errors
/// `Unsupported` if no name is a path on this system; the error for the first name if none can be opened;
/// `Corrupt` if the file is not the disk that the image was made from; `Malformed` if the parent locator has
/// no valid linkage.
pub(crate) fn open(image: &Image, options: &OpenOptions) -> Result<Disk> {
    let linkage = parent_linkage(image)?;
    let mut first_error = None;
    let mut tried = Vec::new();
    for name in NAME_KEYS.iter().filter_map(|key| value(image, key)).filter_map(local_name) {
        if tried.contains(&name) {
            continue;
        }
        match options.externals.open_image("parent", &name, image.file.location(), Some("vhdx"), options) {
            Ok(source) => return check_linkage(source, &linkage, &name),
            Err(error) => first_error = first_error.or(Some(error)),
        }
        tried.push(name);
    }
    Err(first_error.unwrap_or_else(|| {
        let names: Vec<&str> = NAME_KEYS.iter().filter_map(|key| value(image, key)).collect();
        Error::unsupported(format!("no name of the parent is a path on this system: {}", names.join(", ")))
            .hint("set the parent path of the image to a relative path, or to a path of this system")
    }))
}

/// Returns the data-write GUIDs that the parent may have; at least one.
fn parent_linkage(image: &Image) -> Result<Vec<Uuid>> {
    let mut found = Vec::new();
    for key in LINKAGE_KEYS {
        let Some(text) = value(image, key) else { continue };
        match Uuid::try_parse(text) {
            Ok(guid) => found.push(guid),
            Err(_) => {
                return Err(Error::malformed(format!("{key} of the parent locator is not a GUID: '{text}'")));
            }
        }
    }
    if found.is_empty() {
        return Err(Error::malformed("the parent locator has no parent_linkage"));
    }
    Ok(found)
}

/// Checks by the data-write GUID that a source is the parent, and returns its only disk.
fn check_linkage(source: Arc<dyn ImageSource>, linkage: &[Uuid], name: &str) -> Result<Disk> {
    let info = source.info();
    let fact = info.facts.iter().find(|fact| fact.key == DATA_WRITE_GUID);
    let guid = fact.and_then(|fact| fact.value.as_str()).and_then(|text| Uuid::try_parse(text).ok());
    if guid.is_none_or(|guid| !linkage.contains(&guid)) {
        let found = guid.map_or_else(|| "none".to_owned(), |guid| guid.to_string());
        let expected: Vec<String> = linkage.iter().map(Uuid::to_string).collect();
        return Err(Error::corrupt(format!(
            "parent '{name}' is not the disk that the image was made from: its data-write GUID is {found}, not {}",
            expected.join(" or ")
        ))
        .hint("the parent was changed or replaced after the image was made: find the original"));
    }
    Disk::only(source, &format!("parent '{name}'"))
}
