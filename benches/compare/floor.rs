//! Measures a lower bound for a conversion without compression: writes as many bytes as the image has data,
//! to the same offsets of a new file, from one buffer and without reading the data. The kernel serializes
//! writes to one file (inode lock), so more threads would not be faster.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imgtool_core::{BufferPool, Error, Memory, Result};
use imgtool_storage::open::{Opening, open};

/// Length in bytes of a write, as in the writers for raw and qcow2.
const PIECE_LEN: u64 = 256 << 10;

/// Writes other content to `target`, at the offsets of the data extents of `image`.
pub fn write(image: &Path, target: &Path) -> Result<()> {
    let source = open(&image.into(), Opening::Plain, &Memory::default())?.input.into_random()?;
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
