//! `--size`: gives the only disk of a conversion a larger virtual size.

use imgtool_core::{Error, Result};
use imgtool_engine::{Destination, Note, Plan};

use crate::args::NewSize;
use crate::report::exact_size;

/// Sets the virtual size of the only output.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] unless there is exactly one new image of one disk, whose size is known
/// and not larger than the new one.
pub(super) fn set(plan: &mut Plan, size: NewSize) -> Result<()> {
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
    let device = &plan.selected[slot.index()].device;
    if device.open_ended {
        return Err(Error::usage("--size needs the size of the disk, which this stream has at its end")
            .hint("convert it without --size, then use 'imgtool resize'"));
    }
    let (old, dest) = (device.size, output.destination.location());
    let too_large = || Error::usage("--size: the new size is too large");
    let new = match size {
        NewSize::Exact(new) => new,
        NewSize::More(more) => old.checked_add(more).ok_or_else(too_large)?,
        NewSize::Less(less) => old.saturating_sub(less),
    };
    if new < old {
        return Err(Error::usage(format!("--size {new} is smaller than the disk, which has {old} bytes"))
            .hint(format!(
                "convert without --size; then 'imgtool resize {dest} {new}' cuts off zeros, and only zeros"
            )));
    }
    output.size = Some(new);
    if new > old {
        let note = format!("the disk grew from {} to {}", exact_size(old), exact_size(new));
        plan.layout.notes.push(Note::Text(note));
    }
    Ok(())
}
