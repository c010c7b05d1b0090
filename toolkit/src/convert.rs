//! The usual conversion in one call: an opened image becomes a file of another format.
//!
//! What takes more (several outputs in one pass, block devices, pipes, outer compression) is put
//! together from [`Outputs`], [`crate::FanOut`], [`crate::PackedSink`] and [`pipeline::copy`].

use std::path::Path;

use crate::device::{Attachment, Device, DeviceId, Manifest};
use crate::driver::{CreateOptions, Driver};
use crate::error::{Error, Result};
use crate::pipeline::{self, Job, Route, Totals};
use crate::progress::{CancelToken, NoProgress, Progress};
use crate::source::ImageSource;
use crate::storage::Outputs;

/// A conversion into one new file.
///
/// ```
/// use imgtool_toolkit::{Conversion, Input, OpenOptions, Registry, Result};
/// use std::path::Path;
///
/// /// Converts `from`, whatever it is, into the format that the extension of `to` names.
/// fn convert(registry: &Registry, from: &Path, to: &Path) -> Result<u64> {
///     let mut opened = registry.open(Input::open(from)?, None, &OpenOptions::default())?;
///     let driver = match registry.by_extension(&to.to_string_lossy()) {
///         Some(driver) => driver,
///         None => registry.get("raw")?,
///     };
///     let totals = Conversion::new(&*driver).threads(4).to_file(&mut *opened.source, to)?;
///     Ok(totals.guest_bytes)
/// }
///
/// // Without drivers nothing can be opened.
/// let error = convert(&Registry::new(), Path::new("/dev/null"), Path::new("out.raw")).unwrap_err();
/// assert_eq!(error.kind(), imgtool_toolkit::ErrorKind::WrongFormat);
/// ```
pub struct Conversion<'a> {
    driver: &'a dyn Driver,
    options: CreateOptions,
    disks: Vec<String>,
    overwrite: bool,
    threads: usize,
    progress: &'a dyn Progress,
    cancel: CancelToken,
}

impl<'a> Conversion<'a> {
    /// A conversion into the format of `driver`: all devices, the driver's default options, one
    /// thread, no progress, never cancelled, nothing overwritten.
    pub fn new(driver: &'a dyn Driver) -> Self {
        Self {
            driver,
            options: CreateOptions::default(),
            disks: Vec::new(),
            overwrite: false,
            threads: 1,
            progress: &NoProgress,
            cancel: CancelToken::new(),
        }
    }

    /// How the image is made: options, compression.
    #[must_use]
    pub fn options(mut self, options: CreateOptions) -> Self {
        self.options = options;
        self
    }

    /// Takes the devices of this name, and of others named so; without a call all are taken.
    #[must_use]
    pub fn disk(mut self, name: impl Into<String>) -> Self {
        self.disks.push(name.into());
        self
    }

    /// Whether a file of the target's name is replaced, once the new one is finished.
    #[must_use]
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Worker threads, at most [`pipeline::MAX_THREADS`].
    #[must_use]
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }

    /// Who is told how far it has come. Devices are numbered from 0, in the order of the source.
    #[must_use]
    pub fn progress(mut self, progress: &'a dyn Progress) -> Self {
        self.progress = progress;
        self
    }

    /// What stops it: see [`CancelToken::cancel`].
    #[must_use]
    pub fn cancel(mut self, cancel: CancelToken) -> Self {
        self.cancel = cancel;
        self
    }

    /// Makes the file. It has the name `path` only when it is finished; until then, and after an
    /// error or a cancellation, there is nothing of that name that was not there before.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] for a name that is no device's, [`crate::ErrorKind::Refused`] when
    /// `path` exists and is not to be overwritten, [`crate::ErrorKind::Cancelled`]; else those of
    /// source, driver and storage.
    pub fn to_file(&self, source: &mut dyn ImageSource, path: &Path) -> Result<Totals> {
        let (routes, manifest) = self.select(source)?;
        self.driver.check_options(&self.options)?;
        let mut outputs = Outputs::new();
        let output = outputs.create(path, self.overwrite)?;
        let sink = self.driver.create(output, &manifest, &self.options).map_err(|e| e.path(path))?;
        sink.begin()?;
        let job = Job { routes, threads: self.threads, progress: self.progress, cancel: self.cancel.clone() };
        let totals = pipeline::copy(source, &*sink, &job)?;
        sink.finish()?;
        self.cancel.check()?;
        outputs.commit()?;
        Ok(totals)
    }

    /// The devices taken, numbered from 0, and what travels with them.
    fn select(&self, source: &dyn ImageSource) -> Result<(Vec<Route>, Manifest)> {
        let info = source.info();
        if let Some(missing) =
            self.disks.iter().find(|want| !info.devices.iter().any(|device| device.name == **want))
        {
            let names: Vec<&str> = info.devices.iter().map(|device| device.name.as_str()).collect();
            return Err(Error::usage(format!("no device is called '{missing}'"))
                .hint(format!("devices: {}", names.join(", "))));
        }
        let taken =
            info.devices.iter().filter(|device| self.disks.is_empty() || self.disks.contains(&device.name));
        let numbered: Vec<(&Device, DeviceId)> = taken.zip((0..).map(DeviceId)).collect();
        let routes = numbered.iter().map(|(device, to)| Route { from: device.id, to: *to }).collect();
        let devices = numbered.iter().map(|(device, to)| Device { id: *to, ..(*device).clone() }).collect();
        let attachments: Vec<Attachment> =
            if self.driver.capabilities().attachments { info.attachments.clone() } else { Vec::new() };
        Ok((routes, Manifest { devices, attachments }))
    }
}
