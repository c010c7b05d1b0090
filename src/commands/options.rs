//! `-o` and what belongs to it, for the verbs that make images.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::{CreateOptions, Driver, Error, Registry, Result, parse_size};

use super::formats;
use crate::exit::Exit;
use crate::{images, report};

/// What `-S` is a multiple of. qemu-img's.
const SECTOR: u64 = 512;

/// The largest `-S`. qemu-img's.
const MAX_SPARSE: u64 = 16 << 20;

/// The driver that a file's name asks for, behind the extension of a compression too.
pub fn driver_by_name(registry: &Registry, path: &Path) -> Option<Arc<dyn Driver>> {
    let path = images::without_compression(path);
    registry.by_extension(&path.file_name()?.to_string_lossy())
}

/// `-o help`.
///
/// # Errors
/// When it can't be printed.
pub fn list(driver: &dyn Driver) -> Result<Exit> {
    if driver.options().is_empty() {
        report::print(&format!("{} has no options\n", driver.name()))?;
        return Ok(Exit::Done);
    }
    report::print(&format!("Options of {} (-o):\n", driver.name()))?;
    report::print(&formats::options(2, driver.options()))?;
    Ok(Exit::Done)
}

/// What `-o` and `-S` and the environment say.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`] for what can't be read.
pub fn create_options(options: &[String], sparse_size: Option<&str>) -> Result<CreateOptions> {
    let mut map = BTreeMap::new();
    for (key, value) in options.iter().flat_map(|text| split_options(text)) {
        if map.insert(key.clone(), value).is_some() {
            return Err(Error::usage(format!("option '{key}' is given twice")));
        }
    }
    let sparse_granularity = sparse_size.map(sparse).transpose()?;
    Ok(CreateOptions {
        options: map,
        compress: None,
        source_date_epoch: source_date_epoch()?,
        sparse_granularity,
        ..CreateOptions::default()
    })
}

/// `-S`, within qemu-img's bounds.
fn sparse(text: &str) -> Result<u64> {
    let size = parse_size(text)
        .ok_or_else(|| Error::usage(format!("-S takes a size such as 4k, 64k or 0, not '{text}'")))?;
    if size % SECTOR != 0 || size > MAX_SPARSE {
        return Err(Error::usage(format!(
            "-S takes a multiple of {SECTOR} up to {MAX_SPARSE}, or 0, not {size}"
        )));
    }
    Ok(size)
}

/// A size of the command line.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`] when it is none.
pub fn size(text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| {
        Error::usage(format!("a size is a number of bytes such as 512M or 1.5G, not '{text}'"))
            .hint("suffixes: k, M, G, T, P, E (powers of 1024)")
    })
}

/// Seconds since 1970 from SOURCE_DATE_EPOCH (<https://reproducible-builds.org>).
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`] when it is no number.
pub fn source_date_epoch() -> Result<Option<i64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) if !text.is_empty() => text.parse().map(Some).map_err(|_| {
            Error::usage(format!("SOURCE_DATE_EPOCH is a whole number of seconds, not '{text}'"))
        }),
        _ => Ok(None),
    }
}

/// `K=V,K=V` as qemu-img takes it: a comma in a value is doubled; a key alone is `on`.
fn split_options(text: &str) -> Vec<(String, String)> {
    let parts = text.replace(",,", "\u{0}");
    parts
        .split(',')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let part = part.replace('\u{0}', ",");
            match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => (part, "on".to_owned()),
            }
        })
        .collect()
}

/// Whether `-o help` was asked for.
pub fn asks_for_help(options: &[String]) -> bool {
    options.iter().flat_map(|text| text.split(',')).any(|part| part == "help" || part == "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_split_like_qemu_imgs() {
        assert_eq!(
            split_options("a=1,b=x,,y,c"),
            [("a", "1"), ("b", "x,y"), ("c", "on")].map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
        assert!(asks_for_help(&["a=1,help".to_owned()]));
        assert!(!asks_for_help(&["helper=1".to_owned()]));
    }
}
