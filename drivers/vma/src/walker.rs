//! Strict walk over the extents of an archive.
//!
//! The index, which skips the data, and the stream, which reads it, both use the walker. So they accept the
//! same archives and refuse others with the same messages. Checks run in the order of the reference program.

use std::borrow::Cow;
use std::sync::Arc;

use imgtool_core::{DeviceId, Error, OpenOptions, Remedy, Result};

use crate::bytes::ArchiveBytes;
use crate::cluster::VmaCluster;
use crate::extent::{BlockInfo, ExtentHeader};
use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, CLUSTERS_PER_EXTENT, EXTENT_HEADER, MAX_BLOCK_COUNT, MAX_EXTENT, SUB_BLOCK};
use crate::reference;
use crate::tracker::Tracker;

const DAMAGED: Remedy =
    Remedy::Salvage(Cow::Borrowed("the archive is damaged here: copy it again, or use another backup"));
const CUT: Remedy =
    Remedy::Salvage(Cow::Borrowed("the archive is cut short: copy it again, or use another backup"));

/// Position and length of the current extent.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExtentSpan {
    /// Archive offset of the extent header.
    pub(crate) file_offset: u64,
    /// Length in bytes of the data after the header.
    pub(crate) data_len: u64,
}

/// Strict walk over the extents of an archive, which it reads from `B`.
pub(crate) struct Walker<B> {
    pub(crate) bytes: B,
    pub(crate) tracker: Tracker,
    /// The clusters of the current extent, in the order of their data.
    pub(crate) clusters: Vec<VmaCluster>,
    /// All slots of the current extent, empty ones included.
    slots: [BlockInfo; CLUSTERS_PER_EXTENT],
    header: Arc<ArchiveHeader>,
    ignore_trailing: bool,
}

impl<B: ArchiveBytes> Walker<B> {
    /// Creates a walker that starts at the first extent. `bytes` must be positioned directly after the
    /// archive header.
    pub(crate) fn new(bytes: B, header: &Arc<ArchiveHeader>, options: &OpenOptions) -> Result<Self> {
        Ok(Self {
            bytes,
            tracker: Tracker::new(header, &options.memory)?,
            clusters: Vec::new(),
            slots: [BlockInfo::default(); CLUSTERS_PER_EXTENT],
            header: Arc::clone(header),
            ignore_trailing: options.ignore_trailing,
        })
    }

    /// Reads the next extent header and fills [`Walker::clusters`]. The caller must read or skip the data
    /// before the next call. Returns `None` at the end of a complete archive, or at trailing bytes that the
    /// options allow.
    pub(crate) fn next_extent(&mut self) -> Result<Option<ExtentSpan>> {
        let file_offset = self.bytes.position();
        let mut raw = [0; EXTENT_HEADER];
        let got = self.bytes.read_header(&mut raw)?;
        if got == 0 {
            self.tracker.check_complete()?;
            return Ok(None);
        }
        let parsed = if got < EXTENT_HEADER {
            Err(Error::corrupt(reference::short_header(got)))
        } else {
            ExtentHeader::parse(&raw, self.header.uuid.as_bytes())
        };
        let may_end = self.ignore_trailing && self.tracker.is_complete();
        let extent = match parsed {
            // No extent has this many sub-blocks, so these are trailing bytes like any others.
            Ok(extent) if may_end && u64::from(extent.block_count) > MAX_BLOCK_COUNT => {
                self.bytes.skip(u64::MAX)?;
                return Ok(None);
            }
            Ok(extent) => extent,
            Err(_) if may_end => {
                self.bytes.skip(u64::MAX)?;
                return Ok(None);
            }
            Err(error) => {
                let remedy = if self.tracker.is_complete() {
                    Remedy::IgnoreTrailing
                } else if got < EXTENT_HEADER {
                    CUT
                } else {
                    DAMAGED
                };
                return Err(error.at(file_offset).remedied_by(remedy));
            }
        };
        let span = ExtentSpan { file_offset, data_len: extent.data_len() };
        self.slots = extent.slots;
        self.admit(&extent, span)?;
        Ok(Some(span))
    }

    /// Checks that all the data is present, if the length of the input is known, and then checks the slots
    /// and fills [`Walker::clusters`].
    fn admit(&mut self, extent: &ExtentHeader, span: ExtentSpan) -> Result<()> {
        let is_short = self.bytes.remaining().is_some_and(|left| left < span.data_len);
        if is_short || u64::from(extent.block_count) > MAX_BLOCK_COUNT {
            let longest = MAX_EXTENT - EXTENT_HEADER as u64;
            self.bytes.skip(span.data_len.min(longest))?;
            return Err(self.short_extent(span));
        }
        if let Err(error) = self.tracker.admit_extent(extent, &mut self.clusters) {
            // In a stream, only skipping shows whether data is missing. If it is, report that rather than the
            // wrong slot.
            if self.bytes.skip(span.data_len)? < span.data_len {
                return Err(self.short_extent(span));
            }
            return Err(error.at(span.file_offset).remedied_by(DAMAGED));
        }
        Ok(())
    }

    /// Returns the error for an extent whose data ends early, at the current position of `bytes`.
    pub(crate) fn short_extent(&self, span: ExtentSpan) -> Error {
        let available = self.bytes.position() - span.file_offset;
        let needed = EXTENT_HEADER as u64 + span.data_len;
        let remedy = if needed > MAX_EXTENT { DAMAGED } else { CUT };
        let error = Error::corrupt(reference::short_extent(available, needed));
        self.locate_first_lost(error, available).at(span.file_offset).remedied_by(remedy)
    }

    /// Adds to `error` the device and guest range of the first cluster whose data ends beyond the
    /// first `available` bytes of the extent, header included.
    fn locate_first_lost(&self, error: Error, available: u64) -> Error {
        let mut end = EXTENT_HEADER as u64;
        let lost = self.slots.iter().find(|slot| {
            end += u64::from(slot.stored()) * SUB_BLOCK;
            end > available
        });
        let Some(slot) = lost else { return error };
        let Some(device) = self.header.device(DeviceId(u32::from(slot.dev_id))) else { return error };
        let start = u64::from(slot.cluster_num) * CLUSTER;
        error.device(&device.name).guest(start..(start + CLUSTER).min(device.size.max(start)))
    }
}
