//! Measuring and creating images.

mod child;
mod dynamic;
mod fixed;

use imgtool_core::block_sink::{BlockSettings, measure};
use imgtool_core::child_sink;
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::source::data_bytes;
use imgtool_core::table::TableWriter;
use imgtool_core::{
    BackingName, CreateOptions, Error, ImageSink, ImageSource, ImageWriter, Manifest, Measure, OutputFactory,
    Result, TableMemory,
};
use uuid::Uuid;

use crate::layout::footer::{FOOTER_LEN, Footer, Geometry};
use crate::options::{VhdOptions, bat_len, header};
use child::Parent;
use dynamic::DynamicLayout;
use fixed::FixedSink;

/// Writer of images with these options.
#[derive(Debug)]
pub(crate) struct VhdWriter(VhdOptions);

impl VhdWriter {
    /// Parses the options.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        Ok(Self(VhdOptions::parse(options)?))
    }
}

impl ImageWriter for VhdWriter {
    fn tables(&self, manifest: &Manifest) -> TableMemory {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT).ok().filter(|_| !options.is_fixed());
        let virtual_size = device.and_then(|device| options.virtual_size(device.size).ok());
        let memory = if options.backing.is_some() { child_sink::table_memory } else { TableWriter::memory };
        virtual_size.map_or(TableMemory::default(), |size| memory(bat_len(&header(size))))
    }

    fn backing(&self) -> Option<BackingName> {
        self.0.backing.clone()
    }

    fn describes_backing(&self) -> bool {
        true
    }

    fn writes_stream(&self) -> bool {
        self.0.is_fixed()
    }

    fn stream_option(&self) -> Option<&'static str> {
        self.0.backing.is_none().then_some("subformat=fixed")
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let Self(options) = self;
        let device = source.info().single("a VHD image")?;
        let virtual_size = options.virtual_size(device.size).map_err(|e| e.device(&*device.name))?;
        if options.is_fixed() {
            let required = virtual_size + FOOTER_LEN as u64;
            let occupied = match options.zero_unit {
                Some(_) => data_bytes(source, device)?,
                None => device.size,
            };
            return Ok(Measure { required, fully_allocated: required, occupied, ..Measure::default() });
        }
        let header = header(virtual_size);
        let settings = BlockSettings { device_size: device.size, fixed: false, zero_unit: options.zero_unit };
        measure(source, device, settings, header.block_size, |blocks| dynamic::file_len(&header, blocks))
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT)?;
        if device.open_ended {
            return Err(Error::unsupported("VHD needs the size of a disk before its data")
                .hint("save the stream to a file first"));
        }
        let info = manifest.base_info.as_ref().filter(|_| options.backing.is_some());
        let parent = info.map(Parent::new).transpose()?;
        if options.backing.is_some() && parent.is_none() {
            return Err(Error::usage("a differencing VHD image needs its parent, to store its identifier"));
        }
        let own_name = own_name(options, &device.name);
        let virtual_size = match &parent {
            Some(parent) => parent.virtual_size(options, device.size),
            None => options.virtual_size(device.size),
        };
        let virtual_size = virtual_size.map_err(|e| e.device(&*device.name))?;
        let output = outputs.main()?;
        let min_len = match options.is_fixed() {
            true => virtual_size + FOOTER_LEN as u64,
            false => dynamic::file_len(&header(virtual_size), 0),
        };
        if let Some(capacity) = output.capacity().filter(|capacity| *capacity < min_len) {
            return Err(Error::refused(format!(
                "not enough space: the target has {capacity} bytes, the image needs {min_len}"
            ))
            .path(output.location())
            .device(&*device.name));
        }
        if options.is_fixed() {
            return Ok(Box::new(FixedSink::new(
                output,
                device.size,
                virtual_size,
                options.clone(),
                own_name,
            )));
        }
        if output.is_stream() {
            return Err(Error::unsupported("a dynamic VHD image can't be written to a stream")
                .path(output.location())
                .hint("write to a file, or choose the subformat fixed"));
        }
        if let Some(parent) = &parent {
            return Ok(Box::new(child::new(output, manifest, options, parent, virtual_size, own_name)?));
        }
        let layout = DynamicLayout::new(device.size, virtual_size, options.clone(), own_name);
        Ok(Box::new(layout.sink(output, manifest.tables)))
    }
}

/// Returns the name of an image without content, as parameters of its UUID.
fn own_name(options: &VhdOptions, name: &str) -> Vec<u64> {
    if options.blank { Fingerprint::parameters_of(name) } else { Vec::new() }
}

/// Returns the footer of a new image.
fn footer(options: &VhdOptions, virtual_size: u64, uuid: Uuid) -> Footer {
    Footer {
        disk_type: options.disk_type,
        // A dynamic header follows the copy of the footer.
        data_offset: FOOTER_LEN as u64,
        time: options.time,
        creator: [0; 4],
        current_size: virtual_size,
        geometry: Geometry::of(virtual_size),
        uuid: options.uuid.unwrap_or(uuid),
        saved_state: false,
    }
}

/// Returns the note for a virtual size that was rounded up.
fn rounding_note(device_size: u64, virtual_size: u64) -> Vec<String> {
    let note = format!(
        "virtual size rounded up from {device_size} to {virtual_size} bytes; zeros follow the disk, so a \
         GPT's backup header is not at its end"
    );
    (virtual_size != device_size).then_some(note).into_iter().collect()
}
