//! New headers: a random key, and a slot that a passphrase opens.

use std::time::{Duration, Instant};

use imgtool_core::{Error, Result, Secret};
use zerocopy::{FromZeros, IntoBytes};
use zeroize::Zeroizing;

use crate::af;
use crate::hash::Hash;
use crate::header::{
    DISABLED, ENABLED, HEADER_LEN, MAGIC, RawHeader, RawSlot, SALT_LEN, SLOTS, material_len,
};
use crate::sector::{SECTOR, SectorCipher};
use crate::spec::CipherSpec;
use crate::unlock::cipher;

/// Time that the PBKDF2 iterations of a new slot take without another choice, as in QEMU and cryptsetup: an attacker
/// with such a machine needs as long for each guess.
pub const DEFAULT_SLOT_TIME: Duration = Duration::from_secs(2);

/// Minimum number of iterations where the machine decides, however busy or slow it is. OWASP's recommendation of
/// 2023 for SHA-256.
pub const MIN_TIMED_ITERATIONS: u32 = 600_000;

/// Maximum number of iterations where the machine decides. Our limit: a slot of ten times the speed of today's
/// machines opens on an old one, too.
pub const MAX_TIMED_ITERATIONS: u32 = 50_000_000;

/// Minimum number of iterations. LUKS 1.2.3, section 6, "LUKS_MKD_ITER" and section 4.1.
pub const MIN_ITERATIONS: u32 = 1000;

/// Alignment in bytes of the key material and the content. LUKS 1.2.3, section 6, "LUKS_ALIGN_KEYSLOTS".
const ALIGNMENT: usize = 4096;

/// Description of a new volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewVolume {
    /// Cipher of the content.
    pub cipher: CipherSpec,
    /// Hash function of the key derivation.
    pub hash: Hash,
    /// PBKDF2 iterations of the slot.
    pub iterations: Iterations,
}

/// Choice of a number of PBKDF2 iterations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iterations {
    /// This number.
    Count(u32),
    /// As many as take this time on this machine, within [`MIN_TIMED_ITERATIONS`] and [`MAX_TIMED_ITERATIONS`].
    Time(Duration),
}

impl Iterations {
    /// Returns the number for keys of `key_len` bytes.
    fn count(self, hash: Hash, key_len: usize) -> u32 {
        let time = match self {
            Self::Count(count) => return count,
            Self::Time(time) => time,
        };
        let mut key = Zeroizing::new(vec![0; key_len]);
        let mut sample = 10_000;
        loop {
            let start = Instant::now();
            hash.derive(b"passphrase", b"salt", sample, &mut key);
            let elapsed = start.elapsed();
            if elapsed >= SAMPLE_TIME || sample >= MIN_TIMED_ITERATIONS {
                let count = u128::from(sample) * time.as_nanos() / elapsed.as_nanos().max(1);
                let count = u32::try_from(count).unwrap_or(u32::MAX);
                return count.clamp(MIN_TIMED_ITERATIONS, MAX_TIMED_ITERATIONS);
            }
            sample *= 2;
        }
    }
}

/// Least time of the sample that measures the machine.
const SAMPLE_TIME: Duration = Duration::from_millis(50);

impl Default for NewVolume {
    fn default() -> Self {
        Self {
            cipher: CipherSpec::DEFAULT,
            hash: Hash::Sha256,
            iterations: Iterations::Time(DEFAULT_SLOT_TIME),
        }
    }
}

/// Header of a new volume, with the cipher of its content.
#[derive(Debug)]
pub struct NewHeader {
    /// Header and key material of the first slot. The rest up to `payload_offset` is unused.
    pub bytes: Vec<u8>,
    /// Start of the content, in bytes from the start of the header.
    pub payload_offset: u64,
    /// Cipher of the content.
    pub cipher: SectorCipher,
}

impl NewVolume {
    /// Returns the length in bytes of the header with the material of all slots: the start of the content.
    pub fn payload_offset(&self) -> u64 {
        let slot = material_len(self.cipher.key_len()).next_multiple_of(ALIGNMENT);
        // Below 3 MiB.
        (ALIGNMENT + SLOTS * slot) as u64
    }

    /// Creates a header with a new key from the random numbers of the operating system. `secret` opens it.
    ///
    /// # Errors
    /// If the operating system supplies no random numbers.
    pub fn create(&self, secret: &Secret) -> Result<NewHeader> {
        let key_len = self.cipher.key_len();
        let iterations = self.iterations.count(self.hash, key_len);
        let key = random(key_len)?;
        let mut raw = RawHeader::new_zeroed();
        raw.magic = MAGIC;
        raw.version = 1.into();
        set_text(&mut raw.cipher_name, self.cipher.algorithm.name());
        set_text(&mut raw.cipher_mode, &self.cipher.mode_name());
        set_text(&mut raw.hash_spec, self.hash.name());
        // These three are below 2^32.
        raw.payload_offset = ((self.payload_offset() / SECTOR as u64) as u32).into();
        raw.key_bytes = (key_len as u32).into();
        raw.mk_digest_iterations = (iterations / 8).max(MIN_ITERATIONS).into();
        raw.mk_digest_salt.copy_from_slice(&random(SALT_LEN)?);
        self.hash.derive(&key, &raw.mk_digest_salt, raw.mk_digest_iterations.get(), &mut raw.mk_digest);
        let id: [u8; 16] = random(16)?.as_slice().try_into().unwrap_or_default();
        set_text(&mut raw.uuid, &uuid::Builder::from_random_bytes(id).into_uuid().to_string());
        self.describe_slots(&mut raw, iterations)?;
        let material = self.lock(&key, secret, &raw.slots[0])?;
        let mut bytes = raw.as_bytes().to_vec();
        bytes.resize(ALIGNMENT, 0);
        bytes.extend_from_slice(&material);
        debug_assert!(raw.as_bytes().len() == HEADER_LEN);
        Ok(NewHeader { bytes, payload_offset: self.payload_offset(), cipher: cipher(self.cipher, &key)? })
    }

    /// Fills the slots: the first is in use, all have their places.
    fn describe_slots(&self, raw: &mut RawHeader, iterations: u32) -> Result<()> {
        let slot_len = material_len(self.cipher.key_len()).next_multiple_of(ALIGNMENT);
        for (number, slot) in raw.slots.iter_mut().enumerate() {
            slot.active = DISABLED.into();
            slot.stripes = af::STRIPES.into();
            // Below 2^32.
            slot.key_material_offset = (((ALIGNMENT + number * slot_len) / SECTOR) as u32).into();
        }
        let first = &mut raw.slots[0];
        first.active = ENABLED.into();
        first.iterations = iterations.into();
        first.salt.copy_from_slice(&random(SALT_LEN)?);
        Ok(())
    }

    /// Returns the key material of a slot that `secret` opens.
    fn lock(&self, key: &[u8], secret: &Secret, slot: &RawSlot) -> Result<Zeroizing<Vec<u8>>> {
        let mut material = random(material_len(key.len()))?;
        af::split(key, &mut material[..key.len() * af::STRIPES as usize], self.hash);
        let mut slot_key = Zeroizing::new(vec![0; key.len()]);
        self.hash.derive(&secret.bytes(), &slot.salt, slot.iterations.get(), &mut slot_key);
        cipher(self.cipher, &slot_key)?.encrypt(&mut material, 0);
        Ok(material)
    }
}

/// Returns `len` random bytes.
fn random(len: usize) -> Result<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(vec![0; len]);
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::io("get random numbers from the operating system", e.into()))?;
    Ok(bytes)
}

/// Stores a text that is shorter than its field.
fn set_text(field: &mut [u8], text: &str) {
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
}
