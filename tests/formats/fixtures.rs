//! Archives made by the reference program: every device has the digest in the manifest.

use imgtool_testing::manifest::{Entry, archives};
use imgtool_testing::{fixture, names, oracles, sha256_file, tempdir, text};

use crate::support::imgtool;
use crate::support::run::Run;

/// Unpacks a fixture into a directory and compares every device with the manifest.
fn unpack(entry: &Entry, how: &str, convert: impl Fn(&str) -> Run) {
    let dir = tempdir();
    let out = dir.path().join("out");
    // With the slash, even a single disk goes into a directory.
    convert(&format!("{}/", text(&out))).ok();
    let mut expected: Vec<String> = entry.devices.iter().map(|device| device.file_name("raw")).collect();
    expected.extend(entry.attachments.iter().cloned());
    if entry.attachments.iter().any(|name| name == "qemu-server.conf") {
        expected.push("fixture.xml".to_owned());
    }
    expected.sort();
    assert_eq!(names(&out), expected, "{} {how}", entry.file);
    for device in &entry.devices {
        let path = out.join(device.file_name("raw"));
        assert_eq!(std::fs::metadata(&path).unwrap().len(), device.size, "{} {how}", entry.file);
        assert_eq!(sha256_file(&path), device.sha256, "{} {}: {how}", entry.file, device.name);
    }
    for name in &entry.attachments {
        assert_eq!(sha256_file(&out.join(name)), sha256_file(&fixture(name)), "{} {how}", entry.file);
    }
}

#[test]
fn manifest_matches_the_fixture_files() {
    for entry in archives() {
        let path = fixture(&entry.file);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), entry.bytes, "{}", entry.file);
        assert_eq!(sha256_file(&path), entry.file_sha256, "{}", entry.file);
    }
}

#[test]
fn unpacks_fixtures_from_files() {
    for entry in archives() {
        let path = fixture(&entry.file);
        unpack(&entry, "from the file", |out| imgtool(["convert", text(&path), "--to", "raw", out]));
    }
}

#[test]
fn unpacks_fixtures_from_pipes() {
    for entry in archives() {
        let path = fixture(&entry.file);
        unpack(&entry, "from a pipe", |out| imgtool(["convert", "-", "--to", "raw", out]).pipe_from(&path));
    }
}

#[test]
fn unpacks_fixtures_with_an_explicit_format() {
    for entry in archives() {
        let path = fixture(&entry.file);
        unpack(&entry, "-f vma", |out| imgtool(["convert", "-f", "vma", text(&path), "--to", "raw", out]));
    }
}

#[test]
fn unpacked_qcow2_and_vhdx_images_match_the_manifest() {
    for entry in archives().iter().filter(|entry| entry.compression.as_deref() != Some("lzop")) {
        for format in ["qcow2", "vhdx"] {
            let dir = tempdir();
            let out = dir.path().join("out");
            let target = format!("{}/", text(&out));
            imgtool(["convert", text(&fixture(&entry.file)), "--to", format, &target]).ok();
            for device in entry.devices.iter().filter(|device| device.kind == "disk") {
                let image = out.join(device.file_name(format));
                let back = dir.path().join("back.raw");
                imgtool(["convert", "--force", text(&image), "--to", "raw", text(&back)]).ok();
                assert_eq!(sha256_file(&back), device.sha256, "{} {}", entry.file, device.name);
                if oracles::have("qemu-img") {
                    oracles::qemu_check(&image, format);
                    oracles::qemu_compare(&back, "raw", &image, format);
                }
            }
        }
    }
}

#[test]
fn unpacks_only_the_selected_disk() {
    let dir = tempdir();
    let (out, entry) = (dir.path().join("efi.raw"), &archives()[0]);
    let source = fixture(&entry.file);
    imgtool(["convert", text(&source), "--to", "raw", "--disk", "drive-efidisk0", text(&out)]).ok();
    let wanted = entry.devices.iter().find(|device| device.name == "drive-efidisk0").unwrap();
    assert_eq!(sha256_file(&out), wanted.sha256);
    assert_eq!(names(dir.path()), ["efi.raw"]);
}
