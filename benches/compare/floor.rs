//! The floor of a conversion without compression: the same runs of data written to the same places of a
//! new file, from a buffer that is there already. Nothing is read, looked at or decided. Writes into one
//! file are made one after the other (the kernel holds the inode's lock), so no number of threads is
//! faster than this.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgtool_toolkit::{BufferPool, Error, Input, Result};

/// Bytes written at once, as imgtool does.
const PIECE_LEN: u64 = 256 << 10;

/// Writes what of `image` is data to `target`, at the same places; other content, the same work.
pub fn write(image: &Path, target: &Path) -> Result<()> {
    let source = Input::open_plain(image)?.into_random()?;
    let mut buffer = BufferPool::new().take(PIECE_LEN as usize);
    buffer.fill(0xa5);
    let failed = |e| Error::io("write", e).path(target);
    let file = File::create_new(target).map_err(failed)?;
    file.set_len(source.len()).map_err(failed)?;
    let mut position = 0;
    while position < source.len() {
        for extent in source.extents(position..source.len())? {
            position = extent.end();
            let mut at = extent.start;
            while extent.is_data() && at < extent.end() {
                let end = extent.end().min((at / PIECE_LEN + 1) * PIECE_LEN);
                file.write_all_at(&buffer[..(end - at) as usize], at).map_err(failed)?;
                at = end;
            }
        }
    }
    Ok(())
}
