//! Layers of a file or block device: the devices and files below it, from sysfs.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::unix::block_device_identity;
use super::super::{FileClass, FileId, classify, file_identity};

/// Mount point of the kernel's device tree.
const SYSFS: &str = "/sys";

/// Returns the identity of a file or block device, followed by the identities of everything below it: the
/// disk of a partition, the parts of a device-mapper or RAID device, the file behind a loop device.
///
/// With `file_systems`, the device that contains a file's file system counts as below the file. Outside of
/// Linux, the list contains only the file itself.
pub fn file_layers(meta: &Metadata, file_systems: bool) -> Vec<FileId> {
    walk(meta, file_systems, &mut Vec::new())
}

/// Returns the paths of the files behind the loop devices among the layers of a file or block device; see
/// [`file_layers`].
pub fn loop_files(meta: &Metadata, file_systems: bool) -> Vec<PathBuf> {
    let mut files = Vec::new();
    walk(meta, file_systems, &mut files);
    files
}

/// Returns the identities of everything below the block device of this number.
pub(super) fn layers_of_device(number: u64) -> Vec<FileId> {
    let own = block_device_identity(number);
    layers_in(Path::new(SYSFS), own, Some(number), false, &mut Vec::new())
}

fn walk(meta: &Metadata, file_systems: bool, loop_files: &mut Vec<PathBuf>) -> Vec<FileId> {
    let device = match classify(meta) {
        FileClass::BlockDevice => Some(meta.rdev()),
        FileClass::Regular if file_systems => Some(meta.dev()),
        _ => None,
    };
    layers_in(Path::new(SYSFS), file_identity(meta), device, file_systems, loop_files)
}

/// Returns `own` and everything below it. `device` is the device number of `own`, which is then listed twice,
/// or of the device that stores it. Adds the files behind loop devices to `loop_files`.
fn layers_in(
    sysfs: &Path,
    own: FileId,
    device: Option<u64>,
    file_systems: bool,
    loop_files: &mut Vec<PathBuf>,
) -> Vec<FileId> {
    let mut found = vec![own];
    let mut devices = Vec::from_iter(device);
    while let Some(number) = devices.pop() {
        if found[1..].contains(&block_device_identity(number)) {
            continue;
        }
        found.push(block_device_identity(number));
        let directory = device_directory(sysfs, number);
        let is_partition = directory.join("partition").exists();
        devices.extend(is_partition.then(|| device_number(&directory.join(".."))).flatten());
        let parts = std::fs::read_dir(directory.join("slaves")).into_iter().flatten().flatten();
        devices.extend(parts.filter_map(|part| device_number(&part.path())));
        let backing = std::fs::read_to_string(directory.join("loop/backing_file"));
        let backing = backing.map(|path| PathBuf::from(path.trim_end_matches('\n'))).unwrap_or_default();
        if let Ok(meta) = std::fs::metadata(&backing) {
            found.push(file_identity(&meta));
            loop_files.push(backing);
            // The layers of a block device below a loop device count even without `file_systems`.
            match classify(&meta) {
                FileClass::BlockDevice => devices.push(meta.rdev()),
                _ => devices.extend(file_systems.then(|| meta.dev())),
            }
        }
    }
    found
}

/// Returns the sysfs directory of a block device.
fn device_directory(sysfs: &Path, number: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    // With the link resolved, ".." of a partition is the directory of its disk.
    let link = sysfs.join(format!("dev/block/{major}:{minor}"));
    std::fs::canonicalize(&link).unwrap_or(link)
}

/// Reads the device number (`MAJOR:MINOR`) from a device's sysfs directory.
fn device_number(directory: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(rustix::fs::makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// True if one of the lists contains the file that the other begins with.
    fn same_bytes(one: &[FileId], other: &[FileId]) -> bool {
        one.contains(&other[0]) || other.contains(&one[0])
    }

    /// A directory laid out like sysfs: `dev/block/MAJOR:MINOR` are links into `devices`.
    struct Sysfs(tempfile::TempDir);

    impl Sysfs {
        fn new() -> Self {
            let root = tempfile::tempdir().unwrap();
            std::fs::create_dir_all(root.path().join("dev/block")).unwrap();
            Self(root)
        }

        /// Adds a device in the directory `place` below `devices`, built from the devices `slaves`.
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
            layers_in(self.0.path(), block_device_identity(number), Some(number), true, &mut Vec::new())
        }

        /// True if writing to one would change the other.
        fn overlap(&self, one: u64, other: u64) -> bool {
            same_bytes(&self.layers(one), &self.layers(other))
        }
    }

    fn number(major: u32, minor: u32) -> u64 {
        rustix::fs::makedev(major, minor)
    }

    #[test]
    fn mapped_device_overlaps_its_partition_and_disk() {
        let sys = Sysfs::new();
        let disk = sys.device("pci/sda", number(8, 0), &[]);
        let part = sys.partition("pci/sda/sda1", number(8, 1));
        let other_part = sys.partition("pci/sda/sda2", number(8, 2));
        let linear = sys.device("virtual/dm-0", number(253, 0), &["pci/sda/sda1"]);
        assert_eq!(sys.layers(linear)[1..], [linear, part, disk].map(block_device_identity));
        assert!(sys.overlap(linear, part) && sys.overlap(part, linear));
        assert!(sys.overlap(linear, disk) && sys.overlap(disk, linear));
        assert!(sys.overlap(part, disk));
        assert!(!sys.overlap(linear, other_part) && !sys.overlap(part, other_part));
        let another_disk = sys.device("pci/sdb", number(8, 16), &[]);
        assert!(!sys.overlap(linear, another_disk));
    }

    #[test]
    fn volumes_of_one_disk_overlap_the_disk_but_not_each_other() {
        let sys = Sysfs::new();
        let disk = sys.device("pci/sda", number(8, 0), &[]);
        let first = sys.device("virtual/dm-0", number(253, 0), &["pci/sda"]);
        let second = sys.device("virtual/dm-1", number(253, 1), &["pci/sda"]);
        // A volume across two disks, and an encrypted volume on top of it.
        let more = sys.device("pci/sdb", number(8, 16), &[]);
        let wide = sys.device("virtual/dm-2", number(253, 2), &["pci/sda", "pci/sdb"]);
        let crypt = sys.device("virtual/dm-3", number(253, 3), &["virtual/dm-2"]);
        assert!(!sys.overlap(first, second));
        assert!(sys.overlap(first, disk) && sys.overlap(second, disk) && !sys.overlap(first, more));
        assert!(!sys.overlap(wide, first) && sys.overlap(wide, disk) && sys.overlap(wide, more));
        assert!(sys.overlap(crypt, wide) && sys.overlap(crypt, more) && !sys.overlap(crypt, second));
    }

    #[test]
    fn loop_device_layers_include_its_file_and_device() {
        let sys = Sysfs::new();
        let file = sys.0.path().join("disk.raw");
        std::fs::write(&file, b"disk").unwrap();
        let meta = std::fs::metadata(&file).unwrap();
        let disk = sys.device("pci/sda", number(8, 0), &[]);
        // A mapped device that contains the file system of the temporary directory.
        let mapped = sys.device("virtual/dm-0", meta.dev(), &["pci/sda"]);
        let over = sys.loop_over("virtual/loop0", number(7, 0), &file);
        let part = sys.partition("virtual/loop0/loop0p1", number(259, 0));
        let layers = |file_systems| {
            layers_in(sys.0.path(), block_device_identity(part), Some(part), file_systems, &mut Vec::new())
        };
        assert_eq!(
            layers(true)[1..],
            [
                block_device_identity(part),
                block_device_identity(over),
                file_identity(&meta),
                block_device_identity(mapped),
                block_device_identity(disk)
            ]
        );
        // For a target, the file system does not count: writing to the target leaves its other files
        // unchanged.
        assert_eq!(
            layers(false)[1..],
            [block_device_identity(part), block_device_identity(over), file_identity(&meta)]
        );
        let source = layers_in(sys.0.path(), file_identity(&meta), Some(meta.dev()), true, &mut Vec::new());
        assert!(same_bytes(&source, &layers(false)) && same_bytes(&source, &sys.layers(disk)));
    }

    #[test]
    fn without_sysfs_a_device_has_one_layer() {
        let nowhere = Path::new("/nonexistent");
        let (one, other) = (number(253, 0), number(253, 1));
        let layers =
            |number| layers_in(nowhere, block_device_identity(number), Some(number), true, &mut Vec::new());
        assert_eq!(layers(one), [block_device_identity(one); 2]);
        assert!(same_bytes(&layers(one), &layers(one)) && !same_bytes(&layers(one), &layers(other)));
    }

    #[test]
    fn circular_devices_are_visited_once() {
        let sys = Sysfs::new();
        let first = sys.device("virtual/dm-0", number(253, 0), &["virtual/dm-1"]);
        let second = sys.device("virtual/dm-1", number(253, 1), &["virtual/dm-0"]);
        assert_eq!(sys.layers(first)[1..], [first, second].map(block_device_identity));
    }
}
