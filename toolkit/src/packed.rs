//! Outer compression writer: outputs compressed as a whole (`.vma.zst`, `.raw.gz`) by all workers.
//!
//! [`PackedSink`] wraps a sink that only appends to its file ([`ImageSink::append_only`]). Each prepared
//! piece becomes frames (zstd) or members (gzip) of its own, so workers compress independently and the
//! result does not depend on their number. A zstd file ends with a seek table, for later reads by
//! position; other zstd programs skip it. Any program that reads several frames or members reads the
//! whole file.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use libdeflater::{CompressionLvl, Compressor};
use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, ResetDirective};
use zstd::zstd_safe::{compress_bound, get_error_name, get_frame_content_size};

use crate::buffer::{Buffer, BufferPool};
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::sink::{Bytes, Geometry, ImageSink, Part, Prepared, WriteList};
use crate::source::Piece;
use crate::storage::outer::seek_table;
use crate::storage::{Compression, Output};

/// Most plain bytes in a frame or member. Our choice: more than a VMA extent with its header (3.7 MiB),
/// so that an extent is one frame.
const FRAME_LEN: usize = 4 << 20;

/// Bytes of a piece for sinks that prefer smaller ones (raw): shorter frames compress worse, and each
/// takes an entry in the seek table.
const PIECE_LEN: u64 = 2 << 20;

/// Longest piece of zeros, bytes. Our limit: 256 frames, about 40 KiB of zstd or 1 MiB of gzip.
const MAX_ZERO_LEN: u64 = 1 << 30;

/// Bytes at the start of a zstd frame that get a block of their own: the header of a VMA extent. A
/// reader that indexes an archive decodes only this block.
const LEADING_LEN: usize = 512;

/// Bytes beyond `compress_bound`, which does not count the extra block at the start.
const FLUSH_MARGIN: usize = 64;

/// Bytes of memory for compressors. Our limit; at levels that need more, fewer compressors run at once.
const CONTEXT_BUDGET: usize = 112 << 20;

/// Input for compressing runs of zeros.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// Outer compression of an output, with its level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Zstandard frames with a seek table.
    SeekableZstd {
        /// Level of zstd, -7 to 19.
        level: i32,
    },
    /// gzip members.
    Gzip {
        /// Level of libdeflate, 1 to 12; 1 to 9 match gzip's roughly.
        level: i32,
    },
}

impl Packing {
    /// Returns the packing for `compression` at `level`, or at its default level (zstd 3, gzip 6).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a compression that we only read;
    /// [`crate::ErrorKind::Usage`] for a level out of range.
    pub fn new(compression: Compression, level: Option<i32>) -> Result<Self> {
        let (packing, levels) = match compression {
            Compression::Zstd => (Self::SeekableZstd { level: level.unwrap_or(3) }, -7..=19),
            Compression::Gzip => (Self::Gzip { level: level.unwrap_or(6) }, 1..=12),
            other => {
                return Err(Error::unsupported(format!("{} is read, but not written", other.name()))
                    .hint("names that end in .zst or .gz are compressed"));
            }
        };
        let (Self::SeekableZstd { level } | Self::Gzip { level }) = packing;
        if levels.contains(&level) {
            return Ok(packing);
        }
        Err(Error::usage(format!(
            "{} has levels from {} to {}, not {level}",
            compression.name(),
            levels.start(),
            levels.end()
        )))
    }
}

/// A sink that compresses the output of another, append-only sink.
pub struct PackedSink {
    inner: Box<dyn ImageSink>,
    output: Output,
    packing: Packing,
    compressors: CompressorPool,
    pool: BufferPool,
    /// A compressed frame of [`FRAME_LEN`] zeros.
    zero_frame: OnceLock<Vec<u8>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// File offset of the next frame.
    file_offset: u64,
    /// Stored and plain length of every frame so far, for the seek table.
    frames: Vec<[u32; 2]>,
}

impl PackedSink {
    /// Returns the output for the inner sink: a stream that discards all bytes, named `path`.
    pub fn inner_output(path: &Path) -> Output {
        Output::from_writer(path, Box::new(io::sink()))
    }

    /// Wraps `inner`, which was created over [`PackedSink::inner_output`], and writes to `output`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if `inner` is not append-only;
    /// [`crate::ErrorKind::Refused`] if `output` is an existing target of fixed length.
    pub fn new(inner: Box<dyn ImageSink>, output: Output, packing: Packing) -> Result<Self> {
        if !inner.append_only() {
            return Err(Error::unsupported("this format can't be compressed as a whole while it is written")
                .path(output.path())
                .hint("use compression inside the format (-c), or compress the finished file"));
        }
        if output.capacity().is_some() {
            return Err(Error::refused("a compressed image goes to a new file or a pipe").path(output.path()));
        }
        let compressors = CompressorPool::new(packing);
        Ok(Self {
            inner,
            output,
            packing,
            compressors,
            pool: BufferPool::new(),
            zero_frame: OnceLock::new(),
            state: Mutex::default(),
        })
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

    /// Adds a frame to the file and the seek table; returns its file offset.
    fn append(&self, state: &mut State, frame: &[u8]) -> Result<u64> {
        let at = state.file_offset;
        state.file_offset += frame.len() as u64;
        if let Packing::SeekableZstd { .. } = self.packing {
            // `encode_zstd` puts the content size into the header; both lengths fit 32 bits, since
            // a frame holds at most FRAME_LEN bytes.
            let plain = get_frame_content_size(frame).ok().flatten().and_then(|len| u32::try_from(len).ok());
            let (Some(plain), Ok(stored)) = (plain, u32::try_from(frame.len())) else {
                return Err(Error::limit("a compressed frame does not fit the seek table").at(at));
            };
            state.frames.push([stored, plain]);
        }
        Ok(at)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Compresses and writes bytes outside of a piece.
    fn write_now(&self, bytes: &[u8]) -> Result<()> {
        let (packed, ranges) = self.pack(&[Chunk::Data(bytes)])?;
        let mut state = self.state();
        for range in ranges {
            let at = self.append(&mut state, &packed[range.clone()])?;
            self.output.write_at(&packed[range], at)?;
        }
        Ok(())
    }
}

impl ImageSink for PackedSink {
    fn geometry(&self, device: DeviceId) -> Geometry {
        let inner = self.inner.geometry(device);
        let unit = inner.piece_len.max(1);
        let piece_len = unit * (PIECE_LEN / unit).max(1);
        Geometry {
            // Where the format takes any granule, whole pieces make better frames.
            granule: if inner.granule_required { inner.granule } else { piece_len },
            piece_len,
            max_zero_len: inner.max_zero_len.min((MAX_ZERO_LEN / piece_len).max(1) * piece_len),
            ordered: true,
            ..inner
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.output
    }

    fn begin(&self) -> Result<()> {
        self.inner.begin()?;
        let preamble = self.inner.preamble()?;
        if preamble.is_empty() { Ok(()) } else { self.write_now(&preamble) }
    }

    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        let mut prepared = self.inner.prepare(piece, pool)?;
        let chunks: Vec<Chunk<'_>> = prepared
            .parts
            .iter()
            .filter(|part| !part.bytes.is_empty())
            .map(|part| prepared.bytes(&part.bytes).map_or(Chunk::Zero(part.bytes.len()), Chunk::Data))
            .collect();
        let (packed, ranges) = self.pack(&chunks)?;
        // The inner sink's `place` needs its parts, but only their lengths. The frames follow them and
        // stand for no guest bytes.
        for part in &mut prepared.parts {
            if !matches!(part.bytes, Bytes::Zero(_)) {
                // In memory, so its length is a usize.
                part.bytes = Bytes::Data(0..part.bytes.len() as usize);
            }
        }
        let end = prepared.start + prepared.len;
        prepared
            .parts
            .extend(ranges.into_iter().map(|range| Part { guest: end..end, bytes: Bytes::Encoded(range) }));
        prepared.data = None;
        prepared.encoded = Some(packed);
        Ok(prepared)
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
            taken: prepared.taken,
        };
        self.inner.place(&plain, &mut WriteList::default())?;
        let mut state = self.state();
        for part in prepared.parts.iter().filter(is_frame) {
            let Some(frame) = prepared.bytes(&part.bytes) else { continue };
            let at = self.append(&mut state, frame)?;
            writes.push(at, part.bytes.clone());
        }
        Ok(())
    }

    fn resize(&self, device: DeviceId, size: u64) -> Result<()> {
        self.inner.resize(device, size)
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()?;
        if self.state().file_offset == 0 {
            // An empty file is no valid compressed file: write an empty frame.
            self.write_now(&[])?;
        }
        if let Packing::SeekableZstd { .. } = self.packing {
            let state = self.state();
            let table =
                seek_table::encode(&state.frames).map_err(|e| Error::io("encode the seek table", e))?;
            self.output.write_at(&table, state.file_offset)?;
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}

/// Plain bytes to compress.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Chunk<'a> {
    Data(&'a [u8]),
    Zero(u64),
}

impl<'a> Chunk<'a> {
    fn len(&self) -> u64 {
        match self {
            Chunk::Data(bytes) => bytes.len() as u64,
            Chunk::Zero(len) => *len,
        }
    }

    /// Splits off the first `len` bytes; there are at least as many.
    fn split_at(self, len: usize) -> (Self, Self) {
        match self {
            Chunk::Data(bytes) => {
                let (first, rest) = bytes.split_at(len);
                (Chunk::Data(first), Chunk::Data(rest))
            }
            Chunk::Zero(zeros) => (Chunk::Zero(len as u64), Chunk::Zero(zeros - len as u64)),
        }
    }

    /// Returns the bytes as slices; zeros in slices of at most 64 KiB.
    fn slices(self) -> impl Iterator<Item = &'a [u8]> {
        let (data, mut zeros) = match self {
            Chunk::Data(bytes) => (Some(bytes), 0),
            Chunk::Zero(len) => (None, len),
        };
        data.into_iter().chain(std::iter::from_fn(move || {
            let len = usize::try_from(zeros).unwrap_or(usize::MAX).min(ZEROS.len());
            zeros -= len as u64;
            (len > 0).then(|| &ZEROS[..len])
        }))
    }
}

/// Cuts chunks into frames of at most [`FRAME_LEN`] bytes. An empty chunk gives an empty frame.
fn cut_into_frames<'a>(chunks: &[Chunk<'a>]) -> Vec<Vec<Chunk<'a>>> {
    let mut frames: Vec<Vec<Chunk<'a>>> = Vec::new();
    let mut space = 0;
    for chunk in chunks {
        let mut rest = *chunk;
        loop {
            if space == 0 {
                frames.push(Vec::new());
                space = FRAME_LEN;
            }
            let len = usize::try_from(rest.len()).unwrap_or(usize::MAX).min(space);
            let (first, tail) = rest.split_at(len);
            if let Some(frame) = frames.last_mut() {
                frame.push(first);
            }
            space -= len;
            rest = tail;
            if rest.len() == 0 {
                break;
            }
        }
    }
    frames
}

/// True if a frame has the full length and holds only zeros.
fn is_full_zero_frame(frame: &[Chunk<'_>]) -> bool {
    frame_len(frame) == FRAME_LEN && frame.iter().all(|chunk| matches!(chunk, Chunk::Zero(_)))
}

/// Returns the plain bytes of a frame, at most [`FRAME_LEN`].
fn frame_len(frame: &[Chunk<'_>]) -> usize {
    frame.iter().map(|chunk| chunk.len() as usize).sum()
}

/// A pool of compressors: creating one takes a third of the time of compressing a cluster.
struct CompressorPool {
    packing: Packing,
    /// Most compressors at once.
    max_count: usize,
    state: Mutex<PoolState>,
    /// Signalled when a compressor comes back.
    returned: Condvar,
}

#[derive(Default)]
struct PoolState {
    idle: Vec<FrameCompressor>,
    /// Compressors created, idle ones included.
    count: usize,
}

enum FrameCompressor {
    Zstd { context: CCtx<'static>, level: i32 },
    Gzip(Compressor),
}

impl CompressorPool {
    fn new(packing: Packing) -> Self {
        // Memory of a compressor for frames of 4 MiB, in MiB; measured with zstd 1.5.7.
        let context_mib = match packing {
            Packing::SeekableZstd { level } => match level {
                ..=3 => 4,
                4..=6 => 6,
                7..=9 => 14,
                10..=12 => 44,
                13..=14 => 36,
                15 => 68,
                _ => 54,
            },
            Packing::Gzip { level } => {
                if level < 10 {
                    1
                } else {
                    10
                }
            }
        };
        let max_count = (CONTEXT_BUDGET / (context_mib << 20)).max(1);
        Self { packing, max_count, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Takes an idle compressor or creates one; waits if all are in use.
    fn take(&self) -> PooledCompressor<'_> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.idle.is_empty() && state.count >= self.max_count {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let idle = state.idle.pop();
        if idle.is_none() {
            state.count += 1;
        }
        drop(state);
        let compressor = idle.unwrap_or_else(|| FrameCompressor::new(self.packing));
        PooledCompressor { pool: self, compressor: Some(compressor) }
    }
}

/// A compressor that returns to its pool when dropped.
struct PooledCompressor<'a> {
    pool: &'a CompressorPool,
    /// Always set; only the drop takes it.
    compressor: Option<FrameCompressor>,
}

impl Drop for PooledCompressor<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.idle.extend(self.compressor.take());
        drop(state);
        self.pool.returned.notify_one();
    }
}

impl PooledCompressor<'_> {
    /// Returns the most bytes that a frame of `len` plain bytes can take.
    fn bound(&mut self, len: usize) -> usize {
        match &mut self.compressor {
            Some(FrameCompressor::Gzip(compressor)) => compressor.gzip_compress_bound(len),
            _ => compress_bound(len) + FLUSH_MARGIN,
        }
    }

    /// Compresses a frame to the start of `target`; returns its stored length.
    fn encode(&mut self, frame: &[Chunk<'_>], target: &mut [u8], buffers: &BufferPool) -> Result<usize> {
        let failed = |why: String| Error::limit(format!("can't compress: {why}"));
        match &mut self.compressor {
            Some(FrameCompressor::Zstd { context, level }) => encode_zstd(context, *level, frame, target)
                .map_err(|code| failed(get_error_name(code).to_owned())),
            Some(FrameCompressor::Gzip(compressor)) => {
                let mut plain = buffers.take(frame_len(frame));
                let mut end = 0;
                for slice in frame.iter().flat_map(|chunk| chunk.slices()) {
                    plain[end..end + slice.len()].copy_from_slice(slice);
                    end += slice.len();
                }
                compressor.gzip_compress(&plain, target).map_err(|e| failed(e.to_string()))
            }
            None => Err(failed("the compressor is back in its pool".to_owned())),
        }
    }
}

impl FrameCompressor {
    fn new(packing: Packing) -> Self {
        match packing {
            Packing::SeekableZstd { level } => Self::Zstd { context: CCtx::create(), level },
            Packing::Gzip { level } => {
                Self::Gzip(Compressor::new(CompressionLvl::new(level).unwrap_or_default()))
            }
        }
    }
}

/// Compresses one zstd frame, with its content size in the header and a checksum at its end.
fn encode_zstd(
    context: &mut CCtx<'static>,
    level: i32,
    frame: &[Chunk<'_>],
    target: &mut [u8],
) -> std::result::Result<usize, usize> {
    use ZSTD_EndDirective::{ZSTD_e_continue, ZSTD_e_end, ZSTD_e_flush};
    context.reset(ResetDirective::SessionOnly)?;
    context.set_parameter(CParameter::CompressionLevel(level))?;
    context.set_parameter(CParameter::ChecksumFlag(true))?;
    let plain_len = frame_len(frame);
    context.set_pledged_src_size(Some(plain_len as u64))?;
    let mut output = OutBuffer::around(target);
    let mut feed = |bytes: &[u8], directive| {
        let mut input = InBuffer::around(bytes);
        loop {
            let left = context.compress_stream2(&mut output, &mut input, directive)?;
            let is_done = input.pos() == bytes.len() && (left == 0 || directive == ZSTD_e_continue);
            if is_done {
                return Ok(());
            }
            if output.pos() == output.capacity() {
                // Not possible, since `target` has the worst-case length; but the loop must end. zstd
                // returns ZSTD_error_dstSize_tooSmall (70) as -70.
                return Err(0usize.wrapping_sub(70));
            }
        }
    };
    let mut leading = LEADING_LEN;
    for slice in frame.iter().flat_map(|chunk| chunk.slices()) {
        let (first, rest) = slice.split_at(leading.min(slice.len()));
        leading -= first.len();
        // A frame that is no longer than this needs no second block.
        let ends_leading = leading == 0 && !first.is_empty() && plain_len > LEADING_LEN;
        feed(first, if ends_leading { ZSTD_e_flush } else { ZSTD_e_continue })?;
        feed(rest, ZSTD_e_continue)?;
    }
    feed(&[], ZSTD_e_end)?;
    Ok(output.pos())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuts_frames_at_their_maximum_length() {
        let data = vec![1; 100];
        let lens = |chunks: &[Chunk<'_>]| {
            cut_into_frames(chunks).iter().map(|frame| frame_len(frame)).collect::<Vec<_>>()
        };
        let long = FRAME_LEN as u64;
        assert_eq!(lens(&[]), [0; 0]);
        assert_eq!(lens(&[Chunk::Data(&[])]), [0]);
        assert_eq!(lens(&[Chunk::Data(&data), Chunk::Data(&data)]), [200]);
        assert_eq!(lens(&[Chunk::Zero(long)]), [FRAME_LEN]);
        assert_eq!(lens(&[Chunk::Data(&data), Chunk::Zero(2 * long)]), [FRAME_LEN, FRAME_LEN, 100]);
        assert_eq!(lens(&[Chunk::Zero(long - 1), Chunk::Data(&data)]), [FRAME_LEN, 99]);
    }

    #[test]
    fn refuses_levels_out_of_range() {
        assert_eq!(Packing::new(Compression::Zstd, None).ok(), Some(Packing::SeekableZstd { level: 3 }));
        assert_eq!(Packing::new(Compression::Gzip, Some(9)).ok(), Some(Packing::Gzip { level: 9 }));
        for (compression, level) in [(Compression::Zstd, 20), (Compression::Zstd, -8), (Compression::Gzip, 0)]
        {
            let error = Packing::new(compression, Some(level)).expect_err("no such level");
            assert_eq!(error.kind(), crate::ErrorKind::Usage);
        }
        let error = Packing::new(Compression::Xz, None).expect_err("xz is not written");
        assert_eq!(error.kind(), crate::ErrorKind::Unsupported);
    }
}
