//! Equal content gives equal bytes, whatever the holes, the format and the way in.

use std::path::Path;
use std::process::Command;

use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::Archive;
use imgtool_testing::{names, oracles, require, sha256, tempdir, text};

use crate::support::imgtool;

const MIB: u64 = 1 << 20;

/// Targets: extension, options, and true if the source's size must be known.
const TARGETS: &[(&str, &str, bool)] = &[
    ("raw", "", false),
    ("raw", "-S 64k", false),
    ("raw.zst", "", false),
    ("raw.zst", "-S 64k", false),
    ("raw.zst", "-S 0", false),
    ("raw.gz", "", false),
    ("qcow2", "", false),
    ("qcow2", "-c", false),
    ("qcow2", "--compress=zstd -o cluster_size=2M", false),
    ("qcow2", "-o cluster_size=512", false),
    ("qcow2", "-o cluster_size=2M", false),
    ("qcow2", "-o extended_l2=on", false),
    ("qcow2", "-o compat=0.10", false),
    ("qcow2", "-S 128k", false),
    ("qcow2", "-S 0", false),
    ("qcow2", "-o preallocation=metadata", true),
    ("vhdx", "", true),
    ("vhdx", "-o block_size=1M", true),
    ("vhdx", "-S 1M", true),
    ("vhdx", "-S 0", true),
    ("vhdx", "-o subformat=fixed", true),
    ("vmdk", "", true),
    ("vmdk", "-S 0", true),
    ("vmdk", "-o subformat=monolithicSparse", true),
    ("vmdk", "-o subformat=monolithicFlat", true),
    ("vmdk", "-o subformat=vmfs", true),
    ("vmdk", "-o subformat=twoGbMaxExtentSparse", true),
    ("vma", "", true),
    ("vma", "-S 64k", true),
    ("vma", "-S 0", true),
    ("vma.zst", "", true),
    ("vma.gz", "", true),
];

/// Returns a disk with data, zeros that a dense source stores, and zeros longer than any unit, group or frame.
/// It ends within a sub-block.
fn disk() -> Image {
    let mut bytes = images::prose(1, 300_000);
    bytes.resize(3 << 20, 0);
    bytes.extend(images::noise(2, 700_000));
    bytes.resize((5 << 20) + 4096, 0);
    for number in 0..200 {
        bytes.extend(images::noise(number, 512));
        bytes.resize(bytes.len() + 11_776, 0);
    }
    bytes.resize(9 << 20, 0);
    bytes.extend(images::prose(3, 1000));
    let tail = images::noise(4, 5 * 512);
    Image::hole("disk", 22 * MIB + 5 * 512).with(0, bytes).with(22 * MIB, tail)
}

fn convert(directory: &Path, line: &str) {
    imgtool(["convert", "-q", "--force"]).args(line.split_whitespace()).within(directory).ok();
}

/// Writes a preallocated raw image: data where `sparse` has data, allocated but unwritten elsewhere. The
/// kernel reports an unwritten page as data once it was read.
fn preallocate(sparse: &Path, path: &Path) {
    let size = std::fs::metadata(sparse).unwrap().len();
    oracles::run("fallocate", &["-l", &size.to_string(), text(path)]);
    let dd = Command::new("dd")
        .arg(format!("if={}", text(sparse)))
        .arg(format!("of={}", text(path)))
        .args(["conv=notrunc,sparse", "bs=4k", "status=none"])
        .status();
    assert!(dd.unwrap().success());
}

/// Writes the disk in all forms. Returns their names; `-` before the name of a file means a pipe, and `?` that
/// the source's size is unknown.
fn forms(directory: &Path) -> Vec<&'static str> {
    disk().write_raw(&directory.join("sparse.raw"));
    let bytes = std::fs::read(directory.join("sparse.raw")).unwrap();
    std::fs::write(directory.join("dense.raw"), &bytes).unwrap();
    for name in ["fresh.raw", "cached.raw"] {
        preallocate(&directory.join("sparse.raw"), &directory.join(name));
    }
    assert!(std::fs::read(directory.join("cached.raw")).unwrap() == bytes);
    for line in [
        "dense.raw holes.qcow2",
        "dense.raw full.qcow2 -S 0",
        "dense.raw small.qcow2 -o cluster_size=512",
        "dense.raw large.qcow2 -c -o cluster_size=2M",
        "sparse.raw disk.vhdx",
        "sparse.raw fixed.vhdx -S 0 -o subformat=fixed",
        "disk=dense.raw disk.vma",
        "disk=dense.raw full.vma -S 0",
        "disk=sparse.raw seekable.vma.zst",
        "sparse.raw seekable.raw.zst",
    ] {
        convert(directory, line);
    }
    for name in ["dense.raw", "disk.vma", "holes.qcow2"] {
        let path = directory.join(name);
        oracles::run("zstd", &["-q", text(&path), "-o", &format!("{}.zst", text(&path))]);
    }
    vec![
        "dense.raw",
        "sparse.raw",
        "fresh.raw",
        "cached.raw",
        "holes.qcow2",
        "full.qcow2",
        "small.qcow2",
        "large.qcow2",
        "disk.vhdx",
        "fixed.vhdx",
        "disk.vma",
        "full.vma",
        "seekable.vma.zst",
        "seekable.raw.zst",
        "holes.qcow2.zst",
        "disk.vma.zst",
        "-disk.vma",
        "-full.vma",
        "-seekable.vma.zst",
        "?dense.raw.zst",
        "-?dense.raw",
    ]
}

/// Converts one form of the disk, or an archive, and returns the digest of the output.
fn digest(directory: &Path, form: &str, extension: &str, options: &str, threads: usize) -> String {
    let out = directory.join(format!("out.{extension}"));
    let threads = threads.to_string();
    let file = form.trim_start_matches(['-', '?']);
    let is_pipe = form.starts_with('-');
    let path = if is_pipe { "-" } else { file };
    let name = if form.contains(".vma") { path.to_owned() } else { format!("disk={path}") };
    let to = extension.split('.').next().unwrap();
    let mut run = imgtool(["convert", "-q", "--force", "--threads", &threads, &name, "--to", to, text(&out)]);
    run = run.args(options.split_whitespace()).env("SOURCE_DATE_EPOCH", "1").within(directory);
    if is_pipe {
        run = run.args(if file.ends_with(".raw") { ["-f", "raw"].as_slice() } else { &[] });
        run = run.pipe_from(&directory.join(file));
    }
    run.ok();
    // An image may have several files.
    let mut files: Vec<_> = names(directory).into_iter().filter(|name| name.starts_with("out")).collect();
    files.sort();
    let digests = files.iter().map(|name| {
        let path = directory.join(name);
        let digest = sha256(&std::fs::read(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        digest
    });
    digests.collect::<Vec<_>>().join(" ")
}

/// Asserts that all forms of the disk give the same bytes in the targets whose number modulo 3 is `part`.
fn all_forms_agree(part: usize) {
    require!("zstd", "fallocate");
    let dir = tempdir();
    let forms = forms(dir.path());
    let targets = TARGETS.iter().enumerate().filter(|(number, _)| number % 3 == part);
    for (number, (extension, options, sized)) in targets {
        let expected = digest(dir.path(), "dense.raw", extension, options, 1);
        for (index, form) in forms.iter().enumerate().filter(|(_, form)| !sized || !form.contains('?')) {
            let threads = [1, 2, 7][(index + number) % 3];
            let found = digest(dir.path(), form, extension, options, threads);
            assert_eq!(found, expected, "{form} → {extension} {options}, {threads} threads");
        }
    }
}

#[test]
fn every_form_of_a_disk_gives_the_same_bytes_1() {
    all_forms_agree(0);
}

#[test]
fn every_form_of_a_disk_gives_the_same_bytes_2() {
    all_forms_agree(1);
}

#[test]
fn every_form_of_a_disk_gives_the_same_bytes_3() {
    all_forms_agree(2);
}

/// Zeros longer than a group of frames, as a hole, as pieces of one extent, and as stored zeros.
#[test]
fn long_runs_of_zeros_give_the_same_frames() {
    let dir = tempdir();
    let mut image = Image::hole("disk", 1100 * MIB);
    for (number, at) in (0..).zip([3, 250, 251, 473, 474, 945, 1098]) {
        image = image.with(at * MIB, images::noise(number, 5000));
    }
    image.write_raw(&dir.path().join("sparse.raw"));
    std::fs::write(dir.path().join("disk.vma"), Archive::of([("disk", image)]).build().bytes).unwrap();
    convert(dir.path(), "sparse.raw full.qcow2 -S 0 -c -o cluster_size=2M");
    std::fs::write(dir.path().join("notes.txt"), "notes").unwrap();
    // Only plain disks get a configuration if there is none.
    let same = "--config notes.txt";
    for (extension, options) in [("raw.zst", ""), ("raw.gz", ""), ("vma.zst", same), ("vma.gz", same)] {
        let expected = digest(dir.path(), "sparse.raw", extension, options, 1);
        for (form, threads) in [("sparse.raw", 7), ("disk.vma", 2), ("-disk.vma", 7), ("full.qcow2", 2)] {
            let found = digest(dir.path(), form, extension, options, threads);
            assert_eq!(found, expected, "{form} → {extension}, {threads} threads");
        }
    }
}

/// Returns two disks. Together they have more incomplete extents than are gathered at once.
fn two_disks() -> [(&'static str, Image); 2] {
    let mut first = Image::hole("a", 100 * MIB + 512);
    let mut second = Image::hole("b", 30 * MIB);
    for number in 0..50 {
        first = first.with(number * 2 * MIB, images::noise(number, 9000));
        second = second.with(number * 600_000 / 512 * 512, images::prose(number, 70_000));
    }
    [("a", first), ("b", second)]
}

/// Asserts that an archive gives the same outputs from a file and from a pipe, with any number of threads.
fn file_and_pipe_agree(archive: &Archive, targets: &[(&str, &str)]) {
    let dir = tempdir();
    std::fs::write(dir.path().join("vm.vma"), archive.build().bytes).unwrap();
    for (extension, options) in targets {
        let expected = digest(dir.path(), "vm.vma", extension, options, 1);
        for (form, threads) in [("vm.vma", 7), ("-vm.vma", 1), ("-vm.vma", 7)] {
            let found = digest(dir.path(), form, extension, options, threads);
            assert_eq!(found, expected, "{form} → {extension} {options}, {threads} threads");
        }
    }
}

#[test]
fn a_shuffled_archive_gives_the_same_bytes_from_a_file_and_from_a_pipe() {
    let [first, second] = two_disks();
    let archive = Archive::of([first.clone(), second]).shuffled(5);
    file_and_pipe_agree(&archive, &[("vma", ""), ("vma.zst", "")]);
    let single = Archive::of([first]).shuffled(6);
    let targets =
        [("qcow2", ""), ("qcow2", "-o cluster_size=2M"), ("qcow2", "-o cluster_size=512"), ("vhdx", "")];
    file_and_pipe_agree(&single, &targets);
    file_and_pipe_agree(&single, &[("qcow2", "-c")]);
}

/// Compression needs whole clusters, and a badly shuffled stream leaves too many incomplete. In a file, they can
/// be read in guest order.
#[test]
fn a_badly_shuffled_archive_in_a_file_can_be_compressed() {
    let dir = tempdir();
    let [(_, first), _] = two_disks();
    first.write_raw(&dir.path().join("a.raw"));
    let archive = Archive::of([("a", first)]).shuffled(6).build().bytes;
    std::fs::write(dir.path().join("vm.vma"), archive).unwrap();
    let refused = imgtool(["convert", "-q", "-c", "-o", "cluster_size=2M", "-", "piped.qcow2"]);
    let refused = refused.pipe_from(&dir.path().join("vm.vma")).within(dir.path()).go();
    refused.exits(1).says("too badly shuffled");
    for form in ["a.raw", "vm.vma"] {
        convert(dir.path(), &format!("{form} {form}.qcow2 -c -o cluster_size=2M"));
    }
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    assert!(read("a.raw.qcow2") == read("vm.vma.qcow2"));
}

/// The frames of a compressed image follow each other, so that its content must come in guest order.
#[test]
fn a_shuffled_archive_becomes_a_compressed_disk_or_is_refused() {
    let dir = tempdir();
    let [(_, disk), _] = two_disks();
    disk.write_raw(&dir.path().join("a.raw"));
    let archive = Archive::of([("a", disk)]).shuffled(6).build().bytes;
    std::fs::write(dir.path().join("vm.vma"), archive).unwrap();
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    for extension in ["raw", "raw.gz", "raw.zst", "vhd.gz -o subformat=fixed"] {
        let name = extension.split(' ').next().unwrap();
        for form in ["a.raw", "vm.vma"] {
            convert(dir.path(), &format!("{form} {form}.{extension}"));
        }
        assert!(read(&format!("a.raw.{name}")) == read(&format!("vm.vma.{name}")), "{extension}");
        let line = format!("convert -q - piped.{extension}");
        let piped = imgtool(line.split(' ')).pipe_from(&dir.path().join("vm.vma")).within(dir.path()).go();
        match extension {
            "raw" => assert!(piped.exits(0).stderr.is_empty() && read("piped.raw") == read("a.raw")),
            _ => assert!(piped.exits(1).stderr.contains("order"), "{extension}"),
        }
    }
}

#[test]
fn an_interleaved_archive_gives_the_same_bytes_from_a_file_and_from_a_pipe() {
    let archive = Archive::of(two_disks()).interleaved();
    file_and_pipe_agree(&archive, &[("vma", ""), ("vma.gz", "")]);
}

#[test]
fn disks_of_an_interleaved_archive_have_the_bytes_of_plain_disks() {
    let dir = tempdir();
    for (name, image) in two_disks() {
        image.write_raw(&dir.path().join(format!("{name}.raw")));
    }
    std::fs::write(dir.path().join("vm.vma"), Archive::of(two_disks()).interleaved().build().bytes).unwrap();
    for format in ["qcow2", "vhdx"] {
        imgtool(["convert", "-q", "-", "--to", format, "piped/"])
            .pipe_from(&dir.path().join("vm.vma"))
            .within(dir.path())
            .ok();
        for name in ["a", "b"] {
            convert(dir.path(), &format!("{name}.raw expected.{format}"));
            let [found, expected] = [format!("piped/{name}.{format}"), format!("expected.{format}")]
                .map(|name| std::fs::read(dir.path().join(name)).unwrap());
            assert!(found == expected, "{name}.{format}");
        }
        std::fs::remove_dir_all(dir.path().join("piped")).unwrap();
    }
}

#[test]
fn an_archive_of_two_disks_has_the_bytes_of_the_archive_that_it_is_copied_from() {
    let dir = tempdir();
    for (name, image) in two_disks() {
        image.write_raw(&dir.path().join(format!("{name}.raw")));
    }
    imgtool(["convert", "-q", "a=a.raw", "b=b.raw", "vm.vma"])
        .env("SOURCE_DATE_EPOCH", "1")
        .within(dir.path())
        .ok();
    let expected = sha256(&std::fs::read(dir.path().join("vm.vma")).unwrap());
    for form in ["vm.vma", "-vm.vma"] {
        assert_eq!(digest(dir.path(), form, "vma", "", 2), expected, "{form}");
    }
}

/// More data than one batch of refcount blocks describes, from pieces of two lengths.
#[test]
fn refcount_blocks_have_the_same_places_whatever_the_pieces() {
    let dir = tempdir();
    let image = Image::hole("disk", 80 * MIB).with(4096, images::noise(1, 78 << 20));
    image.write_raw(&dir.path().join("disk.raw"));
    convert(dir.path(), "disk.raw large.qcow2 -o cluster_size=2M");
    let digests = ["disk.raw", "large.qcow2"]
        .map(|form| digest(dir.path(), form, "qcow2", "-o cluster_size=512,refcount_bits=64", 2));
    assert_eq!(digests[0], digests[1]);
}
