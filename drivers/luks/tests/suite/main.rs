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

/// Without a passphrase, a check sees the header, the key slots, and the end.
#[test]
fn check_finds_lost_keys_and_cut_ends() {
    let directory = scratch();
    let path = laws::make(&Unlocked(LuksDriver), &options(&[]), &mixed_image(), directory.path());
    let whole = std::fs::read(&path).unwrap();
    let findings = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let report = LuksDriver.check(laws::input(&path).unwrap(), &OpenOptions::default()).unwrap();
        assert_eq!(report.corruptions, report.findings.len() as u64);
        report.findings.join("; ")
    };
    let changed = |at: usize, with: &[u8]| {
        let mut bytes = whole.clone();
        bytes[at..at + with.len()].copy_from_slice(with);
        findings(&bytes)
    };
    assert_eq!(findings(&whole), "");
    let offset = u32::from_be_bytes(whole[248..252].try_into().unwrap());
    let material = offset as usize * 512;
    for (text, expected) in [
        (findings(&whole[..whole.len() - 100]), "ends within a sector"),
        (findings(&whole[..300]), "within the header"),
        (findings(&whole[..material + 1000]), "beyond the end of the file"),
        (changed(208, &0xdead_u32.to_be_bytes()), "no key slot is in use"),
        (changed(208, &[1]), "unknown state"),
        (changed(252, &1u32.to_be_bytes()), "stripes"),
        (changed(248, &1_000_000_u32.to_be_bytes()), "but the content begins at"),
        (changed(material, &vec![0; 256_000]), "slot 0 at"),
        // A second slot in the same place.
        (changed(256, &whole[208..256]), "slots 0 and 1 overlaps"),
    ] {
        assert!(text.contains(expected), "{text}, not {expected}");
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
    // A container holds no size, but it has whole sectors.
    std::fs::write(&path, &whole[..whole.len() - 100]).unwrap();
    let error = laws::open(&Unlocked(LuksDriver), &path).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(matches!(error.remedy(), Some(Remedy::Salvage(_))), "{error:#}");
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = laws::open_with(&Unlocked(LuksDriver), &path, &options).unwrap();
    assert_eq!(source.info().devices[0].size, (3 << 20) - 512);
    assert!(source.doubts()[0].reason.contains("412 bytes"), "{:?}", source.doubts());
    let options = OpenOptions { info_only: true, ..OpenOptions::default() };
    let source = laws::open_with(&LuksDriver, &path, &options).unwrap();
    assert_eq!(source.info().notes.len(), 1);
}
