//! Seekable zstd files whose seek table contradicts their frames, with right checksums.

use twox_hash::XxHash64;
use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use crate::random::Random;

const SKIPPABLE: u32 = 0x184d_2a50;
const TABLE: u32 = 0x184d_2a5e;
const FOOTER: u32 = 0x8f92_eab1;
const HAS_CHECKSUMS: u8 = 1 << 7;

/// A frame, and its entry in the table.
#[derive(Clone)]
struct Frame {
    stored: Vec<u8>,
    entry: [u32; 3],
}

/// Makes a file from random content.
pub fn make(random: &mut Random) -> Vec<u8> {
    let mut frames: Vec<Frame> = (0..1 + random.below(6)).filter_map(|_| frame(random)).collect();
    let mut count_error = 0;
    for _ in 0..random.below(3) {
        match random.below(3) {
            0 => change_frames(&mut frames, random),
            1 => change_entry(&mut frames, random),
            _ => count_error = [0, 1, u32::MAX][random.below(3)],
        }
    }
    let descriptor = match random.below(6) {
        0 => 1 << random.below(8),
        1 => 0,
        _ => HAS_CHECKSUMS,
    };
    let mut file: Vec<u8> = frames.iter().flat_map(|frame| frame.stored.clone()).collect();
    let words = if descriptor & HAS_CHECKSUMS != 0 { 3 } else { 2 };
    let entries: Vec<u8> = frames
        .iter()
        .flat_map(|frame| frame.entry[..words].iter().flat_map(|word| word.to_le_bytes()))
        .collect();
    let len = (entries.len() as u32 + 9).wrapping_add([0, 0, 0, 0, 0, 1][random.below(6)]);
    file.extend([TABLE.to_le_bytes(), len.to_le_bytes()].concat());
    file.extend(entries);
    file.extend((frames.len() as u32).wrapping_add(count_error).to_le_bytes());
    file.push(descriptor);
    file.extend(FOOTER.to_le_bytes());
    file
}

/// Makes a frame of up to 300 KB, with or without checksum and length.
fn frame(random: &mut Random) -> Option<Frame> {
    let longest = [10, 1000, 70_000, 300_000][random.below(4)];
    let len = random.below(longest);
    let mut plain = vec![0; len];
    let kind = random.below(3);
    for byte in &mut plain {
        *byte = [0, b"imgtool "[random.below(8)], random.number() as u8][kind];
    }
    let mut compressor = Compressor::new(1).ok()?;
    compressor.set_parameter(CParameter::ChecksumFlag(!random.once_in(5))).ok()?;
    compressor.set_parameter(CParameter::ContentSizeFlag(!random.once_in(5))).ok()?;
    let mut stored = compressor.compress(&plain).ok()?;
    if random.once_in(12) {
        // Part of the frame for the table, skipped by decoders.
        stored.extend([SKIPPABLE.to_le_bytes(), 4u32.to_le_bytes(), *b"skip"].concat());
    }
    let checksum = XxHash64::oneshot(0, &plain) as u32;
    Some(Frame { entry: [stored.len() as u32, len as u32, checksum], stored })
}

/// Removes, copies or exchanges frames; their entries follow or do not.
fn change_frames(frames: &mut Vec<Frame>, random: &mut Random) {
    let (first, second) = (random.below(frames.len()), random.below(frames.len()));
    if frames.is_empty() {
        return;
    }
    match random.below(5) {
        0 => drop(frames.remove(first)),
        1 => frames.insert(second, frames[first].clone()),
        2 => frames.swap(first, second),
        // The bytes alone: the entries stay in their order.
        3 => {
            let stored = std::mem::take(&mut frames[first].stored);
            frames[first].stored = std::mem::replace(&mut frames[second].stored, stored);
        }
        _ => {
            let at = random.below(frames[first].stored.len());
            if let Some(byte) = frames[first].stored.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
    }
}

/// Changes a number in the table, maybe with the opposite change in the next entry.
fn change_entry(frames: &mut [Frame], random: &mut Random) {
    let (index, word) = (random.below(frames.len()), random.below(3));
    let difference = [1, 512, u32::MAX, 1 << random.below(32)][random.below(4)];
    if let Some(frame) = frames.get_mut(index) {
        frame.entry[word] = frame.entry[word].wrapping_add(difference);
    }
    if random.once_in(2)
        && let Some(next) = frames.get_mut(index + 1)
    {
        next.entry[word] = next.entry[word].wrapping_sub(difference);
    }
}
