//! The registry: which drivers there are, and which one an image belongs to.

use std::path::PathBuf;
use std::sync::Arc;

use crate::driver::{Confidence, Driver, OpenOptions};
use crate::error::{Error, Result};
use crate::source::ImageSource;
use crate::storage::{Compression, Input, outer};
use crate::suggest;

/// The drivers of a program. Cloning is cheap and shares them.
#[derive(Clone, Default)]
pub struct Registry {
    drivers: Vec<Arc<dyn Driver>>,
}

impl Registry {
    /// No drivers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a driver; a later one with the same name replaces the earlier.
    pub fn register(&mut self, driver: impl Driver + 'static) {
        self.drivers.retain(|known| known.name() != driver.name());
        self.drivers.push(Arc::new(driver));
    }

    /// All drivers, in the order of registration.
    pub fn drivers(&self) -> impl Iterator<Item = &Arc<dyn Driver>> {
        self.drivers.iter()
    }

    /// The driver called `name`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when there is none; the hint lists those there are.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Driver>> {
        self.drivers.iter().find(|driver| driver.name() == name).cloned().ok_or_else(|| {
            let names = self.drivers.iter().map(|driver| driver.name());
            Error::usage(format!("unknown format '{name}'")).hint(suggest::hint(name, "formats", names))
        })
    }

    /// The driver whose extension `file_name` ends in, by the longest match.
    pub fn by_extension(&self, file_name: &str) -> Option<Arc<dyn Driver>> {
        let lower = file_name.to_ascii_lowercase();
        self.drivers
            .iter()
            .find(|driver| driver.extensions().iter().any(|ext| lower.ends_with(&format!(".{ext}"))))
            .cloned()
    }

    /// The driver that knows an image by its first bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::WrongFormat`] when none does.
    pub fn probe(&self, head: &[u8], len: Option<u64>) -> Result<Arc<dyn Driver>> {
        let mut best: Option<(Confidence, &Arc<dyn Driver>)> = None;
        for driver in &self.drivers {
            if let Some(confidence) = driver.probe(head, len)
                && best.as_ref().is_none_or(|(known, _)| confidence > *known)
            {
                best = Some((confidence, driver));
            }
        }
        best.map(|(_, driver)| Arc::clone(driver))
            .ok_or_else(|| Error::wrong_format("no driver knows this image").hint("name its format with -f"))
    }

    /// Opens an image with the driver `format`, or the one that knows its first bytes. A stream that
    /// the driver can't read in one pass is copied to temporary storage first ([`Input::spool`]).
    ///
    /// # Errors
    /// Those of [`Registry::get`], [`Registry::probe`] and [`Driver::open`].
    pub fn open(&self, input: Input, format: Option<&str>, options: &OpenOptions) -> Result<Opened> {
        let path = input.path().to_owned();
        let driver = match format {
            Some(name) => self.get(name)?,
            None => {
                let driver = self.probe(&input.head()?, input.len()).map_err(|e| e.path(&path))?;
                self.check_name(&input, &*driver).map_err(|e| e.path(&path))?;
                driver
            }
        };
        if options.snapshot.is_some() && !driver.reads_snapshots() {
            let error = Error::unsupported(format!("{} images hold no snapshots", driver.name()));
            return Err(error.path(&path).hint("leave the snapshot out to read the image as it is"));
        }
        let compression = input.compression().to_vec();
        let stored_len = input.stored_len();
        let input = match (driver.capabilities().stream_read, options.info_only) {
            (true, _) => input,
            (false, true) => input.spool_for_facts()?,
            (false, false) => input.spool()?,
        };
        let spooled = input.is_spooled();
        let source = driver.open(input, options).map_err(|e| e.path(&path))?;
        Ok(Opened { path, driver, compression, stored_len, spooled, source })
    }
}

impl Registry {
    /// An image that nothing but the driver for anything (raw) takes, although its name says what it
    /// is: the beginning is damaged, and taking it for the content of a disk would hide that.
    fn check_name(&self, input: &Input, driver: &dyn Driver) -> Result<()> {
        if driver.probe(&input.head()?, input.len()) != Some(Confidence::Fallback) {
            return Ok(());
        }
        if (input.is_stream() || input.is_spooled()) && input.head()?.is_empty() {
            return Err(Error::wrong_format("nothing came: the stream is empty").at(0).hint(format!(
                "what writes it has failed; -f {} takes nothing for an empty image",
                driver.name()
            )));
        }
        let named = outer::by_name(input.path());
        let damaged = |what: &str| {
            Error::wrong_format(format!("the name says {what}, the content does not begin like it"))
                .at(0)
                .hint(format!(
                    "the file is damaged or misnamed; -f {} takes its bytes as they are",
                    driver.name()
                ))
        };
        if let Some(compression) = named
            && input.compression().is_empty()
        {
            return Err(damaged(compression.name()));
        }
        let stem = if named.is_some() { input.path().file_stem() } else { input.path().file_name() };
        let by_name = stem.and_then(|stem| self.by_extension(&stem.to_string_lossy()));
        match by_name.filter(|other| other.name() != driver.name()) {
            Some(other) => Err(damaged(other.name())),
            None => Ok(()),
        }
    }
}

/// An image that was opened, and how.
pub struct Opened {
    /// The name for messages.
    pub path: PathBuf,
    /// The driver that opened it.
    pub driver: Arc<dyn Driver>,
    /// The layers of outer compression that are undone, outermost first.
    pub compression: Vec<Compression>,
    /// Length of the file itself in bytes, if it is a file.
    pub stored_len: Option<u64>,
    /// It came as a stream and was copied to temporary storage.
    pub spooled: bool,
    /// The image.
    pub source: Box<dyn ImageSource>,
}
