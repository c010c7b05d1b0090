//! Headers of tar archives: ustar (POSIX.1-1988), the extensions of GNU tar, and the pax headers of
//! POSIX.1-2001.

use imgtool_core::{Error, Result};

mod pax;
mod sparse;
mod walker;
pub(crate) mod write;

pub(crate) use sparse::Run;
pub(crate) use walker::{Blocks, Entry, Positions, Walker, checked_name};

/// Length in bytes of a block. Headers and contents fill whole blocks.
pub(crate) const BLOCK: usize = 512;

/// Maximum size of a member in bytes: the largest file offset.
const MAX_SIZE: u64 = i64::MAX as u64;

/// Maximum length in bytes of a name. Our limit: Linux has no longer path (PATH_MAX).
const MAX_NAME: u64 = 4096;

/// Maximum length in bytes of a pax header. Our limit: one with two paths takes less than 9 KiB.
const MAX_PAX: u64 = 64 << 10;

/// Kind of a member, by the type flag of its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file.
    File,
    /// A regular file with holes, in the old form of GNU tar.
    Sparse,
    /// A directory.
    Directory,
    /// A hard or symbolic link.
    Link,
    /// A device or FIFO.
    Special,
    /// A member that only the program of its vendor knows.
    Vendor,
    /// GNU tar's header with the name of the next member.
    LongName,
    /// GNU tar's header with the target of the next member, a link.
    LongLink,
    /// A pax header of the next member.
    Pax,
    /// A pax header of all further members.
    GlobalPax,
}

impl Kind {
    fn of(flag: u8) -> Self {
        match flag {
            b'0' | 0 | b'7' => Self::File,
            b'S' => Self::Sparse,
            b'5' => Self::Directory,
            b'1' | b'2' => Self::Link,
            b'3' | b'4' | b'6' => Self::Special,
            b'L' => Self::LongName,
            b'K' => Self::LongLink,
            b'x' | b'X' => Self::Pax,
            b'g' => Self::GlobalPax,
            _ => Self::Vendor,
        }
    }

    /// Returns the name for messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::File | Self::Sparse => "a file",
            Self::Directory => "a directory",
            Self::Link => "a link",
            Self::Special => "a device or FIFO",
            Self::Vendor => "a member of an unknown type",
            Self::LongName | Self::LongLink | Self::Pax | Self::GlobalPax => "an extended header",
        }
    }

    /// True if the member is a file with content.
    pub(crate) fn is_file(self) -> bool {
        matches!(self, Self::File | Self::Sparse)
    }
}

/// A header whose checksum is right.
pub(super) struct Header<'b> {
    block: &'b [u8; BLOCK],
    pub(super) kind: Kind,
    /// Length in bytes of the content behind the header.
    pub(super) size: u64,
}

impl<'b> Header<'b> {
    /// Parses a block.
    ///
    /// # Errors
    /// `Corrupt` for a wrong checksum; `Malformed` for a number that is none.
    pub(super) fn parse(block: &'b [u8; BLOCK]) -> Result<Self> {
        if !has_checksum(block) {
            return Err(Error::corrupt("the checksum of a tar header does not match")
                .hint("the archive is damaged: copy it again"));
        }
        let size = number(&block[124..136])
            .filter(|size| *size <= MAX_SIZE)
            .ok_or_else(|| Error::malformed("the size in a tar header is no number below 2^63"))?;
        Ok(Self { block, kind: Kind::of(block[156]), size })
    }

    /// Returns the name, with the prefix that only ustar headers have.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.block[..100]);
        let prefix = text(&self.block[345..500]);
        match &self.block[257..263] {
            b"ustar\0" if !prefix.is_empty() => [prefix, b"/", name].concat(),
            _ => name.to_vec(),
        }
    }

    /// Returns the name of the form, as GNU tar calls it.
    pub(super) fn form(&self) -> &'static str {
        match &self.block[257..265] {
            b"ustar  \0" => "oldgnu",
            magic if magic.starts_with(b"ustar") => "ustar",
            _ => "v7",
        }
    }

    /// Returns the block.
    pub(super) fn block(&self) -> &'b [u8; BLOCK] {
        self.block
    }
}

/// True if `head` begins with the header of a tar archive: its checksum is right, and it has the magic number, or
/// nothing in its place, as before POSIX.
pub(crate) fn is_tar(head: &[u8]) -> bool {
    let is_known = |magic: &[u8]| magic.starts_with(b"ustar") || magic[..8] == [0; 8];
    head.first_chunk::<BLOCK>().is_some_and(|block| is_known(&block[257..]) && has_checksum(block))
}

/// True if `head` has the magic number of a tar archive, or only a checksum that is right.
pub(crate) fn may_be_tar(head: &[u8]) -> bool {
    let block = head.first_chunk::<BLOCK>();
    block.is_some_and(|block| block[257..].starts_with(b"ustar") || has_checksum(block))
}

/// True if the sum of all bytes of the block is the stored one. The sum counts its own field as blanks.
fn has_checksum(block: &[u8; BLOCK]) -> bool {
    const FIELD: std::ops::Range<usize> = 148..156;
    let counted = |(at, byte): (usize, &u8)| u64::from(if FIELD.contains(&at) { b' ' } else { *byte });
    let sum: u64 = block.iter().enumerate().map(counted).sum();
    number(&block[FIELD]) == Some(sum)
}

/// Returns the bytes before the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Returns the number in a field: octal digits, or, with the highest bit set, a number to the base 256 (GNU
/// tar).
pub(super) fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first & 0x80 != 0 {
        let (high, low) = rest.split_at_checked(rest.len().checked_sub(8)?)?;
        let is_small = *first == 0x80 && high.iter().all(|byte| *byte == 0);
        return low.first_chunk().filter(|_| is_small).map(|low| u64::from_be_bytes(*low));
    }
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = field.iter().position(|byte| *byte != b' ')?;
    let digits = field[start..].split(is_blank).next().filter(|digits| !digits.is_empty())?;
    let rest = &field[start + digits.len()..];
    let digits = std::str::from_utf8(digits).ok().filter(|_| rest.iter().all(is_blank))?;
    let is_octal = digits.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
    u64::from_str_radix(digits, 8).ok().filter(|_| is_octal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_to_the_base_256() {
        for (field, expected) in [
            (&b"00000001750\0"[..], Some(1000)),
            (b"       1750 ", Some(1000)),
            (b"777777777777", Some((1 << 36) - 1)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(2 << 32)),
            (b"\x80\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff", Some(u64::MAX)),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\x81\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", None),
            (b"            ", None),
            (b"0000000175x\0", None),
            (b"00000009\0\0\0\0", None),
            (b"-0000001750\0", None),
            (b"+0000001750\0", None),
            (b"0001\x000001750", None),
        ] {
            assert_eq!(number(field), expected, "{field:?}");
        }
    }
}
