//! Bounded cache of L2 tables, or of slices of them, by host offset.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Minimum capacity in tables: several threads read neighbouring tables at once.
const MIN_TABLES: usize = 2;

/// Cache of tables by host offset. Callers read tables without holding its lock.
pub struct L2Cache {
    state: Mutex<CacheState>,
    max_tables: usize,
}

#[derive(Default)]
struct CacheState {
    /// Tables by host offset, each with the clock of its last use.
    by_offset: HashMap<u64, (Arc<[u64]>, u64)>,
    /// Number of lookups and insertions so far.
    clock: u64,
}

impl L2Cache {
    /// Creates a cache of `bytes` bytes, in tables of `table_len` bytes.
    pub fn new(bytes: u64, table_len: u64) -> Self {
        let max_tables = usize::try_from(bytes / table_len).unwrap_or(MIN_TABLES).max(MIN_TABLES);
        Self { state: Mutex::default(), max_tables }
    }

    /// Returns the table at `host_offset`, if the cache has it.
    pub fn get(&self, host_offset: u64) -> Option<Arc<[u64]>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.clock += 1;
        let clock = state.clock;
        let (table, last_use) = state.by_offset.get_mut(&host_offset)?;
        *last_use = clock;
        Some(Arc::clone(table))
    }

    /// Adds a table. A full cache first evicts the half that was used least recently.
    pub fn put(&self, host_offset: u64, table: Arc<[u64]>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.by_offset.len() >= self.max_tables {
            let mut uses: Vec<u64> = state.by_offset.values().map(|(_, last_use)| *last_use).collect();
            let middle = uses.len() / 2;
            let (_, median, _) = uses.select_nth_unstable(middle);
            let median = *median;
            state.by_offset.retain(|_, (_, last_use)| *last_use > median);
        }
        state.clock += 1;
        let clock = state.clock;
        state.by_offset.insert(host_offset, (table, clock));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_the_least_recently_used_half() {
        let cache = L2Cache::new(8 * 512, 512);
        for offset in 0..8 {
            cache.put(offset, Arc::from([offset]));
        }
        assert!(cache.get(0).is_some());
        cache.put(8, Arc::from([8]));
        assert!(cache.get(0).is_some() && cache.get(7).is_some() && cache.get(8).is_some());
        assert!(cache.get(1).is_none());
    }
}
