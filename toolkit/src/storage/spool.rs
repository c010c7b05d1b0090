//! Spooling: formats that must be read by position, arriving as a stream.
//!
//! The only place where imgtool uses scratch space: a qcow2 or VHDX image in a pipe or under an
//! outer compression that can't be entered in the middle. The copy has no name and vanishes with
//! the program.

use std::fs::File;

use super::input::Stream;
use super::os;
use crate::error::{Error, Result};
use crate::zero;

/// Bytes copied at a time. Ours.
const CHUNK: usize = 256 * 1024;

/// Copies `stream` to an unnamed temporary file; zeros become holes.
pub(super) fn spool(mut stream: Stream) -> Result<File> {
    let failed = |e| {
        Error::io("write a temporary copy", e)
            .path(std::env::temp_dir())
            .hint("set TMPDIR to a directory with enough space, or decompress the image first")
    };
    let file = tempfile::tempfile().map_err(failed)?;
    let mut chunk = vec![0; CHUNK];
    let mut position = 0u64;
    loop {
        let len = stream.read_full(&mut chunk)?;
        let bytes = &chunk[..len];
        if !zero::is_zero(bytes) {
            let mut written = 0;
            while written < len {
                let slices = [std::io::IoSlice::new(&bytes[written..])];
                written +=
                    os::write_vectored_at(&file, &slices, position + written as u64).map_err(failed)?;
            }
        }
        position += len as u64;
        if len < CHUNK {
            break;
        }
    }
    file.set_len(position).map_err(failed)?;
    Ok(file)
}
