//! [`Identity`], which shows whether writing to one file changes another.

use std::fs::{File, Metadata};
use std::path::Path;

use crate::os::{self, FileClass, FileId};

/// Identity of a file or block device, together with everything below it: the disk of a partition, the parts
/// of a device-mapper or RAID device, the file behind a loop device, the files of the layers of an overlay.
/// It shows whether writing to one file changes another, regardless of their names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
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
        let mut layers = os::file_layers(meta, false);
        let mut with_file_system = os::file_layers(meta, true);
        let overlay = os::overlay_files(meta, path);
        for (below, is_written) in &overlay.files {
            with_file_system.extend(os::file_layers(below, true));
            layers.extend(is_written.then(|| os::file_layers(below, false)).into_iter().flatten());
        }
        Some(Self { layers, with_file_system, is_complete: overlay.is_complete })
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
        os::same_bytes(&self.with_file_system, &target.layers)
    }

    /// True if writing to one target changes the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        os::same_bytes(&self.layers, &other.layers)
    }

    /// True if the two could be one file although they look different: one is on an overlay whose layers this
    /// process can't see, and the other is on another file system.
    pub fn may_be_same(&self, other: &Self) -> bool {
        let device = |identity: &Self| identity.layers.first().map(|(device, _)| *device);
        !(self.is_complete && other.is_complete) && device(self) != device(other)
    }
}
