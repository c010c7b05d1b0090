//! `imgtool measure`: prints the file size that a new image will need.

use imgtool_core::{Error, Measure, OpenOptions, Registry, Result};
use imgtool_engine::measure::{DiskMeasure, Estimate, MeasureRequest, Prediction};
use imgtool_engine::{Reach, TargetFormat, create};
use serde::Serialize;

use super::options;
use crate::args::MeasureArgs;
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::report::{Align, exact_size, human_size, percent};
use crate::{images, report, sandbox};

/// File sizes in bytes, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate: Option<EstimateDocument>,
    /// Empty unless the source is an archive.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    devices: Vec<DeviceDocument<'a>>,
}

/// Estimate with compression, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct EstimateDocument {
    bytes: u64,
    method: &'static str,
    data: u64,
    sampled: u64,
}

/// Sizes of one disk, as JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DeviceDocument<'a> {
    name: &'a str,
    required: u64,
    fully_allocated: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate: Option<u64>,
}

/// Prints the file size that a new image will need, and its size when fully allocated.
///
/// # Errors
/// If the source can't be read, or the format can't be measured.
pub fn run(args: &MeasureArgs) -> Result<Exit> {
    let registry = images::registry(&args.input)?;
    let driver = registry.get(args.to.as_deref().unwrap_or("raw"))?;
    if options::asks_for_help(&args.options) {
        return options::list(&*driver);
    }
    let compress = args.compress.as_deref().map(options::compress).transpose()?;
    let mut format_options = options::format_options(&args.options, None)?;
    // As in qemu-img, the size to measure is that of the image or of --size.
    options::take_size(&mut format_options)?;
    options::take_key_secret(&mut format_options, &args.input.object)?;
    let format = TargetFormat::choose(&registry, Some(driver.name()), None, compress, format_options)?;
    match (&args.image, &args.size) {
        (Some(image), _) => measure_image(&registry, args, image.as_os_str(), &format),
        (None, Some(size)) => {
            images::refuse(&args.input)?;
            let total = create::measure_empty(&format, options::size(size)?)?;
            print(args, &Prediction { disks: Vec::new(), total, estimate: None }, false).map(|()| Exit::Done)
        }
        (None, None) => Err(Error::usage("missing IMAGE").hint("name an image, or give --size")),
    }
}

fn measure_image(
    registry: &Registry,
    args: &MeasureArgs,
    image: &std::ffi::OsStr,
    format: &TargetFormat,
) -> Result<Exit> {
    let options = OpenOptions {
        snapshot: args.snapshot.snapshot.clone(),
        bitmaps: format.writer.stores_bitmaps(),
        // Samples are content.
        layout_only: args.compress.is_none(),
        ..images::open_options(registry, &args.input)?
    };
    let interrupt = Interrupt::listen()?;
    let opened = images::open_random(registry, &args.input, image, &options)?;
    sandbox::narrow(&Reach::default());
    let devices = opened.select(&args.disk)?;
    let request = MeasureRequest {
        registry,
        format,
        image: &opened.image,
        devices: &devices,
        compressed: args.compress.is_some(),
        threads: args.threads.count(),
        cancel: &interrupt.token(),
        memory: &options.memory,
    };
    let prediction = request.predict().map_err(|error| error.path(&opened.location))?;
    print(args, &prediction, opened.driver.capabilities().is_archive())?;
    Ok(Exit::Done)
}

/// Prints the sizes; those of each disk if the source is an archive.
fn print(args: &MeasureArgs, prediction: &Prediction, is_archive: bool) -> Result<()> {
    let Prediction { disks, total, estimate } = prediction;
    let Measure { required, fully_allocated, bitmaps, .. } = *total;
    if args.output.is_json() {
        return report::print_json(&Document {
            required,
            fully_allocated,
            bitmaps,
            estimate: estimate.map(|Estimate { bytes, data, sampled }| EstimateDocument {
                bytes,
                method: "sampled",
                data,
                sampled,
            }),
            devices: disks.iter().filter(|_| is_archive).map(device).collect(),
        });
    }
    let mut text = if disks.len() > 1 { table(disks) + "\n" } else { String::new() };
    text += &format!("required size: {required}\nfully allocated size: {fully_allocated}\n");
    if let Some(bytes) = bitmaps {
        text += &format!("bitmaps size: {bytes}\n");
    }
    if let Some(Estimate { bytes, data, sampled }) = estimate {
        let share = percent(*sampled, *data);
        text += &format!("compressed size, estimated: {}\n", exact_size(*bytes));
        text += &format!(
            "  method: compressed {} of the data ({} of {}) with the settings of the output\n",
            share,
            human_size(*sampled),
            human_size(*data)
        );
    }
    report::print(&text)
}

fn device(disk: &DiskMeasure) -> DeviceDocument<'_> {
    DeviceDocument {
        name: &disk.name,
        required: disk.size.required,
        fully_allocated: disk.size.fully_allocated,
        estimate: disk.estimate,
    }
}

fn table(disks: &[DiskMeasure]) -> String {
    let mut columns =
        vec![("device", Align::Left), ("required", Align::Right), ("fully allocated", Align::Right)];
    let has_estimates = disks.iter().any(|disk| disk.estimate.is_some());
    if has_estimates {
        columns.push(("estimated", Align::Right));
    }
    let row = |disk: &DiskMeasure| {
        let mut row =
            vec![disk.name.clone(), human_size(disk.size.required), human_size(disk.size.fully_allocated)];
        if has_estimates {
            row.push(disk.estimate.map(human_size).unwrap_or_default());
        }
        row
    };
    report::table(0, &columns, &disks.iter().map(row).collect::<Vec<_>>())
}
