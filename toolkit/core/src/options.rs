//! Options of a format: [`OptionSpec`] declares an option; [`OptionValues`] contains the parsed values.
//!
//! Parsing, help, completion and JSON output follow the declarations. The values that a driver receives have
//! the declared types and bounds; the driver only checks that they can be combined.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::{Error, Result};
use crate::remedy::Remedy;
use crate::secret::Secret;
use crate::suggest;

/// Declaration of an option.
#[derive(Debug, Clone, Copy)]
pub struct OptionSpec {
    /// Key, as in `KEY=VALUE`.
    pub name: &'static str,
    /// One-line description for the user.
    pub help: &'static str,
    /// Default value, as shown to the user.
    pub default: &'static str,
    /// Type and bounds of the value.
    pub kind: OptionKind,
}

/// Type and bounds of an option's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OptionKind {
    /// `on` or `off`; the synonyms `true`, `yes`, `false` and `no` are accepted.
    Flag,
    /// One of these words.
    OneOf(&'static [&'static str]),
    /// A size in bytes that is a power of two; see [`parse_size`].
    PowerOfTwo {
        /// Minimum in bytes.
        min: u64,
        /// Maximum in bytes.
        max: u64,
    },
    /// Like [`OptionKind::PowerOfTwo`], or 0 to let the driver choose by the size of the disk.
    PowerOfTwoOrZero {
        /// Minimum in bytes, except for 0.
        min: u64,
        /// Maximum in bytes.
        max: u64,
    },
    /// A size in bytes that is a multiple of `unit`; see [`parse_size`].
    Size {
        /// Minimum in bytes.
        min: u64,
        /// Maximum in bytes.
        max: u64,
        /// Unit in bytes, never 0.
        unit: u64,
    },
    /// One of these numbers.
    OneOfSizes(&'static [u64]),
    /// A whole number, possibly negative.
    Integer,
    /// Any text, with its description for the user ("a UUID").
    Text(&'static str),
    /// A file name.
    Path,
    /// A passphrase or key, which is never printed.
    Secret,
}

impl OptionKind {
    /// Returns the possible values if they are a fixed list of words, otherwise an empty list.
    pub fn words(self) -> &'static [&'static str] {
        match self {
            Self::Flag => &["on", "off"],
            Self::OneOf(words) => words,
            _ => &[],
        }
    }

    fn parse(self, text: &str) -> Option<OptionValue> {
        let size =
            |fits: &dyn Fn(u64) -> bool| parse_size(text).filter(|size| fits(*size)).map(OptionValue::Size);
        match self {
            Self::Flag => match text {
                "on" | "true" | "yes" => Some(OptionValue::Flag(true)),
                "off" | "false" | "no" => Some(OptionValue::Flag(false)),
                _ => None,
            },
            Self::OneOf(words) => words.contains(&text).then(|| OptionValue::Text(text.to_owned())),
            Self::PowerOfTwo { min, max } => size(&|n| n.is_power_of_two() && (min..=max).contains(&n)),
            Self::PowerOfTwoOrZero { min, max } => {
                size(&|n| n == 0 || n.is_power_of_two() && (min..=max).contains(&n))
            }
            Self::Size { min, max, unit } => size(&|n| n.is_multiple_of(unit) && (min..=max).contains(&n)),
            Self::OneOfSizes(sizes) => size(&|n| sizes.contains(&n)),
            Self::Integer => text.parse().ok().map(OptionValue::Integer),
            Self::Text(_) | Self::Path => Some(OptionValue::Text(text.to_owned())),
            Self::Secret => Some(OptionValue::Secret(text.to_owned())),
        }
    }
}

/// Formats the possible values for the user: `on|off`, `512..2M, a power of two`, `a file name`.
impl fmt::Display for OptionKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag | Self::OneOf(_) => f.write_str(&self.words().join("|")),
            Self::PowerOfTwo { min, max } | Self::PowerOfTwoOrZero { min, max } => {
                write!(f, "{}..{}, a power of two", short_size(*min), short_size(*max))
            }
            Self::Size { min, max, unit: 1 } => {
                write!(f, "{}..{}", short_size(*min), short_size(*max))
            }
            Self::Size { min, max, unit } => {
                write!(f, "{}..{}, a multiple of {}", short_size(*min), short_size(*max), short_size(*unit))
            }
            Self::OneOfSizes(sizes) => {
                let sizes: Vec<String> = sizes.iter().map(u64::to_string).collect();
                f.write_str(&sizes.join("|"))
            }
            Self::Integer => f.write_str("a whole number"),
            Self::Text(what) => f.write_str(what),
            Self::Path => f.write_str("a file name"),
            Self::Secret => f.write_str("a secret"),
        }
    }
}

/// Formats a size in the shortest form that [`parse_size`] accepts: 2M, 64k, 512.
fn short_size(bytes: u64) -> String {
    let suffixes = [(40, "T"), (30, "G"), (20, "M"), (10, "k")];
    let fitting = suffixes.iter().find(|(shift, _)| bytes >= 1 << shift && bytes.is_multiple_of(1 << shift));
    match fitting {
        Some((shift, suffix)) => format!("{}{suffix}", bytes >> shift),
        None => bytes.to_string(),
    }
}

#[derive(Clone, PartialEq, Eq)]
enum OptionValue {
    Flag(bool),
    Size(u64),
    Integer(i64),
    Text(String),
    Secret(String),
}

impl fmt::Debug for OptionValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(value) => value.fmt(f),
            Self::Size(value) => value.fmt(f),
            Self::Integer(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
            Self::Secret(_) => f.write_str("<secret>"),
        }
    }
}

/// Parsed options, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OptionValues(BTreeMap<&'static str, OptionValue>);

impl OptionValues {
    /// Parses pairs of key and value by their declarations. `format` names the format in errors.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] for an unknown key, and for a value that its kind does not allow. The
    /// message or the hint describes the valid keys or values.
    pub fn parse<'a>(
        format: &str,
        specs: &'static [OptionSpec],
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        let mut values = BTreeMap::new();
        for (name, text) in pairs {
            let Some(spec) = specs.iter().find(|spec| spec.name == name) else {
                let advice = unknown_option(name, format, specs.iter().map(|spec| spec.name));
                return Err(Error::usage(format!("unknown option '{name}' for {format}"))
                    .remedied_by(Remedy::ListOptions { format: format.to_owned(), advice }));
            };
            let value = spec.kind.parse(text).ok_or_else(|| wrong_value(spec, text))?;
            values.insert(spec.name, value);
        }
        Ok(Self(values))
    }

    /// True if no option is set.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the value of an [`OptionKind::Flag`] option, if set.
    pub fn flag(&self, name: &str) -> Option<bool> {
        match self.0.get(name)? {
            OptionValue::Flag(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns the value of an [`OptionKind::PowerOfTwo`], [`OptionKind::PowerOfTwoOrZero`],
    /// [`OptionKind::Size`] or [`OptionKind::OneOfSizes`] option, if set.
    pub fn size(&self, name: &str) -> Option<u64> {
        match self.0.get(name)? {
            OptionValue::Size(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns the value of an [`OptionKind::Integer`] option, if set.
    pub fn integer(&self, name: &str) -> Option<i64> {
        match self.0.get(name)? {
            OptionValue::Integer(value) => Some(*value),
            _ => None,
        }
    }

    /// Returns the value of an [`OptionKind::OneOf`], [`OptionKind::Text`] or [`OptionKind::Path`] option, if
    /// set.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            OptionValue::Text(value) => Some(value),
            _ => None,
        }
    }

    /// Returns the value of an [`OptionKind::Secret`] option, if set.
    pub fn secret(&self, name: &str) -> Option<&str> {
        match self.0.get(name)? {
            OptionValue::Secret(value) => Some(value),
            _ => None,
        }
    }
}

fn wrong_value(spec: &OptionSpec, text: &str) -> Error {
    let words = spec.kind.words();
    if words.is_empty() {
        let shown = if spec.kind == OptionKind::Secret { "<secret>" } else { text };
        return Error::usage(format!("option '{}' is '{shown}', expected {}", spec.name, spec.kind));
    }
    Error::usage(format!("option '{}' can't be '{text}'", spec.name)).hint(suggest::hint(
        text,
        "values",
        words.iter().copied(),
    ))
}

/// Returns a hint about an unknown option: the nearest known option, or all of them if none is near.
fn unknown_option<'a>(name: &str, format: &str, known: impl Iterator<Item = &'a str> + Clone) -> String {
    match suggest::nearest(name, known.clone()) {
        Some(near) => format!("did you mean '{near}'?"),
        None => suggest::hint("", &format!("options of {format}"), known),
    }
}

/// Parses a size as qemu-img does: a number, optionally with a fraction, and one of the suffixes b, k, M, G,
/// T, P and E (powers of 1024, either case) or none; or a hexadecimal number without either (0x100000). Digits
/// may be missing on one side of the point, and blanks and a plus sign may come first. Without a unit, the
/// fraction must be zero. Also accepts KiB to EiB. Returns `None` if `text` is not a size or exceeds 2^64-1
/// bytes.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let text = text.strip_prefix('+').unwrap_or(text);
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        let is_hexadecimal = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        return is_hexadecimal.then(|| u64::from_str_radix(digits, 16).ok()).flatten();
    }
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
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > MAX_FRACTION || shift == 0 && !fraction.is_empty() {
        return None;
    }
    let parse = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u64>().ok() };
    let unit = 1u128 << shift;
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    // A number below 2^64 times a unit of at most 2^60.
    let bytes = u128::from(parse(whole)?) * unit + u128::from(parse(fraction)?) * unit / scale;
    u64::try_from(bytes).ok()
}

/// Maximum number of digits of a fraction. Our limit: the smallest unit of an exbibyte needs 18.
const MAX_FRACTION: usize = 18;

/// Maximum unit of zero detection, in bytes. Our limit: pieces are at least one unit long and kept in memory.
/// It equals the size of the largest qcow2 cluster.
pub const MAX_ZERO_UNIT: u64 = 2 << 20;

/// Settings for a new image.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    /// Options of the format.
    pub values: OptionValues,
    /// Compression inside the format, if requested.
    pub compress: Option<Compress>,
    /// Passphrase of the new image, if it is to be encrypted.
    pub secret: Option<Secret>,
    /// Time to use instead of the current time, in seconds since 1970 (`SOURCE_DATE_EPOCH`).
    pub source_date_epoch: Option<i64>,
    /// Requested unit of zero detection, in bytes. 0 writes zeros like data; `None` selects the format's
    /// default. Sinks use [`CreateOptions::zero_unit`].
    pub sparse_granularity: Option<u64>,
    /// True for an image without content, which a machine will write. A format whose default variant is for
    /// transport chooses another one.
    pub blank: bool,
}

impl CreateOptions {
    /// Parses options of a format from keys and values. All other settings have their defaults.
    ///
    /// # Errors
    /// Same as [`OptionValues::parse`].
    pub fn parse<'a>(
        format: &str,
        specs: &'static [OptionSpec],
        pairs: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> Result<Self> {
        Ok(Self { values: OptionValues::parse(format, specs, pairs)?, ..Self::default() })
    }

    /// Returns the unit of zero detection, in bytes: `sparse_granularity`, rounded up to a power of two, at
    /// most [`MAX_ZERO_UNIT`] and at least `finest`, the sink's finest unit (a power of two). Returns `None`
    /// if zeros are written like data.
    pub fn zero_unit(&self, finest: u64) -> Option<u64> {
        match self.sparse_granularity {
            Some(0) => None,
            Some(wanted) => Some(wanted.min(MAX_ZERO_UNIT).next_power_of_two().max(finest)),
            None => Some(finest),
        }
    }
}

/// Compression inside a format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Compress {
    /// Name of the algorithm ("zlib", "zstd"); `None` means the format's default.
    pub algorithm: Option<String>,
    /// Level on the algorithm's scale; `None` means the driver's default.
    pub level: Option<i32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPECS: &[OptionSpec] = &[
        spec("flag", OptionKind::Flag),
        spec("word", OptionKind::OneOf(&["off", "falloc", "full"])),
        spec("cluster", OptionKind::PowerOfTwo { min: 512, max: 2 << 20 }),
        spec("log", OptionKind::Size { min: 1 << 20, max: 1 << 30, unit: 1 << 20 }),
        spec("bits", OptionKind::OneOfSizes(&[1, 2, 4])),
        spec("time", OptionKind::Integer),
        spec("key", OptionKind::Secret),
    ];

    const fn spec(name: &'static str, kind: OptionKind) -> OptionSpec {
        OptionSpec { name, help: "", default: "", kind }
    }

    fn parse(name: &str, value: &str) -> Result<OptionValues> {
        OptionValues::parse("x", SPECS, [(name, value)])
    }

    #[test]
    fn parses_values_as_their_declared_type() {
        assert_eq!(parse("flag", "yes").expect("a flag").flag("flag"), Some(true));
        assert_eq!(parse("word", "full").expect("a word").text("word"), Some("full"));
        assert_eq!(parse("cluster", "64k").expect("a size").size("cluster"), Some(65_536));
        assert_eq!(parse("bits", "4").expect("a number").size("bits"), Some(4));
        assert_eq!(parse("time", "-3").expect("a number").integer("time"), Some(-3));
        let secret = parse("key", "hunter2").expect("a secret");
        assert_eq!(secret.secret("key"), Some("hunter2"));
        assert!(!format!("{secret:?}").contains("hunter2"));
    }

    #[test]
    fn invalid_value_errors_list_valid_values() {
        let bad = [("flag", "2"), ("cluster", "96k"), ("cluster", "4M"), ("log", "1.5M"), ("bits", "3")];
        for (name, value) in bad {
            assert!(parse(name, value).is_err(), "{name}={value}");
        }
        let error = parse("word", "fallok").expect_err("a slip");
        assert_eq!(error.hint_text().as_deref(), Some("did you mean 'falloc'? values: off, falloc, full"));
        let error = parse("cluster", "x").expect_err("no size");
        assert_eq!(error.message(), "option 'cluster' is 'x', expected 512..2M, a power of two");
        assert!(parse("clusters", "1").expect_err("a slip").hint_text().is_some());
    }

    #[test]
    fn parses_sizes_like_qemu_img() {
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("64k"), Some(65_536));
        assert_eq!(parse_size("2M"), Some(2 << 20));
        assert_eq!(parse_size("1.5G"), Some(3 << 29));
        assert_eq!(parse_size("8E"), Some(8 << 60));
        for (text, bytes) in [
            (".5M", 1 << 19),
            ("1.M", 1 << 20),
            ("1.0", 1),
            ("1.0b", 1),
            (" 1M", 1 << 20),
            ("+1M", 1 << 20),
            ("0x100000", 1 << 20),
            ("0XE", 14),
            ("0xB", 11),
            ("010", 10),
            ("1.0001k", 1024),
            ("2.00001M", 2_097_162),
            ("1.50000000000000000000G", 3 << 29),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for bad in [
            "",
            "k",
            "1x",
            "-1",
            ".",
            ".M",
            "99999999999E",
            "1.5",
            "1.5b",
            "1e3",
            "0x",
            "0x10k",
            "0x+1",
            "1G5",
            "1.2.3M",
            "1M ",
            "+ 1M",
            "++1M",
            "inf",
            "1,5G",
        ] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
