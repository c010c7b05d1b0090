//! Outer compression: detection by magic number, and decoders that read all frames, members or streams of a
//! file.
//!
//! A file that is truncated, damaged, or followed by other bytes is an error.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::Arc;

use imgtool_core::input::{Consumed, Decode};
use imgtool_core::{Error, Location, Memory, ReadAt, Result};

use units::{GzipMembers, Leased, Opaque, ZstdFrames};
use xz::XzStreams;

pub mod frames;
mod guest_units;
mod lzop;
pub(crate) mod seek_table;
mod seekable;
mod units;
pub mod writer;
mod xz;
mod zstd_header;

/// Compression of a whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Zstandard, RFC 8878.
    Zstd,
    /// gzip, RFC 1952.
    Gzip,
    /// The container of lzop 1.04.
    Lzop,
    /// The .xz format of XZ Utils.
    Xz,
    /// bzip2.
    Bzip2,
}

impl Compression {
    /// Returns the usual name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Gzip => "gzip",
            Self::Lzop => "lzop",
            Self::Xz => "xz",
            Self::Bzip2 => "bzip2",
        }
    }

    /// Returns the file name extension without the dot.
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

/// Returns the compression of a file that begins with `head`; `None` if no magic number matches.
pub fn detect(head: &[u8]) -> Option<Compression> {
    // RFC 8878, 3.1: a Zstandard frame, or a skippable frame (184D2A50 to 184D2A5F).
    let zstd =
        head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..]);
    // bzip2: "BZh", level, then the magic of the first block (digits of pi) or of the end of an empty stream.
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

/// Returns the compression that the file name extension of `location` names, in upper or lower case.
pub fn by_name(location: &Location) -> Option<Compression> {
    layers_by_name(location).first().copied()
}

/// Returns the layers of compression that the file name extensions of `location` name, outermost first: gzip,
/// then zstd for "disk.raw.zst.gz".
pub fn layers_by_name(location: &Location) -> Vec<Compression> {
    let name = location.file_name().unwrap_or_default();
    let mut stem = &*name;
    let mut layers = Vec::new();
    while let Some((rest, extension)) = stem.rsplit_once('.')
        && !rest.is_empty()
        && let Some(layer) = by_extension(extension)
    {
        layers.push(layer);
        stem = rest;
    }
    layers
}

fn by_extension(extension: &str) -> Option<Compression> {
    Compression::ALL.into_iter().find(|known| extension.eq_ignore_ascii_case(known.extension()))
}

/// Returns the error for a file whose name ends in the extension of `compression`, but whose content is not
/// compressed: the start of the file is damaged or missing, or the name is wrong.
pub fn misnamed(compression: Compression) -> Error {
    let (name, extension) = (compression.name(), compression.extension());
    Error::wrong_format(format!("the name says {name}, but the content does not")).at(0).hint(format!(
        "the file is damaged or misnamed; if it holds the disk itself, rename it to a name without .{extension}"
    ))
}

/// Memory in bytes of a bzip2 decoder with the longest blocks (bzip2's manual: 3.7 MB).
const BZIP2_MEMORY: u64 = 4 << 20;

/// Memory in bytes of a gzip decoder: its window of 32 KiB and its tables.
const GZIP_MEMORY: u64 = 128 << 10;

/// Binary logarithm of the maximum zstd window in bytes: 128 MiB, the default limit of `zstd -d`.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// Number of bytes read from a compressed file at a time. Our choice.
const READ_AHEAD: usize = 256 * 1024;

/// Creates a decoder over `reader`, which borrows its window from `memory` and counts in `consumed` the bytes
/// that it takes from `reader`.
///
/// Reads fail with `InvalidData` for damaged content, and with an error of the toolkit for content beyond our
/// limits; I/O errors of `reader` are passed on unchanged.
///
/// # Errors
/// [`imgtool_core::ErrorKind::LimitExceeded`] if `memory` can't lend what the decoder needs from the start.
pub fn decoder(
    compression: Compression,
    reader: Box<dyn Read + Send>,
    memory: &Memory,
    consumed: Consumed,
) -> Result<Box<dyn Decode>> {
    let reader = Counted { reader: BufReader::with_capacity(READ_AHEAD, reader), consumed };
    let lease = |bytes| memory.lease(bytes, format_args!("a {} decoder", compression.name()));
    let setup_error = |e: io::Error| Error::io(format!("set up the {} decoder", compression.name()), e);
    let decoder: Box<dyn Decode> = match compression {
        Compression::Zstd => {
            Box::new(ZstdFrames::new(reader, ZSTD_WINDOW_LOG_MAX, memory).map_err(setup_error)?)
        }
        Compression::Gzip => Box::new(Leased::new(GzipMembers::new(reader), lease(GZIP_MEMORY)?)),
        Compression::Lzop => Box::new(Leased::new(lzop::LzopReader::new(reader), lease(lzop::MEMORY)?)),
        Compression::Xz => {
            Box::new(Opaque::new(Box::new(XzStreams::new(reader, memory).map_err(setup_error)?)))
        }
        Compression::Bzip2 => {
            let decoder = Opaque::new(Box::new(bzip2::bufread::MultiBzDecoder::new(reader)));
            Box::new(Leased::new(decoder, lease(BZIP2_MEMORY)?))
        }
    };
    Ok(Box::new(ErrorContext { compression, decoder, was_truncated: false }))
}

/// A buffered reader that counts the bytes which its caller takes, not those that it has read ahead.
struct Counted<R> {
    reader: R,
    consumed: Consumed,
}

impl<R: BufRead> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.consumed.add(count);
        Ok(count)
    }
}

impl<R: BufRead> BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.reader.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.reader.consume(count);
        self.consumed.add(count);
    }
}

/// Opens a compressed file for reading its content by position. Returns `None` unless the file has a valid
/// seek table (seekable zstd) that `memory` can hold.
pub fn open_seekable(
    compression: Compression,
    source: &Arc<dyn ReadAt>,
    memory: &Memory,
) -> Option<Arc<dyn ReadAt>> {
    match compression {
        Compression::Zstd => {
            seekable::SeekableZstd::open(source, memory).map(|found| Arc::new(found) as Arc<dyn ReadAt>)
        }
        _ => None,
    }
}

/// Returns the error for a valid compressed file that exceeds our limits or needs an unsupported feature: an
/// error of the toolkit inside an [`io::Error`].
fn unsupported(message: String, hint: &'static str) -> io::Error {
    Error::unsupported(message).hint(hint).into()
}

/// Translates decoding errors: adds the name of the compression, and turns errors about the content into
/// `InvalidData` or an error of the toolkit.
struct ErrorContext {
    compression: Compression,
    decoder: Box<dyn Decode>,
    was_truncated: bool,
}

impl ErrorContext {
    fn translate(&self, e: &io::Error) -> io::Error {
        let name = self.compression.name();
        let text = e.to_string();
        if let Some(inner) = e.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
            let error =
                Error::new(inner.kind(), format!("the {name} stream can't be read: {}", inner.message()));
            return match inner.remedy() {
                Some(remedy) => error.remedied_by(remedy.clone()).into(),
                None => error.into(),
            };
        }
        match self.compression {
            // libzstd's text for a window above the limit.
            Compression::Zstd if text.contains("requires too much memory") => unsupported(
                format!("the zstd stream needs a window above {} MiB", 1 << (ZSTD_WINDOW_LOG_MAX - 20)),
                "decompress it with zstd -d --long=31 first",
            ),
            Compression::Xz if liblzma_code(e) == Some(liblzma::stream::Error::MemLimit) => unsupported(
                format!("the xz stream needs more than {} MiB of memory to decode", xz::MAX_MEMORY >> 20),
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

impl Read for ErrorContext {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.decoder.read(buf).map_err(|e| {
            use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof, Unsupported};
            // Other kinds of errors, and errors of the operating system, do not concern the content.
            let is_content =
                matches!(e.kind(), InvalidData | InvalidInput | Other | UnexpectedEof | Unsupported);
            self.was_truncated = e.kind() == UnexpectedEof;
            if is_content && e.raw_os_error().is_none() { self.translate(&e) } else { e }
        })
    }
}

impl Decode for ErrorContext {
    fn unchecked(&self) -> u64 {
        self.decoder.unchecked()
    }

    fn was_truncated(&self) -> bool {
        self.was_truncated
    }

    fn resume(&mut self) -> io::Result<bool> {
        self.decoder.resume()
    }
}
