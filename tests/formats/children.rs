//! Images over a parent in VHDX, VHD, VMDK and VDI: `create -b` and `convert -B`.

use std::path::Path;

use imgtool_testing::images::{self, Image};
use imgtool_testing::{oracles, require, sha256_file, snapshot, tempdir, text};

use crate::support::imgtool;

const MIB: u64 = 1 << 20;

/// A format with the options of the parent, and those of its child.
struct Variant {
    format: &'static str,
    parent: &'static str,
    child: &'static str,
}

const fn variant(format: &'static str, parent: &'static str, child: &'static str) -> Variant {
    Variant { format, parent, child }
}

const VARIANTS: [Variant; 11] = [
    variant("vhdx", "block_size=1M", "log_size=1M"),
    variant("vhdx", "block_size=2M,logical_sector_size=4096", "log_size=2M"),
    variant("vhdx", "subformat=fixed", "block_size=2M"),
    variant("vhdx", "block_size=8M,physical_sector_size=512", "log_size=1M"),
    variant("vhd", "subformat=dynamic", "subformat=dynamic"),
    variant("vhd", "subformat=fixed", "subformat=dynamic"),
    variant("vmdk", "subformat=monolithicSparse", "adapter_type=ide"),
    variant("vmdk", "subformat=streamOptimized", "subformat=monolithicSparse"),
    variant("vmdk", "subformat=twoGbMaxExtentFlat", "zeroed_grain=on"),
    variant("vdi", "static=off", "block_size=1M"),
    variant("vdi", "static=on", "block_size=2M"),
];

trait Over {
    /// Writes bytes over whatever the image has there.
    fn over(self, at: u64, bytes: Vec<u8>) -> Self;
}

impl Over for Image {
    fn over(mut self, at: u64, bytes: Vec<u8>) -> Self {
        self.runs.push((at, bytes));
        self
    }
}

fn base() -> Image {
    Image::hole("base", 24 * MIB)
        .over(0, images::noise(1, 300_000))
        .over(5 * MIB, images::noise(2, 4 << 20))
        .over(16 * MIB + 100, images::noise(3, 70_000))
        .over(20 * MIB, images::noise(4, 1 << 20))
}

/// Returns the base with changes: single sectors, zeros over data of all lengths, data over holes, the last
/// byte.
fn changed() -> Image {
    base()
        .over(1000, b"ten bytes!".to_vec())
        .over(6 * MIB, vec![0; 2 << 20])
        .over(8 * MIB + 4096, vec![0; 5000])
        .over(15 * MIB, images::noise(5, 100))
        .over(20 * MIB, vec![0; 1 << 20])
        .over(24 * MIB - 1, vec![9])
}

/// Creates a directory with `base.raw`, `changed.raw`, and the parent in the format of the variant.
fn with_parent(variant: &Variant) -> tempfile::TempDir {
    let dir = tempdir();
    base().write_raw(&dir.path().join("base.raw"));
    changed().write_raw(&dir.path().join("changed.raw"));
    let parent = format!("base.{}", variant.format);
    imgtool(["convert", "base.raw", "-O", variant.format, "-o", variant.parent, &parent])
        .within(dir.path())
        .ok();
    dir
}

/// Asserts that imgtool and independent programs read the content of a raw file from a child.
fn assert_reads(dir: &Path, format: &str, child: &str, raw: &str) {
    imgtool(["check", child]).within(dir).ok();
    imgtool(["compare", "--allow-external", "chain", child, raw]).within(dir).ok();
    let (child, raw) = (dir.join(child), dir.join(raw));
    let parent = dir.join(format!("base.{format}"));
    if format == "vhdx" || format == "vhd" {
        // It opens the parent by itself.
        let mut expected = std::fs::read(&raw).unwrap();
        let seen = oracles::seven_zip(&child, format);
        assert!(seen.len() - expected.len() < 4096, "7-Zip: {} bytes", seen.len());
        expected.resize(seen.len(), 0);
        assert!(seen == expected, "7-Zip: content differs");
    }
    match format {
        "vhdx" => oracles::dissect_compare_vhdx(&child, &raw),
        "vhd" => oracles::libyal_reads_child("pyvhdi", &child, &parent, &raw),
        "vdi" => assert_vdi_reads(&[&parent, &child], &raw),
        _ => {
            let seen = oracles::dissect_disks("vmdk", &[&child]);
            assert_eq!(seen[0].sha256, sha256_file(&raw), "dissect");
            oracles::qemu_compare(&child, "vmdk", &raw, "raw");
        }
    }
}

/// Asserts that a chain of VDI images, bottom first, has the content of a raw file and the fields that
/// VirtualBox demands. qemu-img reads no differencing images, so this reads them field by field.
fn assert_vdi_reads(chain: &[&Path], raw: &Path) {
    let files: Vec<Vec<u8>> = chain.iter().map(|path| std::fs::read(path).unwrap()).collect();
    let mut content = Vec::new();
    for (index, file) in files.iter().enumerate() {
        let number = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap()) as usize;
        let uuids = |at: usize| &file[at..at + 32];
        assert_eq!([number(64), number(68), number(72)], [0xbeda_107f, 0x0001_0001, 400]);
        let [map, data, block, extra, blocks, allocated] = [340, 344, 376, 380, 384, 388].map(number);
        let (size, sector) = (number(368) + (number(372) << 32), number(360));
        assert_eq!((extra, sector, blocks), (0, 512, size.div_ceil(block)));
        assert!(map >= 472 && map + 4 * blocks <= data && number(368) % 512 == 0);
        // Its own UUIDs differ from each other and are not nil, nor those of its parent.
        let (parent, below) = (uuids(424), index.checked_sub(1).map(|below| &files[below][392..424]));
        assert_eq!(parent, below.unwrap_or(&[0; 32]));
        assert!(uuids(392) != parent && uuids(392)[..16] != uuids(392)[16..]);
        if below.is_some() {
            assert_eq!(number(76), 4);
        }
        let entry = |at: usize| number(map + 4 * at);
        let mut stored: Vec<usize> = (0..blocks).map(entry).filter(|entry| *entry < 0xffff_fffe).collect();
        stored.sort_unstable();
        assert_eq!(stored, (0..allocated).collect::<Vec<_>>());
        assert_eq!(file.len(), data + allocated * block);
        content.resize(size, 0);
        for at in 0..blocks {
            let guest = at * block..size.min((at + 1) * block);
            match entry(at) {
                0xffff_ffff => {}
                0xffff_fffe => content[guest].fill(0),
                entry => {
                    let start = data + entry * block;
                    let len = guest.len();
                    content[guest].copy_from_slice(&file[start..start + len]);
                }
            }
        }
    }
    let mut expected = std::fs::read(raw).unwrap();
    assert!(content.len() - expected.len() < 512);
    expected.resize(content.len(), 0);
    assert!(content == expected, "content differs");
    if files.iter().all(|file| file[376..380] == files[0][376..380]) {
        oracles::dissect_reads_vdi_chain(chain, raw);
    }
}

/// Returns the number of bytes that a child stores itself, by the map.
fn own_data(dir: &Path, child: &str) -> u64 {
    let map =
        imgtool(["map", "--output", "json", "--allow-external", "chain", child]).within(dir).ok().json();
    let runs = map.as_array().unwrap().iter();
    let own = runs.filter(|run| run["depth"] == 0 && run["data"] == true && run["zero"] == false);
    own.map(|run| run["length"].as_u64().unwrap()).sum()
}

#[test]
fn new_children_read_as_their_parents() {
    require!("dissect", "libyal", "qemu-img", "7zz");
    for variant in &VARIANTS {
        let dir = with_parent(variant);
        let (parent, child) = (format!("base.{}", variant.format), format!("child.{}", variant.format));
        let line = ["create", "-f", variant.format, "-b", &parent, "-F", variant.format, "-o", variant.child];
        imgtool(line).args([&child]).within(dir.path()).ok();
        assert_reads(dir.path(), variant.format, &child, "base.raw");
        let info = imgtool(["info", "--output", "json", &child]).within(dir.path()).ok().json();
        assert_eq!(info["virtual-size"], 24 * MIB, "{}", variant.parent);
        let chain = ["info", "--output", "json", "--backing-chain", "--allow-external", "chain", &child];
        let chain = imgtool(chain).within(dir.path()).ok().json();
        assert_eq!(chain.as_array().map(Vec::len), Some(2), "{chain}");
        // Nothing but tables.
        assert!(imgtool_testing::occupied(&dir.path().join(&child)) < 600 << 10, "{}", variant.parent);
    }
}

/// A child identifies its parent by UUID, so that two new disks must not have the same.
#[test]
fn new_disks_have_their_own_uuids() {
    let dir = tempdir();
    for line in [&["vhd"][..], &["vhd", "-o", "subformat=fixed"], &["vdi"], &["vdi", "-o", "static=on"]] {
        let format = line[0];
        let create = |name: &str| {
            let file = format!("{name}.{format}");
            let line = [&["create", "--force", "-f"][..], line, &[&*file, "1M"][..]].concat();
            imgtool(line).within(dir.path()).ok();
            std::fs::read(dir.path().join(&file)).unwrap()
        };
        let (one, other) = (create("a"), create("b"));
        assert!(one != other && create("a") == one, "{line:?}");
    }
}

/// All streams of one size have one content identifier.
#[test]
fn a_stream_as_a_parent_gets_a_note() {
    let dir = tempdir();
    std::fs::write(dir.path().join("base.raw"), vec![7; 1 << 20]).unwrap();
    for (subformat, is_noted) in [("streamOptimized", true), ("monolithicSparse", false)] {
        let option = format!("subformat={subformat}");
        imgtool(["convert", "--force", "base.raw", "-o", &option, "base.vmdk"]).within(dir.path()).ok();
        for line in [
            &["create", "--force", "-f", "vmdk", "-b", "base.vmdk", "-F", "vmdk", "child.vmdk"][..],
            &["convert", "--force", "base.raw", "-B", "base.vmdk", "-F", "vmdk", "child.vmdk"],
        ] {
            let run = imgtool(line).within(dir.path()).ok();
            assert_eq!(run.stderr.contains("the parent is a stream"), is_noted, "{line:?}: {}", run.stderr);
        }
    }
}

/// Neither Hyper-V nor QEMU writes such an image.
#[test]
fn a_fixed_vhd_above_2040_gib_has_a_note() {
    let dir = tempdir();
    for (size, is_noted) in [("2040G", false), ("2041G", true)] {
        let line = ["create", "--force", "-f", "vhd", "-o", "subformat=fixed", "x.vhd", size];
        let run = imgtool(line).within(dir.path()).ok();
        assert_eq!(run.stderr.contains("2040 GiB"), is_noted, "{size}: {}", run.stderr);
    }
}

/// The disks of two machines over one parent: only their UUIDs tell them apart, and a name gives the same again.
#[test]
fn new_children_of_one_parent_have_their_own_uuids() {
    let dir = tempdir();
    std::fs::write(dir.path().join("base.raw"), [1; 70_000]).unwrap();
    for format in ["vhd", "vdi"] {
        let (base, child) = (format!("base.{format}"), |name: &str| format!("{name}.{format}"));
        imgtool(["convert", "base.raw", &base]).within(dir.path()).ok();
        let create = |name: &str| {
            let line = ["create", "--force", "-f", format, "-b", &base, "-F", format, &child(name)];
            imgtool(line).within(dir.path()).ok();
            std::fs::read(dir.path().join(child(name))).unwrap()
        };
        let (one, other) = (create("web01"), create("web02"));
        assert!(one != other && create("web01") == one, "{format}");
        let uuid = |name: &str| {
            let info = imgtool(["info", "--output", "json", &child(name)]).within(dir.path()).ok().json();
            info["format-specific"]["data"]["uuid"].clone()
        };
        assert_ne!(uuid("web01"), uuid("web02"), "{format}");
    }
}

#[test]
fn children_store_only_the_difference() {
    require!("dissect", "libyal", "qemu-img", "7zz");
    for variant in &VARIANTS {
        let dir = with_parent(variant);
        let (parent, child) = (format!("base.{}", variant.format), format!("child.{}", variant.format));
        let convert = |source: &str, child: &str, extra: &[&str]| {
            let line = ["convert", source, "-B", &parent, "-F", variant.format, "-O", variant.format];
            imgtool(line).args(["-o", variant.child]).args(extra).args([child]).within(dir.path()).ok();
        };
        convert("changed.raw", &child, &["--verify"]);
        assert_reads(dir.path(), variant.format, &child, "changed.raw");
        let own = own_data(dir.path(), &child);
        let unit = match variant.format {
            "vhdx" => 4096,
            "vhd" => 8192,
            "vdi" => 2 << 20,
            _ => 3 << 16,
        };
        assert!((1..=4 * unit).contains(&own), "{} {}: {own} bytes", variant.format, variant.parent);
        // The same disk with holes elsewhere, in one thread.
        imgtool(["convert", "changed.raw", "-O", "qcow2", "changed.qcow2"]).within(dir.path()).ok();
        // Under the same name, which a VMDK image contains.
        let first = sha256_file(&dir.path().join(&child));
        for threads in ["1", "4"] {
            convert("changed.raw", &child, &["--force", "--threads", threads]);
            assert_eq!(sha256_file(&dir.path().join(&child)), first, "{threads} threads");
        }
        let from_qcow2 = format!("qcow2.{}", variant.format);
        convert("changed.qcow2", &from_qcow2, &["-S", "64k"]);
        assert_reads(dir.path(), variant.format, &from_qcow2, "changed.raw");
        let whole = format!("whole.{}", variant.format);
        convert("changed.raw", &whole, &["-S", "0"]);
        assert_reads(dir.path(), variant.format, &whole, "changed.raw");
    }
}

/// libvhdi 20260901 reads the bitmap of every block of a VHDX file, whatever its state, so it needs a file in
/// which every chunk has one and no block is zeros as a whole.
#[test]
fn libvhdi_reads_data_in_vhdx_children() {
    require!("libyal");
    for variant in VARIANTS.iter().filter(|variant| variant.format == "vhdx") {
        let dir = with_parent(variant);
        let raw = dir.path().join("some.raw");
        base().over(1000, images::noise(6, 10)).over(15 * MIB, images::noise(7, 5000)).write_raw(&raw);
        imgtool(["convert", "some.raw", "-B", "base.vhdx", "-F", "vhdx", "some.avhdx"])
            .within(dir.path())
            .ok();
        let (child, parent) = (dir.path().join("some.avhdx"), dir.path().join("base.vhdx"));
        oracles::libyal_reads_child("pyvhdi", &child, &parent, &raw);
    }
}

#[test]
fn libvmdk_reads_vmdk_children() {
    require!("libyal");
    // It takes marked grains for the parent's.
    for variant in
        VARIANTS.iter().filter(|variant| variant.format == "vmdk" && !variant.child.contains("zero"))
    {
        let dir = with_parent(variant);
        imgtool(["convert", "changed.raw", "-B", "base.vmdk", "-F", "vmdk", "child.vmdk"])
            .within(dir.path())
            .ok();
        let (child, parent) = (dir.path().join("child.vmdk"), dir.path().join("base.vmdk"));
        oracles::libyal_reads_child("pyvmdk", &child, &parent, &dir.path().join("changed.raw"));
    }
}

#[test]
fn children_of_children_read_the_whole_chain() {
    require!("dissect", "qemu-img");
    for variant in [&VARIANTS[0], &VARIANTS[4], &VARIANTS[6], &VARIANTS[9]] {
        let dir = with_parent(variant);
        let format = variant.format;
        changed().over(3 * MIB, images::noise(8, 9000)).write_raw(&dir.path().join("top.raw"));
        for (source, parent, child) in [("changed.raw", "base", "one"), ("top.raw", "one", "two")] {
            let (parent, child) = (format!("{parent}.{format}"), format!("{child}.{format}"));
            let line = ["convert", source, "-B", &parent, "-F", format, "-O", format, &child];
            if parent.starts_with("one") {
                let before = snapshot(dir.path());
                let missing = if format == "vdi" { "parent '{" } else { "base" };
                imgtool(line).within(dir.path()).go().exits(1).says(missing);
                assert_eq!(snapshot(dir.path()), before);
            }
            imgtool(line).args(["--allow-external", "chain", "--verify"]).within(dir.path()).ok();
        }
        let two = format!("two.{format}");
        imgtool(["compare", "--allow-external", "chain", &two, "top.raw"]).within(dir.path()).ok();
        assert!(own_data(dir.path(), &two) <= if format == "vdi" { 1 << 20 } else { 2 << 16 });
        match format {
            "vhdx" => oracles::dissect_compare_vhdx(&dir.path().join(&two), &dir.path().join("top.raw")),
            "vmdk" => {
                oracles::qemu_compare(&dir.path().join(&two), "vmdk", &dir.path().join("top.raw"), "raw");
            }
            "vdi" => {
                let chain = ["base.vdi", "one.vdi", "two.vdi"].map(|name| dir.path().join(name));
                assert_vdi_reads(&chain.each_ref().map(|path| path.as_path()), &dir.path().join("top.raw"));
            }
            _ => {}
        }
        // The parent was replaced after the child was made.
        imgtool(["convert", "top.raw", "--force", "-O", format, &format!("one.{format}")])
            .within(dir.path())
            .ok();
        let lost = if format == "vdi" { "no allowed file is the parent" } else { "one." };
        imgtool(["compare", "--allow-external", "chain", &two, "top.raw"])
            .within(dir.path())
            .go()
            .exits(2)
            .says(lost);
    }
}

#[test]
fn a_larger_vhdx_child_has_zeros_past_its_parent() {
    require!("dissect", "7zz");
    for block_size in ["1M", "4M", "16M"] {
        let variant = variant("vhdx", "block_size=2M", "");
        let dir = with_parent(&variant);
        let option = format!("block_size={block_size}");
        let line =
            ["create", "-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", "-o", &option, "empty.avhdx", "37M"];
        imgtool(line).within(dir.path()).ok();
        let raw = dir.path().join("large.raw");
        let large = |size| Image { size, ..changed() };
        Image { size: 37 * MIB, ..base() }.write_raw(&raw);
        assert_reads(dir.path(), "vhdx", "empty.avhdx", "large.raw");
        // The second ends within a page: a reader of pages must not look for its rest in the parent.
        for size in [37 * MIB, 36 * MIB + 700] {
            large(size).over(25 * MIB, images::noise(9, 700)).over(size - 1, vec![1]).write_raw(&raw);
            let line = ["convert", "large.raw", "-B", "base.vhdx", "-F", "vhdx", "-o", &option, "--force"];
            imgtool(line).args(["--verify", "large.avhdx"]).within(dir.path()).ok();
            imgtool(["compare", "--allow-external", "chain", "large.avhdx", "large.raw"])
                .within(dir.path())
                .ok();
            oracles::dissect_compare_vhdx(&dir.path().join("large.avhdx"), &raw);
        }
        // A smaller one, which ends within a sector of data of its parent.
        let small = dir.path().join("small.raw");
        std::fs::copy(&raw, &small).unwrap();
        std::fs::File::options().write(true).open(&small).unwrap().set_len(5 * MIB + 700).unwrap();
        let line = ["convert", "small.raw", "-B", "base.vhdx", "-F", "vhdx", "-o", &option, "small.avhdx"];
        imgtool(line).args(["--verify"]).within(dir.path()).ok();
        assert_reads(dir.path(), "vhdx", "small.avhdx", "small.raw");
    }
}

#[test]
fn vhd_vmdk_and_vdi_children_are_as_large_as_their_parents() {
    require!("dissect", "libyal", "qemu-img", "7zz");
    for variant in VARIANTS.iter().filter(|variant| variant.format != "vhdx") {
        let (dir, format) = (with_parent(variant), variant.format);
        let (parent, child) = (format!("base.{format}"), format!("child.{format}"));
        let raw = dir.path().join("other.raw");
        for size in [24 * MIB + 1, 23 * MIB] {
            Image { size, ..Image::hole("other", size) }.write_raw(&raw);
            let before = snapshot(dir.path());
            let line = ["convert", "other.raw", "-B", &parent, "-F", format, "-O", format, &child];
            imgtool(line).within(dir.path()).go().exits(1).says("as large as its parent");
            let line = ["create", "-f", format, "-b", &parent, "-F", format, &child, "25M"];
            imgtool(line).within(dir.path()).go().exits(1).says("as large as its parent");
            assert_eq!(snapshot(dir.path()), before);
        }
        // Rounded up as the parent was: zeros follow, although the parent has data there.
        std::fs::copy(dir.path().join("changed.raw"), &raw).unwrap();
        let rounded = match format {
            "vhd" => 300_000,
            "vmdk" => 30_000,
            _ => 500,
        };
        let cut = 24 * MIB - rounded;
        std::fs::File::options().write(true).open(&raw).unwrap().set_len(cut).unwrap();
        base().over(24 * MIB - 400, images::noise(10, 400)).write_raw(&dir.path().join("full.raw"));
        imgtool(["convert", "full.raw", "--force", "-O", format, "-o", variant.parent, &parent])
            .within(dir.path())
            .ok();
        let line = ["convert", "other.raw", "--verify", "-B", &parent, "-F", format, "-O", format, &child];
        imgtool(line).within(dir.path()).ok();
        std::fs::File::options().write(true).open(&raw).unwrap().set_len(24 * MIB).unwrap();
        assert_reads(dir.path(), format, &child, "other.raw");
    }
}

#[test]
fn refuses_parents_that_a_format_can_not_have() {
    let variant = &VARIANTS[0];
    let dir = with_parent(variant);
    imgtool(["convert", "base.raw", "-O", "vmdk", "base.vmdk"]).within(dir.path()).ok();
    imgtool(["convert", "base.raw", "-O", "vhd", "base.vhd"]).within(dir.path()).ok();
    imgtool(["convert", "base.raw", "-O", "vdi", "base.vdi"]).within(dir.path()).ok();
    let before = snapshot(dir.path());
    for (line, code, words) in [
        (&["-f", "vhdx", "-b", "base.raw", "-F", "raw", "x"][..], 2, "must be a vhdx image"),
        (&["-f", "vhd", "-b", "base.vhdx", "-F", "vhdx", "x"], 2, "must be a vhd image"),
        (&["-f", "vmdk", "-b", "base.raw", "-F", "raw", "x"], 2, "must be a vmdk image"),
        (&["-f", "vdi", "-b", "base.raw", "-F", "raw", "x"], 2, "must be a vdi image"),
        (&["-f", "vdi", "-b", "base.vhd", "-F", "vdi", "x"], 1, "base.vhd"),
        (&["-f", "vdi", "-b", "none.vdi", "-F", "vdi", "-u", "x", "1M"], 1, "none.vdi"),
        (&["-f", "vdi", "-o", "static=on", "-b", "base.vdi", "-F", "vdi", "x"], 2, "combined"),
        (
            &["-f", "vdi", "-o", "block_size=4M", "-b", "base.vdi", "-F", "vdi", "x"],
            2,
            "2097152 bytes at most",
        ),
        (&["-f", "vhdx", "-b", "base.raw", "-F", "vhdx", "x", "1M"], 1, "base.raw"),
        (&["-f", "vhdx", "-b", "none.vhdx", "-F", "vhdx", "x", "1M"], 1, "none.vhdx"),
        (&["-f", "vhdx", "-b", "none.vhdx", "-F", "vhdx", "-u", "x", "1M"], 1, "none.vhdx"),
        (&["-f", "vhdx", "-b", r"a\b.vhdx", "-F", "vhdx", "-u", "x", "1M"], 1, "can't name the parent"),
        (&["-f", "vhdx", "-o", "backing_file=base.vhdx", "x", "1M"], 2, "backing_fmt"),
        (&["-f", "vhdx", "-o", "subformat=fixed", "-b", "base.vhdx", "-F", "vhdx", "x"], 2, "combined"),
        (&["-f", "vhd", "-o", "subformat=fixed", "-b", "base.vhd", "-F", "vhd", "x"], 2, "combined"),
        (&["-f", "vmdk", "-o", "subformat=vmfs", "-b", "base.vmdk", "-F", "vmdk", "x"], 2, "combined"),
        (&["-f", "vhdx", "-o", "logical_sector_size=4096", "-b", "base.vhdx", "-F", "vhdx", "x"], 2, "512"),
        (&["-f", "vhdx", "-b", "base.vhdx", "-F", "vhdx", "--force", "base.vhdx"], 1, "base.vhdx"),
    ] {
        imgtool(["create"]).args(line).within(dir.path()).go().exits(code).says(words);
        assert_eq!(snapshot(dir.path()), before, "{line:?}");
    }
}

/// Several sector bitmaps, blocks beyond 4 GiB, and a disk that ends within a block.
#[test]
fn children_of_large_disks_have_several_bitmaps() {
    require!("dissect", "qemu-img", "libyal");
    let dir = tempdir();
    let size = (9 << 30) + 5 * 512;
    let base = Image::hole("base", size).over(4 << 30, images::noise(1, 5 << 20));
    base.write_raw(&dir.path().join("base.raw"));
    let changed = Image { size, ..base }
        .over((4 << 30) - 3000, images::noise(2, 6000))
        .over((4 << 30) + (1 << 20), vec![0; 3 << 20])
        .over(size - 700, images::noise(3, 700));
    changed.write_raw(&dir.path().join("changed.raw"));
    for (format, option) in [
        ("vhdx", "block_size=1M"),
        ("vhd", "subformat=dynamic"),
        ("vmdk", "adapter_type=ide"),
        ("vdi", "static=off"),
    ] {
        let (parent, child) = (format!("base.{format}"), format!("child.{format}"));
        imgtool(["convert", "base.raw", "-O", format, "-o", option, &parent]).within(dir.path()).ok();
        let line = ["convert", "changed.raw", "-B", &parent, "-F", format, "-O", format, "--verify", &child];
        imgtool(line).within(dir.path()).ok();
        imgtool(["check", &child]).within(dir.path()).ok();
        let (child, raw) = (dir.path().join(child), dir.path().join("changed.raw"));
        match format {
            "vhdx" => oracles::dissect_compare_vhdx(&child, &raw),
            "vmdk" => oracles::qemu_compare(&child, "vmdk", &raw, "raw"),
            "vdi" => {}
            _ => oracles::libyal_reads_child("pyvhdi", &child, &dir.path().join(parent), &raw),
        }
        assert!(imgtool_testing::occupied(&child) < 6 << 20, "{}", text(&child));
    }
}
