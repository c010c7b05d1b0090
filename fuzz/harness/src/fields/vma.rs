//! Fields and extents of VMA archives.

use imgtool_core::ReadAt;
use imgtool_vma::layout::{CLUSTERS_PER_EXTENT, EXTENT_HEADER, EXTENT_MAGIC, HEADER_FIXED, SUB_BLOCK};

use super::Kind::{Count, Flags, Pointer};
use super::{Field, Group, number};
use crate::random::Random;
use crate::scenario::Scenario;
use crate::sparse::SparseFile;

/// Maximum length in bytes of an archive whose extents are rearranged. Our limit, for the time per input.
const MOST_BYTES: u64 = 400 << 10;

/// Maximum number of extents that are looked at.
const MOST_EXTENTS: usize = 64;

pub(super) fn groups(file: &SparseFile) -> Vec<Group> {
    let mut header: Group = [48, 52, 56].map(|at| Field::big(at, 4, Pointer)).into();
    header.extend([Field::big(4, 4, Count), Field::big(8, 4, Flags), Field::big(24, 8, Count)]);
    let mut tables: Group =
        (0..4).flat_map(|i| [2044, 3068].map(|at| Field::big(at + 4 * i, 4, Pointer))).collect();
    for device in (0..4).map(|index| 4096 + 32 * index) {
        tables.extend([Field::big(device, 4, Pointer), Field::big(device + 8, 8, Count)]);
    }
    // Each blob begins with its length; names are short.
    let blobs = u64::from(number(file, 48, 4, false) as u32);
    let names: Group = (0..64).map(|index| Field::big(blobs + index, 1, Flags)).collect();
    let mut groups = vec![header, tables, names];
    for (at, _) in extents(file) {
        groups.push(vec![
            Field::big(at + 4, 2, Flags),
            Field::big(at + 6, 2, Count),
            Field::big(at + 8, 4, Flags),
        ]);
        groups.push(slots(at));
    }
    groups
}

fn slots(extent: u64) -> Group {
    let slots = (0..CLUSTERS_PER_EXTENT as u64).map(|index| extent + 40 + 8 * index);
    slots
        .flat_map(|at| [Field::big(at, 2, Flags), Field::big(at + 3, 1, Count), Field::big(at + 4, 4, Count)])
        .collect()
}

/// Returns position and length of the extents in a chain.
fn extents(file: &SparseFile) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut at = number(file, 56, 4, false);
    while file.bytes(at..at + 4) == EXTENT_MAGIC && found.len() < MOST_EXTENTS {
        let len = EXTENT_HEADER as u64 + number(file, at + 6, 2, false) * SUB_BLOCK;
        found.push((at, len));
        at += len;
    }
    found
}

/// An archive in parts that can be rearranged.
struct Parts {
    header: Vec<u8>,
    extents: Vec<Vec<u8>>,
    rest: Vec<u8>,
}

/// Moves, copies or removes extents and slots, and keeps the number of stored blocks right.
pub(super) fn rearrange(scenario: &mut Scenario, random: &mut Random) {
    let file = scenario.file();
    if file.len() > MOST_BYTES {
        return;
    }
    let places = extents(&file);
    let end = |place: &(u64, u64)| place.0.saturating_add(place.1).min(file.len());
    let Some((first, last)) = places.first().zip(places.last()) else { return };
    let mut parts = Parts {
        header: file.bytes(0..first.0),
        extents: places.iter().map(|place| file.bytes(place.0..end(place))).collect(),
        rest: file.bytes(end(last)..file.len()),
    };
    for _ in 0..1 + random.below(3) {
        parts.change(random);
    }
    let bytes = [parts.header, parts.extents.concat(), parts.rest].concat();
    let flags = scenario.flags;
    *scenario = Scenario { flags, ..Scenario::of_file(&bytes) };
}

impl Parts {
    fn change(&mut self, random: &mut Random) {
        if self.extents.is_empty() || self.extents.len() > MOST_EXTENTS {
            return;
        }
        let index = random.below(self.extents.len());
        let other = random.below(self.extents.len());
        match random.below(8) {
            0 => self.extents.swap(index, other),
            1 => drop(self.extents.remove(index)),
            2 => self.extents.insert(other, self.extents[index].clone()),
            3 => self.rest.extend_from_slice(&[0, 1, b'V'][..1 + random.below(3)]),
            4 if self.header.len() > HEADER_FIXED => {
                self.header.extend([0; 512]);
                let size = self.header.len() as u32;
                self.header[56..60].copy_from_slice(&size.to_be_bytes());
            }
            5 => self.swap_slots(index, other, random),
            _ => self.toggle_block(index, random),
        }
    }

    /// Exchanges the cluster numbers and devices of two slots, not their masks.
    fn swap_slots(&mut self, first: usize, second: usize, random: &mut Random) {
        let [a, b] = [(); 2].map(|()| 40 + 8 * random.below(CLUSTERS_PER_EXTENT) + 3);
        if self.extents[first].len() < EXTENT_HEADER || self.extents[second].len() < EXTENT_HEADER {
            return;
        }
        let one = self.extents[first][a..a + 5].to_vec();
        let two = self.extents[second][b..b + 5].to_vec();
        self.extents[first][a..a + 5].copy_from_slice(&two);
        self.extents[second][b..b + 5].copy_from_slice(&one);
    }

    /// Adds a block to the mask of a slot, or removes one, with its data.
    fn toggle_block(&mut self, index: usize, random: &mut Random) {
        let extent = &mut self.extents[index];
        let (slot, bit) = (40 + 8 * random.below(CLUSTERS_PER_EXTENT), random.below(16));
        if extent.len() < EXTENT_HEADER {
            return;
        }
        let mask = |extent: &[u8], at: usize| u16::from_be_bytes([extent[at], extent[at + 1]]);
        let earlier = (40..slot).step_by(8).filter(|at| extent[at + 3] != 0);
        let before: u32 = earlier.map(|at| mask(extent, at).count_ones()).sum();
        let old = mask(extent, slot);
        let new = old ^ 1 << bit;
        let before = before + (old & ((1 << bit) - 1)).count_ones();
        extent[slot..slot + 2].copy_from_slice(&new.to_be_bytes());
        if extent[slot + 3] == 0 {
            return;
        }
        let at = EXTENT_HEADER + before as usize * SUB_BLOCK as usize;
        let count = u16::from_be_bytes([extent[6], extent[7]]);
        let count = if new > old {
            let block = vec![random.number() as u8; SUB_BLOCK as usize];
            extent.splice(at.min(extent.len())..at.min(extent.len()), block);
            count.wrapping_add(1)
        } else {
            extent.drain(at.min(extent.len())..(at + SUB_BLOCK as usize).min(extent.len()));
            count.wrapping_sub(1)
        };
        extent[6..8].copy_from_slice(&count.to_be_bytes());
    }
}
