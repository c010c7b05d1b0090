//! Reads the files of HTTP servers, as inputs for imgtool: `http` and `https` URLs.
//!
//! * [`HttpOpener`] opens a URL; add it to a registry with [`imgtool_core::Registry::register_opener`].
//! * [`Settings`] are the certificates and headers of the user.
//!
//! A server that answers ranges gives a file that is read by position, by many requests at once: a conversion
//! transfers what the image stores. Any other server gives a stream. Every answer is checked: that its bytes
//! are those that were asked for, and those of the same version of the file. The client is blocking: each
//! reader waits in a thread of its own.

use imgtool_core::location::Url;
use imgtool_core::{Input, Memory, Result, UrlOpener};

mod address;
mod ahead;
mod blocks;
mod client;
mod object;
mod open;
pub mod range;
mod retry;
mod settings;
mod target;

pub use settings::Settings;

/// Opens `http` and `https` URLs.
#[derive(Debug, Clone, Default)]
pub struct HttpOpener {
    settings: Settings,
}

impl HttpOpener {
    /// Creates an opener with these certificates and headers.
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }
}

impl UrlOpener for HttpOpener {
    fn schemes(&self) -> &'static [&'static str] {
        &["http", "https"]
    }

    fn open(&self, url: &Url, memory: &Memory) -> Result<Input> {
        open::open(url, &self.settings, memory).map_err(|e| e.path(url.clone()))
    }
}
