//! `imgtool compare`: compares the guest content of two images. The messages and exit codes are those of
//! qemu-img.

use std::ffi::OsStr;
use std::ops::Range;

use imgtool_core::error::escape_control;
use imgtool_core::{CancelToken, Error, Location, OpenOptions, Registry, Result};
use imgtool_engine::compare::{CompareRun, DevicePair, Differences, Pairing};
use imgtool_engine::{Opened, Phase, allocation, chosen, compare, open};
use serde::Serialize;

use crate::args::{CompareArgs, InputArgs};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::Display;
use crate::{compat, images, report};

/// Result of a comparison.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Verdict {
    identical: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    difference: Option<Difference>,
    devices: Vec<Compared>,
    notes: Vec<String>,
}

impl Verdict {
    /// Adds the notes on both images, and on files that changed meanwhile.
    fn add_notes(&mut self, first: &Opened, second: &Opened) {
        let read = |opened: &Opened| opened.image.info().notes.clone();
        let notes = read(first).into_iter().chain(read(second));
        for change in notes.chain(first.changes()).chain(second.changes()) {
            // Both images share the opener of the files that they name.
            if !self.notes.contains(&change) {
                self.notes.push(change);
            }
        }
    }

    /// True if the sizes of a pair differ, and no difference of content is within the smaller size.
    fn is_equal_to_shorter_end(&self, pair: &Compared) -> bool {
        let shorter = pair.virtual_size_a.min(pair.virtual_size_b);
        let offset = self.difference.as_ref().and_then(|difference| difference.offset);
        pair.virtual_size_a != pair.virtual_size_b && offset.is_none_or(|offset| offset >= shorter)
    }
}

/// The first difference between the two images.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Difference {
    /// `content`, `size`, `allocation` or `missing`.
    kind: &'static str,
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    /// Guest offset of the difference; `None` for `size` and `missing`.
    offset: Option<u64>,
    #[serde(skip)]
    text: String,
}

/// A pair of devices that was compared.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Compared {
    name: String,
    virtual_size_a: u64,
    virtual_size_b: u64,
    /// Missing if the sizes decided, or the comparison stopped at the first difference.
    #[serde(skip_serializing_if = "Option::is_none")]
    different_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    different_ranges: Option<usize>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ranges: Vec<DifferentRange>,
}

/// A range of guest bytes that differs.
#[derive(Debug, Clone, Serialize)]
struct DifferentRange {
    start: u64,
    length: u64,
}

/// Compares two images.
///
/// # Errors
/// Never: any error is printed here, and the exit code is [`Exit::NOT_COMPARED`]. The code of other errors,
/// 1, would mean that the images differ.
pub fn run(args: &CompareArgs) -> Result<Exit> {
    let exit = verdict(args).and_then(|verdict| {
        print(args, &verdict)?;
        Ok(if verdict.identical { Exit::Done } else { Exit::DIFFERENT })
    });
    Ok(exit.unwrap_or_else(|error| {
        report::error(&error);
        Exit::NOT_COMPARED
    }))
}

fn print(args: &CompareArgs, verdict: &Verdict) -> Result<()> {
    if args.output.is_json() {
        return report::print_json(verdict);
    }
    if args.messages.quiet {
        return Ok(());
    }
    for note in &verdict.notes {
        report::note(note);
    }
    if compat::is_on() && verdict.devices.iter().any(|pair| verdict.is_equal_to_shorter_end(pair)) {
        // As in qemu-img: the strict comparison ends there, the other one goes on.
        if args.strict {
            return report::print("Strict mode: Image size mismatch!\n");
        }
        report::print("Warning: Image size mismatch!\n")?;
    }
    // The wording follows qemu-img.
    let mut text = match &verdict.difference {
        None => "Images are identical.\n".to_owned(),
        Some(difference) => format!("{}\n", escape_control(&difference.text)),
    };
    // qemu-img stops at the first difference.
    for pair in verdict.devices.iter().filter(|_| args.list || !compat::is_on()) {
        let Some((bytes, ranges)) = pair.different_bytes.zip(pair.different_ranges) else { continue };
        if bytes > 0 {
            let (name, ranges) = (escape_control(&pair.name), report::count(ranges, "range"));
            let bytes = match usize::try_from(bytes) {
                Ok(few) if few < 1000 => report::count(few, "byte"),
                _ => report::exact_size(bytes),
            };
            text += &format!("{name}: differs in {ranges}, {bytes}\n");
        }
        for DifferentRange { start, length } in &pair.ranges {
            text += &format!("  guest bytes {start}..{} ({})\n", start + length, report::human_size(*length));
        }
    }
    report::print(&text)
}

fn verdict(args: &CompareArgs) -> Result<Verdict> {
    let registry = images::registry(&args.input)?;
    let options = images::open_options(&registry, &args.input)?;
    let options = OpenOptions { memory: options.memory.shared_by(2), ..options };
    if args.first.as_os_str() == "-" && args.second.as_os_str() == "-" {
        return Err(Error::usage("standard input can be only one of the images"));
    }
    let interrupt = Interrupt::listen()?;
    let opener =
        Opener { registry: &registry, input: &args.input, options: &options, quiet: args.messages.quiet };
    let first = opener.open(args.first.as_os_str(), args.input.format.as_deref(), args.strict)?;
    // The comparison needs random access to at least one image; the other may be a stream.
    let first_streams = first.image.access().is_stream();
    let second_format = args.second_format.as_deref();
    let second = opener.open(args.second.as_os_str(), second_format, args.strict || first_streams)?;
    open::check_member(args.input.member.as_deref(), [&first, &second].into_iter())?;
    let pairs = match compare::pair_devices(&first, &second, &args.disk)? {
        Pairing::Pairs(pairs) => pairs,
        Pairing::Missing(device, location) => {
            let difference = missing(&device.name, &location);
            return Ok(Verdict { difference: Some(difference), ..Verdict::default() });
        }
    };
    let mut verdict = Verdict { devices: pairs.iter().map(compared).collect(), ..Verdict::default() };
    compare_sizes(args, &pairs, &mut verdict);
    // Place of the first difference of content: the number of the pair, and the guest offset.
    let mut content = None;
    if verdict.difference.is_none() {
        let display = Display::new(args.messages.mode(), &interrupt).forgetting_secrets_at(Phase::Compare);
        let (threads, cancel) = (args.threads.count(), interrupt.token());
        content = if args.messages.quiet && !args.list && !args.output.is_json() {
            // Only the exit code counts.
            compare::first_difference(&first, &second, &pairs, threads, &display, &cancel, &options.memory)?
        } else {
            let run = CompareRun { threads, monitor: &display, cancel: &cancel, memory: &options.memory };
            let all = compare::differences(&first, &second, &pairs, run)?;
            note_differences(args, &all, &mut verdict);
            let firsts = all.iter().enumerate();
            firsts.filter_map(|(pair, all)| Some((pair, all.ranges().next()?.start))).next()
        };
        verdict.difference = content.map(|(pair, offset)| content_difference(&pairs, pair, offset));
    }
    if args.strict && verdict.difference.as_ref().is_none_or(|difference| difference.offset.is_some()) {
        // As in qemu-img, the first difference counts, and of two at one place that of allocation.
        let found = allocation::first_difference(&first, &second, &pairs)?;
        let found = found.filter(|at| content.is_none_or(|content| *at <= content));
        let found = found.map(|(pair, offset)| allocation_difference(&pairs, pair, offset));
        verdict.difference = found.or(verdict.difference);
    }
    verdict.identical = verdict.difference.is_none();
    verdict.add_notes(&first, &second);
    Ok(verdict)
}

/// Adds the differences of each pair to the verdict.
fn note_differences(args: &CompareArgs, all: &[Differences], verdict: &mut Verdict) {
    for (pair, found) in verdict.devices.iter_mut().zip(all) {
        pair.different_bytes = Some(found.bytes);
        pair.different_ranges = Some(found.ranges().len());
        if args.list {
            let range =
                |range: Range<u64>| DifferentRange { start: range.start, length: range.end - range.start };
            pair.ranges = found.ranges().map(range).collect();
        }
    }
}

/// Opens the images of a comparison.
struct Opener<'a> {
    registry: &'a Registry,
    input: &'a InputArgs,
    options: &'a OpenOptions,
    quiet: bool,
}

impl Opener<'_> {
    /// Opens an image. `anywhere` is true if the comparison needs random access to it.
    fn open(&self, name: &OsStr, format: Option<&str>, anywhere: bool) -> Result<Opened> {
        let source = images::source(self.input, name)?;
        let (location, format) = (&source.location, images::format_of(&source, format));
        let options = &source.options(self.registry, self.options);
        let mut input = open::open_input(self.registry, location, format, options)?;
        // The length of a raw image in a pipe is unknown until the image is spooled.
        if anywhere || input.input.is_stream() && *location == Location::Stdin {
            input = input.spool()?;
        }
        let mut opened = open::open_image(self.registry, input, format, options)?;
        if opened.image.info().devices.iter().any(|device| device.open_ended) {
            // The length of a compressed raw image is unknown until it is copied to temporary storage.
            let cancel = CancelToken::new();
            opened = open::open_random(self.registry, location, format, options, &cancel)?;
        }
        chosen::check(&opened, &source.backing)?;
        if !self.quiet {
            images::note_unrecognised(&opened);
        }
        Ok(opened)
    }
}

fn compared(pair: &DevicePair) -> Compared {
    Compared {
        name: pair.name.clone(),
        virtual_size_a: pair.first.size,
        virtual_size_b: pair.second.size,
        different_bytes: None,
        different_ranges: None,
        ranges: Vec::new(),
    }
}

fn missing(device: &str, only_in: &Location) -> Difference {
    Difference {
        kind: "missing",
        device: device.to_owned(),
        offset: None,
        text: format!("Device {device} is only in {}!", only_in.name()),
    }
}

fn compare_sizes(args: &CompareArgs, pairs: &[DevicePair], verdict: &mut Verdict) {
    for pair in pairs.iter().filter(|pair| pair.first.size != pair.second.size) {
        let text = format!("{}: {} bytes in A, {} bytes in B", pair.name, pair.first.size, pair.second.size);
        if args.strict {
            verdict.difference.get_or_insert(Difference {
                kind: "size",
                device: pair.name.clone(),
                offset: None,
                text: format!("Strict mode: Image size mismatch! {text}"),
            });
        } else {
            verdict.notes.push(format!("sizes differ: {text}"));
        }
    }
}

fn content_difference(pairs: &[DevicePair], pair: usize, offset: u64) -> Difference {
    let name = &pairs[pair].name;
    let of = if pairs.len() > 1 { format!(" of {name}") } else { String::new() };
    Difference {
        kind: "content",
        device: name.clone(),
        offset: Some(offset),
        text: format!("Content mismatch at offset {offset}{of}!"),
    }
}

fn allocation_difference(pairs: &[DevicePair], pair: usize, offset: u64) -> Difference {
    let name = &pairs[pair].name;
    let of = if pairs.len() > 1 { format!(" of {name}") } else { String::new() };
    Difference {
        kind: "allocation",
        device: name.clone(),
        offset: Some(offset),
        text: format!("Strict mode: Offset {offset}{of} block status mismatch!"),
    }
}
