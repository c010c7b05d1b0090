//! Unlocking: from a passphrase to the key of a volume.

use std::ops::Range;

use imgtool_core::{Error, Memory, RandomInput, Remedy, Result, Secret};
use zeroize::Zeroizing;

use crate::af;
use crate::hash::Hash;
use crate::header::{DIGEST_LEN, Header, KeySlot};
use crate::sector::SectorCipher;
use crate::spec::CipherSpec;

/// Maximum number of PBKDF2 iterations of all slots in use together. Our limit, about a minute of work:
/// programs choose a second or two for a slot, but a crafted header can ask for 2^32 in each.
const MAX_ITERATIONS: u64 = 100_000_000;

impl Header {
    /// Returns the cipher of the content, unlocked with `secret`. The header and its key material are the bytes
    /// `area` of `input`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] without a secret, and if it opens no slot;
    /// [`imgtool_core::ErrorKind::Unsupported`] for an unknown cipher;
    /// [`imgtool_core::ErrorKind::LimitExceeded`] for too many iterations.
    pub fn unlock(
        &self,
        input: &RandomInput,
        area: Range<u64>,
        secret: Option<&Secret>,
        memory: &Memory,
    ) -> Result<SectorCipher> {
        let (spec, hash) = (self.cipher()?, self.hash()?);
        let slots: Vec<&KeySlot> = self.slots.iter().filter(|slot| slot.active).collect();
        self.check_work(&slots)?;
        self.check_places(&slots, &area)?;
        let Some(secret) = secret else {
            return Err(Error::refused("the content is encrypted (LUKS)").remedied_by(Remedy::GiveSecret));
        };
        let _lease = memory.lease(self.material_len() as u64, "the key material of a LUKS header")?;
        for slot in &slots {
            if let Some(key) = self.try_slot(slot, input, area.start, secret, spec, hash)? {
                return cipher(spec, &key);
            }
        }
        let message = match slots.len() {
            0 => "no key slot is in use, so that no passphrase opens the content".to_owned(),
            1 => "wrong passphrase: it does not open the only key slot in use".to_owned(),
            count => format!("wrong passphrase: it opens none of the {count} key slots in use"),
        };
        Err(Error::refused(message).hint("nothing was decrypted; check the passphrase and its line end"))
    }

    /// Refuses slots that would take too long.
    fn check_work(&self, slots: &[&KeySlot]) -> Result<()> {
        let each = |slot: &&KeySlot| u64::from(slot.iterations) + u64::from(self.digest_iterations);
        // At most eight slots.
        let all: u64 = slots.iter().map(each).sum();
        if all <= MAX_ITERATIONS {
            return Ok(());
        }
        Err(Error::limit(format!("the key slots need {all} PBKDF2 iterations, above {MAX_ITERATIONS}"))
            .hint("no program sets so many; cryptsetup luksChangeKey on a copy sets fewer"))
    }

    /// Refuses key material outside of `area`.
    fn check_places(&self, slots: &[&KeySlot], area: &Range<u64>) -> Result<()> {
        let available = area.end.saturating_sub(area.start);
        let len = self.material_len() as u64;
        match slots.iter().find(|slot| slot.offset.saturating_add(len) > available) {
            Some(slot) => Err(Error::malformed(format!(
                "{len} bytes of key material at offset {} leave the header's {available} bytes",
                slot.offset
            ))
            .at(area.start)),
            None => Ok(()),
        }
    }

    /// Returns the key if `secret` opens `slot`.
    fn try_slot(
        &self,
        slot: &KeySlot,
        input: &RandomInput,
        start: u64,
        secret: &Secret,
        spec: CipherSpec,
        hash: Hash,
    ) -> Result<Option<Zeroizing<Vec<u8>>>> {
        let mut slot_key = Zeroizing::new(vec![0; self.key_len]);
        let mut material = Zeroizing::new(vec![0; self.material_len()]);
        // Within the area of the header.
        input.read_exact_at(&mut material, start.saturating_add(slot.offset))?;
        hash.derive(secret.bytes(), &slot.salt, slot.iterations, &mut slot_key);
        cipher(spec, &slot_key)?.decrypt(&mut material, 0);
        let stripes = self.key_len * af::STRIPES as usize;
        let key = af::merge(&material[..stripes], self.key_len, hash);
        let mut digest = [0; DIGEST_LEN];
        hash.derive(&key, &self.digest_salt, self.digest_iterations, &mut digest);
        Ok((digest == self.digest).then_some(key))
    }
}

/// Returns the cipher with `key`, whose length the names of the cipher were checked with.
pub(crate) fn cipher(spec: CipherSpec, key: &[u8]) -> Result<SectorCipher> {
    SectorCipher::new(spec, key)
        .ok_or_else(|| Error::malformed(format!("the cipher has no keys of {} bytes", key.len())))
}
