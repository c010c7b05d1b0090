//! The targets of a copy (sinks and consumers), and the taps that observe the pieces.

use imgtool_core::{
    BufferPool, Consumer, Error, Geometry, ImageSink, Lane, Output, Prepared, Result, Sharing, SinkDevice,
    SinkPiece, WriteList,
};
use std::fmt;

use super::{Job, Route};

/// Receiver of the pieces of a copy.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// Sink, which makes an image.
    Sink(&'a dyn ImageSink),
    /// Consumer that stores nothing.
    Consumer(&'a dyn Consumer),
}

impl<'a> Target<'a> {
    fn consumer(self) -> &'a dyn Consumer {
        match self {
            Self::Sink(sink) => sink,
            Self::Consumer(consumer) => consumer,
        }
    }

    pub(super) fn outputs(self) -> &'a [Output] {
        match self {
            Self::Sink(sink) => sink.outputs(),
            Self::Consumer(_) => &[],
        }
    }

    pub(super) fn prepare(self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        self.consumer().prepare(piece, pool)
    }

    /// See [`Consumer::worker_memory`].
    pub(super) fn worker_memory(self) -> u64 {
        self.consumer().worker_memory()
    }

    /// Places a prepared piece, or lets the consumer settle it.
    pub(super) fn place(self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        match self {
            Self::Sink(sink) => sink.place(prepared, writes),
            Self::Consumer(consumer) => consumer.settle(prepared),
        }
    }

    /// See [`ImageSink::seals`].
    pub(super) fn seals(self) -> bool {
        matches!(self, Self::Sink(sink) if sink.seals())
    }

    /// See [`ImageSink::seal`].
    pub(super) fn seal(self, prepared: &mut Prepared, writes: &mut WriteList) -> Result<()> {
        match self {
            Self::Sink(sink) => sink.seal(prepared, writes),
            Self::Consumer(_) => Ok(()),
        }
    }

    /// See [`ImageSink::in_guest_order`].
    pub(super) fn in_guest_order(self) -> bool {
        matches!(self, Self::Sink(sink) if sink.in_guest_order())
    }

    /// Passes on the size of an open-ended device, in bytes.
    pub(super) fn resize(self, device: SinkDevice, size: u64) -> Result<()> {
        self.consumer().resize(device, size)
    }

    pub(super) fn sharing(self, device: SinkDevice) -> Sharing {
        match self {
            Self::Sink(sink) => sink.sharing(device),
            Self::Consumer(_) => Sharing::Never,
        }
    }
}

/// Observer of every piece on its way to its target, such as a digest. Many threads call it at once.
pub trait Tap: Send + Sync {
    /// Returns the alignment in bytes that the tap needs for the start of pieces.
    fn granule(&self) -> u64;

    /// Receives a piece of the device whose progress is counted in `lane`.
    fn piece(&self, lane: Lane, piece: &SinkPiece);
}

impl fmt::Debug for dyn Tap + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tap")
    }
}

/// The checked targets of a job, with all their outputs in one list.
pub(super) struct Targets<'a> {
    job: &'a Job<'a>,
    /// Index of the first output of each target in `outputs`.
    first_outputs: Vec<usize>,
    outputs: Vec<&'a Output>,
    tap_granule: u64,
}

impl<'a> Targets<'a> {
    pub(super) fn new(job: &'a Job<'a>) -> Result<Self> {
        if let Some(route) = job.routes.iter().find(|route| route.target >= job.targets.len()) {
            return Err(Error::usage(format!("there is no target {}", route.target)));
        }
        let (mut outputs, mut first_outputs) = (Vec::new(), Vec::new());
        for target in &job.targets {
            first_outputs.push(outputs.len());
            outputs.extend(target.outputs());
        }
        let tap_granule = job.taps.iter().map(|tap| tap.granule()).max().unwrap_or(1);
        Ok(Self { job, first_outputs, outputs, tap_granule })
    }

    pub(super) fn job(&self) -> &'a Job<'a> {
        self.job
    }

    pub(super) fn of(&self, route: Route) -> Target<'a> {
        self.job.targets[route.target]
    }

    /// Returns the outputs of all targets.
    pub(super) fn outputs(&self) -> &[&'a Output] {
        &self.outputs
    }

    /// Returns the index of a target's output in [`Targets::outputs`].
    pub(super) fn output_index(&self, target: usize, output: imgtool_core::OutputId) -> Option<usize> {
        let index = self.first_outputs.get(target)?.checked_add(output.index())?;
        let end = self.first_outputs.get(target + 1).copied().unwrap_or(self.outputs.len());
        (index < end).then_some(index)
    }

    /// Returns the geometry of pieces that suits the target of a route and every tap.
    pub(super) fn geometry(&self, route: Route) -> Geometry {
        let wanted = self.of(route).consumer().geometry(route.to);
        let granule = wanted.granule.max(self.tap_granule);
        let piece_len = wanted.piece_len.max(granule);
        Geometry { granule, piece_len, max_zero_len: wanted.max_zero_len.max(piece_len), ..wanted }
    }

    /// Returns the blocks that may be shared. With taps, whole extents are not shared, since a tap must
    /// receive every piece.
    pub(super) fn sharing(&self, route: Route) -> Sharing {
        match self.of(route).sharing(route.to) {
            Sharing::Whole(output) if !self.job.taps.is_empty() => Sharing::Parts(output),
            sharing => sharing,
        }
    }
}
