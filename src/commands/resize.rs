//! `imgtool resize`: changes the virtual size of an image in place.

use imgtool_core::{Disk, Error, Resize, Result, ResultExt};
use imgtool_engine::open;
use imgtool_storage::OpenInput;

use super::check::open_target;
use crate::args::{Preallocation, ResizeArgs};
use crate::exit::Exit;
use crate::report::{self, Stream};
use crate::{compat, images};

/// Resizes an image.
///
/// # Errors
/// Any error of the driver; a change of a size to less than 0.
pub fn run(args: &ResizeArgs) -> Result<Exit> {
    images::refuse(&args.input)?;
    let registry = imgtool::registry();
    let source = images::source(&args.input, args.image.as_os_str())?;
    images::refuse_part(&source)?;
    let location = source.location.clone();
    let (outputs, image) = open_target(location.path().unwrap_or(&args.image))?;
    let options = source.options(&registry, &images::open_options(&registry, &args.input)?);
    let format = images::format_of(&source, args.input.format.as_deref());
    let info = imgtool_core::OpenOptions { info_only: true, ..options.clone() };
    // Another handle would meet the lock of this one.
    let input = OpenInput::of(image.reopen(&options.memory)?).borrowing(&options.memory);
    let opened = open::open_image(&registry, input.decompressed()?, format, &info)?;
    if !opened.compression.is_empty() {
        return Err(Error::unsupported("a compressed file can't be resized").path(&location));
    }
    let driver = opened.driver;
    let allocates = args.preallocation != Preallocation::Off;
    if allocates && !driver.capabilities().verbatim {
        return Err(Error::unsupported(format!("{} images grow without preallocation", driver.name()))
            .path(&location)
            .hint("leave out --preallocation"));
    }
    let old = Disk::only(opened.image, "the image").in_file(&location)?.size();
    let size = args.size.of(old).ok_or_else(|| {
        Error::usage(format!("the disk has {old} bytes, which can't change by that much")).path(&location)
    })?;
    let size = if driver.capabilities().verbatim { compat::new_size(size) } else { size };
    compat::check_new_size(old, size, args.shrink).map_err(|e| e.path(&location))?;
    if allocates && size < old {
        return Err(Error::usage(match compat::is_on() {
            true => "Preallocation can only be used for growing images",
            false => "space is allocated only for an image that grows",
        }));
    }
    let resize = Resize { size, discards: args.shrink };
    driver.resize(&image, resize, &options).in_file(&location)?;
    if allocates && size > old {
        let allocated = match args.preallocation {
            Preallocation::Full => image.write_plain_zeros_at(old, size - old),
            _ => image.allocate(old, size - old),
        };
        // The size that nobody got must not stay; the shorter length also frees what was allocated.
        allocated.inspect_err(|_| drop(image.set_len(old))).in_file(&location)?;
    }
    let after = driver.open(image.reopen(&options.memory)?, &info).in_file(&location)?;
    let after = Disk::only(after, "the image").in_file(&location)?.size();
    outputs.commit()?;
    print(args, driver.name(), old, after)?;
    Ok(Exit::Done)
}

/// Prints both sizes in bytes of an image.
fn print(args: &ResizeArgs, format: &str, old: u64, new: u64) -> Result<()> {
    if args.quiet {
        return Ok(());
    }
    if compat::is_on() {
        return report::print("Image resized.\n");
    }
    let name = images::show(args.image.as_os_str());
    let (old, new) = (report::exact_size(old), report::exact_size(new));
    let text = format!("{name}: {format}, {old} before, {new} now");
    report::print(&format!("{}\n", report::flow(Stream::Out, &text, 2)))
}
