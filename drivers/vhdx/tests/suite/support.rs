//! Inputs, options and comparisons shared by the tests.

pub mod builder;
pub mod oracle;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::conformance::{Content, Image};
use imgtool_toolkit::storage::ReadAt;
use imgtool_toolkit::{CreateOptions, Driver, ImageSource, Input, OpenOptions, Result};
use imgtool_vhdx::VhdxDriver;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;

/// Creation options from `-o` pairs.
pub fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    let options = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    CreateOptions { options, ..CreateOptions::default() }
}

/// An input of bytes in memory.
struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> std::io::Result<()> {
        let start = usize::try_from(position).map_err(|_| std::io::ErrorKind::UnexpectedEof)?;
        let bytes = start.checked_add(buf.len()).and_then(|end| self.0.get(start..end));
        buf.copy_from_slice(bytes.ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// An input of bytes in memory, of which the one at this file offset can't be read.
struct Unreadable(Memory, u64);

impl ReadAt for Unreadable {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> std::io::Result<()> {
        if (position..position + buf.len() as u64).contains(&self.1) {
            return Err(std::io::Error::other("the medium is broken"));
        }
        self.0.read_exact_at(buf, position)
    }

    fn len(&self) -> u64 {
        self.0.len()
    }
}

/// Makes an input whose byte at `file_offset` can't be read.
pub fn unreadable_at(bytes: &[u8], file_offset: u64) -> Input {
    Input::from_read_at("memory.vhdx", Arc::new(Unreadable(Memory(bytes.to_vec()), file_offset)))
}

/// Makes an input.
pub fn input(bytes: &[u8]) -> Input {
    Input::from_read_at("memory.vhdx", Arc::new(Memory(bytes.to_vec())))
}

/// Opens an image in memory.
pub fn open_bytes(bytes: &[u8]) -> Result<Box<dyn ImageSource>> {
    VhdxDriver.open(input(bytes), &OpenOptions::default())
}

/// Opens an image file.
pub fn open_file(path: &Path) -> Result<Box<dyn ImageSource>> {
    VhdxDriver.open(Input::open_plain(path)?, &OpenOptions::default())
}

/// Reads all content of a small disk, and checks that its extents and partial reads agree with it.
pub fn content(source: &dyn ImageSource) -> Result<Vec<u8>> {
    let device = source.info().devices[0].clone();
    let random = source.random().unwrap();
    let mut bytes = vec![0xee; device.size as usize];
    random.read_at(device.id, &mut bytes, 0)?;
    let mut at = 0;
    while at < device.size {
        for extent in random.extents(device.id, at..device.size)? {
            assert_eq!(extent.start, at);
            at = extent.end();
            let part = &bytes[extent.start as usize..at as usize];
            assert!(extent.is_data() || part.iter().all(|byte| *byte == 0), "{extent:?} is not zero");
        }
    }
    // Reads that are not aligned return the same.
    for (start, len) in [(1, 511), (511, 2), (4095, 70_001), (MIB - 3, 7), (3 * MIB - 1, MIB)] {
        let end = (start + len).min(device.size);
        if start < end {
            let mut part = vec![0xee; (end - start) as usize];
            random.read_at(device.id, &mut part, start)?;
            assert!(part == bytes[start as usize..end as usize], "read of {start}..{end}");
        }
    }
    Ok(bytes)
}

/// Writes the content of an image into a sparse raw file.
pub fn write_raw(image: &Image, path: &Path) {
    let (device, content) = &image.devices[0];
    let file = File::create(path).unwrap();
    file.set_len(device.size).unwrap();
    let mut at = 0;
    while at < device.size {
        for extent in content.extents(at..device.size) {
            at = extent.end();
            if extent.is_data() {
                write_area(&file, content, extent.start, extent.len);
            }
        }
    }
}

/// Copies `len` bytes of content at guest offset `start`.
fn write_area(file: &File, content: &Content, start: u64, len: u64) {
    let mut bytes = vec![0; MIB as usize];
    let mut written = 0;
    while written < len {
        let part = &mut bytes[..(len - written).min(MIB) as usize];
        content.read(part, start + written);
        file.write_all_at(part, start + written).unwrap();
        written += part.len() as u64;
    }
}
