//! Block devices for tests: loop devices over files.

use std::fs::File;
use std::path::{Path, PathBuf};

use imgtool_testing::{oracles, text};

/// Whether this machine lets us have loop devices. They are no program that could be installed: where
/// there are none (in most containers), or not for this user, such tests are skipped, which `.ci/run`
/// shows. Who may administer a machine that has them must get them when `CI` is set.
pub fn loop_devices() -> bool {
    let control = Path::new("/dev/loop-control");
    let opened = File::options().write(true).open(control);
    if let Err(e) = &opened {
        let why =
            format!("no loop devices on this machine, or not for this user: {}: {e}", control.display());
        oracles::unable(&why, may_administer() && control.exists());
    }
    opened.is_ok() && oracles::have("losetup")
}

/// Whether this user may mount file systems and the like: CAP_SYS_ADMIN, capabilities(7).
pub fn may_administer() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    effective >> CAP_SYS_ADMIN & 1 == 1
}

/// A loop device, detached when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Over a file or another device.
    pub fn over(file: &Path) -> Self {
        let output = oracles::run("losetup", &["--find", "--show", text(file)]);
        Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    }

    /// Over a disk with these partitions (first sector, sectors), devices of their own: its path with
    /// `p1`, `p2` … addpart(8) adds them, so the disk needs no partition table.
    pub fn with_partitions(file: &Path, partitions: &[(u64, u64)]) -> Self {
        let output = oracles::run("losetup", &["--find", "--show", "--partscan", text(file)]);
        let device = Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()));
        for (number, (first, count)) in (1..).zip(partitions) {
            let [number, first, count] = [number, *first, *count].map(|value: u64| value.to_string());
            oracles::run("addpart", &[text(device.path()), &number, &first, &count]);
        }
        device
    }

    /// Over a new file of these bytes.
    pub fn holding(file: &Path, bytes: &[u8]) -> Self {
        std::fs::write(file, bytes).unwrap();
        Self::over(file)
    }

    /// The device.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What is on it now.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.0).unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // Whether it works or not, the test has its result.
        let _ = std::process::Command::new("losetup").arg("-d").arg(&self.0).status();
        // While another process has it open (`losetup --find` does) it is not detached yet.
        let name = self.0.file_name().unwrap_or_default();
        let backing = Path::new("/sys/block").join(name).join("loop/backing_file");
        for _ in 0..1000 {
            if !backing.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

/// A file system that is mounted, unmounted when dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Makes an ext4 on the device and mounts it so that nothing is written to the device: it is in use
    /// and stays as it is.
    pub fn ext4_read_only(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.ext4", &["-q", "-F", text(device.path())]);
        std::fs::create_dir_all(directory).unwrap();
        oracles::run("mount", &["-o", "ro,noload", text(device.path()), text(directory)]);
        Self(directory.to_owned())
    }

    /// Makes an XFS on the device (of 300 MiB or more) and mounts it: files can share blocks there.
    pub fn xfs(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.xfs", &["-q", "-f", text(device.path())]);
        Self::mount(device, directory)
    }

    fn mount(device: &LoopDevice, directory: &Path) -> Self {
        std::fs::create_dir_all(directory).unwrap();
        oracles::run("mount", &[text(device.path()), text(directory)]);
        Self(directory.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}
