//! Sources that fail, are truncated or change while the program reads them.

use std::time::{Duration, Instant};

use imgtool_testing::images::{self, Image};
use imgtool_testing::{fixture, names, require, snapshot, tempdir, text};

use super::{ends, partials, remove, sh, with_disk};
use crate::support::imgtool;

#[test]
fn one_failed_source_discards_the_whole_archive() {
    let dir = tempdir();
    let bytes = std::fs::read(fixture("sparse.vma")).unwrap();
    let (whole, cut) = (dir.path().join("whole.raw"), dir.path().join("cut.vma"));
    Image::hole("w", 1 << 20).with(0, images::noise(1, 1 << 20)).write_raw(&whole);
    std::fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    let before = snapshot(dir.path());
    let out = dir.path().join("out.vma");
    imgtool(["convert", text(&whole), text(&cut), "--to", "vma", text(&out)]).go().exits(1).says("cut.vma");
    let from_pipe = imgtool(["convert", text(&whole), "-", "--to", "vma", text(&out)]);
    from_pipe.pipe_from(&cut).go().exits(1);
    assert_eq!(snapshot(dir.path()), before);
}

#[test]
fn detects_a_source_truncated_during_conversion() {
    let dir = tempdir();
    let raw = dir.path().join("disk.raw");
    for format in ["raw", "qcow2", "vhdx", "vma"] {
        Image::hole("x", 16 << 20).with(0, images::noise(1, 16 << 20)).write_raw(&raw);
        let source = dir.path().join(format!("source.{format}"));
        imgtool(["convert", text(&raw), "--to", format, text(&source)]).ok();
        std::fs::remove_file(&raw).unwrap();
        let out = dir.path().join("out.qcow2");
        // At 8 MiB/s, the conversion takes two seconds, enough to cut the source meanwhile.
        let child = imgtool(["convert", "-r", "8M", text(&source), "--to", "qcow2", text(&out)]).start();
        let began = Instant::now();
        while partials(dir.path()).is_empty() && began.elapsed() < Duration::from_secs(30) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let file = std::fs::File::options().write(true).open(&source).unwrap();
        file.set_len(2 << 20).unwrap();
        assert_eq!(ends(child, format).code(), Some(1), "{format}");
        assert_eq!(names(dir.path()), [format!("source.{format}")]);
        std::fs::remove_file(&source).unwrap();
    }
}

/// A source that another program writes meanwhile has no single state to convert, and the program says so.
#[test]
fn warns_about_a_source_written_during_conversion() {
    require!("strace");
    let dir = with_disk();
    let stop = "strace -f -o log -e trace=pwritev,pwrite64,copy_file_range -e inject=pwritev,pwrite64,copy_file_range:signal=SIGSTOP:when=1";
    let meanwhile = |what: &str| {
        let line = format!(
            "{stop} $IMGTOOL convert disk.raw --to qcow2 out.qcow2 & \
             until grep -q 'stopped by SIGSTOP' log 2>/dev/null; do sleep 0.01; done; \
             {what}; child=$(cat /proc/$!/task/$!/children); \
             while kill -CONT $child 2>/dev/null; do sleep 0.01; done; wait $!"
        );
        let run = sh(dir.path(), &line);
        assert_eq!(run.status.code(), Some(0));
        remove(&dir.path().join("out.qcow2"));
        remove(&dir.path().join("log"));
        String::from_utf8_lossy(&run.stderr).contains("disk.raw was written to while it was read")
    };
    assert!(!meanwhile("true"));
    assert!(!meanwhile("cat disk.raw >/dev/null; chmod 600 disk.raw"));
    assert!(!meanwhile("cp disk.raw other && mv other disk.raw"), "the old file is read");
    assert!(meanwhile("printf x | dd of=disk.raw bs=1 seek=4096 conv=notrunc status=none"));
    assert!(meanwhile("printf x >> disk.raw"));
}
