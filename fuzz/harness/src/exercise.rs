//! Reads an image in every way, within bounds, and checks the toolkit's promises.
//!
//! A broken promise panics, which is what the fuzzer looks for. Errors are allowed. They are formatted,
//! because messages quote bytes of the image.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::zero::is_zero;
use imgtool_core::{
    BufferPool, CancelToken, CheckReport, CreateOptions, Device, DeviceId, Disk, Driver, Error, ExtentKind,
    ImageSource, Input, Lane, Memory, NoProgress, OpenOptions, Registry, Result, StreamAccess,
};
use imgtool_engine::digest;

/// Maximum number of devices to read.
const DEVICES: usize = 8;
/// Maximum number of lists of extents to request per device, and of extents to read from each list.
const ANSWERS: usize = 24;
/// Length in bytes of a read: more than a small cluster, and not a multiple of one.
const READ_LEN: usize = 20_000;
/// Maximum number of reads per device.
const READS: usize = 24;
/// Maximum size in bytes of the data in an image that is read as a whole.
pub const WHOLE: u64 = 2 << 20;
/// Maximum total size in bytes of the devices in a stream that is read as a whole: with salvage, the stream
/// returns missing ranges as pieces of 1 GiB.
const MAX_STREAMED: u64 = 64 << 30;
/// Maximum number of pieces to read from a stream.
const PIECES: usize = 2000;

/// Zeros for comparisons in one call: the fuzzer would count every step of a loop over bytes.
static ZEROS: [u8; READ_LEN] = [0; READ_LEN];

/// Returns a registry of all drivers.
pub fn registry() -> Registry {
    let mut registry = Registry::new();
    imgtool_raw::register(&mut registry);
    imgtool_parallels::register(&mut registry);
    imgtool_qed::register(&mut registry);
    imgtool_qcow1::register(&mut registry);
    imgtool_bochs::register(&mut registry);
    imgtool_cloop::register(&mut registry);
    imgtool_dmg::register(&mut registry);
    imgtool_qcow2::register(&mut registry);
    imgtool_vhdx::register(&mut registry);
    imgtool_vhd::register(&mut registry);
    imgtool_vdi::register(&mut registry);
    imgtool_vmdk::register(&mut registry);
    imgtool_luks::register(&mut registry);
    imgtool_vma::register(&mut registry);
    imgtool_ova::register(&mut registry);
    registry
}

/// Result of reading an image.
#[derive(Debug, Default)]
pub struct Outcome {
    /// First error of a read or a list of extents.
    pub error: Option<Error>,
    /// Total size in bytes of the data extents; `None` unless all extents were listed.
    pub data_bytes: Option<u64>,
}

impl Outcome {
    fn fail(&mut self, error: Error) {
        printed(&error);
        self.error.get_or_insert(error);
    }
}

/// Formats an error like the program, and asserts that it has no control characters.
pub fn printed(error: &Error) {
    let text = format!("{error} {:?}", error.hint_text());
    assert!(!text.chars().any(char::is_control), "an error carries control characters: {text:?}");
}

/// Returns the value of a result, or formats its error with [`printed`].
pub fn opened<T>(result: Result<T>) -> Option<T> {
    result.inspect_err(printed).ok()
}

/// Opens and reads an image of `driver`'s format in every way: plainly, by force, for information only, for
/// salvage, by snapshot, and with `check`.
pub fn image(driver: &str, options: &OpenOptions, input: &dyn Fn() -> Input) {
    let driver = registry().get(driver).expect("a driver of ours");
    let open = |options: &OpenOptions| opened(driver.open(input(), options));
    let mut outcome = Outcome::default();
    let plain = open(options);
    if let Some(source) = plain {
        outcome = random(&source, false);
        whole(&*source, &mut outcome);
        measured(&*source);
        for name in snapshots(&*source) {
            let snapshot = OpenOptions { snapshot: Some(name.into()), ..options.clone() };
            if let Some(source) = open(&snapshot) {
                let mut outcome = random(&source, false);
                whole(&*source, &mut outcome);
            }
        }
        checked(driver.check(input(), options), &outcome);
    } else {
        let _ = opened(driver.check(input(), options));
        open(&OpenOptions { info_only: true, ..options.clone() });
        open(&OpenOptions { force: true, ..options.clone() });
    }
    if let Some(source) = open(&OpenOptions { salvage: true, ..options.clone() }) {
        let mut salvaged = random(&source, true);
        whole(&*source, &mut salvaged);
        if outcome.error.is_none() && outcome.data_bytes.is_some() && salvaged.data_bytes.is_some() {
            assert!(source.losses().is_empty(), "salvage loses {:?} of a sound image", source.losses());
            assert!(source.doubts().is_empty(), "salvage doubts a sound image: {:?}", source.doubts());
        }
    }
}

/// Reads the start and the end of some persistent bitmaps of an image.
pub fn bitmaps(driver: &str, input: &dyn Fn() -> Input) {
    let driver = registry().get(driver).expect("a driver of ours");
    let options = OpenOptions { bitmaps: true, ..OpenOptions::default() };
    let Some(source) = opened(driver.open(input(), &options)) else { return };
    let size = source.info().devices[0].size;
    let sound = source.bitmaps().unwrap_or_default().iter().filter(|bitmap| bitmap.fault.is_none());
    for bitmap in sound.take(8) {
        let len = bitmap.byte_len(size);
        let mut bits = vec![0; len.min(1 << 20) as usize];
        for offset in [0, len - bits.len() as u64] {
            let _ = opened(bitmap.content.read_at(&mut bits, offset));
        }
    }
}

fn checked(report: Result<CheckReport>, outcome: &Outcome) {
    let (Some(report), Some(error)) = (opened(report), &outcome.error) else { return };
    let sound = report.corruptions == 0 && report.check_errors == 0;
    // `check` does not decode compressed clusters. The last cluster of a qcow2 file may be cut, and only a
    // read of the missing part notices.
    let is_known =
        report.compressed_clusters.unwrap_or(0) > 0 || error.message().starts_with("the file ends at");
    assert!(!sound || is_known, "check finds nothing, but reading says: {error}");
}

/// Returns the ids of the first two snapshots among the facts.
fn snapshots(source: &dyn ImageSource) -> Vec<String> {
    let facts = source.info().facts.iter().filter(|fact| fact.key == "snapshots");
    let list = facts.filter_map(|fact| fact.value.as_array()).flatten().take(2);
    list.filter_map(|snapshot| Some(snapshot.get("id")?.as_str()?.to_owned())).collect()
}

fn measured(source: &dyn ImageSource) {
    // A container has the size of its images.
    let alone = |driver: &&Arc<dyn Driver>| driver.capabilities().write && driver.member_format().is_none();
    for driver in registry().drivers().filter(alone) {
        let writer = driver.writer(&CreateOptions::default()).expect("the driver writes");
        let _ = opened(writer.measure(source));
    }
}

/// Reads extents and content of a source by position.
pub fn random(source: &Arc<dyn ImageSource>, salvage: bool) -> Outcome {
    let mut outcome = Outcome { error: None, data_bytes: Some(0) };
    let Ok(disks) = Disk::all(source) else { return outcome };
    for disk in disks.iter().take(DEVICES) {
        let mut reader = Reader { disk, salvage, reads: READS, outcome: &mut outcome };
        reader.extents();
        reader.places();
    }
    outcome
}

struct Reader<'a> {
    disk: &'a Disk,
    salvage: bool,
    /// Remaining reads of this device.
    reads: usize,
    outcome: &'a mut Outcome,
}

impl Reader<'_> {
    fn extents(&mut self) {
        let mut at = 0;
        for _ in 0..ANSWERS {
            if at >= self.disk.size() {
                return;
            }
            let extents = match self.disk.extents(at..self.disk.size()) {
                Ok(extents) => extents,
                Err(error) => {
                    assert!(!self.salvage, "salvage gives up: {error}");
                    self.outcome.data_bytes = None;
                    return self.outcome.fail(error);
                }
            };
            assert!(!extents.is_empty(), "no extent at {at}");
            for (index, extent) in extents.iter().enumerate() {
                assert!(extent.len > 0 && extent.start == at, "{extent:?} at {at}");
                assert!(extent.len <= self.disk.size() - at, "{extent:?} leaves {}", self.disk.size());
                at = extent.end();
                if index < ANSWERS || index + 2 > extents.len() {
                    self.read(extent.start..at.min(extent.start + READ_LEN as u64), extent.kind);
                    self.read(at.saturating_sub(700).max(extent.start)..at, extent.kind);
                }
                if let (true, Some(bytes)) = (extent.is_data(), &mut self.outcome.data_bytes) {
                    *bytes = bytes.saturating_add(extent.len);
                }
            }
        }
        if at < self.disk.size() {
            self.outcome.data_bytes = None;
        }
    }

    /// Reads at the end of the device, across extents, and beyond the end.
    fn places(&mut self) {
        let size = self.disk.size();
        self.reads = self.reads.max(4);
        for start in [size.saturating_sub(READ_LEN as u64), size / 2, size / 3 + 511] {
            let end = start.saturating_add(READ_LEN as u64).min(size);
            if start < end {
                self.read(start..end, ExtentKind::Data);
                if let Err(error) = self.disk.extents(start..end) {
                    assert!(!self.salvage, "salvage gives up: {error}");
                    self.outcome.fail(error);
                }
            }
        }
        let beyond = self.disk.read_at(&mut [0; 2], size.saturating_sub(1));
        assert!(beyond.is_err(), "a read beyond the device of {size} bytes succeeds");
    }

    /// Reads a range whole and in two parts, which must agree.
    fn read(&mut self, range: Range<u64>, kind: ExtentKind) {
        if self.reads == 0 {
            return;
        }
        self.reads -= 1;
        let len = (range.end - range.start) as usize;
        let mut whole = vec![0xa5; len];
        let result = self.disk.read_at(&mut whole, range.start);
        if let Err(error) = result {
            assert!(!self.salvage, "salvage gives up at {range:?}: {error}");
            assert!(kind == ExtentKind::Data, "{kind:?} at {range:?} can't be read: {error}");
            return self.outcome.fail(error);
        }
        assert!(kind == ExtentKind::Data || whole == ZEROS[..len], "{kind:?} at {range:?} holds data");
        let mut parts = vec![0x5a; len];
        let (first, second) = parts.split_at_mut(len / 3);
        let middle = range.start + first.len() as u64;
        let halves = self.disk.read_at(first, range.start).and_then(|()| self.disk.read_at(second, middle));
        assert!(halves.is_ok() && parts == whole, "{range:?} reads differently in two parts: {halves:?}");
    }
}

/// Reads an image through the pipeline, if it has little data.
fn whole(source: &dyn ImageSource, outcome: &mut Outcome) {
    let total = source.info().devices.iter().fold(0u64, |sum, device| sum.saturating_add(device.size));
    let is_streamed = source.access().is_stream();
    if outcome.data_bytes.is_none_or(|bytes| bytes > WHOLE) || is_streamed && total > MAX_STREAMED {
        return;
    }
    match digested(source) {
        Ok(_) => assert!(outcome.error.is_none(), "the pipeline reads what is {:?}", outcome.error),
        Err(error) => outcome.fail(error),
    }
}

/// Computes id, size and digest of every device through the pipeline.
///
/// # Errors
/// If the source can't be read.
pub fn digested(source: &dyn ImageSource) -> Result<Vec<(DeviceId, u64, u128)>> {
    let devices: Vec<(DeviceId, u64)> =
        source.info().devices.iter().map(|device| (device.id, device.size)).collect();
    let digest =
        digest::digest_source(source, Lane(0), 1, &NoProgress, CancelToken::new(), &Memory::default())?;
    let lanes = (0..).map(Lane);
    Ok(lanes.zip(devices).map(|(lane, (device, size))| (device, size, digest.of(lane))).collect())
}

/// Reads the pieces of a stream, and asserts that they contain every byte of every device exactly once.
///
/// # Errors
/// If the stream can't be read; `LimitExceeded` if it has too many pieces.
pub fn stream(devices: &[Device], stream: &mut dyn StreamAccess) -> Result<()> {
    let pool = BufferPool::new();
    let mut seen: Vec<(DeviceId, Range<u64>)> = Vec::new();
    for _ in 0..PIECES {
        let Some(piece) = stream.next_piece(&pool).inspect_err(printed)? else {
            return {
                every_byte_once(devices, seen);
                Ok(())
            };
        };
        assert!(piece.len > 0, "an empty piece at {}", piece.start);
        if let Some(data) = &piece.data {
            assert!(data.len() as u64 == piece.len);
            let mut at = 0;
            for run in &piece.runs {
                assert!(run.start >= at && run.start < run.end && run.end <= data.len(), "{:?}", piece.runs);
                assert!(is_zero(&data[at..run.start]), "data outside of its runs");
                at = run.end;
            }
            assert!(is_zero(&data[at..]), "data outside of its runs");
        }
        seen.push((piece.device, piece.start..piece.end()));
    }
    Err(Error::limit("more pieces than are looked at"))
}

fn every_byte_once(devices: &[Device], mut seen: Vec<(DeviceId, Range<u64>)>) {
    seen.sort_by_key(|(device, range)| (device.0, range.start));
    for device in devices {
        let mut at = 0;
        for (_, range) in seen.iter().filter(|(id, _)| *id == device.id) {
            assert!(range.start == at, "device {}: {range:?} comes after {at}", device.id);
            at = range.end;
        }
        assert!(at == device.size, "device {}: {at} of {} bytes came", device.id, device.size);
    }
    assert!(seen.iter().all(|(id, _)| devices.iter().any(|device| device.id == *id)), "an unknown device");
}
