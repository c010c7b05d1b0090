//! `vma extract`: the disks of an archive into raw files, or where a map says.

use std::fs;
use std::path::{Path, PathBuf};

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::storage::os::{self, FileClass};
use imgtool_toolkit::{
    Attachment, Device, DeviceKind, Error, ImageInfo, ImageSource, Input, OpenOptions, Opened, Outputs,
    Registry, Result,
};

use super::map_file::{Entry, Map};
use super::tally::Tally;
use super::{Failure, is_state, list, open, usage};
use crate::args::{ProgressMode, ThreadArgs, VmaExtractArgs};
use crate::commands::convert::format::Format;
use crate::commands::convert::layout::{Layout, Place, Target};
use crate::commands::convert::names::{self, Unique};
use crate::commands::convert::sources::{Source, SourceArg, Taken};
use crate::commands::convert::write::{self, SIZE_TOLERANCE, Work};
use crate::drivers;
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::RateLimit;
use crate::report;

/// The longest device name whose file the program can make (`tmp-disk-NAME.raw`), bytes; names of
/// configurations are cut there too.
const MAX_NAME: usize = 242;

/// What messages begin with.
const STEP: &str = "restore failed - ";

pub(super) fn run(args: &VmaExtractArgs) -> Result<Exit, Failure> {
    let registry = drivers::registry();
    let interrupt = Interrupt::listen()?;
    let source = open(&args.file, STEP)?;
    let header = source.header();
    let mut outputs = Outputs::new();
    outputs.protect(&args.file)?;
    interrupt.cleans(outputs.cleaner());
    make_directory(&args.dir, &mut outputs)?;
    let plan = Plan::new(args, &registry, source.info().devices.clone(), &header.configs);
    let (layout, taken, limit) = match &args.map {
        None => {
            report::print(&plan.announcement())?;
            (plan.directory_layout()?, plan.taken(), None)
        }
        Some(map_path) => {
            // Whoever writes the map reads the list and the configurations first.
            for (path, config) in &plan.configs {
                outputs.publish(path, &config.data)?;
            }
            report::print(&list::lines(header))?;
            let map = Map::read(map_path)?;
            let limit = map.limit().map(RateLimit::new);
            let (layout, taken) = plan.by_map(&map)?;
            (layout, taken, limit)
        }
    };
    let notes: Vec<String> = plan.notes.iter().chain(&layout.notes).cloned().collect();
    let tally = Tally::new(taken.iter().map(|taken| &taken.device));
    let work = Work {
        registry: &registry,
        base_options: OpenOptions::default(),
        threads: ThreadArgs::default().count(),
        force: true,
        take_busy: false,
        progress: ProgressMode::None,
        limit,
        verify: false,
        observer: args.verbose.then_some(&tally),
    };
    let sources = vec![wrap(args, &registry, Box::new(source))?];
    write::write(work, &layout, sources, &taken, outputs, &interrupt).map_err(Failure::during(STEP))?;
    for note in notes {
        report::say(&format!("vma: note: {}", escape_control(&note)));
    }
    if args.verbose {
        report::print(&tally.totals())?;
    }
    Ok(Exit::Done)
}

/// The directory must be new, and the one above it must be there.
fn make_directory(dir: &Path, outputs: &mut Outputs) -> Result<()> {
    outputs.new_directory(dir).map_err(|e| {
        let reason = e.io_error().map(super::reason).unwrap_or_default();
        usage(format!("unable to create target directory {} - {reason}", dir.display()))
    })
}

fn wrap(args: &VmaExtractArgs, registry: &Registry, source: Box<dyn ImageSource>) -> Result<Source> {
    let opened = Opened {
        path: args.file.clone(),
        driver: registry.get("vma")?,
        compression: Vec::new(),
        stored_len: None,
        spooled: false,
        source,
    };
    Ok(Source::new(SourceArg { name: None, path: args.file.clone() }, opened))
}

/// What goes where.
struct Plan<'a> {
    registry: &'a Registry,
    dir: &'a Path,
    /// The disks that are wanted, and the state.
    devices: Vec<Device>,
    /// File names of the configurations and of the devices, each once.
    configs: Vec<(PathBuf, Attachment)>,
    names: Vec<String>,
    /// What is not called as the archive calls it.
    notes: Vec<String>,
}

impl<'a> Plan<'a> {
    fn new(
        args: &'a VmaExtractArgs,
        registry: &'a Registry,
        mut devices: Vec<Device>,
        configs: &[Attachment],
    ) -> Self {
        if let Some(wanted) = &args.drives {
            let wanted: Vec<&str> = wanted.split(',').collect();
            devices.retain(|device| is_state(device.kind) || wanted.contains(&device.name.as_str()));
        }
        // Disks first: programs look for them by name, whatever a configuration is called.
        let mut unique = Unique::by_case();
        let mut notes = Vec::new();
        let names = devices.iter().map(|device| file_name(device, &mut unique, &mut notes)).collect();
        let configs = configs
            .iter()
            .map(|config| {
                let name = match names::component(&config.name, MAX_NAME) {
                    dots if ["", ".", ".."].contains(&dots.as_str()) => "config".to_owned(),
                    name => name,
                };
                let name = unique.give_file(&name);
                if name != config.name {
                    notes.push(format!("configuration '{}' is written as '{name}'", config.name));
                }
                (args.dir.join(name), config.clone())
            })
            .collect();
        Self { registry, dir: &args.dir, devices, configs, names, notes }
    }

    /// The line for each disk that is printed before its data is read.
    fn announcement(&self) -> String {
        let mut text = String::new();
        for (device, name) in self.devices.iter().zip(&self.names) {
            if !is_state(device.kind) {
                let path = self.dir.join(format!("tmp-{name}"));
                text.push_str(&format!("DEVINFO {} {}\n", path.display(), device.size));
            }
        }
        text
    }

    fn taken(&self) -> Vec<Taken> {
        let taken = |device: &Device| Taken { source: 0, device: device.clone(), name: device.name.clone() };
        self.devices.iter().map(taken).collect()
    }

    fn directory_layout(&self) -> Result<Layout> {
        let targets = (0..self.devices.len()).map(|index| self.file(index, index)).collect::<Result<_>>()?;
        Ok(Layout { targets, files: self.configs.clone(), ..Layout::default() })
    }

    /// A new raw file in the directory.
    fn file(&self, device: usize, taken: usize) -> Result<Target> {
        Ok(Target {
            place: Place::New(self.dir.join(&self.names[device])),
            format: Format::plain(self.registry.get("raw")?),
            devices: vec![taken],
            attachments: Vec::new(),
            size: None,
        })
    }

    fn by_map(&self, map: &Map) -> Result<(Layout, Vec<Taken>)> {
        let mut layout = Layout::default();
        let mut taken = Vec::new();
        for (index, all) in self.taken().into_iter().enumerate() {
            let target = if is_state(all.device.kind) {
                self.file(index, taken.len())?
            } else {
                match map.get(&all.name) {
                    None => return Err(usage(format!("no device name mapping for {}", all.name))),
                    Some(Entry::Skip) => continue,
                    Some(Entry::Target { path, format, write_zeros, .. }) => {
                        let target = self.mapped(&all, path, format.as_deref(), *write_zeros, taken.len())?;
                        if matches!(target.place, Place::New(_)) {
                            let made =
                                format!("{} was made anew as an image of the same format", path.display());
                            layout.notes.push(made);
                        }
                        target
                    }
                }
            };
            layout.targets.push(target);
            taken.push(all);
        }
        Ok((layout, taken))
    }

    /// An existing target. A raw one is written in place; an image is made anew under its name.
    fn mapped(
        &self,
        taken: &Taken,
        path: &Path,
        format: Option<&str>,
        write_zeros: bool,
        number: usize,
    ) -> Result<Target> {
        let plainly_raw =
            path.starts_with("/dev/") || path.extension().is_some_and(|extension| extension == "raw");
        let format = format.or(plainly_raw.then_some("raw"));
        let unknown = |name| self.registry.get(name).is_err();
        if let Some(name) = format.filter(|name| unknown(name)) {
            return Err(usage(format!("can't open file {} - Unknown driver '{name}'", path.display())));
        }
        if fs::metadata(path).is_ok_and(|meta| os::classify(&meta) == FileClass::Stream) {
            return Err(Error::refused("is neither a regular file nor a block device")
                .path(path)
                .hint("imgtool convert ARCHIVE --disk NAME --to raw PIPE writes a disk into one"));
        }
        let input = Input::open_plain(path)?;
        // Its content is replaced: no other file that it names is needed.
        let options = OpenOptions { info_only: true, ..OpenOptions::default() };
        let opened = self.registry.open(input, format, &options)?;
        let info = opened.source.info();
        let [existing] = info.devices.as_slice() else {
            return Err(usage("the target is no disk image").path(path));
        };
        check_size(taken, existing.size)?;
        let is_raw = opened.driver.name() == "raw";
        let is_device = !fs::metadata(path).is_ok_and(|meta| meta.is_file());
        let mut format = Format::plain(opened.driver.clone());
        let cluster_size = info.cluster_size.filter(|_| !is_raw);
        if let Some(size) = cluster_size
            && format.driver.options().iter().any(|option| option.name == "cluster_size")
        {
            format.options.options.insert("cluster_size".to_owned(), size.to_string());
        }
        let place = if is_raw || is_device {
            Place::Existing { path: path.to_owned(), zeroed: is_raw && !write_zeros }
        } else {
            Place::New(path.to_owned())
        };
        let size = matches!(place, Place::New(_)).then_some(existing.size);
        if size.is_some() && has_snapshots(info) {
            let message = "has internal snapshots, which would be lost";
            return Err(Error::refused(format!("the target {} {message}", path.display()))
                .hint("nothing was written; name another target, or delete them with qemu-img snapshot -d"));
        }
        Ok(Target { place, format, devices: vec![number], attachments: Vec::new(), size })
    }
}

/// The program's name for a device's file; another where that one is no file name, or is given.
fn file_name(device: &Device, unique: &mut Unique, notes: &mut Vec<String>) -> String {
    let (stem, extension) = match device.kind {
        DeviceKind::VmState => ("vmstate".to_owned(), "bin"),
        DeviceKind::Disk => (format!("disk-{}", names::component(&device.name, MAX_NAME)), "raw"),
    };
    let name = unique.give(&stem, extension);
    if !is_state(device.kind) && name != format!("disk-{}.raw", device.name) {
        notes.push(format!("device {} '{}' is written to '{name}'", device.id, device.name));
    }
    name
}

fn has_snapshots(info: &ImageInfo) -> bool {
    let snapshots = info.facts.iter().find(|fact| fact.key == "snapshots");
    snapshots.and_then(|fact| fact.value.as_array()).is_some_and(|list| !list.is_empty())
}

fn check_size(taken: &Taken, target_size: u64) -> Result<()> {
    let fits = target_size.checked_sub(taken.device.size).is_some_and(|more| more <= SIZE_TOLERANCE);
    if fits {
        return Ok(());
    }
    Err(usage(format!(
        "vma_reader_register_bs for stream {} failed - unexpected size {target_size} != {}",
        taken.name, taken.device.size
    ))
    .hint("a target is as large as its disk, or up to 4 MiB larger"))
}
