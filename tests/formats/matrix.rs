//! Every format to every format, over the images that formats tend to get wrong. Our reader and independent
//! programs must find the content of the source in each output.

use std::path::{Path, PathBuf};

use imgtool_testing::images::{self, Image};
use imgtool_testing::tar;
use imgtool_testing::vma::Archive;
use imgtool_testing::{assert_same, assert_same_rounded, names, oracles, require, sha256, tempdir, text};

use crate::support::imgtool;

/// Sector size in bytes. Every writer except our raw writer rounds disk sizes up to whole sectors. The
/// archives that the tests build are not rounded.
const SECTOR: u64 = 512;

/// Makes an image in a format, without our program, and returns its path.
fn foreign(image: &Image, raw: &Path, format: &str, directory: &Path) -> PathBuf {
    let path = directory.join(format!("{}.source.{format}", image.name));
    match format {
        "raw" => return raw.to_owned(),
        "vma" => {
            let archive = Archive::of([("drive-scsi0", image.clone())]).build();
            std::fs::write(&path, archive.bytes).unwrap();
        }
        "ova" => {
            let disk = directory.join(format!("{}.source.vmdk", image.name));
            oracles::qemu_make(raw, "vmdk", "subformat=streamOptimized", &disk);
            let described = tar::descriptor("vm", &[("d.vmdk", image.size.next_multiple_of(SECTOR))]);
            let disk = std::fs::read(disk).unwrap();
            let sums = tar::manifest(&[("vm.ovf", described.as_bytes()), ("d.vmdk", &disk)]);
            let archive = tar::Tar::new().file("vm.ovf", described.as_bytes()).file("d.vmdk", &disk);
            std::fs::write(&path, archive.file("vm.mf", sums.as_bytes()).build()).unwrap();
        }
        // By default, QEMU rounds a VHD up to a geometry.
        "vhd" => oracles::qemu_make(raw, "vpc", "force_size=on", &path),
        "vmdk" => oracles::qemu_make(raw, format, "subformat=streamOptimized", &path),
        _ => oracles::qemu_make(raw, format, "", &path),
    }
    path
}

/// Asserts that independent readers find the content of the raw file in its output, for each pair in
/// `outputs`.
pub fn ask_oracles(format: &str, outputs: &[(PathBuf, PathBuf)]) {
    if format == "ova" {
        return ask_oracles("vmdk", &outputs.iter().map(unpacked).collect::<Vec<_>>());
    }
    if matches!(format, "qcow2" | "vhdx" | "vdi" | "vhd" | "vmdk") && oracles::have("qemu-img") {
        for (raw, output) in outputs {
            oracles::qemu_compare(raw, "raw", output, if format == "vhd" { "vpc" } else { format });
            if format != "vhd" {
                oracles::qemu_check(output, format);
            }
        }
    }
    // dissect.hypervisor fails if the size of a VMDK is no multiple of its grain.
    let is_readable = |(raw, _): &&(PathBuf, PathBuf)| {
        format != "vmdk"
            || std::fs::metadata(raw).unwrap().len().next_multiple_of(SECTOR).is_multiple_of(65_536)
    };
    let outputs: Vec<&(PathBuf, PathBuf)> = outputs.iter().filter(is_readable).collect();
    if format == "raw" || !oracles::have("dissect") {
        return;
    }
    let paths: Vec<&Path> = outputs.iter().map(|(_, output)| output.as_path()).collect();
    let seen: Vec<(u64, String)> = if format == "vma" {
        let archives = oracles::dissect_vma(&paths);
        archives
            .into_iter()
            .map(|mut archive| {
                assert_eq!(archive.devices.len(), 1);
                let device = archive.devices.remove(0);
                (device.size, device.sha256)
            })
            .collect()
    } else {
        oracles::dissect_disks(format, &paths).into_iter().map(|disk| (disk.size, disk.sha256)).collect()
    };
    for ((raw, output), (size, digest)) in outputs.iter().zip(seen) {
        let wanted = sha256_rounded(raw, size);
        assert_eq!(digest, wanted, "dissect reads {} otherwise", output.display());
    }
}

/// Unpacks the only disk of a package with GNU tar.
fn unpacked((raw, package): &(PathBuf, PathBuf)) -> (PathBuf, PathBuf) {
    let directory = package.with_extension("unpacked");
    std::fs::create_dir(&directory).unwrap();
    oracles::run_in("tar", &directory, &["-xf", text(package)]);
    let disk = names(&directory).into_iter().find(|name| name.ends_with(".vmdk")).unwrap();
    (raw.clone(), directory.join(disk))
}

/// Returns the digest of a raw file, extended with zeros to `size` bytes, less than a sector more.
fn sha256_rounded(raw: &Path, size: u64) -> String {
    let mut bytes = std::fs::read(raw).unwrap();
    let len = bytes.len() as u64;
    assert!(size >= len && size - len < SECTOR, "{} bytes became {size}", bytes.len());
    bytes.resize(size as usize, 0);
    sha256(&bytes)
}

/// Tests one cell of the matrix: converts all images from one format to another.
fn convert_all(from: &str, to: &str) {
    if !matches!(from, "raw" | "vma") && !oracles::have("qemu-img") {
        return;
    }
    let dir = tempdir();
    let mut outputs = Vec::new();
    for image in images::all() {
        let raw = dir.path().join(format!("{}.raw", image.name));
        image.write_raw(&raw);
        let source = foreign(&image, &raw, from, dir.path());
        let output = dir.path().join(format!("{}.out.{to}", image.name));
        imgtool(["convert", text(&source), "--to", to, text(&output)]).ok();
        let back = dir.path().join(format!("{}.back.raw", image.name));
        imgtool(["convert", "-f", to, text(&output), "--to", "raw", text(&back)]).ok();
        let what = format!("{}: {from} to {to}", image.name);
        let is_exact = to == "raw" && matches!(from, "raw" | "vma");
        let multiple = if is_exact { 1 } else { SECTOR };
        assert_same_rounded(&raw, &back, multiple, &what);
        if to == "raw" {
            assert_same_rounded(&raw, &output, multiple, &what);
        }
        std::fs::remove_file(back).unwrap();
        outputs.push((raw, output));
    }
    ask_oracles(to, &outputs);
}

macro_rules! cells {
    ($($name:ident: $from:literal => $to:literal;)*) => {
        $(#[test] fn $name() { convert_all($from, $to); })*
    };
}

cells! {
    raw_to_raw: "raw" => "raw";
    raw_to_qcow2: "raw" => "qcow2";
    raw_to_vhdx: "raw" => "vhdx";
    raw_to_vhd: "raw" => "vhd";
    raw_to_vdi: "raw" => "vdi";
    raw_to_vmdk: "raw" => "vmdk";
    raw_to_vma: "raw" => "vma";
    raw_to_ova: "raw" => "ova";
    qcow2_to_ova: "qcow2" => "ova";
    vmdk_to_ova: "vmdk" => "ova";
    vma_to_ova: "vma" => "ova";
    ova_to_raw: "ova" => "raw";
    ova_to_qcow2: "ova" => "qcow2";
    ova_to_vmdk: "ova" => "vmdk";
    ova_to_vma: "ova" => "vma";
    ova_to_ova: "ova" => "ova";
    qcow2_to_raw: "qcow2" => "raw";
    qcow2_to_qcow2: "qcow2" => "qcow2";
    qcow2_to_vhdx: "qcow2" => "vhdx";
    qcow2_to_vhd: "qcow2" => "vhd";
    qcow2_to_vdi: "qcow2" => "vdi";
    qcow2_to_vmdk: "qcow2" => "vmdk";
    qcow2_to_vma: "qcow2" => "vma";
    vhdx_to_raw: "vhdx" => "raw";
    vhdx_to_qcow2: "vhdx" => "qcow2";
    vhdx_to_vhdx: "vhdx" => "vhdx";
    vhdx_to_vhd: "vhdx" => "vhd";
    vhdx_to_vdi: "vhdx" => "vdi";
    vhdx_to_vmdk: "vhdx" => "vmdk";
    vhdx_to_vma: "vhdx" => "vma";
    vhd_to_raw: "vhd" => "raw";
    vhd_to_qcow2: "vhd" => "qcow2";
    vhd_to_vhdx: "vhd" => "vhdx";
    vhd_to_vhd: "vhd" => "vhd";
    vhd_to_vdi: "vhd" => "vdi";
    vhd_to_vmdk: "vhd" => "vmdk";
    vhd_to_vma: "vhd" => "vma";
    vdi_to_raw: "vdi" => "raw";
    vdi_to_qcow2: "vdi" => "qcow2";
    vdi_to_vhdx: "vdi" => "vhdx";
    vdi_to_vhd: "vdi" => "vhd";
    vdi_to_vdi: "vdi" => "vdi";
    vdi_to_vmdk: "vdi" => "vmdk";
    vdi_to_vma: "vdi" => "vma";
    vmdk_to_raw: "vmdk" => "raw";
    vmdk_to_qcow2: "vmdk" => "qcow2";
    vmdk_to_vhdx: "vmdk" => "vhdx";
    vmdk_to_vhd: "vmdk" => "vhd";
    vmdk_to_vdi: "vmdk" => "vdi";
    vmdk_to_vmdk: "vmdk" => "vmdk";
    vmdk_to_vma: "vmdk" => "vma";
    vma_to_raw: "vma" => "raw";
    vma_to_qcow2: "vma" => "qcow2";
    vma_to_vhdx: "vma" => "vhdx";
    vma_to_vhd: "vma" => "vhd";
    vma_to_vdi: "vma" => "vdi";
    vma_to_vmdk: "vma" => "vmdk";
    vma_to_vma: "vma" => "vma";
    parallels_to_raw: "parallels" => "raw";
    parallels_to_qcow2: "parallels" => "qcow2";
    parallels_to_vhdx: "parallels" => "vhdx";
    parallels_to_vhd: "parallels" => "vhd";
    parallels_to_vdi: "parallels" => "vdi";
    parallels_to_vmdk: "parallels" => "vmdk";
    parallels_to_vma: "parallels" => "vma";
    qed_to_raw: "qed" => "raw";
    qed_to_qcow2: "qed" => "qcow2";
    qed_to_vhdx: "qed" => "vhdx";
    qed_to_vhd: "qed" => "vhd";
    qed_to_vdi: "qed" => "vdi";
    qed_to_vmdk: "qed" => "vmdk";
    qed_to_vma: "qed" => "vma";
    qcow_to_raw: "qcow" => "raw";
    qcow_to_qcow2: "qcow" => "qcow2";
    qcow_to_vhdx: "qcow" => "vhdx";
    qcow_to_vhd: "qcow" => "vhd";
    qcow_to_vdi: "qcow" => "vdi";
    qcow_to_vmdk: "qcow" => "vmdk";
    qcow_to_vma: "qcow" => "vma";
}

/// Converts all images from raw through `formats` and back to raw.
fn chain(formats: &[&str]) {
    for image in images::all() {
        let dir = tempdir();
        let raw = dir.path().join("start.raw");
        image.write_raw(&raw);
        let mut at = raw.clone();
        for (step, format) in formats.iter().chain(&["raw"]).enumerate() {
            let next = dir.path().join(format!("{step}.{format}"));
            imgtool(["convert", text(&at), "--to", format, text(&next)]).ok();
            at = next;
        }
        assert_same_rounded(&raw, &at, SECTOR, &format!("{} through {formats:?}", image.name));
    }
}

#[test]
fn vma_qcow2_vhdx_chain_preserves_content() {
    chain(&["vma", "qcow2", "vhdx"]);
}

#[test]
fn vhd_vdi_vhdx_chain_preserves_content() {
    chain(&["vhd", "vdi", "vhdx"]);
}

#[test]
fn vmdk_vdi_qcow2_chain_preserves_content() {
    chain(&["vmdk", "vdi", "qcow2"]);
}

#[test]
fn vhdx_qcow2_vma_chain_preserves_content() {
    chain(&["vhdx", "qcow2", "vma"]);
}

/// Returns three devices. The first two end within a cluster.
fn three_disks() -> [(&'static str, Image); 3] {
    let size = 70 * 65_536;
    [
        ("drive-scsi0", images::every_mask()),
        ("drive-efidisk0", Image::hole("efi", 540_672).with(4096, images::noise(5, 9000))),
        ("drive-virtio1", Image::hole("seventy", size).with(65_536 * 64, images::prose(6, 65_536 * 6))),
    ]
}

/// Unpacks an archive to each format and compares every device.
fn unpack_everywhere(archive: &Archive, disks: &[(&str, Image)]) {
    let dir = tempdir();
    let source = dir.path().join("vm.vma");
    std::fs::write(&source, archive.build().bytes).unwrap();
    for format in ["raw", "qcow2", "vhdx"] {
        let out = dir.path().join(format);
        imgtool(["convert", text(&source), "--to", format, text(&out)]).ok();
        let mut expected: Vec<String> = disks.iter().map(|(name, _)| format!("{name}.{format}")).collect();
        expected.sort();
        assert_eq!(names(&out), expected);
        for (name, image) in disks {
            let raw = dir.path().join("expected.raw");
            image.write_raw(&raw);
            let output = out.join(format!("{name}.{format}"));
            let back = dir.path().join("back.raw");
            imgtool(["convert", "--force", text(&output), "--to", "raw", text(&back)]).ok();
            assert_same_rounded(&raw, &back, SECTOR, &format!("{name} as {format}"));
            if format != "raw" && oracles::have("qemu-img") {
                oracles::qemu_compare(&raw, "raw", &output, format);
                oracles::qemu_check(&output, format);
            }
        }
    }
}

#[test]
fn unpacks_three_devices_to_every_format() {
    let disks = three_disks();
    unpack_everywhere(&Archive::of(disks.clone()), &disks);
}

#[test]
fn unpacks_shuffled_clusters_to_every_format() {
    let disks = three_disks();
    unpack_everywhere(&Archive::of(disks.clone()).shuffled(3), &disks);
}

#[test]
fn reads_extents_of_any_length_and_gaps_in_device_ids() {
    let disks = three_disks();
    for (slots, ids) in [(1, [3, 200, 254]), (7, [9, 2, 5]), (59, [1, 128, 4])] {
        let archive = Archive::of(disks.clone()).slots_per_extent(slots).ids(&ids).shuffled(slots as u64);
        unpack_everywhere(&archive, &disks);
    }
}

#[test]
fn packs_sources_of_several_formats_into_one_archive() {
    require!("qemu-img");
    let dir = tempdir();
    let disks = three_disks();
    let mut args = vec!["convert".to_owned()];
    for ((name, image), format) in disks.iter().zip(["raw", "qcow2", "vhdx"]) {
        let raw = dir.path().join(format!("{name}.raw"));
        image.write_raw(&raw);
        args.push(format!("{name}={}", text(&foreign(image, &raw, format, dir.path()))));
    }
    let conf = dir.path().join("qemu-server.conf");
    std::fs::write(&conf, "name: packed\n").unwrap();
    let archive = dir.path().join("vm.vma");
    args.extend(["--config", text(&conf), "--to", "vma", text(&archive)].map(str::to_owned));
    imgtool(args).ok();
    let out = dir.path().join("out");
    imgtool(["convert", text(&archive), "--to", "raw", text(&out)]).ok();
    for (name, _) in &disks {
        let raw = dir.path().join(format!("{name}.raw"));
        assert_same_rounded(&raw, &out.join(format!("{name}.raw")), SECTOR, name);
    }
    // A plain configuration becomes that of a backup.
    let config = std::fs::read(out.join("qemu-server.conf")).unwrap();
    assert!(String::from_utf8_lossy(&config).contains("name: packed\n"));
    if oracles::have("dissect") {
        let seen = oracles::dissect_vma(&[&archive]).remove(0);
        for (device, (name, _)) in seen.devices.iter().zip(&disks) {
            assert_eq!(device.name, *name);
            assert_eq!(device.sha256, sha256_rounded(&dir.path().join(format!("{name}.raw")), device.size));
        }
        assert_eq!(seen.devices.len(), 3);
        assert_eq!(seen.configs["qemu-server.conf"], sha256(&config));
    }
}

#[test]
fn repacking_keeps_devices_configurations_and_guest_state() {
    let dir = tempdir();
    for fixture in ["two-disks.vma.zst", "vmstate.vma.zst"] {
        let fixture = imgtool_testing::fixture(fixture);
        let packed = dir.path().join("packed.vma");
        imgtool(["convert", "--force", text(&fixture), "--to", "vma", text(&packed)]).ok();
        let (before, after) = (dir.path().join("before"), dir.path().join("after"));
        imgtool(["convert", text(&fixture), "--to", "raw", text(&before)]).ok();
        imgtool(["convert", text(&packed), "--to", "raw", text(&after)]).ok();
        // The XML of a domain has the paths of its disks.
        for domain in [before.join("fixture.xml"), after.join("fixture.xml")] {
            let _ = std::fs::remove_file(domain);
        }
        assert_eq!(imgtool_testing::snapshot(&before), imgtool_testing::snapshot(&after));
        std::fs::remove_dir_all(before).unwrap();
        std::fs::remove_dir_all(after).unwrap();
    }
}

/// Returns the most revealing images, for tests that try many options with each.
fn telling() -> impl Iterator<Item = Image> {
    let names = ["every-mask", "prose-and-holes", "prime", "1-byte", "zeros-written"];
    images::all().into_iter().filter(move |image| names.contains(&image.name))
}

#[test]
fn reads_every_qcow2_variant_from_qemu() {
    require!("qemu-img");
    let dir = tempdir();
    let options = [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "compat=0.10",
        "compat=0.10,cluster_size=512",
        "refcount_bits=1",
        "refcount_bits=64,cluster_size=1k",
        "preallocation=metadata",
        "preallocation=full",
        "lazy_refcounts=on",
        "-c",
        "-c cluster_size=512",
        "-c compression_type=zstd",
        "-c compression_type=zstd,cluster_size=2M",
    ];
    for image in telling() {
        let raw = dir.path().join("x.raw");
        image.write_raw(&raw);
        for option in options {
            let (source, out) = (dir.path().join("x.qcow2"), dir.path().join("out.raw"));
            oracles::qemu_make(&raw, "qcow2", option, &source);
            imgtool(["convert", "--force", text(&source), "--to", "raw", text(&out)]).ok();
            assert_same_rounded(&raw, &out, SECTOR, &format!("{} with {option}", image.name));
        }
    }
}

#[test]
fn qemu_reads_images_with_every_qcow2_option() {
    require!("qemu-img");
    let dir = tempdir();
    let options: [&[&str]; 9] = [
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=4k"],
        &["-o", "cluster_size=2M"],
        &["-o", "compat=0.10"],
        &["-c"],
        &["--compress=zstd"],
        &["--compress=zlib", "-o", "cluster_size=512"],
        &["--compress=zstd", "-o", "cluster_size=2M"],
        &["-c", "-o", "compat=0.10"],
    ];
    for image in telling() {
        let (raw, out) = (dir.path().join("x.raw"), dir.path().join("out.qcow2"));
        image.write_raw(&raw);
        for option in options {
            imgtool(["convert", "--force", "--to", "qcow2"]).args(option).args([text(&raw), text(&out)]).ok();
            oracles::qemu_compare(&raw, "raw", &out, "qcow2");
            oracles::qemu_check(&out, "qcow2");
            let back = dir.path().join("back.raw");
            imgtool(["convert", "--force", text(&out), "--to", "raw", text(&back)]).ok();
            assert_same_rounded(&raw, &back, SECTOR, &format!("{} with {option:?}", image.name));
        }
    }
}

#[test]
fn empty_image_stays_empty_or_is_refused() {
    let dir = tempdir();
    let raw = dir.path().join("nothing.raw");
    images::nothing().write_raw(&raw);
    let out = dir.path().join("out.raw");
    imgtool(["convert", text(&raw), "--to", "raw", text(&out)]).ok();
    assert_same(&raw, &out, "nothing");
    let qcow2 = dir.path().join("out.qcow2");
    imgtool(["convert", text(&raw), "--to", "qcow2", text(&qcow2)]).ok();
    if oracles::have("qemu-img") {
        assert_eq!(oracles::qemu_info(&qcow2, "qcow2")["virtual-size"], 0);
    }
    let vma = dir.path().join("out.vma");
    imgtool(["convert", text(&raw), "--to", "vma", text(&vma)]).go().exits(1);
    assert_eq!(names(dir.path()), ["nothing.raw", "out.qcow2", "out.raw"]);
}
