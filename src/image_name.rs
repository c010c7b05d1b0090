//! Names of images that qemu-img takes besides paths: options (`driver=qcow2,file.filename=PATH`) and JSON with the
//! same keys (`json:{…}`).
//!
//! Only the command line gets here. A name of this form inside an image is refused like every name that is no
//! path.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, FilePart, Location, Result};
use serde_json::Value;

use crate::commands::options::split_options;
use crate::compat::parse_size;

/// Prefix of a name in JSON.
pub const JSON: &str = "json:";

/// Drivers of QEMU for plain files and block devices.
const FILE_DRIVERS: [&str; 2] = ["file", "host_device"];

/// Format in which the bytes of a file are the disk.
const RAW: &str = "raw";

/// Last parts of the keys that do not change what is read or written: names, caches, and how QEMU calls the kernel.
const WITHOUT_EFFECT: [&str; 17] = [
    "aio",
    "auto-read-only",
    "cache-clean-interval",
    "cache-size",
    "detect-zeroes",
    "discard",
    "discard-no-unref",
    "l2-cache-entry-size",
    "l2-cache-size",
    "lazy-refcounts",
    "locking",
    "node-name",
    "overlap-check",
    "pass-discard-request",
    "pass-discard-snapshot",
    "read-only",
    "refcount-cache-size",
];

/// An image as its options describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageName {
    /// Location of the file or device.
    pub location: Location,
    /// Format, if it is stated.
    pub format: Option<String>,
    /// Part of the file that is the image; `None` for all of it.
    pub part: Option<FilePart>,
    /// ID of the object with the passphrase of this image and those below it.
    pub key_id: Option<String>,
}

/// An image with backing images in place of those that it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedChain {
    /// The image.
    pub image: ImageName,
    /// Images below it, the topmost first.
    pub backing: Vec<ImageName>,
    /// True if the lowest image is to be read without a backing image: `backing=` or `"backing":null`.
    pub ends: bool,
}

/// Key of the reference to a backing image. Without a value, the image has none.
const NO_BACKING: &str = "backing";

/// Prefix of the keys of the backing image.
const BACKING: &str = "backing.";

/// Maximum number of backing images in the options of an image. Our limit: people write these names.
const MAX_DEPTH: usize = 16;

/// Values by their keys, with dots between the levels.
type Options = BTreeMap<String, String>;

/// Parses `KEY=VALUE,…`; a comma in a value is doubled.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for a key or value that is not supported, or if the file is missing.
pub fn from_options(text: &OsStr) -> Result<NamedChain> {
    let text = text.to_str().ok_or_else(|| Error::usage("the options of an image are not UTF-8"))?;
    interpret(split_options(text).into_iter().collect(), MAX_DEPTH)
}

/// Parses the JSON object behind `json:`.
///
/// # Errors
/// Same as [`from_options`]; for text that is not a JSON object.
pub fn from_json(text: &str) -> Result<NamedChain> {
    let text = with_double_quotes(text);
    let value: Value = serde_json::from_str(&text).map_err(|e| Error::usage(format!("json: {e}")))?;
    if !value.is_object() {
        return Err(Error::usage("json: expected an object").hint(EXAMPLE));
    }
    let mut options = Options::new();
    flatten("", &value, &mut options)?;
    interpret(options, MAX_DEPTH)
}

/// Puts double quotes around strings in single quotes, which QEMU takes as well.
fn with_double_quotes(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    // Quote around the string at this place, and true behind a backslash.
    let (mut quote, mut is_escaped) = (None, false);
    for c in text.chars() {
        let is_quote = matches!(c, '"' | '\'') && quote.is_none_or(|open| open == c) && !is_escaped;
        match c {
            '\'' if is_escaped => {
                // JSON has no escape for it.
                out.pop();
                out.push(c);
            }
            '\'' if is_quote => out.push('"'),
            '"' if quote == Some('\'') && !is_escaped => out.push_str("\\\""),
            other => out.push(other),
        }
        if is_quote {
            quote = if quote.is_none() { Some(c) } else { None };
        }
        is_escaped = c == '\\' && quote.is_some() && !is_escaped;
    }
    out
}

/// Hint with the common form of a name.
const EXAMPLE: &str = r#"driver=qcow2,file.filename=PATH, or json:{"driver":"qcow2","file":{"driver":"file","filename":"PATH"}}"#;

/// Adds a value under its key. serde_json limits the depth to 128.
fn flatten(key: &str, value: &Value, options: &mut Options) -> Result<()> {
    let text = match value {
        Value::Object(members) => {
            let below = |name: &str| if key.is_empty() { name.to_owned() } else { format!("{key}.{name}") };
            return members.iter().try_for_each(|(name, value)| flatten(&below(name), value, options));
        }
        Value::String(text) => text.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::Null if key.rsplit('.').next() == Some(NO_BACKING) => String::new(),
        Value::Null | Value::Array(_) => {
            return Err(Error::usage(format!(
                "json: the value of '{}' is not supported",
                escape_control(key)
            )));
        }
    };
    match options.insert(key.to_owned(), text) {
        Some(_) => Err(Error::usage(format!("json: '{}' is given twice", escape_control(key)))),
        None => Ok(()),
    }
}

/// Interprets the options of an image over at most `depth` others.
fn interpret(mut options: Options, depth: usize) -> Result<NamedChain> {
    let is_last = options.get(NO_BACKING).is_some_and(String::is_empty);
    if is_last {
        options.remove(NO_BACKING);
    }
    let (backing, ends) = match backing(&mut options, depth)? {
        Some(_) if is_last => {
            return Err(Error::usage("an image without a backing image has options of one"));
        }
        Some(NamedChain { image, backing, ends }) => ([image].into_iter().chain(backing).collect(), ends),
        None => (Vec::new(), is_last),
    };
    let driver = options.remove("driver");
    let is_file = |name: &str| FILE_DRIVERS.contains(&name);
    let (format, prefix) = match driver {
        Some(driver) if is_file(&driver) => (Some(RAW.to_owned()), ""),
        driver => (driver, "file."),
    };
    let is_disk = format.as_deref() == Some(RAW) && !prefix.is_empty();
    let mut part = if is_disk { part(&mut options, "")? } else { None };
    let (prefix, below) = match options.remove("file.driver") {
        // The image is in a part of the file.
        Some(below) if below == RAW && part.is_none() => {
            part = self::part(&mut options, "file.")?;
            ("file.file.", options.remove("file.file.driver"))
        }
        below => (prefix, below),
    };
    if let Some(below) = below.filter(|below| !is_file(below)) {
        return Err(Error::usage(format!(
            "the driver '{}' below a format is not supported",
            escape_control(&below)
        ))
        .hint("an image is in a file or block device: file.driver=file, or leave it out"));
    }
    let path = options.remove(&format!("{prefix}filename"));
    let path = path.filter(|path| !path.is_empty()).ok_or_else(|| {
        Error::usage(format!("missing {prefix}filename in the options of an image")).hint(EXAMPLE)
    })?;
    // The format follows from the header of the image.
    options.remove("encrypt.format");
    let keys = ["key-secret", "encrypt.key-secret"].map(|key| options.remove(key));
    options.retain(|key, value| !is_without_effect(key, value));
    match options.keys().next() {
        Some(key) => Err(unsupported(key)),
        None => {
            let location = Location::Path(PathBuf::from(path));
            let image = ImageName { location, format, part, key_id: keys.into_iter().flatten().next() };
            Ok(NamedChain { image, backing, ends })
        }
    }
}

/// Takes the options `offset` and `size` of the driver raw, whose keys begin with `prefix`.
fn part(options: &mut Options, prefix: &str) -> Result<Option<FilePart>> {
    let mut number = |key: &str| {
        let key = format!("{prefix}{key}");
        let Some(text) = options.remove(&key) else { return Ok(None) };
        parse_size(&text).map(Some).ok_or_else(|| {
            Error::usage(format!("invalid value '{}' of '{key}': expected bytes", escape_control(&text)))
        })
    };
    let (start, len) = (number("offset")?, number("size")?);
    Ok((start.is_some() || len.is_some()).then_some(FilePart { start: start.unwrap_or(0), len }))
}

/// Takes the options of the backing image, if any. Returns it and those below it.
fn backing(options: &mut Options, depth: usize) -> Result<Option<NamedChain>> {
    let own = std::mem::take(options);
    let mut below = Options::new();
    for (key, value) in own {
        match key.strip_prefix(BACKING) {
            Some(key) => below.insert(key.to_owned(), value),
            None => options.insert(key, value),
        };
    }
    if below.is_empty() {
        return Ok(None);
    }
    let depth =
        depth.checked_sub(1).ok_or_else(|| Error::usage(format!("more than {MAX_DEPTH} backing images")))?;
    let chain = interpret(below, depth)?;
    if chain.image.part.is_some() {
        return Err(Error::usage("a part of a file as the backing image is not supported"));
    }
    Ok(Some(chain))
}

fn is_without_effect(key: &str, value: &str) -> bool {
    let own = key.strip_prefix("file.").unwrap_or(key);
    let own = own.strip_prefix("file.").unwrap_or(own);
    WITHOUT_EFFECT.contains(&own) || own.starts_with("cache.") || (own == "force-share" && value == "off")
}

fn unsupported(key: &str) -> Error {
    let error = Error::usage(format!("the option '{}' of an image is not supported", escape_control(key)));
    match key.split('.').next_back() {
        Some("force-share") => error.hint("-U reads an image that another program may write"),
        _ => error.hint(EXAMPLE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(path: &str, format: Option<&str>, key_id: Option<&str>) -> ImageName {
        let own = |text: Option<&str>| text.map(str::to_owned);
        let key_id = own(key_id);
        ImageName { location: Location::Path(path.into()), format: own(format), part: None, key_id }
    }

    fn name(path: &str, format: Option<&str>, key_id: Option<&str>) -> NamedChain {
        NamedChain { image: image(path, format, key_id), backing: Vec::new(), ends: false }
    }

    fn options(text: &str) -> Result<NamedChain> {
        from_options(OsStr::new(text))
    }

    #[test]
    fn options_and_json_have_the_same_keys() {
        let plain = name("a,b.img", Some("qcow2"), None);
        for text in [
            "driver=qcow2,file.filename=a,,b.img",
            "file.driver=file,file.filename=a,,b.img,driver=qcow2,file.locking=auto,read-only",
            "driver=qcow2,cache.direct=on,file.cache.no-flush=off,file.filename=a,,b.img,discard=unmap",
        ] {
            assert_eq!(options(text).expect(text), plain);
        }
        for text in [
            r#"{"driver":"qcow2","file":{"driver":"file","filename":"a,b.img"}}"#,
            r#"{"driver":"qcow2","file.filename":"a,b.img","read-only":true,"l2-cache-size":65536}"#,
            r#"{'driver':'qcow2','file':{"driver":"file",'filename':'a,b.img'}}"#,
        ] {
            assert_eq!(from_json(text).expect(text), plain);
        }
        assert_eq!(options("driver=file,filename=x").expect("a file"), name("x", Some("raw"), None));
        assert_eq!(options("file.filename=json:x").expect("a file"), name("json:x", None, None));
        let luks = "driver=luks,key-secret=s0,file.filename=x";
        assert_eq!(options(luks).expect("a key"), name("x", Some("luks"), Some("s0")));
        let inner = "driver=qcow2,encrypt.format=luks,encrypt.key-secret=s0,file.filename=x";
        assert_eq!(options(inner).expect("a key"), name("x", Some("qcow2"), Some("s0")));
    }

    #[test]
    fn strings_may_have_single_quotes() {
        for (text, expected) in [
            (r#"{'a':'b'}"#, r#"{"a":"b"}"#),
            (r#"{"a'b":'c"d'}"#, r#"{"a'b":"c\"d"}"#),
            (r#"['it\'s', "it's", 'a\"b', "a\"b", '\\']"#, r#"["it's", "it's", "a\"b", "a\"b", "\\"]"#),
            (r#"'open"#, r#""open"#),
        ] {
            assert_eq!(with_double_quotes(text), expected);
        }
    }

    #[test]
    fn parts_of_a_file_are_disks_or_hold_images() {
        let of = |format: Option<&str>, start, len| {
            let part = Some(FilePart { start, len });
            NamedChain { image: ImageName { part, ..image("x", format, None) }, ..name("x", None, None) }
        };
        let raw = "driver=raw,offset=1M,size=512,file.filename=x";
        assert_eq!(options(raw).expect("a part"), of(Some("raw"), 1 << 20, Some(512)));
        assert_eq!(
            options("driver=raw,size=1k,file.filename=x").expect("a part"),
            of(Some("raw"), 0, Some(1024))
        );
        let inner = r#"{"file":{"driver":"raw","offset":1024,"file":{"driver":"file","filename":"x"}}}"#;
        assert_eq!(from_json(inner).expect("a part"), of(None, 1024, None));
        assert_eq!(
            options("driver=qcow2,file.driver=raw,file.file.filename=x").expect("a file"),
            name("x", Some("qcow2"), None)
        );
    }

    #[test]
    fn backing_images_are_nested() {
        let text = "file.filename=a,backing.file.filename=b,backing.driver=qcow2,backing.backing.driver=file,\
                    backing.backing.filename=c,backing.encrypt.key-secret=s1";
        let below = [image("b", Some("qcow2"), Some("s1")), image("c", Some("raw"), None)];
        assert_eq!(options(text).expect("a chain").backing, below);
        let deep = |depth: usize| {
            let prefix = |level: usize| format!("{}file.filename=x", BACKING.repeat(level));
            (0..=depth).map(prefix).collect::<Vec<_>>().join(",")
        };
        assert!(options(&deep(MAX_DEPTH)).is_ok() && options(&deep(MAX_DEPTH + 1)).is_err());
    }

    #[test]
    fn chains_end_where_the_user_says_so() {
        let below = [image("b", None, None)];
        for (text, images) in [
            (r#"json:{"file":{"filename":"a"},"backing":null}"#, &[][..]),
            (r#"json:{"file.filename":"a","backing":{"file.filename":"b","backing":null}}"#, &below),
            ("file.filename=a,backing=", &[]),
            ("file.filename=a,backing.file.filename=b,backing.backing=", &below),
        ] {
            let parsed = text.strip_prefix(JSON).map_or_else(|| options(text), from_json).expect(text);
            assert!(parsed.ends && parsed.backing == images, "{text}");
        }
        assert!(options("file.filename=a,backing=,backing.file.filename=b").is_err());
    }

    #[test]
    fn what_changes_the_content_is_refused() {
        for text in [
            "a.qcow2",
            "driver=qcow2",
            "driver=qcow2,file.filename=",
            "driver=qcow2,file=node",
            "driver=raw,offset=x,file.filename=x",
            "driver=qcow2,offset=512,file.filename=x",
            "driver=file,offset=512,filename=x",
            "driver=raw,offset=512,file.driver=raw,file.offset=512,file.file.filename=x",
            "file.filename=x,backing.driver=raw,backing.offset=1,backing.file.filename=y",
            "driver=qcow2,file.driver=nbd,file.filename=x",
            "driver=qcow2,file.filename=x,backing=y",
            "driver=qcow2,file.filename=x,backing.driver=raw",
            "driver=qcow2,file.filename=x,data-file.filename=y",
            "driver=qcow2,file.filename=x,force-share=on",
            "driver=qcow2,file.filename=x,no-such-key=1",
        ] {
            assert!(options(text).is_err(), "{text}");
        }
        let deep = "{\"a\":".repeat(200);
        let twice = r#"{"file":{"filename":"w"},"file.filename":"a"}"#;
        for text in [twice, "", "x", "[]", "null", r#"{"file":null}"#, r#"{"file.filename":["x"]}"#, &deep] {
            assert!(from_json(text).is_err(), "{text}");
        }
    }
}
