//! Bytes of an archive: header, blobs and extents, valid or with faults.

use std::collections::BTreeMap;

use md5::{Digest, Md5};

use super::{BLOCK, Built, CLUSTER};
use crate::images::Image;

/// UUID of built archives.
pub const UUID: [u8; 16] = *b"\x01\x23\x45\x67\x89\xab\x4d\xef\x80\x11\x22\x33\x44\x55\x66\x77";
/// Creation time of built archives: 2026-11-22 10:03:58 UTC.
pub const CTIME: i64 = 1_795_341_838;

/// One slot of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// Device id; 0 in an empty slot.
    pub dev_id: u8,
    /// Cluster number.
    pub cluster: u32,
    /// Bit mask of the stored sub-blocks.
    pub mask: u16,
    /// Byte that readers ignore.
    pub reserved: u8,
}

/// Returns a slot of the device `dev_id`.
pub fn slot(dev_id: u8, cluster: u32, mask: u16) -> Slot {
    Slot { dev_id, cluster, mask, reserved: 0 }
}

/// Returns an empty slot, whose mask and cluster number have no meaning.
pub fn hole() -> Slot {
    Slot { dev_id: 0, cluster: 77, mask: 0xffff, reserved: 0 }
}

/// An extent, valid or with faults.
#[derive(Debug, Clone)]
pub struct Extent {
    /// Slots, at most 59.
    pub slots: Vec<Slot>,
    /// Number of sub-blocks in the header; `None` for the actual number.
    pub block_count: Option<u16>,
    /// UUID; the archive's UUID in a valid extent.
    pub uuid: [u8; 16],
    /// Magic; "VMAE" in a valid extent.
    pub magic: [u8; 4],
    /// Reserved field; 0 in a valid extent.
    pub reserved1: u16,
    /// Position and value of a byte that is XORed into the header after the checksum is computed.
    pub flip: Option<(usize, u8)>,
    /// Number of bytes cut off the end of the data.
    pub cut: usize,
}

/// Returns a valid extent.
pub fn extent(slots: &[Slot]) -> Extent {
    Extent {
        slots: slots.to_vec(),
        block_count: None,
        uuid: UUID,
        magic: *b"VMAE",
        reserved1: 0,
        flip: None,
        cut: 0,
    }
}

/// An archive to build, in which every field can be set.
#[derive(Debug, Clone)]
pub struct ArchiveBuilder {
    /// The blob buffer. Its first byte is unused, since blob offset 0 means no blob.
    pub blobs: Vec<u8>,
    /// Id, blob offset of the name, and size in bytes of each device.
    pub devices: Vec<(u8, u32, u64)>,
    /// Index, blob offset of the name, and blob offset of the content of each configuration file.
    pub configs: Vec<(usize, u32, u32)>,
    /// Magic; "VMA\0" in a valid header.
    pub magic: [u8; 4],
    /// Version; 1 in a valid header.
    pub version: u32,
    /// Offset of the blob buffer; 12288 in a valid header.
    pub blob_buffer_offset: u32,
    /// Size of the blob buffer; `None` for the actual size.
    pub blob_buffer_size: Option<u32>,
    /// Header size; `None` for the actual size. The header that is built keeps its actual size.
    pub header_size: Option<u32>,
    /// Number of bytes added to the end of the header.
    pub padding: usize,
    /// Value of the bytes that readers ignore.
    pub reserved: u8,
    /// Position and value of a byte that is XORed into the header after the checksum is computed.
    pub flip: Option<(usize, u8)>,
    /// Content of devices, by id. A device without an image contains [`block_content`].
    pub images: BTreeMap<u8, Image>,
    /// Extents, in the order of the file.
    pub extents: Vec<Extent>,
    /// Bytes after the last extent.
    pub trailing: Vec<u8>,
}

impl Default for ArchiveBuilder {
    fn default() -> Self {
        Self {
            blobs: vec![0],
            devices: Vec::new(),
            configs: Vec::new(),
            magic: *b"VMA\0",
            version: 1,
            blob_buffer_offset: 12_288,
            blob_buffer_size: None,
            header_size: None,
            padding: 0,
            reserved: 0,
            flip: None,
            images: BTreeMap::new(),
            extents: Vec::new(),
            trailing: Vec::new(),
        }
    }
}

impl ArchiveBuilder {
    /// Returns an archive without devices and extents.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a blob and returns its offset.
    pub fn blob(&mut self, bytes: &[u8]) -> u32 {
        let offset = self.blobs.len() as u32;
        self.blobs.extend_from_slice(&(bytes.len() as u16).to_le_bytes());
        self.blobs.extend_from_slice(bytes);
        offset
    }

    /// Adds a device with its own name blob.
    #[must_use]
    pub fn device(mut self, dev_id: u8, name: &str, size: u64) -> Self {
        let offset = self.blob(format!("{name}\0").as_bytes());
        self.devices.push((dev_id, offset, size));
        self
    }

    /// Adds a device with the content of `image`.
    #[must_use]
    pub fn device_of(mut self, dev_id: u8, name: &str, image: Image) -> Self {
        let size = image.size;
        self.images.insert(dev_id, image);
        self.device(dev_id, name, size)
    }

    /// Adds a configuration file with its own blobs, at the next free index.
    #[must_use]
    pub fn config(mut self, name: &str, data: &[u8]) -> Self {
        let name = self.blob(format!("{name}\0").as_bytes());
        let data = self.blob(data);
        self.configs.push((self.configs.len(), name, data));
        self
    }

    /// Adds an extent.
    #[must_use]
    pub fn extent(mut self, extent: Extent) -> Self {
        self.extents.push(extent);
        self
    }

    /// Adds extents for `slots`, `per_extent` in each.
    #[must_use]
    pub fn extents(mut self, slots: &[Slot], per_extent: usize) -> Self {
        self.extents.extend(slots.chunks(per_extent).map(extent));
        self
    }

    /// Changes any field.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// Returns the bytes of the archive.
    pub fn build(&self) -> Vec<u8> {
        self.built().bytes
    }

    /// Returns the archive and the file offsets of its extents.
    pub fn built(&self) -> Built {
        let mut bytes = self.header();
        let mut extents = Vec::new();
        for extent in &self.extents {
            extents.push(bytes.len());
            bytes.extend(self.encode_extent(extent));
        }
        bytes.extend_from_slice(&self.trailing);
        Built { bytes, extents }
    }

    /// Returns the archive's header.
    pub fn header(&self) -> Vec<u8> {
        let area = self.blobs.len().next_multiple_of(512);
        let mut raw = vec![self.reserved; 12_288];
        raw.extend_from_slice(&self.blobs);
        raw.resize(12_288 + area + self.padding, 0);
        let total = raw.len() as u32;
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &self.magic);
        put(4, &self.version.to_be_bytes());
        put(8, &UUID);
        put(24, &CTIME.to_be_bytes());
        put(32, &[0; 16]);
        put(48, &self.blob_buffer_offset.to_be_bytes());
        put(52, &self.blob_buffer_size.unwrap_or(self.blobs.len() as u32).to_be_bytes());
        put(56, &self.header_size.unwrap_or(total).to_be_bytes());
        put(2044, &[0; 2048]);
        for dev_id in 0..256 {
            put(4096 + 32 * dev_id, &[0; 4]);
            put(4096 + 32 * dev_id + 8, &[0; 8]);
        }
        for (index, name, data) in &self.configs {
            put(2044 + 4 * index, &name.to_be_bytes());
            put(3068 + 4 * index, &data.to_be_bytes());
        }
        for (dev_id, name, size) in &self.devices {
            put(4096 + 32 * usize::from(*dev_id), &name.to_be_bytes());
            put(4096 + 32 * usize::from(*dev_id) + 8, &size.to_be_bytes());
        }
        let md5: [u8; 16] = Md5::digest(&raw).into();
        raw[32..48].copy_from_slice(&md5);
        if let Some((at, value)) = self.flip {
            raw[at] ^= value;
        }
        raw
    }

    fn encode_extent(&self, extent: &Extent) -> Vec<u8> {
        let mut raw = vec![0; 512];
        let mut data = Vec::new();
        for (number, slot) in extent.slots.iter().enumerate() {
            let at = 40 + 8 * number;
            raw[at..at + 2].copy_from_slice(&slot.mask.to_be_bytes());
            raw[at + 2] = slot.reserved;
            raw[at + 3] = slot.dev_id;
            raw[at + 4..at + 8].copy_from_slice(&slot.cluster.to_be_bytes());
            if slot.dev_id != 0 {
                for block in (0..16).filter(|block| slot.mask >> block & 1 == 1) {
                    data.extend(self.block(slot, block));
                }
            }
        }
        let block_count = extent.block_count.unwrap_or((data.len() / BLOCK) as u16);
        raw[..4].copy_from_slice(&extent.magic);
        raw[4..6].copy_from_slice(&extent.reserved1.to_be_bytes());
        raw[6..8].copy_from_slice(&block_count.to_be_bytes());
        raw[8..24].copy_from_slice(&extent.uuid);
        let md5: [u8; 16] = Md5::digest(&raw).into();
        raw[24..40].copy_from_slice(&md5);
        if let Some((at, value)) = extent.flip {
            raw[at] ^= value;
        }
        data.truncate(data.len().saturating_sub(extent.cut));
        raw.extend(data);
        raw
    }

    fn block(&self, slot: &Slot, block: usize) -> Vec<u8> {
        let start = u64::from(slot.cluster) * CLUSTER as u64 + (block * BLOCK) as u64;
        match self.images.get(&slot.dev_id) {
            Some(image) => image.read(start, BLOCK),
            None => block_content(slot.dev_id, slot.cluster, block).to_vec(),
        }
    }
}

/// Returns the content of a sub-block in the archives built here: every eight bytes encode their position.
pub fn block_content(dev_id: u8, cluster: u32, block: usize) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    for (number, word) in bytes.chunks_exact_mut(8).enumerate() {
        let place = u64::from(dev_id) << 56
            | u64::from(cluster) << 20
            | (block as u64) << 12
            | number as u64
            | 1 << 52;
        word.copy_from_slice(&place.to_be_bytes());
    }
    bytes
}

/// Returns the guest's bytes of a device of `size` bytes that `slots` describe, without sub-blocks past the
/// end.
pub fn guest_content(dev_id: u8, size: u64, slots: &[Slot]) -> Vec<u8> {
    let clusters = (size as usize).div_ceil(CLUSTER);
    let mut guest = vec![0; clusters * CLUSTER];
    for slot in slots.iter().filter(|slot| slot.dev_id == dev_id && (slot.cluster as usize) < clusters) {
        for block in (0..16).filter(|block| slot.mask >> block & 1 == 1) {
            let at = slot.cluster as usize * CLUSTER + block * BLOCK;
            guest[at..at + BLOCK].copy_from_slice(&block_content(dev_id, slot.cluster, block));
        }
    }
    guest.truncate(size as usize);
    guest
}
