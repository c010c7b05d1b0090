//! Descriptors with several extents, the names that they may have, and snapshots.

use std::path::Path;

use imgtool_core::{Driver, ErrorKind, OpenOptions, Remedy};
use imgtool_testing::conformance;
use imgtool_vmdk::VmdkDriver;

use crate::crafted::{GRAIN, Sparse, descriptor, filled};
use crate::support::{assert_clean, check, content, open, open_options, open_plainly, save};

/// Returns a descriptor with these lines.
fn text(lines: &str) -> Vec<u8> {
    format!("# Disk DescriptorFile\nversion=1\nCID=00000007\nparentCID=ffffffff\n{lines}\n").into_bytes()
}

#[test]
fn reads_every_kind_of_extent_without_permission() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "a-flat.vmdk", &filled(&[1, 2, 3]));
    save(directory.path(), "a-s001.vmdk", &Sparse::new(3).with(28, &[0; 16]).grain(1, 9).bytes());
    let lines = "RW 8 FLAT \"a-flat.vmdk\" 16\nRDONLY 8 ZERO\n\nrw 8 vmfs \"a-flat.vmdk\"\n\
                 RW 16 SPARSE \"a-s001.vmdk\"\nRW 4 FLAT \"a-flat.vmdk\" 10";
    let path = save(directory.path(), "a.vmdk", &text(lines));
    let expected = [filled(&[3, 0, 1, 0, 9]), vec![2; 2048]].concat();
    let source = open_plainly(&path).unwrap();
    assert!(content(&source).unwrap() == expected);
    assert_eq!(source.info().references.len(), 3);
    assert_clean(&path);
}

#[test]
fn an_extent_without_access_is_an_error_where_it_is_read() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "x", &filled(&[1]));
    let path = save(directory.path(), "a.vmdk", &text("RW 8 FLAT \"x\" 0\nNOACCESS 8 FLAT \"y\" 0"));
    let source = open_plainly(&path).unwrap();
    assert_eq!(source.info().devices[0].size, 2 * GRAIN as u64);
    let error = content(&source).unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("NOACCESS"), "{error}");
    assert_eq!(error.guest_range(), Some(4096..8192));
}

#[track_caller]
fn assert_refused(directory: &Path, lines: &str, kind: ErrorKind, part: &str) {
    let path = save(directory, "a.vmdk", &text(lines));
    let error = open_plainly(&path).map(|_| ()).unwrap_err();
    assert!(error.kind() == kind && format!("{error:#}").contains(part), "{lines}: {error:#}, not {part}");
}

#[test]
fn other_names_need_permission_and_the_image_is_no_extent_of_itself() {
    let outer = tempfile::tempdir().unwrap();
    let directory = outer.path().join("inner");
    std::fs::create_dir_all(directory.join("below")).unwrap();
    for path in [outer.path().join("x"), directory.join("below/x"), directory.join("x")] {
        std::fs::write(path, filled(&[1])).unwrap();
    }
    std::os::unix::fs::symlink("x", directory.join("link")).unwrap();
    for name in
        ["../x", "/etc/passwd", "below/x", "link", "..", ".", "c:x", "json:x", "file:x", "a\\x", "below"]
    {
        assert_refused(&directory, &format!("RW 8 FLAT \"{name}\" 0"), ErrorKind::Refused, name);
    }
    assert_refused(&directory, "RW 8 FLAT \"a.vmdk\" 0", ErrorKind::Malformed, "same chain");
    assert_refused(&directory, "RW 8 FLAT \"gone\" 0", ErrorKind::Io, "gone");
    assert_refused(&directory, "RW 9 FLAT \"x\" 0", ErrorKind::Corrupt, "ends at");
    assert_refused(&directory, "RW 8 FLAT \"x\" 1", ErrorKind::Corrupt, "ends at");
    assert_refused(&directory, "RW 8 SPARSE \"x\"", ErrorKind::Malformed, "not a hosted sparse file");
    assert_refused(&directory, "version=1", ErrorKind::Malformed, "no extents");
    // With permission, files of its directory and below may be extents.
    let path = save(&directory, "a.vmdk", &text("RW 8 FLAT \"below/x\" 0\nRW 8 FLAT \"link\" 0"));
    assert!(content(&open(&path).unwrap()).unwrap() == filled(&[1, 1]));
}

#[test]
fn a_sparse_extent_must_be_as_large_as_its_line() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "s", &Sparse::new(2).bytes());
    assert_refused(directory.path(), "RW 17 SPARSE \"s\"", ErrorKind::Malformed, "17 sectors");
    save(directory.path(), "s", &Sparse::new(2).with(12, &[0; 8]).bytes());
    assert_refused(directory.path(), "RW 8 SPARSE \"s\"", ErrorKind::Malformed, "is a descriptor");
}

#[test]
fn a_header_without_capacity_wraps_a_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "x", &filled(&[4]));
    let mut file = Sparse::new(1).with(12, &[0; 8]);
    file.descriptor = "createType=\"monolithicFlat\"\nRW 8 FLAT \"x\" 0\n".to_owned();
    let path = save(directory.path(), "a.vmdk", &file.bytes());
    assert!(content(&open_plainly(&path).unwrap()).unwrap() == filled(&[4]));
}

/// Returns a snapshot of `grains` grains over the parent that `hint` names.
fn child(grains: u64, cid: u32, parent: u32, hint: &str) -> Sparse {
    let mut child = Sparse::new(grains);
    child.descriptor = format!("{}parentFileNameHint=\"{hint}\"\n", descriptor(cid, parent));
    child
}

#[test]
fn reads_snapshots_of_snapshots() {
    let directory = tempfile::tempdir().unwrap();
    let save = |name: &str, file: &Sparse| save(directory.path(), name, &file.bytes());
    let mut base = Sparse::new(3).grain(0, 1).grain(1, 1).grain(2, 1);
    base.descriptor = descriptor(0x10, u32::MAX);
    save("base.vmdk", &base);
    save("one.vmdk", &child(3, 0x11, 0x10, "base.vmdk").with(8, &[5]).grain(1, 2).entry(2, 1));
    // The path is that of another machine; the third grain is hidden by zeros; the fourth has no parent.
    let path = save("two.vmdk", &child(4, 0x12, 0x11, "C:\\vms\\one.vmdk").grain(0, 3));
    let source = open(&path).unwrap();
    assert!(content(&source).unwrap() == filled(&[3, 2, 0, 0]));
    assert_eq!(check(&path).corruptions, 0);
    let error = open_plainly(&path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Refused && error.to_string().contains("one.vmdk"), "{error}");
    // The error names both places.
    let path = save("lost.vmdk", &child(3, 0x11, 0x10, "../lost/gone.vmdk"));
    let error = format!("{:#}", open(&path).map(|_| ()).unwrap_err());
    assert!(error.contains("'../lost/gone.vmdk', nor as 'gone.vmdk' beside"), "{error}");
}

#[test]
fn refuses_parents_that_changed_and_chains_without_end() {
    let directory = tempfile::tempdir().unwrap();
    let save = |name: &str, file: &Sparse| save(directory.path(), name, &file.bytes());
    save("base.vmdk", &Sparse::new(1));
    let path = save("one.vmdk", &child(1, 0x11, 0x10, "base.vmdk"));
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("00000001"), "{error}");
    let path = save("one.vmdk", &child(1, 0x11, 0x11, "one.vmdk"));
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("same chain"), "{error}");
    let path = save("one.vmdk", &child(1, 0x11, 0x10, ""));
    // Without a name, its identifier is looked for.
    assert_eq!(open(&path).map(|_| ()).unwrap_err().kind(), ErrorKind::Refused);
}

/// A check tells a stale parent where the user allows to open it, and says so where not.
#[test]
fn a_check_compares_the_identifier_of_an_allowed_parent() {
    let directory = tempfile::tempdir().unwrap();
    let save = |name: &str, file: &Sparse| save(directory.path(), name, &file.bytes());
    let path = save("one.vmdk", &child(1, 0x11, 0x10, "base.vmdk"));
    let checked = |chain| {
        let options = open_options(chain);
        let report = VmdkDriver.check(conformance::input(&path).unwrap(), &options).unwrap();
        (report.corruptions, report.check_errors, report.findings)
    };
    assert_eq!(checked(true).1, 1, "the parent is missing");
    save("base.vmdk", &Sparse::new(1));
    let (corruptions, _, findings) = checked(true);
    assert!(corruptions == 1 && findings[0].contains("00000001, not 00000010"), "{findings:?}");
    let (corruptions, errors, findings) = checked(false);
    assert!((corruptions, errors) == (0, 0) && findings[0].contains("only this file"), "{findings:?}");
    let mut base = Sparse::new(1);
    base.descriptor = descriptor(0x10, u32::MAX);
    save("base.vmdk", &base);
    assert_eq!(checked(true), (0, 0, Vec::new()));
}

#[test]
fn salvage_reads_over_a_parent_that_changed_with_a_doubt() {
    let directory = tempfile::tempdir().unwrap();
    let save = |name: &str, file: &Sparse| save(directory.path(), name, &file.bytes());
    save("base.vmdk", &Sparse::new(2).grain(0, 5).grain(1, 6));
    let path = save("one.vmdk", &child(2, 0x11, 0x10, "base.vmdk").grain(1, 7));
    let error = open(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error.remedy(), Some(Remedy::Salvage(_))), "{error:#}");
    let options = OpenOptions { salvage: true, ..open_options(true) };
    let source = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    assert!(content(&source).unwrap() == filled(&[5, 7]));
    let [doubt] = &source.doubts()[..] else { panic!("one doubt") };
    assert!(doubt.reason.contains("unverified: parent 'base.vmdk' is not as it was"), "{}", doubt.reason);
}

#[test]
fn facts_name_extents_that_are_missing_cut_or_damaged() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "flat", &filled(&[1]));
    save(directory.path(), "sparse", &Sparse::new(2).with(28, &[0; 16]).bytes());
    save(directory.path(), "noise", &filled(&[9]));
    let notes = |lines: &str| {
        let path = save(directory.path(), "a.vmdk", &text(lines));
        let options = OpenOptions { info_only: true, ..open_options(false) };
        let source = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
        source.info().notes.clone()
    };
    let sound = "RW 8 FLAT \"flat\" 0\nRW 16 SPARSE \"sparse\"\nRW 8 ZERO\nRW 8 FLAT \"../x\" 0";
    assert!(notes(sound).is_empty(), "{:?}", notes(sound));
    for (line, text) in [
        ("RW 8 FLAT \"gone\" 0", "extent 'gone' is missing"),
        ("RW 9 FLAT \"flat\" 0", "extent 'flat' is cut: it needs 4608 bytes, but its file ends at 4096"),
        ("RW 24 SPARSE \"sparse\"", "extent 'sparse' is damaged: the descriptor says"),
        ("RW 8 SPARSE \"noise\"", "extent 'noise' is damaged"),
    ] {
        let found = notes(line);
        assert!(found.len() == 1 && found[0].contains(text), "{line}: {found:?}");
    }
    let many: String = (0..100).map(|number| format!("RW 8 FLAT \"gone{number}\" 0\n")).collect();
    assert!(notes(&many).len() == 21 && notes(&many)[20].contains("further"), "{:?}", notes(&many));
}

#[test]
fn a_flat_disk_has_flat_and_sparse_snapshots() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "base-flat.vmdk", &filled(&[1, 1, 1]));
    save(directory.path(), "base.vmdk", &text("createType=\"vmfs\"\nRW 24 VMFS \"base-flat.vmdk\""));
    save(directory.path(), "delta-s001.vmdk", &Sparse::new(3).with(28, &[0; 16]).grain(2, 2).bytes());
    let lines = "# Disk DescriptorFile\nCID=8\nparentCID=7\nparentFileNameHint=\"base.vmdk\"\n\
                 RW 24 SPARSE \"delta-s001.vmdk\"\n";
    let path = save(directory.path(), "delta.vmdk", lines.as_bytes());
    assert!(content(&open(&path).unwrap()).unwrap() == filled(&[1, 1, 2]));
}

/// Opens an image for salvage, and returns its content and its lost ranges.
fn salvaged(path: &Path) -> (Vec<u8>, Vec<std::ops::Range<u64>>) {
    let options = OpenOptions { salvage: true, ..open_options(false) };
    let source = VmdkDriver.open(conformance::input(path).unwrap(), &options).unwrap();
    let found = content(&source).unwrap();
    (found, source.losses().into_iter().map(|loss| loss.guest).collect())
}

#[test]
fn salvage_keeps_what_cut_and_missing_extents_leave() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "flat", &filled(&[1, 2])[..GRAIN + 700]);
    save(directory.path(), "short", &Sparse::new(1).with(28, &[0; 16]).grain(0, 5).bytes());
    save(directory.path(), "noise", &filled(&[9]));
    let lines = "RW 24 FLAT \"flat\" 0\nRW 8 FLAT \"gone\" 0\nRW 8 FLAT \"flat\" 0\nRW 8 SPARSE \"noise\"\n\
                 RW 16 SPARSE \"short\"\nRW 8 FLAT \"flat\" 100";
    let path = save(directory.path(), "a.vmdk", &text(lines));
    let error = open_plainly(&path).map(|_| ()).unwrap_err();
    assert!(matches!(error.remedy(), Some(Remedy::Salvage(_))), "{error:#}");
    let (found, losses) = salvaged(&path);
    let flat = [filled(&[1]), vec![2; 700], vec![0; 2 * GRAIN - 700]].concat();
    assert!(found == [flat, filled(&[0, 1, 0, 5, 0, 0])].concat());
    let grain = GRAIN as u64;
    let expected = [grain + 700..4 * grain, 5 * grain..6 * grain, 7 * grain..9 * grain];
    let lost = |at: u64| losses.iter().any(|range| range.contains(&at));
    for at in 0..9 * grain {
        assert_eq!(lost(at), expected.iter().any(|range| range.contains(&at)), "{at}: {losses:?}");
    }
    // What is refused is no loss.
    let path = save(directory.path(), "a.vmdk", &text("RW 8 FLAT \"../x\" 0"));
    let options = OpenOptions { salvage: true, ..open_options(false) };
    let opened = VmdkDriver.open(conformance::input(&path).unwrap(), &options);
    assert_eq!(opened.map(|_| ()).unwrap_err().kind(), ErrorKind::Refused);
    // The parts of one cut file are lost together.
    let path = save(directory.path(), "a.vmdk", &text("RW 9 FLAT \"flat\" 0\nRW 1 FLAT \"gone\" 0"));
    assert_eq!(salvaged(&path).1.len(), 1);
}

#[test]
fn many_lines_of_one_file_open_it_once() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "f", &filled(&[5]));
    let path = save(directory.path(), "a.vmdk", &text(&"RW 8 FLAT \"f\" 0\n".repeat(500)));
    let files = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let before = files();
    let source = open_plainly(&path).unwrap();
    assert!(files() < before + 100, "{before} open files, then {}", files());
    assert_eq!(source.info().devices[0].size, 500 * GRAIN as u64);
    // The memory of the extents is lent.
    let options = open_options(false);
    let before = options.memory.free();
    let opened = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    let lent = before - options.memory.free();
    drop(opened);
    let one = save(directory.path(), "b.vmdk", &text("RW 8 FLAT \"f\" 0"));
    let opened = VmdkDriver.open(conformance::input(&one).unwrap(), &options).unwrap();
    let alone = before - options.memory.free();
    drop(opened);
    assert!(lent >= alone + 499 * 1024, "{lent} and {alone} bytes");
}

/// A small sparse file in thousands of extents would be a disk of terabytes.
#[test]
fn a_sparse_file_belongs_to_one_extent() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "s", &Sparse::new(1).with(28, &[0; 16]).grain(0, 5).bytes());
    let lines = "RW 8 SPARSE \"s\"\n".repeat(3);
    assert_refused(directory.path(), &lines, ErrorKind::Malformed, "more than one extent");
    let path = save(directory.path(), "a.vmdk", &text(&lines));
    assert_eq!(check(&path).corruptions, 1);
    assert!(salvaged(&path).0 == filled(&[5, 0, 0]));
    let options = OpenOptions { info_only: true, ..open_options(false) };
    let source = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    let notes = source.info().notes.join("; ");
    assert_eq!(notes.matches("more than one extent").count(), 2, "{notes}");
    // Each file is opened once for the facts.
    let many = text(&"RW 8 SPARSE \"s\"\n".repeat(30_000));
    let path = save(directory.path(), "many.vmdk", &many);
    let source = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    assert!(
        source.info().notes.iter().any(|note| note.contains("further extents")),
        "{:?}",
        source.info().notes
    );
}
