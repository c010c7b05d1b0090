//! What to say about a source that is not there.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Error, suggest};

/// Entries of a directory that are looked at for a similar name. Ours: an error must not take long.
const MAX_ENTRIES: usize = 10_000;

/// An error with what was probably meant, if it says that the file is not there.
pub fn explain(error: Error, path: &Path) -> Error {
    let is_missing = error.io_error().is_some_and(|cause| cause.kind() == io::ErrorKind::NotFound);
    match hint(path).filter(|_| is_missing) {
        Some(hint) => error.hint(hint),
        None => error,
    }
}

fn hint(path: &Path) -> Option<String> {
    let text = path.to_string_lossy();
    if text.contains("://") {
        return Some(
            "imgtool reads files, block devices and pipes: 'curl -sL URL | imgtool convert - DEST', or nbdcopy"
                .to_owned(),
        );
    }
    if ["json:", "file:", "nbd:", "driver=", "fat:"].iter().any(|start| text.starts_with(start)) {
        return Some("images are named by plain paths, their format by -f".to_owned());
    }
    let parent = path.parent()?;
    let directory = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    if !directory.is_dir() {
        return Some(format!("there is no directory {}", escape_control(&parent.to_string_lossy())));
    }
    let wanted = path.file_name().and_then(OsStr::to_str)?;
    let mut names: Vec<String> = std::fs::read_dir(directory)
        .ok()?
        .take(MAX_ENTRIES)
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        // An extension that both have does not make names similar.
        .filter(|name| !name.starts_with('.') && suggest::nearest(stem(wanted), [stem(name)]).is_some())
        .collect();
    names.sort();
    let near = suggest::nearest(wanted, names.iter().map(String::as_str))?;
    Some(format!("did you mean '{}'?", escape_control(&parent.join(near).to_string_lossy())))
}

/// A name up to its first dot.
fn stem(name: &str) -> &str {
    name.split_once('.').map_or(name, |(stem, _)| stem)
}
