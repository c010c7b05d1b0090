//! A disk with a small Linux: GPT, a BIOS boot partition, an EFI system partition, and a partition with a
//! line of text. One disk boots in both modes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use imgtool_testing::oracles::{kernel_package, run, run_in};
use imgtool_testing::text;

/// Text in the last partition, which the guest prints.
pub const MARKER: &str = "read from the disk: 7d1c9e4a";

const SECTOR: u64 = 512;
/// Length of the disk.
const SIZE: u64 = 40 << 20;
/// First sector of the boot loader, of the EFI system partition with its length, and of the text.
const LOADER: u64 = 2048;
const ESP: u64 = 4096;
const ESP_SECTORS: u64 = 65536;
const TEXT: u64 = ESP + ESP_SECTORS;

/// Commands of GRUB. Without the module `normal`, they run at once.
const COMMANDS: &str = "linux (hd0,gpt2)/vmlinuz quiet console=ttyS0 panic=-1 mitigations=off no_timer_check\n\
    initrd (hd0,gpt2)/initrd.img\nboot\n";

/// Drivers of the guest. Those that the kernel has built in, or not at all, are not in its package.
const MODULES: &[&str] = &[
    "scsi_common",
    "scsi_mod",
    "crc64",
    "crc64_rocksoft_generic",
    "crct10dif_common",
    "crct10dif_generic",
    "crc-t10dif",
    "crc64-rocksoft",
    "t10-pi",
    "sd_mod",
    "libata",
    "libahci",
    "ahci",
    "ata_piix",
    "virtio",
    "virtio_ring",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "vmw_pvscsi",
];

/// First program of the guest. Modules are loaded in rounds, since they depend on each other.
const INIT: &str = r#"#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs devtmpfs /dev
for round in 1 2 3; do
  for module in /modules/*.ko; do $b insmod $module 2>/dev/null && $b rm $module; done
done
firmware=bios
[ -d /sys/firmware/efi ] && firmware=uefi
for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  for disk in /dev/sda3 /dev/vda3 /dev/hda3; do
    [ -b $disk ] && echo "GUEST: $($b head -n 1 $disk) $firmware" >/dev/ttyS0 && $b poweroff -f
  done
  $b sleep 1
done
echo "GUEST: no disk: $($b ls /sys/block)" >/dev/ttyS0
$b poweroff -f
"#;

/// Makes the disk in a directory. Returns its path.
pub fn bootable(directory: &Path) -> PathBuf {
    let work = directory.join("work");
    std::fs::create_dir(&work).unwrap();
    std::fs::write(work.join("commands"), COMMANDS).unwrap();
    let disk = directory.join("disk.raw");
    File::create(&disk).unwrap().set_len(SIZE).unwrap();
    partition(&work, &disk);
    let file = File::options().write(true).open(&disk).unwrap();
    let boot_files = boot_files(&work);
    write_loader(&work, &file);
    file.write_all_at(&boot_files, ESP * SECTOR).unwrap();
    file.write_all_at(format!("{MARKER}\n").as_bytes(), TEXT * SECTOR).unwrap();
    std::fs::remove_dir_all(&work).unwrap();
    disk
}

fn partition(work: &Path, disk: &Path) {
    let table = format!(
        "label: gpt\n\
         start={LOADER},size={},type=21686148-6449-6E6F-744E-656564454649\n\
         start={ESP},size={ESP_SECTORS},type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B\n\
         start={TEXT},size=2048,type=0FC63DAF-8483-4772-8E79-3D69D8477DE4\n",
        ESP - LOADER
    );
    std::fs::write(work.join("table"), table).unwrap();
    let command = format!("PATH=$PATH:/usr/sbin:/sbin sfdisk -q {} <table", text(disk));
    run_in("sh", work, &["-c", &command]);
}

/// Writes GRUB for the BIOS: its first sector, which knows where the rest is, and the rest.
fn write_loader(work: &Path, disk: &File) {
    /// Place in the first sector of the number of the next one, and its length that a table of partitions
    /// leaves.
    const NEXT: u64 = 0x5c;
    const CODE: usize = 440;
    /// Place in the second sector of the number of the third.
    const REST: u64 = SECTOR - 12;
    let modules = ["biosdisk", "part_gpt", "fat", "linux"];
    let image = ["-O", "i386-pc", "-p", "/", "-c", "commands", "-o", "core.img"];
    run_in("grub-mkimage", work, &[&image[..], &modules].concat());
    let first = std::fs::read("/usr/lib/grub/i386-pc/boot.img").expect("boot.img of grub-pc-bin");
    disk.write_all_at(&first[..CODE], 0).unwrap();
    disk.write_all_at(&LOADER.to_le_bytes(), NEXT).unwrap();
    disk.write_all_at(&std::fs::read(work.join("core.img")).unwrap(), LOADER * SECTOR).unwrap();
    disk.write_all_at(&(LOADER + 1).to_le_bytes(), LOADER * SECTOR + REST).unwrap();
}

/// Makes the file system with kernel, drivers and the loader for UEFI.
fn boot_files(work: &Path) -> Vec<u8> {
    let modules = ["part_gpt", "fat", "linux"];
    let image = ["-O", "x86_64-efi", "-p", "/", "-c", "commands", "-o", "bootx64.efi"];
    run_in("grub-mkimage", work, &[&image[..], &modules].concat());
    let kernel = kernel_package().expect("the test requires it");
    initial_files(work, &kernel);
    let boot = std::fs::read_dir(kernel.join("boot")).expect("boot").map(|entry| entry.unwrap().path());
    let is_kernel = |path: &PathBuf| text(path.file_name().unwrap().as_ref()).starts_with("vmlinuz-");
    let vmlinuz = boot.into_iter().find(is_kernel).expect("a kernel");
    File::create(work.join("esp")).unwrap().set_len(ESP_SECTORS * SECTOR).unwrap();
    let sectors = ESP_SECTORS.to_string();
    run_in("mformat", work, &["-i", "esp", "-T", &sectors, "-h", "64", "-s", "32", "::"]);
    run_in("mmd", work, &["-i", "esp", "::/EFI", "::/EFI/BOOT"]);
    run_in("mcopy", work, &["-i", "esp", text(&vmlinuz), "::/vmlinuz"]);
    run_in("mcopy", work, &["-i", "esp", "initrd.img", "::/initrd.img"]);
    run_in("mcopy", work, &["-i", "esp", "bootx64.efi", "::/EFI/BOOT/BOOTX64.EFI"]);
    std::fs::read(work.join("esp")).unwrap()
}

/// Packs the first program, its shell and the drivers.
fn initial_files(work: &Path, kernel: &Path) {
    let root = work.join("root");
    for directory in ["bin", "modules", "proc", "sys", "dev"] {
        std::fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    std::fs::copy(busybox.expect("busybox-static"), root.join("bin/busybox")).unwrap();
    std::fs::write(root.join("init"), INIT).unwrap();
    run("chmod", &["755", text(&root.join("init")), text(&root.join("bin/busybox"))]);
    let found = run("find", &[text(&kernel.join("lib/modules")), "-name", "*.ko"]);
    let found = String::from_utf8(found.stdout).unwrap();
    for path in found.lines().map(Path::new) {
        let name = path.file_stem().unwrap();
        if let Some(place) = MODULES.iter().position(|module| name == *module) {
            std::fs::copy(path, root.join(format!("modules/{place:02}-{}.ko", text(name.as_ref())))).unwrap();
        }
    }
    run_in("sh", &root, &["-c", "find . | cpio -o -H newc --quiet | gzip -n >../initrd.img"]);
}
