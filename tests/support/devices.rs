//! Block devices for tests: loop devices over files, and mounted file systems on them.

use std::fs::File;
use std::path::{Path, PathBuf};

use imgtool_testing::{oracles, text};

/// True if this user can use loop devices. If not, as in most containers, reports the running test as
/// skipped. With `CI` set, fails instead if the user may administer the system and it has loop devices.
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

/// True if this user may mount file systems and the like: CAP_SYS_ADMIN, capabilities(7).
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
    /// Attaches a loop device to a file or another device.
    pub fn over(file: &Path) -> Self {
        let output = oracles::run("losetup", &["--find", "--show", text(file)]);
        Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
    }

    /// Attaches a loop device to a disk with these partitions (first sector, number of sectors). The device
    /// of each is the path of the disk with `p1`, `p2` … addpart(8) adds them, so the disk needs no partition
    /// table.
    pub fn with_partitions(file: &Path, partitions: &[(u64, u64)]) -> Self {
        let output = oracles::run("losetup", &["--find", "--show", "--partscan", text(file)]);
        let device = Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()));
        for (number, (first, count)) in (1..).zip(partitions) {
            let [number, first, count] = [number, *first, *count].map(|value: u64| value.to_string());
            oracles::run("addpart", &[text(device.path()), &number, &first, &count]);
        }
        device
    }

    /// Attaches a loop device to a new file of these bytes.
    pub fn holding(file: &Path, bytes: &[u8]) -> Self {
        std::fs::write(file, bytes).unwrap();
        Self::over(file)
    }

    /// Returns the path of the device.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Returns the current content of the device.
    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.0).unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // A failure does not change the result of the test.
        let _ = std::process::Command::new("losetup").arg("-d").arg(&self.0).status();
        // The kernel does not detach the device while another process has it open, like `losetup --find`.
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

/// A mounted file system, unmounted when dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    /// Makes an ext4 file system on the device, and mounts it without writing to the device: it is in use and
    /// unchanged.
    pub fn ext4_read_only(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.ext4", &["-q", "-F", text(device.path())]);
        std::fs::create_dir_all(directory).unwrap();
        oracles::run("mount", &["-o", "ro,noload", text(device.path()), text(directory)]);
        Self(directory.to_owned())
    }

    /// Makes an ext4 file system on the device, and mounts it for writing.
    pub fn ext4(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.ext4", &["-q", "-F", text(device.path())]);
        Self::mount(device, directory)
    }

    /// Makes an XFS file system, whose files can share blocks, on the device (at least 300 MiB) and mounts
    /// it.
    pub fn xfs(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.xfs", &["-q", "-f", text(device.path())]);
        Self::mount(device, directory)
    }

    /// Makes a btrfs file system on the device (at least 128 MiB) and mounts it.
    pub fn btrfs(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.btrfs", &["-q", "-f", text(device.path())]);
        Self::mount(device, directory)
    }

    /// Mounts an overlay of directories, the topmost of `lower` first; `None` if it can't be mounted here.
    pub fn overlay(lower: &[&Path], upper: &Path, work: &Path, directory: &Path) -> Option<Self> {
        for made in lower.iter().copied().chain([upper, work, directory]) {
            std::fs::create_dir_all(made).unwrap();
        }
        let lower: Vec<&str> = lower.iter().copied().map(text).collect();
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.join(":"), text(upper), text(work));
        let mount = std::process::Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o", &options, text(directory)])
            .output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        if !mounted {
            oracles::unable("no overlay can be mounted on this machine, or by this user", false);
        }
        mounted.then(|| Self(directory.to_owned()))
    }

    /// Mounts a single file over another file; `None` if that is not possible here.
    pub fn bind(file: &Path, over: &Path) -> Option<Self> {
        let mount = std::process::Command::new("mount").args(["--bind", text(file), text(over)]).output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        if !mounted {
            oracles::unable("no file can be mounted on this machine, or by this user", false);
        }
        mounted.then(|| Self(over.to_owned()))
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
