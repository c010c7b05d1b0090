//! Outer compression: found by magic number, undone through all frames, members and streams.
//!
//! A stream that is cut short, damaged, or followed by anything else is an error.

use std::io::{self, BufReader, Read};
use std::path::Path;
use std::sync::Arc;

use super::input::ReadAt;
use crate::error::{Error, Result};

pub(crate) use units::Certain;
pub use units::Decode;
use units::{GzipMembers, Opaque, ZstdFrames};

mod lzop;
pub(crate) mod seek_table;
mod seekable;
mod units;

/// An outer compression.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Zstandard, RFC 8878.
    Zstd,
    /// gzip, RFC 1952.
    Gzip,
    /// The lzop container.
    Lzop,
    /// xz.
    Xz,
    /// bzip2.
    Bzip2,
}

impl Compression {
    /// Its usual name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
            Self::Lzop => "lzop",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
        }
    }

    /// Its file name extension without the dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Zstd => "zst",
            Self::Gzip => "gz",
            Self::Lzop => "lzo",
            Self::Xz => "xz",
            Self::Bzip2 => "bz2",
        }
    }

    const ALL: [Self; 5] = [Self::Zstd, Self::Gzip, Self::Lzop, Self::Xz, Self::Bzip2];
}

/// The compression that a file beginning with `head` has.
pub fn detect(head: &[u8]) -> Option<Compression> {
    // Zstandard: a frame, or a skippable frame (184D2A50..5F) that leads one.
    let zstd =
        head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    // bzip2: "BZh", level, then the magic of a stream's first block (pi) or of an empty stream.
    let bzip2 = matches!(head, [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..])
        || matches!(head, [b'B', b'Z', b'h', b'1'..=b'9', 0x17, 0x72, 0x45, 0x38, 0x50, 0x90, ..]);
    if zstd {
        Some(Compression::Zstd)
    } else if head.starts_with(&[0x1f, 0x8b, 0x08]) {
        Some(Compression::Gzip)
    } else if head.starts_with(&lzop::MAGIC) {
        Some(Compression::Lzop)
    } else if head.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        Some(Compression::Xz)
    } else if bzip2 {
        Some(Compression::Bzip2)
    } else {
        None
    }
}

/// The compression that a file's name stands for.
pub fn by_name(path: &Path) -> Option<Compression> {
    let extension = path.extension()?.to_str()?.to_ascii_lowercase();
    Compression::ALL.into_iter().find(|compression| compression.extension() == extension)
}

/// Memory an xz decoder may take. `xz -9` needs 65 MiB; a crafted header can ask for 4 GiB.
const XZ_MEMORY_LIMIT: u64 = 100 << 20;

/// Largest zstd window, as a power of two. 27 (128 MiB) is what `zstd -d` itself takes without
/// being told otherwise.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Bytes read from a compressed file at a time. Ours.
const READ_AHEAD: usize = 256 * 1024;

/// A reader of what `reader` compresses.
///
/// # Errors
/// When the decoder can't be set up.
pub fn decoder(compression: Compression, reader: Box<dyn Read + Send>) -> Result<Box<dyn Decode>> {
    let reader = BufReader::with_capacity(READ_AHEAD, reader);
    let setup = |e: io::Error| Error::io(format!("set up the {} decoder", compression.name()), e);
    let decoder: Box<dyn Decode> = match compression {
        Compression::Zstd => Box::new(ZstdFrames::new(reader, ZSTD_WINDOW_LOG_MAX).map_err(setup)?),
        Compression::Gzip => Box::new(GzipMembers::new(reader)),
        Compression::Lzop => Box::new(Certain(Box::new(lzop::LzopReader::new(reader)))),
        Compression::Xz => {
            let stream =
                liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY_LIMIT, liblzma::stream::CONCATENATED)
                    .map_err(|e| setup(e.into()))?;
            Box::new(Opaque::new(Box::new(liblzma::bufread::XzDecoder::new_stream(reader, stream))))
        }
        Compression::Bzip2 => Box::new(Opaque::new(Box::new(bzip2::bufread::MultiBzDecoder::new(reader)))),
    };
    Ok(Box::new(Named { compression, decoder, was_cut: false }))
}

/// A view by position on a compressed file that was made for it; `None` when it was not.
pub fn open_seekable(compression: Compression, source: &Arc<dyn ReadAt>) -> Option<Arc<dyn ReadAt>> {
    match compression {
        Compression::Zstd => {
            seekable::SeekableZstd::open(source).map(|found| Arc::new(found) as Arc<dyn ReadAt>)
        }
        _ => None,
    }
}

/// A legal compressed file that is not served, within an [`io::Error`].
#[derive(Debug)]
pub(super) struct Refusal {
    message: String,
    hint: &'static str,
}

impl Refusal {
    /// As an error that a reader returns.
    fn error(message: String, hint: &'static str) -> io::Error {
        io::Error::new(io::ErrorKind::Unsupported, Self { message, hint })
    }

    /// The refusal within `e`, if that is what it is, as an error for a person.
    pub(super) fn within(e: &io::Error) -> Option<Error> {
        let refusal = e.get_ref()?.downcast_ref::<Self>()?;
        Some(Error::unsupported(refusal.message.clone()).hint(refusal.hint))
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}; {}", self.message, self.hint)
    }
}

impl std::error::Error for Refusal {}

/// Puts the compression's name into decoding errors, and makes those about the content `InvalidData`
/// or a [`Refusal`].
struct Named {
    compression: Compression,
    decoder: Box<dyn Decode>,
    was_cut: bool,
}

impl Named {
    fn explain(&self, e: &io::Error) -> io::Error {
        let name = self.compression.name();
        let text = e.to_string();
        if let Some(refusal) = e.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>()) {
            return Refusal::error(
                format!("the {name} stream can't be read: {}", refusal.message),
                refusal.hint,
            );
        }
        match self.compression {
            // The library's text for a window above the limit.
            Compression::Zstd if text.contains("requires too much memory") => Refusal::error(
                format!("the zstd stream needs a window above {} MiB", 1 << (ZSTD_WINDOW_LOG_MAX - 20)),
                "decompress it with zstd -d --long=31 first",
            ),
            Compression::Xz if liblzma_code(e) == Some(liblzma::stream::Error::MemLimit) => Refusal::error(
                format!("the xz stream needs more than {} MiB of memory to decode", XZ_MEMORY_LIMIT >> 20),
                "decompress it with xz -d first",
            ),
            _ => io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the {name} stream is damaged or cut short ({text})"),
            ),
        }
    }
}

fn liblzma_code(e: &io::Error) -> Option<liblzma::stream::Error> {
    e.get_ref()?.downcast_ref::<liblzma::stream::Error>().cloned()
}

impl Read for Named {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buf).map_err(|e| {
            use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof, Unsupported};
            // Other kinds, and the operating system's own errors, are not about the content.
            let content =
                matches!(e.kind(), InvalidData | InvalidInput | Other | UnexpectedEof | Unsupported);
            self.was_cut = e.kind() == UnexpectedEof;
            if content && e.raw_os_error().is_none() { self.explain(&e) } else { e }
        })
    }
}

impl Decode for Named {
    fn unchecked(&self) -> u64 {
        self.decoder.unchecked()
    }

    fn was_cut(&self) -> bool {
        self.was_cut
    }

    fn resume(&mut self) -> io::Result<bool> {
        self.decoder.resume()
    }
}
