//! Writer of outer compression: compresses a whole output (`.vma.zst`, `.raw.gz`) with all workers.
//!
//! [`CompressedSink`] wraps a sink that only appends to its file ([`ImageSink::append_only`]). Each prepared
//! piece becomes frames (zstd) or members (gzip) of its own, so workers compress independently, and the
//! result does not depend on the number of workers. A zstd file ends with a seek table for reads by position,
//! which other zstd programs skip. Any program that reads several frames or members reads the whole file.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use zstd::zstd_safe::get_frame_content_size;

use imgtool_core::sync::lock;
use imgtool_core::{
    Buffer, BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Location, Output, OutputId, Part,
    Prepared, Result, SinkDevice, SinkPiece, TableMemory, WriteList,
};

use super::frames::{
    Chunk, CompressorPool, FRAME_LEN, Framing, PooledCompressor, cut_into_frames, frame_len,
    is_full_zero_frame,
};
use super::seek_table::FrameList;

/// Target length of a piece in bytes, for inner sinks with shorter pieces (raw): short frames compress worse,
/// and each takes an entry in the seek table.
const PIECE_LEN: u64 = 2 << 20;

/// Maximum length of a piece of zeros, in bytes. Our limit: 256 frames, about 40 KiB of zstd or 1 MiB of
/// gzip.
const MAX_ZERO_LEN: u64 = 1 << 30;

/// A sink that compresses the output of another, append-only sink.
pub struct CompressedSink {
    inner: Box<dyn ImageSink>,
    outputs: [Output; 1],
    framing: Framing,
    compressors: Arc<CompressorPool>,
    pool: BufferPool,
    /// A compressed frame of [`FRAME_LEN`] zeros.
    zero_frame: OnceLock<Vec<u8>>,
    state: Mutex<State>,
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
            zero_frame: OnceLock::new(),
            state: Mutex::new(State { file_offset: 0, frames }),
        })
    }

    /// Returns the memory for the seek table of an output of at most `plain_len` bytes.
    pub fn table_memory(framing: Framing, plain_len: u64) -> TableMemory {
        match framing {
            Framing::SeekableZstd { .. } => FrameList::memory(plain_len.div_ceil(PIECE_LEN)),
            Framing::Gzip { .. } => TableMemory::default(),
        }
    }

    /// Compresses `chunks` into frames; returns the buffer and the range of each frame in it.
    fn pack(&self, chunks: &[Chunk<'_>]) -> Result<(Buffer, Vec<Range<usize>>)> {
        let frames = cut_into_frames(chunks);
        let mut compressor = self.compressors.take();
        let zeros = match frames.iter().any(|frame| is_full_zero_frame(frame)) {
            true => self.zero_frame(&mut compressor)?,
            false => &[],
        };
        let max_len = |frame: &Vec<Chunk<'_>>| {
            if is_full_zero_frame(frame) { zeros.len() } else { compressor.bound(frame_len(frame)) }
        };
        let mut packed = self.pool.take(frames.iter().map(max_len).sum());
        let mut ranges = Vec::with_capacity(frames.len());
        let mut end = 0;
        for frame in &frames {
            let target = &mut packed[end..];
            let len = if is_full_zero_frame(frame) {
                target[..zeros.len()].copy_from_slice(zeros);
                zeros.len()
            } else {
                compressor.encode(frame, target, &self.pool)?
            };
            ranges.push(end..end + len);
            end += len;
        }
        drop(compressor);
        packed.truncate(end);
        Ok((packed, ranges))
    }

    /// Returns a frame of [`FRAME_LEN`] zeros, compressed once: long runs of zeros are copies of it.
    fn zero_frame(&self, compressor: &mut PooledCompressor<'_>) -> Result<&[u8]> {
        if let Some(known) = self.zero_frame.get() {
            return Ok(known);
        }
        let mut frame = self.pool.take(compressor.bound(FRAME_LEN));
        let len = compressor.encode(&[Chunk::Zero(FRAME_LEN as u64)], &mut frame, &self.pool)?;
        Ok(self.zero_frame.get_or_init(|| frame[..len].to_vec()))
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
    fn frame(&self, bytes: &[u8]) -> Result<(u64, Buffer)> {
        let (compressed, ranges) = self.pack(&[Chunk::Data(bytes)])?;
        let mut state = lock(&self.state);
        let start = state.file_offset;
        for range in ranges {
            self.append(&mut state, &compressed[range])?;
        }
        Ok((start, compressed))
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }
}

impl Consumer for CompressedSink {
    fn geometry(&self, device: SinkDevice) -> Geometry {
        let inner = self.inner.geometry(device);
        let unit = inner.piece_len.max(1);
        let piece_len = unit * (PIECE_LEN / unit).max(1);
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
        let chunks: Vec<Chunk<'_>> = prepared
            .parts
            .iter()
            .filter(|part| !part.bytes.is_empty())
            .map(|part| prepared.bytes(&part.bytes).map_or(Chunk::Zero(part.bytes.len()), Chunk::Data))
            .collect();
        let (compressed, ranges) = self.pack(&chunks)?;
        // The inner sink's `place` needs its parts, but only their lengths. The frames follow them and
        // represent no guest bytes.
        for part in &mut prepared.parts {
            if !matches!(part.bytes, Bytes::Zero(_)) {
                // The part is in memory, so its length fits into a usize.
                part.bytes = Bytes::Data(0..part.bytes.len() as usize);
            }
        }
        let end = prepared.start + prepared.len;
        prepared
            .parts
            .extend(ranges.into_iter().map(|range| Part { guest: end..end, bytes: Bytes::Encoded(range) }));
        prepared.data = None;
        prepared.encoded = Some(compressed);
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

    fn begin(&self) -> Result<Vec<u8>> {
        let preamble = self.inner.begin()?;
        if preamble.is_empty() { Ok(preamble) } else { Ok(self.frame(&preamble)?.1.to_vec()) }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let is_frame = |part: &&Part| matches!(part.bytes, Bytes::Encoded(_));
        let plain = Prepared {
            device: prepared.device,
            start: prepared.start,
            len: prepared.len,
            data: None,
            encoded: None,
            parts: prepared.parts.iter().filter(|part| !is_frame(part)).cloned().collect(),
            consumed: prepared.consumed,
        };
        self.inner.place(&plain, &mut WriteList::default())?;
        let mut state = lock(&self.state);
        for part in prepared.parts.iter().filter(is_frame) {
            let Some(frame) = prepared.bytes(&part.bytes) else { continue };
            let at = self.append(&mut state, frame)?;
            writes.push(OutputId::MAIN, at, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()?;
        if lock(&self.state).file_offset == 0 {
            // An empty file is no valid compressed file: write an empty frame.
            let (at, frame) = self.frame(&[])?;
            self.output().write_at(&frame, at)?;
        }
        if let Framing::SeekableZstd { .. } = self.framing {
            let state = lock(&self.state);
            let mut at = state.file_offset;
            state.frames.encode(|part| {
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
