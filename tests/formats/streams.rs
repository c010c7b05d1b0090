//! An archive from a file, from a pipe and under every outer compression gives the same disks; raw and VMA go
//! through pipes in both directions.

use std::path::{Path, PathBuf};

use imgtool_testing::vma::Archive;
use imgtool_testing::{
    assert_same_rounded, fixture, images, names, oracles, require, snapshot, tempdir, text,
};

use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Writes an archive of two disks and a configuration file, and returns its path.
fn archive(directory: &Path) -> PathBuf {
    let prose = images::all().into_iter().find(|image| image.name == "prose-and-holes").unwrap();
    let built = Archive::of([("drive-scsi0", images::every_mask()), ("drive-scsi1", prose)])
        .config("qemu-server.conf", b"cores: 2\n")
        .shuffled(11)
        .build();
    let path = directory.join("vm.vma");
    std::fs::write(&path, built.bytes).unwrap();
    path
}

/// Returns the compressor's output for a file.
fn compress(tool: &str, args: &[&str], path: &Path) -> Vec<u8> {
    let mut all = args.to_vec();
    all.extend(["-c", text(path)]);
    oracles::run(tool, &all).stdout
}

/// Returns the file in three parts, each compressed on its own, concatenated.
fn compress_in_parts(tool: &str, args: &[&str], path: &Path) -> Vec<u8> {
    let bytes = std::fs::read(path).unwrap();
    let mut joined = Vec::new();
    // Parts of odd length, so that no frame ends near a border of the archive.
    for part in bytes.chunks(bytes.len() / 3 + 1) {
        let piece = path.with_extension("part");
        std::fs::write(&piece, part).unwrap();
        joined.extend(compress(tool, args, &piece));
    }
    joined
}

/// Asserts that each compressed archive gives the same disks as `source`, from a file and from a pipe.
fn gives_the_same_disks(compressed: &[(&str, Vec<u8>)], source: &Path) {
    let dir = tempdir();
    let plain = dir.path().join("plain");
    imgtool(["convert", text(source), "--to", "raw", text(&plain)]).ok();
    let expected = snapshot(&plain);
    assert_eq!(expected.len(), 3);
    for (name, bytes) in compressed {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        let out = dir.path().join(format!("{name}.file"));
        imgtool(["convert", text(&file), "--to", "raw", text(&out)]).ok();
        assert_eq!(snapshot(&out), expected, "{name} from a file");
        let out = dir.path().join(format!("{name}.pipe"));
        imgtool(["convert", "-", "--to", "raw", text(&out)]).pipe_from(&file).ok();
        assert_eq!(snapshot(&out), expected, "{name} from a pipe");
    }
}

#[test]
fn reads_uncompressed_archives() {
    let dir = tempdir();
    let path = archive(dir.path());
    gives_the_same_disks(&[("plain.vma", std::fs::read(&path).unwrap())], &path);
}

#[test]
fn reads_zstd_with_one_or_many_frames() {
    require!("zstd");
    let dir = tempdir();
    let path = archive(dir.path());
    let many = compress_in_parts("zstd", &["-q", "-1"], &path);
    // A skippable frame at the front does not change the content.
    let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3], many.as_slice()].concat();
    gives_the_same_disks(
        &[
            ("one.zst", compress("zstd", &["-q"], &path)),
            ("long.zst", compress("zstd", &["-q", "-19", "--long=27", "--check"], &path)),
            ("many.zst", many),
            ("skippable.zst", skippable),
        ],
        &path,
    );
}

#[test]
fn reads_gzip_with_one_or_many_members() {
    require!("gzip");
    let dir = tempdir();
    let path = archive(dir.path());
    let many = compress_in_parts("gzip", &["-1"], &path);
    gives_the_same_disks(&[("one.gz", compress("gzip", &[], &path)), ("many.gz", many)], &path);
}

#[test]
fn reads_lzop_at_every_level() {
    require!("lzop");
    let dir = tempdir();
    let path = archive(dir.path());
    gives_the_same_disks(
        &[
            ("fast.lzo", compress("lzop", &["-q", "-1"], &path)),
            ("default.lzo", compress("lzop", &["-q"], &path)),
            ("best.lzo", compress("lzop", &["-q", "-9"], &path)),
            ("crc.lzo", compress("lzop", &["-q", "--crc32"], &path)),
            ("unchecked.lzo", compress("lzop", &["-q", "-F"], &path)),
        ],
        &path,
    );
}

#[test]
fn reads_xz_with_one_or_many_streams() {
    require!("xz");
    let dir = tempdir();
    let path = archive(dir.path());
    let many = compress_in_parts("xz", &["-1"], &path);
    gives_the_same_disks(&[("one.xz", compress("xz", &["-2"], &path)), ("many.xz", many)], &path);
}

#[test]
fn reads_bzip2_with_one_or_many_streams() {
    require!("bzip2");
    let dir = tempdir();
    let path = archive(dir.path());
    let many = compress_in_parts("bzip2", &["-1"], &path);
    gives_the_same_disks(&[("one.bz2", compress("bzip2", &[], &path)), ("many.bz2", many)], &path);
}

#[test]
fn copies_raw_from_standard_input_to_standard_output() {
    let dir = tempdir();
    for image in images::all().into_iter().filter(|image| image.size < 64 << 20) {
        let raw = dir.path().join("x.raw");
        image.write_raw(&raw);
        let run = imgtool(["convert", "-f", "raw", "-", "--to", "raw", "-"]).pipe_from(&raw).ok();
        assert!(run.stdout == std::fs::read(&raw).unwrap(), "{}", image.name);
    }
}

#[test]
fn converts_piped_raw_to_raw_and_qcow2() {
    let dir = tempdir();
    for image in images::all().into_iter().filter(|image| image.size < 64 << 20) {
        let raw = dir.path().join("x.raw");
        image.write_raw(&raw);
        for format in ["raw", "qcow2"] {
            let (out, back) = (dir.path().join("out"), dir.path().join("back"));
            imgtool(["convert", "--force", "-f", "raw", "-", "--to", format, text(&out)])
                .pipe_from(&raw)
                .ok();
            imgtool(["convert", "--force", "-f", format, text(&out), "--to", "raw", text(&back)]).ok();
            let multiple = if format == "raw" { 1 } else { 512 };
            assert_same_rounded(&raw, &back, multiple, &format!("{} to {format}", image.name));
        }
    }
}

#[test]
fn archive_on_standard_output_equals_the_file() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    images::every_mask().write_raw(&raw);
    let file = dir.path().join("file.vma");
    imgtool(["convert", text(&raw), "--to", "vma", text(&file)]).ok();
    for threads in ["1", "2", "7"] {
        let run = imgtool(["convert", "--threads", threads, text(&raw), "--to", "vma", "-"]).ok();
        assert!(run.stdout == std::fs::read(&file).unwrap(), "{threads} threads");
    }
}

/// The zeros before the end of an image are known to end only when the image does.
#[test]
fn compressed_images_end_behind_their_last_zeros() {
    let dir = tempdir();
    let data = images::Image::hole("d", 3 << 20).with(100_000, images::noise(1, 5_000));
    data.write_raw(&dir.path().join("a.raw"));
    let convert = |args: &[&str]| imgtool(["convert", "-q"]).args(args).within(dir.path()).ok();
    convert(&["a.raw", "a.vhd", "-o", "subformat=fixed"]);
    for (name, tool) in [("a.vhd.gz", "gzip"), ("a.vhd.zst", "zstd")] {
        convert(&["a.raw", name, "--verify", "-o", "subformat=fixed"]);
        let plain = oracles::run(tool, &["-dc", text(&dir.path().join(name))]).stdout;
        assert_eq!(plain.len() as u64, (3 << 20) + 512, "{name}");
        let expected = std::fs::read(dir.path().join("a.vhd")).unwrap();
        assert!(plain == expected, "{name} is not the image that has no compression");
    }
}

/// LUKS is read by position, gzip in one pass.
#[test]
fn verifies_compressed_encrypted_images_or_refuses_them_first() {
    let dir = tempdir();
    images::Image::hole("d", 3 << 20).with(4096, vec![1; 70_000]).write_raw(&dir.path().join("a.raw"));
    std::fs::write(dir.path().join("pw"), "secret").unwrap();
    let convert = |name| {
        let options = ["-q", "--verify", "--target-secret", "file=pw", "-o", "iter-time=10"];
        imgtool(["convert"]).args(options).args(["a.raw", name]).within(dir.path())
    };
    convert("a.luks.zst").ok();
    imgtool(["compare", "--secret", "file=pw", "a.raw", "a.luks.zst"]).within(dir.path()).ok();
    convert("a.luks.gz").go().exits(1).says("luks under gzip can't be read back").says("zstd");
    assert!(!dir.path().join("a.luks.gz").exists());
}

#[test]
fn repacks_an_archive_from_pipe_to_pipe() {
    let dir = tempdir();
    let path = archive(dir.path());
    let run = imgtool(["convert", "-", "--to", "vma", "-"]).pipe_from(&path).ok();
    let (before, after) = (dir.path().join("before"), dir.path().join("after"));
    imgtool(["convert", text(&path), "--to", "raw", text(&before)]).ok();
    imgtool(["convert", "-", "--to", "raw", text(&after)]).pipe_bytes(run.stdout).ok();
    assert_eq!(snapshot(&before), snapshot(&after));
}

#[test]
fn reads_piped_and_compressed_qcow2_and_vhdx() {
    require!("qemu-img", "zstd");
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    images::every_mask().write_raw(&raw);
    for format in ["qcow2", "vhdx"] {
        let image = dir.path().join(format!("x.{format}"));
        oracles::qemu_make(&raw, format, "", &image);
        let out = dir.path().join(format!("{format}.pipe.raw"));
        imgtool(["convert", "-", "--to", "raw", text(&out)]).pipe_from(&image).ok();
        assert_same_rounded(&raw, &out, 512, format);
        let compressed = dir.path().join(format!("x.{format}.zst"));
        std::fs::write(&compressed, compress("zstd", &["-q"], &image)).unwrap();
        let out = dir.path().join(format!("{format}.zst.raw"));
        imgtool(["convert", text(&compressed), "--to", "raw", text(&out)]).ok();
        assert_same_rounded(&raw, &out, 512, format);
    }
}

/// A qcow2 image in a pipe is copied to a temporary file first.
#[test]
fn elapsed_time_includes_the_copy_to_temporary_storage() {
    require!("bash");
    let dir = tempdir();
    images::every_mask().write_raw(&dir.path().join("disk.raw"));
    imgtool(["convert", "disk.raw", "disk.qcow2"]).within(dir.path()).ok();
    // The program has recognised the image before the pause.
    let script = r#"(head -c 100000 disk.qcow2; sleep 1; tail -c +100001 disk.qcow2) |
        "$IMGTOOL" convert --output json - out.raw"#;
    let mut run = std::process::Command::new("bash");
    let run = run.args(["-c", script]).env("IMGTOOL", PROGRAM).current_dir(dir.path()).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let report: serde_json::Value = serde_json::from_slice(&run.stdout).unwrap();
    assert!(report["elapsed"].as_f64().unwrap() > 0.9, "{report}");
}

#[test]
fn rejects_damaged_compressed_streams() {
    require!("zstd", "gzip", "lzop", "xz", "bzip2");
    let dir = tempdir();
    let path = archive(dir.path());
    let streams = [
        ("zst", compress("zstd", &["-q", "--check"], &path)),
        ("gz", compress("gzip", &[], &path)),
        ("lzo", compress("lzop", &["-q"], &path)),
        ("xz", compress("xz", &["-0"], &path)),
        ("bz2", compress("bzip2", &["-1"], &path)),
    ];
    for (name, bytes) in streams {
        let len = bytes.len();
        let mut damaged: Vec<(String, Vec<u8>)> = [len - 1, len - 5, len / 2, len / 7]
            .map(|cut| (format!("{name} cut at {cut} of {len}"), bytes[..cut].to_vec()))
            .into();
        damaged.push((format!("{name} and garbage"), [bytes.as_slice(), b"garbage, not zeros"].concat()));
        let mut flipped = bytes.clone();
        flipped[len / 2] ^= 0x10;
        damaged.push((format!("{name} with a flipped bit"), flipped));
        for (what, bytes) in damaged {
            let file = dir.path().join("damaged");
            std::fs::write(&file, bytes).unwrap();
            let before = names(dir.path());
            let run = imgtool(["convert", "-f", "vma", text(&file), "--to", "qcow2"]);
            let run = run.args([dir.path().join("out")]).go();
            assert_eq!(run.status.code(), Some(1), "{what}: {}", run.stderr);
            assert_eq!(names(dir.path()), before, "{what} left something");
        }
    }
}

#[test]
fn broken_pipe_is_an_error_without_a_panic() {
    let dir = tempdir();
    let raw = dir.path().join("x.raw");
    images::Image::hole("x", 8 << 20).with(0, images::noise(1, 8 << 20)).write_raw(&raw);
    let command = format!(
        "'{}' convert '{}' --to raw - | head -c 100 | wc -c; exit ${{PIPESTATUS[0]}}",
        crate::support::run::PROGRAM,
        text(&raw)
    );
    let output = std::process::Command::new("bash").args(["-c", &command]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "not every byte arrived");
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{output:?}");
    assert_eq!(imgtool_testing::names(dir.path()), ["x.raw"]);
}

#[test]
fn rejects_empty_input_unless_declared_raw() {
    let dir = tempdir();
    // The program before the pipe must have failed, so an empty stream is an error for every target.
    for to in ["raw", "qcow2", "vhdx", "vma"] {
        let run = imgtool(["convert", "-", "--to", to, "out"]).within(dir.path()).pipe_bytes([]);
        run.go().exits(1).says("input is empty");
        assert!(names(dir.path()).is_empty(), "{to}");
    }
}

#[test]
fn compares_compressed_raw_images() {
    require!("zstd", "gzip");
    let dir = tempdir();
    let image = images::every_mask();
    let raw = dir.path().join("disk.raw");
    image.write_raw(&raw);
    std::fs::write(dir.path().join("a.raw.zst"), compress("zstd", &["-q"], &raw)).unwrap();
    std::fs::write(dir.path().join("b.raw.gz"), compress("gzip", &[], &raw)).unwrap();
    imgtool(["convert", "disk.raw", "--to", "qcow2", "c.qcow2"]).within(dir.path()).ok();
    for (a, b) in [("a.raw.zst", "b.raw.gz"), ("a.raw.zst", "c.qcow2"), ("c.qcow2", "b.raw.gz")] {
        imgtool(["compare", a, b]).within(dir.path()).ok();
    }
    let mut bytes = std::fs::read(&raw).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&raw, bytes).unwrap();
    imgtool(["compare", "a.raw.zst", "disk.raw"]).within(dir.path()).go().exits(1);
}

/// After one worker has met an error, the others do not read the stream again, so the message is always the
/// same.
#[test]
fn truncated_stream_gives_the_same_error_every_time() {
    let dir = tempdir();
    let whole = std::fs::read(fixture("two-disks.vma.zst")).unwrap();
    std::fs::write(dir.path().join("cut.vma.zst"), &whole[..40_000]).unwrap();
    let said: std::collections::BTreeSet<String> = (0..80)
        .map(|_| imgtool(["convert", "cut.vma.zst", "out/"]).within(dir.path()).go().exits(1).stderr)
        .collect();
    assert_eq!(said.len(), 1, "{said:?}");
}

/// A fixed VHD has its footer at the end, and a compressing writer joins the zeros before it: the footer was written
/// before them, and the disk was lost without an error.
#[test]
fn the_footer_follows_the_zeros_at_the_end_of_a_compressed_disk() {
    let dir = tempdir();
    // Less than a group of units without data, more than one, and none.
    for (len, data) in [(3 << 20, 100_000), (300 << 20, 1 << 20), (8 << 20, (8 << 20) - 4096), (4 << 20, 0)] {
        let disk = images::Image::hole("d", len).with(data, images::noise(len, 4096));
        disk.write_raw(&dir.path().join("disk.raw"));
        for name in ["disk.vhd", "disk.vhd.gz", "disk.vhd.zst"] {
            let line = ["convert", "-q", "--force", "-o", "subformat=fixed", "disk.raw", name];
            imgtool(line).within(dir.path()).ok();
            imgtool(["convert", "-q", "--force", name, "back.raw"]).within(dir.path()).ok();
            imgtool(["compare", "disk.raw", "back.raw"]).within(dir.path()).ok();
        }
        let plain = std::fs::read(dir.path().join("disk.vhd")).unwrap();
        for (name, tool) in [("disk.vhd.gz", "gzip"), ("disk.vhd.zst", "zstd")] {
            if oracles::have(tool) {
                let found = oracles::run(tool, &["-d", "-c", text(&dir.path().join(name))]).stdout;
                assert!(found == plain, "{len}, {name}");
            }
        }
    }
}
