//! Writing dynamic images: a copy of the footer, the dynamic header, the BAT, blocks in the order of their
//! first data, and the footer.

use imgtool_core::block_sink::{BlockLayout, BlockSettings, BlockSink};
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::table::TableWriter;
use imgtool_core::{Output, Result};

use super::{footer, rounding_note};
use crate::layout::header::Header;
use crate::layout::{ABSENT, SECTOR_SIZE, bitmap_len};
use crate::options::{VhdOptions, bat_len, header};

/// The layout and the properties of a new image.
pub(super) struct DynamicLayout {
    header: Header,
    options: VhdOptions,
    /// Size of the device in bytes, before it is rounded up to whole sectors.
    device_size: u64,
    virtual_size: u64,
    /// Name of an image without content, as parameters of its UUID.
    own_name: Vec<u64>,
    /// Bitmap of a block: the guest may have written every sector.
    bitmap: Vec<u8>,
}

impl DynamicLayout {
    /// Lays out an image of a device of `device_size` bytes, which is rounded up to `virtual_size`.
    pub(super) fn new(device_size: u64, virtual_size: u64, options: VhdOptions, own_name: Vec<u64>) -> Self {
        let header = header(virtual_size);
        // The block size bounds it to 512 bytes.
        let bitmap = vec![0xff; bitmap_len(header.block_size) as usize];
        Self { header, options, device_size, virtual_size, own_name, bitmap }
    }

    /// Creates a sink that writes to `output`. `memory` is the image's share of the memory in bytes, if it is
    /// limited.
    pub(super) fn sink(self, output: Output, memory: Option<u64>) -> BlockSink<Self> {
        let bat =
            TableWriter::new(output.clone(), self.header.bat_offset, bat_len(&self.header), 0xff, memory);
        let (device_size, zero_unit) = (self.device_size, self.options.zero_unit);
        let settings = BlockSettings { device_size, fixed: false, zero_unit };
        BlockSink::new(output, bat, self, settings)
    }
}

/// Returns the file offset of the bitmap of the block at `position`, which is also where `position` blocks end.
fn block_offset(header: &Header, position: u64) -> u64 {
    header.bat_offset + bat_len(header) + position * (bitmap_len(header.block_size) + header.block_size)
}

/// Returns the length in bytes of a file with this number of blocks.
pub(super) fn file_len(header: &Header, blocks: u64) -> u64 {
    block_offset(header, blocks) + SECTOR_SIZE
}

impl BlockLayout for DynamicLayout {
    fn block_size(&self) -> u64 {
        self.header.block_size
    }

    fn data_offset(&self, position: u64) -> u64 {
        block_offset(&self.header, position) + self.bitmap.len() as u64
    }

    fn block_head(&self) -> &[u8] {
        &self.bitmap
    }

    /// The bitmap of a sector precedes the data, so no file system can share it.
    fn is_aligned(&self) -> bool {
        false
    }

    fn position(&self, bat: &mut TableWriter, index: u64) -> Result<Option<u64>> {
        let entry = u32::from_be_bytes(bat.get(index)?);
        let blocks_len = (u64::from(entry) * SECTOR_SIZE).saturating_sub(block_offset(&self.header, 0));
        let position = blocks_len / (self.header.block_size + self.bitmap.len() as u64);
        Ok((entry != ABSENT).then_some(position))
    }

    fn allocate(&self, bat: &mut TableWriter, index: u64, position: u64) -> Result<()> {
        let sector = block_offset(&self.header, position) / SECTOR_SIZE;
        // The size of the disk is limited to 2040 GiB, so the file has fewer than 2^32 sectors.
        bat.set(index, u32::try_from(sector).unwrap_or(ABSENT).to_be_bytes())
    }

    fn finish(&self, output: &Output, blocks: u64, fingerprint: &Fingerprint) -> Result<()> {
        let mut parameters = vec![self.device_size, self.virtual_size, self.header.block_size];
        parameters.extend(&self.own_name);
        let uuid = fingerprint.guid("dynamic vhd", &parameters);
        let footer = footer(&self.options, self.virtual_size, uuid).encode();
        output.write_at(&footer, block_offset(&self.header, blocks))?;
        output.write_at(&self.header.encode(), SECTOR_SIZE)?;
        output.write_at(&footer, 0)
    }

    fn notes(&self) -> Vec<String> {
        rounding_note(self.device_size, self.virtual_size)
    }
}
