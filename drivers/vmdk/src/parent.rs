//! The parent of a snapshot's image.
//!
//! VMware and QEMU store the parent's name and its content identifier. VirtualBox stores UUIDs alone: the driver looks
//! for them among the files that the user allowed.

use imgtool_core::candidates::{Match, find_parent};
use imgtool_core::error::escape_control;
use imgtool_core::external::local_name;
use imgtool_core::{Disk, Error, ErrorKind, ImageInfo, Input, OpenOptions, Reference, Remedy, Result};
use uuid::Uuid;

use crate::descriptor::Descriptor;
use crate::descriptor::identity::ParentId;
use crate::extents::read_descriptor;
use crate::image::Image;
use crate::source::{CID, MODIFICATION_UUID, UUID};

/// An open parent.
pub(crate) struct Parent {
    pub(crate) disk: Disk,
    /// Name under which it was found.
    pub(crate) name: String,
    /// Reason why a salvage can't prove that it is the parent, as it was when the image was made.
    pub(crate) doubt: Option<String>,
}

/// Returns the reference to the parent, for `info`; `None` if the image has no parent. `found` is the name under which
/// it was found.
pub(crate) fn reference(image: &Image, found: Option<String>) -> Option<Reference> {
    let (descriptor, id) = image.parent_id()?;
    let name = match descriptor.hint() {
        Some(hint) => names(descriptor).into_iter().next().unwrap_or_else(|| hint.to_owned()),
        None => found.unwrap_or_else(|| id.to_string()),
    };
    Some(Reference { role: "parent", name, format: Some(crate::FORMAT.to_owned()) })
}

/// Returns the name of a parent that the image does not name, if it is among the files that the user allowed.
pub(crate) fn name(
    image: &Image,
    descriptor: &Descriptor,
    id: ParentId,
    options: &OpenOptions,
) -> Option<String> {
    if descriptor.hint().is_some() {
        return None;
    }
    find(image, id, options).ok().map(|(name, _)| name)
}

/// Opens the parent of an image: by the name that the image has for it, by the last component of that name in the
/// image's directory or, if it has no name, by its identifier among the files that the user allowed. In a salvage, the
/// parent may have another content identifier: who repairs a chain needs what is left of it.
///
/// # Errors
/// `Unsupported` if no name is a path on this system; an error of the first name's kind if none can be opened;
/// `Corrupt` if the parent was written to after the child was made; the errors of [`find_parent`].
pub(crate) fn open(
    image: &Image,
    descriptor: &Descriptor,
    id: ParentId,
    options: &OpenOptions,
) -> Result<Parent> {
    if descriptor.hint().is_some() {
        return open_named(image, descriptor, id, options);
    }
    let (name, doubt) = find(image, id, options)?;
    let from = image.files[0].location();
    let source = options.externals.open_image("parent", &name, from, Some(crate::FORMAT), options)?;
    Ok(Parent { disk: Disk::only(source, &format!("parent '{name}'"))?, name, doubt })
}

/// Finds a parent by its identifier.
fn find(image: &Image, id: ParentId, options: &OpenOptions) -> Result<(String, Option<String>)> {
    let from = image.files[0].location();
    // No damage of a candidate matters.
    let strict = OpenOptions { salvage: false, ..options.clone() };
    let judge = |name: &str, input: Input| {
        let Some(found) = read_descriptor(input, &strict)? else { return Ok(Match::Other) };
        Ok(match id {
            ParentId::Cid(cid) if found.cid == Some(cid) => Match::Parent,
            ParentId::Uuid { image, content } if found.uuids.image == Some(image) => match content {
                Some(content) if found.uuids.modification != Some(content) => {
                    Match::Changed(changed_parent(name, found.uuids.modification, content))
                }
                _ => Match::Parent,
            },
            _ => Match::Other,
        })
    };
    find_parent(options, &id.to_string(), from, crate::FORMAT, judge)
}

fn changed_parent(name: &str, found: Option<Uuid>, expected: Uuid) -> Error {
    let found = found.map_or_else(|| "none".to_owned(), |found| found.to_string());
    Error::corrupt(format!(
        "parent '{}' has changed since the image was made: the UUID of its content is {found}, not {expected}",
        escape_control(name)
    ))
    .remedied_by(Remedy::Salvage("find the original of the parent, or a backup of it".into()))
}

/// Opens a parent that the image names.
fn open_named(image: &Image, descriptor: &Descriptor, id: ParentId, options: &OpenOptions) -> Result<Parent> {
    let mut errors = Vec::new();
    for name in names(descriptor) {
        let from = image.files[0].location();
        // Never by content: any file could imitate a raw disk.
        match options.externals.open_image("parent", &name, from, Some(crate::FORMAT), options) {
            Ok(source) => {
                let doubt = match fault(&name, source.info(), id) {
                    Some(error) if !options.salvage => return Err(error),
                    fault => fault.map(|error| format!("unverified: {}", error.message())),
                };
                return Ok(Parent { disk: Disk::only(source, &format!("parent '{name}'"))?, name, doubt });
            }
            Err(error) => errors.push((name, error)),
        }
    }
    let hint = descriptor.hint().unwrap_or("");
    Err(unopened(errors).unwrap_or_else(|| {
        Error::unsupported(format!("the name of the parent '{hint}' is not a path on this system"))
            .hint("put the parent beside the image, under the last component of that name")
    }))
}

/// Returns the error for a file with these facts that is not the parent, or not as it was when the image was made.
fn fault(name: &str, info: &ImageInfo, id: ParentId) -> Option<Error> {
    let fact = |key: &str| info.facts.iter().find(|fact| fact.key == key).map(|fact| &fact.value);
    let uuid = |key: &str| fact(key)?.as_str().and_then(|text| Uuid::try_parse(text).ok());
    match id {
        ParentId::Cid(cid) => {
            let found = fact(CID).and_then(|value| value.as_u64());
            (found != Some(cid.into())).then(|| wrong_parent(name, found, cid))
        }
        ParentId::Uuid { image, .. } if uuid(UUID) != Some(image) => Some(
            Error::corrupt(format!(
                "'{}' is not the parent: it has not the UUID {image}",
                escape_control(name)
            ))
            .remedied_by(Remedy::Salvage("find the original of the parent, or a backup of it".into())),
        ),
        ParentId::Uuid { content, .. } => {
            let expected = content?;
            let found = uuid(MODIFICATION_UUID);
            (found != Some(expected)).then(|| changed_parent(name, found, expected))
        }
    }
}

/// Returns the error for a parent that has these names, none of which can be opened.
fn unopened(errors: Vec<(String, Error)>) -> Option<Error> {
    let mut errors = errors.into_iter();
    let (first, error) = errors.next()?;
    let Some((second, _)) = errors.next() else { return Some(error) };
    let remedy = error.remedy().cloned().unwrap_or_else(|| "put the parent beside the image".into());
    // The message of an I/O error begins with "can't".
    let cannot = if error.kind() == ErrorKind::Io { "" } else { "can't " };
    let both = format!(
        "{cannot}open the parent as '{}', nor as '{}' beside the image",
        escape_control(&first),
        escape_control(&second)
    );
    Some(Error::new(error.kind(), both).remedied_by(remedy).because(error))
}

fn wrong_parent(name: &str, found: Option<u64>, cid: u32) -> Error {
    let found = found.map_or("none".to_owned(), |found| format!("{found:08x}"));
    Error::corrupt(format!(
        "parent '{name}' is not as it was when this image was made: its content identifier is {found}, not \
         {cid:08x}"
    ))
    .remedied_by(Remedy::Salvage(
        "another program wrote to the parent, or the file is another disk: use a backup of it".into(),
    ))
}

/// Returns the names of the parent that are paths on this system, in the order in which they are tried.
fn names(descriptor: &Descriptor) -> Vec<String> {
    let Some(hint) = descriptor.parent_hint.as_deref() else { return Vec::new() };
    let last = hint.rsplit(['\\', '/']).next().unwrap_or(hint);
    let mut names: Vec<String> = local_name(hint).into_iter().collect();
    names.extend(local_name(last).filter(|last| !names.contains(last)));
    names
}
