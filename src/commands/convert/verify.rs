//! `--verify`: reads every finished output back, through its driver, before it gets its name.
//!
//! The content was digested on its way from the source to the sink; the same digest of what the
//! output holds must be equal. That catches what a disk, a cable, a file system or our own writer
//! changed in between.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use imgtool_toolkit::digest::{self, ContentDigest};
use imgtool_toolkit::storage::ReadAt;
use imgtool_toolkit::{
    Attachment, DeviceId, Error, ErrorKind, Given, ImageSource, Input, OpenOptions, Output, Progress,
    RandomInput, Result, ResultExt,
};

use super::layout::{Layout, Place, Target};
use super::sinks::Sinks;
use super::sources::Taken;
use crate::args::ProgressMode;
use crate::commands::extras;
use crate::interrupt::Interrupt;
use crate::progress::{Lane, Meter};

/// Formats count a disk in sectors; VHDX knows the largest, of 4 KiB.
const LARGEST_SECTOR: u64 = 4096;

/// What was sent into the outputs.
pub struct Expected<'a> {
    /// Digests by the sink's numbers.
    pub digest: &'a ContentDigest,
    /// What the sink calls each device taken.
    pub numbers: &'a [DeviceId],
    /// The devices.
    pub taken: &'a [Taken],
    /// How long each device taken came to be.
    pub sizes: &'a [u64],
    /// How backing files of the outputs are opened.
    pub base_options: &'a OpenOptions,
}

/// Reads every output and compares it with what was sent.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Corrupt`] when an output does not hold what was sent.
pub fn read_back(
    layout: &Layout,
    made: &Sinks,
    expected: &Expected<'_>,
    threads: usize,
    progress: ProgressMode,
    interrupt: &Interrupt,
) -> Result<()> {
    // One phase for all outputs: the devices of each stand behind those of the last.
    let mut opened = Vec::new();
    let mut lanes = Vec::new();
    for ((target, output), data_file) in layout.targets.iter().zip(&made.outputs).zip(&made.data_files) {
        // What is still in memory proves nothing about the disk.
        for written in [Some(output), data_file.as_ref()].into_iter().flatten() {
            written.sync_and_forget()?;
        }
        check(target, output, data_file.as_ref(), expected).in_file(target.place.path())?;
        let source = open(target, output, data_file.as_ref(), expected).in_file(target.place.path())?;
        let info = source.info();
        // Names are adapted to the format; what they name is not.
        let contents = |attachments: &[Attachment]| -> Vec<Vec<u8>> {
            attachments.iter().map(|attachment| attachment.data.clone()).collect()
        };
        if contents(&info.attachments) != contents(&target.attachments) {
            return Err(differs(target, "other configurations"));
        }
        let first_lane = u32::try_from(lanes.len()).unwrap_or(u32::MAX);
        // Lanes are found by number, and an archive's devices are numbered from 1.
        let highest = info.devices.iter().map(|device| device.id.0).max().unwrap_or(0);
        lanes.extend((0..=highest).map(|number| lane(&*source, DeviceId(number))));
        opened.push((target, source, first_lane));
    }
    let mut meter = Meter::start(progress, "verify", lanes, None, || 0);
    for (target, mut source, first_lane) in opened {
        let ids: Vec<DeviceId> = source.info().devices.iter().map(|device| device.id).collect();
        let progress = Behind { progress: meter.progress(), first_lane };
        let found = digest::digest_source(&mut *source, threads, &progress, interrupt.token())
            .in_file(target.place.path())?;
        if ids.len() != target.devices.len() {
            return Err(differs(target, "another number of devices"));
        }
        for (id, &device) in ids.into_iter().zip(&target.devices) {
            // Zeros at the end have no part in the digest.
            let size = source.info().device(id).map_or(0, |found| found.size);
            if !is_size_of(target, size, expected.sizes[device]) {
                let what = format!("{size} bytes of disk instead of {}", expected.sizes[device]);
                return Err(differs(target, &what).device(&*expected.taken[device].name));
            }
            if found.of(id) != expected.digest.of(expected.numbers[device]) {
                return Err(differs(target, "other content").device(&*expected.taken[device].name));
            }
        }
    }
    meter.finish();
    Ok(())
}

/// Whether an output's size is that of its disk, or that rounded up to sectors. What existed before keeps
/// its length.
fn is_size_of(target: &Target, size: u64, disk: u64) -> bool {
    size >= disk && (size - disk < LARGEST_SECTOR || matches!(target.place, Place::Existing { .. }))
}

/// The progress of one of several outputs: its devices are counted behind those of others.
struct Behind<'a> {
    progress: &'a dyn Progress,
    first_lane: u32,
}

impl Progress for Behind<'_> {
    fn advance(&self, device: DeviceId, len: u64, zero: u64) {
        self.progress.advance(DeviceId(self.first_lane.saturating_add(device.0)), len, zero);
    }
}

/// Reads a configuration back that was written to a file of its own.
///
/// # Errors
/// Those of [`read_back`].
pub fn same_bytes(output: &Output, sent: &[u8]) -> Result<()> {
    output.sync_and_forget()?;
    let mut found = vec![0; sent.len()];
    output.read_exact_at(&mut found, 0)?;
    if found == sent {
        return Ok(());
    }
    Err(Error::corrupt("reading the configuration back brings other content than was written")
        .path(output.path())
        .hint("check the disk and the memory of this machine, then try again"))
}

fn lane(source: &dyn ImageSource, id: DeviceId) -> Lane {
    let device = source.info().device(id);
    Lane::new(device.map_or("", |device| &device.name), Some(device.map_or(0, |device| device.size)))
}

fn differs(target: &Target, what: &str) -> Error {
    Error::corrupt(format!("reading the output back brings {what} than was written"))
        .path(target.place.path())
        .hint("check the disk and the memory of this machine, then try again")
}

/// Checks the structure of an output: reading its content does not look at the refcounts of a qcow2
/// image, or at the second header of a VHDX image. A compressed archive is all content.
fn check(
    target: &Target,
    output: &Output,
    data_file: Option<&Output>,
    expected: &Expected<'_>,
) -> Result<()> {
    if !target.format.driver.capabilities().check || target.format.outer.is_some() {
        return Ok(());
    }
    let options = open_options(target, data_file, expected)?;
    let found = match target.format.driver.check(output.reopen()?, &options) {
        // No verdict is no damage.
        Err(e) if e.kind() == ErrorKind::LimitExceeded => return Ok(()),
        found => found?,
    };
    let first = found.findings.first().map(|finding| format!(" ({finding})")).unwrap_or_default();
    match found.corruptions.saturating_add(found.leaks).saturating_add(found.check_errors) {
        0 => Ok(()),
        _ => Err(differs(target, &format!("another structure{first}"))),
    }
}

fn open(
    target: &Target,
    output: &Output,
    data_file: Option<&Output>,
    expected: &Expected<'_>,
) -> Result<Box<dyn ImageSource>> {
    let mut input = output.reopen()?;
    if let (Place::Existing { .. }, "raw", [device]) =
        (&target.place, target.format.driver.name(), target.devices.as_slice())
    {
        // The target may be longer than the disk; what follows is not ours.
        input = front(input, expected.taken[*device].device.size)?;
    }
    if target.format.outer.is_some() {
        input = input.decompressed()?;
    }
    target.format.driver.open(input, &open_options(target, data_file, expected)?)
}

fn open_options(target: &Target, data_file: Option<&Output>, expected: &Expected<'_>) -> Result<OpenOptions> {
    let given = named_files(target, data_file)?;
    let externals = expected.base_options.externals.clone().with_given(given);
    Ok(OpenOptions { externals, ..OpenOptions::default() })
}

/// What an output may open when it is read back: precisely what its own options name.
fn named_files(target: &Target, data_file: Option<&Output>) -> Result<BTreeMap<String, Given>> {
    let options = &target.format.options;
    let backing = extras::backing_path(target.place.path(), options)?.map(Given::File);
    let named = [
        (options.get(extras::BACKING_FILE), backing),
        (options.get(extras::DATA_FILE), data_file.cloned().map(Given::Output)),
    ];
    Ok(named.into_iter().filter_map(|(name, given)| Some((name?.to_owned(), given?))).collect())
}

fn front(input: Input, len: u64) -> Result<Input> {
    let path = input.path().to_owned();
    let whole = input.into_random()?;
    let len = len.min(whole.len());
    Ok(Input::from_read_at(path, Arc::new(Front { whole, len })))
}

/// The first bytes of an input.
struct Front {
    whole: RandomInput,
    len: u64,
}

impl ReadAt for Front {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        self.whole.read_exact_at(buf, position).map_err(io::Error::other)
    }

    fn len(&self) -> u64 {
        self.len
    }
}
