//! `imgtool create`: an empty image.

use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{
    DeviceId, Error, ImageSource, Manifest, NoProgress, Outputs, Result, ResultExt, parse_size,
};

use super::options;
use crate::args::CreateArgs;
use crate::exit::Exit;
use crate::images::{self, Blank};
use crate::interrupt::Interrupt;
use crate::{drivers, report};

/// Makes an empty image.
///
/// # Errors
/// When it can't be made; nothing is left then.
pub fn run(args: &CreateArgs) -> Result<Exit> {
    let registry = drivers::registry();
    let by_name = args.path.as_deref().and_then(|path| options::driver_by_name(&registry, path));
    let driver = match (&args.format, by_name) {
        (Some(name), _) => registry.get(name)?,
        (None, Some(driver)) => driver,
        (None, None) => registry.get("raw")?,
    };
    if options::asks_for_help(&args.options) {
        return options::list(&*driver);
    }
    let create = options::create_options(&args.options, None)?;
    create.check_names(driver.name(), driver.options())?;
    let (Some(path), Some(size)) = (&args.path, &args.size) else {
        return Err(Error::usage("PATH and SIZE are needed").hint("imgtool create -f FMT PATH SIZE"));
    };
    let size = parse_size(size)
        .ok_or_else(|| Error::usage(format!("a size is a number such as 512M or 20G, not '{size}'")))?;

    let interrupt = Interrupt::listen()?;
    let mut outputs = Outputs::new();
    interrupt.cleans(outputs.cleaner());
    let mut blank = Blank::new(&images::stem(&registry, path), size);
    let manifest = Manifest { devices: blank.info().devices.clone(), attachments: Vec::new() };
    let output = outputs.create(path, args.force)?;
    let sink = driver.create(output, &manifest, &create).in_file(path)?;
    sink.begin()?;
    let only = Route { from: DeviceId(0), to: DeviceId(0) };
    let job = Job { routes: vec![only], threads: 1, progress: &NoProgress, cancel: interrupt.token() };
    pipeline::copy(&mut blank, &*sink, &job)?;
    sink.finish()?;
    interrupt.shielded(|| outputs.commit())?;
    if !args.quiet {
        let name = images::show(path);
        report::print(&format!("{name}: {}, {}\n", driver.name(), report::exact_size(size)))?;
        sink.notes().iter().for_each(|note| report::note(note));
    }
    Ok(Exit::Done)
}
