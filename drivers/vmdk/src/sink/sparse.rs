//! Writing sparse images: grains in the order of their first data, behind their tables, in one file or several.

use std::ops::Range;
use std::sync::Mutex;

use imgtool_core::base::{self, Base};
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::sync::lock;
use imgtool_core::table::TableWriter;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Manifest, Output, OutputId, Part, Prepared,
    Result, Sharing, SinkDevice, SinkPiece, TableMemory, WriteList,
};

use super::{NewImage, SPLIT_SECTORS};
use crate::layout::SECTOR_SIZE;
use crate::layout::hosted::{Header, MAX_TABLE_ENTRIES};
use crate::options::GRAIN_SIZE;

/// Length of a piece in bytes. Our choice: the read buffer and the page cache's copy fit into a core's cache.
const PIECE_LEN: u64 = 256 << 10;
/// Number of sectors of the descriptor, as VMware has it.
const DESCRIPTOR_SECTORS: u64 = 20;
/// Number of sectors of a grain table.
const TABLE_SECTORS: u64 = MAX_TABLE_ENTRIES as u64 * 4 / SECTOR_SIZE;
/// Number of sectors of a grain.
const GRAIN_SECTORS: u64 = GRAIN_SIZE / SECTOR_SIZE;

/// The structures of a sparse file: header, descriptor, redundant directory and tables, directory and tables.
#[derive(Debug, Clone)]
pub(super) struct SparseLayout {
    header: Header,
}

impl SparseLayout {
    /// Lays out a file for a disk of `sectors` sectors, with a place for a descriptor if it has its own.
    /// Tables can mark grains as zeros with `zeroed_grains`.
    pub(super) fn new(sectors: u64, has_descriptor: bool, zeroed_grains: bool) -> Self {
        let mut header = Header {
            version: if zeroed_grains { 2 } else { 1 },
            capacity: sectors,
            grain_size: GRAIN_SECTORS,
            descriptor_offset: u64::from(has_descriptor),
            descriptor_size: if has_descriptor { DESCRIPTOR_SECTORS } else { 0 },
            table_entries: MAX_TABLE_ENTRIES,
            redundant_directory: None,
            directory: 0,
            overhead: 0,
            unclean_shutdown: false,
            zeroed_grains,
            compressed: false,
            markers: false,
            unknown_flags: 0,
        };
        let redundant = 1 + header.descriptor_size;
        let entries = header.directory_entries();
        let set = directory_sectors(entries) + entries * TABLE_SECTORS;
        header.redundant_directory = Some(redundant);
        header.directory = redundant + set;
        header.overhead = (redundant + 2 * set).next_multiple_of(GRAIN_SECTORS);
        Self { header }
    }

    /// Returns the number of grain tables.
    fn tables(&self) -> u64 {
        self.header.directory_entries()
    }

    /// Returns the sector of the first table behind the directory at a sector.
    fn first_table(&self, directory: u64) -> u64 {
        directory + directory_sectors(self.tables())
    }

    /// Returns the file offset of the grain at `position`, which is also the length of a file with this number
    /// of grains.
    pub(super) fn file_len(&self, position: u64) -> u64 {
        self.header.overhead * SECTOR_SIZE + position * GRAIN_SIZE
    }

    /// Returns both directories.
    fn directories(&self) -> [u64; 2] {
        [self.header.redundant_directory.unwrap_or(0), self.header.directory]
    }

    /// Returns the writers of both sets of tables. Each may use half of `memory` bytes.
    fn table_writers(&self, output: &Output, memory: Option<u64>) -> [TableWriter; 2] {
        self.directories().map(|directory| {
            let offset = self.first_table(directory) * SECTOR_SIZE;
            TableWriter::new(output.clone(), offset, self.table_len(), 0, memory.map(|memory| memory / 2))
        })
    }

    fn table_len(&self) -> u64 {
        self.tables() * TABLE_SECTORS * SECTOR_SIZE
    }

    /// Writes a directory, which lists every table.
    fn write_directory(&self, output: &Output, directory: u64) -> Result<()> {
        let first = self.first_table(directory);
        let mut at = directory * SECTOR_SIZE;
        let mut chunk = Vec::new();
        for table in 0..self.tables() {
            chunk.extend_from_slice(&sector(first + table * TABLE_SECTORS)?.to_le_bytes());
            if chunk.len() == 64 << 10 || table + 1 == self.tables() {
                output.write_at(&chunk, at)?;
                at += chunk.len() as u64;
                chunk.clear();
            }
        }
        Ok(())
    }
}

fn directory_sectors(entries: u64) -> u64 {
    (entries * 4).div_ceil(SECTOR_SIZE)
}

fn sector(at: u64) -> Result<u32> {
    u32::try_from(at).map_err(|_| {
        Error::unsupported("the image would be longer than 2 TiB, where no table can list a grain")
            .hint("choose a flat subformat, or another format")
    })
}

/// A sparse image being written.
#[derive(Debug)]
pub(super) struct SparseSink {
    /// The image's own output, then those of its extents unless it is one of them.
    outputs: Vec<Output>,
    image: NewImage,
    /// Length in bytes of every extent but the last.
    extent_len: u64,
    layouts: Vec<SparseLayout>,
    allocations: Mutex<Vec<Allocation>>,
    fingerprint: Fingerprint,
    /// Content of the parent, if the image has one and is not created empty.
    base: Option<Base>,
}

/// Grains allocated in an extent so far.
#[derive(Debug)]
struct Allocation {
    tables: [TableWriter; 2],
    grains: u64,
}

impl SparseSink {
    /// Creates a sink for `image`. Its extents are in the outputs behind the first, or in the only one. The
    /// manifest has the parent's content, and the image's share of the memory.
    pub(super) fn new(outputs: Vec<Output>, image: NewImage, manifest: &Manifest) -> Self {
        let is_split = outputs.len() > 1;
        let extent_len = if is_split { SPLIT_SECTORS * SECTOR_SIZE } else { u64::MAX };
        let layouts = layouts(&image);
        let memory = manifest.tables.map(|memory| memory / (layouts.len() as u64).max(1));
        let extents = &outputs[usize::from(is_split)..];
        let allocations = layouts.iter().zip(extents);
        let allocations = allocations
            .map(|(layout, output)| Allocation { tables: layout.table_writers(output, memory), grains: 0 });
        let allocations = Mutex::new(allocations.collect());
        let base = manifest.base.clone().map(Base::new);
        Self { outputs, image, extent_len, layouts, allocations, fingerprint: Fingerprint::default(), base }
    }

    /// Returns the memory for the tables of an image.
    pub(super) fn table_memory(image: &NewImage) -> TableMemory {
        let each = layouts(image).into_iter().map(|layout| TableWriter::memory(layout.table_len()));
        let (least, most, count) = each.fold((0u64, 0u64, 0), |(least, most, count), extent| {
            (least.max(extent.least), most.max(extent.most), count + 1)
        });
        // The share is divided equally, so the largest extent counts.
        TableMemory { least: 2 * count * least, most: 2 * count * most }
    }

    fn is_split(&self) -> bool {
        self.outputs.len() > 1
    }

    /// Returns the output of an extent.
    fn output_id(&self, extent: usize) -> OutputId {
        // The writer limits the number of extents.
        OutputId((extent + usize::from(self.is_split())) as u32)
    }

    fn output(&self, extent: usize) -> &Output {
        &self.outputs[self.output_id(extent).index()]
    }

    /// Cuts a run of the piece that starts at guest offset `start` into parts, each within one grain.
    fn cut(start: u64, run: Range<usize>, parts: &mut Vec<Part>) {
        let mut at = run.start;
        while at < run.end {
            let guest = start + at as u64;
            // At most 64 KiB.
            let len = ((GRAIN_SIZE - guest % GRAIN_SIZE) as usize).min(run.end - at);
            parts.push(Part { guest: guest..guest + len as u64, bytes: Bytes::Data(at..at + len) });
            at += len;
        }
    }

    /// Marks a grain as zeros, which hide the data of the parent.
    fn mark_zeros(allocation: &mut Allocation, grain: u64) -> Result<()> {
        for table in &mut allocation.tables {
            table.set(grain, ZEROED_GRAIN.to_le_bytes())?;
        }
        Ok(())
    }

    /// Returns the file offset of a grain of an extent. Allocates the grain at the end of the file if the file
    /// does not contain it.
    fn grain(&self, allocation: &mut Allocation, extent: usize, grain: u64) -> Result<u64> {
        let [redundant, table] = &mut allocation.tables;
        let entry = u32::from_le_bytes(table.get(grain)?);
        if entry != 0 {
            return Ok(u64::from(entry) * SECTOR_SIZE);
        }
        let offset = self.layouts[extent].file_len(allocation.grains);
        let entry = sector(offset / SECTOR_SIZE)?.to_le_bytes();
        table.set(grain, entry)?;
        redundant.set(grain, entry)?;
        allocation.grains += 1;
        Ok(offset)
    }
}

/// Entry of a table for a grain of zeros.
const ZEROED_GRAIN: u32 = 1;

fn layouts(image: &NewImage) -> Vec<SparseLayout> {
    let has_descriptor = image.companions().is_empty();
    let zeroed_grains = image.options.zeroed_grains;
    image
        .extents
        .iter()
        .map(|extent| SparseLayout::new(extent.sectors, has_descriptor, zeroed_grains))
        .collect()
}

impl Consumer for SparseSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let zero_unit = self.image.options.zero_unit;
        let piece_len = PIECE_LEN.max(zero_unit.unwrap_or(0));
        // With a parent, a grain is in the image as a whole or not at all.
        let smallest = if self.base.is_some() { GRAIN_SIZE } else { ZERO_GRANULARITY as u64 };
        Geometry {
            // A unit of zero detection is stored or left out as a whole.
            granule: zero_unit.unwrap_or(0).max(smallest),
            granule_required: self.base.is_some(),
            piece_len,
            max_zero_len: match zero_unit {
                None => piece_len,
                Some(_) if self.base.is_some() => base::MAX_ZERO_LEN,
                Some(_) => u64::MAX,
            },
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let nonzero = piece.nonzero_runs(ZERO_GRANULARITY);
        for run in &nonzero {
            if let Some(data) = &piece.data {
                self.fingerprint.add(piece.start + run.start as u64, &data[run.clone()]);
            }
        }
        if let (Some(base), Some(zero_unit)) = (&self.base, self.image.options.zero_unit) {
            // At most 2 MiB.
            let parts = base.differences(&piece, GRAIN_SIZE, zero_unit.max(GRAIN_SIZE) as usize, pool)?;
            return Ok(Prepared { parts: base::cut(parts, GRAIN_SIZE), ..Prepared::new(piece) });
        }
        let (piece, runs) = match self.image.options.zero_unit {
            None => {
                let piece = piece.with_zeros_as_data(pool);
                let runs = piece.runs.clone();
                (piece, runs)
            }
            Some(unit) if unit as usize > ZERO_GRANULARITY => {
                let runs = piece.nonzero_runs(unit as usize);
                (piece, runs)
            }
            Some(_) => (piece, nonzero),
        };
        let start = piece.start;
        let mut prepared = Prepared::new(piece);
        for run in runs {
            Self::cut(start, run, &mut prepared.parts);
        }
        Ok(prepared)
    }

    fn worker_memory(&self) -> u64 {
        self.base.as_ref().map_or(0, Base::reader_memory)
    }
}

impl ImageSink for SparseSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        if self.is_split() || self.image.options.zero_unit.is_none() {
            Sharing::Never
        } else {
            Sharing::Parts(OutputId::MAIN)
        }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let mut allocations = lock(&self.allocations);
        for part in &prepared.parts {
            let (extent, within) = (part.guest.start / self.extent_len, part.guest.start % self.extent_len);
            let extent = usize::try_from(extent).unwrap_or(usize::MAX);
            let allocation = allocations
                .get_mut(extent)
                .ok_or_else(|| Error::out_of_bounds(format!("the image has no extent {extent}")))?;
            if matches!(part.bytes, Bytes::Zero(_)) && self.image.options.zeroed_grains {
                Self::mark_zeros(allocation, within / GRAIN_SIZE)?;
                continue;
            }
            let offset = self.grain(allocation, extent, within / GRAIN_SIZE)?;
            if matches!(part.bytes, Bytes::Zero(_)) {
                // A new grain reads as zeros.
                continue;
            }
            writes.push(self.output_id(extent), offset + within % GRAIN_SIZE, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let mut allocations = lock(&self.allocations);
        for (extent, allocation) in allocations.iter_mut().enumerate() {
            let (output, layout) = (self.output(extent), &self.layouts[extent]);
            for tables in &mut allocation.tables {
                tables.finish()?;
            }
            for directory in layout.directories() {
                layout.write_directory(output, directory)?;
            }
            output.set_len(layout.file_len(allocation.grains))?;
        }
        let text = self.image.descriptor(&self.fingerprint);
        let main = self.output(0);
        if self.is_split() {
            let descriptor = &self.outputs[0];
            descriptor.write_at(text.as_bytes(), 0)?;
            descriptor.set_len(text.len() as u64)?;
        } else {
            let mut bytes = text.into_bytes();
            bytes.resize((DESCRIPTOR_SECTORS * SECTOR_SIZE) as usize, 0);
            main.write_at(&bytes, SECTOR_SIZE)?;
        }
        for (extent, layout) in self.layouts.iter().enumerate() {
            self.output(extent).write_at(&layout.header.encode(), 0)?;
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        self.image.notes()
    }
}
