//! Hash functions of LUKS headers, and the key derivation on top of them.

use hmac::{EagerHash, Hmac};
use md5::{Digest, Md5};
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Sha224, Sha256, Sha384, Sha512};
use sm3::Sm3;
use zeroize::Zeroizing;

/// A hash function, by its name in a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hash {
    /// MD5, 16 bytes.
    Md5,
    /// SHA-1, 20 bytes.
    Sha1,
    /// SHA-224, 28 bytes.
    Sha224,
    /// SHA-256, 32 bytes.
    Sha256,
    /// SHA-384, 48 bytes.
    Sha384,
    /// SHA-512, 64 bytes.
    Sha512,
    /// RIPEMD-160, 20 bytes.
    Ripemd160,
    /// SM3, 32 bytes.
    Sm3,
}

/// Calls `$call` with the type of the hash function.
macro_rules! with_type {
    ($hash:expr, $call:ident($($argument:expr),*)) => {
        match $hash {
            Hash::Md5 => $call::<Md5>($($argument),*),
            Hash::Sha1 => $call::<Sha1>($($argument),*),
            Hash::Sha224 => $call::<Sha224>($($argument),*),
            Hash::Sha256 => $call::<Sha256>($($argument),*),
            Hash::Sha384 => $call::<Sha384>($($argument),*),
            Hash::Sha512 => $call::<Sha512>($($argument),*),
            Hash::Ripemd160 => $call::<Ripemd160>($($argument),*),
            Hash::Sm3 => $call::<Sm3>($($argument),*),
        }
    };
}

impl Hash {
    /// All hash functions.
    pub const ALL: [Self; 8] = [
        Self::Md5,
        Self::Sha1,
        Self::Sha224,
        Self::Sha256,
        Self::Sha384,
        Self::Sha512,
        Self::Ripemd160,
        Self::Sm3,
    ];

    /// Returns the name in a header, the same as in QEMU and cryptsetup.
    pub fn name(self) -> &'static str {
        match self {
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha224 => "sha224",
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
            Self::Ripemd160 => "ripemd160",
            Self::Sm3 => "sm3",
        }
    }

    /// Returns the hash function called `name`.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hash| hash.name() == name)
    }

    /// Returns the digest of the concatenated `parts`.
    pub(crate) fn digest(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        with_type!(self, digest_of(parts))
    }

    /// Returns the work of [`Self::derive`] for a key of `key_len` bytes, as a number of blocks of SHA-256.
    pub(crate) fn derivation_work(self, iterations: u32, key_len: usize) -> u64 {
        // Length of the digest in bytes, and the time of a block relative to SHA-256, which processors know.
        // Measured on x86-64, rounded up.
        let (digest_len, cost) = match self {
            Self::Md5 => (16, 2),
            Self::Sha1 => (20, 1),
            Self::Sha224 => (28, 1),
            Self::Sha256 => (32, 1),
            Self::Sha384 => (48, 5),
            Self::Sha512 => (64, 5),
            Self::Ripemd160 => (20, 3),
            Self::Sm3 => (32, 4),
        };
        u64::from(iterations) * key_len.div_ceil(digest_len) as u64 * cost
    }

    /// Fills `key` from a passphrase: PBKDF2 (RFC 8018) with HMAC.
    pub(crate) fn derive(self, passphrase: &[u8], salt: &[u8], iterations: u32, key: &mut [u8]) {
        with_type!(self, derive_with(passphrase, salt, iterations, key));
    }
}

fn digest_of<H: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
    let hash = parts.iter().fold(H::new(), |hash, part| hash.chain_update(part));
    Zeroizing::new(hash.finalize().to_vec())
}

fn derive_with<H: EagerHash>(passphrase: &[u8], salt: &[u8], iterations: u32, key: &mut [u8])
where
    Hmac<H>: pbkdf2::hmac::KeyInit,
{
    pbkdf2::pbkdf2_hmac::<H>(passphrase, salt, iterations, key);
}
