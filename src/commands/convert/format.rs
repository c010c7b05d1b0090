//! The format of the output: what was said, what the name says, and what is compressed.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::storage::outer;
use imgtool_toolkit::{Compress, Compression, CreateOptions, Driver, Error, Registry, Result, parse_size};

use crate::images;

/// Taken when nothing tells, as qemu-img does.
const DEFAULT: &str = "raw";

/// What is made.
#[derive(Clone)]
pub struct Format {
    /// The driver.
    pub driver: Arc<dyn Driver>,
    /// How the whole output is compressed.
    pub outer: Option<Outer>,
    /// What the driver is told.
    pub options: CreateOptions,
}

/// The compression of a whole output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// Which.
    pub compression: Compression,
    /// Its own level; `None`: the default.
    pub level: Option<i32>,
}

impl Format {
    /// A driver without any options: for devices with a place of their own.
    pub fn plain(driver: Arc<dyn Driver>) -> Self {
        Self { driver, outer: None, options: CreateOptions::default() }
    }

    /// Whether it holds many devices.
    pub fn is_archive(&self) -> bool {
        self.driver.capabilities().max_devices > 1
    }

    /// The extension of its files.
    pub fn extension(&self) -> String {
        let own = self.driver.extensions().first().copied().unwrap_or_default();
        match self.outer {
            Some(outer) => format!("{own}.{}", outer.compression.extension()),
            None => own.to_owned(),
        }
    }
}

/// Decides the format from `--to`, DEST's name and `-c`.
///
/// # Errors
/// [`imgtool_toolkit::ErrorKind::Usage`] for what makes no sense together.
pub fn choose(
    registry: &Registry,
    to: Option<&str>,
    dest: Option<&Path>,
    compress: Option<&str>,
    options: CreateOptions,
) -> Result<Format> {
    let dest = dest.filter(|dest| !dest.is_dir() && !ends_in_separator(dest));
    let driver = match (to, dest) {
        (Some(name), _) => registry.get(name)?,
        (None, Some(dest)) => match by_name(registry, dest) {
            Some(driver) => driver,
            None => registry.get(DEFAULT)?,
        },
        (None, None) => registry.get(DEFAULT)?,
    };
    options.check_names(driver.name(), driver.options())?;
    let mut format = Format { driver, outer: None, options };
    format.outer = dest.and_then(outer::by_name).map(|compression| Outer { compression, level: None });
    if let Some(text) = compress {
        set_compression(&mut format, text)?;
    }
    check_outer(&format)?;
    Ok(format)
}

/// The driver that a file's name asks for, behind the extension of a compression too.
pub fn by_name(registry: &Registry, path: &Path) -> Option<Arc<dyn Driver>> {
    let path = images::without_compression(path);
    registry.by_extension(&path.file_name()?.to_string_lossy())
}

/// Whether a path can only be a directory.
pub fn ends_in_separator(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().last().is_some_and(|last| std::path::is_separator(char::from(*last)))
}

fn set_compression(format: &mut Format, text: &str) -> Result<()> {
    let wanted = parse_compress(text)?;
    if format.driver.capabilities().compression {
        format.options.compress = Some(wanted);
        return Ok(());
    }
    if !format.is_archive() {
        return Err(Error::usage(format!("{} has no compression of its own", format.driver.name()))
            .hint("leave out -c; a DEST that ends in .zst or .gz compresses the whole file"));
    }
    let compression = match wanted.algorithm.as_deref() {
        None => format.outer.map_or(Compression::Zstd, |outer| outer.compression),
        Some("zstd" | "zst") => Compression::Zstd,
        Some("gzip" | "gz") => Compression::Gzip,
        Some(other) => {
            return Err(Error::usage(format!("no compression of archives is called '{other}'"))
                .hint("zstd or gzip, with a level if you like: -c=zstd:3"));
        }
    };
    if let Some(named) = format.outer
        && named.compression != compression
    {
        return Err(Error::usage(format!(
            "-c asks for {}, DEST's extension for {}",
            compression.name(),
            named.compression.name()
        )));
    }
    format.outer = Some(Outer { compression, level: wanted.level });
    Ok(())
}

fn check_outer(format: &Format) -> Result<()> {
    let Some(outer) = format.outer else { return Ok(()) };
    let name = outer.compression.name();
    if !matches!(outer.compression, Compression::Zstd | Compression::Gzip) {
        return Err(
            Error::usage(format!("{name} is read, but not written")).hint("let DEST end in .zst (or .gz)")
        );
    }
    if !format.driver.capabilities().stream_write {
        return Err(Error::usage(format!("{} can't be compressed as a whole", format.driver.name()))
            .hint("leave out the compression's extension; -c compresses inside the format, where it can"));
    }
    Ok(())
}

/// `ALG[:LEVEL]`; nothing is the default of the format.
fn parse_compress(text: &str) -> Result<Compress> {
    let (algorithm, level) = match text.split_once(':') {
        Some((algorithm, level)) => (algorithm, Some(level)),
        None => (text, None),
    };
    let level = level
        .map(|level| {
            level
                .parse::<i32>()
                .map_err(|_| Error::usage(format!("a compression level is a whole number, not '{level}'")))
        })
        .transpose()?;
    Ok(Compress { algorithm: (!algorithm.is_empty()).then(|| algorithm.to_owned()), level })
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
    let sparse_granularity = sparse_size
        .map(|text| {
            parse_size(text)
                .ok_or_else(|| Error::usage(format!("-S takes a size such as 4k, 64k or 0, not '{text}'")))
        })
        .transpose()?;
    Ok(CreateOptions {
        options: map,
        compress: None,
        source_date_epoch: source_date_epoch()?,
        sparse_granularity,
        ..CreateOptions::default()
    })
}

/// Seconds since 1970 from SOURCE_DATE_EPOCH (<https://reproducible-builds.org>).
fn source_date_epoch() -> Result<Option<i64>> {
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

    #[test]
    fn compression_is_an_algorithm_and_a_level() {
        let parsed = |text| parse_compress(text).map(|c| (c.algorithm, c.level)).ok();
        assert_eq!(parsed(""), Some((None, None)));
        assert_eq!(parsed("zstd:-3"), Some((Some("zstd".to_owned()), Some(-3))));
        assert_eq!(parsed(":9"), Some((None, Some(9))));
        assert_eq!(parsed("zstd:x"), None);
    }
}
