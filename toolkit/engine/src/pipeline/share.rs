//! Shares blocks instead of copying them, on file systems with reflinks (XFS, btrfs, bcachefs).
//!
//! If the output stores every guest byte at its guest offset ([`Sharing::Whole`]), whole extents are shared
//! and nothing is read. Zeros allocated in the source are then allocated in the output. For other outputs
//! ([`Sharing::Parts`]), the kernel shares the bytes of a write if a file of the source stores them verbatim.
//! The output has the same bytes as after a copy.

use std::ops::Range;

use imgtool_core::source::for_each_extent;
use imgtool_core::{
    Copied, Device, DeviceId, Error, Extent, FileWrite, Output, OutputId, Prepared, RandomAccess, Result,
    ResultExt, Sharing,
};
use imgtool_storage::os;

use super::target::Targets;
use super::{Route, Totals};

/// Maximum number of bytes shared in one call. Our choice: the user can cancel between calls.
const SHARE_STEP: u64 = 1 << 30;

/// Maximum number of bytes copied at a time where sharing is not available. Our choice.
const COPY_STEP: u64 = 256 * 1024;

/// Alignment in bytes of shared ranges: the block size of file systems with reflinks, or a multiple of it.
const SHARE_ALIGNMENT: u64 = 4096;

/// Minimum length in bytes of a range to share. Our limit: copying a shorter range is faster.
const MIN_SHARE_LEN: u64 = 32 << 10;

/// Shares blocks in place of writes, for the routes that allow it.
#[derive(Default)]
pub(super) struct BlockSharing<'a> {
    source: Option<&'a dyn RandomAccess>,
    /// Routes whose source and output can share blocks.
    routes: Vec<(Route, OutputId)>,
}

impl<'a> BlockSharing<'a> {
    /// Selects the routes whose source and output can share blocks.
    pub(super) fn new(source: &'a dyn RandomAccess, targets: &Targets<'_>, devices: &[Device]) -> Self {
        let works = |route: &Route| {
            let device = devices.iter().find(|device| device.id == route.from)?;
            let Sharing::Parts(output) = targets.sharing(*route) else { return None };
            let file = output_of(targets, *route, output)?;
            can_share(source, file, device).then_some((*route, output))
        };
        let routes = targets.job().routes.iter().filter_map(works).collect();
        Self { source: Some(source), routes }
    }

    /// Shares the bytes at `range` of the piece with `output`, at the file offset of `write`. Returns false
    /// if the caller has to write them.
    pub(super) fn share(
        &self,
        target: usize,
        prepared: &Prepared,
        range: &Range<usize>,
        output: &Output,
        write: &FileWrite,
    ) -> Result<bool> {
        let (Some(source), Some(file)) = (self.source, output.file()) else { return Ok(false) };
        let is_shared = |(route, id): &&(Route, OutputId)| {
            route.target == target && route.to == prepared.device && *id == write.output
        };
        let Some(from) = self.routes.iter().find(is_shared).map(|(route, _)| route.from) else {
            return Ok(false);
        };
        let file_offset = write.file_offset;
        let len = range.len() as u64;
        let aligned = len.is_multiple_of(SHARE_ALIGNMENT) && file_offset.is_multiple_of(SHARE_ALIGNMENT);
        if !aligned || len < MIN_SHARE_LEN {
            return Ok(false);
        }
        let guest = prepared.start + range.start as u64..prepared.start + range.end as u64;
        let location = source.locate(from, guest);
        let Some(location) =
            location.filter(|p| p.len >= len && p.file_offset.is_multiple_of(SHARE_ALIGNMENT))
        else {
            return Ok(false);
        };
        let mut done = 0;
        while done < range.len() {
            let (from_offset, to_offset) = (location.file_offset + done as u64, file_offset + done as u64);
            let shared = os::copy_range(location.file, from_offset, file, to_offset, range.len() - done)
                .map_err(|e| Error::io("share or copy blocks", e).path(output.location()).at(to_offset))?;
            if shared == 0 {
                // The caller writes the whole range, so the shared part gets the same bytes again.
                return Ok(false);
            }
            done += shared;
        }
        output.count_written(len);
        Ok(true)
    }
}

fn output_of<'a>(targets: &Targets<'a>, route: Route, output: OutputId) -> Option<&'a Output> {
    targets.output_index(route.target, output).map(|index| targets.outputs()[index])
}

/// Shares the blocks of every device whose route allows it. Returns their totals, and the indices of the
/// routes left to copy.
pub(super) fn share_blocks(
    source: &dyn RandomAccess,
    targets: &Targets<'_>,
    devices: &[Device],
) -> Result<(Totals, Vec<usize>)> {
    let mut totals = Totals::default();
    let mut left = Vec::new();
    for (index, route) in targets.job().routes.iter().enumerate() {
        let device = devices.iter().find(|device| device.id == route.from);
        let output = match targets.sharing(*route) {
            Sharing::Whole(output) => output_of(targets, *route, output),
            Sharing::Never | Sharing::Parts(_) => None,
        };
        match device.zip(output) {
            Some((device, output)) if can_share(source, output, device) => {
                let job = DeviceShare { source, output, device: device.id };
                totals = totals + job.run(device.size, *route, targets).on_device(&device.name)?;
            }
            _ => left.push(index),
        }
    }
    Ok((totals, left))
}

/// True if the device's data is in a file that can share blocks with the output.
///
/// Checks only the first extent of data: an image is usually on one file system, and the kernel copies a
/// range that it can't share.
fn can_share(source: &dyn RandomAccess, output: &Output, device: &Device) -> bool {
    // Check this first: querying extents may take a long time.
    let Some(output) = output.file().filter(|file| os::shares_blocks(file)) else {
        return false;
    };
    let whole = 0..device.size;
    !whole.is_empty()
        && source.extents(device.id, whole).is_ok_and(|extents| {
            extents.iter().find(|extent| extent.is_data()).is_some_and(|extent| {
                source
                    .locate(device.id, extent.range())
                    .is_some_and(|location| os::can_share_blocks(location.file, output))
            })
        })
}

/// Shares the blocks of one device with one output.
struct DeviceShare<'a> {
    source: &'a dyn RandomAccess,
    output: &'a Output,
    device: DeviceId,
}

impl DeviceShare<'_> {
    fn run(&self, size: u64, route: Route, targets: &Targets<'_>) -> Result<Totals> {
        let job = targets.job();
        let mut totals = Totals::default();
        for_each_extent(self.source, self.device, 0..size, |extent| {
            job.cancel.check()?;
            let data = if extent.is_data() { extent.len } else { 0 };
            let copied = Copied { guest: extent.len, data, zero: extent.len - data };
            if extent.is_data() {
                job.progress.throttle(data);
                self.extent(extent, targets)?;
            }
            totals = totals + Totals { guest_bytes: copied.guest, zero_bytes: copied.zero };
            job.progress.advance(route.lane, copied);
            Ok(())
        })?;
        Ok(totals)
    }

    /// Shares one extent. Copies the parts that no file stores verbatim (compressed clusters).
    fn extent(&self, extent: Extent, targets: &Targets<'_>) -> Result<()> {
        let mut buffer = Vec::new();
        let mut at = extent.start;
        while at < extent.end() {
            targets.job().cancel.check()?;
            let len = (extent.end() - at).min(SHARE_STEP);
            let shared = self.share(at, len)?;
            if shared > 0 {
                self.output.count_written(shared);
                at += shared;
                continue;
            }
            let len = len.min(COPY_STEP);
            buffer.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
            self.source.read_at(self.device, &mut buffer, at).map_err(|e| e.guest(at..at + len))?;
            self.output.write_at(&buffer, at)?;
            at += len;
        }
        Ok(())
    }

    /// Shares at most `len` bytes from guest offset `at` on. Returns the number of bytes shared.
    fn share(&self, at: u64, len: u64) -> Result<u64> {
        let place = self.source.locate(self.device, at..at + len);
        let (Some(place), Some(file)) = (place, self.output.file()) else { return Ok(0) };
        let len = usize::try_from(place.len.min(len)).unwrap_or(usize::MAX);
        let shared = os::copy_range(place.file, place.file_offset, file, at, len)
            .map_err(|e| Error::io("share or copy blocks", e).path(self.output.location()).at(at))?;
        Ok(shared as u64)
    }
}
