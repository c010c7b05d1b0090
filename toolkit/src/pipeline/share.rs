//! Sharing blocks instead of copying, on a file system that can make two files share blocks (XFS,
//! btrfs).
//!
//! Where the output is the guest's bytes and nothing else ([`ImageSink::is_verbatim`]), whole extents
//! are shared and nothing is read, so zeros that the source has allocated stay allocated (and shared).
//! Other outputs are made as ever, but a write of bytes that stand in the source's file as they are
//! becomes a request to share them ([`Sharing`]): the same bytes in the same places.

use std::ops::Range;

use crate::device::{Device, DeviceId};
use crate::error::{Error, Result, ResultExt};
use crate::extent::Extent;
use crate::pipeline::{Job, Route, Totals};
use crate::sink::{ImageSink, Prepared};
use crate::source::RandomAccess;
use crate::storage::{Output, os};

/// Bytes shared in one call: between calls the work can be cancelled. Ours.
const STEP: u64 = 1 << 30;

/// Bytes read and written at a time where sharing does not work.
const COPY: u64 = 256 * 1024;

/// What shared ranges begin and end with: the block of every such file system, or a multiple of it.
const UNIT: u64 = 4096;

/// Shortest range that is shared. Ours: for less, the request costs more than the copy.
const SHORTEST: u64 = 32 << 10;

/// Turns writes into requests to share, device by device.
#[derive(Default)]
pub(super) struct Sharing<'a> {
    source: Option<&'a dyn RandomAccess>,
    /// Source's device and sink's device.
    routes: Vec<Route>,
}

impl<'a> Sharing<'a> {
    /// For the routes whose source and output can share blocks.
    pub(super) fn new(
        source: &'a dyn RandomAccess,
        sink: &dyn ImageSink,
        devices: &[Device],
        routes: &[Route],
    ) -> Self {
        let works = |route: &&Route| {
            let device = devices.iter().find(|device| device.id == route.from);
            device
                .is_some_and(|device| sink.keeps_bytes(route.to) && can_share(source, sink, device, **route))
        };
        Self { source: Some(source), routes: routes.iter().filter(works).copied().collect() }
    }

    /// Lets `output` share, from `file_offset` on, what stands at `range` of the piece; false when it
    /// has to be written.
    pub(super) fn share(
        &self,
        prepared: &Prepared,
        range: &Range<usize>,
        output: &Output,
        file_offset: u64,
    ) -> Result<bool> {
        let (Some(source), Some(file)) = (self.source, output.file()) else { return Ok(false) };
        let Some(from) = self.from(prepared.device) else { return Ok(false) };
        let len = range.len() as u64;
        let aligned = len.is_multiple_of(UNIT) && file_offset.is_multiple_of(UNIT);
        if !aligned || len < SHORTEST {
            return Ok(false);
        }
        let guest = prepared.start + range.start as u64..prepared.start + range.end as u64;
        let place = source.locate(from, guest);
        let Some(place) = place.filter(|p| p.len >= len && p.file_offset.is_multiple_of(UNIT)) else {
            return Ok(false);
        };
        let mut done = 0;
        while done < range.len() {
            let (there, here) = (place.file_offset + done as u64, file_offset + done as u64);
            let shared = os::copy_range(place.file, there, file, here, range.len() - done)
                .map_err(|e| Error::io("share or copy blocks", e).path(output.path()).at(here))?;
            if shared == 0 {
                // What has been shared is written over with the same bytes.
                return Ok(false);
            }
            done += shared;
        }
        output.count_written(len);
        Ok(true)
    }

    /// The source's device that goes to the sink's device `to`, if it can be shared.
    fn from(&self, to: DeviceId) -> Option<DeviceId> {
        self.routes.iter().find(|route| route.to == to).map(|route| route.from)
    }
}

/// Shares the blocks of every device for which that works; the routes that are left to be copied.
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

/// Whether all data of the device stands in files that can share blocks with the output.
///
/// Decided by its first data: an image lies in one file system, and what can't be shared after all
/// is copied by the kernel.
fn can_share(source: &dyn RandomAccess, sink: &dyn ImageSink, device: &Device, route: Route) -> bool {
    // Asked first: looking for extents may take long.
    let Some(output) = sink.output(route.to).file().filter(|file| os::shares_blocks(file)) else {
        return false;
    };
    let whole = 0..device.size;
    !whole.is_empty()
        && source.extents(device.id, whole).is_ok_and(|extents| {
            extents.iter().find(|extent| extent.is_data()).is_some_and(|extent| {
                source
                    .locate(device.id, extent.range())
                    .is_some_and(|place| os::can_share_blocks(place.file, output))
            })
        })
}

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

/// Shares one extent; parts that stand nowhere as they are (compressed ones) are read and written.
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
        let wanted = (extent.end() - at).min(STEP);
        let place = source.locate(device.id, at..at + wanted);
        let shared = match (place, output.file()) {
            (Some(place), Some(file)) => {
                let len = usize::try_from(place.len.min(wanted)).unwrap_or(usize::MAX);
                os::copy_range(place.file, place.file_offset, file, at, len)
                    .map_err(|e| Error::io("share or copy blocks", e).path(output.path()).at(at))?
            }
            _ => 0,
        };
        if shared > 0 {
            output.count_written(shared as u64);
            at += shared as u64;
            continue;
        }
        let len = wanted.min(COPY);
        buffer.resize(usize::try_from(len).unwrap_or(usize::MAX), 0);
        source.read_at(device.id, &mut buffer, at).map_err(|e| e.guest(at..at + len))?;
        output.write_at(&buffer, at)?;
        at += len;
    }
    Ok(())
}
