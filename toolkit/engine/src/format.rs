//! Chooses the format and compression of an output from the user's settings and the file name.

use std::path::Path;
use std::sync::Arc;

use imgtool_core::driver::ENCRYPT;
use imgtool_core::{
    Compress, CreateOptions, Driver, Error, ImageWriter, Location, OptionValues, Registry, Remedy, Result,
    Secret,
};
use imgtool_storage::{Compression, Framing, outer};

use crate::open;

/// Options of an output as the user stated them, not yet parsed by a driver.
#[derive(Debug, Clone, Default)]
pub struct FormatOptions {
    /// Keys and values of the format's own options. If a key occurs twice, the last value counts.
    pub pairs: Vec<(String, String)>,
    /// Compression inside the format, if requested.
    pub compress: Option<Compress>,
    /// Passphrase of the new image, if it is to be encrypted.
    pub secret: Option<Secret>,
    /// Time to use instead of the current time, in seconds since 1970.
    pub source_date_epoch: Option<i64>,
    /// Unit of zero detection, bytes; see [`CreateOptions::sparse_granularity`].
    pub sparse_granularity: Option<u64>,
    /// True to ask the file system not to copy the file's blocks on writes (btrfs, `chattr +C`).
    pub no_copy_on_write: bool,
    /// True if an extension of the output's name does not compress it.
    pub plain_names: bool,
    /// True for an image without content; see [`CreateOptions::blank`].
    pub blank: bool,
    /// Drivers for the images in a container ([`Driver::member_format`]). [`TargetFormat::choose`] sets them.
    pub formats: Registry,
}

impl FormatOptions {
    /// Returns the options that apply to every format, for an output in another format.
    fn common(&self) -> Self {
        Self {
            secret: self.secret.clone(),
            source_date_epoch: self.source_date_epoch,
            sparse_granularity: self.sparse_granularity,
            no_copy_on_write: self.no_copy_on_write,
            plain_names: self.plain_names,
            formats: self.formats.clone(),
            ..Self::default()
        }
    }

    /// Returns the compression that the extension of `location` names, unless extensions do not count.
    fn compression_of(&self, location: &Location) -> Option<OuterCompression> {
        let compression = outer::by_name(location).filter(|_| !self.plain_names)?;
        Some(OuterCompression { compression, level: None })
    }

    /// True if any option applies to one format only.
    fn is_specific(&self) -> bool {
        !self.pairs.is_empty() || self.compress.is_some()
    }

    /// Returns the driver of the encrypted form of a format, if the options ask for encryption and the format
    /// has none inside. The options become those of that form: qcow2 has the same under names that begin with
    /// "encrypt.".
    fn encrypted(&mut self, driver: Arc<dyn Driver>) -> Result<Arc<dyn Driver>> {
        let Some(at) = self.pairs.iter().position(|(key, _)| key == ENCRYPT) else { return Ok(driver) };
        let has_option =
            |driver: &Arc<dyn Driver>| driver.options().iter().any(|option| option.name == ENCRYPT);
        let form = driver.encrypted_form().filter(|form| self.pairs[at].1 == *form);
        let Some(form) = form else {
            if has_option(&driver) {
                return Ok(driver);
            }
            let names = self.formats.drivers().filter(|driver| has_option(driver));
            let names: Vec<&str> = names.map(|driver| driver.name()).collect();
            return Err(Error::usage(format!("{} images can't be encrypted", driver.name()))
                .hint(format!("formats that can: {}", names.join(", "))));
        };
        self.pairs.remove(at);
        for (key, _) in &mut self.pairs {
            if let Some(own) = key.strip_prefix(ENCRYPT).and_then(|rest| rest.strip_prefix('.')) {
                *key = own.to_owned();
            }
        }
        self.formats.get(form)
    }

    /// Parses the options with the driver.
    fn writer(&self, driver: &dyn Driver) -> Result<Arc<dyn ImageWriter>> {
        let pairs = self.pairs.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let options = CreateOptions {
            compress: self.compress.clone(),
            secret: self.secret.clone(),
            source_date_epoch: self.source_date_epoch,
            sparse_granularity: self.sparse_granularity,
            blank: self.blank,
            ..CreateOptions::parse(driver.name(), driver.options(), pairs.clone())?
        };
        let Some(member) = driver.member_format() else { return driver.writer(&options).map(Arc::from) };
        let inner = self.formats.get(member.name)?;
        // An option of both formats is meant for both.
        let shared = pairs.filter(|(key, _)| inner.options().iter().any(|option| option.name == *key));
        let given = member.options.iter().copied().chain(shared);
        let values = OptionValues::parse(member.name, inner.options(), given)?;
        let inner = inner.writer(&CreateOptions { values, ..options.clone() })?;
        driver.container_writer(&options, inner).map(Arc::from)
    }
}

/// Compression of a whole output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OuterCompression {
    /// Compression format.
    pub compression: Compression,
    /// Level on the format's own scale; `None` means its default.
    pub level: Option<i32>,
}

/// Format of an output, with its options parsed.
#[derive(Debug, Clone)]
pub struct TargetFormat {
    /// Driver of the format.
    pub driver: Arc<dyn Driver>,
    /// Writer of the driver, for the parsed options.
    pub writer: Arc<dyn ImageWriter>,
    /// Compression of the whole output, if any.
    pub outer: Option<OuterCompression>,
    options: FormatOptions,
}

impl TargetFormat {
    /// Creates a target format with these options, without outer compression.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for options that the driver refuses.
    pub fn new(driver: Arc<dyn Driver>, mut options: FormatOptions) -> Result<Self> {
        let driver = options.encrypted(driver)?;
        let writer = options.writer(&*driver)?;
        Ok(Self { driver, writer, outer: None, options })
    }

    /// Chooses the format of the output `dest`: `name` if stated, otherwise the format of the file extension,
    /// otherwise raw. `compress` compresses inside the format, or the whole output if the format has no
    /// compression.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for unknown names and contradictory settings.
    pub fn choose(
        registry: &Registry,
        name: Option<&str>,
        dest: Option<&Location>,
        compress: Option<Compress>,
        options: FormatOptions,
    ) -> Result<Self> {
        let dest = dest.filter(|dest| !is_directory(dest));
        let driver = by_word_or_name(registry, name, dest)?;
        let mut outer = dest.and_then(|dest| options.compression_of(dest));
        let mut options = FormatOptions { formats: registry.clone(), ..options };
        if let Some(compress) = compress {
            if driver.capabilities().compression {
                options.compress = Some(compress);
            } else {
                outer = Some(whole_output(&*driver, outer, &compress)?);
            }
        }
        let format = Self { outer, ..Self::new(driver, options)? };
        format.check_outer()?;
        Ok(format)
    }

    /// Returns the format of a disk with a separate target: with the same options if the driver is the same,
    /// and with outer compression if the extension of `location` names one.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] if the format can't have that compression.
    pub(crate) fn for_location(&self, driver: Arc<dyn Driver>, location: &Location) -> Result<Self> {
        let outer = self.options.compression_of(location);
        let format = match driver.name() == self.driver.name() {
            true => Self { outer, ..self.clone() },
            false => Self { outer, ..Self::new(driver, self.options.common())? },
        };
        format.check_outer()?;
        Ok(format)
    }

    /// True if the file system must not copy the file's blocks on writes.
    pub(crate) fn no_copy_on_write(&self) -> bool {
        self.options.no_copy_on_write
    }

    /// Returns the passphrase of new images, if any.
    pub(crate) fn secret(&self) -> Option<&Secret> {
        self.options.secret.as_ref()
    }

    /// True if an image of this format, with its options, can be written to a stream.
    pub fn writes_stream(&self) -> bool {
        self.driver.capabilities().stream_write && self.writer.writes_stream()
    }

    fn check_outer(&self) -> Result<()> {
        let Some(outer) = self.outer else { return Ok(()) };
        if !matches!(outer.compression, Compression::Zstd | Compression::Gzip) {
            let name = outer.compression.name();
            return Err(Error::usage(format!("{name} is read, but not written"))
                .hint("let the name of the output end in .zst (or .gz)"));
        }
        // Fails if the level is out of range.
        Framing::new(outer.compression, outer.level)?;
        let name = self.driver.name();
        if self.writes_stream() && self.driver.capabilities().compression {
            return Err(Error::usage(format!(
                "a {name} stream is compressed inside: compressing it as a whole would make it no smaller"
            ))
            .hint(format!(
                "leave out the extension .{}, or compress the finished file",
                outer.compression.extension()
            )));
        }
        if self.writes_stream() {
            return Ok(());
        }
        let error = Error::usage(format!("{name} can't be compressed as a whole"));
        // A format with compression of its own is refused as a stream as well.
        let option = self.writer.stream_option().filter(|_| !self.driver.capabilities().compression);
        Err(match option {
            Some(option) => error.remedied_by(Remedy::SetOption(option.to_owned())),
            None => {
                error.hint("leave out the compression's extension, or compress inside the format if it can")
            }
        })
    }

    /// True if the user stated options that apply to this format only.
    pub(crate) fn has_own_options(&self) -> bool {
        self.options.is_specific()
    }

    /// True if the user stated options of this format by their keys.
    pub(crate) fn has_pairs(&self) -> bool {
        !self.options.pairs.is_empty()
    }

    /// True if the size of the output follows from its content: it has neither compression nor a backing
    /// image.
    pub(crate) fn is_measurable(&self) -> bool {
        self.outer.is_none() && self.options.compress.is_none() && self.writer.backing().is_none()
    }

    /// True if an image can contain several devices.
    pub fn is_archive(&self) -> bool {
        self.driver.capabilities().is_archive()
    }

    /// Returns the file extension, including that of the outer compression.
    pub fn extension(&self) -> String {
        let own = self.driver.extensions().first().copied().unwrap_or_default();
        match self.outer {
            Some(outer) => format!("{own}.{}", outer.compression.extension()),
            None => own.to_owned(),
        }
    }
}

/// Returns the driver called `word`, if stated, otherwise the driver for the file extension, otherwise the
/// raw driver, like qemu-img.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for an unknown format or one that is only read.
pub fn by_word_or_name(
    registry: &Registry,
    word: Option<&str>,
    location: Option<&Location>,
) -> Result<Arc<dyn Driver>> {
    let driver = match (word, location) {
        (Some(word), _) => registry.get(word)?,
        (None, None) => registry.verbatim()?,
        (None, Some(location)) => match open::driver_by_name(registry, location) {
            Some(driver) => driver,
            None => registry.verbatim()?,
        },
    };
    check_writes(registry, &*driver)?;
    Ok(driver)
}

/// Refuses a format that is only read as that of an output.
fn check_writes(registry: &Registry, driver: &dyn Driver) -> Result<()> {
    if driver.capabilities().write {
        return Ok(());
    }
    let writers = registry.drivers().filter(|driver| driver.capabilities().write);
    let names: Vec<&str> = writers.map(|driver| driver.name()).collect();
    let advice = format!("formats: {}", names.join(", "));
    Err(Error::usage(format!("{} is read, but not written", driver.name()))
        .remedied_by(Remedy::NameTargetFormat { advice }))
}

/// True if the location is an existing directory, or its path ends in a separator.
pub fn is_directory(location: &Location) -> bool {
    location.path().is_some_and(|path| path.is_dir() || ends_in_separator(path))
}

/// True if the path ends in a separator, and so can only be a directory.
fn ends_in_separator(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().last().is_some_and(|last| std::path::is_separator(char::from(*last)))
}

/// Returns the outer compression that `compress` requests. `named` is the compression of the file extension.
fn whole_output(
    driver: &dyn Driver,
    named: Option<OuterCompression>,
    compress: &Compress,
) -> Result<OuterCompression> {
    if !driver.capabilities().is_archive() && named.is_none() {
        return Err(Error::usage(format!("{} has no compression of its own", driver.name()))
            .remedied_by(Remedy::LeaveOutCompression));
    }
    let compression = match compress.algorithm.as_deref() {
        None => named.map_or(Compression::Zstd, |outer| outer.compression),
        Some("zstd" | "zst") => Compression::Zstd,
        Some("gzip" | "gz") => Compression::Gzip,
        Some(other) => {
            return Err(Error::usage(format!("no compression of whole files is called '{other}'"))
                .hint("zstd or gzip, with a level if you like: zstd:3"));
        }
    };
    match named {
        Some(named) if named.compression != compression => Err(Error::usage(format!(
            "the compression is stated as {}, and as {} by the extension",
            compression.name(),
            named.compression.name()
        ))),
        _ => Ok(OuterCompression { compression, level: compress.level }),
    }
}
