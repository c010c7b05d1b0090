//! Block sharing instead of copying, on file systems with reflinks (XFS, btrfs, bcachefs).
//!
//! If the output holds the guest's bytes at their guest offsets ([`ImageSink::is_verbatim`]), whole
//! extents are shared and nothing is read. Zeros that the source has allocated then stay allocated (and
//! shared). For other outputs, a write of bytes that the source's file holds verbatim becomes a request
//! to share them ([`Sharing`]): the same bytes at the same offsets.

use std::ops::Range;

use crate::device::{Device, DeviceId};
use crate::error::{Error, Result, ResultExt};
use crate::extent::Extent;
use crate::pipeline::{Job, Route, Totals};
use crate::sink::{ImageSink, Prepared};
use crate::source::RandomAccess;
use crate::storage::{Output, os};

/// Most bytes shared in one call. Our choice: the user can cancel between calls.
const SHARE_STEP: u64 = 1 << 30;

/// Most bytes copied at a time where sharing is not available. Our choice.
const COPY_STEP: u64 = 256 * 1024;

/// Alignment of shared ranges, bytes: the block of such file systems, or a multiple of it.
const SHARE_ALIGNMENT: u64 = 4096;

/// Shortest range to share, bytes. Our limit: for less, the request takes longer than the copy.
const MIN_SHARE_LEN: u64 = 32 << 10;

/// Turns writes into requests to share, for the routes that allow it.
#[derive(Default)]
pub(super) struct Sharing<'a> {
    source: Option<&'a dyn RandomAccess>,
    /// The routes whose source and output can share blocks.
    routes: Vec<Route>,
}

impl<'a> Sharing<'a> {
    /// Selects the routes whose source and output can share blocks.
    pub(super) fn new(
        source: &'a dyn RandomAccess,
        sink: &dyn ImageSink,
        devices: &[Device],
        routes: &[Route],
    ) -> Self {
        let is_shareable = |route: &&Route| {
            let device = devices.iter().find(|device| device.id == route.from);
            device
                .is_some_and(|device| sink.keeps_bytes(route.to) && can_share(source, sink, device, **route))
        };
        Self { source: Some(source), routes: routes.iter().filter(is_shareable).copied().collect() }
    }

    /// Makes `output` share the bytes at `range` of the piece, from `file_offset` on. Returns false if they
    /// have to be written.
    pub(super) fn share(
        &self,
        prepared: &Prepared,
        range: &Range<usize>,
        output: &Output,
        file_offset: u64,
    ) -> Result<bool> {
        let (Some(source), Some(file)) = (self.source, output.file()) else { return Ok(false) };
        let Some(from) = self.source_device(prepared.device) else { return Ok(false) };
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
                .map_err(|e| Error::io("share or copy blocks", e).path(output.path()).at(to_offset))?;
            if shared == 0 {
                // The caller writes the whole range: the shared part gets the same bytes again.
                return Ok(false);
            }
            done += shared;
        }
        output.count_written(len);
        Ok(true)
    }

    /// Returns the source device of the shareable route to the sink device `to`.
    fn source_device(&self, to: DeviceId) -> Option<DeviceId> {
        self.routes.iter().find(|route| route.to == to).map(|route| route.from)
    }
}

/// Shares the blocks of every device whose route allows it. Returns their totals, and the routes left to
/// copy.
pub(super) fn share_blocks(
    source: &dyn RandomAccess,
    sink: &dyn ImageSink,
    devices: &[Device],
    routes: Vec<Route>,
    job: &Job<'_>,
) -> Result<(Totals, Vec<Route>)> {
    let mut totals = Totals::default();
    let mut left = Vec::new();
    for route in routes {
        let device = devices.iter().find(|device| device.id == route.from);
        match device.filter(|_| sink.is_verbatim(route.to)) {
            Some(device) if can_share(source, sink, device, route) => {
                totals = totals + share_device(source, sink, device, route, job).on_device(&device.name)?;
            }
            _ => left.push(route),
        }
    }
    Ok((totals, left))
}

/// True if the device's data lies in a file that can share blocks with the output.
///
/// The first extent of data decides: an image lies on one file system, and the kernel copies a range that
/// it can't share after all.
fn can_share(source: &dyn RandomAccess, sink: &dyn ImageSink, device: &Device, route: Route) -> bool {
    // Checked first: a query for extents may take long.
    let Some(output) = sink.output(route.to).file().filter(|file| os::shares_blocks(file)) else {
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

/// Shares all extents of a device.
fn share_device(
    source: &dyn RandomAccess,
    sink: &dyn ImageSink,
    device: &Device,
    route: Route,
    job: &Job<'_>,
) -> Result<Totals> {
    let mut totals = Totals::default();
    let mut position = 0;
    while position < device.size {
        for extent in source.extents(device.id, position..device.size)? {
            job.cancel.check()?;
            if extent.is_data() {
                share_extent(source, sink, device, route, extent, job)?;
            } else {
                totals.zero_bytes += extent.len;
            }
            totals.guest_bytes += extent.len;
            let zero = if extent.is_data() { 0 } else { extent.len };
            job.progress.advance(route.to, extent.len, zero);
            position = extent.end();
        }
    }
    Ok(totals)
}

/// Shares one extent. Parts that no file holds verbatim (compressed ones) are read and written.
fn share_extent(
    source: &dyn RandomAccess,
    sink: &dyn ImageSink,
    device: &Device,
    route: Route,
    extent: Extent,
    job: &Job<'_>,
) -> Result<()> {
    let output = sink.output(route.to);
    let mut buffer = Vec::new();
    let mut at = extent.start;
    while at < extent.end() {
        job.cancel.check()?;
        let step = (extent.end() - at).min(SHARE_STEP);
        let location = source.locate(device.id, at..at + step);
        let shared = match (location, output.file()) {
            (Some(location), Some(file)) => {
                let len = usize::try_from(location.len.min(step)).unwrap_or(usize::MAX);
                os::copy_range(location.file, location.file_offset, file, at, len)
                    .map_err(|e| Error::io("share or copy blocks", e).path(output.path()).at(at))?
            }
            _ => 0,
        };
        if shared > 0 {
            output.count_written(shared as u64);
            at += shared as u64;
            continue;
        }
        let len = step.min(COPY_STEP);
        buffer.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
        source.read_at(device.id, &mut buffer, at).map_err(|e| e.guest(at..at + len))?;
        output.write_at(&buffer, at)?;
        at += len;
    }
    Ok(())
}
