//! The header.

use imgtool_core::{Error, Result};

/// Beginning of an image of any version: a script that mounts it, whose second line names the version.
const MAGIC: &[u8] = b"#!/bin/sh\n#V";
/// The rest of the second line in version 2.
const VERSION_2: &[u8] = b"2.0 Format\n";

/// Size of a sector in bytes.
pub(crate) const SECTOR_SIZE: u64 = 512;
/// Length of the header in bytes: 128 bytes of text and two numbers. The table follows it.
pub(crate) const HEADER_LEN: u64 = 136;
/// Width of an entry of the table in bytes.
pub(crate) const ENTRY_LEN: u64 = 8;
/// Maximum size of a block in bytes. QEMU's limit; live CDs use 64 to 256 KiB.
const MAX_BLOCK_SIZE: u32 = 64 << 20;

/// The header of an image, checked.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    /// Size of a block in bytes.
    pub(crate) block_size: u64,
    /// Number of blocks.
    pub(crate) blocks: u64,
}

/// True if an image begins with the script of some version.
pub(crate) fn is_cloop(head: &[u8]) -> bool {
    let digit = head.strip_prefix(MAGIC).and_then(|rest| rest.split_first());
    digit.is_some_and(|(digit, rest)| digit.is_ascii_digit() && rest.starts_with(&VERSION_2[1..]))
}

impl Header {
    /// Decodes and checks a header.
    ///
    /// # Errors
    /// `WrongFormat` without the signature; `Unsupported` for another version; `Malformed` for impossible
    /// numbers.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self> {
        if !is_cloop(bytes) {
            return Err(Error::wrong_format("is not a cloop image: the signature is missing"));
        }
        let version = &bytes[MAGIC.len()..];
        if !version.starts_with(VERSION_2) {
            let digit = version.first().copied().map_or('?', char::from);
            return Err(Error::unsupported(format!("the image has version {digit}.0, not 2.0"))
                .hint("let the cloop tools extract it"));
        }
        let number = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or_else(|| {
                Error::corrupt(format!("the file ends within the header of {HEADER_LEN} bytes"))
                    .hint("the file is cut short: copy it again, or use a backup")
            })
        };
        let (block_size, blocks) = (number(128)?, number(132)?);
        if block_size == 0 || block_size > MAX_BLOCK_SIZE || u64::from(block_size) % SECTOR_SIZE != 0 {
            return Err(Error::malformed(format!(
                "the image has blocks of {block_size} bytes, not whole sectors up to {MAX_BLOCK_SIZE} bytes"
            ))
            .at(128));
        }
        Ok(Self { block_size: block_size.into(), blocks: blocks.into() })
    }

    /// Returns the virtual size in bytes.
    pub(crate) fn virtual_size(&self) -> u64 {
        // At most 2^32 blocks of 2^26 bytes.
        self.block_size * self.blocks
    }

    /// Returns the length of the table in bytes: an offset for each block, and that of the end.
    pub(crate) fn table_len(&self) -> u64 {
        (self.blocks + 1) * ENTRY_LEN
    }

    /// Returns the maximum length in bytes of a compressed block. Our limit, above the worst case of zlib.
    pub(crate) fn max_stored(&self) -> u64 {
        self.block_size + self.block_size / 8 + 4096
    }
}
