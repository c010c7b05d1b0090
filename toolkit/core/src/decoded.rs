//! [`DecodedUnits`], the units of an image that are stored encoded: clusters, blocks or chunks that a reader
//! must decode as a whole.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::cache::Cache;
use crate::error::Result;
use crate::memory::{Lease, Memory};
use crate::sync::lock;

/// Maximum memory in bytes for the units that are kept decoded. Our limit; an image whose units are longer
/// keeps one.
const MAX_KEPT_BYTES: u64 = 8 << 20;

/// Maximum number of units that are kept decoded: a full cache walks over all of them. Our limit.
const MAX_KEPT: u64 = 64;

/// Keeps the units that were decoded for reads of less than a unit.
pub struct DecodedUnits {
    max_len: u64,
    kept: Mutex<Cache<u64, Arc<Vec<u8>>>>,
    /// Memory for the kept units.
    _lease: Lease,
}

impl fmt::Debug for DecodedUnits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DecodedUnits").field("max_len", &self.max_len).finish_non_exhaustive()
    }
}

impl DecodedUnits {
    /// Prepares for units of at most `max_len` bytes, which borrow from `memory`. `depth` is the number of
    /// images above this one in a chain; the greater it is, the fewer units are kept.
    ///
    /// # Errors
    /// [`crate::ErrorKind::LimitExceeded`] if `memory` can't lend what one unit needs.
    pub fn new(max_len: u64, depth: usize, memory: &Memory) -> Result<Self> {
        let max_len = max_len.max(1);
        let share = memory.cache_share(MAX_KEPT_BYTES) / (depth as u64).saturating_add(1);
        let kept = (share / max_len).clamp(1, MAX_KEPT);
        let lease = memory.lease(kept.saturating_mul(max_len), "the decoded parts of an image")?;
        // At most `MAX_KEPT`, so it fits.
        Ok(Self { max_len, kept: Mutex::new(Cache::new(kept as usize)), _lease: lease })
    }

    /// Returns the memory in bytes that a thread in [`DecodedUnits::read`] needs for a unit besides the
    /// buffer and the decoder.
    pub fn reader_memory(&self) -> u64 {
        self.max_len
    }

    /// Fills `buf` with the bytes of the unit `key` from byte `within` on. `len` is the length of the whole
    /// unit, at most the maximum; `decode` fills a buffer of that length with it.
    ///
    /// # Errors
    /// Any error of `decode`; [`crate::ErrorKind::OutOfBounds`] if the range exceeds the unit.
    pub fn read(
        &self,
        key: u64,
        len: u64,
        buf: &mut [u8],
        within: u64,
        decode: impl FnOnce(&mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let out_of_bounds = || crate::Error::out_of_bounds(format!("byte {within} is outside of the unit"));
        if within == 0 && buf.len() as u64 == len {
            return decode(buf);
        }
        let known = lock(&self.kept).get(&key).map(|unit| Arc::clone(unit));
        let unit = match known {
            Some(unit) => unit,
            None => {
                let len = usize::try_from(len.min(self.max_len)).map_err(|_| out_of_bounds())?;
                let mut unit = vec![0; len];
                decode(&mut unit)?;
                // Not `Arc<[u8]>`, whose conversion copies: both would be in memory.
                let unit = Arc::new(unit);
                lock(&self.kept).insert(key, Arc::clone(&unit));
                unit
            }
        };
        let start = usize::try_from(within).map_err(|_| out_of_bounds())?;
        let part = start.checked_add(buf.len()).and_then(|end| unit.get(start..end));
        buf.copy_from_slice(part.ok_or_else(out_of_bounds)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decodes_a_unit_once_for_several_partial_reads() {
        let units = DecodedUnits::new(8, 0, &Memory::default()).expect("memory");
        let mut decoded = 0;
        let mut read = |key: u64, buf: &mut [u8], within| {
            units.read(key, 8, buf, within, |unit| {
                decoded += 1;
                unit.copy_from_slice(&[key as u8, 1, 2, 3, 4, 5, 6, 7]);
                Ok(())
            })
        };
        let mut buf = [0; 2];
        read(9, &mut buf, 0).expect("read");
        assert_eq!(buf, [9, 1]);
        read(9, &mut buf, 6).expect("read");
        assert_eq!(buf, [6, 7]);
        assert!(read(9, &mut buf, 7).is_err());
        assert_eq!(decoded, 1);
    }

    #[test]
    fn keeps_a_unit_without_a_copy() {
        let units = DecodedUnits::new(8, 0, &Memory::default()).expect("memory");
        let mut decoded_at = 0;
        let decode = |unit: &mut [u8]| {
            decoded_at = unit.as_ptr() as usize;
            Ok(())
        };
        units.read(1, 8, &mut [0; 2], 0, decode).expect("read");
        let kept_at = lock(&units.kept).get(&1).map(|unit| unit.as_ptr() as usize);
        assert_eq!(kept_at, Some(decoded_at));
    }

    #[test]
    fn borrows_the_memory_of_its_units() {
        let memory = Memory::default();
        let free = memory.free();
        let units = DecodedUnits::new(1 << 20, 1, &memory).expect("memory");
        assert_eq!(free - memory.free(), 4 << 20);
        assert_eq!(units.reader_memory(), 1 << 20);
        assert!(DecodedUnits::new(1 << 40, 0, &memory).is_err());
    }
}
