//! Unlocking: from a passphrase to the key of a volume.

use std::ops::Range;

use imgtool_core::{Error, Memory, RandomInput, Remedy, Result, Secret, Secrets};
use zeroize::Zeroizing;

use crate::af;
use crate::hash::Hash;
use crate::header::{DIGEST_LEN, Header, KeySlot};
use crate::sector::SectorCipher;
use crate::spec::CipherSpec;

/// Maximum work for one header with all passphrases, in blocks of SHA-256's key derivation: one iteration yields a block of 32 bytes.
/// Our limit, one to two minutes. QEMU and cryptsetup choose two seconds for a slot, and ten times that on request;
/// a crafted header can ask for 2^32 iterations in each of eight.
const MAX_WORK: u64 = 400_000_000;

impl Header {
    /// Returns the cipher of the content, unlocked with one of `secrets`. The header and its key material are the
    /// bytes `area` of `input`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] without a secret, and if none opens a slot;
    /// [`imgtool_core::ErrorKind::Unsupported`] for an unknown cipher;
    /// [`imgtool_core::ErrorKind::LimitExceeded`] for too many iterations before a slot opens.
    pub fn unlock(
        &self,
        input: &RandomInput,
        area: Range<u64>,
        secrets: &Secrets,
        memory: &Memory,
    ) -> Result<SectorCipher> {
        let (spec, hash) = (self.cipher()?, self.hash()?);
        let slots: Vec<&KeySlot> = self.slots.iter().filter(|slot| slot.active).collect();
        self.check_places(&slots, &area)?;
        let count = secrets.len();
        if count == 0 {
            return Err(Error::refused("the content is encrypted (LUKS)").remedied_by(Remedy::GiveSecret));
        }
        let _lease = memory.lease(self.material_len() as u64, "the key material of a LUKS header")?;
        let mut left = MAX_WORK;
        // All passphrases for one slot before the next: a costly slot may be behind the one that opens.
        for (slot, secret) in slots.iter().flat_map(|slot| secrets.iter().map(move |secret| (slot, secret))) {
            left = self.spend(slot, hash, left, count)?;
            if let Some(key) = self.try_slot(slot, input, area.start, secret, spec, hash)? {
                return cipher(spec, &key);
            }
        }
        Err(wrong(slots.len(), count))
    }

    /// Returns the work that is left after a try of `slot` with one of `secrets` passphrases.
    fn spend(&self, slot: &KeySlot, hash: Hash, left: u64, secrets: usize) -> Result<u64> {
        let of_slot = hash.derivation_work(slot.iterations, self.key_len);
        let work = of_slot.saturating_add(hash.derivation_work(self.digest_iterations, DIGEST_LEN));
        left.checked_sub(work).ok_or_else(|| {
            let (slot, digest) = (slot.iterations, self.digest_iterations);
            let error = Error::limit(format!(
                "a key slot needs {slot} PBKDF2 iterations and its digest {digest}, minutes of work with the tries \
                 before it"
            ));
            match secrets {
                1 => error.hint(
                    "no program chooses so many; if the image is your own, cryptsetup luksChangeKey on a copy sets fewer",
                ),
                _ => error.hint(format!("each of {secrets} passphrases was tried: give fewer")),
            }
        })
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
        hash.derive(&secret.bytes(), &slot.salt, slot.iterations, &mut slot_key);
        cipher(spec, &slot_key)?.decrypt(&mut material, 0);
        let stripes = self.key_len * af::STRIPES as usize;
        let key = af::merge(&material[..stripes], self.key_len, hash);
        let mut digest = [0; DIGEST_LEN];
        hash.derive(&key, &self.digest_salt, self.digest_iterations, &mut digest);
        Ok((digest == self.digest).then_some(key))
    }
}

/// Returns the error for `secrets` passphrases that open none of the `slots` key slots in use.
fn wrong(slots: usize, secrets: usize) -> Error {
    let message = match (slots, secrets) {
        (0, _) => {
            return Error::refused("no key slot is in use, so that no passphrase opens the content")
                .hint("the header was damaged, or its keys were removed: restore the header from a backup");
        }
        (1, 1) => "wrong passphrase: it does not open the only key slot in use".to_owned(),
        (_, 1) => format!("wrong passphrase: it opens none of the {slots} key slots in use"),
        (1, _) => format!("wrong passphrase: none of the {secrets} opens the only key slot in use"),
        _ => format!("wrong passphrase: none of the {secrets} opens any of the {slots} key slots in use"),
    };
    Error::refused(message).hint("nothing was decrypted; check the passphrase and its line end")
}

/// Returns the cipher with `key`, whose length the names of the cipher were checked with.
pub(crate) fn cipher(spec: CipherSpec, key: &[u8]) -> Result<SectorCipher> {
    SectorCipher::new(spec, key)
        .ok_or_else(|| Error::malformed(format!("the cipher has no keys of {} bytes", key.len())))
}
