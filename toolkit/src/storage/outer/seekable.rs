//! Seekable zstd: frames of their own and a table of where they stand.
//!
//! A frame is decoded whole, once, and kept for whoever wants another part of it; while it is being
//! decoded others wait for it, or decode other frames. A short read at the start of a long frame (the
//! header of a VMA extent, when an archive is indexed) decodes only as far as it must.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use twox_hash::XxHash64;
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective, get_error_name};

use super::ZSTD_WINDOW_LOG_MAX;
use super::seek_table::{Frame, SeekTable};
use crate::buffer::{Buffer, BufferPool};
use crate::storage::input::ReadAt;

/// Content that is held: decoded frames and those being decoded. Ours: a quarter of what a
/// conversion may use in all; 16 of the frames that imgtool makes of VMA archives.
const MAX_HELD: u64 = 64 << 20;

/// A read of this much or less from a frame's very start does not decode all of it: the header of a
/// VMA extent, which has a checksum of its own. Longer reads are of content, which must not be
/// handed out before the frame's checksum has been looked at.
const HEAD_LEN: usize = 512;

/// Frames up to this length are always decoded whole: two blocks of zstd.
const SHORT_FRAME_LEN: u32 = 256 << 10;

/// How far ahead of what they wait for readers decode. Ours: as many frames as are held.
const MAX_AHEAD: usize = 16;

/// Bytes read of a frame whose start is wanted, at first and then.
const HEAD_STEPS: [usize; 2] = [2 << 10, 64 << 10];

/// A seekable zstd file, read by position.
pub(super) struct SeekableZstd {
    source: Arc<dyn ReadAt>,
    table: SeekTable,
    cache: Mutex<Cache>,
    /// A frame was decoded, or has failed to be.
    changed: Condvar,
    contexts: Mutex<Vec<DCtx<'static>>>,
    plain: BufferPool,
    stored: BufferPool,
}

#[derive(Default)]
struct Cache {
    /// By frame number.
    slots: HashMap<u32, Slot>,
    /// Frames that are decoded, the one that was wanted longest ago first.
    by_use: VecDeque<u32>,
    /// Bytes of the content of all slots.
    held: u64,
}

enum Slot {
    /// Somebody decodes it.
    InWork,
    /// Its content.
    Decoded(Arc<Buffer>),
}

impl SeekableZstd {
    /// The view on `source`; `None` when it has no seek table that can be relied on. (Then it is read
    /// as a stream, which finds what is wrong.)
    pub(super) fn open(source: &Arc<dyn ReadAt>) -> Option<Self> {
        let table = SeekTable::read(&**source)?;
        Some(Self {
            source: Arc::clone(source),
            table,
            cache: Mutex::default(),
            changed: Condvar::new(),
            contexts: Mutex::default(),
            plain: BufferPool::new(),
            stored: BufferPool::new(),
        })
    }

    /// Fills `buf`, which lies within `frame`, from `within` on.
    fn read_frame(&self, frame: &Frame, buf: &mut [u8], within: usize) -> io::Result<()> {
        let is_head = within == 0 && buf.len() <= HEAD_LEN && frame.plain_len > SHORT_FRAME_LEN;
        match self.content(frame, is_head)? {
            Some(content) => {
                buf.copy_from_slice(&content[within..within + buf.len()]);
                Ok(())
            }
            None => self.with_context(|context| self.decode_head(context, frame, buf)),
        }
    }

    /// The content of a frame, decoded unless somebody has done so; with `only_if_held`, `None`
    /// instead.
    fn content(&self, frame: &Frame, only_if_held: bool) -> io::Result<Option<Arc<Buffer>>> {
        let mut cache = lock(&self.cache);
        loop {
            match cache.slots.get(&frame.number) {
                Some(Slot::Decoded(content)) => {
                    let content = Arc::clone(content);
                    cache.used(frame.number);
                    return Ok(Some(content));
                }
                Some(Slot::InWork) => {
                    // Those who read on together would wait for each frame together: who waits
                    // decodes what comes next instead.
                    if let Some(next) = self.next_idle(&mut cache, frame) {
                        // An error in it is for whoever asks for it.
                        let _ = self.decode_into_cache(cache, &next);
                        cache = lock(&self.cache);
                        continue;
                    }
                }
                None if only_if_held => return Ok(None),
                None => {
                    if cache.make_room(u64::from(frame.plain_len)) {
                        return self.decode_into_cache(cache, frame).map(Some);
                    }
                }
            }
            cache = self.changed.wait(cache).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The first frame after `frame` that is neither decoded nor in work, if it is near and there is
    /// room for it beside what is held.
    fn next_idle(&self, cache: &mut Cache, frame: &Frame) -> Option<Frame> {
        let mut next = *frame;
        for _ in 0..MAX_AHEAD {
            next = self.table.find(next.plain_at + u64::from(next.plain_len))?;
            if !cache.slots.contains_key(&next.number) {
                return cache.make_room(u64::from(next.plain_len)).then_some(next);
            }
        }
        None
    }

    /// Decodes a frame that nobody has in work, for which there is room.
    fn decode_into_cache(&self, mut cache: MutexGuard<'_, Cache>, frame: &Frame) -> io::Result<Arc<Buffer>> {
        cache.slots.insert(frame.number, Slot::InWork);
        cache.held += u64::from(frame.plain_len);
        drop(cache);
        let mut work = InWork { owner: self, frame, content: None };
        let mut content = self.plain.take(frame.plain_len as usize);
        self.with_context(|context| self.decode(context, frame, &mut content))?;
        let content = Arc::new(content);
        work.content = Some(Arc::clone(&content));
        Ok(content)
    }

    /// Decodes all of a frame.
    fn decode(&self, context: &mut DCtx<'static>, frame: &Frame, content: &mut [u8]) -> io::Result<()> {
        let mut stored = self.stored.take(frame.stored_len as usize);
        self.source.read_exact_at(&mut stored, frame.stored_at)?;
        let len =
            context.decompress(content, &stored).map_err(|code| damaged(frame, get_error_name(code)))?;
        if len != content.len() {
            let why = format!("{len} bytes instead of the {} of the seek table", content.len());
            return Err(damaged(frame, &why));
        }
        // The format takes the lower half of the 64 bits.
        let sum = |content: &[u8]| XxHash64::oneshot(0, content) as u32;
        if frame.checksum.is_some_and(|checksum| checksum != sum(content)) {
            return Err(damaged(frame, "its checksum in the seek table does not match"));
        }
        Ok(())
    }

    /// Decodes the start of a frame, as much as `head` holds.
    fn decode_head(&self, context: &mut DCtx<'static>, frame: &Frame, head: &mut [u8]) -> io::Result<()> {
        let zstd = |code| damaged(frame, get_error_name(code));
        context.reset(ResetDirective::SessionOnly).map_err(zstd)?;
        let head_len = head.len();
        let mut output = OutBuffer::around(head);
        let mut done = 0;
        let mut steps = HEAD_STEPS.into_iter().chain(std::iter::repeat(HEAD_STEPS[1]));
        while output.pos() < head_len {
            let left = frame.stored_len as usize - done;
            let len = steps.next().unwrap_or(HEAD_STEPS[1]).min(left);
            if len == 0 {
                return Err(damaged(frame, "it ends early"));
            }
            let mut stored = self.stored.take(len);
            self.source.read_exact_at(&mut stored, frame.stored_at + done as u64)?;
            done += len;
            let mut input = InBuffer::around(&stored);
            while input.pos() < len && output.pos() < head_len {
                context.decompress_stream(&mut output, &mut input).map_err(zstd)?;
            }
        }
        Ok(())
    }

    /// Runs `f` with a decoder that nobody else uses.
    fn with_context<T>(&self, f: impl FnOnce(&mut DCtx<'static>) -> io::Result<T>) -> io::Result<T> {
        let kept = lock(&self.contexts).pop();
        let mut context = match kept {
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
            // Within the frame, so below its length.
            let within = (at - frame.plain_at) as usize;
            let len = rest.len().min(frame.plain_len as usize - within);
            let (part, tail) = rest.split_at_mut(len);
            self.read_frame(&frame, part, within)?;
            rest = tail;
            at += len as u64;
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.table.plain_len()
    }

    fn granule(&self) -> u64 {
        u64::from(self.table.longest_plain()).max(1)
    }
}

impl Cache {
    /// Notes that a frame was wanted.
    fn used(&mut self, number: u32) {
        if let Some(place) = self.by_use.iter().position(|known| *known == number) {
            self.by_use.remove(place);
        }
        self.by_use.push_back(number);
    }

    /// Drops frames until `len` more bytes may be held; false when those in work take too much. One
    /// frame is always let in.
    fn make_room(&mut self, len: u64) -> bool {
        while self.held + len > MAX_HELD && !self.slots.is_empty() {
            let Some(oldest) = self.by_use.pop_front() else { return false };
            if let Some(Slot::Decoded(content)) = self.slots.remove(&oldest) {
                self.held -= content.len() as u64;
            }
        }
        true
    }
}

/// A frame that this thread decodes. However that ends, those who wait are told.
struct InWork<'a> {
    owner: &'a SeekableZstd,
    frame: &'a Frame,
    content: Option<Arc<Buffer>>,
}

impl Drop for InWork<'_> {
    fn drop(&mut self) {
        let mut cache = lock(&self.owner.cache);
        let number = self.frame.number;
        match self.content.take() {
            Some(content) => {
                cache.slots.insert(number, Slot::Decoded(content));
                cache.used(number);
            }
            None => {
                cache.slots.remove(&number);
                cache.held -= u64::from(self.frame.plain_len);
            }
        }
        drop(cache);
        self.owner.changed.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn damaged(frame: &Frame, why: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        format!(
            "zstd frame {} at {} of the compressed file is damaged ({why})",
            frame.number, frame.stored_at
        ),
    )
}
