//! Files that report another length than they have, as files of procfs and of some FUSE file systems do.

use std::fs;

use imgtool_testing::{images, tempdir, text};

use crate::support::imgtool;
use crate::support::shaky::Shaky;

#[test]
fn a_file_that_reports_no_length_is_read_to_its_end() {
    let dir = tempdir();
    let path = "/proc/version";
    let content = fs::read(path).unwrap();
    assert!(fs::metadata(path).unwrap().len() == 0 && !content.is_empty());
    fs::write(dir.path().join("copy.raw"), &content).unwrap();
    for to in ["raw", "qcow2", "vma"] {
        let run = imgtool(["convert", path, "--to", to, "out"]).within(dir.path()).ok();
        assert!(!run.stderr.contains("while it was read"), "{}", run.stderr);
        imgtool(["compare", path, "out"]).within(dir.path()).ok();
        fs::remove_file(dir.path().join("out")).unwrap();
    }
    let run = imgtool(["convert", "-f", "raw", path, "--to", "raw", "-"]).ok();
    assert!(run.stdout == content);
    let run = std::process::Command::new("sh")
        .args(["-c", "exec \"$0\" convert -f raw - --to raw - < /proc/version", crate::support::run::PROGRAM])
        .output()
        .unwrap();
    assert!(run.status.success() && run.stdout == content, "{run:?}");
    let digest = |name: &str| imgtool(["checksum", name]).within(dir.path()).ok().text();
    assert_eq!(digest(path).split(' ').next(), digest("copy.raw").split(' ').next());
    let measure = |name: &str| imgtool(["measure", "--to", "raw", name]).within(dir.path()).ok().text();
    assert_eq!(measure(path), measure("copy.raw"));
}

#[test]
fn a_file_that_reports_too_short_a_length_is_refused() {
    let Some(shaky) = Shaky::mount() else { return };
    let content = images::noise(1, 300_000);
    let dir = tempdir();
    let out = dir.path().join("out");
    let path = shaky.path("disk.raw");
    shaky.put("disk.raw", content.clone());
    let convert = || imgtool(["convert", text(&path), "--to", "raw", text(&out)]).go();
    for reported in [1, 4096, 299_999] {
        shaky.report("disk.raw", reported);
        convert().exits(1).says(&format!("the file reports {reported} bytes but contains more"));
        imgtool(["checksum", text(&path)]).go().exits(1).says("contains more");
    }
    // Too long a length: the missing bytes are an error, as in a truncated file.
    shaky.report("disk.raw", 300_001);
    convert().exits(1).says("ends early");
    for reported in [0, 300_000] {
        shaky.report("disk.raw", reported);
        convert().exits(0);
        assert!(fs::read(&out).unwrap() == content, "{reported}");
        fs::remove_file(&out).unwrap();
    }
}
