//! `imgtool map`: prints the extents of a disk, each with its place in a file of the backing chain.

use std::fmt::Write as _;
use std::ops::Range;

use imgtool_core::error::escape_control;
use imgtool_core::{Device, Disk, Error, Location, MapExtent, Result, ResultExt};
use imgtool_engine::{Opened, Reach};
use serde::Serialize;

use super::options;
use crate::args::{MapArgs, MapFormat};
use crate::exit::Exit;
use crate::report::{self, Stream};
use crate::{compat, images, sandbox};

mod cells;
mod picture;
mod svg;

use cells::Kind;
use picture::Picture;
use svg::Chart;

/// One extent in JSON: the fields of `qemu-img map` in the same order, then our own.
#[derive(Serialize)]
struct ExtentRecord<'a> {
    start: u64,
    length: u64,
    depth: u32,
    present: bool,
    zero: bool,
    data: bool,
    compressed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    device: &'a str,
}

/// Prints the extents of the selected devices.
pub fn run(args: &MapArgs) -> Result<Exit> {
    let registry = images::registry(&args.input)?;
    let options = imgtool_core::OpenOptions {
        snapshot: args.snapshot.clone(),
        layout_only: true,
        salvage: args.salvage,
        ..images::open_options(&registry, &args.input)?
    };
    let opened = images::open_random(&registry, &args.input, args.image.as_os_str(), &options)?;
    sandbox::narrow(&Reach::default());
    let location: &Location = &opened.location;
    let devices = opened.select(&args.disk)?;
    let window = window(args, &devices).in_file(location)?;
    if args.output == MapFormat::Svg {
        return draw(&opened, &devices, &window);
    }
    let json = args.output == MapFormat::Json;
    let mut printer = Printer::new(json);
    printer.begin();
    for device in devices {
        let range = window.start.min(device.size)..window.end.min(device.size);
        let disk = Disk::new(opened.image.clone(), device.id).in_file(location)?;
        if compat::is_on() {
            printer.table_header();
        } else if !json && !range.is_empty() {
            printer.text.push_str(&picture(&disk, range.clone()).in_file(location)?);
            printer.header();
        }
        walk(&disk, range, |extent| printer.extent(&device.name, &extent)).in_file(location)?;
        printer.end_of_device();
    }
    printer.end()?;
    Ok(say_losses(&opened))
}

/// Maximum number of lost ranges that are named. Our limit: people read the map as well.
const MAX_LOSSES: usize = 100;

/// Names what a salvage could not look up, and returns the exit code.
fn say_losses(opened: &Opened) -> Exit {
    let (losses, doubts) = (opened.image.losses(), opened.image.doubts());
    for loss in losses.iter().take(MAX_LOSSES) {
        let Range { start, end } = loss.guest;
        report::note(&format!(
            "{}: guest bytes {start}..{end}: {}",
            opened.location,
            escape_control(&loss.reason)
        ));
    }
    if losses.len() > MAX_LOSSES {
        report::note(&format!("{}: {} more ranges are lost", opened.location, losses.len() - MAX_LOSSES));
    }
    for doubt in &doubts {
        report::note(&format!("{}: {}", opened.location, escape_control(&doubt.reason)));
    }
    if losses.is_empty() && doubts.is_empty() { Exit::Done } else { Exit::Losses }
}

/// Prints a drawing of the devices as an SVG document.
fn draw(opened: &Opened, devices: &[Device], window: &Range<u64>) -> Result<Exit> {
    let mut charts = Vec::with_capacity(devices.len());
    for device in devices {
        let range = window.start.min(device.size)..window.end.min(device.size);
        let disk = Disk::new(opened.image.clone(), device.id).in_file(&opened.location)?;
        let mut chart = Chart::new(&escape_control(&device.name), range.clone(), devices.len());
        walk(&disk, range, |extent| {
            chart.cells.add(extent.start, extent.len, Kind::of(&extent));
            Ok(())
        })
        .in_file(&opened.location)?;
        charts.push(chart);
    }
    let format = images::format_with_compression(opened.driver.name(), &opened.compression);
    let exit = say_losses(opened);
    let disks = report::count(devices.len(), "disk");
    let size = devices.iter().fold(0u64, |sum, device| sum.saturating_add(device.size));
    let subtitle = format!("{format}, {disks}, {}", report::human_size(size));
    report::print(&svg::document(&opened.location.to_string(), &subtitle, &charts))?;
    Ok(exit)
}

/// Returns the guest range to show. It may end beyond the end of a device.
fn window(args: &MapArgs, devices: &[Device]) -> Result<Range<u64>> {
    let start = args.start_offset.as_deref().map_or(Ok(0), options::size)?;
    let longest = devices.iter().map(|device| device.size).max().unwrap_or(0);
    if start > longest && compat::is_on() {
        // As qemu-img does: nothing is there.
        return Ok(longest..longest);
    }
    if start > longest {
        return Err(Error::usage(format!("--start-offset {start} is beyond the end of the disk"))
            .hint(format!("the longest selected disk has {longest} bytes")));
    }
    let len = args.max_length.as_deref().map_or(Ok(u64::MAX), options::size)?;
    Ok(start..start.saturating_add(len))
}

/// Draws the allocation of a guest range.
fn picture(disk: &Disk, range: Range<u64>) -> Result<String> {
    let mut picture = Picture::new(range.clone(), Stream::Out.columns());
    walk(disk, range, |extent| {
        picture.add(&extent);
        Ok(())
    })?;
    Ok(picture.draw(disk.name()))
}

/// Calls `visit` for every extent in `range`, after joining extents that continue each other.
fn walk(disk: &Disk, range: Range<u64>, mut visit: impl FnMut(MapExtent) -> Result<()>) -> Result<()> {
    let mut pending: Option<MapExtent> = None;
    let mut position = range.start;
    while position < range.end {
        for extent in disk.map(position..range.end)? {
            position = extent.end();
            if pending.as_mut().is_some_and(|known| known.join(&extent)) {
                continue;
            }
            if let Some(known) = pending.replace(extent) {
                visit(known)?;
            }
        }
    }
    pending.map_or(Ok(()), visit)
}

/// Number of terminal lines that the list must leave free, so that the drawing stays on the screen: for the
/// drawing with its title and legend, the header and the last line of the list, the command and the prompt.
const RESERVED_LINES: usize = 12;

/// Minimum number of rows in the list, even if the drawing scrolls off the screen. Our choice.
const MIN_ROWS: usize = 8;

/// Width in columns of a row without the names at its end.
const FULL_ROW: usize = 61;

/// Number of buffered bytes at which the text is written to standard output.
const FLUSH_AT: usize = 64 * 1024;

/// Prints the extents in batches, since the map of a fragmented disk is long.
struct Printer {
    json: bool,
    /// Maximum number of rows per device; further extents are only counted.
    max_rows: u64,
    /// True if the terminal is narrower than [`FULL_ROW`]: rows omit the places and the names.
    narrow: bool,
    text: String,
    /// Number of extents printed so far, of all devices.
    printed: u64,
    /// Number of extents of the current device so far.
    rows: u64,
}

impl Printer {
    fn new(json: bool) -> Self {
        let max_rows = match Stream::Out.lines() {
            Some(lines) if !json => lines.saturating_sub(RESERVED_LINES).max(MIN_ROWS) as u64,
            _ => u64::MAX,
        };
        let narrow = Stream::Out.columns().is_some_and(|columns| columns < FULL_ROW);
        Self { json, max_rows, narrow, text: String::new(), printed: 0, rows: 0 }
    }

    fn begin(&mut self) {
        if self.json {
            self.text.push('[');
        }
    }

    /// Appends the header of qemu-img's table.
    fn table_header(&mut self) {
        if !self.json {
            let _ = writeln!(self.text, "{:16}{:16}{:16}File", "Offset", "Length", "Mapped to");
        }
    }

    /// Appends a row of qemu-img's table, which lists only the data.
    fn table_row(&mut self, extent: &MapExtent) -> Result<()> {
        if extent.zero || !extent.data {
            return Ok(());
        }
        let Some(place) = extent.place.as_ref().filter(|_| !extent.compressed) else {
            return Err(Error::unsupported("file contains external, encrypted or compressed clusters")
                .hint("--output json lists them"));
        };
        // C's "%#x" prints 0 without the prefix.
        let number = |n: u64| if n == 0 { "0".to_owned() } else { format!("{n:#x}") };
        let (start, len) = (number(extent.start), number(extent.len));
        let (offset, file) = (number(place.file_offset), place.file.to_string());
        let _ = writeln!(self.text, "{start:<16}{len:<16}{offset:<16}{file}");
        Ok(())
    }

    fn header(&mut self) {
        self.row(["start", "length", "kind", "mapped to"], "device", "file");
    }

    fn end_of_device(&mut self) {
        if self.rows > self.max_rows {
            let more = self.rows - self.max_rows;
            self.text.push_str(&format!("({more} more; a file or pipe gets the complete list)\n"));
        }
        self.rows = 0;
    }

    fn extent(&mut self, device: &str, extent: &MapExtent) -> Result<()> {
        if compat::is_on() && !self.json {
            self.table_row(extent)?;
            return if self.text.len() >= FLUSH_AT { self.flush() } else { Ok(()) };
        }
        self.rows += 1;
        if self.rows > self.max_rows {
            return Ok(());
        }
        if self.json && compat::is_on() {
            self.text.push_str(if self.printed > 0 { ",\n" } else { "" });
            self.text.push_str(&compat_record(extent));
        } else if self.json {
            self.text.push_str(if self.printed > 0 { ",\n " } else { "\n " });
            let text = serde_json::to_string(&record(device, extent)).unwrap_or_default();
            self.text.push_str(&report::json_for_terminals(&text));
        } else {
            let kind = match extent {
                MapExtent { compressed: true, .. } => "compressed",
                MapExtent { zero: false, .. } => "data",
                MapExtent { present: true, .. } => "zero",
                _ => "hole",
            };
            let (start, len) = (extent.start.to_string(), extent.len.to_string());
            let place = extent.place.as_ref();
            let offset = place.map_or_else(|| "-".to_owned(), |place| place.file_offset.to_string());
            let file = place.map_or_else(String::new, |place| place.file.to_string());
            self.row([&start, &len, kind, &offset], &escape_control(device), &file);
        }
        self.printed += 1;
        if self.text.len() >= FLUSH_AT { self.flush() } else { Ok(()) }
    }

    /// Appends a row. Numbers are aligned up to 15 digits (909 TiB), on a narrow terminal up to 13 (9 TiB).
    fn row(&mut self, [start, length, kind, place]: [&str; 4], device: &str, file: &str) {
        let row = if self.narrow {
            format!("{start:>13}  {length:>13}  {kind}")
        } else {
            format!("{start:>15}  {length:>15}  {kind:<10}  {place:>15}  {device}  {file}")
        };
        self.text.push_str(row.trim_end());
        self.text.push('\n');
    }

    fn end(mut self) -> Result<()> {
        if self.json {
            let is_list = self.printed > 0 && !compat::is_on();
            self.text.push_str(if is_list { "\n]\n" } else { "]\n" });
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        report::print(&std::mem::take(&mut self.text))
    }
}

/// Returns an extent as `qemu-img map` prints it: programs parse lines of it.
fn compat_record(extent: &MapExtent) -> String {
    let MapExtent { start, len, depth, present, zero, data, compressed, .. } = extent;
    let offset = extent.place.as_ref().map(|place| format!(", \"offset\": {}", place.file_offset));
    format!(
        "{{ \"start\": {start}, \"length\": {len}, \"depth\": {depth}, \"present\": {present}, \"zero\": {zero}, \
         \"data\": {data}, \"compressed\": {compressed}{}}}",
        offset.unwrap_or_default()
    )
}

fn record<'a>(device: &'a str, extent: &MapExtent) -> ExtentRecord<'a> {
    ExtentRecord {
        start: extent.start,
        length: extent.len,
        depth: extent.depth,
        present: extent.present,
        zero: extent.zero,
        data: extent.data,
        compressed: extent.compressed,
        offset: extent.place.as_ref().map(|place| place.file_offset),
        device,
    }
}
