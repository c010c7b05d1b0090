//! [`Identity`], which shows whether writing to one file changes another.

use std::fs::{File, Metadata};
use std::path::Path;

use crate::os::{self, FileClass, FileId};

/// Maximum number of loop devices below each other whose files are looked at. Our limit: a loop over an overlay
/// over a loop is rare.
const MAX_NESTING: usize = 4;

/// Identity of a file or block device, together with everything below it: the disk of a partition, the parts
/// of a device-mapper or RAID device, the file behind a loop device, the files of the layers of an overlay.
/// It shows whether writing to one file changes another, regardless of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The file or device itself, then the files of an overlay's layers that a read of it may come from.
    reads: Vec<FileId>,
    /// The file or device itself, then the files of an overlay's layers that a write to it changes.
    writes: Vec<FileId>,
    /// The file or device itself, then the layers below it that a write to it changes.
    layers: Vec<FileId>,
    /// `layers`, every other file that a read may come from, the device that contains the file's file system,
    /// and the layers below it.
    with_file_system: Vec<FileId>,
    /// False if the file is on an overlay whose layers this process can't see.
    is_complete: bool,
}

impl Identity {
    /// Returns the identity of the regular file or block device at `path`, which `meta` describes; `None` for
    /// anything else.
    pub fn of(meta: &Metadata, path: &Path) -> Option<Self> {
        if !matches!(os::classify(meta), FileClass::Regular | FileClass::BlockDevice) {
            return None;
        }
        let mut identity = Self {
            reads: Vec::new(),
            writes: Vec::new(),
            layers: Vec::new(),
            with_file_system: Vec::new(),
            is_complete: true,
        };
        identity.add(meta, path, true, MAX_NESTING);
        Some(identity)
    }

    /// Adds a file or device and everything below it. With `is_written`, a write to the identified file changes
    /// this one. `nesting` bounds the number of loop devices below each other.
    fn add(&mut self, meta: &Metadata, path: &Path, is_written: bool, nesting: usize) {
        let overlay = os::overlay_files(meta, path);
        self.is_complete &= overlay.is_complete;
        let below = overlay.files.into_iter().map(|(below, changes)| (below, changes && is_written));
        for (meta, is_written) in std::iter::once((meta.clone(), is_written)).chain(below) {
            if nesting == MAX_NESTING {
                self.reads.push(os::file_identity(&meta));
                self.writes.extend(is_written.then(|| os::file_identity(&meta)));
            }
            self.with_file_system.extend(os::file_layers(&meta, true));
            let written = if is_written { os::file_layers(&meta, false) } else { Vec::new() };
            self.layers.extend(written);
            // The file behind a loop device may be on an overlay again.
            let changed = if is_written { os::loop_files(&meta, false) } else { Vec::new() };
            for file in os::loop_files(&meta, true) {
                let Some(below) = std::fs::metadata(&file).ok().filter(|_| nesting > 0) else { continue };
                self.add(&below, &file, changed.contains(&file), nesting - 1);
            }
        }
    }

    /// Returns the identity of an open file or block device; `None` for anything else.
    pub fn of_file(file: &File) -> Option<Self> {
        Self::of(&file.metadata().ok()?, &os::path_of(file))
    }

    /// Returns the device and inode of the file, or those that stand for a block device.
    pub fn id(&self) -> Option<FileId> {
        self.layers.first().copied()
    }

    /// True if both are the same file or device.
    pub fn is_same(&self, other: &Self) -> bool {
        self.layers.first() == other.layers.first()
    }

    /// True if writing to `target` changes this file: they are the same, or one is a layer of the other. Also
    /// true if `target` contains the file system of this file.
    pub fn is_changed_by(&self, target: &Self) -> bool {
        contains_any(&self.with_file_system, &target.writes) || contains_any(&target.layers, &self.reads)
    }

    /// True if writing to one target changes the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        contains_any(&self.layers, &other.writes) || contains_any(&other.layers, &self.writes)
    }

    /// True if the two could be one file although they look different: one is on an overlay whose layers this
    /// process can't see, and the other is on another file system.
    pub fn may_be_same(&self, other: &Self) -> bool {
        let device = |identity: &Self| identity.layers.first().map(|(device, _)| *device);
        !(self.is_complete && other.is_complete) && device(self) != device(other)
    }
}

/// True if `layers` contains one of `files`. A layer that both sides have is not enough: two partitions of a disk
/// have no byte in common.
fn contains_any(layers: &[FileId], files: &[FileId]) -> bool {
    files.iter().any(|file| layers.contains(file))
}
