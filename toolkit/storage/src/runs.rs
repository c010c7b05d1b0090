//! Cache of the data and hole runs of a file.
//!
//! Some file systems walk over a whole run to find its end: on tmpfs, a query takes time proportional to the
//! length of the run. Without the cache, a driver whose clusters are scattered over the file would pay this
//! for every query.

use std::fs::File;
use std::io;
use std::sync::Mutex;

use imgtool_core::sync::lock;
use imgtool_core::{FileRun, Lease, Memory};

use crate::os;

/// Maximum number of runs in the cache. Our limit: 8 MiB of memory. Queries beyond the last cached run go to
/// the kernel.
const MAX_RUNS: usize = 1 << 20;

/// Number of runs by which the memory of the cache grows. Our choice: 64 KiB.
const RUNS_AT_ONCE: usize = 1 << 13;

/// The runs of a file from its start to the run of the highest position queried so far.
#[derive(Debug)]
pub(crate) struct Runs {
    known: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    /// One number for each run, ascending: twice its end, plus one if it is data. A run begins where the
    /// previous one ends.
    packed: Vec<u64>,
    /// Memory for the runs.
    lease: Option<Lease>,
}

impl Known {
    /// True if another run may be cached. Without memory, queries beyond the cached runs go to the kernel.
    fn has_space(&mut self) -> bool {
        let len = self.packed.len();
        if !len.is_multiple_of(RUNS_AT_ONCE) {
            return true;
        }
        let bytes = (len + RUNS_AT_ONCE) as u64 * 8;
        len < MAX_RUNS && self.lease.as_mut().is_some_and(|lease| lease.try_raise(bytes))
    }
}

impl Runs {
    /// Creates an empty cache that borrows from `memory`.
    pub(crate) fn new(memory: &Memory) -> Self {
        Self { known: Mutex::new(Known { packed: Vec::new(), lease: memory.try_lease(0) }) }
    }

    /// Returns the run that contains `position` in `file`, which is `len` bytes long.
    pub(crate) fn find(&self, file: &File, len: u64, position: u64) -> io::Result<FileRun> {
        let mut known = lock(&self.known);
        let runs = &known.packed;
        let mut frontier = runs.last().map_or(0, |run| unpack(*run).end);
        if position < frontier {
            let index = runs.partition_point(|run| unpack(*run).end <= position);
            // Always found: the last run ends at the frontier.
            return runs.get(index).map(|run| unpack(*run)).ok_or(io::ErrorKind::NotFound.into());
        }
        while known.has_space() {
            let run = os::file_run(file, frontier, len)?;
            // A file is shorter than 2^63 bytes (off_t).
            known.packed.push(run.end << 1 | u64::from(run.is_data));
            if position < run.end {
                return Ok(run);
            }
            frontier = run.end;
        }
        os::file_run(file, position, len)
    }
}

fn unpack(packed: u64) -> FileRun {
    FileRun { end: packed >> 1, is_data: packed & 1 == 1 }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::{Seek, SeekFrom, Write};

    #[test]
    fn answers_do_not_depend_on_the_order_of_queries() {
        const UNIT: u64 = 1 << 20;
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(16 * UNIT).unwrap();
        for unit in [1, 2, 5, 9, 15] {
            file.seek(SeekFrom::Start(unit * UNIT)).unwrap();
            file.write_all(&[1; UNIT as usize]).unwrap();
        }
        let expected: Vec<FileRun> =
            (0..16).map(|unit| os::file_run(&file, unit * UNIT + 7, 16 * UNIT).unwrap()).collect();
        let (forwards, backwards) = (Runs::new(&Memory::default()), Runs::new(&Memory::default()));
        for unit in 0..16u64 {
            let find = |runs: &Runs, unit: u64| runs.find(&file, 16 * UNIT, unit * UNIT + 7).unwrap();
            assert_eq!(find(&forwards, unit), expected[unit as usize]);
            assert_eq!(find(&backwards, 15 - unit), expected[(15 - unit) as usize]);
        }
    }
}
