//! Decompression of chunks.

use libdeflater::Decompressor;
use liblzma::stream::{Action, Status, Stream};

use crate::adc;
use crate::chunks::Kind;

/// Maximum memory in bytes of an LZMA decoder. Our limit: presets up to 9 need 65 MiB.
const LZMA_MEMORY: u64 = 66 << 20;

/// Returns the memory in bytes that a decoder needs besides its buffers. Measured: 11 KiB for zlib, 4 MiB for
/// the largest blocks of bzip2.
pub(crate) fn decoder_memory(kind: Kind) -> u64 {
    match kind {
        Kind::Zero | Kind::Ignored | Kind::Raw | Kind::Lzfse | Kind::Adc => 0,
        Kind::Zlib => 16 << 10,
        Kind::Bzip2 => 4 << 20,
        Kind::Lzma => LZMA_MEMORY,
    }
}

/// Decodes a chunk into `out`, which is as long as its content, or returns the reason for the failure.
pub(crate) fn decode(kind: Kind, stored: &[u8], out: &mut [u8]) -> Result<(), &'static str> {
    const DAMAGED: &str = "the data is damaged";
    let expected = out.len();
    let len = match kind {
        Kind::Zlib => Decompressor::new().zlib_decompress(stored, out).map_err(|_| DAMAGED)?,
        Kind::Bzip2 => bunzip2(stored, out).ok_or(DAMAGED)?,
        Kind::Lzma => unxz(stored, out).ok_or(DAMAGED)?,
        Kind::Adc => return adc::decode(stored, out),
        Kind::Lzfse => return Err("LZFSE is not supported"),
        Kind::Zero | Kind::Ignored | Kind::Raw => return Err("it is not compressed"),
    };
    if len == expected { Ok(()) } else { Err("it decodes to too few bytes") }
}

/// Returns the number of decoded bytes; `None` for damaged data.
fn bunzip2(stored: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut decoder = bzip2::Decompress::new(false);
    loop {
        let (read, written) = (decoder.total_in(), decoder.total_out());
        let (rest, free) = (stored.get(read as usize..)?, out.get_mut(written as usize..)?);
        let status = decoder.decompress(rest, free).ok()?;
        if status == bzip2::Status::StreamEnd {
            return Some(decoder.total_out() as usize);
        }
        if (decoder.total_in(), decoder.total_out()) == (read, written) {
            return None;
        }
    }
}

/// Returns the number of decoded bytes; `None` for damaged data, and for data that needs too much memory.
fn unxz(stored: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut decoder = Stream::new_stream_decoder(LZMA_MEMORY, 0).ok()?;
    loop {
        let (read, written) = (decoder.total_in(), decoder.total_out());
        let (rest, free) = (stored.get(read as usize..)?, out.get_mut(written as usize..)?);
        let status = decoder.process(rest, free, Action::Finish).ok()?;
        if status == Status::StreamEnd {
            return Some(decoder.total_out() as usize);
        }
        if (decoder.total_in(), decoder.total_out()) == (read, written) {
            return None;
        }
    }
}
