//! Counters for the lines of `-v` while an archive is read: progress, and the share of sparse bytes.

use std::sync::Mutex;
use std::time::Instant;

use imgtool_core::sync::lock;
use imgtool_core::{Device, Lane, SinkPiece};
use imgtool_engine::pipeline::Tap;
use imgtool_vma::layout::{CLUSTER, SUB_BLOCK};

use super::{is_state, output};

/// Unit in bytes in which the reference program counts the size of a disk.
const SECTOR: u64 = 512;

/// Number of 4 KiB sub-blocks in a cluster.
const BLOCKS: u64 = CLUSTER / SUB_BLOCK;

/// Counts clusters and sub-blocks on their way to the outputs.
pub(super) struct Tally {
    started: Instant,
    /// Number of clusters of all devices to read, including incomplete last clusters. The reference program
    /// does not count these, so its progress can exceed 100 %, and it divides by zero if there are no others.
    all_clusters: u64,
    /// Ends of the devices in bytes, by lane. Guest state has none: the reference program does not cut it.
    ends: Vec<Option<u64>>,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    clusters: u64,
    zero_clusters: u64,
    /// Number of zero bytes in unstored sub-blocks of clusters that also have stored ones, up to the end of
    /// the device.
    partly_zero: u64,
    percent: u64,
}

impl Tally {
    /// Creates a tally for these devices.
    pub(super) fn new<'a>(devices: impl IntoIterator<Item = &'a Device>) -> Self {
        let devices: Vec<&Device> = devices.into_iter().collect();
        let all_clusters = devices.iter().map(|device| device.size.div_ceil(CLUSTER)).sum();
        // The reference program counts in whole sectors.
        let end = |device: &&Device| (!is_state(device.kind)).then_some(device.size / SECTOR * SECTOR);
        let ends = devices.iter().map(end).collect();
        Self { started: Instant::now(), all_clusters, ends, counts: Mutex::default() }
    }

    /// Returns the lines with the totals, to print at the end. `absent` is the number of clusters that the
    /// archive lacks, at the end of guest state.
    pub(super) fn totals(&self, absent: u64) -> String {
        let counts = lock(&self.counts);
        let clusters = counts.clusters.saturating_sub(absent);
        if clusters == 0 {
            return "vma archive contains no image data\n".to_owned();
        }
        let read = clusters * CLUSTER;
        let beside = counts.partly_zero;
        let sparse = counts.zero_clusters.saturating_sub(absent) * CLUSTER + beside;
        let data = read - sparse;
        let share = |part: u64, whole: u64| three_digits(part as f64 * 100.0 / whole as f64);
        let mut text = format!("total bytes read {read}, sparse bytes {sparse} ({}%)\n", share(sparse, read));
        if data > 0 {
            text.push_str(&format!("space reduction due to 4K zero blocks {}%\n", share(beside, data)));
        }
        text
    }
}

/// Formats a number like `%.3g` in C: three significant digits without trailing zeros, with an exponent below
/// 0.0001 and from 1000 on.
fn three_digits(number: f64) -> String {
    let scientific = format!("{number:.2e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else { return scientific };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let trimmed = |text: &str| match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if (-4..3).contains(&exponent) {
        let decimals = (2 - exponent) as usize;
        return trimmed(&format!("{number:.decimals$}"));
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{}e{sign}{:02}", trimmed(mantissa), exponent.abs())
}

impl Tap for Tally {
    fn granule(&self) -> u64 {
        CLUSTER
    }

    fn piece(&self, lane: Lane, piece: &SinkPiece) {
        let clusters = piece.len.div_ceil(CLUSTER);
        let end = self.ends.get(lane.index()).copied().flatten();
        let (zero_clusters, partly_zero) = match piece.data {
            Some(_) => zeros(piece, end),
            None => (clusters, 0),
        };
        let mut counts = lock(&self.counts);
        counts.zero_clusters += zero_clusters;
        counts.partly_zero += partly_zero;
        let reached = counts.clusters + clusters;
        self.print_percents(&mut counts, reached);
        counts.clusters = reached;
    }
}

impl Tally {
    /// Prints a line for each cluster that changes the percentage.
    fn print_percents(&self, counts: &mut Counts, reached: u64) {
        let mut text = String::new();
        let seconds = self.started.elapsed().as_secs();
        // Sizes have at most 48 bits, so this can't overflow.
        let next = |percent: u64| ((percent + 1) * self.all_clusters).div_ceil(100);
        // Without any cluster, `next` is 0 and no line is printed.
        while (1..=reached).contains(&next(counts.percent)) {
            let at = next(counts.percent);
            counts.percent = at * 100 / self.all_clusters;
            let bytes = at * CLUSTER;
            text.push_str(&format!(
                "progress {}% (read {bytes} bytes, duration {seconds} sec)\n",
                counts.percent
            ));
        }
        if !text.is_empty() {
            // If this write fails, printing the totals fails as well.
            let _ = output::print(&text);
        }
    }
}

/// Returns the number of all-zero clusters in a piece, and the number of zero bytes in unstored sub-blocks of
/// its other clusters, up to the `end` of the device.
fn zeros(piece: &SinkPiece, end: Option<u64>) -> (u64, u64) {
    let clusters = usize::try_from(piece.len.div_ceil(CLUSTER)).unwrap_or(0);
    let mut masks = vec![0u64; clusters];
    for run in &piece.runs {
        let first = run.start as u64 / SUB_BLOCK;
        let last = (run.end as u64).div_ceil(SUB_BLOCK);
        for block in first..last {
            if let Some(mask) = masks.get_mut((block / BLOCKS) as usize) {
                *mask |= 1 << (block % BLOCKS);
            }
        }
    }
    let unstored = |start: u64, mask: u64| -> u64 {
        let blocks = (0..BLOCKS).filter(|block| mask >> block & 1 == 0);
        blocks.map(|block| within(start + block * SUB_BLOCK, end)).sum()
    };
    (0..).zip(&masks).fold((0, 0), |(zero, beside), (cluster, mask)| match mask {
        0 => (zero + 1, beside),
        mask => (zero, beside + unstored(piece.start + cluster * CLUSTER, *mask)),
    })
}

/// Returns the number of bytes of the sub-block at `start` before the `end` of the device.
fn within(start: u64, end: Option<u64>) -> u64 {
    end.map_or(SUB_BLOCK, |end| end.saturating_sub(start).min(SUB_BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_three_significant_digits() {
        for (number, text) in [
            (61.528, "61.5"),
            (0.0, "0"),
            (100.0, "100"),
            (5.254, "5.25"),
            (5.0, "5"),
            (999.4, "999"),
            (999.6, "1e+03"),
            (1234.5, "1.23e+03"),
            (1e12, "1e+12"),
            (0.1234, "0.123"),
            (0.00001234, "1.23e-05"),
        ] {
            assert_eq!(three_digits(number), text);
        }
    }
}
