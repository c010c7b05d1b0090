//! [`UrlOpener`], which opens the bytes behind URLs.

use std::fmt;

use crate::error::Result;
use crate::input::Input;
use crate::location::Url;
use crate::memory::Memory;

/// Opens the bytes behind the URLs of some schemes. A [`crate::Registry`] lists the openers.
///
/// Only a location that the user names reaches an opener: a name inside an image never does.
pub trait UrlOpener: fmt::Debug + Send + Sync {
    /// Returns the schemes of the URLs that it opens, in lower case.
    fn schemes(&self) -> &'static [&'static str];

    /// Opens the bytes behind a URL. Caches borrow from `memory`.
    ///
    /// # Errors
    /// If the URL is invalid, or the bytes can't be had; [`crate::ErrorKind::Unavailable`] if another try may
    /// help.
    fn open(&self, url: &Url, memory: &Memory) -> Result<Input>;
}
