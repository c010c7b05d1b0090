//! `imgtool check --for PLATFORM`: compares images with the import rules of a platform.

use std::fmt::Write as _;
use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{Location, Registry, Result, ResultExt};
use imgtool_platform::{Finding, Platform, Severity, Subject, Verdict};
use serde::Serialize;

use crate::args::CheckArgs;
use crate::exit::Exit;
use crate::images;
use crate::report::{self, Stream};

#[derive(Serialize)]
struct Document {
    platform: String,
    fits: bool,
    images: Vec<ImageVerdict>,
}

/// Verdict on one image.
#[derive(Serialize)]
struct ImageVerdict {
    filename: String,
    format: String,
    fits: bool,
    findings: Vec<Finding>,
}

/// Compares all images that the user named with the rules.
///
/// # Errors
/// If an image can't be read.
pub(super) fn check(args: &CheckArgs, platform: Platform) -> Result<Exit> {
    let registry = images::registry(&args.input)?;
    let mut images = Vec::new();
    for path in std::iter::once(&args.image).chain(&args.others) {
        images.push(judge(args, &registry, platform, path)?);
    }
    let fits = images.iter().all(|image| image.fits);
    if args.output.is_json() {
        report::print_json(&Document { platform: platform.to_string(), fits, images })?;
    } else {
        let shown = images.iter().filter(|image| !(args.quiet && image.fits));
        report::print(&shown.map(|image| page(image, platform)).collect::<String>())?;
    }
    Ok(if fits { Exit::Done } else { Exit::MISFIT })
}

/// Compares one image.
fn judge(args: &CheckArgs, registry: &Registry, platform: Platform, path: &Path) -> Result<ImageVerdict> {
    let options = images::open_options(registry, &args.input)?;
    let opened = images::open_random(registry, &args.input, path.as_os_str(), &options)?;
    let compressions = opened.compression.iter().map(|compression| compression.name()).collect();
    let name = opened.location.file_name();
    let subject = Subject::look(name.as_deref(), compressions, &opened.image).in_file(&opened.location)?;
    let Verdict { findings } = platform.check(&subject);
    let fits = findings.iter().all(|finding| finding.severity == Severity::Note);
    let filename = images::typed(path.as_os_str());
    Ok(ImageVerdict { filename, format: opened.format_name(), fits, findings })
}

/// Returns a line for each finding, and the verdict.
fn page(image: &ImageVerdict, platform: Platform) -> String {
    let name = images::show(Path::new(&image.filename).as_os_str());
    let mut text = String::new();
    for finding in &image.findings {
        let line = line(&name, finding);
        let _ = writeln!(text, "{}", report::flow(Stream::Out, &line, 2));
    }
    let refused = image.findings.iter().filter(|finding| finding.severity == Severity::Breach).count();
    let verdict = match refused {
        0 => format!("{name}: {platform} takes this {} image", image.format),
        _ => format!(
            "{name}: {platform} refuses this {} image; 'imgtool convert --for {platform}' makes one that fits",
            image.format
        ),
    };
    let _ = writeln!(text, "{}", report::flow(Stream::Out, &verdict, 2));
    text
}

/// Words a finding: where, which rule, what, and what to do.
pub(in crate::commands) fn line(place: &str, finding: &Finding) -> String {
    let disk = finding.disk.as_ref().map(|disk| format!(", disk {disk}")).unwrap_or_default();
    let weight = if finding.severity == Severity::Note { "note: " } else { "" };
    let Finding { rule, found, advice, .. } = finding;
    escape_control(&format!("{place}{disk}: {weight}{rule}: {found}; {advice}"))
}

/// Returns the name of a file for [`line`].
pub(in crate::commands) fn place(location: &Location) -> String {
    location.name().into_owned()
}
