//! `imgtool info`: describes images and archives without reading their data. Streams are an exception,
//! because their data cannot be skipped: a short stream is read to its end, a longer one only with
//! `--read-all`.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;

use imgtool_core::external::is_plain_name;
use imgtool_core::sync::lock;
use imgtool_core::{
    Access, BufferPool, Driver, Error, FactScope, ImageInfo, ImageSource, Location, OpenOptions, Reference,
    Registry, Remedy, Result,
};
use imgtool_engine::externals::{self, MAX_CHAIN_DEPTH};
use imgtool_engine::open;
use imgtool_storage::Compression;
use imgtool_storage::os::{self, FileClass};
use serde_json::{Map, Value, json};

use crate::args::InfoArgs;
use crate::exit::Exit;
use crate::{compat, images, remedy, report};

mod facts;
mod guest;
mod page;
mod qemu;

/// Maximum number of decompressed bytes to read from a stream without `--read-all`. Our limit: reading
/// them takes a fraction of a second.
const STREAM_LEN: u64 = 64 << 20;

/// One image to describe.
struct ImageEntry {
    location: Location,
    compression: Vec<Compression>,
    source: Arc<dyn ImageSource>,
    is_archive: bool,
    /// Reason why the rest of the backing chain is not shown.
    chain_ends: Option<Error>,
    /// Size in bytes of the only device, if it became known by reading the stream to its end.
    counted: Option<u64>,
}

impl ImageEntry {
    fn info(&self) -> &ImageInfo {
        self.source.info()
    }

    /// Returns the notes on the image, including how to obtain missing facts and why the rest of the backing
    /// chain is not shown.
    fn notes(&self) -> impl Iterator<Item = String> {
        let info = self.info();
        let notes = info.notes.iter().cloned();
        let chain_ends = self.chain_ends.as_ref();
        let chain_ends = chain_ends.map(|error| format!("the rest of the chain is not shown: {error:#}"));
        notes.chain(info.remedy.as_ref().map(remedy::words)).chain(chain_ends)
    }

    /// Returns the damage that the driver found while opening the image, if any.
    fn damage(&self) -> Option<String> {
        self.source.damage().map(|damage| format!("{damage:#}"))
    }

    fn virtual_size(&self) -> u64 {
        self.info().devices.iter().fold(0, |sum, device| sum.saturating_add(device.size))
    }

    fn text_fact(&self, key: &str) -> Option<&str> {
        self.info().facts.iter().find(|fact| fact.key == key)?.value.as_str()
    }

    /// Returns the name of the backing file, if qemu-img calls it one: also that of a parent of VMDK.
    fn backing_name(&self) -> Option<&str> {
        let parent = || below_reference(self).filter(|_| self.info().format == "vmdk");
        self.text_fact("backing-filename").or_else(|| parent().map(|reference| &*reference.name))
    }

    /// Returns the format of the backing file, if the image states one or has a parent of VMDK.
    fn backing_format(&self) -> Option<&str> {
        let parent = || below_reference(self).filter(|_| self.info().format == "vmdk");
        self.text_fact("backing-filename-format").or_else(|| parent()?.format.as_deref())
    }

    /// Returns the path of the backing file, relative names resolved.
    fn full_backing_name(&self) -> Option<String> {
        let known = self.text_fact("full-backing-filename").map(str::to_owned);
        known.or_else(|| Some(open::resolve(&self.location, self.backing_name()?)?.name().into_owned()))
    }

    /// Returns the virtual size; `None` for a stream whose end was not reached.
    fn known_size(&self) -> Option<u64> {
        let open_ended = self.info().devices.iter().any(|device| device.open_ended);
        if open_ended { self.counted } else { Some(self.virtual_size()) }
    }

    /// Returns the allocated size in bytes of the file and of its extents beside it, as far as they exist; 0 for a
    /// block device, `None` for a stream.
    fn actual_size(&self) -> Option<u64> {
        let is_stored =
            |meta: &fs::Metadata| matches!(os::classify(meta), FileClass::Regular | FileClass::BlockDevice);
        let meta = fs::metadata(self.location.path()?).ok().filter(is_stored)?;
        let extents = self.info().references.iter().filter(|reference| reference.role == "extent");
        let names: BTreeSet<&str> =
            extents.map(|extent| &*extent.name).filter(|n| is_plain_name(n)).collect();
        let beside = names.into_iter().filter_map(|name| {
            let location = open::resolve(&self.location, name)?;
            fs::symlink_metadata(location.path()?).ok().filter(fs::Metadata::is_file)
        });
        Some(beside.fold(os::allocated_len(&meta), |sum, meta| sum.saturating_add(os::allocated_len(&meta))))
    }
}

/// Describes the images.
///
/// # Errors
/// If an image cannot be opened. Nothing is printed then. Damage deeper inside an image, and a backing chain
/// that can't be followed, are not returned as errors: they are printed after the facts, and the exit code is
/// [`Exit::Failed`].
pub fn run(args: &InfoArgs) -> Result<Exit> {
    let registry = images::registry(&args.input)?;
    let options = OpenOptions {
        info_only: true,
        info_stream_len: if args.read_all { u64::MAX } else { STREAM_LEN },
        snapshot: args.snapshot.snapshot.clone(),
        ..images::open_options(&registry, &args.input)?
    };
    let mut entries = Vec::new();
    for path in &args.images {
        let opened = images::open(&registry, &args.input, path.as_os_str(), &options)?;
        entries.push(ImageEntry {
            location: opened.location,
            is_archive: is_archive(&*opened.driver),
            compression: opened.compression,
            counted: args.read_all.then(|| count(&*opened.image)).transpose()?.flatten(),
            source: opened.image,
            chain_ends: None,
        });
        if args.backing_chain {
            follow_chain(&registry, &options, &mut entries);
        }
    }
    if compat::is_on() && entries.iter().any(|image| image.chain_ends.is_some()) {
        // As qemu-img does: the whole chain or nothing.
        return Ok(report_failures(&entries));
    }
    if args.output.is_json() {
        let documents: Vec<Value> = entries.iter().map(document).collect();
        // Like qemu-img, print an array only if there can be several images.
        let is_single = args.images.len() == 1 && !args.backing_chain;
        match (is_single, documents.as_slice()) {
            (true, [only]) => report::print_json(only)?,
            _ => report::print_json(&documents)?,
        }
    } else {
        let pages: Vec<String> = entries.iter().map(page_of).collect();
        report::print(&pages.join("\n"))?;
    }
    Ok(report_failures(&entries))
}

/// Prints the errors of the images and chains. Returns the exit code.
fn report_failures(entries: &[ImageEntry]) -> Exit {
    let mut exit = Exit::Done;
    // A pipe leads to no other file.
    let files = entries.iter().filter(|image| image.location.path().is_some());
    let chain_ends = files.filter_map(|image| image.chain_ends.as_ref());
    // The user did not allow the file: there is no error, and the note tells how. In the place of qemu-img, the
    // caller expects the whole chain.
    let is_noted = |error: &&Error| matches!(error.remedy(), Some(Remedy::AllowExternal { .. }));
    let broken = chain_ends.filter(|error| compat::is_on() || !is_noted(error));
    for error in entries.iter().filter_map(|image| image.source.damage()).chain(broken) {
        report::error(error);
        exit = Exit::Failed;
    }
    exit
}

/// Returns the text that describes one image. qemu-img knows no archives.
fn page_of(image: &ImageEntry) -> String {
    if compat::is_on() && !image.is_archive { qemu::page(image) } else { page::page(image) }
}

fn is_archive(driver: &dyn Driver) -> bool {
    driver.capabilities().is_archive()
}

/// Appends the backing chain of the last entry, as far as its images can be opened. The last image that could
/// be opened gets the reason why the chain ends there.
fn follow_chain(registry: &Registry, options: &OpenOptions, entries: &mut Vec<ImageEntry>) {
    let first = entries.len().saturating_sub(1);
    loop {
        let depth = entries.len() - first;
        let Some(last) = entries.last() else { return };
        let below = open_below(registry, options, last, depth);
        match below {
            Ok(Some(below)) if entries[first..].iter().any(|known| known.location == below.location) => {
                let Some(last) = entries.last_mut() else { return };
                let role = below_reference(last).map_or("backing file", |reference| reference.role);
                let name = below.location.name();
                let loops = match compat::is_on() {
                    true => Error::malformed(format!("Backing file '{name}' creates an infinite loop.")),
                    false => externals::chain_loop(role, &name, &last.location),
                };
                last.chain_ends = Some(loops);
                return;
            }
            Ok(Some(below)) if is_wrong_parent(last.info(), below.info()) => {
                let why = Error::corrupt(format!(
                    "parent '{}' is not as it was when the image was made: its identifier is another",
                    below.location
                ));
                let Some(last) = entries.last_mut() else { return };
                last.chain_ends = Some(why.path(&last.location));
                return;
            }
            Ok(Some(below)) => entries.push(below),
            Ok(None) => return,
            Err(error) => {
                let Some(last) = entries.last_mut() else { return };
                last.chain_ends = Some(error);
                return;
            }
        }
    }
}

/// True if an image states the identifier of its parent, and `parent` has another one.
fn is_wrong_parent(image: &ImageInfo, parent: &ImageInfo) -> bool {
    let Some((key, expected)) = &image.parent_identifier else { return false };
    parent.facts.iter().find(|fact| fact.key == *key).is_none_or(|fact| fact.value != *expected)
}

/// Returns the reference of an image to the one below it in its chain.
fn below_reference(image: &ImageEntry) -> Option<&Reference> {
    image.info().references.iter().find(|reference| matches!(reference.role, "backing file" | "parent"))
}

/// Returns the name that a parent may have beside its child: the last component of a path, which may be of another
/// system. Drivers look there as well.
fn beside(backing: &Reference) -> Option<&str> {
    let last = backing.name.rsplit(['\\', '/']).next()?;
    (backing.role == "parent" && last != backing.name && is_plain_name(last)).then_some(last)
}

/// Opens the image directly below `image` in its backing chain. `depth` counts the images of the chain that are
/// open already. Returns `None` at the end of the chain.
fn open_below(
    registry: &Registry,
    options: &OpenOptions,
    image: &ImageEntry,
    depth: usize,
) -> Result<Option<ImageEntry>> {
    let Some(backing) = below_reference(image) else { return Ok(None) };
    if depth > MAX_CHAIN_DEPTH {
        return Err(Error::limit(format!("the chain is deeper than {MAX_CHAIN_DEPTH} images")));
    }
    let options = OpenOptions { snapshot: None, ..options.clone() };
    let format = backing.format.as_deref();
    let from = &image.location;
    let open = |name: &str| options.externals.open_image(backing.role, name, from, format, &options);
    let (name, source) = match (open(&backing.name), beside(backing)) {
        (Ok(source), _) => (&*backing.name, source),
        (Err(error), Some(name)) => (name, open(name).map_err(|_| error)?),
        (Err(error), None) => return Err(error),
    };
    let is_archive = registry.get(source.info().format).is_ok_and(|driver| is_archive(&*driver));
    let location = open::resolve(from, name);
    Ok(location.map(|location| ImageEntry {
        location,
        compression: Vec::new(),
        source,
        is_archive,
        chain_ends: None,
        counted: None,
    }))
}

/// Returns the JSON object of one image, with qemu-img's names for fields of the same meaning.
fn document(image: &ImageEntry) -> Value {
    let info = image.info();
    let mut map = Map::new();
    map.insert("filename".into(), image.location.name().into());
    let format = compat::format_name(info.format);
    map.insert("format".into(), format.into());
    map.insert("virtual-size".into(), virtual_size(image));
    if let Some(size) = image.actual_size() {
        map.insert("actual-size".into(), size.into());
    }
    if let Some(size) = info.cluster_size {
        map.insert("cluster-size".into(), size.into());
    }
    let names: Vec<&str> = image.compression.iter().map(|c| c.name()).collect();
    map.insert("compression".into(), names.into());
    for fact in info.facts.iter().filter(|fact| fact.scope == FactScope::Image) {
        map.insert(fact.key.into(), fact.value.clone());
    }
    let data: Map<String, Value> = info
        .facts
        .iter()
        .filter(|fact| fact.scope == FactScope::Format)
        .map(|fact| (fact.key.to_owned(), fact.value.clone()))
        .collect();
    if !data.is_empty() {
        map.insert("format-specific".into(), json!({ "type": format, "data": data }));
    }
    if let Some(name) = image.backing_name() {
        map.entry("backing-filename").or_insert(name.into());
    }
    if let Some(format) = image.backing_format() {
        map.entry("backing-filename-format").or_insert(format.into());
    }
    if let Some(full) = image.full_backing_name() {
        map.entry("full-backing-filename").or_insert(full.into());
    }
    // A fact of the formats that know an interrupted write, false for all others.
    map.entry("dirty-flag").or_insert(false.into());
    map.insert("devices".into(), info.devices.iter().map(|known| device(known, image.counted)).collect());
    let attachments = info.attachments.iter().map(|a| json!({ "name": a.name, "size": a.data.len() }));
    map.insert("attachments".into(), attachments.collect());
    if let Some(machine) = &info.machine {
        map.insert("machine".into(), json!(machine));
    }
    let references =
        info.references.iter().map(|r| json!({ "role": r.role, "name": r.name, "format": r.format }));
    map.insert("references".into(), references.collect());
    if let Some(damage) = image.damage() {
        map.insert("damage".into(), damage.into());
    }
    let notes: Vec<String> = image.notes().collect();
    map.insert("notes".into(), json!(notes));
    Value::Object(map)
}

/// Returns the virtual size in bytes; null for a stream of unknown length.
fn virtual_size(image: &ImageEntry) -> Value {
    image.known_size().map_or(Value::Null, Value::from)
}

/// Reads the stream of a device of unknown size to its end, and returns its size; `None` for any other image.
///
/// # Errors
/// If the stream is damaged.
fn count(source: &dyn ImageSource) -> Result<Option<u64>> {
    let Access::Stream(stream) = source.access() else { return Ok(None) };
    let Some(device) = source.info().devices.iter().find(|device| device.open_ended) else { return Ok(None) };
    let mut stream = lock(stream);
    let pool = BufferPool::new();
    while stream.next_piece(&pool)?.is_some() {}
    Ok(stream.final_size(device.id))
}

fn device(device: &imgtool_core::Device, counted: Option<u64>) -> Value {
    let size = if device.open_ended { counted.map_or(Value::Null, Value::from) } else { device.size.into() };
    json!({
        "id": device.id.0,
        "name": device.name,
        "kind": images::kind_name(device.kind),
        "virtual-size": size,
    })
}
