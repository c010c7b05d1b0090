//! Opening and reading an image.

use std::sync::Arc;

use imgtool_core::layered::{LayeredSource, Origin, Segment, SegmentMap, StoredBytes, check_stored};
use imgtool_core::table::PagedTable;
use imgtool_core::unit_check::SharedTables;
use imgtool_core::{Device, ImageInfo, ImageSource, Input, Memory, OpenOptions, RandomInput, Result};

use crate::layout::{ENTRY_LEN, HEADER_LEN, Header, SECTOR_SIZE};

/// The name of an image's only device.
const DISK_NAME: &str = "disk";

/// An open image.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) header: Header,
    pub(crate) catalog: PagedTable,
    /// The whole file as a table of bytes, for the bitmaps.
    bytes: PagedTable,
}

/// Opens an image.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let image = Image::open(input, options.externals.depth(), &options.memory)?;
    let info = describe(&image.header);
    Ok(Arc::new(LayeredSource::new(info, image, None, options.salvage)))
}

impl Image {
    /// Reads and checks the header and the place of the catalog. `depth` is the number of images above this
    /// one in a chain. The tables borrow from `memory`.
    ///
    /// # Errors
    /// Any error of [`Header::decode`]; `Corrupt` if the file ends within the catalog.
    pub(crate) fn open(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let header =
            Header::decode(&input.read_head(HEADER_LEN as usize)?).map_err(|e| e.path(input.location()))?;
        let len = header.entries * ENTRY_LEN;
        let catalog = PagedTable::new(input.clone(), header.catalog_offset, len, depth, memory)?;
        let bytes = PagedTable::new(input.clone(), 0, input.len(), depth, memory)?;
        let image = Self { input, header, catalog, bytes };
        let header = &image.header;
        let offset = |entry| header.extent_offset(entry);
        // Bitmaps that are used several times.
        SharedTables::check::<4>(&image.catalog, 0..header.extents(), header.bitmap_len, memory, offset)
            .map_err(|e| e.path(image.input.location()))?;
        Ok(image)
    }

    fn lookup(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let extent_size = self.header.extent_size;
        let (index, within) = (guest_offset / extent_size, guest_offset % extent_size);
        let (entry, equal) = self.catalog.run::<4>(index, (within + max_len).div_ceil(extent_size))?;
        let Some(extent) = self.header.extent_offset(entry) else {
            return Ok(Segment { len: (equal * extent_size - within).min(max_len), origin: Origin::Hole });
        };
        let data = extent + self.header.bitmap_len;
        check_stored(&self.input, "extent", extent, self.header.bitmap_len + self.header.used_len(index))?;
        let (here, len) = self.bit_run(extent, within, (extent_size - within).min(max_len))?;
        let origin = if here { Origin::File { index: 0, file_offset: data + within } } else { Origin::Hole };
        Ok(Segment { len, origin })
    }

    /// Returns the bit of the sector at `within` in the bitmap at `bitmap`, and a number of bytes from there
    /// on, at most `max_len`, whose sectors have the same bit. The first sector is the least significant bit
    /// of the first byte.
    fn bit_run(&self, bitmap: u64, within: u64, max_len: u64) -> Result<(bool, u64)> {
        let (sector, in_sector) = (within / SECTOR_SIZE, within % SECTOR_SIZE);
        let max_bytes = (sector % 8 + (in_sector + max_len).div_ceil(SECTOR_SIZE)).div_ceil(8);
        let ([byte], equal) = self.bytes.run::<1>(bitmap + sector / 8, max_bytes)?;
        let rest = byte >> (sector % 8);
        let here = rest & 1 == 1;
        let sectors = match byte {
            0 | 0xff => equal * 8 - sector % 8,
            _ if here => rest.trailing_ones().into(),
            // Zeros that the shift brought in do not count.
            _ => u64::from(rest.trailing_zeros()).min(8 - sector % 8),
        };
        Ok((here, (sectors * SECTOR_SIZE - in_sector).min(max_len)))
    }
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        self.lookup(guest_offset, max_len).map_err(|error| {
            let index = guest_offset / self.header.extent_size;
            let start = index * self.header.extent_size;
            let end = start + self.header.used_len(index);
            error.path(self.input.location()).device(DISK_NAME).guest(start..end)
        })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        (self.header.extent_size - guest_offset % self.header.extent_size).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }
}

fn describe(header: &Header) -> ImageInfo {
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(0, DISK_NAME, header.virtual_size)],
        cluster_size: Some(header.extent_size),
        ..ImageInfo::default()
    };
    info.fact("version", "version", header.version);
    info.fact("catalog-entries", "entries of the catalog", header.entries);
    if !header.virtual_size.is_multiple_of(SECTOR_SIZE) {
        info.notes.push(format!("the virtual size is no multiple of a sector of {SECTOR_SIZE} bytes"));
    }
    info
}
