//! [`Filtered`], a stream whose pieces pass a [`Filter`].

use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, DeviceId, Doubt, Error, ImageInfo, ImageSource, Loss, Piece, Result, StreamAccess,
};

/// Looks at the pieces of a stream, and may change them.
pub(crate) trait Filter: Send {
    /// Returns the next piece, from those of `stream`; see [`StreamAccess::next_piece`].
    fn next_piece(&mut self, stream: &mut dyn StreamAccess, pool: &BufferPool) -> Result<Option<Piece>>;

    /// Returns the size of an open-ended device, from the one that the stream tells at its end; see
    /// [`StreamAccess::final_size`].
    fn final_size(&self, _device: DeviceId, told: Option<u64>) -> Option<u64> {
        told
    }

    /// Returns what the user should know, after the stream has ended.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// An image that is read in one pass, through a filter.
pub(crate) struct Filtered<F> {
    info: ImageInfo,
    image: Arc<dyn ImageSource>,
    pass: Mutex<Pass<F>>,
}

struct Pass<F> {
    image: Arc<dyn ImageSource>,
    filter: F,
}

impl<F: Filter> Filtered<F> {
    /// Passes the pieces of `image`, which must be a stream, through `filter`. The image then has the facts
    /// `info`.
    pub(crate) fn new(image: Arc<dyn ImageSource>, info: ImageInfo, filter: F) -> Self {
        Self { info, image: Arc::clone(&image), pass: Mutex::new(Pass { image, filter }) }
    }
}

impl<F: Filter + 'static> ImageSource for Filtered<F> {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }

    fn losses(&self) -> Vec<Loss> {
        lock(&self.pass).image.losses()
    }

    fn doubts(&self) -> Vec<Doubt> {
        lock(&self.pass).image.doubts()
    }

    fn verify(&self) -> Result<()> {
        self.image.verify()
    }

    fn damage(&self) -> Option<&Error> {
        self.image.damage()
    }

    fn notes(&self) -> Vec<String> {
        let pass = lock(&self.pass);
        let mut notes = pass.image.notes();
        notes.extend(pass.filter.notes());
        notes
    }
}

impl<F> Pass<F> {
    /// Calls `read` with the stream of the image.
    fn stream<T>(&self, read: impl FnOnce(&mut dyn StreamAccess) -> T) -> Result<T> {
        with_stream(&*self.image, read)
    }
}

fn with_stream<T>(image: &dyn ImageSource, read: impl FnOnce(&mut dyn StreamAccess) -> T) -> Result<T> {
    match image.access() {
        Access::Stream(stream) => Ok(read(&mut *lock(stream))),
        Access::Random(_) => Err(Error::unsupported("the image is no stream")),
    }
}

impl<F: Filter> StreamAccess for Pass<F> {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        let Self { image, filter } = self;
        with_stream(&**image, |stream| filter.next_piece(stream, pool))?
    }

    fn in_order(&self) -> bool {
        self.stream(|stream| stream.in_order()).unwrap_or(false)
    }

    fn final_size(&self, device: DeviceId) -> Option<u64> {
        let told = self.stream(|stream| stream.final_size(device)).ok()?;
        self.filter.final_size(device, told)
    }
}
