//! Places pieces in source order, and lets one worker at a time write to a file or stream.
//!
//! Workers submit prepared pieces in any order. The worker that submits the next piece in source order places
//! it and all ready pieces after it. If the bytes of a target depend on their file offsets, workers then seal
//! (encrypt) the placed pieces, each of them any piece. A placed piece waits in the queue of its output. A worker that finds an
//! output without a writer empties its queue, while others go on reading and preparing.
//!
//! One writer is enough for a file: the kernel locks the inode during a write, so a second writer would only
//! wait. Measured from page cache to tmpfs, two writers take the same time as one, and a third more CPU time.
//! A block device takes several writes at once ([`Output::prefers_concurrent_writes`]).

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use imgtool_core::sync::lock;
use imgtool_core::{
    Bytes, DeviceId, Error, FileWrite, Output, Prepared, RandomAccess, Result, StreamOrder, WriteList,
};

use super::has_device_twice;
use super::share::BlockSharing;
use super::target::Targets;

/// Returns the order of a stream of the same image, if the layout of some target depends on it.
pub(super) fn of_stream<'a>(
    source: &'a dyn RandomAccess,
    targets: &Targets<'_>,
) -> Result<Option<Box<dyn StreamOrder + 'a>>> {
    let routes = &targets.job().routes;
    if has_device_twice(routes) {
        return Ok(None);
    }
    let of_target = |target| {
        let routes = routes.iter().filter(|route| route.target == target);
        let ordered = routes.filter(|route| targets.geometry(**route).ordered);
        let devices: Vec<DeviceId> = ordered.map(|route| route.from).collect();
        source.stream_order(&devices).transpose()
    };
    let all = targets.job().targets.iter().enumerate();
    let mut free = all.filter(|(_, target)| !target.in_guest_order()).map(|(index, _)| index);
    free.find_map(of_target).transpose()
}

/// The writes of a placed piece to one output.
struct PlacedPiece {
    target: usize,
    /// The piece, shared by its writes to all outputs. It is in flight until the last write is done.
    prepared: Arc<Prepared>,
    writes: Vec<FileWrite>,
}

/// Orders the placing and writing of pieces.
pub(super) struct Orderer<'a> {
    targets: &'a Targets<'a>,
    /// True if pieces must be placed in source order.
    ordered: bool,
    /// Maximum number of pieces in flight.
    window: usize,
    sharing: BlockSharing<'a>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Number of pieces in flight: admitted, but not written yet.
    in_flight: usize,
    /// Number of workers that wait for admission.
    waiting: usize,
    /// Ticket (index in source order) of the piece to place next.
    next: u64,
    /// Prepared pieces that wait for an earlier piece, by ticket, with the index of their target.
    ready: BTreeMap<u64, (usize, Prepared)>,
    /// Placed pieces to be sealed, with the index of their target.
    unsealed: VecDeque<(usize, Prepared, WriteList)>,
    /// Queues of placed pieces, by index of the output.
    queues: Vec<Queue>,
    aborted: bool,
}

#[derive(Default)]
struct Queue {
    placed: VecDeque<PlacedPiece>,
    writers: usize,
}

impl<'a> Orderer<'a> {
    pub(super) fn new(targets: &'a Targets<'a>, window: usize, sharing: BlockSharing<'a>) -> Self {
        let ordered = targets.job().routes.iter().any(|route| targets.geometry(*route).ordered);
        let ordered = ordered || targets.outputs().iter().any(|output| output.is_stream());
        let queues = targets.outputs().iter().map(|_| Queue::default()).collect();
        let state = Mutex::new(State { queues, ..State::default() });
        Self { targets, ordered, window, sharing, state, changed: Condvar::new() }
    }

    /// Waits until one more piece may be in flight. Returns false if the copy was aborted.
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

    /// Returns the number of pieces in flight at which waiting workers wake. Our choice: half the window,
    /// since waking a thread for each piece would take longer than writing a small piece.
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

    /// Submits the prepared piece with index `ticket` in source order. Places and writes all pieces that are
    /// ready.
    pub(super) fn submit(&self, ticket: u64, target: usize, prepared: Prepared) -> Result<()> {
        if self.ordered {
            self.place_in_order(ticket, target, prepared)?;
        } else {
            let writes = self.place(target, &prepared)?;
            self.pass_on(&mut lock(&self.state), target, prepared, writes)?;
        }
        self.seal_placed()?;
        self.write_queued()
    }

    fn place(&self, target: usize, prepared: &Prepared) -> Result<WriteList> {
        let mut writes = WriteList::default();
        self.targets.job().targets[target].place(prepared, &mut writes)?;
        Ok(writes)
    }

    /// Adds a piece to the ready pieces, then places them in order up to the first gap.
    fn place_in_order(&self, ticket: u64, target: usize, prepared: Prepared) -> Result<()> {
        let mut state = lock(&self.state);
        state.ready.insert(ticket, (target, prepared));
        loop {
            let next = state.next;
            let Some((target, prepared)) = state.ready.remove(&next) else { return Ok(()) };
            let writes = self.place(target, &prepared)?;
            state.next += 1;
            self.pass_on(&mut state, target, prepared, writes)?;
        }
    }

    /// Puts the writes of a placed piece into the queues, or the piece among those to be sealed.
    fn pass_on(
        &self,
        state: &mut MutexGuard<'_, State>,
        target: usize,
        prepared: Prepared,
        writes: WriteList,
    ) -> Result<()> {
        if self.targets.job().targets[target].seals() && !writes.writes().is_empty() {
            state.unsealed.push_back((target, prepared, writes));
            return Ok(());
        }
        self.enqueue(state, target, prepared, writes)
    }

    /// Seals placed pieces until none is left. Every worker that has submitted a piece takes part.
    fn seal_placed(&self) -> Result<()> {
        loop {
            let next = lock(&self.state).unsealed.pop_front();
            let Some((target, mut prepared, mut writes)) = next else { return Ok(()) };
            self.targets.job().targets[target].seal(&mut prepared, &mut writes)?;
            self.enqueue(&mut lock(&self.state), target, prepared, writes)?;
        }
    }

    /// Puts the writes of a placed piece into the queues of their outputs.
    fn enqueue(
        &self,
        state: &mut MutexGuard<'_, State>,
        target: usize,
        prepared: Prepared,
        writes: WriteList,
    ) -> Result<()> {
        let mut writes = writes.into_writes();
        if writes.is_empty() {
            self.retire(state);
            return Ok(());
        }
        let prepared = Arc::new(prepared);
        while let Some(first) = writes.first() {
            let output = first.output;
            let index = self.targets.output_index(target, output);
            let queue = index.and_then(|index| state.queues.get_mut(index));
            let queue = queue
                .ok_or_else(|| Error::malformed("the driver wrote to an output that it did not make"))?;
            // Nearly always, all writes go to one output.
            let rest = writes.iter().position(|write| write.output != output).map(|at| writes.split_off(at));
            queue.placed.push_back(PlacedPiece { target, prepared: Arc::clone(&prepared), writes });
            writes = rest.unwrap_or_default();
        }
        Ok(())
    }

    /// Counts a piece as no longer in flight.
    fn retire(&self, state: &mut MutexGuard<'_, State>) {
        state.in_flight -= 1;
        if state.waiting > 0 && state.in_flight <= self.low_water() {
            self.changed.notify_all();
        }
    }

    /// Writes the queued pieces, in order, of every output that needs a writer.
    fn write_queued(&self) -> Result<()> {
        let mut state = lock(&self.state);
        while let Some(index) = self.output_without_writer(&state) {
            // After an error, the count stays as it is, so no worker writes the pieces after the failed one.
            state.queues[index].writers += 1;
            while let Some(placed) = state.queues[index].placed.pop_front() {
                drop(state);
                self.write(self.targets.outputs()[index], &placed)?;
                let last = Arc::into_inner(placed.prepared);
                let is_done = last.is_some();
                drop(last);
                state = lock(&self.state);
                if is_done {
                    self.retire(&mut state);
                }
                if state.aborted {
                    return Ok(());
                }
            }
            state.queues[index].writers -= 1;
        }
        Ok(())
    }

    /// Returns the index of an output that needs a writer.
    fn output_without_writer(&self, state: &State) -> Option<usize> {
        state.queues.iter().zip(self.targets.outputs()).position(|(queue, output)| {
            !queue.placed.is_empty() && (queue.writers == 0 || output.prefers_concurrent_writes())
        })
    }

    /// Writes one placed piece. Joins adjacent writes into one system call.
    fn write(&self, output: &Output, placed: &PlacedPiece) -> Result<()> {
        let prepared = &*placed.prepared;
        let mut rest = placed.writes.as_slice();
        while let Some(first) = rest.first() {
            if let Bytes::Zero(len) = first.bytes {
                output.write_zeros_at(first.file_offset, len)?;
                rest = &rest[1..];
                continue;
            }
            if let Bytes::Data(range) = &first.bytes
                && self.sharing.share(placed.target, prepared, range, output, first)?
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
                // A write refers to a buffer that the piece lacks: a bug in the driver.
                return Err(Error::malformed("the driver placed bytes that it did not prepare"));
            }
            output.write_slices_at(&mut slices, first.file_offset)?;
        }
        Ok(())
    }
}
