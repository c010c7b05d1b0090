//! Salvage of a stream: its tables may contradict its grains, and markers may be damaged.

use std::ops::Range;

use imgtool_core::{Error, ErrorKind, Result};

use super::{Pass, State};
use crate::layout::SECTOR_SIZE;

/// Returns the reason why a salvage that met `error` can't prove the content.
pub(super) fn unverified(error: &Error) -> String {
    format!("unverified: {}", error.message())
}

impl Pass {
    /// Continues after an error in a salvage: the pass looks for the next marker, sector by sector. If the
    /// stream has ended or can't be read, everything from the last grain on is lost, and every grain that
    /// only the tables list.
    ///
    /// # Errors
    /// `error` itself without salvage, or after cancellation.
    pub(super) fn survive(&mut self, error: Error) -> Result<()> {
        if !self.salvage || error.kind() == ErrorKind::Cancelled {
            return Err(error);
        }
        self.doubt.get_or_insert_with(|| unverified(&error));
        if self.exhausted {
            let first = self.damage.take().unwrap_or(error);
            let is_known = self.tables.each_missing(&(0..0), &mut |_| {});
            let start = if is_known { 0 } else { self.at };
            self.lose(start..self.size, &first);
            self.state = State::Ended;
        } else {
            self.damage.get_or_insert(error);
        }
        Ok(())
    }

    /// Passes on a contradiction between the tables and the grains. A salvage believes the grains, whose
    /// markers have their places.
    pub(super) fn agree(&mut self, met: Result<()>) -> Result<()> {
        match met {
            Err(error) if self.salvage && error.kind() != ErrorKind::Cancelled => {
                self.doubt.get_or_insert_with(|| unverified(&error));
                Ok(())
            }
            met => met,
        }
    }

    /// Records a guest range as lost. If the tables are known, only the grains of it that they list and that
    /// were not met.
    pub(super) fn lose(&mut self, guest: Range<u64>, error: &Error) {
        // Both are at most 2^63.
        let grain_size = self.header.grain_size * SECTOR_SIZE;
        let grains = guest.start / grain_size..guest.end.div_ceil(grain_size);
        let (losses, size) = (&self.losses, self.size);
        let known = self.tables.each_missing(&grains, &mut |grains| {
            let end = grains.end.saturating_mul(grain_size).min(size);
            losses.add(grains.start.saturating_mul(grain_size)..end, error);
        });
        if !known && !guest.is_empty() {
            losses.add(guest, error);
        }
    }
}
