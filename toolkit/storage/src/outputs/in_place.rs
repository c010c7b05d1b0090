//! Outputs without a temporary name: existing files and devices to overwrite, images to change, and new files in the
//! place of those that no rename can replace.

use std::fs::File;
use std::path::Path;

use imgtool_core::{Error, Location, Output, Remedy, Result};

use super::Outputs;
use crate::file;
use crate::identity::Identity;
use crate::os::{self, FileClass};

/// A file that no rename can replace: it is emptied, and then written in place.
#[derive(Debug)]
pub(super) struct Emptied {
    file: File,
    output: Output,
    /// True if it had content, which is lost.
    had_content: bool,
}

impl Emptied {
    /// Empties the file again, so that an unfinished output does not look like a finished one. What another program
    /// has written before this run did stays.
    pub(super) fn empty(&self) {
        if self.output.was_changed() || self.output.was_resized() {
            // The run has failed already, so nothing follows from a failure.
            let _ = self.file.set_len(0);
        }
    }
}

/// Returns the reason why no rename can replace the existing file at `path`; `None` if one can.
pub(super) fn reason(path: &Path) -> Option<&'static str> {
    if os::is_mount_point(path) {
        return Some("is a mount point");
    }
    let directory = path.parent()?;
    (!os::may_change_directory(directory)).then_some("is in a directory that this user can't change")
}

/// Treatment of an existing target that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InUse {
    /// Refuse it.
    Refused,
    /// Refuse it, and say that force writes into it.
    Forceable,
    /// Write into it.
    Accepted,
}

impl InUse {
    /// Returns the remedy for a target in use; `advice` makes it free.
    fn remedy(self, advice: &'static str) -> Remedy {
        match self {
            Self::Refused => Remedy::Advice(format!("nothing was written; {advice}").into()),
            Self::Forceable | Self::Accepted => Remedy::ForceWrite(advice.into()),
        }
    }
}

impl Outputs {
    /// Opens an existing block device or file to overwrite it in place. It keeps its length.
    ///
    /// `reads_as_zero` is true if the target is known to contain only zeros. `force` opens a target even if
    /// it is mounted, locked or otherwise in use.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if it is a source or in use; [`imgtool_core::ErrorKind::Usage`]
    /// if it is another output, a directory or a stream; [`imgtool_core::ErrorKind::Io`].
    pub fn existing(&mut self, path: &Path, reads_as_zero: bool, force: bool) -> Result<Output> {
        let in_use = if force { InUse::Accepted } else { InUse::Forceable };
        let (file, identity) = self.open_existing(path, in_use)?;
        let output = file::existing(path, file, reads_as_zero)?;
        self.claimed.extend(identity);
        self.others.push(output.clone());
        Ok(output)
    }

    /// Opens an existing block device or file that contains an image, to change the image in place. A file
    /// grows as needed. An image in use is refused: two writers of its tables would destroy it.
    ///
    /// # Errors
    /// Same as [`Outputs::existing`].
    pub fn existing_image(&mut self, path: &Path) -> Result<Output> {
        let (file, identity) = self.open_existing(path, InUse::Refused)?;
        let output = file::existing_image(path, file)?;
        self.claimed.extend(identity);
        self.others.push(output.clone());
        Ok(output)
    }

    /// Like [`Outputs::existing_image`], for a file that the image names, which may be one that the user allows
    /// images to open ([`Outputs::protect_allowed`]).
    ///
    /// # Errors
    /// Same as [`Outputs::existing`].
    pub fn existing_part(&mut self, path: &Path) -> Result<Output> {
        let allowed = std::mem::take(&mut self.allowed);
        let output = self.existing_image(path);
        self.allowed = allowed;
        output
    }

    /// Opens an existing target for reading and writing, unless it is in use.
    fn open_existing(&mut self, path: &Path, in_use: InUse) -> Result<(File, Option<Identity>)> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io("open for writing", e).path(path))?;
        let identity = Identity::of(&meta, path);
        self.check_free(path, identity.as_ref(), &self.claimed)?;
        let file = match os::classify(&meta) {
            FileClass::BlockDevice => {
                os::open_block_device(path, in_use != InUse::Accepted).map_err(|e| {
                    if e.kind() == std::io::ErrorKind::ResourceBusy {
                        Error::refused("the device is mounted or otherwise in use")
                            .path(path)
                            .remedied_by(in_use.remedy("unmount it"))
                    } else {
                        Error::io("open for writing", e).path(path)
                    }
                })?
            }
            FileClass::Regular => File::options()
                .read(true)
                .write(true)
                .open(path)
                .map_err(|e| Error::io("open for writing", e).path(path))?,
            FileClass::Directory => return Err(Error::usage("is a directory").path(path)),
            FileClass::Stream => return Err(Error::usage("is neither a file nor a block device").path(path)),
        };
        let busy =
            |error: Error| error.path(path).remedied_by(in_use.remedy("stop the program that uses it"));
        let locked = self.lock_target(path, &file);
        let used = os::used_elsewhere(&file).map(|how| Error::refused(format!("in use: {how}")));
        match locked.err().or(used) {
            Some(error) if in_use != InUse::Accepted => return Err(busy(error)),
            Some(error) => self.doubts.push(format!(
                "{} was written although it is {}; that program may overwrite it again",
                Location::from(path),
                error.message()
            )),
            None => {}
        }
        Ok((file, identity))
    }

    /// Empties the existing file at `final_path`, which no rename can replace for the reason `why`, to write an
    /// output in place. A drop without a commit empties it again.
    pub(super) fn create_in_place(
        &mut self,
        path: &Path,
        final_path: &Path,
        overwrite: bool,
        why: &str,
    ) -> Result<Output> {
        let failed = |e| Error::io("open for writing", e).path(path);
        let file = File::options().read(true).write(true).open(final_path).map_err(failed)?;
        let in_use = |e: Error| e.path(path).hint("stop the program that uses it, or choose another target");
        self.lock_target(path, &file).map_err(in_use)?;
        if let Some(how) = os::used_elsewhere(&file) {
            return Err(in_use(Error::refused(format!("in use: {how}"))));
        }
        let had_content = !os::is_empty(&file).map_err(failed)?;
        if had_content && !overwrite {
            return Err(Error::refused("already exists").path(path).remedied_by(Remedy::Overwrite));
        }
        self.cleaner.register(|paths| {
            paths.emptied.push(file.try_clone().map_err(failed)?);
            Ok(())
        })?;
        let own = file.try_clone().map_err(failed)?;
        if had_content {
            file.set_len(0).map_err(failed)?;
        }
        self.doubts.push(format!(
            "{} {why} and was written in place: until the end of the run, other programs saw an \
             unfinished output under this name",
            Location::from(path)
        ));
        self.claimed.extend(file.metadata().ok().and_then(|meta| Identity::of(&meta, final_path)));
        let output = file::new_file(path, file);
        self.emptied.push(Emptied { file: own, output: output.clone(), had_content });
        self.others.push(output.clone());
        Ok(output)
    }

    /// Returns the locations of the files without a temporary name that had content. It is lost.
    pub fn overwritten(&self) -> Vec<Location> {
        let lost = self.emptied.iter().filter(|emptied| emptied.had_content);
        lost.map(|emptied| emptied.output.location().clone()).collect()
    }
}
