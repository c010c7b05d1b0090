//! Writing streamOptimized images, to files and pipes: compressed grains in guest order, each table behind its
//! grains, then the directory, the footer and the end marker. Nothing is written twice.

use std::fmt;
use std::sync::Mutex;

use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::incompressible::looks_incompressible;
use imgtool_core::sync::lock;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Output, OutputId, Part, Prepared, Result,
    SinkDevice, SinkPiece, TableMemory, WriteList,
};
use libdeflater::{CompressionLvl, Compressor};

use super::NewImage;
use crate::layout::SECTOR_SIZE;
use crate::layout::hosted::{GD_AT_END, HEADER_LEN, Header, MAX_TABLE_ENTRIES};
use crate::layout::marker::{GRAIN_HEAD, Kind, Marker};
use crate::options::GRAIN_SIZE;

/// Length of a piece in bytes. Our choice: eight grains.
const PIECE_LEN: u64 = 512 << 10;

/// Number of sectors before the first grain: a grain, as VMware has it.
const OVERHEAD: u64 = GRAIN_SIZE / SECTOR_SIZE;
/// Number of sectors of the descriptor, as VMware has it.
const DESCRIPTOR_SECTORS: u64 = 20;

const TABLE_ENTRIES: u64 = MAX_TABLE_ENTRIES as u64;

/// Maximum length in bytes of a compressed grain with its marker and padding: deflate adds 5 bytes for each
/// stored block of at most 64 KiB, and zlib 6.
const MAX_GRAIN_LEN: u64 = GRAIN_SIZE + 2 * SECTOR_SIZE;

/// Memory in bytes of a compressor and a storer, of levels 1 to 9 and of levels 10 to 12. Measured with libdeflate 1.26: 0.2
/// to 0.7 MiB, and 9 MiB.
const DEFLATE_BYTES: [u64; 2] = [1 << 20, 10 << 20];

/// Idle compressors of one level.
pub(super) struct Deflaters {
    level: i32,
    idle: Mutex<Vec<Deflater>>,
}

/// Compressor of one thread.
struct Deflater {
    compressor: Compressor,
    /// Wraps data that can't be shortened into a stream as it is.
    storer: Compressor,
}

impl fmt::Debug for Deflaters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Deflaters").field("level", &self.level).finish_non_exhaustive()
    }
}

impl Deflaters {
    pub(super) fn new(level: i32) -> Self {
        Self { level, idle: Mutex::default() }
    }

    fn take(&self) -> Result<Deflater> {
        if let Some(idle) = lock(&self.idle).pop() {
            return Ok(idle);
        }
        let of_level = |level| {
            let valid = CompressionLvl::new(level);
            valid.map(Compressor::new).map_err(|_| Error::usage(format!("no deflate level {level}")))
        };
        Ok(Deflater { compressor: of_level(self.level)?, storer: of_level(0)? })
    }
}

impl Deflater {
    /// Compresses a grain into `out`. Returns the length in bytes.
    fn encode(&mut self, grain: &[u8], out: &mut [u8]) -> Result<usize> {
        let compressor = if looks_incompressible(grain) { &mut self.storer } else { &mut self.compressor };
        let len = compressor.zlib_compress(grain, out);
        len.map_err(|_| Error::limit("a compressed grain exceeds its buffer"))
    }
}

/// A stream being written.
#[derive(Debug)]
pub(super) struct StreamSink {
    outputs: [Output; 1],
    image: NewImage,
    deflaters: std::sync::Arc<Deflaters>,
    state: Mutex<State>,
}

/// Place of the next marker, and of the tables so far.
#[derive(Debug)]
struct State {
    /// Sector of the next marker.
    at: u64,
    /// Sectors of the grains of the current table, with its index.
    table: Option<(u64, Vec<u32>)>,
    /// Sector of each table, 0 without one.
    directory: Vec<u32>,
}

fn sector(at: u64) -> Result<u32> {
    u32::try_from(at).map_err(|_| {
        Error::unsupported("the stream would be longer than 2 TiB, where no table can list a grain")
            .hint("choose a flat subformat, or another format")
    })
}

fn bytes_of(entries: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    bytes.resize(bytes.len().next_multiple_of(SECTOR_SIZE as usize), 0);
    bytes
}

impl State {
    /// Ends the current table, and returns its marker and itself; nothing without a table.
    fn end_table(&mut self) -> Result<Vec<u8>> {
        let Some((index, table)) = self.table.take() else { return Ok(Vec::new()) };
        let bytes = bytes_of(&table);
        if let Some(entry) = self.directory.get_mut(index as usize) {
            *entry = sector(self.at + 1)?;
        }
        let marker = Marker::metadata(Kind::Table, bytes.len() as u64 / SECTOR_SIZE);
        self.at += 1 + bytes.len() as u64 / SECTOR_SIZE;
        Ok([&marker[..], &bytes].concat())
    }
}

impl StreamSink {
    /// Creates a sink that writes `image` to `output`.
    pub(super) fn new(output: Output, image: NewImage, deflaters: std::sync::Arc<Deflaters>) -> Self {
        // At most 2 million entries, for 62 TiB.
        let directory = vec![0; header(&image, GD_AT_END).directory_entries() as usize];
        let state = State { at: OVERHEAD, table: None, directory };
        Self { outputs: [output], image, deflaters, state: Mutex::new(state) }
    }

    /// Returns the memory for the tables of an image: the directory, its bytes, and the end of the stream with
    /// them, whose vector doubles.
    pub(super) fn table_memory(image: &NewImage) -> TableMemory {
        let bytes = header(image, GD_AT_END).directory_entries() * 20 + TABLE_ENTRIES * 4;
        TableMemory { least: bytes, most: bytes }
    }

    /// Returns the maximum length in bytes of a stream with this number of grains.
    pub(super) fn max_len(image: &NewImage, grains: u64) -> u64 {
        let entries = header(image, GD_AT_END).directory_entries();
        let tables = entries.min(grains) * (TABLE_ENTRIES * 4 + SECTOR_SIZE);
        let directory = (entries * 4).next_multiple_of(SECTOR_SIZE);
        // Markers of directory and footer, the footer, the end.
        OVERHEAD * SECTOR_SIZE + grains * MAX_GRAIN_LEN + tables + directory + 4 * SECTOR_SIZE
    }
}

/// Returns the header of an image whose directory is at a sector.
fn header(image: &NewImage, directory: u64) -> Header {
    Header {
        version: 3,
        capacity: image.sectors,
        grain_size: GRAIN_SIZE / SECTOR_SIZE,
        descriptor_offset: 1,
        descriptor_size: DESCRIPTOR_SECTORS,
        table_entries: MAX_TABLE_ENTRIES,
        redundant_directory: None,
        directory,
        overhead: OVERHEAD,
        unclean_shutdown: false,
        zeroed_grains: false,
        compressed: true,
        markers: true,
        unknown_flags: 0,
    }
}

impl Consumer for StreamSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: GRAIN_SIZE,
            granule_required: true,
            piece_len: PIECE_LEN,
            max_zero_len: if self.image.options.zero_unit.is_some() { u64::MAX } else { PIECE_LEN },
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let piece = match self.image.options.zero_unit {
            None => piece.with_zeros_as_data(pool),
            Some(_) => piece,
        };
        let runs = match self.image.options.zero_unit {
            None => piece.runs.clone(),
            Some(_) => piece.nonzero_runs(GRAIN_SIZE as usize),
        };
        let start = piece.start;
        let mut prepared = Prepared::new(piece);
        let Some(data) = prepared.data.take().filter(|_| !runs.is_empty()) else { return Ok(prepared) };
        let grains: usize = runs.iter().map(|run| run.len().div_ceil(GRAIN_SIZE as usize)).sum();
        let mut encoded = pool.take(grains * MAX_GRAIN_LEN as usize);
        let mut deflater = self.deflaters.take()?;
        let mut used = 0;
        for run in runs {
            for (index, grain) in data[run.clone()].chunks(GRAIN_SIZE as usize).enumerate() {
                let guest = start + run.start as u64 + index as u64 * GRAIN_SIZE;
                let len = encode(&mut deflater, grain, guest / SECTOR_SIZE, &mut encoded[used..])?;
                let guest = guest..guest + grain.len() as u64;
                prepared.parts.push(Part { guest, bytes: Bytes::Encoded(used..used + len) });
                used += len;
            }
        }
        lock(&self.deflaters.idle).push(deflater);
        prepared.encoded = Some(encoded);
        Ok(prepared)
    }

    fn worker_memory(&self) -> u64 {
        DEFLATE_BYTES[usize::from(self.deflaters.level >= 10)] + GRAIN_SIZE
    }
}

/// Encodes a grain with its marker into `out`, padded to whole sectors. Returns the length in bytes. Every
/// grain decodes to 64 KiB, even if the disk ends within it: VirtualBox refuses others.
fn encode(deflater: &mut Deflater, grain: &[u8], lba: u64, out: &mut [u8]) -> Result<usize> {
    let padded;
    let whole = if grain.len() == GRAIN_SIZE as usize {
        grain
    } else {
        let mut copy = grain.to_vec();
        copy.resize(GRAIN_SIZE as usize, 0);
        padded = copy;
        &padded
    };
    let out = out.get_mut(..MAX_GRAIN_LEN as usize).unwrap_or_default();
    let (head, body) = out.split_at_mut_checked(GRAIN_HEAD).unwrap_or_default();
    let len = deflater.encode(whole, body)?;
    // At most `MAX_GRAIN_LEN`, so it fits.
    head.copy_from_slice(&Marker::grain(lba, len as u32));
    let end = (GRAIN_HEAD + len).next_multiple_of(SECTOR_SIZE as usize);
    out[GRAIN_HEAD + len..end].fill(0);
    Ok(end)
}

impl ImageSink for StreamSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        let mut bytes = header(&self.image, GD_AT_END).encode().to_vec();
        debug_assert_eq!(bytes.len(), HEADER_LEN);
        // The content is not known yet, so the content identifier depends on the size and the options alone.
        bytes.extend_from_slice(self.image.descriptor(&Fingerprint::default()).as_bytes());
        bytes.resize((OVERHEAD * SECTOR_SIZE) as usize, 0);
        Ok(bytes)
    }

    fn in_guest_order(&self) -> bool {
        true
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let mut state = lock(&self.state);
        for part in &prepared.parts {
            let grain = part.guest.start / GRAIN_SIZE;
            let (index, entry) = (grain / TABLE_ENTRIES, (grain % TABLE_ENTRIES) as usize);
            if state.table.as_ref().is_some_and(|(current, _)| *current != index) {
                if state.table.as_ref().is_some_and(|(current, _)| *current > index) {
                    return Err(Error::out_of_order(
                        "the grains of a stream must be in the order of the disk",
                    )
                    .guest(part.guest.clone())
                    .hint("save the source to a file, and convert from there"));
                }
                let at = state.at;
                let table = state.end_table()?;
                writes.push(OutputId::MAIN, at * SECTOR_SIZE, Bytes::Owned(table));
            }
            let at = state.at;
            let (_, table) = state.table.get_or_insert_with(|| (index, vec![0; TABLE_ENTRIES as usize]));
            table[entry] = sector(at)?;
            writes.push(OutputId::MAIN, at * SECTOR_SIZE, part.bytes.clone());
            state.at += part.bytes.len() / SECTOR_SIZE;
        }
        Ok(())
    }

    fn end(&self) -> Result<Vec<u8>> {
        let mut state = lock(&self.state);
        let mut bytes = state.end_table()?;
        let directory = bytes_of(&state.directory);
        let directory_at = state.at + 1;
        sector(directory_at)?;
        bytes.extend_from_slice(&Marker::metadata(Kind::Directory, directory.len() as u64 / SECTOR_SIZE));
        bytes.extend_from_slice(&directory);
        bytes.extend_from_slice(&Marker::metadata(Kind::Footer, 1));
        bytes.extend_from_slice(&header(&self.image, directory_at).encode());
        bytes.extend_from_slice(&Marker::metadata(Kind::End, 0));
        Ok(bytes)
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        self.image.notes()
    }
}
