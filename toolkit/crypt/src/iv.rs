//! Initialisation vectors: the number of a sector as the start of its encryption.

use crate::block::{BlockKey, keyed};
use crate::spec::{Algorithm, IvRule};

/// Longest block of the ciphers in bytes.
pub(crate) const MAX_BLOCK: usize = 16;

/// Generator of the initialisation vectors of sectors.
pub(crate) enum IvGenerator {
    /// Lower 32 bits of the sector number, little-endian.
    Plain,
    /// Sector number of 64 bits, little-endian.
    Plain64,
    /// The sector number as in `Plain64`, encrypted with a hash of the key.
    Essiv(Box<dyn BlockKey>),
}

impl IvGenerator {
    /// Creates the generator of `rule` for a volume with `key`, or `None` if the cipher has no keys of the
    /// hash's length.
    pub(crate) fn new(rule: IvRule, algorithm: Algorithm, key: &[u8]) -> Option<Self> {
        Some(match rule {
            IvRule::Plain => Self::Plain,
            IvRule::Plain64 => Self::Plain64,
            IvRule::Essiv(hash) => Self::Essiv(keyed(algorithm, &hash.digest(&[key]))?),
        })
    }

    /// Returns the vector of a sector. A cipher with shorter blocks uses its first `block_len` bytes.
    pub(crate) fn vector(&self, sector: u64, block_len: usize) -> [u8; MAX_BLOCK] {
        let number = match self {
            Self::Plain => sector & u64::from(u32::MAX),
            Self::Plain64 | Self::Essiv(_) => sector,
        };
        let mut vector = [0; MAX_BLOCK];
        vector[..8].copy_from_slice(&number.to_le_bytes());
        if let Self::Essiv(key) = self {
            key.encrypt(&mut vector[..block_len]);
        }
        vector
    }
}
