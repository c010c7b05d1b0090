//! OVF packages: descriptor, manifest, disks of every kind, and what is refused.

use imgtool_core::{Disk, Driver, ErrorKind, OpenOptions};
use imgtool_ova::{OvaDriver, TarDriver};
use imgtool_testing::crafted::qemu_image;
use imgtool_testing::images::prose;
use imgtool_testing::oracles::filter;
use imgtool_testing::tar::{Tar, descriptor, manifest};
use imgtool_testing::{memory, require, tempdir};

use crate::{bytes_of, contents, open, options, package, refusal, small, vmdk};

/// Returns a package of one disk, whose file is called `name`.
fn of_one(name: &str, file: &[u8], capacity: u64) -> Tar {
    let text = descriptor("vm", &[(name, capacity)]);
    Tar::new().file("vm.ovf", text.as_bytes()).file(name, file)
}

#[test]
fn reads_every_disk_in_the_order_of_the_descriptor() {
    let (first, second) = (small(1), small(2));
    let text = descriptor("vm", &[("b.vmdk", 1), ("a.vmdk", 2)]);
    let archive = Tar::new()
        .file("a.vmdk", &vmdk(&second))
        .file("b.vmdk", &vmdk(&first))
        .file("vm.nvram", b"variables")
        .file("vm.ovf", text.as_bytes())
        .build();
    for driver in [&OvaDriver as &dyn Driver, &TarDriver] {
        let found = contents(driver, &archive);
        assert_eq!(found, [("b".to_owned(), bytes_of(&first)), ("a".to_owned(), bytes_of(&second))]);
    }
    let source = open(&OvaDriver, &archive).unwrap();
    let notes = source.info().notes.join("\n");
    assert!(notes.contains("no disk, and left out: 'vm.nvram'"), "{notes}");
    assert!(notes.contains("b: the descriptor says 1 bytes, the disk has 512512, which count"), "{notes}");
    assert_eq!(source.info().attachments[0].name, "vm.ovf");
    assert_eq!(source.info().machine.as_ref().unwrap().name, "vm");
}

/// A raw disk alone can't tell that its file was cut.
#[test]
fn a_raw_disk_shorter_than_its_description_is_refused() {
    let disk = prose(3, 512 * 300);
    let package = of_one("d.raw", &disk, 512 * 301).build();
    let error = refusal(&OvaDriver, &package);
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains("153600 bytes of the 154112"), "{error}");
    let options = OpenOptions { salvage: true, ..options() };
    let source = OvaDriver.open(memory::as_file("vm.ova", &package), &options).unwrap();
    assert_eq!(source.info().devices[0].size, 512 * 300);
}

#[test]
fn reads_the_formats_that_packages_contain() {
    require!("qemu-img", "gzip");
    let disk = prose(3, 512 * 300);
    let size = disk.len() as u64;
    for (name, format, options) in [
        ("d.vmdk", "vmdk", "subformat=streamOptimized"),
        ("d.vmdk", "vmdk", "subformat=monolithicSparse"),
        ("d.qcow2", "qcow2", ""),
        ("d.vhd", "vpc", "subformat=dynamic,force_size=on"),
        ("d.vhd", "vpc", "subformat=fixed,force_size=on"),
    ] {
        let file = qemu_image(&disk, format, options);
        let found = contents(&OvaDriver, &of_one(name, &file, size).build());
        assert!(found[0].1 == disk, "{name} {options}");
    }
    assert!(contents(&OvaDriver, &of_one("d.raw", &disk, size).build())[0].1 == disk);
}

#[test]
fn reads_compressed_and_chunked_files() {
    require!("gzip");
    let disk = small(1);
    let file = vmdk(&disk);
    let text = descriptor("vm", &[("d.vmdk", 1)]);
    let gzip = text.replace(r#"ovf:id="file0""#, r#"ovf:id="file0" ovf:compression="gzip""#);
    let packed = filter("gzip", &["-c"], &file);
    let archive = Tar::new().file("vm.ovf", gzip.as_bytes()).file("d.vmdk", &packed).build();
    assert_eq!(contents(&OvaDriver, &archive), [("d".to_owned(), bytes_of(&disk))]);
    let not_packed = Tar::new().file("vm.ovf", gzip.as_bytes()).file("d.vmdk", &file).build();
    assert_eq!(refusal(&OvaDriver, &not_packed).kind(), ErrorKind::WrongFormat);

    let chunked = text.replace(r#"ovf:id="file0""#, r#"ovf:id="file0" ovf:chunkSize="5000""#);
    let chunks = |archive: Tar, count: usize| {
        let names = (0..count).map(|number| format!("d.vmdk.{number:09}"));
        let parts = names.zip(file.chunks(5000));
        parts.fold(archive, |archive, (name, chunk)| archive.file(&name, chunk))
    };
    assert!(file.len() > 5000);
    let begin = || Tar::new().file("vm.ovf", chunked.as_bytes());
    assert_eq!(contents(&OvaDriver, &chunks(begin(), 1000).build()), [("d".to_owned(), bytes_of(&disk))]);
    let memory = imgtool_core::Memory::default();
    let _others = memory.lease(memory.free() - (2 << 20), "the rest").unwrap();
    let small = OpenOptions { memory, ..options() };
    let many = (0..5000).fold(begin(), |tar, number| tar.file(&format!("d.vmdk.{number:09}"), b"x")).build();
    let error = OvaDriver.open(memory::as_file("x", &many), &small).map(drop).expect_err("too many chunks");
    assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{error}");
    assert!(error.to_string().contains("the chunks of a file"), "{error}");
    let error = refusal(&OvaDriver, &begin().file("d.vmdk", &file).build());
    assert!(error.to_string().contains("'d.vmdk.000000000' is missing"), "{error}");
}

#[test]
fn a_disk_without_a_file_is_empty() {
    let text = descriptor("vm", &[("d.vmdk", 8192)]).replace(r#" ovf:fileRef="file0""#, "");
    let source = open(&OvaDriver, &Tar::new().file("vm.ovf", text.as_bytes()).build()).unwrap();
    let disk = Disk::only(source, "the package").unwrap();
    assert_eq!((disk.name(), disk.size()), ("vmdisk0", 8192));
    assert!(disk.extents(0..8192).unwrap().iter().all(|extent| !extent.is_data()));
    let mut content = [1; 100];
    disk.read_at(&mut content, 8000).unwrap();
    assert_eq!(content, [0; 100]);
}

#[test]
fn notes_what_the_manifest_or_the_package_lacks() {
    let file = vmdk(&small(1));
    let size = small(1).devices[0].0.size;
    let text = descriptor("vm", &[("d.vmdk", size)])
        .replace("</References>", r#"<File ovf:href="v.nvram" ovf:id="v"/></References>"#);
    let sums = manifest(&[("vm.ovf", text.as_bytes())]);
    let tar = Tar::new().file("vm.ovf", text.as_bytes()).file("vm.mf", sums.as_bytes()).file("d.vmdk", &file);
    let notes = |tar: Tar| open(&OvaDriver, &tar.build()).unwrap().info().notes.join("\n");
    let found = notes(tar.clone());
    assert!(found.contains("the manifest has no digest of 'd.vmdk', so damage may go unnoticed"), "{found}");
    assert!(found.contains("missing from the package, but needed by no disk: 'v.nvram'"), "{found}");
    let found = notes(tar.file("v.nvram", b"variables"));
    assert!(!found.contains("missing"), "{found}");
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("d.vmdk", &file)]);
    let found = notes(
        Tar::new().file("vm.ovf", text.as_bytes()).file("vm.mf", sums.as_bytes()).file("d.vmdk", &file),
    );
    assert!(!found.contains("no digest"), "{found}");
}

#[test]
fn the_extension_below_a_compression_tells_the_format() {
    require!("gzip");
    let disk = prose(3, 512 * 30);
    let text = descriptor("vm", &[("d.raw.gz", disk.len() as u64)])
        .replace(r#"ovf:id="file0""#, r#"ovf:id="file0" ovf:compression="gzip""#);
    let packed = filter("gzip", &["-c"], &disk);
    let archive = Tar::new().file("vm.ovf", text.as_bytes()).file("d.raw.gz", &packed).build();
    assert_eq!(contents(&OvaDriver, &archive), [("d".to_owned(), disk)]);
}

#[test]
fn a_manifest_is_found_by_any_case_and_by_its_extension() {
    let text = descriptor("vm", &[("d.raw", 512)]);
    let sums = manifest(&[("VM.OVF", text.as_bytes()), ("d.raw", &[1; 512])]);
    for name in ["VM.mf", "VM.MF", "vm.mf", "export.mf"] {
        let tar = Tar::new().file("VM.OVF", text.as_bytes()).file(name, sums.as_bytes());
        let source = open(&OvaDriver, &tar.file("d.raw", &[2; 512]).build()).unwrap();
        assert!(!source.info().notes.iter().any(|note| note.contains("left out")), "{name}");
        Disk::all(&source).unwrap()[0].read_at(&mut [0; 512], 0).unwrap();
        assert_eq!(source.verify().expect_err(name).kind(), ErrorKind::Corrupt, "{name}");
    }
    let dir = tempdir();
    std::fs::write(dir.path().join("VM.OVF"), &text).unwrap();
    std::fs::write(dir.path().join("VM.MF"), &sums).unwrap();
    std::fs::write(dir.path().join("d.raw"), [2; 512]).unwrap();
    let input = imgtool_testing::conformance::input(&dir.path().join("VM.OVF")).unwrap();
    let source = OvaDriver.open(input, &options()).unwrap();
    Disk::all(&source).unwrap()[0].read_at(&mut [0; 512], 0).unwrap();
    assert_eq!(source.verify().unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn two_disks_in_one_file_are_refused() {
    let text =
        descriptor("vm", &[("d.vmdk", 1), ("e.vmdk", 1)]).replace(r#"fileRef="file1""#, r#"fileRef="file0""#);
    let file = vmdk(&small(1));
    let archive =
        Tar::new().file("vm.ovf", text.as_bytes()).file("d.vmdk", &file).file("e.vmdk", &file).build();
    let error = refusal(&OvaDriver, &archive);
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(
        error.to_string().contains("the disks 'd' and 'vmdisk1' are both in the file 'd.vmdk'"),
        "{error}"
    );
}

#[test]
fn compares_the_digests_of_what_was_read() {
    let (sound, _) = package();
    let at = sound.windows(4).position(|bytes| bytes == b"KDMV").unwrap();
    let mut changed = sound.clone();
    // A byte of the descriptor inside of the disk, which no checksum of the disk covers.
    let comment = sound[at..].windows(4).position(|bytes| bytes == b"# Ex").unwrap();
    changed[at + comment + 2] ^= 1;
    let report = OvaDriver.check(memory::as_file("x", &sound), &options()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
    let report = OvaDriver.check(memory::as_file("x", &changed), &options()).unwrap();
    assert_eq!(report.corruptions, 1, "{:?}", report.findings);
    assert!(report.findings[0].contains("'vm-disk1.vmdk' does not have the SHA256 digest"));

    let source = open(&OvaDriver, &changed).unwrap();
    source.verify().unwrap();
    let disks = Disk::all(&source).unwrap();
    disks[1].read_at(&mut [0; 512], 0).unwrap();
    source.verify().expect("the first disk was not read");
    disks[0].read_at(&mut [0; 512], 0).unwrap();
    let error = source.verify().unwrap_err();
    assert_eq!((error.kind(), error.device_name()), (ErrorKind::Corrupt, Some("vm-disk1")));

    let salvage = OpenOptions { salvage: true, ..options() };
    let source = OvaDriver.open(memory::as_file("x", &changed), &salvage).unwrap();
    Disk::all(&source).unwrap()[0].read_at(&mut [0; 512], 0).unwrap();
    source.verify().unwrap();
    assert_eq!(source.losses().len(), 1);
}

/// A sparse copy that broke off reads as a hole, and a caller that shares blocks reads nothing itself.
#[test]
fn compares_the_digests_of_what_was_only_mapped() {
    let text = descriptor("vm", &[("d.raw", 65_536)]);
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("d.raw", &prose(1, 65_536))]);
    let archive = Tar::new()
        .file("vm.ovf", text.as_bytes())
        .file("vm.mf", sums.as_bytes())
        .sparse("d.raw", &[0; 65_536], &[(0, 0)])
        .build();
    type Question = fn(&Disk);
    let questions: [(&str, Question); 4] = [
        ("extents", |disk| drop(disk.extents(0..65_536).unwrap())),
        ("rough extents", |disk| drop(disk.rough_extents(0..65_536, 4096).unwrap())),
        ("map", |disk| drop(disk.map(0..65_536).unwrap())),
        ("locate", |disk| {
            _ = disk.locate(0..65_536);
        }),
    ];
    for (what, ask) in questions {
        let source = open(&OvaDriver, &archive).unwrap();
        ask(&Disk::all(&source).unwrap()[0]);
        assert_eq!(source.verify().expect_err(what).kind(), ErrorKind::Corrupt, "{what}");
    }
}

#[test]
fn refuses_contradictory_packages() {
    let file = vmdk(&small(1));
    let text = descriptor("vm", &[("d.vmdk", 512_512)]);
    let with = |sums: &str| {
        Tar::new()
            .file("vm.ovf", text.as_bytes())
            .file("vm.mf", sums.as_bytes())
            .file("d.vmdk", &file)
            .build()
    };
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("d.vmdk", &file)]);
    open(&OvaDriver, &with(&sums)).unwrap();
    for (archive, what) in [
        (with(&manifest(&[("vm.ovf", b"other")])), "'vm.ovf' does not have the SHA256 digest"),
        (with(&format!("{sums}{}", manifest(&[("e.vmdk", b"")]))), "'e.vmdk' is missing"),
        (with(&sums.repeat(2)), "lists 'vm.ovf' twice"),
        (with("MD5(vm.ovf)= 00"), "unknown algorithm 'MD5'"),
        (with(&" ".repeat(2 << 20)), "the manifest has 2097152 bytes"),
        (Tar::new().file("vm.ovf", text.as_bytes()).build(), "'d.vmdk' is missing"),
        (Tar::new().file("vm.ovf", text.as_bytes()).file("b.ovf", b"").build(), "two descriptors"),
        (Tar::new().file("vm.ovf", &vec![b' '; 5 << 20]).build(), "the descriptor has 5242880 bytes"),
        (
            Tar::new().file("vm.ovf", text.as_bytes()).member("d.vmdk", b'2', b"").build(),
            "'d.vmdk' is missing",
        ),
        (of_one("d.vmdk", b"no disk", 512).build(), "device d"),
        (of_one("../d.vmdk", b"", 512).build(), "leads out"),
    ] {
        let error = refusal(&OvaDriver, &archive);
        assert!(error.to_string().contains(what), "{what}: {error}");
    }
}

/// Whatever the user allows: names in an untrusted archive lead nowhere.
#[test]
fn nothing_outside_of_a_package_is_opened() {
    require!("qemu-img");
    let dir = tempdir();
    let secret = dir.path().join("secret.raw");
    std::fs::write(&secret, vec![1; 65_536]).unwrap();
    let overlay = dir.path().join("overlay.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "secret.raw", "overlay.qcow2"];
    imgtool_testing::oracles::run_in("qemu-img", dir.path(), &args);
    let overlay = of_one("d.qcow2", &std::fs::read(overlay).unwrap(), 65_536).build();
    let flat = "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicFlat\"\nRW 128 FLAT \"secret.raw\" 0\n";
    let flat = of_one("d.vmdk", flat.as_bytes(), 65_536).file("secret.raw", &[2; 65_536]).build();
    for (number, archive) in [overlay, flat].iter().enumerate() {
        let path = dir.path().join(format!("{number}.ova"));
        std::fs::write(&path, archive).unwrap();
        let input = imgtool_testing::conformance::input(&path).unwrap();
        let error = OvaDriver.open(input, &options()).map(drop).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
        assert!(error.to_string().contains("nothing outside of it is opened"), "{error}");
    }
}

#[test]
fn reads_a_package_in_a_directory() {
    let dir = tempdir();
    let disk = small(2);
    let file = vmdk(&disk);
    let text = descriptor("vm", &[("d.vmdk", bytes_of(&disk).len() as u64)]);
    let path = dir.path().join("vm.ovf");
    std::fs::write(&path, &text).unwrap();
    std::fs::write(dir.path().join("d.vmdk"), &file).unwrap();
    let open = || OvaDriver.open(imgtool_testing::conformance::input(&path).unwrap(), &options());
    let read = || {
        let disk = Disk::only(open().unwrap(), "the package").unwrap();
        let mut content = vec![7; usize::try_from(disk.size()).unwrap()];
        disk.read_at(&mut content, 0).unwrap();
        content
    };
    assert!(read() == bytes_of(&disk));
    let sums = manifest(&[("vm.ovf", text.as_bytes()), ("d.vmdk", &file)]);
    std::fs::write(dir.path().join("vm.mf"), &sums).unwrap();
    assert!(read() == bytes_of(&disk));
    let input = imgtool_testing::conformance::input(&path).unwrap();
    let report = OvaDriver.check(input, &options()).unwrap();
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
    let more = format!("{sums}{}", manifest(&[("gone.nvram", b"")]));
    std::fs::write(dir.path().join("vm.mf"), more).unwrap();
    let error = open().map(drop).unwrap_err();
    assert!(error.to_string().contains("'gone.nvram' is missing"), "{error}");
    std::fs::write(dir.path().join("vm.mf"), manifest(&[("vm.ovf", b"")])).unwrap();
    assert_eq!(open().map(drop).unwrap_err().kind(), ErrorKind::Corrupt);
    std::fs::remove_file(dir.path().join("vm.mf")).unwrap();
    std::fs::remove_file(dir.path().join("d.vmdk")).unwrap();
    let error = open().map(drop).unwrap_err();
    assert!(error.to_string().contains("'d.vmdk' is missing"), "{error}");
    std::os::unix::fs::symlink("/etc/hostname", dir.path().join("d.vmdk")).unwrap();
    assert_eq!(open().map(drop).unwrap_err().kind(), ErrorKind::Refused, "a link leads out of the directory");
}
