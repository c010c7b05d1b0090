//! Opening an image: its footer, and its header and BAT unless it is fixed.

use std::sync::{Arc, Mutex};

use imgtool_core::layered::{Origin, Segment, SegmentMap, StoredBytes};
use imgtool_core::sync::lock;
use imgtool_core::table::PagedTable;
use imgtool_core::{Cache, DeviceId, Error, ErrorKind, Input, Lease, Memory, RandomInput, Remedy, Result};
use uuid::Uuid;

use crate::layout::footer::{COOKIE, DiskType, FOOTER_LEN, Footer, Geometry, footer_len, was_fixed};
use crate::layout::header::{HEADER_LEN, Header};
use crate::layout::{ABSENT, ENTRY_LEN, Fault, SECTOR_SIZE, bitmap_len};

/// The id of an image's only device.
pub(crate) const DISK: DeviceId = DeviceId(0);

/// The name of an image's only device.
pub(crate) const DISK_NAME: &str = "disk";

/// Maximum number of sector bitmaps in memory for the top image of a chain. Our limit: 1 MiB for the
/// longest bitmaps. An image deeper in the chain gets less.
const MAX_CACHED_BITMAPS: u64 = 16;

/// An open image, without its parent.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) footer: Footer,
    /// True if the footer at the end is missing or damaged, so that its copy was used.
    pub(crate) used_copy: bool,
    /// Reason why a salvage took the file for a fixed disk without a footer.
    pub(crate) doubt: Option<String>,
    /// File offset at which the blocks or the fixed disk end: that of the footer, if there is one.
    data_end: u64,
    /// Header and BAT; `None` in a fixed image.
    pub(crate) blocks: Option<Blocks>,
}

/// The blocks of a dynamic or differencing image.
pub(crate) struct Blocks {
    pub(crate) header: Header,
    pub(crate) bat: PagedTable,
    /// File offset at which header and BAT end. Blocks follow them.
    structures_end: u64,
    /// Sector bitmaps of a differencing image by block.
    bitmaps: Mutex<Cache<u64, Arc<[u8]>>>,
    /// Memory for the bitmaps.
    _lease: Lease,
}

impl Image {
    /// Reads and checks all structures but the entries of the BAT. `depth` is the number of images above this
    /// one in a chain. The BAT and the sector bitmaps borrow from `memory`.
    ///
    /// # Errors
    /// `WrongFormat` if the file has no footer; `Unsupported`, `Malformed` or `Corrupt` by its structures.
    pub(crate) fn open(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let found = read_footer(&input);
        found
            .and_then(|(footer, used_copy)| Self::with_footer(&input, footer, used_copy, depth, memory))
            .map_err(|e| e.path(input.location()))
    }

    /// Like [`Image::open`], but takes what precedes a missing or damaged footer for a fixed disk, unless the file
    /// begins like a dynamic image.
    ///
    /// # Errors
    /// Same as [`Image::open`].
    pub(crate) fn salvage(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let opened = match read_footer(&input) {
            Ok((footer, used_copy)) => {
                let is_fixed = footer.disk_type == DiskType::Fixed;
                match Self::with_footer(&input, footer, used_copy, depth, memory) {
                    Err(error) if is_fixed && error.kind() == ErrorKind::Corrupt => {
                        without_footer(&input, error)
                    }
                    opened => opened,
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::WrongFormat) => {
                without_footer(&input, error)
            }
            Err(error) => Err(error),
        };
        opened.map_err(|e| e.path(input.location()))
    }

    fn with_footer(
        input: &RandomInput,
        footer: Footer,
        used_copy: bool,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        let blocks = match footer.disk_type {
            DiskType::Fixed => None,
            DiskType::Dynamic | DiskType::Differencing => Some(Blocks::open(input, &footer, depth, memory)?),
        };
        let data_end = if used_copy { input.len() } else { input.len() - last_len(input) };
        let image = Self { input: input.clone(), footer, used_copy, doubt: None, data_end, blocks };
        if image.blocks.is_none() && image.footer.current_size > data_end {
            return Err(Error::corrupt(format!(
                "the disk has {} bytes, but the file has {data_end} before its footer",
                image.footer.current_size,
            ))
            .at(data_end)
            .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())));
        }
        Ok(image)
    }

    /// Returns the number of bytes between a fixed disk and its footer.
    pub(crate) fn gap(&self) -> Option<u64> {
        self.data_end.checked_sub(self.footer.current_size).filter(|_| self.blocks.is_none())
    }

    /// Returns the number of guest bytes that the block `index` contributes to the disk.
    pub(crate) fn used_len(&self, blocks: &Blocks, index: u64) -> u64 {
        let start = index.saturating_mul(blocks.header.block_size);
        self.footer.current_size.saturating_sub(start).min(blocks.header.block_size)
    }

    /// Returns the file offset of the data of a block from its entry. The block must follow header and BAT, and
    /// the file must contain the bytes that the disk uses, before its footer.
    pub(crate) fn stored_block(&self, blocks: &Blocks, index: u64, entry: u32) -> Result<u64> {
        let block_offset = u64::from(entry) * SECTOR_SIZE;
        let data_offset = block_offset + bitmap_len(blocks.header.block_size);
        let used = self.used_len(blocks, index);
        if block_offset < blocks.structures_end {
            return Err(Error::malformed(format!(
                "the block at {block_offset} overlaps the structures before {}",
                blocks.structures_end
            ))
            .at(block_offset));
        }
        if data_offset + used > self.data_end {
            let end = if self.data_end < self.input.len() { "footer begins" } else { "file ends" };
            return Err(Error::corrupt(format!(
                "the block needs {used} bytes at {data_offset}, but the {end} at {}",
                self.data_end
            ))
            .at(data_offset)
            .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())));
        }
        Ok(data_offset)
    }

    fn block_segment(&self, blocks: &Blocks, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let block_size = blocks.header.block_size;
        let (index, in_block) = (guest_offset / block_size, guest_offset % block_size);
        let is_child = self.footer.disk_type == DiskType::Differencing;
        // The next entry as well: two that refer to one block are damaged, however much is looked up.
        let max_blocks = (in_block + max_len).div_ceil(block_size);
        let (bytes, equal) = blocks.bat.run::<4>(index, max_blocks.max(2))?;
        let entry = u32::from_be_bytes(bytes);
        if entry == ABSENT {
            let origin = if is_child { Origin::Parent } else { Origin::Hole };
            let len = (equal.min(max_blocks) * block_size - in_block).min(max_len);
            return Ok(Segment { len, origin });
        }
        let data_offset = self.stored_block(blocks, index, entry)?;
        if equal > 1 && self.used_len(blocks, index + 1) > 0 {
            let (last, sector) = (index + equal - 1, u64::from(entry) * SECTOR_SIZE);
            return Err(Error::corrupt(format!(
                "BAT entries {index} to {last} refer to one block, at {sector}"
            ))
            .at(blocks.bat.entry_offset::<4>(index))
            .remedied_by(Remedy::Salvage("the BAT is damaged: use a backup".into())));
        }
        let len = (block_size - in_block).min(max_len);
        let stored = Origin::File { index: 0, file_offset: data_offset + in_block };
        if !is_child {
            // In a dynamic image, a clear bit means that the guest never wrote to the sector. Readers differ
            // in its content, but files in use have zeros there.
            return Ok(Segment { len, origin: stored });
        }
        let bitmap = blocks.bitmap(&self.input, index, data_offset)?;
        let (here, len) = bit_run(&bitmap, in_block, len);
        Ok(Segment { len, origin: if here { stored } else { Origin::Parent } })
    }
}

impl Blocks {
    fn open(input: &RandomInput, footer: &Footer, depth: usize, memory: &Memory) -> Result<Self> {
        let bytes = input.read_vec(footer.data_offset, HEADER_LEN)?;
        let header = Header::decode(&bytes, footer.current_size).map_err(|fault| {
            match fault {
                Fault::NoSignature => Error::malformed("the dynamic header has no signature"),
                Fault::Unsupported(what) => Error::unsupported(format!("the dynamic header {what}")),
                Fault::Malformed(what) => Error::malformed(format!("the dynamic header {what}")),
            }
            .at(footer.data_offset)
        })?;
        let len = header.entries * ENTRY_LEN;
        let bat = PagedTable::new(input.clone(), header.bat_offset, len, depth, memory)?;
        let share = memory.cache_share(MAX_CACHED_BITMAPS) / (depth as u64).saturating_add(1);
        let max_bitmaps = if footer.disk_type == DiskType::Differencing { share.max(1) } else { 0 };
        let bytes = max_bitmaps * bitmap_len(header.block_size);
        let lease = memory.lease(bytes, "the sector bitmaps of a VHD image")?;
        // At most MAX_CACHED_BITMAPS, so it fits.
        let bitmaps = Mutex::new(Cache::new(max_bitmaps.max(1) as usize));
        let header_end = footer.data_offset.saturating_add(HEADER_LEN as u64);
        let structures_end = header.bat_end().max(header_end);
        Ok(Self { header, bat, structures_end, bitmaps, _lease: lease })
    }

    /// Returns the sector bitmap of a block, which precedes its data.
    fn bitmap(&self, input: &RandomInput, index: u64, data_offset: u64) -> Result<Arc<[u8]>> {
        if let Some(bitmap) = lock(&self.bitmaps).get(&index) {
            return Ok(Arc::clone(bitmap));
        }
        let len = bitmap_len(self.header.block_size);
        // At most 64 KiB, the bitmap of the largest block.
        let bitmap: Arc<[u8]> = Arc::from(input.read_vec(data_offset - len, len as usize)?);
        lock(&self.bitmaps).insert(index, Arc::clone(&bitmap));
        Ok(bitmap)
    }
}

/// Returns the bit of the sector at `in_block`, and the number of bytes from there on, at most `max_len`,
/// whose sectors have the same bit. The first sector is the most significant bit of the first byte.
fn bit_run(bitmap: &[u8], in_block: u64, max_len: u64) -> (bool, u64) {
    let bit =
        |sector: u64| bitmap.get((sector / 8) as usize).is_some_and(|byte| byte >> (7 - sector % 8) & 1 == 1);
    let first = in_block / SECTOR_SIZE;
    let here = bit(first);
    let end = in_block + max_len;
    let mut next = first + 1;
    while next * SECTOR_SIZE < end && bit(next) == here {
        next += 1;
    }
    (here, (next * SECTOR_SIZE).min(end) - in_block)
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let Some(blocks) = &self.blocks else {
            return Ok(Segment {
                len: max_len,
                origin: Origin::File { index: 0, file_offset: guest_offset },
            });
        };
        self.block_segment(blocks, guest_offset, max_len).map_err(|error| {
            let start = guest_offset - guest_offset % blocks.header.block_size;
            let used = self.used_len(blocks, guest_offset / blocks.header.block_size);
            error.path(self.input.location()).device(DISK_NAME).guest(start..start + used)
        })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let Some(blocks) = &self.blocks else {
            return (SECTOR_SIZE - guest_offset % SECTOR_SIZE).min(max_len);
        };
        let block_size = blocks.header.block_size;
        let (index, in_block) = (guest_offset / block_size, guest_offset % block_size);
        // Many entries may refer to one block.
        let max_blocks = (in_block + max_len).div_ceil(block_size);
        let equal = blocks.bat.run::<4>(index, max_blocks).map_or(1, |(_, equal)| equal);
        (equal * block_size - in_block).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }
}

/// Says that a disk of `size` bytes is what precedes a footer with this fault.
pub(crate) fn unverified(error: &Error, size: u64) -> String {
    format!("unverified: {}; the disk is taken to have the {size} bytes before it", error.message())
}

/// Takes a file for a fixed disk although its footer is missing or damaged, which `error` describes.
fn without_footer(input: &RandomInput, error: Error) -> Result<Image> {
    let last = last_sector(input)?;
    let begins_like_dynamic = input.read_vec(0, input.len().min(COOKIE.len() as u64) as usize)? == COOKIE;
    if begins_like_dynamic && !was_fixed(&last) {
        return Err(error);
    }
    let footer_len = if was_fixed(&last) { last_len(input) } else { 0 };
    let data_end = input.len() - footer_len;
    let size = data_end - data_end % SECTOR_SIZE;
    let footer = Footer {
        disk_type: DiskType::Fixed,
        data_offset: 0,
        time: 0,
        creator: *b"    ",
        current_size: size,
        geometry: Geometry::of(size),
        uuid: Uuid::nil(),
        saved_state: false,
    };
    let doubt = Some(unverified(&error, size));
    Ok(Image { input: input.clone(), footer, used_copy: false, doubt, data_end, blocks: None })
}

/// Reads the footer at the end or, if it is damaged, its copy at the start. Returns true with the copy.
fn read_footer(input: &RandomInput) -> Result<(Footer, bool)> {
    let last = last_sector(input)?;
    let fault = match Footer::decode(&last) {
        Ok(footer) => return Ok((footer, false)),
        Err(Fault::Unsupported(what)) => return Err(Error::unsupported(format!("the footer {what}"))),
        Err(fault) => fault,
    };
    if was_fixed(&last) {
        let what = if let Fault::Malformed(what) = fault { what } else { "has no signature".to_owned() };
        return Err(damaged_footer(input, &what));
    }
    let len = input.len().min(FOOTER_LEN as u64) as usize;
    match Footer::decode(&input.read_vec(0, len)?) {
        // A fixed image has no copy: a guest may have written this sector.
        Ok(footer) if footer.disk_type != DiskType::Fixed => Ok((footer, true)),
        Err(Fault::Unsupported(what)) => Err(Error::unsupported(format!("the copy of the footer {what}"))),
        _ => Err(match fault {
            Fault::Malformed(what) => damaged_footer(input, &what),
            _ => Error::wrong_format("is not a VHD image: the footer is missing")
                .remedied_by(Remedy::Salvage("the file is no VHD image, or a fixed one that was cut".into())),
        }),
    }
}

fn damaged_footer(input: &RandomInput, what: &str) -> Error {
    Error::corrupt(format!("the footer {what}"))
        .at(input.len() - last_len(input))
        .remedied_by(Remedy::Salvage("the image is damaged: use a backup".into()))
}

/// Returns the length in bytes of the footer at the end of the file.
fn last_len(input: &RandomInput) -> u64 {
    input.len().min(footer_len(input.len()) as u64)
}

/// Reads the footer at the end of the file.
fn last_sector(input: &RandomInput) -> Result<Vec<u8>> {
    let len = last_len(input);
    let mut bytes = input.read_vec(input.len() - len, len as usize)?;
    bytes.resize(FOOTER_LEN, 0);
    Ok(bytes)
}
