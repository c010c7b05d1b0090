//! Measuring and creating images.

use imgtool_core::base::Base;
use imgtool_core::block_sink::{BlockLayout, BlockSettings, BlockSink, measure};
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::table::TableWriter;
use imgtool_core::{
    BackingName, CreateOptions, Error, ImageInfo, ImageSink, ImageSource, ImageWriter, Manifest, Measure,
    Output, OutputFactory, Result, TableMemory,
};
use uuid::Uuid;

use crate::layout::{ENTRY_LEN, Entry, Header};
use crate::options::VdiOptions;
use crate::source::{MODIFICATION_UUID, UUID};

/// Writer of images with these options.
#[derive(Debug)]
pub(crate) struct VdiWriter(VdiOptions);

impl VdiWriter {
    /// Parses the options.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        Ok(Self(VdiOptions::parse(options)?))
    }
}

impl ImageWriter for VdiWriter {
    fn backing(&self) -> Option<BackingName> {
        self.0.backing.clone()
    }

    fn describes_backing(&self) -> bool {
        true
    }

    fn tables(&self, manifest: &Manifest) -> TableMemory {
        let header = manifest.single(crate::FORMAT).and_then(|device| self.0.layout(device.size));
        header.map_or(TableMemory::default(), |header| TableWriter::memory(header.blocks * ENTRY_LEN))
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let device = source.info().single("a VDI image")?;
        let header = self.0.layout(device.size).map_err(|e| e.device(&*device.name))?;
        let settings = self.settings(device.size);
        measure(source, device, settings, header.block_size, |blocks| {
            header.data_offset + blocks * header.block_size
        })
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let Self(options) = self;
        let device = manifest.single(crate::FORMAT)?;
        if device.open_ended {
            return Err(Error::unsupported("VDI needs the size of a disk before its data")
                .hint("save the stream to a file first"));
        }
        let mut header = options.layout(device.size).map_err(|e| e.device(&*device.name))?;
        if options.backing.is_some() {
            let info = manifest.base_info.as_ref().ok_or_else(|| {
                Error::usage("a differencing VDI image needs its parent, to store its identifiers")
            })?;
            name_parent(&mut header, info).map_err(|e| e.device(&*device.name))?;
        }
        let output = outputs.main()?;
        if output.is_stream() {
            return Err(Error::unsupported("a VDI image can't be written to a stream")
                .path(output.location())
                .hint("write to a file"));
        }
        let blocks = if options.is_fixed() { header.blocks } else { 0 };
        let min_len = header.data_offset + blocks * header.block_size;
        if let Some(capacity) = output.capacity().filter(|capacity| *capacity < min_len) {
            return Err(Error::refused(format!(
                "not enough space: the target has {capacity} bytes, the image needs {min_len}"
            ))
            .path(output.location())
            .device(&*device.name));
        }
        let map = TableWriter::new(
            output.clone(),
            header.map_offset,
            header.blocks * ENTRY_LEN,
            0xff,
            manifest.tables,
        );
        let own_name = if options.blank { Fingerprint::parameters_of(&device.name) } else { Vec::new() };
        let layout = VdiLayout { header, options: options.clone(), device_size: device.size, own_name };
        let sink = BlockSink::new(output, map, layout, self.settings(device.size));
        Ok(match manifest.base.clone().filter(|_| options.backing.is_some()) {
            Some(base) => Box::new(sink.over(Base::new(base))),
            None => Box::new(sink),
        })
    }
}

impl VdiWriter {
    fn settings(&self, device_size: u64) -> BlockSettings {
        BlockSettings { device_size, fixed: self.0.is_fixed(), zero_unit: self.0.zero_unit }
    }
}

/// Enters the parent with these facts into the header of its child.
///
/// # Errors
/// `Unsupported` if the parent is no VDI image with both UUIDs, or has another size than the child: VirtualBox makes
/// children of the size of their parent alone.
fn name_parent(header: &mut Header, parent: &ImageInfo) -> Result<()> {
    let uuid = |key: &str| {
        let fact = parent.facts.iter().find(|fact| fact.key == key);
        let uuid = fact.and_then(|fact| fact.value.as_str()).and_then(|text| Uuid::try_parse(text).ok());
        uuid.filter(|uuid| !uuid.is_nil()).ok_or_else(|| {
            Error::unsupported(format!("the parent of a VDI image must be a VDI image with a {key}"))
                .hint("convert the parent to a new VDI image first")
        })
    };
    header.parent_uuid = uuid(UUID)?;
    header.parent_modification_uuid = uuid(MODIFICATION_UUID)?;
    let size = parent.single("a VDI image")?.size;
    if size != header.virtual_size {
        return Err(Error::unsupported(format!(
            "the disk has {} bytes, and its parent {size}: a differencing VDI image is as large as its parent",
            header.virtual_size
        ))
        .hint("choose VHDX or qcow2 for the new image, or a parent of the same size"));
    }
    Ok(())
}

/// The layout and the properties of a new image.
struct VdiLayout {
    /// The header without UUIDs and the number of stored blocks.
    header: Header,
    options: VdiOptions,
    /// Size of the device in bytes, before it is rounded up to whole sectors.
    device_size: u64,
    /// Name of an image without content, as parameters of its UUIDs.
    own_name: Vec<u64>,
}

impl BlockLayout for VdiLayout {
    fn block_size(&self) -> u64 {
        self.header.block_size
    }

    fn data_offset(&self, position: u64) -> u64 {
        self.header.data_offset + position * self.header.block_size
    }

    fn is_aligned(&self) -> bool {
        true
    }

    fn position(&self, map: &mut TableWriter, index: u64) -> Result<Option<u64>> {
        Ok(match Entry::decode(map.get(index)?) {
            Entry::Stored(position) => Some(position.into()),
            Entry::Zero | Entry::Absent => None,
        })
    }

    fn allocate(&self, map: &mut TableWriter, index: u64, position: u64) -> Result<()> {
        // `VdiOptions::layout` bounds the number of blocks.
        map.set(index, Entry::Stored(u32::try_from(position).unwrap_or(u32::MAX)).encode())
    }

    fn set_zero(&self, map: &mut TableWriter, index: u64) -> Result<()> {
        map.set(index, Entry::Zero.encode())
    }

    fn finish(&self, output: &Output, blocks: u64, fingerprint: &Fingerprint) -> Result<()> {
        let mut parameters =
            vec![self.device_size, self.header.block_size, u64::from(self.options.is_fixed())];
        for parent in [self.header.parent_uuid, self.header.parent_modification_uuid] {
            let (high, low) = parent.as_u64_pair();
            parameters.extend((!parent.is_nil()).then_some([high, low]).into_iter().flatten());
        }
        parameters.extend(&self.own_name);
        let derived = |purpose| fingerprint.guid(purpose, &parameters);
        let header = Header {
            allocated: blocks,
            uuid: self.options.uuid.unwrap_or_else(|| derived("vdi image")),
            modification_uuid: self.options.modification_uuid.unwrap_or_else(|| derived("vdi content")),
            ..self.header.clone()
        };
        let bytes = header.encode();
        if output.needs_zeros() {
            output.write_zeros_at(bytes.len() as u64, self.header.map_offset - bytes.len() as u64)?;
            output.write_zeros_at(header.map_end(), header.data_offset - header.map_end())?;
        }
        output.write_at(&bytes, 0)
    }

    fn notes(&self) -> Vec<String> {
        let virtual_size = self.header.virtual_size;
        let mut notes = Vec::new();
        if virtual_size != self.device_size {
            notes.push(format!(
                "virtual size rounded up from {} to {virtual_size} bytes, a multiple of a sector",
                self.device_size
            ));
        }
        if !self.header.parent_uuid.is_nil() {
            notes.push(format!(
                "a VDI image stores no name of its parent, only its UUID {}: keep both in one directory",
                self.header.parent_uuid
            ));
        }
        notes
    }
}
