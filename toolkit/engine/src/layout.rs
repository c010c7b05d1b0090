//! Layout of a conversion: decides the name, format and destination of every output before the first byte is
//! written.

use std::path::{Path, PathBuf};

use imgtool_core::device::meant;
use imgtool_core::{
    Attachment, Bitmap, DeviceKind, Driver, Error, InPlace, Location, Machine, Manifest, Memory, Output,
    Registry, Remedy, Result, Slot, suggest,
};
use imgtool_storage::open::Opening;
use imgtool_storage::os::{self, FileClass};
use imgtool_storage::{Links, OutputRequest, Sharing, outer};

use crate::existing;
use crate::format::{self, TargetFormat};
use crate::names::{self, Unique};
use crate::open;
use crate::report::Note;
use crate::sources::{self, OpenSource, SelectedDisk};

/// Destination of an output.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Destination {
    /// A new file.
    New(PathBuf),
    /// An existing file or block device: written in place, keeping its length, or replaced
    /// ([`is_written_in_place`]).
    Existing {
        /// Path.
        path: PathBuf,
        /// True if the target is known to read as zeros.
        zeroed: bool,
    },
    /// An existing image, whose disk gets new content; see [`imgtool_core::ImageWriter::update`].
    Image {
        /// Path of the file or block device.
        path: PathBuf,
        /// True if its disk is known to read as zeros.
        zeroed: bool,
    },
    /// Standard output, a FIFO, or another target that is written in order.
    Stream(Location),
    /// An output that the caller has opened.
    Open(Output),
}

impl Destination {
    /// Returns the location, for messages and for resolving relative names.
    pub fn location(&self) -> Location {
        match self {
            Self::New(path) | Self::Existing { path, .. } | Self::Image { path, .. } => path.into(),
            Self::Stream(location) => location.clone(),
            Self::Open(output) => output.location().clone(),
        }
    }

    /// Returns the path, if the destination is a file or device.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::New(path) | Self::Existing { path, .. } | Self::Image { path, .. } => Some(path),
            Self::Stream(_) | Self::Open(_) => None,
        }
    }

    /// True if the destination can only be written in order.
    pub fn is_stream(&self) -> bool {
        match self {
            Self::New(_) | Self::Existing { .. } | Self::Image { .. } => false,
            Self::Stream(_) => true,
            Self::Open(output) => output.is_stream(),
        }
    }

    /// True if this is standard output.
    pub fn is_stdout(&self) -> bool {
        matches!(self, Self::Stream(Location::Stdout))
    }
}

/// An image to make.
#[derive(Debug)]
pub struct PlannedOutput {
    /// Destination.
    pub destination: Destination,
    /// Format and options.
    pub format: TargetFormat,
    /// Disks in the image, in order.
    pub disks: Vec<Slot>,
    /// Configurations in the image.
    pub attachments: Vec<Attachment>,
    /// The machine that the disks belong to, by the names that they have in the image; `None` for several machines.
    pub machine: Option<Box<Machine>>,
    /// Persistent bitmaps of the only disk to copy into the image.
    pub bitmaps: Vec<Bitmap>,
}

impl PlannedOutput {
    /// Resolves a file name stored in the image, relative to its directory, like a reader of the image.
    fn beside(&self, name: &str) -> Option<PathBuf> {
        self.destination.path()?;
        open::resolve(&self.destination.location(), name)?.path().map(Path::to_owned)
    }

    /// Returns the paths of the files beside the image that belong to it.
    pub(crate) fn companions(&self, selected: &[SelectedDisk]) -> Vec<PathBuf> {
        let main = self.destination.location();
        let main = main.file_name().unwrap_or_default();
        let names = self.format.writer.companions(&main, &self.manifest(selected));
        names.iter().filter_map(|name| self.beside(name)).collect()
    }

    /// Returns the manifest of the image.
    pub(crate) fn manifest(&self, selected: &[SelectedDisk]) -> Manifest {
        let device = |(number, slot): (u32, &Slot)| {
            let disk = &selected[slot.index()];
            imgtool_core::Device {
                id: imgtool_core::DeviceId(number),
                name: disk.name.clone(),
                ..disk.device.clone()
            }
        };
        Manifest {
            devices: (0..).zip(&self.disks).map(device).collect(),
            attachments: self.attachments.clone(),
            machine: self.machine.clone(),
            base: None,
            base_info: None,
            bitmaps: self.bitmaps.clone(),
            tables: None,
        }
    }
}

/// A configuration to write as a separate file.
#[derive(Debug)]
pub struct PlannedFile {
    /// Path of the file.
    pub path: PathBuf,
    /// Configuration.
    pub attachment: Attachment,
}

/// All outputs of a conversion.
#[derive(Debug, Default)]
pub struct Layout {
    /// Directory that receives the outputs; created if missing.
    pub directory: Option<PathBuf>,
    /// Directories in it, one for each machine if there are several; created if missing.
    pub machine_directories: Vec<PathBuf>,
    /// Images to make. Those of disks with a separate target come last.
    pub outputs: Vec<PlannedOutput>,
    /// Configurations to write as separate files.
    pub files: Vec<PlannedFile>,
    /// Notes for the user.
    pub notes: Vec<Note>,
    /// True to replace existing files.
    pub overwrite: bool,
}

impl Layout {
    /// Returns all outputs in the form that [`imgtool_storage::Outputs::check`] expects.
    pub(crate) fn requests(&self, selected: &[SelectedDisk]) -> Vec<OutputRequest> {
        let new = |path: &Path, overwrite: bool| OutputRequest::New {
            path: path.to_owned(),
            overwrite,
            links: self.links(path),
        };
        let mut requests = Vec::new();
        for output in &self.outputs {
            requests.push(match &output.destination {
                Destination::New(path) => new(path, self.overwrite),
                Destination::Existing { path, .. } if is_written_in_place(&*output.format.driver, path) => {
                    OutputRequest::Existing(path.clone())
                }
                Destination::Existing { path, .. } => new(path, true),
                Destination::Image { path, .. } => OutputRequest::Existing(path.clone()),
                Destination::Stream(Location::Stdout) => OutputRequest::Stdout,
                // A stream replaces nothing, and two outputs may share it.
                Destination::Stream(_) | Destination::Open(_) => continue,
            });
            let companions = output.companions(selected);
            requests.extend(companions.iter().map(|path| new(path, self.overwrite)));
        }
        requests.extend(self.files.iter().map(|file| new(&file.path, self.overwrite)));
        requests
    }

    /// Returns the treatment of a symbolic link at `path`. In the directory that receives the disks, names
    /// come from the image, so links are refused. The user chose all other names.
    pub(crate) fn links(&self, path: &Path) -> Links {
        let mut directories = self.directory.iter().chain(&self.machine_directories);
        let inside = directories.any(|directory| path.parent() == Some(directory));
        if inside { Links::Refuse } else { Links::Follow }
    }
}

/// A disk with a separate target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskTarget {
    /// Name of the disk.
    pub name: String,
    /// Location of the target.
    pub location: Location,
    /// Format of the target, if the user stated it.
    pub format: Option<String>,
    /// True if the target is known to read as zeros.
    pub zeroed: bool,
}

/// Request for a layout.
#[derive(Debug)]
pub struct LayoutRequest<'a> {
    /// Registry of drivers.
    pub registry: &'a Registry,
    /// Open sources.
    pub sources: &'a [OpenSource],
    /// Disks selected for the conversion.
    pub selected: &'a [SelectedDisk],
    /// Format of `dest`.
    pub format: &'a TargetFormat,
    /// True if the user stated that format.
    pub format_stated: bool,
    /// File or directory for all disks without a separate target.
    pub dest: Option<&'a Location>,
    /// Disks with a separate target.
    pub disk_targets: &'a [DiskTarget],
    /// True if the user chose the disks by their names.
    pub disks_named: bool,
    /// Configurations to convert.
    pub attachments: Vec<Attachment>,
    /// True if the caller has given one of them: it says which machine the disks belong to.
    pub attachments_given: bool,
    /// `Some` to write into the existing file or device at `dest`; `Some(true)` if it is known to read as
    /// zeros.
    pub in_place: Option<bool>,
    /// True to replace existing files.
    pub overwrite: bool,
}

impl LayoutRequest<'_> {
    /// Decides every output.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] if the request does not match the disks of the sources.
    pub fn layout(&self) -> Result<Layout> {
        let mut layout = Layout { overwrite: self.overwrite, ..Layout::default() };
        let apart = self.outputs_apart()?;
        let rest: Vec<Slot> = Slot::first(self.selected.len())
            .filter(|slot| !apart.iter().any(|output| output.disks.contains(slot)))
            .collect();
        match self.dest {
            Some(dest) => self.lay_out_dest(dest, rest, &mut layout)?,
            None if rest.is_empty() => {}
            None => {
                return Err(Error::usage(format!("missing target for {}", self.names(&rest)))
                    .remedied_by(Remedy::NameDestination));
            }
        }
        layout.outputs.extend(apart);
        let misnamed: Vec<Note> = layout.outputs.iter().filter_map(|output| self.misnamed(output)).collect();
        layout.notes.extend(misnamed);
        if layout.outputs.is_empty() && layout.files.is_empty() {
            return Err(Error::usage("nothing to convert: the source holds no disk"));
        }
        Ok(layout)
    }

    /// Returns the note on a new file whose extension is that of another format: people go by it, and a raw disk of
    /// such a name is refused as a source.
    fn misnamed(&self, output: &PlannedOutput) -> Option<Note> {
        let Destination::New(path) = &output.destination else { return None };
        let (location, driver) = (path.into(), &output.format.driver);
        let named = open::driver_by_name(self.registry, &location)?;
        // Any image may be called `.img`.
        let is_clear = !named.capabilities().verbatim || open::is_named_raw(&*named, &location);
        let (name, own, other) = (path.display(), driver.name(), named.name());
        (is_clear && own != other)
            .then(|| Note::Text(format!("{name} is {own}, although its name says {other}")))
    }

    /// Plans the outputs of disks with a separate target.
    fn outputs_apart(&self) -> Result<Vec<PlannedOutput>> {
        let mut outputs: Vec<PlannedOutput> = Vec::new();
        for target in self.disk_targets {
            let slot = self.find(&target.name)?;
            if outputs.iter().any(|output| output.disks.contains(&slot)) {
                return Err(Error::usage(format!("device '{}' has two targets", target.name)));
            }
            outputs.push(self.output_apart(target, slot)?);
        }
        let is_used = |output: &PlannedOutput| output.format.driver.name() == self.format.driver.name();
        if self.dest.is_none() && !outputs.iter().any(is_used) && self.format.has_own_options() {
            return Err(Error::usage(format!(
                "options for {} are given, but no target has that format",
                self.format.driver.name()
            ))
            .remedied_by(Remedy::NameDiskFormat));
        }
        Ok(outputs)
    }

    fn output_apart(&self, target: &DiskTarget, slot: Slot) -> Result<PlannedOutput> {
        let location = &target.location;
        let is_raw = self.format_stated && self.format.driver.capabilities().verbatim;
        let found = match target.format {
            None if !is_raw => existing::unless_named(self.registry, location)?,
            _ => None,
        };
        if let (Some(driver), Some(path)) = (&found, location.path())
            && driver.capabilities().updates
        {
            let format = self.format.for_location(driver.clone(), location)?;
            let destination = in_place(&format, path, target.zeroed)?;
            return Ok(self.output(destination, format, vec![slot]));
        }
        let driver = format::by_word_or_name(self.registry, target.format.as_deref(), Some(location))?;
        let existing =
            location.path().filter(|path| is_written_in_place(&*driver, path) && has_content(path));
        if target.zeroed && existing.is_none() {
            return Err(Error::usage("only an existing block device or raw file can be marked as zeroed")
                .path(location));
        }
        let format = self.format.for_location(driver, location)?;
        let destination = match (stream_of(location), existing, location.path()) {
            (Some(stream), _, _) => stream_destination(&format, stream)?,
            (None, Some(_), _) if format.outer.is_some() => {
                return Err(Error::usage("a compressed output can't be written in place").path(location));
            }
            (None, Some(path), _) => Destination::Existing { path: path.to_owned(), zeroed: target.zeroed },
            (None, None, Some(path)) => Destination::New(path.to_owned()),
            (None, None, None) => return Err(unsupported_target(location)),
        };
        Ok(self.output(destination, format, vec![slot]))
    }

    /// Returns the slot of the only disk that `name` means ([`meant`]).
    fn find(&self, name: &str) -> Result<Slot> {
        let meant = meant(name, self.selected.iter().flat_map(SelectedDisk::names)).unwrap_or(name);
        let mut found = (0..).map(Slot).zip(self.selected).filter(|(_, disk)| disk.names().contains(&meant));
        match (found.next(), found.next()) {
            (Some((slot, _)), None) => Ok(slot),
            (Some(_), Some(_)) => Err(Error::usage(format!("more than one device is called '{name}'"))),
            (None, _) => Err(Error::usage(format!("a target is given for '{name}', which is not selected"))
                .hint(suggest::hint(name, "devices", self.selected.iter().map(|disk| disk.name.as_str())))),
        }
    }

    fn select_one(&self, slots: &[Slot], advice: &'static str) -> Remedy {
        Remedy::SelectDisk { names: self.names(slots), advice: advice.into() }
    }

    fn names(&self, slots: &[Slot]) -> String {
        let names: Vec<&str> = slots.iter().map(|slot| self.selected[slot.index()].name.as_str()).collect();
        names.join(", ")
    }

    fn lay_out_dest(&self, dest: &Location, rest: Vec<Slot>, layout: &mut Layout) -> Result<()> {
        let is_directory = format::is_directory(dest) || self.machines_need_directory(dest, &rest);
        if self.format.is_archive() {
            if is_directory && self.machines().len() > 1 {
                return self.lay_out_archives(dest, &rest, layout);
            }
            self.refuse_one_archive(dest, &rest)?;
            let location = match dest.path().filter(|_| is_directory) {
                Some(directory) => {
                    layout.directory = Some(directory.to_owned());
                    directory.join(self.archive_name()).into()
                }
                None => dest.clone(),
            };
            return self.lay_out_archive(&location, rest, layout);
        }
        if rest.len() == 1 && !is_directory {
            self.note_left_out(layout);
            layout.outputs.push(self.output(self.destination(dest)?, self.format.clone(), rest));
            return Ok(());
        }
        let path = self.check_directory(dest, is_directory, &rest)?;
        self.lay_out_directory(path, &rest, layout)
    }

    /// True if `dest` will be a directory because a source holds machines: their disks and configurations need
    /// one, also if there is a single disk today. The name says otherwise if it has the extension of a format or a
    /// compression, or any extension if the user chose the only disk.
    fn machines_need_directory(&self, dest: &Location, rest: &[Slot]) -> bool {
        let Some(path) = dest.path().filter(|path| !is_block_device(path)) else { return false };
        let has_extension = path.extension().is_some();
        let is_known = open::driver_by_name(self.registry, dest).is_some() || outer::by_name(dest).is_some();
        let names_file = has_extension && (is_known || self.disks_named && rest.len() == 1);
        let holds_machines = self.sources.iter().any(OpenSource::holds_machine);
        holds_machines && !names_file && self.in_place.is_none() && stream_of(dest).is_none()
    }

    fn lay_out_archive(&self, location: &Location, rest: Vec<Slot>, layout: &mut Layout) -> Result<()> {
        if self.in_place.is_some() {
            return Err(Error::usage(format!(
                "a {} archive is always a new file, only disks are written in place",
                self.format.driver.name()
            ))
            .path(location));
        }
        let machine = sources::machine(self.sources, self.selected).map(Box::new);
        self.check_number(&rest)?;
        let output = self.output(self.destination(location)?, self.format.clone(), rest);
        layout.outputs.push(PlannedOutput { attachments: self.attachments.clone(), machine, ..output });
        Ok(())
    }

    /// Refuses more disks than an archive of the format holds.
    fn check_number(&self, disks: &[Slot]) -> Result<()> {
        let (limit, number) = (self.format.driver.capabilities().max_devices() as usize, disks.len());
        if number <= limit {
            return Ok(());
        }
        let name = self.format.driver.name();
        Err(Error::unsupported(format!("{name} holds at most {limit} devices, not {number}")))
    }

    /// True if each machine gets an archive of its own.
    pub(crate) fn archives_apart(&self) -> bool {
        let Some(dest) = self.dest.filter(|_| self.format.is_archive() && self.machines().len() > 1) else {
            return false;
        };
        let rest: Vec<Slot> = Slot::first(self.selected.len()).collect();
        format::is_directory(dest) || self.machines_need_directory(dest, &rest)
    }

    /// Plans an archive for each of several machines, in a directory.
    fn lay_out_archives(&self, dest: &Location, rest: &[Slot], layout: &mut Layout) -> Result<()> {
        let directory = dest.path().ok_or_else(|| unsupported_target(dest))?;
        let machines = self.machines();
        let of = |slot: &Slot| self.selected[slot.index()].source;
        if let Some(alone) = rest.iter().find(|slot| !machines.contains(&of(slot))) {
            let disk = &self.selected[alone.index()].name;
            return Err(Error::usage(format!(
                "disk '{disk}' belongs to none of the {} machines",
                machines.len()
            ))
            .path(dest)
            .hint("convert it with one machine, and the others by themselves"));
        }
        if self.attachments_given {
            return Err(Error::usage(format!(
                "a configuration is that of one machine, not of {}",
                machines.len()
            ))
            .path(dest)
            .hint("convert each machine with its own configuration"));
        }
        layout.directory = Some(directory.to_owned());
        let mut unique = Unique::default();
        for machine in machines {
            let source = &self.sources[machine];
            let stem = names::safe(&open::stem(self.registry, &source.opened.location), "vm");
            let path: Location = directory.join(unique.issue(&stem, &self.format.extension())).into();
            let disks: Vec<Slot> = rest.iter().filter(|slot| of(slot) == machine).copied().collect();
            self.check_number(&disks)?;
            let described = source.opened.image.info().machine.as_ref();
            let described = described.map(|found| sources::of_selected(found, machine, self.selected));
            let output = self.output(self.destination(&path)?, self.format.clone(), disks);
            let attachments = source.attachments().to_vec();
            layout.outputs.push(PlannedOutput { attachments, machine: described.map(Box::new), ..output });
        }
        Ok(())
    }

    /// Refuses several machines in one archive, which would keep the description of one at most. Disks that the user
    /// chose by name, or gave a configuration, are one machine.
    fn refuse_one_archive(&self, dest: &Location, rest: &[Slot]) -> Result<()> {
        let is_described = |source: &OpenSource| {
            source.opened.image.info().machine.is_some() || !source.attachments().is_empty()
        };
        let has_disk =
            |machine: &usize| rest.iter().any(|slot| self.selected[slot.index()].source == *machine);
        let machines = self.machines();
        let number =
            machines.iter().filter(|index| is_described(&self.sources[**index]) && has_disk(index)).count();
        if number < 2 || self.disks_named || self.attachments_given {
            return Ok(());
        }
        let name = self.format.driver.name();
        Err(Error::usage(format!("{number} machines do not go into one {name} archive")).path(dest).hint(
            "a directory (a name that ends in '/') takes an archive for each; or name the disks of one machine",
        ))
    }

    /// Plans a directory for the disks and configurations, with a directory in it for each of several machines.
    fn lay_out_directory(&self, dest: &Path, rest: &[Slot], layout: &mut Layout) -> Result<()> {
        layout.directory = Some(dest.to_owned());
        let machines = self.machines();
        if machines.len() < 2 {
            return self.lay_out_files(dest, rest, &self.attachments, layout);
        }
        let of = |slot: &&Slot, machine: usize| self.selected[slot.index()].source == machine;
        let is_alone = |slot: &&Slot| !machines.iter().any(|machine| of(slot, *machine));
        let alone: Vec<Slot> = rest.iter().filter(is_alone).copied().collect();
        self.lay_out_files(dest, &alone, &[], layout)?;
        let mut unique = Unique::default();
        for machine in machines {
            let source = &self.sources[machine];
            let name = names::safe(&open::stem(self.registry, &source.opened.location), "vm");
            let directory = dest.join(unique.issue(&name, ""));
            let disks: Vec<Slot> = rest.iter().filter(|slot| of(slot, machine)).copied().collect();
            self.lay_out_files(&directory, &disks, source.attachments(), layout)?;
            layout.machine_directories.push(directory);
        }
        Ok(())
    }

    /// Returns the indices of the sources that hold machines, except those without a selected disk.
    fn machines(&self) -> Vec<usize> {
        let is_selected = |index: usize| self.selected.iter().any(|disk| disk.source == index);
        let sources = self.sources.iter().enumerate();
        let machines = sources.filter(|(index, source)| source.holds_machine() && is_selected(*index));
        machines.map(|(index, _)| index).collect()
    }

    /// Plans a file in `directory` for each disk and each configuration.
    fn lay_out_files(
        &self,
        directory: &Path,
        disks: &[Slot],
        attachments: &[Attachment],
        layout: &mut Layout,
    ) -> Result<()> {
        let mut unique = Unique::default();
        for &slot in disks {
            let disk = &self.selected[slot.index()];
            let (stem, format, extension) = match disk.device.kind {
                DeviceKind::Disk => {
                    (names::safe(&disk.name, "disk"), self.format.clone(), self.format.extension())
                }
                // Guest state is not a disk, so its bytes are written verbatim in every format.
                DeviceKind::VmState => {
                    let verbatim = TargetFormat::new(self.registry.verbatim()?, Default::default())?;
                    ("vmstate".to_owned(), verbatim, "bin".to_owned())
                }
            };
            let path = directory.join(unique.issue(&stem, &extension));
            layout.outputs.push(self.output(Destination::New(path), format, vec![slot]));
        }
        for attachment in attachments {
            let name = unique.issue_file(&names::safe(&attachment.name, "config"));
            if name != attachment.name {
                let text = format!("configuration '{}' is written as '{name}'", attachment.name);
                layout.notes.push(Note::Text(text));
            }
            layout.files.push(PlannedFile { path: directory.join(name), attachment: attachment.clone() });
        }
        Ok(())
    }

    /// Checks that `dest` can be a directory for the disks, and returns its path.
    fn check_directory<'d>(&self, dest: &'d Location, is_directory: bool, rest: &[Slot]) -> Result<&'d Path> {
        let several = |what: &str| Error::usage(format!("{what}, not {}", rest.len())).path(dest);
        if stream_of(dest).is_some() {
            return Err(
                several("a pipe takes one disk").remedied_by(self.select_one(rest, "make one archive"))
            );
        }
        let path = dest.path().ok_or_else(|| unsupported_target(dest))?;
        if self.in_place.is_some() {
            return Err(several("one file or device that exists takes one disk in place")
                .remedied_by(self.select_one(rest, "name a target for each")));
        }
        if is_directory {
            return self.refuse_file(path).map(|()| path);
        }
        let source_of = |slot: &Slot| self.selected[slot.index()].source;
        if rest.iter().any(|slot| Some(source_of(slot)) != rest.first().map(source_of)) {
            let (sources, format) = (self.sources.len(), self.format.driver.name());
            return Err(Error::usage(format!("{sources} sources do not go into one {format} image"))
                .path(dest)
                .remedied_by(Remedy::JoinSources));
        }
        if path.exists() || open::driver_by_name(self.registry, dest).is_some() {
            return Err(Error::usage(format!("{} devices do not go into one file", rest.len()))
                .path(dest)
                .remedied_by(self.select_one(rest, "name a directory")));
        }
        Ok(path)
    }

    /// Refuses a file where the disks of a machine need a directory.
    fn refuse_file(&self, path: &Path) -> Result<()> {
        if !path.is_file() {
            return Ok(());
        }
        let extension = self.format.extension();
        Err(Error::refused("is a file: the disks of an archive go into a directory")
            .path(path)
            .hint(format!("a name with an extension, such as disk.{extension}, is that of a file")))
    }

    fn destination(&self, dest: &Location) -> Result<Destination> {
        if let Some(stream) = stream_of(dest) {
            return stream_destination(self.format, stream);
        }
        let path = dest.path().ok_or_else(|| unsupported_target(dest))?;
        match self.in_place {
            Some(_) if self.format.outer.is_some() => {
                Err(Error::usage("a compressed output can't be written in place").path(dest))
            }
            Some(_) if !path.exists() => {
                Err(Error::usage("only a file or device that exists can be written in place")
                    .path(dest)
                    .hint("it does not exist: leave out writing in place to make it"))
            }
            Some(zeroed) => in_place(self.format, path, zeroed),
            None => new_image(self.format, path),
        }
    }

    fn output(&self, destination: Destination, format: TargetFormat, disks: Vec<Slot>) -> PlannedOutput {
        let (attachments, bitmaps) = (Vec::new(), Vec::new());
        PlannedOutput { destination, format, disks, attachments, machine: None, bitmaps }
    }

    fn archive_name(&self) -> String {
        let first = self.sources.first().map(|source| open::stem(self.registry, &source.opened.location));
        format!("{}.{}", names::safe(first.as_deref().unwrap_or("vm"), "vm"), self.format.extension())
    }

    /// Adds a note about the configurations that the file of a single disk leaves out.
    fn note_left_out(&self, layout: &mut Layout) {
        if !self.attachments.is_empty() {
            let names = self.attachments.iter().map(|attachment| attachment.name.clone()).collect();
            layout.notes.push(Note::ConfigurationsLeftOut(names));
        }
    }
}

/// Decides how to write into the file or device at `path`, which exists.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the format can't write into it: nothing is replaced.
fn in_place(format: &TargetFormat, path: &Path, zeroed: bool) -> Result<Destination> {
    let (driver, path) = (&*format.driver, path.to_owned());
    let capabilities = driver.capabilities();
    if capabilities.updates && (holds_image(driver, &path)? || !is_written_in_place(driver, &path)) {
        if format.has_pairs() {
            return Err(Error::usage("the options of an image that exists can't be changed")
                .path(path)
                .hint("leave out the options"));
        }
        return Ok(Destination::Image { path, zeroed });
    }
    if is_written_in_place(driver, &path) {
        return Ok(Destination::Existing { path, zeroed });
    }
    Err(Error::refused(format!("a {} image that exists can't be written into", driver.name()))
        .path(path)
        .remedied_by(Remedy::ReplaceImage))
}

fn unsupported_target(location: &Location) -> Error {
    Error::unsupported("only files, devices and pipes can be written")
        .path(location)
        .hint("write to a file first and upload it, or to a pipe")
}

/// Returns the location of `dest` if it is a stream: standard output, a FIFO.
fn stream_of(dest: &Location) -> Option<Location> {
    let Some(path) = dest.path() else { return (*dest == Location::Stdout).then(|| dest.clone()) };
    if path == Path::new("/dev/stdout") {
        return Some(Location::Stdout);
    }
    let is_stream = std::fs::metadata(path).is_ok_and(|meta| os::classify(&meta) == FileClass::Stream);
    is_stream.then(|| dest.clone())
}

fn stream_destination(format: &TargetFormat, stream: Location) -> Result<Destination> {
    if format.writes_stream() {
        return Ok(Destination::Stream(stream));
    }
    let name = format.driver.name();
    Err(match format.writer.stream_option() {
        Some(option) => Error::usage(format!("only {name} with {option} can be written to a pipe"))
            .remedied_by(Remedy::SetOption(option.to_owned())),
        None => Error::usage(format!("{name} can't be written to a pipe"))
            .hint("its tables are written last, at the front: give a file name"),
    }
    .path(&stream))
}

/// True if an image of this format is written into the file or device at `path`; otherwise a new file
/// replaces it.
pub fn is_written_in_place(driver: &dyn Driver, path: &Path) -> bool {
    match driver.capabilities().in_place {
        InPlace::Never => false,
        InPlace::Anywhere => true,
        InPlace::BlockDevices => is_block_device(path),
    }
}

/// True if something exists at `path`, except an empty file: a new one takes its place.
fn has_content(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| !meta.is_file() || meta.len() > 0)
}

fn is_block_device(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|meta| os::classify(&meta) == FileClass::BlockDevice)
}

/// Returns the destination of a new image at `path`: a block device is overwritten, anything else is a new file.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the format can't be written onto the block device at `path`.
pub(crate) fn new_image(format: &TargetFormat, path: &Path) -> Result<Destination> {
    if !is_block_device(path) || format.is_archive() {
        return Ok(Destination::New(path.to_owned()));
    }
    if format.outer.is_some() {
        return Err(Error::usage("a compressed output can't be written in place").path(path));
    }
    if !is_written_in_place(&*format.driver, path) {
        let name = format.driver.name();
        return Err(Error::refused(format!("is a block device, onto which no {name} image can be written"))
            .path(path)
            .hint("write it to a file, or choose another format"));
    }
    Ok(Destination::Existing { path: path.to_owned(), zeroed: false })
}

/// True if the file or device at `path` begins like an image of the driver's format.
fn holds_image(driver: &dyn Driver, path: &Path) -> Result<bool> {
    // Whether another program uses the target is found when it is opened for writing.
    let (opening, sharing) = (Opening::Plain, Sharing::Accepted);
    let input = imgtool_storage::open::open_shared(&path.into(), opening, &Memory::default(), sharing)?.input;
    Ok(driver.probe(&input.head()?, input.len()).is_some())
}
