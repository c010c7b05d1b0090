//! Opening images for the verbs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::storage::outer;
use imgtool_toolkit::{
    DeviceKind, Error, ExternalPolicy, Externals, Input, OpenOptions, Opened, Registry, Result,
};

use crate::args::InputArgs;

/// The format in which every content is legal: an image is only taken for it when told so or when
/// nothing else fits.
const RAW: &str = "raw";

/// How images are opened, from the command line.
///
/// # Errors
/// For flags that are refused.
pub fn open_options(registry: &Registry, args: &InputArgs) -> Result<OpenOptions> {
    if args.image_opts {
        return Err(Error::usage("--image-opts is not taken: images are named by plain paths")
            .hint("give the path itself, and its format with -f"));
    }
    let (chain, paths): (Vec<_>, Vec<_>) =
        args.allow_external.iter().cloned().partition(|path| path.as_os_str() == "chain");
    let policy = ExternalPolicy { chain: !chain.is_empty(), paths };
    Ok(OpenOptions {
        ignore_trailing: args.ignore_trailing,
        externals: Externals::new(registry.clone(), policy),
        ..OpenOptions::default()
    })
}

/// Opens the bytes of an image, outer compression undone.
///
/// # Errors
/// Those of [`Input::open`].
pub fn input(path: &Path, format: Option<&str>) -> Result<Input> {
    // What is said to be raw is not looked into: its content decides nothing.
    if format == Some(RAW) { Input::open_unguessed(path) } else { Input::open(path) }
}

/// Opens an image.
///
/// # Errors
/// Those of [`Registry::open`].
pub fn open(registry: &Registry, path: &Path, format: Option<&str>, options: &OpenOptions) -> Result<Opened> {
    registry.open(input(path, format)?, format, options)
}

/// What an image turned out to be: "vma in zstd".
pub fn describe_format(opened: &Opened) -> String {
    let mut text = opened.driver.name().to_owned();
    for compression in opened.compression.iter().rev() {
        text.push_str(" in ");
        text.push_str(compression.name());
    }
    text
}

/// A path for a person.
pub fn show(path: &Path) -> String {
    match path.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => escape_control(&path.to_string_lossy()),
    }
}

/// A file name without the extensions that name its format and compression: "vm" of "vm.vma.zst".
pub fn stem(registry: &Registry, path: &Path) -> String {
    let path = without_compression(path);
    let Some(name) = path.file_name().map(OsStr::to_string_lossy) else { return "disk".to_owned() };
    if name == "-" {
        return "disk".to_owned();
    }
    let known = |ext: &str| registry.drivers().any(|driver| driver.extensions().contains(&ext));
    match name.rsplit_once('.') {
        Some((stem, ext)) if !stem.is_empty() && known(&ext.to_ascii_lowercase()) => stem.to_owned(),
        _ => name.into_owned(),
    }
}

/// A path without the extension of an outer compression.
pub fn without_compression(path: &Path) -> PathBuf {
    if outer::by_name(path).is_some() { path.with_extension("") } else { path.to_owned() }
}

/// A snapshot as qemu-img takes it: `snapshot.id=ID`, `snapshot.name=NAME`, or a name or ID alone.
pub fn snapshot_name(text: &str) -> String {
    let bare = text.strip_prefix("snapshot.id=").or_else(|| text.strip_prefix("snapshot.name="));
    bare.unwrap_or(text).to_owned()
}

/// What a device stands for, in a word; the JSON has the same.
pub fn kind_name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Disk => "disk",
        DeviceKind::VmState => "vmstate",
    }
}
