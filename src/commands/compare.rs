//! `imgtool compare`: whether two images hold the same guest content.
//!
//! One image runs through the pipeline, into a sink that reads the same part of the other and looks
//! for a difference. What both know to be zero is not read.

use std::path::Path;

use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{
    Access, Device, DeviceId, Error, ErrorKind, Input, OpenOptions, Opened, Registry, Result, ResultExt,
};
use serde::Serialize;

use crate::args::CompareArgs;
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::{Lane, Meter};
use crate::{drivers, images, report};

mod sink;
mod strict;

use sink::{CompareSink, Pair};

/// What was found.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Verdict {
    identical: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Difference>,
    devices: Vec<Compared>,
    notes: Vec<String>,
}

/// The first difference.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Difference {
    /// "content", "size", "allocation" or "missing".
    kind: &'static str,
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip)]
    text: String,
}

/// A device that was compared.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Compared {
    name: String,
    virtual_size_a: u64,
    virtual_size_b: u64,
}

/// Compares two images.
///
/// # Errors
/// Never: what could not be compared ends with code 2, as wrong usage does.
pub fn run(args: &CompareArgs) -> Result<Exit> {
    let verdict = match compare(args) {
        Ok(verdict) => verdict,
        Err(error) => {
            report::error(&error);
            return Ok(Exit::NOT_COMPARED);
        }
    };
    if args.output.is_json() {
        report::print_json(&verdict)?;
    } else if !args.messages.quiet {
        for note in &verdict.notes {
            report::note(note);
        }
        // The words are qemu-img's.
        report::print(&match &verdict.difference {
            None => "Images are identical.\n".to_owned(),
            Some(difference) => format!("{}\n", imgtool_toolkit::error::escape_control(&difference.text)),
        })?;
    }
    Ok(if verdict.identical { Exit::Done } else { Exit::DIFFERENT })
}

fn compare(args: &CompareArgs) -> Result<Verdict> {
    let registry = drivers::registry();
    let options = images::open_options(&registry, &args.input)?;
    if args.first == Path::new("-") && args.second == Path::new("-") {
        return Err(Error::usage("standard input can be only one of the images"));
    }
    let interrupt = Interrupt::listen()?;
    let mut first = open(&registry, &args.first, args.input.format.as_deref(), &options, args.strict)?;
    // One of the two must be readable anywhere; the other may be a stream.
    let first_streams = matches!(first.source.access(), Access::Sequential(_));
    let second_format = args.second_format.as_deref();
    let mut second = open(&registry, &args.second, second_format, &options, args.strict || first_streams)?;
    let pairs = match match_devices(&first, &second, &args.disk)? {
        Matched::Pairs(pairs) => pairs,
        Matched::Missing(difference) => {
            return Ok(Verdict { difference: Some(difference), ..Verdict::default() });
        }
    };
    let swapped = matches!(second.source.access(), Access::Sequential(_));
    let mut verdict = Verdict { devices: pairs.iter().map(compared).collect(), ..Verdict::default() };
    note_sizes(args, &pairs, &mut verdict);
    if verdict.difference.is_none() {
        verdict.difference = if swapped {
            let pairs: Vec<Pair> = pairs.iter().map(Pair::swapped).collect();
            content(args, &mut second, &first, &pairs, &interrupt)?
        } else {
            content(args, &mut first, &second, &pairs, &interrupt)?
        };
    }
    if args.strict && verdict.difference.is_none() {
        verdict.difference = strict::allocation(&first, &second, &pairs)?;
    }
    verdict.identical = verdict.difference.is_none();
    Ok(verdict)
}

fn open(
    registry: &Registry,
    path: &Path,
    format: Option<&str>,
    options: &OpenOptions,
    anywhere: bool,
) -> Result<Opened> {
    if anywhere {
        return images::open_random(registry, path, format, options);
    }
    let mut input: Input = images::input(registry, path, format)?;
    if input.is_stream() && path == Path::new("-") {
        // Raw images in a pipe do not tell their length.
        input = input.spool()?;
    }
    let opened = registry.open(input, format, options)?;
    if opened.source.info().devices.iter().any(|device| device.open_ended) {
        // Nor do those under compression.
        return images::open_random(registry, path, format, options);
    }
    Ok(opened)
}

fn compared(pair: &Pair) -> Compared {
    Compared { name: pair.name.clone(), virtual_size_a: pair.first.size, virtual_size_b: pair.second.size }
}

enum Matched {
    Pairs(Vec<Pair>),
    Missing(Difference),
}

/// Which device of one is which of the other: the only ones of both, or those of the same name.
fn match_devices(first: &Opened, second: &Opened, wanted: &[String]) -> Result<Matched> {
    let whole = wanted.is_empty();
    let (mut a, b) = (first.source.info().devices.clone(), second.source.info().devices.clone());
    if !whole {
        a = images::select(first, wanted)?;
    }
    if let ([a], [b]) = (a.as_slice(), b.as_slice()) {
        return Ok(Matched::Pairs(vec![Pair { name: a.name.clone(), first: a.clone(), second: b.clone() }]));
    }
    let mut left: Vec<Option<Device>> = b.into_iter().map(Some).collect();
    let mut pairs = Vec::new();
    for device in a {
        let same = left.iter_mut().find(|other| other.as_ref().is_some_and(|o| o.name == device.name));
        match same.and_then(Option::take) {
            Some(other) => pairs.push(Pair { name: device.name.clone(), first: device, second: other }),
            None => return Ok(Matched::Missing(missing(&device, &first.path))),
        }
    }
    match left.into_iter().flatten().next() {
        Some(device) if whole => Ok(Matched::Missing(missing(&device, &second.path))),
        _ => Ok(Matched::Pairs(pairs)),
    }
}

fn missing(device: &Device, only_in: &Path) -> Difference {
    Difference {
        kind: "missing",
        device: device.name.clone(),
        offset: None,
        text: format!("Device {} is only in {}!", device.name, only_in.display()),
    }
}

fn note_sizes(args: &CompareArgs, pairs: &[Pair], verdict: &mut Verdict) {
    for pair in pairs.iter().filter(|pair| pair.first.size != pair.second.size) {
        let text = format!("{}: {} bytes in A, {} bytes in B", pair.name, pair.first.size, pair.second.size);
        if args.strict {
            verdict.difference.get_or_insert(Difference {
                kind: "size",
                device: pair.name.clone(),
                offset: None,
                text: format!("Image size mismatch! {text}"),
            });
        } else {
            verdict.notes.push(format!("sizes differ: {text}"));
        }
    }
}

/// The first difference of content. `stepped` runs through the pipeline, `other` is read at random.
fn content(
    args: &CompareArgs,
    stepped: &mut Opened,
    other: &Opened,
    pairs: &[Pair],
    interrupt: &Interrupt,
) -> Result<Option<Difference>> {
    let lanes = pairs.iter().map(|pair| Lane::new(&*pair.name, Some(pair.first.size))).collect();
    let mut meter = Meter::start(args.messages.mode(), "compare", lanes, None, || 0);
    let sink = CompareSink::new(images::random(other)?, &other.path, pairs);
    let routes: Vec<Route> =
        (0..).zip(pairs).map(|(number, pair)| Route { from: pair.first.id, to: DeviceId(number) }).collect();
    let job =
        Job { routes, threads: args.threads.count(), progress: meter.progress(), cancel: interrupt.token() };
    let copied = pipeline::copy(&mut *stepped.source, &sink, &job).in_file(&stepped.path);
    let found = match (copied, sink.difference()) {
        (_, Some(found)) => Some(found),
        (Err(error), None) if error.kind() == ErrorKind::Cancelled => return Err(error),
        (Err(error), None) => return Err(error),
        (Ok(_), None) => sink.tails(&interrupt.token())?,
    };
    meter.finish();
    Ok(found.map(|(pair, offset)| {
        let name = &pairs[pair].name;
        let of = if pairs.len() > 1 { format!(" of {name}") } else { String::new() };
        Difference {
            kind: "content",
            device: name.clone(),
            offset: Some(offset),
            text: format!("Content mismatch at offset {offset}{of}!"),
        }
    }))
}
