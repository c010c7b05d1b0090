//! `create` and `convert` with a backing image or a data file.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{names, oracles, require, snapshot, tempdir, text};

use crate::support::imgtool;

/// Creates a directory with `base.raw`, and with an overlay of it that has changes, `base.qcow2`.
fn with_bases() -> tempfile::TempDir {
    let dir = tempdir();
    let raw = dir.path().join("base.raw");
    Image::hole("base", 3 << 20)
        .with(0, images::noise(1, 300_000))
        .with(2 << 20, images::noise(2, 70_000))
        .write_raw(&raw);
    let overlay = dir.path().join("base.qcow2");
    let line = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "base.raw", text(&overlay), "4M"];
    oracles::run("qemu-img", &line);
    write(&overlay, &["write -q -P 7 1M 100k", "write -q -z 0 64k"]);
    dir
}

fn write(path: &Path, commands: &[&str]) {
    let mut args = vec!["-f", "qcow2"];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    args.push(text(path));
    oracles::run("qemu-io", &args);
}

#[test]
fn new_overlay_reads_the_same_as_its_base() {
    require!("qemu-img", "qemu-io");
    for set in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on", "cluster_size=2M"] {
        for (base, format) in [("base.raw", "raw"), ("base.qcow2", "qcow2")] {
            let dir = with_bases();
            let new = dir.path().join("new.qcow2");
            imgtool(["create", "-f", "qcow2", "-b", base, "-F", format, "-o", set, "new.qcow2"])
                .within(dir.path())
                .ok();
            oracles::qemu_check(&new, "qcow2");
            oracles::qemu_compare(&new, "qcow2", &dir.path().join(base), format);
            let info = oracles::qemu_info(&new, "qcow2");
            assert_eq!(info["backing-filename"], base, "{set}");
            assert_eq!(info["backing-filename-format"], format, "{set}");
            assert_eq!(
                info["virtual-size"],
                oracles::qemu_info(&dir.path().join(base), format)["virtual-size"]
            );
        }
    }
}

#[test]
fn allows_a_larger_overlay_and_with_u_a_missing_base() {
    require!("qemu-img", "qemu-io");
    let dir = with_bases();
    let options = "backing_file=base.raw,backing_fmt=raw";
    imgtool(["create", "-f", "qcow2", "-o", options, "new.qcow2", "10M"]).within(dir.path()).ok();
    let new = dir.path().join("new.qcow2");
    assert_eq!(oracles::qemu_info(&new, "qcow2")["virtual-size"], 10 << 20);
    oracles::qemu_compare(&new, "qcow2", &dir.path().join("base.raw"), "raw");
    let before = snapshot(dir.path());
    for (line, code, words) in [
        (&["-b", "nope.raw", "-F", "raw", "x.qcow2", "1M"][..], 1, "nope.raw"),
        (&["-o", "backing_file=base.raw", "x.qcow2", "1M"], 2, "backing_fmt"),
        (
            &["-b", "json:{\"file.filename\":\"base.raw\"}", "-F", "raw", "x.qcow2", "1M"],
            1,
            "plain file name",
        ),
        (&["-b", "nbd://host/x", "-F", "raw", "x.qcow2", "1M"], 1, "plain file name"),
        (&["-b", "nope.raw", "-F", "raw", "-u", "x.qcow2"], 2, "missing SIZE"),
        (&["x.qcow2"], 2, "missing SIZE"),
        (&["-b", "x.qcow2", "-F", "qcow2", "x.qcow2", "1M"], 1, "x.qcow2"),
        (&["-b", "base.qcow2", "-F", "qcow2", "--force", "base.qcow2", "1M"], 1, "base.qcow2"),
        // The image below the base.
        (&["-b", "base.qcow2", "-F", "qcow2", "--force", "base.raw", "1M"], 1, "base.raw"),
    ] {
        imgtool(["create", "-f", "qcow2"]).args(line).within(dir.path()).go().exits(code).says(words);
        assert_eq!(snapshot(dir.path()), before, "{line:?}");
    }
    imgtool(["create", "-f", "qcow2", "-b", "nope.raw", "-F", "raw", "-u", "x.qcow2", "1M"])
        .within(dir.path())
        .ok();
    assert_eq!(oracles::qemu_info(&dir.path().join("x.qcow2"), "qcow2")["backing-filename"], "nope.raw");
}

#[test]
fn stores_only_the_difference_to_a_base_overlay() {
    require!("qemu-img", "qemu-io");
    for set in ["compat=1.1", "compat=0.10", "cluster_size=512", "extended_l2=on", "cluster_size=2M"] {
        for compress in [false, true] {
            let dir = with_bases();
            let source = dir.path().join("source.qcow2");
            std::fs::copy(dir.path().join("base.qcow2"), &source).unwrap();
            write(&source, &["write -q -P 9 2M 9k", "write -q -z 200k 64k", "discard -q 1M 64k"]);
            let line = ["convert", "source.qcow2", "-B", "base.qcow2", "-F", "qcow2", "-o", set, "new.qcow2"];
            let convert = |extra: &[&str]| {
                let packed: &[&str] = if compress { &["-c"] } else { &[] };
                imgtool(line).args(packed).args(extra).within(dir.path())
            };
            // Source and base both refer to base.raw, which neither may open unless the user allows it.
            let before = snapshot(dir.path());
            convert(&[]).go().exits(1).says("base.raw");
            assert_eq!(snapshot(dir.path()), before);
            convert(&["--allow-external", "chain"]).ok();
            let new = dir.path().join("new.qcow2");
            oracles::qemu_check(&new, "qcow2");
            oracles::qemu_compare(&new, "qcow2", &source, "qcow2");
            imgtool(["compare", "--allow-external", "chain", "new.qcow2", "source.qcow2"])
                .within(dir.path())
                .ok();
            // Only the difference is stored, in few clusters.
            let map = imgtool(["map", "--output", "json", "--allow-external", "chain", "new.qcow2"]);
            let map = map.within(dir.path()).ok().json();
            let own: u64 = map
                .as_array()
                .unwrap()
                .iter()
                .filter(|run| run["depth"] == 0 && run["data"] == true)
                .map(|run| run["length"].as_u64().unwrap())
                .sum();
            let most = if set.contains("2M") { 4 << 20 } else { 512 << 10 };
            assert!(own > 0 && own <= most, "{set}: {own} of its own");
        }
    }
}

/// The virtual size is a whole number of sectors, and a base may have other bytes behind the end of the disk.
#[test]
fn zeros_follow_a_disk_that_ends_within_a_sector_of_its_base() {
    require!("qemu-img");
    let dir = tempdir();
    let bytes = images::noise(7, 3 << 20);
    std::fs::write(dir.path().join("base.raw"), &bytes).unwrap();
    let mut only_behind = vec![0; 3 << 20];
    only_behind[2_500_001..2_500_100].fill(7);
    std::fs::write(dir.path().join("behind.raw"), &only_behind).unwrap();
    for (base, len, zeros) in [
        ("base", 65_036, false),
        ("base", 65_536 - 512, false),
        ("base", 2_500_001, false),
        ("base", 2_500_001, true),
        ("behind", 2_500_001, true),
        ("behind", 2_500_000, true),
    ] {
        let disk = if zeros { vec![0; len] } else { bytes[..len].to_vec() };
        std::fs::write(dir.path().join("disk.raw"), &disk).unwrap();
        let raw = format!("{base}.raw");
        imgtool(["convert", "--force", &raw, "base.qcow2"]).within(dir.path()).ok();
        for options in [&[][..], &["-c"], &["-o", "cluster_size=512"], &["-S", "0"], &["-S", "64k"]] {
            let line = ["convert", "--force", "--verify", "disk.raw", "-B", "base.qcow2", "-F", "qcow2"];
            imgtool(line).args(options).args(["new.qcow2"]).within(dir.path()).ok();
            let (new, disk) = (dir.path().join("new.qcow2"), dir.path().join("disk.raw"));
            oracles::qemu_compare(&new, "qcow2", &disk, "raw");
            oracles::qemu_check(&new, "qcow2");
        }
    }
}

#[test]
fn creates_and_converts_images_with_data_files() {
    require!("qemu-img", "qemu-io");
    let dir = with_bases();
    let raw = dir.path().join("base.raw");
    for (number, set) in [
        "data_file_raw=off",
        "data_file_raw=on",
        "data_file_raw=on,preallocation=metadata",
        "cluster_size=4k",
    ]
    .iter()
    .enumerate()
    {
        // QEMU resolves a relative name against its working directory, we against the image.
        let data = text(&dir.path().join(format!("made-{number}.data"))).to_owned();
        let options = format!("data_file={data},{set}");
        let name = format!("made-{number}.qcow2");
        imgtool(["create", "-f", "qcow2", "-o", &options, &name, "3M"]).within(dir.path()).ok();
        let made = dir.path().join(&name);
        oracles::qemu_check(&made, "qcow2");
        let info = oracles::qemu_info(&made, "qcow2");
        assert_eq!(info["format-specific"]["data"]["data-file"], data);
        write(&made, &["read -q -P 0 0 3M", "write -q -P 5 1M 64k", "read -q -P 5 1M 64k"]);

        let data = text(&dir.path().join(format!("converted-{number}.data"))).to_owned();
        let options = format!("data_file={data},{set}");
        let name = format!("converted-{number}.qcow2");
        imgtool(["convert", "base.raw", "-O", "qcow2", "-o", &options, &name]).within(dir.path()).ok();
        let converted = dir.path().join(&name);
        oracles::qemu_check(&converted, "qcow2");
        oracles::qemu_compare(&converted, "qcow2", &raw, "raw");
        if set.contains("data_file_raw=on") {
            imgtool_testing::assert_same(&raw, &dir.path().join(&data), set);
        }
        // An existing data file is not overwritten.
        let before = snapshot(dir.path());
        imgtool(["create", "-f", "qcow2", "-o", &options, "again.qcow2", "3M"])
            .within(dir.path())
            .go()
            .exits(1)
            .says(&data);
        assert_eq!(snapshot(dir.path()), before);
    }
    imgtool(["create", "-f", "qcow2", "-o", "data_file=beside.data", "sub/beside.qcow2", "3M"])
        .within(dir.path())
        .go()
        .exits(1);
    std::fs::create_dir(dir.path().join("sub")).unwrap();
    imgtool(["convert", "base.raw", "-O", "qcow2", "-o", "data_file=beside.data", "sub/beside.qcow2"])
        .within(dir.path())
        .ok();
    imgtool(["compare", "--allow-external", "chain", "sub/beside.qcow2", "base.raw"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("sub")), ["beside.data", "beside.qcow2"]);
    assert!(names(dir.path()).iter().all(|name| !name.contains("partial")));
}

/// Writes an image with an L1 table of 32 MiB (a disk of 2 EiB in clusters of 2 MiB). `tables` lists indices
/// in
/// the L1 table, each with the host cluster of its L2 table. `l2` lists indices and entries of the L2 table
/// in
/// host cluster 18.
fn huge_tables(path: &Path, backing: Option<&str>, tables: &[(u64, u64)], l2: &[(u64, u64)]) {
    const CLUSTER: u64 = 2 << 20;
    let name = backing.unwrap_or("");
    let (version, crypt, l1_entries, order, header_len) = (3u32, 0u32, 4u32 << 20, 4u32, 104u32);
    let name_at = if name.is_empty() { 0 } else { 120u64 };
    let mut header = b"QFI\xfb".to_vec();
    header.extend(version.to_be_bytes());
    header.extend(name_at.to_be_bytes());
    header.extend(u32::try_from(name.len()).unwrap().to_be_bytes());
    header.extend(21u32.to_be_bytes());
    header.extend((1u64 << 61).to_be_bytes());
    header.extend(crypt.to_be_bytes());
    header.extend(l1_entries.to_be_bytes());
    header.extend(CLUSTER.to_be_bytes());
    header.extend((17 * CLUSTER).to_be_bytes());
    header.extend(1u32.to_be_bytes());
    header.resize(96, 0);
    header.extend(order.to_be_bytes());
    header.extend(header_len.to_be_bytes());
    header.extend(0xe279_2acau32.to_be_bytes());
    header.extend(5u32.to_be_bytes());
    header.extend(b"qcow2\0\0\0");
    header.truncate(if name.is_empty() { 104 } else { 120 });
    header.extend(name.as_bytes());
    let file = std::fs::File::create(path).unwrap();
    file.set_len(20 * CLUSTER).unwrap();
    let write = |at: u64, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
    write(0, &header);
    for (index, cluster) in tables {
        write(CLUSTER + index * 8, &((cluster * CLUSTER) | (1 << 63)).to_be_bytes());
    }
    for (index, entry) in l2 {
        write(18 * CLUSTER + index * 8, &entry.to_be_bytes());
    }
    write(19 * CLUSTER, text(path).as_bytes());
}

/// Takes hours if the reader walks the tables of every layer anew for each extent of the layer above.
#[test]
fn long_chain_with_huge_tables_converts_quickly() {
    let dir = tempdir();
    let data = (19 * (2u64 << 20)) | (1 << 63);
    for layer in 0..200u64 {
        let below = layer.checked_sub(1).map(|below| format!("{below}.qcow2"));
        let place = layer * 20_011 + 77;
        let path = dir.path().join(format!("{layer}.qcow2"));
        huge_tables(&path, below.as_deref(), &[(place, 18)], &[(5, data)]);
    }
    let line = "convert --allow-external chain 199.qcow2 --to qcow2 -o cluster_size=2M out.qcow2 --verify";
    let run = imgtool(line.split(' ')).within(dir.path()).measured().ok();
    assert!(run.peak_memory <= 256 << 20, "{} bytes", run.peak_memory);
    let map = imgtool(["map", "--output", "json", "out.qcow2"]).within(dir.path()).ok().json();
    let found = map.as_array().unwrap().iter().filter(|extent| extent["zero"] == false).count();
    assert_eq!(found, 200);
}

/// The reader does not walk tables entry by entry if they are holes of the file or repeat one entry.
#[test]
fn million_references_to_an_empty_table_convert_quickly() {
    let dir = tempdir();
    let all: Vec<(u64, u64)> = (0..4 << 20).step_by(4).map(|index| (index, 18)).collect();
    let zeros: Vec<(u64, u64)> = (0..1 << 18).map(|index| (index, 1)).collect();
    for (name, l2) in [("hole", &[][..]), ("zeros", &zeros[..])] {
        huge_tables(&dir.path().join("x.qcow2"), None, &all, l2);
        let line = "convert x.qcow2 --to qcow2 -o cluster_size=2M out.qcow2 --force";
        imgtool(line.split(' ')).within(dir.path()).ok();
        let line = ["map", "--output", "json", "out.qcow2"];
        let map = imgtool(line).within(dir.path()).ok().json();
        assert!(map.as_array().unwrap().iter().all(|extent| extent["data"] == false), "{name}: {map}");
    }
}

#[test]
fn names_in_a_linked_image_are_beside_the_real_one() {
    let dir = with_bases();
    let sub = dir.path().join("sub");
    std::fs::create_dir(&sub).unwrap();
    std::fs::rename(dir.path().join("base.raw"), sub.join("base.raw")).unwrap();
    std::fs::write(sub.join("real.qcow2"), "old").unwrap();
    std::os::unix::fs::symlink("sub/real.qcow2", dir.path().join("link.qcow2")).unwrap();
    let before = names(dir.path());
    imgtool(["convert", "--force", "--verify", "-o", "data_file=x.data", "sub/base.raw", "link.qcow2"])
        .within(dir.path())
        .ok();
    imgtool(["compare", "--allow-external", "chain", "sub/base.raw", "link.qcow2"]).within(dir.path()).ok();
    imgtool(["create", "--force", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "link.qcow2"])
        .within(dir.path())
        .ok();
    imgtool(["compare", "--allow-external", "chain", "sub/base.raw", "link.qcow2"]).within(dir.path()).ok();
    assert_eq!(names(dir.path()), before);
}
