//! The parent of a snapshot's image.

use imgtool_core::error::escape_control;
use imgtool_core::external::local_name;
use imgtool_core::{Disk, Error, ErrorKind, OpenOptions, Reference, Remedy, Result};

use crate::descriptor::Descriptor;
use crate::image::Image;
use crate::source::CID;

/// Returns the reference to the parent, for `info`; empty if the image has no parent.
pub(crate) fn references(image: &Image) -> Vec<Reference> {
    let Some(descriptor) = image.descriptor.as_ref().filter(|descriptor| descriptor.parent_cid().is_some())
    else {
        return Vec::new();
    };
    let name = names(descriptor).into_iter().next().or_else(|| descriptor.parent_hint.clone());
    let name = name.unwrap_or_default();
    vec![Reference { role: "parent", name, format: Some(crate::FORMAT.to_owned()) }]
}

/// Opens the parent of an image: by the name that the image has for it, or by the last component of that name
/// in the image's directory. In a salvage, the parent may have another content identifier: who repairs a chain
/// needs what is left of it. Returns that fault with it.
///
/// # Errors
/// `Unsupported` if no name is a path on this system; an error of the first name's kind if none can be opened;
/// `Corrupt` if the parent was written to after the child was made.
pub(crate) fn open(
    image: &Image,
    descriptor: &Descriptor,
    cid: u32,
    options: &OpenOptions,
) -> Result<(Disk, Option<String>)> {
    let mut errors = Vec::new();
    for name in names(descriptor) {
        let from = image.files[0].location();
        // Never by content: any file could imitate a raw disk.
        match options.externals.open_image("parent", &name, from, Some(crate::FORMAT), options) {
            Ok(source) => {
                let fact = source.info().facts.iter().find(|fact| fact.key == CID);
                let found = fact.and_then(|fact| fact.value.as_u64());
                let wrong = (found != Some(cid.into())).then(|| wrong_parent(&name, found, cid));
                let doubt = match wrong {
                    Some(error) if !options.salvage => return Err(error),
                    wrong => wrong.map(|error| format!("unverified: {}", error.message())),
                };
                return Ok((Disk::only(source, &format!("parent '{name}'"))?, doubt));
            }
            Err(error) => errors.push((name, error)),
        }
    }
    let hint = descriptor.parent_hint.as_deref().unwrap_or("");
    Err(unopened(errors).unwrap_or_else(|| {
        Error::unsupported(format!("the name of the parent '{hint}' is not a path on this system"))
            .hint("put the parent beside the image, under the last component of that name")
    }))
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
