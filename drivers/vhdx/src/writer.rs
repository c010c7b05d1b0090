//! Measuring and creating VHDX images.

use imgtool_core::block_sink::measure;
use imgtool_core::child_sink;
use imgtool_core::table::TableWriter;
use imgtool_core::{
    BackingName, CreateOptions, Error, ImageSink, ImageSource, ImageWriter, Manifest, Measure, NamedFiles,
    OpenOptions, Output, OutputFactory, Result, TableMemory,
};

use crate::layout::bat::SECTOR_BITMAP_LEN;
use crate::options::VhdxOptions;
use crate::sink::{self, child::Parent};
use crate::update::{UpdateOptions, Updater};

/// Writer of images with these options.
#[derive(Debug)]
pub(crate) struct VhdxWriter(VhdxOptions);

impl VhdxWriter {
    /// Parses the options.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        Ok(Self(VhdxOptions::parse(options)?))
    }
}

impl ImageWriter for VhdxWriter {
    fn tables(&self, manifest: &Manifest) -> TableMemory {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT).ok();
        let bat_len = device.and_then(|device| options.max_bat_len(device.size).ok());
        let memory = if options.backing.is_some() { child_sink::table_memory } else { TableWriter::memory };
        bat_len.map_or(TableMemory::default(), memory)
    }

    fn backing(&self) -> Option<BackingName> {
        self.0.backing.clone()
    }

    fn describes_backing(&self) -> bool {
        true
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let Self(options) = self;
        let device = source.info().single("a VHDX image")?;
        let layout = options.layout(device.size, None).map_err(|e| e.device(&*device.name))?;
        let settings = sink::settings(device.size, options);
        measure(source, device, settings, layout.shape.block_size, |blocks| {
            // Every block of a differencing image may need a sector bitmap of its own.
            let bitmaps =
                if options.backing.is_some() { blocks.min(layout.shape.sector_bitmap_blocks()) } else { 0 };
            layout.file_len(blocks) + bitmaps * SECTOR_BITMAP_LEN
        })
    }

    fn update(
        &self,
        image: &Output,
        _files: &mut dyn NamedFiles,
        manifest: &Manifest,
        reads_as_zero: bool,
        options: &OpenOptions,
    ) -> Result<Box<dyn ImageSink>> {
        let Self(VhdxOptions { zero_unit, .. }) = self;
        let update = UpdateOptions { zero_unit: *zero_unit, reads_as_zero };
        Ok(Box::new(Updater::open(image, manifest.single(crate::FORMAT)?, update, &options.memory)?))
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT)?;
        if device.open_ended {
            return Err(Error::unsupported("VHDX needs the size of a disk before its data")
                .hint("save the stream to a file first"));
        }
        let info = manifest.base_info.as_ref().filter(|_| options.backing.is_some());
        let parent = info.map(Parent::new).transpose()?;
        if options.backing.is_some() && parent.is_none() {
            return Err(Error::usage("a differencing VHDX image needs its parent, to store its identifier"));
        }
        let layout = options.layout(device.size, parent.as_ref()).map_err(|e| e.device(&*device.name))?;
        let output = outputs.main()?;
        if output.is_stream() {
            return Err(Error::unsupported("a VHDX image can't be written to a stream")
                .path(output.location())
                .hint("write to a file"));
        }
        let min_len = layout.file_len(if options.fixed { layout.shape.payload_blocks } else { 0 });
        if let Some(capacity) = output.capacity()
            && capacity < min_len
        {
            return Err(Error::refused(format!(
                "not enough space: the target has {capacity} bytes, the image needs {min_len}"
            ))
            .path(output.location())
            .device(&*device.name));
        }
        if let Some(parent) = parent {
            return Ok(Box::new(sink::child::new(output, manifest, options.clone(), layout, parent)?));
        }
        Ok(Box::new(sink::new(output, device.size, options.clone(), layout, manifest.tables)))
    }
}
