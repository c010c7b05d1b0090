//! `imgtool info`: what an image or archive holds, without reading its data. Of a stream some of the
//! data must be read, so only a short one is read to its end unasked.

use std::fs;
use std::path::{Path, PathBuf};

use imgtool_toolkit::external::{self, MAX_CHAIN_DEPTH};
use imgtool_toolkit::storage::os;
use imgtool_toolkit::{
    Compression, Driver, Error, FactScope, ImageInfo, ImageSource, OpenOptions, Registry, Result,
};
use serde_json::{Map, Value, json};

use crate::args::InfoArgs;
use crate::exit::Exit;
use crate::{drivers, images, report};

mod guest;
mod page;

/// Bytes of a stream, decompressed, that are read unasked: a blink. Ours.
const STREAM_LEN: u64 = 64 << 20;

/// What is told about one image.
struct Subject {
    path: PathBuf,
    compression: Vec<Compression>,
    source: Box<dyn ImageSource>,
    is_archive: bool,
    /// Why the chain below it is not shown.
    chain_ends: Option<String>,
}

impl Subject {
    fn info(&self) -> &ImageInfo {
        self.source.info()
    }

    fn notes(&self) -> impl Iterator<Item = &String> {
        self.info().notes.iter().chain(&self.chain_ends)
    }

    /// What is wrong with it, for `info` to say in its own place.
    fn damage(&self) -> Option<String> {
        self.source.damage().map(ToString::to_string)
    }

    fn virtual_size(&self) -> u64 {
        self.info().devices.iter().fold(0, |sum, device| sum.saturating_add(device.size))
    }

    /// Bytes on disk, if it is a file.
    fn actual_size(&self) -> Option<u64> {
        let meta = fs::metadata(&self.path).ok().filter(fs::Metadata::is_file)?;
        Some(os::allocated_len(&meta))
    }
}

/// Prints what images hold.
///
/// # Errors
/// When one can't be opened. What is wrong behind its beginning is told, and the rest too.
pub fn run(args: &InfoArgs) -> Result<Exit> {
    let registry = drivers::registry();
    let options = OpenOptions {
        info_only: true,
        info_stream_len: if args.read_all { u64::MAX } else { STREAM_LEN },
        snapshot: args.snapshot.snapshot.as_deref().map(images::snapshot_name),
        ..images::open_options(&registry, &args.input)?
    };
    let mut subjects = Vec::new();
    for path in &args.images {
        let opened = images::open(&registry, path, args.input.format.as_deref(), &options)?;
        subjects.push(Subject {
            path: path.clone(),
            is_archive: is_archive(&*opened.driver),
            compression: opened.compression,
            source: opened.source,
            chain_ends: None,
        });
        if args.backing_chain {
            follow(&registry, &options, &mut subjects)?;
        }
    }
    if args.output.is_json() {
        let documents: Vec<Value> = subjects.iter().map(document).collect();
        // As qemu-img: an array only where there may be many.
        let alone = args.images.len() == 1 && !args.backing_chain;
        match (alone, documents.as_slice()) {
            (true, [only]) => report::print_json(only)?,
            _ => report::print_json(&documents)?,
        }
    } else {
        let pages: Vec<String> = subjects.iter().map(page::page).collect();
        report::print(&pages.join("\n"))?;
    }
    let mut exit = Exit::Done;
    for damage in subjects.iter().filter_map(|subject| subject.source.damage()) {
        report::error(damage);
        exit = Exit::Failed;
    }
    Ok(exit)
}

fn is_archive(driver: &dyn Driver) -> bool {
    driver.capabilities().max_devices > 1
}

/// Adds the backing files below the last subject.
fn follow(registry: &Registry, options: &OpenOptions, subjects: &mut Vec<Subject>) -> Result<()> {
    for _ in 0..MAX_CHAIN_DEPTH {
        let Some(last) = subjects.last() else { return Ok(()) };
        let below = last.info().references.iter().find(|r| matches!(r.role, "backing file" | "parent"));
        let Some(below) = below.cloned() else { return Ok(()) };
        let from = last.path.clone();
        let source = options.externals.open_image(
            below.role,
            &below.name,
            &from,
            below.format.as_deref(),
            &OpenOptions { snapshot: None, ..options.clone() },
        );
        let source = match source {
            Ok(source) => source,
            // What is needed is listed; what may not or can't be opened is not.
            Err(error) => {
                let Some(last) = subjects.last_mut() else { return Ok(()) };
                last.chain_ends = Some(format!("the chain is not shown further: {error}"));
                return Ok(());
            }
        };
        let is_archive = registry.get(source.info().format).is_ok_and(|driver| is_archive(&*driver));
        let path = images::resolve(from.parent().unwrap_or(Path::new("")), &below.name);
        if subjects.iter().any(|known| known.path == path) {
            return Err(external::leads_back(below.role, &below.name, &from));
        }
        subjects.push(Subject { path, compression: Vec::new(), source, is_archive, chain_ends: None });
    }
    Err(Error::limit(format!("the chain is deeper than {MAX_CHAIN_DEPTH} images")))
}

/// The JSON of one image: qemu-img's names where they mean the same.
fn document(subject: &Subject) -> Value {
    let info = subject.info();
    let mut map = Map::new();
    map.insert("filename".into(), subject.path.to_string_lossy().into());
    map.insert("format".into(), info.format.into());
    map.insert("virtual-size".into(), virtual_size(subject));
    if let Some(size) = subject.actual_size() {
        map.insert("actual-size".into(), size.into());
    }
    if let Some(size) = info.cluster_size {
        map.insert("cluster-size".into(), size.into());
    }
    let names: Vec<&str> = subject.compression.iter().map(|c| c.name()).collect();
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
        map.insert("format-specific".into(), json!({ "type": info.format, "data": data }));
    }
    map.insert("devices".into(), info.devices.iter().map(device).collect());
    let attachments = info.attachments.iter().map(|a| json!({ "name": a.name, "size": a.data.len() }));
    map.insert("attachments".into(), attachments.collect());
    let references =
        info.references.iter().map(|r| json!({ "role": r.role, "name": r.name, "format": r.format }));
    map.insert("references".into(), references.collect());
    if let Some(damage) = subject.damage() {
        map.insert("damage".into(), damage.into());
    }
    let notes: Vec<&String> = subject.notes().collect();
    map.insert("notes".into(), json!(notes));
    Value::Object(map)
}

/// Null for a stream whose length is not known.
fn virtual_size(subject: &Subject) -> Value {
    let open_ended = subject.info().devices.iter().any(|device| device.open_ended);
    if open_ended { Value::Null } else { subject.virtual_size().into() }
}

fn device(device: &imgtool_toolkit::Device) -> Value {
    let size = if device.open_ended { Value::Null } else { device.size.into() };
    json!({
        "id": device.id.0,
        "name": device.name,
        "kind": images::kind_name(device.kind),
        "virtual-size": size,
    })
}
