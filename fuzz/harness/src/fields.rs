//! Mutation of images that knows their structure: fields of headers, entries of tables, whole extents.
//!
//! Each submodule finds the fields of one format by following the image's own tables. [`mutate`] changes some
//! of them to values that are plausible for their `Kind`. The targets then correct the checksums, so that
//! the mutation gets past them. [`judge`] compares the outcome with other programs.

pub mod fuzz;
pub mod judge;
mod qcow2;
mod vhdx;
mod vma;
pub mod zst;

use imgtool_core::ReadAt;

use crate::random::Random;
use crate::scenario::Scenario;
use crate::sparse::SparseFile;
use crate::targets;

/// Names of the targets whose formats [`mutate`] can change field by field.
pub const FORMATS: [&str; 3] = ["qcow2", "vhdx", "vma_agree"];

/// Maximum number of fields in a group. Our limit, for the time per input.
const MOST_FIELDS: usize = 512;

/// Kind of a field, which determines its new values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Number of things, or length.
    Count,
    /// Position in the file or elsewhere, maybe with flags in its highest and lowest bits.
    Pointer,
    /// Bits.
    Flags,
}

/// A number in the image.
#[derive(Debug, Clone, Copy)]
struct Field {
    at: u64,
    len: usize,
    is_little: bool,
    kind: Kind,
}

impl Field {
    fn big(at: u64, len: usize, kind: Kind) -> Self {
        Self { at, len, is_little: false, kind }
    }

    fn little(at: u64, len: usize, kind: Kind) -> Self {
        Self { at, len, is_little: true, kind }
    }

    fn read(&self, file: &SparseFile) -> u64 {
        number(file, self.at, self.len, self.is_little)
    }

    fn bytes(&self, value: u64) -> Vec<u8> {
        if self.is_little {
            value.to_le_bytes()[..self.len].to_vec()
        } else {
            value.to_be_bytes()[8 - self.len..].to_vec()
        }
    }
}

fn number(file: &SparseFile, at: u64, len: usize, is_little: bool) -> u64 {
    let mut bytes = file.bytes(at..at.saturating_add(len as u64));
    if is_little {
        bytes.reverse();
    }
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// Fields of one structure or table.
type Group = Vec<Field>;

/// Changes one to four fields of a scenario of the target `name`.
pub fn mutate(name: &str, seed: &Scenario, random: &mut Random) -> Scenario {
    let mut scenario = seed.clone();
    if name.starts_with("vma") && random.once_in(2) {
        vma::rearrange(&mut scenario, random);
    }
    for _ in 0..[1, 1, 1, 2, 2, 3, 4][random.below(7)] {
        change(name, &mut scenario, random);
    }
    if random.once_in(40) {
        let cut = random.number() % scenario.len.max(1);
        scenario.len = if random.once_in(2) { cut } else { scenario.len.saturating_sub(cut % 70_000) };
    }
    scenario
}

fn change(name: &str, scenario: &mut Scenario, random: &mut Random) {
    let image = targets::by_name(name).and_then(|target| target.image);
    let Some(file) = image.map(|image| image(&scenario.encode())) else { return };
    let mut groups = match name {
        "qcow2" => qcow2::groups(&file),
        "vhdx" => vhdx::groups(&file),
        _ => vma::groups(&file),
    };
    groups.retain(|group| !group.is_empty());
    groups.iter_mut().for_each(|group| group.truncate(MOST_FIELDS));
    if groups.is_empty() {
        return;
    }
    let group = &groups[random.below(groups.len())];
    // Entries in use are more interesting, and most tables are nearly empty.
    let in_use: Vec<&Field> = group.iter().filter(|field| field.read(&file) != 0).collect();
    let field = match in_use.as_slice() {
        [_, ..] if !random.once_in(3) => *in_use[random.below(in_use.len())],
        _ => group[random.below(group.len())],
    };
    let value = new_value(&field, &groups, &file, random);
    scenario.pieces.push((field.at, field.bytes(value)));
}

fn new_value(field: &Field, groups: &[Group], file: &SparseFile, random: &mut Random) -> u64 {
    let old = field.read(file);
    let other = |random: &mut Random| {
        let group = &groups[random.below(groups.len())];
        group[random.below(group.len())].read(file)
    };
    let step = 1u64 << random.below(22);
    let flags = old & 0xff00_0000_0000_01ff;
    let common =
        [0, old.wrapping_add(1), old.wrapping_sub(1), u64::MAX, 1 << random.below(64), other(random)];
    match field.kind {
        Kind::Flags => match random.below(8) {
            0 => random.number(),
            1 => common[random.below(common.len())],
            _ => old ^ 1 << random.below(8 * field.len),
        },
        Kind::Count => match random.below(8) {
            0 => old.wrapping_mul(2),
            1 => old / 2,
            2 => old.wrapping_add(step),
            3 => old ^ 1 << random.below(8 * field.len),
            _ => common[random.below(common.len())],
        },
        Kind::Pointer => match random.below(12) {
            0 => old ^ 1 << random.below(8 * field.len),
            1 => old.wrapping_add(step),
            2 => old.wrapping_sub(step),
            3 => (file.len() / step * step) | flags,
            4 => (random.number() % file.len().max(1) / step * step) | flags,
            5 => other(random) ^ (1 << 63),
            6 => old ^ [1 << 63, 1 << 62, 1, 3, 6, 7][random.below(6)],
            7 => file.len().wrapping_sub(step),
            8 | 9 => other(random),
            _ => common[random.below(common.len())],
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_fields() {
        for name in FORMATS {
            let directory = format!("{}/../seeds/{name}", env!("CARGO_MANIFEST_DIR"));
            for entry in std::fs::read_dir(directory).expect("seeds") {
                let path = entry.expect("a seed").path();
                let seed = Scenario::decode(&std::fs::read(&path).expect("readable"));
                let mut random = Random::new(1);
                let mut seen = std::collections::BTreeSet::new();
                for _ in 0..40 {
                    seen.extend(mutate(name, &seed, &mut random).pieces.last().map(|piece| piece.0));
                }
                assert!(seen.len() > 5, "{}: {seen:?}", path.display());
            }
        }
    }
}
