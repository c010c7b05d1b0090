//! Places pieces in source order and lets one worker at a time write to an output.
//!
//! Workers submit prepared pieces in any order. The worker that submits the next piece in source order
//! places it and all that follow. A placed piece waits in the queue of its output. A worker that finds an
//! output without a writer empties the queue, while the others go on reading and preparing.
//!
//! One writer is enough: the kernel allows one write into a file at a time (it holds the inode's lock for
//! the whole call), so a second writer would only wait. Measured from page cache to tmpfs, two writers
//! take the same time as one, and a third more CPU time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::IoSlice;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::share::Sharing;
use super::{Job, lock};
use crate::device::DeviceId;
use crate::error::Result;
use crate::sink::{Bytes, ImageSink, Prepared, WriteList};
use crate::storage::Output;

/// A piece with its writes.
type PlacedPiece = (Prepared, WriteList);

/// Orders the placing and writing of pieces.
pub(super) struct Orderer<'a> {
    sink: &'a dyn ImageSink,
    /// True if pieces must be placed in source order.
    ordered: bool,
    /// Most pieces in flight.
    window: usize,
    /// The outputs, each once.
    outputs: Vec<&'a Output>,
    /// Index into `outputs` of each device of the sink.
    output_of: HashMap<DeviceId, usize>,
    sharing: Sharing<'a>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Pieces in flight: admitted, but not written yet.
    in_flight: usize,
    /// Workers that wait to be admitted.
    waiting: usize,
    /// Ticket of the piece to place next.
    next: u64,
    /// Prepared pieces that wait for their turn, by ticket.
    ready: BTreeMap<u64, Prepared>,
    /// One for each of the outputs.
    queues: Vec<Queue>,
    aborted: bool,
}

#[derive(Default)]
struct Queue {
    placed: VecDeque<PlacedPiece>,
    writers: usize,
}

impl<'a> Orderer<'a> {
    pub(super) fn new(sink: &'a dyn ImageSink, job: &Job<'_>, window: usize, sharing: Sharing<'a>) -> Self {
        let mut outputs: Vec<&Output> = Vec::new();
        let mut output_of = HashMap::new();
        for route in &job.routes {
            let output = sink.output(route.to);
            let known = outputs.iter().position(|known| known.is_same(output));
            let index = known.unwrap_or_else(|| {
                outputs.push(output);
                outputs.len() - 1
            });
            output_of.insert(route.to, index);
        }
        let ordered = job.routes.iter().any(|route| sink.geometry(route.to).ordered);
        let ordered = ordered || outputs.iter().any(|output| output.is_stream());
        let queues = outputs.iter().map(|_| Queue::default()).collect();
        let state = Mutex::new(State { queues, ..State::default() });
        Self { sink, ordered, window, outputs, output_of, sharing, state, changed: Condvar::new() }
    }

    /// Waits until one more piece may be in flight; returns false if the copy was aborted.
    pub(super) fn admit(&self) -> bool {
        let mut state = lock(&self.state);
        if state.in_flight >= self.window {
            state.waiting += 1;
            while state.in_flight > self.low_water() && !state.aborted {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
        }
        state.in_flight += 1;
        !state.aborted
    }

    /// Pieces in flight at which waiting workers are woken. Half the window, and not each piece: waking a
    /// thread takes longer than writing a small piece.
    fn low_water(&self) -> usize {
        self.window / 2
    }

    /// Returns an admission unused because the source is exhausted.
    pub(super) fn withdraw(&self) {
        self.retire(&mut lock(&self.state));
    }

    /// Aborts the copy and wakes all waiting workers.
    pub(super) fn abort(&self) {
        lock(&self.state).aborted = true;
        self.changed.notify_all();
    }

    /// Takes the prepared piece with number `ticket` in source order; places and writes every piece that
    /// is ready.
    pub(super) fn submit(&self, ticket: u64, prepared: Prepared) -> Result<()> {
        if self.ordered {
            self.place_in_order(ticket, prepared)?;
        } else {
            let mut writes = WriteList::default();
            self.sink.place(&prepared, &mut writes)?;
            self.enqueue(&mut lock(&self.state), (prepared, writes));
        }
        self.write_queued()
    }

    /// Places the pieces whose turn it is.
    fn place_in_order(&self, ticket: u64, prepared: Prepared) -> Result<()> {
        let mut state = lock(&self.state);
        state.ready.insert(ticket, prepared);
        loop {
            let next = state.next;
            let Some(prepared) = state.ready.remove(&next) else { return Ok(()) };
            let mut writes = WriteList::default();
            self.sink.place(&prepared, &mut writes)?;
            state.next += 1;
            self.enqueue(&mut state, (prepared, writes));
        }
    }

    /// Puts a placed piece into the queue of its output.
    fn enqueue(&self, state: &mut MutexGuard<'_, State>, placed: PlacedPiece) {
        let index = self.output_of.get(&placed.0.device).copied().unwrap_or(0);
        match state.queues.get_mut(index) {
            Some(queue) if !placed.1.writes().is_empty() => queue.placed.push_back(placed),
            _ => self.retire(state),
        }
    }

    /// Counts a piece as no longer in flight.
    fn retire(&self, state: &mut MutexGuard<'_, State>) {
        state.in_flight -= 1;
        if state.waiting > 0 && state.in_flight <= self.low_water() {
            self.changed.notify_all();
        }
    }

    /// Writes the queued pieces, in order, of every output that has no writer.
    fn write_queued(&self) -> Result<()> {
        let mut state = lock(&self.state);
        while let Some(index) = self.output_without_writer(&state) {
            // After an error the count stays: no piece may follow one that was not written.
            state.queues[index].writers += 1;
            while let Some(placed) = state.queues[index].placed.pop_front() {
                drop(state);
                self.write(self.outputs[index], &placed)?;
                drop(placed);
                state = lock(&self.state);
                self.retire(&mut state);
                if state.aborted {
                    return Ok(());
                }
            }
            state.queues[index].writers -= 1;
        }
        Ok(())
    }

    /// Returns the index of an output that waits for a writer.
    fn output_without_writer(&self, state: &State) -> Option<usize> {
        state.queues.iter().zip(&self.outputs).position(|(queue, output)| {
            !queue.placed.is_empty() && (queue.writers == 0 || output.takes_writes_at_once())
        })
    }

    /// Writes one placed piece, adjacent writes in one call.
    fn write(&self, output: &Output, (prepared, list): &PlacedPiece) -> Result<()> {
        let mut rest = list.writes();
        while let Some(first) = rest.first() {
            if let Bytes::Zero(len) = first.bytes {
                output.write_zeros_at(first.file_offset, len)?;
                rest = &rest[1..];
                continue;
            }
            if let Bytes::Data(range) = &first.bytes
                && self.sharing.share(prepared, range, output, first.file_offset)?
            {
                rest = &rest[1..];
                continue;
            }
            let mut slices = Vec::new();
            let mut end = first.file_offset;
            while let Some(write) = rest.first() {
                let Some(bytes) = prepared.bytes(&write.bytes).filter(|_| write.file_offset == end) else {
                    break;
                };
                slices.push(IoSlice::new(bytes));
                end += bytes.len() as u64;
                rest = &rest[1..];
            }
            if slices.is_empty() {
                // A part that refers to a buffer that the piece lacks: a bug of the driver.
                return Err(crate::Error::malformed("the driver placed bytes that it did not prepare"));
            }
            output.write_slices_at(&mut slices, first.file_offset)?;
        }
        Ok(())
    }
}
