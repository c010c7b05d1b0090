//! Creates the sinks of a run, one for each image, and the outputs that they fill.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::error::escape_control;
use imgtool_core::external::BackingName;
use imgtool_core::{
    Disk, Error, ImageSink, Input, Location, Manifest, NamedFiles, OpenOptions, Output, OutputFactory,
    Registry, Remedy, Result, ResultExt, TableMemory,
};
use imgtool_storage::open::Opening;
use imgtool_storage::{CompressedSink, Compressors, Framing, Identity, Outputs, Sharing, os};

use crate::externals::{PolicyOpener, SuppliedFile};
use crate::format::OuterCompression;
use crate::layout::{Destination, Layout, PlannedOutput, is_written_in_place};
use crate::open::{self, Opened};
use crate::report::DiskReport;
use crate::sources::SelectedDisk;

/// Maximum number of bytes by which an existing target may be larger than its disk. Our limit: LVM and others
/// round sizes up to their extents, 4 MiB by default.
pub const SIZE_TOLERANCE: u64 = 4 << 20;

/// Sink of one image.
pub(crate) struct OpenSink {
    pub(crate) sink: Box<dyn ImageSink>,
    /// Main output of the image.
    pub(crate) output: Output,
    /// Files that the image names: its further outputs and its backing image.
    pub(crate) supplied: BTreeMap<String, SuppliedFile>,
    /// Backing image of the new image, if its content was needed.
    pub(crate) base: Option<Opened>,
}

impl OpenSink {
    /// Returns every output of the image, the main output first.
    pub(crate) fn outputs(&self) -> &[Output] {
        self.sink.outputs()
    }

    /// Returns the paths of the backing images that verification opens.
    pub(crate) fn backing_images(&self) -> impl Iterator<Item = &Path> + Clone {
        self.supplied.values().filter_map(|file| match file {
            SuppliedFile::Path(path) => Some(path.as_path()),
            SuppliedFile::Output(_) => None,
        })
    }
}

/// Settings for creating outputs.
#[derive(Clone, Copy)]
pub(crate) struct SinkSettings<'a> {
    pub(crate) registry: &'a Registry,
    /// Opener of the files that existing images name.
    pub(crate) base_opener: &'a PolicyOpener,
    /// Settings for opening the backing images of outputs.
    pub(crate) base_options: &'a OpenOptions,
    /// True to write into targets that are in use, or much larger than the disk.
    pub(crate) force: bool,
    /// True to write into targets of any sufficient size.
    pub(crate) accept_larger: bool,
    /// True to replace existing files.
    pub(crate) overwrite: bool,
    /// True if the outputs stay empty, so backing images need not be opened.
    pub(crate) without_content: bool,
    /// Memory in bytes for the tables of each output.
    pub(crate) shares: &'a [u64],
}

/// Creates the outputs and the sink of every image of a layout.
///
/// # Errors
/// If an output can't be created, or a backing image can't be opened.
pub(crate) fn open_sinks(
    layout: &Layout,
    selected: &[SelectedDisk],
    outputs: &mut Outputs,
    settings: SinkSettings<'_>,
) -> Result<Vec<OpenSink>> {
    let mut compressors = Vec::new();
    let planned = layout.outputs.iter().zip(settings.shares);
    planned
        .map(|(planned, tables)| {
            let manifest = Manifest { tables: Some(*tables), ..planned.manifest(selected) };
            open_sink(planned, layout, manifest, outputs, settings, &mut compressors)
        })
        .collect()
}

/// Returns the memory for the tables of an output.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a compression level out of range.
pub(crate) fn table_memory(planned: &PlannedOutput, selected: &[SelectedDisk]) -> Result<TableMemory> {
    let manifest = planned.manifest(selected);
    let inner = planned.format.writer.tables(&manifest);
    let Some(outer) = planned.format.outer else { return Ok(inner) };
    let len = manifest.devices.iter().fold(0, |sum: u64, device| sum.saturating_add(device.size));
    let len = if manifest.devices.iter().any(|device| device.open_ended) { u64::MAX } else { len };
    let list = CompressedSink::table_memory(Framing::new(outer.compression, outer.level)?, len);
    let sum = |a: u64, b: u64| a.saturating_add(b);
    Ok(TableMemory { least: sum(inner.least, list.least), most: sum(inner.most, list.most) })
}

/// Returns the compressors of an output. Outputs with equal settings share them.
fn shared_compressors(outer: OuterCompression, known: &mut Vec<Compressors>) -> Result<Compressors> {
    let framing = Framing::new(outer.compression, outer.level)?;
    if let Some(shared) = known.iter().find(|shared| shared.framing() == framing) {
        return Ok(shared.clone());
    }
    let new = Compressors::new(framing);
    known.push(new.clone());
    Ok(new)
}

fn open_sink(
    planned: &PlannedOutput,
    layout: &Layout,
    mut manifest: Manifest,
    outputs: &mut Outputs,
    settings: SinkSettings<'_>,
    compressors: &mut Vec<Compressors>,
) -> Result<OpenSink> {
    let location = planned.destination.location();
    outputs.set_copy_on_write(!planned.format.no_copy_on_write());
    let output = open_output(planned, &manifest, layout, outputs, settings)?;
    let mut supplied = BTreeMap::new();
    if let Destination::Image { zeroed, .. } = planned.destination {
        let writer = &planned.format.writer;
        if !manifest.bitmaps.is_empty() {
            return Err(Error::unsupported("bitmaps can't be copied into an image that exists")
                .path(&location)
                .hint("make a new image instead"));
        }
        let mut files =
            ImageFiles { image: &location, opener: settings.base_opener, outputs, opened: &mut supplied };
        let options = settings.base_options;
        let sink = writer.update(&output, &mut files, &manifest, zeroed, options).in_file(&location)?;
        return Ok(OpenSink { sink, output, supplied, base: None });
    }
    let mut base = None;
    if let Some(backing) = planned.format.writer.backing() {
        let path = backing_path(&location, &backing.name)?;
        if !settings.without_content {
            let opened = open_base(settings.registry, &path, &backing, settings.base_options)?;
            manifest.base = Some(Disk::only(Arc::clone(&opened.image), "the backing image").in_file(&path)?);
            manifest.base_info = Some(opened.image.info().clone());
            base = Some(opened);
        } else if planned.format.writer.describes_backing() {
            let options = OpenOptions { info_only: true, ..settings.base_options.clone() };
            let opened = open_base(settings.registry, &path, &backing, &options)?;
            manifest.base_info = Some(opened.image.info().clone());
        }
        if let Some(path) = path.path() {
            supplied.insert(backing.name, SuppliedFile::Path(path.to_owned()));
        }
    }
    let mut factory = Factory {
        main: match planned.format.outer {
            Some(_) => CompressedSink::inner_output(&location),
            None => output.clone(),
        },
        location: &location,
        outputs,
        overwrite: settings.overwrite,
        beside: &mut supplied,
    };
    let sink = planned.format.writer.create(&mut factory, &manifest).in_file(&location)?;
    let sink = match planned.format.outer {
        Some(outer) => {
            let shared = shared_compressors(outer, compressors)?;
            let sink = CompressedSink::sharing(sink, output.clone(), &shared, manifest.tables);
            Box::new(sink.in_file(&location)?)
        }
        None => sink,
    };
    Ok(OpenSink { sink, output, supplied, base })
}

/// Creates the outputs of one image for its driver.
struct Factory<'a> {
    main: Output,
    location: &'a Location,
    outputs: &'a mut Outputs,
    overwrite: bool,
    beside: &'a mut BTreeMap<String, SuppliedFile>,
}

impl OutputFactory for Factory<'_> {
    fn main(&mut self) -> Result<Output> {
        Ok(self.main.clone())
    }

    fn beside(&mut self, name: &str) -> Result<Output> {
        let location = plain_name_beside(self.location, name)?;
        let path = location.path().ok_or_else(|| Error::unsupported("is not a file").path(&location))?;
        let output = self.outputs.create(path, self.overwrite)?;
        self.beside.insert(name.to_owned(), SuppliedFile::Output(output.clone()));
        Ok(output)
    }
}

/// Opens the files that an existing image names, as far as the policy allows.
struct ImageFiles<'a> {
    image: &'a Location,
    opener: &'a PolicyOpener,
    outputs: &'a mut Outputs,
    /// Files opened so far, for verification.
    opened: &'a mut BTreeMap<String, SuppliedFile>,
}

impl NamedFiles for ImageFiles<'_> {
    fn open(&mut self, role: &str, name: &str) -> Result<Output> {
        let (path, allowed) = self.opener.writable(role, name, self.image)?;
        let output = self.outputs.existing_part(&path)?;
        let opened = output.file().and_then(|file| file.metadata().ok());
        let opened = opened.and_then(|meta| Identity::of(&meta, &path));
        if opened.and_then(|identity| identity.id()) != allowed.id() {
            return Err(Error::refused(format!("{role} leads to another file since it was opened"))
                .path(path)
                .hint("another program renames files there: try again when it has finished"));
        }
        self.opened.insert(name.to_owned(), SuppliedFile::Output(output.clone()));
        Ok(output)
    }
}

/// Returns the location of the backing image of a new image.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Unsupported`] if the name is not a path; [`imgtool_core::ErrorKind::Usage`] if
/// the new image is a stream.
pub(crate) fn backing_path(image: &Location, name: &str) -> Result<Location> {
    plain_name_beside(image, name)
}

/// Returns the location of the file `name`, as the new image at `image` refers to it.
fn plain_name_beside(image: &Location, name: &str) -> Result<Location> {
    // A scheme precedes any slash: "json:{...}", "nbd://host".
    let scheme = name.split_once(':').filter(|(scheme, _)| *scheme != "file" && !scheme.contains('/'));
    if scheme.is_some() || name.is_empty() {
        return Err(Error::unsupported(format!("'{}' is not a plain file name", escape_control(name)))
            .hint("only plain paths are followed; ./NAME for a name with a colon"));
    }
    open::resolve(image, name).ok_or_else(|| Error::usage("a stream has no files beside it").path(image))
}

/// Opens the backing image of a new image. The user named the backing image in an option, so it
/// needs no permission, but external files that it names do.
pub(crate) fn open_base(
    registry: &Registry,
    location: &Location,
    backing: &BackingName,
    options: &OpenOptions,
) -> Result<Opened> {
    let sharing = Sharing::forced(options.force_share);
    let input = imgtool_storage::open::open_shared(location, Opening::Plain, &options.memory, sharing)?;
    open::open_image(registry, input, Some(&backing.format), options)
}

/// Returns the paths of the files that a backing image names; none if it can't be opened, which the caller finds
/// out later.
pub(crate) fn files_below(registry: &Registry, location: &Location, backing: &BackingName) -> Vec<PathBuf> {
    let facts = OpenOptions { info_only: true, force_share: true, ..OpenOptions::default() };
    let opened = open_base(registry, location, backing, &facts);
    opened.map_or_else(|_| Vec::new(), |opened| opened.referenced_files())
}

fn open_output(
    planned: &PlannedOutput,
    manifest: &Manifest,
    layout: &Layout,
    outputs: &mut Outputs,
    settings: SinkSettings<'_>,
) -> Result<Output> {
    match &planned.destination {
        Destination::New(path) => outputs.create_linked(path, layout.overwrite, layout.links(path)),
        // The new file replaces the existing image when it is finished.
        Destination::Existing { path, .. } if !is_written_in_place(&*planned.format.driver, path) => {
            outputs.create_linked(path, true, layout.links(path))
        }
        Destination::Existing { path, zeroed } => {
            let output = outputs.existing(path, *zeroed, settings.force)?;
            check_capacity(planned, manifest, &output, settings)?;
            Ok(output)
        }
        Destination::Image { path, .. } => outputs.existing_image(path),
        Destination::Stream(location) => {
            let output = open_stream(location)?;
            outputs.stream(output.clone());
            Ok(output)
        }
        Destination::Open(output) => {
            outputs.stream(output.clone());
            Ok(output.clone())
        }
    }
}

fn open_stream(location: &Location) -> Result<Output> {
    let writer: Box<dyn io::Write + Send> = match location {
        Location::Path(path) => {
            Box::new(os::open_stream(path).map_err(|e| Error::io("open for writing", e)).in_file(path)?)
        }
        _ if io::stdout().is_terminal() => {
            return Err(Error::usage("standard output is a terminal").hint("redirect it to a file or a pipe"));
        }
        _ => Box::new(io::stdout()),
    };
    Ok(Output::from_writer(location, writer))
}

/// Refuses an existing target of a verbatim image (raw) if it is smaller than the disk, or, unless forced,
/// larger by more than [`SIZE_TOLERANCE`].
fn check_capacity(
    planned: &PlannedOutput,
    manifest: &Manifest,
    output: &Output,
    settings: SinkSettings<'_>,
) -> Result<()> {
    let (Some(capacity), [device]) = (output.capacity(), manifest.devices.as_slice()) else { return Ok(()) };
    if device.open_ended || !planned.format.driver.capabilities().verbatim {
        return Ok(());
    }
    let error =
        |what: &str| size_error(what, capacity, device.size).path(output.location()).device(&*device.name);
    if capacity < device.size {
        return Err(error("too small").hint("nothing was written; a larger target is needed"));
    }
    if capacity - device.size > SIZE_TOLERANCE && !settings.force && !settings.accept_larger {
        return Err(error("much larger").remedied_by(Remedy::ForceFront));
    }
    Ok(())
}

/// Returns the error for a target whose size does not fit its disk.
pub(crate) fn size_error(what: &str, capacity: u64, size: u64) -> Error {
    Error::refused(format!("the target is {what}: it has {capacity} bytes, the disk {size}"))
}

/// Like [`check_capacity`], after the copy, for a disk whose size was unknown until its stream ended.
pub(crate) fn check_stream_size(
    planned: &PlannedOutput,
    output: &Output,
    disk: &DiskReport,
    accept_larger: bool,
) -> Result<()> {
    let is_verbatim = planned.format.driver.capabilities().verbatim;
    let Some(capacity) = output.capacity().filter(|_| is_verbatim) else { return Ok(()) };
    let size = disk.virtual_size;
    let error = |what: &str| {
        Error::refused(format!(
            "the target was overwritten in place, but is {what}: it has {capacity} bytes, the stream had {size}"
        ))
        .path(output.location())
        .device(&*disk.name)
    };
    if capacity < size {
        return Err(error("too small").hint("a larger target is needed"));
    }
    if capacity - size > SIZE_TOLERANCE && !accept_larger {
        let advice = "its old content follows the disk; check the command that writes the stream";
        return Err(error("much larger").remedied_by(Remedy::AcceptLarger(advice.into())));
    }
    Ok(())
}

/// Returns the first `len` bytes of an output to read back. An existing target may be longer than its disk.
pub(crate) fn front(input: Input, len: u64) -> Result<Input> {
    let whole = input.len().unwrap_or(0);
    input.section(0..len.min(whole))
}
