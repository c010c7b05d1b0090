//! `imgtool measure`: how many bytes an image will need, before any is written.

use imgtool_toolkit::{Error, ImageSource, OpenOptions, Registry, Result};

use super::options;
use crate::args::MeasureArgs;
use crate::exit::Exit;
use crate::images::{self, Blank};
use crate::{drivers, report};

/// Prints what an image will need.
///
/// # Errors
/// When the source can't be read, or the format does not measure.
pub fn run(args: &MeasureArgs) -> Result<Exit> {
    let registry = drivers::registry();
    let driver = images::driver(&registry, args.to.as_deref().unwrap_or("raw"))?;
    if options::asks_for_help(&args.options) {
        return options::list(&*driver);
    }
    let create = options::create_options(&args.options, None)?;
    driver.check_options(&create)?;
    let source = source(&registry, args)?;
    let measure = driver.measure(&*source, &create)?;
    if args.output.is_json() {
        report::print_json(&measure)?;
    } else {
        report::print(&format!(
            "required size: {}\nfully allocated size: {}\n",
            measure.required, measure.fully_allocated
        ))?;
    }
    Ok(Exit::Done)
}

fn source(registry: &Registry, args: &MeasureArgs) -> Result<Box<dyn ImageSource>> {
    match (&args.image, &args.size) {
        (Some(image), _) => {
            let options = OpenOptions {
                snapshot: args.snapshot.snapshot.as_deref().map(images::snapshot_name),
                ..images::open_options(registry, &args.input)?
            };
            Ok(images::open_random(registry, image, args.input.format.as_deref(), &options)?.source)
        }
        (None, Some(size)) => {
            images::refuse(&args.input)?;
            Ok(Box::new(Blank::new("disk", options::size(size)?)))
        }
        (None, None) => Err(Error::usage("there is no image to measure").hint("name one, or give --size")),
    }
}
