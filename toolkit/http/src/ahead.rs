//! [`Ahead`], a reader of a whole file in order that fetches several ranges at once: a stream is then not
//! bound to the speed of one connection.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use imgtool_core::{Lease, Memory};

use crate::object::Object;

/// Length of a range in bytes. Our choice: its transfer takes longer than a round trip.
const RANGE: u64 = 4 << 20;

/// Number of ranges fetched at once.
const RANGES: u64 = 8;

/// Divisor of the free memory: ranges may take a quarter.
const MEMORY_DIVISOR: u64 = 4;

/// A reader that fetches ahead.
pub(crate) struct Ahead {
    object: Object,
    len: u64,
    /// Position of the next range to ask for.
    asked: u64,
    /// Ranges that are fetched, in order.
    queue: VecDeque<Receiver<io::Result<Vec<u8>>>>,
    ranges: usize,
    /// Range that is passed on, and how much of it was.
    current: (Vec<u8>, usize),
    /// True after an error: the bytes behind it must not follow.
    is_broken: bool,
    _lease: Lease,
}

impl Ahead {
    /// Creates a reader of `object`, which has `len` bytes; `None` if `memory` can't lend a range.
    pub(crate) fn new(object: &Object, len: u64, memory: &Memory) -> Option<Self> {
        // One more is passed on.
        let affordable = (memory.free() / MEMORY_DIVISOR / RANGE).saturating_sub(1);
        let ranges = affordable.min(RANGES).min(len.div_ceil(RANGE));
        let lease = memory.try_lease((ranges + 1) * RANGE).filter(|_| ranges > 0)?;
        let (queue, current) = (VecDeque::new(), (Vec::new(), 0));
        // At most `RANGES`.
        let ranges = ranges as usize;
        Some(Self {
            object: object.clone(),
            len,
            asked: 0,
            queue,
            ranges,
            current,
            is_broken: false,
            _lease: lease,
        })
    }

    /// Asks for further ranges. Without a thread for one, fetches it at once.
    fn ask(&mut self) {
        while self.queue.len() < self.ranges && self.asked < self.len {
            // At most the length of a range.
            let (start, len) = (self.asked, (self.len - self.asked).min(RANGE) as usize);
            let (sender, receiver) = sync_channel(1);
            let (object, other) = (self.object.clone(), sender.clone());
            // A receiver that is gone needs no bytes.
            let work = move || drop(sender.send(fetch(&object, start, len)));
            if thread::Builder::new().name("fetch".to_owned()).spawn(work).is_err() {
                let _ = other.send(fetch(&self.object, start, len));
            }
            self.queue.push_back(receiver);
            self.asked += len as u64;
        }
    }
}

fn fetch(object: &Object, start: u64, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    object.fetch(&mut bytes, start).map(|()| bytes)
}

impl Read for Ahead {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.current.1 == self.current.0.len() {
            self.current = (Vec::new(), 0);
            self.ask();
            let Some(next) = self.queue.pop_front() else { return Ok(0) };
            if std::mem::replace(&mut self.is_broken, true) {
                return Err(io::Error::other("the stream is broken"));
            }
            let bytes = next.recv().map_err(|_| io::Error::other("a thread that reads ahead ended"))??;
            self.is_broken = false;
            self.current = (bytes, 0);
            self.ask();
        }
        let (bytes, done) = &mut self.current;
        let count = (bytes.len() - *done).min(buf.len());
        buf[..count].copy_from_slice(&bytes[*done..*done + count]);
        *done += count;
        Ok(count)
    }
}
