//! Outputs compressed as a whole (`.vma.zst`, `.raw.gz`), by all workers at once.
//!
//! [`PackedSink`] goes around a sink whose file is nothing but its parts one after the other
//! ([`ImageSink::append_only`]). Every prepared piece becomes frames (zstd) or members (gzip) of its
//! own, so that workers compress independently and the result does not depend on their number. The
//! zstd file ends with a seek table: it is read by position later, and every other zstd program
//! skips the table. Any program that reads several frames or members reads the whole.

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

/// Plain bytes in one frame or member at most. Ours: above an extent of VMA with its header, so that
/// an extent is a frame.
const FRAME_LEN: usize = 4 << 20;

/// Pieces of sinks that like them small (raw) are asked for in this length: shorter frames compress
/// worse, and each costs an entry in the seek table.
const PIECE_LEN: u64 = 2 << 20;

/// Longest piece of zeros, bytes. Ours: 256 frames, some 40 KiB of zstd, 1 MiB of gzip.
const MAX_ZERO_LEN: u64 = 1 << 30;

/// The first bytes of a zstd frame are a block of their own: who indexes an archive of VMA extents
/// (whose header this is) decodes no more than that.
const LEADING_LEN: usize = 512;

/// Room for what `compress_bound` does not count: the leading block ends early.
const FLUSH_MARGIN: usize = 64;

/// Memory for compressors. Fewer work at once where a level needs more.
const CONTEXT_BUDGET: usize = 112 << 20;

/// Zeros for the compressors.
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// How a whole output is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Zstandard frames with a seek table, levels -7 to 19.
    SeekableZstd {
        /// zstd's own level.
        level: i32,
    },
    /// Members of gzip, levels 1 to 12 (those of libdeflate; 1 to 9 are about gzip's).
    Gzip {
        /// libdeflate's level.
        level: i32,
    },
}

impl Packing {
    /// The packing for an outer compression, at a level or at its usual one (zstd 3, gzip 6).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a compression that is only read;
    /// [`crate::ErrorKind::Usage`] for a level that it does not have.
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

/// Compresses the output of an append-only sink.
pub struct PackedSink {
    inner: Box<dyn ImageSink>,
    output: Output,
    packing: Packing,
    coders: Coders,
    pool: BufferPool,
    zero_frame: OnceLock<Vec<u8>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Where the next frame goes.
    file_offset: u64,
    /// Stored and plain length of every frame, for the seek table.
    frames: Vec<[u32; 2]>,
}

impl PackedSink {
    /// Where a sink writes that is to be packed: nowhere. Drivers see a stream.
    pub fn inner_output(path: &Path) -> Output {
        Output::from_writer(path, Box::new(io::sink()))
    }

    /// Packs what `inner` makes into `output`. `inner` was created over
    /// [`PackedSink::inner_output`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] when the sink is not append-only;
    /// [`crate::ErrorKind::Refused`] when the target keeps its length.
    pub fn new(inner: Box<dyn ImageSink>, output: Output, packing: Packing) -> Result<Self> {
        if !inner.append_only() {
            return Err(Error::unsupported("this format can't be compressed as a whole while it is written")
                .path(output.path())
                .hint("use compression inside the format (-c), or compress the finished file"));
        }
        if output.capacity().is_some() {
            return Err(Error::refused("a compressed image goes to a new file or a pipe").path(output.path()));
        }
        let coders = Coders::new(packing);
        Ok(Self {
            inner,
            output,
            packing,
            coders,
            pool: BufferPool::new(),
            zero_frame: OnceLock::new(),
            state: Mutex::default(),
        })
    }

    /// Compresses `chunks` one after the other into frames.
    fn pack(&self, chunks: &[Chunk<'_>]) -> Result<(Buffer, Vec<Range<usize>>)> {
        let frames = split(chunks);
        let mut coder = self.coders.take();
        let zeros = match frames.iter().any(|frame| is_whole_zero(frame)) {
            true => self.zero_frame(&mut coder)?,
            false => &[],
        };
        let room = |frame: &Vec<Chunk<'_>>| {
            if is_whole_zero(frame) { zeros.len() } else { coder.bound(frame_len(frame)) }
        };
        let room = frames.iter().map(room).sum();
        let mut packed = self.pool.take(room);
        let mut ranges = Vec::with_capacity(frames.len());
        let mut end = 0;
        for frame in &frames {
            let target = &mut packed[end..];
            let len = if is_whole_zero(frame) {
                target[..zeros.len()].copy_from_slice(zeros);
                zeros.len()
            } else {
                coder.encode(frame, target, &self.pool)?
            };
            ranges.push(end..end + len);
            end += len;
        }
        drop(coder);
        packed.truncate(end);
        Ok((packed, ranges))
    }

    /// A frame of [`FRAME_LEN`] zeros, made once: long runs of zeros are copies of it.
    fn zero_frame(&self, coder: &mut Borrowed<'_>) -> Result<&[u8]> {
        if let Some(known) = self.zero_frame.get() {
            return Ok(known);
        }
        let mut frame = self.pool.take(coder.bound(FRAME_LEN));
        let len = coder.encode(&[Chunk::Zero(FRAME_LEN as u64)], &mut frame, &self.pool)?;
        Ok(self.zero_frame.get_or_init(|| frame[..len].to_vec()))
    }

    /// Notes a frame and says where it lands.
    fn append(&self, state: &mut State, frame: &[u8]) -> Result<u64> {
        let at = state.file_offset;
        state.file_offset += frame.len() as u64;
        if let Packing::SeekableZstd { .. } = self.packing {
            // Ours, so the size is in its header, and both lengths are about FRAME_LEN at most.
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

    /// Compresses and writes bytes that are no piece.
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
            // Streams are gathered into whole pieces where the format does not care.
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
        // The inner sink's parts stay for its `place`, which looks at lengths only; the frames go
        // behind them, standing for no guest bytes of their own.
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
            // No bytes at all are a frame too: an empty file is no compressed file.
            self.write_now(&[])?;
        }
        if let Packing::SeekableZstd { .. } = self.packing {
            let state = self.state();
            let table = seek_table::encode(&state.frames).map_err(|e| Error::io("make the seek table", e))?;
            self.output.write_at(&table, state.file_offset)?;
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}

/// Plain bytes to be compressed.
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

    /// The first `len` bytes, which there are, and the rest.
    fn split_at(self, len: usize) -> (Self, Self) {
        match self {
            Chunk::Data(bytes) => {
                let (first, rest) = bytes.split_at(len);
                (Chunk::Data(first), Chunk::Data(rest))
            }
            Chunk::Zero(zeros) => (Chunk::Zero(len as u64), Chunk::Zero(zeros - len as u64)),
        }
    }

    /// As slices of at most 64 KiB where zeros are concerned.
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

/// Cuts chunks into frames of at most [`FRAME_LEN`]; one empty chunk is one empty frame.
fn split<'a>(chunks: &[Chunk<'a>]) -> Vec<Vec<Chunk<'a>>> {
    let mut frames: Vec<Vec<Chunk<'a>>> = Vec::new();
    let mut room = 0;
    for chunk in chunks {
        let mut rest = *chunk;
        loop {
            if room == 0 {
                frames.push(Vec::new());
                room = FRAME_LEN;
            }
            let len = usize::try_from(rest.len()).unwrap_or(usize::MAX).min(room);
            let (first, tail) = rest.split_at(len);
            if let Some(frame) = frames.last_mut() {
                frame.push(first);
            }
            room -= len;
            rest = tail;
            if rest.len() == 0 {
                break;
            }
        }
    }
    frames
}

/// Whether a frame is as long as can be and all zero.
fn is_whole_zero(frame: &[Chunk<'_>]) -> bool {
    frame_len(frame) == FRAME_LEN && frame.iter().all(|chunk| matches!(chunk, Chunk::Zero(_)))
}

/// Plain bytes of a frame, [`FRAME_LEN`] at most.
fn frame_len(frame: &[Chunk<'_>]) -> usize {
    frame.iter().map(|chunk| chunk.len() as usize).sum()
}

/// Compressors, used again: making one costs a third of the time of compressing a cluster.
struct Coders {
    packing: Packing,
    most: usize,
    state: Mutex<CodersState>,
    returned: Condvar,
}

#[derive(Default)]
struct CodersState {
    free: Vec<Coder>,
    made: usize,
}

enum Coder {
    Zstd { context: CCtx<'static>, level: i32 },
    Gzip(Compressor),
}

impl Coders {
    fn new(packing: Packing) -> Self {
        // What a context of zstd occupies for frames of 4 MiB, MiB, measured with 1.5.7.
        let size = match packing {
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
        let most = (CONTEXT_BUDGET / (size << 20)).max(1);
        Self { packing, most, state: Mutex::default(), returned: Condvar::new() }
    }

    /// A compressor for this thread alone; waits for one when there may be no more.
    fn take(&self) -> Borrowed<'_> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.free.is_empty() && state.made >= self.most {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let coder = state.free.pop();
        if coder.is_none() {
            state.made += 1;
        }
        drop(state);
        Borrowed { home: self, coder: Some(coder.unwrap_or_else(|| Coder::new(self.packing))) }
    }
}

/// A compressor that goes back when dropped.
struct Borrowed<'a> {
    home: &'a Coders,
    coder: Option<Coder>,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let mut state = self.home.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.free.extend(self.coder.take());
        drop(state);
        self.home.returned.notify_one();
    }
}

impl Borrowed<'_> {
    fn bound(&mut self, len: usize) -> usize {
        match &mut self.coder {
            Some(Coder::Gzip(compressor)) => compressor.gzip_compress_bound(len),
            _ => compress_bound(len) + FLUSH_MARGIN,
        }
    }

    /// Compresses a frame to the start of `target`; its length there.
    fn encode(&mut self, frame: &[Chunk<'_>], target: &mut [u8], pool: &BufferPool) -> Result<usize> {
        let failed = |why: String| Error::limit(format!("can't compress: {why}"));
        match &mut self.coder {
            Some(Coder::Zstd { context, level }) => encode_zstd(context, *level, frame, target)
                .map_err(|code| failed(get_error_name(code).to_owned())),
            Some(Coder::Gzip(compressor)) => {
                let mut plain = pool.take(frame_len(frame));
                let mut end = 0;
                for slice in frame.iter().flat_map(|chunk| chunk.slices()) {
                    plain[end..end + slice.len()].copy_from_slice(slice);
                    end += slice.len();
                }
                compressor.gzip_compress(&plain, target).map_err(|e| failed(e.to_string()))
            }
            None => Err(failed("the compressor was given back".to_owned())),
        }
    }
}

impl Coder {
    fn new(packing: Packing) -> Self {
        match packing {
            Packing::SeekableZstd { level } => Self::Zstd { context: CCtx::create(), level },
            Packing::Gzip { level } => {
                Self::Gzip(Compressor::new(CompressionLvl::new(level).unwrap_or_default()))
            }
        }
    }
}

/// Makes one zstd frame, its plain length in the header, a checksum at its end.
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
                // Room for the worst case was there: this can't be, but must not go on forever.
                return Err(usize::MAX - 70);
            }
        }
    };
    let mut leading = LEADING_LEN;
    for slice in frame.iter().flat_map(|chunk| chunk.slices()) {
        let (first, rest) = slice.split_at(leading.min(slice.len()));
        leading -= first.len();
        // Nothing would follow the leading block of a frame that is no longer.
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
    fn frames_are_cut_at_their_length() {
        let data = vec![1; 100];
        let lens =
            |chunks: &[Chunk<'_>]| split(chunks).iter().map(|frame| frame_len(frame)).collect::<Vec<_>>();
        let long = FRAME_LEN as u64;
        assert_eq!(lens(&[]), [0; 0]);
        assert_eq!(lens(&[Chunk::Data(&[])]), [0]);
        assert_eq!(lens(&[Chunk::Data(&data), Chunk::Data(&data)]), [200]);
        assert_eq!(lens(&[Chunk::Zero(long)]), [FRAME_LEN]);
        assert_eq!(lens(&[Chunk::Data(&data), Chunk::Zero(2 * long)]), [FRAME_LEN, FRAME_LEN, 100]);
        assert_eq!(lens(&[Chunk::Zero(long - 1), Chunk::Data(&data)]), [FRAME_LEN, 99]);
    }

    #[test]
    fn levels_are_checked() {
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
