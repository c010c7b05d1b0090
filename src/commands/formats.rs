//! `imgtool formats`: lists the formats, their capabilities and their options.

use std::fmt::Write as _;
use std::sync::Arc;

use imgtool_core::{Capabilities, Driver, OptionSpec, Result};
use serde::Serialize;

use crate::args::FormatsArgs;
use crate::exit::Exit;
use crate::report::{self, Align, Paint, Stream};

/// Maximum number of columns in a line. Our choice: longer lines are hard to read.
const MAX_COLUMNS: usize = 80;

/// Minimum number of columns for explanations beside the option names. A narrower terminal has them below.
const NARROW: usize = 60;

/// One format in JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct FormatRecord<'a> {
    name: &'a str,
    description: &'a str,
    extensions: &'a [&'a str],
    capabilities: CapabilitiesRecord,
    options: Vec<OptionRecord>,
}

/// Capabilities of a format in JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct CapabilitiesRecord {
    read: bool,
    write: bool,
    stream_read: bool,
    stream_write: bool,
    max_devices: u32,
    attachments: bool,
    compression: bool,
    open_ended: bool,
    size_multiple: u64,
    check: bool,
}

impl From<Capabilities> for CapabilitiesRecord {
    fn from(can: Capabilities) -> Self {
        Self {
            read: can.read,
            write: can.write,
            stream_read: can.stream_read,
            stream_write: can.stream_write,
            max_devices: can.max_devices(),
            attachments: can.attachments(),
            compression: can.compression,
            open_ended: can.open_ended,
            size_multiple: can.size_multiple,
            check: can.check,
        }
    }
}

/// One option in JSON.
#[derive(Serialize)]
struct OptionRecord {
    name: &'static str,
    help: &'static str,
    default: &'static str,
    values: String,
}

impl From<&OptionSpec> for OptionRecord {
    fn from(spec: &OptionSpec) -> Self {
        Self { name: spec.name, help: spec.help, default: spec.default, values: spec.kind.to_string() }
    }
}

/// Prints the formats.
pub fn run(args: &FormatsArgs) -> Result<Exit> {
    let registry = imgtool::registry();
    let named = args.name.as_deref().map(|name| registry.get(name)).transpose()?;
    let drivers: Vec<_> = match &named {
        Some(driver) => vec![driver.clone()],
        None => registry.drivers().cloned().collect(),
    };
    if args.output.is_json() {
        let formats: Vec<FormatRecord<'_>> = drivers
            .iter()
            .map(|driver| FormatRecord {
                name: driver.name(),
                description: driver.description(),
                extensions: driver.extensions(),
                capabilities: driver.capabilities().into(),
                options: driver.options().iter().map(OptionRecord::from).collect(),
            })
            .collect();
        report::print_json(&formats)?;
    } else {
        report::print(&match &named {
            Some(driver) => page(&**driver),
            None => overview(&drivers),
        })?;
    }
    Ok(Exit::Done)
}

/// Returns a table of all formats, one line for each.
fn overview(drivers: &[Arc<dyn Driver>]) -> String {
    let columns = [
        ("format", Align::Left),
        ("read", Align::Left),
        ("write", Align::Left),
        ("pipe", Align::Left),
        ("check", Align::Left),
        ("extensions", Align::Left),
    ];
    let yes = |can: bool| if can { "yes" } else { "-" }.to_owned();
    let row = |driver: &Arc<dyn Driver>| {
        let can = driver.capabilities();
        let pipe = match (can.stream_read, can.stream_write) {
            (true, true) => "both ways",
            (true, false) => "from",
            (false, true) => "to",
            (false, false) => "-",
        };
        let extensions: Vec<String> = driver.extensions().iter().map(|ext| format!(".{ext}")).collect();
        let name = driver.name().to_owned();
        vec![name, yes(can.read), yes(can.write), pipe.to_owned(), yes(can.check), extensions.join(" ")]
    };
    let table = report::table(0, &columns, &drivers.iter().map(row).collect::<Vec<_>>());
    let table = match table.split_once('\n') {
        Some((header, rest)) => format!("{}\n{rest}", Stream::Out.paint(Paint::Bold, header)),
        None => table,
    };
    table + "\n'imgtool formats NAME' describes a format and its -o options.\n"
}

fn page(driver: &dyn Driver) -> String {
    let title = Stream::Out.paint(Paint::Bold, driver.name());
    let columns = Stream::Out.columns().unwrap_or(MAX_COLUMNS).min(MAX_COLUMNS);
    let mut text = report::flow_within(columns, &format!("{title}: {}", driver.description()), 2) + "\n";
    let extensions: Vec<String> = driver.extensions().iter().map(|ext| format!(".{ext}")).collect();
    let _ = writeln!(text, "  extensions: {}", extensions.join(", "));
    paragraph(&mut text, 2, "can: ", &capability_names(&driver.capabilities()).join(", "));
    if !driver.options().is_empty() {
        text.push_str("  options (-o):\n");
        text.push_str(&options(4, driver.options()));
    }
    text
}

/// Returns a list of the `-o` options of a format with their meanings, values and defaults.
pub fn options(indent: usize, specs: &[OptionSpec]) -> String {
    if Stream::Out.columns().is_some_and(|columns| columns < NARROW) {
        return narrow_options(indent, specs);
    }
    let longest = specs.iter().map(|spec| spec.name.len() + 1).max().unwrap_or(0);
    let mut text = String::new();
    for spec in specs {
        let name = format!("{:<longest$}  ", format!("{}=", spec.name));
        let below = indent + name.len();
        paragraph(&mut text, indent, &name, spec.help);
        paragraph(&mut text, below, "", &format!("{}; default: {}", spec.kind, spec.default));
    }
    text
}

fn narrow_options(indent: usize, specs: &[OptionSpec]) -> String {
    let mut text = String::new();
    for spec in specs {
        let _ = writeln!(text, "{:indent$}{}=", "", spec.name);
        paragraph(&mut text, indent + 2, "", spec.help);
        paragraph(&mut text, indent + 2, "", &format!("{}; default: {}", spec.kind, spec.default));
    }
    text
}

/// Appends a label and a text, wrapped so that further lines are aligned with the text's first word.
fn paragraph(text: &mut String, indent: usize, label: &str, words: &str) {
    let columns = Stream::Out.columns().unwrap_or(MAX_COLUMNS).min(MAX_COLUMNS);
    let begin = indent + label.len();
    // At least 20 columns, since narrower text is unreadable. The terminal wraps lines that are too long.
    let width = columns.saturating_sub(begin).max(20);
    for (index, line) in report::wrap(words, width).iter().enumerate() {
        let prefix = if index == 0 { format!("{:indent$}{label}", "") } else { " ".repeat(begin) };
        let _ = writeln!(text, "{prefix}{line}");
    }
}

/// Returns the capabilities of a driver in words.
fn capability_names(can: &Capabilities) -> Vec<String> {
    let mut list: Vec<String> = [
        (can.read, "read"),
        (can.write, "write"),
        (can.stream_read, "read from a pipe"),
        (can.stream_write, "write to a pipe"),
        (can.compression, "compress"),
        (can.attachments(), "hold configurations"),
        (can.check, "check"),
    ]
    .iter()
    .filter(|(has, _)| *has)
    .map(|(_, what)| (*what).to_owned())
    .collect();
    list.push(match can.max_devices() {
        1 => "one disk".to_owned(),
        many => format!("up to {many} disks"),
    });
    if can.size_multiple > 1 {
        list.push(format!("sizes in multiples of {} bytes", can.size_multiple));
    }
    list
}
