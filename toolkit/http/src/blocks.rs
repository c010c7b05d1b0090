//! [`Blocks`], a cache of aligned blocks for small reads: tables of an image are read in parts of a few KiB,
//! each of which would be a request of its own.

use std::io;
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Cache, Lease, Memory, Result};

/// Length of a block in bytes. Our choice: a table of 64 KiB and its neighbours; at 20 ms for a request and
/// 40 MB/s, its transfer takes as long as one more request.
pub(crate) const BLOCK: u64 = 256 << 10;

/// Number of blocks of one source. Our choice: 8 MiB.
const COUNT: u64 = 32;

/// Divisor of the free memory: the blocks of one source may take a sixteenth.
const MEMORY_DIVISOR: u64 = 16;

/// Content of a block; `None` until a thread has fetched it. The others wait for the lock.
type Block = Arc<Mutex<Option<Arc<[u8]>>>>;

/// A cache of blocks.
#[derive(Debug)]
pub(crate) struct Blocks {
    blocks: Mutex<Cache<u64, Block>>,
    _lease: Lease,
}

impl Blocks {
    /// Creates a cache that borrows its memory.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if `memory` can't lend a single block.
    pub(crate) fn new(memory: &Memory) -> Result<Self> {
        let most = memory.cache_share(COUNT * BLOCK).min(memory.free() / MEMORY_DIVISOR);
        let mut count = (most / BLOCK).max(1);
        let lease = loop {
            match memory.try_lease(count * BLOCK) {
                Some(lease) => break lease,
                None if count == 1 => break memory.lease(BLOCK, "a block of a remote file")?,
                None => count /= 2,
            }
        };
        // At most `COUNT`.
        Ok(Self { blocks: Mutex::new(Cache::new(count as usize)), _lease: lease })
    }

    /// Returns the block `index`. Fetches it if it is not there, once however many threads need it.
    ///
    /// # Errors
    /// Those of `fetch`. The next thread tries again.
    pub(crate) fn get(
        &self,
        index: u64,
        fetch: impl FnOnce() -> io::Result<Vec<u8>>,
    ) -> io::Result<Arc<[u8]>> {
        let block = self.slot(index);
        let mut content = lock(&block);
        if let Some(bytes) = &*content {
            return Ok(Arc::clone(bytes));
        }
        let bytes: Arc<[u8]> = fetch()?.into();
        *content = Some(Arc::clone(&bytes));
        Ok(bytes)
    }

    /// Frees all blocks.
    pub(crate) fn clear(&self) {
        lock(&self.blocks).drain().for_each(drop);
    }

    fn slot(&self, index: u64) -> Block {
        let mut blocks = lock(&self.blocks);
        if let Some(block) = blocks.get(&index) {
            return Arc::clone(block);
        }
        let block = Block::default();
        blocks.insert(index, Arc::clone(&block));
        block
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn fetches_a_block_once_for_all_threads() {
        let blocks = Blocks::new(&Memory::default()).expect("memory");
        let fetched = AtomicUsize::new(0);
        let fetch = || {
            fetched.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(20));
            Ok(vec![7; 3])
        };
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert_eq!(*blocks.get(5, fetch).expect("fetched"), [7; 3]));
            }
        });
        assert_eq!(fetched.load(Ordering::SeqCst), 1);
        assert!(blocks.get(6, || Err(io::ErrorKind::Other.into())).is_err());
        blocks.get(6, fetch).expect("another try");
        assert_eq!(fetched.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn borrows_less_from_a_small_ledger() {
        let memory = Memory::default();
        let _rest = memory.lease(memory.free() - BLOCK, "the rest").expect("free");
        let blocks = Blocks::new(&memory).expect("one block");
        assert_eq!(memory.free(), 0);
        drop(blocks);
        let _all = memory.lease(BLOCK, "all").expect("returned");
        assert!(Blocks::new(&memory).is_err());
    }
}
