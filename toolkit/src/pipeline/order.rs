//! Placing in source order, writing in parallel.
//!
//! Workers hand in prepared pieces in any order. Whoever hands in the one that everybody waits for
//! places it and all that follow, then writes them. For a stream one worker at a time writes.

use std::collections::{BTreeMap, VecDeque};
use std::io::IoSlice;
use std::sync::{Condvar, Mutex, PoisonError};

use super::{Job, lock};
use crate::error::Result;
use crate::sink::{Bytes, ImageSink, Prepared, WriteList};

/// A piece whose place is known.
type Placed = (Prepared, WriteList);

pub(super) struct Orderer<'a> {
    sink: &'a dyn ImageSink,
    /// Per device of the sink: whether placing must be in source order.
    ordered: bool,
    /// The output is a stream: writes keep the order too.
    in_order_writes: bool,
    /// Pieces that may be under way at once.
    window: usize,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    under_way: usize,
    next: u64,
    ready: BTreeMap<u64, Prepared>,
    to_write: VecDeque<Placed>,
    writing: bool,
    aborted: bool,
}

impl<'a> Orderer<'a> {
    pub(super) fn new(sink: &'a dyn ImageSink, job: &Job<'_>, window: usize) -> Self {
        let ordered = job.routes.iter().any(|route| sink.geometry(route.to).ordered);
        let in_order_writes = job.routes.iter().any(|route| sink.output(route.to).is_stream());
        Self {
            sink,
            ordered: ordered || in_order_writes,
            in_order_writes,
            window,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        }
    }

    /// Waits until one more piece may be under way; false when the work was given up.
    pub(super) fn admit(&self) -> bool {
        if !self.ordered {
            return true;
        }
        let mut state = lock(&self.state);
        while state.under_way >= self.window && !state.aborted {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.under_way += 1;
        !state.aborted
    }

    /// Gives up: nobody waits any longer.
    pub(super) fn abort(&self) {
        lock(&self.state).aborted = true;
        self.changed.notify_all();
    }

    /// Takes a prepared piece; places and writes whatever can be.
    pub(super) fn submit(&self, ticket: u64, prepared: Prepared) -> Result<()> {
        if !self.ordered {
            let mut writes = WriteList::default();
            self.sink.place(&prepared, &mut writes)?;
            return self.write(&prepared, &writes);
        }
        let placed = self.place(ticket, prepared)?;
        let count = placed.len();
        for (prepared, writes) in &placed {
            self.write(prepared, writes)?;
        }
        self.written(count);
        if self.in_order_writes { self.write_in_order() } else { Ok(()) }
    }

    /// Places the pieces whose turn it is; those to be written by the caller.
    fn place(&self, ticket: u64, prepared: Prepared) -> Result<Vec<Placed>> {
        let mut state = lock(&self.state);
        state.ready.insert(ticket, prepared);
        let mut placed = Vec::new();
        loop {
            let next = state.next;
            let Some(prepared) = state.ready.remove(&next) else { break };
            let mut writes = WriteList::default();
            self.sink.place(&prepared, &mut writes)?;
            state.next += 1;
            if self.in_order_writes {
                state.to_write.push_back((prepared, writes));
            } else {
                placed.push((prepared, writes));
            }
        }
        Ok(placed)
    }

    /// Writes what is placed, in order, unless somebody is doing so already.
    fn write_in_order(&self) -> Result<()> {
        let mut state = lock(&self.state);
        if state.writing {
            return Ok(());
        }
        state.writing = true;
        while let Some((prepared, writes)) = state.to_write.pop_front() {
            drop(state);
            // After an error `writing` stays set: nothing may follow what was not written.
            self.write(&prepared, &writes)?;
            drop(prepared);
            self.written(1);
            state = lock(&self.state);
        }
        state.writing = false;
        Ok(())
    }

    fn written(&self, count: usize) {
        if count > 0 {
            lock(&self.state).under_way -= count;
            self.changed.notify_all();
        }
    }

    /// Writes one placed piece, neighbours in one call.
    fn write(&self, prepared: &Prepared, list: &WriteList) -> Result<()> {
        let output = self.sink.output(prepared.device);
        let mut rest = list.writes();
        while let Some(first) = rest.first() {
            if let Bytes::Zero(len) = first.bytes {
                output.write_zeros_at(first.file_offset, len)?;
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
