//! Text output of `info`. The first lines use the labels of `qemu-img info`.

use std::fmt::Write as _;

use imgtool_core::error::escape_control;
use imgtool_core::{Device, DeviceKind, Fact, FactScope, ImageInfo};
use serde_json::Value;

use super::facts::facts;
use super::{ImageEntry, guest};
use crate::report::{self, Align, Paint, Stream, exact_size, human_size, percent};
use crate::{compat, images};

/// Returns the text that describes one image.
pub(super) fn page(image: &ImageEntry) -> String {
    let info = image.info();
    let mut text = String::new();
    summary(&mut text, image);
    facts(&mut text, 0, info.facts.iter().filter(|fact| fact.scope == FactScope::Image));
    if image.is_archive {
        if let Some(guest) = guest::summary(&info.attachments) {
            line(&mut text, "guest", &guest);
        } else if let Some(machine) = &info.machine {
            line(&mut text, "guest", &guest::of_machine(machine));
        }
        for (label, value) in info.machine.iter().flat_map(|machine| guest::hardware(machine)) {
            line(&mut text, label, &value);
        }
        devices(&mut text, image);
        configurations(&mut text, image);
    }
    format_facts(&mut text, image);
    references(&mut text, info);
    for note in image.notes() {
        line(&mut text, "note", &note);
    }
    if let Some(damage) = image.damage() {
        line(&mut text, "damaged", &damage);
    }
    text
}

/// Writes the lines that every image has: location, format and sizes.
fn summary(text: &mut String, image: &ImageEntry) {
    let info = image.info();
    line(text, "image", &image.location.to_string());
    line(
        text,
        "file format",
        &images::format_with_compression(compat::format_name(info.format), &image.compression),
    );
    let size = image.known_size().map(exact_size);
    let unknown = || "unknown until the end of the stream (--read-all reads it)".to_owned();
    line(text, "virtual size", &size.unwrap_or_else(unknown));
    if let Some(bytes) = image.actual_size() {
        line(text, "disk size", &human_size(bytes));
    }
    if let (Some(bytes), false) = (info.cluster_size, image.is_archive) {
        line(text, "cluster size", &human_size(bytes));
    }
}

/// Writes the format-specific facts under the name of the format, except for the devices of an archive, which
/// have a table.
fn format_facts(text: &mut String, image: &ImageEntry) {
    let info = image.info();
    let specific: Vec<&Fact> = info
        .facts
        .iter()
        .filter(|fact| fact.scope == FactScope::Format && !(image.is_archive && fact.key == "devices"))
        .collect();
    if !specific.is_empty() {
        text.push_str(&heading(info.format));
        facts(text, 4, specific.into_iter());
    }
}

/// Writes the files that the image refers to.
fn references(text: &mut String, info: &ImageInfo) {
    // Some drivers already list the file among the facts, as `qemu-img info` does.
    let is_listed = |role: &str| info.facts.iter().any(|fact| fact.label == role);
    for reference in info.references.iter().filter(|reference| !is_listed(reference.role)) {
        let format = reference.format.as_deref().map(|f| format!(" ({f})")).unwrap_or_default();
        line(text, reference.role, &format!("{}{format}", reference.name));
    }
}

fn line(text: &mut String, label: &str, value: &str) {
    let label = Stream::Out.paint(Paint::Bold, &format!("{label}:"));
    let _ = writeln!(text, "{}", report::flow(Stream::Out, &format!("{label} {}", escape_control(value)), 4));
}

fn heading(label: &str) -> String {
    Stream::Out.paint(Paint::Bold, &format!("{label}:")) + "\n"
}

fn devices(text: &mut String, image: &ImageEntry) {
    let info = image.info();
    if info.devices.is_empty() {
        line(text, "devices", "none");
        return;
    }
    let restored = guest::drives(&info.attachments);
    let table = |size: fn(u64) -> String, with_restored: bool| {
        let mut columns = vec![
            ("name", Align::Left),
            ("kind", Align::Left),
            ("size", Align::Left),
            ("stored", Align::Right),
            ("zero", Align::Right),
            ("restored as", Align::Left),
        ];
        let mut rows: Vec<Vec<String>> = Vec::new();
        for device in &info.devices {
            let stored = stored(info, device.id.0);
            rows.push(vec![
                device.name.clone(),
                images::kind_name(device.kind).to_owned(),
                size(device.size),
                stored.map(human_size).unwrap_or_default(),
                stored.map(|s| percent(device.size.saturating_sub(s), device.size)).unwrap_or_default(),
                restored.get(&device.name).filter(|_| with_restored).cloned().unwrap_or_default(),
            ]);
        }
        // A column without any value is omitted.
        for column in (0..columns.len()).rev() {
            if rows.iter().all(|row| row[column].is_empty()) {
                columns.remove(column);
                rows.iter_mut().for_each(|row| drop(row.remove(column)));
            }
        }
        report::table(4, &columns, &rows)
    };
    let wide = table(exact_size, true);
    let fits = Stream::Out.columns().is_none_or(|columns| report::widest(&wide) <= columns);
    let table = if fits { wide } else { table(human_size, false) };
    text.push_str(&heading("devices"));
    if Stream::Out.columns().is_some_and(|columns| report::widest(&table) > columns) {
        info.devices.iter().for_each(|device| stacked(text, info, device));
    } else {
        text.push_str(&headed(&table));
    }
}

/// Describes a device in two lines, for a terminal too narrow for the table.
fn stacked(text: &mut String, info: &ImageInfo, device: &Device) {
    let kind = if device.kind == DeviceKind::Disk { "" } else { ", guest state" };
    let _ = writeln!(text, "    {}", Stream::Out.paint(Paint::Bold, &escape_control(&device.name)));
    let stored = stored(info, device.id.0).map(|stored| {
        let zero = percent(device.size.saturating_sub(stored), device.size);
        format!("; {} stored, {zero} zero", human_size(stored))
    });
    let _ = writeln!(text, "      {}{kind}{}", human_size(device.size), stored.unwrap_or_default());
}

/// Highlights the header of a table.
fn headed(table: &str) -> String {
    match table.split_once('\n') {
        Some((header, rest)) => {
            let words = header.trim_start();
            let indent = &header[..header.len() - words.len()];
            format!("{indent}{}\n{rest}", Stream::Out.paint(Paint::Bold, words))
        }
        None => table.to_owned(),
    }
}

/// Returns the number of bytes stored for a device, if the driver has counted them.
fn stored(info: &ImageInfo, id: u32) -> Option<u64> {
    let rows = info.facts.iter().find(|fact| fact.key == "devices")?.value.as_array()?;
    let row = rows.iter().find(|row| row.get("dev-id").and_then(Value::as_u64) == Some(id.into()))?;
    row.get("stored-bytes")?.as_u64()
}

fn configurations(text: &mut String, image: &ImageEntry) {
    let attachments = &image.info().attachments;
    if attachments.is_empty() {
        line(text, "configurations", "none");
        return;
    }
    let rows: Vec<Vec<String>> = attachments
        .iter()
        .map(|attachment| vec![attachment.name.clone(), format!("{} bytes", attachment.data.len())])
        .collect();
    text.push_str(&heading("configurations"));
    text.push_str(&report::table(4, &[("", Align::Left), ("", Align::Right)], &rows));
}
