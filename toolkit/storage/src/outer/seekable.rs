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

use super::seek_table::{Frame, MAX_FRAME_LEN, SeekTable};

/// Maximum memory in bytes of all slots and decoders. Our limit: a quarter of the memory budget of a conversion,
/// or seven frames of our writer that are decoded at once. It suffices for a slot and a decoder of the longest
/// frames.
const MAX_CACHED: u64 = 64 << 20;

/// Maximum number of slots. Our limit: a search for the least recently used one walks over all of them.
const MAX_SLOTS: usize = 1024;

/// Memory in bytes that a slot takes beside its content: the alignment of the buffer and a map entry.
const SLOT_OVERHEAD: u64 = 8 << 10;

/// Memory in bytes that a decoder takes beside the stored bytes of a frame. Measured: 160 KiB, and about as
/// much again after it has decoded the start of a frame.
const DECODER_OVERHEAD: u64 = 512 << 10;

/// Maximum length in bytes of an unverified read that decodes only the start of a frame: the header of a VMA
/// extent, which contains its own checksum.
const HEAD_LEN: usize = 512;

/// Maximum plain length in bytes of a frame that is always decoded whole: two zstd blocks (RFC 8878,
/// 3.1.1.2.4).
const SHORT_FRAME_LEN: u32 = 256 << 10;

/// Maximum number of frames by which a waiting reader decodes ahead. Our limit: the cache fits as many of our
/// writer.
const MAX_AHEAD: usize = 16;

/// Number of stored bytes read to decode the start of a frame: in the first step, and in every later one.
const HEAD_STEPS: [usize; 2] = [2 << 10, 64 << 10];

/// A seekable zstd file, read by position.
pub(super) struct SeekableZstd {
    source: Arc<dyn ReadAt>,
    table: SeekTable,
    cache: Mutex<Cache>,
    /// Signalled when a frame has been decoded or has failed, and when a decoder or a content is not in use
    /// any more.
    changed: Condvar,
    /// Buffers for the content of frames, all of the length of the longest frame.
    plain: BufferPool,
}

/// Cached frames and idle decoders.
struct Cache {
    /// Slots by the frame's index in the seek table.
    slots: HashMap<u32, Slot>,
    /// Indexes of decoded frames, least recently used first.
    by_use: VecDeque<u32>,
    /// Decoders that no thread uses.
    idle: Vec<Decoder>,
    /// Number of all decoders.
    decoders: usize,
    /// Memory of a slot in bytes. Slots have room for the longest frame, so that any of them can take the
    /// buffer of another.
    slot_cost: u64,
    /// Memory of a decoder in bytes, with room for the longest stored frame.
    decoder_cost: u64,
    /// Memory for the slots and decoders; always enough for one of each.
    lease: Lease,
}

enum Slot {
    /// A thread is decoding the frame.
    Decoding,
    /// The content of the frame.
    Decoded(Arc<Buffer>),
}

/// A zstd decoder with a buffer for the stored bytes of a frame.
struct Decoder {
    context: DCtx<'static>,
    stored: Vec<u8>,
}

impl SeekableZstd {
    /// Opens `source`. Returns `None` without a valid seek table, or if `memory` can't lend what a slot and a
    /// decoder need; the caller then reads a stream, whose decoder reports any damage.
    pub(super) fn open(source: &Arc<dyn ReadAt>, memory: &Memory) -> Option<Self> {
        let table = SeekTable::read(&**source, memory)?;
        let slot_cost = u64::from(table.longest_plain()) + SLOT_OVERHEAD;
        let decoder_cost = u64::from(table.longest_stored()) + DECODER_OVERHEAD;
        let cache = Cache {
            slots: HashMap::new(),
            by_use: VecDeque::new(),
            idle: Vec::new(),
            decoders: 0,
            slot_cost,
            decoder_cost,
            lease: memory.try_lease(slot_cost + decoder_cost)?,
        };
        Some(Self {
            source: Arc::clone(source),
            table,
            cache: Mutex::new(cache),
            changed: Condvar::new(),
            plain: BufferPool::new(),
        })
    }

    /// Fills `buf` from the content of `frame`, starting `skip` bytes into it. The range must be within the
    /// frame.
    fn read_frame(&self, frame: &Frame, buf: &mut [u8], skip: usize) -> io::Result<()> {
        let content = self.content(frame)?;
        buf.copy_from_slice(&content[skip..skip + buf.len()]);
        self.put_back(content);
        Ok(())
    }

    /// Drops a content, and wakes the threads that wait for it to be evicted.
    fn put_back(&self, content: Arc<Buffer>) {
        let cache = lock(&self.cache);
        drop(content);
        drop(cache);
        self.changed.notify_all();
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
                    if let Some((next, decoder)) = self.next_without_slot(&mut cache, frame)? {
                        // The reader of that frame will get the error itself.
                        if let Ok(content) = self.decode_into_cache(cache, &next, decoder) {
                            self.put_back(content);
                        }
                        cache = lock(&self.cache);
                        continue;
                    }
                }
                None => {
                    if cache.make_space(true) {
                        let decoder = cache.take_decoder()?;
                        return self.decode_into_cache(cache, frame, decoder);
                    }
                }
            }
            cache = self.changed.wait(cache).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the first frame after `frame` that has no slot, with a decoder, if it is at most [`MAX_AHEAD`]
    /// frames ahead and fits into the cache.
    fn next_without_slot(&self, cache: &mut Cache, frame: &Frame) -> io::Result<Option<(Frame, Decoder)>> {
        let mut next = *frame;
        for _ in 0..MAX_AHEAD {
            let Some(found) = self.table.find(next.plain_at + u64::from(next.plain_len)) else { break };
            next = found;
            if !cache.slots.contains_key(&next.index) {
                return if cache.make_space(true) {
                    Ok(Some((next, cache.take_decoder()?)))
                } else {
                    Ok(None)
                };
            }
        }
        Ok(None)
    }

    /// Decodes a frame that has no slot yet. The caller has made space for it in the cache.
    fn decode_into_cache(
        &self,
        mut cache: MutexGuard<'_, Cache>,
        frame: &Frame,
        decoder: Decoder,
    ) -> io::Result<Arc<Buffer>> {
        cache.slots.insert(frame.index, Slot::Decoding);
        drop(cache);
        let mut work = Decoding { owner: self, frame, decoder: Some(decoder), content: None };
        let mut content = self.plain.take(self.table.longest_plain() as usize);
        content.truncate(frame.plain_len as usize);
        work.decode(&mut content)?;
        let content = Arc::new(content);
        work.content = Some(Arc::clone(&content));
        Ok(content)
    }

    /// Fills `head` with the start of a frame, without decoding the rest.
    fn decode_head(&self, frame: &Frame, head: &mut [u8]) -> io::Result<()> {
        let mut cache = lock(&self.cache);
        while !cache.make_space(false) {
            cache = self.changed.wait(cache).unwrap_or_else(PoisonError::into_inner);
        }
        let mut decoder = cache.take_decoder()?;
        drop(cache);
        let result = decoder.decode_head(&*self.source, frame, head);
        lock(&self.cache).give_back(result.is_ok().then_some(decoder));
        self.changed.notify_all();
        result
    }
}

impl Decoder {
    fn new() -> io::Result<Self> {
        let mut context = DCtx::try_create().ok_or(io::ErrorKind::OutOfMemory)?;
        // A window need not be longer than the frame. Decoding a whole frame takes none.
        let limit = DParameter::WindowLogMax(MAX_FRAME_LEN.ilog2());
        context.set_parameter(limit).map_err(|code| io::Error::other(get_error_name(code)))?;
        Ok(Self { context, stored: Vec::new() })
    }

    /// Reads the next `len` stored bytes of a frame. The seek table bounds the length of a frame.
    fn read_stored(&mut self, source: &dyn ReadAt, stored_at: u64, len: usize) -> io::Result<()> {
        if self.stored.len() < len {
            // Allocate a new vector: growing the old one would copy its stale content.
            self.stored = vec![0; len];
        }
        source.read_exact_at(&mut self.stored[..len], stored_at)
    }

    /// Decodes a whole frame into `content` and verifies its checksums.
    fn decode(&mut self, source: &dyn ReadAt, frame: &Frame, content: &mut [u8]) -> io::Result<()> {
        let stored_len = frame.stored_len as usize;
        self.read_stored(source, frame.stored_at, stored_len)?;
        let stored = &self.stored[..stored_len];
        let len =
            self.context.decompress(content, stored).map_err(|code| damaged(frame, get_error_name(code)))?;
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

    /// Fills `head` with the start of a frame.
    fn decode_head(&mut self, source: &dyn ReadAt, frame: &Frame, head: &mut [u8]) -> io::Result<()> {
        let zstd = |code| damaged(frame, get_error_name(code));
        self.context.reset(ResetDirective::SessionOnly).map_err(zstd)?;
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
            self.read_stored(source, frame.stored_at + stored_done as u64, len)?;
            stored_done += len;
            let mut input = InBuffer::around(&self.stored[..len]);
            while input.pos() < len && output.pos() < head_len {
                self.context.decompress_stream(&mut output, &mut input).map_err(zstd)?;
            }
        }
        Ok(())
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
                    self.put_back(content);
                    Ok(())
                }
                // A frame may need a longer window than itself, or be damaged: decoding all of it tells.
                None => self.decode_head(&frame, buf).or_else(|_| self.read_exact_at(buf, position)),
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

    fn concurrency(&self) -> usize {
        self.source.concurrency()
    }

    fn compressed_offset(&self, position: u64) -> Option<u64> {
        self.table.find(position).map(|frame| frame.stored_at)
    }

    fn release(&self) {
        lock(&self.cache).clear();
        self.plain.clear();
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

    /// Makes space for a decoder that is not idle and, if `and_slot`, a slot: evicts frames and frees idle
    /// decoders as necessary. Returns false if other threads use too many; the caller then waits for them.
    fn make_space(&mut self, and_slot: bool) -> bool {
        loop {
            let slots = self.slots.len() + usize::from(and_slot);
            let decoders = self.decoders + usize::from(self.idle.is_empty());
            let sum = slots as u64 * self.slot_cost + decoders as u64 * self.decoder_cost;
            if slots <= MAX_SLOTS && sum <= MAX_CACHED && self.lease.try_raise(sum) {
                return true;
            }
            if !self.evict() {
                if self.idle.len() <= 1 {
                    return false;
                }
                self.idle.pop();
                self.decoders -= 1;
            }
        }
    }

    /// Returns an idle or new decoder; [`Cache::make_space`] has made space for it.
    fn take_decoder(&mut self) -> io::Result<Decoder> {
        if let Some(decoder) = self.idle.pop() {
            return Ok(decoder);
        }
        let decoder = Decoder::new()?;
        self.decoders += 1;
        Ok(decoder)
    }

    /// Takes a decoder back; `None` if it must not be used again, since it failed.
    fn give_back(&mut self, decoder: Option<Decoder>) {
        match decoder {
            Some(decoder) => self.idle.push(decoder),
            None => self.decoders -= 1,
        }
    }

    /// Evicts the least recently used frame whose content nobody reads; returns false if there is none.
    fn evict(&mut self) -> bool {
        let is_unused = |index: &u32| match self.slots.get(index) {
            // Others can get the content only from the slot, which is locked.
            Some(Slot::Decoded(content)) => Arc::strong_count(content) == 1,
            _ => false,
        };
        let Some(position) = self.by_use.iter().position(is_unused) else { return false };
        let index = self.by_use.remove(position);
        index.is_some_and(|index| self.slots.remove(&index).is_some())
    }

    /// Evicts all frames that nobody reads and frees all idle decoders.
    fn clear(&mut self) {
        while self.evict() {}
        self.decoders -= self.idle.len();
        self.idle.clear();
        let sum = self.slots.len() as u64 * self.slot_cost + self.decoders as u64 * self.decoder_cost;
        self.lease.lower(sum.max(self.slot_cost + self.decoder_cost));
    }
}

/// A frame that this thread is decoding. Its drop stores the content, or removes the slot after an error or a
/// panic, gives the decoder back and wakes the waiting readers.
struct Decoding<'a> {
    owner: &'a SeekableZstd,
    frame: &'a Frame,
    /// Always `Some`, except during a decoding.
    decoder: Option<Decoder>,
    content: Option<Arc<Buffer>>,
}

impl Decoding<'_> {
    /// Decodes the frame into `content`. After an error, the decoder is not used again.
    fn decode(&mut self, content: &mut [u8]) -> io::Result<()> {
        let mut decoder = self.decoder.take().ok_or(io::ErrorKind::Other)?;
        decoder.decode(&*self.owner.source, self.frame, content)?;
        self.decoder = Some(decoder);
        Ok(())
    }
}

impl Drop for Decoding<'_> {
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
            }
        }
        cache.give_back(self.decoder.take());
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
