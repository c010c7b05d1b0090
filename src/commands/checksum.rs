//! `imgtool checksum`: prints a digest of each device's content. The digest does not depend on the format.

use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{OpenOptions, Registry, Result};
use imgtool_engine::checksum::{Algorithm, ChecksumRequest, checksum};
use imgtool_engine::{Phase, chosen};
use serde::Serialize;

use crate::args::{self, ChecksumArgs};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::Display;
use crate::{images, report};

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Line {
    filename: String,
    device: String,
    virtual_size: u64,
    algorithm: &'static str,
    digest: String,
    #[serde(skip)]
    is_archive: bool,
}

/// Prints the digests.
///
/// # Errors
/// If an image can't be read. In text form, the digests of the images before it are already printed.
pub fn run(args: &ChecksumArgs) -> Result<Exit> {
    let registry = images::registry(&args.input)?;
    let options = OpenOptions {
        snapshot: args.snapshot.snapshot.clone(),
        ..images::open_options(&registry, &args.input)?
    };
    let interrupt = Interrupt::listen()?;
    let mut lines = Vec::new();
    for (index, path) in args.images.iter().enumerate() {
        let is_last = index + 1 == args.images.len();
        for line in digest_image(&registry, path, is_last, args, &options, &interrupt)? {
            if !args.output.is_json() {
                report::print(&human(&line))?;
            }
            lines.push(line);
        }
    }
    if args.output.is_json() {
        report::print_json(&lines)?;
    }
    Ok(Exit::Done)
}

/// Formats a line like sha256sum and b3sum. The name of an archive is followed by the name of the device.
fn human(line: &Line) -> String {
    let name =
        if line.is_archive { format!("{}:{}", line.filename, line.device) } else { line.filename.clone() };
    format!("{}  {}\n", line.digest, escape_control(&name))
}

/// Digests an image. Passphrases are forgotten when the last one is open (`is_last`).
fn digest_image(
    registry: &Registry,
    path: &Path,
    is_last: bool,
    args: &ChecksumArgs,
    options: &OpenOptions,
    interrupt: &Interrupt,
) -> Result<Vec<Line>> {
    let source = images::source(&args.input, path.as_os_str())?;
    let options = &source.options(registry, options);
    let request = ChecksumRequest {
        algorithm: match args.algorithm {
            args::Algorithm::Sha256 => Algorithm::Sha256,
            args::Algorithm::Blake3 => Algorithm::Blake3,
        },
        format: images::format_of(&source, args.input.format.as_deref()),
        options,
        disks: &args.disk,
        threads: args.threads.count(),
    };
    let mut display = Display::new(args.messages.mode(), interrupt);
    if is_last {
        display = display.forgetting_secrets_at(Phase::Checksum);
    }
    let (opened, found) = checksum(registry, &source.location, &request, &display, &interrupt.token())?;
    imgtool_engine::open::check_member(args.input.member.as_deref(), std::iter::once(&opened))?;
    chosen::check(&opened, &source.backing)?;
    if !args.messages.quiet {
        images::note_unrecognised(&opened);
        opened.image.info().notes.iter().for_each(|note| report::note(note));
        opened.changes().iter().for_each(|change| report::note(change));
    }
    let is_archive = opened.driver.capabilities().is_archive();
    let line = |found: imgtool_engine::checksum::DeviceChecksum| Line {
        filename: images::typed(path.as_os_str()),
        device: found.device,
        virtual_size: found.virtual_size,
        algorithm: request.algorithm.name(),
        digest: found.digest,
        is_archive,
    };
    Ok(found.into_iter().map(line).collect())
}
