//! `imgtool map`: which parts of a disk hold data, in which file of a chain, and where.

use std::ops::Range;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Device, Error, Extent, ExtentKind, MapExtent, RandomAccess, Result, ResultExt};
use serde::Serialize;

use super::options;
use crate::args::MapArgs;
use crate::exit::Exit;
use crate::report::{self, Stream};
use crate::{drivers, images};

mod picture;

use picture::Picture;

/// One extent in JSON: qemu-img's names and order, and after them what it does not have.
#[derive(Serialize)]
struct Line<'a> {
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

/// Prints the extents of the devices.
///
/// # Errors
/// When the image can't be opened or its tables can't be read.
pub fn run(args: &MapArgs) -> Result<Exit> {
    let registry = drivers::registry();
    let options = imgtool_toolkit::OpenOptions {
        snapshot: args.snapshot.snapshot.as_deref().map(images::snapshot_name),
        ..images::open_options(&registry, &args.input)?
    };
    let opened = images::open_random(&registry, &args.image, args.input.format.as_deref(), &options)?;
    let random = images::random(&opened)?;
    let devices = images::select(&opened, &args.disk)?;
    let window = window(args, &devices).in_file(&args.image)?;
    let json = args.output.is_json();
    let mut printer = Printer::new(json);
    printer.begin();
    for device in devices {
        let range = window.start.min(device.size)..window.end.min(device.size);
        if !json && !range.is_empty() {
            printer.text.push_str(&picture(random, &device, range.clone()).in_file(&args.image)?);
            printer.head();
        }
        walk(random, &device, range, |extent| printer.extent(&device.name, &extent)).in_file(&args.image)?;
        printer.end_of_device();
    }
    printer.end()?;
    Ok(Exit::Done)
}

/// The guest range that is shown.
fn window(args: &MapArgs, devices: &[Device]) -> Result<Range<u64>> {
    let start = args.start_offset.as_deref().map_or(Ok(0), options::size)?;
    let longest = devices.iter().map(|device| device.size).max().unwrap_or(0);
    if start > longest {
        return Err(Error::usage(format!("--start-offset {start} is beyond the end"))
            .hint(format!("the longest disk that is shown has {longest} bytes")));
    }
    let len = args.max_length.as_deref().map_or(Ok(u64::MAX), options::size)?;
    Ok(start..start.saturating_add(len))
}

/// A device as a bar of blocks.
fn picture(random: &dyn RandomAccess, device: &Device, range: Range<u64>) -> Result<String> {
    let mut picture = Picture::new(range.clone(), Stream::Out.columns());
    walk(random, device, range, |extent| {
        let kind = match extent {
            MapExtent { zero: false, .. } => ExtentKind::Data,
            MapExtent { present: true, .. } => ExtentKind::Zero,
            _ => ExtentKind::Hole,
        };
        picture.add(Extent { start: extent.start, len: extent.len, kind });
        Ok(())
    })?;
    Ok(picture.draw(&device.name))
}

/// Calls `see` for every run of `range`, neighbours of one kind joined.
fn walk(
    random: &dyn RandomAccess,
    device: &Device,
    range: Range<u64>,
    mut see: impl FnMut(MapExtent) -> Result<()>,
) -> Result<()> {
    let mut pending: Option<MapExtent> = None;
    let mut position = range.start;
    while position < range.end {
        for extent in random.map(device.id, position..range.end)? {
            position = extent.end();
            if pending.as_mut().is_some_and(|known| known.join(&extent)) {
                continue;
            }
            if let Some(known) = pending.replace(extent) {
                see(known)?;
            }
        }
    }
    pending.map_or(Ok(()), see)
}

/// Lines of a terminal that are kept from the list, or it would push the picture off the screen: the
/// picture with title and legend, the list's own first and last line, the command and the prompt.
const LINES_OF_THE_REST: usize = 12;

/// Rows of a list that the smallest terminal is given. Ours.
const FEWEST_ROWS: usize = 8;

/// Prints as it goes: maps of fragmented disks are long.
struct Printer {
    json: bool,
    most_rows: u64,
    /// Only the columns that have room on a narrow terminal.
    narrow: bool,
    text: String,
    lines: u64,
    /// Of the device under way.
    rows: u64,
}

/// Columns of a row without the names at its end.
const FULL_ROW: usize = 61;

/// Text is handed to standard output in parts of this many bytes.
const FLUSH_AT: usize = 64 * 1024;

impl Printer {
    fn new(json: bool) -> Self {
        let most_rows = match Stream::Out.lines() {
            Some(lines) if !json => lines.saturating_sub(LINES_OF_THE_REST).max(FEWEST_ROWS) as u64,
            _ => u64::MAX,
        };
        let narrow = Stream::Out.columns().is_some_and(|columns| columns < FULL_ROW);
        Self { json, most_rows, narrow, text: String::new(), lines: 0, rows: 0 }
    }

    fn begin(&mut self) {
        if self.json {
            self.text.push('[');
        }
    }

    fn head(&mut self) {
        self.row(["start", "length", "kind", "mapped to"], "device", "file");
    }

    fn end_of_device(&mut self) {
        if self.rows > self.most_rows {
            let more = self.rows - self.most_rows;
            self.text.push_str(&format!("({more} more; into a file or pipe the list is complete)\n"));
        }
        self.rows = 0;
    }

    fn extent(&mut self, device: &str, extent: &MapExtent) -> Result<()> {
        self.rows += 1;
        if self.rows > self.most_rows {
            return Ok(());
        }
        if self.json {
            self.text.push_str(if self.lines > 0 { ",\n " } else { "\n " });
            let text = serde_json::to_string(&line(device, extent)).unwrap_or_default();
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
            let file = place.map_or_else(String::new, |place| escape_control(&place.file.to_string_lossy()));
            self.row([&start, &len, kind, &offset], &escape_control(device), &file);
        }
        self.lines += 1;
        if self.text.len() >= FLUSH_AT { self.flush() } else { Ok(()) }
    }

    /// Columns wide enough for 64 TiB in bytes; narrow ones for 8 TiB.
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
            self.text.push_str(if self.lines > 0 { "\n]\n" } else { "]\n" });
        }
        self.flush()
    }

    fn flush(&mut self) -> Result<()> {
        report::print(&std::mem::take(&mut self.text))
    }
}

fn line<'a>(device: &'a str, extent: &MapExtent) -> Line<'a> {
    Line {
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
