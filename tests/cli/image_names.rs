//! Names of images beside paths, as qemu-img takes them: options, JSON, `zeroinit:`, and passphrases in objects.

use std::path::Path;

use imgtool_testing::images::noise;
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::{names, require, snapshot, tempdir};

use crate::support::imgtool;

/// Makes a disk as raw, qcow2 and VDI image, the qcow2 one with a comma in its name.
fn scene() -> tempfile::TempDir {
    let dir = tempdir();
    let mut disk = noise(3, 2 << 20);
    disk[300_000..1_500_000].fill(0);
    std::fs::write(dir.path().join("disk.raw"), disk).unwrap();
    for (format, name) in [("qcow2", "a,b.img"), ("vdi", "disk.vdi")] {
        run_in("qemu-img", dir.path(), &["convert", "-O", format, "disk.raw", name]);
    }
    dir
}

/// Runs qemu-img and imgtool with the same arguments. Returns true if both succeed, false if both fail. A new file
/// of qemu-img makes room for ours.
#[track_caller]
fn both(directory: &Path, line: &[&str]) -> bool {
    let target = directory.join(line.last().expect("arguments"));
    let existed = target.exists();
    let (theirs, _, errors) = try_run_in("qemu-img", directory, line);
    if target.exists() && !existed {
        std::fs::remove_file(&target).unwrap();
    }
    let ours = imgtool(line).within(directory).go();
    assert_eq!(theirs == 0, ours.status.success(), "{line:?}\n{errors}{}", ours.stderr);
    theirs == 0
}

const QCOW2: [&str; 4] = [
    "driver=qcow2,file.filename=a,,b.img",
    "driver=qcow2,file.driver=file,file.filename=a,,b.img,file.locking=auto,cache.direct=off,discard=unmap",
    "file.driver=file,file.filename=a,,b.img",
    "read-only=on,node-name=n,l2-cache-size=1048576,file.filename=a,,b.img,driver=qcow2",
];

const JSON: [&str; 4] = [
    r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a,b.img"}}"#,
    r#"json:{"driver":"qcow2","file.filename":"a,b.img","read-only":true}"#,
    r#"json:{"file":{"filename":"a,b.img"}}"#,
    r#"json:{"driver":"vdi","file":{"driver":"file","filename":"disk.vdi","cache":{"direct":false}}}"#,
];

#[test]
fn options_and_json_name_the_same_image_as_for_qemu_img() {
    require!("qemu-img");
    let dir = scene();
    let run = |line: &[&str]| imgtool(line).within(dir.path()).ok();
    for name in QCOW2.into_iter().chain(JSON) {
        let flag: &[&str] = if name.starts_with("json:") { &[] } else { &["--image-opts"] };
        let line = |command: &[&'static str], more: &[&'static str]| [command, flag, more].concat();
        assert!(both(dir.path(), &[&line(&["convert", "-O", "raw"], &[])[..], &[name, "x.raw"]].concat()));
        run(&["compare", "disk.raw", "x.raw"]);
        assert!(both(dir.path(), &[&line(&["info"], &[])[..], &[name]].concat()));
        assert!(both(dir.path(), &[&line(&["map", "--output", "json"], &[])[..], &[name]].concat()));
        assert!(both(dir.path(), &[&line(&["check"], &[])[..], &[name]].concat()));
        assert!(both(dir.path(), &[&line(&["measure", "-O", "raw"], &[])[..], &[name]].concat()));
        let raw = if flag.is_empty() { "disk.raw" } else { "driver=raw,file.filename=disk.raw" };
        assert!(both(dir.path(), &[&line(&["compare"], &[])[..], &[name, raw]].concat()));
        run(&[&line(&["checksum"], &[])[..], &[name]].concat());
        std::fs::remove_file(dir.path().join("x.raw")).unwrap();
    }
    // The bytes of the file are the disk.
    assert!(both(dir.path(), &["convert", "--image-opts", "driver=file,filename=a,,b.img", "x.raw"]));
    let same = std::fs::read(dir.path().join("x.raw")).unwrap();
    assert!(same.starts_with(&std::fs::read(dir.path().join("a,b.img")).unwrap()[..]));
    // A name for the device, for an archive.
    run(&["convert", &format!("scsi0={}", JSON[0]), "vm.vma"]);
    run(&["convert", "vm.vma", "--disk", "scsi0", "y.raw"]);
    run(&["compare", "disk.raw", "y.raw"]);
    // A grown image, by its options.
    assert!(both(dir.path(), &["resize", "--image-opts", QCOW2[0], "+1M"]));
}

#[test]
fn other_drivers_and_options_are_refused_as_by_qemu_img() {
    require!("qemu-img");
    let dir = scene();
    let before = snapshot(dir.path());
    for options in [
        "a.qcow2",
        "driver=qcow2",
        "driver=nosuch,file.filename=disk.raw",
        "driver=qcow2,file.filename=a,,b.img,foo=bar",
        "driver=qcow2,file=a",
        "driver=qcow2,file.driver=nosuch,file.filename=x",
        "driver=qcow2,file.filename=disk.raw",
    ] {
        assert!(!both(dir.path(), &["convert", "--image-opts", options, "x.raw"]), "{options}");
    }
    for json in ["json:", "json:{", "json:[]", "json:{}", r#"json:{"driver":"qcow2","file":"x"}"#] {
        assert!(!both(dir.path(), &["info", json]), "{json}");
    }
    assert!(!both(dir.path(), &["info", "-f", "qcow2", "--image-opts", QCOW2[0]]));
    // What qemu-img can do, and would change the content.
    for (options, words) in [
        ("driver=qcow2,offset=512,file.filename=a,,b.img", "'offset' of an image is not supported"),
        ("driver=qcow2,file.filename=a,,b.img,data-file.filename=x", "'data-file.filename'"),
        ("driver=qcow2,file.filename=a,,b.img,backing.file.filename=disk.raw", "has no backing file"),
        ("driver=raw,file.driver=null-co,file.size=1M", "'null-co' below a format is not supported"),
        ("driver=raw,file.filename=disk.raw,force-share=on", "-U reads"),
    ] {
        imgtool(["convert", "--image-opts", options, "x.raw"]).within(dir.path()).go().exits(2).says(words);
    }
    assert_eq!(snapshot(dir.path()), before);
}

/// What an overlay does not store itself then reads as zeros.
#[test]
fn an_image_is_read_without_its_backing_file_on_request() {
    require!("qemu-img", "qemu-io");
    let dir = scene();
    let qemu = |tool: &str, line: &[&str]| drop(run_in(tool, dir.path(), line));
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "mid.qcow2", "3M"]);
    qemu("qemu-io", &["-c", "write -P 7 64k 64k", "mid.qcow2"]);
    qemu("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "mid.qcow2", "-F", "qcow2", "top.qcow2"]);
    qemu("qemu-io", &["-c", "write -P 8 1M 64k", "top.qcow2"]);
    let mid = r#"{"driver":"qcow2","file":{"driver":"file","filename":"mid.qcow2"},"backing":null}"#;
    for name in [
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"},"backing":null}"#
            .to_owned(),
        format!(r#"json:{{"driver":"qcow2","file.filename":"top.qcow2","backing":{mid}}}"#),
        r#"json:{"driver":"raw","file.filename":"disk.raw"}"#.to_owned(),
    ] {
        qemu("qemu-img", &["convert", "-O", "raw", &name, "theirs.raw"]);
        imgtool(["convert", "-q", "--force", "-O", "raw", &name, "ours.raw"]).within(dir.path()).ok();
        let read = |file: &str| std::fs::read(dir.path().join(file)).unwrap();
        assert!(read("ours.raw") == read("theirs.raw"), "{name}");
        assert!(both(dir.path(), &["map", "--output", "json", &name]), "{name}");
    }
    let options = "driver=qcow2,file.filename=top.qcow2,backing=";
    imgtool(["convert", "-q", "--image-opts", options, "zeros.raw"]).within(dir.path()).ok();
    let zeros = std::fs::read(dir.path().join("zeros.raw")).unwrap();
    assert!(zeros[..1 << 20].iter().all(|byte| *byte == 0) && zeros[1 << 20] == 8);
    let before = snapshot(dir.path());
    let resize = ["resize", "--image-opts", options, "+1M"];
    imgtool(resize).within(dir.path()).go().exits(1).says("can be read, but not written");
    assert_eq!(snapshot(dir.path()), before);
}

/// As virt-v2v reads the disks of an OVA, which is a tar.
#[test]
fn a_part_of_a_file_is_read_as_by_qemu_img() {
    require!("qemu-img");
    let dir = scene();
    let disk = std::fs::read(dir.path().join("disk.raw")).unwrap();
    let image = std::fs::read(dir.path().join("a,b.img")).unwrap();
    std::fs::write(dir.path().join("box.tar"), [&disk[..512], &image[..], &disk[..1024]].concat()).unwrap();
    let len = image.len();
    let raw = format!("driver=raw,offset=512,size={len},file.driver=file,file.filename=box.tar");
    assert!(both(dir.path(), &["convert", "--image-opts", "-O", "raw", &raw, "x.raw"]));
    assert!(std::fs::read(dir.path().join("x.raw")).unwrap() == image);
    for name in [
        format!(
            r#"json:{{"driver":"qcow2","file":{{"driver":"raw","offset":512,"size":{len},"file":{{"driver":"file","filename":"box.tar"}}}}}}"#
        ),
        r#"json:{"file":{"driver":"raw","offset":512,"file":{"filename":"box.tar"}}}"#.to_owned(),
    ] {
        assert!(both(dir.path(), &["convert", "-O", "raw", &name, "y.raw"]), "{name}");
        assert!(std::fs::read(dir.path().join("y.raw")).unwrap() == disk, "{name}");
        std::fs::remove_file(dir.path().join("y.raw")).unwrap();
        assert!(both(dir.path(), &["compare", &name, "disk.raw"]), "{name}");
        assert!(both(dir.path(), &["info", &name]), "{name}");
    }
    for bad in ["driver=raw,offset=8M,file.filename=disk.raw", "driver=raw,size=8M,file.filename=disk.raw"] {
        assert!(!both(dir.path(), &["convert", "--image-opts", "-O", "raw", bad, "z.raw"]), "{bad}");
    }
    let before = snapshot(dir.path());
    let resize = ["resize", "--image-opts", &raw, "+1M"];
    imgtool(resize).within(dir.path()).go().exits(1).says("can be read, but not written");
    let target = ["convert", "-n", "--target-image-opts", "disk.raw", &raw];
    imgtool(target).within(dir.path()).go().exits(1).says("can be read, but not written");
    assert_eq!(snapshot(dir.path()), before);
}

/// An author of an image must not choose what is opened.
#[test]
fn json_inside_an_image_stays_refused() {
    require!("qemu-img");
    let dir = scene();
    let backing = r#"json:{"driver":"raw","file":{"driver":"file","filename":"disk.raw"}}"#;
    let create = ["create", "-q", "-f", "qcow2", "-b", backing, "-F", "raw", "x.qcow2", "2M"];
    run_in("qemu-img", dir.path(), &create);
    let by_json = r#"json:{"driver":"qcow2","file.filename":"x.qcow2"}"#;
    for name in ["x.qcow2", by_json] {
        let line = ["convert", "--allow-external", "chain", name, "y.raw"];
        imgtool(line).within(dir.path()).go().exits(1).says("is not a plain file name");
    }
    // A file below the image needs the same permission by every name.
    run_in(
        "qemu-img",
        dir.path(),
        &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", "z.qcow2"],
    );
    let by_json = r#"json:{"driver":"qcow2","file.filename":"z.qcow2"}"#;
    imgtool(["convert", by_json, "y.raw"]).within(dir.path()).go().exits(1).says("--allow-external");
    imgtool(["convert", "--allow-external", "chain", by_json, "y.raw"]).within(dir.path()).ok();
    imgtool(["compare", "disk.raw", "y.raw"]).within(dir.path()).ok();
}

#[test]
fn backing_images_are_those_that_the_user_chose() {
    require!("qemu-img", "qemu-io");
    let dir = scene();
    let run = |line: &[&str]| drop(run_in("qemu-img", dir.path(), line));
    std::fs::write(dir.path().join("other.raw"), noise(8, 2 << 20)).unwrap();
    // Overlays over files that do not exist any more.
    for (name, below, format) in [("mid.qcow2", "gone.raw", "raw"), ("top.qcow2", "gone.qcow2", "qcow2")] {
        run(&["create", "-q", "-u", "-f", "qcow2", "-b", below, "-F", format, name, "2M"]);
        let write = if format == "raw" { "write -P 1 64k 64k" } else { "write -P 2 256k 64k" };
        let options =
            format!("driver=qcow2,file.filename={name},backing.driver=raw,backing.file.filename=disk.raw");
        run_in("qemu-io", dir.path(), &["-c", write, "--image-opts", &options]);
    }
    for options in [
        "driver=qcow2,file.filename=mid.qcow2,backing.driver=raw,backing.file.filename=other.raw",
        "driver=qcow2,file.filename=mid.qcow2,backing.driver=qcow2,backing.file.filename=a,,b.img",
        "driver=qcow2,file.filename=top.qcow2,backing.file.filename=mid.qcow2,backing.driver=qcow2,\
         backing.backing.driver=raw,backing.backing.file.filename=other.raw",
    ] {
        run(&["convert", "-O", "raw", "--image-opts", options, "theirs.raw"]);
        let line = ["convert", "--image-opts", "--to", "raw", options, "ours.raw"];
        imgtool(line).within(dir.path()).ok();
        imgtool(["compare", "theirs.raw", "ours.raw"]).within(dir.path()).ok();
        let raw = "driver=raw,file.filename=theirs.raw";
        assert!(both(dir.path(), &["compare", "--image-opts", options, raw]), "{options}");
        // qemu-img refuses these options for facts.
        imgtool(["info", "--image-opts", options]).within(dir.path()).ok();
        imgtool(["checksum", "--image-opts", options]).within(dir.path()).ok();
        std::fs::remove_file(dir.path().join("ours.raw")).unwrap();
    }
    let before = snapshot(dir.path());
    let over = |below: &str| format!("driver=qcow2,file.filename=mid.qcow2,backing.driver=raw,{below}");
    // A chosen image is a source, and what it names needs the permission that every name needs.
    let line = ["convert", "--force", "--image-opts", &over("backing.file.filename=other.raw"), "other.raw"];
    imgtool(line).within(dir.path()).go().exits(1).says("same file");
    let line = ["convert", "--image-opts", &over("backing.file.filename=missing"), "x.raw"];
    assert!(!both(dir.path(), &line));
    let top = "driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=mid.qcow2";
    imgtool(["convert", "--image-opts", top, "x.raw"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("--allow-external");
    imgtool(["checksum", "--image-opts", "file.filename=disk.vdi,backing.file.filename=disk.raw"])
        .within(dir.path())
        .go()
        .exits(2)
        .says("has no backing file");
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn targets_that_exist_have_options_too() {
    require!("qemu-img");
    let dir = scene();
    let create = |name: &str| {
        run_in("qemu-img", dir.path(), &["create", "-q", "-f", "qcow2", name, "2M"]);
    };
    let opts = ["convert", "-n", "--target-image-opts", "disk.raw"];
    let json = r#"json:{"driver":"qcow2","file.filename":"t.qcow2"}"#;
    for line in [
        &[&opts[..], &["driver=qcow2,file.filename=t.qcow2"]].concat()[..],
        &["convert", "-n", "-O", "qcow2", "disk.raw", json],
    ] {
        create("t.qcow2");
        assert!(both(dir.path(), line), "{line:?}");
        // The second of the two has written the content.
        run_in("qemu-img", dir.path(), &["compare", "disk.raw", "t.qcow2"]);
        create("t.qcow2");
        imgtool(line).within(dir.path()).ok();
        run_in("qemu-img", dir.path(), &["compare", "disk.raw", "t.qcow2"]);
    }
    // qemu-img writes raw without -O, whatever the options say.
    create("t.qcow2");
    imgtool(["convert", "-n", "disk.raw", json]).within(dir.path()).ok();
    run_in("qemu-img", dir.path(), &["compare", "disk.raw", "t.qcow2"]);
    let before = snapshot(dir.path());
    for line in [
        &["convert", "--target-image-opts", "disk.raw", "driver=qcow2,file.filename=t.qcow2"][..],
        &[
            &["convert", "-n", "-O", "qcow2", "--target-image-opts"],
            &["disk.raw", "file.filename=t.qcow2"][..],
        ]
        .concat(),
        &["convert", "-O", "raw", "disk.raw", r#"json:{"driver":"raw","file.filename":"k.raw"}"#],
    ] {
        assert!(!both(dir.path(), line), "{line:?}");
    }
    let line = [&opts[..], &["file.filename=t.qcow2"]].concat();
    imgtool(line).within(dir.path()).go().exits(2).says("lack its format");
    assert_eq!(snapshot(dir.path()), before);
}

/// The prefix of Proxmox's qemu-img; that of Debian does not have it.
#[test]
fn zeroinit_takes_a_target_for_zeroed() {
    let dir = tempdir();
    let mut disk = noise(3, 2 << 20);
    disk[1 << 20..].fill(0);
    std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
    std::fs::write(dir.path().join("t.raw"), vec![b'o'; 2 << 20]).unwrap();
    let line = ["convert", "-n", "-f", "raw", "-O", "raw", "zeroinit:disk.raw", "zeroinit:t.raw"];
    imgtool(line).within(dir.path()).ok();
    let found = std::fs::read(dir.path().join("t.raw")).unwrap();
    assert!(found[..1 << 20] == disk[..1 << 20] && found[1 << 20..] == vec![b'o'; 1 << 20]);
    let line = ["convert", "-O", "raw", "disk.raw", "zeroinit:new.raw"];
    imgtool(line).within(dir.path()).go().exits(2).says("zeroinit: needs -n");
    imgtool(["convert", "-n", "disk.raw", "zeroinit:nbd:x"]).within(dir.path()).go().exits(2).says("nbd:");
    assert_eq!(names(dir.path()), ["disk.raw", "t.raw"]);
}

#[test]
fn passphrases_come_from_objects_as_for_qemu_img() {
    require!("qemu-img");
    let dir = scene();
    // The line end is a part of the passphrase, as for qemu-img.
    std::fs::write(dir.path().join("key"), "horse\n").unwrap();
    std::fs::write(dir.path().join("wrong"), "horse").unwrap();
    let object = ["--object", "secret,id=s,file=key"];
    let make = |format: &str, options: &str, name: &str| {
        let line = [&["convert", "-O", format], &object[..], &["-o", options, "disk.raw", name]].concat();
        run_in("qemu-img", dir.path(), &line);
    };
    make("luks", "key-secret=s,iter-time=10", "x.luks");
    make("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "x.qcow2");
    for options in [
        "driver=luks,key-secret=s,file.filename=x.luks",
        "driver=qcow2,encrypt.key-secret=s,file.filename=x.qcow2",
        "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=x.qcow2",
    ] {
        let line = |object: &'static str| ["convert", "--object", object, "--image-opts", options, "y.raw"];
        assert!(both(dir.path(), &line("secret,id=s,file=key")), "{options}");
        run_in("qemu-img", dir.path(), &["compare", "disk.raw", "y.raw"]);
        std::fs::remove_file(dir.path().join("y.raw")).unwrap();
        assert!(!both(dir.path(), &line("secret,id=s,file=wrong")), "{options}");
        assert!(!both(dir.path(), &line("secret,id=other,file=key")), "{options}");
    }
    // A new image.
    let line = ["create", "-f", "luks", "--object", object[1], "-o", "key-secret=s", "new.luks", "1M"];
    imgtool(line).within(dir.path()).ok();
    let open = ["info", "--image-opts", "driver=luks,key-secret=s,file.filename=new.luks"];
    run_in("qemu-img", dir.path(), &[&open[..1], &object, &open[1..]].concat());
    let options = "encrypt.format=luks,encrypt.key-secret=s";
    let line = ["convert", "-O", "qcow2", "--object", object[1], "-o", options, "disk.raw", "new.qcow2"];
    imgtool(line).within(dir.path()).ok();
    let theirs = "driver=qcow2,encrypt.key-secret=s,file.filename=new.qcow2";
    let raw = "driver=raw,file.filename=disk.raw";
    run_in("qemu-img", dir.path(), &["compare", object[0], object[1], "--image-opts", theirs, raw]);
    // A passphrase in the command line is refused, and not repeated.
    let run = imgtool(["info", "--object", "secret,id=s,data=hunter2", "disk.raw"]).within(dir.path()).go();
    assert!(!run.stderr.contains("hunter2"), "{}", run.stderr);
    run.exits(2).says("readable for other users");
}
