//! Packing for Proxmox VE: plain configurations, settings, minimal configurations, and names that can be pasted.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{require, tempdir};

use crate::support::imgtool;

/// A configuration as on a node, of a guest with two snapshots, a lock and pending changes.
const PLAIN: &str = "#web server\nboot: order=scsi0;ide2\nide2: local:iso/debian.iso,media=cdrom\nlock: backup\n\
    memory: 2048\nname: web\nnet0: virtio=BC:24:11:00:00:01,bridge=vmbr0\nparent: before\n\
    scsi0: local-lvm:vm-105-disk-0,iothread=1,size=32G\nscsihw: virtio-scsi-single\n\
    unused0: local-lvm:vm-105-disk-7\nvirtio1: nas:105/vm-105-disk-1.qcow2,size=8G\n\n[PENDING]\nmemory: 8192\n\n\
    [before]\nmemory: 512\nscsi0: local-lvm:vm-105-disk-0,size=32G\nsnaptime: 1790000000\n";

/// Configuration that a backup stores for it.
const PACKED: &str = "#web server\nboot: order=scsi0;ide2\nide2: local:iso/debian.iso,media=cdrom\n\
    memory: 2048\nname: web\nnet0: virtio=BC:24:11:00:00:01,bridge=vmbr0\n\
    scsi0: local-lvm:vm-105-disk-0,iothread=1,size=32G\nscsihw: virtio-scsi-single\n\
    virtio1: nas:105/vm-105-disk-1.qcow2,size=8G\n\
    #qmdump#map:scsi0:drive-scsi0:local-lvm:raw:\n#qmdump#map:virtio1:drive-virtio1:nas:qcow2:\n";

const ARCHIVE: &str = "vzdump-qemu-105-2026_01_02-03_04_05.vma.zst";

fn workshop() -> tempfile::TempDir {
    let dir = tempdir();
    for (name, seed) in [("a.raw", 1), ("b.raw", 2), ("c.raw", 3)] {
        let image = Image::hole("d", 300_032).with(4096, images::noise(seed, 9000));
        image.write_raw(&dir.path().join(name));
    }
    std::fs::write(dir.path().join("105.conf"), PLAIN).unwrap();
    dir
}

fn config(directory: &Path, archive: &str) -> String {
    imgtool(["vma", "config", archive]).within(directory).ok().text()
}

/// The big disk was grown after the configuration was saved, so only the others have a telling size.
#[test]
fn firmware_variables_and_a_tpm_are_not_taken_for_the_disk() {
    let dir = workshop();
    for (name, size) in [("vars.raw", 540_672), ("tpm.raw", 4 << 20), ("win.raw", 80 << 20)] {
        std::fs::File::create(dir.path().join(name)).unwrap().set_len(size).unwrap();
    }
    let text = "bios: ovmf\nboot: order=scsi0\nefidisk0: local-lvm:vm-200-disk-0,efitype=4m,size=4M\n\
        scsi0: local-lvm:vm-200-disk-1,size=64M\ntpmstate0: local-lvm:vm-200-disk-2,size=4M,version=v2.0\n";
    std::fs::write(dir.path().join("200.conf"), text).unwrap();
    let convert =
        |args: &[&str]| imgtool(["convert", "--config", "200.conf"]).args(args).within(dir.path()).go();
    for (number, order) in
        [["vars.raw", "win.raw", "tpm.raw"], ["tpm.raw", "win.raw", "vars.raw"]].iter().enumerate()
    {
        let archive = format!("{number}.vma");
        let run = convert(&[&order[..], &[&archive]].concat()).exits(0);
        run.says("scsi0 is win.raw").says("efidisk0 is vars.raw").says("tpmstate0 is tpm.raw");
    }
    convert(&["vars.raw", "alone.vma"]).exits(0).says("efidisk0 is vars.raw").says("no disk for scsi0");
    std::fs::copy(dir.path().join("win.raw"), dir.path().join("data.raw")).unwrap();
    let run = convert(&["vars.raw", "win.raw", "data.raw", "more.vma"]).exits(2);
    run.says("data.raw: by name and size").says("efidisk0=vars.raw scsi0=win.raw");
    let named = ["efidisk0=win.raw", "scsi0=vars.raw", "named.vma"];
    convert(&named).exits(0).says("is efidisk0 really win.raw?").says("is scsi0 really vars.raw?");
}

#[test]
fn values_that_proxmox_does_not_take_are_refused_or_noted() {
    let dir = workshop();
    for setting in
        ["cpu=bogus", "vga=none,memory=1", "boot=order=scsi9", "smbios1=uuid=x", "ipconfig0=ip=foo"]
    {
        let line = ["convert", "a.raw", "--proxmox", setting, "x.vma"];
        imgtool(line).within(dir.path()).go().exits(2).says("--proxmox");
    }
    std::fs::write(dir.path().join("1.conf"), "cores: 0\nmemory: abc\nname: web\nostype: l26\n").unwrap();
    let run = imgtool(["convert", "a.raw", "--config", "1.conf", "x.vma"]).within(dir.path()).ok();
    run.says("not valid in Proxmox VE 9").says("cores ('0' is not").says("memory ('abc' is not");
    assert!(config(dir.path(), "x.vma").contains("memory: abc\n"));
}

#[test]
fn packs_a_plain_configuration_as_a_backup_does() {
    let dir = workshop();
    let convert = |args: &[&str]| imgtool(["convert"]).args(args).within(dir.path()).go();
    convert(&["a.raw", "b.raw", "--config", "105.conf", ARCHIVE])
        .exits(0)
        .says("qemu-server.conf: from 105.conf; scsi0 is a.raw, virtio1 is b.raw")
        .says("left out: lock (backup), parent (before), unused0 (local-lvm:vm-105-disk-7), pending changes, snapshot before");
    assert_eq!(config(dir.path(), ARCHIVE), PACKED);
    let list = imgtool(["vma", "list", ARCHIVE]).within(dir.path()).ok().text();
    assert!(list.contains("name: qemu-server.conf\n"), "{list}");
    assert!(
        list.contains("devname: drive-scsi0\nDEV: dev_id=2 size: 300032 devname: drive-virtio1"),
        "{list}"
    );
    imgtool(["compare", "--disk", "scsi0", ARCHIVE, "a.raw"]).within(dir.path()).ok();
    // A name decides before the order. What comes from an archive stays as it is.
    convert(&["virtio1=a.raw", "b.raw", "--config", "105.conf", "named.vma"])
        .exits(0)
        .says("virtio1 is a.raw, scsi0 is b.raw");
    convert(&[ARCHIVE, "out/", "-q"]).exits(0);
    let back = ["drive-scsi0=a.raw", "drive-virtio1=b.raw", "--config", "out/qemu-server.conf", "again.vma"];
    convert(&back).exits(0).says("out/qemu-server.conf as it is");
    assert_eq!(config(dir.path(), "again.vma"), PACKED);
    // Fewer disks than drives, and more.
    convert(&["a.raw", "--config", "105.conf", "one.vma"])
        .exits(0)
        .says("no disk for virtio1")
        .says("virtio1=PATH");
    assert!(!config(dir.path(), "one.vma").contains("virtio1:"));
    convert(&["a.raw", "b.raw", "c.raw", "--config", "105.conf", "three.vma"])
        .exits(0)
        .says("scsi1 is c.raw");
    assert!(config(dir.path(), "three.vma").contains("\nscsi1: local:105/vm-105-disk-2.raw,size=293K\n"));
}

#[test]
fn settings_override_a_configuration_and_are_checked() {
    let dir = workshop();
    let convert = |args: &[&str]| imgtool(["convert", "a.raw", "x.vma"]).args(args).within(dir.path()).go();
    let both = ["--config", "105.conf", "--proxmox", "memory=4096", "--proxmox", "onboot=1"];
    convert(&both).exits(0).says("from 105.conf with memory, onboot of --proxmox");
    let text = config(dir.path(), "x.vma");
    assert!(text.contains("\nmemory: 4096\nname: web\n") && text.contains("\nonboot: 1\nscsi0: "), "{text}");
    // The configuration of an archive, changed; its firewall rules stay.
    std::fs::write(dir.path().join("105.fw"), "[OPTIONS]\nenable: 1\n").unwrap();
    let pack = ["convert", "a.raw", "old.vma", "--config", "105.conf", "--config", "105.fw"];
    imgtool(pack).within(dir.path()).ok().says("105.fw is called qemu-server.fw");
    let change = ["convert", "old.vma", "new.vma", "--proxmox", "name=copy"];
    imgtool(change).within(dir.path()).ok().says("that of the source with name of --proxmox");
    assert!(config(dir.path(), "new.vma").contains("\nname: copy\n"));
    imgtool(["vma", "config", "new.vma", "-c", "qemu-server.fw"]).within(dir.path()).ok();
    for (setting, what, hint) in [
        ("memroy=4096", "Proxmox has no setting 'memroy'", "did you mean 'memory'"),
        ("memory=abc", "'abc' is not a whole number of at least 16", "--proxmox memory=4096"),
        ("memory=4G", "'4G' is not", "--proxmox memory=4096"),
        ("name=my_vm", "my_vm", "--proxmox name=web-1"),
        ("net0=virtio,brigde=vmbr0", "no property 'brigde'", "did you mean 'bridge'"),
        ("scsi40=x", "no setting 'scsi40'", "scsi0 to scsi30"),
    ] {
        imgtool(["convert", "a.raw", "y.vma", "--proxmox", setting])
            .within(dir.path())
            .go()
            .exits(2)
            .says(what)
            .says(hint);
    }
    std::fs::write(dir.path().join("bad.conf"), "memory: 512\nname: x\noops\n").unwrap();
    let bad = ["convert", "a.raw", "y.vma", "--config", "bad.conf"];
    imgtool(bad).within(dir.path()).go().exits(2).says("bad.conf: line 3 is not 'KEY: VALUE'");
    let two = ["convert", "a.raw", "y.vma", "--config", "105.conf", "--config", "106.conf"];
    std::fs::copy(dir.path().join("105.conf"), dir.path().join("106.conf")).unwrap();
    imgtool(two).within(dir.path()).go().exits(2).says("as is 105.conf").says("one guest");
}

#[test]
fn backup_without_a_configuration_gets_a_minimal_one() {
    let dir = workshop();
    let run = imgtool(["convert", "a.raw", "b.raw", ARCHIVE]).within(dir.path()).ok();
    run.says("qemu-server.conf: a minimal one; scsi0 is a.raw, scsi1 is b.raw").says("2048 MiB of memory");
    let text = config(dir.path(), ARCHIVE);
    assert!(
        text.starts_with("boot: order=scsi0\nmemory: 2048\nscsi0: local:105/vm-105-disk-0.raw"),
        "{text}"
    );
    // Any other archive gets one as well, but keeps the names of its devices.
    let run = imgtool(["convert", "a.raw", "efidisk0=b.raw", "vm-107.vma"]).within(dir.path()).ok();
    run.says("qemu-server.conf: a minimal one; scsi0 is a.raw, efidisk0 is b.raw")
        .says("mv vm-107.vma vzdump-qemu-107-2026_09_21-14_13_20.vma");
    let list = imgtool(["vma", "list", "vm-107.vma"]).within(dir.path()).ok().text();
    assert!(list.contains("devname: a\n") && list.contains("devname: efidisk0\n"), "{list}");
    let text = config(dir.path(), "vm-107.vma");
    assert!(
        text.ends_with("\n#qmdump#map:scsi0:a:local:raw:\n#qmdump#map:efidisk0:efidisk0:local:raw:\n"),
        "{text}"
    );
    // An archive that has none is packed again as it is, unless it becomes a backup; the reference program adds nothing.
    imgtool(["vma", "create", "bare.vma", "x=a.raw"]).within(dir.path()).ok();
    assert!(!imgtool(["vma", "list", "bare.vma"]).within(dir.path()).ok().text().contains("CFG"));
    imgtool(["convert", "bare.vma", "same.vma"]).within(dir.path()).ok();
    assert!(!imgtool(["vma", "list", "same.vma"]).within(dir.path()).ok().text().contains("CFG"));
    let backup = "vzdump-qemu-108-2026_01_31-12_00_00.vma";
    imgtool(["convert", "bare.vma", backup]).within(dir.path()).ok().says("a minimal one; scsi0 is x");
    assert!(config(dir.path(), backup).ends_with("\n#qmdump#map:scsi0:drive-scsi0:local:raw:\n"));
    // Any file of the user is a configuration.
    std::fs::write(dir.path().join("notes.txt"), "of my own").unwrap();
    let own = imgtool(["convert", "a.raw", "own.vma", "--config", "notes.txt"]).within(dir.path()).ok();
    own.says("notes.txt: stored as it is; not a guest's configuration");
    assert!(!imgtool(["vma", "list", "own.vma"]).within(dir.path()).ok().text().contains("qemu-server"));
}

#[test]
fn suggested_name_can_be_pasted() {
    require!("sh");
    let dir = workshop();
    let run = imgtool(["convert", "a.raw", "my vm.vma", "--config", "105.conf"]).within(dir.path()).ok();
    let note = run.stderr.lines().find(|line| line.contains("qmrestore refuses the name 'my vm.vma': mv "));
    let command = note.and_then(|line| line.split_once("': ")).expect("a note").1;
    let status = std::process::Command::new("sh").args(["-c", command]).current_dir(dir.path()).status();
    assert!(status.unwrap().success(), "{command}");
    assert!(dir.path().join("vzdump-qemu-105-2026_09_21-14_13_20.vma").exists(), "{command}");
}

#[test]
fn short_names_choose_drives() {
    let dir = workshop();
    let pack = ["convert", "-q", "scsi0=a.raw", "tpmstate0=b.raw", "scsi1=c.raw", ARCHIVE];
    imgtool(pack).within(dir.path()).ok();
    let run = |args: &[&str]| imgtool(args.iter()).within(dir.path()).go();
    run(&["convert", ARCHIVE, "--disk", "scsi0", "scsi0.raw"]).exits(0);
    run(&["compare", "scsi0.raw", "a.raw"]).exits(0);
    run(&["convert", ARCHIVE, "--target", "tpmstate0=tpm.raw", "--disk", "tpmstate0"]).exits(0);
    run(&["compare", "tpm.raw", "b.raw"]).exits(0);
    for command in ["map", "checksum"] {
        run(&[command, "--disk", "scsi1", ARCHIVE]).exits(0);
    }
    run(&["convert", ARCHIVE, "--disk", "scsi", "x.raw"]).exits(2).says("did you mean 'drive-scsi0'");
    // A device that is called so wins.
    imgtool(["convert", "-q", "scsi0=a.raw", "drive-scsi0=b.raw", "both.vma"]).within(dir.path()).ok();
    run(&["convert", "both.vma", "--disk", "scsi0", "exact.raw"]).exits(0);
    run(&["compare", "exact.raw", "a.raw"]).exits(0);
}
