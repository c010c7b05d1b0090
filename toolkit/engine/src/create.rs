//! Creates empty images, and measures the size that an image will have.

use std::path::PathBuf;

use imgtool_core::{
    CancelToken, Error, ImageSource, Location, Measure, Memory, OpenOptions, Registry, Result,
};
use imgtool_storage::open::open_shared;
use imgtool_storage::{Opening, Outputs, Sharing};

use crate::blank::Blank;
use crate::format::TargetFormat;
use crate::layout::{self, Destination, Layout, PlannedOutput};
use crate::monitor::Monitor;
use crate::open::{self, Opened};
use crate::report::{Note, Report};
use crate::run::{Plan, RunOptions};
use crate::sinks;
use crate::sources::{OpenSource, SelectedDisk};

/// Length in bytes of the sector by which programs recognise formats.
const SECTOR: u64 = 512;

/// Settings for a new image without data.
#[derive(Debug)]
pub struct CreateRequest {
    /// Path of the new file, or of the block device for the image.
    pub path: PathBuf,
    /// Format, with its options and backing image.
    pub format: TargetFormat,
    /// Virtual size in bytes.
    pub size: u64,
    /// True to replace an existing file.
    pub overwrite: bool,
    /// True to use a block device that is in use or much larger.
    pub force: bool,
    /// True if a raw disk on a block device of any sufficient size keeps the device's content, except for the
    /// first sector, by which programs recognise formats.
    pub keep_device: bool,
}

/// Returns the virtual size in bytes of the backing image that `format` names for a new image at `location`;
/// `None` if there is none.
///
/// # Errors
/// If the backing image can't be opened, or does not contain exactly one disk.
pub fn backing_size(registry: &Registry, location: &Location, format: &TargetFormat) -> Result<Option<u64>> {
    let Some(backing) = format.writer.backing() else { return Ok(None) };
    let base = sinks::backing_path(location, &backing.name)?;
    // Facts suffice, so the driver opens no further backing images. A program that writes the image does not
    // change its size.
    let options = OpenOptions { info_only: true, force_share: true, ..OpenOptions::default() };
    let input = open_shared(&base, Opening::Plain, &options.memory, Sharing::Accepted)?;
    let opened = open::open_image(registry, input, Some(&backing.format), &options)?;
    match opened.image.info().devices.as_slice() {
        [device] => Ok(Some(device.size)),
        devices => {
            Err(Error::unsupported(format!("the backing file holds {} devices, not one", devices.len())))
        }
    }
}

/// Returns the name of the format that the content of the backing file `name` of a new image at `location` looks like;
/// `None` if the file can't be read. A guest chooses the content of a raw disk, so this is a guess.
pub fn backing_format(registry: &Registry, location: &Location, name: &str) -> Option<&'static str> {
    let base = sinks::backing_path(location, name).ok()?;
    let input = open_shared(&base, Opening::Plain, &Memory::default(), Sharing::Accepted).ok()?;
    open::recognise(registry, &input).ok().map(|(driver, _)| driver.name())
}

/// Creates an image without data. With a backing image, the guest sees the content of that image.
///
/// # Errors
/// If the image can't be created. No file is left then.
pub fn create(
    registry: &Registry,
    request: CreateRequest,
    monitor: &dyn Monitor,
    cancel: &CancelToken,
) -> Result<Report> {
    let destination = layout::new_image(&request.format, &request.path)?;
    let is_device = matches!(destination, Destination::Existing { .. });
    if request.keep_device && is_device && request.format.driver.capabilities().verbatim {
        return clear_first_sector(&request);
    }
    let location = Location::from(&request.path);
    let image = Blank::new(&open::stem(registry, &location), request.size);
    let disk = image.info().devices[0].clone();
    let has_backing = request.format.writer.backing().is_some();
    let source = OpenSource { name: None, opened: Opened::in_memory(image, registry.verbatim()?) };
    let output = PlannedOutput {
        destination,
        format: request.format,
        disks: vec![imgtool_core::Slot(0)],
        attachments: Vec::new(),
        machine: None,
        bitmaps: Vec::new(),
    };
    let plan = Plan {
        layout: Layout { outputs: vec![output], overwrite: request.overwrite, ..Layout::default() },
        selected: vec![SelectedDisk { source: 0, name: disk.name.clone(), device: disk }],
        sources: vec![source],
        outputs: Outputs::new(),
        registry: registry.clone(),
        memory: Memory::default(),
    };
    let options = RunOptions {
        threads: 1,
        force: request.force,
        // Zeros would hide the content of the backing image.
        without_content: has_backing,
        cancel: cancel.clone(),
        ..RunOptions::default()
    };
    plan.run(&options, monitor)
}

/// Clears the first sector of the block device for a raw disk.
fn clear_first_sector(request: &CreateRequest) -> Result<Report> {
    let mut outputs = Outputs::new();
    let output = outputs.existing(&request.path, false, request.force)?;
    let capacity = output.capacity().unwrap_or(0);
    if capacity < request.size {
        return Err(sinks::size_error("too small", capacity, request.size)
            .path(&request.path)
            .hint("nothing was written; a larger target is needed"));
    }
    output.write_plain_zeros_at(0, SECTOR.min(capacity))?;
    let notes = outputs.doubts().iter().cloned().map(Note::Text).collect();
    outputs.commit()?;
    Ok(Report { notes, ..Report::default() })
}

/// Returns the size that an image of this format will have with the content of `source`.
///
/// # Errors
/// If the source can't be read; [`imgtool_core::ErrorKind::Unsupported`] if the format can't be measured.
pub fn measure(format: &TargetFormat, source: &dyn ImageSource) -> Result<Measure> {
    format.writer.measure(source)
}

/// Like [`measure`], for an empty disk of `size` bytes.
///
/// # Errors
/// Same as [`measure`].
pub fn measure_empty(format: &TargetFormat, size: u64) -> Result<Measure> {
    measure(format, &Blank::new("disk", size))
}
