//! Writing dynamic and fixed images; [`child`] writes differencing ones.
//!
//! [`BlockSink`] stores the payload blocks and lists them in the BAT; this module knows the rest of the file.
//! The GUIDs of a file are derived from content and options, so the same source and options give the same
//! bytes.

pub(crate) mod child;

use imgtool_core::block_sink::{BlockLayout, BlockSettings, BlockSink};
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::table::TableWriter;
use imgtool_core::{Output, Result};

use crate::layout::HEADER_SECTION_LEN;
use crate::layout::bat::BatEntry;
use crate::layout::header::{HEADER_OFFSETS, Header, encode_identifier};
use crate::layout::metadata::Metadata;
use crate::layout::region::{REGION_TABLE_OFFSETS, Region, RegionTable};
use crate::options::{FileLayout, VhdxOptions};
use child::Parent;

/// Creator string of the file type identifier (section 2.2.1).
const CREATOR: &str = concat!("imgtool ", env!("CARGO_PKG_VERSION"));

/// Creates a sink that writes a device of `device_size` bytes to `output`, with this layout. `memory` is the
/// image's share of the memory in bytes, if it is limited.
pub(crate) fn new(
    output: Output,
    device_size: u64,
    options: VhdxOptions,
    layout: FileLayout,
    memory: Option<u64>,
) -> BlockSink<VhdxLayout> {
    let bat = TableWriter::new(output.clone(), layout.bat.file_offset, layout.bat.length.into(), 0, memory);
    let settings = settings(device_size, &options);
    BlockSink::new(output, bat, VhdxLayout { device_size, options, layout, parent: None }, settings)
}

/// Returns the settings of a new file for a device of `device_size` bytes.
pub(crate) fn settings(device_size: u64, options: &VhdxOptions) -> BlockSettings {
    BlockSettings { device_size, fixed: options.fixed, zero_unit: options.zero_unit }
}

/// The layout and the properties of a new file.
pub(crate) struct VhdxLayout {
    /// Size of the device in bytes, before it is rounded up to whole sectors.
    device_size: u64,
    options: VhdxOptions,
    layout: FileLayout,
    /// Parent of a differencing file.
    parent: Option<Parent>,
}

impl BlockLayout for VhdxLayout {
    fn block_size(&self) -> u64 {
        self.layout.shape.block_size
    }

    fn data_offset(&self, position: u64) -> u64 {
        self.layout.file_len(position)
    }

    fn is_aligned(&self) -> bool {
        true
    }

    fn position(&self, bat: &mut TableWriter, index: u64) -> Result<Option<u64>> {
        let bat_index = self.layout.shape.payload_bat_index(index);
        let entry = BatEntry(u64::from_le_bytes(bat.get(bat_index)?));
        let blocks_len = entry.file_offset().checked_sub(self.layout.payload_start);
        Ok(blocks_len.map(|len| len / self.layout.shape.block_size))
    }

    fn allocate(&self, bat: &mut TableWriter, index: u64, position: u64) -> Result<()> {
        let entry = BatEntry::fully_present(self.layout.file_len(position));
        bat.set(self.layout.shape.payload_bat_index(index), entry.0.to_le_bytes())
    }

    fn finish(&self, output: &Output, _blocks: u64, fingerprint: &Fingerprint) -> Result<()> {
        self.write_structures(output, fingerprint)
    }

    fn notes(&self) -> Vec<String> {
        self.rounding_notes()
    }
}

/// Writes `bytes` at the start of a region, and zeros to its end.
fn write_region(output: &Output, region: &Region, bytes: &[u8]) -> Result<()> {
    output.write_at(bytes, region.file_offset)?;
    let end = region.file_offset + bytes.len() as u64;
    output.write_zeros_at(end, region.end() - end)
}

impl VhdxLayout {
    /// Writes everything but the blocks and the BAT, the first bytes of the file last.
    fn write_structures(&self, output: &Output, fingerprint: &Fingerprint) -> Result<()> {
        let locator = match (&self.parent, &self.options.backing) {
            (Some(parent), Some(backing)) => parent.locator(backing),
            _ => Vec::new(),
        };
        let metadata = self.metadata(fingerprint).encode(&locator);
        write_region(output, &self.layout.metadata, &metadata)?;
        write_region(output, &self.layout.log, &[])?;
        self.write_header_section(output, fingerprint)
    }

    /// Returns a note if the virtual size was rounded up.
    fn rounding_notes(&self) -> Vec<String> {
        let virtual_size = self.layout.virtual_size;
        if virtual_size == self.device_size {
            return Vec::new();
        }
        vec![format!(
            "virtual size rounded up from {} to {virtual_size} bytes, a multiple of the logical sector size {}",
            self.device_size, self.layout.shape.logical_sector_size
        )]
    }

    /// Returns the disk's properties, for the metadata region.
    fn metadata(&self, fingerprint: &Fingerprint) -> Metadata {
        let FileLayout { virtual_size, shape, .. } = &self.layout;
        // The options bound all of these far below 2^32.
        let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Metadata {
            block_size: narrow(shape.block_size),
            leave_blocks_allocated: self.options.fixed,
            has_parent: self.parent.is_some(),
            virtual_size: *virtual_size,
            virtual_disk_id: self.options.disk_id.unwrap_or_else(|| self.guid(fingerprint, "disk id")),
            logical_sector_size: narrow(shape.logical_sector_size),
            physical_sector_size: narrow(self.layout.physical_sector_size),
        }
    }

    /// Derives the GUID for `purpose` from content and options.
    fn guid(&self, fingerprint: &Fingerprint, purpose: &str) -> uuid::Uuid {
        let mut parameters = vec![
            self.device_size,
            self.layout.shape.block_size,
            self.layout.shape.logical_sector_size,
            self.layout.physical_sector_size,
            u64::from(self.layout.log.length),
            u64::from(self.options.fixed),
        ];
        if let Some(parent) = &self.parent {
            let (high, low) = parent.data_write_guid.as_u64_pair();
            parameters.extend([high, low]);
        }
        fingerprint.guid(purpose, &parameters)
    }

    /// Writes the region tables, the headers and, last, the file type identifier, without which no program
    /// accepts the file.
    fn write_header_section(&self, output: &Output, fingerprint: &Fingerprint) -> Result<()> {
        let FileLayout { log, bat, metadata, .. } = &self.layout;
        if output.needs_zeros() {
            output.write_zeros_at(0, HEADER_SECTION_LEN)?;
        }
        let table = RegionTable { bat: *bat, metadata: *metadata }.encode();
        for file_offset in REGION_TABLE_OFFSETS {
            output.write_at(&table, file_offset)?;
        }
        for (sequence_number, file_offset) in (1..).zip(HEADER_OFFSETS) {
            let mut header = Header::new(sequence_number, log.file_offset, log.length);
            header.file_write_guid =
                self.options.file_write_guid.unwrap_or_else(|| self.guid(fingerprint, "file write"));
            header.data_write_guid =
                self.options.data_write_guid.unwrap_or_else(|| self.guid(fingerprint, "data write"));
            output.write_at(&header.encode(), file_offset)?;
        }
        output.write_at(&encode_identifier(CREATOR), 0)
    }
}
