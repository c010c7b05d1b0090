//! What holds the bytes of a file or block device, as sysfs tells it: the disk of a partition, the parts
//! of a device-mapper or RAID device, the file behind a loop device.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::super::{FileClass, FileId};
use super::classify;

/// Where the kernel tells about devices.
const SYSFS: &str = "/sys";

/// Identifies a file across names and links: device and inode; for block devices the device it is.
pub fn file_identity(meta: &Metadata) -> FileId {
    if meta.file_type().is_block_device() { block_device(meta.rdev()) } else { (meta.dev(), meta.ino()) }
}

fn block_device(number: u64) -> FileId {
    (u64::MAX, number)
}

/// A file or block device, and whatever holds its bytes: the disk of a partition, the parts of a
/// device-mapper or RAID device, the file behind a loop device; with `file_systems` also the device
/// that a file's file system is on. The file itself comes first.
pub fn file_layers(meta: &Metadata, file_systems: bool) -> Vec<FileId> {
    let device = match classify(meta) {
        FileClass::BlockDevice => Some(meta.rdev()),
        FileClass::Regular if file_systems => Some(meta.dev()),
        _ => None,
    };
    layers_in(Path::new(SYSFS), file_identity(meta), device, file_systems)
}

/// `own`, and what is below it: `device`, which it is or lies on, and all that this rests on.
fn layers_in(sysfs: &Path, own: FileId, device: Option<u64>, file_systems: bool) -> Vec<FileId> {
    let mut found = vec![own];
    let mut devices = Vec::from_iter(device);
    while let Some(number) = devices.pop() {
        if found[1..].contains(&block_device(number)) {
            continue;
        }
        found.push(block_device(number));
        let known = directory_of(sysfs, number);
        devices.extend(known.join("partition").exists().then(|| device_number(&known.join(".."))).flatten());
        let parts = std::fs::read_dir(known.join("slaves")).into_iter().flatten().flatten();
        devices.extend(parts.filter_map(|part| device_number(&part.path())));
        let backing = std::fs::read_to_string(known.join("loop/backing_file"));
        if let Ok(meta) = backing.and_then(|path| std::fs::metadata(path.trim_end_matches('\n'))) {
            found.push(file_identity(&meta));
            // Behind a loop device there may be another device, which rests on something in any case.
            match classify(&meta) {
                FileClass::BlockDevice => devices.push(meta.rdev()),
                _ => devices.extend(file_systems.then(|| meta.dev())),
            }
        }
    }
    found
}

/// What the kernel tells about a block device.
fn directory_of(sysfs: &Path, number: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    // The link resolved: ".." is the disk then.
    let link = sysfs.join(format!("dev/block/{major}:{minor}"));
    std::fs::canonicalize(&link).unwrap_or(link)
}

/// The number of the device that a directory of sysfs is about.
fn device_number(directory: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::super::same_bytes;
    use super::*;

    /// A directory laid out as sysfs is: `dev/block/MAJOR:MINOR` are links into `devices`.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(root.path().join("dev/block")).unwrap();
            Self(root)
        }

        /// A device whose directory is at `place` below `devices`, and the devices it is made of.
        fn device(&self, place: &str, number: u64, slaves: &[&str]) -> u64 {
            let directory = self.0.path().join("devices").join(place);
            std::fs::create_dir_all(directory.join("slaves")).unwrap();
            let text = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
            std::fs::write(directory.join("dev"), format!("{text}\n")).unwrap();
            let link = |to: &Path, at: &Path| std::os::unix::fs::symlink(to, at).unwrap();
            link(&directory, &self.0.path().join("dev/block").join(text));
            for slave in slaves {
                let name = Path::new(slave).file_name().unwrap();
                link(&self.0.path().join("devices").join(slave), &directory.join("slaves").join(name));
            }
            number
        }

        fn partition(&self, place: &str, number: u64) -> u64 {
            self.device(place, number, &[]);
            std::fs::write(self.0.path().join("devices").join(place).join("partition"), "1\n").unwrap();
            number
        }

        fn loop_over(&self, place: &str, number: u64, file: &Path) -> u64 {
            self.device(place, number, &[]);
            let directory = self.0.path().join("devices").join(place).join("loop");
            std::fs::create_dir(&directory).unwrap();
            std::fs::write(directory.join("backing_file"), format!("{}\n", file.display())).unwrap();
            number
        }

        fn layers(&self, number: u64) -> Vec<FileId> {
            layers_in(self.0.path(), block_device(number), Some(number), true)
        }

        /// Whether writing to one would change the other.
        fn touch(&self, one: u64, other: u64) -> bool {
            same_bytes(&self.layers(one), &self.layers(other))
        }
    }

    fn number(major: u32, minor: u32) -> u64 {
        rustix::fs::makedev(major, minor)
    }

    #[test]
    fn a_mapped_device_rests_on_its_partition_and_on_that_ones_disk() {
        let sys = Sysfs::new();
        let disk = sys.device("pci/sda", number(8, 0), &[]);
        let part = sys.partition("pci/sda/sda1", number(8, 1));
        let other_part = sys.partition("pci/sda/sda2", number(8, 2));
        let linear = sys.device("virtual/dm-0", number(253, 0), &["pci/sda/sda1"]);
        assert_eq!(sys.layers(linear)[1..], [linear, part, disk].map(block_device));
        assert!(sys.touch(linear, part) && sys.touch(part, linear));
        assert!(sys.touch(linear, disk) && sys.touch(disk, linear));
        assert!(sys.touch(part, disk));
        assert!(!sys.touch(linear, other_part) && !sys.touch(part, other_part));
        let another_disk = sys.device("pci/sdb", number(8, 16), &[]);
        assert!(!sys.touch(linear, another_disk));
    }

    #[test]
    fn two_volumes_of_one_disk_are_not_one_but_each_is_of_it() {
        let sys = Sysfs::new();
        let disk = sys.device("pci/sda", number(8, 0), &[]);
        let first = sys.device("virtual/dm-0", number(253, 0), &["pci/sda"]);
        let second = sys.device("virtual/dm-1", number(253, 1), &["pci/sda"]);
        // A volume of two disks, and an encrypted one in it.
        let more = sys.device("pci/sdb", number(8, 16), &[]);
        let wide = sys.device("virtual/dm-2", number(253, 2), &["pci/sda", "pci/sdb"]);
        let crypt = sys.device("virtual/dm-3", number(253, 3), &["virtual/dm-2"]);
        assert!(!sys.touch(first, second));
        assert!(sys.touch(first, disk) && sys.touch(second, disk) && !sys.touch(first, more));
        assert!(!sys.touch(wide, first) && sys.touch(wide, disk) && sys.touch(wide, more));
        assert!(sys.touch(crypt, wide) && sys.touch(crypt, more) && !sys.touch(crypt, second));
    }

    #[test]
    fn a_loop_device_rests_on_its_file_and_on_the_mapped_device_that_this_lies_on() {
        let sys = Sysfs::new();
        let file = sys.0.path().join("disk.raw");
        std::fs::write(&file, b"disk").unwrap();
        let meta = std::fs::metadata(&file).unwrap();
        let disk = sys.device("pci/sda", number(8, 0), &[]);
        // The file system that the temporary directory is on, as a mapped device.
        let mapped = sys.device("virtual/dm-0", meta.dev(), &["pci/sda"]);
        let over = sys.loop_over("virtual/loop0", number(7, 0), &file);
        let part = sys.partition("virtual/loop0/loop0p1", number(259, 0));
        let layers = |file_systems| layers_in(sys.0.path(), block_device(part), Some(part), file_systems);
        assert_eq!(
            layers(true)[1..],
            [
                block_device(part),
                block_device(over),
                file_identity(&meta),
                block_device(mapped),
                block_device(disk)
            ]
        );
        // As a target: what else is on the file system stays as it is.
        assert_eq!(layers(false)[1..], [block_device(part), block_device(over), file_identity(&meta)]);
        let source = layers_in(sys.0.path(), file_identity(&meta), Some(meta.dev()), true);
        assert!(same_bytes(&source, &layers(false)) && same_bytes(&source, &sys.layers(disk)));
    }

    #[test]
    fn without_sysfs_a_device_is_only_itself() {
        let nowhere = Path::new("/nonexistent");
        let (one, other) = (number(253, 0), number(253, 1));
        let layers = |number| layers_in(nowhere, block_device(number), Some(number), true);
        assert_eq!(layers(one), [block_device(one); 2]);
        assert!(same_bytes(&layers(one), &layers(one)) && !same_bytes(&layers(one), &layers(other)));
    }

    #[test]
    fn devices_that_rest_on_each_other_are_looked_at_once() {
        let sys = Sysfs::new();
        let first = sys.device("virtual/dm-0", number(253, 0), &["virtual/dm-1"]);
        let second = sys.device("virtual/dm-1", number(253, 1), &["virtual/dm-0"]);
        assert_eq!(sys.layers(first)[1..], [first, second].map(block_device));
    }
}
