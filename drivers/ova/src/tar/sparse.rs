//! Maps of sparse files in the old form of GNU tar: pairs of offset and length, in the header and in blocks
//! behind it.

use imgtool_core::{Error, Result};

use super::{BLOCK, Header, number};

/// Maximum number of runs of a file. Our limit: a map of 16 MiB; a disk of 64 TiB with data in every other 64
/// MiB has 512 Ki.
pub(super) const MAX_RUNS: usize = 1 << 20;

/// Maximum length of a sparse file in bytes. Our limit: 64 TiB, the largest disk of VHDX.
const MAX_REAL_SIZE: u64 = 64 << 40;

/// Length in bytes of a pair.
const PAIR: usize = 24;

/// A run of data in a sparse file. The data of all runs is stored without gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Run {
    /// Position in the file, in bytes.
    pub(crate) start: u64,
    /// Length in bytes.
    pub(crate) len: u64,
}

/// A map, as far as it was read.
#[derive(Debug)]
pub(super) struct Map {
    runs: Vec<Run>,
    /// Position after the last run.
    end: u64,
    /// Length of the data of all runs.
    stored: u64,
    /// Length of the file in bytes.
    pub(super) real_size: u64,
    /// True if another block of the map follows.
    pub(super) continues: bool,
}

impl Map {
    /// Parses the part of the map in the header of a file.
    pub(super) fn begin(header: &Header<'_>) -> Result<Self> {
        let block = header.block();
        let real_size = number(&block[483..495]).filter(|size| *size <= MAX_REAL_SIZE);
        let real_size = real_size
            .ok_or_else(|| Error::malformed("the size of a sparse file is no number of at most 64 TiB"))?;
        let mut map = Self { runs: Vec::new(), end: 0, stored: 0, real_size, continues: block[482] != 0 };
        map.push_pairs(&block[386..482])?;
        Ok(map)
    }

    /// Parses a further block of the map.
    pub(super) fn push_block(&mut self, block: &[u8; BLOCK]) -> Result<()> {
        self.continues = block[504] != 0;
        self.push_pairs(&block[..504])
    }

    fn push_pairs(&mut self, pairs: &[u8]) -> Result<()> {
        for pair in pairs.chunks_exact(PAIR).take_while(|pair| pair.iter().any(|byte| *byte != 0)) {
            let (offset, len) = (number(&pair[..12]), number(&pair[12..]));
            let run = offset.zip(len).map(|(start, len)| Run { start, len });
            let end = run.and_then(|run| run.start.checked_add(run.len));
            let (Some(run), Some(end)) = (run, end.filter(|end| *end <= self.real_size)) else {
                return Err(Error::malformed("the map of a sparse file leaves the file"));
            };
            if run.start < self.end {
                return Err(Error::malformed("the map of a sparse file does not ascend"));
            }
            if self.runs.len() == MAX_RUNS {
                return Err(Error::limit(format!("a sparse file has more than {MAX_RUNS} runs of data")));
            }
            self.end = end;
            // At most the file's size, since the runs don't overlap.
            self.stored += run.len;
            if run.len > 0 {
                self.runs.push(run);
            }
        }
        Ok(())
    }

    /// Returns the runs, if their data has the length that the header states.
    pub(super) fn finish(self, stored: u64) -> Result<Vec<Run>> {
        if self.stored == stored {
            return Ok(self.runs);
        }
        Err(Error::malformed(format!(
            "the map of a sparse file has {} bytes of data, its header {stored}",
            self.stored
        )))
    }
}
