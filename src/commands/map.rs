//! `imgtool map`: which parts of a disk hold data.

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Device, Extent, ExtentKind, RandomAccess, Result, ResultExt};
use serde::Serialize;

use crate::args::MapArgs;
use crate::exit::Exit;
use crate::{drivers, images, report};

/// One extent in JSON: qemu-img's names where they mean the same.
#[derive(Serialize)]
struct Line<'a> {
    device: &'a str,
    start: u64,
    length: u64,
    /// Something is allocated there.
    present: bool,
    /// It reads as zeros.
    zero: bool,
    /// It must be read.
    data: bool,
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
    let mut printer = Printer { json: args.output.is_json(), text: String::new(), lines: 0 };
    printer.begin();
    for device in images::select(&opened, &args.disk)? {
        walk(random, &device, |extent| printer.extent(&device.name, extent)).in_file(&args.image)?;
    }
    printer.end()?;
    Ok(Exit::Done)
}

/// Calls `see` for every extent of a device, neighbours of one kind joined.
fn walk(random: &dyn RandomAccess, device: &Device, mut see: impl FnMut(Extent) -> Result<()>) -> Result<()> {
    let mut pending: Option<Extent> = None;
    let mut position = 0;
    while position < device.size {
        for extent in random.extents(device.id, position..device.size)? {
            position = extent.end();
            match &mut pending {
                Some(known) if known.kind == extent.kind => known.len += extent.len,
                _ => {
                    if let Some(known) = pending.replace(extent) {
                        see(known)?;
                    }
                }
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
            self.text.push_str(&row("start", "length", "kind", "device"));
        }
    }

    fn extent(&mut self, device: &str, extent: Extent) -> Result<()> {
        if self.json {
            let line = Line {
                device,
                start: extent.start,
                length: extent.len,
                present: extent.kind != ExtentKind::Hole,
                zero: !extent.is_data(),
                data: extent.is_data(),
            };
            self.text.push_str(if self.lines > 0 { ",\n " } else { "\n " });
            self.text.push_str(&serde_json::to_string(&line).unwrap_or_default());
        } else {
            let kind = match extent.kind {
                ExtentKind::Data => "data",
                ExtentKind::Zero => "zero",
                ExtentKind::Hole => "hole",
            };
            let (start, len) = (extent.start.to_string(), extent.len.to_string());
            self.text.push_str(&row(&start, &len, kind, &escape_control(device)));
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

/// Columns wide enough for 64 TiB in bytes.
fn row(start: &str, length: &str, kind: &str, device: &str) -> String {
    format!("{start:>15}  {length:>15}  {kind:<4}  {device}\n")
}
