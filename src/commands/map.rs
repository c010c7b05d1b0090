//! `imgtool map`: which parts of a disk hold data, in which file of a chain, and where.

use std::ops::Range;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Device, Error, MapExtent, RandomAccess, Result, ResultExt, parse_size};
use serde::Serialize;

use crate::args::MapArgs;
use crate::exit::Exit;
use crate::{drivers, images, report};

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
    let window = window(args)?;
    let mut printer = Printer { json: args.output.is_json(), text: String::new(), lines: 0 };
    printer.begin();
    for device in devices {
        let range = window.start.min(device.size)..window.end.min(device.size);
        walk(random, &device, range, |extent| printer.extent(&device.name, &extent)).in_file(&args.image)?;
    }
    printer.end()?;
    Ok(Exit::Done)
}

/// The guest range that is shown.
fn window(args: &MapArgs) -> Result<Range<u64>> {
    let size = |flag: &str, text: &str| {
        parse_size(text)
            .ok_or_else(|| Error::usage(format!("{flag} takes bytes such as 65536, 64k or 2G, not '{text}'")))
    };
    let start = args.start_offset.as_deref().map_or(Ok(0), |text| size("--start-offset", text))?;
    let len = args.max_length.as_deref().map_or(Ok(u64::MAX), |text| size("--max-length", text))?;
    Ok(start..start.saturating_add(len))
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

/// Prints as it goes: maps of fragmented disks are long.
struct Printer {
    json: bool,
    text: String,
    lines: u64,
}

/// Text is handed to standard output in parts of this many bytes.
const FLUSH_AT: usize = 64 * 1024;

impl Printer {
    fn begin(&mut self) {
        if self.json {
            self.text.push('[');
        } else {
            self.text.push_str(&row(["start", "length", "kind", "mapped to"], "device", "file"));
        }
    }

    fn extent(&mut self, device: &str, extent: &MapExtent) -> Result<()> {
        if self.json {
            self.text.push_str(if self.lines > 0 { ",\n " } else { "\n " });
            self.text.push_str(&serde_json::to_string(&line(device, extent)).unwrap_or_default());
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
            self.text.push_str(&row([&start, &len, kind, &offset], &escape_control(device), &file));
        }
        self.lines += 1;
        if self.text.len() >= FLUSH_AT { self.flush() } else { Ok(()) }
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

/// Columns wide enough for 64 TiB in bytes.
fn row([start, length, kind, place]: [&str; 4], device: &str, file: &str) -> String {
    let row = format!("{start:>15}  {length:>15}  {kind:<10}  {place:>15}  {device}  {file}");
    format!("{}\n", row.trim_end())
}
