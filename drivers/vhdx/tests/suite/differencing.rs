//! Differencing disks: pairs and chains built byte by byte, read by the driver and by dissect.hypervisor.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::{Driver, ErrorKind, ImageSource, OpenOptions, Registry, Result};
use imgtool_engine::externals::{ExternalPolicy, PolicyOpener};
use imgtool_testing::{conformance, oracles, require};
use imgtool_vhdx::VhdxDriver;

use crate::support::builder::{BLOCKS_AT, DATA_GUID, VhdxBuilder, guid};
use crate::support::{GIB, MIB, check_file, content, disk_of, open_file};

const CHILD_GUID: &str = "cccccccc-0000-4000-8000-000000000002";

/// Returns options that allow external files according to `policy`.
fn allowed(policy: ExternalPolicy) -> OpenOptions {
    let mut registry = Registry::new();
    imgtool_vhdx::register(&mut registry);
    let externals = PolicyOpener::new(registry, policy).externals();
    OpenOptions { externals, ..OpenOptions::default() }
}

/// Opens an image, and allows parents in its directory.
fn open_chain(path: &Path) -> Result<Arc<dyn ImageSource>> {
    let options = allowed(ExternalPolicy { chain: true, ..ExternalPolicy::default() });
    VhdxDriver.open(conformance::input(path)?, &options)
}

/// Writes the file and returns its path.
fn save(directory: &Path, name: &str, vhdx: &VhdxBuilder) -> PathBuf {
    let path = directory.join(name);
    std::fs::write(&path, &vhdx.bytes).unwrap();
    path
}

/// Returns a parent of eight blocks of 1 MiB; each byte of blocks 0 to 5 is the block's index plus one.
fn parent(logical: u32) -> VhdxBuilder {
    (0..6).fold(VhdxBuilder::new(8 * MIB, MIB, logical), |vhdx, block| {
        let at = BLOCKS_AT + block * MIB;
        vhdx.bat(block, at, 6).fill(at, MIB, block as u8 + 1)
    })
}

/// Returns the pairs of the parent locator of a child of [`parent`].
fn linkage(name: &str) -> Vec<(String, String)> {
    vec![
        ("parent_linkage".to_owned(), format!("{{{DATA_GUID}}}")),
        ("relative_path".to_owned(), name.to_owned()),
        ("absolute_win32_path".to_owned(), r"C:\images\base.vhdx".to_owned()),
    ]
}

/// Returns an empty child with this parent locator.
fn child_of(pairs: &[(String, String)], logical: u32) -> VhdxBuilder {
    let pairs: Vec<(&str, &str)> = pairs.iter().map(|(key, value)| (&**key, &**value)).collect();
    VhdxBuilder::new(8 * MIB, MIB, logical).differencing(MIB, &pairs).header_field(32, &guid(CHILD_GUID))
}

/// Returns a child with a block in every state: 0 in the parent, 1 overwritten, 2 zero, 3 partially present,
/// 4 unmapped, 5 undefined, 6 new, 7 in neither file.
fn child(logical: u32) -> VhdxBuilder {
    let chunk_ratio = (1 << 23) * u64::from(logical) / MIB;
    let at = |block: u64| BLOCKS_AT + block * MIB;
    let mut child = child_of(&linkage(r".\base.vhdx"), logical)
        .bat(1, at(0), 6)
        .fill(at(0), MIB, 0xa1)
        .bat(2, 0, 2)
        .bat(3, at(1), 7)
        .fill(at(1), MIB, 0xa3)
        .bat(4, 0, 3)
        .bat(5, 0, 1)
        .bat(6, at(2), 6)
        .fill(at(2), MIB, 0xa6)
        .bat(chunk_ratio, at(3), 6);
    // The sector bitmap of block 3.
    for sector in sectors_here(logical) {
        let bit = 3 * MIB / u64::from(logical) + sector;
        let byte_at = at(3) + bit / 8;
        let byte = child.bytes.get(byte_at as usize).copied().unwrap_or(0) | 1 << (bit % 8);
        child.put(byte_at, &[byte]);
    }
    child
}

/// Returns the sectors of block 3 in the child: scattered bits at first, then whole bytes of the bitmap.
fn sectors_here(logical: u32) -> Vec<u64> {
    let last = MIB / u64::from(logical) - 1;
    [0, 1, 2, 5, 7, 8, 15, 17].into_iter().chain(64..128).chain([last]).collect()
}

/// Returns the content of [`child`] over [`parent`].
fn expected(logical: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for byte in [1, 0xa1, 0, 4, 0, 0, 0xa6, 0] {
        bytes.extend(vec![byte; MIB as usize]);
    }
    for sector in sectors_here(logical) {
        let at = (3 * MIB + sector * u64::from(logical)) as usize;
        bytes[at..at + logical as usize].fill(0xa3);
    }
    bytes
}

#[test]
fn reads_a_child_over_its_parent() {
    for logical in [512, 4096] {
        let directory = tempfile::tempdir().unwrap();
        save(directory.path(), "base.vhdx", &parent(logical));
        let path = save(directory.path(), "child.avhdx", &child(logical));
        let source = open_chain(&path).unwrap();
        assert!(content(&source).unwrap() == expected(logical), "sectors of {logical}");
        let facts = &source.info().facts;
        assert!(facts.iter().any(|fact| fact.key == "subformat" && fact.value == "differencing"));
        let report = check_file(&path);
        assert_eq!(report.corruptions, 0, "{:?}", report.findings);
        assert_eq!(report.allocated_clusters, Some(3));
    }
}

#[test]
fn a_check_compares_the_identifier_and_the_size_of_an_allowed_parent() {
    let directory = tempfile::tempdir().unwrap();
    let path = save(directory.path(), "child.avhdx", &child(512));
    let check = |chain| {
        let options = allowed(ExternalPolicy { chain, ..ExternalPolicy::default() });
        VhdxDriver.check(conformance::input(&path).unwrap(), &options).unwrap()
    };
    let alone = check(false);
    let note = alone.findings[0].contains("only this file was checked, not its parent");
    assert!(alone.corruptions == 0 && note, "{:?}", alone.findings);
    assert_eq!(check(true).check_errors, 1, "a missing parent");
    save(directory.path(), "base.vhdx", &parent(512));
    assert!(check(true).findings.is_empty(), "{:?}", check(true).findings);
    save(directory.path(), "base.vhdx", &VhdxBuilder::new(4 * MIB, MIB, 512));
    let shorter = check(true);
    let note = "note: the disk has 8388608 bytes, but its parent has 4194304";
    assert!(shorter.corruptions == 0 && shorter.findings == [note], "{:?}", shorter.findings);
    save(directory.path(), "base.vhdx", &parent(512).header_field(32, &guid(CHILD_GUID)));
    let other = check(true);
    assert!(other.corruptions == 1 && other.findings[0].contains("is not the disk"), "{:?}", other.findings);
}

#[test]
fn dissect_reads_the_same() {
    require!("dissect");
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "base.vhdx", &parent(512));
    let path = save(directory.path(), "child.avhdx", &child(512));
    let raw = directory.path().join("expected.raw");
    std::fs::write(&raw, expected(512)).unwrap();
    oracles::dissect_compare_vhdx(&path, &raw);
}

#[test]
fn reads_chains_of_several_children() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::create_dir(directory.path().join("snapshots")).unwrap();
    save(directory.path(), "base.vhdx", &parent(512));
    save(directory.path(), "child.avhdx", &child(512));
    let mut link = linkage(r"..\child.avhdx");
    link[0].1 = format!("{{{CHILD_GUID}}}");
    let top = child_of(&link, 512).bat(0, BLOCKS_AT, 6).fill(BLOCKS_AT, MIB, 0x77);
    // The chain leaves the directory of the image, so each file must be allowed by its path.
    let path = save(&directory.path().join("snapshots"), "top.avhdx", &top);
    assert_eq!(open_chain(&path).map(|_| ()).unwrap_err().kind(), ErrorKind::Refused);
    let paths = ["base.vhdx", "child.avhdx"].map(|name| directory.path().join(name)).to_vec();
    let options = allowed(ExternalPolicy { paths, ..ExternalPolicy::default() });
    let source = VhdxDriver.open(conformance::input(&path).unwrap(), &options).unwrap();
    let mut expected = expected(512);
    expected[..MIB as usize].fill(0x77);
    assert!(content(&source).unwrap() == expected);
}

#[test]
fn reads_the_bitmap_of_the_second_chunk() {
    // Block 4097 of 1 MiB is in the second chunk: entry 4098, bitmap entry 8193.
    let directory = tempfile::tempdir().unwrap();
    let size = 4 * GIB + 2 * MIB;
    let base = VhdxBuilder::new(size, MIB, 512).bat(4098, BLOCKS_AT, 6).fill(BLOCKS_AT, MIB, 1);
    save(directory.path(), "base.vhdx", &base);
    let link = linkage(r".\base.vhdx");
    let pairs: Vec<(&str, &str)> = link.iter().map(|(key, value)| (&**key, &**value)).collect();
    let mut child = VhdxBuilder::new(size, MIB, 512)
        .differencing(MIB, &pairs)
        .bat(4098, BLOCKS_AT, 7)
        .fill(BLOCKS_AT, MIB, 2)
        .bat(8193, BLOCKS_AT + MIB, 6);
    // Block 4097 is the second of its chunk: its bits begin at byte 256.
    child.put(BLOCKS_AT + MIB + 256, &[0b10]);
    let path = save(directory.path(), "child.vhdx", &child);
    let source = open_chain(&path).unwrap();
    let mut bytes = [0; 1536];
    disk_of(&source).read_at(&mut bytes, 4 * GIB + MIB).unwrap();
    assert_eq!((bytes[0], bytes[511], bytes[512], bytes[1023], bytes[1024]), (1, 1, 2, 2, 1));
}

#[test]
fn reads_zeros_past_the_end_of_a_shorter_parent() {
    let directory = tempfile::tempdir().unwrap();
    let small = VhdxBuilder::new(2 * MIB + 4096, 2 * MIB, 512)
        .bat(0, BLOCKS_AT, 6)
        .fill(BLOCKS_AT, 2 * MIB, 1)
        .bat(1, BLOCKS_AT + 2 * MIB, 6)
        .fill(BLOCKS_AT + 2 * MIB, 2 * MIB, 2);
    save(directory.path(), "base.vhdx", &small);
    let path = save(directory.path(), "child.vhdx", &child_of(&linkage(r".\base.vhdx"), 512));
    let bytes = content(&open_chain(&path).unwrap()).unwrap();
    let expected = [vec![1; 2 * MIB as usize], vec![2; 4096], vec![0; 6 * MIB as usize - 4096]].concat();
    assert!(bytes == expected);
}

#[test]
fn refuses_parents_unless_allowed() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "base.vhdx", &parent(512));
    let path = save(directory.path(), "child.vhdx", &child(512));
    let Err(error) = open_file(&path) else { panic!("the parent was opened") };
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("base.vhdx"), "{error}");
    let facts = OpenOptions { info_only: true, ..OpenOptions::default() };
    let source = VhdxDriver.open(conformance::input(&path).unwrap(), &facts).unwrap();
    // The path on this system; the facts have the locator's own text, with Windows separators.
    assert_eq!(source.info().references[0].name, "./base.vhdx");
    assert_eq!(source.info().references[0].role, "parent");
    assert!(content(&source).is_err());
}

#[test]
fn refuses_a_parent_with_another_guid() {
    let directory = tempfile::tempdir().unwrap();
    let other = parent(512).header_field(32, &guid("eeeeeeee-0000-4000-8000-000000000009"));
    save(directory.path(), "base.vhdx", &other);
    let path = save(directory.path(), "child.vhdx", &child(512));
    let Err(error) = open_chain(&path) else { panic!("opened") };
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains(DATA_GUID), "{error}");
    // While the parent is being changed, the child names both GUIDs.
    let mut link = linkage(r".\base.vhdx");
    link.push(("parent_linkage2".to_owned(), "{eeeeeeee-0000-4000-8000-000000000009}".to_owned()));
    let path = save(directory.path(), "child2.vhdx", &child_of(&link, 512));
    assert!(open_chain(&path).is_ok());
}

#[test]
fn refuses_bad_parent_locators() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "base.vhdx", &parent(512));
    let open = |pairs: &[(&str, &str)]| {
        let pairs: Vec<(String, String)> =
            pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let path = save(directory.path(), "child.vhdx", &child_of(&pairs, 512));
        open_chain(&path).map(|_| ()).unwrap_err().to_string()
    };
    let link = format!("{{{DATA_GUID}}}");
    assert!(open(&[("relative_path", r".\base.vhdx")]).contains("no parent_linkage"));
    assert!(open(&[("parent_linkage", "x"), ("relative_path", r".\base.vhdx")]).contains("not a GUID"));
    assert!(
        open(&[("parent_linkage", &link), ("absolute_win32_path", r"C:\x.vhdx")])
            .contains("no name of the parent")
    );
    assert!(
        open(&[("parent_linkage", &link), ("relative_path", r".\child.vhdx")])
            .contains("back to an image of the same chain")
    );
    assert!(open(&[("parent_linkage", &link), ("relative_path", r".\none.vhdx")]).contains("none.vhdx"));
    // Two thousand keys that share one text would fill memory.
    assert!(open(&vec![("k", "v"); 2000]).contains("2000 keys"));
    assert!(open(&[("k", "v"), ("k", "w")]).contains("twice"));
}

#[test]
fn refuses_missing_or_misplaced_sector_bitmaps() {
    let directory = tempfile::tempdir().unwrap();
    save(directory.path(), "base.vhdx", &parent(512));
    for (bitmap_at, state) in [(0, 0), (900 * MIB, 6), (0, 6), (BLOCKS_AT, 3)] {
        let path = save(directory.path(), "child.vhdx", &child(512).bat(4096, bitmap_at, state));
        let error = content(&open_chain(&path).unwrap()).unwrap_err();
        assert!(error.to_string().contains("bitmap"), "{error}");
        assert_eq!(error.guest_range(), Some(3 * MIB..4 * MIB));
        let report = check_file(&path);
        assert!(report.corruptions > 0);
    }
}
