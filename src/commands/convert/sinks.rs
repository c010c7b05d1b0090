//! Sinks over outputs: one for each image to be made, and one over all.

use imgtool_toolkit::fanout::FanOut;
use imgtool_toolkit::storage::{Links, os};
use imgtool_toolkit::{
    CreateOptions, Device, DeviceId, Error, ImageSink, Manifest, OpenOptions, Output, Outputs, PackedSink,
    Packing, Registry, Result, ResultExt,
};
use std::io::{self, IsTerminal};

use super::layout::{Layout, Place, Target, can_be_written_in_place, name_of_stream};
use super::sources::Taken;
use super::write::SIZE_TOLERANCE;
use crate::commands::extras;

/// What is written into.
pub struct Sinks {
    /// The sink over all targets.
    pub sink: Box<dyn ImageSink>,
    /// The output of each target.
    pub outputs: Vec<Output>,
    /// The data file of each target that has one.
    pub data_files: Vec<Option<Output>>,
    /// What the sink calls each device taken.
    pub numbers: Vec<DeviceId>,
}

/// Makes the outputs of all targets and the sinks over them.
///
/// # Errors
/// When one can't be made.
pub fn make(
    registry: &Registry,
    layout: &Layout,
    taken: &[Taken],
    outputs: &mut Outputs,
    base_options: &OpenOptions,
    (force, take_busy): (bool, bool),
) -> Result<Sinks> {
    let mut sinks = Vec::new();
    let mut handles = Vec::new();
    let mut data_files = Vec::new();
    let mut places = Vec::new();
    let mut numbers = vec![DeviceId(0); taken.len()];
    for (index, target) in layout.targets.iter().enumerate() {
        let manifest = manifest(target, taken);
        let links = layout.links(target.place.path());
        let output = make_output(target, &manifest, outputs, (force, take_busy), links)?;
        handles.push(output.clone());
        let options = extras::with_extras(
            registry,
            target.place.path(),
            &target.format.options,
            base_options,
            (&mut *outputs, force),
        )?;
        data_files.push(options.extras.outputs.get(extras::DATA_FILE).cloned());
        let sink = make_sink(target, output, &manifest, &options).in_file(target.place.path())?;
        for (inner, &device) in manifest.devices.iter().zip(&target.devices) {
            // At most as many devices as the sources hold: 254 each.
            numbers[device] = DeviceId(u32::try_from(places.len()).unwrap_or(u32::MAX));
            places.push((index, inner.id));
        }
        sinks.push(sink);
    }
    let only = (sinks.len() == 1).then(|| sinks.pop()).flatten();
    let sink = match only {
        Some(only) => only,
        None => Box::new(FanOut::with_places(sinks, places)?),
    };
    Ok(Sinks { sink, outputs: handles, data_files, numbers })
}

fn make_sink(
    target: &Target,
    output: Output,
    manifest: &Manifest,
    options: &CreateOptions,
) -> Result<Box<dyn ImageSink>> {
    let driver = &target.format.driver;
    let Some(outer) = target.format.outer else { return driver.create(output, manifest, options) };
    let packing = Packing::new(outer.compression, outer.level)?;
    let inner = driver.create(PackedSink::inner_output(output.path()), manifest, options)?;
    Ok(Box::new(PackedSink::new(inner, output, packing)?))
}

/// What a target is to hold, its devices numbered from 0.
fn manifest(target: &Target, taken: &[Taken]) -> Manifest {
    let device = |(number, &index): (u32, &usize)| Device {
        id: DeviceId(number),
        name: taken[index].name.clone(),
        size: target.size.unwrap_or(taken[index].device.size),
        ..taken[index].device.clone()
    };
    Manifest {
        devices: (0..).zip(&target.devices).map(device).collect(),
        attachments: target.attachments.clone(),
    }
}

fn make_output(
    target: &Target,
    manifest: &Manifest,
    outputs: &mut Outputs,
    (force, take_busy): (bool, bool),
    links: Links,
) -> Result<Output> {
    match &target.place {
        Place::New(path) => outputs.create_linked(path, force, links),
        // `-n` onto an image file: the new one takes its place when it is finished.
        Place::Existing { path, .. } if !can_be_written_in_place(&*target.format.driver, path) => {
            outputs.create_linked(path, true, links)
        }
        Place::Existing { path, zeroed } => {
            let output = outputs.existing(path, *zeroed, take_busy)?;
            check_capacity(target, manifest, &output, force)?;
            Ok(output)
        }
        Place::Stream(path) => {
            let writer: Box<dyn io::Write + Send> = if !target.place.is_stdout() {
                Box::new(os::open_stream(path).map_err(|e| Error::io("open for writing", e)).in_file(path)?)
            } else if io::stdout().is_terminal() {
                return Err(
                    Error::usage("standard output is a terminal").hint("redirect it to a file or a pipe")
                );
            } else {
                Box::new(io::stdout())
            };
            let output = Output::from_writer(name_of_stream(path), writer);
            outputs.stream(output.clone());
            Ok(output)
        }
    }
}

/// An existing target of a format that is the guest's bytes must be about as large as the disk.
fn check_capacity(target: &Target, manifest: &Manifest, output: &Output, force: bool) -> Result<()> {
    let (Some(capacity), [device]) = (output.capacity(), manifest.devices.as_slice()) else { return Ok(()) };
    if device.open_ended || target.format.driver.name() != "raw" {
        return Ok(());
    }
    let error = |what: &str| {
        Error::refused(format!("the target is {what}: it holds {capacity} bytes, the disk {}", device.size))
            .path(target.place.path())
            .device(&*device.name)
    };
    if capacity < device.size {
        return Err(error("too small").hint("nothing was written; a larger target is needed"));
    }
    if capacity - device.size > SIZE_TOLERANCE && !force {
        return Err(error("much larger")
            .hint("nothing was written; --force writes the disk to its front and leaves the rest alone"));
    }
    Ok(())
}
