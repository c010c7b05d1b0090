//! [`Cache`], a bounded cache for drivers and decoders that evicts the least recently used entries.

use std::collections::HashMap;
use std::hash::Hash;

/// A cache of a bounded number of entries that evicts the least recently used one.
///
/// [`Cache::insert`] into a full cache walks over all entries. A cache of thousands of small entries should
/// instead make space with [`Cache::evict_older_half`]: one walk for thousands of insertions.
#[derive(Debug)]
pub struct Cache<K, V> {
    entries: HashMap<K, Entry<V>>,
    capacity: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    last_use: u64,
}

impl<K: Eq + Hash + Clone, V> Cache<K, V> {
    /// Creates an empty cache of at most `capacity` entries; 0 counts as 1.
    pub fn new(capacity: usize) -> Self {
        Self { entries: HashMap::new(), capacity: capacity.max(1), clock: 0 }
    }

    /// Returns the value cached for `key` and marks it as the most recently used.
    pub fn get(&mut self, key: &K) -> Option<&mut V> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.last_use = self.clock;
        Some(&mut entry.value)
    }

    /// Adds or replaces the entry for `key`. Returns the evicted entry, if `key` is new and the cache was
    /// full.
    pub fn insert(&mut self, key: K, value: V) -> Option<(K, V)> {
        self.clock += 1;
        let evicted = if self.entries.contains_key(&key) || self.entries.len() < self.capacity {
            None
        } else {
            self.evict()
        };
        self.entries.insert(key, Entry { value, last_use: self.clock });
        evicted
    }

    /// Removes and returns the least recently used entry; `None` if the cache is empty.
    pub fn evict(&mut self) -> Option<(K, V)> {
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.last_use)?.0.clone();
        let entry = self.entries.remove(&oldest)?;
        Some((oldest, entry.value))
    }

    /// True if the next insertion of a new key evicts an entry.
    pub fn is_full(&self) -> bool {
        self.entries.len() >= self.capacity
    }

    /// Removes and returns the least recently used entries, just over half of them, in no particular order.
    pub fn evict_older_half(&mut self) -> Vec<(K, V)> {
        let mut uses: Vec<u64> = self.entries.values().map(|entry| entry.last_use).collect();
        if uses.is_empty() {
            return Vec::new();
        }
        let middle = uses.len() / 2;
        let median = *uses.select_nth_unstable(middle).1;
        let older = self.entries.extract_if(|_, entry| entry.last_use <= median);
        older.map(|(key, entry)| (key, entry.value)).collect()
    }

    /// Removes and returns all entries, in no particular order.
    pub fn drain(&mut self) -> impl Iterator<Item = (K, V)> {
        self.entries.drain().map(|(key, entry)| (key, entry.value))
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if there are no entries.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns all values, in no particular order, without marking them as used.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.entries.values().map(|entry| &entry.value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn evicts_the_least_recently_used_entry() {
        let mut cache = Cache::new(2);
        assert_eq!(cache.insert("a", 1), None);
        assert_eq!(cache.insert("b", 2), None);
        assert_eq!(cache.get(&"a").copied(), Some(1));
        assert_eq!(cache.insert("c", 3), Some(("b", 2)));
        assert_eq!(cache.insert("a", 4), None, "replacing evicts nothing");
        assert_eq!(cache.len(), 2);
    }

    #[test]
    fn evicts_the_older_half_at_once() {
        let mut cache = Cache::new(8);
        for key in 0..8 {
            assert!(!cache.is_full());
            cache.insert(key, key * 10);
        }
        assert!(cache.is_full());
        assert_eq!(cache.get(&0).copied(), Some(0));
        let mut evicted: Vec<i32> = cache.evict_older_half().into_iter().map(|(key, _)| key).collect();
        evicted.sort_unstable();
        assert_eq!(evicted, [1, 2, 3, 4, 5]);
        let mut rest: Vec<(i32, i32)> = cache.drain().collect();
        rest.sort_unstable();
        assert_eq!(rest, [(0, 0), (6, 60), (7, 70)]);
        assert!(cache.evict_older_half().is_empty());
    }
}
