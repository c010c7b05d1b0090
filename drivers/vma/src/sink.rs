//! Writer of archives, to files and pipes alike: the archive header, then extents one after the other.
//!
//! Each piece becomes one or more whole extents, so threads can prepare pieces independently. An extent covers
//! 59 clusters from a multiple of 59 on, so the archive does not depend on the length of the pieces. Preparing
//! encodes the extent headers and leaves the data in the piece's buffer. Placing appends the extents to the
//! archive.

use std::ops::Range;
use std::sync::Mutex;

use imgtool_core::sync::lock;
use imgtool_core::{
    Buffer, BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Output, OutputId, Part, Prepared,
    Result, Sharing, SinkDevice, SinkPiece, WriteList,
};

use crate::extent::{BlockInfo, ExtentHeader};
use crate::layout::{CLUSTER, CLUSTERS_PER_EXTENT, EXTENT_HEADER, SUB_BLOCK, SUB_BLOCKS_PER_CLUSTER};
use crate::plan::{ArchivePlan, PlannedDevice};

/// Number of guest bytes that a full extent covers.
const EXTENT_SPAN: u64 = CLUSTER * CLUSTERS_PER_EXTENT as u64;
/// Maximum number of extents made of one piece of zeros: 512 KiB of headers, 3.7 GiB of guest. Our limit.
const ZERO_EXTENTS: u64 = 1024;

/// Writer of one archive.
pub(crate) struct VmaSink {
    outputs: [Output; 1],
    plan: ArchivePlan,
    /// Length in bytes of the shortest run of zeros that is omitted, or `None` to store all zeros. More than
    /// a cluster counts as a cluster.
    zero_unit: Option<u64>,
    state: Mutex<State>,
}

/// Progress of placing.
struct State {
    /// Archive offset of the next extent.
    file_offset: u64,
    /// Number of clusters placed so far, for each device of the plan.
    clusters_placed: Vec<u64>,
}

impl VmaSink {
    /// Creates a writer of the planned archive. Writes nothing.
    pub(crate) fn new(output: Output, plan: ArchivePlan, zero_unit: Option<u64>) -> Self {
        let state =
            State { file_offset: plan.header.len() as u64, clusters_placed: vec![0; plan.devices.len()] };
        Self { outputs: [output], plan, zero_unit, state: Mutex::new(state) }
    }

    fn device(&self, device: SinkDevice) -> Result<&PlannedDevice> {
        let planned = self.plan.devices.get(device.index());
        planned.ok_or_else(|| Error::usage(format!("the archive has no device {device}")))
    }

    /// True if the sink stores all zeros of the device. It always stores the zeros of guest state, because
    /// the reference program drops unstored sub-blocks when it reads guest state.
    fn stores_zeros(&self, device: &PlannedDevice) -> bool {
        device.is_state || self.zero_unit.is_none()
    }
}

impl Consumer for VmaSink {
    fn geometry(&self, device: SinkDevice) -> Geometry {
        let stores_zeros = self.device(device).is_ok_and(|device| self.stores_zeros(device));
        Geometry {
            // Extents cover the same guest ranges, whatever the pieces of the source. If a shuffled stream
            // leaves parts, these are whole clusters, since every stream of known size consists of clusters.
            granule: EXTENT_SPAN,
            granule_required: false,
            piece_len: EXTENT_SPAN,
            max_zero_len: if stores_zeros { EXTENT_SPAN } else { EXTENT_SPAN * ZERO_EXTENTS },
            ordered: true,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let device = self.device(piece.device)?;
        check_piece(device, &piece)?;
        let piece = if self.zero_unit.is_none() { piece.with_zeros_as_data(pool) } else { piece };
        let masks = if self.stores_zeros(device) {
            ClusterMasks::all(&piece, device)
        } else {
            // Fits usize: at most a cluster.
            let unit = self.zero_unit.unwrap_or(SUB_BLOCK).min(CLUSTER) as usize;
            ClusterMasks::of_runs(piece.nonzero_runs(unit), &piece)
        };
        let extents = masks.clusters.len().div_ceil(CLUSTERS_PER_EXTENT);
        let tail = masks.tail_len(&piece);
        let mut encoded = pool.take(extents * EXTENT_HEADER + tail);
        encoded[extents * EXTENT_HEADER..].fill(0);
        let mut prepared = Prepared::new(piece);
        let mut builder =
            ExtentBuilder { sink: self, device, prepared: &mut prepared, encoded: &mut encoded, tail };
        for index in 0..extents {
            builder.add_extent(index, extents, &masks)?;
        }
        prepared.encoded = Some(encoded);
        Ok(prepared)
    }
}

impl ImageSink for VmaSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        Ok(self.plan.header.clone())
    }

    fn append_only(&self) -> bool {
        true
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        Sharing::Parts(OutputId::MAIN)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let device = self.device(prepared.device)?;
        let index = prepared.device.index();
        let mut state = lock(&self.state);
        if device.is_state && prepared.start != state.clusters_placed[index] * CLUSTER {
            return Err(Error::unsupported("guest state must be written in order")
                .device(&device.name)
                .guest(prepared.start..prepared.start + prepared.len)
                .hint("save the source to a file and convert from there"));
        }
        state.clusters_placed[index] += prepared.len.div_ceil(CLUSTER);
        for part in &prepared.parts {
            writes.push(OutputId::MAIN, state.file_offset, part.bytes.clone());
            state.file_offset += part.bytes.len();
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        let state = lock(&self.state);
        for (device, placed) in self.plan.devices.iter().zip(&state.clusters_placed) {
            if *placed != device.clusters {
                return Err(Error::corrupt(format!(
                    "{placed} of {} clusters were written: the source was not read in full",
                    device.clusters
                ))
                .device(&device.name));
            }
        }
        // In a new file, zeros at the end of guest state may be unwritten; this extends the file over them.
        self.outputs[0].set_len(state.file_offset)
    }

    fn notes(&self) -> Vec<String> {
        self.plan.notes.clone()
    }
}

/// Refuses a piece that is not made of whole clusters of the device.
fn check_piece(device: &PlannedDevice, piece: &SinkPiece) -> Result<()> {
    let end = piece.start.checked_add(piece.len).filter(|end| *end <= device.size);
    let whole = piece.start.is_multiple_of(CLUSTER)
        && piece.len > 0
        && end.is_some_and(|end| end.is_multiple_of(CLUSTER) || end.div_ceil(CLUSTER) == device.clusters);
    if whole {
        return Ok(());
    }
    Err(Error::out_of_bounds(format!(
        "{} bytes at {} are not whole clusters of the device of {} bytes",
        piece.len, piece.start, device.size
    ))
    .device(&device.name))
}

/// Masks of the clusters of a piece.
struct ClusterMasks {
    /// One mask for each cluster; bit *i* is set if sub-block *i* is stored.
    clusters: Vec<u16>,
}

impl ClusterMasks {
    /// Returns masks that store the sub-blocks touched by `runs`, which are byte ranges of the piece.
    fn of_runs(runs: Vec<Range<usize>>, piece: &SinkPiece) -> Self {
        let mut masks = Self::none(piece);
        for run in runs {
            masks.set(run.start as u64 / SUB_BLOCK..(run.end as u64).div_ceil(SUB_BLOCK));
        }
        masks
    }

    /// Returns masks that store every sub-block up to the end of the device.
    fn all(piece: &SinkPiece, device: &PlannedDevice) -> Self {
        let mut masks = Self::none(piece);
        // The last piece may end before the device, because the plan rounds sizes up to a sector.
        let end = device.size.min(piece.start + piece.len.next_multiple_of(CLUSTER));
        masks.set(0..(end - piece.start).div_ceil(SUB_BLOCK));
        masks
    }

    /// Returns masks that store nothing. `Geometry::max_zero_len` bounds a piece to 60,416 clusters.
    fn none(piece: &SinkPiece) -> Self {
        Self { clusters: vec![0; piece.len.div_ceil(CLUSTER) as usize] }
    }

    /// Marks sub-blocks, counted from the start of the piece, as stored.
    fn set(&mut self, blocks: Range<u64>) {
        for block in blocks {
            self.clusters[(block / SUB_BLOCKS_PER_CLUSTER) as usize] |= 1 << (block % SUB_BLOCKS_PER_CLUSTER);
        }
    }

    /// Returns the number of zero bytes that complete the last sub-block: 0 unless the piece ends within a
    /// stored sub-block.
    fn tail_len(&self, piece: &SinkPiece) -> usize {
        let tail = piece.len.next_multiple_of(SUB_BLOCK) - piece.len;
        let last = piece.len / SUB_BLOCK;
        let mask = self.clusters.get((last / SUB_BLOCKS_PER_CLUSTER) as usize).copied().unwrap_or(0);
        let stored = mask >> (last % SUB_BLOCKS_PER_CLUSTER) & 1 == 1;
        if stored { tail as usize } else { 0 }
    }
}

/// Encoder of the extents of one piece.
struct ExtentBuilder<'a> {
    sink: &'a VmaSink,
    device: &'a PlannedDevice,
    prepared: &'a mut Prepared,
    /// Buffer for the extent headers, followed by `tail` zero bytes.
    encoded: &'a mut Buffer,
    /// Number of zero bytes that complete the last sub-block.
    tail: usize,
}

impl ExtentBuilder<'_> {
    /// Adds extent `index` of the piece, which becomes `extents` in all: the header, then the data.
    fn add_extent(&mut self, index: usize, extents: usize, masks: &ClusterMasks) -> Result<()> {
        let first = index * CLUSTERS_PER_EXTENT;
        let clusters = &masks.clusters[first..masks.clusters.len().min(first + CLUSTERS_PER_EXTENT)];
        let first_cluster = self.prepared.start / CLUSTER + first as u64;
        let mut header = ExtentHeader::empty();
        let mut block_count = 0;
        for ((mask, slot), cluster) in clusters.iter().zip(&mut header.slots).zip(first_cluster..) {
            let cluster_num = u32::try_from(cluster)
                .map_err(|_| Error::limit(format!("cluster number {cluster} does not fit into 32 bits")))?;
            *slot = BlockInfo { mask: *mask, dev_id: self.device.dev_id, cluster_num };
            block_count += mask.count_ones();
        }
        header.block_count = u16::try_from(block_count).unwrap_or(u16::MAX);
        let at = index * EXTENT_HEADER;
        self.encoded[at..at + EXTENT_HEADER].copy_from_slice(&header.encode(self.sink.plan.uuid.as_bytes()));
        let guest = first_cluster * CLUSTER;
        self.push(guest..guest, Bytes::Encoded(at..at + EXTENT_HEADER));
        self.add_data(first, clusters, extents);
        Ok(())
    }

    /// Adds the stored sub-blocks of `clusters`, which begin at the cluster `first` of the piece.
    fn add_data(&mut self, first: usize, clusters: &[u16], extents: usize) {
        let base = first as u64 * SUB_BLOCKS_PER_CLUSTER;
        let blocks = clusters.len() as u64 * SUB_BLOCKS_PER_CLUSTER;
        let stored = |block: u64| {
            clusters[(block / SUB_BLOCKS_PER_CLUSTER) as usize] >> (block % SUB_BLOCKS_PER_CLUSTER) & 1 == 1
        };
        let mut block = 0;
        while block < blocks {
            let start = block;
            while block < blocks && stored(block) {
                block += 1;
            }
            if block > start {
                self.add_run((base + start) * SUB_BLOCK..(base + block) * SUB_BLOCK, extents);
            } else {
                block += 1;
            }
        }
    }

    /// Adds a run of stored sub-blocks, given as bytes of the piece. The last run may reach past the end of
    /// the piece.
    fn add_run(&mut self, run: Range<u64>, extents: usize) {
        let (start, len) = (self.prepared.start, self.prepared.len);
        let within = run.start..run.end.min(len);
        let guest = start + within.start..start + within.end;
        let bytes = if self.prepared.data.is_some() {
            // Fits usize: within the piece's buffer.
            Bytes::Data(within.start as usize..within.end as usize)
        } else {
            Bytes::Zero(within.end - within.start)
        };
        self.push(guest.clone(), bytes);
        let missing = run.end - within.end;
        if missing > 0 {
            let headers = extents * EXTENT_HEADER;
            debug_assert_eq!(missing, self.tail as u64);
            self.push(guest.end..guest.end, Bytes::Encoded(headers..headers + self.tail));
        }
    }

    fn push(&mut self, guest: Range<u64>, bytes: Bytes) {
        self.prepared.parts.push(Part { guest, bytes });
    }
}
