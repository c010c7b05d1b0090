//! `compare --strict` beside `qemu-img compare -s`: what one finds different, the other does as well.

use std::path::Path;

use imgtool_testing::{oracles, require, tempdir};

use crate::support::imgtool;

/// Images of 4 MiB: a name, whose extension is the format, and commands of qemu-img and qemu-io that make it. A
/// command without a program's name is one of qemu-io.
const IMAGES: [(&str, &[&str]); 20] = [
    ("empty.qcow2", &[]),
    ("empty.vmdk", &[]),
    ("empty.vdi", &[]),
    ("empty.vhdx", &[]),
    ("zero.qcow2", &["write -z 0 4M"]),
    ("zero-allocated.qcow2", &["write -P 1 0 4M", "write -z 0 4M"]),
    ("zero-data.qcow2", &["write -P 0 0 4M"]),
    ("zero-data.raw", &["write -P 0 0 4M"]),
    ("metadata.qcow2", &["-o preallocation=metadata"]),
    ("falloc.qcow2", &["-o preallocation=falloc"]),
    ("half.raw", &["write -P 1 0 1M"]),
    ("half.qcow2", &["write -P 1 0 1M"]),
    ("half.vmdk", &["write -P 1 0 1M"]),
    ("half.vdi", &["write -P 1 0 1M"]),
    ("half.vhdx", &["write -P 1 0 1M"]),
    ("subclusters.qcow2", &["-o extended_l2=on", "write -P 1 0 1M"]),
    ("large-clusters.qcow2", &["-o cluster_size=2M", "write -P 1 0 1M"]),
    ("compressed.qcow2", &["write -c -P 1 0 1M"]),
    ("overlay.qcow2", &["-b half.qcow2 -F qcow2"]),
    ("overlay-of-empty.qcow2", &["-b empty.qcow2 -F qcow2"]),
];

fn format(name: &str) -> &str {
    name.rsplit('.').next().unwrap()
}

fn make(directory: &Path, name: &str, steps: &[&str]) {
    let options = steps.iter().filter(|step| step.starts_with('-')).flat_map(|step| step.split(' '));
    let mut create = vec!["create", "-q", "-f", format(name)];
    create.extend(options);
    create.extend([name, "4M"]);
    oracles::run_in("qemu-img", directory, &create);
    for step in steps.iter().filter(|step| !step.starts_with('-')) {
        oracles::run_in("qemu-io", directory, &["-f", format(name), "-c", step, name]);
    }
}

#[test]
fn strict_is_as_strict_as_qemu_img() {
    require!("qemu-img", "qemu-io");
    let dir = tempdir();
    IMAGES.iter().for_each(|(name, steps)| make(dir.path(), name, steps));
    let mut different = Vec::new();
    let (mut same, mut apart) = (0, 0);
    for (number, (a, _)) in IMAGES.iter().enumerate() {
        for (b, _) in &IMAGES[number + 1..] {
            let theirs = oracles::try_run_in(
                "qemu-img",
                dir.path(),
                &["compare", "-s", "-f", format(a), "-F", format(b), a, b],
            );
            let line = ["compare", "-s", "--allow-external", "chain", "-f", format(a), "-F", format(b), a, b];
            let ours = imgtool(line).within(dir.path()).go();
            let code = ours.status.code();
            *if theirs.0 == 0 { &mut same } else { &mut apart } += 1;
            if code != Some(theirs.0) {
                different.push(format!(
                    "{a}, {b}: qemu-img {}, {code:?} {}",
                    theirs.1.trim(),
                    ours.text().trim()
                ));
            }
        }
    }
    assert!(different.is_empty(), "{different:#?}");
    assert!(same > 5 && apart > 100, "{same} pairs are the same, {apart} are not");
}

#[test]
fn strict_requires_equal_sizes() {
    require!("qemu-img");
    let dir = tempdir();
    for (name, size) in [("a.raw", "1M"), ("b.raw", "2M")] {
        oracles::run_in("qemu-img", dir.path(), &["create", "-q", "-f", "raw", name, size]);
    }
    let (code, out, _) = oracles::try_run_in("qemu-img", dir.path(), &["compare", "-s", "a.raw", "b.raw"]);
    assert_eq!((code, out.trim()), (1, "Strict mode: Image size mismatch!"));
    let run = imgtool(["compare", "-s", "a.raw", "b.raw"]).within(dir.path()).go().exits(1);
    assert!(run.text().starts_with("Strict mode: Image size mismatch!"), "{}", run.text());
    imgtool(["compare", "a.raw", "b.raw"]).within(dir.path()).ok();
}
