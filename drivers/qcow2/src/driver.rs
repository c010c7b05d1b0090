//! Driver for the registry, and the writer that it creates.

use std::sync::Arc;

use imgtool_core::{
    BackingName, Capabilities, CheckReport, Confidence, CreateOptions, Driver, ImageSink, ImageSource,
    ImageWriter, InPlace, Input, Manifest, Measure, NamedFiles, OpenOptions, OptionSpec, Output,
    OutputFactory, Repair, Resize, Result, TableMemory,
};

use crate::compressed::Encoder;
use crate::layout::FORMAT;
use crate::layout::header::MAGIC;
use crate::options::{OPTIONS, SIZE_MULTIPLE, WriteOptions};
use crate::sink::{Qcow2Sink, table_memory};
use crate::source::Qcow2Source;
use crate::update::{UpdateOptions, Updater};
use crate::{check, measure, repair, resize};

/// Driver for QEMU's qcow2 format.
#[derive(Debug, Clone, Copy, Default)]
pub struct Qcow2Driver;

impl Driver for Qcow2Driver {
    fn name(&self) -> &'static str {
        FORMAT
    }

    fn description(&self) -> &'static str {
        "QEMU copy-on-write, versions 2 and 3"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["qcow2", "qcow"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            read: true,
            write: true,
            stream_read: false,
            stream_write: false,
            archive: None,
            container: false,
            stream_member: false,
            verbatim: false,
            in_place: InPlace::BlockDevices,
            updates: true,
            compression: true,
            snapshots: true,
            open_ended: true,
            sized_by_end: false,
            size_multiple: SIZE_MULTIPLE,
            check: true,
        }
    }

    fn options(&self) -> &'static [OptionSpec] {
        OPTIONS
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        // Accept any version: `open` refuses an unknown one and names it.
        head.starts_with(&MAGIC).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        Ok(Arc::new(Qcow2Source::open(input, options)?))
    }

    fn check(&self, input: Input, options: &OpenOptions) -> Result<CheckReport> {
        check::check(input, options)
    }

    fn repair(&self, image: &Output, what: Repair, options: &OpenOptions) -> Result<CheckReport> {
        repair::repair(image, what, options)
    }

    fn resize(&self, image: &Output, resize: Resize, options: &OpenOptions) -> Result<()> {
        resize::resize(image, resize, options)
    }

    fn writer(&self, options: &CreateOptions) -> Result<Box<dyn ImageWriter>> {
        let options = WriteOptions::parse(options)?;
        let encoder = options.compress.map(|level| Arc::new(Encoder::new(options.compression, level)));
        Ok(Box::new(Qcow2Writer { options, encoder }))
    }
}

/// Writer of images with checked options.
struct Qcow2Writer {
    options: WriteOptions,
    /// Compressors, shared by all images that this writer creates: a conversion of many disks needs only as
    /// many as it has workers.
    encoder: Option<Arc<Encoder>>,
}

impl ImageWriter for Qcow2Writer {
    fn backing(&self) -> Option<BackingName> {
        self.options.backing.clone()
    }

    fn stores_bitmaps(&self) -> bool {
        self.options.version >= 3
    }

    fn encrypts(&self) -> bool {
        self.options.encryption.is_some()
    }

    fn companions(&self, _main: &str, _manifest: &Manifest) -> Vec<String> {
        self.options.data_file.iter().cloned().collect()
    }

    fn tables(&self, manifest: &Manifest) -> TableMemory {
        table_memory(manifest, &self.options)
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        measure::measure(source, &self.options)
    }

    fn update(
        &self,
        image: &Output,
        files: &mut dyn NamedFiles,
        manifest: &Manifest,
        reads_as_zero: bool,
        options: &OpenOptions,
    ) -> Result<Box<dyn ImageSink>> {
        let update = UpdateOptions {
            zero_unit: self.options.zero_unit,
            reads_as_zero,
            level: self.options.compress,
            algorithm: self.options.states_compression.then_some(self.options.compression),
        };
        Ok(Box::new(Updater::open(image, files, manifest.single(FORMAT)?, update, options)?))
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        Ok(Box::new(Qcow2Sink::create(outputs, manifest, &self.options, self.encoder.clone())?))
    }
}
