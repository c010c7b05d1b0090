//! Encryption of guest data: LUKS, and the AES that QEMU had before it. Specification, "Data encryption" and
//! "Full disk encryption header pointer".
//!
//! Only data clusters are encrypted: neither tables nor compressed clusters, as in QEMU.

use std::ops::Range;

use imgtool_core::{Error, Losses, OpenOptions, RandomInput, Result};
use imgtool_crypt::{HEADER_LEN, Header as LuksHeader, SECTOR, SectorCipher, in_sectors};

use crate::layout::header::{Encryption, Header};

/// Maximum length in bytes of an encryption header. Our limit: LUKS headers have a few MiB, but a crafted
/// image can declare one as long as a sparse file.
pub const MAX_CRYPTO_HEADER: u64 = 256 << 20;

/// Cipher of an image's data clusters.
pub struct DataCipher {
    cipher: SectorCipher,
    /// True if sectors are numbered by their guest offset, as in QEMU's first AES; otherwise by their host
    /// offset.
    by_guest: bool,
}

impl DataCipher {
    /// Unlocks the data of an image; `None` if it is not encrypted, or if the caller reads no content.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] without the right passphrase.
    pub fn unlock(input: &RandomInput, header: &Header, options: &OpenOptions) -> Result<Option<Self>> {
        if header.encryption == Encryption::None || options.layout_only {
            return Ok(None);
        }
        if header.encryption == Encryption::Luks {
            let (luks, area) = read_luks(input, header)?;
            let cipher = luks.unlock(input, area, &options.secrets, &options.memory)?;
            return Ok(Some(Self { cipher, by_guest: false }));
        }
        let cipher = SectorCipher::legacy_aes(&options.secrets).map_err(|e| e.at(32))?;
        Ok(Some(Self { cipher, by_guest: true }))
    }

    /// Fills `buf` with the guest's bytes from `guest_offset` on, which `data` stores from `host_offset` on.
    /// With `losses`, fills sectors that can't be read with zeros and records them.
    pub fn read(
        &self,
        data: &RandomInput,
        buf: &mut [u8],
        host_offset: u64,
        guest_offset: u64,
        losses: Option<&Losses>,
    ) -> Result<()> {
        // Clusters are multiples of a sector, so both offsets are at the same place in one.
        in_sectors(buf, host_offset, |sectors, host| {
            let guest = host.wrapping_sub(host_offset).wrapping_add(guest_offset);
            let number = if self.by_guest { guest } else { host } / SECTOR as u64;
            let Some(losses) = losses else { return self.cipher.read(data, sectors, host, number, None) };
            let mut lost = |lost: Range<usize>, e: Error| {
                losses.add(guest + lost.start as u64..guest + lost.end as u64, &e);
            };
            self.cipher.read(data, sectors, host, number, Some(&mut lost))
        })
    }
}

/// Reads the LUKS header of an image. Returns it with the host range that it and its key material may use.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Malformed`] if there is none, or if it is outside of the file.
pub fn read_luks(input: &RandomInput, header: &Header) -> Result<(LuksHeader, Range<u64>)> {
    let Some((offset, len)) = header.extensions.crypto_header else {
        return Err(Error::malformed("the image is encrypted (LUKS), but has no encryption header"));
    };
    let cluster_size = header.shape.cluster_size();
    if !offset.is_multiple_of(cluster_size) || offset == 0 {
        return Err(Error::malformed(format!(
            "the encryption header is at offset {offset}, not at a multiple of {cluster_size}"
        )));
    }
    if !(HEADER_LEN as u64..=MAX_CRYPTO_HEADER).contains(&len) {
        return Err(Error::malformed(format!(
            "the encryption header has {len} bytes, not within {HEADER_LEN}..{MAX_CRYPTO_HEADER}"
        ))
        .at(offset));
    }
    let end = offset.checked_add(len).filter(|end| *end <= input.len());
    let Some(end) = end else {
        return Err(Error::corrupt("the file ends within the encryption header")
            .at(offset)
            .hint("the file is cut short: copy it again, or use a backup"));
    };
    let luks = LuksHeader::parse(&input.read_vec(offset, HEADER_LEN)?).map_err(|e| e.at(offset))?;
    Ok((luks, offset..end))
}
