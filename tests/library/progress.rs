//! Accounting of the work of a phase: what is expected is done at the end, `done` never decreases, and
//! extents that are known count as their data.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use imgtool::contracts::{
    BufferPool, Consumer, Copied, Geometry, ImageSource, Memory, Prepared, Progress, SinkDevice, SinkPiece,
};
use imgtool::engine::checksum::{Algorithm, ChecksumRequest, checksum};
use imgtool::engine::compare::{Pairing, first_difference, pair_devices};
use imgtool::engine::open;
use imgtool::engine::pipeline::{Job, Route, Target, copy};
use imgtool::{CancelToken, Gauge, Lane, Location, Monitor, OpenOptions, Phase, Work, WorkUnit, registry};
use imgtool_testing::images::{Image, noise};
use imgtool_testing::{fixture, tempdir};

use super::TWO_DISKS;

/// Watches the work of every phase.
#[derive(Default)]
struct Watch {
    gauge: Mutex<Option<(Phase, Arc<Gauge>)>>,
    /// Work of the current phase when it was polled last.
    last: Mutex<Option<Work>>,
    /// Work of each phase when it was complete.
    complete: Mutex<Vec<(Phase, Work)>>,
    /// True to wait at the first piece until the expected work is known.
    waits: bool,
}

impl Watch {
    fn waiting() -> Self {
        Self { waits: true, ..Self::default() }
    }

    fn poll(&self) -> Option<Work> {
        let gauge = self.gauge.lock().unwrap().clone();
        let mut last = self.last.lock().unwrap();
        let work = gauge.map(|(_, gauge)| gauge.work())?;
        if let Some(last) = *last {
            assert!(work.done >= last.done, "work is undone: {last:?}, then {work:?}");
            assert!(last.expected.is_none() || work.expected == last.expected, "{last:?}, then {work:?}");
        }
        assert!(work.expected.is_none_or(|expected| work.done <= expected), "{work:?}");
        *last = Some(work);
        Some(work)
    }

    /// Returns the work of the only phase at its end.
    fn only(&self) -> Work {
        let complete = self.complete.lock().unwrap();
        let [(_, work)] = complete.as_slice() else { panic!("not one phase: {complete:?}") };
        *work
    }
}

impl Monitor for Watch {
    fn begin(&self, phase: Phase, gauge: &Arc<Gauge>) {
        *self.gauge.lock().unwrap() = Some((phase, Arc::clone(gauge)));
        *self.last.lock().unwrap() = None;
    }

    fn advance(&self, _lane: Lane, _len: u64, _zero: u64) {
        let begun = Instant::now();
        while self.poll().is_some_and(|work| self.waits && work.expected.is_none()) {
            assert!(begun.elapsed() < Duration::from_secs(60), "nobody adds up the data");
            std::thread::yield_now();
        }
    }

    fn end(&self) {
        let work = self.poll().unwrap();
        assert!(work.is_done(), "the phase is complete, but not its work: {work:?}");
        let phase = self.gauge.lock().unwrap().as_ref().map(|(phase, _)| *phase).unwrap();
        self.complete.lock().unwrap().push((phase, work));
    }
}

const MIB: u64 = 1 << 20;

/// Writes a raw disk of 64 MiB with 9 MiB of data, 1 MiB of them zeros.
fn sparse_disk(dir: &Path) -> PathBuf {
    let path = dir.join("disk.raw");
    let disk = Image::hole("disk", 64 * MIB).with(4 * MIB, noise(1, 6 << 20));
    disk.with(32 * MIB, vec![0; 1 << 20]).with(60 * MIB, noise(2, 2 << 20)).write_raw(&path);
    path
}

/// Returns the number of bytes that the file system says are data.
fn stored(path: &Path) -> u64 {
    let disks = imgtool::open(path).unwrap().disks().unwrap();
    let extents = disks[0].extents(0..disks[0].size()).unwrap();
    extents.iter().filter(|extent| extent.is_data()).map(|extent| extent.len).sum()
}

#[test]
fn known_extents_count_as_their_data() {
    let dir = tempdir();
    let disk = sparse_disk(dir.path());
    let data = stored(&disk);
    assert!((8 * MIB..20 * MIB).contains(&data), "the file system keeps holes: {data}");
    for (to, threads) in [("a.qcow2", 1), ("b.vhdx", 3), ("c.raw", 2), ("d.vma", 3)] {
        let watch = Watch::waiting();
        let report =
            imgtool::convert(&disk, dir.path().join(to)).threads(threads).monitor(&watch).run().unwrap();
        let work = watch.only();
        assert_eq!((work.unit, work.expected), (WorkUnit::Data, Some(data)), "{to}");
        assert_eq!(report.data, data, "{to}");
    }
    // Its clusters are known as well, and 1 MiB of zeros was left out.
    let watch = Watch::waiting();
    assert!(
        imgtool::convert(dir.path().join("a.qcow2"), dir.path().join("e.raw"))
            .monitor(&watch)
            .run()
            .unwrap()
            .is_complete()
    );
    assert_eq!(watch.only().expected, Some(8 * MIB));
}

#[test]
fn verification_counts_the_data_of_the_outputs() {
    let dir = tempdir();
    let disk = sparse_disk(dir.path());
    let watch = Watch::waiting();
    assert!(
        imgtool::convert(&disk, dir.path().join("a.qcow2"))
            .verify()
            .monitor(&watch)
            .run()
            .unwrap()
            .is_complete()
    );
    let complete = watch.complete.lock().unwrap();
    let [(Phase::Convert, _), (Phase::Verify, verified)] = complete.as_slice() else {
        panic!("{complete:?}")
    };
    assert_eq!((verified.unit, verified.expected), (WorkUnit::Data, Some(8 * MIB)));
}

#[test]
fn a_compressed_stream_counts_the_bytes_of_its_file() {
    let dir = tempdir();
    let archive = fixture("two-disks.vma.zst");
    let len = std::fs::metadata(&archive).unwrap().len();
    for (to, disk) in [("a.vma", None), ("b.raw", Some(TWO_DISKS[0].0)), ("c.raw", Some(TWO_DISKS[1].0))] {
        let watch = Watch::waiting();
        let mut conversion = imgtool::convert(&archive, dir.path().join(to)).monitor(&watch);
        if let Some(name) = disk {
            conversion = conversion.disk(name);
        }
        assert!(conversion.run().unwrap().is_complete());
        let work = watch.only();
        assert_eq!((work.unit, work.expected), (WorkUnit::Input, Some(len)), "{to}");
        assert_eq!(work.passed > 0, disk.is_some(), "{work:?}");
    }
}

#[cfg(unix)]
#[test]
fn the_other_disks_of_a_pipe_count() {
    let dir = tempdir();
    let (archive, fifo) = (dir.path().join("a.vma"), dir.path().join("pipe.vma"));
    assert!(imgtool::convert(fixture("two-disks.vma.zst"), &archive).run().unwrap().is_complete());
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for (index, (name, size, _)) in TWO_DISKS.into_iter().enumerate() {
        let (from, to) = (archive.clone(), fifo.clone());
        let writer = std::thread::spawn(move || std::fs::copy(from, to));
        let watch = Watch::waiting();
        let target = dir.path().join(format!("{index}.raw"));
        assert!(
            imgtool::convert(&fifo, target)
                .format("raw")
                .disk(name)
                .monitor(&watch)
                .run()
                .unwrap()
                .is_complete()
        );
        writer.join().unwrap().unwrap();
        let work = watch.only();
        let all: u64 = TWO_DISKS.iter().map(|(_, size, _)| size).sum();
        assert_eq!((work.unit, work.expected, work.passed), (WorkUnit::Guest, Some(all), all - size));
        assert_eq!(work.to_pass, 0);
    }
}

#[test]
fn a_comparison_counts_the_data_of_both_images() {
    let dir = tempdir();
    let disk = sparse_disk(dir.path());
    let copy = dir.path().join("a.qcow2");
    assert!(imgtool::convert(&disk, &copy).run().unwrap().is_complete());
    let (registry, options, cancel) = (registry(), OpenOptions::default(), CancelToken::new());
    let open = |path: &Path| open(&registry, &Location::from(path), None, &options, &cancel).unwrap();
    let (first, second) = (open(&disk), open(&copy));
    let Pairing::Pairs(pairs) = pair_devices(&first, &second, &[]).unwrap() else { panic!("no pair") };
    let watch = Watch::waiting();
    let found = first_difference(&first, &second, &pairs, 2, &watch, &cancel, &options.memory).unwrap();
    assert_eq!(found, None);
    assert_eq!(watch.only().expected, Some(stored(&disk) + 8 * MIB));
}

#[test]
fn zeros_are_work_where_they_take_time() {
    let dir = tempdir();
    let disk = sparse_disk(dir.path());
    let request = ChecksumRequest {
        algorithm: Algorithm::Blake3,
        format: None,
        options: &OpenOptions::default(),
        disks: &[],
        threads: 2,
    };
    let watch = Watch::default();
    checksum(&registry(), &Location::from(&disk), &request, &watch, &CancelToken::new()).unwrap();
    assert_eq!((watch.only().unit, watch.only().expected), (WorkUnit::Guest, Some(64 * MIB)));
}

/// Consumer that stores nothing.
struct Discard;

impl Consumer for Discard {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: 4096,
            granule_required: false,
            piece_len: 256 << 10,
            max_zero_len: u64::MAX,
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> imgtool::Result<Prepared> {
        Ok(Prepared::consumed(piece))
    }

    fn resize(&self, _device: SinkDevice, _size: u64) -> imgtool::Result<()> {
        Ok(())
    }
}

/// Adds up the calls of a copy.
#[derive(Default)]
struct Calls {
    throttled: AtomicU64,
    copied: AtomicU64,
    passed: AtomicU64,
}

impl Progress for Calls {
    fn advance(&self, _lane: Lane, copied: Copied) {
        let before = self.copied.fetch_add(copied.data, Ordering::SeqCst);
        assert!(before + copied.data <= self.throttled.load(Ordering::SeqCst), "read before it was allowed");
    }

    fn streamed(&self, lane: Option<Lane>, read: Copied, _spent: Duration) {
        if lane.is_none() {
            self.passed.fetch_add(read.data, Ordering::SeqCst);
        }
    }

    fn throttle(&self, data: u64) {
        self.throttled.fetch_add(data, Ordering::SeqCst);
    }
}

/// Copies the first device of an image to nowhere.
fn copy_first(image: &dyn ImageSource) -> Calls {
    let calls = Calls::default();
    let route = Route { from: image.info().devices[0].id, target: 0, to: SinkDevice(0), lane: Lane(0) };
    let job = Job {
        targets: vec![Target::Consumer(&Discard)],
        routes: vec![route],
        taps: Vec::new(),
        threads: 3,
        progress: &calls,
        cancel: CancelToken::new(),
        memory: Memory::default(),
    };
    copy(image, &job).unwrap();
    calls
}

/// A limit on the speed that counted only what is stored in the target would not slow down the reading of a
/// file full of zeros, nor of an archive whose other disks pass.
#[test]
fn all_data_that_is_read_is_limited_before() {
    let dir = tempdir();
    let disk = sparse_disk(dir.path());
    let (registry, options, cancel) = (registry(), OpenOptions::default(), CancelToken::new());
    let open = |path: &Path| open(&registry, &Location::from(path), None, &options, &cancel).unwrap();
    let calls = copy_first(&*open(&disk).image);
    let data = stored(&disk);
    assert_eq!((calls.throttled.into_inner(), calls.copied.into_inner()), (data, data));
    let archive = open(&fixture("two-disks.vma.zst"));
    assert!(archive.image.access().is_stream());
    let calls = copy_first(&*archive.image);
    assert!(calls.passed.into_inner() > 0, "the other disk was read as well");
    assert_eq!(calls.throttled.into_inner(), calls.copied.into_inner());
}
