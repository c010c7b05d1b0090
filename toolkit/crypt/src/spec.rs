//! Names of a cipher: its algorithm, mode and rule for initialisation vectors.

use imgtool_core::{Error, Result};

use crate::hash::Hash;

/// A block cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// AES.
    Aes,
    /// Serpent.
    Serpent,
    /// Twofish.
    Twofish,
    /// CAST5 (CAST-128), with blocks of 8 bytes.
    Cast5,
}

/// A mode of a block cipher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Each block for itself.
    Ecb,
    /// Cipher block chaining.
    Cbc,
    /// XEX with ciphertext stealing (IEEE 1619), with a key of two halves.
    Xts,
    /// Counter mode: the initialisation vector counts up.
    Ctr,
}

/// A rule for the initialisation vectors of sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IvRule {
    /// Lower 32 bits of the sector number.
    Plain,
    /// Sector number.
    Plain64,
    /// Encrypted sector number; the key is this hash of the volume's key.
    Essiv(Hash),
}

/// Cipher of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CipherSpec {
    /// Block cipher.
    pub algorithm: Algorithm,
    /// Length of its key in bits; half of the volume's key with [`Mode::Xts`].
    pub key_bits: u32,
    /// Mode.
    pub mode: Mode,
    /// Rule for initialisation vectors.
    pub iv: IvRule,
}

impl Algorithm {
    const ALL: [Self; 4] = [Self::Aes, Self::Serpent, Self::Twofish, Self::Cast5];

    /// Returns the name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Aes => "aes",
            Self::Serpent => "serpent",
            Self::Twofish => "twofish",
            Self::Cast5 => "cast5",
        }
    }

    /// Returns the lengths in bytes of the keys that are supported.
    pub(crate) fn key_lens(self) -> &'static [usize] {
        match self {
            Self::Cast5 => &[16],
            _ => &[16, 24, 32],
        }
    }

    /// Returns the length in bytes of a block.
    pub(crate) fn block_len(self) -> usize {
        if self == Self::Cast5 { 8 } else { 16 }
    }
}

impl Mode {
    const ALL: [Self; 4] = [Self::Ecb, Self::Cbc, Self::Xts, Self::Ctr];

    /// Returns the name in a header.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ecb => "ecb",
            Self::Cbc => "cbc",
            Self::Xts => "xts",
            Self::Ctr => "ctr",
        }
    }
}

impl IvRule {
    /// Returns the name in a header.
    pub fn name(self) -> String {
        match self {
            Self::Plain => "plain".to_owned(),
            Self::Plain64 => "plain64".to_owned(),
            Self::Essiv(hash) => format!("essiv:{}", hash.name()),
        }
    }

    fn by_name(name: &str) -> Option<Self> {
        match name.split_once(':') {
            // QEMU appends a hash that these rules do not use.
            None | Some(("plain" | "plain64", _)) => match name.split(':').next()? {
                "plain" => Some(Self::Plain),
                "plain64" => Some(Self::Plain64),
                _ => None,
            },
            Some(("essiv", hash)) => Hash::by_name(hash).map(Self::Essiv),
            Some(_) => None,
        }
    }
}

impl CipherSpec {
    /// Default of new volumes, the same as QEMU's: AES-256 in XTS mode.
    pub const DEFAULT: Self =
        Self { algorithm: Algorithm::Aes, key_bits: 256, mode: Mode::Xts, iv: IvRule::Plain64 };

    /// Cipher of qcow2's first encryption: AES-128 in CBC mode.
    pub const LEGACY_AES: Self =
        Self { algorithm: Algorithm::Aes, key_bits: 128, mode: Mode::Cbc, iv: IvRule::Plain64 };

    /// Parses the fields "cipher-name" and "cipher-mode" of a header whose volume has keys of `key_len` bytes.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unsupported`] with the name that is not known, or the length of the key.
    pub fn parse(cipher_name: &str, cipher_mode: &str, key_len: usize) -> Result<Self> {
        let known = Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == cipher_name);
        let Some(algorithm) = known else {
            return Err(unsupported(&format!("the cipher '{cipher_name}'")));
        };
        let (mode_name, iv_name) = cipher_mode.split_once('-').unwrap_or((cipher_mode, ""));
        let Some(mode) = Mode::ALL.into_iter().find(|mode| mode.name() == mode_name) else {
            return Err(unsupported(&format!("the cipher mode '{cipher_mode}'")));
        };
        // Without chaining, no vector is used.
        let iv = if mode == Mode::Ecb { Some(IvRule::Plain64) } else { IvRule::by_name(iv_name) };
        let Some(iv) = iv else {
            return Err(unsupported(&format!("the initialisation vectors of '{cipher_mode}'")));
        };
        let halves = if mode == Mode::Xts { 2 } else { 1 };
        let fits = key_len.is_multiple_of(halves) && algorithm.key_lens().contains(&(key_len / halves));
        if !fits || (mode == Mode::Xts && algorithm.block_len() != 16) {
            return Err(unsupported(&format!("{cipher_name}-{cipher_mode} with a key of {key_len} bytes")));
        }
        // At most 32 bytes.
        let spec = Self { algorithm, key_bits: (key_len / halves * 8) as u32, mode, iv };
        spec.check_essiv()?;
        Ok(spec)
    }

    /// Refuses a hash whose digest is no key of the cipher.
    fn check_essiv(&self) -> Result<()> {
        let IvRule::Essiv(hash) = self.iv else { return Ok(()) };
        let len = hash.digest(&[]).len();
        if self.algorithm.key_lens().contains(&len) {
            return Ok(());
        }
        let (cipher, hash) = (self.algorithm.name(), hash.name());
        Err(unsupported(&format!("{cipher} with essiv:{hash}, whose digest of {len} bytes is no key of it,")))
    }

    /// Returns the length in bytes of a volume's key.
    pub fn key_len(&self) -> usize {
        let halves = if self.mode == Mode::Xts { 2 } else { 1 };
        // At most 64.
        self.key_bits as usize / 8 * halves
    }

    /// Returns the field "cipher-mode" of a header.
    pub fn mode_name(&self) -> String {
        format!("{}-{}", self.mode.name(), self.iv.name())
    }

    /// Returns QEMU's name of the algorithm with the length of its key ("aes-256").
    pub fn algorithm_name(&self) -> String {
        format!("{}-{}", self.algorithm.name(), self.key_bits)
    }
}

fn unsupported(what: &str) -> Error {
    Error::unsupported(format!("{what} is not supported"))
        .hint("qemu-img or cryptsetup may know it: decrypt a copy with them first")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn parses_the_names_of_headers() {
        let spec = CipherSpec::parse("aes", "xts-plain64", 64).unwrap();
        assert_eq!(spec, CipherSpec::DEFAULT);
        assert_eq!((spec.key_len(), spec.mode_name()), (64, "xts-plain64".to_owned()));
        let spec = CipherSpec::parse("aes", "cbc-essiv:sha256", 16).unwrap();
        assert_eq!(spec.iv, IvRule::Essiv(Hash::Sha256));
        assert_eq!(spec.algorithm_name(), "aes-128");
        assert_eq!(CipherSpec::parse("aes", "cbc-plain:sha1", 16).unwrap().iv, IvRule::Plain);
        assert_eq!(CipherSpec::parse("serpent", "ecb", 32).unwrap().mode, Mode::Ecb);
    }

    #[test]
    fn refuses_other_names_and_keys() {
        for (name, mode, len) in [
            ("des3_ede", "cbc-plain64", 24),
            ("aes", "lrw-benbi", 32),
            ("aes", "cbc-tcw", 32),
            ("aes", "cbc", 32),
            ("aes", "xts-plain64", 16),
            ("aes", "xts-plain64", 63),
            ("cast5", "xts-plain64", 32),
            ("aes", "cbc-essiv:sha1", 32),
            ("aes", "cbc-plain64", 64),
            ("", "", 0),
        ] {
            assert!(CipherSpec::parse(name, mode, len).is_err(), "{name} {mode} {len}");
        }
    }
}
