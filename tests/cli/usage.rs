//! Arguments: help, usage errors, flags of qemu-img.

use std::collections::BTreeSet;

use imgtool_testing::{assert_same, names, tempdir};

use super::with_disk;
use crate::support::imgtool;

#[test]
fn prints_help_and_version_to_standard_output() {
    for verb in [None, Some("convert"), Some("info"), Some("formats")] {
        let run = imgtool(verb.into_iter().chain(["--help"])).ok();
        assert!(run.text().contains("Usage"), "{verb:?}: {}", run.text());
    }
    assert!(imgtool(["--version"]).ok().text().starts_with("imgtool "));
}

#[test]
fn usage_errors_exit_2_and_write_nothing() {
    let dir = with_disk();
    let lines: [&[&str]; 9] = [
        &[],
        &["frobnicate"],
        &["convert"],
        &["convert", "disk.raw"],
        &["convert", "disk.raw", "--to", "nosuchformat", "out"],
        &["convert", "--nosuchflag", "disk.raw", "--to", "raw", "out"],
        &["convert", "disk.raw", "--to", "qcow2", "-o", "nosuchoption=1", "out"],
        &["convert", "disk.raw", "--to", "qcow2", "-o", "cluster_size=3000", "out"],
        &["convert", "disk.raw", "--to", "raw", "--threads", "many", "out"],
    ];
    for line in lines {
        let run = imgtool(line.iter().copied()).within(dir.path()).go().exits(2);
        assert!(!run.stderr.is_empty(), "{line:?} says nothing");
        assert_eq!(names(dir.path()), ["disk.raw"], "{line:?}");
    }
}

#[test]
fn rejects_a_compression_separated_by_a_space() {
    let dir = with_disk();
    let line = ["convert", "-O", "vma", "disk.raw", "-c", "zstd"];
    imgtool(line).within(dir.path()).go().exits(2).says("-c=zstd is the compression");
    assert_eq!(names(dir.path()), ["disk.raw"]);
}

#[test]
fn errors_omit_url_credentials() {
    let dir = with_disk();
    let url = "https://user:secret@host/x.qcow2";
    let json = format!("json:{{\"file.url\":\"{url}\"}}");
    let lines: [&[&str]; 8] = [
        &["info", url],
        &["info", &json],
        &["convert", url, "out.raw"],
        &["convert", "disk.raw", url],
        &["convert", "disk.raw", "-O", "qcow2", "-o", &format!("backing_file={url}"), "out.qcow2"],
        &["create", "-f", "qcow2", url, "1M"],
        &["vma", "create", url, "disk.raw"],
        &["vma", "create", "out.vma", "-c", url, "disk.raw"],
    ];
    for line in lines {
        let run = imgtool(line.iter().copied()).within(dir.path()).go();
        assert!(!run.status.success(), "{line:?}");
        assert!(!run.stderr.contains("secret") && !run.stderr.is_empty(), "{line:?}: {}", run.stderr);
    }
}

#[test]
fn capital_o_is_short_for_to() {
    let dir = with_disk();
    imgtool(["convert", "-O", "qcow2", "disk.raw", "a"]).within(dir.path()).ok();
    imgtool(["convert", "--to", "qcow2", "disk.raw", "b"]).within(dir.path()).ok();
    assert_same(&dir.path().join("a"), &dir.path().join("b"), "-O");
}

#[test]
fn accepts_flags_from_qemu_img_scripts() {
    let dir = with_disk();
    let line = "convert -p -q -W -t none -T none -U -m 4 -f raw -O qcow2 disk.raw out.qcow2";
    imgtool(line.split(' ')).within(dir.path()).ok();
    let line = "convert --image-opts -O raw driver=raw,file.filename=disk.raw out.raw";
    imgtool(line.split(' ')).within(dir.path()).ok();
    assert_same(&dir.path().join("disk.raw"), &dir.path().join("out.raw"), "--image-opts");
    assert_eq!(names(dir.path()), ["disk.raw", "out.qcow2", "out.raw"]);
}

#[test]
fn repeated_flags_override_earlier_ones() {
    let dir = with_disk();
    let line = "convert -p -p -q -q -f qcow2 -f raw -O vhdx -O qcow2 -t none -t writeback disk.raw copy";
    imgtool(line.split(' ')).within(dir.path()).ok();
    let info = imgtool(["info", "--output", "human", "--output", "json", "copy"]).within(dir.path()).ok();
    assert_eq!(info.json()["format"], "qcow2");
}

#[test]
fn reports_usage_errors_before_opening_a_source() {
    let dir = tempdir();
    for line in [
        "convert -O qcow2 -o cluster_size=3000 none out",
        "convert -O qcow2 -o extended_l2=on,cluster_size=512 none out",
        "convert -O qcow2 -c=zstd:99 none out",
        "convert -O qcow2 -c=lzma none out",
        "convert -O vhdx -o block_size=3M none out",
        "convert -O vma -o uuid=x none out",
        "convert -O raw -o preallocation=x none out",
        "convert -c=zstd:99 none out.vma",
        "convert -r fast none out",
        "convert -S x none out",
        "convert -O dmg none out",
        "convert none out.dmg",
        "convert none -O out.qcow2",
        "measure -O qcow2 -o cluster_size=3000 none",
        "create -f vhdx -o block_size=3M out 1G",
        "create -f qcow2 - 1G",
        "create 1G out",
        "create out.dmg 1G",
    ] {
        let run = imgtool(line.split(' ')).within(dir.path()).go().exits(2);
        assert!(!run.stderr.contains("No such file"), "{line}: {}", run.stderr);
        assert!(names(dir.path()).is_empty(), "{line} wrote {:?}", names(dir.path()));
    }
}

#[test]
fn help_of_convert_begins_with_the_common_flags() {
    let flags = |args: &[&str]| -> BTreeSet<String> {
        let help = imgtool(args.iter()).ok().text();
        // Texts are indented further.
        let is_flag = |line: &&str| line.starts_with("  -") || line.starts_with("      --");
        let flags = help
            .lines()
            .filter(is_flag)
            .map(str::trim_start)
            .map(|line| line.split([' ', ',', '[', '=', '.']).next().unwrap());
        flags.map(str::to_owned).collect()
    };
    let (short, long) = (flags(&["convert", "-h"]), flags(&["convert", "--help"]));
    let rare = flags(&["convert", "--help-compat"]);
    // The 21 flags, --help-compat and -h.
    assert!(short.len() <= 23 && long.len() <= 23, "{short:?} {long:?}");
    for flag in ["-O", "--config", "--proxmox", "--salvage", "--size", "--for"] {
        assert!(long.contains(flag) && !rare.contains(flag), "{flag}");
    }
    for flag in ["-t", "-T", "-W", "-C", "-S", "-B", "--bitmaps", "--memory"] {
        assert!(rare.contains(flag) && !short.contains(flag), "{flag}");
    }
    // The manual page has all of them.
    let dir = tempdir();
    imgtool(["man", "."]).within(dir.path()).ok();
    let page = std::fs::read_to_string(dir.path().join("imgtool-convert.1")).unwrap();
    assert!(page.contains("\\-\\-bitmaps") && page.contains("\\-\\-target\\-image\\-opts"), "{page}");
}

#[test]
fn formats_describes_one_format_by_name() {
    let table = imgtool(["formats"]).ok().text();
    assert!(table.lines().count() < 25 && !table.contains("cluster_size"), "{table}");
    let page = imgtool(["formats", "qcow2"]).ok().text();
    assert!(page.starts_with("qcow2: ") && page.contains("cluster_size="), "{page}");
    let json = imgtool(["formats", "--output", "json", "vpc"]).ok().json();
    assert_eq!((json.as_array().unwrap().len(), &json[0]["name"]), (1, &"vhd".into()));
    imgtool(["formats", "qcow3"]).go().exits(2).says("did you mean 'qcow");
}

#[test]
fn formats_lists_every_driver() {
    let people = imgtool(["formats"]).ok().text();
    let json = imgtool(["formats", "--output", "json"]).ok().json().to_string();
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        assert!(people.contains(format), "{people}");
        assert!(json.contains(&format!("\"{format}\"")), "{json}");
    }
}
