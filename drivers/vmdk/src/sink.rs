//! Measuring and creating images.

mod child;
mod flat;
mod sparse;
mod stream;
mod text;

use imgtool_core::block_sink::{BlockSettings, measure};
use imgtool_core::error::escape_control;
use imgtool_core::external::is_plain_name;
use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::source::{data_bytes, for_each_extent};
use imgtool_core::{
    BackingName, CreateOptions, Device, Error, ImageSink, ImageSource, ImageWriter, Manifest, Measure,
    Output, OutputFactory, Result, TableMemory,
};
use std::borrow::Cow;
use std::sync::Arc;

use crate::layout::SECTOR_SIZE;
use crate::options::{GRAIN_SIZE, Subformat, VmdkOptions};
use child::Parent;
use flat::FlatSink;
use sparse::{SparseLayout, SparseSink};
use stream::{Deflaters, StreamSink};
use text::ExtentText;

/// Number of sectors of the extents of a split disk: 2047 MiB, as VMware has it.
const SPLIT_SECTORS: u64 = 2047 << 11;

/// Maximum number of extents of a new split disk: all of them are open at once. Our limit: a process may have
/// 1024 files by default.
const MAX_SPLIT_EXTENTS: u64 = 500;

/// Name that an image has for itself if it is written to a stream.
const NAMELESS: &str = "disk.vmdk";

/// Length in bytes of a file name for which a measured size has room. Linux's limit.
const MAX_NAME: usize = 255;

/// Writer of images with these options.
#[derive(Debug)]
pub(crate) struct VmdkWriter {
    options: VmdkOptions,
    /// Compressors, shared by all images that this writer creates.
    deflaters: Arc<Deflaters>,
}

/// A new image: its options and its extents.
#[derive(Debug, Clone)]
struct NewImage {
    options: VmdkOptions,
    /// Size of the device in bytes, before it is rounded up to whole sectors.
    device_size: u64,
    /// Size of the disk in sectors.
    sectors: u64,
    extents: Vec<NewExtent>,
    parent: Option<Parent>,
}

/// Extension of an image, in lower case.
const EXTENSION: &str = ".vmdk";

/// An extent of a new image.
#[derive(Debug, Clone)]
struct NewExtent {
    /// Name of its file.
    name: String,
    sectors: u64,
}

impl NewImage {
    /// Decides the extents of the image `main` of a device.
    ///
    /// # Errors
    /// `Unsupported` if the device is too large, has another size than its parent, or if the descriptor can't
    /// contain the names of the extents.
    fn new(options: &VmdkOptions, device: &Device, main: &str, parent: Option<Parent>) -> Result<Self> {
        let sectors = match &parent {
            Some(parent) => parent.sectors(options, device.size),
            None => options.sectors(device.size),
        };
        let sectors = sectors.map_err(|error| error.device(&*device.name))?;
        let stem = match main.len().checked_sub(EXTENSION.len()).and_then(|at| main.split_at_checked(at)) {
            Some((stem, extension)) if extension.eq_ignore_ascii_case(EXTENSION) => stem,
            _ => main,
        };
        let single = |name: String| vec![NewExtent { name, sectors }];
        let extents = match options.subformat {
            // libvmdk opens the file that a single file names, so that must be the file's own name.
            Subformat::StreamOptimized | Subformat::MonolithicSparse if is_storable(main) => {
                single(main.to_owned())
            }
            Subformat::StreamOptimized | Subformat::MonolithicSparse => single(NAMELESS.to_owned()),
            Subformat::MonolithicFlat | Subformat::Vmfs => single(format!("{stem}-flat.vmdk")),
            Subformat::SplitSparse => split(sectors, |number| format!("{stem}-s{number:03}.vmdk"))?,
            Subformat::SplitFlat => split(sectors, |number| format!("{stem}-f{number:03}.vmdk"))?,
        };
        if let Some(extent) = extents.iter().find(|extent| !is_storable(&extent.name)) {
            return Err(Error::unsupported(format!(
                "a descriptor can't contain the file name '{}'",
                escape_control(&extent.name)
            ))
            .hint("choose a name without quotes, colons and control characters"));
        }
        Ok(Self { options: options.clone(), device_size: device.size, sectors, extents, parent })
    }

    /// Returns the names of the files beside the image.
    fn companions(&self) -> Vec<String> {
        match self.options.subformat {
            Subformat::StreamOptimized | Subformat::MonolithicSparse => Vec::new(),
            _ => self.extents.iter().map(|extent| extent.name.clone()).collect(),
        }
    }

    /// Returns the text of the descriptor. The content identifier is derived from `fingerprint`.
    fn descriptor(&self, fingerprint: &Fingerprint) -> String {
        let extent_type = match self.options.subformat {
            Subformat::MonolithicFlat | Subformat::SplitFlat => ExtentText::Flat,
            Subformat::Vmfs => ExtentText::Vmfs,
            _ => ExtentText::Sparse,
        };
        text::descriptor(self, extent_type, fingerprint)
    }

    /// Returns a length in bytes for the descriptor that suffices for names of up to [`MAX_NAME`] bytes.
    fn descriptor_len(&self) -> u64 {
        let names = (self.extents.len() * MAX_NAME) as u64;
        self.descriptor(&Fingerprint::default()).len() as u64 + names
    }

    /// Returns notes for the user.
    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        let virtual_size = self.sectors * SECTOR_SIZE;
        if virtual_size != self.device_size {
            notes.push(format!(
                "virtual size rounded up from {} to {virtual_size} bytes; zeros follow the disk",
                self.device_size
            ));
        }
        if self.options.subformat == Subformat::StreamOptimized && !virtual_size.is_multiple_of(GRAIN_SIZE) {
            notes.push(
                "the virtual size is no multiple of 64 KiB, which some importers can't read; the option \
                 align=64k rounds it up"
                    .to_owned(),
            );
        }
        if self.parent.as_ref().is_some_and(|parent| parent.is_stream) {
            notes.push(
                "the parent is a stream, whose content identifier does not show its content: readers accept any \
                 stream of its size in its place; convert it to another subformat first"
                    .to_owned(),
            );
        }
        notes
    }
}

/// True if a descriptor can contain the name of a file.
fn is_storable(name: &str) -> bool {
    is_plain_name(name) && !name.contains(['"', '\u{fffd}'])
}

/// Splits a disk into extents.
fn split(sectors: u64, name: impl Fn(u64) -> String) -> Result<Vec<NewExtent>> {
    let count = sectors.div_ceil(SPLIT_SECTORS).max(1);
    if count > MAX_SPLIT_EXTENTS {
        return Err(Error::unsupported(format!(
            "a split image would have {count} extents; the limit is {MAX_SPLIT_EXTENTS}"
        ))
        .hint("choose another subformat"));
    }
    let extent = |index: u64| NewExtent {
        name: name(index + 1),
        sectors: (sectors - index * SPLIT_SECTORS).min(SPLIT_SECTORS),
    };
    Ok((0..count).map(extent).collect())
}

impl VmdkWriter {
    /// Parses the options.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        let options = VmdkOptions::parse(options)?;
        let deflaters = Arc::new(Deflaters::new(options.level));
        Ok(Self { options, deflaters })
    }

    fn image(&self, manifest: &Manifest, main: &str) -> Result<NewImage> {
        let parent = match (&self.options.backing, &manifest.base_info) {
            (Some(backing), Some(info)) => Some(Parent::new(info, &backing.name)?),
            _ => None,
        };
        NewImage::new(&self.options, manifest.single(crate::FORMAT)?, main, parent)
    }
}

impl ImageWriter for VmdkWriter {
    fn backing(&self) -> Option<BackingName> {
        self.options.backing.clone()
    }

    fn describes_backing(&self) -> bool {
        true
    }

    fn companions(&self, main: &str, manifest: &Manifest) -> Vec<String> {
        self.image(manifest, main).map(|image| image.companions()).unwrap_or_default()
    }

    fn tables(&self, manifest: &Manifest) -> TableMemory {
        let Ok(image) = self.image(manifest, NAMELESS) else { return TableMemory::default() };
        match self.options.subformat {
            Subformat::StreamOptimized => StreamSink::table_memory(&image),
            Subformat::MonolithicSparse | Subformat::SplitSparse => SparseSink::table_memory(&image),
            Subformat::MonolithicFlat | Subformat::Vmfs | Subformat::SplitFlat => TableMemory::default(),
        }
    }

    fn writes_stream(&self) -> bool {
        self.options.subformat == Subformat::StreamOptimized
    }

    fn stream_option(&self) -> Option<&'static str> {
        self.options.backing.is_none().then_some("subformat=streamOptimized")
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let device = source.info().single("a VMDK image")?;
        let image = NewImage::new(&self.options, device, NAMELESS, None)?;
        let zero_unit = self.options.zero_unit;
        match self.options.subformat {
            Subformat::StreamOptimized => measure_stream(&image, source, device),
            Subformat::MonolithicSparse | Subformat::SplitSparse => {
                let settings = BlockSettings { device_size: device.size, fixed: false, zero_unit };
                let has_descriptor = self.options.subformat == Subformat::MonolithicSparse;
                let extent_len =
                    |extent: &NewExtent| SparseLayout::new(extent.sectors, has_descriptor, false).file_len(0);
                let text = if has_descriptor { 0 } else { image.descriptor_len() };
                let tables = image.extents.iter().map(extent_len).sum::<u64>() + text;
                measure(source, device, settings, GRAIN_SIZE, |grains| tables + grains * GRAIN_SIZE)
            }
            Subformat::MonolithicFlat | Subformat::Vmfs | Subformat::SplitFlat => {
                let required = image.sectors * SECTOR_SIZE + image.descriptor_len();
                let occupied = match zero_unit {
                    Some(_) => data_bytes(source, device)?,
                    None => device.size,
                };
                Ok(Measure { required, fully_allocated: required, occupied, ..Measure::default() })
            }
        }
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let device = manifest.single(crate::FORMAT)?;
        if device.open_ended {
            return Err(Error::unsupported("VMDK needs the size of a disk before its data")
                .hint("save the stream to a file first"));
        }
        let output = outputs.main()?;
        if output.is_stream() && !self.writes_stream() {
            return Err(Error::unsupported(format!(
                "a VMDK image of the subformat {} can't be written to a stream",
                self.options.subformat.name()
            ))
            .path(output.location())
            .hint("write to a file, or choose the subformat streamOptimized"));
        }
        if output.capacity().is_some() {
            return Err(Error::unsupported("a VMDK image can't be written into an existing target")
                .path(output.location())
                .hint("write to a new file"));
        }
        let name = output.location().file_name().filter(|_| !output.is_stream());
        let name = name.map_or_else(|| NAMELESS.to_owned(), Cow::into_owned);
        let image = self.image(manifest, &name)?;
        if self.options.backing.is_some() && image.parent.is_none() {
            return Err(Error::usage(
                "a VMDK image over a parent needs that parent, to store its identifier",
            ));
        }
        if self.options.subformat == Subformat::StreamOptimized {
            return Ok(Box::new(StreamSink::new(output, image, Arc::clone(&self.deflaters))));
        }
        let mut all: Vec<Output> = vec![output];
        for name in image.companions() {
            all.push(outputs.beside(&name)?);
        }
        Ok(match self.options.subformat {
            Subformat::MonolithicSparse | Subformat::SplitSparse => {
                Box::new(SparseSink::new(all, image, manifest))
            }
            _ => Box::new(FlatSink::new(all, image)),
        })
    }
}

/// Predicts the size of a stream: an upper bound, since nothing is known about how well the content compresses.
fn measure_stream(image: &NewImage, source: &dyn ImageSource, device: &Device) -> Result<Measure> {
    let fully_allocated = StreamSink::max_len(image, image.sectors.div_ceil(GRAIN_SIZE / SECTOR_SIZE));
    if image.options.zero_unit.is_none() {
        return Ok(Measure { required: fully_allocated, fully_allocated, occupied: 0, ..Measure::default() });
    }
    let Some(random) = source.access().random() else {
        return Err(Error::unsupported("a stream can't be measured").hint("save it to a file first"));
    };
    let (mut grains, mut next) = (0, 0);
    for_each_extent(random, device.id, 0..device.size, |extent| {
        if extent.is_data() {
            let end = extent.end().div_ceil(GRAIN_SIZE);
            grains += end.saturating_sub((extent.start / GRAIN_SIZE).max(next));
            next = end.max(next);
        }
        Ok(())
    })?;
    Ok(Measure {
        required: StreamSink::max_len(image, grains),
        fully_allocated,
        occupied: 0,
        ..Measure::default()
    })
}
