//! [`Consumer`] and [`ImageSink`], the receivers of a copy.
//!
//! A plain [`Consumer`] receives pieces and stores nothing: it digests, compares or counts. An [`ImageSink`]
//! is a consumer that creates an image. Every format comes down to bytes at file offsets, so the sink only
//! decides which bytes go where, and the pipeline writes them. Three steps make the work parallel and its
//! result deterministic:
//!
//! 1. [`Consumer::prepare`] finds zeros, compresses and assembles, in many threads and without shared state.
//! 2. [`ImageSink::place`] chooses the file offsets of the prepared bytes, in source order. It must be cheap.
//! 3. The pipeline writes the placed bytes: to a pipe in order, to several outputs in several threads. If the
//!    bytes depend on their file offsets, [`ImageSink::seal`] encrypts them before, in many threads.
//!
//! [`ImageSink::finish`] then writes the tables, and the header last.

use std::ops::Range;

use crate::buffer::{Buffer, BufferPool};
use crate::device::{OutputId, SinkDevice};
use crate::error::{Error, Result};
use crate::output::Output;
use crate::source::SinkPiece;

/// Alignment and length of the pieces that a consumer receives, in guest bytes.
#[derive(Debug, Clone, Copy)]
pub struct Geometry {
    /// Alignment: the start of every piece is a multiple of it, and so is the length of every piece but a
    /// device's last.
    pub granule: u64,
    /// True if the consumer can't handle a part of a granule. Otherwise, pieces from a badly shuffled stream
    /// may start and end at any multiple of 4 KiB.
    pub granule_required: bool,
    /// Preferred length of a piece with data; a multiple of `granule`. Pieces may be longer, and those of a
    /// stream may also be shorter.
    pub piece_len: u64,
    /// Maximum length of a piece of zeros: a multiple of `piece_len`, or `u64::MAX` if zeros cost nothing.
    pub max_zero_len: u64,
    /// True if [`Consumer::settle`] or [`ImageSink::place`] must be called in source order. A sink whose file
    /// offsets equal the guest offsets needs no order.
    pub ordered: bool,
}

/// The bytes of one write.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// A run of zeros of this length.
    Zero(u64),
    /// A part of [`Prepared::data`].
    Data(Range<usize>),
    /// A part of [`Prepared::encoded`].
    Encoded(Range<usize>),
    /// Bytes that the sink has created (a full table).
    Owned(Vec<u8>),
}

impl Bytes {
    /// Returns the number of bytes.
    pub fn len(&self) -> u64 {
        match self {
            Bytes::Zero(len) => *len,
            Bytes::Data(range) | Bytes::Encoded(range) => range.len() as u64,
            Bytes::Owned(bytes) => bytes.len() as u64,
        }
    }

    /// True if there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A part of a prepared piece that is contiguous in the file.
#[derive(Debug, Clone)]
pub struct Part {
    /// Guest range that the part represents, in bytes.
    pub guest: Range<u64>,
    /// Bytes to write.
    pub bytes: Bytes,
}

/// A piece after [`Consumer::prepare`].
#[derive(Debug)]
pub struct Prepared {
    /// The device.
    pub device: SinkDevice,
    /// Guest offset of the first byte.
    pub start: u64,
    /// Length in guest bytes.
    pub len: u64,
    /// Content of the piece; `None` if all bytes are zero.
    pub data: Option<Buffer>,
    /// Derived bytes, if any: compressed clusters, headers.
    pub encoded: Option<Buffer>,
    /// Parts to write, in the order in which the sink places them.
    pub parts: Vec<Part>,
    /// Number of guest bytes of data that the consumer used without writing them.
    pub consumed: u64,
}

impl Prepared {
    /// Creates a prepared piece without parts; the sink adds them.
    pub fn new(piece: SinkPiece) -> Self {
        Self {
            device: piece.device,
            start: piece.start,
            len: piece.len,
            data: piece.data,
            encoded: None,
            parts: Vec::new(),
            consumed: 0,
        }
    }

    /// Creates a prepared piece with a part for each of `runs`, the ranges of the piece that contain data
    /// (see [`crate::Piece::nonzero_runs`]). If `zeros_too`, the gaps become parts of zeros, for an output
    /// where unwritten bytes do not read as zeros.
    pub fn sparse(piece: SinkPiece, runs: Vec<Range<usize>>, zeros_too: bool) -> Self {
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

    /// Creates a prepared piece without parts. Its data still counts as data in the progress.
    pub fn consumed(piece: SinkPiece) -> Self {
        let consumed = if piece.data.is_some() { piece.len } else { 0 };
        Self { consumed, ..Self::new(piece) }
    }

    /// Returns the slice that `bytes` refers to; `None` for zeros.
    pub fn bytes<'a>(&'a self, bytes: &'a Bytes) -> Option<&'a [u8]> {
        match bytes {
            Bytes::Zero(_) => None,
            Bytes::Data(range) => self.data.as_deref().map(|data| &data[range.clone()]),
            Bytes::Encoded(range) => self.encoded.as_deref().map(|data| &data[range.clone()]),
            Bytes::Owned(bytes) => Some(bytes),
        }
    }

    /// Returns the number of guest bytes that are written or consumed as data; zeros do not count.
    pub fn stored(&self) -> u64 {
        let written = self.parts.iter().filter(|part| !matches!(part.bytes, Bytes::Zero(_)));
        self.consumed + written.map(|part| part.guest.end - part.guest.start).sum::<u64>()
    }
}

/// One write.
#[derive(Debug, Clone)]
pub struct FileWrite {
    /// Output to write to.
    pub output: OutputId,
    /// File offset in the output.
    pub file_offset: u64,
    /// Bytes to write.
    pub bytes: Bytes,
}

/// Writes of one placed piece. The pipeline joins writes that are adjacent in an output and pushed one after
/// the other into one system call.
#[derive(Debug, Default)]
pub struct WriteList {
    writes: Vec<FileWrite>,
}

impl WriteList {
    /// Adds a write, unless it is empty.
    pub fn push(&mut self, output: OutputId, file_offset: u64, bytes: Bytes) {
        if !bytes.is_empty() {
            self.writes.push(FileWrite { output, file_offset, bytes });
        }
    }

    /// Returns the writes.
    pub fn writes(&self) -> &[FileWrite] {
        &self.writes
    }

    /// Returns the writes, to be changed by [`ImageSink::seal`].
    pub fn writes_mut(&mut self) -> &mut [FileWrite] {
        &mut self.writes
    }

    /// Consumes the list and returns the writes.
    pub fn into_writes(self) -> Vec<FileWrite> {
        self.writes
    }
}

/// Receives the pieces of a copy.
pub trait Consumer: Send + Sync {
    /// Returns the alignment and length of the pieces of `device`.
    fn geometry(&self, device: SinkDevice) -> Geometry;

    /// Processes a piece. Many threads call it at once, in any order. A sink returns the parts to write; any
    /// other consumer returns [`Prepared::consumed`].
    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared>;

    /// Returns the memory in bytes that a thread in [`Consumer::prepare`] needs besides the piece and its
    /// encoded form: a compressor.
    fn worker_memory(&self) -> u64 {
        0
    }

    /// Receives a result of [`Consumer::prepare`]. If [`Geometry::ordered`], the pipeline calls it in source
    /// order and from one thread at a time. For a sink, the pipeline calls [`ImageSink::place`] instead.
    fn settle(&self, _prepared: &Prepared) -> Result<()> {
        Ok(())
    }

    /// Receives the size of an open-ended device, in bytes, after its last piece.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] by default.
    fn resize(&self, _device: SinkDevice, _size: u64) -> Result<()> {
        Err(Error::unsupported("this format must know the size of a device before its data"))
    }
}

/// Part of an output that may share its blocks with the source, on a file system with reflinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// No part: the sink changes the bytes, or must allocate them.
    Never,
    /// Every [`Bytes::Data`] placed in this output contains the piece's bytes unchanged. The pipeline may
    /// share their blocks instead of writing a copy.
    Parts(OutputId),
    /// Every byte of the device is at its guest offset in this output, and zeros need no writing. The
    /// pipeline may share whole extents instead of passing their pieces to the sink.
    Whole(OutputId),
}

/// A consumer that creates an image.
///
/// The order of calls is: [`ImageSink::begin`]; [`Consumer::prepare`] and [`ImageSink::place`] for every
/// piece; [`Consumer::resize`] for open-ended devices; [`ImageSink::end`]; [`ImageSink::finish`].
pub trait ImageSink: Consumer {
    /// Returns the outputs, indexed by [`OutputId`]. The first is the image's own, so there is at least one.
    fn outputs(&self) -> &[Output];

    /// Prepares the outputs. Returns the bytes before the first piece, which the caller writes at the start
    /// of the main output.
    fn begin(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// True if the main output consists of the bytes of [`ImageSink::begin`], the parts of all pieces in order,
    /// and the bytes of [`ImageSink::end`], so that the sink can write to a pipe or through a compressor.
    fn append_only(&self) -> bool {
        false
    }

    /// True if the pieces must come one device after the other, each in guest order, whatever the order of a stream
    /// of the same source. False by default.
    fn in_guest_order(&self) -> bool {
        false
    }

    /// Returns the part of an output whose blocks `device` may share with the source.
    fn sharing(&self, _device: SinkDevice) -> Sharing {
        Sharing::Never
    }

    /// Chooses the file offsets of the parts and adds the writes to `writes`. Must be cheap. If
    /// [`Geometry::ordered`], the pipeline calls it in source order and from one thread at a time.
    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()>;

    /// True if the pipeline must call [`ImageSink::seal`] for every placed piece. False by default.
    fn seals(&self) -> bool {
        false
    }

    /// Changes the bytes of a placed piece, which depend on their file offsets: encrypts them. The pipeline calls
    /// it after [`ImageSink::place`] and before the writes, from many threads at once and in any order, so not
    /// for an append-only image. The bytes of a write may change, and writes may be added.
    fn seal(&self, _prepared: &mut Prepared, _writes: &mut WriteList) -> Result<()> {
        Ok(())
    }

    /// Returns the bytes after the last piece of an append-only image. The caller writes them at the end of
    /// the main output, before it calls [`ImageSink::finish`].
    fn end(&self) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }

    /// Writes the tables and the header. The caller calls it once, after every write has succeeded.
    /// Afterwards, the owner of the outputs flushes them and gives them their final names.
    fn finish(&self) -> Result<()>;

    /// Returns the number of leaked allocation units that an existing image had before it was changed. A check
    /// of the finished image finds no more than these.
    fn leaks_before(&self) -> u64 {
        0
    }

    /// Returns notes for the user about the image ("the virtual size was rounded up …").
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}
