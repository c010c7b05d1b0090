//! Parser for DEST: a path, options (`--target-image-opts`), JSON, or a path behind `zeroinit:`.

use std::ffi::OsStr;

use imgtool_core::{Error, Location, Result};

use crate::args::ConvertArgs;
use crate::image_name::{self, NamedChain};
use crate::images;

/// DEST as the user named it.
pub(super) struct TargetName {
    pub(super) location: Location,
    /// Format in the options, which name an image that exists.
    pub(super) format: Option<String>,
    /// True if the name says that the target reads as zeros.
    pub(super) zeroed: bool,
}

/// Parses DEST. As for qemu-img, options, JSON and `zeroinit:` need a target that exists.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a name that is not supported.
pub(super) fn parse(args: &ConvertArgs, dest: &OsStr) -> Result<TargetName> {
    let text = dest.to_str().unwrap_or_default();
    if args.compat.target_image_opts {
        check_exists(args, "--target-image-opts")?;
        if args.target.to.is_some() {
            return Err(Error::usage("--target-image-opts and -O exclude each other")
                .hint("state the format in the options: driver=FORMAT,file.filename=PATH"));
        }
        return described(args, image_name::from_options(dest)?);
    }
    if let Some(json) = text.strip_prefix(image_name::JSON) {
        check_exists(args, image_name::JSON)?;
        return described(args, image_name::from_json(json)?);
    }
    let behind = text.strip_prefix(images::ZEROED);
    if behind.is_some() {
        check_exists(args, images::ZEROED)?;
    }
    let path = behind.map_or(dest, OsStr::new);
    images::refuse_protocol(path)?;
    Ok(TargetName { location: Location::target(path), format: None, zeroed: behind.is_some() })
}

fn check_exists(args: &ConvertArgs, what: &str) -> Result<()> {
    if args.target.no_create {
        return Ok(());
    }
    Err(Error::usage(format!("{what} needs -n: it names an image that exists"))
        .hint("a new image has a plain path, its format with -O, its options with -o"))
}

fn described(
    args: &ConvertArgs,
    NamedChain { image: name, backing, ends }: NamedChain,
) -> Result<TargetName> {
    if name.part.is_some() {
        return Err(Error::unsupported("a part of a file can be read, but not written").path(name.location));
    }
    if name.key_id.is_some() {
        return Err(Error::unsupported("an encrypted image can't be written into").path(name.location));
    }
    if ends || !backing.is_empty() {
        return Err(
            Error::usage("the backing image of a target that exists can't be chosen").path(name.location)
        );
    }
    if name.format.is_none() && args.target.to.is_none() {
        return Err(Error::usage("the options of the target lack its format")
            .path(name.location)
            .hint("driver=FORMAT,file.filename=PATH"));
    }
    Ok(TargetName { location: name.location, format: name.format, zeroed: false })
}
