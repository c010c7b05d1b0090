//! Decoder for the .xz format. It begins with little memory, and borrows more when a block needs it.

use std::io::{self, BufRead, Read};

use imgtool_core::{Lease, Memory};
use liblzma::stream::{Action, CONCATENATED, Error as XzError, Status, Stream};

/// Maximum memory of a decoder, in bytes. Our limit: `xz -9` files need 65 MiB, crafted headers 4 GiB.
pub(super) const MAX_MEMORY: u64 = 100 << 20;

/// Initial memory of a decoder, in bytes. Our choice: `xz -6` files, the default, need 9 MiB.
const FIRST_MEMORY: u64 = 10 << 20;

/// Decoder of all streams of an .xz file.
pub(super) struct XzStreams<R> {
    reader: R,
    stream: Stream,
    lease: Lease,
}

impl<R: BufRead> XzStreams<R> {
    pub(super) fn new(reader: R, memory: &Memory) -> io::Result<Self> {
        let lease = memory.lease(FIRST_MEMORY, "an xz decoder")?;
        let stream = Stream::new_stream_decoder(FIRST_MEMORY, CONCATENATED)?;
        Ok(Self { reader, stream, lease })
    }

    /// Doubles the memory of the decoder until it suffices for the current block, up to [`MAX_MEMORY`].
    fn grow(&mut self) -> io::Result<()> {
        loop {
            let memory = self.lease.bytes().saturating_mul(2).min(MAX_MEMORY);
            if memory == self.lease.bytes() {
                return Err(XzError::MemLimit.into());
            }
            let purpose = format_args!("an xz decoder of {} MiB", memory >> 20);
            self.lease.raise(memory, purpose)?;
            // liblzma refuses a limit below what the block needs.
            match self.stream.set_memlimit(memory) {
                Err(XzError::MemLimit) => {}
                set => return Ok(set?),
            }
        }
    }
}

impl<R: BufRead> Read for XzStreams<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            let stored = self.reader.fill_buf()?;
            let at_end = stored.is_empty();
            let action = if at_end { Action::Finish } else { Action::Run };
            let (before_in, before_out) = (self.stream.total_in(), self.stream.total_out());
            let status = self.stream.process(stored, buf, action);
            let consumed = self.stream.total_in() - before_in;
            let produced = self.stream.total_out() - before_out;
            // At most the lengths of the two slices.
            self.reader.consume(consumed as usize);
            let status = match status {
                Err(XzError::MemLimit) => {
                    self.grow()?;
                    continue;
                }
                status => status?,
            };
            if produced > 0 || status == Status::StreamEnd {
                return Ok(produced as usize);
            }
            if at_end && consumed == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "premature eof"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use liblzma::bufread::XzEncoder;

    use super::*;

    #[test]
    fn borrows_what_each_preset_needs() {
        let plain = b"text ".repeat(1000);
        for (preset, mib) in [(0, 10), (6, 10), (7, 20), (9, 80)] {
            let mut stored = Vec::new();
            XzEncoder::new(&plain[..], preset).read_to_end(&mut stored).expect("in memory");
            let memory = Memory::default();
            let mut decoder = XzStreams::new(BufReader::new(&stored[..]), &memory).expect("free");
            let mut found = Vec::new();
            decoder.read_to_end(&mut found).expect("valid");
            assert!(found == plain, "preset {preset}");
            assert_eq!(decoder.lease.bytes() >> 20, mib, "preset {preset}");
        }
    }
}
