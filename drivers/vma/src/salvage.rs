//! Salvage: restores the intact clusters of a damaged archive and lists the rest.
//!
//! A cluster is intact if its extent header is valid and all its sub-blocks are present and readable; salvage
//! uses the first of several copies. If the bytes after an extent are neither an extent, nor the remains of
//! an extent, nor the end of the archive, a fault may have begun in its data, and salvage drops the whole
//! extent. If the input ends within an extent, salvage restores the clusters before the end. After the last
//! extent, it delivers zeros for the missing clusters and lists them as lost. The format has no checksum over
//! data, so damage that does not change the length of the data goes unnoticed.
//!
//! If the archive is compressed with checksums, reading resumes at the next frame or member after a damaged
//! one. If a damaged frame is longer than an extent, salvage may have delivered clusters from it before the
//! damage showed. It lists these clusters as unverified.
//!
//! Salvage decodes a damaged archive header as far as possible, and then reports a [`Doubt`] about every
//! device.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::source::second_pass;
use imgtool_core::{
    BufferPool, Device, DeviceId, Doubt, Input, Loss, LossClass, Memory, Piece, Result, StreamAccess,
};
use roaring::RoaringBitmap;
use uuid::Uuid;

use crate::cluster::{VmaCluster, data_piece, piece_group, stored_ranges};
use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, EXTENT_HEADER, SUB_BLOCK};
use crate::scan::{ScanExtent, ScanItem, Scanner};
use crate::tracker::Tracker;
use crate::window::{ChecksumState, Window};

/// Maximum number of losses listed one by one; further losses of a device are joined to its last one. Our
/// limit, to bound memory.
const MAX_LOSSES: usize = 65_536;
/// Maximum length in bytes of a piece of zeros. Our limit: the largest archive then takes a million pieces,
/// and a sink that accepts 256 KiB at a time queues 2^18 parts of a piece.
const MAX_ZERO_PIECE: u64 = 64 << 30;

/// Note for an archive whose header is damaged.
const DAMAGED_HEADER: &str =
    "names, sizes and configurations were decoded as far as possible and may be wrong";
/// Reason to list a restored cluster with several copies.
const DUPLICATED: &str = "it is in the archive more than once; the first copy was used";
/// Reason to list a restored cluster whose checksum is wrong or missing.
const UNVERIFIED: &str =
    "it was restored but may be wrong: the compressed stream is damaged before the checksum of this part";
/// Reason for the doubt about every device of a compressed archive that was cut.
const CUT_BEFORE_CHECKSUM: &str =
    "the compressed stream ends before its checksum, so what was restored is unverified";

/// The first fault of the archive, and the number of faults.
#[derive(Default)]
struct Faults {
    first: Option<Fault>,
    count: u64,
}

/// A fault of the archive.
struct Fault {
    offset: u64,
    /// Position in the compressed file.
    compressed: Option<u64>,
    message: String,
}

impl Faults {
    fn add(&mut self, offset: u64, compressed: Option<u64>, message: &str) {
        self.count += 1;
        self.first.get_or_insert_with(|| Fault { offset, compressed, message: message.to_owned() });
    }

    /// Returns the reason to list for a missing cluster.
    fn reason(&self) -> String {
        match (&self.first, self.count) {
            (None, _) => "it is not in the archive".to_owned(),
            (Some(Fault { offset, message, .. }), 1) => {
                format!("no complete copy in the archive, which is damaged (at offset {offset}: {message})")
            }
            (Some(Fault { offset, message, .. }), count) => {
                format!(
                    "no complete copy in the archive, which is damaged in {count} places (first at offset \
                     {offset}: {message})"
                )
            }
        }
    }

    /// Returns the loss of a missing cluster.
    fn loss(&self, device: DeviceId, guest: Range<u64>) -> Loss {
        // In an archive without faults, the cluster was left out when it was written.
        let class = if self.first.is_some() { LossClass::Lost } else { LossClass::NeverStored };
        let (offset, compressed_offset) = self.place();
        Loss { class, offset, compressed_offset, device, guest, reason: self.reason() }
    }

    /// Returns the place of the first fault in the archive and in the compressed file.
    fn place(&self) -> (Option<u64>, Option<u64>) {
        let first = self.first.as_ref();
        (first.map(|fault| fault.offset), first.and_then(|fault| fault.compressed))
    }
}

/// One-pass reader of a damaged archive.
pub(crate) struct Salvage {
    header: Arc<ArchiveHeader>,
    scanner: Scanner,
    tracker: Tracker,
    faults: Faults,
    /// Per device: clusters found more than once.
    duplicated: Vec<RoaringBitmap>,
    /// Per device: clusters from a part of a compressed stream whose checksum is still to be read.
    pending: Vec<RoaringBitmap>,
    /// Per device: clusters from a part of a compressed stream whose checksum was wrong or missing.
    unverified: Vec<RoaringBitmap>,
    /// Intact clusters of the current extent, with the archive offset of their data.
    intact: Vec<(VmaCluster, u64)>,
    /// Index into `intact` of the next cluster to deliver.
    next_cluster: usize,
    /// Progress of filling gaps, or `None` until the input has ended.
    gap_fill: Option<GapFill>,
    /// True once [`StreamAccess::next_piece`] has returned `None`.
    finished: bool,
    losses: Vec<Loss>,
    /// Reason why names and sizes may be wrong, if the archive header is damaged.
    header_damage: Option<String>,
}

/// Progress of delivering zeros for missing clusters.
struct GapFill {
    /// Index of the device in the header.
    device: usize,
    /// Number of the cluster from which to look for the next gap.
    next_cluster: u64,
    /// Guest range of the current gap that is still to be delivered.
    zeros: Range<u64>,
}

impl Salvage {
    /// Opens an archive for salvage.
    ///
    /// # Errors
    /// Fails if not even one device can be decoded from the archive header.
    pub(crate) fn open(input: Input, memory: &Memory) -> Result<(Arc<ArchiveHeader>, Self)> {
        let mut window = Window::new(input)?;
        let (mut header, damage) = ArchiveHeader::read_lenient(&mut window).map_err(|e| {
            e.hint("an archive can't be restored without its header; use another copy or backup")
        })?;
        let header_damage = damage.map(|error| {
            if let Some(uuid) = window.first_uuid() {
                header.uuid = Uuid::from_bytes(uuid);
            }
            header.notes.push(format!("the archive's header is damaged ({error:#}): {DAMAGED_HEADER}"));
            format!("the archive's header is damaged ({error:#}): the name and size may be wrong")
        });
        let header = Arc::new(header);
        let salvage = Self {
            scanner: Scanner::new(window, *header.uuid.as_bytes(), u64::from(header.header_size)),
            tracker: Tracker::lenient(&header, memory)?,
            faults: Faults::default(),
            duplicated: bitmaps(&header),
            pending: bitmaps(&header),
            unverified: bitmaps(&header),
            intact: Vec::new(),
            next_cluster: 0,
            gap_fill: None,
            finished: false,
            losses: Vec::new(),
            header_damage,
            header: Arc::clone(&header),
        };
        Ok((header, salvage))
    }

    /// Returns the lost and unverified ranges, by device and in ascending order. The list is complete after
    /// the last piece.
    pub(crate) fn losses(&self) -> Vec<Loss> {
        self.losses.clone()
    }

    /// Returns the doubts, which are the same for every device.
    pub(crate) fn doubts(&self) -> Vec<Doubt> {
        let cut = self.scanner.window().was_cut_before_checksum().then(|| CUT_BEFORE_CHECKSUM.to_owned());
        let reasons: Vec<String> = self.header_damage.iter().cloned().chain(cut).collect();
        let of_device = |device: &Device| {
            reasons
                .iter()
                .map(|reason| Doubt { device: device.id, reason: reason.clone() })
                .collect::<Vec<_>>()
        };
        self.header.devices.iter().flat_map(of_device).collect()
    }

    /// Settles the clusters delivered so far, by the checksums read up to archive offset `position`: they
    /// become verified or unverified, or stay pending.
    fn settle_checksums(&mut self, position: u64) {
        // A read after the current extent was accepted may have found its checksum wrong.
        for (cluster, file_offset) in &self.intact {
            let file = *file_offset..*file_offset + cluster.stored_len();
            if self.scanner.window().is_unverified(&file)
                && let Some(index) = self.header.ids.index_of(cluster.device)
            {
                self.unverified[index].insert(cluster.number);
            }
        }
        self.intact.clear();
        let window = self.scanner.window_mut();
        if window.take_released_unverified() {
            for (unverified, pending) in self.unverified.iter_mut().zip(&self.pending) {
                *unverified |= pending;
            }
        } else if window.checksum_state(&(position..position)) != ChecksumState::Verified {
            return;
        }
        self.pending.iter_mut().for_each(RoaringBitmap::clear);
    }

    /// Records a fault at the archive offset `offset`, which the window holds.
    fn add_fault(&mut self, offset: u64, message: &str) {
        self.faults.add(offset, self.scanner.window().compressed_offset(offset), message);
    }

    /// Collects the intact clusters of an extent.
    fn collect_intact(&mut self, extent: &ScanExtent) {
        self.settle_checksums(extent.file_offset);
        self.next_cluster = 0;
        if let Some(fault) = &extent.fault {
            self.faults.add(extent.file_offset, extent.compressed, fault);
        }
        let marked: u32 = extent.header.slots.iter().map(|slot| slot.stored()).sum();
        if marked != u32::from(extent.header.block_count) {
            self.add_fault(extent.file_offset, "the masks do not match the number of sub-blocks");
            return;
        }
        if !extent.ends_well && !self.would_complete(extent) {
            self.add_fault(extent.file_offset, "no valid extent follows this one");
            return;
        }
        let data = extent.file_offset + EXTENT_HEADER as u64;
        let mut before = 0;
        let mut is_reported = extent.fault.is_some();
        for (slot_index, slot) in extent.header.slots.iter().enumerate() {
            let stored = before..before + u64::from(slot.stored()) * SUB_BLOCK;
            before = stored.end;
            let file = data + stored.start..data + stored.end;
            if slot.dev_id == 0 {
                continue;
            }
            if stored.end > extent.usable || !self.scanner.window().is_readable(&file) {
                if !std::mem::replace(&mut is_reported, true) {
                    self.add_fault(file.start, "the file can't be read here");
                }
                continue;
            }
            match self.tracker.admit_slot(slot, slot_index as u8, false) {
                Ok(cluster) if cluster.is_beyond() => {}
                Ok(cluster) => {
                    if let Some(index) = self.header.ids.index_of(cluster.device) {
                        match self.scanner.window_mut().checksum_state(&file) {
                            ChecksumState::Verified => {}
                            ChecksumState::Pending => _ = self.pending[index].insert(cluster.number),
                            ChecksumState::Failed => _ = self.unverified[index].insert(cluster.number),
                        }
                    }
                    self.intact.push((cluster, file.start));
                }
                Err(error) => {
                    self.note_duplicate(DeviceId(u32::from(slot.dev_id)), slot.cluster_num);
                    self.add_fault(extent.file_offset, error.message());
                }
            }
        }
    }

    /// True if the extent has enough clusters to complete the archive. The bytes after it do not matter then.
    fn would_complete(&self, extent: &ScanExtent) -> bool {
        let used = extent.header.slots.iter().filter(|slot| slot.dev_id != 0).count() as u64;
        self.tracker.missing_count() <= used
    }

    /// Records a cluster that the tracker refused, in most cases because it is a second copy. Nothing shows
    /// which copy is right.
    fn note_duplicate(&mut self, device: DeviceId, cluster: u32) {
        let index = self.header.ids.index_of(device);
        if let Some((index, known)) = index.and_then(|index| Some((index, self.header.devices.get(index)?)))
            && u64::from(cluster) * CLUSTER < known.size
        {
            self.duplicated[index].insert(cluster);
        }
    }

    /// Returns the next piece of the current extent, or `None` if all its pieces have been delivered.
    fn next_intact(&mut self, pool: &BufferPool) -> Option<Piece> {
        let clusters: Vec<VmaCluster> = self.intact.iter().map(|(cluster, _)| *cluster).collect();
        let group = piece_group(&clusters, self.next_cluster);
        let (first, _) = *self.intact.get(group.start)?;
        self.next_cluster = group.end;
        let clusters = &clusters[group.clone()];
        let len = clusters.iter().map(|cluster| cluster.len).sum();
        if first.mask == 0 {
            return Some(Piece::zero(first.device, first.start, len));
        }
        let mut buffer = pool.take(clusters.len() * CLUSTER as usize);
        buffer.fill(0);
        for (index, (cluster, file_offset)) in self.intact[group].iter().enumerate() {
            let mut from = *file_offset;
            for range in stored_ranges(std::slice::from_ref(cluster)) {
                let to = range.start + index * CLUSTER as usize;
                buffer[to..to + range.len()].copy_from_slice(self.scanner.window().slice(from, range.len()));
                from += range.len() as u64;
            }
        }
        Some(data_piece(&first, len, buffer, stored_ranges(clusters)))
    }

    /// Returns the next piece of zeros for missing clusters, and lists the clusters as lost. Returns `None`
    /// after the last gap.
    fn next_gap(&mut self) -> Option<Piece> {
        loop {
            let fill = self.gap_fill.get_or_insert(GapFill { device: 0, next_cluster: 0, zeros: 0..0 });
            let device = self.header.devices.get(fill.device)?;
            if !fill.zeros.is_empty() {
                let end = fill.zeros.end.min(fill.zeros.start + MAX_ZERO_PIECE);
                let piece = Piece::zero(device.id, fill.zeros.start, end - fill.zeros.start);
                fill.zeros.start = end;
                return Some(piece);
            }
            match self.tracker.next_missing(fill.device, fill.next_cluster) {
                Some(clusters) => {
                    fill.next_cluster = clusters.end;
                    fill.zeros = clusters.start * CLUSTER..(clusters.end * CLUSTER).min(device.size);
                    push_loss(&mut self.losses, self.faults.loss(device.id, fill.zeros.clone()));
                }
                None => {
                    let index = fill.device;
                    *fill = GapFill { device: index + 1, next_cluster: 0, zeros: 0..0 };
                    self.list_unverified(index);
                }
            }
        }
    }

    /// Adds the duplicated and unverified clusters of the device at `index` to its losses, in guest order.
    fn list_unverified(&mut self, index: usize) {
        let Some(device) = self.header.devices.get(index) else { return };
        let duplicated = std::mem::take(&mut self.duplicated[index]);
        let unverified = std::mem::take(&mut self.unverified[index]) - &duplicated;
        if duplicated.is_empty() && unverified.is_empty() {
            return;
        }
        // Of several faults, nobody knows which one a cluster belongs to.
        let (offset, compressed_offset) =
            if self.faults.count == 1 { self.faults.place() } else { (None, None) };
        for (clusters, reason) in [(duplicated, DUPLICATED), (unverified, UNVERIFIED)] {
            for cluster in clusters {
                let start = u64::from(cluster) * CLUSTER;
                let guest = start..(start + CLUSTER).min(device.size);
                let (class, device, reason) = (LossClass::Unverified, device.id, reason.to_owned());
                push_loss(&mut self.losses, Loss { class, offset, compressed_offset, device, guest, reason });
            }
        }
        let first = self.losses.partition_point(|loss| loss.device < device.id);
        self.losses[first..].sort_by_key(|loss| loss.guest.start);
    }
}

impl StreamAccess for Salvage {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        while self.gap_fill.is_none() {
            if let Some(piece) = self.next_intact(pool) {
                return Ok(Some(piece));
            }
            match self.scanner.next() {
                ScanItem::Extent(extent) => self.collect_intact(&extent),
                ScanItem::Fault { file, compressed, message } => {
                    self.faults.add(file.start, compressed, &message);
                }
                ScanItem::End => break,
            }
        }
        if self.finished {
            return Err(second_pass());
        }
        self.settle_checksums(u64::MAX);
        let gap = self.next_gap();
        self.finished = gap.is_none();
        Ok(gap)
    }
}

/// Returns an empty bitmap for each device.
fn bitmaps(header: &ArchiveHeader) -> Vec<RoaringBitmap> {
    header.devices.iter().map(|_| RoaringBitmap::new()).collect()
}

/// Adds a loss, or joins it to the last one of the same device if the two are adjacent and have the same
/// reason, or if the list is full.
fn push_loss(losses: &mut Vec<Loss>, loss: Loss) {
    let full = losses.len() >= MAX_LOSSES;
    if let Some(last) = losses.last_mut()
        && last.device == loss.device
        && loss.guest.start >= last.guest.end
        && ((last.guest.end == loss.guest.start && last.reason == loss.reason) || full)
    {
        last.guest.end = loss.guest.end;
        return;
    }
    losses.push(loss);
}
