//! The parent of a differencing disk (section 2.6.2.6).
//!
//! The parent locator names the parent in several ways. Only the user decides which files may be
//! opened; a name is tried when it can mean a file here. Whatever is found must be the disk that the
//! child was made from: its data-write GUID is the child's parent linkage.

use imgtool_toolkit::{DeviceId, Error, ImageSource, OpenOptions, RandomAccess, Reference, Result};
use uuid::Uuid;

use crate::image::Image;

/// The fact under which a source tells its data-write GUID.
pub(crate) const DATA_WRITE_GUID: &str = "data-write-guid";

/// Keys of section 2.6.2.6.3 that name a file, best first.
const NAME_KEYS: [&str; 3] = ["relative_path", "absolute_win32_path", "volume_path"];

/// Keys that tell which data-write GUID the parent has; the second is set while a parent is changed.
const LINKAGE_KEYS: [&str; 2] = ["parent_linkage", "parent_linkage2"];

/// An opened parent.
pub(crate) struct Parent {
    source: Box<dyn ImageSource>,
    device: DeviceId,
    /// May differ from the child's, which can have been resized: behind it there are zeros.
    pub(crate) virtual_size: u64,
}

impl Parent {
    /// Reading its content.
    pub(crate) fn random(&self) -> Result<(&dyn RandomAccess, DeviceId)> {
        match self.source.random() {
            Some(random) => Ok((random, self.device)),
            None => Err(Error::unsupported("the parent can only be read as a stream")),
        }
    }

    /// The source, for what it lost.
    pub(crate) fn source(&self) -> &dyn ImageSource {
        &*self.source
    }
}

/// The names under which an image knows its parent, for `info`.
pub(crate) fn references(image: &Image) -> Vec<Reference> {
    // The name under which it will be looked for first; one that means nothing here is shown as it is.
    let names = || NAME_KEYS.iter().filter_map(|key| value(image, key));
    let name = names().find_map(local_name).or_else(|| names().next().map(str::to_owned));
    name.map(|name| Reference { role: "parent", name, format: Some("vhdx".to_owned()) }).into_iter().collect()
}

fn value<'a>(image: &'a Image, key: &str) -> Option<&'a str> {
    image.parent_locator.iter().find(|(known, _)| known == key).map(|(_, value)| value.as_str())
}

/// A Windows name as a path here: separators turned, `None` when it has no counterpart (a drive
/// letter, a volume or a share).
fn local_name(name: &str) -> Option<String> {
    let path = name.strip_prefix(r"\\?\").unwrap_or(name).replace('\\', "/");
    let has_drive = path.as_bytes().get(1) == Some(&b':');
    let is_foreign = has_drive || path.starts_with("//") || path.starts_with("Volume{") || path.is_empty();
    (!is_foreign).then_some(path)
}

/// Opens the parent that the image names.
pub(crate) fn open(image: &Image, options: &OpenOptions) -> Result<Parent> {
    let linkage = linkage(image)?;
    let mut first_error = None;
    let mut tried = Vec::new();
    for name in NAME_KEYS.iter().filter_map(|key| value(image, key)).filter_map(local_name) {
        if tried.contains(&name) {
            continue;
        }
        match options.externals.open_image("parent", &name, image.file.path(), Some("vhdx"), options) {
            Ok(source) => return check(source, &linkage, &name),
            Err(error) => first_error = first_error.or(Some(error)),
        }
        tried.push(name);
    }
    Err(first_error.unwrap_or_else(|| {
        let names: Vec<&str> = NAME_KEYS.iter().filter_map(|key| value(image, key)).collect();
        Error::unsupported(format!("the names of the parent mean nothing here: {}", names.join(", "))).hint(
            "place the parent beside the image; the image must know it by a relative path or a name on this system",
        )
    }))
}

fn linkage(image: &Image) -> Result<Vec<Uuid>> {
    let mut found = Vec::new();
    for key in LINKAGE_KEYS {
        let Some(text) = value(image, key) else { continue };
        match Uuid::try_parse(text) {
            Ok(guid) => found.push(guid),
            Err(_) => {
                return Err(Error::malformed(format!("{key} of the parent locator is no GUID: '{text}'")));
            }
        }
    }
    if found.is_empty() {
        return Err(Error::malformed("the parent locator has no parent_linkage"));
    }
    Ok(found)
}

fn check(source: Box<dyn ImageSource>, linkage: &[Uuid], name: &str) -> Result<Parent> {
    let info = source.info();
    let fact = info.facts.iter().find(|fact| fact.key == DATA_WRITE_GUID);
    let guid = fact.and_then(|fact| fact.value.as_str()).and_then(|text| Uuid::try_parse(text).ok());
    if guid.is_none_or(|guid| !linkage.contains(&guid)) {
        let found = guid.map_or_else(|| "none".to_owned(), |guid| guid.to_string());
        let wanted: Vec<String> = linkage.iter().map(Uuid::to_string).collect();
        return Err(Error::corrupt(format!(
            "parent '{name}' is not the disk that this one was made from: its data-write GUID is {found}, not {}",
            wanted.join(" or ")
        ))
        .hint("the parent was changed or replaced after the child was made: find the original"));
    }
    let [device] = info.devices.as_slice() else {
        return Err(Error::malformed(format!("parent '{name}' has {} disks", info.devices.len())));
    };
    let (device, virtual_size) = (device.id, device.size);
    Ok(Parent { source, device, virtual_size })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_names_become_paths_where_they_can() {
        assert_eq!(local_name(r".\base.vhdx").as_deref(), Some("./base.vhdx"));
        assert_eq!(local_name(r"..\a\base.vhdx").as_deref(), Some("../a/base.vhdx"));
        assert_eq!(local_name("/srv/base.vhdx").as_deref(), Some("/srv/base.vhdx"));
        for foreign in [r"C:\base.vhdx", r"\\?\C:\base.vhdx", r"\\server\x", r"\\?\Volume{1}\x", ""] {
            assert_eq!(local_name(foreign), None, "{foreign}");
        }
    }
}
