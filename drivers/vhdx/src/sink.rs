//! Writing dynamic and fixed images.
//!
//! In a dynamic file, the sink allocates a payload block at the end of the file when the block's first data
//! arrives. The file grows by the whole block, but only the data is written; the rest of the block is a hole,
//! or zeroed if the target already exists. Blocks without data are not present. In a fixed file, every block
//! has its place from the start. The GUIDs of a file are derived from content and options, so the same source
//! and options give the same bytes.

use std::sync::Mutex;

use imgtool_core::sync::lock;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Geometry, ImageSink, Output, OutputId, Part, Prepared, Result, Sharing,
    SinkDevice, SinkPiece, WriteList,
};

use crate::layout::bat::{BatEntry, ENTRY_LEN};
use crate::layout::header::{HEADER_OFFSETS, Header, encode_identifier};
use crate::layout::metadata::Metadata;
use crate::layout::region::{REGION_TABLE_OFFSETS, Region, RegionTable};
use crate::layout::{HEADER_SECTION_LEN, MIB};
use crate::options::{FileLayout, VhdxOptions};

mod bat_writer;
mod fingerprint;

pub(crate) use bat_writer::BatWriter;
use fingerprint::Fingerprint;

/// Length in bytes of a piece. Our choice: the read buffer and the page cache's copy fit into a core's cache.
const PIECE_LEN: u64 = 256 << 10;

/// Creator string of the file type identifier (section 2.2.1).
const CREATOR: &str = concat!("imgtool ", env!("CARGO_PKG_VERSION"));

/// An image being written.
pub(crate) struct VhdxSink {
    outputs: [Output; 1],
    /// Size of the device in bytes, before it is rounded up to whole sectors.
    device_size: u64,
    options: VhdxOptions,
    layout: FileLayout,
    fingerprint: Fingerprint,
    /// Unused if the file is fixed.
    allocation: Mutex<Allocation>,
}

/// The payload blocks allocated so far in a dynamic file.
struct Allocation {
    bat: BatWriter,
    /// Number of payload blocks in the file.
    blocks: u64,
}

impl Consumer for VhdxSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let zero_unit = self.options.zero_unit;
        let piece_len = PIECE_LEN.max(zero_unit.unwrap_or(0));
        Geometry {
            // A unit of zero detection is stored or left out as a whole.
            granule: zero_unit.unwrap_or(0).max(ZERO_GRANULARITY as u64),
            granule_required: false,
            piece_len,
            max_zero_len: if zero_unit.is_some() { u64::MAX } else { piece_len },
            ordered: !self.options.fixed,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let start = piece.start;
        // The fingerprint depends on the content alone, not on which zeros are stored.
        let nonzero = piece.nonzero_runs(ZERO_GRANULARITY);
        for run in &nonzero {
            if let Some(data) = &piece.data {
                self.fingerprint.add(start + run.start as u64, &data[run.clone()]);
            }
        }
        let (piece, stored) = match self.options.zero_unit {
            None => {
                let piece = piece.with_zeros_as_data(pool);
                let runs = piece.runs.clone();
                (piece, runs)
            }
            // `CreateOptions::zero_unit` limits the unit to 2 MiB.
            Some(unit) if unit as usize > ZERO_GRANULARITY => {
                let runs = piece.nonzero_runs(unit as usize);
                (piece, runs)
            }
            Some(_) => (piece, nonzero),
        };
        let mut parts = Vec::new();
        for run in stored {
            // Neighbouring blocks may be far apart in the file, so no part crosses a block boundary.
            let mut at = run.start;
            while at < run.end {
                let guest = start + at as u64;
                let block_rest = self.layout.shape.block_size - guest % self.layout.shape.block_size;
                let len = usize::try_from(block_rest).unwrap_or(usize::MAX).min(run.end - at);
                parts.push(Part { guest: guest..guest + len as u64, bytes: Bytes::Data(at..at + len) });
                at += len;
            }
        }
        let mut prepared = Prepared::new(piece);
        if self.options.fixed && self.output().needs_zeros() {
            parts = fill_gaps(parts, start, start + prepared.len);
        }
        prepared.parts = parts;
        Ok(prepared)
    }
}

impl ImageSink for VhdxSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        if self.options.fixed || self.options.zero_unit.is_none() {
            Sharing::Never
        } else {
            Sharing::Parts(OutputId::MAIN)
        }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        if self.options.fixed {
            for part in &prepared.parts {
                writes.push(OutputId::MAIN, self.layout.payload_start + part.guest.start, part.bytes.clone());
            }
            return Ok(());
        }
        let mut allocation = lock(&self.allocation);
        for part in &prepared.parts {
            let block_at =
                self.allocate_block(&mut allocation, part.guest.start / self.layout.shape.block_size)?;
            writes.push(
                OutputId::MAIN,
                block_at + part.guest.start % self.layout.shape.block_size,
                part.bytes.clone(),
            );
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let layout = &self.layout;
        let blocks = if self.options.fixed {
            self.write_fixed_bat()?;
            layout.shape.payload_blocks
        } else {
            let mut allocation = lock(&self.allocation);
            allocation.bat.finish()?;
            allocation.blocks
        };
        let file_len = layout.file_len(blocks);
        if self.options.fixed {
            let data_end = layout.payload_start + self.device_size;
            self.output().write_zeros_at(data_end, file_len - data_end)?;
        }
        self.output().set_len(file_len)?;
        let metadata = self.metadata().encode();
        self.write_region(&layout.metadata, &metadata)?;
        self.write_region(&layout.log, &[])?;
        self.write_header_section()
    }

    fn notes(&self) -> Vec<String> {
        let virtual_size = self.layout.virtual_size;
        if virtual_size == self.device_size {
            return Vec::new();
        }
        vec![format!(
            "virtual size rounded up from {} to {virtual_size} bytes, a multiple of the logical sector size {}",
            self.device_size, self.options.logical_sector_size
        )]
    }
}

/// Fills the gaps around `parts`, from guest offset `start` to `end`, with parts of zeros.
fn fill_gaps(parts: Vec<Part>, start: u64, end: u64) -> Vec<Part> {
    let zeros = |guest: std::ops::Range<u64>| Part { bytes: Bytes::Zero(guest.end - guest.start), guest };
    let mut filled = Vec::new();
    let mut position = start;
    for part in parts {
        if position < part.guest.start {
            filled.push(zeros(position..part.guest.start));
        }
        position = part.guest.end;
        filled.push(part);
    }
    if position < end {
        filled.push(zeros(position..end));
    }
    filled
}

impl VhdxSink {
    /// Creates a sink that writes a device of `device_size` bytes to `output`, with this layout. `memory` is
    /// the image's share of the memory in bytes, if it is limited.
    pub(crate) fn new(
        output: Output,
        device_size: u64,
        options: VhdxOptions,
        layout: FileLayout,
        memory: Option<u64>,
    ) -> Self {
        let bat = BatWriter::new(output.clone(), layout.bat, memory);
        Self {
            outputs: [output],
            device_size,
            options,
            layout,
            fingerprint: Fingerprint::default(),
            allocation: Mutex::new(Allocation { bat, blocks: 0 }),
        }
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }

    /// Returns the file offset of a payload block. If the block is not present, allocates it at the end of
    /// the file.
    fn allocate_block(&self, allocation: &mut Allocation, payload_block: u64) -> Result<u64> {
        let bat_index = self.layout.shape.payload_bat_index(payload_block);
        let entry = allocation.bat.get(bat_index)?;
        if entry != BatEntry(0) {
            return Ok(entry.file_offset());
        }
        let block_at = self.layout.file_len(allocation.blocks);
        allocation.blocks += 1;
        allocation.bat.set(bat_index, BatEntry::fully_present(block_at))?;
        if self.output().needs_zeros() {
            // Zero the block now: other threads may write data to it as soon as it has an offset.
            self.output().write_zeros_at(block_at, self.layout.shape.block_size)?;
        }
        Ok(block_at)
    }

    /// Writes the BAT of a fixed file, whose blocks follow each other in guest order.
    fn write_fixed_bat(&self) -> Result<()> {
        let FileLayout { shape, bat, .. } = &self.layout;
        let mut file_offset = bat.file_offset;
        let mut bytes = Vec::new();
        let entries_at_once = MIB / ENTRY_LEN;
        let mut first = 0;
        while first < shape.entries(false) {
            let end = shape.entries(false).min(first + entries_at_once);
            bytes.clear();
            for bat_index in first..end {
                let payload_block = shape.payload_block_from(bat_index);
                let is_payload = shape.payload_bat_index(payload_block) == bat_index;
                let block_at = self.layout.file_len(payload_block);
                let entry = if is_payload { BatEntry::fully_present(block_at) } else { BatEntry(0) };
                bytes.extend_from_slice(&entry.0.to_le_bytes());
            }
            self.output().write_at(&bytes, file_offset)?;
            file_offset += bytes.len() as u64;
            first = end;
        }
        self.output().write_zeros_at(file_offset, bat.end() - file_offset)
    }

    /// Writes `bytes` at the start of a region, and zeros to its end.
    fn write_region(&self, region: &Region, bytes: &[u8]) -> Result<()> {
        self.output().write_at(bytes, region.file_offset)?;
        let end = region.file_offset + bytes.len() as u64;
        self.output().write_zeros_at(end, region.end() - end)
    }

    /// Returns the disk's properties, for the metadata region.
    fn metadata(&self) -> Metadata {
        let FileLayout { virtual_size, shape, .. } = &self.layout;
        // The options bound all of these far below 2^32.
        let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Metadata {
            block_size: narrow(shape.block_size),
            leave_blocks_allocated: self.options.fixed,
            has_parent: false,
            virtual_size: *virtual_size,
            virtual_disk_id: self.options.disk_id.unwrap_or_else(|| self.guid("disk id")),
            logical_sector_size: narrow(self.options.logical_sector_size),
            physical_sector_size: narrow(self.options.physical_sector_size),
        }
    }

    /// Derives the GUID for `purpose` from content and options.
    fn guid(&self, purpose: &str) -> uuid::Uuid {
        self.fingerprint.guid(
            purpose,
            &[
                self.device_size,
                self.layout.shape.block_size,
                self.options.logical_sector_size,
                self.options.physical_sector_size,
                u64::from(self.layout.log.length),
                u64::from(self.options.fixed),
            ],
        )
    }

    /// Writes the region tables, the headers and, last, the file type identifier, without which no program
    /// accepts the file.
    fn write_header_section(&self) -> Result<()> {
        let FileLayout { log, bat, metadata, .. } = &self.layout;
        if self.output().needs_zeros() {
            self.output().write_zeros_at(0, HEADER_SECTION_LEN)?;
        }
        let table = RegionTable { bat: *bat, metadata: *metadata }.encode();
        for file_offset in REGION_TABLE_OFFSETS {
            self.output().write_at(&table, file_offset)?;
        }
        for (sequence_number, file_offset) in (1..).zip(HEADER_OFFSETS) {
            let mut header = Header::new(sequence_number, log.file_offset, log.length);
            header.file_write_guid = self.options.file_write_guid.unwrap_or_else(|| self.guid("file write"));
            header.data_write_guid = self.options.data_write_guid.unwrap_or_else(|| self.guid("data write"));
            self.output().write_at(&header.encode(), file_offset)?;
        }
        self.output().write_at(&encode_identifier(CREATOR), 0)
    }
}
