//! `imgtool formats`: the drivers, what each can do, and their options.

use std::fmt::Write as _;

use imgtool_toolkit::{Capabilities, Driver, OptionSpec, Result};
use serde::Serialize;

use crate::args::FormatsArgs;
use crate::drivers;
use crate::exit::Exit;
use crate::report::{self, Align};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Format<'a> {
    name: &'a str,
    description: &'a str,
    extensions: &'a [&'a str],
    capabilities: Capabilities,
    options: &'a [OptionSpec],
}

/// Prints the formats.
///
/// # Errors
/// When the output can't be written.
pub fn run(args: &FormatsArgs) -> Result<Exit> {
    let registry = drivers::registry();
    if args.output.is_json() {
        let formats: Vec<Format<'_>> = registry
            .drivers()
            .map(|driver| Format {
                name: driver.name(),
                description: driver.description(),
                extensions: driver.extensions(),
                capabilities: driver.capabilities(),
                options: driver.options(),
            })
            .collect();
        report::print_json(&formats)?;
    } else {
        let pages: Vec<String> = registry.drivers().map(|driver| page(&**driver)).collect();
        report::print(&pages.join("\n"))?;
    }
    Ok(Exit::Done)
}

fn page(driver: &dyn Driver) -> String {
    let mut text = format!("{}: {}\n", driver.name(), driver.description());
    let extensions: Vec<String> = driver.extensions().iter().map(|ext| format!(".{ext}")).collect();
    let _ = writeln!(text, "  extensions: {}", extensions.join(", "));
    let _ = writeln!(text, "  can: {}", abilities(&driver.capabilities()).join(", "));
    if !driver.options().is_empty() {
        text.push_str("  options (-o):\n");
        text.push_str(&options(4, driver.options()));
    }
    text
}

/// The `-o` options of a format: what each is for, and below it what may be said.
pub fn options(indent: usize, specs: &[OptionSpec]) -> String {
    let mut rows = Vec::new();
    for spec in specs {
        rows.push(vec![format!("{}=", spec.name), spec.help.to_owned()]);
        rows.push(vec![String::new(), format!("{}; default: {}", spec.values, spec.default)]);
    }
    report::table(indent, &[("", Align::Left), ("", Align::Left)], &rows)
}

fn abilities(can: &Capabilities) -> Vec<String> {
    let mut list: Vec<String> = [
        (can.read, "read"),
        (can.write, "write"),
        (can.stream_read, "read from a pipe"),
        (can.stream_write, "write to a pipe"),
        (can.compression, "compress"),
        (can.attachments, "hold configurations"),
        (can.check, "check"),
    ]
    .iter()
    .filter(|(has, _)| *has)
    .map(|(_, what)| (*what).to_owned())
    .collect();
    list.push(match can.max_devices {
        1 => "one disk".to_owned(),
        many => format!("up to {many} disks"),
    });
    if can.size_multiple > 1 {
        list.push(format!("sizes in multiples of {} bytes", can.size_multiple));
    }
    list
}
