//! Opening an image: its header and its block map.

use imgtool_core::layered::{Origin, Segment, SegmentMap, StoredBytes};
use imgtool_core::table::PagedTable;
use imgtool_core::{DeviceId, Error, Input, Memory, RandomInput, Remedy, Result};

use crate::layout::{ENTRY_LEN, Entry, Header, HeaderFault, ImageType, MAX_HEADER_LEN};

/// The id of an image's only device.
pub(crate) const DISK: DeviceId = DeviceId(0);

/// The name of an image's only device.
pub(crate) const DISK_NAME: &str = "disk";

/// An open image, without its parent.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) header: Header,
    pub(crate) map: PagedTable,
}

impl Image {
    /// Reads and checks the header and the place of the map. `depth` is the number of images above this one
    /// in a chain. The map borrows from `memory`.
    ///
    /// # Errors
    /// `WrongFormat`, `Unsupported` or `Malformed` by the header; `Corrupt` if the file ends within the map.
    pub(crate) fn open(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let header = read_header(&input).map_err(|e| e.path(input.location()))?;
        let len = header.blocks * ENTRY_LEN;
        let map = PagedTable::new(input.clone(), header.map_offset, len, depth, memory)?;
        Ok(Self { input, header, map })
    }

    /// Returns the number of guest bytes that the block `index` contributes to the disk.
    pub(crate) fn used_len(&self, index: u64) -> u64 {
        let start = index.saturating_mul(self.header.block_size);
        self.header.virtual_size.saturating_sub(start).min(self.header.block_size)
    }

    /// Returns the origin of a block that is not in this image.
    fn absent(&self) -> Origin {
        if self.header.image_type == ImageType::Differencing { Origin::Parent } else { Origin::Hole }
    }

    /// Returns the error for `equal` entries of the map from `index` on that refer to one block.
    fn shared_block(&self, index: u64, equal: u64, position: u32) -> Error {
        Error::corrupt(format!(
            "map entries {index} to {} refer to one block, at {}",
            index + equal - 1,
            self.header.block_data(position)
        ))
        .at(self.map.entry_offset::<4>(index))
        .remedied_by(Remedy::Salvage("the map is damaged: use a backup".into()))
    }

    /// Returns the file offset of the data of a stored block. The file must contain the bytes that the disk
    /// uses.
    fn stored_block(&self, index: u64, position: u32) -> Result<u64> {
        let file_offset = self.header.block_data(position);
        let used = self.used_len(index);
        if file_offset.saturating_add(used) > self.input.len() {
            return Err(Error::corrupt(format!(
                "the block needs {used} bytes at {file_offset}, but the file ends at {}",
                self.input.len()
            ))
            .at(file_offset)
            .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())));
        }
        Ok(file_offset)
    }
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let block_size = self.header.block_size;
        let index = guest_offset / block_size;
        let in_block = guest_offset % block_size;
        let context = |error: Error| {
            let start = index * block_size;
            error.path(self.input.location()).device(DISK_NAME).guest(start..start + self.used_len(index))
        };
        // The next entry as well: two that refer to one block are damaged, however much is looked up.
        let max_blocks = (in_block + max_len).div_ceil(block_size);
        let (bytes, equal) = self.map.run::<4>(index, max_blocks.max(2)).map_err(context)?;
        let equal_here = equal.min(max_blocks);
        let (origin, blocks) = match Entry::decode(bytes) {
            Entry::Stored(position) if equal > 1 && self.used_len(index + 1) > 0 => {
                return Err(context(self.shared_block(index, equal, position)));
            }
            Entry::Stored(position) => {
                let file_offset = self.stored_block(index, position).map_err(context)?;
                (Origin::File { index: 0, file_offset: file_offset + in_block }, 1)
            }
            Entry::Zero => (Origin::Zero, equal_here),
            Entry::Absent => (self.absent(), equal_here),
        };
        Ok(Segment { len: (blocks * block_size - in_block).min(max_len), origin })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let (index, in_block) =
            (guest_offset / self.header.block_size, guest_offset % self.header.block_size);
        // A hole of the file may be a map of a billion equal entries.
        let max_blocks = (in_block + max_len).div_ceil(self.header.block_size);
        let blocks = self.map.run::<4>(index, max_blocks).map_or(1, |(_, equal)| equal);
        (blocks * self.header.block_size - in_block).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }
}

fn read_header(input: &RandomInput) -> Result<Header> {
    Header::decode(&input.read_head(MAX_HEADER_LEN)?).map_err(|fault| match fault {
        HeaderFault::NotVdi => Error::wrong_format("is not a VDI image: the signature is missing"),
        HeaderFault::Unsupported(what) => Error::unsupported(format!("the image {what}")),
        HeaderFault::Malformed(what) => Error::malformed(format!("the image {what}")).at(0),
    })
}
