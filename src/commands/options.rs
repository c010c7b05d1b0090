//! Parsers for `-o`, `-S`, `-c` and sizes, shared by several commands.

use imgtool_core::error::escape_control;
use imgtool_core::{
    Compress, Driver, Error, Location, OptionKind, OptionSpec, OptionValues, Registry, Remedy, Result, Secret,
};
use imgtool_engine::{FormatOptions, TargetFormat, create};

use super::formats;
use crate::compat::{self, parse_size};
use crate::exit::Exit;
use crate::{report, secrets};

/// `-S` must be a multiple of this many bytes, as in qemu-img.
const SECTOR: u64 = 512;

/// Maximum value of `-S` in bytes. QEMU's limit.
const MAX_SPARSE: u64 = 16 << 20;

/// Options of every new image: those that qemu-img adds to the options of each format.
const COMMON: &[OptionSpec] = &[SIZE, NO_COPY_ON_WRITE, EXTENT_SIZE_HINT];

const SIZE: OptionSpec = OptionSpec {
    name: "size",
    help: "virtual size, for create; a converted image has the size of its source",
    default: "none",
    kind: OptionKind::Text("a size"),
};

const NO_COPY_ON_WRITE: OptionSpec = OptionSpec {
    name: "nocow",
    help: "do not copy the file's blocks when they are written again (btrfs)",
    default: "off",
    kind: OptionKind::Flag,
};

const EXTENT_SIZE_HINT: OptionSpec = OptionSpec {
    name: "extent_size_hint",
    help: "accepted for compatibility, no effect: the file system chooses its extents",
    default: "0",
    kind: OptionKind::Text("a size"),
};

/// Prints the list for `-o help`.
pub fn list(driver: &dyn Driver) -> Result<Exit> {
    let mut text = match driver.options() {
        [] => format!("{} has no options of its own\n", driver.name()),
        options => format!("Options of {} (-o):\n{}", driver.name(), formats::options(2, options)),
    };
    text.push_str(&format!("Options of every format:\n{}", formats::options(2, COMMON)));
    report::print(&text)?;
    Ok(Exit::Done)
}

/// Collects the values of `-o`, `-S` and SOURCE_DATE_EPOCH. If a key occurs twice, the last value counts. The
/// driver parses the keys and values of `-o`; `size` is left to [`take_size`].
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if `-S`, SOURCE_DATE_EPOCH or an option of every format is not valid.
pub fn format_options(options: &[String], sparse_size: Option<&str>) -> Result<FormatOptions> {
    let mut format_options = FormatOptions {
        source_date_epoch: source_date_epoch()?,
        sparse_granularity: sparse_size.map(sparse).transpose()?,
        plain_names: compat::is_on(),
        ..FormatOptions::default()
    };
    options.iter().try_for_each(|text| compat::check_options(text))?;
    for (key, value) in options.iter().flat_map(|text| split_options(text)) {
        set(&mut format_options, &key, &value);
    }
    let common = take(&mut format_options, &[NO_COPY_ON_WRITE, EXTENT_SIZE_HINT])?;
    common.text(EXTENT_SIZE_HINT.name).map(size).transpose()?;
    format_options.no_copy_on_write = common.flag(NO_COPY_ON_WRITE.name) == Some(true);
    Ok(format_options)
}

/// Removes the option `size` and returns its value.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if it is no size.
pub fn take_size(options: &mut FormatOptions) -> Result<Option<u64>> {
    take(options, &[SIZE])?.text(SIZE.name).map(size).transpose()
}

/// Removes the options with these declarations and parses their values.
fn take(options: &mut FormatOptions, specs: &'static [OptionSpec]) -> Result<OptionValues> {
    let is_taken = |(key, _): &(String, String)| specs.iter().any(|spec| spec.name == key);
    let (taken, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut options.pairs).into_iter().partition(is_taken);
    options.pairs = rest;
    let pairs = taken.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    OptionValues::parse("every format", specs, pairs)
}

/// Sets the options `backing_file` and `backing_fmt` to the values of `-B`/`-b` and `-F`, which win over `-o`, as in
/// qemu-img.
pub fn set_backing(options: &mut FormatOptions, file: Option<&str>, format: Option<&str>) {
    for (key, value) in [("backing_file", file), ("backing_fmt", format)] {
        value.into_iter().for_each(|value| set(options, key, value));
    }
}

/// Completes the error of an image at `location` whose options state a backing file without its format.
pub fn explain_backing(
    error: Error,
    registry: &Registry,
    location: Option<&Location>,
    pairs: &[(String, String)],
) -> Error {
    let is_missing =
        matches!(error.remedy(), Some(Remedy::SetOption(option)) if option == "backing_fmt=FORMAT");
    let file = pairs.iter().find(|(key, _)| key == "backing_file").filter(|_| is_missing);
    let found = file.zip(location).and_then(|((_, file), location)| {
        let format = create::backing_format(registry, location, file)?;
        Some((escape_control(file), format))
    });
    match found {
        Some((file, format)) => Error::usage(error.message())
            .hint(format!("'{file}' looks like {format}; if that is right, add -F {format}")),
        None => error,
    }
}

/// Removes qemu-img's options for the passphrase of a new image, `key-secret` and `encrypt.key-secret`. Returns the
/// passphrase of the object that they name.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if there is no such object; if the passphrase can't be read.
pub fn take_key_secret(options: &mut FormatOptions, objects: &[String]) -> Result<Option<Secret>> {
    let is_key = |(key, _): &(String, String)| key == "key-secret" || key == "encrypt.key-secret";
    let id = options.pairs.iter().find(|pair| is_key(pair)).map(|(_, id)| id.clone());
    options.pairs.retain(|pair| !is_key(pair));
    id.map(|id| secrets::of_object(objects, &id)).transpose()
}

/// Refuses a passphrase for an output that is not encrypted: it would be taken for one that is.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if `has_secret` and the format does not encrypt.
pub fn check_secret(format: &TargetFormat, has_secret: bool) -> Result<()> {
    if !has_secret || format.writer.encrypts() {
        return Ok(());
    }
    let name = format.driver.name();
    Err(Error::usage(format!("--target-secret is given, but the output is {name} without encryption"))
        .hint("use -o encrypt=luks with qcow2 or raw, or -O luks"))
}

/// Sets an option. A later value replaces an earlier one.
fn set(options: &mut FormatOptions, key: &str, value: &str) {
    options.pairs.retain(|(known, _)| known != key);
    options.pairs.push((key.to_owned(), value.to_owned()));
}

/// Sets an option that has no value yet.
pub fn set_default(options: &mut FormatOptions, key: &str, value: &str) {
    if !options.pairs.iter().any(|(known, _)| known == key) {
        set(options, key, value);
    }
}

/// Parses the value of `-c`, `ALG[:LEVEL]`. An empty algorithm or a missing level means the format's default.
pub fn compress(text: &str) -> Result<Compress> {
    let (algorithm, level) = match text.split_once(':') {
        Some((algorithm, level)) => (algorithm, Some(level)),
        None => (text, None),
    };
    let level = level
        .map(|level| {
            level.parse::<i32>().map_err(|_| {
                Error::usage(format!("invalid compression level '{level}': expected a whole number"))
            })
        })
        .transpose()?;
    Ok(Compress { algorithm: (!algorithm.is_empty()).then(|| algorithm.to_owned()), level })
}

/// Parses the value of `-S` into bytes, with the bounds of qemu-img.
fn sparse(text: &str) -> Result<u64> {
    let size = parse_size(text).ok_or_else(|| {
        Error::usage(format!("invalid value '{text}' for -S: expected a size such as 4k, 64k or 0"))
    })?;
    if size % SECTOR != 0 || size > MAX_SPARSE {
        return Err(Error::usage(format!(
            "invalid value {size} for -S: expected 0 or a multiple of {SECTOR} up to {MAX_SPARSE}"
        )));
    }
    Ok(size)
}

/// Parses a size from the command line into bytes.
pub fn size(text: &str) -> Result<u64> {
    parse_size(text).ok_or_else(|| {
        Error::usage(format!("invalid size '{text}': expected a number such as 512M or 1.5G"))
            .hint("suffixes: k, M, G, T, P, E (powers of 1024)")
    })
}

/// Returns the value of SOURCE_DATE_EPOCH (<https://reproducible-builds.org>), in seconds since 1970, if set.
pub fn source_date_epoch() -> Result<Option<i64>> {
    match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) if !text.is_empty() => text.parse().map(Some).map_err(|_| {
            Error::usage(format!("invalid SOURCE_DATE_EPOCH '{text}': expected a whole number of seconds"))
        }),
        _ => Ok(None),
    }
}

/// Splits `K=V,K=V` like qemu-img: `,,` stands for a comma in a value. A key without a value is on, or off behind
/// `no`.
pub fn split_options(text: &str) -> Vec<(String, String)> {
    let parts = text.replace(",,", "\u{0}");
    parts
        .split(',')
        .filter(|part| !part.is_empty())
        .map(|part| {
            let part = part.replace('\u{0}', ",");
            match part.split_once('=') {
                Some((key, value)) => (key.to_owned(), value.to_owned()),
                None => flag(&part),
            }
        })
        .collect()
}

/// Interprets a key without a value. `nocow` is a key by itself; for qemu-img, even that one is `cow` behind `no`.
fn flag(text: &str) -> (String, String) {
    match text.strip_prefix("no").filter(|_| text != NO_COPY_ON_WRITE.name || compat::is_on()) {
        Some(key) => (key.to_owned(), "off".to_owned()),
        None => (text.to_owned(), "on".to_owned()),
    }
}

/// True if the options contain `help` or `?`.
pub fn asks_for_help(options: &[String]) -> bool {
    options.iter().flat_map(|text| text.split(',')).any(|part| part == "help" || part == "?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_split_like_qemu_img() {
        assert_eq!(
            split_options("a=1,b=x,,y,c,nod,nocow"),
            [("a", "1"), ("b", "x,y"), ("c", "on"), ("d", "off"), ("nocow", "on")]
                .map(|(k, v)| (k.to_owned(), v.to_owned()))
        );
        assert!(asks_for_help(&["a=1,help".to_owned()]));
        assert!(!asks_for_help(&["helper=1".to_owned()]));
    }

    #[test]
    fn last_value_of_an_option_counts() {
        let given = ["a=1,b=2,size=1M,nocow=on".to_owned(), "a=3,size=2M,extent_size_hint=64k".to_owned()];
        let mut options = format_options(&given, None).expect("options");
        assert_eq!(take_size(&mut options).expect("a size"), Some(2 << 20));
        assert!(options.no_copy_on_write);
        set_backing(&mut options, None, Some("raw"));
        let pairs = [("b", "2"), ("a", "3"), ("backing_fmt", "raw")];
        assert_eq!(options.pairs, pairs.map(|(k, v)| (k.to_owned(), v.to_owned())));
        assert!(format_options(&["nocow=perhaps".to_owned()], None).is_err());
    }

    #[test]
    fn parses_compression_algorithm_and_level() {
        let parsed = |text| compress(text).map(|c| (c.algorithm, c.level)).ok();
        assert_eq!(parsed(""), Some((None, None)));
        assert_eq!(parsed("zstd:-3"), Some((Some("zstd".to_owned()), Some(-3))));
        assert_eq!(parsed(":9"), Some((None, Some(9))));
        assert_eq!(parsed("zstd:x"), None);
    }
}
