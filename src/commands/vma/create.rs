//! `vma create`: creates an archive of disks and configurations, with a random UUID and the current time.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use imgtool_core::sync::lock;
use imgtool_core::{
    Attachment, CancelToken, Device, DeviceId, DeviceKind, Error, Location, Manifest, Memory, OpenOptions,
    Registry, Result, ResultExt, Slot,
};
use imgtool_engine::pipeline::Tap;
use imgtool_engine::{
    Destination, ExternalPolicy, FormatOptions, Gauge, Layout, Monitor, Note, OpenSource, Opened, Phase,
    Plan, PlannedOutput, PolicyOpener, Reach, RunOptions, SelectedDisk, TargetFormat, open,
};
use imgtool_storage::open::Opening;
use imgtool_storage::{Cleaner, Outputs};
use imgtool_vma::layout::{MAX_BLOB, MAX_DEV_ID};
use uuid::Uuid;

use super::map_file::split_once;
use super::new_archive::{NewArchive, Piped, exec_command};
use super::progress::Percent;
use super::{Failure, output, usage};
use crate::args::{ThreadArgs, VmaCreateArgs};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::sandbox::{self, Writes};

/// Name of the device with the state of a running guest.
const STATE: &str = "vmstate";

pub(super) fn run(args: &VmaCreateArgs) -> Result<Exit, Failure> {
    // A command is free to do what it wants, and would inherit all limits.
    if exec_command(&args.file).is_none() {
        sandbox::enter(Writes::to([&Location::from(&args.file)], &[]));
    }
    let registry = imgtool::registry();
    let interrupt = Interrupt::listen()?;
    let attachments = args.configs.iter().map(|path| read_config(path)).collect::<Result<Vec<_>>>()?;
    let memory = Memory::default().shared_by(args.drives.len() + args.disks.len());
    let opening = DiskOpening { args, registry: &registry, memory: &memory, cancel: interrupt.token() };
    let disks = opening.all()?;
    let devices = (0..).zip(&disks).map(|(number, disk)| disk.device(number)).collect();
    let manifest = Manifest { devices, attachments: attachments.clone(), ..Manifest::default() };
    check_limits(&manifest)?;

    let mut outputs = Outputs::new();
    for disk in &disks {
        outputs.protect(&disk.opened.location, disk.opened.identity.as_ref());
    }
    let archive = NewArchive::open(&args.file)?;
    let format = TargetFormat::new(registry.get("vma")?, options()?)?;
    let plan = plan(disks, archive.destination, format, attachments, outputs, registry, memory);
    let command = Arc::new(Mutex::new(archive.command));
    let killed = command.clone();
    output::before_death(move || lock(&killed).iter_mut().for_each(Piped::kill));
    let percent = args.verbose.then(|| Percent::new(&manifest.devices));
    let options = RunOptions {
        threads: ThreadArgs::default().count(),
        // Like the reference program, skip the check for free space.
        force: true,
        taps: percent.iter().map(|percent| percent as &dyn Tap).collect(),
        cancel: interrupt.token(),
        ..RunOptions::default()
    };
    let monitor = Watch { interrupt: &interrupt, command: &command, percent: percent.as_ref() };
    let made = plan.run(&options, &monitor);
    if let Err(error) = &made {
        if let Some(command) = &mut *lock(&command) {
            command.give_up(error)?;
        }
        if archive.is_stream && error.io_error().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            output::die_of_pipe();
        }
    }
    let report = made?;
    percent.iter().for_each(Percent::summary);
    for note in &report.notes {
        if matches!(note, Note::Text(_) | Note::SourceChanged(_) | Note::UnsafeNaming(_)) {
            output::note(&note.to_string());
        }
    }
    Ok(Exit::Done)
}

/// Plans a conversion of all disks into one archive.
fn plan(
    disks: Vec<Disk>,
    destination: Destination,
    format: TargetFormat,
    attachments: Vec<Attachment>,
    outputs: Outputs,
    registry: Registry,
    memory: Memory,
) -> Plan {
    let select = |(source, disk): (usize, &Disk)| SelectedDisk {
        source,
        // The id is from the source; name and kind are for the archive.
        device: Device { id: disk.device, ..disk.device(0) },
        name: disk.name.clone(),
    };
    let selected: Vec<SelectedDisk> = disks.iter().enumerate().map(select).collect();
    let output = PlannedOutput {
        destination,
        format,
        disks: Slot::first(selected.len()).collect(),
        attachments,
        machine: None,
        bitmaps: Vec::new(),
    };
    let sources = disks.into_iter().map(|disk| OpenSource { name: Some(disk.name), opened: disk.opened });
    Plan {
        layout: Layout { outputs: vec![output], ..Layout::default() },
        sources: sources.collect(),
        selected,
        outputs,
        registry,
        memory,
    }
}

/// Refuses the disks and configurations that the reference program refuses to register, in that program's
/// words. The driver also refuses them, but with messages of its own.
fn check_limits(manifest: &Manifest) -> Result<()> {
    for (number, device) in manifest.devices.iter().enumerate() {
        let hint = match device.size {
            0 => "its size is 0: leave it out",
            _ if number >= usize::from(MAX_DEV_ID) => "an archive holds at most 254 disks",
            _ => continue,
        };
        return Err(usage(format!("vma_writer_register_stream '{}' failed", device.name)).hint(hint));
    }
    match manifest.attachments.iter().find(|config| config.data.len() > MAX_BLOB) {
        Some(config) => {
            Err(usage(format!("Unable to append config data {} (len = {})", config.name, config.data.len()))
                .hint(format!("an archive takes configurations of at most {MAX_BLOB} bytes")))
        }
        None => Ok(()),
    }
}

/// Returns the options that make an archive unique: a random UUID and the current time.
fn options() -> Result<FormatOptions> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|e| Error::io("read the clock", io::Error::other(e)))?;
    let uuid = ("uuid".to_owned(), Uuid::new_v4().to_string());
    let ctime = ("ctime".to_owned(), now.as_secs().to_string());
    Ok(FormatOptions { pairs: vec![uuid, ctime], ..FormatOptions::default() })
}

/// Reads a configuration. Its name in the archive is text, so a note says if the name of the file is not.
fn read_config(path: &Path) -> Result<Attachment> {
    let file_name = path.file_name().unwrap_or_default();
    let name = file_name.to_string_lossy().into_owned();
    if file_name.to_str().is_none() {
        output::note(&format!("the name of a configuration is not UTF-8: it is stored as '{name}'"));
    }
    let data = fs::read(path).map_err(|e| Error::io("read config data from", e)).in_file(path)?;
    Ok(Attachment { name, data })
}

/// A disk to add to the archive.
struct Disk {
    name: String,
    device: DeviceId,
    opened: Opened,
}

impl Disk {
    fn device(&self, number: u32) -> Device {
        let size = self.opened.image.info().device(self.device).map_or(0, |device| device.size);
        let kind = if self.name == STATE { DeviceKind::VmState } else { DeviceKind::Disk };
        Device { kind, ..Device::disk(number, self.name.clone(), size) }
    }
}

/// Opens the disks that the command line names.
struct DiskOpening<'a> {
    args: &'a VmaCreateArgs,
    registry: &'a Registry,
    memory: &'a Memory,
    cancel: CancelToken,
}

impl DiskOpening<'_> {
    fn all(&self) -> Result<Vec<Disk>> {
        let VmaCreateArgs { drives, disks, .. } = self.args;
        if !drives.is_empty() && !disks.is_empty() {
            return Err(usage("Unexpected extra argument - specify all devices via '-d'"));
        }
        drives.iter().chain(disks).enumerate().map(|(index, text)| self.named(index, text)).collect()
    }

    /// Opens the disk at `index` of the command line: `[format=FMT:][DEV=]PATH`.
    fn named(&self, index: usize, text: &OsString) -> Result<Disk> {
        let bytes = text.as_bytes();
        let (format, disk) = match bytes.strip_prefix(b"format=").map(|rest| split_once(rest, b':')) {
            Some(Some((format, disk))) => (Some(String::from_utf8_lossy(format)), disk),
            _ if self.args.drives.is_empty() => (None, bytes),
            _ => {
                let text = text.to_string_lossy();
                return Err(usage(format!("No format specified for device: '{text}'")));
            }
        };
        let (name, path) = match split_once(disk, b'=') {
            // A name that is not UTF-8 is refused with all others that not every reader accepts.
            Some((name, path)) => (String::from_utf8_lossy(name).into_owned(), path),
            None => (format!("disk{index}"), disk),
        };
        self.open(name, Path::new(OsStr::from_bytes(path)), format.as_deref())
    }

    fn open(&self, name: String, path: &Path, format: Option<&str>) -> Result<Disk> {
        let opened = self.image(path, format).map_err(|error| {
            let reason = match error.io_error() {
                Some(cause) => format!("Could not open '{}': {}", path.display(), super::reason(cause)),
                None => error.message().to_owned(),
            };
            let failure = Error::refused(format!("bdrv_open '{}' failed - {reason}", path.display()));
            match error.remedy() {
                Some(remedy) => failure.remedied_by(remedy.clone()),
                None => failure,
            }
        })?;
        let is_guess = format.is_none() && opened.driver.capabilities().verbatim;
        if is_guess && !is_plainly_raw(self.registry, &opened) {
            output::note(&format!("'{}' is read as raw, since no other format fits", path.display()));
        }
        match opened.image.info().devices.as_slice() {
            [only] => Ok(Disk { name, device: only.id, opened }),
            many => {
                let held = many.len();
                Err(usage(format!("bdrv_open '{}' failed - it holds {held} disks", path.display())))
            }
        }
    }

    /// Opens an image. Without a format, its content says what it is, as in the other commands; outer
    /// compression is removed.
    fn image(&self, path: &Path, format: Option<&str>) -> Result<Opened> {
        let (chain, paths): (Vec<_>, Vec<_>) =
            self.args.allow_external.iter().cloned().partition(|path| path.as_os_str() == "chain");
        let policy = ExternalPolicy { chain: !chain.is_empty(), paths, ..ExternalPolicy::default() };
        let opener = PolicyOpener::new(self.registry.clone(), policy).borrowing(self.memory);
        let options = OpenOptions {
            memory: self.memory.clone(),
            externals: opener.externals(),
            ..OpenOptions::default()
        };
        // Always a path, even if it looks like a URL or is `-`.
        let location = Location::from(path);
        // The archive header contains the size of the disk, which is unknown for a FIFO.
        if format.is_none() {
            return open::open_random(self.registry, &location, None, &options, &self.cancel);
        }
        let input = imgtool_storage::open::open(&location, Opening::Plain, self.memory)?;
        let input = input.cancelled_by(self.cancel.clone()).spool()?;
        open::open_image(self.registry, input, format, &options)
    }
}

/// True if the name of an image says that it is raw, or if it is a device.
fn is_plainly_raw(registry: &Registry, opened: &Opened) -> bool {
    let is_device = opened.location.path().is_some_and(|path| path.starts_with("/dev/"));
    let named = open::driver_by_name(registry, &opened.location);
    is_device || named.is_some_and(|driver| driver.name() == opened.driver.name())
}

/// Monitor of the run. It waits for the command before the archive counts as complete.
struct Watch<'a> {
    interrupt: &'a Interrupt,
    command: &'a Mutex<Option<Piped>>,
    percent: Option<&'a Percent>,
}

impl Monitor for Watch<'_> {
    fn outputs(&self, cleaner: Cleaner) {
        self.interrupt.set_cleaner(cleaner.clone());
        output::before_death(move || cleaner.clean());
    }

    fn opened(&self, reach: &Reach) {
        sandbox::narrow(reach);
    }

    fn name_outputs(&self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        if let Some(command) = &mut *lock(self.command) {
            command.finish()?;
        }
        self.interrupt.shielded(step)
    }

    fn polls_work(&self) -> bool {
        false
    }

    fn begin(&self, _phase: Phase, _gauge: &Arc<Gauge>) {
        if let Some(percent) = self.percent {
            percent.start();
        }
    }
}
