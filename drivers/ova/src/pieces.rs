//! [`Pieces`], a file put together from ranges of others: the chunks of a split file, the runs of a sparse
//! one.

use std::io;
use std::sync::Arc;

use imgtool_core::input::{FileRun, InputBody};
use imgtool_core::{Error, Input, Lease, ReadAt, Result};

/// Bytes in memory.
#[derive(Debug)]
pub(crate) struct Bytes(pub(crate) Vec<u8>);

impl ReadAt for Bytes {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let start = usize::try_from(position).map_err(io::Error::other)?;
        let found = self.0.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// A range of the file.
#[derive(Debug, Clone, Copy)]
struct Piece {
    /// Position after its last byte.
    end: u64,
    /// Index of the source with its bytes, and its position there; `None` for zeros.
    place: Option<(u32, u64)>,
}

/// Bytes that consist of ranges of other inputs, and of zeros.
#[derive(Default)]
pub(crate) struct Pieces {
    sources: Vec<Arc<dyn ReadAt>>,
    /// Ascending and without gaps.
    pieces: Vec<Piece>,
    /// Lease of the memory, unless another one holds it.
    lease: Option<Lease>,
}

impl Pieces {
    /// Length in memory of a piece, in bytes.
    pub(crate) const PIECE_BYTES: u64 = size_of::<Piece>() as u64;

    /// Adds an input. Returns its number.
    ///
    /// # Errors
    /// `Unsupported` for a stream.
    pub(crate) fn source(&mut self, input: Input) -> Result<u32> {
        let InputBody::Random(source) = input.into_body() else {
            return Err(Error::unsupported("a part of a stream can't be read by position"));
        };
        self.sources.push(source);
        u32::try_from(self.sources.len() - 1).map_err(|_| Error::limit("too many parts of a file"))
    }

    /// Keeps the lease of the memory.
    pub(crate) fn hold(&mut self, lease: Lease) {
        self.lease = Some(lease);
    }

    /// Appends `len` bytes of a source, from `position` on.
    pub(crate) fn push(&mut self, source: u32, position: u64, len: u64) -> Result<()> {
        self.append(len, Some((source, position)))
    }

    /// Appends zeros up to the position `end`.
    pub(crate) fn push_zeros_until(&mut self, end: u64) -> Result<()> {
        self.append(end.saturating_sub(self.len()), None)
    }

    fn append(&mut self, len: u64, place: Option<(u32, u64)>) -> Result<()> {
        let end = self.len().checked_add(len).ok_or_else(|| Error::malformed("a file ends beyond 2^64"))?;
        if len > 0 {
            self.pieces.push(Piece { end, place });
        }
        Ok(())
    }

    /// Returns the index of the piece with this position, and its start.
    fn find(&self, position: u64) -> Option<(usize, u64)> {
        let index = self.pieces.partition_point(|piece| piece.end <= position);
        let start = index.checked_sub(1).map_or(0, |before| self.pieces[before].end);
        (index < self.pieces.len()).then_some((index, start))
    }
}

impl ReadAt for Pieces {
    fn read_exact_at(&self, mut buf: &mut [u8], mut position: u64) -> io::Result<()> {
        while !buf.is_empty() {
            let (index, start) = self.find(position).ok_or(io::ErrorKind::UnexpectedEof)?;
            let piece = self.pieces[index];
            let len = usize::try_from(piece.end - position).unwrap_or(usize::MAX).min(buf.len());
            let (part, rest) = buf.split_at_mut(len);
            match piece.place {
                Some((source, at)) => {
                    let source = self.sources.get(source as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
                    source.read_exact_at(part, at + (position - start))?;
                }
                None => part.fill(0),
            }
            position += len as u64;
            buf = rest;
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.pieces.last().map_or(0, |piece| piece.end)
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        let (index, start) = self.find(position).ok_or(io::ErrorKind::UnexpectedEof)?;
        let Piece { end, place } = self.pieces[index];
        let Some((source, at)) = place else { return Ok(FileRun { end, is_data: false }) };
        let source = self.sources.get(source as usize).ok_or(io::ErrorKind::UnexpectedEof)?;
        let run = source.run(at + (position - start))?;
        // The run may reach beyond the piece.
        Ok(FileRun { end: run.end.saturating_sub(at).saturating_add(start).min(end), ..run })
    }

    fn granule(&self) -> u64 {
        self.sources.iter().map(|source| source.granule()).max().unwrap_or(1)
    }

    fn concurrency(&self) -> usize {
        self.sources.iter().map(|source| source.concurrency()).max().unwrap_or(1)
    }

    fn release(&self) {
        self.sources.iter().for_each(|source| source.release());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_across_pieces_and_zeros() {
        let mut pieces = Pieces::default();
        let input = |bytes: &[u8]| Input::from_read_at("x", Arc::new(Bytes(bytes.to_vec())));
        let first = pieces.source(input(b"0123456789")).expect("random");
        let second = pieces.source(input(b"abc")).expect("random");
        pieces.push(first, 3, 4).expect("fits");
        pieces.push_zeros_until(6).expect("fits");
        pieces.push(second, 0, 3).expect("fits");
        pieces.push_zeros_until(12).expect("fits");
        let whole = b"3456\0\0abc\0\0\0";
        assert_eq!(pieces.len(), 12);
        for start in 0..12 {
            for end in start..=12 {
                let mut buf = vec![9; end - start];
                pieces.read_exact_at(&mut buf, start as u64).expect("within");
                assert_eq!(buf, whole[start..end]);
            }
        }
        assert!(pieces.read_exact_at(&mut [0; 2], 11).is_err());
        assert_eq!(pieces.run(1).expect("within"), FileRun { end: 4, is_data: true });
        assert_eq!(pieces.run(4).expect("within"), FileRun { end: 6, is_data: false });
        assert_eq!(pieces.run(7).expect("within"), FileRun { end: 9, is_data: true });
        assert!(pieces.run(12).is_err());
    }
}
