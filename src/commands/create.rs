//! `imgtool create`: creates an empty image, or an overlay on a backing image.

use std::ffi::OsStr;
use std::path::Path;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, Location, Registry, Result};
use imgtool_engine::create::{self, CreateRequest};
use imgtool_engine::{Phase, TargetFormat, format};
use serde::Serialize;

use super::options;
use crate::args::{CreateArgs, ProgressMode};
use crate::exit::Exit;
use crate::interrupt::Interrupt;
use crate::progress::Display;
use crate::sandbox::{self, Writes};
use crate::secrets::SecretSource;
use crate::{compat, images, report, secrets};

/// JSON document that describes the new image.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Document<'a> {
    filename: String,
    format: &'a str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<String>,
    notes: Vec<String>,
}

/// Creates an image.
///
/// # Errors
/// If the image can't be created. No incomplete image is left behind then.
pub fn run(args: &CreateArgs) -> Result<Exit> {
    refuse(args)?;
    let registry = imgtool::registry();
    let location = args.path.as_deref().map(|path| Location::target(path.as_os_str()));
    let word = args.format.as_deref().or(compat::default_format());
    let driver = format::by_word_or_name(&registry, word, location.as_ref())?;
    if options::asks_for_help(&args.options) {
        return options::list(&*driver);
    }
    let mut format_options = options::format_options(&args.options, None)?;
    format_options.blank = true;
    format_options.formats = registry.clone();
    let key = options::take_key_secret(&mut format_options, &args.object)?;
    format_options.secret = args.target_secret.as_ref().map(SecretSource::read).transpose()?.or(key);
    let has_secret = format_options.secret.is_some();
    options::set_backing(&mut format_options, args.backing.as_deref(), args.backing_format.as_deref());
    let option_size = options::take_size(&mut format_options)?;
    let pairs = format_options.pairs.clone();
    sandbox::enter(Writes::to(&location, &format_options.pairs));
    let format = TargetFormat::new(driver, format_options)
        .map_err(|e| options::explain_backing(e, &registry, location.as_ref(), &pairs))?;
    options::check_secret(&format, has_secret)?;
    let (Some(path), Some(location)) = (&args.path, location) else {
        return Err(Error::usage("missing PATH").hint("imgtool create -f FMT PATH SIZE"));
    };
    let stated_size = size(&registry, args, option_size, path, &location, &format)?;
    let size = compat::new_size(stated_size);
    // A URL gets here, and is refused as a path that does not exist.
    let path = location.path().unwrap_or(path);
    let backing_filename = format.writer.backing().map(|backing| backing.name);
    let format_name = format.driver.name();

    let interrupt = Interrupt::listen()?;
    let request = CreateRequest {
        path: path.to_owned(),
        format,
        size,
        overwrite: args.force || compat::is_on(),
        force: args.force,
        keep_device: compat::is_on(),
    };
    let display = Display::new(ProgressMode::None, &interrupt).forgetting_secrets_at(Phase::Convert);
    let made = create::create(&registry, request, &display, &interrupt.token())?;
    let document = Document {
        filename: path.to_string_lossy().into_owned(),
        format: format_name,
        virtual_size: size,
        backing_filename,
        notes: made.notes.iter().map(ToString::to_string).collect(),
    };
    print(args, &document, stated_size, &pairs);
    Ok(Exit::Done)
}

/// Describes the new image, which has the options `pairs`, and of which the user wanted `stated_size` bytes.
fn print(args: &CreateArgs, document: &Document<'_>, stated_size: u64, pairs: &[(String, String)]) {
    if args.output.is_json() {
        report::note_unprinted(report::print_json(document));
    } else if !args.quiet && compat::is_on() {
        let name = args.path.as_deref().map(|path| images::show(path.as_os_str())).unwrap_or_default();
        report::note_unprinted(report::print(&formatting(&name, document.format, stated_size, pairs)));
    } else if !args.quiet {
        let below = document.backing_filename.as_ref().map(|name| format!(", on {}", escape_control(name)));
        let size = report::exact_size(document.virtual_size);
        let what = format!("{}, {size}{}", document.format, below.unwrap_or_default());
        let line = format!("{}: {what}\n", images::show(OsStr::new(&document.filename)));
        report::note_unprinted(report::print(&line));
        document.notes.iter().for_each(|note| report::note(note));
    }
}

/// Returns the line that qemu-img prints, with the name as the user wrote it.
fn formatting(name: &str, format: &str, size: u64, pairs: &[(String, String)]) -> String {
    let pairs: String =
        pairs.iter().map(|(key, value)| format!(" {key}={}", escape_control(value))).collect();
    let format = compat::format_name(format);
    format!("Formatting '{name}', fmt={format} size={size}{pairs}\n")
}

/// Refuses objects, and names that are no path.
fn refuse(args: &CreateArgs) -> Result<()> {
    secrets::check_objects(&args.object)?;
    args.path.iter().try_for_each(|path| images::refuse_protocol(path.as_os_str()))?;
    match args.path.as_deref().is_some_and(|path| path == Path::new("-")) {
        true => {
            Err(Error::usage("cannot create an image on standard output")
                .hint("imgtool create -f FMT PATH SIZE"))
        }
        false => Ok(()),
    }
}

/// Returns the size in bytes if SIZE or the option `size` states it, otherwise the virtual size of the backing
/// image.
fn size(
    registry: &Registry,
    args: &CreateArgs,
    option_size: Option<u64>,
    path: &Path,
    location: &Location,
    format: &TargetFormat,
) -> Result<u64> {
    let is_size = |text: &str| options::size(text).is_ok();
    if let (Some(first), Some(second)) = (path.to_str(), args.size.as_deref())
        && is_size(first)
        && !is_size(second)
    {
        return Err(Error::usage(format!("'{second}' is not a size"))
            .hint(format!("SIZE comes last: imgtool create {second} {first}")));
    }
    let size = args.size.as_deref().map(options::size).transpose()?;
    if size.is_some() && option_size.is_some() {
        return Err(Error::usage("the size is given twice: as SIZE and as -o size"));
    }
    let size = size.or(option_size);
    let missing = || Error::usage("missing SIZE").hint("imgtool create -f FMT PATH SIZE");
    if args.unsafe_backing {
        return size.ok_or_else(missing);
    }
    let backing_size = create::backing_size(registry, location, format)?;
    size.or(backing_size).ok_or_else(missing)
}
