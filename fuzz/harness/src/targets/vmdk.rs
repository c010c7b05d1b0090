//! VMDK images, by position and, if their beginning says that they can be, as a stream.

use std::sync::Arc;

use imgtool_core::input::{Cursor, PROBE_LEN};
use imgtool_core::{Access, Driver, Input, OpenOptions, ReadAt};
use imgtool_vmdk::VmdkDriver;

use super::{by_position, file};
use crate::exercise::{self, opened};
use crate::scenario::MAX_FILE_LEN;
use crate::sparse::SparseFile;

/// Maximum length in bytes of a file that is read as a stream. Our limit, for the time per input.
const MAX_STREAM: u64 = 16 << 20;

pub(super) fn image(input: &[u8]) -> SparseFile {
    file(input, MAX_FILE_LEN).1
}

pub(super) fn run(input: &[u8]) {
    let file = Arc::new(image(input));
    exercise::image("vmdk", &OpenOptions::default(), &|| by_position(&file));
    let head = file.bytes(0..file.len().min(PROBE_LEN as u64));
    if file.len() > MAX_STREAM || !VmdkDriver.reads_stream(&head) {
        return;
    }
    for salvage in [false, true] {
        let options = OpenOptions { salvage, ..OpenOptions::default() };
        let reader = Box::new(Cursor::new(Arc::clone(&file) as _));
        let piped = Input::from_reader("image", reader).and_then(|input| VmdkDriver.open(input, &options));
        let Some(source) = opened(piped) else { continue };
        let devices = source.info().devices.clone();
        let Access::Stream(pass) = source.access() else { panic!("not read in one pass") };
        let mut pass = pass.lock().expect("no panic before");
        let _ = exercise::stream(&devices, &mut *pass);
    }
    let options = OpenOptions::default();
    let reader = Box::new(Cursor::new(Arc::clone(&file) as _));
    let piped = Input::from_reader("image", reader).and_then(|input| VmdkDriver.open(input, &options));
    let found = VmdkDriver.open(by_position(&file), &options);
    if let (Ok(piped), Ok(found)) = (piped, found)
        && found.info().devices.iter().all(|device| device.size <= exercise::WHOLE * 32)
        && let (Ok(piped), Ok(found)) = (exercise::digested(&*piped), exercise::digested(&*found))
    {
        assert!(piped == found, "a stream and a file of the same bytes have different content");
    }
}
