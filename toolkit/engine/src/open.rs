//! Opens images: removes outer compression, chooses the driver, and resolves file names in images.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_core::device::meant;
use imgtool_core::input::Consumed;
use imgtool_core::{
    CancelToken, Confidence, Device, Driver, Error, Externals, ImageSource, Input, Location, NoProgress,
    OpenOptions, RandomInput, Registry, Remedy, Result, suggest,
};
use imgtool_storage::open::{OpenInput, Opening};
use imgtool_storage::{Compression, FileWatch, Identity, Sharing, outer};

use crate::externals::{ExternalPolicy, PolicyOpener};
use crate::monitor::Monitor;
use crate::resized::Resized;
use crate::tail::{self, Tail};
use crate::{contents, missing, spool};

/// An open image, with the facts about its file.
#[derive(Debug)]
pub struct Opened {
    /// Location, for messages and for resolving names in the image.
    pub location: Location,
    /// Driver that opened the image.
    pub driver: Arc<dyn Driver>,
    /// Layers of outer compression that were removed, outermost first.
    pub compression: Vec<Compression>,
    /// Length of the file in bytes, before decompression, if it is a file.
    pub stored_len: Option<u64>,
    /// Number of bytes that a stream has read from its file or pipe; `None` for an input read by position.
    pub consumed: Option<Consumed>,
    /// True if the image was opened to salvage what is left of it. Its extents are then queried only once, in
    /// the order of the copy, since queries record losses.
    pub salvages: bool,
    /// True if the image was a stream, which was copied to temporary storage.
    pub spooled: bool,
    /// True if neither the content nor the name of the image says what it is: it is read as a raw disk.
    pub unrecognised: bool,
    /// Identity of the file, if it is a file or block device.
    pub identity: Option<Identity>,
    /// Watch over the file, if it is a regular file or block device.
    pub watch: Option<FileWatch>,
    /// Opener of the files that the image names.
    pub externals: Externals,
    /// The open image.
    pub image: Arc<dyn ImageSource>,
    /// Bytes of the image, for [`Opened::release`], unless they are a stream.
    pub bytes: Option<RandomInput>,
    /// Images whose disks were joined into this one; empty for a single image.
    pub parts: Vec<Opened>,
}

impl Opened {
    /// Wraps an image that exists only in memory.
    pub fn in_memory(image: impl ImageSource + 'static, driver: Arc<dyn Driver>) -> Self {
        Self {
            location: Location::from(""),
            driver,
            compression: Vec::new(),
            stored_len: None,
            consumed: None,
            salvages: false,
            spooled: false,
            unrecognised: false,
            identity: None,
            watch: None,
            externals: Externals::default(),
            image: Arc::new(image),
            bytes: None,
            parts: Vec::new(),
        }
    }

    /// Returns the number of workers that read the image; `stated` is what the user states, 0 for nothing. By default,
    /// as many as its bytes can be read at once, since workers that wait for a server need no processor.
    pub fn workers(&self, stated: usize) -> usize {
        let own = self.bytes.as_ref().map_or(1, RandomInput::concurrency);
        let parts = self.parts.iter().map(|part| part.workers(0)).max().unwrap_or(0);
        match own.max(parts) {
            most if stated == 0 && most > 1 => {
                most.max(std::thread::available_parallelism().map_or(1, usize::from))
            }
            _ => stated,
        }
    }

    /// Frees the decoded bytes that were kept for further reads. The image stays readable.
    pub fn release(&self) {
        self.bytes.iter().for_each(RandomInput::release);
        self.parts.iter().for_each(Self::release);
    }

    /// Returns the devices that these names mean ([`meant`]); all devices if `names` is empty.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for a name that no device has.
    pub fn select(&self, names: &[String]) -> Result<Vec<Device>> {
        let devices = &self.image.info().devices;
        let known = devices.iter().map(|device| device.name.as_str());
        let found = |name: &String| {
            meant(name, known.clone()).ok_or_else(|| {
                Error::usage(format!("no device is called '{name}'"))
                    .path(&self.location)
                    .hint(suggest::hint(name, "devices", known.clone()))
            })
        };
        let names: Vec<&str> = names.iter().map(found).collect::<Result<_>>()?;
        let is_selected = |device: &&Device| names.is_empty() || names.contains(&device.name.as_str());
        Ok(devices.iter().filter(is_selected).cloned().collect())
    }

    /// Describes format and compression: "vma in zstd".
    pub fn format_name(&self) -> String {
        let mut text = self.driver.name().to_owned();
        for compression in self.compression.iter().rev() {
            text.push_str(" in ");
            text.push_str(compression.name());
        }
        text
    }

    /// Describes, in a sentence each, what has changed since the image and the files that it names were
    /// opened.
    pub fn changes(&self) -> Vec<String> {
        let mut changes = self.watch.as_ref().map_or_else(Vec::new, FileWatch::changes);
        changes.extend(self.externals.changes());
        changes.extend(self.parts.iter().flat_map(Self::changes));
        changes
    }

    /// Returns the paths of the files that the image names. No output may overwrite them.
    pub fn referenced_files(&self) -> Vec<PathBuf> {
        let references = self.image.info().references.iter();
        let located = references.filter_map(|reference| resolve(&self.location, &reference.name));
        located.filter_map(|location| location.path().map(Path::to_owned)).collect()
    }
}

/// Resolves the file name `name` in the image at `image`; `None` for a stream. If the image is a symbolic
/// link, the name is beside the file that the link leads to, as for [`crate::externals::PolicyOpener`].
pub fn resolve(image: &Location, name: &str) -> Option<Location> {
    let name = name.strip_prefix("file:").unwrap_or(name);
    let is_link = |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink());
    let real = image.path().filter(|path| is_link(path)).and_then(|path| std::fs::canonicalize(path).ok());
    real.map_or_else(|| image.beside(name), |real| Location::from(&real).beside(name))
}

/// Opens the bytes of an image and removes outer compression. If the user states the `format` raw, in which
/// any content is legal, only the file extensions determine the compression. A file that its end identifies
/// as an image of the stated format, or of its extension's, is not compressed. With [`OpenOptions::plain`],
/// no compression is removed, nor from a part of a file ([`OpenOptions::part`]) that is raw. Decoders borrow
/// from the memory of `options`, which also decide about a file in use.
///
/// # Errors
/// If the input can't be opened, or its content contradicts those extensions;
/// [`imgtool_core::ErrorKind::Usage`] for an unknown `format`.
pub fn open_input(
    registry: &Registry,
    location: &Location,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<OpenInput> {
    let driver = format.map(|name| registry.get(name)).transpose()?;
    let is_verbatim = driver.as_ref().is_some_and(|driver| driver.capabilities().verbatim);
    let as_it_is = options.plain || options.part.is_some();
    let opening = if is_verbatim && !as_it_is { Opening::ByName } else { Opening::Plain };
    let mut open = open_location(registry, location, opening, options)?;
    if let Some(part) = options.part {
        open.input = open.input.part(part)?;
        open.stored_len = open.input.len();
    }
    if is_verbatim || options.plain {
        return Ok(open);
    }
    // An image that its end identifies begins with its disk, which may look like any compression or format.
    let named = driver.or_else(|| driver_by_name(registry, location));
    let decompressed = match named.filter(|driver| driver.probe_end(None)) {
        Some(driver) if ends_like(&open.input, &*driver).map_err(|e| e.path(location))? => return Ok(open),
        Some(_) => open.decompressed_to_disk(),
        None => open.decompressed(),
    };
    decompressed.map_err(|e| missing::explain(e.path(location), location))
}

/// Opens a path, standard input, or a URL for which the registry has an opener.
fn open_location(
    registry: &Registry,
    location: &Location,
    opening: Opening,
    options: &OpenOptions,
) -> Result<OpenInput> {
    let memory = &options.memory;
    if let Location::Url(url) = location
        && let Some(opener) = registry.opener(url.scheme())
    {
        if options.salvage {
            // A failure of the network would become lost content.
            return Err(Error::unsupported("content can't be salvaged over a network")
                .path(location)
                .hint("copy it to a file first"));
        }
        return imgtool_storage::open::from_input(opener.open(url, memory)?, opening, memory);
    }
    let sharing = Sharing::forced(options.force_share);
    imgtool_storage::open::open_shared(location, opening, memory, sharing)
        .map_err(|e| missing::explain(e, location))
}

/// True if the input is known to end like an image of the driver's format; false for a stream.
fn ends_like(input: &Input, driver: &dyn Driver) -> Result<bool> {
    let end = input.end()?;
    Ok(end.is_some() && driver.probe_end(end.as_deref()))
}

/// Opens an image with the driver called `format`, if stated, otherwise with the driver that recognises it.
///
/// # Errors
/// Same as [`open_input`], and any error of the driver.
pub fn open(
    registry: &Registry,
    location: &Location,
    format: Option<&str>,
    options: &OpenOptions,
    cancel: &CancelToken,
) -> Result<Opened> {
    let input = open_input(registry, location, format, options)?.cancelled_by(cancel.clone());
    open_image(registry, input, format, options)
}

/// Like [`open`], for random access: copies a stream to temporary storage first.
///
/// # Errors
/// Same as [`open`] and [`OpenInput::spool`].
pub fn open_random(
    registry: &Registry,
    location: &Location,
    format: Option<&str>,
    options: &OpenOptions,
    cancel: &CancelToken,
) -> Result<Opened> {
    let input = open_input(registry, location, format, options)?.cancelled_by(cancel.clone()).spool()?;
    open_image(registry, input, format, options)
}

/// Opens the image in an input with the driver called `format`, if stated, otherwise with the driver that
/// recognises it. Copies a stream to temporary storage first if the driver can't read it in one pass.
///
/// # Errors
/// If no driver recognises the image; any error of the driver.
pub fn open_image(
    registry: &Registry,
    input: OpenInput,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Opened> {
    open_watched(registry, input, format, options, &NoProgress)
}

/// Like [`open_image`]; `monitor` receives the progress of the copy.
///
/// # Errors
/// Same as [`open_image`].
pub fn open_watched(
    registry: &Registry,
    input: OpenInput,
    format: Option<&str>,
    options: &OpenOptions,
    monitor: &dyn Monitor,
) -> Result<Opened> {
    let location = input.input.location().clone();
    open_located(registry, input, format, options, monitor).map_err(|e| e.path(location))
}

fn open_located(
    registry: &Registry,
    input: OpenInput,
    format: Option<&str>,
    options: &OpenOptions,
    monitor: &dyn Monitor,
) -> Result<Opened> {
    let input = with_end_watched(registry, input, format, options.info_only, monitor)?;
    let (driver, confidence) = choose_driver(registry, &input, format, options)?;
    if options.snapshot.is_some() && !driver.capabilities().snapshots {
        return Err(Error::unsupported(format!("{} images hold no snapshots", driver.name()))
            .hint("leave the snapshot out to read the image as it is"));
    }
    let head = input.input.head()?;
    let takes_member = options.member.is_some() && !options.salvage && driver.capabilities().stream_member;
    let input = match (takes_member || driver.reads_stream(&head), options.info_only) {
        (true, _) => input,
        (false, true) => input.spool_for_facts()?,
        (false, false) => spool::spool(input, monitor)?,
    };
    let OpenInput { input, compression, stored_len, spooled, identity, watch, memory: _ } = input;
    let (location, consumed) = (input.location().clone(), input.consumed());
    let options = with_opener(registry, options);
    if let Some(id) = identity.as_ref().and_then(Identity::id) {
        options.externals.image_opened(&location, id);
    }
    let (input, bytes) = if input.is_stream() {
        (input, None)
    } else {
        let bytes = input.into_random()?;
        (Input::from(bytes.clone()), Some(bytes))
    };
    let unrecognised = confidence == Confidence::Fallback
        && !is_named_raw(&*driver, &location)
        && !contents::is_disk(&head, bytes.as_ref())
        && !contents::is_blank(&head, bytes.as_ref());
    let image = driver.open(input, &options)?;
    let is_sectors = options.plain && driver.capabilities().verbatim;
    let image = if is_sectors { Resized::to_sectors(image) } else { image };
    let image = if confidence == Confidence::Fallback { Tail::guard(image, registry) } else { image };
    let (salvages, externals) = (options.salvage, options.externals);
    Ok(Opened {
        location,
        driver,
        compression,
        stored_len,
        consumed,
        salvages,
        spooled,
        unrecognised,
        identity,
        watch,
        externals,
        image,
        bytes,
        parts: Vec::new(),
    })
}

/// Adds an opener to options without one: a container needs it for its members, even if no other file is
/// allowed.
fn with_opener(registry: &Registry, options: &OpenOptions) -> OpenOptions {
    let mut options = options.clone();
    if options.externals.is_empty() {
        let opener = PolicyOpener::new(registry.clone(), ExternalPolicy::default());
        let opener = opener.borrowing(&options.memory).sharing(Sharing::forced(options.force_share));
        options.externals = opener.externals();
    }
    options
}

/// True if the extension says that the file is a raw disk: the first one of the driver. Any image may be
/// called `.img`.
pub(crate) fn is_named_raw(driver: &dyn Driver, location: &Location) -> bool {
    let name = name_without_compression(location).unwrap_or_default().to_ascii_lowercase();
    name.rsplit_once('.').is_some_and(|(_, extension)| driver.extensions().first() == Some(&extension))
}

/// Returns the driver called `format`, if stated, otherwise the driver that recognises the input: with a
/// chosen member, also a container whose name does not say so. With [`OpenOptions::plain`], any other content
/// is a raw disk.
///
/// # Errors
/// [`imgtool_core::ErrorKind::WrongFormat`] if no driver recognises the content, or if the content
/// contradicts the file extension, or for an empty stream, whatever the format.
fn choose_driver(
    registry: &Registry,
    input: &OpenInput,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<(Arc<dyn Driver>, Confidence)> {
    refuse_empty_stream(input)?;
    if let Some(name) = format {
        return Ok((registry.get(name)?, Confidence::Magic));
    }
    let (driver, confidence) = recognise_for(registry, input, options)?;
    if confidence == Confidence::Fallback && !options.plain {
        check_name(registry, input, &*driver)?;
        refuse_other_files(registry, input, &*driver)?;
    }
    Ok((driver, confidence))
}

/// Refuses a file that only the fallback driver (raw) accepts although its content shows that it is something
/// else: no disk at all, or an image whose signature is at its end.
fn refuse_other_files(registry: &Registry, open: &OpenInput, driver: &dyn Driver) -> Result<()> {
    let raw = driver.name();
    if let Some(found) = contents::no_disk_by_head(&open.input.head()?) {
        let inside = open.compression.iter().rev().map(|compression| format!(", in {}", compression.name()));
        return Err(Error::wrong_format(format!("is {}{}", found.name, inside.collect::<String>()))
            .remedied_by(Remedy::ReadAs { format: raw, advice: found.advice.into() }));
    }
    // The end of a stream is not known yet: `Tail` looks at it. The damaged end of a compressed file is an
    // error of the read that needs it.
    let end = if open.compression.is_empty() { open.input.end()? } else { open.input.end().unwrap_or(None) };
    end.map_or(Ok(()), |end| tail::refuse_other_end(registry, raw, &end))
}

/// Copies a stream to temporary storage if only its end may tell its format: its name is that of a format
/// with a signature at the end, and its beginning is that of another format, or one that can't be read in one
/// pass. `facts_only` is true for a caller that needs no content.
///
/// # Errors
/// Same as [`OpenInput::spool`] and [`OpenInput::spool_for_facts`].
pub fn with_end(
    registry: &Registry,
    open: OpenInput,
    format: Option<&str>,
    facts_only: bool,
) -> Result<OpenInput> {
    with_end_watched(registry, open, format, facts_only, &NoProgress)
}

fn with_end_watched(
    registry: &Registry,
    open: OpenInput,
    format: Option<&str>,
    facts_only: bool,
    monitor: &dyn Monitor,
) -> Result<OpenInput> {
    let Some(named) = signed_at_end(registry, open.input.location()) else { return Ok(open) };
    if format.is_some() || !open.input.is_stream() {
        return Ok(open);
    }
    let head = open.input.head()?;
    let (found, confidence) = registry.probe(&head, open.input.len())?;
    let is_clear = match confidence {
        Confidence::Magic => found.name() == named.name(),
        Confidence::Fallback => named.reads_stream(&head),
    };
    match (is_clear, facts_only) {
        (true, _) => Ok(open),
        (false, true) => open.spool_for_facts(),
        (false, false) => spool::spool(open, monitor),
    }
}

/// Returns the driver for the file extension if images of its format have a signature at the end.
fn signed_at_end(registry: &Registry, location: &Location) -> Option<Arc<dyn Driver>> {
    driver_by_name(registry, location).filter(|driver| driver.probe_end(None))
}

/// Returns the driver that recognises the input by its last bytes, if the name has the extension of the
/// format, or by its first bytes. The end comes first: it is of the image's program, while a guest may have
/// written the first sector of a disk that begins the file. A name alone decides nothing else, and the end of
/// a file alone neither: a guest may have written the last sector of a raw disk. A container needs a name
/// with its extension as well, since guests store archives on disks without partitions. Call [`with_end`]
/// before.
///
/// # Errors
/// [`imgtool_core::ErrorKind::WrongFormat`] if no driver recognises the content.
pub fn recognise(registry: &Registry, open: &OpenInput) -> Result<(Arc<dyn Driver>, Confidence)> {
    let input = &open.input;
    // Other formats have no signature at the end, which takes a read, of a whole frame in a seekable `.zst`.
    let Some(named) = signed_at_end(registry, input.location()) else {
        return probe_by_name(registry, input);
    };
    if ends_like(input, &*named)? {
        return Ok((named, Confidence::Magic));
    }
    let found = probe_by_name(registry, input)?;
    // The end of a stream is not known yet.
    let is_named = input.is_stream() && found.1 == Confidence::Fallback;
    Ok(if is_named { (named, Confidence::Magic) } else { found })
}

/// Like [`recognise`]; the choice of a member ([`OpenOptions::member`]) says of any file that it is a
/// container.
///
/// # Errors
/// Same as [`recognise`].
pub fn recognise_for(
    registry: &Registry,
    open: &OpenInput,
    options: &OpenOptions,
) -> Result<(Arc<dyn Driver>, Confidence)> {
    if options.member.is_some() {
        let found = registry.probe(&open.input.head()?, open.input.len())?;
        if found.0.capabilities().container {
            return Ok(found);
        }
    }
    recognise(registry, open)
}

/// Refuses the choice of a member if none of the images is a container.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] in this case.
pub fn check_member<'o>(member: Option<&str>, mut opened: impl Iterator<Item = &'o Opened>) -> Result<()> {
    let Some(member) = member else { return Ok(()) };
    match opened.any(|opened| opened.driver.capabilities().container) {
        true => Ok(()),
        false => Err(no_member(member)),
    }
}

/// Returns the error for a chosen member of something that is no container.
pub fn no_member(member: &str) -> Error {
    Error::usage(format!("'{member}' can't be chosen: a disk image is no archive of files"))
        .remedied_by(Remedy::LeaveOutMember)
}

/// Returns the driver that recognises the input by its first bytes; for a container whose name does not say
/// so, the driver of raw disks.
fn probe_by_name(registry: &Registry, input: &Input) -> Result<(Arc<dyn Driver>, Confidence)> {
    let found = registry.probe(&input.head()?, input.len())?;
    let is_container = |driver: &dyn Driver| driver.capabilities().container;
    let has_other_name = input.location().file_name().is_some()
        && driver_by_name(registry, input.location()).is_none_or(|named| !is_container(&*named));
    match is_container(&*found.0) && has_other_name {
        true => Ok((registry.verbatim()?, Confidence::Fallback)),
        false => Ok(found),
    }
}

/// Refuses an empty stream, and a compressed file without content: the command that wrote it has failed. A
/// file may be empty.
fn refuse_empty_stream(open: &OpenInput) -> Result<()> {
    if !(open.input.is_stream() || open.spooled) || !open.input.head()?.is_empty() {
        return Ok(());
    }
    let error = match open.compression.first() {
        Some(compression) => Error::wrong_format(format!(
            "the {} stream contains nothing; did the command that wrote it fail?",
            compression.name()
        )),
        None => Error::wrong_format("input is empty; did the command before the pipe fail?").at(0),
    };
    Err(error.hint("check the command that writes the input"))
}

/// Refuses an image that only the fallback driver (raw) accepts although its extension names another format:
/// reading it as a raw disk would hide a damaged beginning.
fn check_name(registry: &Registry, open: &OpenInput, driver: &dyn Driver) -> Result<()> {
    let location = open.input.location();
    if let Some(missing) = outer::layers_by_name(location).get(open.compression.len()) {
        return Err(outer::misnamed(*missing));
    }
    match driver_by_name(registry, location).filter(|other| other.name() != driver.name()) {
        Some(other) => {
            let advice = match location.file_name().and_then(|name| contents::descriptor_of(&name)) {
                Some(descriptor) => {
                    Cow::Owned(format!("it may be a part of the disk '{descriptor}': name that file instead"))
                }
                None => Cow::Borrowed("the file is damaged or misnamed"),
            };
            let message = format!("the name says {}, but the content does not", other.name());
            Err(Error::wrong_format(message)
                .at(0)
                .remedied_by(Remedy::ReadAs { format: driver.name(), advice }))
        }
        None => Ok(()),
    }
}

/// Returns the driver for the file extension, ignoring an extension of outer compression.
pub fn driver_by_name(registry: &Registry, location: &Location) -> Option<Arc<dyn Driver>> {
    registry.by_extension(&name_without_compression(location)?)
}

/// Returns a file name without the extensions of its format and compression: "vm" for "vm.vma.zst".
pub fn stem(registry: &Registry, location: &Location) -> String {
    let Some(name) = name_without_compression(location) else { return "disk".to_owned() };
    let known = |ext: &str| registry.drivers().any(|driver| driver.extensions().contains(&ext));
    match name.rsplit_once('.') {
        Some((stem, ext)) if !stem.is_empty() && known(&ext.to_ascii_lowercase()) => stem.to_owned(),
        _ => name,
    }
}

fn name_without_compression(location: &Location) -> Option<String> {
    let name = location.file_name()?;
    let stem = Path::new(&*name).file_stem().map(OsStr::to_string_lossy);
    match stem.filter(|_| outer::by_name(location).is_some()) {
        Some(stem) => Some(stem.into_owned()),
        None => Some(name.into_owned()),
    }
}
