//! Measuring and creating raw images.

use imgtool_core::source::data_bytes;
use imgtool_core::{Error, ImageSink, ImageSource, ImageWriter, Manifest, Measure, OutputFactory, Result};

use crate::options::{Preallocation, WriteOptions};
use crate::sink::RawSink;

/// Writer of raw images with these options.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawWriter(pub(crate) WriteOptions);

impl ImageWriter for RawWriter {
    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let device = source.info().single("a raw image")?;
        let writes_all = self.0.stores_zeros || self.0.preallocation != Preallocation::Off;
        Ok(Measure {
            // The file's length, holes included: the output's file system decides whether they save space.
            required: device.size,
            fully_allocated: device.size,
            occupied: if writes_all { device.size } else { data_bytes(source, device)? },
            ..Measure::default()
        })
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let device = manifest.single(crate::FORMAT)?;
        let output = outputs.main()?;
        if let Some(capacity) = output.capacity()
            && capacity < device.size
        {
            return Err(Error::refused(format!(
                "not enough space: the target has {capacity} bytes, the device needs {}",
                device.size
            ))
            .device(&*device.name));
        }
        Ok(Box::new(RawSink::new(output, device, self.0)))
    }
}
