//! `vma create`: an archive of disks and configurations, with a random UUID and the time of day.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::storage::os::{self, FileClass};
use imgtool_toolkit::{
    Attachment, CreateOptions, Device, DeviceId, DeviceKind, Error, ImageSink, Input, Manifest, OpenOptions,
    Opened, Output, Outputs, Progress, Registry, Result, ResultExt,
};
use imgtool_vma::layout::{CLUSTER, MAX_BLOB, MAX_DEV_ID, SUB_BLOCK};
use uuid::Uuid;

use super::{Failure, usage};
use crate::args::{ThreadArgs, VmaCreateArgs};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::{drivers, report};

/// The device of this name is the state of a running guest.
const STATE: &str = "vmstate";

pub(super) fn run(args: &VmaCreateArgs) -> Result<Exit, Failure> {
    let registry = drivers::registry();
    let interrupt = Interrupt::listen()?;
    let configs = args.configs.iter().map(|path| read_config(path)).collect::<Result<Vec<_>>>()?;
    let mut sources = open_disks(args, &registry)?;
    let devices = (0..).zip(&sources).map(|(number, disk)| disk.device(number)).collect();
    let manifest = Manifest { devices, attachments: configs };
    check_limits(&manifest)?;

    let mut outputs = Outputs::new();
    interrupt.cleans(outputs.cleaner());
    for disk in &sources {
        outputs.protect(&disk.opened.path)?;
    }
    let mut archive = Archive::open(&args.file, &mut outputs)?;
    let sink = registry.get("vma")?.create(archive.output.clone(), &manifest, &options()?)?;
    let progress = Percent::new(&manifest, args.verbose);
    let copied = copy(&mut sources, &*sink, &progress, &interrupt);
    // A command that gave up says why by its exit status; that the pipe broke is only what follows.
    archive.close(&copied)?;
    copied?;
    interrupt.shielded(|| outputs.commit())?;
    progress.summary(&manifest);
    for note in sink.notes() {
        report::say(&format!("vma: note: {}", escape_control(&note)));
    }
    Ok(Exit::Done)
}

/// What the program refuses when it registers disks and configurations, in its words. The driver
/// refuses it too.
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

fn copy(sources: &mut [Disk], sink: &dyn ImageSink, progress: &Percent, interrupt: &Interrupt) -> Result<()> {
    sink.begin()?;
    for (number, disk) in (0..).zip(sources) {
        let route = Route { from: disk.device, to: DeviceId(number) };
        let threads = ThreadArgs::default().count();
        let job = Job { routes: vec![route], threads, progress, cancel: interrupt.token() };
        pipeline::copy(&mut *disk.opened.source, sink, &job).in_file(&disk.opened.path)?;
    }
    sink.finish()
}

/// What must be unique about an archive, and when it was made.
fn options() -> Result<CreateOptions> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_err(|e| Error::io("read the clock", io::Error::other(e)))?;
    let mut options = CreateOptions::default();
    options.options.insert("uuid".to_owned(), Uuid::new_v4().to_string());
    options.options.insert("ctime".to_owned(), now.as_secs().to_string());
    Ok(options)
}

fn read_config(path: &Path) -> Result<Attachment> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let data = fs::read(path).map_err(|e| Error::io("read config data from", e)).in_file(path)?;
    Ok(Attachment { name, data })
}

/// A disk that goes into the archive.
struct Disk {
    name: String,
    device: DeviceId,
    opened: Opened,
}

impl Disk {
    fn device(&self, number: u32) -> Device {
        let size = self.opened.source.info().device(self.device).map_or(0, |device| device.size);
        let kind = if self.name == STATE { DeviceKind::VmState } else { DeviceKind::Disk };
        Device { kind, ..Device::disk(number, self.name.clone(), size) }
    }
}

fn open_disks(args: &VmaCreateArgs, registry: &Registry) -> Result<Vec<Disk>> {
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
        disks.push(open_disk(registry, name, Path::new(path), format)?);
    }
    Ok(disks)
}

fn open_disk(registry: &Registry, name: String, path: &Path, format: Option<&str>) -> Result<Disk> {
    let open = || -> Result<Opened> {
        let input = Input::open_plain(path)?;
        // A FIFO does not tell its length, which stands in the header.
        let input = if input.is_stream() { input.spool()? } else { input };
        registry.open(input, format, &OpenOptions::default())
    };
    let opened = open().map_err(|error| {
        let reason = match error.io_error() {
            Some(cause) => format!("Could not open '{}': {}", path.display(), super::reason(cause)),
            None => error.message().to_owned(),
        };
        let failure = Error::refused(format!("bdrv_open '{}' failed - {reason}", path.display()));
        match error.hint_text() {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    })?;
    match opened.source.info().devices.as_slice() {
        [only] => Ok(Disk { name, device: only.id, opened }),
        many => Err(usage(format!("bdrv_open '{}' failed - it holds {} disks", path.display(), many.len()))),
    }
}

/// Where the archive goes.
struct Archive {
    output: Output,
    command: Option<Piped>,
}

/// A command that reads the archive.
struct Piped {
    child: Child,
    stdin: SharedStdin,
}

impl Archive {
    fn open(path: &Path, outputs: &mut Outputs) -> Result<Self> {
        if let Some(command) = path.to_str().and_then(|text| text.strip_prefix("exec:")) {
            return Self::exec(path, command, outputs);
        }
        let exists = fs::metadata(path).ok();
        let is_stream = exists.as_ref().is_some_and(|meta| os::classify(meta) == FileClass::Stream);
        if is_stream {
            let file = os::open_stream(path).map_err(|e| Error::io("open", e)).in_file(path)?;
            let output = Output::from_writer(path, Box::new(file));
            outputs.stream(output.clone());
            return Ok(Self { output, command: None });
        }
        if exists.is_some() {
            return Err(Error::refused(format!("can't open file {} - File exists", path.display())));
        }
        // A plain name: '-' is a file here.
        let path = if path == Path::new("-") { PathBuf::from("./-") } else { path.to_owned() };
        Ok(Self { output: outputs.create(&path, false)?, command: None })
    }

    fn exec(path: &Path, command: &str, outputs: &mut Outputs) -> Result<Self> {
        let mut child = Command::new("sh")
            .args(["-c", command])
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|e| Error::io("start", e))
            .in_file(path)?;
        let stdin = SharedStdin(Arc::new(Mutex::new(child.stdin.take())));
        let output = Output::from_writer(path, Box::new(stdin.clone()));
        outputs.stream(output.clone());
        Ok(Self { output, command: Some(Piped { child, stdin }) })
    }

    /// Ends the command's input and waits for its verdict. A command that has not ended by itself
    /// must not take an unfinished archive for a finished one.
    fn close(&mut self, copied: &Result<()>) -> Result<()> {
        let Some(command) = &mut self.command else { return Ok(()) };
        let path = self.output.path();
        let closed_its_input =
            |e: &Error| e.io_error().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe);
        if copied.as_ref().is_err_and(|e| !closed_its_input(e)) {
            // It may just have ended; then there is nothing to stop.
            let _ = command.child.kill();
            let _ = command.child.wait();
            return Ok(());
        }
        // Nothing is buffered on our side.
        drop(command.stdin.lock().take());
        let status = command.child.wait().map_err(|e| Error::io("wait for", e)).in_file(path)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::refused(format!("the command that was to read the archive failed: {status}")).path(path))
    }
}

/// The standard input of a command, which somebody else may close.
#[derive(Clone)]
struct SharedStdin(Arc<Mutex<Option<ChildStdin>>>);

impl SharedStdin {
    fn lock(&self) -> MutexGuard<'_, Option<ChildStdin>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for SharedStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.lock().as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        // After the command's end there is nothing left to flush.
        self.lock().as_mut().map_or(Ok(()), ChildStdin::flush)
    }
}

/// What `-v` prints.
struct Percent {
    verbose: bool,
    total: u64,
    state: Mutex<State>,
}

struct State {
    done: u64,
    zero: u64,
    percent: u64,
    zeros: Vec<u64>,
}

impl Percent {
    fn new(manifest: &Manifest, verbose: bool) -> Self {
        let total = manifest.devices.iter().map(|device| device.size).sum();
        let zeros = vec![0; manifest.devices.len()];
        if verbose && total > 0 {
            report::say(&format!("progress 0% 0/{total} 0"));
        }
        Self { verbose, total, state: Mutex::new(State { done: 0, zero: 0, percent: 0, zeros }) }
    }

    fn summary(&self, manifest: &Manifest) {
        if !self.verbose {
            return;
        }
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for (device, zeros) in manifest.devices.iter().zip(&state.zeros) {
            let zeros = zeros.saturating_add(beyond_end(device));
            let saved = i128::from(device.size) - i128::from(zeros);
            let name = escape_control(&device.name);
            report::say(&format!("image {name}: size={} zeros={zeros} saved={saved}", device.size));
        }
    }
}

/// The program counts the blocks of a disk's last cluster that lie past the disk's end as zeros.
fn beyond_end(device: &Device) -> u64 {
    match device.kind {
        DeviceKind::VmState => 0,
        DeviceKind::Disk => {
            let clusters = device.size.div_ceil(CLUSTER).saturating_mul(CLUSTER);
            clusters.saturating_sub(device.size.div_ceil(SUB_BLOCK).saturating_mul(SUB_BLOCK))
        }
    }
}

impl Progress for Percent {
    fn advance(&self, device: DeviceId, len: u64, zero: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.done += len;
        state.zero += zero;
        if let Some(zeros) = state.zeros.get_mut(device.0 as usize) {
            *zeros += zero;
        }
        // No more than 254 disks of 2^48 bytes.
        let percent = (state.done * 100).checked_div(self.total).unwrap_or(100);
        if self.verbose && percent != state.percent {
            state.percent = percent;
            report::say(&format!("progress {percent}% {}/{} {}", state.done, self.total, state.zero));
        }
    }
}
