//! Where everything goes: decided, and checked, before the first byte is written.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::storage::os::{self, FileClass};
use imgtool_toolkit::storage::{Links, Wanted};
use imgtool_toolkit::{Attachment, DeviceKind, Driver, Error, Registry, Result, suggest};

use super::format::{self, Format};
use super::names::{self, Unique};
use super::sources::{Source, Taken};
use crate::commands::options::driver_by_name;
use crate::images;

/// Standard output, as a path.
pub const STDOUT: &str = "-";

/// Where an output goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A new file.
    New(PathBuf),
    /// A file or block device that exists and keeps its length.
    Existing {
        /// Its path.
        path: PathBuf,
        /// It is known to read as zeros.
        zeroed: bool,
    },
    /// Standard output (`-`), a FIFO or another thing that takes bytes in order.
    Stream(PathBuf),
}

impl Place {
    /// The path, `-` for standard output.
    pub fn path(&self) -> &Path {
        match self {
            Place::New(path) | Place::Existing { path, .. } | Place::Stream(path) => path,
        }
    }

    /// Whether it takes bytes in order only.
    pub fn is_stream(&self) -> bool {
        matches!(self, Place::Stream(_))
    }

    /// Whether it is standard output.
    pub fn is_stdout(&self) -> bool {
        self.is_stream() && self.path() == Path::new(STDOUT)
    }
}

/// One image to be made.
pub struct Target {
    /// Where.
    pub place: Place,
    /// As what.
    pub format: Format,
    /// The devices in it, as indices into those taken.
    pub devices: Vec<usize>,
    /// The configurations in it.
    pub attachments: Vec<Attachment>,
    /// The size of its one device, where it is to be larger than the disk: zeros follow.
    pub size: Option<u64>,
}

/// Everything that is made.
#[derive(Default)]
pub struct Layout {
    /// A directory that is made if it is missing.
    pub directory: Option<PathBuf>,
    /// The images; one that holds many devices comes first.
    pub targets: Vec<Target>,
    /// Configurations that become files.
    pub files: Vec<(PathBuf, Attachment)>,
    /// What the person should know.
    pub notes: Vec<String>,
}

impl Layout {
    /// What [`imgtool_toolkit::storage::Outputs::check`] is to look at: everything that is going to be made, as it will be.
    pub fn wanted(&self, force: bool) -> Vec<Wanted> {
        let new = |path: &Path, overwrite: bool| Wanted::New {
            path: path.to_owned(),
            overwrite,
            links: self.links(path),
        };
        let mut wanted = Vec::new();
        for target in &self.targets {
            wanted.push(match &target.place {
                Place::New(path) => new(path, force),
                Place::Existing { path, .. } if can_be_written_in_place(&*target.format.driver, path) => {
                    Wanted::Existing(path.clone())
                }
                Place::Existing { path, .. } => new(path, true),
                Place::Stream(path) if path == Path::new("-") => Wanted::Stdout,
                // A pipe or the like: nothing is replaced, and two may share it.
                Place::Stream(_) => continue,
            });
            wanted.extend(target.beside("data_file").map(|path| new(&path, force)));
        }
        wanted.extend(self.files.iter().map(|(path, _)| new(path, force)));
        wanted
    }

    /// Names in the directory that receives the disks come from the image; all others from the user.
    pub fn links(&self, path: &Path) -> Links {
        let inside = self.directory.as_deref().is_some_and(|directory| path.parent() == Some(directory));
        if inside { Links::Refuse } else { Links::Follow }
    }
}

impl Target {
    /// What an option of the format names: relative to the image's directory, as whoever reads the
    /// image will take it.
    pub fn beside(&self, option: &str) -> Option<PathBuf> {
        let directory = self.place.path().parent().unwrap_or(Path::new(""));
        self.format.options.get(option).map(|name| directory.join(name))
    }
}

/// What the layout is made from.
pub struct Request<'a> {
    /// The drivers.
    pub registry: &'a Registry,
    /// The sources.
    pub sources: &'a [Source],
    /// The devices that are taken.
    pub taken: &'a [Taken],
    /// What DEST becomes.
    pub format: &'a Format,
    /// DEST.
    pub dest: Option<&'a Path>,
    /// `--target`.
    pub own_places: Vec<OwnPlace>,
    /// The configurations that are kept.
    pub attachments: Vec<Attachment>,
    /// `-n`, and whether the target is zero.
    pub in_place: Option<bool>,
}

/// `--target NAME=PATH[,format=FMT][,zeroed]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnPlace {
    /// The device's name.
    pub name: String,
    /// Where it goes.
    pub path: PathBuf,
    /// The format, if it was said.
    pub format: Option<String>,
    /// The target reads as zeros.
    pub zeroed: bool,
}

impl OwnPlace {
    /// Reads the value of `--target`.
    ///
    /// # Errors
    /// When it is not of that form.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let usage = |what: &str| {
            Error::usage(format!("--target '{}': {what}", text.to_string_lossy()))
                .hint("the form is NAME=PATH[,format=FMT][,zeroed]; a comma in PATH is doubled")
        };
        let whole = text.to_str().ok_or_else(|| usage("is not UTF-8"))?.replace(",,", "\u{0}");
        let mut parts = whole.split(',');
        let (name, path) = parts
            .next()
            .and_then(|first| first.split_once('='))
            .filter(|(name, path)| !name.is_empty() && !path.is_empty())
            .ok_or_else(|| usage("there is no NAME=PATH"))?;
        let path = PathBuf::from(path.replace('\u{0}', ","));
        let mut place = Self { name: name.to_owned(), path, format: None, zeroed: false };
        for part in parts {
            match part.split_once('=') {
                Some(("format", format)) => place.format = Some(format.to_owned()),
                None if part == "zeroed" => place.zeroed = true,
                _ => return Err(usage(&format!("'{part}' is not known"))),
            }
        }
        Ok(place)
    }
}

impl Request<'_> {
    /// Decides where everything goes.
    ///
    /// # Errors
    /// When the request makes no sense for what the sources hold.
    pub fn layout(&self) -> Result<Layout> {
        let mut layout = Layout::default();
        let apart = self.own_targets()?;
        let rest: Vec<usize> = (0..self.taken.len())
            .filter(|index| !apart.iter().any(|target| target.devices.contains(index)))
            .collect();
        match self.dest {
            Some(dest) => self.lay_out_dest(dest, rest, &mut layout)?,
            None => self.nothing_is_left(&rest)?,
        }
        layout.targets.extend(apart);
        if layout.targets.is_empty() && layout.files.is_empty() {
            return Err(Error::usage("there is nothing to convert: the source holds no disk"));
        }
        Ok(layout)
    }

    fn own_targets(&self) -> Result<Vec<Target>> {
        let mut targets: Vec<Target> = Vec::new();
        for place in &self.own_places {
            let device = self.find(&place.name)?;
            if targets.iter().any(|target| target.devices.contains(&device)) {
                return Err(Error::usage(format!("--target names device '{}' twice", place.name)));
            }
            let driver = match &place.format {
                Some(name) => images::driver(self.registry, name)?,
                None => match driver_by_name(self.registry, &place.path) {
                    Some(driver) => driver,
                    None => {
                        images::check_name(self.registry, &place.path, "format=")?;
                        self.registry.get("raw")?
                    }
                },
            };
            let in_place = place.path.exists() && can_be_written_in_place(&*driver, &place.path);
            if place.zeroed && !in_place {
                return Err(Error::usage(
                    "a target that is 'zeroed' is a block device or raw file that exists",
                )
                .path(&place.path));
            }
            let format = self.format.for_place(driver, &place.path)?;
            if in_place && format.outer.is_some() && stream_of(&place.path).is_none() {
                return Err(Error::usage("a compressed output can't be written in place").path(&place.path));
            }
            let place = if let Some(stream) = stream_of(&place.path) {
                stream_place(&*format.driver, stream)?
            } else if in_place {
                Place::Existing { path: place.path.clone(), zeroed: place.zeroed }
            } else {
                Place::New(place.path.clone())
            };
            targets.push(Target {
                place,
                format,
                devices: vec![device],
                attachments: Vec::new(),
                size: None,
            });
        }
        let used = targets.iter().any(|target| target.format.driver.name() == self.format.driver.name());
        if self.dest.is_none() && !used && self.format.has_options() {
            return Err(Error::usage(format!(
                "-o or -c is for {}, and no target is of that format",
                self.format.driver.name()
            ))
            .hint("name the format with --to, or with --target NAME=PATH,format=FMT"));
        }
        Ok(targets)
    }

    /// The only device of this name.
    fn find(&self, name: &str) -> Result<usize> {
        let mut found = (0..self.taken.len())
            .filter(|i| self.taken[*i].name == name || self.taken[*i].device.name == name);
        match (found.next(), found.next()) {
            (Some(device), None) => Ok(device),
            (Some(_), Some(_)) => Err(Error::usage(format!("more than one device is called '{name}'"))),
            (None, _) => Err(Error::usage(format!("--target names '{name}', which is not taken"))
                .hint(suggest::hint(name, "devices", self.taken.iter().map(|taken| taken.name.as_str())))),
        }
    }

    fn names(&self, devices: impl IntoIterator<Item = usize>) -> String {
        let names: Vec<&str> = devices.into_iter().map(|i| self.taken[i].name.as_str()).collect();
        names.join(", ")
    }

    fn nothing_is_left(&self, rest: &[usize]) -> Result<()> {
        if rest.is_empty() {
            return Ok(());
        }
        Err(Error::usage(format!("no place is given for {}", self.names(rest.iter().copied())))
            .hint("give DEST, or a --target for each device; --disk takes only some of them"))
    }

    fn lay_out_dest(&self, dest: &Path, rest: Vec<usize>, layout: &mut Layout) -> Result<()> {
        let is_directory = dest.is_dir() || format::ends_in_separator(dest);
        if self.format.is_archive() {
            let path = if is_directory { dest.join(self.archive_name()) } else { dest.to_owned() };
            layout.directory = is_directory.then(|| dest.to_owned());
            return self.lay_out_archive(&path, rest, layout);
        }
        if rest.len() == 1 && !is_directory {
            self.left_out_configurations(layout);
            if self.in_place.is_some() && !can_be_written_in_place(&*self.format.driver, dest) {
                let name = escape_control(&dest.to_string_lossy());
                layout
                    .notes
                    .push(format!("{name} was made anew: its old options, size and snapshots are gone"));
            }
            layout.targets.push(self.target(self.place(dest)?, rest, Vec::new()));
            return Ok(());
        }
        self.check_directory(dest, is_directory, &rest)?;
        self.lay_out_directory(dest, &rest, layout);
        Ok(())
    }

    fn lay_out_archive(&self, path: &Path, rest: Vec<usize>, layout: &mut Layout) -> Result<()> {
        if self.in_place.is_some() {
            return Err(Error::usage(format!(
                "-n is for disks; a {} archive is always a new file",
                self.format.driver.name()
            ))
            .path(path));
        }
        let limit = self.format.driver.capabilities().max_devices as usize;
        if rest.len() > limit {
            return Err(Error::unsupported(format!(
                "{} holds at most {limit} devices, not {}",
                self.format.driver.name(),
                rest.len()
            )));
        }
        layout.targets.push(self.target(self.place(path)?, rest, self.attachments.clone()));
        Ok(())
    }

    /// Many disks, or one into a directory: each becomes a file of its own.
    fn lay_out_directory(&self, dest: &Path, rest: &[usize], layout: &mut Layout) {
        let mut unique = Unique::default();
        layout.directory = Some(dest.to_owned());
        for &index in rest {
            let device = &self.taken[index];
            let (stem, format, extension) = match device.device.kind {
                DeviceKind::Disk => {
                    (names::safe(&device.name, "disk"), self.format.clone(), self.format.extension())
                }
                // Not a disk: the bytes as they are, whatever the disks become.
                DeviceKind::VmState => match self.registry.get("raw") {
                    Ok(raw) => ("vmstate".to_owned(), Format::plain(raw), "bin".to_owned()),
                    Err(_) => ("vmstate".to_owned(), self.format.clone(), self.format.extension()),
                },
            };
            let path = dest.join(unique.give(&stem, &extension));
            layout.targets.push(Target {
                place: Place::New(path),
                format,
                devices: vec![index],
                attachments: Vec::new(),
                size: None,
            });
        }
        for attachment in &self.attachments {
            let wanted = names::safe(&attachment.name, "config");
            let name = unique.give_file(&wanted);
            if name != attachment.name {
                layout.notes.push(format!("configuration '{}' is written as '{name}'", attachment.name));
            }
            layout.files.push((dest.join(name), attachment.clone()));
        }
    }

    fn check_directory(&self, dest: &Path, is_directory: bool, rest: &[usize]) -> Result<()> {
        if stream_of(dest).is_some() {
            return Err(Error::usage(format!("a pipe takes one disk, not {}", rest.len()))
                .path(dest)
                .hint("--disk takes one of them; --to vma makes one archive"));
        }
        if self.in_place.is_some() {
            return Err(Error::usage("-n writes into one file or device that exists").path(dest));
        }
        if is_directory {
            return Ok(());
        }
        let first = rest.first().map(|i| self.taken[*i].source);
        if rest.iter().any(|i| Some(self.taken[*i].source) != first) {
            return Err(Error::usage(format!("{} sources do not go into one {} image", self.sources.len(), self.format.driver.name()))
                .path(dest)
                .hint("a DEST that ends in '/' takes an image for each; --to vma makes one archive; sources are never joined end to end"));
        }
        if dest.exists() || driver_by_name(self.registry, dest).is_some() {
            let disks = self.names(rest.iter().copied());
            return Err(Error::usage(format!("{} devices do not go into one file", rest.len()))
                .path(dest)
                .hint(format!("name a directory, or take one with --disk: {disks}")));
        }
        Ok(())
    }

    fn place(&self, dest: &Path) -> Result<Place> {
        if let Some(stream) = stream_of(dest) {
            return stream_place(&*self.format.driver, stream);
        }
        match self.in_place {
            Some(_) if self.format.outer.is_some() => {
                Err(Error::usage("a compressed output can't be written in place").path(dest))
            }
            Some(_) if !dest.exists() => {
                Err(Error::usage("-n writes into a file or device that exists").path(dest))
            }
            Some(zeroed) => Ok(Place::Existing { path: dest.to_owned(), zeroed }),
            None => Ok(Place::New(dest.to_owned())),
        }
    }

    fn target(&self, place: Place, devices: Vec<usize>, attachments: Vec<Attachment>) -> Target {
        Target { place, format: self.format.clone(), devices, attachments, size: None }
    }

    fn archive_name(&self) -> String {
        let first = self.sources.first().map(|source| images::stem(self.registry, &source.arg.path));
        format!("{}.{}", names::safe(first.as_deref().unwrap_or("vm"), "vm"), self.format.extension())
    }

    /// One disk into one file: the configurations have no place.
    fn left_out_configurations(&self, layout: &mut Layout) {
        if self.attachments.is_empty() {
            return;
        }
        let names: Vec<&str> = self.attachments.iter().map(|attachment| attachment.name.as_str()).collect();
        layout.notes.push(format!(
            "not written: {} (a DEST that ends in '/' takes configurations too)",
            names.join(", ")
        ));
    }
}

/// What DEST is called if it takes bytes in order only: standard output, a FIFO.
fn stream_of(dest: &Path) -> Option<PathBuf> {
    if [STDOUT, "/dev/stdout"].iter().any(|name| dest == Path::new(name)) {
        return Some(PathBuf::from(STDOUT));
    }
    let is_stream = std::fs::metadata(dest).is_ok_and(|meta| os::classify(&meta) == FileClass::Stream);
    is_stream.then(|| dest.to_owned())
}

/// What a stream is called in messages.
pub fn name_of_stream(stream: &Path) -> &Path {
    if stream == Path::new(STDOUT) { Path::new("standard output") } else { stream }
}

fn stream_place(driver: &dyn Driver, stream: PathBuf) -> Result<Place> {
    if driver.capabilities().stream_write {
        return Ok(Place::Stream(stream));
    }
    Err(Error::usage(format!("{} can't be written to a pipe", driver.name()))
        .path(name_of_stream(&stream))
        .hint("its tables are written last, at the front: give a file name"))
}

/// Whether an image of this format can be written over what is there: a raw image always; another
/// on a block device only, and only if it does not end where its file ends. The rest is made anew.
pub fn can_be_written_in_place(driver: &dyn Driver, path: &Path) -> bool {
    let is_device = std::fs::metadata(path).is_ok_and(|meta| os::classify(&meta) == FileClass::BlockDevice);
    driver.name() == "raw" || is_device && driver.capabilities().max_devices == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_places_are_read() {
        let parse = |text: &str| OwnPlace::parse(OsStr::new(text));
        let place = parse("scsi0=/dev/vg/a,format=raw,zeroed").expect("place");
        assert_eq!(place.name, "scsi0");
        assert_eq!(place.path, PathBuf::from("/dev/vg/a"));
        assert_eq!(place.format.as_deref(), Some("raw"));
        assert!(place.zeroed);
        assert_eq!(parse("a=x,,y").expect("place").path, PathBuf::from("x,y"));
        for bad in ["", "a", "=x", "a=", "a=b,c", "a=b,format"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
