//! Tests of the LUKS driver: conformance laws with a passphrase, and what a container can't do.
//! Those beside qemu-img and cryptsetup are in `tests/formats/encrypted.rs` of the program.

#![allow(clippy::unwrap_used, missing_docs)]

use imgtool_core::{CreateOptions, Driver, ErrorKind, OpenOptions, Remedy};
use imgtool_luks::LuksDriver;
use imgtool_testing::conformance::{self as laws, Unlocked, mixed_image, scratch};

fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    let quick = [("iterations", "1000")];
    let pairs = quick.iter().chain(pairs).copied();
    CreateOptions::parse("luks", LuksDriver.options(), pairs).unwrap()
}

/// All laws but those of equal bytes and of sparse files: keys are random, and zeros are encrypted.
#[test]
fn the_laws_hold() {
    let quick = options(&[]);
    for image in laws::patterns() {
        laws::round_trip(&Unlocked(LuksDriver), &quick, &image);
        laws::sequential_equals_random(&Unlocked(LuksDriver), &quick, &image);
    }
    laws::sizes(&Unlocked(LuksDriver), &quick);
    laws::parallel_reads(&Unlocked(LuksDriver), &quick);
    laws::reads_stay_within_the_device(&Unlocked(LuksDriver), &quick);
    laws::cancelled_copies_end(&Unlocked(LuksDriver), &quick);
    laws::cancelled_opens_and_checks_end(&Unlocked(LuksDriver), &quick);
    laws::probe_knows_its_own(&Unlocked(LuksDriver), &quick);
    laws::too_many_devices_are_refused(&Unlocked(LuksDriver), &quick);
    laws::open_ended_sources(&Unlocked(LuksDriver), &quick);
}

#[test]
fn other_ciphers_keep_the_content() {
    for pairs in [
        &[("cipher-alg", "aes-128"), ("cipher-mode", "cbc")][..],
        &[("cipher-alg", "serpent-256"), ("hash-alg", "sha1")],
        &[("cipher-alg", "twofish-256"), ("cipher-mode", "cbc"), ("ivgen-alg", "essiv")],
    ] {
        laws::round_trip(&Unlocked(LuksDriver), &options(pairs), &mixed_image());
    }
}

#[test]
fn contradictory_options_are_refused() {
    for pairs in [
        &[("ivgen-hash-alg", "sha256")][..],
        &[
            ("cipher-alg", "aes-128"),
            ("cipher-mode", "cbc"),
            ("ivgen-alg", "plain64"),
            ("ivgen-hash-alg", "sha256"),
        ],
    ] {
        let error = LuksDriver.writer(&options(pairs)).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Usage);
    }
}

#[test]
fn a_container_opens_for_its_facts_and_extents_without_a_passphrase() {
    let directory = scratch();
    let path = laws::make(&Unlocked(LuksDriver), &options(&[]), &mixed_image(), directory.path());
    let error = laws::open(&LuksDriver, &path).err().unwrap();
    assert_eq!(
        (error.kind(), error.remedy()),
        (ErrorKind::Refused, Some(&Remedy::GiveSecretOrReadAs { format: "raw" }))
    );
    for options in [
        OpenOptions { info_only: true, ..OpenOptions::default() },
        OpenOptions { layout_only: true, ..OpenOptions::default() },
    ] {
        let source = laws::open_with(&LuksDriver, &path, &options).unwrap();
        assert_eq!(source.info().devices[0].size, 3 << 20);
        let random = source.access().random().unwrap();
        let device = source.info().devices[0].id;
        assert!(random.extents(device, 0..3 << 20).unwrap()[0].is_data());
        // Without the key, there is nothing to read: neither noise nor zeros.
        assert!(random.read_at(device, &mut [0; 512], 0).is_err());
        assert!(random.locate(device, 0..4096).is_none());
    }
}

#[test]
fn cut_containers_and_detached_headers_are_refused() {
    let directory = scratch();
    let path = laws::make(&Unlocked(LuksDriver), &options(&[]), &mixed_image(), directory.path());
    let whole = std::fs::read(&path).unwrap();
    let mut detached = whole.clone();
    detached[104..108].fill(0);
    for (bytes, kind) in [
        (&whole[..500], ErrorKind::Corrupt),
        (&whole[..300_000], ErrorKind::Corrupt),
        (&detached, ErrorKind::Unsupported),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let error = laws::open(&Unlocked(LuksDriver), &path).err().unwrap();
        assert_eq!(error.kind(), kind, "{error}");
    }
    // A container holds no size, so a ragged end can only be noted.
    std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    let source = laws::open(&Unlocked(LuksDriver), &path).unwrap();
    assert_eq!(source.info().devices[0].size, (3 << 20) - 512);
    assert_eq!(source.info().notes.len(), 1);
}
