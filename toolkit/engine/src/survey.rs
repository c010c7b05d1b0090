//! Survey: a background thread that adds up the data in the extents of images, so that a display knows how
//! much work a phase is. The copy does not wait for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use imgtool_core::extent::check_answer;
use imgtool_core::{DeviceId, ImageSource, Lane};

use crate::work::Gauge;

/// Maximum number of guest bytes in one query. Our limit: the answer for a disk of scattered or damaged
/// tables takes a moment, and the end of the phase waits for it.
const STEP: u64 = 64 << 30;

/// A device whose data is added to the expected work of a lane.
pub(crate) struct SurveyedDevice {
    pub(crate) lane: Lane,
    pub(crate) image: Arc<dyn ImageSource>,
    pub(crate) device: DeviceId,
    /// Number of guest bytes to survey, from the start of the device.
    pub(crate) size: u64,
    /// Resolution in bytes with which the copy queries the extents; `None` if it needs the exact ones.
    pub(crate) resolution: Option<u64>,
}

/// A running survey. Dropping it stops it.
#[derive(Debug)]
pub(crate) struct Survey {
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Survey {
    /// Starts to survey the devices, lane by lane: all devices of a lane are neighbours in the list. If the
    /// system refuses to create a thread, the expected work stays unknown.
    pub(crate) fn start(devices: Vec<SurveyedDevice>, gauge: Arc<Gauge>) -> Self {
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        let work = move || {
            for lane in devices.chunk_by(|one, next| one.lane == next.lane) {
                let mut data = lane.iter().map(|device| data_bytes(device, &stop));
                let sum = data.try_fold(0u64, |sum, data| data.map(|data| sum.saturating_add(data)));
                if let (Some(sum), Some(first)) = (sum, lane.first()) {
                    gauge.expect(first.lane, sum);
                }
            }
        };
        Self { stopped, thread: std::thread::Builder::new().spawn(work).ok() }
    }
}

impl Drop for Survey {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic of a driver is reported by the worker that runs into it.
            let _ = thread.join();
        }
    }
}

/// Returns the number of data bytes of a device; `None` if the survey was stopped, or an extent can't be
/// read: the copy reports the error.
fn data_bytes(surveyed: &SurveyedDevice, stop: &AtomicBool) -> Option<u64> {
    let random = surveyed.image.access().random()?;
    let (mut position, mut data) = (0, 0u64);
    while position < surveyed.size {
        if stop.load(Ordering::Relaxed) {
            return None;
        }
        let range = position..position.saturating_add(STEP).min(surveyed.size);
        let answer = match surveyed.resolution {
            Some(resolution) => random.rough_extents(surveyed.device, range.clone(), resolution),
            None => random.extents(surveyed.device, range.clone()),
        };
        for extent in check_answer(answer.ok()?, range).ok()? {
            data = data.saturating_add(if extent.is_data() { extent.len } else { 0 });
            position = extent.end();
        }
    }
    Some(data)
}
