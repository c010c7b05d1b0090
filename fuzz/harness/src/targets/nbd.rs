//! Everything that an NBD server sends.

use std::io::{self, Cursor, Read, Write};

use imgtool_nbd::uri::Uri;
use imgtool_nbd::wire;

use crate::exercise;

/// A connection whose other side sends fixed bytes.
struct Script<'a>(Cursor<&'a [u8]>);

impl Read for Script<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Script<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Negotiates, asks for extents and reads. Bytes that are text are a URL as well.
pub(super) fn run(input: &[u8]) {
    if let Ok(text) = std::str::from_utf8(input) {
        let _ = exercise::opened(Uri::parse(text));
    }
    let mut script = Script(Cursor::new(input));
    let Some(export) = exercise::opened(wire::negotiate(&mut script, "disk")) else { return };
    assert!(export.block.is_power_of_two() && export.payload >= export.block);
    let asked = export.size.min(1 << 20);
    // The cookie of the first reply is 1.
    if let Some(extents) = exercise::opened(wire::extents(&mut script, &export, 1, 0..asked)) {
        let sum: u64 = extents.iter().map(|extent| extent.len).sum();
        assert!(sum > 0 && sum <= asked && extents.iter().all(|extent| extent.len > 0));
    }
    let mut buf = vec![0; usize::try_from(asked.min(4096)).unwrap_or(0)];
    let _ = exercise::opened(wire::read_at(&mut script, &export, 2, &mut buf, 0));
}
