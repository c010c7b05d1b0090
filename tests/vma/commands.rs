//! `imgtool vma` behaves like the `vma` program: the same lines, files and exit codes.
//!
//! The expected lines were recorded from that program, with the archives of the fixtures.

use imgtool_testing::{fixture, names, sha256_file, snapshot, tempdir};

use super::{EFI, LIST, SCSI, target, two_disks, without_time};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

const STATE: &str = "3f67e904c371410e4dfce00900b6896afabf0152bc6b347030a896a0ed6ab631";

#[test]
fn list_prints_the_lines_that_restore_tools_read() {
    let (dir, archive) = two_disks();
    let listed = imgtool(["vma", "list", archive]).within(dir.path()).ok();
    assert_eq!(without_time(&listed.text()), LIST);
    assert!(listed.text().lines().last().unwrap().starts_with("CTIME: Sun Nov 22 "), "{}", listed.text());
    let piped = imgtool(["vma", "list", "-"]).pipe_from(&dir.path().join(archive)).ok();
    assert_eq!(piped.text(), listed.text());
    let state = imgtool(["vma", "list"]).args([fixture("vmstate.vma.zst")]).ok();
    assert_eq!(
        without_time(&state.text()),
        "VMSTATE: dev_id=1 memory: 199680\nDEV: dev_id=2 size: 5255168 devname: drive-scsi0\n"
    );
}

#[test]
fn prints_unpadded_years_like_asctime() {
    let dir = tempdir();
    std::fs::write(dir.path().join("a.raw"), [1; 512]).unwrap();
    for (ctime, line) in [
        ("253402300800", "CTIME: Sat Jan  1 00:00:00 10000"),
        ("-62135596800", "CTIME: Mon Jan  1 00:00:00 1"),
        ("-9223372036854775808", "CTIME: (null)"),
    ] {
        let options = format!("ctime={ctime}");
        imgtool(["convert", "--force", "a.raw", "--to", "vma", "-o", &options, "a.vma"])
            .within(dir.path())
            .ok();
        let listed = imgtool(["vma", "list", "a.vma"]).env("TZ", "UTC").within(dir.path()).ok();
        assert_eq!(listed.text().lines().last(), Some(line));
    }
}

#[test]
fn config_prints_the_bytes_or_exits_255() {
    let (dir, archive) = two_disks();
    let config = imgtool(["vma", "config", archive]).within(dir.path()).ok();
    assert_eq!(config.stdout, std::fs::read(fixture("qemu-server.conf")).unwrap());
    let firewall = imgtool(["vma", "config", archive, "-c", "qemu-server.fw"]).within(dir.path()).ok();
    assert_eq!(firewall.stdout, std::fs::read(fixture("qemu-server.fw")).unwrap());
    let none = imgtool(["vma", "config", archive, "-c", "nope"]).within(dir.path()).go().exits(255);
    assert_eq!(none.stderr, "unable to find configuration data 'nope'\n");
}

#[test]
fn extract_announces_and_names_the_disks() {
    let (dir, archive) = two_disks();
    let run = imgtool(["vma", "extract", archive, "d1"]).within(dir.path()).ok();
    assert_eq!(
        run.text(),
        "DEVINFO d1/tmp-disk-drive-scsi0.raw 5255168\nDEVINFO d1/tmp-disk-drive-efidisk0.raw 540672\n"
    );
    let out = dir.path().join("d1");
    assert_eq!(
        names(&out),
        ["disk-drive-efidisk0.raw", "disk-drive-scsi0.raw", "qemu-server.conf", "qemu-server.fw"]
    );
    assert_eq!(sha256_file(&out.join("disk-drive-scsi0.raw")), SCSI);
    assert_eq!(sha256_file(&out.join("disk-drive-efidisk0.raw")), EFI);
    imgtool(["vma", "extract", archive, "d1"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("vma: unable to create target directory d1 - File exists");
}

#[test]
fn verbose_extract_counts_to_100_percent() {
    let (dir, archive) = two_disks();
    let text = imgtool(["vma", "extract", "-v", archive, "d"]).within(dir.path()).ok().text();
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[2].starts_with("progress 1% (read 65536 bytes, duration "), "{text}");
    assert!(lines[3].starts_with("progress 2% (read 131072 bytes, duration "), "{text}");
    let end = &lines[lines.len() - 3..];
    assert!(end[0].starts_with("progress 100% (read 5898240 bytes, duration "), "{text}");
    assert_eq!(end[1], "total bytes read 5898240, sparse bytes 3629056 (61.5%)");
    assert_eq!(end[2], "space reduction due to 4K zero blocks 87.7%");
    let verified = imgtool(["vma", "verify", "-v", archive]).within(dir.path()).ok().text();
    assert!(verified.starts_with(LIST), "{verified}");
    assert!(verified.ends_with(&format!("{}\n{}\n", end[1], end[2])), "{verified}");
    assert_eq!(imgtool(["vma", "verify", archive]).within(dir.path()).ok().text(), "");
}

#[test]
fn extracts_guest_state_to_vmstate_bin() {
    let dir = tempdir();
    let archive = fixture("vmstate.vma.zst");
    let out = dir.path().join("d");
    imgtool(["vma", "extract"]).args([&archive, &out]).ok();
    assert_eq!(names(&out), ["disk-drive-scsi0.raw", "vmstate.bin"]);
    assert_eq!(sha256_file(&out.join("vmstate.bin")), STATE);
}

#[test]
fn extracts_only_the_selected_drives() {
    let (dir, archive) = two_disks();
    imgtool(["vma", "extract", "-d", "drive-efidisk0,other", archive, "d"]).within(dir.path()).ok();
    let out = dir.path().join("d");
    assert_eq!(names(&out), ["disk-drive-efidisk0.raw", "qemu-server.conf", "qemu-server.fw"]);
}

#[test]
fn damage_gets_the_reference_messages_and_leaves_no_output() {
    let (dir, archive) = two_disks();
    let bytes = std::fs::read(dir.path().join(archive)).unwrap();
    std::fs::write(dir.path().join("cut.vma"), &bytes[..100_000]).unwrap();
    let words = "short vma extent (87200 < 1192448)";
    for (args, step) in
        [(["verify", "cut.vma", "-v"], "verify failed"), (["extract", "cut.vma", "d"], "restore failed")]
    {
        let run = imgtool(["vma"]).args(args).within(dir.path()).go().exits(1);
        assert!(run.stderr.starts_with(&format!("vma: {step} - {words}\n")), "{}", run.stderr);
    }
    assert!(!dir.path().join("d").exists());
    imgtool(["vma", "list", "nothere.vma"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("vma: can't open file nothere.vma - No such file or directory");
    let config = fixture("qemu-server.conf");
    imgtool(["vma", "list"]).args([config]).go().exits(1).says("vma: can't read vma header - got EOF");
}

#[test]
fn create_and_extract_round_trip() {
    let (dir, archive) = two_disks();
    imgtool(["vma", "extract", archive, "d"]).within(dir.path()).ok();
    let run = imgtool(["vma", "create", "-v", "c.vma", "-c", "d/qemu-server.conf"])
        .args(["drive-scsi0=d/disk-drive-scsi0.raw", "d/disk-drive-efidisk0.raw"])
        .within(dir.path())
        .ok();
    let said: Vec<&str> = run.stderr.lines().rev().take(2).collect();
    assert_eq!(said[1], "image drive-scsi0: size=5255168 zeros=3153920 saved=2101248");
    assert!(said[0].starts_with("image disk1: size=540672 zeros="), "{}", run.stderr);
    let list = imgtool(["vma", "list", "c.vma"]).within(dir.path()).ok().text();
    assert_eq!(
        without_time(&list),
        "CFG: size: 256 name: qemu-server.conf\n\
         DEV: dev_id=1 size: 5255168 devname: drive-scsi0\n\
         DEV: dev_id=2 size: 540672 devname: disk1\n"
    );
    imgtool(["vma", "extract", "c.vma", "e"]).within(dir.path()).ok();
    assert_eq!(sha256_file(&dir.path().join("e/disk-drive-scsi0.raw")), SCSI);
    assert_eq!(sha256_file(&dir.path().join("e/disk-disk1.raw")), EFI);
    // Each archive has its own UUID.
    let uuid = |name: &str| std::fs::read(dir.path().join(name)).unwrap()[8..24].to_vec();
    imgtool(["vma", "create", "c2.vma", "d/disk-drive-efidisk0.raw"]).within(dir.path()).ok();
    imgtool(["vma", "create", "c3.vma", "d/disk-drive-efidisk0.raw"]).within(dir.path()).ok();
    assert_ne!(uuid("c2.vma"), uuid("c3.vma"));
}

#[test]
fn create_refuses_with_the_reference_messages() {
    let (dir, archive) = two_disks();
    for (args, words) in [
        (
            vec!["create", archive, "a=x.raw"],
            "vma: bdrv_open 'x.raw' failed - Could not open 'x.raw': No such file",
        ),
        (vec!["create", archive, "two-disks.vma"], "vma: bdrv_open"),
        (vec!["create", archive, "-d", "a=b"], "vma: No format specified for device: 'a=b'"),
        (vec!["create", archive, "-d", "format=raw:a=b", "c"], "vma: Unexpected extra argument"),
    ] {
        imgtool(["vma"]).args(args).within(dir.path()).go().exits(1).says(words);
    }
    target(dir.path(), "x.raw", 4096, 1);
    imgtool(["vma", "create", archive, "x.raw"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("vma: can't open file two-disks.vma - File exists");
}

#[test]
fn create_pipes_to_a_command_and_checks_its_exit_status() {
    let dir = tempdir();
    target(dir.path(), "x.raw", 200_000, 1);
    imgtool(["vma", "create", "exec:cat > a.vma", "x.raw"]).within(dir.path()).ok();
    imgtool(["vma", "verify", "a.vma"]).within(dir.path()).ok();
    for command in ["exec:cat > /dev/null; exit 3", "exec:exit 3"] {
        imgtool(["vma", "create", command, "x.raw"]).within(dir.path()).go().exits(1).says("exit status: 3");
    }
}

#[cfg(unix)]
#[test]
fn acts_as_the_vma_program_if_named_vma() {
    let (dir, archive) = two_disks();
    let vma = dir.path().join("vma");
    std::os::unix::fs::symlink(PROGRAM, &vma).unwrap();
    let run =
        |args: &[&str]| std::process::Command::new(&vma).args(args).current_dir(dir.path()).output().unwrap();
    let list = run(&["list", archive]);
    assert!(list.status.success());
    assert_eq!(without_time(&String::from_utf8(list.stdout).unwrap()), LIST);
    let before = snapshot(dir.path());
    for args in [&[][..], &["-h"], &["list"], &["nonsense"], &["list", "a", "b"], &["list", "-x", "a"]] {
        let wrong = run(args);
        assert_eq!(snapshot(dir.path()), before, "{args:?}");
        assert_eq!(wrong.status.code(), Some(1), "{args:?}");
        assert!(wrong.stdout.starts_with(b"usage: vma "), "{args:?}");
    }
}
