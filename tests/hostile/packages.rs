//! Malicious packages and archives, tar and zip: names that lead out, sizes that nothing has, descriptors and
//! manifests that lie.

use imgtool_testing::tar::{Tar, descriptor, header, manifest, pax_record, set_size, sum};
use imgtool_testing::tempdir;
use imgtool_testing::zip::{Member, Zip};

use super::all_end;

/// Returns a package of a descriptor and one file.
fn package(text: &str, name: &str, file: &[u8]) -> Tar {
    Tar::new().file("vm.ovf", text.as_bytes()).file(name, file)
}

fn archives() -> Vec<(&'static str, Vec<u8>)> {
    let huge = |len: u64| {
        let mut block = header("disk.raw", b'0', 0);
        set_size(&mut block, len);
        sum(&mut block);
        Tar::new().raw(&block, &[0; 4096]).build()
    };
    let pax = |key: &str, value: &str| {
        Tar::new().member("x", b'x', pax_record(key, value).as_bytes()).file("disk.raw", &[0; 4096]).build()
    };
    let disk = vec![0; 1 << 20];
    let far: Vec<(usize, usize)> = (0..200).map(|number| (number * 5000, 512)).collect();
    let mut endless = Tar::new().sparse("disk.raw", &disk, &far).build();
    let mut block: [u8; 512] = endless[..512].try_into().unwrap();
    block[483..495].copy_from_slice(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff");
    sum(&mut block);
    endless[..512].copy_from_slice(&block);
    let many = (0..70_000).fold(Tar::new(), |tar, number| tar.file(&format!("{number}"), b""));
    vec![
        ("huge.tar", huge(i64::MAX as u64)),
        ("wrapping.tar", huge(u64::MAX - 511)),
        ("pax-size.tar", pax("size", "9223372036854775807")),
        ("pax-path.tar", pax("path", "../../etc/passwd")),
        ("endless-sparse.tar", endless),
        ("many-members.tar", many.build()),
        ("absolute.tar", Tar::new().file("/etc/passwd", &disk).build()),
        ("twice.tar", Tar::new().file("disk.raw", &disk).file("disk.raw", &disk).build()),
        ("itself.tar", (0..8).fold(disk.clone(), |inner, _| Tar::new().file("disk.tar", &inner).build())),
        ("link.tar", Tar::new().member("disk.raw", b'2', b"").build()),
        ("cut.tar", Tar::new().file("disk.raw", &disk).build()[..5000].to_vec()),
    ]
}

fn packages() -> Vec<(&'static str, Vec<u8>)> {
    let disk = vec![0; 1 << 20];
    let plain = descriptor("vm", &[("d.raw", 1 << 20)]);
    let bomb = "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;&a;&a;'>]>\n<Envelope";
    let deep = format!("{}{}", plain.split("<References").next().unwrap(), "<a>".repeat(100_000));
    let wide: String = (0..30_000).map(|number| format!(" a{number}=''")).collect();
    let many: Vec<(String, u64)> = (0..1000).map(|number| (format!("{number}.raw"), 1)).collect();
    let many: Vec<(&str, u64)> = many.iter().map(|(name, size)| (name.as_str(), *size)).collect();
    let same: Vec<(&str, u64)> = (0..200).map(|_| ("d.raw", 1 << 20)).collect();
    let empty = plain.replace(r#" ovf:fileRef="file0""#, "").replace("1048576", "9223372036854775807");
    let flat = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 8 FLAT \"/etc/passwd\" 0\n";
    let with_manifest = |sums: &str| {
        Tar::new()
            .file("vm.ovf", plain.as_bytes())
            .file("vm.mf", sums.as_bytes())
            .file("d.raw", &disk)
            .build()
    };
    vec![
        ("entities.ova", package(&plain.replacen("<Envelope", bomb, 1), "d.raw", &disk).build()),
        ("deep.ova", package(&deep, "d.raw", &disk).build()),
        (
            "wide.ova",
            package(&plain.replacen("<References", &format!("<References{wide}"), 1), "d.raw", &disk).build(),
        ),
        ("path.ova", package(&plain.replace("d.raw", "../../etc/passwd"), "d.raw", &disk).build()),
        ("url.ova", package(&plain.replace("d.raw", "http://127.0.0.1:1/d.raw"), "d.raw", &disk).build()),
        ("flat.ova", package(&plain.replace("d.raw", "d.vmdk"), "d.vmdk", flat.as_bytes()).build()),
        ("many-disks.ova", package(&descriptor("vm", &many), "d.raw", &disk).build()),
        ("one-file-often.ova", package(&descriptor("vm", &same), "d.raw", &disk).build()),
        ("largest-empty.ova", package(&empty, "d.raw", &disk).build()),
        ("wrong-digest.ova", with_manifest(&manifest(&[("vm.ovf", plain.as_bytes()), ("d.raw", b"other")]))),
        ("missing-file.ova", with_manifest(&manifest(&[("gone.raw", b"")]))),
        ("md5.ova", with_manifest("MD5(d.raw)= d41d8cd98f00b204e9800998ecf8427e\n")),
        ("controls.ova", package(&plain, "d\x1b[2J.raw", &disk).file("d.raw", &disk).build()),
    ]
}

fn zips() -> Vec<(&'static str, Vec<u8>)> {
    let disk = vec![0; 1 << 20];
    let plain = || Member::stored("disk.raw", &disk);
    let one = |member: Member| Zip::new().member(&member).build();
    let whole = one(plain());
    let many = (0..70_000).fold(Zip::new(), |zip, number| zip.file(&format!("{number}"), b""));
    let shared = (0..200).fold(Zip::new().member(&plain()), |zip, number| {
        zip.entry(&Member { name: format!("{number}.raw"), ..plain() }, 0)
    });
    vec![
        ("huge.zip", Zip::new().wide().member(&Member { size: 1 << 63, ..plain() }).build()),
        (
            "bomb.zip",
            Zip::new().wide().member(&Member { size: 1 << 50, ..Member::deflated("d.raw", b"x") }).build(),
        ),
        ("wrapping.zip", Zip::new().wide().entry(&plain(), u64::MAX - 20).build()),
        ("many-members.zip", many.build()),
        ("shared-bytes.zip", shared.build()),
        ("path.zip", one(Member::stored("../../etc/passwd", &disk))),
        ("absolute.zip", one(Member::stored("/etc/passwd", &disk))),
        ("link.zip", one(Member { mode: 0o120_777, ..Member::stored("disk.raw", b"/etc/passwd") })),
        ("encrypted.zip", one(Member { flags: 1, ..plain() })),
        ("wrong-checksum.zip", one(Member { crc: 7, ..plain() })),
        ("wrong-checksum-deflated.zip", one(Member { crc: 7, ..Member::deflated("disk.raw", &disk) })),
        ("itself.zip", (0..8).fold(disk.clone(), |inner, _| Zip::new().file("disk.zip", &inner).build())),
        ("cut.zip", whole[..whole.len() - 10].to_vec()),
    ]
}

fn all(name: &str, files: Vec<(&'static str, Vec<u8>)>) {
    let dir = tempdir();
    let write = |(name, bytes): (&str, Vec<u8>)| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let paths: Vec<_> = files.into_iter().map(write).collect();
    all_end(name, dir.path(), &paths);
}

#[test]
fn archives_end_within_the_limits() {
    all("tar-archives", archives());
}

#[test]
fn zip_archives_end_within_the_limits() {
    all("zip-archives", zips());
}

#[test]
fn packages_end_within_the_limits() {
    all("packages", packages());
}
