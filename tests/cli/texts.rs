//! Output of the program, word for word. After an intended change, run `INSTA_UPDATE=always cargo
//! test --test main cli::texts::`, then read the difference.
//!
//! Nothing here depends on the file system, the terminal or the clock: space on disk and times are
//! blanked out.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, oracles, require, tempdir};

use crate::support::imgtool;

/// Runs a command and returns the command, its output and its exit code, as a person sees them.
fn screen(dir: &Path, line: &str) -> String {
    let run = imgtool(line.split_whitespace())
        .env("LC_ALL", "C")
        .env("COLUMNS", "80")
        .env("NO_COLOR", "1")
        .within(dir)
        .go();
    let code = run.status.code().expect("an exit code");
    let stdout = run.text();
    let mut shown = format!("$ imgtool {line}\n{stdout}");
    if !run.stderr.is_empty() {
        shown.push_str(&format!("--- standard error\n{}", run.stderr));
    }
    blank(&format!("{shown}--- exit code {code}\n"))
}

fn screens(dir: &Path, lines: &[&str]) -> String {
    lines.iter().map(|line| screen(dir, line)).collect::<Vec<_>>().join("\n")
}

/// Blanks out everything that depends on the time or the file system.
fn blank(shown: &str) -> String {
    let line = |line: &str| -> String {
        for label in ["disk size: ", "\"actual-size\": ", "\"elapsed\": "] {
            if let Some(at) = line.find(label) {
                let comma = if line.ends_with(',') { "," } else { "" };
                return format!("{}[blank]{comma}", &line[..at + label.len()]);
            }
        }
        if line.starts_with("done in ") || line.starts_with("finished with losses in ") {
            let (how, what) = line.split_once(": ").expect("a verdict");
            let how = how.rsplit_once(" in ").map_or(how, |(how, _)| how);
            let what = what.split_once("; ").map_or(what, |(what, _)| what);
            return format!("{how} in [blank]: {what}; [blank]");
        }
        line.to_owned()
    };
    let mut in_summary = false;
    let lines = shown.lines().map(|text| {
        let verdict = text.starts_with("done") || text.starts_with("finished");
        in_summary = text.starts_with("output ") || in_summary && !verdict;
        if !in_summary || text.starts_with("imgtool:") {
            return line(text);
        }
        let mut cells: Vec<&str> = text.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect();
        let on_disk = if cells.len() == 5 { 3 } else { cells.len() - 1 };
        // The XML of a domain has absolute paths, so its length depends on the directory.
        if cells[0] != "output" && (cells[1] != "config" || cells[0].ends_with(".xml")) {
            cells[on_disk] = "[blank]";
        }
        cells.join("  ")
    });
    lines.map(|line| line + "\n").collect()
}

/// Creates a directory with images of one disk in each format, an overlay, and two archives of two disks.
fn workshop() -> tempfile::TempDir {
    let dir = tempdir();
    Image::hole("x", 8 << 20)
        .with(1 << 20, images::noise(1, 3 << 16))
        .with(5 << 20, images::noise(2, 1 << 20))
        .write_raw(&dir.path().join("disk.raw"));
    for line in [
        "convert -q disk.raw disk.qcow2",
        "convert -q disk.raw disk.vhdx",
        "convert -q drive-scsi0=disk.raw drive-efidisk0=disk.qcow2 --proxmox name=web --proxmox cores=4 vm.vma",
        "create -q -f qcow2 -b disk.qcow2 -F qcow2 overlay.qcow2",
    ] {
        imgtool(line.split(' ')).within(dir.path()).ok();
    }
    std::fs::copy(fixture("two-disks.vma.zst"), dir.path().join("two-disks.vma.zst")).unwrap();
    dir
}

#[test]
fn help() {
    let dir = tempdir();
    insta::assert_snapshot!("help", screen(dir.path(), "--help"));
    insta::assert_snapshot!("help-short", screen(dir.path(), "-h"));
    for verb in [
        "convert",
        "info",
        "map",
        "check",
        "compare",
        "checksum",
        "measure",
        "create",
        "formats",
        "completions",
        "man",
        "vma",
    ] {
        let shown = screens(dir.path(), &[&format!("{verb} -h"), &format!("{verb} --help")]);
        let widest = shown.lines().map(|line| line.chars().count()).max().unwrap_or(0);
        assert!(widest <= 80, "{verb}: {widest} columns\n{shown}");
        insta::assert_snapshot!(format!("help-{verb}"), shown);
    }
    insta::assert_snapshot!(
        "formats",
        screens(dir.path(), &["formats", "formats qcow2", "convert -O qcow2 -o help"])
    );
    insta::assert_snapshot!("help-compat", screen(dir.path(), "convert --help-compat"));
    assert_eq!(imgtool(["help", "map"]).ok().stdout, imgtool(["map", "--help"]).ok().stdout);
}

#[test]
fn info() {
    let dir = workshop();
    for name in ["disk.raw", "disk.qcow2", "disk.vhdx", "vm.vma", "two-disks.vma.zst", "overlay.qcow2"] {
        let shown = screens(dir.path(), &[&format!("info {name}"), &format!("info --output json {name}")]);
        insta::assert_snapshot!(format!("info-{name}"), shown);
    }
}

#[test]
fn inspection_commands() {
    let dir = workshop();
    let lines = [
        "map disk.qcow2",
        "map vm.vma --disk drive-scsi0",
        "map --start-offset=1M --max-length=1M disk.qcow2",
        "map --output=json disk.qcow2",
        "map --start-offset 1T disk.qcow2",
        "map --output svg --start-offset=1M --max-length=512k disk.qcow2",
    ];
    insta::assert_snapshot!("map", screens(dir.path(), &lines));
    let lines = [
        "check disk.qcow2",
        "check --output json disk.qcow2",
        "check disk.vhdx",
        "check vm.vma",
        "check disk.raw",
    ];
    insta::assert_snapshot!("check", screens(dir.path(), &lines));
    imgtool(["convert", "-q", "vm.vma", "--disk", "drive-scsi0", "other.raw"]).within(dir.path()).ok();
    let mut bytes = std::fs::read(dir.path().join("other.raw")).unwrap();
    bytes[5 << 20] ^= 1;
    std::fs::write(dir.path().join("other.raw"), bytes).unwrap();
    let lines = [
        "compare disk.qcow2 disk.vhdx",
        "compare --output json disk.qcow2 disk.vhdx",
        "compare -f raw -F vhdx -p -q other.raw disk.vhdx",
        "compare other.raw disk.vhdx",
        "compare disk.raw nothing.raw",
    ];
    insta::assert_snapshot!("compare", screens(dir.path(), &lines));
    let lines = [
        "measure -O qcow2 disk.vhdx",
        "measure --output json -O qcow2 --size 1G",
        "checksum --output json disk.qcow2",
        "checksum two-disks.vma.zst",
    ];
    insta::assert_snapshot!("numbers", screens(dir.path(), &lines));
}

#[test]
fn summaries() {
    let dir = workshop();
    let lines = [
        "convert disk.qcow2 copy.vhdx",
        "convert --verify vm.vma --to qcow2 out/",
        "convert --output json -q disk.qcow2 json.raw",
        "convert -p -f raw -O qcow2 -c -W -m 8 -t none -T none -S 4k -o cluster_size=64k disk.raw b",
        "create --output json new.qcow2 1G",
        "create -f qcow2 -u -b none.raw -F raw new2.qcow2 1.5G",
    ];
    insta::assert_snapshot!("summaries", screens(dir.path(), &lines));
}

#[test]
fn errors() {
    let dir = workshop();
    let before = imgtool_testing::snapshot(dir.path());
    let lines = [
        "conver disk.raw x",
        "rebase disk.qcow2",
        "convert --thread 3 disk.raw x",
        "convert disk.raw",
        "convert -O qcow disk.raw x",
        "convert -O qcow2 -o cluster_siz=4k disk.raw x",
        "convert -O qcow2 -o preallocation=ful disk.raw x",
        "convert -O qcow2 -o cluster_size=3000 disk.raw x",
        "convert -t nono disk.raw x",
        "convert --progress bars disk.raw x",
        "convert -m 0 disk.raw x",
        "convert -r fast disk.raw x",
        "convert -S 3q disk.raw x",
        "convert --disk scsi7 vm.vma x",
        "convert --target scsi7=x vm.vma",
        "convert disk.raw disk.qcow2 disk.vhdx x",
        "convert --image-opts driver=raw x",
        "convert --target-image-opts disk.raw x",
        "convert --object secret,id=s disk.raw x",
        "convert --image-opts driver=nbd,file.filename=x y",
        "create -f raw json:{} 1M",
        "convert --bitmaps disk.raw x",
        "convert overlay.qcow2 x",
        "convert disk.raw disk.qcow2",
        "convert nothing.raw x",
        "check -r some disk.qcow2",
        "map --disk scsi disk.qcow2",
        "create x",
        "create -f raw x 1Q",
    ];
    insta::assert_snapshot!("errors", screens(dir.path(), &lines));
    assert_eq!(imgtool_testing::snapshot(dir.path()), before);
    for line in &lines {
        let stderr = imgtool(line.split(' ')).within(dir.path()).go().stderr;
        assert!(
            stderr.lines().filter(|line| !line.starts_with("imgtool: disk")).count() <= 4,
            "{line}: {stderr}"
        );
    }
}

/// Commands of people who have not read the manual.
#[test]
fn mistakes() {
    let dir = workshop();
    let here = dir.path();
    std::fs::create_dir(here.join("directory")).unwrap();
    std::fs::write(here.join("empty.qcow2"), b"").unwrap();
    let cut = |from: &str, to: &str, len| {
        std::fs::write(here.join(to), &std::fs::read(here.join(from)).unwrap()[..len]).unwrap();
    };
    cut("disk.qcow2", "cut.qcow2", 70_000);
    cut("disk.vhdx", "cut.vhdx", 100_000);
    cut("two-disks.vma.zst", "cut.vma.zst", 40_000);
    let before = imgtool_testing::snapshot(here);
    let lines = [
        "vm.vma",
        "none.vma.zst",
        "list vm.vma",
        "version",
        "-O qcow2 convert disk.raw x",
        "info",
        "compare disk.raw",
        "compare disk.raw disk.qcow2 disk.vhdx",
        "completions",
        "convert",
        "convert --disk",
        "convert --verify=yes disk.raw x",
        "convert -to qcow2 disk.raw x",
        "convert disk.raw -O x.qcow2",
        "convert -O dmg disk.raw x",
        "convert disk.raw x.dmg",
        "convert -f ova disk.raw x",
        "convert -O raw -o cluster_size=64k disk.raw x",
        "convert -O qcow2 -o cluster=1G disk.raw x",
        "convert dsik.raw x",
        "convert nodir/disk.raw x",
        "convert nbd://localhost/disk x",
        "convert nbd:disk.raw x",
        "convert directory x",
        "convert disk.raw disk.raw",
        "convert disk.raw nodir/x",
        "convert disk.raw disk.vhdx/",
        "convert -O qcow2 disk.raw -",
        "convert empty.qcow2 x",
        "convert cut.qcow2 x",
        "convert cut.vhdx x",
        "convert cut.vma.zst x/",
        "info -",
        "map --start-offset 9M disk.raw",
        "create 10G disk.new",
        "create -f qcow2 - 10G",
        "create x.ova 10G",
    ];
    insta::assert_snapshot!("mistakes", screens(here, &lines));
    assert_eq!(imgtool_testing::snapshot(here), before);
}

#[test]
fn losses() {
    let dir = tempdir();
    let whole = std::fs::read(fixture("sparse.vma")).unwrap();
    std::fs::write(dir.path().join("damaged.vma"), &whole[..93_000]).unwrap();
    let lines = [
        "convert damaged.vma --to raw rescued.raw",
        "convert --salvage damaged.vma --to raw rescued.raw",
        "convert --salvage -q damaged.vma --to raw quietly.raw",
    ];
    insta::assert_snapshot!("losses", screens(dir.path(), &lines));
}

#[test]
fn overlay_reads_the_same_as_its_backing_file() {
    require!("qemu-img");
    let dir = workshop();
    let line = "compare --allow-external chain overlay.qcow2 disk.raw";
    imgtool(line.split(' ')).within(dir.path()).ok();
    let overlay = dir.path().join("overlay.qcow2");
    oracles::qemu_compare(&overlay, "qcow2", &dir.path().join("disk.qcow2"), "qcow2");
}
