//! `imgtool::convert`: a conversion in one call.

use std::sync::{Arc, Mutex};

use imgtool::{CancelToken, ErrorKind, Gauge, Lane, LaneInfo, Monitor, Phase, Remedy};
use imgtool_testing::images::{Image, noise};
use imgtool_testing::toy::{Flaw, Toy};
use imgtool_testing::{assert_same, fixture, names, tempdir};

use super::{TWO_DISKS, assert_two_disks, digest};

/// Adds up the progress of each lane, and keeps the lanes of each phase.
#[derive(Default)]
struct Sum {
    lanes: Mutex<Vec<(Phase, Vec<LaneInfo>)>>,
    sums: Mutex<[u64; 2]>,
}

impl Monitor for Sum {
    fn begin(&self, phase: Phase, gauge: &Arc<Gauge>) {
        self.lanes.lock().unwrap().push((phase, gauge.lanes().cloned().collect()));
    }

    fn advance(&self, lane: Lane, len: u64, _zero: u64) {
        self.sums.lock().unwrap()[lane.index()] += len;
    }
}

#[test]
fn converts_all_disks_and_reports_all_bytes() {
    let dir = tempdir();
    let path = dir.path().join("copy.vma");
    let sum = Sum::default();
    let report =
        imgtool::convert(fixture("two-disks.vma.zst"), &path).threads(3).monitor(&sum).run().unwrap();
    let sizes = TWO_DISKS.map(|(_, size, _)| size);
    assert_eq!(report.virtual_size(), sizes.iter().sum::<u64>());
    assert!(report.is_complete());
    assert_eq!(*sum.sums.lock().unwrap(), sizes);
    let lanes = TWO_DISKS.map(|(name, size, _)| LaneInfo { name: name.to_owned(), total: Some(size) });
    assert_eq!(*sum.lanes.lock().unwrap(), [(Phase::Convert, lanes.to_vec())]);
    assert_two_disks(&imgtool::open(&path).unwrap().disks().unwrap());
    assert_eq!(names(dir.path()), ["copy.vma"]);
}

#[test]
fn converts_one_disk_by_name() {
    let dir = tempdir();
    let path = dir.path().join("efi.vhdx");
    let (name, size, sha256) = TWO_DISKS[1];
    let report = imgtool::convert(fixture("two-disks.vma.zst"), &path).disk(name).verify().run().unwrap();
    assert!(report.verified);
    assert_eq!(report.outputs.len(), 1);
    assert_eq!(report.outputs[0].disks[0].name, name);
    let image = imgtool::open(&path).unwrap();
    let disks = image.disks().unwrap();
    assert_eq!((image.format(), disks.len(), disks[0].size()), ("vhdx", 1, size));
    assert_eq!(digest(&disks[0]), sha256);
}

#[test]
fn writes_every_disk_and_configuration_to_a_directory() {
    let dir = tempdir();
    let dest = format!("{}/", dir.path().join("disks").display());
    let conversion = imgtool::convert(fixture("two-disks.vma.zst"), dest.as_str());
    let report = conversion.format("qcow2").option("cluster_size", "4k").run().unwrap();
    assert_eq!((report.outputs.len(), report.files.len()), (2, 2));
    let found = names(&dir.path().join("disks"));
    assert_eq!(found, ["drive-efidisk0.qcow2", "drive-scsi0.qcow2", "qemu-server.conf", "qemu-server.fw"]);
    for (name, size, sha256) in TWO_DISKS {
        let image = imgtool::open(dir.path().join(format!("disks/{name}.qcow2"))).unwrap();
        let disks = image.disks().unwrap();
        assert_eq!((image.format(), disks.len(), disks[0].size()), ("qcow2", 1, size));
        assert_eq!(digest(&disks[0]), sha256);
    }
}

/// The name decides the format and the compression of the whole file.
#[test]
fn file_name_selects_format_and_compression() {
    let dir = tempdir();
    let (raw, archive) = (dir.path().join("disk.raw"), dir.path().join("e.vma.zst"));
    Image::hole("disk", 200_704).with(1000, noise(1, 150_000)).write_raw(&raw);
    let report = imgtool::convert(&raw, &archive).run().unwrap();
    assert_eq!((report.outputs[0].format, report.outputs[0].compression), ("vma", Some("zstd")));
    assert!(std::fs::read(&archive).unwrap().starts_with(b"\x28\xb5\x2f\xfd"));
    assert_eq!(imgtool::open(&archive).unwrap().format(), "vma");
    let back = dir.path().join("back.raw");
    assert!(imgtool::convert(&archive, &back).run().unwrap().is_complete());
    assert_same(&raw, &back, "through the archive");
}

#[test]
fn refusals_leave_no_file() {
    let dir = tempdir();
    let path = dir.path().join("copy.vma");
    let conversion = || imgtool::convert(fixture("two-disks.vma.zst"), &path);
    let error = conversion().disk("c").run().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert_eq!(error.hint_text().as_deref(), Some("devices: drive-scsi0, drive-efidisk0"));
    let error = conversion().option("colour", "blue").run().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
    assert!(matches!(error.remedy(), Some(Remedy::ListOptions { format, .. }) if format == "vma"));
    let cancel = CancelToken::new();
    cancel.cancel();
    let error = conversion().cancelled_by(cancel).run().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(names(dir.path()).is_empty());
}

/// Cancels at the first report of progress.
struct CancelSoon(CancelToken);

impl Monitor for CancelSoon {
    fn advance(&self, _lane: Lane, _len: u64, _zero: u64) {
        self.0.cancel();
    }
}

#[test]
fn cancelled_conversion_leaves_no_file() {
    let dir = tempdir();
    let cancel = CancelToken::new();
    let monitor = CancelSoon(cancel.clone());
    let conversion = imgtool::convert(fixture("two-disks.vma.zst"), dir.path().join("copy.vma"));
    let error = conversion.monitor(&monitor).cancelled_by(cancel).run().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Cancelled);
    assert!(names(dir.path()).is_empty());
}

#[test]
fn replaces_an_existing_file_only_if_allowed() {
    let dir = tempdir();
    let path = dir.path().join("copy.vma");
    std::fs::write(&path, "old").unwrap();
    let conversion = || imgtool::convert(fixture("two-disks.vma.zst"), &path);
    let error = conversion().run().unwrap_err();
    assert_eq!((error.kind(), error.remedy()), (ErrorKind::Refused, Some(&Remedy::Overwrite)));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert!(conversion().overwrite().run().unwrap().is_complete());
    assert_two_disks(&imgtool::open(&path).unwrap().disks().unwrap());
}

#[test]
fn uses_a_driver_registered_by_the_caller() {
    let dir = tempdir();
    let (toy, back) = (dir.path().join("copy.toy"), dir.path().join("back.vma"));
    let registry = || {
        let mut registry = imgtool::registry();
        registry.register(Toy(Flaw::None));
        registry
    };
    let made = imgtool::convert(fixture("two-disks.vma.zst"), &toy).drivers(registry()).run().unwrap();
    assert_eq!(made.outputs[0].format, "toy");
    assert!(imgtool::convert(&toy, &back).drivers(registry()).run().unwrap().is_complete());
    // The toy format stores no names of disks.
    let disks = imgtool::open(&back).unwrap().disks().unwrap();
    assert!(disks.iter().map(digest).eq(TWO_DISKS.map(|(.., sha256)| sha256.to_owned())));
}

#[test]
fn compresses_and_follows_a_chain_only_if_allowed() {
    let dir = tempdir();
    let path = |name: &str| dir.path().join(name);
    let (base, overlay) = (path("base.raw"), path("overlay.qcow2"));
    std::fs::write(&base, [7; 1 << 20]).unwrap();
    let made =
        imgtool::convert(&base, &overlay).option("backing_file", "base.raw").option("backing_fmt", "raw");
    assert!(made.with_request(|request| request.open.policy.chain = true).run().unwrap().is_complete());
    let error = imgtool::convert(&overlay, path("refused.raw")).run().unwrap_err();
    assert!(matches!(error.remedy(), Some(Remedy::AllowExternal { .. })), "{error:?}");
    let report = imgtool::convert(&overlay, path("small.qcow2"))
        .allow_chain()
        .compressed()
        .with_options(|options| options.threads = 1)
        .run()
        .unwrap();
    assert!(report.outputs[0].stored < 512 << 10, "{report:?}");
    assert!(imgtool::convert(path("small.qcow2"), path("back.raw")).run().unwrap().is_complete());
    assert_same(&base, &path("back.raw"), "through a chain and compressed");
}

#[test]
fn salvages_a_truncated_archive_and_reports_the_losses() {
    let dir = tempdir();
    let (whole, cut) = (dir.path().join("whole.vma"), dir.path().join("cut.vma"));
    assert!(imgtool::convert(fixture("two-disks.vma.zst"), &whole).run().unwrap().is_complete());
    let bytes = std::fs::read(&whole).unwrap();
    std::fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let conversion = || imgtool::convert(&cut, dir.path().join("out/")).format("raw");
    assert!(matches!(conversion().run().unwrap_err().remedy(), Some(Remedy::Salvage(_))));
    let report = conversion().salvage().run().unwrap();
    assert!(!report.is_complete() && !report.losses.is_empty());
}
