//! Spooling: copies a stream to a temporary file, for readers that need reads by position or the length.
//!
//! Nothing else in imgtool uses scratch space. The usual case is a qcow2 or VHDX image from a pipe, or inside
//! outer compression without random access. The copy has no name and disappears with the process.

use std::fs::File;

use imgtool_core::{BufferPool, Copied, Error, Result, Stream, zero};

use crate::file::write_all_at;

/// Number of bytes copied at a time. Our choice.
const CHUNK: usize = 256 * 1024;

/// Copies `stream` to an unnamed temporary file; chunks of zeros become holes. Calls `copied` after each
/// chunk. Fails with [`imgtool_core::ErrorKind::LimitExceeded`] if the stream is longer than `limit` bytes.
pub(super) fn spool(mut stream: Stream, limit: u64, copied: &dyn Fn(Copied)) -> Result<File> {
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
        let is_zero = zero::is_zero(bytes);
        if !is_zero {
            write_all_at(&file, bytes, position).map_err(failed)?;
        }
        let guest = len as u64;
        copied(Copied { guest, data: guest, zero: if is_zero { guest } else { 0 } });
        position += guest;
        if position > limit {
            return Err(Error::limit(format!("the file expands to more than {limit} bytes"))
                .path(stream.location())
                .hint("it may be a decompression bomb; if you trust it, decompress it first"));
        }
        if len < CHUNK {
            break;
        }
    }
    file.set_len(position).map_err(failed)?;
    Ok(file)
}
