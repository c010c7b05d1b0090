//! Opens images that the user names on the command line, and formats their names for messages.

use std::ffi::OsStr;
use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{
    CancelToken, DeviceKind, Error, Location, Memory, OpenOptions, Registry, Result, Secret, Url,
};
use imgtool_engine::{
    ChosenChain, ChosenImage, ExternalPolicy, OpenSettings, Opened, PolicyOpener, SourceRequest, chosen,
    open as opening,
};
use imgtool_storage::Compression;

use crate::args::InputArgs;
use crate::image_name::{self, ImageName};
#[cfg(feature = "net")]
use crate::network;
use crate::{compat, report, secrets};

/// Returns the drivers, and openers of URLs with the certificates and headers of the user.
///
/// # Errors
/// If a file with these can't be read, or is invalid.
pub fn registry(args: &InputArgs) -> Result<Registry> {
    let registry = imgtool::registry();
    #[cfg(feature = "net")]
    return network::add(registry, args);
    #[cfg(not(feature = "net"))]
    {
        let _ = args;
        Ok(registry)
    }
}

/// Returns the settings for opening images. Reads the passphrases, which a descriptor supplies only once.
///
/// # Errors
/// Same as [`refuse`], and if a passphrase can't be read.
pub fn open_settings(args: &InputArgs) -> Result<OpenSettings> {
    refuse(args)?;
    let (chain, paths): (Vec<_>, Vec<_>) =
        args.allow_external.iter().cloned().partition(|path| path.as_os_str() == "chain");
    Ok(OpenSettings {
        ignore_trailing: args.ignore_trailing,
        force_share: args.force_share,
        plain: compat::is_on(),
        member: args.member.clone(),
        policy: ExternalPolicy {
            chain: !chain.is_empty() || compat::is_on(),
            paths,
            directories: compat::external_directories()?,
        },
        secrets: secrets::read_all(&args.secret)?,
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

/// Refuses contradictory flags, and objects that are not supported.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for these.
pub fn refuse(args: &InputArgs) -> Result<()> {
    if args.image_opts && args.format.is_some() {
        return Err(Error::usage("--image-opts and -f exclude each other")
            .hint("state the format in the options: driver=FORMAT,file.filename=PATH"));
    }
    secrets::check_objects(&args.object)
}

/// Protocols by which qemu-img opens images, without those slashes that make a URL. A plain path may contain a colon as
/// well, but is then called by another name (`./nbd:disk`), as for qemu-img.
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

/// Prefix of a name by which Proxmox's qemu-img takes a target for zeroed. It means nothing for a source.
pub const ZEROED: &str = "zeroinit:";

/// Returns the source that the user named: by a path, in options, or in JSON. Its format and passphrase are
/// those of the name.
///
/// # Errors
/// Same as [`refuse_protocol`], and if options or JSON are not supported.
pub fn source(args: &InputArgs, name: &OsStr) -> Result<SourceRequest> {
    let text = name.to_str().unwrap_or_default();
    let parsed = match text.strip_prefix(image_name::JSON) {
        _ if args.image_opts => image_name::from_options(name)?,
        Some(json) => image_name::from_json(json)?,
        None => {
            let path = text.strip_prefix(ZEROED).map_or(name, OsStr::new);
            refuse_protocol(path)?;
            let location = Location::source(path);
            note_password(&location);
            return Ok(SourceRequest::new(location));
        }
    };
    let own = |image: &ImageName| -> Result<Option<Secret>> {
        image.key_id.as_ref().map(|id| secrets::of_object(&args.object, id)).transpose()
    };
    let below = |image: ImageName| {
        let secret = own(&image)?;
        Ok(ChosenImage { location: image.location, format: image.format, secret })
    };
    let secret = own(&parsed.image)?;
    let images = parsed.backing.into_iter().map(below).collect::<Result<_>>()?;
    let backing = ChosenChain { images, ends: parsed.ends };
    let ImageName { location, format, part, .. } = parsed.image;
    Ok(SourceRequest { format, secret, backing, part, ..SourceRequest::new(location) })
}

/// Prints a note if a password is in a URL, where other users see it.
fn note_password(location: &Location) {
    if let Location::Url(url) = location
        && url.has_user()
    {
        report::note(&format!(
            "{location}: other users see the user part of a URL; --header @FILE keeps credentials in a file"
        ));
    }
}

/// Returns the format of a source: `format` if the user stated it, otherwise that of the name.
pub fn format_of<'a>(source: &'a SourceRequest, format: Option<&'a str>) -> Option<&'a str> {
    format.or(source.format.as_deref())
}

/// Refuses a part of a file, and an image without its backing image, for a command that writes into the image.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Unsupported`] for these.
pub fn refuse_part(source: &SourceRequest) -> Result<()> {
    let what = match (source.part, source.backing.ends) {
        (Some(_), _) => "a part of a file",
        (None, true) => "an image without its backing image",
        (None, false) => return Ok(()),
    };
    Err(Error::unsupported(format!("{what} can be read, but not written")).path(&source.location))
}

/// Opens an image that the user named.
///
/// # Errors
/// If it can't be opened.
pub fn open(registry: &Registry, args: &InputArgs, name: &OsStr, options: &OpenOptions) -> Result<Opened> {
    let source = source(args, name)?;
    let (format, options) = (format_of(&source, args.format.as_deref()), source.options(registry, options));
    let opened = opening::open(registry, &source.location, format, &options, &CancelToken::new())?;
    opening::check_member(args.member.as_deref(), [&opened].into_iter())?;
    chosen::check(&opened, &source.backing)?;
    note_unrecognised(&opened);
    Ok(opened)
}

/// Opens an image that the user named, for random access.
///
/// # Errors
/// If it can't be opened or, for a stream, copied to temporary storage.
pub fn open_random(
    registry: &Registry,
    args: &InputArgs,
    name: &OsStr,
    options: &OpenOptions,
) -> Result<Opened> {
    let source = source(args, name)?;
    let (format, options) = (format_of(&source, args.format.as_deref()), source.options(registry, options));
    let opened = opening::open_random(registry, &source.location, format, &options, &CancelToken::new())?;
    opening::check_member(args.member.as_deref(), [&opened].into_iter())?;
    chosen::check(&opened, &source.backing)?;
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

/// Formats the name of an image for messages: `-` becomes "standard input", a URL loses its credentials.
pub fn show(name: &OsStr) -> String {
    match name.to_str() {
        Some("-") => "standard input".to_owned(),
        Some(text) if Url::parse(text).is_some() => Location::source(name).to_string(),
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

/// Returns the name of an image as the user typed it, for JSON: a URL loses its credentials.
pub fn typed(name: &OsStr) -> String {
    match name.to_str().and_then(Url::parse) {
        Some(url) => url.to_string(),
        None => name.to_string_lossy().into_owned(),
    }
}

/// Returns the kind of a device in one word, for text and JSON.
pub fn kind_name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Disk => "disk",
        DeviceKind::VmState => "vmstate",
    }
}
