//! A bounded cache of L2 tables. No lock is held while a table is read.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// L2 tables by host offset.
pub struct L2Cache {
    tables: Mutex<Tables>,
    max_tables: usize,
}

#[derive(Default)]
struct Tables {
    by_offset: HashMap<u64, (Arc<[u64]>, u64)>,
    /// Counts lookups: the age of an entry is when it was last asked for.
    clock: u64,
}

/// Fewest tables kept: neighbours are read by many threads at once.
const MIN_TABLES: usize = 2;

impl L2Cache {
    /// Room for `bytes` of tables of `table_len` bytes.
    pub fn new(bytes: u64, table_len: u64) -> Self {
        let max_tables = usize::try_from(bytes / table_len).unwrap_or(MIN_TABLES).max(MIN_TABLES);
        Self { tables: Mutex::default(), max_tables }
    }

    /// The table at `offset`, if it is there.
    pub fn get(&self, offset: u64) -> Option<Arc<[u64]>> {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        tables.clock += 1;
        let clock = tables.clock;
        let (table, used) = tables.by_offset.get_mut(&offset)?;
        *used = clock;
        Some(Arc::clone(table))
    }

    /// Keeps a table; the older half makes room when there is none.
    pub fn put(&self, offset: u64, table: Arc<[u64]>) {
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.by_offset.len() >= self.max_tables {
            let mut ages: Vec<u64> = tables.by_offset.values().map(|(_, used)| *used).collect();
            let middle = ages.len() / 2;
            let (_, median, _) = ages.select_nth_unstable(middle);
            let median = *median;
            tables.by_offset.retain(|_, (_, used)| *used > median);
        }
        tables.clock += 1;
        let clock = tables.clock;
        tables.by_offset.insert(offset, (table, clock));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_older_half_goes() {
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
