//! libvhdi: vhdiinfo and vhdimount.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{run, unable};
use crate::text;

/// Returns the output of vhdiinfo for a file.
#[track_caller]
pub fn vhdi_info(path: &Path) -> String {
    String::from_utf8_lossy(&run("vhdiinfo", &[text(path)]).stdout).into_owned()
}

/// Content of a VHD or VHDX file, mounted by vhdimount and unmounted on drop.
#[derive(Debug)]
pub struct VhdiMount(PathBuf);

impl VhdiMount {
    /// Mounts the file on a new directory. `None` if this user can't mount with FUSE, which skips the test.
    #[track_caller]
    pub fn of(path: &Path, directory: &Path) -> Option<Self> {
        std::fs::create_dir(directory).unwrap();
        let mounted = Command::new("vhdimount").args([path, directory]).output().unwrap();
        if !mounted.status.success() {
            // No package provides the device. For a user who can open it, mounting must work.
            let usable = File::options().read(true).write(true).open("/dev/fuse").is_ok();
            unable(&format!("vhdimount: FUSE does not work here: {mounted:?}"), usable);
            return None;
        }
        Some(Self(directory.to_owned()))
    }

    /// Returns the path of the guest's content as a raw file.
    pub fn raw(&self) -> PathBuf {
        self.0.join("vhdi1")
    }
}

impl Drop for VhdiMount {
    fn drop(&mut self) {
        let _ = Command::new("fusermount").args(["-u", text(&self.0)]).status();
    }
}
