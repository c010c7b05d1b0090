//! `imgtool check`: checks the whole structure of an image. The JSON fields and exit codes are those of
//! qemu-img.

use std::fmt::Write as _;
use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{CheckReport, Driver, Error, OpenOptions, Output, Repair, Result, ResultExt};
use imgtool_engine::open;
use imgtool_storage::{OpenInput, Outputs};
use serde::Serialize;

use crate::args::{CheckArgs, RepairMode};
use crate::exit::Exit;
use crate::report::{self, Stream};
use crate::sandbox::{self, Writes};
use crate::{compat, images};

pub(in crate::commands) mod platform;

#[derive(Serialize)]
struct Document<'a> {
    filename: String,
    format: &'a str,
    #[serde(flatten)]
    report: &'a CheckReport,
    #[serde(flatten)]
    fixed: Option<Fixed>,
}

/// Number of faults that a repair mended, with the names of qemu-img.
#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Fixed {
    leaks_fixed: u64,
    corruptions_fixed: u64,
}

/// Checks an image.
///
/// # Errors
/// Never: any error is printed here, and the exit code is [`Exit::Failed`]. The code of a usage error, 2,
/// would mean a corrupt image.
pub fn run(args: &CheckArgs) -> Result<Exit> {
    Ok(check(args).unwrap_or_else(|error| {
        report::error(&error);
        Exit::Failed
    }))
}

fn check(args: &CheckArgs) -> Result<Exit> {
    images::refuse(&args.input)?;
    if let Some(platform) = args.platform {
        return platform::check(args, platform);
    }
    if let Some(other) = args.others.first() {
        return Err(Error::usage(format!("unexpected argument '{}'", images::show(other.as_os_str()))));
    }
    let source = images::source(&args.input, args.image.as_os_str())?;
    args.repair.map_or(Ok(()), |_| images::refuse_part(&source))?;
    let location = source.location.clone();
    let path = location.path().unwrap_or(&args.image);
    let target = args.repair.map(|what| open_target(path).map(|target| (what, target))).transpose()?;
    let registry = images::registry(&args.input)?;
    let options = source.options(&registry, &images::open_options(&registry, &args.input)?);
    let format = images::format_of(&source, args.input.format.as_deref());
    let open = match &target {
        // Another handle would meet the lock of this one.
        Some((_, (_, image))) => OpenInput::of(image.reopen(&options.memory)?).borrowing(&options.memory),
        None => open::open_input(&registry, &location, format, &options)?,
    };
    let open = open::with_end(&registry, open, format, false)?;
    let driver = match format {
        Some(name) => registry.get(name)?,
        None => open::recognise_for(&registry, &open, &options).in_file(&location)?.0,
    };
    let can = driver.capabilities();
    if let (Some(member), false) = (&options.member, can.container) {
        return Err(open::no_member(member).path(location));
    }
    if !can.check {
        let error = match compat::is_on() {
            // Scripts look for this sentence.
            true => Error::unsupported("This image format does not support checks"),
            false => Error::unsupported(format!("{} images have no structure to check", driver.name()))
                .path(location),
        };
        report::error(&error);
        return Ok(Exit::NO_CHECK);
    }
    if let Some((what, target)) = target {
        drop(open);
        return repair(args, &*driver, what, target, &options);
    }
    let head = open.input.head()?;
    let open = if driver.reads_stream(&head) { open } else { open.spool()? };
    let found = driver.check(open.input, &options).in_file(location)?;
    print(args, compat::format_name(driver.name()), &found, None)?;
    Ok(exit(&found))
}

/// Opens an image to change it in place. The program then opens no other file for writing.
pub(super) fn open_target(path: &Path) -> Result<(Outputs, Output)> {
    let mut outputs = Outputs::new();
    let image = outputs.existing_image(path)?;
    sandbox::enter(Writes::nothing());
    Ok((outputs, image))
}

/// Repairs an image in place, and checks it again.
fn repair(
    args: &CheckArgs,
    driver: &dyn Driver,
    what: RepairMode,
    (outputs, image): (Outputs, Output),
    options: &OpenOptions,
) -> Result<Exit> {
    let what = match what {
        RepairMode::Leaks => Repair::Leaks,
        RepairMode::All => Repair::All,
    };
    let before = driver.repair(&image, what, options).in_file(&args.image)?;
    let after = driver.check(image.reopen(&options.memory)?, options).in_file(&args.image)?;
    outputs.commit()?;
    let fixed = Fixed {
        leaks_fixed: before.leaks.saturating_sub(after.leaks),
        corruptions_fixed: before.corruptions.saturating_sub(after.corruptions),
    };
    print(args, compat::format_name(driver.name()), &after, Some(fixed))?;
    Ok(exit(&after))
}

/// Prints the result of a check, and before it what was repaired.
fn print(args: &CheckArgs, format: &str, found: &CheckReport, fixed: Option<Fixed>) -> Result<()> {
    if args.output.is_json() {
        let filename = images::typed(args.image.as_os_str());
        return report::print_json(&document(&Document { filename, format, report: found, fixed }));
    }
    if args.quiet && exit(found) == Exit::Done {
        return Ok(());
    }
    if compat::is_on() {
        return report::print(&qemu_page(format, found, fixed));
    }
    if let Some(Fixed { leaks_fixed, corruptions_fixed }) = fixed {
        let text = format!("repaired: {leaks_fixed} leaked clusters, {corruptions_fixed} errors");
        report::print(&format!("{}\n", report::flow(Stream::Out, &text, 2)))?;
    }
    report::print(&page(&args.image, format, found))
}

/// Returns the JSON document. As in qemu-img, fields that do not apply to the format are omitted.
fn document(document: &Document<'_>) -> serde_json::Value {
    let mut value = serde_json::to_value(document).unwrap_or_default();
    if let Some(map) = value.as_object_mut() {
        map.retain(|_, field| !field.is_null());
    }
    value
}

fn exit(found: &CheckReport) -> Exit {
    // As in qemu-img, an incomplete check has no verdict.
    if found.check_errors > 0 {
        Exit::Failed
    } else if found.corruptions > 0 {
        Exit::CORRUPT
    } else if found.leaks > 0 {
        Exit::LEAKS
    } else {
        Exit::Done
    }
}

/// Formats whose clusters qemu-img counts.
const COUNTED: [&str; 3] = ["parallels", "qcow2", "qed"];

/// Formats whose end qemu-img finds.
const ENDED: [&str; 2] = ["parallels", "qcow2"];

/// Returns the text of `qemu-img check`.
fn qemu_page(format: &str, found: &CheckReport, fixed: Option<Fixed>) -> String {
    let mut text = String::new();
    if let Some(Fixed { leaks_fixed, corruptions_fixed }) =
        fixed.filter(|fixed| fixed.leaks_fixed + fixed.corruptions_fixed > 0)
    {
        let _ = write!(
            text,
            "The following inconsistencies were found and repaired:\n\n    {leaks_fixed} leaked clusters\n    \
             {corruptions_fixed} corruptions\n\nDouble checking the fixed image now...\n"
        );
    }
    for finding in &found.findings {
        let _ = writeln!(text, "{}", escape_control(finding));
    }
    let counts = [
        (
            found.corruptions,
            "errors were found on the image.\nData may be corrupted, or further writes to the image may corrupt it.",
        ),
        (
            found.leaks,
            "leaked clusters were found on the image.\nThis means waste of disk space, but no harm to data.",
        ),
        (found.check_errors, "internal errors have occurred during the check."),
    ];
    if counts.iter().all(|(count, _)| *count == 0) {
        text.push_str("No errors were found on the image.\n");
    }
    for (count, what) in counts.iter().filter(|(count, _)| *count > 0) {
        let _ = writeln!(text, "\n{count} {what}");
    }
    if let (Some(total), Some(allocated)) = (found.total_clusters, found.allocated_clusters)
        && COUNTED.contains(&format)
    {
        let share = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 * 100.0 / whole as f64 };
        let _ = writeln!(
            text,
            "{allocated}/{total} = {:.2}% allocated, {:.2}% fragmented, {:.2}% compressed clusters",
            share(allocated, total),
            share(found.fragmented_clusters.unwrap_or(0), allocated),
            share(found.compressed_clusters.unwrap_or(0), allocated)
        );
    }
    if let Some(end) = found.image_end_offset.filter(|_| ENDED.contains(&format)) {
        let _ = writeln!(text, "Image end offset: {end}");
    }
    text
}

fn page(path: &Path, format: &str, found: &CheckReport) -> String {
    let mut text = String::new();
    for finding in &found.findings {
        let _ = writeln!(text, "{}", report::flow(Stream::Out, &escape_control(finding), 2));
    }
    let counted = found.corruptions.saturating_add(found.leaks);
    if !found.findings.is_empty() && counted > found.findings.len() as u64 {
        let _ = writeln!(text, "(only the first {} findings are listed)", found.findings.len());
    }
    let name = images::show(path.as_os_str());
    let errors = if found.corruptions == 1 { "error" } else { "errors" };
    let verdict = match exit(found) {
        Exit::Done => format!("{name}: no errors were found in this {format} image"),
        Exit::LEAKS => {
            format!("{name}: {} leaked clusters; space is wasted, the content is intact", found.leaks)
        }
        Exit::Failed => format!(
            "{name}: {} parts could not be checked ({} {errors}, {} leaks)",
            found.check_errors, found.corruptions, found.leaks
        ),
        _ => {
            format!(
                "{name}: {} {errors}; the content may be wrong ({} leaks)",
                found.corruptions, found.leaks
            )
        }
    };
    let _ = writeln!(text, "{}", report::flow(Stream::Out, &verdict, 2));
    if let (Some(total), Some(allocated)) = (found.total_clusters, found.allocated_clusters) {
        let mut line =
            format!("{allocated}/{total} clusters = {} allocated", report::percent(allocated, total));
        for (count, what) in
            [(found.fragmented_clusters, "fragmented"), (found.compressed_clusters, "compressed")]
        {
            if let Some(count) = count {
                let _ = write!(line, ", {} {what}", report::percent(count, allocated));
            }
        }
        let _ = writeln!(text, "{line}");
    }
    if let Some(end) = found.image_end_offset {
        let _ = writeln!(text, "image end offset: {end}");
    }
    text
}
