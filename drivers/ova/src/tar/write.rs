//! Headers of new archives: ustar, as every importer of packages reads it, and the form of GNU tar before
//! POSIX, which Google Compute Engine wants.

use imgtool_core::{Error, Result};

use super::BLOCK;

/// Maximum length of a name in bytes: that of the field, without a prefix.
pub(crate) const MAX_NEW_NAME: usize = 100;

/// Smallest size that is written to the base 256, in bytes: eleven octal digits end here.
const BASE_256: u64 = 8 << 30;

/// Returns the header of a file of `size` bytes, last changed at `mtime` seconds since 1970.
///
/// # Errors
/// `Unsupported` for a longer name than [`MAX_NEW_NAME`].
pub(crate) fn header(name: &str, size: u64, mtime: u64) -> Result<[u8; BLOCK]> {
    header_of(name, size, mtime, (0, b"ustar\x0000"))
}

/// Like [`header`], in the form of GNU tar before POSIX.
///
/// # Errors
/// Same as [`header`].
pub(crate) fn old_gnu_header(name: &str, size: u64, mtime: u64) -> Result<[u8; BLOCK]> {
    header_of(name, size, mtime, (b'0', b"ustar  \0"))
}

/// Returns a header with this type flag, magic number and version.
fn header_of(name: &str, size: u64, mtime: u64, (flag, magic): (u8, &[u8; 8])) -> Result<[u8; BLOCK]> {
    let mut block = [0; BLOCK];
    if name.len() > MAX_NEW_NAME {
        return Err(Error::unsupported(format!(
            "the name '{name}' has {} bytes; the limit in an archive is {MAX_NEW_NAME}",
            name.len()
        )));
    }
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    // User and group 0.
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    match size {
        BASE_256.. => {
            put(124, &[0x80, 0, 0, 0]);
            put(128, &size.to_be_bytes());
        }
        _ => put(124, format!("{size:011o}\0").as_bytes()),
    }
    // Eleven octal digits.
    put(136, format!("{:011o}\0", mtime.min(BASE_256 - 1)).as_bytes());
    put(148, b"        0");
    put(156, &[flag]);
    put(257, magic);
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tar::{Header, is_tar};

    #[test]
    fn headers_are_read_back() {
        for size in [0, 1, (8 << 30) - 1, 8 << 30, (1 << 50) + 7] {
            let block = header("vm-disk1.vmdk", size, 1_700_000_000).expect("a short name");
            assert!(is_tar(&block));
            let read = Header::parse(&block).expect("sound");
            assert_eq!((read.size, read.name(), read.form()), (size, b"vm-disk1.vmdk".to_vec(), "ustar"));
            let block = old_gnu_header("disk.raw", size, 1).expect("a short name");
            let read = Header::parse(&block).expect("sound");
            assert_eq!((read.size, read.name(), read.form()), (size, b"disk.raw".to_vec(), "oldgnu"));
        }
        assert!(header(&"a".repeat(101), 0, 0).is_err());
    }
}
