//! One sink over many: a directory of images, or an archive and images beside it.

use crate::buffer::BufferPool;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::sink::{Geometry, ImageSink, Prepared, WriteList};
use crate::source::Piece;
use crate::storage::Output;

/// The device of a sink that holds one.
const ONLY: DeviceId = DeviceId(0);

/// Sends each device to one of many sinks.
#[derive(Default)]
pub struct FanOut {
    sinks: Vec<Box<dyn ImageSink>>,
    /// For each device: the index of its sink, and what it is called there.
    places: Vec<(usize, DeviceId)>,
}

impl FanOut {
    /// Sends device *n* to the *n*-th sink, each of which holds one device (its device 0).
    pub fn new(sinks: Vec<Box<dyn ImageSink>>) -> Self {
        let places = (0..sinks.len()).map(|sink| (sink, ONLY)).collect();
        Self { sinks, places }
    }

    /// Sends device *n* to `places[n]`: the index of a sink, and the number of the device there. A
    /// sink of many devices must know them by the same numbers: [`ImageSink::place`] sees them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when a place names a sink that is not there, or another number.
    pub fn with_places(sinks: Vec<Box<dyn ImageSink>>, places: Vec<(usize, DeviceId)>) -> Result<Self> {
        if let Some((sink, _)) = places.iter().find(|(sink, _)| *sink >= sinks.len()) {
            return Err(Error::usage(format!("there is no sink {sink}, only {}", sinks.len())));
        }
        let renumbered =
            |(device, (_, inner)): (usize, &(usize, DeviceId))| *inner != ONLY && inner.0 as usize != device;
        if let Some(device) = places.iter().enumerate().position(renumbered) {
            return Err(Error::usage(format!("device {device} has another number in its sink")));
        }
        Ok(Self { sinks, places })
    }

    fn place_of(&self, device: DeviceId) -> (&dyn ImageSink, DeviceId) {
        // Devices are numbered by whoever built the fan-out: a number beyond is its mistake.
        let (sink, inner) = self.places[device.0 as usize];
        (&*self.sinks[sink], inner)
    }
}

impl ImageSink for FanOut {
    fn geometry(&self, device: DeviceId) -> Geometry {
        let (sink, inner) = self.place_of(device);
        sink.geometry(inner)
    }

    fn output(&self, device: DeviceId) -> &Output {
        let (sink, inner) = self.place_of(device);
        sink.output(inner)
    }

    fn keeps_bytes(&self, device: DeviceId) -> bool {
        let (sink, inner) = self.place_of(device);
        sink.keeps_bytes(inner)
    }

    fn begin(&self) -> Result<()> {
        self.sinks.iter().try_for_each(|sink| sink.begin())
    }

    fn is_verbatim(&self, device: DeviceId) -> bool {
        let (sink, inner) = self.place_of(device);
        sink.is_verbatim(inner)
    }

    fn prepare(&self, mut piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        let device = piece.device;
        if device.0 as usize >= self.places.len() {
            return Err(Error::usage(format!("no output for device {device}")));
        }
        let (sink, inner) = self.place_of(device);
        piece.device = inner;
        let mut prepared = sink.prepare(piece, pool)?;
        prepared.device = device;
        Ok(prepared)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let (sink, _) = self.place_of(prepared.device);
        sink.place(prepared, writes)
    }

    fn resize(&self, device: DeviceId, size: u64) -> Result<()> {
        let (sink, inner) = self.place_of(device);
        sink.resize(inner, size)
    }

    fn finish(&self) -> Result<()> {
        self.sinks.iter().try_for_each(|sink| sink.finish())
    }

    fn notes(&self) -> Vec<String> {
        self.sinks.iter().flat_map(|sink| sink.notes()).collect()
    }
}
