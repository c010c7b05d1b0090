//! The search for a parent that an image identifies instead of naming it.

use crate::error::escape_control;
use crate::{Error, ErrorKind, Input, Location, OpenOptions, Remedy, Result};

/// Relation of a file to the parent that an image identifies.
#[derive(Debug)]
pub enum Match {
    /// The file is another image, or none.
    Other,
    /// The file is the parent, but its content has changed, which the error describes.
    Changed(Error),
    /// The file is the parent.
    Parent,
}

/// Returns the name of the parent that the image at `from` identifies by `identity`: of all files that the user
/// allowed, the one that `judge` takes for it. `format` is the parent's format and its extension. In a salvage, its
/// content may have changed, if no file is as it was, and several files may be the parent: who repairs a chain needs
/// what is left of it. Returns that fault with the name.
///
/// # Errors
/// [`ErrorKind::Refused`] if the user allowed no files, if none of them is the parent, or if several are: they may
/// differ, since not every program changes the identifiers of an image into which it writes. The error in
/// [`Match::Changed`]; the first I/O error of a file if one could not be read.
pub fn find_parent(
    options: &OpenOptions,
    identity: &str,
    from: &Location,
    format: &'static str,
    judge: impl Fn(&str, Input) -> Result<Match>,
) -> Result<(String, Option<String>)> {
    let (mut parents, mut changed, mut unreadable) = (Vec::new(), None, None);
    for name in options.externals.candidates("parent", identity, from, format)? {
        match options.externals.open_file("parent", &name, from).and_then(|input| judge(&name, input)) {
            Ok(Match::Parent) => parents.push(name),
            Ok(Match::Changed(error)) => changed = changed.or(Some((name, error))),
            Ok(Match::Other) => {}
            Err(error) => {
                unreadable = unreadable.or(Some(error).filter(|error| error.kind() == ErrorKind::Io));
            }
        }
    }
    let unverified = |error: &Error| Some(format!("unverified: {}", error.message()));
    let mut parents = parents.into_iter();
    match (parents.next(), parents.next(), changed, unreadable) {
        (Some(first), Some(second), _, _) => {
            let error = several(&first, &second, identity);
            if options.salvage { Ok((first, unverified(&error))) } else { Err(error) }
        }
        (Some(name), None, _, _) => Ok((name, None)),
        (None, _, Some((name, error)), _) if options.salvage => Ok((name, unverified(&error))),
        (None, _, Some((_, error)), _) => Err(error),
        // It may be the parent.
        (None, _, None, Some(error)) => Err(error),
        (None, _, None, None) => Err(Error::refused(format!(
            "no allowed file is the parent, the {} image {identity}",
            format.to_ascii_uppercase()
        ))
        .remedied_by(Remedy::AllowExternal { name: identity.to_owned() })),
    }
}

/// Returns the error for two files, each of which may be the parent.
fn several(first: &str, second: &str, identity: &str) -> Error {
    Error::refused(format!(
        "two allowed files have the identifier {identity} of the parent, '{}' and '{}'",
        escape_control(first),
        escape_control(second)
    ))
    .remedied_by(Remedy::Salvage("allow the parent alone, by its path".into()))
}
