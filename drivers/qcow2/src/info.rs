//! Facts and notes about an image, with the keys of `qemu-img info --output=json`.

use imgtool_core::{ImageInfo, Location, OpenOptions, RandomInput, Reference};
use serde_json::{Map, Value, json};

use crate::encryption::read_luks;
use crate::layout::FORMAT;
use crate::layout::bitmap::{self, Bitmap};
use crate::layout::header::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, Encryption, Header, INCOMPATIBLE_CORRUPT,
    INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY,
};
use crate::layout::snapshot::{Snapshot, Snapshots};

/// Describes an image: facts, notes and references. The caller adds the devices. For information only, lists
/// the snapshots and adds a note for each list that was cut off.
pub fn describe(
    input: &RandomInput,
    header: &Header,
    snapshots: &Snapshots,
    bitmaps: &[Bitmap],
    options: &OpenOptions,
) -> ImageInfo {
    let list = options.info_only;
    let mut info =
        ImageInfo { format: FORMAT, cluster_size: Some(header.shape.cluster_size()), ..ImageInfo::default() };
    describe_names(&mut info, input.location(), header);
    if header.encryption != Encryption::None {
        info.top_fact("encrypted", "encrypted", true);
    }
    info.top_fact("dirty-flag", "dirty", header.has(INCOMPATIBLE_DIRTY));
    if list && !snapshots.listed.is_empty() {
        let list: Vec<Value> = snapshots.listed.iter().map(snapshot_fact).collect();
        info.top_fact("snapshots", "snapshots", list);
    }
    info.notes = notes(header, snapshots, options);
    describe_format(&mut info, input, header, bitmaps);
    if list {
        info.notes.extend(truncation_notes(header, snapshots, bitmaps));
    }
    info
}

fn describe_names(info: &mut ImageInfo, location: &Location, header: &Header) {
    let extensions = &header.extensions;
    if let Some(name) = &header.backing_file {
        info.top_fact("backing-filename", "backing file", name.clone());
        info.top_fact("full-backing-filename", "backing file path", full_backing_name(location, name));
        if let Some(format) = &extensions.backing_format {
            info.top_fact("backing-filename-format", "backing file format", format.clone());
        }
        info.references.push(Reference {
            role: "backing file",
            name: name.clone(),
            format: extensions.backing_format.clone(),
        });
    }
    if header.has(INCOMPATIBLE_DATA_FILE) {
        info.references.push(Reference {
            role: "data file",
            name: extensions.data_file.clone().unwrap_or_default(),
            format: Some("raw".to_owned()),
        });
    }
}

/// Resolves a relative `name` against the directory of the image at `location`. Returns a URL or a `json:`
/// name unchanged.
fn full_backing_name(location: &Location, name: &str) -> String {
    let has_protocol = name.split_once(':').is_some_and(|(before, _)| !before.contains('/'));
    match location.beside(name) {
        Some(full) if !has_protocol => full.name().into_owned(),
        _ => name.to_owned(),
    }
}

fn describe_format(info: &mut ImageInfo, input: &RandomInput, header: &Header, bitmaps: &[Bitmap]) {
    let compression = match header.compression {
        Ok(compression) => compression.name().to_owned(),
        Err(number) => format!("unknown ({number})"),
    };
    if header.version < 3 {
        info.fact("compat", "compat", "0.10");
        info.fact("compression-type", "compression type", compression);
        info.fact("refcount-bits", "refcount bits", header.refcount_bits());
    } else {
        info.fact("compat", "compat", "1.1");
        info.fact("compression-type", "compression type", compression);
        info.fact("lazy-refcounts", "lazy refcounts", header.compatible & COMPATIBLE_LAZY_REFCOUNTS != 0);
        if !bitmaps.is_empty() {
            let list: Vec<Value> = bitmaps.iter().map(bitmap_fact).collect();
            info.fact("bitmaps", "bitmaps", list);
        }
        info.fact("refcount-bits", "refcount bits", header.refcount_bits());
        if header.has(INCOMPATIBLE_DATA_FILE) {
            if let Some(name) = &header.extensions.data_file {
                info.fact("data-file", "data file", name.clone());
            }
            info.fact("data-file-raw", "data file raw", header.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0);
        }
        info.fact("corrupt", "corrupt", header.has(INCOMPATIBLE_CORRUPT));
        info.fact("extended-l2", "extended l2", header.shape.extended_l2);
    }
    if header.encryption != Encryption::None {
        let fact = encryption_fact(input, header, &mut info.notes);
        info.fact("encrypt", "encryption", fact);
    }
}

/// Returns the facts of the encryption. Damage of a LUKS header becomes a note.
fn encryption_fact(input: &RandomInput, header: &Header, notes: &mut Vec<String>) -> Value {
    if header.encryption == Encryption::Aes {
        return json!({ "format": "aes" });
    }
    let mut fact = Map::new();
    fact.insert("format".into(), "luks".into());
    match read_luks(input, header) {
        Ok((luks, _)) => fact.extend(luks.facts()),
        Err(e) => notes.push(format!("{e:#}")),
    }
    fact.into()
}

fn snapshot_fact(snapshot: &Snapshot) -> Value {
    let mut fact = Map::new();
    fact.insert("id".into(), snapshot.id.clone().into());
    fact.insert("name".into(), snapshot.name.clone().into());
    fact.insert("vm-state-size".into(), snapshot.vm_state_size.into());
    fact.insert("date-sec".into(), snapshot.date_sec.into());
    fact.insert("date-nsec".into(), snapshot.date_nsec.into());
    fact.insert("vm-clock-sec".into(), (snapshot.vm_clock_nsec / 1_000_000_000).into());
    fact.insert("vm-clock-nsec".into(), (snapshot.vm_clock_nsec % 1_000_000_000).into());
    if let Some(icount) = snapshot.icount {
        fact.insert("icount".into(), icount.into());
    }
    fact.into()
}

fn bitmap_fact(bitmap: &Bitmap) -> Value {
    let mut flags = Vec::new();
    if bitmap.in_use {
        flags.push("in-use");
    }
    if bitmap.auto {
        flags.push("auto");
    }
    json!({ "name": bitmap.name, "granularity": bitmap.granularity, "flags": flags })
}

/// Returns a note for each list, of snapshots or of bitmaps, that was cut off.
fn truncation_notes(header: &Header, snapshots: &Snapshots, bitmaps: &[Bitmap]) -> Vec<String> {
    let counts = [
        (snapshots.listed.len(), snapshots.count, "snapshots"),
        (bitmaps.len(), bitmap::count(header) as usize, "bitmaps"),
    ];
    let too_many = counts.iter().filter(|(listed, count, _)| *listed > 0 && listed < count);
    too_many
        .map(|(listed, count, what)| format!("only the first {listed} of {count} {what} are listed"))
        .collect()
}

fn notes(header: &Header, snapshots: &Snapshots, options: &OpenOptions) -> Vec<String> {
    let mut notes = Vec::new();
    let selected = snapshots.selected.as_ref();
    if let Some(snapshot) = selected {
        notes.push(format!("the content is from snapshot {} ({})", snapshot.id, snapshot.name));
    }
    if header.has(INCOMPATIBLE_DIRTY) {
        notes.push("the image was not closed cleanly; its content is read as it is".to_owned());
    }
    if header.has(INCOMPATIBLE_CORRUPT) {
        notes.push("the image is marked corrupt: its content may be wrong".to_owned());
    }
    if header.unknown_features() != 0 {
        notes.push(format!(
            "the image needs unknown features: {}",
            header.feature_list(header.unknown_features())
        ));
    }
    let other_snapshots = snapshots.count.saturating_sub(usize::from(selected.is_some()));
    if other_snapshots > 0 {
        let (noun, verb) = plural(other_snapshots, "snapshot");
        notes.push(format!("{other_snapshots} internal {noun} {verb} not part of the content"));
    }
    let bitmaps = bitmap::count(header) as usize;
    if bitmaps > 0 && !options.bitmaps {
        let (noun, verb) = plural(bitmaps, "bitmap");
        notes.push(format!("{bitmaps} persistent {noun} {verb} not part of the content"));
    }
    notes
}

fn plural(count: usize, noun: &str) -> (String, &'static str) {
    if count == 1 { (noun.to_owned(), "is") } else { (format!("{noun}s"), "are") }
}
