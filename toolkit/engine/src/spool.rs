//! Copies of streams in temporary storage, with their progress.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_core::{Lane, Result};
use imgtool_storage::open::OpenInput;

use crate::monitor::{Monitor, Phase};
use crate::work::{Gauge, LaneInfo, Part};

/// Copies a stream to temporary storage, so that it can be read by position. Returns any other input
/// unchanged.
///
/// # Errors
/// Same as [`OpenInput::spool`].
pub(crate) fn spool(open: OpenInput, monitor: &dyn Monitor) -> Result<OpenInput> {
    if !open.input.is_stream() {
        return Ok(open);
    }
    let lane = LaneInfo { name: open.input.location().name().into_owned(), total: None };
    let part = Part::of_stream(Lane(0), open.input.consumed(), open.stored_len);
    let stored = Arc::new(AtomicU64::new(0));
    let written = Arc::clone(&stored);
    let gauge = Gauge::new(vec![lane], vec![part], Box::new(move || written.load(Ordering::Relaxed)));
    let gauge = Arc::new(gauge);
    monitor.begin(Phase::Spool, &gauge);
    let spooled = open.spool_counted(&|copied| {
        stored.fetch_add(copied.guest.saturating_sub(copied.zero), Ordering::Relaxed);
        gauge.advance(Lane(0), copied);
        monitor.advance(Lane(0), copied.guest, copied.zero);
    })?;
    gauge.end_part();
    monitor.end();
    Ok(spooled)
}
