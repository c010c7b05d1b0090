//! What a person (or a program) is told about a conversion.

use std::fs;
use std::path::Path;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::storage::os;
use imgtool_toolkit::{DeviceKind, Result};
use serde::Serialize;

use super::layout::{Layout, Place, Target};
use super::sources::{Source, Taken};
use super::write::Done;
use crate::args::ConvertArgs;
use crate::exit::Exit;
use crate::images;
use crate::report::{self, Align, Paint, Stream, count, human_size, human_time, percent};

/// Says what a source turned out to be.
pub fn announce(source: &Source) {
    let info = source.opened.source.info();
    let bytes: u64 = info.devices.iter().fold(0, |sum, device| sum.saturating_add(device.size));
    let disks = info.devices.iter().filter(|device| device.kind == DeviceKind::Disk).count();
    let mut parts = vec![images::describe_format(&source.opened)];
    if source.opened.driver.capabilities().max_devices > 1 {
        parts.push(count(disks, "disk"));
        if !info.attachments.is_empty() {
            parts.push(count(info.attachments.len(), "configuration"));
        }
    }
    if !info.devices.iter().any(|device| device.open_ended) {
        parts.push(human_size(bytes));
    }
    if source.opened.spooled {
        parts.push("copied to temporary storage first".to_owned());
    }
    report::tell(&format!("{}: {}", images::show(&source.arg.path), parts.join(", ")));
    for note in &info.notes {
        report::note(&format!("{}: {note}", images::show(&source.arg.path)));
    }
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Summary<'a> {
    outputs: Vec<OutputSummary<'a>>,
    configurations: Vec<ConfigurationSummary<'a>>,
    complete: bool,
    verified: bool,
    elapsed: f64,
    notes: Vec<&'a str>,
    lost: Vec<LostRange<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OutputSummary<'a> {
    filename: String,
    format: &'a str,
    compression: Option<&'a str>,
    virtual_size: u64,
    actual_size: u64,
    devices: Vec<DeviceSummary<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DeviceSummary<'a> {
    name: &'a str,
    virtual_size: u64,
    zero: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ConfigurationSummary<'a> {
    filename: String,
    name: &'a str,
    size: usize,
}

#[derive(Serialize)]
struct LostRange<'a> {
    device: &'a str,
    start: u64,
    length: u64,
    reason: &'a str,
}

/// Tells what was done, and what was lost.
///
/// # Errors
/// When the output can't be written.
pub fn print(args: &ConvertArgs, layout: &Layout, taken: &[Taken], done: &Done) -> Result<Exit> {
    let summary = summarise(layout, taken, done, args.target.verify);
    let stdout_is_data = layout.targets.iter().any(|target| target.place.is_stdout());
    if args.output.is_json() && !stdout_is_data {
        report::print_json(&summary)?;
    } else if !args.messages.quiet {
        say(&summary);
    }
    if summary.lost.is_empty() {
        return Ok(Exit::Done);
    }
    if !args.output.is_json() || stdout_is_data {
        say_losses(&summary.lost);
    }
    Ok(Exit::Losses)
}

fn summarise<'a>(layout: &'a Layout, taken: &'a [Taken], done: &'a Done, verified: bool) -> Summary<'a> {
    let outputs = layout
        .targets
        .iter()
        .zip(&done.written)
        .map(|(target, written)| summarise_output(target, *written, taken, done))
        .collect();
    Summary {
        outputs,
        configurations: layout
            .files
            .iter()
            .map(|(path, attachment)| ConfigurationSummary {
                filename: path.to_string_lossy().into_owned(),
                name: &attachment.name,
                size: attachment.data.len(),
            })
            .collect(),
        complete: done.losses.is_empty(),
        verified,
        elapsed: (done.elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
        notes: layout.notes.iter().chain(&done.notes).map(String::as_str).collect(),
        lost: done
            .losses
            .iter()
            .map(|(device, loss)| LostRange {
                device,
                start: loss.guest.start,
                length: loss.guest.end.saturating_sub(loss.guest.start),
                reason: &loss.reason,
            })
            .collect(),
    }
}

fn summarise_output<'a>(
    target: &'a Target,
    written: u64,
    taken: &'a [Taken],
    done: &Done,
) -> OutputSummary<'a> {
    let devices: Vec<DeviceSummary<'a>> = target
        .devices
        .iter()
        .map(|&index| {
            let (virtual_size, zero) = done.devices[index];
            DeviceSummary { name: &taken[index].name, virtual_size, zero }
        })
        .collect();
    OutputSummary {
        filename: target.place.path().to_string_lossy().into_owned(),
        format: target.format.driver.name(),
        compression: target.format.outer.map(|outer| outer.compression.name()),
        virtual_size: devices.iter().fold(0, |sum, device| sum.saturating_add(device.virtual_size)),
        actual_size: actual_size(&target.place, written),
        devices,
    }
}

/// Bytes that an output takes on disk; what was written to it where that can't be told.
fn actual_size(place: &Place, written: u64) -> u64 {
    match place {
        Place::New(path) => allocated(path).unwrap_or(written),
        Place::Existing { .. } | Place::Stream(_) => written,
    }
}

fn allocated(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| os::allocated_len(&meta))
}

/// Is it done, is it all there, how big is it.
fn say(summary: &Summary<'_>) {
    report::say(table(summary).trim_end());
    for note in &summary.notes {
        report::note(note);
    }
    report::say(&report::flow(Stream::Err, &verdict(summary), 2));
}

fn table(summary: &Summary<'_>) -> String {
    let mut rows = Vec::new();
    for output in &summary.outputs {
        let zero = output.devices.iter().fold(0u64, |sum, device| sum.saturating_add(device.zero));
        let format = match output.compression {
            Some(compression) => format!("{} in {compression}", output.format),
            None => output.format.to_owned(),
        };
        rows.push(vec![
            output.filename.clone(),
            format,
            human_size(output.virtual_size),
            human_size(output.actual_size),
            percent(zero, output.virtual_size),
        ]);
    }
    for file in &summary.configurations {
        let size = human_size(file.size as u64);
        rows.push(vec![file.filename.clone(), "config".to_owned(), String::new(), size, String::new()]);
    }
    let columns = [
        ("output", Align::Left),
        ("format", Align::Left),
        ("virtual", Align::Right),
        ("on disk", Align::Right),
        ("zero", Align::Right),
    ];
    let table = report::table(0, &columns, &rows);
    if Stream::Err.columns().is_some_and(|columns| report::widest(&table) > columns) {
        return stacked(&rows);
    }
    match table.split_once('\n') {
        Some((header, rest)) => format!("{}\n{rest}", Stream::Err.paint(Paint::Bold, header)),
        None => table,
    }
}

/// The table where it has no room: a name, and what belongs to it below.
fn stacked(rows: &[Vec<String>]) -> String {
    let mut text = String::new();
    for row in rows {
        let [name, format, virtual_size, on_disk, zero] = row.as_slice() else { continue };
        text.push_str(&Stream::Err.paint(Paint::Bold, &escape_control(name)));
        text.push_str(&match virtual_size.as_str() {
            "" => format!("\n  {format}, {on_disk}\n"),
            _ => format!("\n  {format}, {virtual_size}\n  {on_disk} on disk, {zero} zero\n"),
        });
    }
    text
}

fn verdict(summary: &Summary<'_>) -> String {
    let sum = |of: fn(&OutputSummary<'_>) -> u64| {
        summary.outputs.iter().fold(0u64, |sum, output| sum.saturating_add(of(output)))
    };
    let devices = summary.outputs.iter().map(|output| output.devices.len()).sum();
    let what = format!("{}, {}", count(devices, "device"), human_size(sum(|output| output.virtual_size)));
    let time = human_time(std::time::Duration::from_secs_f64(summary.elapsed));
    if !summary.lost.is_empty() {
        let lost = summary.lost.iter().fold(0u64, |sum, range| sum.saturating_add(range.length));
        let how = Stream::Err.paint(Paint::Warning, &format!("finished with losses in {time}"));
        return format!("{how}: {what}; {} of it lost or in doubt", human_size(lost));
    }
    let proof = if summary.verified { ", read back and equal" } else { "" };
    let on_disk = human_size(sum(|output| output.actual_size));
    let how = Stream::Err.paint(Paint::Good, &format!("done in {time}"));
    format!("{how}: {what}, complete{proof}; {on_disk} on disk")
}

fn say_losses(lost: &[LostRange<'_>]) {
    let bytes: u64 = lost.iter().fold(0, |sum, range| sum.saturating_add(range.length));
    let ranges = lost.iter().filter(|range| range.length > 0).count();
    report::tell(&match ranges {
        0 => "nothing is known to be lost, but:".to_owned(),
        _ => format!(
            "{} lost or in doubt in {}; what is lost is zero:",
            report::exact_size(bytes),
            count(ranges, "range")
        ),
    });
    for range in lost {
        let end = range.start.saturating_add(range.length);
        let line = if range.length == 0 {
            format!("  {}: {}", range.device, range.reason)
        } else {
            format!("  {} guest bytes {}..{end}: {}", range.device, range.start, range.reason)
        };
        report::say(&report::flow(Stream::Err, &escape_control(&line), 4));
    }
}
