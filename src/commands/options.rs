//! Values of `-o`, `-S` and sizes, for the commands that create images.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::{CreateOptions, Driver, Error, Registry, Result, parse_size};

use super::formats;
use crate::exit::Exit;
use crate::{images, report};

/// Granularity of `-S`: qemu-img's.
const SECTOR: u64 = 512;

/// Largest value of `-S`: qemu-img's limit.
const MAX_SPARSE: u64 = 16 << 20;

/// The driver for the extension of a file name. The extension of a compression is ignored.
pub fn driver_by_name(registry: &Registry, path: &Path) -> Option<Arc<dyn Driver>> {
    let path = images::without_compression(path);
    registry.by_extension(&path.file_name()?.to_string_lossy())
}

/// Prints the list for `-o help`.
pub fn list(driver: &dyn Driver) -> Result<Exit> {
    if driver.options().is_empty() {
        report::print(&format!("{} has no options\n", driver.name()))?;
        return Ok(Exit::Done);
    }
    report::print(&format!("Options of {} (-o):\n", driver.name()))?;
    report::print(&formats::options(2, driver.options()))?;
    Ok(Exit::Done)
}

/// Collects `-o`, `-S` and SOURCE_DATE_EPOCH. Keys and values of `-o` are left to the driver.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`] for a duplicate key or a malformed number.
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

/// Parses `-S` within qemu-img's bounds.
fn sparse(text: &str) -> Result<u64> {
    let size = parse_size(text).ok_or_else(|| {
        Error::usage(format!("invalid value '{text}' for -S: expected a size such as 4k, 64k or 0"))
    })?;
    if size % SECTOR != 0 || size > MAX_SPARSE {
        return Err(Error::usage(format!(
            "invalid value {size} for -S: expected 0 or a multiple of {SECTOR} up to {MAX_SPARSE}"
        )));
    }
    Ok(size)
}

/// Parses a size on the command line.
pub fn size(text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| {
        Error::usage(format!("invalid size '{text}': expected a number such as 512M or 1.5G"))
            .hint("suffixes: k, M, G, T, P, E (powers of 1024)")
    })
}

/// Seconds since 1970 from SOURCE_DATE_EPOCH (<https://reproducible-builds.org>), if it is set.
pub fn source_date_epoch() -> Result<Option<i64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) if !text.is_empty() => text.parse().map(Some).map_err(|_| {
            Error::usage(format!("invalid SOURCE_DATE_EPOCH '{text}': expected a whole number of seconds"))
        }),
        _ => Ok(None),
    }
}

/// Splits `K=V,K=V` like qemu-img: a comma in a value is doubled, and a key without a value means `on`.
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

/// True if the options contain `help` or `?`.
pub fn asks_for_help(options: &[String]) -> bool {
    options.iter().flat_map(|text| text.split(',')).any(|part| part == "help" || part == "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_like_qemu_img() {
        assert_eq!(
            split_options("a=1,b=x,,y,c"),
            [("a", "1"), ("b", "x,y"), ("c", "on")].map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
        assert!(asks_for_help(&["a=1,help".to_owned()]));
        assert!(!asks_for_help(&["helper=1".to_owned()]));
    }
}
