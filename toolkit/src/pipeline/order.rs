//! Placing in source order, writing by one worker at a time.
//!
//! Workers hand in prepared pieces in any order. Whoever hands in the one that everybody waits for
//! places it and all that follow. What is placed waits in the queue of its output; whoever finds an
//! output that nobody writes to empties its queue, while the others go on reading and preparing.
//!
//! One writer is enough: the kernel lets one write at a time into a file (it holds the inode's lock
//! for the whole call), and a second would spend its time waiting for the first. Measured from page
//! cache to tmpfs, two writers take as long as one and a third more CPU time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::IoSlice;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::share::Sharing;
use super::{Job, lock};
use crate::device::DeviceId;
use crate::error::Result;
use crate::sink::{Bytes, ImageSink, Prepared, WriteList};
use crate::storage::Output;

/// A piece whose place is known.
type Placed = (Prepared, WriteList);

pub(super) struct Orderer<'a> {
    sink: &'a dyn ImageSink,
    /// Whether placing must be in source order.
    ordered: bool,
    /// Pieces that may be under way at once.
    window: usize,
    /// The outputs, each once, and which of them a device of the sink goes to.
    outputs: Vec<&'a Output>,
    output_of: HashMap<DeviceId, usize>,
    sharing: Sharing<'a>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    under_way: usize,
    /// Workers that wait for pieces to be done with.
    waiting: usize,
    next: u64,
    ready: BTreeMap<u64, Prepared>,
    /// One for each output.
    queues: Vec<Queue>,
    aborted: bool,
}

#[derive(Default)]
struct Queue {
    placed: VecDeque<Placed>,
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

    /// Waits until one more piece may be under way; false when the work was given up.
    pub(super) fn admit(&self) -> bool {
        let mut state = lock(&self.state);
        if state.under_way >= self.window {
            state.waiting += 1;
            while state.under_way > self.low_water() && !state.aborted {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
        }
        state.under_way += 1;
        !state.aborted
    }

    /// Whoever waits is woken when so few pieces are under way: not at each, as waking costs more
    /// than writing a small piece.
    fn low_water(&self) -> usize {
        self.window / 2
    }

    /// There was no piece for the worker that was admitted.
    pub(super) fn withdraw(&self) {
        self.done(&mut lock(&self.state));
    }

    /// Gives up: nobody waits any longer.
    pub(super) fn abort(&self) {
        lock(&self.state).aborted = true;
        self.changed.notify_all();
    }

    /// Takes a prepared piece; places and writes whatever can be.
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

    fn enqueue(&self, state: &mut MutexGuard<'_, State>, placed: Placed) {
        let index = self.output_of.get(&placed.0.device).copied().unwrap_or(0);
        match state.queues.get_mut(index) {
            Some(queue) if !placed.1.writes().is_empty() => queue.placed.push_back(placed),
            _ => self.done(state),
        }
    }

    /// A piece is not under way any longer.
    fn done(&self, state: &mut MutexGuard<'_, State>) {
        state.under_way -= 1;
        if state.waiting > 0 && state.under_way <= self.low_water() {
            self.changed.notify_all();
        }
    }

    /// Writes what is placed, in order, for every output to which nobody does already.
    fn write_queued(&self) -> Result<()> {
        let mut state = lock(&self.state);
        while let Some(index) = self.to_be_written(&state) {
            // After an error it stays so: nothing may follow what was not written.
            state.queues[index].writers += 1;
            while let Some(placed) = state.queues[index].placed.pop_front() {
                drop(state);
                self.write(self.outputs[index], &placed)?;
                drop(placed);
                state = lock(&self.state);
                self.done(&mut state);
                if state.aborted {
                    return Ok(());
                }
            }
            state.queues[index].writers -= 1;
        }
        Ok(())
    }

    /// An output that waits for a writer.
    fn to_be_written(&self, state: &State) -> Option<usize> {
        state.queues.iter().zip(&self.outputs).position(|(queue, output)| {
            !queue.placed.is_empty() && (queue.writers == 0 || output.takes_writes_at_once())
        })
    }

    /// Writes one placed piece, neighbours in one call.
    fn write(&self, output: &Output, (prepared, list): &Placed) -> Result<()> {
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
                // A part that refers to a buffer the piece does not have: a driver's mistake.
                return Err(crate::Error::malformed("the driver placed bytes that it did not prepare"));
            }
            output.write_slices_at(&mut slices, first.file_offset)?;
        }
        Ok(())
    }
}
