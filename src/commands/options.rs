//! Parsers for `-o`, `-S`, `-c` and sizes, shared by several commands.

use imgtool_core::{Compress, Driver, Error, Result, parse_size};
use imgtool_engine::{FormatOptions, TargetFormat};

use super::formats;
use crate::exit::Exit;
use crate::report;

/// `-S` must be a multiple of this many bytes, as in qemu-img.
const SECTOR: u64 = 512;

/// Maximum value of `-S` in bytes. QEMU's limit.
const MAX_SPARSE: u64 = 16 << 20;

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

/// Collects the values of `-o`, `-S` and SOURCE_DATE_EPOCH. The driver parses the keys and values of `-o`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a duplicate key, or if `-S` or SOURCE_DATE_EPOCH is not valid.
pub fn format_options(options: &[String], sparse_size: Option<&str>) -> Result<FormatOptions> {
    let mut format_options = FormatOptions {
        source_date_epoch: source_date_epoch()?,
        sparse_granularity: sparse_size.map(sparse).transpose()?,
        ..FormatOptions::default()
    };
    for (key, value) in options.iter().flat_map(|text| split_options(text)) {
        add(&mut format_options, &key, &value)?;
    }
    Ok(format_options)
}

/// Adds the values of `-B`/`-b` and `-F` as the options `backing_file` and `backing_fmt`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if `-o` also sets one of them.
pub fn add_backing(options: &mut FormatOptions, file: Option<&str>, format: Option<&str>) -> Result<()> {
    for (key, value) in [("backing_file", file), ("backing_fmt", format)] {
        value.map_or(Ok(()), |value| add(options, key, value))?;
    }
    Ok(())
}

/// Refuses a passphrase for an output that is not encrypted: it would be taken for one that is.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if `has_secret` and the format does not encrypt.
pub fn check_secret(format: &TargetFormat, has_secret: bool) -> Result<()> {
    if !has_secret || format.writer.encrypts() {
        return Ok(());
    }
    let name = format.driver.name();
    Err(Error::usage(format!("--target-secret is given, but the output is {name} without encryption"))
        .hint("use -o encrypt=luks with qcow2, or -O luks"))
}

fn add(options: &mut FormatOptions, key: &str, value: &str) -> Result<()> {
    if options.pairs.iter().any(|(known, _)| known == key) {
        return Err(Error::usage(format!("option '{key}' is given twice")));
    }
    options.pairs.push((key.to_owned(), value.to_owned()));
    Ok(())
}

/// Parses the value of `-c`, `ALG[:LEVEL]`. An empty algorithm or a missing level means the format's default.
pub fn compress(text: &str) -> Result<Compress> {
    let (algorithm, level) = match text.split_once(':') {
        Some((algorithm, level)) => (algorithm, Some(level)),
        None => (text, None),
    };
    let level = level
        .map(|level| {
            level.parse::<i32>().map_err(|_| {
                Error::usage(format!("invalid compression level '{level}': expected a whole number"))
            })
        })
        .transpose()?;
    Ok(Compress { algorithm: (!algorithm.is_empty()).then(|| algorithm.to_owned()), level })
}

/// Parses the value of `-S` into bytes, with the bounds of qemu-img.
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

/// Parses a size from the command line into bytes.
pub fn size(text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| {
        Error::usage(format!("invalid size '{text}': expected a number such as 512M or 1.5G"))
            .hint("suffixes: k, M, G, T, P, E (powers of 1024)")
    })
}

/// Returns the value of SOURCE_DATE_EPOCH (<https://reproducible-builds.org>), in seconds since 1970, if set.
pub fn source_date_epoch() -> Result<Option<i64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) if !text.is_empty() => text.parse().map(Some).map_err(|_| {
            Error::usage(format!("invalid SOURCE_DATE_EPOCH '{text}': expected a whole number of seconds"))
        }),
        _ => Ok(None),
    }
}

/// Splits `K=V,K=V` like qemu-img: `,,` stands for a comma in a value, and a key without a value gets `on`.
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

    #[test]
    fn parses_compression_algorithm_and_level() {
        let parsed = |text| compress(text).map(|c| (c.algorithm, c.level)).ok();
        assert_eq!(parsed(""), Some((None, None)));
        assert_eq!(parsed("zstd:-3"), Some((Some("zstd".to_owned()), Some(-3))));
        assert_eq!(parsed(":9"), Some((None, Some(9))));
        assert_eq!(parsed("zstd:x"), None);
    }
}
