//! Verification: reads every finished output back through its driver, before the output gets its name.
//!
//! The run digests the content on its way from the sources to the sinks. The content read back must have the
//! same digest. This detects changes by a disk, a cable, a file system or our own writer.

use std::sync::Arc;

use imgtool_core::{
    Attachment, CancelToken, DeviceId, Error, ErrorKind, ImageSource, Lane, Memory, OpenOptions, Output,
    Result, ResultExt, Secrets, Slot,
};
use imgtool_storage::Compression;
use imgtool_storage::open::OpenInput;

use crate::digest::{self, ContentDigest};
use crate::externals::PolicyOpener;
use crate::inspect::FinishedOutput;
use crate::layout::{Destination, Layout, PlannedOutput};
use crate::monitor::{Counter, Monitor, Phase};
use crate::rate_limit::RateLimit;
use crate::report::DiskReport;
use crate::resized::Resized;
use crate::sinks::{self, OpenSink};
use crate::sources::SelectedDisk;
use crate::survey::SurveyedDevice;
use crate::work::{Gauge, LaneInfo, Part};

/// Largest unit in bytes to which a format rounds virtual sizes up: the MiB of fixed VHD images.
const LARGEST_UNIT: u64 = 1 << 20;

/// Content that was written to the outputs.
pub(crate) struct Expected<'a> {
    /// Digests by lane. The lane of a disk equals its slot.
    pub(crate) digest: &'a ContentDigest,
    /// Final sizes of the disks, by slot.
    pub(crate) disks: &'a [DiskReport],
    /// Disks, by slot.
    pub(crate) selected: &'a [SelectedDisk],
    /// Opener for the external files of backing images.
    pub(crate) base_opener: &'a PolicyOpener,
    /// Passphrases of backing images.
    pub(crate) base_secrets: &'a Secrets,
    /// Number of worker threads.
    pub(crate) threads: usize,
    pub(crate) cancel: CancelToken,
    /// Limit on the speed.
    pub(crate) limit: Option<&'a RateLimit>,
    /// Ledger from which the readers borrow.
    pub(crate) memory: Memory,
}

/// An output opened for reading, with the lanes of its devices.
struct Reopened<'a> {
    planned: &'a PlannedOutput,
    image: Arc<dyn ImageSource>,
    first_lane: Lane,
}

/// Reads every output back and compares it with the content written.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if an output differs or is damaged; any error from reading it.
pub(crate) fn read_back(
    layout: &Layout,
    sinks: &[OpenSink],
    expected: &Expected<'_>,
    monitor: &dyn Monitor,
) -> Result<()> {
    // All outputs share one phase, so their lanes are consecutive.
    let mut lanes = Vec::new();
    let mut reopened = Vec::new();
    for (planned, open) in layout.outputs.iter().zip(sinks) {
        let image = reopen(planned, open, expected).in_file(planned.destination.location())?;
        // An output has at most 254 lanes, so the number fits.
        let first_lane = Lane(u32::try_from(lanes.len()).unwrap_or(u32::MAX));
        lanes.extend(image.info().devices.iter().map(|device| LaneInfo {
            name: device.name.clone(),
            total: (!device.open_ended).then_some(device.size),
        }));
        reopened.push(Reopened { planned, image, first_lane });
    }
    let parts = reopened.iter().map(|output| Part::new(&*output.image, &output.lanes(), None, None, false));
    let gauge = Gauge::new(lanes, parts.collect(), Box::new(|| 0));
    let counter = Counter::begin(monitor, Phase::Verify, gauge, expected.limit);
    counter.survey(reopened.iter().flat_map(Reopened::surveyed).collect());
    for output in reopened {
        let found = digest::digest_source(
            &*output.image,
            output.first_lane,
            expected.threads,
            &counter,
            expected.cancel.clone(),
            &expected.memory,
        )
        .in_file(output.planned.destination.location())?;
        counter.end_part();
        output.compare(&found, &counter, expected)?;
    }
    monitor.end();
    Ok(())
}

/// Opens every finished output for an inspection.
///
/// # Errors
/// Any error of opening one.
pub(crate) fn finished(
    layout: &Layout,
    sinks: &[OpenSink],
    expected: &Expected<'_>,
) -> Result<Vec<FinishedOutput>> {
    let open_one = |(planned, open): (&PlannedOutput, &OpenSink)| {
        let location = planned.destination.location();
        let options = open_options(planned, open, expected);
        let is_readable = !planned.destination.is_stream() && refuse_unreadable(planned).is_ok();
        let image = is_readable.then(|| open_again(planned, open, expected, &options)).transpose();
        let compression = planned.format.outer.map(|outer| outer.compression.name());
        Ok(FinishedOutput { image: image.in_file(&location)?, location, compression })
    };
    layout.outputs.iter().zip(sinks).map(open_one).collect()
}

/// Checks the structure and configurations of an output, and opens it for reading.
fn reopen(planned: &PlannedOutput, open: &OpenSink, expected: &Expected<'_>) -> Result<Arc<dyn ImageSource>> {
    for output in open.outputs() {
        // Reading cached pages would prove nothing about the disk.
        output.sync_and_forget()?;
    }
    let options = open_options(planned, open, expected);
    check(planned, open, &options)?;
    let image = open_again(planned, open, expected, &options)?;
    // Drivers may adapt names to the format, but not contents.
    let contents =
        |attachments: &[Attachment]| attachments.iter().map(|one| one.data.clone()).collect::<Vec<_>>();
    // A driver may add the configuration that its format needs for a machine.
    let (written, sent) = (contents(&image.info().attachments), contents(&planned.attachments));
    let is_same = written == sent || planned.machine.is_some() && written.starts_with(&sent);
    if planned.format.driver.capabilities().attachments() && !is_same {
        return Err(differs(planned, "the configurations differ from the source"));
    }
    Ok(image)
}

impl Reopened<'_> {
    /// Returns the lanes of the devices.
    fn lanes(&self) -> Vec<(Lane, DeviceId)> {
        let devices = self.image.info().devices.iter().map(|device| device.id);
        (self.first_lane.0..).map(Lane).zip(devices).collect()
    }

    /// Returns the devices for a survey, unless the output is read as a stream.
    fn surveyed(&self) -> Vec<SurveyedDevice> {
        let Some(random) = self.image.access().random() else { return Vec::new() };
        let surveyed = |(lane, device): (Lane, DeviceId)| SurveyedDevice {
            lane,
            image: Arc::clone(&self.image),
            device,
            size: self.image.info().device(device).map_or(0, |device| device.size),
            resolution: Some(digest::resolution(random, device)),
        };
        self.lanes().into_iter().map(surveyed).collect()
    }

    fn compare(&self, found: &ContentDigest, counter: &Counter<'_>, expected: &Expected<'_>) -> Result<()> {
        let devices = &self.image.info().devices;
        if devices.len() != self.planned.disks.len() {
            return Err(differs(self.planned, "the number of devices differs from the source"));
        }
        for ((number, device), slot) in (0..).zip(devices).zip(&self.planned.disks) {
            let name = &expected.selected[slot.index()].name;
            // Compare the sizes as well: trailing zeros do not change the digest.
            let size = expected.disks[slot.index()].virtual_size;
            let lane = Lane(self.first_lane.0.saturating_add(number));
            // The size of a compressed raw disk is known only at its end.
            let found_size = if device.open_ended { counter.totals(lane).0 } else { device.size };
            if !is_size_of(self.planned, found_size, size) {
                let what = format!("the disk has {found_size} bytes instead of {size}");
                return Err(differs(self.planned, &what).device(name));
            }
            if found.of(lane) != expected.digest.of(lane_of(*slot)) {
                return Err(differs(self.planned, "the content differs from the source").device(name));
            }
        }
        Ok(())
    }
}

/// Returns the lane of a disk during the copy.
fn lane_of(slot: Slot) -> Lane {
    Lane(slot.0)
}

/// True if `size` equals `disk`, the size of the disk, or `disk` rounded up by a format. An existing target
/// may be larger, since it keeps its length.
fn is_size_of(planned: &PlannedOutput, size: u64, disk: u64) -> bool {
    let existed = matches!(planned.destination, Destination::Existing { .. } | Destination::Image { .. });
    size >= disk && (size - disk < LARGEST_UNIT || existed)
}

/// Reads the file of a configuration back and compares it with `sent`.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the bytes differ.
pub(crate) fn same_bytes(output: &Output, sent: &[u8]) -> Result<()> {
    output.sync_and_forget()?;
    let mut found = vec![0; sent.len()];
    output.read_exact_at(&mut found, 0)?;
    if found == sent {
        return Ok(());
    }
    Err(failure("the configuration differs from the source").path(output.location()))
}

fn differs(planned: &PlannedOutput, what: &str) -> Error {
    failure(what).path(planned.destination.location())
}

fn failure(what: &str) -> Error {
    Error::corrupt(format!("verification failed: {what}"))
        .hint("check the disk and the memory of this machine, then try again")
}

/// Refuses an output that could not be read back: its format is read by position, and its compression in one pass.
///
/// # Errors
/// [`ErrorKind::Unsupported`].
pub(crate) fn refuse_unreadable(planned: &PlannedOutput) -> Result<()> {
    let outer = planned.format.outer.map(|outer| outer.compression);
    let driver = &planned.format.driver;
    if outer != Some(Compression::Gzip) || driver.capabilities().stream_read {
        return Ok(());
    }
    Err(Error::unsupported(format!("{} under gzip can't be read back to verify it", driver.name()))
        .hint("compress it with zstd, which can be read by position, or verify it with a comparison later"))
}

/// Checks the structure of an output, since reading the content does not check qcow2 refcounts or the second
/// header of a VHDX image. A compressed archive has no such structure.
fn check(planned: &PlannedOutput, open: &OpenSink, options: &OpenOptions) -> Result<()> {
    if !planned.format.driver.capabilities().check || planned.format.outer.is_some() {
        return Ok(());
    }
    let found = match planned.format.driver.check(open.output.reopen(&options.memory)?, options) {
        // A check that stopped at a limit has found no damage.
        Err(e) if e.kind() == ErrorKind::LimitExceeded => return Ok(()),
        found => found?,
    };
    let first = found.findings.first().map(|finding| format!(" ({finding})")).unwrap_or_default();
    let leaks = found.leaks.saturating_sub(open.sink.leaks_before());
    match found.corruptions.saturating_add(leaks).saturating_add(found.check_errors) {
        0 => Ok(()),
        _ => Err(differs(planned, &format!("the structure is damaged{first}"))),
    }
}

fn open_again(
    planned: &PlannedOutput,
    open: &OpenSink,
    expected: &Expected<'_>,
    options: &OpenOptions,
) -> Result<Arc<dyn ImageSource>> {
    let mut input = open.output.reopen(&options.memory)?;
    if let (Destination::Existing { .. }, true, [slot]) =
        (&planned.destination, planned.format.driver.capabilities().verbatim, planned.disks.as_slice())
    {
        // The target may be longer than the disk. The bytes after the disk are not ours.
        input = sinks::front(input, expected.disks[slot.index()].virtual_size)?;
    }
    if planned.format.outer.is_some() {
        // One layer: the disk itself may begin like a compressed file.
        input = OpenInput::of(input).borrowing(&options.memory).without_layers(1)?.input;
    }
    let image = planned.format.driver.open(input, options)?;
    match (&planned.destination, planned.disks.as_slice()) {
        // The image may be larger than the disk, and keeps its content there.
        (Destination::Image { .. }, [slot]) => {
            let device = image.info().single("an image that is written in place")?;
            let size = expected.disks[slot.index()].virtual_size.min(device.size);
            Ok(Arc::new(Resized::new(Arc::clone(&image), device.id, size)))
        }
        _ => Ok(image),
    }
}

/// Returns options with an opener that supplies the files named by an output.
fn open_options(planned: &PlannedOutput, open: &OpenSink, expected: &Expected<'_>) -> OpenOptions {
    let opener = expected.base_opener.supplying(open.supplied.clone());
    let memory = expected.memory.clone();
    let secrets = expected.base_secrets.clone();
    let secrets = planned.format.secret().map_or(secrets.clone(), |own| secrets.with(own));
    OpenOptions { externals: opener.externals(), secrets, memory, ..OpenOptions::default() }
}
