//! Opens images that the user names on the command line, and formats their names for messages.

use std::ffi::OsStr;
use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{CancelToken, DeviceKind, Error, Location, Memory, OpenOptions, Registry, Result};
use imgtool_engine::{ExternalPolicy, OpenSettings, Opened, PolicyOpener, open as opening};
use imgtool_storage::Compression;

use crate::args::InputArgs;
use crate::secrets::SecretSource;
use crate::{compat, report};

/// Returns the settings for opening images. Reads the passphrase, which a descriptor supplies only once.
///
/// # Errors
/// Same as [`refuse`], and if the passphrase can't be read.
pub fn open_settings(args: &InputArgs) -> Result<OpenSettings> {
    refuse(args)?;
    let (chain, paths): (Vec<_>, Vec<_>) =
        args.allow_external.iter().cloned().partition(|path| path.as_os_str() == "chain");
    Ok(OpenSettings {
        ignore_trailing: args.ignore_trailing,
        force_share: args.force_share,
        plain: compat::is_on(),
        policy: ExternalPolicy { chain: !chain.is_empty() || compat::is_on(), paths },
        secret: args.secret.as_ref().map(SecretSource::read).transpose()?,
        memory: args.memory.map_or_else(Memory::default, Memory::new),
        ..OpenSettings::default()
    })
}

/// Returns the settings of [`open_settings`] as options for drivers.
///
/// # Errors
/// Same as [`open_settings`].
pub fn open_options(registry: &Registry, args: &InputArgs) -> Result<OpenOptions> {
    let settings = open_settings(args)?;
    Ok(settings.options(&PolicyOpener::new(registry.clone(), settings.policy.clone())))
}

/// Refuses flags of qemu-img that are not supported.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if one of them was given.
pub fn refuse(args: &InputArgs) -> Result<()> {
    if args.image_opts {
        return Err(Error::usage("--image-opts is not supported: images are named by plain paths")
            .hint("give the path itself, and its format with -f"));
    }
    refuse_objects(&args.object)
}

/// Refuses `--object`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if it was given.
pub fn refuse_objects(objects: &[String]) -> Result<()> {
    if objects.is_empty() {
        return Ok(());
    }
    Err(Error::usage(
        "--object is not supported: a passphrase comes from a file, the environment or a descriptor",
    )
    .hint("--secret file=PATH, env=NAME or fd=N; --target-secret for a new image"))
}

/// Protocols by which qemu-img opens images. A plain path may contain a colon as well, but is then called by another
/// name (`./nbd:disk`), as for qemu-img.
const PROTOCOLS: [&str; 23] = [
    "json",
    "nbd",
    "nbd+tcp",
    "nbd+unix",
    "ssh",
    "http",
    "https",
    "ftp",
    "ftps",
    "iscsi",
    "rbd",
    "gluster",
    "nfs",
    "fat",
    "blkdebug",
    "blklogwrites",
    "blkverify",
    "copy-on-read",
    "host_cdrom",
    "host_device",
    "null-aio",
    "null-co",
    "zeroinit",
];

/// Refuses a name with a protocol of qemu-img that is not supported. A URL is refused when it is opened.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for such a name.
pub fn refuse_protocol(name: &OsStr) -> Result<()> {
    let text = name.to_str().unwrap_or_default();
    match text.split_once(':') {
        Some((protocol, rest)) if PROTOCOLS.contains(&protocol) && !rest.starts_with("//") => {
            Err(Error::usage(format!("{protocol}: is not supported: images are named by plain paths"))
                .path(Location::from(Path::new(name)))
                .hint(format!("a file of this name is ./{}", escape_control(text))))
        }
        _ => Ok(()),
    }
}

/// Returns the location of a source that the user named.
///
/// # Errors
/// Same as [`refuse_protocol`].
pub fn source(name: &OsStr) -> Result<Location> {
    refuse_protocol(name)?;
    Ok(Location::source(name))
}

/// Opens an image that the user named.
///
/// # Errors
/// If it can't be opened.
pub fn open(
    registry: &Registry,
    name: &OsStr,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Opened> {
    let opened = opening::open(registry, &source(name)?, format, options, &CancelToken::new())?;
    note_unrecognised(&opened);
    Ok(opened)
}

/// Opens an image that the user named, for random access.
///
/// # Errors
/// If it can't be opened or, for a stream, copied to temporary storage.
pub fn open_random(
    registry: &Registry,
    name: &OsStr,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Opened> {
    let opened = opening::open_random(registry, &source(name)?, format, options, &CancelToken::new())?;
    note_unrecognised(&opened);
    Ok(opened)
}

/// Prints a note if only the lack of any other format makes the image a raw disk.
pub fn note_unrecognised(opened: &Opened) {
    if opened.unrecognised {
        let name = opened.driver.name();
        report::note(&format!("{}: no known format, read as {name} (-f {name} to silence)", opened.location));
    }
}

/// Formats the name of an image for messages: `-` becomes "standard input".
pub fn show(name: &OsStr) -> String {
    match name.to_str() {
        Some("-") => "standard input".to_owned(),
        _ => escape_control(&name.to_string_lossy()),
    }
}

/// Formats the name of a format with the compression around it, outermost first: "vma in zstd".
pub fn format_with_compression(format: &str, compression: &[Compression]) -> String {
    let mut text = format.to_owned();
    for layer in compression.iter().rev() {
        text.push_str(" in ");
        text.push_str(layer.name());
    }
    text
}

/// Returns the kind of a device in one word, for text and JSON.
pub fn kind_name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Disk => "disk",
        DeviceKind::VmState => "vmstate",
    }
}
