//! Image locks, by which QEMU's programs and imgtool see that another program uses an image.
//!
//! A program takes a shared lock on one byte of the file for each of its uses, and on another byte for each use
//! that it does not permit to others. It then tests the bytes of the opposite kind. The bytes and their meaning
//! were observed in the system calls of qemu-img, qemu-io and qemu-nbd 10.0:
//!
//! * A reader of a qcow2 image takes 100, 201 and 203, and tests 200, 101 and 103.
//! * A writer of a qcow2 image takes 101 and 103 as well, and tests 201 and 203 as well.
//! * A writer of a raw image takes 100 and 101, and tests 200 and 201; qemu-nbd also takes 203.

use std::fs::File;
use std::io;
use std::ops::Range;

use imgtool_core::{Error, Remedy, Result};

use crate::os;

/// First byte for the uses of a program.
const USED: u64 = 100;
/// First byte for the uses that a program does not permit to others.
const NOT_SHARED: u64 = 200;

/// Use that needs consistent content.
const READ: u64 = 0;
/// Use that changes content.
const WRITE: u64 = 1;
/// Use that changes the length.
const RESIZE: u64 = 3;

/// Bytes that a reader locks.
const READER: [u64; 3] = [USED + READ, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
/// Bytes that a reader tests.
const AGAINST_READER: [u64; 3] = [NOT_SHARED + READ, USED + WRITE, USED + RESIZE];
/// Bytes that a writer locks.
const WRITER: [u64; 5] = [USED + READ, USED + WRITE, USED + RESIZE, NOT_SHARED + WRITE, NOT_SHARED + RESIZE];
/// All bytes with a meaning; several are for uses that imgtool does not have.
const ALL: Range<u64> = USED..NOT_SHARED + 10;

/// Treatment of a source that another program may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Refuse it, and lock the source so that no such program starts meanwhile.
    #[default]
    Refused,
    /// Read it without a lock.
    Accepted,
}

impl Sharing {
    /// Returns the treatment that [`imgtool_core::OpenOptions::force_share`] selects.
    pub fn forced(force_share: bool) -> Self {
        if force_share { Self::Accepted } else { Self::Refused }
    }
}

/// Lock of an open file, as it was when the file was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ImageLock {
    /// The file is locked, or the user did not want a lock and no other program may write it.
    Safe,
    /// Another program may write the file, which the user accepted.
    Written,
    /// The file has no locks: nobody knows whether another program uses it.
    Unavailable,
}

/// Locks `file` for reading until it is closed.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if another program may write it.
pub(crate) fn for_reading(file: &File, sharing: Sharing) -> Result<ImageLock> {
    let take: &[u64] = if sharing == Sharing::Refused { &READER } else { &[] };
    let is_used = || {
        let mut bytes = AGAINST_READER.iter();
        bytes.try_fold(false, |used, byte| Ok(used || os::is_locked(file, *byte..byte + 1)?))
    };
    match (try_lock(file, take, is_used), sharing) {
        (Ok(false), _) => Ok(ImageLock::Safe),
        (Ok(true), Sharing::Accepted) => Ok(ImageLock::Written),
        (Ok(true), Sharing::Refused) => {
            Err(Error::refused("in use: another program, perhaps a virtual machine, may write it")
                .remedied_by(Remedy::ShareSource(
                    "stop the program that uses it, or read a snapshot of it".into(),
                )))
        }
        (Err(_), _) => Ok(ImageLock::Unavailable),
    }
}

/// Locks `file` for writing until it is closed.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if another program uses it.
pub(crate) fn for_writing(file: &File) -> Result<ImageLock> {
    match try_lock(file, &WRITER, || os::is_locked(file, ALL)) {
        Ok(false) => Ok(ImageLock::Safe),
        Ok(true) => Err(Error::refused("in use: another program, perhaps a virtual machine, has locked it")),
        Err(_) => Ok(ImageLock::Unavailable),
    }
}

/// Locks these bytes and returns whether another program has a lock that forbids it. An error means that the
/// file has no locks.
fn try_lock(file: &File, bytes: &[u64], is_used: impl Fn() -> io::Result<bool>) -> io::Result<bool> {
    for byte in bytes {
        match os::lock_byte(file, *byte) {
            Ok(()) => {}
            // An exclusive lock. QEMU's programs take none, but others may lock a whole file.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::PermissionDenied) => {
                return Ok(true);
            }
            Err(e) => return Err(e),
        }
    }
    is_used()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// Opens a new file several times.
    fn opened<const N: usize>() -> (tempfile::TempDir, [File; N]) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, b"").unwrap();
        (dir, [(); N].map(|()| File::options().read(true).write(true).open(&path).unwrap()))
    }

    #[test]
    fn readers_share_and_writers_do_not() {
        let (_dir, [one, two, writer]) = opened();
        assert_eq!(for_reading(&one, Sharing::Refused).unwrap(), ImageLock::Safe);
        assert_eq!(for_reading(&two, Sharing::Refused).unwrap(), ImageLock::Safe);
        assert!(for_writing(&writer).is_err());
        drop((one, two));
        // The refused writer has locks until it is closed.
        drop(writer);
    }

    #[test]
    fn a_writer_excludes_others_until_it_closes_the_file() {
        let (_dir, [writer, reader, second, late]) = opened();
        assert_eq!(for_writing(&writer).unwrap(), ImageLock::Safe);
        assert!(for_reading(&reader, Sharing::Refused).is_err());
        assert_eq!(for_reading(&reader, Sharing::Accepted).unwrap(), ImageLock::Written);
        assert!(for_writing(&second).is_err());
        let copy = writer.try_clone().unwrap();
        drop((writer, reader, second));
        assert!(for_writing(&late).is_err(), "a copy of the descriptor keeps the locks");
        drop(copy);
        assert_eq!(for_writing(&late).unwrap(), ImageLock::Safe);
    }

    /// As `qemu-io -f raw`: it takes no byte of the second kind.
    #[test]
    fn a_writer_that_shares_everything_is_still_a_writer() {
        let (_dir, [writer, reader, other]) = opened();
        os::lock_byte(&writer, USED + WRITE).unwrap();
        assert!(for_reading(&reader, Sharing::Refused).is_err());
        assert!(for_writing(&other).is_err());
    }

    /// The base of a running virtual machine's overlay is only read.
    #[test]
    fn a_reader_of_a_base_image_is_no_obstacle() {
        let (_dir, [machine, reader]) = opened();
        READER.iter().for_each(|byte| os::lock_byte(&machine, *byte).unwrap());
        assert_eq!(for_reading(&reader, Sharing::Refused).unwrap(), ImageLock::Safe);
    }
}
