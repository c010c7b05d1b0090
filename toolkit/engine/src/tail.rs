//! [`Tail`], which refuses a stream that ends like an image of another format.
//!
//! A fixed VHD begins with its disk, so the pipe that brings one looks like a raw disk until its end.

use std::sync::Arc;

use imgtool_core::input::PROBE_END_LEN;
use imgtool_core::{BufferPool, Error, ImageSource, Piece, Registry, Remedy, Result, StreamAccess};

use crate::filtered::{Filter, Filtered};

/// The last bytes of a raw disk that is read in one pass, in guest order.
pub(crate) struct Tail {
    registry: Registry,
    /// Name of the format as which the disk is read.
    format: &'static str,
    /// Last bytes so far, up to [`PROBE_END_LEN`].
    end: Vec<u8>,
}

impl Tail {
    /// Wraps a raw disk, unless it can be read by position.
    pub(crate) fn guard(image: Arc<dyn ImageSource>, registry: &Registry) -> Arc<dyn ImageSource> {
        if !image.access().is_stream() {
            return image;
        }
        let info = image.info().clone();
        let tail = Self { registry: registry.clone(), format: info.format, end: Vec::new() };
        Arc::new(Filtered::new(image, info, tail))
    }

    /// Keeps the last bytes of a piece.
    fn keep(&mut self, piece: &Piece) {
        // At most 512 bytes of a piece count.
        let len = piece.len.min(PROBE_END_LEN as u64) as usize;
        match piece.data.as_deref() {
            Some(data) => self.end.extend_from_slice(&data[data.len().saturating_sub(len)..]),
            None => self.end.resize(self.end.len() + len, 0),
        }
        self.end.drain(..self.end.len().saturating_sub(PROBE_END_LEN));
    }
}

/// Refuses a raw disk that ends like an image of another format.
///
/// # Errors
/// [`imgtool_core::ErrorKind::WrongFormat`] for such an end.
pub(crate) fn refuse_other_end(registry: &Registry, raw: &'static str, end: &[u8]) -> Result<()> {
    match registry.drivers().find(|other| other.probe_end(Some(end))) {
        Some(other) => Err(Error::wrong_format(format!("ends like a {} image", other.name()))
            .remedied_by(Remedy::ChooseFormat { formats: [other.name(), raw] })),
        None => Ok(()),
    }
}

impl Filter for Tail {
    fn next_piece(&mut self, stream: &mut dyn StreamAccess, pool: &BufferPool) -> Result<Option<Piece>> {
        let piece = stream.next_piece(pool)?;
        match &piece {
            Some(piece) => self.keep(piece),
            None => refuse_other_end(&self.registry, self.format, &self.end)?,
        }
        Ok(piece)
    }
}
