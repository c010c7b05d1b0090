//! `imgtool checksum`: a digest of each device's content, the same in every format.
//!
//! Content is read by many threads and digested in its order: the pipeline's `place` step.

use std::fs;
use std::path::Path;

use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{Device, DeviceId, Error, OpenOptions, Opened, Registry, Result, ResultExt};
use serde::Serialize;

use crate::args::ChecksumArgs;
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::{Lane, Meter};
use crate::{drivers, images, report};

mod sink;

use sink::DigestSink;

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
/// When an image can't be read.
pub fn run(args: &ChecksumArgs) -> Result<Exit> {
    let registry = drivers::registry();
    let options = OpenOptions {
        snapshot: args.snapshot.snapshot.as_deref().map(images::snapshot_name),
        ..images::open_options(&registry, &args.input)?
    };
    let interrupt = Interrupt::listen()?;
    let mut lines = Vec::new();
    for path in &args.images {
        for line in digest_image(&registry, path, args, &options, &interrupt)? {
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

/// As sha256sum and b3sum print it; a device of an archive stands behind the archive's name.
fn human(line: &Line) -> String {
    let name =
        if line.is_archive { format!("{}:{}", line.filename, line.device) } else { line.filename.clone() };
    format!("{}  {}\n", line.digest, imgtool_toolkit::error::escape_control(&name))
}

fn digest_image(
    registry: &Registry,
    path: &Path,
    args: &ChecksumArgs,
    options: &OpenOptions,
    interrupt: &Interrupt,
) -> Result<Vec<Line>> {
    let format = args.input.format.as_deref();
    let mut opened = images::open(registry, path, format, options)?;
    let devices = images::select(&opened, &args.disk)?;
    let mut result = digest(&mut opened, &devices, args, interrupt);
    let is_file = fs::metadata(path).is_ok_and(|meta| meta.is_file());
    if result.as_ref().is_err_and(sink::is_out_of_order) && is_file {
        // An archive may bring its clusters in any order; only a copy can be read in that of the disk.
        opened = images::open_random(registry, path, format, options)?;
        result = digest(&mut opened, &devices, args, interrupt);
    }
    let sink = result.in_file(path)?;
    let is_archive = opened.driver.capabilities().max_devices > 1;
    let line = |(device, (size, digest)): (&Device, (u64, String))| Line {
        filename: path.to_string_lossy().into_owned(),
        device: device.name.clone(),
        virtual_size: size,
        algorithm: sink::name(args.algorithm),
        digest,
        is_archive,
    };
    Ok(devices.iter().zip(sink.into_digests()?).map(line).collect())
}

fn digest(
    opened: &mut Opened,
    devices: &[Device],
    args: &ChecksumArgs,
    interrupt: &Interrupt,
) -> Result<DigestSink> {
    let lane = |device: &Device| Lane::new(&*device.name, (!device.open_ended).then_some(device.size));
    let lanes = devices.iter().map(lane).collect();
    let mut meter = Meter::start(args.messages.mode(), "checksum", lanes, None, || 0);
    let routes: Vec<Route> =
        (0..).zip(devices).map(|(number, device)| Route { from: device.id, to: DeviceId(number) }).collect();
    let sink = DigestSink::new(args.algorithm, devices);
    let job =
        Job { routes, threads: args.threads.count(), progress: meter.progress(), cancel: interrupt.token() };
    pipeline::copy(&mut *opened.source, &sink, &job)?;
    meter.finish();
    Ok(sink)
}

/// What a stream that does not bring a disk in its order leads to.
fn out_of_order(device: &str) -> Error {
    Error::unsupported(sink::OUT_OF_ORDER).device(device).hint("save the stream to a file first")
}
