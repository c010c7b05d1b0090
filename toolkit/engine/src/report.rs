//! [`Report`], the result of a run: its outputs, losses and notes.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use imgtool_core::{Location, Loss};

/// Result of a run.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
#[must_use = "with salvage, a run can succeed with losses"]
pub struct Report {
    /// Images, in the order of the layout.
    pub outputs: Vec<OutputReport>,
    /// Configurations written as separate files.
    pub files: Vec<FileReport>,
    /// Ranges that salvage could not restore or verify, with the name of the disk. An empty range at the end
    /// of a disk means that the disk as a whole can't be proven complete.
    pub losses: Vec<(String, Loss)>,
    /// Notes for the user.
    pub notes: Vec<Note>,
    /// True if the outputs were read back and compared.
    pub verified: bool,
    /// Number of guest bytes that were read from the sources as data.
    pub data: u64,
    /// Duration of the run, with the copies of sources to temporary storage before it.
    pub elapsed: Duration,
}

impl Report {
    /// True if there are no losses.
    pub fn is_complete(&self) -> bool {
        self.losses.is_empty()
    }

    /// Returns the total virtual size of all disks, in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.outputs.iter().fold(0, |sum, output| sum.saturating_add(output.virtual_size()))
    }
}

/// Report on an image.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct OutputReport {
    /// Location.
    pub location: Location,
    /// Name of the format.
    pub format: &'static str,
    /// Name of the outer compression, if any.
    pub compression: Option<&'static str>,
    /// Disks, in the image's order.
    pub disks: Vec<DiskReport>,
    /// Number of persistent bitmaps that were copied into the image.
    pub bitmaps: usize,
    /// Number of bytes that a new file takes on disk; for other outputs, the number of bytes written.
    pub stored: u64,
}

impl OutputReport {
    /// Returns the total virtual size of the disks, in bytes.
    pub fn virtual_size(&self) -> u64 {
        self.disks.iter().fold(0, |sum, disk| sum.saturating_add(disk.virtual_size))
    }
}

/// Report on a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskReport {
    /// Name; untrusted.
    pub name: String,
    /// Number of guest bytes copied: the virtual size in the source, or 0 if the run copied no content.
    pub virtual_size: u64,
    /// Number of these bytes that were zeros without data.
    pub zero: u64,
}

/// Report on a configuration written as a separate file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileReport {
    /// Location of the file.
    pub location: Location,
    /// Name of the configuration in the source; untrusted.
    pub name: String,
    /// Length in bytes.
    pub len: u64,
}

/// A note for the user about a plan or run.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Note {
    /// A sentence from a driver or the plan.
    Text(String),
    /// Names of configurations left out, since the file of a single disk can't store them.
    ConfigurationsLeftOut(Vec<String>),
    /// Path of a removed file that was left by a killed run.
    Swept(PathBuf),
    /// A sentence about a source that changed while it was read, or whose name leads to another file now.
    SourceChanged(String),
    /// Standard output is closed or `/dev/null`: the output written to it is lost.
    StdoutClosed,
    /// Directory whose file system can neither rename without replacing nor link.
    UnsafeNaming(PathBuf),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) | Self::SourceChanged(text) => f.write_str(text),
            Self::ConfigurationsLeftOut(names) => write!(f, "not written: {}", names.join(", ")),
            Self::Swept(path) => write!(f, "removed {}, left by a killed run", path.display()),
            Self::StdoutClosed => {
                f.write_str("standard output is closed, or /dev/null: nothing of what was written is kept")
            }
            Self::UnsafeNaming(path) => write!(
                f,
                "the file system of {} can neither rename without replacing nor link: an output's name is an \
                 empty file for a moment, and a program that puts a file there in that moment loses it",
                path.display()
            ),
        }
    }
}
