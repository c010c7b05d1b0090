//! Writing differencing images: the payload blocks in which the disk differs from its parent, and the sector
//! bitmaps between them (sections 2.4 and 2.5).

use imgtool_core::base::Base;
use imgtool_core::child_sink::{BitmapPlace, Block, ChildLayout, ChildSettings, ChildSink, table_share};
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::table::TableWriter;
use imgtool_core::{BackingName, Error, ImageInfo, Manifest, Output, Result};
use uuid::Uuid;

use super::VhdxLayout;
use crate::layout::bat::{BatEntry, PayloadState, SECTOR_BITMAP_LEN, SectorBitmapState};
use crate::options::{FileLayout, VhdxOptions};
use crate::parent::DATA_WRITE_GUID;

/// The properties of a parent that its child depends on.
#[derive(Debug, Clone)]
pub(crate) struct Parent {
    /// GUID of the parent's content, by which readers recognise it.
    pub(crate) data_write_guid: Uuid,
    /// Virtual size in bytes.
    pub(crate) virtual_size: u64,
    /// Size of a payload block in bytes.
    pub(crate) block_size: u64,
    /// Logical sector size in bytes.
    pub(crate) logical_sector_size: u64,
    /// Physical sector size in bytes; `None` if the parent does not state it.
    pub(crate) physical_sector_size: Option<u64>,
}

impl Parent {
    /// Takes the properties from the facts about the parent.
    pub(crate) fn new(info: &ImageInfo) -> Result<Self> {
        let value = |key: &str| info.facts.iter().find(|fact| fact.key == key).map(|fact| &fact.value);
        let number = |key: &str| value(key).and_then(|value| value.as_u64());
        let text = value(DATA_WRITE_GUID).and_then(|value| value.as_str());
        let guid = text.and_then(|text| Uuid::try_parse(text).ok());
        let missing = || Error::unsupported("the parent of a VHDX image must be a VHDX image");
        Ok(Self {
            data_write_guid: guid.ok_or_else(missing)?,
            virtual_size: info.single("a VHDX image")?.size,
            block_size: number("block-size").ok_or_else(missing)?,
            logical_sector_size: number("logical-sector-size").ok_or_else(missing)?,
            physical_sector_size: number("physical-sector-size"),
        })
    }

    /// Returns the keys and values of the parent locator (section 2.6.2.6.3).
    pub(crate) fn locator(&self, backing: &BackingName) -> Vec<(&'static str, String)> {
        let path_key = if backing.is_absolute() { "absolute_win32_path" } else { "relative_path" };
        vec![
            ("parent_linkage", self.data_write_guid.braced().to_string()),
            (path_key, backing.windows_path()),
        ]
    }
}

/// Creates a sink that writes a child of `parent` to `output`.
pub(crate) fn new(
    output: Output,
    manifest: &Manifest,
    options: VhdxOptions,
    layout: FileLayout,
    parent: Parent,
) -> Result<ChildSink<ChildFile>> {
    let device_size = manifest.single(crate::FORMAT)?.size;
    let memory = table_share(manifest.tables);
    let bat = TableWriter::new(output.clone(), layout.bat.file_offset, layout.bat.length.into(), 0, memory);
    let settings = ChildSettings {
        device_size,
        parent_size: parent.virtual_size,
        base: manifest.base.clone().map(Base::new),
        zero_unit: options.zero_unit,
        blocks_start: layout.payload_start,
    };
    let file = ChildFile(VhdxLayout { device_size, options, layout, parent: Some(parent) });
    Ok(ChildSink::new(output, bat, file, settings))
}

/// The layout of a differencing file.
pub(crate) struct ChildFile(VhdxLayout);

impl ChildFile {
    fn entry(&self, bat: &mut TableWriter, bat_index: u64) -> Result<BatEntry> {
        Ok(BatEntry(u64::from_le_bytes(bat.get(bat_index)?)))
    }

    fn set(&self, bat: &mut TableWriter, bat_index: u64, entry: BatEntry) -> Result<()> {
        bat.set(bat_index, entry.0.to_le_bytes())
    }
}

impl ChildLayout for ChildFile {
    fn block_size(&self) -> u64 {
        self.0.layout.shape.block_size
    }

    fn sector_size(&self) -> u64 {
        self.0.layout.shape.logical_sector_size
    }

    fn virtual_size(&self) -> u64 {
        self.0.layout.virtual_size
    }

    fn bitmap_len(&self) -> usize {
        SECTOR_BITMAP_LEN as usize
    }

    fn is_msb_first(&self) -> bool {
        false
    }

    fn has_zero_blocks(&self) -> bool {
        true
    }

    fn block(&self, bat: &mut TableWriter, index: u64) -> Result<Block> {
        let entry = self.entry(bat, self.0.layout.shape.payload_bat_index(index))?;
        Ok(match entry.payload_state() {
            PayloadState::PartiallyPresent => Block::Stored(entry.file_offset()),
            PayloadState::Zero => Block::Zero,
            _ => Block::Parent,
        })
    }

    fn allocate(&self, bat: &mut TableWriter, index: u64, end: u64) -> Result<(u64, u64)> {
        let shape = &self.0.layout.shape;
        let bitmap_index = shape.sector_bitmap_bat_index(index);
        let bitmap = self.entry(bat, bitmap_index)?;
        let mut data = end;
        if bitmap.sector_bitmap_state() != SectorBitmapState::Present {
            self.set(bat, bitmap_index, BatEntry::fully_present(end))?;
            data += SECTOR_BITMAP_LEN;
        }
        self.set(bat, shape.payload_bat_index(index), BatEntry::partially_present(data))?;
        Ok((data, data + shape.block_size))
    }

    fn set_zero(&self, bat: &mut TableWriter, index: u64) -> Result<()> {
        self.set(bat, self.0.layout.shape.payload_bat_index(index), BatEntry::ZERO)
    }

    fn bitmap(&self, bat: &mut TableWriter, index: u64, _data: u64) -> Result<BitmapPlace> {
        let shape = &self.0.layout.shape;
        let entry = self.entry(bat, shape.sector_bitmap_bat_index(index))?;
        let sectors_per_block = shape.block_size / shape.logical_sector_size;
        let first_bit = index % shape.chunk_ratio * sectors_per_block;
        Ok(BitmapPlace { file_offset: entry.file_offset(), first_bit })
    }

    fn finish(&self, output: &Output, _end: u64, fingerprint: &Fingerprint) -> Result<()> {
        self.0.write_structures(output, fingerprint)
    }

    fn notes(&self) -> Vec<String> {
        self.0.rounding_notes()
    }
}
