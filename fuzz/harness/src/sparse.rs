//! A file in memory that stores only its written sectors: images of any length in little memory.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{FileRun, ReadAt};

/// Unit of storage in bytes.
pub const SECTOR: u64 = 512;

/// A file in memory whose holes take no memory.
#[derive(Debug, Clone, Default)]
pub struct SparseFile {
    len: u64,
    sectors: BTreeMap<u64, Box<[u8; SECTOR as usize]>>,
}

impl SparseFile {
    /// Creates a file of `len` bytes that is one hole.
    pub fn new(len: u64) -> Self {
        Self { len, sectors: BTreeMap::new() }
    }

    /// Writes bytes, but drops those beyond the end.
    pub fn write(&mut self, position: u64, bytes: &[u8]) {
        let mut position = position;
        let mut rest = bytes;
        while !rest.is_empty() && position < self.len {
            let within = (position % SECTOR) as usize;
            let room = (SECTOR as usize - within).min(rest.len());
            let room = room.min(usize::try_from(self.len - position).unwrap_or(usize::MAX));
            let sector =
                self.sectors.entry(position / SECTOR).or_insert_with(|| Box::new([0; SECTOR as usize]));
            sector[within..within + room].copy_from_slice(&rest[..room]);
            rest = &rest[room..];
            position += room as u64;
        }
    }

    /// Fills `buf` with the bytes from `position` on; holes and bytes beyond the end are zeros.
    pub fn read(&self, buf: &mut [u8], position: u64) {
        buf.fill(0);
        let end = position.saturating_add(buf.len() as u64);
        for (number, sector) in self.sectors.range(position / SECTOR..end.div_ceil(SECTOR)) {
            let sector_start = number * SECTOR;
            let from = sector_start.max(position);
            let to = (sector_start + SECTOR).min(end);
            let target = (from - position) as usize..(to - position) as usize;
            buf[target]
                .copy_from_slice(&sector[(from - sector_start) as usize..(to - sector_start) as usize]);
        }
    }

    /// Returns the bytes of `range`, whose length the caller must bound.
    pub fn bytes(&self, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0)];
        self.read(&mut bytes, range.start);
        bytes
    }

    /// Returns the positions of the written sectors in `range`, ascending.
    pub fn written(&self, range: Range<u64>) -> impl Iterator<Item = u64> + '_ {
        let first = range.start.div_ceil(SECTOR);
        self.sectors.range(first..range.end.div_ceil(SECTOR).max(first)).map(|(number, _)| number * SECTOR)
    }

    /// Returns the file as a stream.
    pub fn stream(self: &Arc<Self>) -> SparseStream {
        SparseStream { file: Arc::clone(self), position: 0 }
    }
}

impl ReadAt for SparseFile {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        if position.checked_add(buf.len() as u64).is_none_or(|end| end > self.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(buf, position);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        let number = position / SECTOR;
        let mut next = self.sectors.range(number..).map(|(number, _)| *number).peekable();
        let is_data = next.peek() == Some(&number);
        let end = if is_data {
            let mut end = number;
            while next.next() == Some(end) {
                end += 1;
            }
            end
        } else {
            next.next().unwrap_or(u64::MAX / SECTOR)
        };
        Ok(FileRun { end: (end * SECTOR).min(self.len), is_data })
    }
}

/// Reader of a [`SparseFile`] from its start.
#[derive(Debug)]
pub struct SparseStream {
    file: Arc<SparseFile>,
    position: u64,
}

impl io::Read for SparseStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.file.len.saturating_sub(self.position);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        self.file.read(&mut buf[..count], self.position);
        self.position += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn reads_written_bytes_and_reports_holes() {
        let mut file = SparseFile::new(1 << 40);
        file.write(1000, &[7; 600]);
        file.write((1 << 40) - 2, &[9; 10]);
        assert_eq!(file.bytes(998..1002), [0, 0, 7, 7]);
        assert_eq!(file.bytes(1599..1601), [7, 0]);
        assert_eq!(file.run(0).expect("run"), FileRun { end: 512, is_data: false });
        assert_eq!(file.run(600).expect("run"), FileRun { end: 2048, is_data: true });
        assert_eq!(file.run(5000).expect("run").end, (1 << 40) - 512);
        assert!(file.read_exact_at(&mut [0; 3], (1 << 40) - 2).is_err());
        let mut head = [0; 1001];
        Arc::new(file).stream().read_exact(&mut head).expect("read");
        assert_eq!(head[1000], 7);
    }
}
