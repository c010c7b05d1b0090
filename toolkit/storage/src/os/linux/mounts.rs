//! Mounted file systems that may change a file or block device, from mountinfo.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::unix::block_device_identity;
use super::super::{FileClass, classify, file_identity};
use super::layers::layers_of_device;
use super::overlay::unescaped;

/// Returns where a file system is mounted that can write to the file or block device; `None` if there is none, or
/// if the mounts can't be read. A file is written through a loop device, a disk also through its partitions.
pub fn writable_mount_over(meta: &Metadata) -> Option<String> {
    let own = file_identity(meta);
    let table = std::fs::read("/proc/self/mountinfo").ok()?;
    let mut seen = Vec::new();
    table.split(|byte| *byte == b'\n').filter_map(writable_mount).find_map(|(device, point)| {
        // A file system is mounted once for each bind mount.
        if seen.contains(&device) {
            return None;
        }
        seen.push(device);
        let is_over = own == block_device_identity(device) || layers_of_device(device).contains(&own);
        is_over.then(|| String::from_utf8_lossy(&point).into_owned())
    })
}

/// Parses a line of mountinfo (proc_pid_mountinfo(5)). Returns the device number and the mount point of a file system
/// that is on a block device and can be written.
fn writable_mount(line: &[u8]) -> Option<(u64, Vec<u8>)> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = std::str::from_utf8(fields.nth(2)?).ok()?;
    let point = unescaped(fields.nth(1)?);
    // The options of the mount are of no use here: another mount of the file system may be writable.
    fields.find(|field| *field == b"-")?;
    let (source, options) = (unescaped(fields.nth(1)?), fields.next()?);
    let is_writable = options.split(|byte| *byte == b',').any(|option| option == b"rw");
    if !source.starts_with(b"/dev/") || !is_writable {
        return None;
    }
    let (major, minor) = number.split_once(':')?;
    let (major, minor) = (major.parse().ok()?, minor.parse().ok()?);
    if major != 0 {
        return Some((rustix::fs::makedev(major, minor), point));
    }
    // btrfs has no number of its device there.
    let source = std::fs::metadata(Path::new(std::str::from_utf8(&source).ok()?)).ok()?;
    (classify(&source) == FileClass::BlockDevice).then(|| (source.rdev(), point))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn only_writable_file_systems_on_devices_count() {
        let of = |line: &str| writable_mount(line.as_bytes());
        let point = b"/mnt/a b".to_vec();
        let device = rustix::fs::makedev(7, 3);
        let line = r"65 43 7:3 / /mnt/a\040b ro,relatime shared:1 - ext4 /dev/loop3 rw,errors=continue";
        assert_eq!(of(line), Some((device, point)));
        for other in [
            "65 43 7:3 / /mnt rw shared:1 - ext4 /dev/loop3 ro",
            "65 43 0:39 / /mnt rw - tmpfs tmpfs rw",
            "65 43 7:3 / /mnt rw",
            "65 43 x / /mnt rw - ext4 /dev/loop3 rw",
            "",
        ] {
            assert_eq!(of(other), None, "{other}");
        }
    }
}
