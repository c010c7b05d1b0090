//! `vma create`: creates an archive of disks and configurations, with a random UUID and the current time.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use imgtool_core::error::escape_control;
use imgtool_core::sync::lock;
use imgtool_core::{
    Attachment, CancelToken, Device, DeviceKind, Error, Lane, Location, Manifest, Memory, OpenOptions,
    Output, Registry, Result, ResultExt, Slot,
};
use imgtool_engine::{
    Destination, FormatOptions, Gauge, Layout, Monitor, Note, OpenSource, Opened, Phase, Plan, PlannedOutput,
    Reach, RunOptions, SelectedDisk, TargetFormat, open,
};
use imgtool_storage::open::Opening;
use imgtool_storage::os::{self, FileClass};
use imgtool_storage::{Cleaner, Outputs};
use imgtool_vma::layout::{CLUSTER, MAX_BLOB, MAX_DEV_ID, SUB_BLOCK};
use uuid::Uuid;

use super::{Failure, usage};
use crate::args::{ThreadArgs, VmaCreateArgs};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::sandbox::Writes;
use crate::{report, sandbox};

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
    let disks = open_disks(args, &registry, &memory)?;
    let devices = (0..).zip(&disks).map(|(number, disk)| disk.device(number)).collect();
    let manifest = Manifest { devices, attachments: attachments.clone(), ..Manifest::default() };
    check_limits(&manifest)?;

    let mut outputs = Outputs::new();
    for disk in &disks {
        outputs.protect(&disk.opened.location, disk.opened.identity.as_ref());
    }
    let mut archive = Archive::open(&args.file)?;
    let format = TargetFormat::new(registry.get("vma")?, options()?)?;
    let plan = plan(disks, archive.destination.clone(), format, attachments, outputs, registry, memory);
    let command = Mutex::new(archive.command.take());
    let progress = Percent::new(&manifest, args.verbose, &interrupt, &command);
    let options = RunOptions {
        threads: ThreadArgs::default().count(),
        // Like the reference program, skip the check for free space.
        force: true,
        cancel: interrupt.token(),
        ..RunOptions::default()
    };
    let made = plan.run(&options, &progress);
    if let (Err(error), Some(command)) = (&made, &mut *lock(&command)) {
        command.give_up(error)?;
    }
    let report = made?;
    progress.summary(&manifest);
    for note in &report.notes {
        if matches!(note, Note::Text(_) | Note::SourceChanged(_) | Note::UnsafeNaming(_)) {
            super::note(&note.to_string());
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
        size: None,
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

fn read_config(path: &Path) -> Result<Attachment> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let data = fs::read(path).map_err(|e| Error::io("read config data from", e)).in_file(path)?;
    Ok(Attachment { name, data })
}

/// A disk to add to the archive.
struct Disk {
    name: String,
    device: imgtool_core::DeviceId,
    opened: Opened,
}

impl Disk {
    fn device(&self, number: u32) -> Device {
        let size = self.opened.image.info().device(self.device).map_or(0, |device| device.size);
        let kind = if self.name == STATE { DeviceKind::VmState } else { DeviceKind::Disk };
        Device { kind, ..Device::disk(number, self.name.clone(), size) }
    }
}

fn open_disks(args: &VmaCreateArgs, registry: &Registry, memory: &Memory) -> Result<Vec<Disk>> {
    if !args.drives.is_empty() && !args.disks.is_empty() {
        return Err(usage("Unexpected extra argument - specify all devices via '-d'"));
    }
    let mut disks = Vec::new();
    for (index, text) in args.drives.iter().chain(&args.disks).enumerate() {
        let text = text.to_str().ok_or_else(|| usage("a device is not UTF-8"))?;
        let (format, disk) = match text.strip_prefix("format=").map(|rest| rest.split_once(':')) {
            Some(Some((format, disk))) => (Some(format), disk),
            _ if args.drives.is_empty() => (None, text),
            _ => return Err(usage(format!("No format specified for device: '{text}'"))),
        };
        let (name, path) = match disk.split_once('=') {
            Some((name, path)) => (name.to_owned(), path),
            None => (format!("disk{index}"), disk),
        };
        disks.push(open_disk(registry, name, Path::new(path), format, memory)?);
    }
    Ok(disks)
}

fn open_disk(
    registry: &Registry,
    name: String,
    path: &Path,
    format: Option<&str>,
    memory: &Memory,
) -> Result<Disk> {
    let open = || -> Result<Opened> {
        let input = imgtool_storage::open::open(&Location::from(path), Opening::Plain, memory)?;
        // The archive header contains the size of the disk, which is unknown for a FIFO.
        let input = input.cancelled_by(CancelToken::new()).spool()?;
        let options = OpenOptions { memory: memory.clone(), ..OpenOptions::default() };
        open::open_image(registry, input, format, &options)
    };
    let opened = open().map_err(|error| {
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
    match opened.image.info().devices.as_slice() {
        [only] => Ok(Disk { name, device: only.id, opened }),
        many => Err(usage(format!("bdrv_open '{}' failed - it holds {} disks", path.display(), many.len()))),
    }
}

/// Returns the command that reads the archive, if `path` is one.
fn exec_command(path: &Path) -> Option<&str> {
    path.to_str()?.strip_prefix("exec:")
}

/// Destination of the archive, and the command that reads it from a pipe, if any.
struct Archive {
    destination: Destination,
    command: Option<Piped>,
}

/// A running command that reads the archive from its standard input.
struct Piped {
    location: Location,
    child: Child,
    stdin: SharedStdin,
}

impl Archive {
    fn open(path: &Path) -> Result<Self> {
        if let Some(command) = exec_command(path) {
            return Self::exec(path, command);
        }
        let exists = fs::metadata(path).ok();
        let is_stream = exists.as_ref().is_some_and(|meta| os::classify(meta) == FileClass::Stream);
        if is_stream {
            let file = os::open_stream(path).map_err(|e| Error::io("open", e)).in_file(path)?;
            let output = Output::from_writer(path, Box::new(file));
            return Ok(Self { destination: Destination::Open(output), command: None });
        }
        if exists.is_some() {
            return Err(Error::refused(format!("can't open file {} - File exists", path.display())));
        }
        // The reference program treats '-' as the name of a file.
        let path = if path == Path::new("-") { PathBuf::from("./-") } else { path.to_owned() };
        Ok(Self { destination: Destination::New(path), command: None })
    }

    fn exec(path: &Path, command: &str) -> Result<Self> {
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|e| Error::io("start", e))
            .in_file(path)?;
        let stdin = SharedStdin(Arc::new(Mutex::new(child.stdin.take())));
        let output = Output::from_writer(path, Box::new(stdin.clone()));
        Ok(Self {
            destination: Destination::Open(output),
            command: Some(Piped { location: path.into(), child, stdin }),
        })
    }
}

impl Piped {
    /// Closes the command's standard input and waits for its exit status.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if the command failed.
    fn finish(&mut self) -> Result<()> {
        // Dropping the handle closes the pipe. It has no buffer to flush.
        drop(lock(&self.stdin.0).take());
        let status = self.child.wait().map_err(|e| Error::io("wait for", e)).in_file(&self.location)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::refused(format!("the command reading the archive failed: {status}")).path(&self.location))
    }

    /// Kills the command after `error`, so that it does not mistake an unfinished archive for a complete one.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if the command had already failed. Its exit status then explains
    /// `error`, a broken pipe.
    fn give_up(&mut self, error: &Error) -> Result<()> {
        if error.io_error().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return self.finish();
        }
        // Fails only if the command has just ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
        Ok(())
    }
}

/// Standard input of a command, shared with the code that closes it.
#[derive(Clone)]
struct SharedStdin(Arc<Mutex<Option<ChildStdin>>>);

impl Write for SharedStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        // After the pipe is closed, there is nothing left to flush.
        lock(&self.0).as_mut().map_or(Ok(()), ChildStdin::flush)
    }
}

/// Monitor of the run. Prints the lines of `-v`, and waits for the command before the archive counts as
/// complete.
struct Percent<'a> {
    interrupt: &'a Interrupt,
    command: &'a Mutex<Option<Piped>>,
    verbose: bool,
    total: u64,
    state: Mutex<State>,
}

/// Progress so far, in guest bytes; `zeros` counts per device.
struct State {
    done: u64,
    zero: u64,
    percent: u64,
    zeros: Vec<u64>,
}

impl<'a> Percent<'a> {
    fn new(
        manifest: &Manifest,
        verbose: bool,
        interrupt: &'a Interrupt,
        command: &'a Mutex<Option<Piped>>,
    ) -> Self {
        let total = manifest.devices.iter().map(|device| device.size).sum();
        let zeros = vec![0; manifest.devices.len()];
        Self {
            interrupt,
            command,
            verbose,
            total,
            state: Mutex::new(State { done: 0, zero: 0, percent: 0, zeros }),
        }
    }

    fn summary(&self, manifest: &Manifest) {
        if !self.verbose {
            return;
        }
        let state = lock(&self.state);
        for (device, zeros) in manifest.devices.iter().zip(&state.zeros) {
            let zeros = zeros.saturating_add(beyond_end(device));
            let saved = i128::from(device.size) - i128::from(zeros);
            let name = escape_control(&device.name);
            report::say(&format!("image {name}: size={} zeros={zeros} saved={saved}", device.size));
        }
    }
}

/// Returns the number of bytes between a disk's last sub-block and the end of its last cluster. The reference
/// program counts them as zeros.
fn beyond_end(device: &Device) -> u64 {
    match device.kind {
        DeviceKind::VmState => 0,
        DeviceKind::Disk => {
            let clusters = device.size.div_ceil(CLUSTER).saturating_mul(CLUSTER);
            clusters.saturating_sub(device.size.div_ceil(SUB_BLOCK).saturating_mul(SUB_BLOCK))
        }
    }
}

impl Monitor for Percent<'_> {
    fn outputs(&self, cleaner: Cleaner) {
        self.interrupt.set_cleaner(cleaner);
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

    fn begin(&self, _phase: Phase, _gauge: &Arc<Gauge>) {
        if self.verbose && self.total > 0 {
            report::say(&format!("progress 0% 0/{} 0", self.total));
        }
    }

    fn advance(&self, lane: Lane, len: u64, zero: u64) {
        let mut state = lock(&self.state);
        state.done += len;
        state.zero += zero;
        if let Some(zeros) = state.zeros.get_mut(lane.index()) {
            *zeros += zero;
        }
        // Cannot overflow: an archive has at most 254 disks of 2^48 bytes.
        let percent = (state.done * 100).checked_div(self.total).unwrap_or(100);
        if self.verbose && percent != state.percent {
            state.percent = percent;
            report::say(&format!("progress {percent}% {}/{} {}", state.done, self.total, state.zero));
        }
    }
}
