//! Spooling: formats that must be read by position, arriving as a stream.
//!
//! The only place where imgtool uses scratch space: a qcow2 or VHDX image in a pipe or under an
//! outer compression that can't be entered in the middle. The copy has no name and vanishes with
//! the program.

use std::fs::File;
use std::io::{self, IoSlice};

use super::input::Stream;
use super::os;
use crate::buffer::BufferPool;
use crate::error::{Error, Result};
use crate::zero;

/// Bytes copied at a time. Ours.
const CHUNK: usize = 256 * 1024;

/// Copies `stream`, of at most `limit` bytes, to an unnamed temporary file; zeros become holes.
pub(super) fn spool(mut stream: Stream, limit: u64) -> Result<File> {
    let failed = |e| {
        Error::io("write a temporary copy", e)
            .path(std::env::temp_dir())
            .hint("set TMPDIR to a directory with enough space, or decompress the image first")
    };
    let file = tempfile::tempfile().map_err(failed)?;
    let mut chunk = BufferPool::new().take(CHUNK);
    let mut position = 0u64;
    loop {
        let len = stream.read_full(&mut chunk)?;
        let bytes = &chunk[..len];
        if !zero::is_zero(bytes) {
            write_all_at(&file, bytes, position).map_err(failed)?;
        }
        position += len as u64;
        if position > limit {
            return Err(Error::limit(format!("the file expands to more than {limit} bytes"))
                .path(stream.path())
                .hint("it may be made to take forever; if it is not, decompress it first"));
        }
        if len < CHUNK {
            break;
        }
    }
    file.set_len(position).map_err(failed)?;
    Ok(file)
}

fn write_all_at(file: &File, mut bytes: &[u8], mut position: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match os::write_vectored_at(file, &[IoSlice::new(bytes)], position) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => {
                bytes = &bytes[count..];
                position += count as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
