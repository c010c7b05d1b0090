//! Parser for the values of `--target`: `NAME=PATH[,format=FMT][,zeroed]`.

use std::ffi::OsStr;

use imgtool_core::{Error, Location, Result};
use imgtool_engine::DiskTarget;

use crate::images;

/// Parses the value of `--target`. A comma in the path is written as two commas.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a malformed value.
pub(super) fn parse(text: &OsStr) -> Result<DiskTarget> {
    let usage = |what: &str| {
        Error::usage(format!("invalid value '{}' for --target: {what}", text.to_string_lossy()))
            .hint("the form is NAME=PATH[,format=FMT][,zeroed]; a comma in PATH is doubled")
    };
    let whole = text.to_str().ok_or_else(|| usage("is not UTF-8"))?.replace(",,", "\u{0}");
    let mut parts = whole.split(',');
    let (name, path) = parts
        .next()
        .and_then(|first| first.split_once('='))
        .filter(|(name, path)| !name.is_empty() && !path.is_empty())
        .ok_or_else(|| usage("expected NAME=PATH"))?;
    let path = path.replace('\u{0}', ",");
    images::refuse_protocol(OsStr::new(&path))?;
    let location = Location::target(OsStr::new(&path));
    let mut target = DiskTarget { name: name.to_owned(), location, format: None, zeroed: false };
    for part in parts {
        match part.split_once('=') {
            Some(("format", format)) => target.format = Some(format.to_owned()),
            None if part == "zeroed" => target.zeroed = true,
            _ => return Err(usage(&format!("unknown setting '{part}'"))),
        }
    }
    Ok(target)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_names_paths_and_settings() {
        let parse = |text: &str| parse(OsStr::new(text));
        let target = parse("scsi0=/dev/vg/a,format=raw,zeroed").expect("a target");
        assert_eq!(target.name, "scsi0");
        assert_eq!(target.location, "/dev/vg/a".into());
        assert_eq!(target.format.as_deref(), Some("raw"));
        assert!(target.zeroed);
        assert_eq!(parse("a=x,,y").expect("a target").location, "x,y".into());
        for bad in ["", "a", "=x", "a=", "a=b,c", "a=b,format"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
