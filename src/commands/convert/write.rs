//! Making the outputs: sinks over outputs, the copy, the finish, the names.

use std::io::{self, IsTerminal};
use std::time::Duration;

use imgtool_toolkit::digest::{ContentDigest, DigestSink};
use imgtool_toolkit::fanout::FanOut;
use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{
    Device, DeviceId, Error, ImageSink, Loss, Manifest, OpenOptions, Output, Outputs, Result, ResultExt,
};

use super::layout::{Layout, Place, Target};
use super::sources::{Source, Taken};
use super::verify::Written;
use crate::args::ProgressMode;
use crate::interrupt::Interrupt;
use crate::progress::{Lane, Meter, RateLimit};

/// An existing target may be larger than its disk by this much without being taken for a mistake:
/// LVM and others round sizes up to their extents.
const SIZE_TOLERANCE: u64 = 4 << 20;

/// How the work is done.
pub struct Work {
    /// Worker threads.
    pub threads: usize,
    /// `--force`.
    pub force: bool,
    /// How progress is shown.
    pub progress: ProgressMode,
    /// `-r`.
    pub limit: Option<RateLimit>,
    /// `--verify`: how the outputs are read back.
    pub verify: Option<OpenOptions>,
}

/// What was done.
pub struct Done {
    /// For each target, how many bytes were written to it.
    pub written: Vec<u64>,
    /// For each device taken, its final size and how much of it was zero.
    pub devices: Vec<(u64, u64)>,
    /// What could not be restored, with the device's name.
    pub losses: Vec<(String, Loss)>,
    /// What drivers have to say.
    pub notes: Vec<String>,
    /// How long it took.
    pub elapsed: Duration,
}

/// Makes everything that `layout` says.
///
/// # Errors
/// The first thing that went wrong; nothing is left under a final name then.
pub fn write(
    work: Work,
    layout: &Layout,
    mut sources: Vec<Source>,
    taken: &[Taken],
    mut outputs: Outputs,
    interrupt: &Interrupt,
) -> Result<Done> {
    if let Some(directory) = &layout.directory {
        outputs.directory(directory)?;
    }
    refuse_to_verify_a_stream(&work, layout)?;
    let (sink, handles, numbers) = make_sinks(layout, taken, &mut outputs, work.force)?;
    for (path, attachment) in &layout.files {
        outputs.create(path, work.force)?.write_at(&attachment.data, 0)?;
    }
    let counted = handles.clone();
    let written = move || counted.iter().map(Output::written).sum();
    let mut meter = Meter::start(work.progress, "convert", lanes(taken, &numbers), work.limit, written);
    let digest = ContentDigest::new();
    let digesting = DigestSink::new(&*sink, &digest);
    let target: &dyn ImageSink = if work.verify.is_some() { &digesting } else { &*sink };
    sink.begin()?;
    for (index, source) in sources.iter_mut().enumerate() {
        let routes: Vec<Route> = taken
            .iter()
            .enumerate()
            .filter(|(_, device)| device.source == index)
            .map(|(device, taken)| Route { from: taken.device.id, to: numbers[device] })
            .collect();
        let job =
            Job { routes, threads: work.threads, progress: meter.progress(), cancel: interrupt.token() };
        pipeline::copy(&mut *source.opened.source, target, &job).in_file(&source.arg.path)?;
    }
    sink.finish()?;
    if let Some(options) = &work.verify {
        for written in written_targets(layout, taken, &handles, &numbers) {
            written.check(&digest, options, work.threads, interrupt.token())?;
        }
    }
    commit(outputs, &handles, interrupt)?;
    meter.finish();
    let device = |index: usize| {
        let number = numbers[index].0 as usize;
        (meter.done(number), meter.zero(number))
    };
    Ok(Done {
        written: handles.iter().map(Output::written).collect(),
        devices: (0..taken.len()).map(device).collect(),
        losses: losses(&sources, taken),
        notes: sink.notes(),
        elapsed: meter.elapsed(),
    })
}

fn refuse_to_verify_a_stream(work: &Work, layout: &Layout) -> Result<()> {
    if work.verify.is_some() && layout.targets.iter().any(|target| target.place == Place::Stdout) {
        return Err(Error::usage("--verify can't read back what went to standard output"));
    }
    Ok(())
}

fn written_targets<'a>(
    layout: &'a Layout,
    taken: &'a [Taken],
    handles: &'a [Output],
    numbers: &'a [DeviceId],
) -> impl Iterator<Item = Written<'a>> {
    layout.targets.iter().zip(handles).map(|(target, output)| Written {
        driver: &*target.format.driver,
        output,
        packed: target.format.outer.is_some(),
        devices: target
            .devices
            .iter()
            .map(|&device| (numbers[device], taken[device].name.as_str()))
            .collect(),
    })
}

/// The sink over all targets, the output of each target, and the sink's number of each device.
type Sinks = (Box<dyn ImageSink>, Vec<Output>, Vec<DeviceId>);

fn make_sinks(layout: &Layout, taken: &[Taken], outputs: &mut Outputs, force: bool) -> Result<Sinks> {
    let mut sinks = Vec::new();
    let mut handles = Vec::new();
    let mut places = Vec::new();
    let mut numbers = vec![DeviceId(0); taken.len()];
    for (index, target) in layout.targets.iter().enumerate() {
        let manifest = manifest(target, taken);
        let output = make_output(target, &manifest, outputs, force)?;
        handles.push(output.clone());
        let sink = target
            .format
            .driver
            .create(output, &manifest, &target.format.options)
            .in_file(target.place.path())?;
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
    Ok((sink, handles, numbers))
}

/// What a target is to hold, its devices numbered from 0.
fn manifest(target: &Target, taken: &[Taken]) -> Manifest {
    let device = |(number, &index): (u32, &usize)| Device {
        id: DeviceId(number),
        name: taken[index].name.clone(),
        ..taken[index].device.clone()
    };
    Manifest {
        devices: (0..).zip(&target.devices).map(device).collect(),
        attachments: target.attachments.clone(),
    }
}

fn make_output(target: &Target, manifest: &Manifest, outputs: &mut Outputs, force: bool) -> Result<Output> {
    if target.format.outer.is_some() {
        return Err(Error::unsupported("compressed outputs are not there yet"));
    }
    match &target.place {
        Place::New(path) => outputs.create(path, force),
        Place::InPlace { path, zeroed } => {
            let output = outputs.existing(path, *zeroed, force)?;
            check_capacity(target, manifest, &output, force)?;
            Ok(output)
        }
        Place::Stdout => {
            if io::stdout().is_terminal() {
                return Err(
                    Error::usage("standard output is a terminal").hint("redirect it to a file or a pipe")
                );
            }
            let output = Output::from_writer("-", Box::new(io::stdout()));
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

fn lanes(taken: &[Taken], numbers: &[DeviceId]) -> Vec<Lane> {
    let mut lanes: Vec<(DeviceId, Lane)> = taken
        .iter()
        .zip(numbers)
        .map(|(taken, number)| {
            let total = (!taken.device.open_ended).then_some(taken.device.size);
            (*number, Lane::new(&*taken.name, total))
        })
        .collect();
    lanes.sort_by_key(|(number, _)| *number);
    lanes.into_iter().map(|(_, lane)| lane).collect()
}

/// Flushes, then gives all outputs their names. The flush may take long and can be interrupted; the
/// naming is short and can't.
fn commit(outputs: Outputs, handles: &[Output], interrupt: &Interrupt) -> Result<()> {
    for output in handles {
        output.sync()?;
        interrupt.token().check()?;
    }
    interrupt.shielded(|| outputs.commit())
}

fn losses(sources: &[Source], taken: &[Taken]) -> Vec<(String, Loss)> {
    let mut losses = Vec::new();
    for (index, source) in sources.iter().enumerate() {
        for loss in source.opened.source.losses() {
            let device = taken.iter().find(|taken| taken.source == index && taken.device.id == loss.device);
            if let Some(device) = device {
                losses.push((device.name.clone(), loss));
            }
        }
    }
    losses
}
