//! Counters for the lines of `-v` while an archive is created: progress, and the zeros of each disk.

use std::sync::Mutex;

use imgtool_core::error::escape_control;
use imgtool_core::sync::lock;
use imgtool_core::{Device, Lane, SinkPiece};
use imgtool_engine::pipeline::Tap;
use imgtool_vma::layout::{CLUSTER, SUB_BLOCK};

use super::output;

/// Unit in bytes of the sizes in an archive.
const SECTOR: u64 = 512;

/// Counts the bytes and the zeros on their way into the archive. The figures are those of the reference
/// program: sizes are whole sectors, and zeros are the sub-blocks that it does not store, up to the end of
/// the last cluster.
pub(super) struct Percent {
    devices: Vec<(String, u64)>,
    total: u64,
    state: Mutex<State>,
}

/// Progress so far, in guest bytes; `zeros` counts per device.
struct State {
    done: u64,
    percent: u64,
    zeros: Vec<u64>,
}

impl Percent {
    pub(super) fn new(devices: &[Device]) -> Self {
        let sized = |device: &Device| (device.name.clone(), device.size.next_multiple_of(SECTOR));
        let devices: Vec<_> = devices.iter().map(sized).collect();
        let total = devices.iter().map(|(_, size)| size).sum();
        let zeros = vec![0; devices.len()];
        Self { devices, total, state: Mutex::new(State { done: 0, percent: 0, zeros }) }
    }

    /// Prints the line before the first byte.
    pub(super) fn start(&self) {
        if self.total > 0 {
            output::say(&format!("progress 0% 0/{} 0", self.total));
        }
    }

    /// Prints the line of each device after the last byte.
    pub(super) fn summary(&self) {
        let state = lock(&self.state);
        for ((name, size), zeros) in self.devices.iter().zip(&state.zeros) {
            let saved = i128::from(*size) - i128::from(*zeros);
            let name = escape_control(name);
            output::say(&format!("image {name}: size={size} zeros={zeros} saved={saved}"));
        }
    }
}

impl Tap for Percent {
    fn granule(&self) -> u64 {
        CLUSTER
    }

    fn piece(&self, lane: Lane, piece: &SinkPiece) {
        let blocks = |run: &std::ops::Range<usize>| {
            (run.end as u64).div_ceil(SUB_BLOCK) - run.start as u64 / SUB_BLOCK
        };
        let runs = piece.nonzero_runs(SUB_BLOCK as usize);
        let stored = runs.iter().map(blocks).sum::<u64>() * SUB_BLOCK;
        let mut state = lock(&self.state);
        // Cannot overflow: an archive has at most 254 disks of 2^48 bytes.
        state.done += piece.len.next_multiple_of(SECTOR);
        if let Some(zeros) = state.zeros.get_mut(lane.index()) {
            *zeros += piece.len.next_multiple_of(CLUSTER).saturating_sub(stored);
        }
        let percent = (state.done * 100).checked_div(self.total).unwrap_or(100);
        if percent != state.percent {
            state.percent = percent;
            let zero: u64 = state.zeros.iter().sum();
            output::say(&format!("progress {percent}% {}/{} {zero}", state.done, self.total));
        }
    }
}
