//! Walks over the extents of an archive and refuses everything that is not as it must be.
//!
//! Both ways of reading use it, so both accept and refuse the same archives with the same words: the
//! index skips the data, the stream reads it. The order of the checks is the reference program's.

use std::sync::Arc;

use imgtool_toolkit::{DeviceId, Error, OpenOptions, Result};

use crate::bytes::ArchiveBytes;
use crate::extent::{BlockInfo, ExtentHeader};
use crate::header::ArchiveHeader;
use crate::layout::{CLUSTER, CLUSTERS_PER_EXTENT, EXTENT_HEADER, MAX_BLOCK_COUNT, MAX_EXTENT, SUB_BLOCK};
use crate::tracker::{Placed, Tracker};

const DAMAGED: &str =
    "the archive is damaged here: copy it again, or use another backup; --salvage restores what is whole";
const CUT: &str =
    "the archive is cut short: copy it again, or use another backup; --salvage restores what is whole";
const TRAILING: &str = "every device is complete, so these are bytes after the end of the archive; --ignore-trailing accepts them";

/// The extent that was just entered; its data comes next.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Entered {
    /// Where its header is.
    pub(crate) file_offset: u64,
    /// Bytes of data after it.
    pub(crate) data_len: u64,
}

/// The walk.
pub(crate) struct Walker<B> {
    pub(crate) bytes: B,
    pub(crate) tracker: Tracker,
    /// The slots of the current extent that own something, in the order of their data.
    pub(crate) placed: Vec<Placed>,
    /// All slots of the current extent.
    slots: [BlockInfo; CLUSTERS_PER_EXTENT],
    header: Arc<ArchiveHeader>,
    ignore_trailing: bool,
}

impl<B: ArchiveBytes> Walker<B> {
    /// Starts behind the header, which has been read from `bytes`.
    pub(crate) fn new(bytes: B, header: &Arc<ArchiveHeader>, options: &OpenOptions) -> Self {
        Self {
            bytes,
            tracker: Tracker::new(&header.devices),
            placed: Vec::new(),
            slots: [BlockInfo::default(); CLUSTERS_PER_EXTENT],
            header: Arc::clone(header),
            ignore_trailing: options.ignore_trailing,
        }
    }

    /// Enters the next extent, whose data must be read or skipped before the next call; `None` at
    /// the end, when everything has come.
    pub(crate) fn enter(&mut self) -> Result<Option<Entered>> {
        let file_offset = self.bytes.position();
        let mut raw = [0; EXTENT_HEADER];
        let got = self.bytes.read_full(&mut raw)?;
        if got == 0 {
            self.tracker.check_complete()?;
            return Ok(None);
        }
        let parsed = if got < EXTENT_HEADER {
            Err(Error::corrupt(format!("read short extent ({got} bytes)")))
        } else {
            ExtentHeader::parse(&raw, self.header.uuid.as_bytes())
        };
        let may_end = self.ignore_trailing && self.tracker.is_complete();
        let extent = match parsed {
            // No extent is that long, so these are bytes behind the end as others are.
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
                let hint = if self.tracker.is_complete() {
                    TRAILING
                } else if got < EXTENT_HEADER {
                    CUT
                } else {
                    DAMAGED
                };
                return Err(error.at(file_offset).hint(hint));
            }
        };
        let entered = Entered { file_offset, data_len: extent.data_len() };
        self.slots = extent.slots;
        self.admit(&extent, entered)?;
        Ok(Some(entered))
    }

    /// Checks that the data is there, as far as that is known, and then the slots.
    fn admit(&mut self, extent: &ExtentHeader, entered: Entered) -> Result<()> {
        let known_short = self.bytes.remaining().is_some_and(|left| left < entered.data_len);
        if known_short || u64::from(extent.block_count) > MAX_BLOCK_COUNT {
            let longest = MAX_EXTENT - EXTENT_HEADER as u64;
            self.bytes.skip(entered.data_len.min(longest))?;
            return Err(self.short(entered));
        }
        if let Err(error) = self.tracker.admit(extent, &mut self.placed) {
            // A stream knows only now whether the data is there; that comes first.
            if self.bytes.skip(entered.data_len)? < entered.data_len {
                return Err(self.short(entered));
            }
            return Err(error.at(entered.file_offset).hint(DAMAGED));
        }
        Ok(())
    }

    /// The error for an extent whose data ended early: the bytes are where the data ended.
    pub(crate) fn short(&self, entered: Entered) -> Error {
        let there = self.bytes.position() - entered.file_offset;
        let needed = EXTENT_HEADER as u64 + entered.data_len;
        let hint = if needed > MAX_EXTENT { DAMAGED } else { CUT };
        let error = Error::corrupt(format!("short vma extent ({there} < {needed})"));
        self.first_lost(error, there).at(entered.file_offset).hint(hint)
    }

    /// Names the first cluster whose data is not among the first `there` bytes of the extent.
    fn first_lost(&self, error: Error, there: u64) -> Error {
        let mut end = EXTENT_HEADER as u64;
        let lost = self.slots.iter().find(|slot| {
            end += u64::from(slot.stored()) * SUB_BLOCK;
            end > there
        });
        let Some(slot) = lost else { return error };
        let Some(device) = self.header.device(DeviceId(u32::from(slot.dev_id))) else { return error };
        let start = u64::from(slot.cluster_num) * CLUSTER;
        error.device(&device.name).guest(start..(start + CLUSTER).min(device.size.max(start)))
    }
}
