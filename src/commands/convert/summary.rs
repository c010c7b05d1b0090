//! Output of `convert`: the report of a conversion, as text and as JSON.

use imgtool_core::error::escape_control;
use imgtool_core::{DeviceKind, LossClass};
use imgtool_engine::{Note, Opened, Report};
use serde::Serialize;

use crate::args::ConvertArgs;
use crate::exit::Exit;
use crate::report::{self, Align, Paint, Stream, count, human_size, human_time, percent};
use crate::{compat, images};

/// Prints the format, contents and notes of a source to standard error, before the conversion.
pub fn announce(opened: &Opened) {
    if !opened.parts.is_empty() {
        return opened.parts.iter().for_each(announce);
    }
    let info = opened.image.info();
    images::note_unrecognised(opened);
    let bytes: u64 = info.devices.iter().fold(0, |sum, device| sum.saturating_add(device.size));
    let disks = info.devices.iter().filter(|device| device.kind == DeviceKind::Disk).count();
    let mut parts = vec![opened.format_name()];
    if opened.driver.capabilities().is_archive() {
        parts.push(count(disks, "disk"));
        if !info.attachments.is_empty() {
            parts.push(count(info.attachments.len(), "configuration"));
        }
    }
    if !info.devices.iter().any(|device| device.open_ended) {
        parts.push(human_size(bytes));
    }
    if opened.spooled {
        parts.push("copied to temporary storage first".to_owned());
    }
    let facts = parts.join(", ");
    let name = first_line_name(&opened.location.to_string(), &facts, Stream::Err.columns());
    report::tell(&format!("{name}: {facts}"));
    for note in &info.notes {
        report::note(&format!("{}: {note}", opened.location));
    }
}

/// Shortens the name of a source so that the first line of a run, with these facts, fits into the terminal. The end
/// of the path and a part of its start remain.
fn first_line_name(name: &str, facts: &str, columns: Option<usize>) -> String {
    let others = report::width("imgtool: : ") + report::width(facts);
    match columns {
        // As in the table, a longer name is wrapped in a terminal too narrow for both.
        Some(columns) => report::shorten(name, columns.saturating_sub(others).max(NARROWEST_NAME)),
        None => name.to_owned(),
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
    /// Average number of bytes of data per second.
    #[serde(skip)]
    speed: u64,
    notes: Vec<String>,
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
    /// Number of bitmaps; `None` without `--bitmaps`.
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<usize>,
    devices: Vec<DeviceSummary>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DeviceSummary {
    name: String,
    virtual_size: u64,
    zero: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ConfigurationSummary<'a> {
    filename: String,
    name: &'a str,
    size: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct LostRange<'a> {
    device: &'a str,
    #[serde(serialize_with = "in_one_word")]
    class: &'static str,
    start: u64,
    length: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compressed_offset: Option<u64>,
    reason: &'a str,
}

/// Writes the name of a class as one word: `never-stored`.
fn in_one_word<S: serde::Serializer>(class: &str, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&class.replace(' ', "-"))
}

/// Prints the outputs and the losses, and returns the exit code. If an output is written to standard output
/// (`stdout_is_data`), prints text to standard error instead of JSON. If a source is compressed
/// (`is_compressed`), offsets are those in the decompressed data.
pub fn print(args: &ConvertArgs, report: &Report, stdout_is_data: bool, is_compressed: bool) -> Exit {
    let summary = summarise(args, report);
    if args.output.is_json() && !stdout_is_data {
        report::note_unprinted(report::print_json(&summary));
    } else if report::speaks_json() {
        if !args.messages.quiet || !report.is_complete() {
            report::json_line(&serde_json::json!({ "report": summary }));
        }
        return if report.is_complete() { Exit::Done } else { Exit::Losses };
    } else if !args.messages.quiet && !compat::is_on() {
        say(&summary);
    }
    if report.is_complete() {
        return Exit::Done;
    }
    if !args.output.is_json() || stdout_is_data {
        let output = summary.outputs.first().map_or("OUTPUT", |output| &output.filename);
        say_losses(&summary.lost, output, is_compressed);
    }
    Exit::Losses
}

fn summarise<'a>(args: &ConvertArgs, report: &'a Report) -> Summary<'a> {
    let bitmaps = args.target.bitmaps;
    Summary {
        outputs: report.outputs.iter().map(|output| summarise_output(output, bitmaps)).collect(),
        configurations: report
            .files
            .iter()
            .map(|file| ConfigurationSummary {
                filename: file.location.name().into_owned(),
                name: &file.name,
                size: file.len,
            })
            .collect(),
        complete: report.is_complete(),
        verified: report.verified,
        elapsed: (report.elapsed.as_secs_f64() * 1000.0).round() / 1000.0,
        speed: (report.data as f64 / report.elapsed.as_secs_f64().max(0.001)) as u64,
        notes: report.notes.iter().map(note).collect(),
        lost: report
            .losses
            .iter()
            .map(|(device, loss)| LostRange {
                device,
                class: loss.class.name(),
                offset: loss.offset,
                compressed_offset: loss.compressed_offset,
                start: loss.guest.start,
                length: loss.guest.end.saturating_sub(loss.guest.start),
                reason: &loss.reason,
            })
            .collect(),
    }
}

/// Words a note for the command line.
fn note(note: &Note) -> String {
    match note {
        Note::ConfigurationsLeftOut(names) => {
            format!(
                "not written: {} (a DEST that ends in '/' also receives configurations)",
                names.join(", ")
            )
        }
        other => other.to_string(),
    }
}

/// Describes an output, with the number of its bitmaps if the user wanted them.
fn summarise_output(output: &imgtool_engine::OutputReport, bitmaps: bool) -> OutputSummary<'_> {
    let device = |disk: &'_ imgtool_engine::DiskReport| DeviceSummary {
        name: disk.name.clone(),
        virtual_size: disk.virtual_size,
        zero: disk.zero,
    };
    OutputSummary {
        filename: output.location.name().into_owned(),
        format: output.format,
        compression: output.compression,
        virtual_size: output.virtual_size(),
        actual_size: output.stored,
        bitmaps: bitmaps.then_some(output.bitmaps),
        devices: output.disks.iter().map(device).collect(),
    }
}

/// Prints the table of outputs, the notes, and the verdict.
fn say(summary: &Summary<'_>) {
    report::say(table(summary).trim_end());
    for note in &summary.notes {
        report::note(note);
    }
    report::say(&report::flow(Stream::Err, &verdict(summary), 2));
}

/// Minimum number of columns for the names of outputs in the table; in a narrower terminal, each name gets a
/// line of its own. Our limit: the end of a path must remain, and a part of its start.
const NARROWEST_NAME: usize = 32;

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
        let size = human_size(file.size);
        rows.push(vec![file.filename.clone(), "config".to_owned(), String::new(), size, String::new()]);
    }
    let columns = [
        ("output", Align::Left),
        ("format", Align::Left),
        ("virtual", Align::Right),
        ("on disk", Align::Right),
        ("zero", Align::Right),
    ];
    let mut table = report::table(0, &columns, &rows);
    if let Some(available) = Stream::Err.columns().filter(|columns| report::widest(&table) > *columns) {
        let names = rows.iter().map(|row| report::width(&escape_control(&row[0]))).max().unwrap_or(0);
        let others = report::widest(&table).saturating_sub(names);
        if available < others + NARROWEST_NAME {
            return stacked(&rows);
        }
        for row in &mut rows {
            row[0] = report::shorten(&escape_control(&row[0]), available - others);
        }
        table = report::table(0, &columns, &rows);
    }
    match table.split_once('\n') {
        Some((header, rest)) => format!("{}\n{rest}", Stream::Err.paint(Paint::Bold, header)),
        None => table,
    }
}

/// Formats the table for a narrow terminal: each name on a line, with its cells below.
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
    let mut what = format!("{}, {}", count(devices, "device"), human_size(sum(|output| output.virtual_size)));
    if let Some(bitmaps) = summary.outputs.iter().find_map(|output| output.bitmaps) {
        what.push_str(&format!(", {}", count(bitmaps, "bitmap")));
    }
    let mut time = human_time(std::time::Duration::from_secs_f64(summary.elapsed));
    if summary.speed > 0 {
        time.push_str(&format!(" at {}/s", human_size(summary.speed)));
    }
    if !summary.lost.is_empty() {
        let lost = summary.lost.iter().fold(0u64, |sum, range| sum.saturating_add(range.length));
        let how = Stream::Err.paint(Paint::Warning, &format!("finished with losses in {time}"));
        return format!("{how}: {what}; {} of it {}", human_size(lost), classes(&summary.lost));
    }
    let proof = if summary.verified { ", read back and equal" } else { "" };
    let on_disk = human_size(sum(|output| output.actual_size));
    let how = Stream::Err.paint(Paint::Good, &format!("done in {time}"));
    format!("{how}: {what}, complete{proof}; {on_disk} on disk")
}

/// Names the classes of ranges in a list: "lost or unverified".
fn classes(lost: &[LostRange<'_>]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for range in lost.iter().filter(|range| range.length > 0) {
        if !names.contains(&range.class) {
            names.push(range.class);
        }
    }
    if names.is_empty() { "lost".to_owned() } else { names.join(" or ") }
}

/// Maximum number of ranges of a class that the text lists. Our limit: people read the verdict above them as well.
const MAX_RANGES: usize = 100;

/// Lists the ranges, each class apart, and says what can be done next.
fn say_losses(lost: &[LostRange<'_>], output: &str, is_compressed: bool) {
    for class in [LossClass::Lost, LossClass::NeverStored, LossClass::Unverified] {
        let of_class: Vec<&LostRange<'_>> =
            lost.iter().filter(|range| range.class == class.name() && range.length > 0).collect();
        if of_class.is_empty() {
            continue;
        }
        let bytes: u64 = of_class.iter().fold(0, |sum, range| sum.saturating_add(range.length));
        let reads = match class {
            LossClass::Unverified => "restored, but possibly wrong",
            LossClass::NeverStored => "not in the image, although it is intact there; reads as zeros",
            _ => "reads as zeros",
        };
        let ranges = count(of_class.len(), "range");
        let bytes = report::exact_size(bytes);
        report::tell(&format!("{}: {bytes} in {ranges} ({reads}):", class.name()));
        for range in of_class.iter().take(MAX_RANGES) {
            let end = range.start.saturating_add(range.length);
            let LostRange { device, start, reason, .. } = range;
            let place = range.compressed_offset.map(|position| format!("; compressed byte {position}"));
            say_range(&format!("{device} guest bytes {start}..{end}: {reason}{}", place.unwrap_or_default()));
        }
        if of_class.len() > MAX_RANGES {
            let more = of_class.len() - MAX_RANGES;
            say_range(&format!("and {more} more ranges; --output json lists all of them"));
        }
    }
    let remarks: Vec<&LostRange<'_>> = lost.iter().filter(|range| range.length == 0).collect();
    if !remarks.is_empty() {
        report::tell("not proven:");
        remarks.iter().for_each(|range| say_range(&format!("{}: {}", range.device, range.reason)));
    }
    if is_compressed && lost.iter().any(|range| range.offset.is_some()) {
        report::tell(
            "offsets are those in the decompressed data; a compressed byte is one of the file itself",
        );
    }
    let next = format!(
        "another copy or backup may have what is missing: 'imgtool compare --list {output} OTHER' shows where \
         they differ; before the disk is used, check its file systems in the guest (fsck, chkdsk)"
    );
    report::say(&report::flow(Stream::Err, &format!("  hint: {}", escape_control(&next)), 4));
}

fn say_range(line: &str) {
    report::say(&report::flow(Stream::Err, &escape_control(&format!("  {line}")), 4));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_line_fits_the_terminal() {
        let (path, facts) = (format!("/srv/{}/disk.qcow2", "long/".repeat(40)), "qcow2, 40 GiB");
        assert_eq!(first_line_name(&path, facts, None), path);
        for columns in [60, 80, 132] {
            let name = first_line_name(&path, facts, Some(columns));
            assert_eq!(report::width(&format!("imgtool: {name}: {facts}")), columns);
            assert!(name.starts_with("/srv/") && name.ends_with("/disk.qcow2"), "{name}");
        }
        assert_eq!(report::width(&first_line_name(&path, facts, Some(36))), NARROWEST_NAME);
        assert_eq!(first_line_name("a.raw", facts, Some(36)), "a.raw");
    }
}
