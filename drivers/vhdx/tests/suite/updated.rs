//! Content written into images that exist, and the files that an interrupted writer leaves.

use imgtool_core::{CreateOptions, Driver, ErrorKind, OpenOptions, Repair};
use imgtool_testing::conformance::scratch;
use imgtool_testing::crafted;
use imgtool_testing::images::noise;
use imgtool_testing::journal::{Journal, is_old_or_new, overwritten};
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::require;
use imgtool_vhdx::VhdxDriver;

/// Size in bytes of the images.
const SIZE: usize = 7 << 20;

/// Returns the content of the images: text, a long gap, noise.
fn old_content() -> Vec<u8> {
    let mut disk = vec![0; SIZE];
    disk[..900_000].fill(b'o');
    disk[5_000_000..6_000_000].copy_from_slice(&noise(2, 1_000_000));
    disk
}

/// Returns `len` bytes: noise and zeros in turns.
fn new_content(len: usize) -> Vec<u8> {
    let mut bytes = noise(9, len);
    for start in (150_000..len).step_by(1_500_000) {
        let end = (start + 1_290_000).min(len);
        bytes[start..end].fill(0);
    }
    bytes
}

/// Returns images of [`old_content`] that qemu-img makes.
fn images() -> impl Iterator<Item = Vec<u8>> {
    ["subformat=dynamic,block_size=1M", "subformat=dynamic,block_size=4M", "subformat=fixed"]
        .into_iter()
        .map(|options| crafted::qemu_image(&old_content(), "vhdx", options))
}

#[test]
fn qemu_finds_the_new_content_and_no_fault() {
    require!("qemu-img");
    for image in images() {
        for len in [SIZE, 3_000_001, 4096, 1] {
            let journal = Journal::new(image.clone());
            let new = new_content(len);
            journal.write(&VhdxDriver, &CreateOptions::default(), &new).unwrap();
            let directory = scratch();
            std::fs::write(directory.path().join("x"), journal.now()).unwrap();
            run_in("qemu-img", directory.path(), &["check", "-f", "vhdx", "x"]);
            let expected = overwritten(&old_content(), &new);
            assert!(crafted::qemu_content(&journal.now(), "vhdx") == expected, "{len}");
            assert_eq!(crafted::faults(&VhdxDriver, &journal.now()), (0, 0));
        }
    }
}

#[test]
fn every_write_leaves_a_sound_image() {
    require!("qemu-img");
    for image in images() {
        let (old, len) = (old_content(), 5_300_000);
        let journal = Journal::new(image);
        let new = new_content(len);
        journal.write(&VhdxDriver, &CreateOptions::default(), &new).unwrap();
        let new = overwritten(&old, &new);
        let assert_sound = |image: &[u8]| {
            let report = crafted::check(&VhdxDriver, image);
            assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
            assert!(is_old_or_new(&crafted::read(&VhdxDriver, image).unwrap(), &old, &new));
        };
        journal.each_prefix(&assert_sound);
        journal.each_crash(5, 8, &assert_sound);
        assert!(crafted::read(&VhdxDriver, &journal.now()).unwrap() == new);
    }
}

#[test]
fn qemu_replays_our_log() {
    require!("qemu-img");
    let journal = Journal::new(images().next().unwrap());
    journal.write(&VhdxDriver, &CreateOptions::default(), &new_content(SIZE)).unwrap();
    let directory = scratch();
    let mut replayed = 0;
    journal.each_prefix(|image| {
        let findings = crafted::check(&VhdxDriver, image).findings;
        if !findings.iter().any(|finding| finding.contains("the log is not empty")) {
            return;
        }
        std::fs::write(directory.path().join("x"), image).unwrap();
        run_in("qemu-img", directory.path(), &["check", "-r", "all", "-f", "vhdx", "x"]);
        let found = std::fs::read(directory.path().join("x")).unwrap();
        assert!(crafted::qemu_content(&found, "vhdx") == crafted::read(&VhdxDriver, image).unwrap());
        replayed += 1;
    });
    assert!(replayed > 0, "no state with a log");
}

#[test]
fn a_log_is_replayed_before_the_first_write() {
    require!("qemu-img");
    let journal = Journal::new(images().next().unwrap());
    journal.write(&VhdxDriver, &CreateOptions::default(), &new_content(SIZE)).unwrap();
    let mut with_log = Vec::new();
    journal.each_prefix(|image| {
        let findings = crafted::check(&VhdxDriver, image).findings;
        if with_log.is_empty() && findings.iter().any(|finding| finding.contains("the log is not empty")) {
            with_log = image.to_vec();
        }
    });
    let old = crafted::read(&VhdxDriver, &with_log).unwrap();
    let journal = Journal::new(with_log);
    journal.write(&VhdxDriver, &CreateOptions::default(), &noise(3, 70_000)).unwrap();
    journal.each_prefix(|image| {
        assert_eq!(crafted::faults(&VhdxDriver, image), (0, 0));
        assert!(crafted::read(&VhdxDriver, image).unwrap()[70_144..] == old[70_144..]);
    });
    let directory = scratch();
    std::fs::write(directory.path().join("x"), journal.now()).unwrap();
    let (status, output, errors) = try_run_in("qemu-img", directory.path(), &["check", "-f", "vhdx", "x"]);
    assert_eq!(status, 0, "{output}{errors}");
    let expected = overwritten(&old, &noise(3, 70_000));
    assert!(crafted::qemu_content(&journal.now(), "vhdx") == expected);
}

#[test]
fn other_programs_see_that_the_file_changed() {
    require!("qemu-img");
    let image = images().next().unwrap();
    let guids = |image: &[u8]| -> Vec<Vec<u8>> {
        [65_536, 131_072].map(|at| image[at + 16..at + 48].to_vec()).to_vec()
    };
    let (one, other) = (Journal::new(image.clone()), Journal::new(image.clone()));
    one.write(&VhdxDriver, &CreateOptions::default(), &noise(1, 5000)).unwrap();
    other.write(&VhdxDriver, &CreateOptions::default(), &noise(2, 5000)).unwrap();
    let (one, other) = (guids(&one.now()), guids(&other.now()));
    assert_eq!(one[0], one[1], "both headers");
    assert_ne!(one, guids(&image));
    assert_eq!(one[0][..16], other[0][..16], "the GUID of a writer");
    assert_ne!(one[0][16..], other[0][16..], "the GUID of the content");
}

#[test]
fn refuses_what_it_can_not_keep() {
    require!("qemu-img");
    let image = images().next().unwrap();
    let refusal = |image: &[u8], size: usize| {
        let journal = Journal::new(image.to_vec());
        let error =
            journal.update(&VhdxDriver, &CreateOptions::default(), size as u64).map(|_| ()).unwrap_err();
        assert!(journal.now() == image, "refused, but changed");
        error
    };
    assert_eq!(refusal(&image, SIZE + 512).kind(), ErrorKind::Refused);
    let mut damaged = image.clone();
    damaged[65_540] ^= 1;
    assert!(refusal(&damaged, SIZE).message().contains("damaged"));
    assert_eq!(refusal(&[0; 4096], 512).kind(), ErrorKind::WrongFormat);
}

#[test]
fn a_repair_replays_the_log_and_restores_copies() {
    require!("qemu-img");
    let repair = |image: &[u8]| {
        let journal = Journal::new(image.to_vec());
        VhdxDriver.repair(&journal.output(), Repair::All, &OpenOptions::default()).unwrap();
        journal
    };
    let journal = Journal::new(images().next().unwrap());
    journal.write(&VhdxDriver, &CreateOptions::default(), &new_content(SIZE)).unwrap();
    let mut with_log = Vec::new();
    journal.each_prefix(|image| {
        let findings = crafted::check(&VhdxDriver, image).findings;
        if with_log.is_empty() && findings.iter().any(|finding| finding.contains("the log is not empty")) {
            with_log = image.to_vec();
        }
    });
    let mut torn = with_log.clone();
    // The second copy of the region table.
    torn[256 << 10] ^= 1;
    for damaged in [with_log, torn] {
        let content = crafted::read(&VhdxDriver, &damaged).unwrap();
        let repaired = repair(&damaged);
        assert!(crafted::check(&VhdxDriver, &repaired.now()).findings.is_empty());
        assert!(crafted::qemu_content(&repaired.now(), "vhdx") == content);
        repaired.each_prefix(|image| assert!(crafted::read(&VhdxDriver, image).unwrap() == content));
    }
}
