//! Writer of outer compression: compresses a whole output (`.vma.zst`, `.raw.gz`) with all workers.
//!
//! [`CompressedSink`] wraps a sink that only appends to its file ([`ImageSink::append_only`]). The bytes are cut
//! into units by guest position (`guest_units`), and each unit with data becomes a frame (zstd) or
//! member (gzip) of its own. So workers compress independently, and the result depends neither on their number
//! nor on the pieces of the source. Units without data are joined into common frames, in the order of placing.
//!
//! A zstd file ends with a seek table for reads by position, which other zstd programs skip. Any program that
//! reads several frames or members reads the whole file.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use zstd::zstd_safe::get_frame_content_size;

use imgtool_core::sync::lock;
use imgtool_core::{
    Buffer, BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Location, Output, OutputId, Prepared,
    Result, SinkDevice, SinkPiece, TableMemory, WriteList,
};

use super::frames::{Chunk, CompressorPool, FRAME_LEN, Framing, cut_into_frames, frame_len};
use super::guest_units::{self, Empty, Plain, Unit};
use super::seek_table::FrameList;

/// Target length of a piece in bytes, for inner sinks with shorter pieces (raw): short frames compress worse,
/// and each takes an entry in the seek table.
const PIECE_LEN: u64 = 2 << 20;

/// Maximum length of a piece of zeros, in bytes. Our limit: 256 frames, about 40 KiB of zstd or 1 MiB of
/// gzip.
const MAX_ZERO_LEN: u64 = 1 << 30;

/// Maximum number of different frames of zeros to keep. Our limit: a disk has two lengths, [`FRAME_LEN`] and
/// [`PIECE_LEN`], and that of its tail.
const MAX_ZERO_FRAMES: usize = 8;

/// Returns the number of guest bytes in a unit of a sink whose output is compressed as a whole. A unit becomes a
/// frame, unless it is longer than 4 MiB or without data.
pub fn unit_of_frames(sink: &dyn ImageSink, device: SinkDevice) -> u64 {
    let unit = sink.geometry(device).piece_len.max(1);
    unit * (PIECE_LEN / unit).max(1)
}

/// A unit, cut into frames.
enum Cut<'a> {
    Frames(Vec<Vec<Chunk<'a>>>),
    Empty(Empty),
}

/// A sink that compresses the output of another, append-only sink.
pub struct CompressedSink {
    inner: Box<dyn ImageSink>,
    outputs: [Output; 1],
    framing: Framing,
    compressors: Arc<CompressorPool>,
    pool: BufferPool,
    /// Compressed frames of zeros, by plain length.
    zero_frames: Mutex<HashMap<u64, Arc<[u8]>>>,
    /// Results of [`Consumer::prepare`] that wait to be placed, by device and guest offset. Each belongs to a
    /// piece in flight and takes less than the piece: at most the headers of its units without data.
    packed: Mutex<HashMap<(SinkDevice, u64), Vec<Packed>>>,
    state: Mutex<State>,
}

/// A part of a prepared piece.
enum Packed {
    /// A compressed frame, as a range of [`Prepared::encoded`].
    Frame(Range<usize>),
    /// Units without data. They join their neighbours of other pieces before they are compressed.
    Empty(Empty),
}

impl fmt::Debug for CompressedSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressedSink").field("inner", &self.inner).finish_non_exhaustive()
    }
}

struct State {
    /// File offset of the next frame.
    file_offset: u64,
    /// Stored and plain length of every frame so far, for the seek table.
    frames: FrameList,
    /// Units without data that were placed, but not compressed yet: at most one group.
    pending: Option<(SinkDevice, Empty)>,
    /// Device and end of the last piece placed, in guest bytes.
    last: Option<(SinkDevice, u64)>,
}

impl State {
    /// Takes note of a piece of an image that is written in guest order. The frames follow each other, so that a
    /// piece which comes late would end up in another place of the image.
    fn advance(&mut self, piece: &Prepared) -> Result<()> {
        match self.last {
            Some((device, end)) if device == piece.device && piece.start < end => {
                return Err(Error::out_of_order(
                    "the content does not come in order, and a compressed image can't be written out of order",
                )
                .hint("save the source to a file, and convert from there"));
            }
            _ => self.last = Some((piece.device, piece.start + piece.len)),
        }
        Ok(())
    }
}

/// Compressors and buffers for the compressed outputs of a run, which share them: a run needs only as many as
/// it has workers.
#[derive(Debug, Clone)]
pub struct Compressors {
    framing: Framing,
    compressors: Arc<CompressorPool>,
    pool: BufferPool,
}

impl Compressors {
    /// Creates an empty pool.
    pub fn new(framing: Framing) -> Self {
        Self { framing, compressors: Arc::new(CompressorPool::new(framing)), pool: BufferPool::new() }
    }

    /// Returns the framing of the outputs.
    pub fn framing(&self) -> Framing {
        self.framing
    }
}

impl CompressedSink {
    /// Returns the output for the inner sink, named `location`. The compressed sink takes its bytes.
    pub fn inner_output(location: &Location) -> Output {
        Output::framed(location)
    }

    /// Wraps `inner`, which was created over [`CompressedSink::inner_output`], and writes to `output`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unsupported`] if `inner` is not append-only or has several outputs;
    /// [`imgtool_core::ErrorKind::Refused`] if `output` is an existing target of fixed length.
    pub fn new(inner: Box<dyn ImageSink>, output: Output, framing: Framing) -> Result<Self> {
        Self::sharing(inner, output, &Compressors::new(framing), None)
    }

    /// Like [`CompressedSink::new`], with compressors that other outputs share. `memory` limits the seek
    /// table to a number of bytes; a file with more frames gets none, and is then read as a stream.
    ///
    /// # Errors
    /// Same as [`CompressedSink::new`].
    pub fn sharing(
        inner: Box<dyn ImageSink>,
        output: Output,
        shared: &Compressors,
        memory: Option<u64>,
    ) -> Result<Self> {
        if !inner.append_only() {
            return Err(Error::unsupported("this format can't be compressed as a whole while it is written")
                .path(output.location())
                .hint("use compression inside the format, or compress the finished file"));
        }
        if inner.outputs().len() != 1 {
            return Err(Error::unsupported("an image of several files can't be compressed as a whole")
                .path(output.location()));
        }
        if output.capacity().is_some() {
            return Err(
                Error::refused("a compressed image goes to a new file or a pipe").path(output.location())
            );
        }
        let Compressors { framing, compressors, pool } = shared.clone();
        let frames = FrameList::within(memory);
        Ok(Self {
            inner,
            outputs: [output],
            framing,
            compressors,
            pool,
            zero_frames: Mutex::default(),
            packed: Mutex::default(),
            state: Mutex::new(State { file_offset: 0, frames, pending: None, last: None }),
        })
    }

    /// Returns the memory for the seek table of an output of at most `plain_len` bytes.
    pub fn table_memory(framing: Framing, plain_len: u64) -> TableMemory {
        match framing {
            Framing::SeekableZstd { .. } => FrameList::memory(plain_len.div_ceil(PIECE_LEN)),
            Framing::Gzip { .. } => TableMemory::default(),
        }
    }

    /// Compresses the units with data, and groups of units without data that are whole. Returns the buffer with
    /// the frames, and the parts in order.
    fn pack(&self, units: Vec<Unit<'_>>, group_len: u64) -> Result<(Buffer, Vec<Packed>)> {
        let mut compressor = self.compressors.take();
        let cut = |unit| match unit {
            Unit::Data(chunks) => Cut::Frames(cut_into_frames(&chunks)),
            Unit::Empty(empty) => Cut::Empty(empty),
        };
        let cuts: Vec<Cut<'_>> = units.into_iter().map(cut).collect();
        let max_len = |cut: &Cut<'_>| match cut {
            Cut::Frames(frames) => {
                frames.iter().map(|frame| compressor.bound(frame_len(frame))).sum::<usize>()
            }
            Cut::Empty(empty) if empty.is_whole(group_len) => compressor.bound(empty.plain.bytes().len()),
            Cut::Empty(_) => 0,
        };
        let mut buffer = self.pool.take(cuts.iter().map(max_len).sum());
        let mut packed = Vec::with_capacity(cuts.len());
        let mut end = 0;
        let mut encode = |frame: &[Chunk<'_>], packed: &mut Vec<Packed>| {
            let len = compressor.encode(frame, &mut buffer[end..], &self.pool)?;
            packed.push(Packed::Frame(end..end + len));
            end += len;
            Ok::<(), Error>(())
        };
        for cut in cuts {
            match cut {
                Cut::Frames(frames) => {
                    frames.iter().try_for_each(|frame| encode(frame, &mut packed))?;
                }
                Cut::Empty(empty) if empty.is_whole(group_len) && !empty.plain.bytes().is_empty() => {
                    encode(&[Chunk::Data(empty.plain.bytes())], &mut packed)?;
                }
                Cut::Empty(empty) => packed.push(Packed::Empty(empty)),
            }
        }
        drop(compressor);
        buffer.truncate(end);
        Ok((buffer, packed))
    }

    /// Returns a compressed frame of `len` zeros. Few lengths occur, so their frames are compressed once.
    fn zero_frame(&self, len: u64) -> Result<Arc<[u8]>> {
        if let Some(known) = lock(&self.zero_frames).get(&len) {
            return Ok(Arc::clone(known));
        }
        let frame: Arc<[u8]> = self.encode(&[Chunk::Zero(len)])?.into();
        let mut frames = lock(&self.zero_frames);
        if frames.len() < MAX_ZERO_FRAMES {
            frames.insert(len, Arc::clone(&frame));
        }
        Ok(frame)
    }

    /// Compresses one frame.
    fn encode(&self, frame: &[Chunk<'_>]) -> Result<Vec<u8>> {
        let mut compressor = self.compressors.take();
        let mut buffer = self.pool.take(compressor.bound(frame_len(frame)));
        let len = compressor.encode(frame, &mut buffer, &self.pool)?;
        Ok(buffer[..len].to_vec())
    }

    /// Compresses the pending units without data and reserves file space for their frames. Returns the first
    /// file offset and the frames; the latter are empty if no unit is pending.
    fn flush(&self, state: &mut State) -> Result<(u64, Vec<u8>)> {
        let start = state.file_offset;
        let mut frames = Vec::new();
        let Some((_, Empty { plain, .. })) = state.pending.take() else { return Ok((start, frames)) };
        match plain {
            Plain::Bytes(bytes) => {
                for bytes in bytes.chunks(FRAME_LEN) {
                    let frame = self.encode(&[Chunk::Data(bytes)])?;
                    self.append(state, &frame)?;
                    frames.extend_from_slice(&frame);
                }
            }
            Plain::Zeros(mut left) => {
                while left > 0 {
                    let len = left.min(FRAME_LEN as u64);
                    let frame = self.zero_frame(len)?;
                    self.append(state, &frame)?;
                    frames.extend_from_slice(&frame);
                    left -= len;
                }
            }
        }
        Ok((start, frames))
    }

    /// Adds the writes of the pending units without data.
    fn place_pending(&self, state: &mut State, writes: &mut WriteList) -> Result<()> {
        let (at, frames) = self.flush(state)?;
        writes.push(OutputId::MAIN, at, Bytes::Owned(frames));
        Ok(())
    }

    /// Adds units without data to the pending ones, or replaces these and adds their writes to `writes`.
    fn place_empty(
        &self,
        state: &mut State,
        device: SinkDevice,
        empty: Empty,
        writes: &mut WriteList,
    ) -> Result<()> {
        let group_len = self.group_len(device);
        let empty = match &mut state.pending {
            Some((pending, joined)) if *pending == device => joined.join(empty, group_len),
            _ => Some(empty),
        };
        if let Some(empty) = empty {
            self.place_pending(state, writes)?;
            state.pending = Some((device, empty));
        }
        Ok(())
    }

    fn unit_len(&self, device: SinkDevice) -> u64 {
        unit_of_frames(&*self.inner, device)
    }

    fn group_len(&self, device: SinkDevice) -> u64 {
        self.unit_len(device).saturating_mul(guest_units::GROUP_UNITS)
    }

    /// Reserves file space for a frame and records it for the seek table. Returns its file offset.
    fn append(&self, state: &mut State, frame: &[u8]) -> Result<u64> {
        let at = state.file_offset;
        state.file_offset += frame.len() as u64;
        if let Framing::SeekableZstd { .. } = self.framing {
            // `encode_zstd` puts the content size into the header; both lengths fit into 32 bits, since a
            // frame contains at most FRAME_LEN plain bytes.
            let plain = get_frame_content_size(frame).ok().flatten().and_then(|len| u32::try_from(len).ok());
            let (Some(plain), Ok(stored)) = (plain, u32::try_from(frame.len())) else {
                return Err(Error::limit("a compressed frame does not fit the seek table").at(at));
            };
            state.frames.push(stored, plain);
        }
        Ok(at)
    }

    /// Compresses bytes that belong to no piece, and reserves consecutive file offsets for their frames.
    /// Returns the first file offset and the frames.
    fn frame(&self, bytes: &[u8]) -> Result<(u64, Vec<u8>)> {
        let mut frames = Vec::new();
        let mut state = lock(&self.state);
        let start = state.file_offset;
        for frame in cut_into_frames(&[Chunk::Data(bytes)]) {
            let frame = self.encode(&frame)?;
            self.append(&mut state, &frame)?;
            frames.extend_from_slice(&frame);
        }
        Ok((start, frames))
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }
}

impl Consumer for CompressedSink {
    fn geometry(&self, device: SinkDevice) -> Geometry {
        let inner = self.inner.geometry(device);
        let piece_len = self.unit_len(device);
        Geometry {
            // If the format accepts any granule, whole pieces make better frames.
            granule: if inner.granule_required { inner.granule } else { piece_len },
            piece_len,
            max_zero_len: inner.max_zero_len.min((MAX_ZERO_LEN / piece_len).max(1) * piece_len),
            ordered: true,
            ..inner
        }
    }

    fn worker_memory(&self) -> u64 {
        self.compressors.context_bytes() + self.inner.worker_memory()
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let mut prepared = self.inner.prepare(piece, pool)?;
        let (unit_len, group_len) = (self.unit_len(prepared.device), self.group_len(prepared.device));
        let (frames, packed) = self.pack(guest_units::cut(&prepared, unit_len, group_len), group_len)?;
        lock(&self.packed).insert((prepared.device, prepared.start), packed);
        // The inner sink's `place` needs its parts, but only their lengths.
        for part in &mut prepared.parts {
            if !matches!(part.bytes, Bytes::Zero(_)) {
                // The part is in memory, so its length fits into a usize.
                part.bytes = Bytes::Data(0..part.bytes.len() as usize);
            }
        }
        prepared.data = None;
        prepared.encoded = Some(frames);
        Ok(prepared)
    }

    fn resize(&self, device: SinkDevice, size: u64) -> Result<()> {
        self.inner.resize(device, size)
    }
}

impl ImageSink for CompressedSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn in_guest_order(&self) -> bool {
        self.inner.in_guest_order()
    }

    fn begin(&self) -> Result<Vec<u8>> {
        let preamble = self.inner.begin()?;
        if preamble.is_empty() { Ok(preamble) } else { Ok(self.frame(&preamble)?.1) }
    }

    fn end(&self) -> Result<Vec<u8>> {
        let end = self.inner.end()?;
        if end.is_empty() {
            return Ok(end);
        }
        // The pending zeros come before these bytes. Both are written at the same file offset.
        let (_, mut frames) = self.flush(&mut lock(&self.state))?;
        frames.extend_from_slice(&self.frame(&end)?.1);
        Ok(frames)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        self.inner.place(prepared, &mut WriteList::default())?;
        let not_prepared = || Error::usage("a piece is placed that was not prepared");
        let packed =
            lock(&self.packed).remove(&(prepared.device, prepared.start)).ok_or_else(not_prepared)?;
        let mut state = lock(&self.state);
        if self.inner.in_guest_order() {
            state.advance(prepared)?;
        }
        for part in packed {
            match part {
                Packed::Empty(empty) => self.place_empty(&mut state, prepared.device, empty, writes)?,
                Packed::Frame(range) => {
                    self.place_pending(&mut state, writes)?;
                    let bytes = Bytes::Encoded(range);
                    let at = self.append(&mut state, prepared.bytes(&bytes).ok_or_else(not_prepared)?)?;
                    writes.push(OutputId::MAIN, at, bytes);
                }
            }
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()?;
        let (at, frames) = self.flush(&mut lock(&self.state))?;
        if !frames.is_empty() {
            self.output().write_at(&frames, at)?;
        }
        if lock(&self.state).file_offset == 0 {
            return Err(Error::unsupported("a disk of 0 bytes can't be compressed")
                .path(self.output().location())
                .hint("no program can tell the result from the output of a command that failed"));
        }
        if let Framing::SeekableZstd { .. } = self.framing {
            let mut state = lock(&self.state);
            let mut at = state.file_offset;
            // Frees the list: the outputs may be read back next, and need memory for that.
            std::mem::take(&mut state.frames).encode(|part| {
                self.output().write_at(part, at)?;
                at += part.len() as u64;
                Ok(())
            })?;
        }
        // The outputs may be read back next.
        self.pool.clear();
        self.compressors.clear();
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}
