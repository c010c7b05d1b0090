//! What of a file is data and what is hole, asked once and kept.
//!
//! A file system may walk over a whole run to find its end: on tmpfs a question costs time in
//! proportion to the run. A driver whose clusters lie scattered over the file would pay for that
//! again and again.

use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

use super::os::{self, FileRun};

/// Runs that are kept: 8 MiB. Ours. What lies behind them is asked for each time.
const MAX_RUNS: usize = 1 << 20;

/// The runs of a file from its start up to as far as they were asked for.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Ascending. Twice the end of each run, which begins where the one before ends; plus one if it
    /// is data.
    known: Mutex<Vec<u64>>,
}

impl Runs {
    /// The run of `file`, which is `len` bytes long, that `position` lies in.
    pub(super) fn find(&self, file: &File, len: u64, position: u64) -> io::Result<FileRun> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut frontier = known.last().map_or(0, |packed| unpack(*packed).end);
        if position < frontier {
            let place = known.partition_point(|packed| unpack(*packed).end <= position);
            // There is one: the last ends at the frontier.
            return known.get(place).map(|packed| unpack(*packed)).ok_or(io::ErrorKind::NotFound.into());
        }
        while known.len() < MAX_RUNS {
            let run = os::file_run(file, frontier, len)?;
            // Lengths of files are below 2^63.
            known.push(run.end << 1 | u64::from(run.is_data));
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
    fn answers_do_not_depend_on_the_order_of_questions() {
        const UNIT: u64 = 1 << 20;
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(16 * UNIT).unwrap();
        for unit in [1, 2, 5, 9, 15] {
            file.seek(SeekFrom::Start(unit * UNIT)).unwrap();
            file.write_all(&[1; UNIT as usize]).unwrap();
        }
        let asked: Vec<FileRun> =
            (0..16).map(|unit| os::file_run(&file, unit * UNIT + 7, 16 * UNIT).unwrap()).collect();
        let (forwards, backwards) = (Runs::default(), Runs::default());
        for unit in 0..16u64 {
            let find = |runs: &Runs, unit: u64| runs.find(&file, 16 * UNIT, unit * UNIT + 7).unwrap();
            assert_eq!(find(&forwards, unit), asked[unit as usize]);
            assert_eq!(find(&backwards, 15 - unit), asked[(15 - unit) as usize]);
        }
    }
}
