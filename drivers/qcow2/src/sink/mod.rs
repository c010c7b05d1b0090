//! Writing: a new image, in one pass.
//!
//! Layout of a new file: the header's cluster, the L1 table (when the disk's size is known), data in
//! the order in which it comes with finished refcount blocks between it, L2 tables, the rest of the
//! refcount blocks and the refcount table. With preallocation, and in a raw data file, every guest
//! cluster has its place from the start and the L2 tables are made at the end.

mod alloc;
mod base;
mod finish;
mod prepare;
mod tables;
mod write;

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use imgtool_toolkit::{
    BufferPool, Bytes, CreateOptions, DeviceId, Error, Geometry, ImageSink, Manifest, Output, Piece,
    Prepared, Result, WriteList,
};

use crate::compressed::Encoder;
use crate::layout::entry::{CompressedPlace, L2Entry, Subclusters};
use crate::options::{Preallocation, SIZE_MULTIPLE, WriteOptions, ZERO_GRANULARITY};
use alloc::Allocator;
use base::Base;
use tables::Tables;

/// Data pieces, uncompressed. Measured: what stays in the cache of one core is written fastest.
const PIECE_LEN: u64 = 256 << 10;

/// Data pieces that are compressed. Ours: large enough that handing them over costs nothing.
const COMPRESSED_PIECE_LEN: u64 = 1 << 20;

/// Longest piece of zeros that must be noted cluster by cluster. Ours.
const NOTED_ZERO_LEN: u64 = 64 << 20;

/// Where guest data goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Placement {
    /// Into clusters that are allocated when they are needed.
    Packed,
    /// Into the image, all guest clusters in order from this offset on.
    Linear { data_start: u64 },
    /// Into the data file, at the guest's own offsets; clusters without data have no entry.
    External,
    /// Into the data file; every cluster has its entry, so that the file alone is the disk.
    ExternalRaw,
}

/// An image in the making.
pub struct Qcow2Sink {
    options: WriteOptions,
    output: Output,
    data_output: Option<Output>,
    placement: Placement,
    /// `None`: zeros need no entry, as there is nothing below.
    base: Option<Base>,
    encoder: Option<Encoder>,
    /// The size that was asked for, before rounding; `None` while it is not known.
    size: Mutex<Option<u64>>,
    /// Where the L1 table goes; `None`: behind the data.
    l1_offset: Option<u64>,
    state: Mutex<State>,
}

struct State {
    alloc: Allocator,
    tables: Tables,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A size as the header has it.
fn rounded(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(SIZE_MULTIPLE)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::limit(format!("a disk of {size} bytes is too large, it must be below 2^63")))
}

impl Qcow2Sink {
    /// Begins an image; nothing is written yet.
    pub fn create(output: Output, manifest: &Manifest, options: &CreateOptions) -> Result<Self> {
        let device = manifest.single("qcow2")?;
        let write_options = WriteOptions::parse(options)?;
        let shape = write_options.shape;
        let size = (!device.open_ended).then_some(device.size);
        if output.is_stream() {
            return Err(Error::unsupported("qcow2 can't be written to a stream")
                .path(output.path())
                .hint("write to a file, or choose a format that can be streamed (raw, vma)"));
        }
        let data_output = options.extras.outputs.get("data_file").cloned();
        if write_options.data_file.is_some() && data_output.is_none() {
            return Err(Error::usage("the option data_file needs a data file that was opened for writing"));
        }
        let mut alloc = Allocator::new(shape.cluster_bits, write_options.refcount_order);
        alloc.allocate(1)?;
        let mut l1_offset = None;
        if let Some(size) = size {
            let virtual_size = rounded(size)?;
            write_options.check_size(virtual_size)?;
            let clusters = (shape.l1_entries(virtual_size) * 8).div_ceil(shape.cluster_size());
            l1_offset = (clusters > 0).then(|| alloc.allocate(clusters)).transpose()?;
        }
        let placement = match (&write_options.data_file, write_options.preallocation, size) {
            (Some(_), Preallocation::Off, _) if !write_options.data_file_raw => Placement::External,
            (None, Preallocation::Off, _) => Placement::Packed,
            (_, _, None) => {
                return Err(Error::unsupported(
                    "preallocation and data_file_raw need a source whose size is known",
                ));
            }
            (Some(_), ..) => Placement::ExternalRaw,
            // Taken from the allocator at the end, when refcounts can be written.
            (None, _, Some(_)) => Placement::Linear { data_start: alloc.end() },
        };
        let base =
            write_options.backing.as_ref().map(|_| Base::new(options.extras.base.clone())).transpose()?;
        let encoder = match write_options.compress {
            Some(level) => Some(Encoder::new(write_options.compression, level)?),
            None => None,
        };
        let state = State { alloc, tables: Tables::new(shape) };
        Ok(Self {
            options: write_options,
            output,
            data_output,
            placement,
            base,
            encoder,
            size: Mutex::new(size),
            l1_offset,
            state: Mutex::new(state),
        })
    }

    /// The output that guest data goes to.
    fn data_output(&self) -> &Output {
        self.data_output.as_ref().unwrap_or(&self.output)
    }

    fn cluster_size(&self) -> u64 {
        self.options.shape.cluster_size()
    }

    /// Whether every guest cluster has its place from the start.
    fn is_linear(&self) -> bool {
        matches!(self.placement, Placement::Linear { .. } | Placement::ExternalRaw)
    }

    /// Whether a cluster is only stored as a whole.
    fn whole_clusters(&self) -> bool {
        self.encoder.is_some() || self.base.is_some()
    }

    /// Places bytes that are stored as they are; `guest` may cover several clusters.
    fn place_plain(
        &self,
        state: &mut State,
        guest: Range<u64>,
        bytes: &Bytes,
        writes: &mut WriteList,
    ) -> Result<()> {
        let cluster_size = self.cluster_size();
        let mut open: Option<(u64, Range<u64>)> = None;
        let mut position = guest.start;
        while position < guest.end {
            let cluster = position - self.options.shape.within_cluster(position);
            let end = cluster.saturating_add(cluster_size).min(guest.end);
            let host = self.host_cluster(state, cluster, position..end)? + (position - cluster);
            match &mut open {
                Some((start, run)) if *start + (run.end - run.start) == host => run.end = end,
                _ => {
                    if let Some((start, run)) = open.take() {
                        writes.push(start, part_of(bytes, &guest, &run));
                    }
                    open = Some((host, position..end));
                }
            }
            position = end;
        }
        if let Some((start, run)) = open {
            writes.push(start, part_of(bytes, &guest, &run));
        }
        Ok(())
    }

    /// The host offset of the guest cluster at `cluster`, allocated if it is new; `part` is what is
    /// about to be written of it.
    fn host_cluster(&self, state: &mut State, cluster: u64, part: Range<u64>) -> Result<u64> {
        let shape = self.options.shape;
        let State { alloc, tables } = state;
        let words = tables.entry(cluster, alloc, &self.output)?;
        let entry = L2Entry(words[0]);
        let known = entry.is_copied().then(|| entry.host_offset());
        let host = match known {
            Some(host) => host,
            None => {
                let host = match self.placement {
                    Placement::External | Placement::ExternalRaw => cluster,
                    Placement::Packed | Placement::Linear { .. } => alloc.allocate(1)?,
                };
                let whole = part.end - part.start == shape.cluster_size();
                if !whole && self.data_output().needs_zeros() {
                    // Before anything else is written there, so not left to the pipeline.
                    let output = self.data_output();
                    let room = output.capacity().map_or(u64::MAX, |capacity| capacity.saturating_sub(host));
                    output.write_zeros_at(host, shape.cluster_size().min(room))?;
                }
                host
            }
        };
        words[0] = L2Entry::data(host).0;
        if let Some(bitmap) = words.get_mut(1) {
            let subcluster_size = shape.subcluster_size();
            // Both below 32.
            let first = ((part.start - cluster) / subcluster_size) as u32;
            let end = (part.end - cluster).div_ceil(subcluster_size) as u32;
            let mut subclusters = Subclusters(*bitmap);
            subclusters.allocate(first, end - first);
            if self.base.is_some() {
                subclusters.zero_the_rest();
            }
            *bitmap = subclusters.0;
        }
        Ok(host)
    }

    /// Notes that whole clusters read as zeros although there is something below.
    fn note_zeros(&self, state: &mut State, guest: Range<u64>) -> Result<()> {
        let State { alloc, tables } = state;
        let mut cluster = guest.start;
        while cluster < guest.end {
            let words = tables.entry(cluster, alloc, &self.output)?;
            match words {
                [entry] => *entry = L2Entry::ZEROS.0,
                [entry, bitmap] => (*entry, *bitmap) = (0, Subclusters::ALL_ZERO.0),
                _ => {}
            }
            cluster = cluster.saturating_add(self.cluster_size());
        }
        Ok(())
    }

    /// Places one compressed cluster.
    fn place_compressed(&self, state: &mut State, cluster: u64, len: u64) -> Result<u64> {
        let State { alloc, tables } = state;
        let host_offset = alloc.allocate_bytes(len)?;
        let entry = L2Entry::compressed(self.options.shape, CompressedPlace { host_offset, max_len: len })
            .ok_or_else(|| {
                Error::limit("the image is too large for compressed clusters of this size")
                    .hint("use a smaller cluster_size")
            })?;
        tables.entry(cluster, alloc, &self.output)?[0] = entry.0;
        Ok(host_offset)
    }
}

/// The part of `bytes`, which stand for `guest`, that stands for `run`.
fn part_of(bytes: &Bytes, guest: &Range<u64>, run: &Range<u64>) -> Bytes {
    // Within the piece, which is in memory.
    let from = (run.start - guest.start) as usize;
    let len = (run.end - run.start) as usize;
    match bytes {
        Bytes::Zero(_) => Bytes::Zero(len as u64),
        Bytes::Data(range) => Bytes::Data(range.start + from..range.start + from + len),
        Bytes::Encoded(range) => Bytes::Encoded(range.start + from..range.start + from + len),
        Bytes::Owned(owned) => Bytes::Owned(owned[from..from + len].to_vec()),
    }
}

impl ImageSink for Qcow2Sink {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        let cluster_size = self.cluster_size();
        let whole = self.whole_clusters();
        let granule = if whole || self.data_output().needs_zeros() || self.options.shape.extended_l2 {
            cluster_size.max(ZERO_GRANULARITY)
        } else {
            // Gathering larger clusters would only copy: their parts are placed one by one.
            cluster_size.clamp(ZERO_GRANULARITY, 64 << 10)
        };
        let zero_unit = self.options.zero_unit.unwrap_or(0);
        let piece_len = if self.encoder.is_some() { COMPRESSED_PIECE_LEN } else { PIECE_LEN }
            .max(cluster_size)
            .max(zero_unit);
        let max_zero_len = if self.options.stores_zeros() {
            piece_len
        } else if self.base.is_some() {
            NOTED_ZERO_LEN
        } else {
            u64::MAX
        };
        Geometry { granule, granule_required: whole, piece_len, max_zero_len, ordered: !self.is_linear() }
    }

    fn keeps_bytes(&self, _device: DeviceId) -> bool {
        self.options.preallocation == Preallocation::Off && !self.options.stores_zeros()
    }

    fn output(&self, _device: DeviceId) -> &Output {
        self.data_output()
    }

    fn begin(&self) -> Result<()> {
        if !matches!(self.options.preallocation, Preallocation::Falloc | Preallocation::Full) {
            return Ok(());
        }
        let size = rounded(lock(&self.size).unwrap_or(0))?;
        let start = match self.placement {
            Placement::Linear { data_start } => data_start,
            _ => 0,
        };
        self.data_output().allocate(start, size.next_multiple_of(self.cluster_size()))
    }

    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        if self.whole_clusters() && !piece.start.is_multiple_of(self.cluster_size()) {
            return Err(Error::malformed("a piece does not start with a cluster"));
        }
        let piece = if self.options.stores_zeros() { piece.with_zeros_as_data(pool) } else { piece };
        match (&self.encoder, &self.base) {
            (None, None) => Ok(self.prepare_plain(piece)),
            (encoder, base) => self.prepare_clusters(piece, pool, encoder.as_ref(), base.as_ref()),
        }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let start = match self.placement {
            Placement::Linear { data_start } => Some(data_start),
            Placement::ExternalRaw => Some(0),
            Placement::Packed | Placement::External => None,
        };
        if let Some(start) = start {
            for part in &prepared.parts {
                writes.push(start + part.guest.start, part.bytes.clone());
            }
            return Ok(());
        }
        let mut state = lock(&self.state);
        for part in &prepared.parts {
            match &part.bytes {
                Bytes::Encoded(range) => {
                    let offset = self.place_compressed(&mut state, part.guest.start, range.len() as u64)?;
                    writes.push(offset, part.bytes.clone());
                }
                Bytes::Zero(_) if self.options.version >= 3 => {
                    self.note_zeros(&mut state, part.guest.clone())?
                }
                bytes => self.place_plain(&mut state, part.guest.clone(), bytes, writes)?,
            }
        }
        state.alloc.settle(&self.output)
    }

    fn resize(&self, _device: DeviceId, size: u64) -> Result<()> {
        let mut known = lock(&self.size);
        if known.is_some_and(|known| known != size) {
            return Err(Error::unsupported("the disk's size was given before and can't change"));
        }
        self.options.check_size(rounded(size)?)?;
        *known = Some(size);
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.write_tables()
    }

    fn notes(&self) -> Vec<String> {
        match *lock(&self.size) {
            Some(size) if !size.is_multiple_of(SIZE_MULTIPLE) => vec![format!(
                "the virtual size was rounded up from {size} to {} bytes",
                size.next_multiple_of(SIZE_MULTIPLE)
            )],
            _ => Vec::new(),
        }
    }
}
