//! `vma extract`: writes the disks of an archive to raw files, or to the targets in a map.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use imgtool_core::{
    Attachment, CancelToken, Device, DeviceKind, Error, Externals, Location, Memory, OpenOptions, Registry,
    Result, Slot,
};
use imgtool_engine::names::{self, Unique};
use imgtool_engine::{
    Destination, FormatOptions, Layout, Note, OpenSource, Opened, Plan, PlannedFile, PlannedOutput,
    RunOptions, SIZE_TOLERANCE, SelectedDisk, TargetFormat, existing, open as engine_open,
};
use imgtool_storage::open::{Opening, open_shared};
use imgtool_storage::os::{self, FileClass};
use imgtool_storage::{Outputs, Sharing};
use imgtool_vma::ArchiveHeader;

use super::map_file::{Entry, Map};
use super::tally::Tally;
use super::{Archive, Failure, absent_clusters, is_state, list, open, output, usage};
use crate::args::{ProgressMode, ThreadArgs, VmaExtractArgs};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::Display;
use crate::report;
use crate::sandbox::{self, Writes};

/// Maximum length in bytes of a device's or configuration's name; longer ones are cut. With this length, the
/// reference program's `tmp-disk-NAME.raw` has 255 bytes, the maximum for a file name.
const MAX_NAME: usize = 242;

/// Prefix of error messages.
const STEP: &str = "restore failed - ";

pub(super) fn run(args: &VmaExtractArgs) -> Result<Exit, Failure> {
    sandbox::enter(match args.map {
        // The map comes after the program has read the header of the archive.
        Some(_) => Writes::Anywhere,
        None => Writes::to([&Location::from(&args.dir)], &[]),
    });
    let registry = imgtool::registry();
    let interrupt = Interrupt::listen()?;
    let archive = open(&args.file, STEP)?;
    let header = archive.source.header();
    let mut outputs = Outputs::new();
    outputs.protect(&archive.location, archive.identity.as_ref());
    let cleaner = outputs.cleaner();
    interrupt.set_cleaner(cleaner.clone());
    output::before_death(move || cleaner.clean());
    make_directory(&args.dir, &mut outputs)?;
    let extraction = Extraction::new(args, &registry, header);
    let (layout, selected, bytes_per_second) = match &args.map {
        None => {
            output::print_bytes(&extraction.announcement())?;
            (extraction.directory_layout()?, extraction.selected(), None)
        }
        Some(map_path) => {
            // The program that writes the map first reads the list and the configurations.
            for (path, config) in &extraction.configs {
                outputs.publish(path, &config.data)?;
            }
            output::print_bytes(&list::lines(header))?;
            let map = Map::read(map_path)?;
            let (layout, selected) = extraction.by_map(&map)?;
            (layout, selected, map.limit())
        }
    };
    let tally = Tally::new(selected.iter().map(|disk| &disk.device));
    let options = RunOptions {
        threads: ThreadArgs::default().count(),
        force: args.force,
        bytes_per_second,
        taps: if args.verbose { vec![&tally] } else { Vec::new() },
        cancel: interrupt.token(),
        ..RunOptions::default()
    };
    let names_changed = extraction.notes;
    let memory = archive.memory.clone();
    let read = archive.source.clone();
    let sources = vec![source(archive, &registry)?];
    let plan = Plan { layout, sources, selected, outputs, registry, memory };
    let display = Display::new(ProgressMode::None, &interrupt);
    let done = plan.run(&options, &display).map_err(Failure::during(STEP))?;
    let is_printed =
        |note: &&Note| matches!(note, Note::Text(_) | Note::SourceChanged(_) | Note::UnsafeNaming(_));
    let unprinted =
        if args.verbose { output::print(&tally.totals(absent_clusters(&read))).err() } else { None };
    let notes =
        names_changed.into_iter().chain(done.notes.iter().filter(is_printed).map(ToString::to_string));
    for text in notes.chain(unprinted.iter().map(report::unprinted)) {
        output::note(&text);
    }
    Ok(Exit::Done)
}

/// Creates the directory. It must not exist yet; its parent must exist.
fn make_directory(dir: &Path, outputs: &mut Outputs) -> Result<()> {
    outputs.new_directory(dir).map_err(|e| {
        let reason = e.io_error().map(super::reason).unwrap_or_default();
        usage(format!("unable to create target directory {} - {reason}", dir.display()))
    })
}

fn source(archive: Archive, registry: &Registry) -> Result<OpenSource> {
    let opened = Opened {
        parts: Vec::new(),
        location: archive.location,
        driver: registry.get("vma")?,
        compression: Vec::new(),
        stored_len: None,
        consumed: None,
        salvages: false,
        spooled: false,
        unrecognised: false,
        identity: archive.identity,
        watch: archive.watch,
        externals: Externals::default(),
        image: archive.source,
        bytes: None,
    };
    Ok(OpenSource { name: None, opened })
}

/// Names and targets of everything to extract.
struct Extraction<'a> {
    registry: &'a Registry,
    dir: &'a Path,
    /// Selected disks, and the guest state.
    devices: Vec<Device>,
    /// Paths and contents of the configurations; the paths are unique.
    configs: Vec<(PathBuf, Attachment)>,
    /// Names of `devices` as the archive stores them, in the same order.
    raw_names: Vec<Vec<u8>>,
    /// Unique file names of `devices`, in the same order.
    names: Vec<OsString>,
    /// Notes on file names that differ from the names in the archive.
    notes: Vec<String>,
}

impl<'a> Extraction<'a> {
    fn new(args: &'a VmaExtractArgs, registry: &'a Registry, header: &ArchiveHeader) -> Self {
        let mut devices = header.devices.clone();
        if let Some(wanted) = &args.drives {
            let wanted: Vec<&[u8]> = wanted.as_bytes().split(|byte| *byte == b',').collect();
            devices.retain(|device| is_state(device.kind) || wanted.contains(&header.device_name(device)));
        }
        let raw_names: Vec<Vec<u8>> =
            devices.iter().map(|device| header.device_name(device).to_owned()).collect();
        // Disks get their names first, since programs look for them by name.
        let mut unique = Unique::by_case();
        let mut notes = Vec::new();
        let named = devices.iter().zip(&raw_names);
        let names = named.map(|(device, raw)| file_name(device, raw, &mut unique, &mut notes)).collect();
        let configs = header.configs.iter().enumerate().map(|(index, config)| {
            let name = config_name(config, header.config_name(index), &mut unique, &mut notes);
            (args.dir.join(name), config.clone())
        });
        let configs = configs.collect();
        Self { registry, dir: &args.dir, devices, configs, raw_names, names, notes }
    }

    /// Returns the lines that announce the disks before their data is read.
    fn announcement(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (device, name) in self.devices.iter().zip(&self.names) {
            if !is_state(device.kind) {
                let mut temporary = OsString::from("tmp-");
                temporary.push(name);
                text.extend_from_slice(b"DEVINFO ");
                text.extend_from_slice(self.dir.join(temporary).as_os_str().as_bytes());
                text.extend_from_slice(format!(" {}\n", device.size).as_bytes());
            }
        }
        text
    }

    fn selected(&self) -> Vec<SelectedDisk> {
        let disk =
            |device: &Device| SelectedDisk { source: 0, device: device.clone(), name: device.name.clone() };
        self.devices.iter().map(disk).collect()
    }

    fn directory_layout(&self) -> Result<Layout> {
        let outputs = Slot::first(self.devices.len())
            .map(|slot| self.file(slot.index(), slot))
            .collect::<Result<_>>()?;
        let file = |(path, attachment): &(PathBuf, Attachment)| PlannedFile {
            path: path.clone(),
            attachment: attachment.clone(),
        };
        Ok(Layout {
            outputs,
            files: self.configs.iter().map(file).collect(),
            overwrite: true,
            ..Layout::default()
        })
    }

    /// Plans a new raw file in the directory.
    fn file(&self, device: usize, slot: Slot) -> Result<PlannedOutput> {
        let destination = Destination::New(self.dir.join(&self.names[device]));
        let format = TargetFormat::new(self.registry.verbatim()?, FormatOptions::default())?;
        Ok(output(destination, format, slot))
    }

    fn by_map(&self, map: &Map) -> Result<(Layout, Vec<SelectedDisk>)> {
        let mut layout = Layout { overwrite: true, ..Layout::default() };
        let mut selected: Vec<SelectedDisk> = Vec::new();
        for (index, disk) in self.selected().into_iter().enumerate() {
            // The conversion cannot fail: there are at most 255 devices.
            let slot = Slot(u32::try_from(selected.len()).unwrap_or(u32::MAX));
            let output = if is_state(disk.device.kind) {
                self.file(index, slot)?
            } else {
                match map.get(&self.raw_names[index]) {
                    None => return Err(usage(format!("no device name mapping for {}", disk.name))),
                    Some(Entry::Skip) => continue,
                    Some(Entry::Target { path, format, write_zeros, .. }) => {
                        self.mapped(&disk, path, format.as_deref(), *write_zeros, slot)?
                    }
                }
            };
            layout.outputs.push(output);
            selected.push(disk);
        }
        Ok((layout, selected))
    }

    /// Plans the output for an existing target: the disk is written into the image or the device.
    fn mapped(
        &self,
        disk: &SelectedDisk,
        path: &Path,
        format: Option<&str>,
        write_zeros: bool,
        slot: Slot,
    ) -> Result<PlannedOutput> {
        let opened = self.open_target(path, format)?;
        let [existing] = opened.image.info().devices.as_slice() else {
            return Err(usage("the target is not a disk image").path(path));
        };
        check_size(disk, existing.size)?;
        let (driver, path, zeroed) = (&opened.driver, path.to_owned(), !write_zeros);
        let destination = if driver.capabilities().updates {
            Destination::Image { path, zeroed }
        } else if driver.capabilities().verbatim {
            Destination::Existing { path, zeroed }
        } else {
            return Err(cannot_write_into(driver.name()).path(path));
        };
        Ok(output(destination, TargetFormat::new(driver.clone(), FormatOptions::default())?, slot))
    }

    /// Opens an existing target to find its format and size. Refuses unknown formats and pipes.
    fn open_target(&self, path: &Path, format: Option<&str>) -> Result<Opened> {
        let format = format.or(path.starts_with("/dev/").then_some("raw"));
        let unknown = |name| self.registry.get(name).is_err();
        if let Some(name) = format.filter(|name| unknown(name)) {
            return Err(usage(format!("can't open file {} - Unknown driver '{name}'", path.display())));
        }
        if fs::metadata(path).is_ok_and(|meta| os::classify(&meta) == FileClass::Stream) {
            return Err(Error::refused("is neither a regular file nor a block device")
                .path(path)
                .hint("imgtool convert ARCHIVE --disk NAME --to raw PIPE writes a disk into one"));
        }
        let found = match format {
            None => Some(existing::format_of(self.registry, path)?),
            Some(_) => None,
        };
        let format = format.or(found.as_ref().map(|driver| driver.name()));
        // The content is replaced, so no external file of the image is needed.
        let options = OpenOptions { info_only: true, ..OpenOptions::default() };
        // Whether another program uses the target is found when it is opened for writing.
        let (opening, sharing) = (Opening::Plain, Sharing::forced(true));
        let input = open_shared(&Location::from(path), opening, &Memory::default(), sharing)?;
        let input = input.cancelled_by(CancelToken::new());
        engine_open::open_image(self.registry, input, format, &options)
    }
}

/// Returns the error for an existing target that is not replaced, since its format can't be written into.
fn cannot_write_into(format: &str) -> Error {
    Error::refused(format!("a {format} image that exists can't be written into"))
        .hint("nothing was written; name a raw, qcow2 or VHDX target")
}

/// Plans an output with one disk.
fn output(destination: Destination, format: TargetFormat, slot: Slot) -> PlannedOutput {
    PlannedOutput {
        destination,
        format,
        disks: vec![slot],
        attachments: Vec::new(),
        machine: None,
        bitmaps: Vec::new(),
    }
}

/// Returns the file name that the reference program gives a device. If it is not a valid file name or already
/// in use, changes it and adds a note.
fn file_name(device: &Device, raw: &[u8], unique: &mut Unique, notes: &mut Vec<String>) -> OsString {
    let (stem, extension) = match device.kind {
        DeviceKind::VmState => ("vmstate".to_owned(), "bin"),
        DeviceKind::Disk => (format!("disk-{}", names::component(&device.name, MAX_NAME)), "raw"),
    };
    let name = unique.issue(&stem, extension);
    if is_state(device.kind) {
        return name.into();
    }
    if name != format!("disk-{}.raw", device.name) {
        notes.push(format!("device {} '{}' is written to '{name}'", device.id, device.name));
        return name.into();
    }
    OsString::from_vec([b"disk-", raw, b".raw"].concat())
}

/// Returns the file name of a configuration. If its own is not a valid file name or already in use, changes
/// it and adds a note.
fn config_name(config: &Attachment, raw: &[u8], unique: &mut Unique, notes: &mut Vec<String>) -> OsString {
    let name = match names::component(&config.name, MAX_NAME) {
        dots if ["", ".", ".."].contains(&dots.as_str()) => "config".to_owned(),
        name => name,
    };
    let name = unique.issue_file(&name);
    if name != config.name {
        notes.push(format!("configuration '{}' is written as '{name}'", config.name));
        return name.into();
    }
    // Only bytes that are not UTF-8 differ from the text that was checked.
    OsStr::from_bytes(raw).to_owned()
}

fn check_size(disk: &SelectedDisk, target_size: u64) -> Result<()> {
    let fits = target_size.checked_sub(disk.device.size).is_some_and(|more| more <= SIZE_TOLERANCE);
    if fits {
        return Ok(());
    }
    Err(usage(format!(
        "vma_reader_register_bs for stream {} failed - unexpected size {target_size} != {}",
        disk.name, disk.device.size
    ))
    .hint("a target is as large as its disk, or up to 4 MiB larger"))
}
