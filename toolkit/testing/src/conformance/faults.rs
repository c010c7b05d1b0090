//! Storage that fails on purpose, and the laws about it: no matter which read or write fails, and with how
//! many threads, the driver or the copy returns an error, and neither panics nor hangs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use imgtool_core::input::PROBE_LEN;
use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Consumer, CreateOptions, DeviceId, Driver, Error, ErrorKind, Extent, Geometry,
    ImageInfo, ImageSource, Input, OpenOptions, Output, Piece, Prepared, RandomAccess, ReadAt, Result,
    SinkDevice, SinkPiece, StreamAccess,
};
use imgtool_storage::file;

use super::harness::{Pipe, consume, create, fill_sink, make_bytes, scratch, write};
use super::hostile::Memory;
use super::image::{Image, Order};
use super::memory::MemorySource;

/// Time after which a run counts as hung. Our limit: generous, for busy machines.
const HANG_TIMEOUT: Duration = Duration::from_secs(120);

/// Maximum number of calls, besides the last, that a law makes fail, one per run; spread evenly over all
/// calls if there are more.
const MAX_FAULTS: u64 = 40;

/// A fault injected into a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A read fails with EIO, a write with ENOSPC.
    Fail,
    /// A read reports the end of the input; a write accepts no bytes.
    End,
    /// The call transfers at most one byte. Streams only.
    Short,
    /// The call is interrupted once (EINTR). Streams only.
    Interrupt,
    /// The call is delayed by 20 ms.
    Delay,
}

/// Counts calls and selects the calls that get a fault.
#[derive(Debug)]
pub struct Plan {
    fault: Fault,
    /// Index of the first call with a fault; if `lasting`, all later calls get it as well.
    from: u64,
    lasting: bool,
    calls: AtomicU64,
}

impl Plan {
    /// Selects call `nth`, counted from 0. [`Fault::Fail`] and [`Fault::End`] also select all later calls,
    /// like a broken disk.
    pub fn nth(fault: Fault, nth: u64) -> Arc<Self> {
        let lasting = matches!(fault, Fault::Fail | Fault::End);
        Arc::new(Self { fault, from: nth, lasting, calls: AtomicU64::new(0) })
    }

    /// Selects every call.
    pub fn every(fault: Fault) -> Arc<Self> {
        Arc::new(Self { fault, from: 0, lasting: true, calls: AtomicU64::new(0) })
    }

    /// Selects no call: the plan only counts.
    pub fn none() -> Arc<Self> {
        Self::nth(Fault::Delay, u64::MAX)
    }

    /// Returns the number of calls so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// Counts a call and returns its fault, if any. Sleeps for [`Fault::Delay`].
    fn next_fault(&self) -> Option<Fault> {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let is_selected = call == self.from || (self.lasting && call > self.from);
        if is_selected && self.fault == Fault::Delay {
            std::thread::sleep(Duration::from_millis(20));
        }
        is_selected.then_some(self.fault)
    }
}

/// Returns EIO.
fn device_error() -> io::Error {
    io::Error::from_raw_os_error(5)
}

/// Returns ENOSPC.
fn no_space() -> io::Error {
    io::Error::from_raw_os_error(28)
}

/// Storage read by position, with faults.
#[derive(Debug)]
pub struct FaultyStorage {
    inner: Arc<dyn ReadAt>,
    plan: Arc<Plan>,
}

impl FaultyStorage {
    /// Wraps `inner` and applies `plan` to its reads.
    pub fn new(inner: Arc<dyn ReadAt>, plan: Arc<Plan>) -> Self {
        Self { inner, plan }
    }
}

impl ReadAt for FaultyStorage {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        match self.plan.next_fault() {
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
#[derive(Debug)]
pub struct FaultyStream<S> {
    inner: S,
    plan: Arc<Plan>,
    /// True after an interrupted call, so that the retry succeeds.
    interrupted: bool,
}

impl<S> FaultyStream<S> {
    /// Wraps `inner` and applies `plan` to its reads or writes.
    pub fn new(inner: S, plan: Arc<Plan>) -> Self {
        Self { inner, plan, interrupted: false }
    }

    /// Applies the plan to a call for `len` bytes and returns the number of bytes to transfer, or the error
    /// that `failure` makes.
    fn admit(&mut self, len: usize, failure: fn() -> io::Error) -> io::Result<usize> {
        let is_retry = std::mem::take(&mut self.interrupted);
        match self.plan.next_fault() {
            Some(Fault::Fail) => Err(failure()),
            Some(Fault::End) => Ok(0),
            Some(Fault::Short) => Ok(len.min(1)),
            Some(Fault::Interrupt) if !is_retry => {
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

/// A consumer that discards all content.
#[derive(Debug, Default)]
pub struct Discard;

impl Consumer for Discard {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: 65_536,
            granule_required: true,
            piece_len: 65_536,
            max_zero_len: 1 << 30,
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        Ok(Prepared::consumed(piece))
    }

    fn resize(&self, _device: SinkDevice, _size: u64) -> Result<()> {
        Ok(())
    }
}

/// Runs every law about faults that the driver's capabilities imply.
///
/// # Panics
/// If the driver breaks a law.
pub fn all(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let can = driver.capabilities();
    failing_reads_are_errors(driver, options, image);
    failing_sources_end_the_copy(driver, options, image);
    targets_that_are_too_small_are_errors(driver, options, image);
    if can.stream_read {
        failing_pipes_are_errors(driver, options, image);
    }
    if can.stream_write && driver.writer(options).expect("valid options").writes_stream() {
        failing_pipe_writes_are_errors(driver, options, image);
    }
}

/// Returns the indices of the calls to make fail, out of `calls`.
fn spread(calls: u64) -> impl Iterator<Item = u64> {
    let step = calls.div_ceil(MAX_FAULTS).max(1) as usize;
    (0..calls).step_by(step).chain(calls.checked_sub(1))
}

/// Runs `f`; aborts the process if it hangs, since a hung thread can't be stopped otherwise.
fn without_hang<T: Send>(what: &str, f: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let (done, wait) = mpsc::channel();
        let worker = scope.spawn(move || {
            let result = f();
            // The receiver is waiting, or has aborted the process.
            let _ = done.send(());
            result
        });
        if wait.recv_timeout(HANG_TIMEOUT) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("hangs: {what}");
            std::process::abort();
        }
        worker.join().unwrap_or_else(|_| panic!("panics: {what}"))
    })
}

/// Opens an input and reads all of it.
fn read_through(
    driver: &dyn Driver,
    input: Result<Input>,
    options: &OpenOptions,
    threads: usize,
) -> Result<()> {
    let source = driver.open(input?, options)?;
    consume(&*source, &Discard, threads)
}

/// Asserts that `result` is an error of kind `Io`.
fn expect_io(driver: &dyn Driver, what: &str, result: Result<()>) {
    match result {
        Ok(()) => panic!("{}: {what}: succeeded without an error", driver.name()),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Io, "{}: {what}: not an I/O error: {error:#}", driver.name())
        }
    }
}

/// A copy ends with an I/O error if any of its reads fails; a slow read is no error.
///
/// # Panics
/// If the driver breaks the law.
pub fn failing_reads_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let bytes = make_bytes(driver, options, image);
    failing_reads_of_bytes_are_errors(driver, &bytes, image, &OpenOptions::default());
}

/// Like [`failing_reads_are_errors`], for the bytes of a finished image.
pub(super) fn failing_reads_of_bytes_are_errors(
    driver: &dyn Driver,
    bytes: &[u8],
    image: &Image,
    options: &OpenOptions,
) {
    let bytes: Arc<dyn ReadAt> = Arc::new(Memory(bytes.to_vec()));
    let read = |plan: &Arc<Plan>, threads| {
        let storage = FaultyStorage::new(Arc::clone(&bytes), Arc::clone(plan));
        read_through(driver, Ok(Input::from_read_at("faulty", Arc::new(storage))), options, threads)
    };
    for threads in [1, 7] {
        let counting = Plan::none();
        read(&counting, threads).unwrap_or_else(|e| panic!("{}: {image}: {e:#}", driver.name()));
        for nth in spread(counting.calls()) {
            let what = format!("{image}: read {nth} of {} fails, {threads} threads", counting.calls());
            let plan = Plan::nth(Fault::Fail, nth);
            let result = without_hang(&what, || read(&plan, threads));
            // The order of the threads differs from run to run, and so does the number of reads.
            if plan.calls() > nth {
                expect_io(driver, &what, result);
            }
        }
    }
    let what = format!("{image}: slow read");
    let slow = without_hang(&what, || read(&Plan::nth(Fault::Delay, 3), 7));
    slow.unwrap_or_else(|e| panic!("{}: {what}: {e:#}", driver.name()));
}

/// A copy from a pipe that fails ends with an I/O error; single-byte, interrupted and slow reads are no
/// errors.
///
/// # Panics
/// If the driver breaks the law.
pub fn failing_pipes_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let bytes = make_bytes(driver, options, image);
    if !driver.reads_stream(&bytes[..bytes.len().min(PROBE_LEN)]) {
        return;
    }
    let read = |plan: &Arc<Plan>, threads| {
        let stream = FaultyStream::new(io::Cursor::new(bytes.clone()), Arc::clone(plan));
        read_through(driver, Input::from_reader("faulty", Box::new(stream)), &OpenOptions::default(), threads)
    };
    let counting = Plan::none();
    read(&counting, 1).unwrap_or_else(|e| panic!("{}: {image} from a pipe: {e:#}", driver.name()));
    for nth in spread(counting.calls()) {
        for threads in [1, 7] {
            let what = format!("{image}: read {nth} of a pipe fails, {threads} threads");
            let plan = Plan::nth(Fault::Fail, nth);
            let result = without_hang(&what, || read(&plan, threads));
            if plan.calls() > nth {
                expect_io(driver, &what, result);
            }
        }
    }
    for fault in [Fault::Short, Fault::Interrupt, Fault::Delay] {
        for plan in [Plan::nth(fault, 0), Plan::nth(fault, 2)] {
            let what = format!("{image}: a pipe with {fault:?}");
            let result = without_hang(&what, || read(&plan, 7));
            result.unwrap_or_else(|e| panic!("{}: {what}: {e:#}", driver.name()));
        }
    }
    let what = format!("{image}: a pipe that is interrupted at every read");
    let result = without_hang(&what, || read(&Plan::every(Fault::Interrupt), 2));
    result.unwrap_or_else(|e| panic!("{}: {what}: {e:#}", driver.name()));
}

/// A failed write to a pipe makes the copy fail; partial and interrupted writes are completed.
///
/// # Panics
/// If the driver breaks the law.
pub fn failing_pipe_writes_are_errors(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    let into = |pipe: &Pipe, plan: &Arc<Plan>, threads| {
        let stream = FaultyStream::new(pipe.clone(), Arc::clone(plan));
        write(driver, options, image, &Output::from_writer("faulty", Box::new(stream)), threads)
    };
    let whole = Pipe::default();
    let counting = Plan::none();
    into(&whole, &counting, 1).unwrap_or_else(|e| panic!("{}: {image} into a pipe: {e:#}", driver.name()));
    for nth in spread(counting.calls()) {
        for (fault, threads) in [(Fault::Fail, 1), (Fault::Fail, 7), (Fault::End, 2)] {
            let what = format!("{image}: write {nth} into a pipe: {fault:?}, {threads} threads");
            let result = without_hang(&what, || into(&Pipe::default(), &Plan::nth(fault, nth), threads));
            expect_io(driver, &what, result);
        }
    }
    for plan in [Plan::nth(Fault::Short, 1), Plan::every(Fault::Interrupt), Plan::nth(Fault::Delay, 1)] {
        let what = format!("{image}: into a pipe with {:?}", plan.fault);
        let pipe = Pipe::default();
        let result = without_hang(&what, || into(&pipe, &plan, 7));
        result.unwrap_or_else(|e| panic!("{}: {what}: {e:#}", driver.name()));
        assert!(pipe.bytes() == whole.bytes(), "{}: {what}: the pipe got other bytes", driver.name());
    }
}

/// Writing into a target that is too small fails.
///
/// # Panics
/// If the driver breaks the law.
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
            let output = file::existing(&path, file, true).expect("ask for the length");
            let what = format!("{image}: {needed} bytes into {len}, {threads} threads");
            let result = without_hang(&what, || write(driver, options, image, &output, threads));
            assert!(result.is_err(), "{}: {what}: succeeded without an error", driver.name());
        }
    }
}

/// A failed call to the source, as a stream or by position, ends the copy with its error.
///
/// # Panics
/// If the driver breaks the law.
pub fn failing_sources_end_the_copy(driver: &dyn Driver, options: &CreateOptions, image: &Image) {
    for order in [Order::Random, Order::Stream] {
        let image = image.read_as(order);
        let copy = |plan: &Arc<Plan>, threads| {
            let directory = scratch();
            let output = super::new_file(&directory.path().join("image"));
            let sink = create(driver, output, &image.manifest(), options)?;
            fill_sink(&FaultySource::new(MemorySource::new(&image), plan), &*sink, threads)
        };
        let counting = Plan::none();
        copy(&counting, 1).unwrap_or_else(|e| panic!("{}: {image}: {e:#}", driver.name()));
        for nth in spread(counting.calls()) {
            for threads in [1, 7] {
                let what = format!("{image}: call {nth} of the source fails, {threads} threads");
                let plan = Plan::nth(Fault::Fail, nth);
                let result = without_hang(&what, || copy(&plan, threads));
                if plan.calls() > nth {
                    expect_io(driver, &what, result);
                }
            }
        }
    }
}

/// A source with faults.
struct FaultySource {
    inner: Arc<MemorySource>,
    plan: Arc<Plan>,
    stream: Mutex<FaultyPieces>,
}

/// The stream access of a [`FaultySource`].
struct FaultyPieces {
    inner: Arc<MemorySource>,
    plan: Arc<Plan>,
}

impl FaultySource {
    fn new(inner: MemorySource, plan: &Arc<Plan>) -> Self {
        let (inner, plan) = (Arc::new(inner), Arc::clone(plan));
        let stream = Mutex::new(FaultyPieces { inner: Arc::clone(&inner), plan: Arc::clone(&plan) });
        Self { inner, plan, stream }
    }
}

impl Plan {
    /// Counts a call to a source and fails if the plan says so.
    fn check(&self) -> Result<()> {
        match self.next_fault() {
            Some(Fault::Fail) => Err(Error::io("read", device_error())),
            _ => Ok(()),
        }
    }
}

impl ImageSource for FaultySource {
    fn info(&self) -> &ImageInfo {
        self.inner.info()
    }

    fn access(&self) -> Access<'_> {
        match self.inner.access() {
            Access::Random(_) => Access::Random(self),
            Access::Stream(_) => Access::Stream(&self.stream),
        }
    }
}

impl RandomAccess for FaultySource {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.plan.check()?;
        self.inner.extents(device, range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.plan.check()?;
        self.inner.read_at(device, buf, guest_offset)
    }
}

impl StreamAccess for FaultyPieces {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        self.plan.check()?;
        match self.inner.access() {
            Access::Stream(stream) => lock(stream).next_piece(pool),
            Access::Random(_) => Ok(None),
        }
    }

    fn final_size(&self, device: DeviceId) -> Option<u64> {
        match self.inner.access() {
            Access::Stream(stream) => lock(stream).final_size(device),
            Access::Random(_) => None,
        }
    }
}
