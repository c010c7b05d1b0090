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
use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_toolkit::{
    CancelToken, Conversion, DeviceId, Input, OpenOptions, Progress, Registry, Result, pipeline::Totals,
};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

/// The progress callback. Worker threads call it concurrently, with a number of guest bytes.
struct Percent<F: Fn(u64) + Sync> {
    total: u64,
    done: AtomicU64,
    show: F,
}

impl<F: Fn(u64) + Sync> Progress for Percent<F> {
    fn advance(&self, _device: DeviceId, len: u64, _zero: u64) {
        let before = self.done.fetch_add(len, Ordering::Relaxed);
        let percent = |done: u64| done.saturating_mul(100).checked_div(self.total).unwrap_or(0);
        if percent(before + len) > percent(before) {
            (self.show)(percent(before + len));
        }
    }
}

/// Converts `from`, or only its device `disk`, into the new file `to`.
fn convert(
    from: &Path,
    to: &Path,
    disk: Option<&str>,
    show: impl Fn(u64) + Sync,
    cancel: CancelToken,
) -> Result<Totals> {
    let mut registry = Registry::new();
    imgtool_qcow2::register(&mut registry);
    imgtool_vhdx::register(&mut registry);
    imgtool_vma::register(&mut registry);
    imgtool_raw::register(&mut registry);

    let mut opened = registry.open(Input::open(from)?, None, &OpenOptions::default())?;
    let driver = match registry.by_extension(&to.to_string_lossy()) {
        Some(driver) => driver,
        None => registry.get("raw")?,
    };
    let selected =
        opened.source.info().devices.iter().filter(|device| disk.is_none_or(|disk| device.name == disk));
    let progress = Percent { total: selected.map(|device| device.size).sum(), done: AtomicU64::new(0), show };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut conversion = Conversion::new(&*driver).threads(threads).progress(&progress).cancel(cancel);
    if let Some(disk) = disk {
        conversion = conversion.disk(disk);
    }
    conversion.to_file(&mut *opened.source, to)
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
        Ok(totals) => {
            eprintln!("\r{to}: {} bytes, {} of them zero", totals.guest_bytes, totals.zero_bytes);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("\r{error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgtool_toolkit::ErrorKind;
    use std::path::PathBuf;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
    }

    #[test]
    fn progress_ends_at_100_percent() {
        let directory = tempfile::tempdir().expect("a directory");
        let to = directory.path().join("efi.raw");
        let last = AtomicU64::new(0);
        let show = |percent| {
            last.fetch_max(percent, Ordering::Relaxed);
        };
        let from = fixture("two-disks.vma.zst");
        let totals = convert(&from, &to, Some("drive-efidisk0"), show, CancelToken::new()).expect("converts");
        assert_eq!(totals.guest_bytes, 540_672);
        assert_eq!(std::fs::metadata(&to).expect("the target").len(), 540_672);
        assert_eq!(last.into_inner(), 100);
    }

    #[test]
    fn a_callback_can_stop_the_conversion() {
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
