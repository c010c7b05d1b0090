//! [`Monitor`], which receives the events of a run.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use imgtool_core::sync::lock;
use imgtool_core::{Copied, Lane, Location, NoProgress, Progress, Result};
use imgtool_storage::Cleaner;
use imgtool_storage::os::DirectoryHandle;

use crate::rate_limit::RateLimit;
use crate::survey::{Survey, SurveyedDevice};
use crate::work::Gauge;

/// Phase of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Phase {
    /// Copying a stream to temporary storage, before its image can be opened.
    Spool,
    /// Copying content from sources to outputs.
    Convert,
    /// Reading finished outputs back.
    Verify,
    /// Comparing two images.
    Compare,
    /// Digesting content.
    Checksum,
}

/// Files that a run may still open by name when all sources and outputs are open.
#[derive(Debug, Clone, Default)]
pub struct Reach {
    /// Directories in which the run renames, replaces and removes files, but opens none. They are open, because
    /// another process may move them.
    pub files: Vec<Arc<DirectoryHandle>>,
    /// Those of `files` in which an empty file reserves the name of an output, so that the run creates files.
    pub reserved: Vec<Arc<DirectoryHandle>>,
    /// Directories in which the run has created directories, which it removes if it fails.
    pub parents: Vec<Arc<DirectoryHandle>>,
    /// Files and directories that verification may read: backing images of the outputs.
    pub reads: BTreeSet<PathBuf>,
}

/// Receives the events of a run. Every method has a default.
pub trait Monitor: Sync {
    /// Called when a phase begins. With verification, a run has two phases, and one more before them for each
    /// stream that is copied to temporary storage. A display can poll the progress from `gauge` at any time.
    fn begin(&self, _phase: Phase, _gauge: &Arc<Gauge>) {}

    /// True if the monitor polls the work of a phase ([`Gauge::work`]). The run then adds up the extents of the
    /// images in the background, to know how much data they have.
    fn polls_work(&self) -> bool {
        true
    }

    /// Called for each piece, by many threads at once, so it must be fast. `len` more guest bytes were
    /// copied; `zero` of them were zeros without data.
    fn advance(&self, _lane: Lane, _len: u64, _zero: u64) {}

    /// Called when the current phase is complete, but not if it fails.
    fn end(&self) {}

    /// Called before the first output is created. `cleaner` removes unfinished outputs, for a signal handler
    /// that has no time to unwind.
    fn outputs(&self, _cleaner: Cleaner) {}

    /// Called before the first output is created, with a note that may make the user stop the run.
    fn warn(&self, _note: &str) {}

    /// Called when all sources and outputs are open, before their content is copied or compared, in the thread
    /// of the caller. From here on, the run opens no file outside of `reach`, and starts most of its threads.
    fn opened(&self, _reach: &Reach) {}

    /// Runs `step`, which gives the outputs their names and which a signal handler must not interrupt. The
    /// default calls it; the run fails if a monitor does not.
    fn name_outputs(&self, step: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        step()
    }

    /// Called if the run failed after it had begun to overwrite `target` in place.
    fn left_incomplete(&self, _target: &Location) {}
}

impl fmt::Debug for dyn Monitor + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Monitor")
    }
}

/// A monitor that ignores everything.
impl Monitor for NoProgress {
    fn polls_work(&self) -> bool {
        false
    }
}

/// Counts the progress of a phase, passes it to the monitor, and limits the speed.
pub(crate) struct Counter<'a> {
    monitor: &'a dyn Monitor,
    gauge: Arc<Gauge>,
    limit: Option<&'a RateLimit>,
    survey: Mutex<Option<Survey>>,
}

impl<'a> Counter<'a> {
    /// Begins a phase.
    pub(crate) fn begin(
        monitor: &'a dyn Monitor,
        phase: Phase,
        gauge: Gauge,
        limit: Option<&'a RateLimit>,
    ) -> Self {
        let gauge = Arc::new(gauge);
        monitor.begin(phase, &gauge);
        Self { monitor, gauge, limit, survey: Mutex::new(None) }
    }

    /// Adds up the data of the devices in the background, if the monitor wants to know it.
    pub(crate) fn survey(&self, devices: Vec<SurveyedDevice>) {
        if self.monitor.polls_work() && !devices.is_empty() {
            *lock(&self.survey) = Some(Survey::start(devices, Arc::clone(&self.gauge)));
        }
    }

    /// Returns the counts of a lane; see [`Gauge::count`].
    pub(crate) fn totals(&self, lane: Lane) -> (u64, u64) {
        self.gauge.count(lane)
    }

    /// Returns the number of guest bytes of all lanes that were read as data.
    pub(crate) fn data(&self) -> u64 {
        Lane::first(self.gauge.lanes().len()).map(|lane| self.gauge.data(lane)).sum()
    }

    /// Counts data that was read for the lane `index`, but not copied.
    pub(crate) fn read_beside(&self, index: usize, data: u64) {
        let lane = u32::try_from(index).map(Lane);
        let _ = lane.map(|lane| self.gauge.advance(lane, Copied { data, ..Copied::default() }));
    }

    /// Ends the current part of the phase: one image is read.
    pub(crate) fn end_part(&self) {
        self.gauge.end_part();
    }
}

impl Progress for Counter<'_> {
    fn advance(&self, lane: Lane, copied: Copied) {
        self.gauge.advance(lane, copied);
        self.monitor.advance(lane, copied.guest, copied.zero);
    }

    fn streamed(&self, lane: Option<Lane>, read: Copied, spent: Duration) {
        let begun = Instant::now();
        if lane.is_none() {
            // A copied piece is limited on its way to the target.
            self.throttle(read.data);
        }
        self.gauge.streamed(lane.is_some(), read.guest, spent + begun.elapsed());
    }

    fn throttle(&self, data: u64) {
        if let Some(limit) = self.limit {
            limit.wait(data);
        }
    }
}
