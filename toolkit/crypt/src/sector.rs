//! Encryption of sectors of 512 bytes.

use std::fmt;
use std::ops::Range;

use imgtool_core::{Error, RandomInput, Remedy, Result, Secrets};
use zeroize::Zeroizing;

use crate::block::{BlockKey, aes_128, keyed};
use crate::iv::{IvGenerator, MAX_BLOCK};
use crate::spec::{CipherSpec, Mode};

/// Length in bytes of a sector, the unit of encryption. LUKS 1.2.3, section 1, "SECTOR_SIZE".
pub const SECTOR: usize = 512;

/// Note on an image with [`SectorCipher::legacy_aes`].
pub const LEGACY_NOTE: &str = "the image is encrypted with QEMU's first AES, which can't tell a wrong passphrase: \
     check that the content makes sense";

/// Number of blocks of 16 bytes in a sector.
const BLOCKS: usize = SECTOR / MAX_BLOCK;

/// Cipher of a volume with its key. Many threads use it at once.
pub struct SectorCipher {
    key: Box<dyn BlockKey>,
    /// Key of the tweaks, the second half of the volume's key with [`Mode::Xts`].
    tweak: Option<Box<dyn BlockKey>>,
    iv: IvGenerator,
    mode: Mode,
    block_len: usize,
}

impl SectorCipher {
    /// Creates the cipher of a volume with `key`, or `None` if the key has another length than
    /// [`CipherSpec::key_len`].
    pub fn new(spec: CipherSpec, key: &[u8]) -> Option<Self> {
        let (first, second) = match spec.mode {
            Mode::Xts => key.split_at_checked(key.len() / 2).map(|(first, second)| (first, Some(second)))?,
            _ => (key, None),
        };
        Some(Self {
            key: keyed(spec.algorithm, first)?,
            tweak: match second {
                Some(second) => Some(keyed(spec.algorithm, second)?),
                None => None,
            },
            iv: IvGenerator::new(spec.iv, spec.algorithm, key)?,
            mode: spec.mode,
            block_len: spec.algorithm.block_len(),
        })
    }

    /// Creates the cipher of the first encryption of QCOW, in its versions 1 and 2, which numbers sectors by
    /// their guest offset. Its key is the start of the passphrase itself, so a wrong passphrase can't be told from the
    /// right one.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] without a passphrase, and with several.
    pub fn legacy_aes(secrets: &Secrets) -> Result<Self> {
        let Some(passphrase) = secrets.single() else {
            return Err(match secrets.len() {
                0 => Error::refused("the content is encrypted (AES)").remedied_by(Remedy::GiveSecret),
                count => Error::refused(format!(
                    "the image is encrypted with QEMU's first AES, which can't tell which of {count} passphrases is right"
                ))
                .remedied_by(Remedy::GiveOneSecret),
            });
        };
        let passphrase = passphrase.bytes();
        let mut key = Zeroizing::new([0; 16]);
        let len = passphrase.len().min(key.len());
        key[..len].copy_from_slice(&passphrase[..len]);
        let aes = aes_128(&key);
        Ok(Self { key: aes, tweak: None, iv: IvGenerator::Plain64, mode: Mode::Cbc, block_len: MAX_BLOCK })
    }

    /// Decrypts `bytes`, whole sectors of which the first has the number `sector`.
    pub fn decrypt(&self, bytes: &mut [u8], sector: u64) {
        for (bytes, sector) in bytes.chunks_exact_mut(SECTOR).zip(sector..) {
            let vector = self.iv.vector(sector, self.block_len);
            match (self.mode, &self.tweak) {
                (Mode::Ecb, _) => self.key.decrypt(bytes),
                (Mode::Cbc, _) => self.decrypt_cbc(bytes, vector),
                (Mode::Ctr, _) => self.apply_counter(bytes, vector),
                (Mode::Xts, tweak) => xts(bytes, &tweaks(tweak.as_deref(), vector), |b| self.key.decrypt(b)),
            }
        }
    }

    /// Encrypts `bytes`, whole sectors of which the first has the number `sector`.
    pub fn encrypt(&self, bytes: &mut [u8], sector: u64) {
        for (bytes, sector) in bytes.chunks_exact_mut(SECTOR).zip(sector..) {
            let vector = self.iv.vector(sector, self.block_len);
            match (self.mode, &self.tweak) {
                (Mode::Ecb, _) => self.key.encrypt(bytes),
                (Mode::Cbc, _) => self.encrypt_cbc(bytes, vector),
                (Mode::Ctr, _) => self.apply_counter(bytes, vector),
                (Mode::Xts, tweak) => xts(bytes, &tweaks(tweak.as_deref(), vector), |b| self.key.encrypt(b)),
            }
        }
    }

    /// Decrypts all blocks at once, then undoes the chaining.
    fn decrypt_cbc(&self, sector: &mut [u8], vector: [u8; MAX_BLOCK]) {
        let mut before = [0; SECTOR];
        before[..self.block_len].copy_from_slice(&vector[..self.block_len]);
        before[self.block_len..].copy_from_slice(&sector[..SECTOR - self.block_len]);
        self.key.decrypt(sector);
        xor(sector, &before);
    }

    fn encrypt_cbc(&self, sector: &mut [u8], vector: [u8; MAX_BLOCK]) {
        let mut before = vector;
        for block in sector.chunks_exact_mut(self.block_len) {
            xor(block, &before[..self.block_len]);
            self.key.encrypt(block);
            before[..self.block_len].copy_from_slice(block);
        }
    }

    /// Encrypts or decrypts with the stream that the encrypted counter makes. The counter is big-endian.
    fn apply_counter(&self, sector: &mut [u8], vector: [u8; MAX_BLOCK]) {
        let mut counter = [0; MAX_BLOCK];
        counter[MAX_BLOCK - self.block_len..].copy_from_slice(&vector[..self.block_len]);
        let mut counter = u128::from_be_bytes(counter);
        let mut stream = Zeroizing::new([0; SECTOR]);
        for block in stream.chunks_exact_mut(self.block_len) {
            block.copy_from_slice(&counter.to_be_bytes()[MAX_BLOCK - self.block_len..]);
            counter = counter.wrapping_add(1);
        }
        self.key.encrypt(&mut stream[..]);
        xor(sector, &stream[..]);
    }
}

impl SectorCipher {
    /// Fills `buf`, whole sectors of which the first has the number `sector`, from `input` at `position`. With
    /// `lost`, fills sectors that can't be read with zeros and passes on their ranges of `buf`.
    ///
    /// # Errors
    /// Those of the reads, without `lost`.
    pub fn read(
        &self,
        input: &RandomInput,
        buf: &mut [u8],
        position: u64,
        sector: u64,
        lost: Option<&mut dyn FnMut(Range<usize>, Error)>,
    ) -> Result<()> {
        let Some(lost) = lost else {
            input.read_exact_at(buf, position)?;
            self.decrypt(buf, sector);
            return Ok(());
        };
        let mut gaps: Vec<Range<usize>> = Vec::new();
        input.read_salvage(buf, position, |gap, e| {
            // A sector of which a part is lost decrypts to noise.
            let gap = gap.start - gap.start % SECTOR..gap.end.next_multiple_of(SECTOR);
            lost(gap.clone(), e);
            gaps.push(gap);
        });
        self.decrypt(buf, sector);
        gaps.into_iter().for_each(|gap| buf[gap].fill(0));
        Ok(())
    }
}

/// Fills `buf`, which starts at `offset`, by calls of `read` for whole sectors with their offsets. Sectors at the
/// ends of which `buf` has only a part are read into a buffer of their own.
///
/// # Errors
/// The first error of `read`.
pub fn in_sectors(
    buf: &mut [u8],
    offset: u64,
    mut read: impl FnMut(&mut [u8], u64) -> Result<()>,
) -> Result<()> {
    let mut sector = [0; SECTOR];
    // Below 512.
    let within = (offset % SECTOR as u64) as usize;
    let head_len = if within == 0 { 0 } else { (SECTOR - within).min(buf.len()) };
    let (head, rest) = buf.split_at_mut(head_len);
    if !head.is_empty() {
        read(&mut sector, offset - within as u64)?;
        head.copy_from_slice(&sector[within..within + head_len]);
    }
    let (middle, tail) = rest.split_at_mut(rest.len() - rest.len() % SECTOR);
    let offset = offset + head_len as u64;
    if !middle.is_empty() {
        read(middle, offset)?;
    }
    if !tail.is_empty() {
        read(&mut sector, offset + middle.len() as u64)?;
        tail.copy_from_slice(&sector[..tail.len()]);
    }
    Ok(())
}

impl fmt::Debug for SectorCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SectorCipher").field("mode", &self.mode).finish_non_exhaustive()
    }
}

/// Returns the tweaks of the blocks of a sector: the encrypted vector, and its products with powers of x.
fn tweaks(key: Option<&dyn BlockKey>, mut vector: [u8; MAX_BLOCK]) -> [u128; BLOCKS] {
    if let Some(key) = key {
        key.encrypt(&mut vector);
    }
    let mut tweak = u128::from_le_bytes(vector);
    std::array::from_fn(|_| {
        let this = tweak;
        // Multiplication by x in GF(2^128), modulo x^128 + x^7 + x^2 + x + 1. IEEE 1619, section 5.2.
        tweak = (this << 1) ^ (0x87 * (this >> 127));
        this
    })
}

/// Adds the tweaks before and after `crypt`, which handles all blocks at once.
fn xts(sector: &mut [u8], tweaks: &[u128; BLOCKS], crypt: impl Fn(&mut [u8])) {
    add_tweaks(sector, tweaks);
    crypt(sector);
    add_tweaks(sector, tweaks);
}

fn add_tweaks(sector: &mut [u8], tweaks: &[u128; BLOCKS]) {
    let (blocks, _) = sector.as_chunks_mut::<MAX_BLOCK>();
    for (block, tweak) in blocks.iter_mut().zip(tweaks) {
        *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
    }
}

fn xor(bytes: &mut [u8], others: &[u8]) {
    for (byte, other) in bytes.iter_mut().zip(others) {
        *byte ^= other;
    }
}
