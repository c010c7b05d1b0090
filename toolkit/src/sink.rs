//! Sinks: images that are made.
//!
//! Every format comes down to bytes at file offsets. A sink says which bytes and where; the
//! pipeline writes them. Three steps make the result deterministic and parallel at once:
//!
//! 1. [`ImageSink::prepare`], by many threads, without shared state: find zeros, compress, assemble.
//! 2. [`ImageSink::place`], in source order, cheap: decide where the prepared bytes land.
//! 3. The pipeline writes what was placed, by many threads again (in order to a pipe).
//!
//! [`ImageSink::finish`] then writes the tables, the header last.

use std::ops::Range;

use crate::buffer::{Buffer, BufferPool};
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::source::Piece;
use crate::storage::Output;

/// The shape in which a sink wants its pieces.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Pieces start at multiples of this many bytes and, except for a device's last, are multiples
    /// of it long.
    pub granule: u64,
    /// A sink that cannot take a piece of less than a whole granule. When false, pieces from badly
    /// shuffled streams may be any multiple of 4 KiB.
    pub granule_required: bool,
    /// Data pieces cover this many bytes, starting at multiples of it; a multiple of `granule`.
    pub piece_len: u64,
    /// The longest piece of zeros; a multiple of `piece_len`, or `u64::MAX` when zeros cost nothing.
    pub max_zero_len: u64,
    /// Whether [`ImageSink::place`] must be called in source order. A sink whose file offsets are
    /// the guest's needs no order.
    pub ordered: bool,
}

/// Where the bytes of one write are.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// This many zeros.
    Zero(u64),
    /// A part of [`Prepared::data`].
    Data(Range<usize>),
    /// A part of [`Prepared::encoded`].
    Encoded(Range<usize>),
    /// Bytes of their own (a table that was full).
    Owned(Vec<u8>),
}

impl Bytes {
    /// How many bytes.
    pub fn len(&self) -> u64 {
        match self {
            Bytes::Zero(len) => *len,
            Bytes::Data(range) | Bytes::Encoded(range) => range.len() as u64,
            Bytes::Owned(bytes) => bytes.len() as u64,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A part of a prepared piece that stays together in the file.
#[derive(Debug, Clone)]
pub struct Part {
    /// The guest range it stands for, bytes.
    pub guest: Range<u64>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// A piece after [`ImageSink::prepare`].
#[derive(Debug)]
pub struct Prepared {
    /// The device.
    pub device: DeviceId,
    /// First guest byte.
    pub start: u64,
    /// Guest bytes.
    pub len: u64,
    /// The piece's own buffer.
    pub data: Option<Buffer>,
    /// What was made of it: compressed clusters, headers.
    pub encoded: Option<Buffer>,
    /// What has to be written, in the order in which the sink wants to place it.
    pub parts: Vec<Part>,
    /// Guest bytes that were taken without anything being written for them.
    pub taken: u64,
}

impl Prepared {
    /// A piece of which nothing needs writing yet; the sink adds parts.
    pub fn new(piece: Piece) -> Self {
        Self {
            device: piece.device,
            start: piece.start,
            len: piece.len,
            data: piece.data,
            encoded: None,
            parts: Vec::new(),
            taken: 0,
        }
    }

    /// A piece whose zeros take no space: a part for each of `runs` of data (bytes of the piece, as
    /// [`Piece::nonzero_runs`] finds them), and with `zeros_too` (the output does not read as zeros by
    /// itself) for what is between them.
    pub fn sparse(piece: Piece, runs: Vec<Range<usize>>, zeros_too: bool) -> Self {
        let (start, end) = (piece.start, piece.end());
        let mut prepared = Self::new(piece);
        let mut position = start;
        let zeros = |guest: Range<u64>| {
            let len = guest.end - guest.start;
            (zeros_too && len > 0).then_some(Part { guest, bytes: Bytes::Zero(len) })
        };
        for run in runs {
            let guest = start + run.start as u64..start + run.end as u64;
            prepared.parts.extend(zeros(position..guest.start));
            position = guest.end;
            prepared.parts.push(Part { guest, bytes: Bytes::Data(run) });
        }
        prepared.parts.extend(zeros(position..end));
        prepared
    }

    /// A piece that a sink has taken and of which it writes nothing (it compares, it digests): its data
    /// counts as data for progress.
    pub fn taken(piece: Piece) -> Self {
        let taken = if piece.data.is_some() { piece.len } else { 0 };
        Self { taken, ..Self::new(piece) }
    }

    /// The bytes themselves; `None` for zeros.
    pub fn bytes<'a>(&'a self, bytes: &'a Bytes) -> Option<&'a [u8]> {
        match bytes {
            Bytes::Zero(_) => None,
            Bytes::Data(range) => self.data.as_deref().map(|data| &data[range.clone()]),
            Bytes::Encoded(range) => self.encoded.as_deref().map(|data| &data[range.clone()]),
            Bytes::Owned(bytes) => Some(bytes),
        }
    }

    /// Guest bytes for which something is written, or that were taken as data.
    pub fn stored(&self) -> u64 {
        let written = self.parts.iter().filter(|part| !matches!(part.bytes, Bytes::Zero(_)));
        self.taken + written.map(|part| part.guest.end - part.guest.start).sum::<u64>()
    }
}

/// One write that [`ImageSink::place`] asks for.
#[derive(Debug, Clone)]
pub struct FileWrite {
    /// Offset in the output, bytes.
    pub file_offset: u64,
    /// The bytes.
    pub bytes: Bytes,
}

/// The writes of one placed piece. Neighbours in the file are joined into one call when they are
/// pushed one after the other.
#[derive(Debug, Default)]
pub struct WriteList {
    writes: Vec<FileWrite>,
}

impl WriteList {
    /// Adds a write.
    pub fn push(&mut self, file_offset: u64, bytes: Bytes) {
        if !bytes.is_empty() {
            self.writes.push(FileWrite { file_offset, bytes });
        }
    }

    /// The writes.
    pub fn writes(&self) -> &[FileWrite] {
        &self.writes
    }
}

/// An image that is being made.
pub trait ImageSink: Send + Sync {
    /// The shape in which pieces of `device` are wanted.
    fn geometry(&self, device: DeviceId) -> Geometry;

    /// Where the writes that [`ImageSink::place`] asks for on behalf of `device` go.
    fn output(&self, device: DeviceId) -> &Output;

    /// The bytes before the first piece, for formats that can be written in one pass to a pipe.
    ///
    /// # Errors
    /// When the manifest can't be expressed.
    fn preamble(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Called once, before the first piece: writes the [`ImageSink::preamble`].
    ///
    /// # Errors
    /// When it can't be written.
    fn begin(&self) -> Result<()> {
        let bytes = self.preamble()?;
        if bytes.is_empty() { Ok(()) } else { self.output(DeviceId(0)).write_at(&bytes, 0) }
    }

    /// Whether the file is the [`ImageSink::preamble`] followed by the parts of all pieces in
    /// order: what can go to a pipe or through a compressor.
    fn append_only(&self) -> bool {
        false
    }

    /// Whether every byte of `device` stands at its guest offset in the output and zeros need no
    /// writing. Then, where source and output lie on a file system that can, blocks are shared
    /// instead of copied, and the sink does not see those pieces.
    fn is_verbatim(&self, _device: DeviceId) -> bool {
        false
    }

    /// Whether every [`Bytes::Data`] that is placed for `device` holds the guest's bytes as the piece
    /// brought them. Then, where source and output lie on a file system that can, the output shares
    /// their blocks instead of taking a copy.
    fn keeps_bytes(&self, _device: DeviceId) -> bool {
        false
    }

    /// Turns a piece into parts. Called by many threads at once, in any order.
    ///
    /// # Errors
    /// When the piece can't be expressed in the format.
    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared>;

    /// Decides where the parts land. Called in source order if [`Geometry::ordered`], by one thread
    /// at a time then; cheap.
    ///
    /// # Errors
    /// When the format's limits are reached or a table can't be written.
    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()>;

    /// Tells the size of a device that was open-ended, before [`ImageSink::finish`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] by default.
    fn resize(&self, _device: DeviceId, _size: u64) -> Result<()> {
        Err(Error::unsupported("this format must know the size of a device before its data"))
    }

    /// Writes tables and header. Called once, after every write of every piece has succeeded. The
    /// outputs are flushed and named by their owner afterwards.
    ///
    /// # Errors
    /// When they can't be written.
    fn finish(&self) -> Result<()>;

    /// What the summary should say ("virtual size rounded up to …"): one sentence each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}
