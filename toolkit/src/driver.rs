//! Drivers: what a format has to offer.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::device::Manifest;
use crate::error::{Error, Result};
use crate::external::Externals;
use crate::sink::ImageSink;
use crate::source::ImageSource;
use crate::storage::{Input, Output};
use crate::suggest;

/// One image format.
pub trait Driver: Send + Sync {
    /// Its name on the command line: lower case, no blanks.
    fn name(&self) -> &'static str;

    /// One line for a person.
    fn description(&self) -> &'static str;

    /// File name extensions without the dot; the first is given to outputs.
    fn extensions(&self) -> &'static [&'static str];

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The `-o` options of [`Driver::create`].
    fn options(&self) -> &'static [OptionSpec] {
        &[]
    }

    /// Refuses options that [`Driver::create`] would refuse, before anything is opened: unknown names,
    /// words that are not listed, and, where a driver adds that, values and options that exclude each
    /// other.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`].
    fn check_options(&self, options: &CreateOptions) -> Result<()> {
        options.check_names(self.name(), self.options())
    }

    /// Whether [`OpenOptions::snapshot`] is served: the others refuse it.
    fn reads_snapshots(&self) -> bool {
        false
    }

    /// Whether an image that begins with `head` (up to [`crate::storage::PROBE_LEN`] bytes) and is
    /// `len` bytes long, if that is known, is of this format.
    fn probe(&self, head: &[u8], len: Option<u64>) -> Option<Confidence>;

    /// Opens an image for reading. Checks everything that can be checked without reading data;
    /// what is not supported is refused here, by name.
    ///
    /// # Errors
    /// When the image is not of this format, is damaged, or needs what is not supported.
    fn open(&self, input: Input, options: &OpenOptions) -> Result<Box<dyn ImageSource>>;

    /// Begins an image. Options have passed [`Driver::check_options`].
    ///
    /// # Errors
    /// When the manifest or an option can't be expressed; nothing has been written then.
    fn create(
        &self,
        output: Output,
        manifest: &Manifest,
        options: &CreateOptions,
    ) -> Result<Box<dyn ImageSink>>;

    /// Checks the structure of an image, all of it.
    ///
    /// # Errors
    /// When it can't be checked; damage that was found is in the report instead.
    fn check(&self, _input: Input, _options: &OpenOptions) -> Result<CheckReport> {
        Err(Error::unsupported(format!("{} images have no structure to check", self.name())))
    }

    /// How many bytes an image made from `source` will need.
    ///
    /// # Errors
    /// When the source can't be read.
    fn measure(&self, _source: &dyn ImageSource, _options: &CreateOptions) -> Result<Measure> {
        Err(Error::unsupported(format!("{} does not measure", self.name())))
    }
}

/// What a driver can do: shown by `imgtool formats`, and what the conformance laws are chosen by.
#[derive(Debug, Clone, Copy, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Capabilities {
    /// Images can be read.
    pub read: bool,
    /// Images can be made.
    pub write: bool,
    /// An image can be read in one pass from a pipe.
    pub stream_read: bool,
    /// An image can be made in one pass into a pipe.
    pub stream_write: bool,
    /// The most devices an image holds.
    pub max_devices: u32,
    /// Images hold attachments.
    pub attachments: bool,
    /// `-c` compresses inside the format.
    pub compression: bool,
    /// An image can be made of a device whose size is not known before its end.
    pub open_ended: bool,
    /// Sizes are rounded up to a multiple of this many bytes.
    pub size_multiple: u64,
    /// Images have a structure that [`Driver::check`] checks.
    pub check: bool,
}

/// How sure a probe is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Confidence {
    /// Anything is legal in this format: taken when no other fits.
    Fallback,
    /// The magic number is there.
    Magic,
}

/// One `-o` option.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct OptionSpec {
    /// Its key.
    pub name: &'static str,
    /// One line for a person.
    pub help: &'static str,
    /// What holds when it is not given, for a person.
    pub default: &'static str,
    /// The allowed values, for a person ("512..2M, a power of two"), or an enumeration `a|b|c`.
    pub values: &'static str,
}

impl OptionSpec {
    /// The allowed values, if they are an enumeration of words; empty for numbers and names.
    pub fn words(&self) -> Vec<&'static str> {
        let words: Vec<&str> = self.values.split('|').collect();
        let is_word = |text: &&str| {
            text.starts_with(|c: char| c.is_ascii_alphabetic())
                && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'))
        };
        if words.len() > 1 && words.iter().all(is_word) { words } else { Vec::new() }
    }

    /// [`CreateOptions::flag`] takes more words than are listed.
    fn is_same_as_on_or_off(&self, value: &str) -> bool {
        self.values == "on|off" && matches!(value, "true" | "false" | "yes" | "no")
    }
}

/// How an image is opened.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Restore what is whole of a damaged image, fill the rest with zeros and list it.
    pub salvage: bool,
    /// Accept what is normally refused as unsafe (the corrupt bit).
    pub force: bool,
    /// Accept bytes after the end of an archive.
    pub ignore_trailing: bool,
    /// Read this internal snapshot (name or ID) instead of the active state.
    pub snapshot: Option<String>,
    /// Only facts are wanted, no content: whatever needs other files or all of a stream may be left
    /// out.
    pub info_only: bool,
    /// With `info_only`: bytes of a stream that may be read to learn what only its end tells.
    pub info_stream_len: u64,
    /// What other files may be opened, and how.
    pub externals: Externals,
}

/// The longest run of zeros that `-S` can ask to be written: pieces are as long, and kept in memory.
/// Ours; the largest qcow2 cluster.
pub const MAX_ZERO_UNIT: u64 = 2 << 20;

/// How an image is made: `-o` options and compression.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// `-o` keys and values.
    pub options: BTreeMap<String, String>,
    /// `-c`: compress inside the format; the algorithm and level if given.
    pub compress: Option<Compress>,
    /// SOURCE_DATE_EPOCH, seconds.
    pub source_date_epoch: Option<i64>,
    /// `-S`: zeros are told apart in units of this many bytes; 0: zeros are written like data.
    /// `None`: as fine as the format has it. Sinks ask [`CreateOptions::zero_unit`].
    pub sparse_granularity: Option<u64>,
    /// What the caller opened for the image beside its own output.
    pub extras: Extras,
}

/// Other files that a new image consists of or rests on. A driver opens nothing by name: whoever
/// calls [`Driver::create`] opens what its options name and hands it over here.
#[derive(Clone, Default)]
pub struct Extras {
    /// Outputs by the option that names them: `data_file` of qcow2.
    pub outputs: BTreeMap<String, Output>,
    /// The image that the new one is based on (`backing_file`), with one device that can be read at
    /// random: what it holds already is not stored again.
    pub base: Option<Arc<dyn ImageSource>>,
}

impl fmt::Debug for Extras {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extras")
            .field("outputs", &self.outputs.keys())
            .field("base", &self.base.is_some())
            .finish()
    }
}

/// What `-c` asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compress {
    /// "zlib", "zstd" …; `None`: the format's default.
    pub algorithm: Option<String>,
    /// The algorithm's own level; `None`: the driver's default.
    pub level: Option<i32>,
}

impl CreateOptions {
    /// The value of an option.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.options.get(name).map(String::as_str)
    }

    /// Refuses keys that `specs` does not have, and words that an option does not list, with the
    /// nearest that is known. Numbers and names are the driver's to judge.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`].
    pub fn check_names(&self, format: &str, specs: &[OptionSpec]) -> Result<()> {
        for (name, value) in &self.options {
            let Some(spec) = specs.iter().find(|spec| spec.name == name) else {
                let known = specs.iter().map(|spec| spec.name);
                return Err(Error::usage(format!("unknown option '{name}' for {format}"))
                    .hint(unknown_option(name, format, known)));
            };
            let words = spec.words();
            if !words.is_empty() && !words.contains(&value.as_str()) && !spec.is_same_as_on_or_off(value) {
                return Err(Error::usage(format!("option '{name}' can't be '{value}'"))
                    .hint(suggest::hint(value, "values", words)));
            }
        }
        Ok(())
    }

    /// The units in which a sink tells zeros apart that by itself does so in units of `finest` bytes, a
    /// power of two: what `-S` asks for, rounded up to a power of two, at least `finest` and at most
    /// [`MAX_ZERO_UNIT`]. `None`: zeros are written like data.
    pub fn zero_unit(&self, finest: u64) -> Option<u64> {
        match self.sparse_granularity {
            Some(0) => None,
            Some(asked) => Some(asked.min(MAX_ZERO_UNIT).next_power_of_two().max(finest)),
            None => Some(finest),
        }
    }

    /// A boolean option: on/off, true/false, yes/no.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] for anything else.
    pub fn flag(&self, name: &str) -> Result<Option<bool>> {
        match self.get(name) {
            None => Ok(None),
            Some("on" | "true" | "yes") => Ok(Some(true)),
            Some("off" | "false" | "no") => Ok(Some(false)),
            Some(other) => Err(Error::usage(format!("option '{name}' is on or off, not '{other}'"))),
        }
    }

    /// A size option in bytes; see [`parse_size`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when it is not a size.
    pub fn size(&self, name: &str) -> Result<Option<u64>> {
        self.get(name)
            .map(|text| {
                parse_size(text).ok_or_else(|| {
                    Error::usage(format!("option '{name}' is a size such as 65536, 64k or 2M, not '{text}'"))
                })
            })
            .transpose()
    }

    /// A whole-number option.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] when it is not a number.
    pub fn number(&self, name: &str) -> Result<Option<u64>> {
        self.get(name)
            .map(|text| {
                text.parse()
                    .map_err(|_| Error::usage(format!("option '{name}' is a whole number, not '{text}'")))
            })
            .transpose()
    }
}

/// What to say about an option that a format does not have. A list of all is long: who is near the
/// right one does not need it.
fn unknown_option<'a>(name: &str, format: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    match suggest::nearest(name, known.clone()) {
        Some(near) => format!("did you mean '{near}'? '-o help' explains all options of {format}"),
        None => suggest::hint("", &format!("options of {format}"), known) + "; '-o help' explains them",
    }
}

/// Bytes from a size as qemu-img takes it: a number, optionally with a fraction, and one of the
/// suffixes b k M G T P E (powers of 1024, either case). `None` when it is none or above 2^64-1.
pub fn parse_size(text: &str) -> Option<u64> {
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let shift = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        "e" | "eib" => 60,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let whole: u64 = whole.parse().ok()?;
    let unit = 1u128 << shift;
    let mut bytes = u128::from(whole) * unit;
    if number.contains('.') {
        if fraction.is_empty() || fraction.len() > 18 || shift == 0 {
            return None;
        }
        let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        bytes += fraction.parse::<u128>().ok()? * unit / scale;
    }
    u64::try_from(bytes).ok()
}

/// What [`Driver::check`] found.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CheckReport {
    /// Places where the image contradicts itself; content may be wrong.
    pub corruptions: u64,
    /// Space that is allocated and belongs to nothing; content is right.
    pub leaks: u64,
    /// What could not be checked.
    pub check_errors: u64,
    /// A line for each finding, worst first; at most [`CheckReport::MAX_FINDINGS`].
    pub findings: Vec<String>,
    /// Where the used part of the file ends, bytes.
    pub image_end_offset: Option<u64>,
    /// Allocation units of the guest's size.
    pub total_clusters: Option<u64>,
    /// Allocation units that are allocated.
    pub allocated_clusters: Option<u64>,
    /// Allocated units that do not follow their neighbour in the file.
    pub fragmented_clusters: Option<u64>,
    /// Allocation units that are compressed.
    pub compressed_clusters: Option<u64>,
}

impl CheckReport {
    /// Findings that are kept word by word; further ones are only counted. Ours.
    pub const MAX_FINDINGS: usize = 1000;

    /// Counts a corruption and keeps its line.
    pub fn corruption(&mut self, finding: impl fmt::Display) {
        self.corruptions += 1;
        self.keep(finding);
    }

    /// Counts leaked allocation units and keeps the line.
    pub fn leak(&mut self, units: u64, finding: impl fmt::Display) {
        self.leaks += units;
        self.keep(finding);
    }

    fn keep(&mut self, finding: impl fmt::Display) {
        if self.findings.len() < Self::MAX_FINDINGS {
            self.findings.push(finding.to_string());
        }
    }
}

/// What [`Driver::measure`] expects.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Measure {
    /// Bytes the image needs for the source's content.
    pub required: u64,
    /// Bytes it would need if every part were allocated.
    #[serde(rename = "fully-allocated")]
    pub fully_allocated: u64,
    /// Bytes it takes at least on a file system where holes take none: what the space check goes by.
    /// Not told to a user, who wants to know what to provide.
    #[serde(skip)]
    pub occupied: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_checked_and_numbers_are_not() {
        let spec = |values| OptionSpec { name: "key", help: "", default: "", values };
        let check = |values, value: &str| {
            let options = BTreeMap::from([("key".to_owned(), value.to_owned())]);
            CreateOptions { options, ..CreateOptions::default() }.check_names("x", &[spec(values)])
        };
        assert!(check("off|falloc|full", "full").is_ok());
        assert!(check("on|off", "yes").is_ok());
        assert!(check("1|2|4", "4k").is_ok());
        assert!(check("0.10|1.1|v3", "x").is_ok());
        assert!(check("a file name", "x").is_ok());
        let error = check("off|falloc|full", "fallok").expect_err("a slip");
        assert_eq!(error.hint_text(), Some("did you mean 'falloc'? values: off, falloc, full"));
    }

    #[test]
    fn sizes_are_qemu_imgs() {
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("64k"), Some(65_536));
        assert_eq!(parse_size("2M"), Some(2 << 20));
        assert_eq!(parse_size("1.5G"), Some(3 << 29));
        assert_eq!(parse_size("8E"), Some(8 << 60));
        for bad in ["", "k", "1x", "-1", "1.", "99999999999E", "1.5"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
