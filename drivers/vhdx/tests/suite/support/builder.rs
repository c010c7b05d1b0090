//! VHDX files built byte by byte from the specification, without the driver's encoders.
//!
//! Their layout: header section at 0, log at 1 MiB, metadata at 2 MiB, BAT at 3 MiB, blocks from 4 MiB.

use std::sync::Arc;

use imgtool_core::{Driver, ImageSource, OpenOptions, Result};
use uuid::Uuid;

use super::{MIB, open_bytes};

pub const LOG_AT: u64 = MIB;
pub const METADATA_AT: u64 = 2 * MIB;
pub const BAT_AT: u64 = 3 * MIB;
pub const BLOCKS_AT: u64 = 4 * MIB;
pub const HEADERS_AT: [usize; 2] = [64 << 10, 128 << 10];
pub const REGIONS_AT: [usize; 2] = [192 << 10, 256 << 10];

pub const BAT_GUID: &str = "2DC27766-F623-4200-9D64-115E9BFD4A08";
pub const METADATA_GUID: &str = "8B7CA206-4790-4B9A-B8FE-575F050F886E";
pub const FILE_PARAMETERS: &str = "CAA16737-FA36-4D43-B3B6-33F0AA44E76B";
pub const DISK_SIZE: &str = "2FA54224-CD1B-4876-B211-5DBED83BF4B8";
pub const DISK_ID: &str = "BECA12AB-B2E6-4523-93EF-C309E000C746";
pub const LOGICAL: &str = "8141BF1D-A96F-4709-BA47-F233A8FAAB5F";
pub const PHYSICAL: &str = "CDA348C7-445D-4471-9CC9-E9885251C556";
pub const PARENT_LOCATOR: &str = "A8D35F2D-B30B-454D-ABF7-D3D84834AB0C";
pub const LOCATOR_TYPE: &str = "B04AEFB7-D19E-4A81-B789-25B8E9445913";

pub const LOG_GUID: &str = "11111111-2222-3333-4444-555555555555";
pub const DATA_GUID: &str = "dddddddd-0000-4000-8000-000000000001";

/// Encodes a GUID.
pub fn guid(text: &str) -> [u8; 16] {
    Uuid::parse_str(text).unwrap().to_bytes_le()
}

/// A VHDX file being built.
#[derive(Clone)]
pub struct VhdxBuilder {
    /// Content of the file.
    pub bytes: Vec<u8>,
    /// Metadata items: GUID, flags, value.
    items: Vec<(String, u32, Vec<u8>)>,
    /// Regions: GUID, file offset, length, flags.
    region_entries: Vec<(String, u64, u32, u32)>,
}

impl VhdxBuilder {
    /// Builds a dynamic disk without data. Sizes are in bytes; `logical` is the logical sector size.
    pub fn new(virtual_size: u64, block_size: u64, logical: u32) -> Self {
        let mut vhdx = Self {
            bytes: vec![0; BLOCKS_AT as usize],
            items: vec![
                (FILE_PARAMETERS.to_owned(), 4, [(block_size as u32).to_le_bytes(), [0; 4]].concat()),
                (DISK_SIZE.to_owned(), 6, virtual_size.to_le_bytes().to_vec()),
                (LOGICAL.to_owned(), 6, logical.to_le_bytes().to_vec()),
                (PHYSICAL.to_owned(), 6, 4096u32.to_le_bytes().to_vec()),
                (DISK_ID.to_owned(), 6, guid("12345678-1234-1234-1234-123456789abc").to_vec()),
            ],
            region_entries: vec![
                (BAT_GUID.to_owned(), BAT_AT, MIB as u32, 1),
                (METADATA_GUID.to_owned(), METADATA_AT, MIB as u32, 1),
            ],
        };
        vhdx.put(0, b"vhdxfile");
        for (index, unit) in "test".encode_utf16().enumerate() {
            vhdx.put(8 + 2 * index as u64, &unit.to_le_bytes());
        }
        for (number, at) in (7u64..).zip(HEADERS_AT) {
            vhdx.put_header(at, number);
        }
        vhdx.write_metadata();
        vhdx.write_regions();
        vhdx
    }

    fn put_header(&mut self, at: usize, sequence_number: u64) {
        let at = at as u64;
        self.put(at, b"head");
        self.put(at + 8, &sequence_number.to_le_bytes());
        self.put(at + 16, &guid("ffffffff-0000-4000-8000-000000000001"));
        self.put(at + 32, &guid(DATA_GUID));
        self.put(at + 66, &1u16.to_le_bytes());
        self.put(at + 68, &(MIB as u32).to_le_bytes());
        self.put(at + 72, &LOG_AT.to_le_bytes());
        self.seal(at as usize, 4096);
    }

    /// Writes bytes at a file offset; the file grows in whole MiB.
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if end > self.bytes.len() {
            self.bytes.resize(end.next_multiple_of(MIB as usize), 0);
        }
        self.bytes[at as usize..end].copy_from_slice(bytes);
    }

    /// Corrects the checksum of a header or region table.
    pub fn seal(&mut self, at: usize, len: usize) {
        self.bytes[at + 4..at + 8].fill(0);
        let crc = crc32c::crc32c(&self.bytes[at..at + len]);
        self.bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
    }

    /// Overwrites a field of both headers.
    pub fn header_field(mut self, field_at: usize, bytes: &[u8]) -> Self {
        for at in HEADERS_AT {
            self.put((at + field_at) as u64, bytes);
            self.seal(at, 4096);
        }
        self
    }

    /// Replaces or adds a metadata item.
    pub fn item(mut self, id: &str, flags: u32, value: &[u8]) -> Self {
        self.items.retain(|(known, _, _)| known != id);
        self.items.push((id.to_owned(), flags, value.to_vec()));
        self.write_metadata();
        self
    }

    /// Removes a metadata item.
    pub fn without_item(mut self, id: &str) -> Self {
        self.items.retain(|(known, _, _)| known != id);
        self.write_metadata();
        self
    }

    fn write_metadata(&mut self) {
        let (start, len) = (METADATA_AT as usize, MIB as usize);
        self.bytes[start..start + len].fill(0);
        self.put(METADATA_AT, b"metadata");
        self.put(METADATA_AT + 10, &(self.items.len() as u16).to_le_bytes());
        let mut value_at = 65_536u32;
        for (index, (id, flags, value)) in self.items.clone().into_iter().enumerate() {
            let entry_at = METADATA_AT + 32 + 32 * index as u64;
            self.put(entry_at, &guid(&id));
            self.put(entry_at + 16, &value_at.to_le_bytes());
            self.put(entry_at + 20, &(value.len() as u32).to_le_bytes());
            self.put(entry_at + 24, &flags.to_le_bytes());
            self.put(METADATA_AT + u64::from(value_at), &value);
            value_at += value.len() as u32;
        }
    }

    /// Adds or replaces a region in both tables.
    pub fn region(mut self, id: &str, file_offset: u64, length: u32, required: u32) -> Self {
        self.region_entries.retain(|(known, _, _, _)| known != id);
        self.region_entries.push((id.to_owned(), file_offset, length, required));
        self.write_regions();
        self
    }

    fn write_regions(&mut self) {
        for at in REGIONS_AT {
            self.bytes[at..at + 65_536].fill(0);
            self.put(at as u64, b"regi");
            self.put(at as u64 + 8, &(self.region_entries.len() as u32).to_le_bytes());
            for (index, (id, file_offset, length, required)) in
                self.region_entries.clone().into_iter().enumerate()
            {
                let entry_at = (at + 16 + 32 * index) as u64;
                self.put(entry_at, &guid(&id));
                self.put(entry_at + 16, &file_offset.to_le_bytes());
                self.put(entry_at + 24, &length.to_le_bytes());
                self.put(entry_at + 28, &required.to_le_bytes());
            }
            self.seal(at, 65_536);
        }
    }

    /// Sets the BAT entry at `index`.
    pub fn bat(mut self, index: u64, file_offset: u64, state: u64) -> Self {
        assert!(file_offset.is_multiple_of(MIB));
        self.put(BAT_AT + 8 * index, &(file_offset | state).to_le_bytes());
        self
    }

    /// Fills `len` bytes at file offset `at` with `byte`.
    pub fn fill(mut self, at: u64, len: u64, byte: u8) -> Self {
        self.put(at, &vec![byte; len as usize]);
        self
    }

    /// Turns the disk into a differencing disk whose parent locator has these pairs.
    pub fn differencing(self, block_size: u64, pairs: &[(&str, &str)]) -> Self {
        let parameters = [(block_size as u32).to_le_bytes(), 2u32.to_le_bytes()].concat();
        self.item(FILE_PARAMETERS, 4, &parameters).item(PARENT_LOCATOR, 4, &locator(pairs))
    }

    /// Opens the image.
    pub fn open(&self) -> Result<Arc<dyn ImageSource>> {
        open_bytes(&self.bytes)
    }

    /// Opens the image for salvage.
    pub fn salvage(&self) -> Result<Arc<dyn ImageSource>> {
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        imgtool_vhdx::VhdxDriver.open(super::input(&self.bytes), &options)
    }

    /// Writes a log entry at a position in the log, wrapping around at its end, and sets the log GUID in both
    /// headers, so that the log must be replayed.
    pub fn log_entry(mut self, position: u64, entry: &[u8]) -> Self {
        for (index, sector) in entry.chunks(4096).enumerate() {
            let at = (position + 4096 * index as u64) % MIB;
            self.put(LOG_AT + at, sector);
        }
        self.header_field(48, &guid(LOG_GUID))
    }
}

/// Encodes a parent locator.
pub fn locator(pairs: &[(&str, &str)]) -> Vec<u8> {
    let mut item = guid(LOCATOR_TYPE).to_vec();
    item.extend([0, 0]);
    item.extend((pairs.len() as u16).to_le_bytes());
    let mut text_at = 20 + 12 * pairs.len() as u32;
    let mut texts = Vec::new();
    for (key, value) in pairs {
        let key: Vec<u8> = key.encode_utf16().flat_map(u16::to_le_bytes).collect();
        let value: Vec<u8> = value.encode_utf16().flat_map(u16::to_le_bytes).collect();
        item.extend(text_at.to_le_bytes());
        item.extend((text_at + key.len() as u32).to_le_bytes());
        item.extend((key.len() as u16).to_le_bytes());
        item.extend((value.len() as u16).to_le_bytes());
        text_at += (key.len() + value.len()) as u32;
        texts.extend(key);
        texts.extend(value);
    }
    item.extend(texts);
    item
}

/// A change that a log entry makes: a descriptor and, for a page, its data sector.
#[derive(Clone)]
pub enum Change {
    Zero { at: u64, len: u64 },
    Page { at: u64, bytes: Vec<u8> },
}

/// A log entry.
pub struct LogEntry {
    /// Sequence number.
    pub number: u64,
    pub tail: u32,
    /// `flushed_file_offset`.
    pub flushed: u64,
    /// `last_file_offset`.
    pub last: u64,
    pub changes: Vec<Change>,
}

impl LogEntry {
    pub fn new(number: u64, tail: u64, changes: Vec<Change>) -> Self {
        Self { number, tail: tail as u32, flushed: BLOCKS_AT, last: BLOCKS_AT, changes }
    }

    /// Encodes the entry for the log [`LOG_GUID`].
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_for(LOG_GUID)
    }

    /// Encodes the entry for the log with this GUID, checksum included.
    pub fn bytes_for(&self, log_guid: &str) -> Vec<u8> {
        let pages = self.changes.iter().filter(|change| matches!(change, Change::Page { .. })).count();
        let head = (64 + 32 * self.changes.len()).next_multiple_of(4096);
        let length = head + 4096 * pages;
        let mut entry = vec![0; length];
        entry[..4].copy_from_slice(b"loge");
        entry[8..12].copy_from_slice(&(length as u32).to_le_bytes());
        entry[12..16].copy_from_slice(&self.tail.to_le_bytes());
        entry[16..24].copy_from_slice(&self.number.to_le_bytes());
        entry[24..28].copy_from_slice(&(self.changes.len() as u32).to_le_bytes());
        entry[32..48].copy_from_slice(&guid(log_guid));
        entry[48..56].copy_from_slice(&self.flushed.to_le_bytes());
        entry[56..64].copy_from_slice(&self.last.to_le_bytes());
        let mut sector_at = head;
        for (index, change) in self.changes.iter().enumerate() {
            let descriptor = &mut entry[64 + 32 * index..][..32];
            descriptor[24..32].copy_from_slice(&self.number.to_le_bytes());
            match change {
                Change::Zero { at, len } => {
                    descriptor[..4].copy_from_slice(b"zero");
                    descriptor[8..16].copy_from_slice(&len.to_le_bytes());
                    descriptor[16..24].copy_from_slice(&at.to_le_bytes());
                }
                Change::Page { at, bytes } => {
                    descriptor[..4].copy_from_slice(b"desc");
                    descriptor[4..8].copy_from_slice(&bytes[4092..]);
                    descriptor[8..16].copy_from_slice(&bytes[..8]);
                    descriptor[16..24].copy_from_slice(&at.to_le_bytes());
                    let sector = &mut entry[sector_at..sector_at + 4096];
                    sector[..4].copy_from_slice(b"data");
                    sector[4..8].copy_from_slice(&((self.number >> 32) as u32).to_le_bytes());
                    sector[8..4092].copy_from_slice(&bytes[8..4092]);
                    sector[4092..].copy_from_slice(&(self.number as u32).to_le_bytes());
                    sector_at += 4096;
                }
            }
        }
        seal_entry(&mut entry);
        entry
    }
}

/// Corrects the checksum of a log entry.
pub fn seal_entry(entry: &mut [u8]) {
    entry[4..8].fill(0);
    let crc = crc32c::crc32c(entry);
    entry[4..8].copy_from_slice(&crc.to_le_bytes());
}
