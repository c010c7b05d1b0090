//! The format of the output: what was said, what the name says, and what is compressed.

use std::path::Path;
use std::sync::Arc;

use imgtool_toolkit::storage::outer;
use imgtool_toolkit::{Compress, Compression, CreateOptions, Driver, Error, Packing, Registry, Result};

use crate::commands::options::driver_by_name;
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

    /// The format of a device that has a place of its own: with the same options where the driver is
    /// the same, compressed as a whole where the name of a new file says so.
    ///
    /// # Errors
    /// [`imgtool_toolkit::ErrorKind::Usage`] when it can't be compressed as its name says.
    pub fn for_place(&self, driver: Arc<dyn Driver>, path: &Path) -> Result<Self> {
        let options = if driver.name() == self.driver.name() {
            self.options.clone()
        } else {
            // -S is of every format.
            CreateOptions {
                sparse_granularity: self.options.sparse_granularity,
                source_date_epoch: self.options.source_date_epoch,
                ..CreateOptions::default()
            }
        };
        let outer = outer::by_name(path).map(|compression| Outer { compression, level: None });
        let format = Self { driver, outer, options };
        check_outer(&format)?;
        Ok(format)
    }

    /// Whether `-o` or `-c` was given, which are for one format.
    pub fn has_options(&self) -> bool {
        !self.options.options.is_empty() || self.options.compress.is_some()
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
        (Some(name), _) => images::driver(registry, name)?,
        (None, Some(dest)) => match driver_by_name(registry, dest) {
            Some(driver) => driver,
            None => {
                images::check_name(registry, dest, "-O ")?;
                registry.get(DEFAULT)?
            }
        },
        (None, None) => registry.get(DEFAULT)?,
    };
    let mut format = Format { driver, outer: None, options };
    format.outer = dest.and_then(outer::by_name).map(|compression| Outer { compression, level: None });
    if let Some(text) = compress {
        set_compression(&mut format, text)?;
    }
    check_outer(&format)?;
    format.driver.check_options(&format.options)?;
    Ok(format)
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
    if !format.is_archive() && format.outer.is_none() {
        return Err(Error::usage(format!("{} has no compression of its own", format.driver.name()))
            .hint("leave out -c; a DEST that ends in .zst or .gz compresses the whole file"));
    }
    let compression = match wanted.algorithm.as_deref() {
        None => format.outer.map_or(Compression::Zstd, |outer| outer.compression),
        Some("zstd" | "zst") => Compression::Zstd,
        Some("gzip" | "gz") => Compression::Gzip,
        Some(other) => {
            return Err(Error::usage(format!("no compression of whole files is called '{other}'"))
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
    // Whether it has that level.
    Packing::new(outer.compression, outer.level)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compression_is_an_algorithm_and_a_level() {
        let parsed = |text| parse_compress(text).map(|c| (c.algorithm, c.level)).ok();
        assert_eq!(parsed(""), Some((None, None)));
        assert_eq!(parsed("zstd:-3"), Some((Some("zstd".to_owned()), Some(-3))));
        assert_eq!(parsed(":9"), Some((None, Some(9))));
        assert_eq!(parsed("zstd:x"), None);
    }
}
