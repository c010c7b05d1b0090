//! Block devices for tests: loop devices over files.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::oracles;
use super::text;

/// Whether this machine lets us have loop devices. They are no program that could be installed:
/// without them (in most containers) such tests say so and pass.
pub fn loop_devices() -> bool {
    let allowed = File::options().write(true).open("/dev/loop-control").is_ok() && oracles::have("losetup");
    if !allowed {
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: no loop devices on this machine");
    }
    allowed
}

/// A loop device, detached when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// Over a file or another device.
    pub fn over(file: &Path) -> Self {
        let output = oracles::run("losetup", &["--find", "--show", text(file)]);
        Self(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
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
        // While somebody else looks at it (`losetup --find` does) it is not detached yet.
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
    /// Makes an ext4 on the device and mounts it.
    pub fn ext4(device: &LoopDevice, directory: &Path) -> Self {
        oracles::run("mkfs.ext4", &["-q", "-F", text(device.path())]);
        Self::mount(device, directory)
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
