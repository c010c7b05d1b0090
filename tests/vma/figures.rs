//! Figures in the last lines of `-v`: those of the vma program, also for disks that end within a cluster and
//! for guest state.

use imgtool_testing::images::noise;
use imgtool_testing::tempdir;
use imgtool_testing::vma::{ArchiveBuilder, guest_content, slot};

use super::vma;

/// Returns the last `count` lines.
fn last(text: &str, count: usize) -> Vec<&str> {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].to_vec()
}

#[test]
fn create_counts_unstored_sub_blocks_up_to_the_end_of_the_cluster() {
    let dir = tempdir();
    let mut front = vec![0; 70_000];
    front[0] = 1;
    let mut both = front.clone();
    both[69_999] = 1;
    for (name, bytes) in [("full", noise(3, 70_000)), ("front", front), ("both", both)] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
    }
    let line = "create -v a.vma -d format=raw:full -d format=raw:front -d format=raw:both \
                -d format=raw:vmstate=both";
    let said = vma(dir.path(), line).exits(0).stderr;
    // A disk has 32 sub-blocks of 4 KiB in 2 clusters, and 137 sectors.
    let expected = [
        "image disk0: size=70144 zeros=57344 saved=12800",
        "image disk1: size=70144 zeros=126976 saved=-56832",
        "image disk2: size=70144 zeros=122880 saved=-52736",
        "image vmstate: size=70144 zeros=122880 saved=-52736",
    ];
    let images: Vec<&str> = said.lines().filter(|line| line.starts_with("image ")).collect();
    assert_eq!(images, expected, "{said}");
    assert!(said.starts_with("progress 0% 0/280576 0\n"), "{said}");
    assert!(said.contains("progress 100% 280576/280576 430080\n"), "{said}");
}

#[test]
fn extract_counts_zeros_up_to_the_end_of_the_disk() {
    let dir = tempdir();
    for (name, size, slots, expected) in [
        (
            "d",
            135_680,
            vec![slot(1, 0, 0xffff), slot(1, 1, 0), slot(1, 2, 1)],
            [
                "total bytes read 196608, sparse bytes 66048 (33.6%)",
                "space reduction due to 4K zero blocks 0.392%",
            ],
        ),
        // Guest state has no end.
        (
            "vmstate",
            70_536,
            vec![slot(1, 0, 0x00ff), slot(1, 1, 1)],
            [
                "total bytes read 131072, sparse bytes 94208 (71.9%)",
                "space reduction due to 4K zero blocks 256%",
            ],
        ),
        (
            "vmstate",
            327_680,
            vec![slot(1, 0, 0xffff)],
            ["total bytes read 65536, sparse bytes 0 (0%)", "space reduction due to 4K zero blocks 0%"],
        ),
    ] {
        let archive = ArchiveBuilder::new().device(1, name, size).extents(&slots, 59).build();
        std::fs::write(dir.path().join("a.vma"), archive).unwrap();
        for line in ["extract -v a.vma out", "verify -v a.vma"] {
            let text = vma(dir.path(), line).exits(0).text();
            assert_eq!(last(&text, 2), expected, "{line}: {text}");
        }
        std::fs::remove_dir_all(dir.path().join("out")).unwrap();
    }
}

#[test]
fn guest_state_shorter_than_its_size_is_extracted_with_a_note() {
    let dir = tempdir();
    let slots = [slot(1, 0, 0xffff), slot(2, 0, 1)];
    let builder =
        ArchiveBuilder::new().device(1, "vmstate", 300_000).device(2, "d", 4096).extents(&slots, 59);
    std::fs::write(dir.path().join("a.vma"), builder.build()).unwrap();
    let note = "vma: note: device vmstate ends at 65536 of 300000 bytes";
    vma(dir.path(), "verify a.vma").exits(0).says(note);
    vma(dir.path(), "extract a.vma out").exits(0).says(note);
    let state = std::fs::read(dir.path().join("out/vmstate.bin")).unwrap();
    assert!(state == guest_content(1, 300_000, &slots));
    crate::support::imgtool(["vma", "verify", "-"]).pipe_from(&dir.path().join("a.vma")).ok().says(note);
    let converted =
        crate::support::imgtool(["convert", "a.vma", "--to", "raw", "raw"]).within(dir.path()).ok();
    converted.says("device vmstate ends at 65536 of 300000 bytes");
    assert!(std::fs::read(dir.path().join("raw/vmstate.bin")).unwrap() == state);
}
