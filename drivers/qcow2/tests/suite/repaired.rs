//! Repairs of images with leaks, wrong refcounts and flags, beside qemu-img's own repair.

use imgtool_core::{Driver, ErrorKind, OpenOptions, Repair};
use imgtool_qcow2::Qcow2Driver;
use imgtool_testing::conformance::scratch;
use imgtool_testing::images::noise;
use imgtool_testing::journal::Journal;
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::{crafted, require};

/// Returns an image with data and a snapshot, and the host offset of its only refcount block.
fn image(options: &str) -> (Vec<u8>, usize) {
    let directory = scratch();
    std::fs::write(directory.path().join("raw"), noise(1, 3 << 20)).unwrap();
    let line = ["convert", "-f", "raw", "-O", "qcow2", "-o", options, "raw", "x"];
    run_in("qemu-img", directory.path(), &line);
    run_in("qemu-img", directory.path(), &["snapshot", "-c", "s", "x"]);
    run_in("qemu-io", directory.path(), &["-c", "write -P 3 0 200k", "x"]);
    let image = std::fs::read(directory.path().join("x")).unwrap();
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    (image, block)
}

fn repair(image: &[u8], what: Repair) -> Journal {
    let journal = Journal::new(image.to_vec());
    Qcow2Driver.repair(&journal.output(), what, &OpenOptions::default()).unwrap();
    journal
}

/// Asserts that qemu-img finds no fault, and the same content as before.
fn assert_clean(image: &[u8], content: &[u8]) {
    let directory = scratch();
    std::fs::write(directory.path().join("x"), image).unwrap();
    let (status, output, errors) = try_run_in("qemu-img", directory.path(), &["check", "-f", "qcow2", "x"]);
    assert_eq!(status, 0, "{output}{errors}");
    assert!(crafted::qemu_content(image, "qcow2") == content);
}

#[test]
fn leaks_and_wrong_refcounts_are_repaired() {
    require!("qemu-img", "qemu-io");
    for options in ["compat=1.1", "compat=0.10", "refcount_bits=8,cluster_size=16k", "extended_l2=on"] {
        let (sound, block) = image(options);
        let content = crafted::read(&Qcow2Driver, &sound).unwrap();
        let width = if options.contains("refcount_bits=8") { 1 } else { 2 };
        // Entries 6 to 9 are of tables and data: one reference less, and one more; the last has a leak.
        let set = |image: &mut Vec<u8>, cluster: usize, by: i8| {
            let low = block + cluster * width + width - 1;
            image[low] = image[low].wrapping_add_signed(by);
        };
        let mut leaking = sound.clone();
        set(&mut leaking, 8, 3);
        set(&mut leaking, 70, 2);
        let mut low = sound.clone();
        set(&mut low, 6, -1);
        set(&mut low, 9, -1);
        set(&mut low, 71, 1);
        for (damaged, what) in
            [(&leaking, Repair::Leaks), (&leaking, Repair::All), (&low, Repair::All), (&sound, Repair::All)]
        {
            let journal = repair(damaged, what);
            if what == Repair::All {
                assert_clean(&journal.now(), &content);
            }
            assert_eq!(crafted::check(&Qcow2Driver, &journal.now()).leaks, 0, "{options}");
            let faults = crafted::check(&Qcow2Driver, damaged).corruptions;
            journal.each_prefix(|image| {
                assert!(crafted::check(&Qcow2Driver, image).corruptions <= faults, "{options}");
                assert!(crafted::read(&Qcow2Driver, image).unwrap() == content);
            });
        }
    }
}

#[test]
fn the_dirty_and_corrupt_bits_are_cleared() {
    require!("qemu-img", "qemu-io");
    let (mut image, _) = image("lazy_refcounts=on");
    let content = crafted::read(&Qcow2Driver, &image).unwrap();
    image[79] |= 3;
    let journal = repair(&image, Repair::All);
    assert_eq!(journal.now()[79], 0);
    assert_clean(&journal.now(), &content);
    assert_eq!(repair(&image, Repair::Leaks).now()[79], 3);
}

#[test]
fn a_killed_writer_with_lazy_refcounts_leaves_what_is_repaired() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    let create = ["create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", "x", "8M"];
    run_in("qemu-img", directory.path(), &create);
    // qemu-io flushes the data, then ends without closing the image.
    let line = ["-c", "write -P 5 1M 3M", "-c", "flush", "-c", "abort", "x"];
    let _ = try_run_in("qemu-io", directory.path(), &line);
    let image = std::fs::read(directory.path().join("x")).unwrap();
    assert_eq!(image[79] & 1, 1, "the dirty bit");
    let content = crafted::read(&Qcow2Driver, &image).unwrap();
    assert!(content[1 << 20..4 << 20].iter().all(|byte| *byte == 5));
    assert_clean(&repair(&image, Repair::All).now(), &content);
}

#[test]
fn lost_tables_are_refused() {
    require!("qemu-img", "qemu-io");
    let (image, _) = image("compat=1.1");
    let l1 = u64::from_be_bytes(image[40..48].try_into().unwrap()) as usize;
    let mut damaged = image.clone();
    // The L2 table is far beyond the end of the file.
    damaged[l1 + 2] = 1;
    let journal = Journal::new(damaged.clone());
    let error = Qcow2Driver.repair(&journal.output(), Repair::All, &OpenOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(journal.now() == damaged, "refused, but changed");
}
