//! `--for PLATFORM`: what is chosen, what is refused, and what independent programs find in the result.

use std::path::{Path, PathBuf};

use imgtool_platform::Purpose;
use imgtool_testing::images::{Image, noise, prose};
use imgtool_testing::vma::Archive;
use imgtool_testing::{fixture, names, oracles, require, tempdir, text};

use crate::support::imgtool;

/// A disk of 5 MiB and a few sectors: no platform that rounds takes its size.
fn disk() -> Image {
    Image::hole("web", 5_255_168)
        .with(0, Vec::new())
        .with(4096, noise(1, 100_000))
        .with(3 << 20, prose(2, 300_000))
}

/// Returns the first sector of a disk that starts with a BIOS alone.
fn bios_sector() -> Vec<u8> {
    let mut sector = vec![0; 512];
    sector[0] = 0xeb;
    sector[446..454].copy_from_slice(&[0x80, 0, 0, 0, 0x83, 0, 0, 0]);
    sector[454..458].copy_from_slice(&8u32.to_le_bytes());
    sector[458..462].copy_from_slice(&100u32.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// Returns the start of a disk of `sectors` sectors with a GPT of one EFI system partition.
fn uefi_start(sectors: u64) -> Vec<u8> {
    let mut start = vec![0; 2048];
    start[450] = 0xee;
    start[510..512].copy_from_slice(&[0x55, 0xaa]);
    start[512..520].copy_from_slice(b"EFI PART");
    start[512 + 32..512 + 40].copy_from_slice(&(sectors - 1).to_le_bytes());
    start[512 + 72..512 + 80].copy_from_slice(&2u64.to_le_bytes());
    start[512 + 80..512 + 84].copy_from_slice(&4u32.to_le_bytes());
    start[512 + 84..512 + 88].copy_from_slice(&128u32.to_le_bytes());
    start[1024..1040].copy_from_slice(&[
        0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b,
    ]);
    start[1056..1064].copy_from_slice(&40u64.to_le_bytes());
    start
}

/// Puts `web.raw` and `web.qcow2` into a directory.
fn with_sources() -> tempfile::TempDir {
    let dir = tempdir();
    disk().write_raw(&dir.path().join("web.raw"));
    imgtool(["convert", "-q", "web.raw", "web.qcow2"]).within(dir.path()).ok();
    dir
}

/// Asserts that an independent program finds the content of `raw` at the front of an image.
fn ask_qemu(raw: &Path, image: &Path, format: &str) {
    // qemu-img compare takes zeros behind the shorter disk for equal.
    oracles::qemu_compare(raw, "raw", image, format);
}

/// Unpacks an archive with GNU tar, and returns the path of a file in it.
fn unpacked(archive: &Path, suffix: &str) -> PathBuf {
    let directory = archive.with_extension("unpacked");
    std::fs::create_dir(&directory).unwrap();
    oracles::run_in("tar", &directory, &["-xf", text(archive)]);
    let name = names(&directory).into_iter().find(|name| name.ends_with(suffix)).expect(suffix);
    directory.join(name)
}

#[test]
fn every_platform_takes_what_is_made_for_it() {
    require!("qemu-img", "tar");
    let dir = with_sources();
    let raw = dir.path().join("web.raw");
    for (platform, output, format) in [
        ("proxmox", "a.qcow2", "qcow2"),
        ("libvirt", "b.qcow2", "qcow2"),
        ("libvirt", "b.raw", "raw"),
        ("hyperv", "c.vhdx", "vhdx"),
        ("hyperv:gen1", "c.vhd", "vpc"),
        ("azure", "d.vhd", "vpc"),
        ("aws", "e.vmdk", "vmdk"),
        ("aws", "e.vhd", "vpc"),
        ("aws", "e.vhdx", "vhdx"),
        ("aws", "e.raw", "raw"),
        ("gce", "f.tar.gz", "tar"),
        ("vmware", "g.vmdk", "vmdk"),
        ("vmware", "g.ova", "ova"),
        ("virtualbox", "h.vdi", "vdi"),
        ("virtualbox", "h.vmdk", "vmdk"),
        ("virtualbox", "h.ova", "ova"),
        ("openstack", "i.qcow2", "qcow2"),
    ] {
        for source in ["web.raw", "web.qcow2", "-"] {
            let name = format!("from{}-{output}", source.replace('.', "-"));
            let path = dir.path().join(&name);
            let run = imgtool(["convert", "--for", platform, "--verify", source, &name]).within(dir.path());
            let run = if source == "-" { run.args(["-f", "raw"]).pipe_from(&raw).ok() } else { run.ok() };
            run.says(&format!("for {platform}: "));
            imgtool(["check", "--for", platform, text(&path)]).ok();
            match format {
                "ova" => ask_qemu(&raw, &unpacked(&path, ".vmdk"), "vmdk"),
                "tar" => ask_qemu(&raw, &unpacked(&path, "disk.raw"), "raw"),
                format => ask_qemu(&raw, &path, format),
            }
        }
    }
}

#[test]
fn every_platform_and_source_of_rules_is_documented() {
    let page =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/platforms.md")).unwrap();
    for rules in imgtool_platform::RULES {
        let start = format!("| `{}` |", rules.name);
        let row = page.lines().find(|line| line.starts_with(&start)).unwrap_or_else(|| panic!("{start}"));
        for form in
            rules.forms.iter().filter(|form| form.generation.is_none() && form.purpose == Purpose::Disk)
        {
            let known = row.to_lowercase();
            assert!(
                known.contains(form.format) || form.format == "tar" && known.contains(".tar.gz"),
                "{row}"
            );
        }
        let sources = rules.forms.iter().map(|form| form.source);
        // The first form of each platform is the one that is chosen.
        assert!(sources.take(1).all(|source| row.contains(source)), "{row}");
    }
}

#[test]
fn azure_gets_a_fixed_vhd_of_whole_mebibytes() {
    require!("qemu-img");
    let dir = with_sources();
    std::fs::copy(fixture("two-disks.vma.zst"), dir.path().join("vm.vma.zst")).unwrap();
    for source in [&["web.raw"][..], &["vm.vma.zst", "--disk", "scsi0"]] {
        imgtool(["convert", "--for", "azure", "--force"])
            .args(source)
            .args(["web.vhd"])
            .within(dir.path())
            .ok()
            .says("as azure wants it");
        let bytes = std::fs::read(dir.path().join("web.vhd")).unwrap();
        let (content, footer) = bytes.split_at(bytes.len() - 512);
        assert_eq!(content.len(), 20 << 20, "the smallest disk of Azure");
        assert_eq!(&footer[..8], b"conectix");
        assert_eq!(footer[60..64], 2u32.to_be_bytes(), "fixed");
        assert_eq!(footer[48..56], (20u64 << 20).to_be_bytes());
        let info = oracles::qemu_info(&dir.path().join("web.vhd"), "vpc");
        assert_eq!(info["virtual-size"], 20 << 20, "{info}");
    }
}

#[test]
fn gce_gets_a_disk_in_an_archive() {
    require!("tar", "gzip");
    let dir = with_sources();
    let at = |name: &str| dir.path().join(name);
    imgtool(["convert", "--for", "gce", "web.raw", "a.tar.gz"]).within(dir.path()).ok();
    imgtool(["convert", "--for", "gce", "--threads", "1", "web.qcow2", "b.tar.gz"]).within(dir.path()).ok();
    imgtool(["convert", "--for", "gce", "-f", "raw", "-", "c.tar.gz"])
        .within(dir.path())
        .pipe_from(&at("web.raw"))
        .ok();
    let piped = imgtool(["convert", "--for", "gce", "-q", "web.qcow2", "-"]).within(dir.path()).ok();
    let bytes = std::fs::read(at("a.tar.gz")).unwrap();
    assert_eq!(bytes, std::fs::read(at("b.tar.gz")).unwrap(), "the same bytes with one thread");
    assert_eq!(bytes, std::fs::read(at("c.tar.gz")).unwrap(), "the same bytes from a pipe");
    assert_eq!(bytes, piped.stdout, "the same bytes into a pipe");
    // The clusters of an archive may have any order, in a file and in a pipe.
    let shuffled = Archive::of([("drive-scsi0", disk())]).shuffled(5).build();
    std::fs::write(at("vm.vma"), &shuffled.bytes).unwrap();
    imgtool(["convert", "--for", "gce", "vm.vma", "d.tar.gz"]).within(dir.path()).ok();
    imgtool(["convert", "--for", "gce", "-", "e.tar.gz"]).within(dir.path()).pipe_from(&at("vm.vma")).ok();
    assert_eq!(bytes, std::fs::read(at("d.tar.gz")).unwrap(), "the same bytes from a shuffled archive");
    assert_eq!(bytes, std::fs::read(at("e.tar.gz")).unwrap(), "the same bytes from its pipe");
    let listed = oracles::run_in("tar", dir.path(), &["--utc", "-tvzf", "a.tar.gz"]);
    let words: Vec<&str> = listed.split_whitespace().collect();
    assert_eq!(words, ["-rw-r--r--", "0/0", "1073741824", "2026-09-21", "14:13", "disk.raw"]);
    assert_eq!(&oracles::filter("gzip", &["-dc"], &bytes)[257..265], b"ustar  \0");
    // Back from the archive, in one pass, and from an archive of GNU tar with holes.
    imgtool(["compare", "web.raw", "a.tar.gz"]).within(dir.path()).ok();
    imgtool(["convert", "-q", "a.tar.gz", "back.qcow2"]).within(dir.path()).ok();
    imgtool(["compare", "web.raw", "back.qcow2"]).within(dir.path()).ok();
    let checked = |archive: &str| imgtool(["check", "--for", "gce", archive]).within(dir.path()).go();
    std::fs::copy(at("web.raw"), at("disk.raw")).unwrap();
    std::fs::OpenOptions::new().write(true).open(at("disk.raw")).unwrap().set_len(1 << 30).unwrap();
    oracles::run_in("tar", dir.path(), &["--format=oldgnu", "-Sczf", "gnu.tar.gz", "disk.raw"]);
    checked("gnu.tar.gz").exits(0);
    oracles::run_in("tar", dir.path(), &["--format=ustar", "-czf", "ustar.tar.gz", "disk.raw"]);
    oracles::run_in("tar", dir.path(), &["--format=oldgnu", "-czf", "name.tar.gz", "web.raw"]);
    let found = checked("ustar.tar.gz").exits(2).text();
    assert!(
        found.contains("variant: form of the archive is ustar; make the archive with tar --format=oldgnu")
    );
    let found = checked("name.tar.gz").exits(2).text();
    for rule in ["disk-name: files is web.raw", "size: the disk has 5255168 bytes"] {
        assert!(found.contains(rule), "{rule}: {found}");
    }
}

#[test]
fn contradictions_are_refused_by_name() {
    let dir = with_sources();
    for (args, message) in [
        (&["--for", "azure", "--to", "qcow2", "web.raw", "x.vhd"][..], "the format qcow2 contradict"),
        (&["--for", "azure", "web.raw", "x.qcow2"], "the name 'x.qcow2' contradict"),
        (&["--for", "azure", "web.raw", "x.vhd.zst"], "the name 'x.vhd.zst' contradict"),
        (&["--for", "azure", "web.raw", "x"], "the name 'x' contradict"),
        (
            &["--for", "azure", "-o", "subformat=dynamic", "web.raw", "x.vhd"],
            "-o subformat=dynamic contradict",
        ),
        (&["--for", "azure", "-o", "align=512", "web.raw", "x.vhd"], "-o align=512 contradict"),
        (&["--for", "azure", "-c", "web.raw", "x.vhd"], "-c contradict"),
        (&["--for", "azure", "--size", "21000000", "web.raw", "x.vhd"], "--size 21000000 contradict"),
        (&["--for", "gce", "-c=zstd", "web.raw", "x.tar.gz"], "-c=zstd contradict"),
        (&["--for", "gce", "web.raw", "x.tgz"], "the name 'x.tgz' contradict"),
        (&["--for", "hyperv:gen2", "web.raw", "x.vhd"], "the name 'x.vhd' contradict"),
        (
            &["--for", "vmware", "-o", "subformat=monolithicSparse", "web.raw", "x.vmdk"],
            "takes streamOptimized, vmfs",
        ),
        (&["--for", "libvirt", "-n", "web.raw", "web.qcow2"], "-n can't be combined"),
        (
            &["--for", "libvirt", "-B", "web.raw", "-F", "raw", "web.raw", "x.qcow2"],
            "backing file can't be combined",
        ),
        (&["--for", "libvirt", "web.raw", "--target", "web=x.qcow2"], "--target can't be combined"),
        (&["--for", "proxmox", "web.raw", "vm.vma.zst"], "the name 'vm.vma.zst' contradict"),
        (&["--for", "azur", "web.raw", "x.vhd"], "did you mean 'azure'"),
        (&["--for", "gce:gen1", "web.raw", "x.tar.gz"], "gce has no generations"),
    ] {
        imgtool(["convert"]).args(args).within(dir.path()).go().exits(2).says(message);
    }
    // What the platform takes as well stays.
    imgtool(["convert", "--for", "vmware", "-o", "subformat=vmfs", "web.raw", "x.vmdk"])
        .within(dir.path())
        .ok();
    imgtool(["check", "--for", "vmware", "x.vmdk"]).within(dir.path()).ok();
    imgtool(["convert", "--for", "hyperv", "-o", "logical_sector_size=4096", "web.raw", "x.vhdx"])
        .within(dir.path())
        .ok()
        .says("note: x.vhdx: note: sectors: logical sector size is 4096");
}

#[test]
fn machines_get_the_package_of_their_platform() {
    require!("tar");
    let dir = with_sources();
    std::fs::copy(fixture("two-disks.vma.zst"), dir.path().join("vm.vma.zst")).unwrap();
    for directory in ["vmware", "proxmox", "box"] {
        std::fs::create_dir(dir.path().join(directory)).unwrap();
    }
    imgtool(["convert", "--for", "vmware", "vm.vma.zst", "vmware/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("vmware")), ["vm.ova"]);
    imgtool(["check", "--for", "vmware", "vmware/vm.ova"]).within(dir.path()).ok();
    imgtool(["convert", "--for", "virtualbox", "web.raw", "web.qcow2", "box/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("box")), ["web.ova"]);
    imgtool(["convert", "--for", "proxmox", "vmware/vm.ova", "proxmox/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("proxmox")), ["vzdump-qemu-100-2026_09_21-14_13_20.vma.zst"]);
    let archive = "proxmox/vzdump-qemu-100-2026_09_21-14_13_20.vma.zst";
    let config = imgtool(["vma", "config", archive]).within(dir.path()).ok().text();
    assert!(config.contains("#qmdump#map:scsi0:"), "{config}");
    imgtool(["check", "--for", "proxmox", archive]).within(dir.path()).ok();
    imgtool(["convert", "--for", "proxmox", "web.raw", "web.qcow2", "new/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("new")), ["vzdump-qemu-100-2026_09_21-14_13_20.vma.zst"]);
    imgtool(["convert", "--for", "libvirt", "vm.vma.zst", "libvirt/"]).within(dir.path()).ok();
    let made = names(&dir.path().join("libvirt"));
    assert!(
        made.iter().any(|name| name.ends_with(".xml")) && made.iter().any(|name| name.ends_with(".qcow2"))
    );
    imgtool(["convert", "--for", "hyperv", "vm.vma.zst", "hyperv/"]).within(dir.path()).ok();
    let made = names(&dir.path().join("hyperv"));
    assert!(!made.iter().any(|name| name.contains("efidisk")), "the platform makes its own: {made:?}");
    let disks = made.iter().filter(|name| name.ends_with(".vhdx"));
    imgtool(["check", "--for", "hyperv"]).args(disks).within(&dir.path().join("hyperv")).ok();
}

#[test]
fn firmware_is_compared_before_the_output_gets_its_name() {
    let dir = tempdir();
    Image::hole("b", 4 << 20).with(0, bios_sector()).write_raw(&dir.path().join("bios.raw"));
    Image::hole("u", 4 << 20).with(0, uefi_start(8192)).write_raw(&dir.path().join("uefi.raw"));
    let convert = |platform: &str, source: &str, output: &str| {
        imgtool(["convert", "--for", platform, source, output]).within(dir.path()).go()
    };
    convert("hyperv:gen2", "bios.raw", "a.vhdx")
        .exits(1)
        .says("no EFI system partition")
        .says("choose generation 1");
    convert("azure:gen2", "bios.raw", "a.vhd").exits(1).says("azure:gen2 refuses the image");
    convert("hyperv:gen1", "uefi.raw", "a.vhdx").exits(1).says("the disk starts with UEFI alone");
    convert("hyperv:gen1", "bios.raw", "b.vhdx").exits(0);
    convert("hyperv:gen2", "uefi.raw", "c.vhdx").exits(0);
    convert("hyperv", "uefi.raw", "d.vhdx").exits(0).says("make a machine of generation 2");
    convert("gce", "uefi.raw", "e.tar.gz")
        .exits(0)
        .says("UEFI_COMPATIBLE")
        .says("gpt-end: the backup header");
}

#[test]
fn a_check_lists_what_is_wrong_and_counts_as_its_worst_image() {
    let dir = with_sources();
    imgtool(["convert", "-q", "web.raw", "web.vhd"]).within(dir.path()).ok();
    imgtool(["convert", "-q", "--for", "azure", "web.raw", "good.vhd"]).within(dir.path()).ok();
    let check = |args: &[&str]| imgtool(["check", "--for", "azure"]).args(args).within(dir.path()).go();
    let page = check(&["web.vhd", "good.vhd"]).exits(2).text();
    for line in [
        "web.vhd: variant: type is dynamic; make it a fixed VHD",
        "size: the disk has 5255168 bytes; the minimum is 20971520; round it up to 20971520 bytes",
        "web.vhd: azure refuses this vhd image",
        "good.vhd: azure takes this vhd image",
    ] {
        assert!(page.contains(line), "{line}: {page}");
    }
    assert_eq!(check(&["-q", "good.vhd"]).exits(0).text(), "");
    let json = check(&["--output", "json", "web.vhd", "good.vhd"]).exits(2).json();
    assert_eq!(json["fits"], false);
    assert_eq!(json["images"][0]["findings"][0]["rule"], "variant");
    assert_eq!(json["images"][0]["findings"][0]["severity"], "breach");
    assert_eq!(json["images"][1]["fits"], true);
    check(&["nothing.vhd"]).exits(1);
    imgtool(["check", "web.vhd", "good.vhd"])
        .within(dir.path())
        .go()
        .exits(1)
        .says("unexpected argument 'good.vhd'");
    imgtool(["check", "--for", "azure", "-r", "all", "good.vhd"]).within(dir.path()).go().exits(1);
}
