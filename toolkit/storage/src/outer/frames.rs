//! Frames and their compressors: cuts plain bytes into frames (zstd) or members (gzip), and encodes each with
//! a compressor from a pool.

use std::fmt;
use std::sync::{Condvar, Mutex, PoisonError};

use imgtool_core::sync::lock;
use imgtool_core::zero::zero_slices;
use imgtool_core::{BufferPool, Error, Result};
use libdeflater::{CompressionLvl, Compressor};
use zstd::zstd_safe::zstd_sys::ZSTD_EndDirective;
use zstd::zstd_safe::{CCtx, CParameter, InBuffer, OutBuffer, ResetDirective};
use zstd::zstd_safe::{compress_bound, get_error_name};

use super::Compression;

/// Maximum plain length of a frame or member, in bytes. Our choice: longer than a VMA extent with its header
/// (3.7 MiB), so an extent fits into one frame.
pub(super) const FRAME_LEN: usize = 4 << 20;

/// Plain length of the first zstd block of a longer frame, in bytes: the header of a VMA extent. A reader
/// that indexes an archive decodes only this block.
const LEADING_LEN: usize = 512;

/// Number of bytes to add to `compress_bound`, which does not account for the extra block at the start.
const FLUSH_MARGIN: usize = 64;

/// Maximum memory of all compressors, in bytes. Our limit: the more memory a level needs, the fewer
/// compressors run at once.
const CONTEXT_BUDGET: usize = 112 << 20;

/// Outer compression of an output, with its level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// Zstandard frames with a seek table.
    SeekableZstd {
        /// zstd level, -7 to 19.
        level: i32,
    },
    /// gzip members.
    Gzip {
        /// libdeflate level, 1 to 12. Levels 1 to 9 roughly match those of gzip.
        level: i32,
    },
}

impl Framing {
    /// Returns the framing for `compression` at `level`, or at its default level (zstd 3, gzip 6).
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unsupported`] for a compression that the toolkit can only read;
    /// [`imgtool_core::ErrorKind::Usage`] for a level out of range.
    pub fn new(compression: Compression, level: Option<i32>) -> Result<Self> {
        let (framing, levels) = match compression {
            Compression::Zstd => (Self::SeekableZstd { level: level.unwrap_or(3) }, -7..=19),
            Compression::Gzip => (Self::Gzip { level: level.unwrap_or(6) }, 1..=12),
            other => {
                return Err(Error::unsupported(format!("{} is read, but not written", other.name()))
                    .hint("names that end in .zst or .gz are compressed"));
            }
        };
        let (Self::SeekableZstd { level } | Self::Gzip { level }) = framing;
        if levels.contains(&level) {
            return Ok(framing);
        }
        Err(Error::usage(format!(
            "{} has levels from {} to {}, not {level}",
            compression.name(),
            levels.start(),
            levels.end()
        )))
    }
}

/// Plain bytes to compress.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Chunk<'a> {
    Data(&'a [u8]),
    Zero(u64),
}

impl<'a> Chunk<'a> {
    pub(super) fn len(&self) -> u64 {
        match self {
            Chunk::Data(bytes) => bytes.len() as u64,
            Chunk::Zero(len) => *len,
        }
    }

    /// Splits the chunk after `len` bytes, which must not exceed its length.
    pub(super) fn split_at(self, len: usize) -> (Self, Self) {
        match self {
            Chunk::Data(bytes) => {
                let (first, rest) = bytes.split_at(len);
                (Chunk::Data(first), Chunk::Data(rest))
            }
            Chunk::Zero(zeros) => (Chunk::Zero(len as u64), Chunk::Zero(zeros - len as u64)),
        }
    }

    /// Returns the bytes as slices, zeros in slices of at most 64 KiB.
    pub(super) fn slices(self) -> impl Iterator<Item = &'a [u8]> {
        let (data, zeros) = match self {
            Chunk::Data(bytes) => (Some(bytes), 0),
            Chunk::Zero(len) => (None, len),
        };
        data.into_iter().chain(zero_slices(zeros).map(|zeros| -> &[u8] { zeros }))
    }
}

/// Cuts chunks into frames of at most [`FRAME_LEN`] bytes. A single empty chunk gives an empty frame.
pub(super) fn cut_into_frames<'a>(chunks: &[Chunk<'a>]) -> Vec<Vec<Chunk<'a>>> {
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

/// Returns the plain length of a frame in bytes, at most [`FRAME_LEN`].
pub(super) fn frame_len(frame: &[Chunk<'_>]) -> usize {
    frame.iter().map(|chunk| chunk.len() as usize).sum()
}

/// A pool of compressors. Creating one takes a third of the time needed to compress a cluster.
pub(super) struct CompressorPool {
    framing: Framing,
    /// Memory in bytes of one compressor.
    context_bytes: usize,
    /// Maximum number of compressors in use at once.
    max_count: usize,
    state: Mutex<PoolState>,
    /// Signalled when a compressor returns to the pool.
    returned: Condvar,
}

impl fmt::Debug for CompressorPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompressorPool").field("framing", &self.framing).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct PoolState {
    idle: Vec<FrameCompressor>,
    /// Number of compressors created, idle ones included.
    count: usize,
}

enum FrameCompressor {
    Zstd { context: CCtx<'static>, level: i32 },
    Gzip(Compressor),
}

impl CompressorPool {
    pub(super) fn new(framing: Framing) -> Self {
        // Memory in MiB of a compressor for frames of 4 MiB, measured with zstd 1.5.7.
        let context_mib = match framing {
            Framing::SeekableZstd { level } => match level {
                ..=3 => 4,
                4..=6 => 6,
                7..=9 => 14,
                10..=12 => 44,
                13..=14 => 36,
                15 => 68,
                _ => 54,
            },
            Framing::Gzip { level } => {
                // With a copy of the compressed frame.
                if level < 10 { 5 } else { 14 }
            }
        };
        let context_bytes = context_mib << 20;
        let max_count = (CONTEXT_BUDGET / context_bytes).max(1);
        Self { framing, context_bytes, max_count, state: Mutex::default(), returned: Condvar::new() }
    }

    /// Returns the memory in bytes of one compressor.
    pub(super) fn context_bytes(&self) -> u64 {
        self.context_bytes as u64
    }

    /// Frees the idle compressors.
    pub(super) fn clear(&self) {
        let mut state = lock(&self.state);
        state.count -= state.idle.len();
        state.idle.clear();
    }

    /// Takes an idle compressor or creates one. Waits while the maximum number is in use.
    pub(super) fn take(&self) -> PooledCompressor<'_> {
        let mut state = lock(&self.state);
        while state.idle.is_empty() && state.count >= self.max_count {
            state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let idle = state.idle.pop();
        if idle.is_none() {
            state.count += 1;
        }
        drop(state);
        let compressor = idle.unwrap_or_else(|| FrameCompressor::new(self.framing));
        PooledCompressor { pool: self, compressor: Some(compressor) }
    }
}

/// A compressor that returns to its pool when dropped.
pub(super) struct PooledCompressor<'a> {
    pool: &'a CompressorPool,
    /// Always `Some` until the drop.
    compressor: Option<FrameCompressor>,
}

impl Drop for PooledCompressor<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.pool.state);
        state.idle.extend(self.compressor.take());
        drop(state);
        self.pool.returned.notify_one();
    }
}

impl PooledCompressor<'_> {
    /// Returns the maximum stored length in bytes of a frame of `len` plain bytes.
    pub(super) fn bound(&mut self, len: usize) -> usize {
        match &mut self.compressor {
            Some(FrameCompressor::Gzip(compressor)) => compressor.gzip_compress_bound(len),
            _ => compress_bound(len) + FLUSH_MARGIN,
        }
    }

    /// Compresses a frame into the start of `target` and returns its stored length in bytes.
    pub(super) fn encode(
        &mut self,
        frame: &[Chunk<'_>],
        target: &mut [u8],
        buffers: &BufferPool,
    ) -> Result<usize> {
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
    fn new(framing: Framing) -> Self {
        match framing {
            Framing::SeekableZstd { level } => Self::Zstd { context: CCtx::create(), level },
            Framing::Gzip { level } => {
                Self::Gzip(Compressor::new(CompressionLvl::new(level).unwrap_or_default()))
            }
        }
    }
}

/// Compresses one zstd frame, with its content size in the header and a checksum at its end. Returns its
/// stored length in bytes, or zstd's error code.
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
                // Unreachable, since `target` has the worst-case length, but the loop must end. zstd returns
                // ZSTD_error_dstSize_tooSmall (70) as -70.
                return Err(0usize.wrapping_sub(70));
            }
        }
    };
    let mut leading = LEADING_LEN;
    for slice in frame.iter().flat_map(|chunk| chunk.slices()) {
        let (first, rest) = slice.split_at(leading.min(slice.len()));
        leading -= first.len();
        // A frame of at most LEADING_LEN bytes needs no second block.
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
    fn rejects_levels_out_of_range() {
        assert_eq!(Framing::new(Compression::Zstd, None).ok(), Some(Framing::SeekableZstd { level: 3 }));
        assert_eq!(Framing::new(Compression::Gzip, Some(9)).ok(), Some(Framing::Gzip { level: 9 }));
        for (compression, level) in [(Compression::Zstd, 20), (Compression::Zstd, -8), (Compression::Gzip, 0)]
        {
            let error = Framing::new(compression, Some(level)).expect_err("no such level");
            assert_eq!(error.kind(), imgtool_core::ErrorKind::Usage);
        }
        let error = Framing::new(Compression::Xz, None).expect_err("xz is not written");
        assert_eq!(error.kind(), imgtool_core::ErrorKind::Unsupported);
    }
}
