//! A look at the pieces on their way into a sink.

use imgtool_toolkit::{
    BufferPool, DeviceId, Geometry, ImageSink, Output, Piece, Prepared, Result, WriteList,
};

/// Is shown every piece, by many threads at once.
pub trait Observe: Sync + Send {
    /// Pieces are to start at multiples of this many bytes.
    fn granule(&self) -> u64;

    /// A piece that comes by.
    fn piece(&self, piece: &Piece);
}

/// A sink in front of another.
pub struct ObservedSink<'a> {
    inner: &'a dyn ImageSink,
    observer: &'a dyn Observe,
}

impl<'a> ObservedSink<'a> {
    /// Shows `observer` what goes into `inner`.
    pub fn new(inner: &'a dyn ImageSink, observer: &'a dyn Observe) -> Self {
        Self { inner, observer }
    }
}

impl ImageSink for ObservedSink<'_> {
    fn geometry(&self, device: DeviceId) -> Geometry {
        let inner = self.inner.geometry(device);
        let granule = inner.granule.max(self.observer.granule());
        let piece_len = inner.piece_len.max(granule);
        Geometry { granule, piece_len, max_zero_len: inner.max_zero_len.max(piece_len), ..inner }
    }

    fn output(&self, device: DeviceId) -> &Output {
        self.inner.output(device)
    }

    fn keeps_bytes(&self, device: DeviceId) -> bool {
        self.inner.keeps_bytes(device)
    }

    fn preamble(&self) -> Result<Vec<u8>> {
        self.inner.preamble()
    }

    fn begin(&self) -> Result<()> {
        self.inner.begin()
    }

    fn append_only(&self) -> bool {
        self.inner.append_only()
    }

    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        self.observer.piece(&piece);
        self.inner.prepare(piece, pool)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        self.inner.place(prepared, writes)
    }

    fn resize(&self, device: DeviceId, size: u64) -> Result<()> {
        self.inner.resize(device, size)
    }

    fn finish(&self) -> Result<()> {
        self.inner.finish()
    }

    fn notes(&self) -> Vec<String> {
        self.inner.notes()
    }
}

/// A sink that keeps nothing: for reading an image to its end.
pub struct Nowhere(Output);

impl Default for Nowhere {
    fn default() -> Self {
        Self(Output::from_writer("", Box::new(std::io::sink())))
    }
}

impl ImageSink for Nowhere {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        Geometry {
            granule: 4096,
            granule_required: false,
            piece_len: 256 * 1024,
            max_zero_len: u64::MAX,
            ordered: false,
        }
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.0
    }

    fn prepare(&self, piece: Piece, _pool: &BufferPool) -> Result<Prepared> {
        Ok(Prepared::taken(piece))
    }

    fn place(&self, _prepared: &Prepared, _writes: &mut WriteList) -> Result<()> {
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}
