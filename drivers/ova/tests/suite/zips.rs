//! Zip archives: their members, and what is refused.

use imgtool_core::{Driver, ErrorKind, OpenOptions};
use imgtool_ova::{OvaDriver, TarDriver, ZipDriver};
use imgtool_testing::conformance::{self, Image};
use imgtool_testing::images::{noise, prose};
use imgtool_testing::memory;
use imgtool_testing::tar::{Tar, descriptor, manifest};
use imgtool_testing::zip::{Member, Zip};

use crate::{bytes_of, contents, open, options, refusal, small, vmdk};

fn disk() -> Vec<u8> {
    [prose(1, 512 * 40), noise(2, 512 * 300)].concat()
}

#[test]
fn zip_archives_obey_the_laws() {
    let disk = small(1);
    let content = bytes_of(&disk);
    let (device, content_of_disk) = disk.devices[0].clone();
    let image = Image::disk("disk", device.size, content_of_disk);
    let stored = Zip::new().file("disk.raw", &content).build();
    let deflated = Zip::new().member(&Member::deflated("d/disk.raw", &content)).build();
    conformance::read_only_with(&ZipDriver, &[(&stored, image.clone()), (&deflated, image)], &options());
}

#[test]
fn reads_stored_and_deflated_members_of_both_sizes() {
    for zip in [Zip::new(), Zip::new().wide()] {
        let archive = zip
            .member(&Member { mode: 0o040_755, ..Member::stored("d/", b"") })
            .file("README.txt", b"notes")
            .file("d/one.raw", &disk())
            .member(&Member::deflated("two.VMDK", &vmdk(&small(2))))
            .build();
        let found = contents(&ZipDriver, &archive);
        assert_eq!(found[0], ("one".to_owned(), disk()));
        assert_eq!(found[1], ("two".to_owned(), bytes_of(&small(2))));
        assert_eq!(found.len(), 2);
    }
}

/// The comment may contain anything, also what looks like the end of an archive.
#[test]
fn comments_are_no_part_of_the_archive() {
    let mut archive = Zip::new().file("disk.raw", &disk()).build();
    let at = archive.len() - 2;
    archive[at..].copy_from_slice(&30_u16.to_le_bytes());
    archive.extend(b"PK\x05\x06 is the mark of the end.....");
    archive.truncate(at + 2 + 30);
    assert_eq!(contents(&ZipDriver, &archive)[0].1, disk());
}

#[test]
fn packages_in_zip_archives_have_their_machine() {
    let image = vmdk(&small(0));
    let text = descriptor("vm", &[("a.vmdk", small(0).devices[0].0.size)]);
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("a.vmdk", &image)]);
    let archive = Zip::new()
        .member(&Member::deflated("vm.ovf", text.as_bytes()))
        .file("vm.mf", sums.as_bytes())
        .member(&Member::deflated("a.vmdk", &image))
        .build();
    let source = open(&ZipDriver, &archive).unwrap();
    assert_eq!(source.info().machine.as_ref().unwrap().name, "vm");
    assert_eq!(contents(&ZipDriver, &archive)[0].1, bytes_of(&small(0)));
}

#[test]
fn wrong_checksums_are_damage() {
    let stored = Member { crc: 1, ..Member::stored("disk.raw", &disk()) };
    let source = open(&ZipDriver, &Zip::new().member(&stored).build()).unwrap();
    source.access().random().unwrap().read_at(source.info().devices[0].id, &mut [0; 512], 0).unwrap();
    let error = source.verify().unwrap_err();
    assert!(error.to_string().contains("'disk.raw' does not have the CRC-32 checksum"), "{error}");
    let deflated = Member { crc: 1, ..Member::deflated("disk.raw", &disk()) };
    let error = refusal(&ZipDriver, &Zip::new().member(&deflated).build());
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
}

#[test]
fn refuses_what_is_hostile_or_not_read() {
    let plain = || Member::stored("disk.raw", &disk());
    let whole = Zip::new().file("disk.raw", &disk()).build();
    let with = |member: Member| Zip::new().member(&member).build();
    let other = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let far = Zip::new().wide().entry(&plain(), u64::MAX - 40).build();
    let shared = Zip::new().member(&plain()).entry(&Member { name: "b.raw".into(), ..plain() }, 0).build();
    let twice = Zip::new().member(&plain()).member(&plain()).build();
    let longer = Member { size: 1 << 63, ..plain() };
    let mut fewer = Zip::new().file("a.raw", &disk()).file("b.raw", &disk()).build();
    // The end record (22 bytes) states the number of entries twice.
    let end = fewer.len() - 22;
    fewer[end + 8..end + 12].copy_from_slice(&[1, 0, 1, 0]);
    for (what, bytes, kind, says) in [
        ("encrypted", with(Member { flags: 1, ..plain() }), ErrorKind::Unsupported, "encryption"),
        ("deflate64", with(Member { method: 9, ..plain() }), ErrorKind::Unsupported, "deflate64"),
        ("zstd", with(Member { method: 93, ..plain() }), ErrorKind::Unsupported, "zstd"),
        ("leads out", with(Member::stored("../disk.raw", &disk())), ErrorKind::Refused, "leads out"),
        ("absolute", with(Member::stored("/disk.raw", &disk())), ErrorKind::Refused, "leads out"),
        ("link", with(Member { mode: 0o120_777, ..plain() }), ErrorKind::Unsupported, "no file"),
        ("far", far, ErrorKind::Malformed, ""),
        ("shared", shared, ErrorKind::Malformed, "share bytes"),
        ("fewer", fewer, ErrorKind::Malformed, "more than the 1 entries"),
        ("twice", twice, ErrorKind::Malformed, "two members are called"),
        ("size", Zip::new().wide().member(&longer).build(), ErrorKind::Malformed, "can't have"),
        ("bomb", with(Member { size: 1 << 40, ..Member::deflated("a.raw", b"x") }), ErrorKind::Malformed, ""),
        ("local name", other(31), ErrorKind::Malformed, "differs from its entry"),
        ("local method", other(8), ErrorKind::Malformed, "differs from its entry"),
        ("cut", whole[..whole.len() - 30].to_vec(), ErrorKind::Corrupt, "cut short"),
    ] {
        let error = refusal(&ZipDriver, &bytes);
        let text = format!("{error} {:?}", error.remedy());
        assert!(error.kind() == kind && text.contains(says), "{what}: {:?} {text}", error.kind());
    }
}

/// zip(1) stores what it reads from a pipe with the type of the pipe.
#[test]
fn a_member_from_a_pipe_is_a_file() {
    let piped = Member { mode: 0o010_600, ..Member::stored("disk.raw", &disk()) };
    let bytes = Zip::new().member(&piped).build();
    let source = ZipDriver.open(memory::as_file("s.zip", &bytes), &options()).unwrap();
    assert_eq!(source.info().devices[0].size, disk().len() as u64);
}

#[test]
fn the_chosen_member_is_the_image() {
    let (a, b) = (disk(), noise(9, 512 * 7));
    let tar = Tar::new().file("a.bin", &a).file("d/b.raw", &b).file("e/c.raw", &a).build();
    let zip =
        Zip::new().file("a.bin", &a).member(&Member::deflated("d/b.raw", &b)).file("e/c.raw", &a).build();
    let text = descriptor("vm", &[("a.vmdk", 512)]);
    let ova = Tar::new().file("vm.ovf", text.as_bytes()).file("d/b.raw", &b).file("d2/c.raw", &b).build();
    let chosen = |driver: &dyn Driver, bytes: &[u8], member: &str| {
        let options = OpenOptions { member: Some(member.to_owned()), ..options() };
        driver.open(memory::as_file("image", bytes), &options).map(|source| {
            let device = source.info().single("the test").unwrap().clone();
            let mut content = vec![0; usize::try_from(device.size).unwrap()];
            source.access().random().unwrap().read_at(device.id, &mut content, 0).unwrap();
            source.verify().unwrap();
            content
        })
    };
    let archives: [(&dyn Driver, &[u8]); 3] = [(&TarDriver, &tar), (&ZipDriver, &zip), (&OvaDriver, &ova)];
    for (driver, bytes) in archives {
        for name in ["d/b.raw", "b.raw"] {
            assert_eq!(chosen(driver, bytes, name).unwrap(), b, "{}", driver.name());
        }
        let error = chosen(driver, bytes, "b.rew").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.remedy().unwrap().to_string().contains("d/b.raw"), "{error}");
    }
}
