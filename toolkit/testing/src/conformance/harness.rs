//! Building blocks of the laws: functions that write images through drivers, and open them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{
    CancelToken, Consumer, CreateOptions, Driver, Error, ExternalOpener, Externals, ImageSink, ImageSource,
    Input, Lane, Location, Manifest, Memory, NoProgress, OpenOptions, Output, OutputFactory, Registry,
    Result, SinkDevice, external,
};
use imgtool_engine::pipeline::{self, Job, Route, Target};
use imgtool_storage::{Opening, file, open as storage};

use super::image::Image;
use super::memory::MemorySource;

/// Number of threads in laws that are not about threads.
pub const THREADS: usize = 2;

/// Creates a temporary directory, removed when the returned value is dropped.
pub fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("conformance-").tempdir().expect("make a temporary directory")
}

/// Creates an output file at `path`, which must not exist.
pub fn new_file(path: &Path) -> Output {
    let file = File::options().read(true).write(true).create_new(true).open(path).expect("create an output");
    file::new_file(path, file)
}

/// A stream output to memory, in place of a pipe.
#[derive(Debug, Clone, Default)]
pub struct Pipe(Arc<Mutex<Vec<u8>>>);

impl Pipe {
    /// Returns an output that writes into this pipe.
    pub fn output(&self) -> Output {
        Output::from_writer(Location::Stdout, Box::new(self.clone()))
    }

    /// Returns the bytes written so far.
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0).clone()
    }
}

impl Write for Pipe {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The only output of an image: a file, a device or a pipe. Refuses to create outputs beside it.
#[derive(Debug)]
pub struct SingleOutput(pub Output);

impl OutputFactory for SingleOutput {
    fn main(&mut self) -> Result<Output> {
        Ok(self.0.clone())
    }

    fn beside(&mut self, name: &str) -> Result<Output> {
        Err(Error::refused(format!("no output beside the image, so not '{name}'")))
    }
}

/// Outputs of an image: new files in one directory, under their final names from the start.
#[derive(Debug)]
pub struct FileOutputs {
    path: PathBuf,
    main: Option<Output>,
    beside: Vec<String>,
}

impl FileOutputs {
    /// Returns a factory that creates the image at `path`, and its other outputs in the same directory.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), main: None, beside: Vec::new() }
    }
}

impl OutputFactory for FileOutputs {
    fn main(&mut self) -> Result<Output> {
        Ok(self.main.get_or_insert_with(|| new_file(&self.path)).clone())
    }

    fn beside(&mut self, name: &str) -> Result<Output> {
        let is_plain = Path::new(name).file_name().is_some_and(|plain| plain == name);
        let path = self.path.with_file_name(name);
        if !is_plain || path.exists() {
            return Err(Error::refused("already exists, or is no plain file name").path(path));
        }
        self.beside.push(name.to_owned());
        Ok(new_file(&path))
    }
}

/// Begins an image in `output`, its only output.
///
/// # Errors
/// The error of the driver.
pub fn create(
    driver: &dyn Driver,
    output: Output,
    manifest: &Manifest,
    options: &CreateOptions,
) -> Result<Box<dyn ImageSink>> {
    driver.writer(options)?.create(&mut SingleOutput(output), manifest)
}

/// Copies all devices of `source` into the devices of `sink`, in their order, and finishes the sink.
///
/// # Errors
/// The first error of the source, the sink or the copy.
pub fn fill_sink(source: &dyn ImageSource, sink: &dyn ImageSink, threads: usize) -> Result<()> {
    let head = sink.begin()?;
    if !head.is_empty() {
        let main = sink.outputs().first().expect("a sink has an output");
        main.write_at(&head, 0)?;
    }
    copy(source, Target::Sink(sink), threads, CancelToken::new())?;
    let end = sink.end()?;
    if !end.is_empty() {
        let main = sink.outputs().first().expect("a sink has an output");
        main.write_at(&end, main.reached())?;
    }
    sink.finish()
}

/// Copies all devices of `source` to a consumer.
///
/// # Errors
/// The first error of the source, the consumer or the copy.
pub fn consume(source: &dyn ImageSource, consumer: &dyn Consumer, threads: usize) -> Result<()> {
    copy(source, Target::Consumer(consumer), threads, CancelToken::new())
}

/// Copies all devices of `source` into the devices of `target`, in their order.
pub(super) fn copy(
    source: &dyn ImageSource,
    target: Target<'_>,
    threads: usize,
    cancel: CancelToken,
) -> Result<()> {
    let devices = source.info().devices.iter().zip(0..);
    let routes = devices
        .map(|(device, index)| Route { from: device.id, target: 0, to: SinkDevice(index), lane: Lane(index) })
        .collect();
    let (targets, memory) = (vec![target], Memory::default());
    let job = Job { targets, routes, taps: Vec::new(), threads, progress: &NoProgress, cancel, memory };
    pipeline::copy(source, &job).map(drop)
}

/// Writes `image` to `output` with `driver`, and syncs the output.
///
/// # Errors
/// The first error of the driver or the copy.
pub fn write(
    driver: &dyn Driver,
    options: &CreateOptions,
    image: &Image,
    output: &Output,
    threads: usize,
) -> Result<()> {
    write_to(driver, options, image, &mut SingleOutput(output.clone()), threads)
}

/// Like [`write()`], to the outputs of a factory.
///
/// # Errors
/// The first error of the driver or the copy.
pub fn write_to(
    driver: &dyn Driver,
    options: &CreateOptions,
    image: &Image,
    outputs: &mut dyn OutputFactory,
    threads: usize,
) -> Result<()> {
    let sink = driver.writer(options)?.create(outputs, &image.manifest())?;
    fill_sink(&MemorySource::new(image), &*sink, threads)?;
    sink.outputs().iter().try_for_each(Output::sync)
}

/// Writes `image` into a new file in a new directory in `directory`, and returns its path. All such files have
/// the same name, which an image may contain.
///
/// # Panics
/// If the driver can't write the image.
pub fn make(driver: &dyn Driver, options: &CreateOptions, image: &Image, directory: &Path) -> PathBuf {
    make_with(driver, options, image, directory, THREADS)
}

/// Like [`make`], with `threads` threads.
///
/// # Panics
/// If the driver can't write the image, or if the outputs beside it differ from those that the driver
/// announced.
pub fn make_with(
    driver: &dyn Driver,
    options: &CreateOptions,
    image: &Image,
    directory: &Path,
    threads: usize,
) -> PathBuf {
    let number = std::fs::read_dir(directory).expect("list the directory").count();
    let name = format!("disk.{}", driver.name());
    let own = directory.join(number.to_string());
    std::fs::create_dir(&own).expect("create a directory");
    let path = own.join(&name);
    let mut outputs = FileOutputs::new(&path);
    if let Err(error) = write_to(driver, options, image, &mut outputs, threads) {
        panic!("{}: {image} can't be written: {error:#}", driver.name());
    }
    let writer = driver.writer(options).expect("made before");
    let mut announced = writer.companions(&name, &image.manifest());
    announced.sort();
    outputs.beside.sort();
    assert_eq!(outputs.beside, announced, "{}: outputs beside {image}, and those announced", driver.name());
    path
}

/// Returns the bytes of the file that `driver` writes for `image`.
///
/// # Panics
/// If the driver can't write the image.
pub fn make_bytes(driver: &dyn Driver, options: &CreateOptions, image: &Image) -> Vec<u8> {
    let directory = scratch();
    std::fs::read(make(driver, options, image, directory.path())).expect("read the output")
}

/// Opens a file as an input, without undoing outer compression.
///
/// # Errors
/// If the file can't be opened.
pub fn input(path: &Path) -> Result<Input> {
    storage::open(&path.into(), Opening::Plain, &Memory::default()).map(|opened| opened.input)
}

/// Opens a file with `driver`, without undoing outer compression.
///
/// # Errors
/// The error of the driver.
pub fn open(driver: &dyn Driver, path: &Path) -> Result<Arc<dyn ImageSource>> {
    open_with(driver, path, &OpenOptions::default())
}

/// Like [`open`], with options.
///
/// # Errors
/// The error of the driver.
pub fn open_with(driver: &dyn Driver, path: &Path, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    driver.open(input(path)?, options)
}

/// Returns an opener that opens members of containers with the drivers of `registry`, and refuses everything
/// outside the container.
pub fn members(registry: &Registry) -> Externals {
    Externals::new(Arc::new(Members(registry.clone())))
}

struct Members(Registry);

impl ExternalOpener for Members {
    fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Location,
        _format: Option<&str>,
        _options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        Err(external::refusal(role, name, from))
    }

    fn open_file(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        Err(external::refusal(role, name, from))
    }

    fn open_member(
        &self,
        member: Input,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        let driver = match format {
            Some(format) => self.0.get(format)?,
            None => self.0.probe(&member.head()?, member.len())?.0,
        };
        driver.open(member, options)
    }

    fn depth(&self) -> usize {
        0
    }
}

/// True if the driver refused the request rather than failed.
pub(super) fn is_refusal(error: &Error) -> bool {
    use imgtool_core::ErrorKind::{LimitExceeded, Refused, Unsupported, Usage};
    matches!(error.kind(), Unsupported | Usage | Refused | LimitExceeded)
}
