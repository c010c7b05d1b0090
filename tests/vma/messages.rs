//! Messages of `imgtool vma`: they begin with `vma:`, and hints name flags that exist.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use imgtool_testing::images::noise;
use imgtool_testing::{oracles, require, sha256_file, text};

use super::{EFI, scene, vma};
use crate::support::run::PROGRAM;

#[test]
fn hints_name_whole_commands() {
    let dir = scene();
    let path = dir.path();
    oracles::run("mkfifo", &[text(&path.join("pipe.raw"))]);
    std::fs::write(path.join("map"), "format=raw:1:drive-efidisk0=pipe.raw\n").unwrap();
    vma(path, "extract -d drive-efidisk0 -r map a.vma out")
        .exits(1)
        .says("\n  hint: imgtool convert ARCHIVE --disk NAME --to raw PIPE writes a disk into one\n");
    let whole = std::fs::read(path.join("a.vma")).unwrap();
    std::fs::write(path.join("cut.vma"), &whole[..100_000]).unwrap();
    vma(path, "verify cut.vma").exits(1).says("; imgtool convert --salvage restores what is intact\n");
    std::fs::write(path.join("more.vma"), [&whole, &[0u8; 700][..]].concat()).unwrap();
    vma(path, "verify more.vma").exits(1).says("; imgtool convert --ignore-trailing accepts them\n");
    std::fs::write(path.join("x.qcow2"), noise(1, 5000)).unwrap();
    vma(path, "create x.vma x.qcow2").exits(1).says("; -d format=raw:[DEV=]PATH reads it as a raw disk\n");
}

#[test]
fn interrupted_run_speaks_as_vma() {
    let dir = scene();
    oracles::run("mkfifo", &[text(&dir.path().join("archive"))]);
    // The archive never comes.
    let mut child = Command::new(PROGRAM)
        .arg0("vma")
        .args(["verify", "archive"])
        .current_dir(dir.path())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let fifo = std::fs::OpenOptions::new().write(true).open(dir.path().join("archive")).unwrap();
    // The program has opened the FIFO, but may not have installed its handler yet.
    std::thread::sleep(std::time::Duration::from_millis(500));
    oracles::run("kill", &["-TERM", &child.id().to_string()]);
    let mut said = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said).unwrap();
    child.wait().unwrap();
    drop(fifo);
    assert_eq!(said, "vma: interrupted\n");
}

#[test]
fn extract_has_a_flag_for_targets_in_use() {
    require!("qemu-io");
    let dir = scene();
    let target = dir.path().join("t.raw");
    std::fs::write(&target, vec![0x55; 540_672]).unwrap();
    std::fs::write(dir.path().join("map"), "1:drive-efidisk0=t.raw\n").unwrap();
    // qemu-io waits for commands on its standard input, with the image open and locked.
    let mut machine = Command::new("qemu-io")
        .args(["-f", "raw", text(&target)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut prompt = [0; 8];
    std::io::Read::read_exact(machine.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    let line = "extract -d drive-efidisk0 -r map a.vma out";
    let refused = vma(dir.path(), line);
    let forced = vma(dir.path(), &format!("{line} --force"));
    drop(machine.stdin.take());
    machine.wait().unwrap();
    refused.exits(1).says("has locked it").says("--force writes anyway\n");
    forced.exits(0);
    assert_eq!(sha256_file(&target), EFI);
}
