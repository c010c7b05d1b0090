//! Inputs over bytes in memory.

use std::io::{self, Cursor, Read};
use std::sync::Arc;

use imgtool_core::{Input, ReadAt, Result};
use imgtool_storage::OpenInput;

/// A file in memory.
struct Memory(Vec<u8>);

impl ReadAt for Memory {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let start = usize::try_from(position).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        let bytes = start.checked_add(buf.len()).and_then(|end| self.0.get(start..end));
        buf.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

/// A file in memory with one byte that can't be read.
struct Unreadable {
    memory: Memory,
    byte: u64,
}

impl ReadAt for Unreadable {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        if (position..position + buf.len() as u64).contains(&self.byte) {
            return Err(io::Error::other("the medium is broken"));
        }
        self.memory.read_exact_at(buf, position)
    }

    fn len(&self) -> u64 {
        self.memory.len()
    }
}

/// A pipe that delivers at most 10,007 bytes at a time.
struct Drip(Cursor<Vec<u8>>);

impl Read for Drip {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = buf.len().min(10_007);
        self.0.read(&mut buf[..count])
    }
}

/// Returns an input that is read by position.
pub fn as_file(name: &str, bytes: &[u8]) -> Input {
    Input::from_read_at(name, Arc::new(Memory(bytes.to_vec())))
}

/// Returns an input that is read by position and can't read the byte at offset `byte`.
pub fn unreadable_at(name: &str, bytes: &[u8], byte: u64) -> Input {
    Input::from_read_at(name, Arc::new(Unreadable { memory: Memory(bytes.to_vec()), byte }))
}

/// Returns an input that is read as a pipe, with outer compression undone.
pub fn as_stream(name: &str, bytes: &[u8]) -> Input {
    from_reader(name, Drip(Cursor::new(bytes.to_vec()))).unwrap()
}

/// Opens a pipe like the program, with outer compression undone.
///
/// # Errors
/// If the first bytes can't be read or decompressed.
pub fn from_reader(name: &str, reader: impl Read + Send + 'static) -> Result<Input> {
    let stream = Input::from_reader(name, Box::new(reader))?;
    Ok(OpenInput::of(stream).decompressed()?.input)
}
