//! Writing differencing images: a copy of the footer, the dynamic header, the BAT, the parent's name, the
//! blocks in which the disk differs from its parent, each behind the bitmap of its sectors, and the footer.

use imgtool_core::base::Base;
use imgtool_core::child_sink::{BitmapPlace, Block, ChildLayout, ChildSettings, ChildSink, table_share};
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::table::TableWriter;
use imgtool_core::{BackingName, Error, ImageInfo, Manifest, Output, Result};
use uuid::Uuid;

use super::{footer, rounding_note};
use crate::layout::header::{Header, Locator};
use crate::layout::{ABSENT, SECTOR_SIZE, bitmap_len};
use crate::options::{FIXED_ALIGNMENT, VhdOptions, bat_len, header};
use crate::source::{TIMESTAMP, UUID};

/// The properties of a parent that its child depends on.
#[derive(Debug, Clone)]
pub(super) struct Parent {
    uuid: Uuid,
    /// Time of creation in the format's unit.
    time: u32,
    virtual_size: u64,
}

impl Parent {
    /// Takes the properties from the facts about the parent.
    pub(super) fn new(info: &ImageInfo) -> Result<Self> {
        let value = |key: &str| info.facts.iter().find(|fact| fact.key == key).map(|fact| &fact.value);
        let uuid = value(UUID).and_then(|value| value.as_str()).and_then(|text| Uuid::try_parse(text).ok());
        let time =
            value(TIMESTAMP).and_then(|value| value.as_u64()).and_then(|time| u32::try_from(time).ok());
        Ok(Self {
            uuid: uuid.ok_or_else(|| Error::unsupported("the parent of a VHD image must be a VHD image"))?,
            time: time.unwrap_or(0),
            virtual_size: info.single("a VHD image")?.size,
        })
    }

    /// Returns the virtual size of a child for a device of `size` bytes: that of the parent, which may have
    /// been rounded up as fixed images are.
    ///
    /// # Errors
    /// `Unsupported` for another size, with which no program opens a child.
    pub(super) fn virtual_size(&self, options: &VhdOptions, size: u64) -> Result<u64> {
        let own = options.virtual_size(size)?;
        let rounded = size.checked_next_multiple_of(FIXED_ALIGNMENT);
        if own == self.virtual_size || rounded == Some(self.virtual_size) {
            return options.virtual_size(self.virtual_size);
        }
        Err(Error::unsupported(format!(
            "the disk has {own} bytes, and its parent {}: a differencing VHD image is as large as its parent",
            self.virtual_size
        ))
        .hint("choose VHDX or qcow2 for the new image, or a parent of the same size"))
    }
}

/// Creates a sink that writes a child of `parent` with this virtual size to `output`.
pub(super) fn new(
    output: Output,
    manifest: &Manifest,
    options: &VhdOptions,
    parent: &Parent,
    virtual_size: u64,
    own_name: Vec<u64>,
) -> Result<ChildSink<ChildFile>> {
    let device = manifest.single(crate::FORMAT)?;
    let device_size = device.size;
    let backing = options.backing.as_ref().ok_or_else(|| Error::usage("the parent has no name"))?;
    let file = ChildFile::new(options.clone(), backing, parent, device_size, virtual_size);
    let file = ChildFile { own_name, ..file };
    let (bat_offset, bat_len) = (file.header.bat_offset, bat_len(&file.header));
    let bat = TableWriter::new(output.clone(), bat_offset, bat_len, 0xff, table_share(manifest.tables));
    let settings = ChildSettings {
        device_size,
        parent_size: virtual_size,
        base: manifest.base.clone().map(Base::new),
        zero_unit: options.zero_unit,
        blocks_start: file.blocks_start(),
    };
    Ok(ChildSink::new(output, bat, file, settings))
}

/// The layout of a differencing image.
pub(super) struct ChildFile {
    options: VhdOptions,
    header: Header,
    /// The parent's name in UTF-16LE, relative or absolute, which the locator refers to.
    name: Vec<u8>,
    /// Name of the image, as parameters of its UUID.
    own_name: Vec<u64>,
    device_size: u64,
    virtual_size: u64,
}

impl ChildFile {
    fn new(
        options: VhdOptions,
        backing: &BackingName,
        parent: &Parent,
        device_size: u64,
        virtual_size: u64,
    ) -> Self {
        let path = backing.windows_path();
        let name: Vec<u8> = path.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let empty = header(virtual_size);
        let locator = Locator {
            code: if backing.is_absolute() { *b"W2ku" } else { *b"W2ru" },
            file_offset: empty.bat_offset + bat_len(&empty),
            len: name.len(),
        };
        let header = Header {
            parent_uuid: parent.uuid,
            parent_time: parent.time,
            parent_name: path.rsplit('\\').next().unwrap_or_default().to_owned(),
            locators: vec![locator],
            ..empty
        };
        Self { options, header, name, own_name: Vec::new(), device_size, virtual_size }
    }

    /// Returns the file offset of the first block, behind the parent's name.
    fn blocks_start(&self) -> u64 {
        let names = self.header.locators.iter().map(|locator| locator.file_offset + locator.len as u64);
        names.max().unwrap_or(0).next_multiple_of(SECTOR_SIZE)
    }
}

impl ChildLayout for ChildFile {
    fn block_size(&self) -> u64 {
        self.header.block_size
    }

    fn sector_size(&self) -> u64 {
        SECTOR_SIZE
    }

    /// A byte of the bitmap: libvhdi 20260901 takes all sectors of a byte for stored from the first whose bit
    /// is set, and Windows writes whole pages.
    fn unit(&self) -> u64 {
        8 * SECTOR_SIZE
    }

    fn virtual_size(&self) -> u64 {
        self.virtual_size
    }

    fn bitmap_len(&self) -> usize {
        // The block size bounds it to 512 bytes.
        bitmap_len(self.header.block_size) as usize
    }

    fn is_msb_first(&self) -> bool {
        true
    }

    fn has_zero_blocks(&self) -> bool {
        false
    }

    fn block(&self, bat: &mut TableWriter, index: u64) -> Result<Block> {
        let entry = u32::from_be_bytes(bat.get(index)?);
        let data = u64::from(entry) * SECTOR_SIZE + self.bitmap_len() as u64;
        Ok(if entry == ABSENT { Block::Parent } else { Block::Stored(data) })
    }

    fn allocate(&self, bat: &mut TableWriter, index: u64, end: u64) -> Result<(u64, u64)> {
        // The size of the disk is limited to 2040 GiB, so the file has fewer than 2^32 sectors.
        let sector = u32::try_from(end / SECTOR_SIZE).unwrap_or(ABSENT);
        bat.set(index, sector.to_be_bytes())?;
        let data = end + self.bitmap_len() as u64;
        Ok((data, data + self.header.block_size))
    }

    fn set_zero(&self, _bat: &mut TableWriter, index: u64) -> Result<()> {
        Err(Error::unsupported(format!("the format has no entry for block {index} of zeros")))
    }

    fn bitmap(&self, _bat: &mut TableWriter, _index: u64, data: u64) -> Result<BitmapPlace> {
        Ok(BitmapPlace { file_offset: data - self.bitmap_len() as u64, first_bit: 0 })
    }

    fn finish(&self, output: &Output, end: u64, fingerprint: &Fingerprint) -> Result<()> {
        let (high, low) = self.header.parent_uuid.as_u64_pair();
        let mut parameters = vec![self.device_size, self.virtual_size, self.header.block_size, high, low];
        parameters.extend(&self.own_name);
        let uuid = fingerprint.guid("differencing vhd", &parameters);
        let footer = footer(&self.options, self.virtual_size, uuid).encode();
        output.write_at(&footer, end)?;
        for locator in &self.header.locators {
            let mut name = self.name.clone();
            name.resize(name.len().next_multiple_of(SECTOR_SIZE as usize), 0);
            output.write_at(&name, locator.file_offset)?;
        }
        output.write_at(&self.header.encode(), SECTOR_SIZE)?;
        output.write_at(&footer, 0)
    }

    fn notes(&self) -> Vec<String> {
        rounding_note(self.device_size, self.virtual_size)
    }
}
