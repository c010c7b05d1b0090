//! [`RemoteDisk`], an export that is read by position.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use imgtool_core::sync::lock;
use imgtool_core::{Error, ErrorKind, FileRun, Location, ReadAt, Result};

use crate::socket::{Endpoint, READ, Socket};
use crate::uri::Uri;
use crate::wire::{self, Export};

/// Number of connections. Our choice: servers have 8 to 16 threads for one export.
const CONNECTIONS: usize = 8;

/// Maximum length of a read in bytes. Our choice: the first bytes of a longer one would come late.
const MAX_READ: u64 = 1 << 20;

/// Maximum length of a question for extents in bytes: its length has 32 bits, and a server may take long to
/// answer.
const MAX_QUESTION: u64 = 1 << 30;

/// Number of runs that are kept. Our limit: 4 MiB; further ones are asked for again.
const MAX_RUNS: usize = 64 << 10;

/// Number of tries in a row after a connection broke, and the first waiting time, which doubles. Our choice:
/// about half a minute.
const TRIES: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(200);

/// Time that a server may take to accept a further connection. Our choice: the first one works already.
const PATIENCE: Duration = Duration::from_secs(2);

/// An export that is read by position.
pub(crate) struct RemoteDisk {
    location: Location,
    name: String,
    endpoint: Endpoint,
    export: Export,
    pool: Mutex<Pool>,
    /// Signals that a connection is idle, or that another one may be opened.
    idle: Condvar,
    cookie: AtomicU64,
    /// Ends and states of the known runs by their starts. They do not overlap.
    runs: Mutex<BTreeMap<u64, (u64, bool)>>,
}

struct Pool {
    idle: Vec<Socket>,
    /// Number of open connections, idle ones among them.
    open: usize,
    limit: usize,
    /// True while a connection is opened: one at a time, since a server may leave the next ones unserved.
    is_opening: bool,
}

impl RemoteDisk {
    /// Connects to an export.
    ///
    /// # Errors
    /// As [`imgtool_core::UrlOpener::open`].
    pub(crate) fn open(location: Location, uri: &Uri) -> Result<Self> {
        let endpoint = Endpoint::of(&uri.server)?;
        let mut socket = endpoint.connect().map_err(again)?;
        let export = wire::negotiate(&mut socket, &uri.export).map_err(again)?;
        let limit = if export.multi_conn { CONNECTIONS } else { 1 };
        Ok(Self {
            location,
            name: uri.export.clone(),
            endpoint,
            export,
            pool: Mutex::new(Pool { idle: vec![socket], open: 1, limit, is_opening: false }),
            idle: Condvar::new(),
            cookie: AtomicU64::new(1),
            runs: Mutex::new(BTreeMap::new()),
        })
    }

    /// Runs a request over a connection of its own. Tries again if the connection breaks.
    fn with_socket<T>(&self, mut request: impl FnMut(&mut Socket, u64) -> Result<T>) -> Result<T> {
        let mut tries = 0;
        loop {
            let result = self.take().and_then(|mut socket| {
                let result = request(&mut socket, self.cookie.fetch_add(1, Ordering::Relaxed));
                // After a failure, the next bytes may be those of another reply.
                self.give_back(result.is_ok().then_some(socket));
                result
            });
            match result {
                Err(error) if error.kind() == ErrorKind::Unavailable && tries < TRIES => {
                    thread::sleep(FIRST_PAUSE.saturating_mul(1 << tries.min(5)));
                    tries += 1;
                }
                Err(error) => return Err(again(error).path(&self.location)),
                Ok(value) => return Ok(value),
            }
        }
    }

    /// Returns an idle connection, or a new one. Waits if there are as many as there may be.
    fn take(&self) -> Result<Socket> {
        let mut pool = lock(&self.pool);
        loop {
            if let Some(socket) = pool.idle.pop() {
                return Ok(socket);
            }
            if pool.open >= pool.limit || pool.is_opening {
                pool = self.idle.wait(pool).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            pool.open += 1;
            pool.is_opening = true;
            let is_first = pool.open == 1;
            drop(pool);
            let connected = self.connect(is_first);
            pool = lock(&self.pool);
            pool.is_opening = false;
            self.idle.notify_one();
            match connected {
                Ok(socket) => return Ok(socket),
                Err(error) => {
                    pool.open -= 1;
                    if pool.open == 0 {
                        return Err(error);
                    }
                    // A server may take fewer connections than it says. Those that are open go on.
                    pool.limit = pool.open;
                }
            }
        }
    }

    /// Opens a connection. A server that leaves a further one unserved does not answer: it is not waited for.
    fn connect(&self, is_first: bool) -> Result<Socket> {
        let mut socket = self.endpoint.connect()?;
        if !is_first {
            socket.set_timeout(PATIENCE)?;
        }
        let export = wire::negotiate(&mut socket, &self.name)?;
        socket.set_timeout(READ)?;
        match export == self.export {
            true => Ok(socket),
            false => {
                Err(Error::corrupt("the export on the server changed while it was read").hint("start again"))
            }
        }
    }

    fn give_back(&self, socket: Option<Socket>) {
        let mut pool = lock(&self.pool);
        match socket {
            Some(socket) => pool.idle.push(socket),
            None => {
                pool.open -= 1;
                // Another one may be opened in its place.
                pool.limit = pool.limit.max(1);
            }
        }
        self.idle.notify_one();
    }

    /// Reads a range that is aligned to the blocks of the server, except at the end of the export.
    fn read_aligned(&self, buf: &mut [u8], position: u64) -> Result<()> {
        // A multiple of the block, since both are powers of two or multiples of it.
        let most = MAX_READ.min(u64::from(self.export.payload)).max(u64::from(self.export.block));
        let mut at = position;
        for part in buf.chunks_mut(usize::try_from(most).unwrap_or(usize::MAX)) {
            self.with_socket(|socket, cookie| wire::read_at(socket, &self.export, cookie, part, at))
                .map_err(|error| error.at(at))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    fn read(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let block = u64::from(self.export.block);
        let (before, end) = (position % block, position + buf.len() as u64);
        let aligned_end = end.next_multiple_of(block).min(self.export.size);
        if before == 0 && aligned_end == end {
            return self.read_aligned(buf, position);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = position + done as u64;
            let start = at - at % block;
            let len = (aligned_end - start).min(MAX_READ.max(block));
            // At most 1 MiB.
            let mut bytes = vec![0; len as usize];
            self.read_aligned(&mut bytes, start)?;
            let from = &bytes[(at - start) as usize..];
            let count = from.len().min(buf.len() - done);
            buf[done..done + count].copy_from_slice(&from[..count]);
            done += count;
        }
        Ok(())
    }

    /// Returns the known run that contains `position`.
    fn known(&self, position: u64) -> Option<FileRun> {
        let runs = lock(&self.runs);
        let (_, (end, is_zero)) = runs.range(..=position).next_back()?;
        (position < *end).then_some(FileRun { end: *end, is_data: !is_zero })
    }

    /// Asks for the runs from `position` on.
    fn ask(&self, position: u64) -> Result<()> {
        let block = u64::from(self.export.block);
        let start = position - position % block;
        let end = start.saturating_add(MAX_QUESTION).min(self.export.size);
        let extents =
            self.with_socket(|socket, cookie| wire::extents(socket, &self.export, cookie, start..end))?;
        let mut runs = lock(&self.runs);
        if runs.len() >= MAX_RUNS {
            runs.clear();
        }
        let (mut at, mut open) = (start, None::<(u64, bool)>);
        for extent in extents {
            // Neighbours of one state become one run.
            let (from, is_zero) = match open.take() {
                Some((from, is_zero)) if is_zero == extent.is_zero => (from, is_zero),
                Some((from, is_zero)) => {
                    insert(&mut runs, from, at, is_zero);
                    (at, extent.is_zero)
                }
                None => (at, extent.is_zero),
            };
            at += extent.len;
            open = Some((from, is_zero));
        }
        if let Some((from, is_zero)) = open {
            insert(&mut runs, from, at, is_zero);
        }
        Ok(())
    }
}

/// Adds a run in place of those that it overlaps, which came of an earlier answer.
fn insert(runs: &mut BTreeMap<u64, (u64, bool)>, start: u64, end: u64, is_zero: bool) {
    let overlapping: Vec<u64> = runs.range(start..end).map(|(start, _)| *start).collect();
    for start in overlapping {
        runs.remove(&start);
    }
    if let Some((_, (before, _))) = runs.range_mut(..start).next_back()
        && *before > start
    {
        *before = start;
    }
    runs.insert(start, (end, is_zero));
}

/// Adds a hint to an error that may pass.
fn again(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Unavailable => error.hint("another try may help"),
        _ => error,
    }
}

impl ReadAt for RemoteDisk {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let fits = position.checked_add(buf.len() as u64).is_some_and(|end| end <= self.export.size);
        match (fits, buf.is_empty()) {
            (false, _) => Err(io::ErrorKind::UnexpectedEof.into()),
            (true, true) => Ok(()),
            (true, false) => self.read(buf, position).map_err(io::Error::from),
        }
    }

    fn len(&self) -> u64 {
        self.export.size
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        if !self.export.has_extents() {
            return Ok(FileRun { end: self.export.size, is_data: true });
        }
        if let Some(known) = self.known(position) {
            return Ok(known);
        }
        self.ask(position)?;
        self.known(position).ok_or_else(|| io::Error::other("the server states no extent"))
    }

    fn concurrency(&self) -> usize {
        if self.export.multi_conn { CONNECTIONS } else { 1 }
    }
}

impl Drop for RemoteDisk {
    fn drop(&mut self) {
        let mut pool = lock(&self.pool);
        pool.idle.iter_mut().for_each(wire::disconnect);
    }
}
