//! Mutation of scenarios within their framing: numbers, table entries, pieces, lengths.

use crate::random::Random;
use crate::scenario::{MAX_FILE_LEN, Scenario};

/// Maximum number of bytes of a piece that the fuzzer's own mutator changes or adds at once.
const WINDOW: usize = 64;

/// Changes the input in `data[..size]`, which may grow to `data.len()` bytes, and returns its new size.
/// `mutate_bytes` is the fuzzer's own mutator: it changes the first `size` bytes of a slice, which may grow
/// to the whole slice.
pub fn mutate(
    data: &mut [u8],
    size: usize,
    seed: u32,
    mutate_bytes: &mut dyn FnMut(&mut [u8], usize, usize) -> usize,
) -> usize {
    let mut random = Random::new(u64::from(seed));
    let mut scenario = Scenario::decode(&data[..size]);
    for _ in 0..=random.below(3) {
        change(&mut scenario, &mut random, mutate_bytes);
    }
    let input = scenario.encode();
    if input.len() > data.len() {
        let max = data.len();
        return mutate_bytes(data, size, max);
    }
    data[..input.len()].copy_from_slice(&input);
    input.len()
}

fn change(
    scenario: &mut Scenario,
    random: &mut Random,
    mutate_bytes: &mut dyn FnMut(&mut [u8], usize, usize) -> usize,
) {
    if scenario.pieces.is_empty() {
        scenario.pieces.push((0, vec![0; WINDOW]));
    }
    match random.below(32) {
        0 => scenario.flags ^= 1 << random.below(8),
        1 | 2 => scenario.len = file_len(scenario, random),
        3 => {
            let piece = scenario.pieces[random.below(scenario.pieces.len())].clone();
            scenario.pieces.push((place(scenario, random), piece.1));
        }
        4 => {
            let index = random.below(scenario.pieces.len());
            scenario.pieces[index].0 = place(scenario, random);
        }
        5 => {
            let index = random.below(scenario.pieces.len());
            scenario.pieces.remove(index);
        }
        6 => {
            let piece = pick(scenario, random);
            let len = piece.len() + 1 + random.below(WINDOW);
            piece.resize(len, 0);
        }
        7..=9 => {
            let piece = pick(scenario, random);
            let mut grown = piece.clone();
            grown.resize(piece.len() + WINDOW, 0);
            let (size, max) = (piece.len(), grown.len());
            let size = mutate_bytes(&mut grown, size, max);
            grown.truncate(size);
            *piece = grown;
        }
        10..=12 => copy_entry(scenario, random),
        13..=18 => {
            let piece = pick(scenario, random);
            let start = random.below(piece.len().max(1));
            let len = (1 + random.below(WINDOW)).min(piece.len() - start.min(piece.len()));
            if len > 0 {
                let mut window = piece[start..start + len].to_vec();
                mutate_bytes(&mut window, len, len);
                piece[start..start + len].copy_from_slice(&window);
            }
        }
        _ => put_number(scenario, random),
    }
}

fn pick<'a>(scenario: &'a mut Scenario, random: &mut Random) -> &'a mut Vec<u8> {
    let index = random.below(scenario.pieces.len());
    &mut scenario.pieces[index].1
}

/// Copies a table entry over another one or after the last.
fn copy_entry(scenario: &mut Scenario, random: &mut Random) {
    let len = [4, 8, 16, 32, 512][random.below(5)];
    let from = pick(scenario, random);
    let start = random.below(from.len() / len + 1) * len;
    let entry = from[start.min(from.len())..(start + len).min(from.len())].to_vec();
    let to = pick(scenario, random);
    let start = random.below(to.len() / len + 2) * len;
    if to.len() < start + entry.len() {
        to.resize(start + entry.len(), 0);
    }
    to[start..start + entry.len()].copy_from_slice(&entry);
}

/// Writes an interesting number at an aligned position, in either byte order.
fn put_number(scenario: &mut Scenario, random: &mut Random) {
    let len = [1, 2, 4, 4, 8, 8][random.below(6)];
    let number = interesting(scenario, random);
    let little = random.below(2) == 0;
    let index = random.below(scenario.pieces.len());
    let (position, bytes) = &mut scenario.pieces[index];
    // Fields are aligned in the file, not in the piece.
    let skew = ((len as u64 - *position % len as u64) % len as u64) as usize;
    let at = skew + random.below(bytes.len() / len + 1) * len;
    if bytes.len() < at + len {
        bytes.resize(at + len, 0);
    }
    let field = &mut bytes[at..at + len];
    if little {
        field.copy_from_slice(&number.to_le_bytes()[..len]);
    } else {
        field.copy_from_slice(&number.to_be_bytes()[8 - len..]);
    }
}

fn interesting(scenario: &Scenario, random: &mut Random) -> u64 {
    let power = 1u64 << random.below(64);
    match random.below(8) {
        0 => random.below(16) as u64,
        1 => power,
        2 => power.wrapping_sub(1),
        3 => u64::MAX - random.below(4) as u64,
        4 => scenario.len.wrapping_sub(random.below(3) as u64),
        // A pointer, with flags of the formats in its highest and lowest bits.
        5 | 6 => place(scenario, random) | [0, 1, 6, 1 << 63, 1 << 62][random.below(5)],
        _ => random.number(),
    }
}

/// Picks a position in the file, an edge of a piece or any other, and rounds it down.
fn place(scenario: &Scenario, random: &mut Random) -> u64 {
    let near = match scenario.pieces.get(random.below(scenario.pieces.len().max(1))) {
        Some((position, bytes)) if random.below(2) == 0 => {
            position.wrapping_add([0, bytes.len()][random.below(2)] as u64)
        }
        _ => random.number() % scenario.len.max(1),
    };
    let unit = 1u64 << [0, 9, 12, 16, 20][random.below(5)];
    near - near % unit
}

fn file_len(scenario: &Scenario, random: &mut Random) -> u64 {
    let len = match random.below(4) {
        0 => scenario.len.saturating_add(1 << random.below(46)),
        1 => scenario.len.saturating_sub(1 << random.below(24)),
        2 => 1 << random.below(47),
        _ => place(scenario, random),
    };
    len.min(MAX_FILE_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mutations_fit_the_buffer_and_decode() {
        let scenario =
            Scenario { flags: 0, len: 1 << 20, pieces: vec![(0, vec![1; 100]), (65_536, vec![2; 8])] };
        let mut data = vec![0; 4096];
        let mut size = scenario.encode().len();
        data[..size].copy_from_slice(&scenario.encode());
        let mut own = |bytes: &mut [u8], size: usize, _max: usize| {
            bytes[0] ^= 0x55;
            size
        };
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..5000 {
            size = mutate(&mut data, size, seed, &mut own);
            assert!(size <= data.len());
            seen.insert(Scenario::decode(&data[..size]).pieces.len());
        }
        assert!(seen.len() > 3, "pieces come and go: {seen:?}");
    }
}
