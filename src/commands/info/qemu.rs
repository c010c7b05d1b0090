//! Text output of `info` in the place of qemu-img, whose lines programs parse.

use std::fmt::Write as _;
use std::fs::File;

use chrono::{DateTime, Local};
use imgtool_core::error::escape_control;
use imgtool_core::{FactScope, ImageInfo};
use imgtool_storage::os::{self, FileClass};
use serde_json::Value;

use super::ImageEntry;
use crate::compat;
use crate::report::{exact_size, human_size};

/// Formats with lines of their own in qemu-img.
const SPECIFIC: [&str; 3] = ["luks", "qcow2", "vmdk"];

/// Returns the text that describes one image.
pub(super) fn page(image: &ImageEntry) -> String {
    let info = image.info();
    let mut text = String::new();
    line(&mut text, 0, "image", &image.location.to_string());
    line(&mut text, 0, "file format", compat::format_name(info.format));
    let size = image.known_size().map_or_else(|| "unavailable".to_owned(), exact_size);
    line(&mut text, 0, "virtual size", &size);
    if let Some(bytes) = image.actual_size() {
        line(&mut text, 0, "disk size", &human_size(bytes));
    }
    let is_true = |key: &str| fact(info, key) == Some(&Value::Bool(true));
    if is_true("encrypted") {
        line(&mut text, 0, "encrypted", "yes");
    }
    if let Some(bytes) = info.cluster_size {
        line(&mut text, 0, "cluster_size", &bytes.to_string());
    }
    if is_true("dirty-flag") {
        line(&mut text, 0, "cleanly shut down", "no");
    }
    backing(&mut text, image);
    snapshots(&mut text, info);
    specific(&mut text, info);
    child(&mut text, image);
    text
}

fn fact<'a>(info: &'a ImageInfo, key: &str) -> Option<&'a Value> {
    info.facts.iter().find(|fact| fact.key == key).map(|fact| &fact.value)
}

fn line(text: &mut String, indent: usize, label: &str, value: &str) {
    let _ = writeln!(text, "{:indent$}{label}: {}", "", escape_control(value));
}

/// Writes the names of the backing file.
fn backing(text: &mut String, image: &ImageEntry) {
    if let Some(name) = image.backing_name() {
        let full = image.full_backing_name().filter(|full| full != name);
        let path = full.map(|full| format!(" (actual path: {full})")).unwrap_or_default();
        line(text, 0, "backing file", &format!("{name}{path}"));
    }
    if let Some(format) = image.backing_format() {
        line(text, 0, "backing file format", format);
    }
}

/// Writes the table of the internal snapshots.
fn snapshots(text: &mut String, info: &ImageInfo) {
    let list = fact(info, "snapshots").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    if list.is_empty() {
        return;
    }
    text.push_str("Snapshot list:\n");
    let mut row = |cells: [&str; 6]| {
        let [id, tag, size, date, clock, count] = cells.map(escape_control);
        let _ = writeln!(text, "{id:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {count:>10}");
    };
    row(["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"]);
    for snapshot in list {
        let words = |key: &str| snapshot.get(key).and_then(Value::as_str).unwrap_or_default();
        let number = |key: &str| snapshot.get(key).and_then(Value::as_u64).unwrap_or(0);
        let seconds = number("vm-clock-sec");
        let clock = format!(
            "{:04}:{:02}:{:02}.{:03}",
            seconds / 3600,
            seconds / 60 % 60,
            seconds % 60,
            number("vm-clock-nsec") / 1_000_000
        );
        let count = snapshot.get("icount").and_then(Value::as_u64).map(|count| count.to_string());
        row([
            words("id"),
            words("name"),
            &human_size(number("vm-state-size")),
            &date(number("date-sec")),
            &clock,
            count.as_deref().unwrap_or_default(),
        ]);
    }
}

/// Formats seconds since 1970 as local time.
fn date(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|seconds| DateTime::from_timestamp(seconds, 0));
    time.map(|time| time.with_timezone(&Local).format("%Y-%m-%d %H:%M:%S").to_string()).unwrap_or_default()
}

/// Writes the facts of the format.
fn specific(text: &mut String, info: &ImageInfo) {
    if !SPECIFIC.contains(&info.format) {
        return;
    }
    text.push_str("Format specific information:\n");
    for fact in info.facts.iter().filter(|fact| fact.scope == FactScope::Format) {
        value(text, 4, fact.key, &fact.value);
    }
}

/// Writes a value under its key, each level of it on lines of its own.
fn value(text: &mut String, indent: usize, key: &str, value: &Value) {
    let label = escape_control(&key.replace('-', " "));
    let plain = match value {
        Value::Object(members) => {
            let _ = writeln!(text, "{:indent$}{label}:", "");
            return members.iter().for_each(|(key, inner)| self::value(text, indent + 4, key, inner));
        }
        Value::Array(items) => {
            let _ = writeln!(text, "{:indent$}{label}:", "");
            let items = items.iter().enumerate();
            return items.for_each(|(at, item)| self::value(text, indent + 4, &format!("[{at}]"), item));
        }
        Value::String(words) => words.clone(),
        Value::Null => String::new(),
        plain => plain.to_string(),
    };
    line(text, indent, &label, &plain);
}

/// Writes the facts of the file that holds the image.
fn child(text: &mut String, image: &ImageEntry) {
    /// Unit in bytes in which QEMU counts the length of a file.
    const SECTOR: u64 = 512;
    let Some(path) = image.location.path() else { return };
    let Ok(meta) = std::fs::metadata(path) else { return };
    // A FIFO must not be opened: that would wait for a writer.
    let (kind, len) = match os::classify(&meta) {
        FileClass::Regular => ("file", Some(meta.len())),
        FileClass::BlockDevice => {
            ("host_device", File::open(path).and_then(|device| os::file_len(&device)).ok())
        }
        FileClass::Directory | FileClass::Stream => return,
    };
    let Some(len) = len else { return };
    text.push_str("Child node '/file':\n");
    line(text, 4, "filename", &image.location.to_string());
    line(text, 4, "protocol type", kind);
    line(text, 4, "file length", &exact_size(len.checked_next_multiple_of(SECTOR).unwrap_or(len)));
    line(text, 4, "disk size", &human_size(os::allocated_len(&meta)));
}
