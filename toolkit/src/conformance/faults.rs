//! Storage that fails on purpose, and the laws about it: an error comes out, nothing panics, nothing
//! waits forever, whichever read or write it was and however many threads there are.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::harness::{Pipe, fill_sink, make_bytes, scratch, write};
use super::hostile::Memory;
use super::image::{Image, Order};
use super::memory::MemorySource;
use crate::buffer::BufferPool;
use crate::device::DeviceId;
use crate::driver::{CreateOptions, Driver, OpenOptions};
use crate::error::{Error, ErrorKind, Result};
use crate::extent::Extent;
use crate::sink::{Geometry, ImageSink, Prepared, WriteList};
use crate::source::{Access, ImageInfo, ImageSource, Piece, RandomAccess, SequentialAccess};
use crate::storage::{Input, Output, ReadAt};

/// How long anything may take before it counts as waiting forever. Ours: generous, for busy machines.
const PATIENCE: Duration = Duration::from_secs(120);

/// Most calls that are made to fail one after the other; where there are more, they are spread.
const MOST_FAULTS: u64 = 40;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It fails: an error of the device (EIO), or no space left (ENOSPC) for writes.
    Fail,
    /// It says that there is no more (reads), or that it took nothing (writes).
    End,
    /// It serves a single byte. For streams.
    Short,
    /// It is interrupted once (EINTR). For streams.
    Interrupt,
    /// It takes its time.
    Delay,
}

/// Counts calls and says which of them are hit.
#[derive(Debug)]
pub struct Plan {
    fault: Fault,
    /// The call that is hit, and every later one when `lasting`.
    from: u64,
    lasting: bool,
    calls: AtomicU64,
}

impl Plan {
    /// Hits call number `nth`, the first being 0; with [`Fault::Fail`] and [`Fault::End`] all later
    /// calls too, as a broken disk does.
    pub fn nth(fault: Fault, nth: u64) -> Arc<Self> {
        let lasting = matches!(fault, Fault::Fail | Fault::End);
        Arc::new(Self { fault, from: nth, lasting, calls: AtomicU64::new(0) })
    }

    /// Hits every call.
    pub fn every(fault: Fault) -> Arc<Self> {
        Arc::new(Self { fault, from: 0, lasting: true, calls: AtomicU64::new(0) })
    }

    /// Hits none: to count.
    pub fn none() -> Arc<Self> {
        Self::nth(Fault::Delay, u64::MAX)
    }

    /// Calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// The fault for this call, if it is hit; a delay is over when this returns.
    fn strike(&self) -> Option<Fault> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let is_hit = call == self.from || (self.lasting && call > self.from);
        if is_hit && self.fault == Fault::Delay {
            std::thread::sleep(Duration::from_millis(20));
        }
        is_hit.then_some(self.fault)
    }
}

fn device_error() -> io::Error {
    io::Error::from_raw_os_error(5)
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(28)
}

/// Positional reads with faults.
pub struct FaultyStorage {
    inner: Arc<dyn ReadAt>,
    plan: Arc<Plan>,
}

impl FaultyStorage {
    /// Over `inner`.
    pub fn new(inner: Arc<dyn ReadAt>, plan: Arc<Plan>) -> Self {
        Self { inner, plan }
    }
}

impl ReadAt for FaultyStorage {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        match self.plan.strike() {
            Some(Fault::Fail) => Err(device_error()),
            Some(Fault::End) => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => self.inner.read_exact_at(buf, position),
        }
    }

    fn len(&self) -> u64 {
        self.inner.len()
    }
}

/// A stream with faults, for reading or writing.
pub struct FaultyStream<S> {
    inner: S,
    plan: Arc<Plan>,
    /// A call was interrupted; its repetition goes through.
    interrupted: bool,
}

impl<S> FaultyStream<S> {
    /// Over `inner`.
    pub fn new(inner: S, plan: Arc<Plan>) -> Self {
        Self { inner, plan, interrupted: false }
    }

    /// What is left of a call for `len` bytes: how many are served.
    fn admit(&mut self, len: usize, failure: fn() -> io::Error) -> io::Result<usize> {
        let repeated = std::mem::take(&mut self.interrupted);
        match self.plan.strike() {
            Some(Fault::Fail) => Err(failure()),
            Some(Fault::End) => Ok(0),
            Some(Fault::Short) => Ok(len.min(1)),
            Some(Fault::Interrupt) if !repeated => {
                self.interrupted = true;
                Err(io::ErrorKind::Interrupted.into())
            }
            _ => Ok(len),
        }
    }
}

impl<S: Read> Read for FaultyStream<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.admit(buf.len(), device_error)?;
        self.inner.read(&mut buf[..len])
    }
}

impl<S: Write> Write for FaultyStream<S> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let len = self.admit(buf.len(), no_space)?;
        if len == 0 { Ok(0) } else { self.inner.write(&buf[..len]) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A sink that takes everything and keeps nothing.
pub struct Discard(Output);

impl Default for Discard {
    fn default() -> Self {
        Self(Output::from_writer("nowhere", Box::new(io::sink())))
    }
}

impl ImageSink for Discard {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        Geometry {
            granule: 65_536,
            granule_required: true,
            piece_len: 65_536,
            max_zero_len: 1 << 30,
            ordered: true,
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.0
    }

    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        Ok(Prepared::new(piece))
    }

    fn place(&self, _prepared: &Prepared, _writes: &mut WriteList) -> Result<()> {
        Ok(())
    }

    fn resize(&self, _device: DeviceId, _size: u64) -> Result<()> {
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

/// Every law about faults that the driver's capabilities claim.
///
/// # Panics
/// When the law is broken.
pub fn all(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let can = driver.capabilities();
    failing_reads_are_errors(driver, options, image);
    failing_sources_end_the_copy(driver, options, image);
    targets_that_are_too_small_are_errors(driver, options, image);
    if can.stream_read {
        failing_pipes_are_errors(driver, options, image);
    }
    if can.stream_write {
        failing_pipe_writes_are_errors(driver, options, image);
    }
}

/// The calls to be hit, of `calls` that there are.
fn spread(calls: u64) -> impl Iterator<Item = u64> {
    let step = calls.div_ceil(MOST_FAULTS).max(1) as usize;
    (0..calls).step_by(step).chain(calls.checked_sub(1))
}

/// Runs `f`; when it takes too long the whole process ends, for a thread that waits forever can't be
/// got rid of otherwise.
fn within_patience<T: Send>(what: &str, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let (done, wait) = mpsc::channel();
        let worker = scope.spawn(move || {
            let result = f();
            // The other side waits for this or has ended the process.
            let _ = done.send(());
            result
        });
        if wait.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("waits forever: {what}");
            std::process::abort();
        }
        worker.join().unwrap_or_else(|_| panic!("panics: {what}"))
    })
}

/// Opens an input and reads all of it through the pipeline.
fn read_through(driver: &dyn Driver, input: Result<Input>, threads: usize) -> Result<()> {
    let mut source = driver.open(input?, &OpenOptions::default())?;
    fill_sink(&mut *source, &Discard::default(), threads)
}

fn expect_io(driver: &dyn Driver, what: &str, result: Result<()>) {
    match result {
        Ok(()) => panic!("{}: {what}: no error came out", driver.name()),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Io, "{}: {what}: not an I/O error: {error}", driver.name())
        }
    }
}

/// A read that fails, at whatever point, is an error of the whole; one that takes long is none.
///
/// # Panics
/// When the law is broken.
pub fn failing_reads_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let bytes: Arc<dyn ReadAt> = Arc::new(Memory(make_bytes(driver, options, image)));
    let read = |plan: &Arc<Plan>, threads| {
        let storage = FaultyStorage::new(Arc::clone(&bytes), Arc::clone(plan));
        read_through(driver, Ok(Input::from_read_at("faulty", Arc::new(storage))), threads)
    };
    for threads in [1, 7] {
        let counting = Plan::none();
        read(&counting, threads).unwrap_or_else(|e| panic!("{}: {image}: {e}", driver.name()));
        for nth in spread(counting.calls()) {
            let what = format!("{image}: read {nth} of {} fails, {threads} threads", counting.calls());
            let plan = Plan::nth(Fault::Fail, nth);
            let result = within_patience(&what, || read(&plan, threads));
            // Threads read in another order each time, and may ask for more or for less.
            if plan.calls() > nth {
                expect_io(driver, &what, result);
            }
        }
    }
    let what = format!("{image}: a read takes long");
    let slow = within_patience(&what, || read(&Plan::nth(Fault::Delay, 3), 7));
    slow.unwrap_or_else(|e| panic!("{}: {what}: {e}", driver.name()));
}

/// A pipe that fails or ends early is an error; one that serves single bytes, is interrupted or slow
/// is none.
///
/// # Panics
/// When the law is broken.
pub fn failing_pipes_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let bytes = make_bytes(driver, options, image);
    let read = |plan: &Arc<Plan>, threads| {
        let stream = FaultyStream::new(io::Cursor::new(bytes.clone()), Arc::clone(plan));
        read_through(driver, Input::from_stream("faulty", Box::new(stream)), threads)
    };
    let counting = Plan::none();
    read(&counting, 1).unwrap_or_else(|e| panic!("{}: {image} from a pipe: {e}", driver.name()));
    for nth in spread(counting.calls()) {
        for threads in [1, 7] {
            let what = format!("{image}: read {nth} of a pipe fails, {threads} threads");
            let plan = Plan::nth(Fault::Fail, nth);
            let result = within_patience(&what, || read(&plan, threads));
            if plan.calls() > nth {
                expect_io(driver, &what, result);
            }
        }
    }
    for fault in [Fault::Short, Fault::Interrupt, Fault::Delay] {
        for plan in [Plan::nth(fault, 0), Plan::nth(fault, 2)] {
            let what = format!("{image}: a pipe with {fault:?}");
            let result = within_patience(&what, || read(&plan, 7));
            result.unwrap_or_else(|e| panic!("{}: {what}: {e}", driver.name()));
        }
    }
    let what = format!("{image}: a pipe that is interrupted all the time");
    let result = within_patience(&what, || read(&Plan::every(Fault::Interrupt), 2));
    result.unwrap_or_else(|e| panic!("{}: {what}: {e}", driver.name()));
}

/// A write into a pipe that fails is an error; partial and interrupted writes are completed.
///
/// # Panics
/// When the law is broken.
pub fn failing_pipe_writes_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let into = |pipe: &Pipe, plan: &Arc<Plan>, threads| {
        let stream = FaultyStream::new(pipe.clone(), Arc::clone(plan));
        write(driver, options, image, &Output::from_writer("faulty", Box::new(stream)), threads)
    };
    let whole = Pipe::default();
    let counting = Plan::none();
    into(&whole, &counting, 1).unwrap_or_else(|e| panic!("{}: {image} into a pipe: {e}", driver.name()));
    for nth in spread(counting.calls()) {
        for (fault, threads) in [(Fault::Fail, 1), (Fault::Fail, 7), (Fault::End, 2)] {
            let what = format!("{image}: write {nth} into a pipe: {fault:?}, {threads} threads");
            let result = within_patience(&what, || into(&Pipe::default(), &Plan::nth(fault, nth), threads));
            expect_io(driver, &what, result);
        }
    }
    for plan in [Plan::nth(Fault::Short, 1), Plan::every(Fault::Interrupt), Plan::nth(Fault::Delay, 1)] {
        let what = format!("{image}: into a pipe with {:?}", plan.fault);
        let pipe = Pipe::default();
        let result = within_patience(&what, || into(&pipe, &plan, 7));
        result.unwrap_or_else(|e| panic!("{}: {what}: {e}", driver.name()));
        assert!(pipe.bytes() == whole.bytes(), "{}: {what}: other bytes came out", driver.name());
    }
}

/// A target that is too small is an error, never a silent loss.
///
/// # Panics
/// When the law is broken.
pub fn targets_that_are_too_small_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let needed = make_bytes(driver, options, image).len() as u64;
    for (number, len) in
        [0, 1, 4096, needed / 4, needed / 2, needed.saturating_sub(4096), needed - 1].into_iter().enumerate()
    {
        for threads in [1, 7] {
            let directory = scratch();
            let path = directory.path().join(format!("{number}"));
            let file = File::options().read(true).write(true).create_new(true).open(&path).expect("create");
            file.set_len(len).expect("set the length");
            let output = Output::from_existing(&path, file, true).expect("ask for the length");
            let what = format!("{image}: {needed} bytes into {len}, {threads} threads");
            let result = within_patience(&what, || write(driver, options, image, &output, threads));
            assert!(result.is_err(), "{}: {what}: no error came out", driver.name());
        }
    }
}

/// A source that fails, in order or at random, ends the copy with its error.
///
/// # Panics
/// When the law is broken.
pub fn failing_sources_end_the_copy(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    for order in [Order::Random, Order::Stream] {
        let image = image.read_as(order);
        let copy = |plan: &Arc<Plan>, threads| {
            let directory = scratch();
            let output = super::new_file(&directory.path().join("image"));
            let sink = driver.create(output, &image.manifest(), options)?;
            let mut source = FaultySource { inner: MemorySource::new(&image), plan: Arc::clone(plan) };
            fill_sink(&mut source, &*sink, threads)
        };
        let counting = Plan::none();
        copy(&counting, 1).unwrap_or_else(|e| panic!("{}: {image}: {e}", driver.name()));
        for nth in spread(counting.calls()) {
            for threads in [1, 7] {
                let what = format!("{image}: call {nth} of the source fails, {threads} threads");
                let plan = Plan::nth(Fault::Fail, nth);
                let result = within_patience(&what, || copy(&plan, threads));
                if plan.calls() > nth {
                    expect_io(driver, &what, result);
                }
            }
        }
    }
}

/// A source whose calls fail.
struct FaultySource {
    inner: MemorySource,
    plan: Arc<Plan>,
}

impl FaultySource {
    fn check(&self) -> Result<()> {
        match self.plan.strike() {
            Some(Fault::Fail) => Err(Error::io("read", device_error())),
            _ => Ok(()),
        }
    }
}

impl ImageSource for FaultySource {
    fn info(&self) -> &ImageInfo {
        self.inner.info()
    }

    fn access(&mut self) -> Access<'_> {
        if self.inner.random().is_some() { Access::Random(self) } else { Access::Sequential(self) }
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        self.inner.random().is_some().then_some(self as &dyn RandomAccess)
    }
}

impl RandomAccess for FaultySource {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.check()?;
        self.inner.extents(device, range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.check()?;
        self.inner.read_at(device, buf, guest_offset)
    }
}

impl SequentialAccess for FaultySource {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        self.check()?;
        self.inner.next_piece(pool)
    }

    fn final_size(&self, device: DeviceId) -> Option<u64> {
        self.inner.final_size(device)
    }
}
