//! Converts an image with a progress callback; Ctrl-C cancels it and leaves no file behind.
//!
//! ```sh
//! cargo run --release --example convert -- fixtures/sparse.vma target/sparse.qcow2
//! cargo run --release --example convert -- fixtures/two-disks.vma.zst target/efi.vhdx drive-efidisk0
//! ```
//!
//! The extension of the target selects its format.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use imgtool::{CancelToken, Gauge, Lane, Monitor, Phase, Report, Result};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

/// Shows the progress of a conversion in percent.
struct Percent<F: Fn(u64) + Sync> {
    total: AtomicU64,
    done: AtomicU64,
    show: F,
}

impl<F: Fn(u64) + Sync> Monitor for Percent<F> {
    fn begin(&self, _phase: Phase, gauge: &Arc<Gauge>) {
        self.done.store(0, Ordering::Relaxed);
        self.total.store(gauge.lanes().filter_map(|lane| lane.total).sum(), Ordering::Relaxed);
    }

    /// Adds the guest bytes of a piece. Worker threads call this method concurrently.
    fn advance(&self, _lane: Lane, len: u64, _zero: u64) {
        let before = self.done.fetch_add(len, Ordering::Relaxed);
        let total = self.total.load(Ordering::Relaxed);
        let percent = |done: u64| done.saturating_mul(100).checked_div(total).unwrap_or(0);
        if percent(before + len) > percent(before) {
            (self.show)(percent(before + len));
        }
    }
}

/// Converts `from`, or only its disk `disk`, into the new file `to`. `show` receives the progress in percent.
fn convert(
    from: &Path,
    to: &Path,
    disk: Option<&str>,
    show: impl Fn(u64) + Sync,
    cancel: CancelToken,
) -> Result<Report> {
    let percent = Percent { total: AtomicU64::new(0), done: AtomicU64::new(0), show };
    let mut conversion = imgtool::convert(from, to).monitor(&percent).cancelled_by(cancel);
    if let Some(disk) = disk {
        conversion = conversion.disk(disk);
    }
    conversion.run()
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (from, to, disk) = match args.as_slice() {
        [from, to] => (from, to, None),
        [from, to, disk] => (from, to, Some(disk.as_str())),
        _ => {
            eprintln!("usage: convert SOURCE TARGET [DISK]");
            return ExitCode::from(2);
        }
    };
    let cancel = CancelToken::new();
    let on_signal = cancel.clone();
    match Signals::new([SIGINT]) {
        Ok(mut signals) => {
            std::thread::spawn(move || signals.forever().for_each(|_| on_signal.cancel()));
        }
        Err(error) => eprintln!("cannot handle Ctrl-C, which will leave an unfinished file: {error}"),
    }
    let show = |percent| eprint!("\r{percent:3} %");
    match convert(Path::new(from), Path::new(to), disk, show, cancel) {
        Ok(report) => {
            let disks = report.outputs.iter().flat_map(|output| &output.disks);
            let zero: u64 = disks.map(|disk| disk.zero).sum();
            eprintln!("\r{to}: {} bytes, {zero} of them zero", report.virtual_size());
            ExitCode::SUCCESS
        }
        Err(error) => {
            // The alternate form adds the cause: the message of the operating system.
            eprintln!("\r{error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgtool::ErrorKind;
    use imgtool_testing::fixture;

    #[test]
    fn progress_ends_at_100_percent() {
        let directory = tempfile::tempdir().expect("a directory");
        let to = directory.path().join("efi.raw");
        let last = AtomicU64::new(0);
        let show = |percent| {
            last.fetch_max(percent, Ordering::Relaxed);
        };
        let from = fixture("two-disks.vma.zst");
        let report = convert(&from, &to, Some("drive-efidisk0"), show, CancelToken::new()).expect("converts");
        assert_eq!(report.virtual_size(), 540_672);
        assert_eq!(std::fs::metadata(&to).expect("the target").len(), 540_672);
        assert_eq!(last.into_inner(), 100);
    }

    #[test]
    fn callback_can_cancel_the_conversion() {
        let directory = tempfile::tempdir().expect("a directory");
        let to = directory.path().join("scsi.qcow2");
        let cancel = CancelToken::new();
        let on_progress = cancel.clone();
        let from = fixture("two-disks.vma.zst");
        let stopped = convert(&from, &to, Some("drive-scsi0"), move |_| on_progress.cancel(), cancel);
        assert_eq!(stopped.expect_err("it was cancelled").kind(), ErrorKind::Cancelled);
        let left = std::fs::read_dir(directory.path()).expect("list").count();
        assert_eq!(left, 0, "no file is left under any name");
    }
}
