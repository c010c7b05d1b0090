//! Seekable zstd: reads by position from independent frames and a seek table.
//!
//! The first reader of a frame decodes all of it and caches the content for others. Meanwhile, other readers
//! of the frame wait, or decode later frames. Every read verifies the checksums of its frames, except
//! [`ReadAt::read_unverified_at`]: it decodes only the start of a long frame. Indexing a VMA archive reads the
//! headers of its extents this way.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use imgtool_core::sync::lock;
use imgtool_core::{Buffer, BufferPool, Lease, Memory, ReadAt};
use twox_hash::XxHash64;
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

use super::ZSTD_WINDOW_LOG_MAX;
use super::seek_table::{Frame, SeekTable};

/// Maximum plain length of all cached frames in bytes, including frames that are being decoded. Our limit: a
/// quarter of the memory budget of a conversion, or 16 frames of our writer.
const MAX_CACHED: u64 = 64 << 20;

/// Maximum length in bytes of an unverified read that decodes only the start of a frame: the header of a VMA
/// extent, which contains its own checksum.
const HEAD_LEN: usize = 512;

/// Maximum plain length in bytes of a frame that is always decoded whole: two zstd blocks (RFC 8878,
/// 3.1.1.2.4).
const SHORT_FRAME_LEN: u32 = 256 << 10;

/// Maximum number of frames by which a waiting reader decodes ahead. Our limit: the cache fits as many.
const MAX_AHEAD: usize = 16;

/// Number of stored bytes read to decode the start of a frame: in the first step, and in every later one.
const HEAD_STEPS: [usize; 2] = [2 << 10, 64 << 10];

/// A seekable zstd file, read by position.
pub(super) struct SeekableZstd {
    source: Arc<dyn ReadAt>,
    table: SeekTable,
    cache: Mutex<Cache>,
    /// Signalled when a frame has been decoded or has failed.
    changed: Condvar,
    contexts: Mutex<Vec<DCtx<'static>>>,
    plain: BufferPool,
    stored: BufferPool,
}

struct Cache {
    /// Slots by the frame's index in the seek table.
    slots: HashMap<u32, Slot>,
    /// Indexes of decoded frames, least recently used first.
    by_use: VecDeque<u32>,
    /// Plain length of all slots in bytes.
    cached: u64,
    /// Memory for the slots.
    lease: Lease,
}

enum Slot {
    /// A thread is decoding the frame.
    Decoding,
    /// The content of the frame.
    Decoded(Arc<Buffer>),
}

impl SeekableZstd {
    /// Opens `source`. Returns `None` without a valid seek table; the caller then reads a stream, whose
    /// decoder reports any damage.
    pub(super) fn open(source: &Arc<dyn ReadAt>, memory: &Memory) -> Option<Self> {
        let table = SeekTable::read(&**source, memory)?;
        let lease = memory.try_lease(0)?;
        let cache = Cache { slots: HashMap::new(), by_use: VecDeque::new(), cached: 0, lease };
        Some(Self {
            source: Arc::clone(source),
            table,
            cache: Mutex::new(cache),
            changed: Condvar::new(),
            contexts: Mutex::default(),
            plain: BufferPool::new(),
            stored: BufferPool::new(),
        })
    }

    /// Fills `buf` from the content of `frame`, starting `skip` bytes into it. The range must be within the
    /// frame.
    fn read_frame(&self, frame: &Frame, buf: &mut [u8], skip: usize) -> io::Result<()> {
        let content = self.content(frame)?;
        buf.copy_from_slice(&content[skip..skip + buf.len()]);
        Ok(())
    }

    /// Returns the long frame that starts at `position`, if a read of `len` bytes needs only its head.
    fn frame_with_head(&self, len: usize, position: u64) -> Option<Frame> {
        let frame = self.table.find(position)?;
        let is_head = frame.plain_at == position && len <= HEAD_LEN && frame.plain_len > SHORT_FRAME_LEN;
        is_head.then_some(frame)
    }

    /// Returns the content of a frame if it is in the cache.
    fn cached(&self, frame: &Frame) -> Option<Arc<Buffer>> {
        let mut cache = lock(&self.cache);
        let Some(Slot::Decoded(content)) = cache.slots.get(&frame.index) else { return None };
        let content = Arc::clone(content);
        cache.touch(frame.index);
        Some(content)
    }

    /// Returns the content of a frame from the cache, or decodes it.
    fn content(&self, frame: &Frame) -> io::Result<Arc<Buffer>> {
        let mut cache = lock(&self.cache);
        loop {
            match cache.slots.get(&frame.index) {
                Some(Slot::Decoded(content)) => {
                    let content = Arc::clone(content);
                    cache.touch(frame.index);
                    return Ok(content);
                }
                Some(Slot::Decoding) => {
                    // Threads that read neighbouring ranges would all wait for the same frame. Decode a later
                    // one instead.
                    if let Some(next) = self.next_without_slot(&mut cache, frame) {
                        // The reader of that frame will get the error itself.
                        let _ = self.decode_into_cache(cache, &next);
                        cache = lock(&self.cache);
                        continue;
                    }
                }
                None => {
                    if cache.evict_for(u64::from(frame.plain_len)) {
                        return self.decode_into_cache(cache, frame);
                    }
                }
            }
            cache = self.changed.wait(cache).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the first frame after `frame` that has no slot, if it is at most [`MAX_AHEAD`] frames ahead
    /// and fits into the cache.
    fn next_without_slot(&self, cache: &mut Cache, frame: &Frame) -> Option<Frame> {
        let mut next = *frame;
        for _ in 0..MAX_AHEAD {
            next = self.table.find(next.plain_at + u64::from(next.plain_len))?;
            if !cache.slots.contains_key(&next.index) {
                return cache.evict_for(u64::from(next.plain_len)).then_some(next);
            }
        }
        None
    }

    /// Decodes a frame that has no slot yet. The caller has made space for it in the cache.
    fn decode_into_cache(&self, mut cache: MutexGuard<'_, Cache>, frame: &Frame) -> io::Result<Arc<Buffer>> {
        cache.slots.insert(frame.index, Slot::Decoding);
        cache.cached += u64::from(frame.plain_len);
        drop(cache);
        let mut guard = DecodingGuard { owner: self, frame, content: None };
        let mut content = self.plain.take(frame.plain_len as usize);
        self.with_context(|context| self.decode(context, frame, &mut content))?;
        let content = Arc::new(content);
        guard.content = Some(Arc::clone(&content));
        Ok(content)
    }

    /// Decodes a whole frame into `content` and verifies its checksums.
    fn decode(&self, context: &mut DCtx<'static>, frame: &Frame, content: &mut [u8]) -> io::Result<()> {
        let mut stored = self.stored.take(frame.stored_len as usize);
        self.source.read_exact_at(&mut stored, frame.stored_at)?;
        let len =
            context.decompress(content, &stored).map_err(|code| damaged(frame, get_error_name(code)))?;
        if len != content.len() {
            let why = format!("{len} bytes instead of the {} of the seek table", content.len());
            return Err(damaged(frame, &why));
        }
        // Seekable format, "Checksum": the least significant 32 bits of the XXH64 digest.
        let sum = |content: &[u8]| XxHash64::oneshot(0, content) as u32;
        if frame.checksum.is_some_and(|checksum| checksum != sum(content)) {
            return Err(damaged(frame, "its checksum in the seek table does not match"));
        }
        Ok(())
    }

    /// Fills `head` with the start of a frame, without decoding the rest.
    fn decode_head(&self, context: &mut DCtx<'static>, frame: &Frame, head: &mut [u8]) -> io::Result<()> {
        let zstd = |code| damaged(frame, get_error_name(code));
        context.reset(ResetDirective::SessionOnly).map_err(zstd)?;
        let head_len = head.len();
        let mut output = OutBuffer::around(head);
        let mut stored_done = 0;
        let mut steps = HEAD_STEPS.into_iter().chain(std::iter::repeat(HEAD_STEPS[1]));
        while output.pos() < head_len {
            let left = frame.stored_len as usize - stored_done;
            let len = steps.next().unwrap_or(HEAD_STEPS[1]).min(left);
            if len == 0 {
                return Err(damaged(frame, "it ends early"));
            }
            let mut stored = self.stored.take(len);
            self.source.read_exact_at(&mut stored, frame.stored_at + stored_done as u64)?;
            stored_done += len;
            let mut input = InBuffer::around(&stored);
            while input.pos() < len && output.pos() < head_len {
                context.decompress_stream(&mut output, &mut input).map_err(zstd)?;
            }
        }
        Ok(())
    }

    /// Runs `f` with a decoder that no other thread uses. Decoders are reused, except after an error.
    fn with_context<T>(&self, f: impl FnOnce(&mut DCtx<'static>) -> io::Result<T>) -> io::Result<T> {
        let idle = lock(&self.contexts).pop();
        let mut context = match idle {
            Some(context) => context,
            None => {
                let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
                let limit = DParameter::WindowLogMax(ZSTD_WINDOW_LOG_MAX);
                context.set_parameter(limit).map_err(|code| io::Error::other(get_error_name(code)))?;
                context
            }
        };
        let result = f(&mut context);
        if result.is_ok() {
            lock(&self.contexts).push(context);
        }
        result
    }
}

impl ReadAt for SeekableZstd {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let fits = position.checked_add(buf.len() as u64).is_some_and(|end| end <= self.table.plain_len());
        if !fits {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let mut at = position;
        let mut rest = buf;
        while !rest.is_empty() {
            let frame = self.table.find(at).ok_or(io::ErrorKind::UnexpectedEof)?;
            // Lossless: `at` is within the frame.
            let skip = (at - frame.plain_at) as usize;
            let len = rest.len().min(frame.plain_len as usize - skip);
            let (part, tail) = rest.split_at_mut(len);
            self.read_frame(&frame, part, skip)?;
            rest = tail;
            at += len as u64;
        }
        Ok(())
    }

    fn read_unverified_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        match self.frame_with_head(buf.len(), position) {
            Some(frame) => match self.cached(&frame) {
                Some(content) => {
                    buf.copy_from_slice(&content[..buf.len()]);
                    Ok(())
                }
                None => self.with_context(|context| self.decode_head(context, &frame, buf)),
            },
            None => self.read_exact_at(buf, position),
        }
    }

    fn len(&self) -> u64 {
        self.table.plain_len()
    }

    fn granule(&self) -> u64 {
        u64::from(self.table.longest_plain()).max(1)
    }

    fn release(&self) {
        lock(&self.cache).clear();
        lock(&self.contexts).clear();
        self.plain.clear();
        self.stored.clear();
    }
}

impl Cache {
    /// Marks a frame as the most recently used.
    fn touch(&mut self, frame_index: u32) {
        if let Some(position) = self.by_use.iter().position(|known| *known == frame_index) {
            self.by_use.remove(position);
        }
        self.by_use.push_back(frame_index);
    }

    /// Evicts frames until `len` more bytes fit; returns false if frames being decoded fill the cache. An
    /// empty cache accepts a frame of any length.
    fn evict_for(&mut self, len: u64) -> bool {
        while !self.fits(len) && !self.slots.is_empty() {
            let Some(oldest) = self.by_use.pop_front() else { return false };
            if let Some(Slot::Decoded(content)) = self.slots.remove(&oldest) {
                self.cached -= content.len() as u64;
            }
        }
        true
    }

    /// True if `len` more bytes are within the limit, and the ledger lends them.
    fn fits(&mut self, len: u64) -> bool {
        let sum = self.cached.saturating_add(len);
        sum <= MAX_CACHED && self.lease.try_raise(sum)
    }

    /// Evicts all frames that are not being decoded.
    fn clear(&mut self) {
        while let Some(oldest) = self.by_use.pop_front() {
            if let Some(Slot::Decoded(content)) = self.slots.remove(&oldest) {
                self.cached -= content.len() as u64;
            }
        }
        self.lease.lower(self.cached);
    }
}

/// Guard of a frame that this thread is decoding. Its drop stores the content, or removes the slot after an
/// error or a panic, and wakes the waiting readers.
struct DecodingGuard<'a> {
    owner: &'a SeekableZstd,
    frame: &'a Frame,
    content: Option<Arc<Buffer>>,
}

impl Drop for DecodingGuard<'_> {
    fn drop(&mut self) {
        let mut cache = lock(&self.owner.cache);
        let index = self.frame.index;
        match self.content.take() {
            Some(content) => {
                cache.slots.insert(index, Slot::Decoded(content));
                cache.touch(index);
            }
            None => {
                cache.slots.remove(&index);
                cache.cached -= u64::from(self.frame.plain_len);
            }
        }
        drop(cache);
        self.owner.changed.notify_all();
    }
}

fn damaged(frame: &Frame, why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "zstd frame {} at {} of the compressed file is damaged ({why})",
            frame.index, frame.stored_at
        ),
    )
}
