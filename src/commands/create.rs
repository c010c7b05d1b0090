//! `imgtool create`: an empty image, or one that shows what its backing file holds.

use std::path::Path;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::pipeline::{self, Job, Route};
use imgtool_toolkit::{
    CreateOptions, DeviceId, Error, ImageSource, Manifest, NoProgress, OpenOptions, Outputs, Registry,
    Result, ResultExt,
};
use serde::Serialize;

use super::{extras, options};
use crate::args::CreateArgs;
use crate::exit::Exit;
use crate::images::{self, Blank};
use crate::interrupt::Interrupt;
use crate::{drivers, report};

/// What was made, in JSON.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document<'a> {
    filename: String,
    format: &'a str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<&'a str>,
    notes: Vec<String>,
}

/// Makes an empty image.
///
/// # Errors
/// When it can't be made; nothing is left then.
pub fn run(args: &CreateArgs) -> Result<Exit> {
    images::refuse_objects(&args.object)?;
    let registry = drivers::registry();
    let by_name = args.path.as_deref().and_then(|path| options::driver_by_name(&registry, path));
    let driver = match (&args.format, by_name) {
        (Some(name), _) => images::driver(&registry, name)?,
        (None, Some(driver)) => driver,
        (None, None) => {
            args.path.iter().try_for_each(|path| images::check_name(&registry, path, "-f "))?;
            registry.get("raw")?
        }
    };
    if options::asks_for_help(&args.options) {
        return options::list(&*driver);
    }
    let mut create = options::create_options(&args.options, None)?;
    extras::add_backing(&mut create, args.backing.as_deref(), args.backing_format.as_deref())?;
    driver.check_options(&create)?;
    let Some(path) = &args.path else {
        return Err(Error::usage("PATH is needed").hint("imgtool create -f FMT PATH SIZE"));
    };
    if path == Path::new("-") {
        return Err(Error::usage("an empty image is made as a file, not on standard output")
            .hint("imgtool create -f FMT PATH SIZE"));
    }
    let size = size(&registry, args, path, &create)?;

    let interrupt = Interrupt::listen()?;
    let mut outputs = Outputs::new();
    interrupt.cleans(outputs.cleaner());
    let backing = extras::backing_path(path, &create)?;
    backing.iter().try_for_each(|path| outputs.protect(path))?;
    let mut blank = Blank::new(&images::stem(&registry, path), size);
    let manifest = Manifest { devices: blank.info().devices.clone(), attachments: Vec::new() };
    let output = outputs.create(path, args.force)?;
    if let Some(data_file) = extras::create_data_file(path, &create, &mut outputs, args.force)? {
        create.extras.outputs.insert(extras::DATA_FILE.to_owned(), data_file);
    }
    let sink = driver.create(output, &manifest, &create).in_file(path)?;
    sink.begin()?;
    // Over a backing file nothing is written: zeros would hide it.
    if backing.is_none() {
        let only = Route { from: DeviceId(0), to: DeviceId(0) };
        let job = Job { routes: vec![only], threads: 1, progress: &NoProgress, cancel: interrupt.token() };
        pipeline::copy(&mut blank, &*sink, &job)?;
    }
    sink.finish()?;
    interrupt.shielded(|| outputs.commit())?;
    let document = Document {
        filename: path.to_string_lossy().into_owned(),
        format: driver.name(),
        virtual_size: size,
        backing_filename: create.get(extras::BACKING_FILE),
        notes: sink.notes(),
    };
    if args.output.is_json() {
        report::print_json(&document)?;
    } else if !args.quiet {
        let below = document.backing_filename.map(|name| format!(", on {}", escape_control(name)));
        let size = report::exact_size(size);
        let what = format!("{}, {size}{}", driver.name(), below.unwrap_or_default());
        report::print(&format!("{}: {what}\n", images::show(path)))?;
        document.notes.iter().for_each(|note| report::note(note));
    }
    Ok(Exit::Done)
}

/// SIZE, or the size of the backing file.
fn size(registry: &Registry, args: &CreateArgs, path: &Path, create: &CreateOptions) -> Result<u64> {
    let is_size = |text: &str| options::size(text).is_ok();
    if let (Some(first), Some(second)) = (path.to_str(), args.size.as_deref())
        && is_size(first)
        && !is_size(second)
    {
        return Err(Error::usage(format!("'{second}' is not a size"))
            .hint(format!("SIZE comes last: imgtool create {second} {first}")));
    }
    let given = args.size.as_deref().map(options::size).transpose()?;
    let missing = || Error::usage("SIZE is needed").hint("imgtool create -f FMT PATH SIZE");
    if args.unsafe_backing {
        return given.ok_or_else(missing);
    }
    // Its own backing files are not looked for.
    let facts = OpenOptions { info_only: true, ..OpenOptions::default() };
    let base = extras::open_base(registry, path, create, &facts)?;
    let devices = base.as_ref().map(|base| base.source.info().devices.as_slice());
    match (given, devices) {
        (_, Some(devices)) if devices.len() != 1 => {
            Err(Error::unsupported(format!("the backing file holds {} devices, not one", devices.len())))
        }
        (Some(size), _) => Ok(size),
        (None, Some([device])) => Ok(device.size),
        (None, _) => Err(missing()),
    }
}
