//! Encoding of images in the fuzzer's inputs.
//!
//! Images are mostly empty, and their lengths and positions matter: a VHDX file begins with a nearly empty
//! MiB, and a hostile file of 64 TiB may have a table at its end. An input is therefore a list of pieces:
//! flags (1 byte), length of the file (8 bytes), then for each piece its position (8), its length (2) and
//! its bytes. Numbers are little-endian. Every byte string is a scenario: missing fields are zero, missing
//! bytes of a piece shorten it.

use crate::sparse::SparseFile;

/// Maximum length in bytes of a scenario's file. Our limit: 64 TiB, the largest image that imgtool promises
/// to
/// handle.
pub const MAX_FILE_LEN: u64 = 64 << 40;

/// Maximum length in bytes of a piece: its length field has 16 bits.
const MAX_PIECE: usize = u16::MAX as usize;

/// Maximum number of consecutive zeros within a piece; a longer gap starts a new piece.
const JOINED_GAP: usize = 16;

/// A file in pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Scenario {
    /// Flags, whose bits each target defines.
    pub flags: u8,
    /// Length of the file in bytes.
    pub len: u64,
    /// Position in the file and content of each piece. A later piece overwrites an earlier one.
    pub pieces: Vec<(u64, Vec<u8>)>,
}

impl Scenario {
    /// Decodes an input.
    pub fn decode(input: &[u8]) -> Self {
        let mut rest = input;
        let flags = number(&mut rest, 1) as u8;
        let len = number(&mut rest, 8).min(MAX_FILE_LEN);
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let position = number(&mut rest, 8);
            let piece_len = (number(&mut rest, 2) as usize).min(rest.len());
            let (piece, after) = rest.split_at(piece_len);
            pieces.push((position, piece.to_vec()));
            rest = after;
        }
        Self { flags, len, pieces }
    }

    /// Encodes the scenario as an input.
    pub fn encode(&self) -> Vec<u8> {
        let mut input = vec![self.flags];
        input.extend_from_slice(&self.len.to_le_bytes());
        for (position, bytes) in &self.pieces {
            for (index, piece) in bytes.chunks(MAX_PIECE).enumerate() {
                let position = position.wrapping_add((index * MAX_PIECE) as u64);
                input.extend_from_slice(&position.to_le_bytes());
                input.extend_from_slice(&(piece.len() as u16).to_le_bytes());
                input.extend_from_slice(piece);
            }
        }
        input
    }

    /// Makes a scenario of a whole file from its runs of nonzero bytes.
    pub fn of_file(bytes: &[u8]) -> Self {
        let mut pieces: Vec<(u64, Vec<u8>)> = Vec::new();
        let mut at = 0;
        while let Some(start) = bytes[at..].iter().position(|byte| *byte != 0).map(|found| at + found) {
            let mut end = start;
            let mut zeros = 0;
            for (index, byte) in bytes[start..].iter().enumerate().take(MAX_PIECE) {
                zeros = if *byte == 0 { zeros + 1 } else { 0 };
                if zeros == 0 {
                    end = start + index + 1;
                } else if zeros > JOINED_GAP {
                    break;
                }
            }
            pieces.push((start as u64, bytes[start..end].to_vec()));
            at = end;
        }
        Self { flags: 0, len: bytes.len() as u64, pieces }
    }

    /// Builds the file.
    pub fn file(&self) -> SparseFile {
        let mut file = SparseFile::new(self.len.min(MAX_FILE_LEN));
        for (position, bytes) in &self.pieces {
            file.write(*position, bytes);
        }
        file
    }
}

/// Splits a number of `len` bytes off the front; missing bytes are zero.
fn number(rest: &mut &[u8], len: usize) -> u64 {
    let (bytes, after) = rest.split_at(len.min(rest.len()));
    *rest = after;
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_a_file() {
        let mut bytes = vec![0; 300_000];
        bytes[0] = 1;
        bytes[20] = 2;
        bytes[5000..150_000].fill(3);
        bytes[299_999] = 4;
        let scenario = Scenario::of_file(&bytes);
        assert!(scenario.pieces.len() < 8, "{}", scenario.pieces.len());
        let again = Scenario::decode(&scenario.encode());
        assert_eq!(again, scenario);
        assert!(again.file().bytes(0..300_000) == bytes);
    }

    #[test]
    fn decodes_any_input() {
        let input: Vec<u8> = (0..=255).collect();
        for len in 0..input.len() {
            let scenario = Scenario::decode(&input[..len]);
            let _ = scenario.file();
            assert_eq!(
                Scenario::decode(&scenario.encode()).file().bytes(0..64),
                scenario.file().bytes(0..64)
            );
        }
    }
}
