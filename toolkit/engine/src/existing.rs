//! Format of a target that exists. If nobody states it, the content decides how the target is written into, so that
//! an image is never overwritten as a raw disk.

use std::path::Path;
use std::sync::Arc;

use imgtool_core::{Confidence, Driver, Error, Location, Memory, Registry, Remedy, Result};
use imgtool_storage::open::{OpenInput, Opening, open_shared};
use imgtool_storage::os::{self, FileClass};
use imgtool_storage::{Sharing, outer};

use crate::{contents, open};

/// Returns the format in which a file or block device that exists is written into, unless its name states another
/// one than raw; `None` also for an empty file, and where there is no file or device.
///
/// # Errors
/// Same as [`format_of`].
pub(crate) fn unless_named(registry: &Registry, target: &Location) -> Result<Option<Arc<dyn Driver>>> {
    let is_raw = |driver: Arc<dyn Driver>| driver.capabilities().verbatim;
    let Some(path) = target.path().filter(|path| has_content(path)) else { return Ok(None) };
    match open::driver_by_name(registry, target).is_none_or(is_raw) {
        true => format_of(registry, path).map(Some),
        false => Ok(None),
    }
}

/// True if there is a block device or a file with content.
fn has_content(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| match os::classify(&meta) {
        FileClass::Regular => meta.len() > 0,
        FileClass::BlockDevice => true,
        FileClass::Directory | FileClass::Stream => false,
    })
}

/// Returns the format in which the file or block device at `path` is written into, by its content: the raw one if
/// no other fits.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the content is that of a format that can't be written into, of a
/// compressed file or of no disk at all, or contradicts the extension of raw disks.
pub fn format_of(registry: &Registry, path: &Path) -> Result<Arc<dyn Driver>> {
    // Whether another program uses the target is found when it is opened for writing.
    let (opening, sharing) = (Opening::Plain, Sharing::Accepted);
    let input = open_shared(&path.into(), opening, &Memory::default(), sharing)?;
    by_content(registry, &input).map_err(|e| e.path(path))
}

fn by_content(registry: &Registry, open: &OpenInput) -> Result<Arc<dyn Driver>> {
    let raw = registry.verbatim()?;
    let (head, location) = (open.input.head()?, open.input.location());
    let refused = |what: String, image| {
        Error::refused(what).remedied_by(Remedy::OverwriteAs { raw: raw.name(), image })
    };
    if let Some(compression) = outer::detect(&head) {
        return Err(refused(
            format!("a {} file that exists can't be written into", compression.name()),
            None,
        ));
    }
    let (found, confidence) = open::recognise(registry, open)?;
    let found = if confidence == Confidence::Fallback {
        let end = open.input.end()?;
        registry.drivers().find(|driver| end.is_some() && driver.probe_end(end.as_deref())).cloned()
    } else {
        Some(found)
    };
    let Some(found) = found else {
        return match contents::no_disk_by_head(&head) {
            Some(other) => Err(refused(format!("is {}, not a disk", other.name), None)),
            None => Ok(raw),
        };
    };
    if !found.capabilities().updates {
        return Err(refused(format!("a {} image that exists can't be written into", found.name()), None));
    }
    if open::is_named_raw(&*raw, location) {
        let what = format!("the name says raw, but the content is that of a {} image", found.name());
        return Err(refused(what, Some(found.name())));
    }
    Ok(found)
}
