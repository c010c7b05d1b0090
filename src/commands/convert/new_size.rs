//! `--size`: gives the only disk of a conversion another virtual size. Only zeros are cut off.

use std::sync::Arc;

use imgtool_core::{CancelToken, Error, Result, ResultExt};
use imgtool_engine::{Destination, Note, Plan, size};

use crate::args::NewSize;
use crate::report::exact_size;

/// Sets the virtual size of the only output.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] unless there is exactly one new image of one disk;
/// [`imgtool_core::ErrorKind::Refused`] if data would be cut off, from a stream during the run.
pub(super) fn set(plan: &mut Plan, wanted: NewSize, cancel: &CancelToken) -> Result<()> {
    let [output] = plan.layout.outputs.as_slice() else {
        return Err(Error::usage("--size is for one disk").hint("choose it with --disk NAME"));
    };
    let (false, [slot]) = (output.format.is_archive(), output.disks.as_slice()) else {
        return Err(Error::usage("--size is for the image of a disk, not for an archive")
            .hint("convert the disk first, with --size, and pack the result"));
    };
    if !matches!(output.destination, Destination::New(_) | Destination::Stream(_)) {
        return Err(Error::usage("--size is for a new image")
            .hint("'imgtool resize' changes the size of an image that exists"));
    }
    if !output.bitmaps.is_empty() {
        return Err(Error::usage("--size and --bitmaps can't be combined: the bitmaps have the old size"));
    }
    let slot = slot.index();
    let device = &plan.selected[slot].device;
    if device.open_ended {
        let NewSize::Exact(new) = wanted else {
            return Err(Error::usage(
                "--size has a sign, but the size of this disk is known only at its end",
            )
            .hint("state the whole size, for example --size 10G"));
        };
        return change(plan, slot, new, cancel);
    }
    let old = device.size;
    let too_large = || Error::usage("--size: the new size is too large");
    let new = match wanted {
        NewSize::Exact(new) => new,
        NewSize::More(more) => old.checked_add(more).ok_or_else(too_large)?,
        NewSize::Less(less) => old.saturating_sub(less),
    };
    if new == old {
        return Ok(());
    }
    change(plan, slot, new, cancel)?;
    let (before, after) = (exact_size(old), exact_size(new));
    plan.layout.notes.push(Note::Text(match new < old {
        true => format!("the disk was cut from {before} to {after}; the rest was zero"),
        false => format!("the disk grew from {before} to {after}"),
    }));
    Ok(())
}

/// Gives the disk with this index `new` bytes.
///
/// # Errors
/// Same as [`set`].
pub(super) fn change(plan: &mut Plan, disk: usize, new: u64, cancel: &CancelToken) -> Result<()> {
    let disk = &mut plan.selected[disk];
    let opened = &mut plan.sources[disk.source].opened;
    if opened.salvages && opened.image.access().is_stream() {
        return Err(Error::usage("the size of a stream can't change while it is salvaged")
            .path(&opened.location)
            .hint("salvage it first, then use 'imgtool resize'"));
    }
    opened.image =
        size::change(Arc::clone(&opened.image), disk.device.id, new, cancel).in_file(&opened.location)?;
    (disk.device.size, disk.device.open_ended) = (new, false);
    Ok(())
}
