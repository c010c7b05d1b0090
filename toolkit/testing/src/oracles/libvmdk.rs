//! libvmdk (vmdkmount) and 7-Zip, which read VMDK.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{run, unable};
use crate::text;

/// Returns the content of a disk image as 7-Zip reads it.
#[track_caller]
pub fn seven_zip(path: &Path, format: &str) -> Vec<u8> {
    // Without the format, 7-Zip also opens a file system in the disk.
    run("7zz", &["x", "-so", &format!("-t{format}"), text(path)]).stdout
}

/// Content of a VMDK image, mounted by vmdkmount and unmounted on drop.
#[derive(Debug)]
pub struct VmdkMount(PathBuf);

impl VmdkMount {
    /// Mounts the image on a new directory. `None` if this user can't mount with FUSE, which skips the test.
    #[track_caller]
    pub fn of(path: &Path, directory: &Path) -> Option<Self> {
        std::fs::create_dir(directory).unwrap();
        let mounted = Command::new("vmdkmount").args([path, directory]).output().unwrap();
        if !mounted.status.success() {
            // No package provides the device. For a user who can open it, mounting must work.
            let usable = File::options().read(true).write(true).open("/dev/fuse").is_ok();
            unable(&format!("vmdkmount: FUSE does not work here: {mounted:?}"), usable);
            return None;
        }
        Some(Self(directory.to_owned()))
    }

    /// Returns the path of the guest's content as a raw file.
    pub fn raw(&self) -> PathBuf {
        self.0.join("vmdk1")
    }
}

impl Drop for VmdkMount {
    fn drop(&mut self) {
        let _ = Command::new("fusermount").args(["-u", text(&self.0)]).status();
    }
}
