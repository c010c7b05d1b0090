//! Opening images for the verbs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::storage::outer;
use imgtool_toolkit::{
    Device, DeviceKind, Error, ExternalPolicy, Externals, Input, OpenOptions, Opened, RandomAccess, Registry,
    Result, suggest,
};

use crate::args::InputArgs;

mod blank;
mod foreign;
mod missing;

pub use blank::Blank;
pub use foreign::{check_name, driver};

/// The format in which every content is legal: an image is only taken for it when told so or when
/// nothing else fits.
const RAW: &str = "raw";

/// How images are opened, from the command line.
///
/// # Errors
/// For flags that are refused.
pub fn open_options(registry: &Registry, args: &InputArgs) -> Result<OpenOptions> {
    refuse(args)?;
    let (chain, paths): (Vec<_>, Vec<_>) =
        args.allow_external.iter().cloned().partition(|path| path.as_os_str() == "chain");
    let policy = ExternalPolicy { chain: !chain.is_empty(), paths };
    Ok(OpenOptions {
        ignore_trailing: args.ignore_trailing,
        externals: Externals::new(registry.clone(), policy),
        ..OpenOptions::default()
    })
}

/// Refuses what is not served, with the reason.
///
/// # Errors
/// For these flags.
pub fn refuse(args: &InputArgs) -> Result<()> {
    if args.image_opts {
        return Err(Error::usage("--image-opts is not taken: images are named by plain paths")
            .hint("give the path itself, and its format with -f"));
    }
    refuse_objects(&args.object)
}

/// [`refuse`], for `--object`.
///
/// # Errors
/// When there is one.
pub fn refuse_objects(objects: &[String]) -> Result<()> {
    if objects.is_empty() {
        return Ok(());
    }
    Err(Error::usage("--object is not taken: no encrypted or remote image is opened")
        .hint("leave it out; qemu-img reads such an image into one that imgtool can read"))
}

/// Opens the bytes of an image, outer compression undone.
///
/// # Errors
/// Those of [`Input::open`].
pub fn input(registry: &Registry, path: &Path, format: Option<&str>) -> Result<Input> {
    if let Some(name) = format {
        driver(registry, name)?;
    }
    open_bytes(path, format).map_err(|error| missing::explain(error, path))
}

fn open_bytes(path: &Path, format: Option<&str>) -> Result<Input> {
    // What is said to be raw is not looked into: its content decides nothing.
    if format == Some(RAW) {
        return Input::open_unguessed(path);
    }
    let input = Input::open(path)?;
    if format.is_none()
        && let Some(foreign) = foreign::by_content(&input.head()?)
    {
        return Err(Error::unsupported(format!("{foreign} images are not read yet"))
            .path(path)
            .hint("qemu-img converts it to qcow2; -f raw takes its bytes as they are"));
    }
    Ok(input)
}

/// Opens an image.
///
/// # Errors
/// Those of [`Registry::open`].
pub fn open(registry: &Registry, path: &Path, format: Option<&str>, options: &OpenOptions) -> Result<Opened> {
    registry.open(input(registry, path, format)?, format, options)
}

/// Opens an image so that any part of it can be read: what comes as a stream is copied to temporary
/// storage first.
///
/// # Errors
/// Those of [`Registry::open`] and [`Input::spool`].
pub fn open_random(
    registry: &Registry,
    path: &Path,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Opened> {
    let mut input = input(registry, path, format)?;
    if input.is_stream() {
        input = input.spool()?;
    }
    registry.open(input, format, options)
}

/// Its random half, which [`open_random`] has seen to.
///
/// # Errors
/// When the driver can only read it in one pass all the same.
pub fn random(opened: &Opened) -> Result<&dyn RandomAccess> {
    opened
        .source
        .random()
        .ok_or_else(|| Error::unsupported("the image can only be read in one pass").path(&opened.path))
}

/// The devices called by one of `wanted`; all, if none is wanted.
///
/// # Errors
/// When a name fits no device.
pub fn select(opened: &Opened, wanted: &[String]) -> Result<Vec<Device>> {
    let devices = &opened.source.info().devices;
    if let Some(missing) = wanted.iter().find(|want| !devices.iter().any(|device| device.name == **want)) {
        let known = devices.iter().map(|device| device.name.as_str());
        return Err(Error::usage(format!("no device is called '{missing}'"))
            .path(&opened.path)
            .hint(suggest::hint(missing, "devices", known)));
    }
    let is_wanted = |device: &&Device| wanted.is_empty() || wanted.contains(&device.name);
    Ok(devices.iter().filter(is_wanted).cloned().collect())
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

/// The files that an image names, as far as it names paths: they are not to be written over.
pub fn named_files(opened: &Opened) -> Vec<PathBuf> {
    let directory = opened.path.parent().unwrap_or(Path::new(""));
    let references = &opened.source.info().references;
    references.iter().map(|reference| resolve(directory, &reference.name)).collect()
}

/// A name in an image is relative to the image's directory.
pub fn resolve(directory: &Path, name: &str) -> PathBuf {
    directory.join(name.strip_prefix("file:").unwrap_or(name))
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
