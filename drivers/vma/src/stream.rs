//! One-pass reading of an archive: from a pipe, through a decompressor, or from a file too scattered for the
//! index.
//!
//! Pieces come in the order of the archive. Each piece consists of consecutive clusters of one device within
//! one extent. Data is read directly into the buffer of its piece.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::source::second_pass;
use imgtool_core::{
    BufferPool, DeviceId, OpenOptions, Piece, RandomInput, Result, Stream, StreamAccess, StreamOrder,
    StreamPart,
};

use crate::bytes::{ArchiveBytes, FileCursor};
use crate::cluster::{data_piece, piece_group, stored_ranges};
use crate::header::ArchiveHeader;
use crate::layout::CLUSTER;
use crate::walker::{ExtentSpan, Walker};

/// One-pass reader of an archive.
pub(crate) struct ArchiveStream {
    walker: Walker<Stream>,
    /// The extent whose data is being read, or `None` between extents.
    extent: Option<ExtentSpan>,
    /// Index of the next cluster in [`Walker::clusters`].
    next_cluster: usize,
    /// True if the archive has no further extent.
    at_end: bool,
    /// True if the last call has delivered nothing.
    ended: bool,
    /// Unstored ends of guest state, found at the end: the device and the guest range.
    short_states: Vec<(DeviceId, Range<u64>)>,
    /// Number of them that were delivered.
    delivered: usize,
}

impl ArchiveStream {
    /// Creates a reader that starts at the first extent. `stream` must be positioned directly after the
    /// archive header.
    pub(crate) fn new(stream: Stream, header: &Arc<ArchiveHeader>, options: &OpenOptions) -> Result<Self> {
        let walker = Walker::new(stream, header, options)?;
        let short_states = Vec::new();
        let (at_end, ended) = (false, false);
        Ok(Self { walker, extent: None, next_cluster: 0, at_end, ended, short_states, delivered: 0 })
    }

    /// Returns the unstored ends of guest state. The list is complete after the last piece.
    pub(crate) fn short_states(&self) -> &[(DeviceId, Range<u64>)] {
        &self.short_states
    }

    /// Returns the next unstored end of guest state as zeros.
    fn next_short_state(&mut self) -> Option<Piece> {
        let (device, guest) = self.short_states.get(self.delivered)?;
        self.delivered += 1;
        Some(Piece::zero(*device, guest.start, guest.end - guest.start))
    }
}

impl StreamAccess for ArchiveStream {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.ended {
            return Err(second_pass());
        }
        while !self.at_end {
            let Some(extent) = self.extent else {
                self.extent = self.walker.next_extent()?;
                self.at_end = self.extent.is_none();
                self.next_cluster = 0;
                if self.at_end {
                    self.short_states = self.walker.tracker.short_states();
                }
                continue;
            };
            let group = piece_group(&self.walker.clusters, self.next_cluster);
            let Some(first) = self.walker.clusters.get(group.start).copied() else {
                self.extent = None;
                continue;
            };
            self.next_cluster = group.end;
            if first.is_beyond() {
                if self.walker.bytes.skip(first.stored_len())? < first.stored_len() {
                    return Err(self.walker.short_extent(extent));
                }
                continue;
            }
            let clusters = &self.walker.clusters[group];
            let len: u64 = clusters.iter().map(|cluster| cluster.len).sum();
            if first.mask == 0 {
                return Ok(Some(Piece::zero(first.device, first.start, len)));
            }
            let mut buffer = pool.take(clusters.len() * CLUSTER as usize);
            let stored = stored_ranges(clusters);
            if !fill(&mut self.walker.bytes, &mut buffer, &stored)? {
                return Err(self.walker.short_extent(extent));
            }
            return Ok(Some(data_piece(&first, len, buffer, stored)));
        }
        let end = self.next_short_state();
        self.ended = end.is_none();
        Ok(end)
    }
}

/// Order in which [`ArchiveStream`] would deliver the content of an archive in a file. Reads the extent headers
/// again, because the index does not keep the places of zero clusters.
pub(crate) struct ArchiveOrder {
    walker: Walker<FileCursor>,
    /// Index of the next cluster in [`Walker::clusters`].
    next_cluster: usize,
    /// Unstored ends of guest state that were not returned yet; `None` before the last extent.
    short_states: Option<Vec<(DeviceId, Range<u64>)>>,
}

impl ArchiveOrder {
    /// Creates the order of the archive in `input`.
    pub(crate) fn new(
        input: &RandomInput,
        header: &Arc<ArchiveHeader>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let cursor = FileCursor::at(input.clone(), u64::from(header.header_size));
        Ok(Self { walker: Walker::new(cursor, header, options)?, next_cluster: 0, short_states: None })
    }
}

impl StreamOrder for ArchiveOrder {
    fn next_part(&mut self) -> Result<Option<StreamPart>> {
        let zeros = |(device, guest)| StreamPart { device, guest, has_data: false };
        loop {
            if let Some(ends) = &mut self.short_states {
                return Ok(ends.pop().map(zeros));
            }
            let group = piece_group(&self.walker.clusters, self.next_cluster);
            let Some(first) = self.walker.clusters.get(group.start).copied() else {
                let Some(extent) = self.walker.next_extent()? else {
                    // The other way round, so that the first one is at the end of the list.
                    let ends = self.walker.tracker.short_states().into_iter().rev();
                    self.short_states = Some(ends.collect());
                    continue;
                };
                self.walker.bytes.skip(extent.data_len)?;
                self.next_cluster = 0;
                continue;
            };
            self.next_cluster = group.end;
            if !first.is_beyond() {
                let len: u64 = self.walker.clusters[group].iter().map(|cluster| cluster.len).sum();
                let guest = first.start..first.start + len;
                return Ok(Some(StreamPart { device: first.device, guest, has_data: first.mask != 0 }));
            }
        }
    }
}

/// Reads the stored ranges into `buffer` and zeroes the rest. Returns false if the input ends early.
fn fill(bytes: &mut impl ArchiveBytes, buffer: &mut [u8], stored: &[Range<usize>]) -> Result<bool> {
    let mut filled = 0;
    for range in stored {
        buffer[filled..range.start].fill(0);
        if bytes.read_full(&mut buffer[range.clone()])? < range.len() {
            return Ok(false);
        }
        filled = range.end;
    }
    buffer[filled..].fill(0);
    Ok(true)
}
