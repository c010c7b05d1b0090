//! The files that an option of a new image names beside it: a backing file, a data file.
//!
//! Names are relative to the image's directory, as whoever reads the image will take them. The user
//! has typed them, so they may be opened; what the backing file names in turn needs leave like any
//! other name in an image.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{
    CreateOptions, Error, ImageSource, Input, OpenOptions, Opened, Output, Outputs, Registry, Result,
};

/// The option that names the image below.
pub const BACKING_FILE: &str = "backing_file";
/// The option that names its format.
pub const BACKING_FORMAT: &str = "backing_fmt";
/// The option that names the file beside.
pub const DATA_FILE: &str = "data_file";

/// Adds `-B`/`-b` and `-F`, which are two options of qcow2.
///
/// # Errors
/// When one of them is among the options already.
pub fn add_backing(create: &mut CreateOptions, file: Option<&str>, format: Option<&str>) -> Result<()> {
    for (key, value) in [(BACKING_FILE, file), (BACKING_FORMAT, format)] {
        if let Some(value) = value
            && create.options.insert(key.to_owned(), value.to_owned()).is_some()
        {
            return Err(Error::usage(format!("{key} is given twice")));
        }
    }
    Ok(())
}

/// Where the backing file of the image at `image` is, if it is to have one.
///
/// # Errors
/// When its name is not a path.
pub fn backing_path(image: &Path, options: &CreateOptions) -> Result<Option<PathBuf>> {
    options.get(BACKING_FILE).map(|name| beside(image, name)).transpose()
}

/// Opens the backing file of the image at `image`, if it is to have one.
///
/// # Errors
/// Those of [`Registry::open`].
pub fn open_base(
    registry: &Registry,
    image: &Path,
    create: &CreateOptions,
    open: &OpenOptions,
) -> Result<Option<Opened>> {
    let Some(path) = backing_path(image, create)? else { return Ok(None) };
    let Some(format) = create.get(BACKING_FORMAT) else {
        return Err(Error::usage("a backing file's format has to be named")
            .hint("-F FMT, or -o backing_file=FILE,backing_fmt=FMT"));
    };
    registry.open(Input::open_plain(&path)?, Some(format), open).map(Some)
}

/// Makes the data file of the image at `image`, if it is to have one.
///
/// # Errors
/// Those of [`Outputs::create`].
pub fn create_data_file(
    image: &Path,
    create: &CreateOptions,
    outputs: &mut Outputs,
    force: bool,
) -> Result<Option<Output>> {
    let Some(name) = create.get(DATA_FILE) else { return Ok(None) };
    outputs.create(&beside(image, name)?, force).map(Some)
}

/// The options with everything in them that the driver needs opened.
///
/// # Errors
/// When a file can't be opened or made.
pub fn with_extras(
    registry: &Registry,
    image: &Path,
    create: &CreateOptions,
    open: &OpenOptions,
    (outputs, force): (&mut Outputs, bool),
) -> Result<CreateOptions> {
    let mut create = create.clone();
    if let Some(output) = create_data_file(image, &create, outputs, force)? {
        create.extras.outputs.insert(DATA_FILE.to_owned(), output);
    }
    let base = open_base(registry, image, &create, open)?;
    create.extras.base = base.map(|opened| Arc::<dyn ImageSource>::from(opened.source));
    Ok(create)
}

/// A name relative to the image's directory.
fn beside(image: &Path, name: &str) -> Result<PathBuf> {
    // "json:{...}", "nbd://host": a scheme before any slash.
    let scheme = name.split_once(':').filter(|(scheme, _)| *scheme != "file" && !scheme.contains('/'));
    if scheme.is_some() || name.is_empty() {
        return Err(Error::unsupported(format!("'{}' is not a plain file name", escape_control(name)))
            .hint("only plain paths are followed; ./NAME for a name with a colon"));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(name.strip_prefix("file:").unwrap_or(name)))
}
