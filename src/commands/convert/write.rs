//! The work itself: the copy, the finish, the proof, the names.

use std::path::Path;
use std::time::Duration;

use imgtool_toolkit::digest::{ContentDigest, DigestSink};
use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::storage::os;
use imgtool_toolkit::{
    DeviceId, Error, ImageSink, Loss, OpenOptions, Output, Outputs, Registry, Result, ResultExt,
};

use super::layout::Layout;
use super::sinks::{self, Sinks};
use super::sources::{Source, Taken};
use super::{space, verify};
use crate::args::ProgressMode;
use crate::commands::extras;
use crate::interrupt::Interrupt;
use crate::observe::{Observe, ObservedSink};
use crate::progress::{Lane, Meter, RateLimit};
use crate::report;

/// An existing target may be larger than its disk by this much without being taken for a mistake:
/// LVM and others round sizes up to their extents.
pub const SIZE_TOLERANCE: u64 = 4 << 20;

/// How the work is done.
pub struct Work<'a> {
    /// The drivers.
    pub registry: &'a Registry,
    /// How backing files of the outputs are opened.
    pub base_options: OpenOptions,
    /// Worker threads.
    pub threads: usize,
    /// `--force`.
    pub force: bool,
    /// Write into block devices that are mounted or otherwise in use.
    pub take_busy: bool,
    /// How progress is shown.
    pub progress: ProgressMode,
    /// `-r`.
    pub limit: Option<RateLimit>,
    /// `--verify`.
    pub verify: bool,
    /// Is shown every piece.
    pub observer: Option<&'a dyn Observe>,
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
    work: Work<'_>,
    layout: &Layout,
    mut sources: Vec<Source>,
    taken: &[Taken],
    mut outputs: Outputs,
    interrupt: &Interrupt,
) -> Result<Done> {
    if work.verify && layout.targets.iter().any(|target| target.place.is_stream()) {
        return Err(Error::usage("--verify can't read back what went to a pipe"));
    }
    for target in &layout.targets {
        if let Some(path) = extras::backing_path(target.place.path(), &target.format.options)? {
            outputs.protect(&path)?;
        }
    }
    outputs.check(&layout.wanted(work.force))?;
    if !work.take_busy {
        space::check(layout, &sources, taken)?;
    }
    if let Some(directory) = &layout.directory {
        outputs.directory(directory)?;
    }
    let made = sinks::make(
        work.registry,
        layout,
        taken,
        &mut outputs,
        &work.base_options,
        (work.force, work.take_busy),
    )?;
    let in_place = made.outputs.clone();
    let done = fill(work, layout, &mut sources, taken, (made, outputs), interrupt);
    if done.is_err() {
        for output in in_place.iter().filter(|output| output.capacity().is_some() && output.written() > 0) {
            let path = escape_control(&output.path().to_string_lossy());
            report::note(&format!("{path} was being written in place: what it holds now is not complete"));
        }
    }
    done
}

/// Fills the outputs and gives them their names.
fn fill(
    work: Work<'_>,
    layout: &Layout,
    sources: &mut [Source],
    taken: &[Taken],
    (made, mut outputs): (Sinks, Outputs),
    interrupt: &Interrupt,
) -> Result<Done> {
    let mut files = Vec::new();
    for (path, attachment) in &layout.files {
        let output = outputs.create_linked(path, work.force, layout.links(path))?;
        output.write_at(&attachment.data, 0)?;
        files.push((output, attachment));
    }
    let counted = made.outputs.clone();
    let written = move || counted.iter().map(Output::written).sum();
    let mut meter = Meter::start(work.progress, "convert", lanes(taken, &made.numbers), work.limit, written);
    let digest = ContentDigest::new();
    let digesting = DigestSink::new(&*made.sink, &digest);
    let sink: &dyn ImageSink = if work.verify { &digesting } else { &*made.sink };
    let observed = work.observer.map(|observer| ObservedSink::new(sink, observer));
    let sink: &dyn ImageSink = observed.as_ref().map_or(sink, |observed| observed);
    sink.begin()?;
    for (index, source) in sources.iter_mut().enumerate() {
        let routes = routes(taken, index, &made.numbers);
        let job =
            Job { routes, threads: work.threads, progress: meter.progress(), cancel: interrupt.token() };
        pipeline::copy(&mut *source.opened.source, sink, &job).in_file(&source.arg.path)?;
    }
    sink.finish()?;
    let devices: Vec<(u64, u64)> = (0..taken.len()).map(|index| made.totals(&meter, index)).collect();
    if work.verify {
        meter.finish();
        let sizes: Vec<u64> = devices.iter().map(|(size, _)| *size).collect();
        let expected = verify::Expected {
            digest: &digest,
            numbers: &made.numbers,
            taken,
            sizes: &sizes,
            base_options: &work.base_options,
        };
        files.iter().try_for_each(|(output, config)| verify::same_bytes(output, &config.data))?;
        verify::read_back(layout, &made, &expected, work.threads, work.progress, interrupt)?;
    }
    let swept = outputs
        .swept()
        .iter()
        .map(|path| format!("removed {}, which a run that was killed had left", path.display()));
    let changed = sources.iter().filter_map(Source::change);
    let notes = made.sink.notes().into_iter().chain(swept).chain(changed).chain(vanished(layout)).collect();
    commit(outputs, &made.outputs, interrupt)?;
    meter.finish();
    Ok(Done {
        written: made.outputs.iter().map(Output::written).collect(),
        devices,
        losses: losses(sources, taken),
        notes,
        elapsed: meter.elapsed(),
    })
}

/// What there is to say when standard output, where an image went, keeps nothing. Whether it was closed
/// or somebody wanted it so can't be told.
fn vanished(layout: &Layout) -> Option<String> {
    let to_stdout = layout.targets.iter().any(|target| target.place.path() == Path::new("-"));
    (to_stdout && os::is_stdout_closed())
        .then(|| "standard output is closed, or /dev/null: nothing of what was written is kept".to_owned())
}

impl Sinks {
    /// Size and zero bytes of a device taken, after the copy.
    fn totals(&self, meter: &Meter, device: usize) -> (u64, u64) {
        let number = self.numbers[device].0 as usize;
        (meter.done(number), meter.zero(number))
    }
}

fn routes(taken: &[Taken], source: usize, numbers: &[DeviceId]) -> Vec<Route> {
    let of_source = taken.iter().zip(numbers).filter(|(taken, _)| taken.source == source);
    of_source.map(|(taken, number)| Route { from: taken.device.id, to: *number }).collect()
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
        // A range of no length: what is in doubt is the device itself.
        for doubt in source.opened.source.doubts() {
            let device = taken.iter().find(|taken| taken.source == index && taken.device.id == doubt.device);
            if let Some(Taken { device, name, .. }) = device {
                let guest = device.size..device.size;
                losses.push((name.clone(), Loss { device: device.id, guest, reason: doubt.reason }));
            }
        }
    }
    losses
}
