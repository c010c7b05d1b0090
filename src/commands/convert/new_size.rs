//! `--size`: gives the only disk of a conversion another virtual size. Only zeros are cut off.

use std::sync::Arc;

use imgtool_core::{CancelToken, Error, Result, ResultExt};
use imgtool_engine::{Destination, Note, Plan, cut};

use crate::args::NewSize;
use crate::report::exact_size;

/// Sets the virtual size of the only output.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] unless there is exactly one new image of one disk, whose size is known;
/// [`imgtool_core::ErrorKind::Refused`] if data would be cut off.
pub(super) fn set(plan: &mut Plan, size: NewSize, cancel: &CancelToken) -> Result<()> {
    let [output] = plan.layout.outputs.as_mut_slice() else {
        return Err(Error::usage("--size is for one disk").hint("choose it with --disk NAME"));
    };
    let (false, [slot]) = (output.format.is_archive(), output.disks.as_slice()) else {
        return Err(Error::usage("--size is for the image of a disk, not for an archive")
            .hint("convert the disk first, with --size, and pack the result"));
    };
    if !matches!(output.destination, Destination::New(_)) {
        return Err(Error::usage("--size is for a new image")
            .hint("'imgtool resize' changes the size of an image that exists"));
    }
    if !output.bitmaps.is_empty() {
        return Err(Error::usage("--size and --bitmaps can't be combined: the bitmaps have the old size"));
    }
    let device = &plan.selected[slot.index()].device;
    if device.open_ended {
        return Err(Error::usage("--size needs the size of the disk, which this stream has at its end")
            .hint("convert it without --size, then use 'imgtool resize'"));
    }
    let old = device.size;
    let too_large = || Error::usage("--size: the new size is too large");
    let new = match size {
        NewSize::Exact(new) => new,
        NewSize::More(more) => old.checked_add(more).ok_or_else(too_large)?,
        NewSize::Less(less) => old.saturating_sub(less),
    };
    if new < old {
        return cut_off(plan, old, new, cancel);
    }
    output.size = Some(new);
    if new > old {
        let note = format!("the disk grew from {} to {}", exact_size(old), exact_size(new));
        plan.layout.notes.push(Note::Text(note));
    }
    Ok(())
}

/// Cuts the only disk, which has `old` bytes, to `new` bytes.
fn cut_off(plan: &mut Plan, old: u64, new: u64, cancel: &CancelToken) -> Result<()> {
    let [disk] = plan.selected.as_mut_slice() else {
        return Err(Error::usage("--size is for one disk").hint("choose it with --disk NAME"));
    };
    let opened = &mut plan.sources[disk.source].opened;
    if opened.image.access().is_stream() {
        return Err(Error::usage(format!("--size {new} is smaller than the disk, which has {old} bytes"))
            .path(&opened.location)
            .hint("a stream can't be checked before it is read: convert it, then use 'imgtool resize'"));
    }
    opened.image =
        cut::to_size(Arc::clone(&opened.image), disk.device.id, new, cancel).in_file(&opened.location)?;
    disk.device.size = new;
    let note = format!("the disk was cut from {} to {}; the rest was zero", exact_size(old), exact_size(new));
    plan.layout.notes.push(Note::Text(note));
    Ok(())
}
