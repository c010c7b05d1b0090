//! Parents that VirtualBox identifies by UUIDs alone, and descriptors that contradict themselves about a parent.

use std::path::Path;
use std::sync::Arc;

use imgtool_core::{Driver, ErrorKind, ImageSource, OpenOptions, Registry, Remedy};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_testing::conformance;
use imgtool_vmdk::VmdkDriver;

use crate::crafted::{Sparse, descriptor, filled};
use crate::support::{check, content, open, open_options, open_plainly, save};

const BASE: &str = "5c2a1d1b-5b5b-4b86-9a7e-6ff4b0f1a001";
const CONTENT: &str = "5c2a1d1b-5b5b-4b86-9a7e-6ff4b0f1a002";

/// Returns an image of three grains whose descriptor has these lines as well; `byte` fills the grain `index`.
fn image(parent_cid: u32, lines: &str, index: usize, byte: u8) -> Vec<u8> {
    let mut file = Sparse::new(3).grain(index, byte);
    file.descriptor = format!("{}{lines}\n", descriptor(7, parent_cid));
    file.bytes()
}

fn base(byte: u8) -> Vec<u8> {
    image(u32::MAX, &format!("ddb.uuid.image=\"{BASE}\"\nddb.uuid.modification=\"{CONTENT}\""), 0, byte)
}

/// Returns a snapshot as VirtualBox writes it: without a content identifier and a name of the parent.
fn snapshot() -> Vec<u8> {
    let lines = format!("ddb.uuid.parent=\"{BASE}\"\nddb.uuid.parentmodification=\"{CONTENT}\"");
    image(u32::MAX, &lines, 1, 2)
}

fn salvage(path: &Path) -> Arc<dyn ImageSource> {
    let options = OpenOptions { salvage: true, ..open_options(true) };
    VmdkDriver.open(conformance::input(path).unwrap(), &options).unwrap()
}

fn doubts(source: &Arc<dyn ImageSource>) -> String {
    source.doubts().into_iter().map(|doubt| doubt.reason).collect()
}

#[track_caller]
fn assert_refused(path: &Path, kind: ErrorKind, text: &str) {
    let error = open(path).map(|_| ()).unwrap_err();
    assert!(error.kind() == kind && format!("{error:#}").contains(text), "{error:#}, not {text}");
}

/// Read alone, a snapshot would have zeros in place of its parent's content.
#[test]
fn finds_the_parent_of_a_virtualbox_snapshot_by_its_uuids() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "{a}.vmdk", &snapshot());
    save(directory.path(), "other.vmdk", &image(u32::MAX, "", 0, 9));
    save(directory.path(), "noise.vmdk", b"not an image");
    assert_eq!(open_plainly(&path).map(|_| ()).unwrap_err().kind(), ErrorKind::Refused);
    assert_refused(&path, ErrorKind::Refused, "no allowed file is the parent");
    save(directory.path(), "disk.vmdk", &base(1));
    let found = open(&path).unwrap();
    assert!(content(&found).unwrap() == filled(&[1, 2, 0]));
    let info = found.info();
    assert_eq!(info.references[0].name, "disk.vmdk");
    assert!(info.facts.iter().any(|fact| fact.key == "parent-uuid" && fact.value == BASE));
    let findings = check(&path).findings;
    assert!(findings.len() == 1 && findings[0].contains("only this file was checked"), "{findings:?}");
}

#[test]
fn a_parent_in_another_directory_is_allowed_by_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let snapshots = directory.path().join("Snapshots");
    std::fs::create_dir(&snapshots).unwrap();
    let path = save(&snapshots, "{a}.vmdk", &snapshot());
    let mut registry = Registry::new();
    imgtool_vmdk::register(&mut registry);
    let policy = ExternalPolicy {
        paths: vec![save(directory.path(), "disk.vmdk", &base(1))],
        ..ExternalPolicy::default()
    };
    let externals = PolicyOpener::new(registry, policy).externals();
    let options = OpenOptions { externals, ..OpenOptions::default() };
    let source = VmdkDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    assert!(content(&source).unwrap() == filled(&[1, 2, 0]));
}

/// QEMU changes no UUID when it writes, so that copies with one UUID may differ.
#[test]
fn refuses_two_parents_of_one_uuid() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "child.vmdk", &snapshot());
    save(directory.path(), "a.vmdk", &base(1));
    save(directory.path(), "b.vmdk", &base(3));
    assert_refused(&path, ErrorKind::Refused, "'a.vmdk' and 'b.vmdk'");
    let source = salvage(&path);
    assert!(content(&source).unwrap() == filled(&[1, 2, 0]));
    assert!(doubts(&source).contains("two allowed files"), "{}", doubts(&source));
}

#[test]
fn refuses_a_virtualbox_parent_that_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "child.vmdk", &snapshot());
    let changed =
        image(u32::MAX, &format!("ddb.uuid.image=\"{BASE}\"\nddb.uuid.modification=\"{BASE}\""), 0, 1);
    save(directory.path(), "a.vmdk", &changed);
    assert_refused(&path, ErrorKind::Corrupt, "has changed since");
    assert!(doubts(&salvage(&path)).contains("has changed since"));
}

#[test]
fn finds_a_parent_without_a_name_by_its_content_identifier() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "child.vmdk", &image(0xb, "", 1, 2));
    let mut parent = Sparse::new(3).grain(0, 1);
    parent.descriptor = descriptor(0xb, u32::MAX);
    save(directory.path(), "disk.vmdk", &parent.bytes());
    assert!(content(&open(&path).unwrap()).unwrap() == filled(&[1, 2, 0]));
}

#[track_caller]
fn assert_contradiction(path: &Path, text: &str, salvaged: &[u8]) {
    let error = open(path).map(|_| ()).unwrap_err();
    assert!(error.kind() == ErrorKind::Malformed && error.to_string().contains(text), "{error:#}");
    assert!(matches!(error.remedy(), Some(Remedy::Salvage(_))), "{error:#}");
    let source = salvage(path);
    assert!(content(&source).unwrap() == salvaged);
    assert!(doubts(&source).contains(text), "{}", doubts(&source));
    let report = check(path);
    assert!(report.corruptions == 1 && report.findings[0].contains(text), "{:?}", report.findings);
    let options = OpenOptions { info_only: true, ..open_options(false) };
    let source = VmdkDriver.open(conformance::input(path).unwrap(), &options).unwrap();
    assert!(source.info().notes.iter().any(|note| note.contains(text)), "{:?}", source.info().notes);
}

#[test]
fn refuses_a_named_parent_that_the_identifier_denies() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = image(u32::MAX, "parentFileNameHint=\"vm.vmdk\"", 1, 2);
    let path = save(directory.path(), "child.vmdk", &bytes);
    assert_contradiction(&path, "names a parent, 'vm.vmdk'", &filled(&[0, 2, 0]));
}
