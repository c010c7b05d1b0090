//! [`Tail`], a stream that is refused if it ends like an image of another format.
//!
//! A fixed VHD begins with its disk, so the pipe that brings one looks like a raw disk until its end.

use std::sync::{Arc, Mutex};

use imgtool_core::input::PROBE_END_LEN;
use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, DeviceId, Error, ImageInfo, ImageSource, Piece, Registry, Remedy, Result,
    StreamAccess,
};

/// A raw disk that is read in one pass, in guest order.
pub(crate) struct Tail {
    info: ImageInfo,
    pass: Mutex<Pass>,
}

struct Pass {
    image: Arc<dyn ImageSource>,
    registry: Registry,
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
        let pass = Pass { image, registry: registry.clone(), end: Vec::new() };
        Arc::new(Self { info, pass: Mutex::new(pass) })
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

impl ImageSource for Tail {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }
}

impl Pass {
    /// Calls `read` with the stream of the image.
    fn stream<T>(&self, read: impl FnOnce(&mut dyn StreamAccess) -> T) -> Result<T> {
        match self.image.access() {
            Access::Stream(stream) => Ok(read(&mut *lock(stream))),
            Access::Random(_) => Err(Error::unsupported("the image is no stream")),
        }
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

impl StreamAccess for Pass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        let piece = self.stream(|stream| stream.next_piece(pool))??;
        match &piece {
            Some(piece) => self.keep(piece),
            None => refuse_other_end(&self.registry, self.image.info().format, &self.end)?,
        }
        Ok(piece)
    }

    fn in_order(&self) -> bool {
        self.stream(|stream| stream.in_order()).unwrap_or(false)
    }

    fn final_size(&self, device: DeviceId) -> Option<u64> {
        self.stream(|stream| stream.final_size(device)).ok()?
    }
}
