//! Images that get another size in place.

use imgtool_core::{Driver, ErrorKind, OpenOptions, Resize, Result};
use imgtool_qcow2::Qcow2Driver;
use imgtool_testing::conformance::scratch;
use imgtool_testing::journal::Journal;
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::{crafted, require};

const OLD: usize = (3 << 20) + 512;

/// Makes an image of [`OLD`] bytes with data at both ends, and a snapshot if there can be one.
fn image(options: &str) -> Vec<u8> {
    let directory = scratch();
    let size = OLD.to_string();
    run_in("qemu-img", directory.path(), &["create", "-q", "-f", "qcow2", "-o", options, "x", &size]);
    let commands = ["-c", "write -P 1 0 70k", "-c", "write -P 2 3M 512", "-c", "write -P 3 2000k 100k", "x"];
    run_in("qemu-io", directory.path(), &commands);
    if !options.contains("0.10") {
        run_in("qemu-img", directory.path(), &["snapshot", "-c", "s", "x"]);
        run_in("qemu-io", directory.path(), &["-c", "write -P 4 64k 64k", "x"]);
    }
    std::fs::read(directory.path().join("x")).unwrap()
}

fn resize(journal: &Journal, size: usize, discards: bool) -> Result<()> {
    let resize = Resize { size: size as u64, discards };
    Qcow2Driver.resize(&journal.output(), resize, &OpenOptions::default())
}

#[test]
fn every_write_leaves_the_old_or_the_new_size() {
    require!("qemu-img", "qemu-io");
    for options in ["cluster_size=512", "cluster_size=512,compat=0.10", "cluster_size=64k", "extended_l2=on"]
    {
        let image = image(options);
        let old = crafted::read(&Qcow2Driver, &image).unwrap();
        for size in [OLD, OLD + 512, 40 << 20, 2 << 20, 100 << 10, 512, 0] {
            let journal = Journal::new(image.clone());
            resize(&journal, size, true).unwrap();
            let mut new = old.clone();
            new.resize(size, 0);
            let see = |image: &[u8]| {
                let report = crafted::check(&Qcow2Driver, image);
                assert_eq!(report.corruptions, 0, "{options} {size}: {:?}", report.findings);
                let content = crafted::read(&Qcow2Driver, image).unwrap();
                assert!(content == new || content == old, "{options} {size}");
            };
            journal.each_prefix(see);
            journal.each_crash(1, 6, see);
            let directory = scratch();
            std::fs::write(directory.path().join("x"), journal.now()).unwrap();
            let (status, output, errors) =
                try_run_in("qemu-img", directory.path(), &["check", "-f", "qcow2", "x"]);
            assert_eq!(status, 0, "{options} {size}: {output}{errors}");
            assert!(crafted::qemu_content(&journal.now(), "qcow2") == new, "{options} {size}");
        }
    }
}

#[test]
fn only_zeros_are_cut_off_without_permission() {
    require!("qemu-img", "qemu-io");
    let image = image("compat=1.1");
    let journal = Journal::new(image.clone());
    let error = resize(&journal, 3 << 20, false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(journal.now() == image, "refused, but changed");
    let grown = Journal::new(image);
    resize(&grown, 50 << 20, false).unwrap();
    resize(&grown, OLD, false).unwrap();
    assert_eq!(crafted::faults(&Qcow2Driver, &grown.now()), (0, 0));
}

#[test]
fn bytes_after_the_end_do_not_appear() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    run_in("qemu-img", directory.path(), &["create", "-q", "-f", "qcow2", "x", "65k"]);
    run_in("qemu-io", directory.path(), &["-c", "write -P 7 0 65k", "x"]);
    let mut image = std::fs::read(directory.path().join("x")).unwrap();
    // The rest of the last cluster of data, at the end of the file, is not zeros.
    let len = image.len().next_multiple_of(65_536);
    image.resize(len, 9);
    assert!(image[image.len() - 65_536..][..1024].iter().all(|byte| *byte == 7));
    image[len - 65_536 + 1024..].fill(9);
    let journal = Journal::new(image);
    resize(&journal, 1 << 20, false).unwrap();
    let content = crafted::qemu_content(&journal.now(), "qcow2");
    assert!(content[..65 << 10].iter().all(|byte| *byte == 7));
    assert!(content[65 << 10..].iter().all(|byte| *byte == 0));
}
