//! The command line as people and scripts see it: arguments, exit codes, texts, targets.

use imgtool_testing::{images, tempdir};

mod block_devices;
mod changes;
mod commands;
mod differences;
mod format_options;
mod image_locks;
mod image_names;
mod info;
mod json_reference;
mod machines;
mod map_svg;
mod measure;
mod outputs;
mod platforms;
mod progress;
mod protocol_names;
mod recipes;
mod same_file;
mod shell;
mod sizes;
mod standing_targets;
mod strict_compare;
mod targets;
mod texts;
mod unknown_contents;
mod usage;

/// Creates a directory that contains `disk.raw`.
fn with_disk() -> tempfile::TempDir {
    let dir = tempdir();
    images::every_mask().write_raw(&dir.path().join("disk.raw"));
    dir
}
