//! `imgtool measure`: prints the file size that a new image will need.

use imgtool_core::{Error, Measure, OpenOptions, Registry, Result};
use imgtool_engine::{Reach, TargetFormat, create, foreign};
use serde::Serialize;

use super::options;
use crate::args::MeasureArgs;
use crate::exit::Exit;
use crate::{images, report, sandbox};

/// File sizes in bytes, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document {
    required: u64,
    fully_allocated: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
}

/// Prints the file size that a new image will need, and its size when fully allocated.
///
/// # Errors
/// If the source can't be read, or the format can't be measured.
pub fn run(args: &MeasureArgs) -> Result<Exit> {
    let registry = imgtool::registry();
    let driver = foreign::driver(&registry, args.to.as_deref().unwrap_or("raw"))?;
    if options::asks_for_help(&args.options) {
        return options::list(&*driver);
    }
    let format = TargetFormat::new(driver, options::format_options(&args.options, None)?)?;
    let Measure { required, fully_allocated, bitmaps, .. } = measure(&registry, args, &format)?;
    if args.output.is_json() {
        report::print_json(&Document { required, fully_allocated, bitmaps })?;
    } else {
        let bitmaps = bitmaps.map_or_else(String::new, |bytes| format!("bitmaps size: {bytes}\n"));
        let sizes = format!("required size: {required}\nfully allocated size: {fully_allocated}\n{bitmaps}");
        report::print(&sizes)?;
    }
    Ok(Exit::Done)
}

fn measure(registry: &Registry, args: &MeasureArgs, format: &TargetFormat) -> Result<Measure> {
    match (&args.image, &args.size) {
        (Some(image), _) => {
            let options = OpenOptions {
                snapshot: args.snapshot.snapshot.as_deref().map(images::snapshot_name),
                bitmaps: format.writer.stores_bitmaps(),
                layout_only: true,
                ..images::open_options(registry, &args.input)?
            };
            let format_name = args.input.format.as_deref();
            let opened = images::open_random(registry, image.as_os_str(), format_name, &options)?;
            sandbox::narrow(&Reach::default());
            create::measure(format, &*opened.image)
        }
        (None, Some(size)) => {
            images::refuse(&args.input)?;
            create::measure_empty(format, options::size(size)?)
        }
        (None, None) => Err(Error::usage("missing IMAGE").hint("name an image, or give --size")),
    }
}
