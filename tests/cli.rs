//! The command line: exit codes, targets and what is said, as scripts rely on it.

use crate::support::images::{self, Image};
use crate::support::{assert_same, fixture, imgtool, names, snapshot, tempdir, text};

/// A directory with `disk.raw` in it.
fn with_disk() -> tempfile::TempDir {
    let dir = tempdir();
    images::every_mask().write_raw(&dir.path().join("disk.raw"));
    dir
}

#[test]
fn help_and_version_are_on_standard_output() {
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
fn many_disks_do_not_fit_into_one_file() {
    let dir = with_disk();
    std::fs::copy(dir.path().join("disk.raw"), dir.path().join("other.raw")).unwrap();
    let before = snapshot(dir.path());
    let run = imgtool(["convert", "disk.raw", "other.raw", "--to", "qcow2", "out.qcow2"]);
    let run = run.within(dir.path()).go();
    // Whether this is taken as a usage error or made a directory of, no file may hold half of it.
    if run.status.success() {
        assert_eq!(names(&dir.path().join("out.qcow2")), ["disk.qcow2", "other.qcow2"]);
    } else {
        assert_eq!(snapshot(dir.path()), before);
    }
}

#[test]
fn an_existing_output_is_not_overwritten_without_force() {
    let dir = with_disk();
    std::fs::write(dir.path().join("out"), b"precious").unwrap();
    let before = snapshot(dir.path());
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        let line = ["convert", "disk.raw", "--to", format, "out"];
        imgtool(line).within(dir.path()).go().exits(1).says("out");
        assert_eq!(snapshot(dir.path()), before, "{format}");
    }
    imgtool(["convert", "--force", "disk.raw", "--to", "raw", "out"]).within(dir.path()).ok();
    assert_same(&dir.path().join("disk.raw"), &dir.path().join("out"), "--force");
}

#[test]
fn the_source_is_never_the_target() {
    let dir = with_disk();
    std::fs::hard_link(dir.path().join("disk.raw"), dir.path().join("link.raw")).unwrap();
    std::os::unix::fs::symlink("disk.raw", dir.path().join("symlink.raw")).unwrap();
    let before = snapshot(dir.path());
    for target in ["disk.raw", "./disk.raw", "link.raw", "symlink.raw"] {
        let line = ["convert", "--force", "disk.raw", "--to", "qcow2", target];
        imgtool(line).within(dir.path()).go().exits(1);
        assert_eq!(snapshot(dir.path()), before, "{target}");
    }
}

#[test]
fn one_disk_into_a_directory_is_named_after_its_source() {
    let dir = with_disk();
    std::fs::create_dir(dir.path().join("there")).unwrap();
    imgtool(["convert", "disk.raw", "--to", "qcow2", "there"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("there")), ["disk.qcow2"]);
    imgtool(["convert", "disk.raw", "--to", "vhdx", "new/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("new")), ["disk.vhdx"]);
}

#[test]
fn the_format_follows_the_extension_of_the_target() {
    let dir = with_disk();
    for (name, format) in [("a.qcow2", "qcow2"), ("a.vhdx", "vhdx"), ("a.vma", "vma"), ("a.raw", "raw")] {
        imgtool(["convert", "disk.raw", name]).within(dir.path()).ok();
        let info = imgtool(["info", "--output", "json", name]).within(dir.path()).ok().json();
        assert_eq!(info["format"], format);
    }
}

#[test]
fn capital_o_is_to() {
    let dir = with_disk();
    imgtool(["convert", "-O", "qcow2", "disk.raw", "a"]).within(dir.path()).ok();
    imgtool(["convert", "--to", "qcow2", "disk.raw", "b"]).within(dir.path()).ok();
    assert_same(&dir.path().join("a"), &dir.path().join("b"), "-O");
}

#[test]
fn flags_of_qemu_img_scripts_are_taken() {
    let dir = with_disk();
    let line = "convert -p -q -W -t none -T none -U -m 4 -f raw -O qcow2 disk.raw out.qcow2";
    imgtool(line.split(' ')).within(dir.path()).ok();
    let line = "convert --image-opts -O raw driver=raw,file.filename=disk.raw out.raw";
    let run = imgtool(line.split(' ')).within(dir.path()).go();
    assert!(!run.status.success());
    assert_eq!(names(dir.path()), ["disk.raw", "out.qcow2"]);
}

#[test]
fn a_found_format_is_told() {
    let source = fixture("two-disks.vma.zst");
    let dir = tempdir();
    let run = imgtool(["convert", text(&source), "--to", "qcow2", text(&dir.path().join("out"))]).ok();
    let said = run.text() + &run.stderr;
    assert!(said.contains("vma") && said.contains("zst"), "{said}");
}

#[test]
fn the_summary_names_every_output() {
    let source = fixture("two-disks.vma.zst");
    let dir = tempdir();
    let run = imgtool(["convert", text(&source), "--to", "qcow2", text(&dir.path().join("out"))]).ok();
    let said = run.text() + &run.stderr;
    for name in ["drive-scsi0.qcow2", "drive-efidisk0.qcow2"] {
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn quiet_is_quiet() {
    let dir = with_disk();
    let run =
        imgtool(["convert", "-q", "-f", "raw", "disk.raw", "--to", "qcow2", "x"]).within(dir.path()).ok();
    assert_eq!((run.text().as_str(), run.stderr.as_str()), ("", ""));
}

#[test]
fn progress_in_json_ends_at_100_percent_once() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    Image::hole("x", 64 << 20).with(5 << 20, images::noise(1, 20 << 20)).write_raw(&raw);
    let line = ["convert", "--progress", "json", "disk.raw", "--to", "qcow2", "out.qcow2"];
    let run = imgtool(line).within(dir.path()).ok();
    let objects: Vec<serde_json::Value> =
        run.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    assert!(!objects.is_empty(), "{}", run.stderr);
    for field in ["phase", "device", "done", "total", "zero", "written", "elapsed"] {
        assert!(objects.iter().all(|object| object.get(field).is_some()), "no '{field}': {}", run.stderr);
    }
    let last = objects.last().unwrap();
    assert_eq!(last["done"], last["total"], "{}", run.stderr);
    // The digests of the objects themselves tell repeated final lines apart from repeated states.
    assert_eq!(objects.iter().filter(|object| *object == last).count(), 1, "{}", run.stderr);
}

#[test]
fn each_phase_reaches_100_percent_once() {
    let dir = tempdir();
    let archive = fixture("two-disks.vma.zst");
    let out = dir.path().join("out/");
    let line = ["convert", "--verify", "--progress", "json", text(&archive), "--to", "qcow2", text(&out)];
    let run = imgtool(line).ok();
    let objects: Vec<serde_json::Value> =
        run.stderr.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let whole: Vec<_> = objects.iter().filter(|object| object["device"].is_null()).collect();
    let complete: Vec<&str> = whole
        .iter()
        .filter(|object| object["done"] == object["total"])
        .map(|object| object["phase"].as_str().unwrap())
        .collect();
    // Both outputs are one phase.
    assert_eq!(complete, ["convert", "verify"], "{}", run.stderr);
    assert_eq!(objects.last(), whole.last().copied(), "{}", run.stderr);
    for object in &whole {
        let (zero, done) = (object["zero"].as_u64().unwrap(), object["done"].as_u64().unwrap());
        assert!(zero < done, "not all of it is zero: {object}");
    }
}

#[test]
fn flags_may_be_repeated_as_qemu_imgs_and_the_last_counts() {
    let dir = with_disk();
    let line = "convert -p -p -q -q -f qcow2 -f raw -O vhdx -O qcow2 -t none -t writeback disk.raw copy";
    imgtool(line.split(' ')).within(dir.path()).ok();
    let info = imgtool(["info", "--output", "human", "--output", "json", "copy"]).within(dir.path()).ok();
    assert_eq!(info.json()["format"], "qcow2");
}

#[test]
fn what_makes_no_sense_is_said_before_a_source_is_opened() {
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
        "convert -O vmdk none out",
        "convert none out.vmdk",
        "convert none -O out.qcow2",
        "measure -O qcow2 -o cluster_size=3000 none",
        "create -f vhdx -o block_size=3M out 1G",
        "create -f qcow2 - 1G",
        "create 1G out",
        "create out.vdi 1G",
    ] {
        let run = imgtool(line.split(' ')).within(dir.path()).go().exits(2);
        assert!(!run.stderr.contains("No such file"), "{line}: {}", run.stderr);
        assert!(names(dir.path()).is_empty(), "{line} wrote {:?}", names(dir.path()));
    }
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

#[test]
fn names_from_an_archive_stay_in_the_output_directory() {
    use crate::support::archive::Archive;
    let disk = || Image::hole("d", 65_536).with(0, images::noise(1, 4096));
    for name in ["../evil", "/tmp/evil-absolute", "a/b", "..", ".", "", "x\ny", "\u{1b}[2Jz", "-rf"] {
        let dir = tempdir();
        let inner = dir.path().join("inner");
        std::fs::create_dir(&inner).unwrap();
        let archive = Archive::of([(name, disk())]).config("../evil.conf", b"x").build();
        let source = inner.join("vm.vma");
        std::fs::write(&source, archive.bytes).unwrap();
        let run = imgtool(["convert", text(&source), "--to", "raw", text(&inner.join("out/"))]).go();
        assert!(matches!(run.status.code(), Some(0 | 1)), "{name:?}: {}", run.stderr);
        assert!(
            !run.stderr.contains("panicked") && !run.stderr.contains('\u{1b}'),
            "{name:?}: {}",
            run.stderr
        );
        assert_eq!(names(dir.path()), ["inner"], "{name:?} left the directory");
        let beside: Vec<String> = names(&inner).into_iter().filter(|name| name != "out").collect();
        assert_eq!(beside, ["vm.vma"], "{name:?} left the directory");
        assert!(!std::path::Path::new("/tmp/evil-absolute.raw").exists());
    }
}

#[test]
fn devices_of_one_name_do_not_overwrite_each_other() {
    use crate::support::archive::Archive;
    let disk = |seed| Image::hole("d", 65_536).with(0, images::noise(seed, 4096));
    let dir = tempdir();
    let archive = Archive::of([("same", disk(1)), ("same", disk(2))]).build();
    let source = dir.path().join("vm.vma");
    std::fs::write(&source, archive.bytes).unwrap();
    let out = dir.path().join("out");
    let run = imgtool(["convert", text(&source), "--to", "raw", text(&out)]).go();
    if run.status.success() {
        let contents: std::collections::BTreeSet<String> = snapshot(&out).into_values().collect();
        assert_eq!(contents.len(), 2, "{:?}", names(&out));
    } else {
        assert_eq!(names(dir.path()), ["vm.vma"]);
    }
}
