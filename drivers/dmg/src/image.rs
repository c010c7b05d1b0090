//! Opening and reading an image.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::decoded::DecodedUnits;
use imgtool_core::layered::{LayeredSource, Origin, Segment, SegmentMap, StoredBytes, check_stored};
use imgtool_core::{Device, Error, ImageInfo, ImageSource, Input, Memory, OpenOptions, RandomInput, Result};

use crate::checksums::Checksums;
use crate::chunks::{Chunk, Chunks, Kind};
use crate::decode::{decode, decoder_memory};
use crate::layout::{SECTOR_SIZE, TRAILER_LEN, Trailer, is_encrypted};
use crate::stored::StoredChunks;

/// The name of an image's only device.
const DISK_NAME: &str = "disk";

/// An open image.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) trailer: Trailer,
    pub(crate) chunks: Chunks,
}

/// An image with the chunks that are kept decoded for reads.
struct Reader {
    image: Image,
    stored: StoredChunks,
    decoded: DecodedUnits,
    checksums: Checksums,
    /// Memory in bytes that a thread needs for a read besides its buffer.
    reader_memory: u64,
}

/// Opens an image.
///
/// # Errors
/// `Unsupported` for an image that is compressed with LZFSE, unless only information is needed.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let image = Image::open(input, &options.memory)?;
    if !options.info_only && !options.salvage {
        image.refuse_lzfse()?;
    }
    let info = describe(&image);
    let chunks = &image.chunks;
    let max_len = chunks.most(|chunk| chunk.len);
    let decoded = DecodedUnits::new(max_len, options.externals.depth(), &options.memory)?;
    let reader_memory = decoded.reader_memory()
        + chunks.most(|chunk| chunk.stored_len)
        + chunks.most(|chunk| decoder_memory(chunk.kind));
    let checksums = Checksums::new(chunks, &options.memory)?;
    let stored = StoredChunks::new(&image, &options.memory)?;
    let reader = Reader { image, stored, decoded, checksums, reader_memory };
    Ok(Arc::new(LayeredSource::new(info, reader, None, options.salvage)))
}

impl Image {
    /// Reads and checks the trailer and the tables of chunks. The chunks borrow from `memory`.
    ///
    /// # Errors
    /// Any error of [`Trailer::decode`] and [`Chunks::read`]; `Unsupported` for an encrypted image.
    pub(crate) fn open(input: Input, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let context = |error: Error| error.path(input.location());
        let head = input.read_vec(0, input.len().min(16) as usize)?;
        if is_encrypted(&head) {
            return Err(context(Error::unsupported("the image is encrypted"))
                .hint("on macOS, 'hdiutil convert -format UDZO' makes an image without encryption"));
        }
        // At most `TRAILER_LEN`, so it fits.
        let len = input.len().min(TRAILER_LEN);
        let trailer = Trailer::decode(&input.read_vec(input.len() - len, len as usize)?)
            .map_err(|error| context(error).at(input.len() - len))?;
        let chunks = Chunks::read(&input, &trailer, memory).map_err(context)?;
        Ok(Self { input, trailer, chunks })
    }

    /// Refuses an image with chunks that are compressed with LZFSE.
    ///
    /// # Errors
    /// `Unsupported` if there is such a chunk.
    pub(crate) fn refuse_lzfse(&self) -> Result<()> {
        if self.chunks.iter().all(|chunk| chunk.kind != Kind::Lzfse) {
            return Ok(());
        }
        Err(Error::unsupported("the image is compressed with LZFSE, which is not supported")
            .path(self.input.location())
            .hint("on macOS, 'hdiutil convert -format UDZO' makes an image that is compressed with zlib"))
    }

    /// Returns the virtual size in bytes.
    pub(crate) fn virtual_size(&self) -> u64 {
        self.chunks.end().max(self.trailer.sectors * SECTOR_SIZE)
    }

    /// Decodes a compressed chunk into `out`, which is as long as its content.
    pub(crate) fn decode(&self, chunk: &Chunk, out: &mut [u8]) -> Result<()> {
        check_stored(&self.input, "chunk", chunk.file_offset, chunk.stored_len)?;
        // At most twice the maximum length of a chunk, so it fits.
        let stored = self.input.read_vec(chunk.file_offset, chunk.stored_len as usize)?;
        decode(chunk.kind, &stored, out).map_err(|why| {
            let name = chunk.kind.compression().unwrap_or("plain");
            Error::corrupt(format!("cannot decode a chunk ({name}): {why}")).at(chunk.file_offset)
        })
    }

    /// Adds the place of a chunk to an error.
    pub(crate) fn in_chunk(&self, error: Error, chunk: &Chunk) -> Error {
        error.path(self.input.location()).device(DISK_NAME).guest(chunk.start..chunk.end())
    }
}

impl SegmentMap for Reader {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let chunk = match self.image.chunks.at(guest_offset) {
            Ok(chunk) => chunk,
            Err(next) => {
                return Ok(Segment { len: (next - guest_offset).min(max_len), origin: Origin::Hole });
            }
        };
        let within = guest_offset - chunk.start;
        let origin = match chunk.kind {
            Kind::Zero => Origin::Zero,
            Kind::Ignored => Origin::Hole,
            Kind::Raw => {
                check_stored(&self.image.input, "chunk", chunk.file_offset, chunk.len)
                    .map_err(|error| self.image.in_chunk(error, chunk))?;
                Origin::File { index: 0, file_offset: chunk.file_offset + within }
            }
            Kind::Adc | Kind::Zlib | Kind::Bzip2 | Kind::Lzfse | Kind::Lzma => Origin::Encoded,
        };
        Ok(Segment { len: (chunk.len - within).min(max_len), origin })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let end = self.image.chunks.at(guest_offset).map_or_else(|next| next, Chunk::end);
        (end - guest_offset).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.stored
    }

    fn read_encoded(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let Some((index, chunk)) = self.image.chunks.indexed_at(guest_offset) else {
            return Err(Error::out_of_bounds(format!("no chunk stores the byte {guest_offset}")));
        };
        self.decoded
            .read(chunk.start, chunk.len, buf, guest_offset - chunk.start, |out| {
                self.image.decode(chunk, out)?;
                self.checksums.record(index, out);
                Ok(())
            })
            .map_err(|error| self.image.in_chunk(error, chunk))
    }

    fn verify(&self, failed: &mut dyn FnMut(Range<u64>, Error) -> Result<()>) -> Result<()> {
        self.checksums.verify(&self.image, &self.stored, failed)
    }

    fn read_granule(&self) -> u64 {
        let chunk = self.image.chunks.most(|chunk| chunk.len);
        chunk.next_power_of_two().max(self.image.input.granule())
    }

    fn reader_memory(&self) -> u64 {
        self.reader_memory
    }
}

fn describe(image: &Image) -> ImageInfo {
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(0, DISK_NAME, image.virtual_size())],
        ..ImageInfo::default()
    };
    let mut names: Vec<&str> = image.chunks.iter().filter_map(|chunk| chunk.kind.compression()).collect();
    names.sort_unstable();
    names.dedup();
    let compression = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    info.fact("compression-type", "compression type", compression);
    info.fact("tables", "tables of chunks", image.chunks.parts.len());
    info.fact("chunks", "chunks", image.chunks.iter().count());
    let (chunks_end, stated) = (image.chunks.end(), image.trailer.sectors * SECTOR_SIZE);
    if chunks_end > stated {
        info.notes.push(format!("the trailer states {stated} bytes, but the chunks reach {chunks_end}"));
    }
    info
}
