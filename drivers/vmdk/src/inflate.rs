//! Reading compressed grains.

use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Cache, Error, Lease, Memory, Remedy, Result};
use libdeflater::{DecompressionError, Decompressor};

use crate::grains::{GrainFile, Place};
use crate::layout::SECTOR_SIZE;
use crate::layout::marker::GRAIN_HEAD;

/// Maximum number of decoded grains kept for reads of less than a grain. Our limit: 4 MiB of the largest.
const MAX_RECENT_GRAINS: u64 = 4;

/// Number of bytes of a grain that are read first: most compressed grains are shorter than their size, which
/// is known only from their head.
const FIRST_READ: u64 = 8 << 10;

/// Memory in bytes of a decoder besides its buffer. Measured with libdeflate 1.26: 11 KiB.
const CONTEXT_BYTES: u64 = 16 << 10;

/// Decoder of the compressed grains of an image, shared by several threads.
pub(crate) struct Inflater {
    /// Size of the largest grain in bytes.
    grain_size: u64,
    idle: Mutex<Vec<Context>>,
    max_idle: usize,
    /// Decoded grains of the latest partial reads, by extent and grain.
    recent: Mutex<Recent>,
    _lease: Lease,
}

/// Decoded grains by extent and grain.
type Recent = Cache<(usize, u64), Arc<Vec<u8>>>;

struct Context {
    codec: Decompressor,
    stored: Vec<u8>,
}

impl Inflater {
    /// Creates a decoder for grains of at most `grain_size` bytes; 0 if the image has no compressed grains.
    pub(crate) fn new(grain_size: u64, depth: usize, memory: &Memory) -> Result<Self> {
        let kept = (memory.cache_share(MAX_RECENT_GRAINS) / (depth as u64 + 1)).max(1);
        let lease = memory.lease(kept * grain_size, "decoded grains")?;
        let max_idle = if depth == 0 && memory.cache_share(2) == 2 { usize::MAX } else { 1 };
        let recent = Mutex::new(Cache::new(kept as usize));
        Ok(Self { grain_size, idle: Mutex::default(), max_idle, recent, _lease: lease })
    }

    /// Returns the memory in bytes of a decoder in use.
    pub(crate) fn context_memory(&self) -> u64 {
        if self.grain_size == 0 { 0 } else { 3 * self.grain_size + CONTEXT_BYTES }
    }

    /// Fills `buf` with the bytes of a grain of extent `extent` from byte `within` on.
    pub(crate) fn read(
        &self,
        file: &GrainFile,
        extent: usize,
        grain: u64,
        buf: &mut [u8],
        within: usize,
    ) -> Result<()> {
        // The size of a grain is at most 1 MiB.
        let grain_size = file.grain_size as usize;
        if within == 0 && buf.len() == grain_size {
            return self.decode(file, grain, buf);
        }
        let known = lock(&self.recent).get(&(extent, grain)).cloned();
        let bytes = match known {
            Some(bytes) => bytes,
            None => {
                let mut bytes = vec![0; grain_size];
                self.decode(file, grain, &mut bytes)?;
                let bytes = Arc::new(bytes);
                lock(&self.recent).insert((extent, grain), Arc::clone(&bytes));
                bytes
            }
        };
        buf.copy_from_slice(&bytes[within..within + buf.len()]);
        Ok(())
    }

    /// Decodes a grain into `bytes`, which are as long as a grain.
    pub(crate) fn decode(&self, file: &GrainFile, grain: u64, bytes: &mut [u8]) -> Result<()> {
        let (place, _) = file.run(grain, 1)?;
        let Place::At(offset) = place else {
            bytes.fill(0);
            return Ok(());
        };
        let idle = lock(&self.idle).pop();
        let mut context = idle.unwrap_or_else(|| Context { codec: Decompressor::new(), stored: Vec::new() });
        let stored = read_stored(file, grain, offset, &mut context.stored)?;
        inflate(&mut context.codec, &context.stored[stored], bytes, file.used_len(grain))
            .map_err(|error| error.at(offset))?;
        let mut idle = lock(&self.idle);
        if idle.len() < self.max_idle {
            idle.push(context);
        }
        Ok(())
    }
}

/// Reads the head and the compressed bytes of a grain into `buf`, checks the head, and returns the range of the
/// compressed bytes.
fn read_stored(
    file: &GrainFile,
    grain: u64,
    offset: u64,
    buf: &mut Vec<u8>,
) -> Result<std::ops::Range<usize>> {
    let crate::grains::Form::Compressed(head) = file.form else {
        return Err(Error::malformed("the grain is not compressed").at(offset));
    };
    let first = FIRST_READ.min(file.input.len().saturating_sub(offset)) as usize;
    buf.clear();
    buf.resize(first.max(head), 0);
    file.input.read_exact_at(buf, offset)?;
    let len = check_head(file, grain, &buf[..head]).map_err(|error| error.at(offset))?;
    let end = head + len as usize;
    if end > first {
        buf.resize(end, 0);
        file.input.read_exact_at(&mut buf[first..], offset + first as u64).map_err(cut)?;
    }
    Ok(head..end)
}

fn cut(error: Error) -> Error {
    error.remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into()))
}

/// Checks the head of a grain and returns its number of compressed bytes.
pub(crate) fn check_head(file: &GrainFile, grain: u64, head: &[u8]) -> Result<u32> {
    let (lba, len) = head.split_at(head.len() - 4);
    let len = len.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let expected = grain * (file.grain_size / SECTOR_SIZE);
    let lba = lba.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
    if head.len() == GRAIN_HEAD && lba != Some(expected) {
        return Err(damaged(format!(
            "the marker of grain {grain} is that of sector {}, not {expected}",
            lba.unwrap_or(0)
        )));
    }
    check_len(len, file.grain_size)?;
    Ok(len)
}

/// Checks the number of compressed bytes of a grain. Grains that do not shrink take a little more than their
/// size; no program writes more than twice as much.
pub(crate) fn check_len(len: u32, grain_size: u64) -> Result<()> {
    if len == 0 || u64::from(len) > 2 * grain_size {
        return Err(damaged(format!(
            "a compressed grain has {len} bytes; the limit is twice its size, {}",
            2 * grain_size
        )));
    }
    Ok(())
}

fn damaged(message: String) -> Error {
    Error::corrupt(message).remedied_by(Remedy::Salvage("copy the file again, or use a backup".into()))
}

/// Inflates a grain into `bytes`, which is as long as a grain. The last grain may be cut at the capacity, of
/// which it has `used` bytes.
pub(crate) fn inflate(codec: &mut Decompressor, stored: &[u8], bytes: &mut [u8], used: u64) -> Result<()> {
    let len = codec.zlib_decompress(stored, bytes).map_err(|error| match error {
        DecompressionError::InsufficientSpace => {
            damaged(format!("a compressed grain decodes to more than its {} bytes", bytes.len()))
        }
        DecompressionError::BadData => damaged("a compressed grain is damaged (deflate)".to_owned()),
    })?;
    if (len as u64) < used {
        return Err(damaged(format!("a compressed grain decodes to {len} bytes of {used}")));
    }
    bytes[len..].fill(0);
    Ok(())
}
