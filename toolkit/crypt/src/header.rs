//! LUKS version 1 header: its fields, checked, and the facts that they state.

use imgtool_core::{Error, Result};
use serde_json::{Map, Value, json};
use zerocopy::byteorder::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::af::STRIPES;
use crate::hash::Hash;
use crate::sector::SECTOR;
use crate::spec::CipherSpec;

/// Magic number at the start of a header, of every version. LUKS 1.2.3, section 6, "LUKS_MAGIC".
pub const MAGIC: [u8; 6] = *b"LUKS\xba\xbe";

/// Length in bytes of the header without the key material. LUKS 1.2.3, section 2.2.
pub const HEADER_LEN: usize = 592;

/// Number of key slots. LUKS 1.2.3, section 6, "LUKS_NUMKEYS".
pub(crate) const SLOTS: usize = 8;

/// Keys of [`Header::facts`], those of `qemu-img info`.
pub const FACTS: [&str; 10] = [
    "cipher-alg",
    "cipher-mode",
    "ivgen-alg",
    "ivgen-hash-alg",
    "hash-alg",
    "detached-header",
    "uuid",
    "payload-offset",
    "master-key-iters",
    "slots",
];

/// State of a slot in use. LUKS 1.2.3, section 6, "LUKS_KEY_ENABLED".
pub(crate) const ENABLED: u32 = 0x00ac_71f3;
/// State of a slot that is not in use. LUKS 1.2.3, section 6, "LUKS_KEY_DISABLED".
pub(crate) const DISABLED: u32 = 0x0000_dead;

/// Length in bytes of the digest of the key. LUKS 1.2.3, section 6, "LUKS_DIGESTSIZE".
pub(crate) const DIGEST_LEN: usize = 20;
/// Length in bytes of a salt. LUKS 1.2.3, section 6, "LUKS_SALTSIZE".
pub(crate) const SALT_LEN: usize = 32;

/// Longest key in bytes: two keys of 256 bits.
const MAX_KEY_LEN: u32 = 64;

/// Key slot as stored. LUKS 1.2.3, section 2.2, like [`RawHeader`].
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawSlot {
    pub(crate) active: U32,
    pub(crate) iterations: U32,
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) key_material_offset: U32,
    pub(crate) stripes: U32,
}

/// Header as stored.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(crate) struct RawHeader {
    pub(crate) magic: [u8; 6],
    pub(crate) version: U16,
    pub(crate) cipher_name: [u8; 32],
    pub(crate) cipher_mode: [u8; 32],
    pub(crate) hash_spec: [u8; 32],
    pub(crate) payload_offset: U32,
    pub(crate) key_bytes: U32,
    pub(crate) mk_digest: [u8; DIGEST_LEN],
    pub(crate) mk_digest_salt: [u8; SALT_LEN],
    pub(crate) mk_digest_iterations: U32,
    pub(crate) uuid: [u8; 40],
    pub(crate) slots: [RawSlot; SLOTS],
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_LEN);

/// A key slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySlot {
    /// True if a passphrase opens it.
    pub active: bool,
    /// PBKDF2 iterations.
    pub iterations: u32,
    pub(crate) salt: [u8; SALT_LEN],
    /// Position of the key material, in bytes from the start of the header.
    pub offset: u64,
    /// Number of stripes of the key material.
    pub stripes: u32,
}

/// Checked header. It holds no secret: all of it is stored in the clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Field "cipher-name"; untrusted, like the next two.
    pub cipher_name: String,
    /// Field "cipher-mode".
    pub cipher_mode: String,
    /// Field "hash-spec".
    pub hash_name: String,
    /// Start of the encrypted content, in bytes from the start of the header.
    pub payload_offset: u64,
    /// Length of the key in bytes.
    pub key_len: usize,
    pub(crate) digest: [u8; DIGEST_LEN],
    pub(crate) digest_salt: [u8; SALT_LEN],
    /// PBKDF2 iterations of the digest that shows whether a key is right.
    pub digest_iterations: u32,
    /// UUID of the volume; untrusted.
    pub uuid: String,
    /// The eight key slots.
    pub slots: Vec<KeySlot>,
}

impl Header {
    /// Parses and checks the first bytes of a header.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::WrongFormat`] without the magic number;
    /// [`imgtool_core::ErrorKind::Unsupported`] for LUKS version 2.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if !bytes.starts_with(&MAGIC) {
            return Err(Error::wrong_format("is not a LUKS header: the magic number is missing"));
        }
        let version = bytes.get(6..8).map_or(0, |v| u16::from_be_bytes([v[0], v[1]]));
        match version {
            1 => {}
            2 => {
                let message = "the header is LUKS version 2; only version 1 is supported";
                return Err(Error::unsupported(message).at(6));
            }
            other => return Err(Error::unsupported(format!("unknown LUKS version {other}")).at(6)),
        }
        let Ok((raw, _)) = RawHeader::read_from_prefix(bytes) else {
            return Err(Error::corrupt(format!(
                "the file ends within the header, after {} bytes",
                bytes.len()
            )));
        };
        let header = Self::from_raw(&raw)?;
        header.check()?;
        Ok(header)
    }

    fn from_raw(raw: &RawHeader) -> Result<Self> {
        let slots = raw.slots.iter().zip(0..).map(|(slot, number)| slot_of(slot, number));
        let key_bytes = raw.key_bytes.get();
        if key_bytes == 0 || key_bytes > MAX_KEY_LEN {
            return Err(Error::malformed(format!(
                "the key has {key_bytes} bytes, not within 1..{MAX_KEY_LEN}"
            ))
            .at(108));
        }
        Ok(Self {
            cipher_name: text(&raw.cipher_name),
            cipher_mode: text(&raw.cipher_mode),
            hash_name: text(&raw.hash_spec),
            payload_offset: u64::from(raw.payload_offset.get()) * SECTOR as u64,
            // At most MAX_KEY_LEN.
            key_len: key_bytes as usize,
            digest: raw.mk_digest,
            digest_salt: raw.mk_digest_salt,
            digest_iterations: raw.mk_digest_iterations.get(),
            uuid: text(&raw.uuid),
            slots: slots.collect::<Result<_>>()?,
        })
    }

    fn check(&self) -> Result<()> {
        if self.digest_iterations == 0 {
            return Err(Error::malformed("the digest of the key has 0 iterations").at(164));
        }
        for (slot, number) in self.slots.iter().zip(0..).filter(|(slot, _)| slot.active) {
            let at = slot_offset(number);
            if slot.iterations == 0 {
                return Err(Error::malformed(format!("key slot {number} has 0 iterations")).at(at + 4));
            }
            if slot.stripes != STRIPES {
                let stripes = slot.stripes;
                return Err(Error::malformed(format!(
                    "key slot {number} has {stripes} stripes, not {STRIPES}"
                ))
                .at(at + 44));
            }
            if slot.offset < HEADER_LEN as u64 {
                let offset = slot.offset;
                return Err(Error::malformed(format!(
                    "the key material of slot {number} is at offset {offset}, inside the header"
                ))
                .at(at + 40));
            }
        }
        Ok(())
    }

    /// Returns the length in bytes of the key material of a slot, in whole sectors.
    pub fn material_len(&self) -> usize {
        material_len(self.key_len)
    }

    /// Returns the cipher of the content.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unsupported`] with the name that is not known.
    pub fn cipher(&self) -> Result<CipherSpec> {
        CipherSpec::parse(&self.cipher_name, &self.cipher_mode, self.key_len)
    }

    /// Returns the hash function of the key derivation.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Unsupported`] with the name that is not known.
    pub fn hash(&self) -> Result<Hash> {
        Hash::by_name(&self.hash_name).ok_or_else(|| {
            Error::unsupported(format!("the hash function '{}' is not supported", self.hash_name))
                .hint("cryptsetup may know it: decrypt a copy with it first")
        })
    }

    /// Returns the facts of `qemu-img info`, with its names, in reading order.
    pub fn facts(&self) -> Map<String, Value> {
        let (mode, iv) = self.cipher_mode.split_once('-').unwrap_or((&self.cipher_mode, ""));
        let (iv, iv_hash) = iv.split_once(':').unwrap_or((iv, ""));
        let halves = if mode == "xts" { 2 } else { 1 };
        let mut facts = Map::new();
        let mut fact = |key: &str, value: Value| facts.insert(key.to_owned(), value);
        fact("cipher-alg", format!("{}-{}", self.cipher_name, self.key_len * 8 / halves).into());
        fact("cipher-mode", mode.into());
        fact("ivgen-alg", iv.into());
        if !iv_hash.is_empty() {
            fact("ivgen-hash-alg", iv_hash.into());
        }
        fact("hash-alg", self.hash_name.clone().into());
        fact("detached-header", false.into());
        fact("uuid", self.uuid.clone().into());
        fact("payload-offset", self.payload_offset.into());
        fact("master-key-iters", self.digest_iterations.into());
        fact("slots", self.slots.iter().map(KeySlot::fact).collect());
        facts
    }
}

impl KeySlot {
    fn fact(&self) -> Value {
        match self.active {
            true => json!({
                "active": true,
                "iters": self.iterations,
                "key-offset": self.offset,
                "stripes": self.stripes,
            }),
            false => json!({ "active": false, "key-offset": self.offset }),
        }
    }
}

fn slot_of(raw: &RawSlot, number: u64) -> Result<KeySlot> {
    let active = match raw.active.get() {
        ENABLED => true,
        DISABLED => false,
        other => {
            return Err(Error::malformed(format!("key slot {number} has the unknown state {other:#010x}"))
                .at(slot_offset(number)));
        }
    };
    Ok(KeySlot {
        active,
        iterations: raw.iterations.get(),
        salt: raw.salt,
        offset: u64::from(raw.key_material_offset.get()) * SECTOR as u64,
        stripes: raw.stripes.get(),
    })
}

/// Returns the position of a slot in the header.
fn slot_offset(number: u64) -> u64 {
    (HEADER_LEN as u64).saturating_sub((SLOTS as u64 - number) * size_of::<RawSlot>() as u64)
}

/// Returns the length in bytes of the key material for a key of `key_len` bytes, at most 64, in whole sectors.
pub(crate) fn material_len(key_len: usize) -> usize {
    (key_len * STRIPES as usize).next_multiple_of(SECTOR)
}

/// Decodes the text before the first zero byte.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
