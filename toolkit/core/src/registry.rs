//! [`Registry`], the list of drivers and of openers of URLs, and the choice of a driver by name, extension or
//! content.

use std::sync::Arc;

use crate::driver::{Confidence, Driver};
use crate::error::{Error, Result};
use crate::opener::UrlOpener;
use crate::remedy::Remedy;
use crate::suggest;

/// List of drivers and openers. Cloning is cheap and shares them.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    drivers: Vec<Arc<dyn Driver>>,
    openers: Vec<Arc<dyn UrlOpener>>,
}

impl Registry {
    /// Creates a registry without drivers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a driver, replacing an earlier one of the same name.
    pub fn register(&mut self, driver: impl Driver + 'static) {
        self.drivers.retain(|known| known.name() != driver.name());
        self.drivers.push(Arc::new(driver));
    }

    /// Adds an opener of URLs. It replaces an earlier one for the same schemes.
    pub fn register_opener(&mut self, opener: impl UrlOpener + 'static) {
        self.openers.retain(|known| known.schemes() != opener.schemes());
        self.openers.push(Arc::new(opener));
    }

    /// Returns the opener for URLs of `scheme`, ignoring case.
    pub fn opener(&self, scheme: &str) -> Option<&dyn UrlOpener> {
        let opens = |opener: &&Arc<dyn UrlOpener>| {
            opener.schemes().iter().any(|known| known.eq_ignore_ascii_case(scheme))
        };
        self.openers.iter().find(opens).map(|opener| &**opener)
    }

    /// Returns all drivers, in the order of registration.
    pub fn drivers(&self) -> impl Iterator<Item = &Arc<dyn Driver>> {
        self.drivers.iter()
    }

    /// Returns the driver called `name`, which may be an alias.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if no driver has this name; the hint lists the known names.
    pub fn get(&self, name: &str) -> Result<Arc<dyn Driver>> {
        let is_called = |driver: &&Arc<dyn Driver>| driver.name() == name || driver.aliases().contains(&name);
        self.drivers.iter().find(is_called).cloned().ok_or_else(|| {
            let names = self.drivers.iter().map(|driver| driver.name());
            Error::usage(format!("unknown format '{name}'")).hint(suggest::hint(name, "formats", names))
        })
    }

    /// Returns the first driver that has the extension of `file_name`, ignoring case.
    pub fn by_extension(&self, file_name: &str) -> Option<Arc<dyn Driver>> {
        let lower = file_name.to_ascii_lowercase();
        self.drivers
            .iter()
            .find(|driver| driver.extensions().iter().any(|ext| lower.ends_with(&format!(".{ext}"))))
            .cloned()
    }

    /// Returns the driver whose images consist of their disk's bytes ([`crate::Capabilities::verbatim`]).
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if no verbatim driver is registered.
    pub fn verbatim(&self) -> Result<Arc<dyn Driver>> {
        let verbatim = self.drivers.iter().find(|driver| driver.capabilities().verbatim);
        verbatim.cloned().ok_or_else(|| Error::usage("no driver for raw disks is registered"))
    }

    /// Returns the driver that recognises an image with the highest confidence, and this confidence. `head`
    /// contains the first bytes of the image; `len` is its file size in bytes, if known.
    ///
    /// # Errors
    /// [`crate::ErrorKind::WrongFormat`] if no driver recognises the image.
    pub fn probe(&self, head: &[u8], len: Option<u64>) -> Result<(Arc<dyn Driver>, Confidence)> {
        let mut best: Option<(Confidence, &Arc<dyn Driver>)> = None;
        for driver in &self.drivers {
            if let Some(confidence) = driver.probe(head, len)
                && best.as_ref().is_none_or(|(known, _)| confidence > *known)
            {
                best = Some((confidence, driver));
            }
        }
        best.map(|(confidence, driver)| (Arc::clone(driver), confidence)).ok_or_else(|| {
            Error::wrong_format("no driver recognises this image").remedied_by(Remedy::NameFormat)
        })
    }
}
