//! One sink over many: a directory of images, one for each device.

use crate::buffer::BufferPool;
use crate::device::DeviceId;
use crate::error::{Error, Result};
use crate::sink::{Geometry, ImageSink, Prepared, WriteList};
use crate::source::Piece;
use crate::storage::Output;

/// The device of a sink that holds one.
const ONLY: DeviceId = DeviceId(0);

/// Sends device *n* to the *n*-th sink, each of which holds one device (its device 0).
#[derive(Default)]
pub struct FanOut {
    sinks: Vec<Box<dyn ImageSink>>,
}

impl FanOut {
    /// Over these sinks.
    pub fn new(sinks: Vec<Box<dyn ImageSink>>) -> Self {
        Self { sinks }
    }

    fn sink(&self, device: DeviceId) -> &dyn ImageSink {
        // Devices are numbered by whoever built the fan-out: a number beyond is its mistake.
        &*self.sinks[device.0 as usize]
    }
}

impl ImageSink for FanOut {
    fn geometry(&self, device: DeviceId) -> Geometry {
        self.sink(device).geometry(ONLY)
    }

    fn output(&self, device: DeviceId) -> &Output {
        self.sink(device).output(ONLY)
    }

    fn begin(&self) -> Result<()> {
        self.sinks.iter().try_for_each(|sink| sink.begin())
    }

    fn is_verbatim(&self, device: DeviceId) -> bool {
        self.sink(device).is_verbatim(ONLY)
    }

    fn prepare(&self, mut piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        let device = piece.device;
        if device.0 as usize >= self.sinks.len() {
            return Err(Error::usage(format!("no output for device {device}")));
        }
        piece.device = ONLY;
        let mut prepared = self.sink(device).prepare(piece, pool)?;
        prepared.device = device;
        Ok(prepared)
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        self.sink(prepared.device).place(prepared, writes)
    }

    fn resize(&self, device: DeviceId, size: u64) -> Result<()> {
        self.sink(device).resize(ONLY, size)
    }

    fn finish(&self) -> Result<()> {
        self.sinks.iter().try_for_each(|sink| sink.finish())
    }

    fn notes(&self) -> Vec<String> {
        self.sinks.iter().flat_map(|sink| sink.notes()).collect()
    }
}
