//! Opening and reading an image.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::decoded::DecodedUnits;
use imgtool_core::layered::{LayeredSource, Origin, Segment, SegmentMap, StoredBytes, check_stored};
use imgtool_core::table::PagedTable;
use imgtool_core::{Device, Error, ImageInfo, ImageSource, Input, Memory, OpenOptions, RandomInput, Result};
use libdeflater::Decompressor;

use crate::layout::{HEADER_LEN, Header};

/// The name of an image's only device.
const DISK_NAME: &str = "disk";

/// Memory in bytes of a decoder besides its buffers. Measured: 11 KiB.
const DECODER_MEMORY: u64 = 16 << 10;

/// An open image.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) header: Header,
    pub(crate) table: PagedTable,
    decoded: DecodedUnits,
}

/// Opens an image.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let image = Image::open(input, options.externals.depth(), &options.memory)?;
    let header = &image.header;
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(0, DISK_NAME, header.virtual_size())],
        cluster_size: Some(header.block_size),
        ..ImageInfo::default()
    };
    info.fact("blocks", "blocks of the disk", header.blocks);
    Ok(Arc::new(LayeredSource::new(info, image, None, options.salvage)))
}

impl Image {
    /// Reads and checks the header and the place of the table. `depth` is the number of images above this one
    /// in a chain. The table and the decoded blocks borrow from `memory`.
    ///
    /// # Errors
    /// Any error of [`Header::decode`]; `Corrupt` if the file ends within the table.
    pub(crate) fn open(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let header =
            Header::decode(&input.read_head(HEADER_LEN as usize)?).map_err(|e| e.path(input.location()))?;
        let table = PagedTable::new(input.clone(), HEADER_LEN, header.table_len(), depth, memory)?;
        let decoded = DecodedUnits::new(header.block_size, depth, memory)?;
        Ok(Self { input, header, table, decoded })
    }

    /// Returns the file range of the block `index`.
    ///
    /// # Errors
    /// `Malformed` if the block overlaps the table, ends before it begins or is too long; `Corrupt` if the file
    /// does not contain it.
    pub(crate) fn stored(&self, index: u64) -> Result<Range<u64>> {
        let offset = |index| self.table.run::<8>(index, 1).map(|(bytes, _)| u64::from_be_bytes(bytes));
        let (start, end) = (offset(index)?, offset(index + 1)?);
        let most = self.header.max_stored();
        if start < HEADER_LEN + self.header.table_len() || end < start || end - start > most {
            return Err(Error::malformed(format!(
                "block {index} is stored at {start} to {end}, not in up to {most} bytes after the table"
            ))
            .at(self.table.entry_offset::<8>(index)));
        }
        check_stored(&self.input, "compressed block", start, end - start)?;
        Ok(start..end)
    }

    /// Decodes the block `index` into `block`.
    pub(crate) fn decode(&self, index: u64, block: &mut [u8]) -> Result<()> {
        let stored = self.stored(index)?;
        // At most `Header::max_stored`, so it fits.
        let bytes = self.input.read_vec(stored.start, (stored.end - stored.start) as usize)?;
        let why = match Decompressor::new().zlib_decompress(&bytes, block) {
            Ok(len) if len == block.len() => return Ok(()),
            Ok(len) => format!("it decodes to {len} bytes, not {}", block.len()),
            Err(_) => "the data is damaged".to_owned(),
        };
        Err(Error::corrupt(format!("cannot decode block {index}: {why}")).at(stored.start))
    }

    /// Adds the place of the block at `guest_offset` to an error.
    fn in_block(&self, error: Error, guest_offset: u64) -> Error {
        let start = guest_offset - guest_offset % self.header.block_size;
        error.path(self.input.location()).device(DISK_NAME).guest(start..start + self.header.block_size)
    }
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let block_size = self.header.block_size;
        self.stored(guest_offset / block_size).map_err(|error| self.in_block(error, guest_offset))?;
        let len = (block_size - guest_offset % block_size).min(max_len);
        Ok(Segment { len, origin: Origin::Encoded })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let block_size = self.header.block_size;
        let (index, within) = (guest_offset / block_size, guest_offset % block_size);
        // Equal offsets enclose blocks without bytes, all of them lost: billions if the table is a hole of the file.
        let max_offsets = (within + max_len).div_ceil(block_size).saturating_add(1);
        let blocks = self.table.run::<8>(index, max_offsets).map_or(1, |(_, equal)| (equal - 1).max(1));
        (blocks * block_size - within).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }

    fn read_encoded(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let block_size = self.header.block_size;
        let (index, within) = (guest_offset / block_size, guest_offset % block_size);
        self.decoded
            .read(index, block_size, buf, within, |block| self.decode(index, block))
            .map_err(|error| self.in_block(error, guest_offset))
    }

    fn read_granule(&self) -> u64 {
        self.header.block_size.max(self.input.granule())
    }

    fn reader_memory(&self) -> u64 {
        self.decoded.reader_memory() + self.header.max_stored() + DECODER_MEMORY
    }
}
