//! Hints for a source that does not exist: the most similar name, or the missing directory.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, Location, suggest};

/// Maximum number of directory entries to compare. Our limit: an error must appear at once.
const MAX_ENTRIES: usize = 10_000;

/// Adds a hint to the error for a `location` that does not exist.
pub fn explain(error: Error, location: &Location) -> Error {
    let is_missing = error.io_error().is_some_and(|cause| cause.kind() == io::ErrorKind::NotFound);
    match location.path().and_then(hint).filter(|_| is_missing) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn hint(path: &Path) -> Option<String> {
    let text = path.to_string_lossy();
    if ["json:", "nbd:", "driver=", "fat:"].iter().any(|start| text.starts_with(start)) {
        return Some("images are named by plain paths".to_owned());
    }
    let parent = path.parent()?;
    let directory = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    if !directory.is_dir() {
        return Some(format!("directory {} does not exist", escape_control(&parent.to_string_lossy())));
    }
    let wanted = path.file_name().and_then(OsStr::to_str)?;
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .ok()?
        .take(MAX_ENTRIES)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        // Compare without extensions: a common extension does not make two names similar.
        .filter(|name| !name.starts_with('.') && suggest::nearest(stem(wanted), [stem(name)]).is_some())
        .collect();
    names.sort();
    let near = suggest::nearest(wanted, names.iter().map(String::as_str))?;
    Some(format!("did you mean '{}'?", escape_control(&parent.join(near).to_string_lossy())))
}

/// Returns the part of a name before its first dot.
fn stem(name: &str) -> &str {
    name.split_once('.').map_or(name, |(stem, _)| stem)
}
