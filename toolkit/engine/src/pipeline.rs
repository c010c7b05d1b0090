//! The pipeline: copies the content of a source into sinks and consumers.
//!
//! Every worker runs the same loop: take the next task (under a lock, in source order), read and prepare it
//! (in parallel), submit it for placing (in source order), and write the placed pieces (one worker at a time
//! for each output, except for block devices). There are no dedicated reader or writer threads: a worker that
//! submits a piece while no other writes becomes the writer. With one thread, the loop is a plain copy.
//!
//! Memory is bounded: the workers and the pieces in flight borrow from the ledger of the run before the copy
//! begins, and a worker takes a new task only if fewer pieces are in flight.

mod crew;
mod flush;
mod order;
mod plan;
mod regroup;
mod share;
mod target;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use imgtool_core::sync::{into_inner, lock};
use imgtool_core::{
    Access, BufferPool, CancelToken, Copied, Device, DeviceId, Error, ImageSource, Lane, Memory, Piece,
    Progress, RandomAccess, Result, ResultExt, SinkDevice, SinkPiece, StreamAccess, StreamOrder,
};

pub use crew::MAX_THREADS;
use crew::{Arrival, Crew};
use flush::Flusher;
use order::Orderer;
pub(crate) use plan::piece_len;
use plan::{Plan, ReadTask};
use regroup::{FittedContent, FittedPiece, Regroup};
use share::BlockSharing;
use target::Targets;
pub use target::{Tap, Target};

/// Route of one device from the source to a target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route {
    /// Device of the source.
    pub from: DeviceId,
    /// Index of the target in [`Job::targets`].
    pub target: usize,
    /// Device of the target.
    pub to: SinkDevice,
    /// Lane in which the progress is counted. Taps receive it with every piece.
    pub lane: Lane,
}

/// Settings of a copy.
#[derive(Debug)]
pub struct Job<'a> {
    /// Sinks and consumers that receive the content.
    pub targets: Vec<Target<'a>>,
    /// Routes of the devices to copy, in order. Other devices are skipped.
    pub routes: Vec<Route>,
    /// Observers of every piece on its way to its target.
    pub taps: Vec<&'a dyn Tap>,
    /// Number of worker threads; 0 for one per processor.
    pub threads: usize,
    /// Receiver of progress.
    pub progress: &'a dyn Progress,
    /// Token that cancels the copy.
    pub cancel: CancelToken,
    /// Ledger from which workers and pieces borrow.
    pub memory: Memory,
}

/// Numbers of bytes copied.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Guest bytes.
    pub guest_bytes: u64,
    /// Zeros without data among them.
    pub zero_bytes: u64,
}

impl std::ops::Add for Totals {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            guest_bytes: self.guest_bytes + other.guest_bytes,
            zero_bytes: self.zero_bytes + other.zero_bytes,
        }
    }
}

/// Refuses a copy for which the memory does not suffice. Reads and writes nothing.
///
/// # Errors
/// [`imgtool_core::ErrorKind::LimitExceeded`] with the limit that would suffice.
pub fn check_memory(source: &dyn ImageSource, job: &Job<'_>) -> Result<()> {
    let targets = Targets::new(job)?;
    let devices = &source.info().devices;
    match source.access() {
        Access::Random(random) => {
            let (_producer, largest) = Producer::of_random(random, &targets, devices, &all_routes(job))?;
            Crew::hire(job, source.access(), largest).map(drop)
        }
        Access::Stream(stream) => {
            let arrival = Arrival::of_stream(&*lock(stream));
            let regroup = Regroup::new(&targets, devices, &all_routes(job), arrival)?;
            Crew::hire(job, source.access(), regroup.largest_piece()).map(drop)
        }
    }
}

/// Returns, for each route, the resolution in bytes with which a copy queries the extents of its device;
/// nothing for a stream.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for an invalid route.
pub(crate) fn resolutions(source: &dyn ImageSource, job: &Job<'_>) -> Result<Vec<u64>> {
    let targets = Targets::new(job)?;
    let resolution = |random: &dyn RandomAccess, route: &Route| {
        piece_len(targets.geometry(*route).piece_len, random.read_granule(route.from))
    };
    let random = source.access().random();
    Ok(random
        .map_or_else(Vec::new, |random| job.routes.iter().map(|route| resolution(random, route)).collect()))
}

/// Copies the content of `source` into the targets. Calls neither [`imgtool_core::ImageSink::begin`] nor
/// [`imgtool_core::ImageSink::finish`], since several sources may fill one sink.
///
/// # Errors
/// The first error of source, target or storage; [`imgtool_core::ErrorKind::Cancelled`];
/// [`imgtool_core::ErrorKind::Usage`] for an invalid route; [`imgtool_core::ErrorKind::LimitExceeded`] if the
/// memory does not suffice.
pub fn copy(source: &dyn ImageSource, job: &Job<'_>) -> Result<Totals> {
    let info = source.info();
    if let Some(route) = job.routes.iter().find(|route| info.device(route.from).is_none()) {
        return Err(Error::usage(format!("the source has no device {}", route.from)));
    }
    let targets = Targets::new(job)?;
    match source.access() {
        Access::Random(random) => {
            let (shared, left) = share::share_blocks(random, &targets, &info.devices)?;
            let (producer, largest) = Producer::of_random(random, &targets, &info.devices, &left)?;
            let crew = Crew::hire(job, source.access(), largest)?;
            let sharing = BlockSharing::new(random, &targets, &info.devices);
            let (copied, _) = run(producer, Some(random), &targets, &crew, sharing)?;
            source.verify()?;
            Ok(shared + copied)
        }
        Access::Stream(stream) => {
            if has_device_twice(&job.routes) {
                return Err(Error::usage("a stream can feed each device to only one target"));
            }
            let totals = copy_stream(source, &mut *lock(stream), job, &targets)?;
            // An image may need its stream for it.
            source.verify()?;
            Ok(totals)
        }
    }
}

/// Copies the content of a stream, which is that of `source`.
fn copy_stream(
    source: &dyn ImageSource,
    stream: &mut dyn StreamAccess,
    job: &Job<'_>,
    targets: &Targets<'_>,
) -> Result<Totals> {
    let arrival = Arrival::of_stream(stream);
    let regroup = Regroup::new(targets, &source.info().devices, &all_routes(job), arrival)?;
    let crew = Crew::hire(job, source.access(), regroup.largest_piece())?;
    let pass = Pass { stream, job };
    let producer = Producer::Stream { pass, regroup, ended: false };
    let (totals, producer) = run(producer, None, targets, &crew, BlockSharing::default())?;
    if let Producer::Stream { pass, .. } = producer {
        for route in &job.routes {
            if let Some(size) = pass.stream.final_size(route.from) {
                targets.of(*route).resize(route.to, size)?;
            }
        }
    }
    Ok(totals)
}

/// Returns the indices of all routes.
fn all_routes(job: &Job<'_>) -> Vec<usize> {
    (0..job.routes.len()).collect()
}

/// True if two routes have the same device of the source.
fn has_device_twice(routes: &[Route]) -> bool {
    routes.iter().any(|route| routes.iter().filter(|other| other.from == route.from).count() > 1)
}

/// Supplies the tasks, in source order.
enum Producer<'a> {
    /// Reads the devices one after another, in guest order.
    Random(Plan<'a>),
    /// Reads in the order of a stream of the same image.
    Ordered { order: Box<dyn StreamOrder + 'a>, regroup: Regroup, plan: Plan<'a>, ended: bool },
    /// Reads the stream.
    Stream { pass: Pass<'a>, regroup: Regroup, ended: bool },
}

/// The one pass over a stream.
struct Pass<'a> {
    stream: &'a mut dyn StreamAccess,
    job: &'a Job<'a>,
}

impl Pass<'_> {
    /// Reads the next piece, and counts it.
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        let begun = Instant::now();
        let piece = self.stream.next_piece(pool)?;
        if let Some(piece) = &piece {
            let route = self.job.routes.iter().find(|route| route.from == piece.device);
            let read = Copied { guest: piece.len, data: data_len(&piece.runs), zero: 0 };
            self.job.progress.streamed(route.map(|route| route.lane), read, begun.elapsed());
        }
        Ok(piece)
    }
}

/// Returns the total length of the runs of data of a piece.
fn data_len(runs: &[Range<usize>]) -> u64 {
    runs.iter().map(|run| run.len() as u64).sum()
}

/// Next task of a worker.
enum Task {
    Read(ReadTask),
    Piece(Routed),
}

/// A piece with the index of its route.
struct Routed {
    route: usize,
    piece: SinkPiece,
}

impl<'a> Producer<'a> {
    /// Returns the producer for the routes with these indices of a random-access source, and the maximum
    /// length in bytes of a piece with data.
    fn of_random(
        random: &'a dyn RandomAccess,
        targets: &Targets<'_>,
        devices: &[Device],
        routes: &[usize],
    ) -> Result<(Self, u64)> {
        let plan = Plan::new(random, targets, devices, routes);
        let regroup = || Regroup::new(targets, devices, routes, Arrival::Unread);
        if let Some(mut probe) = order::of_stream(random, targets)?
            && !regroup()?.refuses(&mut *probe, &targets.job().cancel)?
            && let Some(order) = order::of_stream(random, targets)?
        {
            let regroup = regroup()?;
            let largest = regroup.largest_piece();
            return Ok((Producer::Ordered { order, regroup, plan, ended: false }, largest));
        }
        let largest = plan.largest_piece();
        Ok((Producer::Random(plan), largest))
    }

    fn next(&mut self, pool: &BufferPool) -> Result<Option<Task>> {
        match self {
            Producer::Random(plan) => Ok(plan.next()?.map(Task::Read)),
            Producer::Ordered { order, regroup, plan, ended } => loop {
                if let Some(fitted) = regroup.pop() {
                    return task_of(fitted, Some(plan));
                }
                if *ended {
                    return Ok(None);
                }
                // As below.
                *ended = true;
                if let Some(part) = order.next_part()? {
                    regroup.push_unread(part, pool)?;
                    *ended = false;
                } else {
                    regroup.flush()?;
                }
            },
            Producer::Stream { pass, regroup, ended } => loop {
                if let Some(fitted) = regroup.pop() {
                    return task_of(fitted, None);
                }
                if *ended {
                    return Ok(None);
                }
                // After an error, do not read the stream again, since a second error would hide the first.
                *ended = true;
                if let Some(piece) = pass.next_piece(pool)? {
                    regroup.push(piece, pool)?;
                    *ended = false;
                } else {
                    regroup.flush()?;
                }
            },
        }
    }
}

/// Returns the task for a piece of the stream. `plan` finds the data of a piece that is still to be read.
fn task_of(fitted: FittedPiece, plan: Option<&Plan<'_>>) -> Result<Option<Task>> {
    let FittedPiece { route, content } = fitted;
    Ok(match content {
        FittedContent::Read(piece) => Some(Task::Piece(Routed { route, piece })),
        FittedContent::Unread(from, guest) => {
            let task = plan.map(|plan| plan.task(route, from, guest)).transpose()?.flatten();
            let task = task.ok_or_else(|| Error::malformed("a stream left out the content of a piece"))?;
            Some(Task::Read(task))
        }
    })
}

/// State that the workers share.
struct Shared<'a, 'p> {
    /// Ticket of the next task, and the producer.
    producer: Mutex<(u64, Producer<'p>)>,
    random: Option<&'a dyn RandomAccess>,
    orderer: Orderer<'a>,
    targets: &'a Targets<'a>,
    pool: BufferPool,
    stop: AtomicBool,
    error: Mutex<Option<Error>>,
    guest_bytes: AtomicU64,
    zero_bytes: AtomicU64,
}

/// Runs all tasks. Returns the numbers of bytes copied, and the producer.
fn run<'a, 'p>(
    producer: Producer<'p>,
    random: Option<&'a dyn RandomAccess>,
    targets: &'a Targets<'a>,
    crew: &Crew,
    sharing: BlockSharing<'a>,
) -> Result<(Totals, Producer<'p>)> {
    let shared = Shared {
        producer: Mutex::new((0, producer)),
        random,
        orderer: Orderer::new(targets, crew.window, sharing),
        targets,
        pool: BufferPool::new(),
        stop: AtomicBool::new(false),
        error: Mutex::new(None),
        guest_bytes: AtomicU64::new(0),
        zero_bytes: AtomicU64::new(0),
    };
    run_workers(&shared, crew.threads);
    if let Some(error) = lock(&shared.error).take() {
        return Err(error);
    }
    let totals = Totals {
        guest_bytes: shared.guest_bytes.load(Ordering::Relaxed),
        zero_bytes: shared.zero_bytes.load(Ordering::Relaxed),
    };
    let (_, producer) = into_inner(shared.producer);
    Ok((totals, producer))
}

/// Runs the workers, the calling thread among them, and the flusher until all have ended.
fn run_workers(shared: &Shared<'_, '_>, threads: usize) {
    let flusher = Flusher::new(shared.targets.outputs());
    std::thread::scope(|scope| {
        let _stopping = flusher.stop_when_dropped();
        // If the system refuses to create a thread (a limit on memory or processes), fewer threads do the
        // work.
        if flusher.has_work() {
            let _ = std::thread::Builder::new().spawn_scoped(scope, || flusher.work());
        }
        let workers: Vec<_> = (1..threads)
            .map_while(|_| std::thread::Builder::new().spawn_scoped(scope, || shared.work()).ok())
            .collect();
        shared.work();
        for worker in workers {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
}

/// Aborts the copy if a worker panics (a bug in a driver), so that other workers do not wait for its piece.
struct AbortOnPanic<'s, 'a, 'p>(&'s Shared<'a, 'p>);

impl Drop for AbortOnPanic<'_, '_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.stop.store(true, Ordering::Relaxed);
            self.0.orderer.abort();
        }
    }
}

impl Shared<'_, '_> {
    fn work(&self) {
        let _panicking = AbortOnPanic(self);
        while !self.stop.load(Ordering::Relaxed) {
            match self.step() {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    lock(&self.error).get_or_insert(error);
                    self.stop.store(true, Ordering::Relaxed);
                    self.orderer.abort();
                }
            }
        }
    }

    /// Moves one piece from the source to its target. Returns false if no piece is left, or the copy was
    /// aborted.
    fn step(&self) -> Result<bool> {
        self.targets.job().cancel.check()?;
        if !self.orderer.admit() {
            return Ok(false);
        }
        let (ticket, task) = {
            let mut producer = lock(&self.producer);
            let Some(task) = producer.1.next(&self.pool)? else {
                self.orderer.withdraw();
                return Ok(false);
            };
            producer.0 += 1;
            (producer.0 - 1, task)
        };
        let data = data_len(match &task {
            Task::Piece(routed) => &routed.piece.runs,
            Task::Read(task) => &task.runs,
        });
        self.targets.job().progress.throttle(data);
        let Routed { route, piece } = match task {
            Task::Piece(routed) => routed,
            Task::Read(task) => self.read(task)?,
        };
        let (start, len) = (piece.start, piece.len);
        let route = self.targets.job().routes[route];
        for tap in &self.targets.job().taps {
            tap.piece(route.lane, &piece);
        }
        let prepared = self.targets.of(route).prepare(piece, &self.pool);
        let prepared = prepared.map_err(|e| e.guest(start..start + len))?;
        let zero = len - prepared.stored().min(len);
        self.orderer.submit(ticket, route.target, prepared)?;
        self.guest_bytes.fetch_add(len, Ordering::Relaxed);
        self.zero_bytes.fetch_add(zero, Ordering::Relaxed);
        self.targets.job().progress.advance(route.lane, Copied { guest: len, data, zero });
        Ok(true)
    }

    fn read(&self, task: ReadTask) -> Result<Routed> {
        let Some(random) = self.random.filter(|_| !task.runs.is_empty()) else {
            let piece = SinkPiece::zero(task.to, task.start, task.len);
            return Ok(Routed { route: task.route, piece });
        };
        let len = usize::try_from(task.len).map_err(|_| Error::limit("a piece does not fit into memory"))?;
        let mut buffer = self.pool.take(len);
        let mut filled = 0;
        for run in &task.runs {
            buffer[filled..run.start].fill(0);
            let guest_offset = task.start + run.start as u64;
            random
                .read_at(task.from, &mut buffer[run.clone()], guest_offset)
                .map_err(|e| e.guest(guest_offset..task.start + run.end as u64))
                .on_device(&task.name)?;
            filled = run.end;
        }
        buffer[filled..].fill(0);
        let piece = SinkPiece {
            device: task.to,
            start: task.start,
            len: task.len,
            data: Some(buffer),
            runs: task.runs,
        };
        Ok(Routed { route: task.route, piece })
    }
}
