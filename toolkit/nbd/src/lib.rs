//! Reads the exports of NBD servers, as inputs for imgtool: `nbd` and `nbd+unix` URLs.
//!
//! [`NbdOpener`] opens a URL; add it to a registry with [`imgtool_core::Registry::register_opener`]. The
//! bytes of an export are those of a disk, or of an image in it, as those of a block device are. The client
//! is blocking: each reader waits for a connection of its own.

use std::sync::Arc;

use imgtool_core::{Error, Input, Location, Memory, Result, Url, UrlOpener};

mod disk;
mod socket;
pub mod uri;
pub mod wire;

use disk::RemoteDisk;
use uri::Uri;

/// Opens `nbd` and `nbd+unix` URLs.
#[derive(Debug, Clone, Copy, Default)]
pub struct NbdOpener;

impl UrlOpener for NbdOpener {
    fn schemes(&self) -> &'static [&'static str] {
        &["nbd", "nbd+unix", "nbds", "nbds+unix"]
    }

    fn open(&self, url: &Url, _memory: &Memory) -> Result<Input> {
        let location = Location::Url(url.clone());
        if url.scheme().to_ascii_lowercase().starts_with("nbds") {
            return Err(Error::unsupported("NBD over TLS is not supported yet")
                .path(location)
                .hint("tunnel the connection with another program, and name that with nbd://"));
        }
        let opened = Uri::parse(url.secret_text()).and_then(|uri| RemoteDisk::open(location.clone(), &uri));
        let disk = opened.map_err(|error| error.path(&location))?;
        Ok(Input::from_read_at(location, Arc::new(disk)))
    }
}
