//! Restoring what is whole of a damaged archive.
//!
//! A cluster is restored when its extent's header is right and all its sub-blocks are there and can
//! be read; the first whole copy counts. When an extent is followed by neither another one, nor the
//! remains of one, nor the end of the archive, then the fault may have begun in its data, and nothing
//! of it is taken. Where the input ends within an extent it is taken for cut: what comes before
//! counts. What is missing at the end is handed out as zeros and listed. Data has no checksum
//! in this format: damage inside data that leaves its length alone can't be seen.
//!
//! Where the archive comes through a compression that has checksums, nothing of a damaged frame or
//! member is taken as long as it is still held, and reading goes on with the next. What had been
//! handed out before the damage showed (of a frame longer than an extent) is listed.
//!
//! An archive's header that is damaged is taken as far as it can be made out; then every device is
//! listed, with an empty range if nothing else of it is lost.

use std::ops::Range;
use std::sync::Arc;

use imgtool_toolkit::{BufferPool, Device, DeviceId, Doubt, Input, Loss, Piece, Result, SequentialAccess};
use roaring::RoaringBitmap;
use uuid::Uuid;

use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, EXTENT_HEADER, SUB_BLOCK};
use crate::scan::{Certainty, Found, FoundExtent, Scanner, Window};
use crate::stream::{group_at, piece, stored_ranges};
use crate::tracker::{Placed, Tracker};

/// Losses that are listed one by one; what comes after is joined to the last. Ours: bounds memory.
const MAX_LOSSES: usize = 65_536;
/// Most zeros in one piece. Ours: a million pieces for all that an archive can name, and a sink that takes
/// 256 KiB at once has 2^18 of them in its queue.
const MAX_ZERO_PIECE: u64 = 64 << 30;

/// What a damaged header means.
const DOUBTFUL_HEADER: &str =
    "names, sizes and configurations are as far as they can be made out, and may be wrong";
/// Why a cluster that was restored is listed.
const TWICE: &str = "it is in the archive more than once; the first copy was taken";
const MISLED: &str = "it was restored, but the compressed stream is damaged before the checksum of this part, so it may be wrong";
/// Of a device as a whole.
const UNPROVEN: &str =
    "the compressed stream ends before its checksum: nothing proves that what was restored is right";

/// The first fault, and how many there were.
#[derive(Default)]
struct Faults {
    first: Option<String>,
    count: u64,
}

impl Faults {
    fn add(&mut self, file_offset: u64, message: &str) {
        self.count += 1;
        self.first.get_or_insert_with(|| format!("file offset {file_offset}: {message}"));
    }

    /// Why clusters are missing.
    fn reason(&self) -> String {
        match (&self.first, self.count) {
            (None, _) => "it is not in the archive".to_owned(),
            (Some(first), 1) => format!("no whole copy is in the archive, which is damaged ({first})"),
            (Some(first), count) => {
                format!(
                    "no whole copy is in the archive, which is damaged in {count} places ({first} is the first)"
                )
            }
        }
    }
}

/// A damaged archive, read in one pass.
pub(crate) struct Salvage {
    header: Arc<ArchiveHeader>,
    scanner: Scanner,
    tracker: Tracker,
    faults: Faults,
    /// Clusters of each device that came more than once.
    doubtful: Vec<RoaringBitmap>,
    /// Clusters that came from a part of a compressed stream whose checksum has not been seen.
    unchecked: Vec<RoaringBitmap>,
    /// Clusters that came from a part of a compressed stream whose checksum was wrong or never came.
    misled: Vec<RoaringBitmap>,
    /// Whole clusters of the current extent, and where their data stands in the input.
    whole: Vec<(Placed, u64)>,
    next_slot: usize,
    /// Where the filling of gaps stands, once the input has ended.
    filling: Option<Filling>,
    losses: Vec<Loss>,
    /// Why names and sizes may be wrong.
    header_damage: Option<String>,
}

struct Filling {
    device: usize,
    from: u64,
    /// Guest bytes that are still to be handed out as zeros.
    zeros: Range<u64>,
}

impl Salvage {
    /// Opens an archive whose header tells of a device at least.
    pub(crate) fn open(input: Input) -> Result<(Arc<ArchiveHeader>, Self)> {
        let mut window = Window::new(input)?;
        let (mut header, damage) = ArchiveHeader::salvage(&mut window).map_err(|e| {
            e.hint("without its header nothing of an archive can be restored; use another copy or backup")
        })?;
        let header_damage = damage.map(|error| {
            if let Some(uuid) = window.first_uuid() {
                header.uuid = Uuid::from_bytes(uuid);
            }
            header.notes.push(format!("the archive's header is damaged ({error}): {DOUBTFUL_HEADER}"));
            format!("the archive's header is damaged ({error}): the name and size may be wrong")
        });
        let header = Arc::new(header);
        let salvage = Self {
            scanner: Scanner::new(window, *header.uuid.as_bytes(), u64::from(header.header_size)),
            tracker: Tracker::lenient(&header.devices),
            faults: Faults::default(),
            doubtful: bitmaps(&header),
            unchecked: bitmaps(&header),
            misled: bitmaps(&header),
            whole: Vec::new(),
            next_slot: 0,
            filling: None,
            losses: Vec::new(),
            header_damage,
            header: Arc::clone(&header),
        };
        Ok((header, salvage))
    }

    /// What could not be restored, by device and ascending.
    pub(crate) fn losses(&self) -> Vec<Loss> {
        self.losses.clone()
    }

    /// What holds for every device as a whole.
    pub(crate) fn doubts(&self) -> Vec<Doubt> {
        let unproven = self.scanner.window().unproven.then(|| UNPROVEN.to_owned());
        let reasons: Vec<String> = self.header_damage.iter().cloned().chain(unproven).collect();
        let of_device = |device: &Device| {
            reasons
                .iter()
                .map(|reason| Doubt { device: device.id, reason: reason.clone() })
                .collect::<Vec<_>>()
        };
        self.header.devices.iter().flat_map(of_device).collect()
    }

    /// Looks at what the compression's checksums say of the clusters that were taken so far.
    fn note_checksums(&mut self, position: u64) {
        // The last extent was taken before the end was seen.
        for (placed, file_offset) in &self.whole {
            let file = *file_offset..*file_offset + placed.stored_len();
            if self.scanner.window().is_doubtful(&file)
                && let Some(index) = self.index_of(placed.device)
            {
                self.misled[index].insert(placed.cluster);
            }
        }
        self.whole.clear();
        if self.scanner.window_mut().take_misled() {
            for (misled, unchecked) in self.misled.iter_mut().zip(&self.unchecked) {
                *misled |= unchecked;
            }
        } else if self.scanner.window_mut().certainty(&(position..position)) != Certainty::Right {
            return;
        }
        self.unchecked.iter_mut().for_each(RoaringBitmap::clear);
    }

    /// Keeps the clusters of an extent that are whole.
    fn take_extent(&mut self, found: &FoundExtent) {
        self.note_checksums(found.file_offset);
        self.next_slot = 0;
        if let Some(fault) = &found.fault {
            self.faults.add(found.file_offset, fault);
        }
        let named: u32 = found.header.slots.iter().map(|slot| slot.stored()).sum();
        if named != u32::from(found.header.block_count) {
            self.faults.add(found.file_offset, "the masks do not fit the number of sub-blocks");
            return;
        }
        if !found.ends_well && !self.would_complete(found) {
            self.faults.add(found.file_offset, "the extent is not followed by another");
            return;
        }
        let data = found.file_offset + EXTENT_HEADER as u64;
        let mut before = 0;
        let mut is_known = found.fault.is_some();
        for (number, slot) in found.header.slots.iter().enumerate() {
            let stored = before..before + u64::from(slot.stored()) * SUB_BLOCK;
            before = stored.end;
            let file = data + stored.start..data + stored.end;
            if slot.dev_id == 0 {
                continue;
            }
            if stored.end > found.usable || !self.scanner.window().is_readable(&file) {
                if !std::mem::replace(&mut is_known, true) {
                    self.faults.add(file.start, "the file can't be read here");
                }
                continue;
            }
            match self.tracker.take(slot, number as u8, false) {
                Ok(placed) if placed.is_beyond() => {}
                Ok(placed) => {
                    if let Some(index) = self.index_of(placed.device) {
                        match self.scanner.window_mut().certainty(&file) {
                            Certainty::Right => {}
                            Certainty::Unknown => _ = self.unchecked[index].insert(placed.cluster),
                            Certainty::Doubtful => _ = self.misled[index].insert(placed.cluster),
                        }
                    }
                    self.whole.push((placed, file.start));
                }
                Err(error) => {
                    self.doubt(DeviceId(u32::from(slot.dev_id)), slot.cluster_num);
                    self.faults.add(found.file_offset, error.message());
                }
            }
        }
    }

    /// Whether the archive is complete with this extent: what stands behind it then does not matter.
    fn would_complete(&self, found: &FoundExtent) -> bool {
        let used = found.header.slots.iter().filter(|slot| slot.dev_id != 0).count() as u64;
        self.tracker.missing_count() <= used
    }

    fn index_of(&self, device: DeviceId) -> Option<usize> {
        self.header.devices.iter().position(|known| known.id == device)
    }

    /// A cluster came again: which copy is right can't be known.
    fn doubt(&mut self, device: DeviceId, cluster: u32) {
        let index = self.index_of(device);
        if let Some((index, known)) = index.and_then(|index| Some((index, self.header.devices.get(index)?)))
            && u64::from(cluster) * CLUSTER < known.size
        {
            self.doubtful[index].insert(cluster);
        }
    }

    /// The next piece of the current extent.
    fn next_whole(&mut self, pool: &BufferPool) -> Option<Piece> {
        let slots: Vec<Placed> = self.whole.iter().map(|(placed, _)| *placed).collect();
        let group = group_at(&slots, self.next_slot);
        let (first, _) = *self.whole.get(group.start)?;
        self.next_slot = group.end;
        let slots = &slots[group.clone()];
        let len = slots.iter().map(|placed| placed.len).sum();
        if first.mask == 0 {
            return Some(Piece::zero(first.device, first.start, len));
        }
        let mut buffer = pool.take(slots.len() * CLUSTER as usize);
        buffer.fill(0);
        for (number, (placed, file_offset)) in self.whole[group].iter().enumerate() {
            let mut from = *file_offset;
            for range in stored_ranges(std::slice::from_ref(placed)) {
                let to = range.start + number * CLUSTER as usize;
                buffer[to..to + range.len()].copy_from_slice(self.scanner.window().slice(from, range.len()));
                from += range.len() as u64;
            }
        }
        Some(piece(&first, len, buffer, stored_ranges(slots)))
    }

    /// The next piece of zeros for what did not come.
    fn next_gap(&mut self) -> Option<Piece> {
        loop {
            let filling = self.filling.get_or_insert(Filling { device: 0, from: 0, zeros: 0..0 });
            let device = self.header.devices.get(filling.device)?;
            if !filling.zeros.is_empty() {
                let end = filling.zeros.end.min(filling.zeros.start + MAX_ZERO_PIECE);
                let piece = Piece::zero(device.id, filling.zeros.start, end - filling.zeros.start);
                filling.zeros.start = end;
                return Some(piece);
            }
            match self.tracker.next_missing(filling.device, filling.from) {
                Some(clusters) => {
                    filling.from = clusters.end;
                    filling.zeros = clusters.start * CLUSTER..(clusters.end * CLUSTER).min(device.size);
                    let loss = Loss {
                        device: device.id,
                        guest: filling.zeros.clone(),
                        reason: self.faults.reason(),
                    };
                    push_loss(&mut self.losses, loss);
                }
                None => {
                    let index = filling.device;
                    *filling = Filling { device: index + 1, from: 0, zeros: 0..0 };
                    self.list_doubtful(index);
                }
            }
        }
    }

    /// Lists what of a device came twice, in its place among the losses.
    fn list_doubtful(&mut self, index: usize) {
        let Some(device) = self.header.devices.get(index) else { return };
        let doubtful = std::mem::take(&mut self.doubtful[index]);
        let misled = std::mem::take(&mut self.misled[index]) - &doubtful;
        if doubtful.is_empty() && misled.is_empty() {
            return;
        }
        for (clusters, reason) in [(doubtful, TWICE), (misled, MISLED)] {
            for cluster in clusters {
                let start = u64::from(cluster) * CLUSTER;
                let guest = start..(start + CLUSTER).min(device.size);
                push_loss(&mut self.losses, Loss { device: device.id, guest, reason: reason.to_owned() });
            }
        }
        let first = self.losses.partition_point(|loss| loss.device < device.id);
        self.losses[first..].sort_by_key(|loss| loss.guest.start);
    }
}

impl SequentialAccess for Salvage {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        while self.filling.is_none() {
            if let Some(piece) = self.next_whole(pool) {
                return Ok(Some(piece));
            }
            match self.scanner.next() {
                Found::Extent(found) => self.take_extent(&found),
                Found::Fault { file, message } => self.faults.add(file.start, &message),
                Found::End => break,
            }
        }
        self.note_checksums(u64::MAX);
        Ok(self.next_gap())
    }
}

fn bitmaps(header: &ArchiveHeader) -> Vec<RoaringBitmap> {
    header.devices.iter().map(|_| RoaringBitmap::new()).collect()
}

/// Adds a loss; joined to the last one where it goes on or the list is full.
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
