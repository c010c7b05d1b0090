//! Parser for the map of `vma extract -r`, which gives the target of each device.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use imgtool_core::{Error, Result, ResultExt};

use super::usage;

/// Maximum length of a line in bytes, including the line feed. The reference program's limit.
const MAX_LINE: u64 = 8191;

/// Maximum number of lines. Our limit: about four times the maximum number of devices in an archive.
const MAX_LINES: usize = 1024;

/// Names of the valid cache modes.
const CACHE_MODES: [&str; 6] = ["none", "off", "writeback", "writethrough", "directsync", "unsafe"];

/// Instruction for a device, from one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Entry {
    /// Skip the device.
    Skip,
    /// Write the device to a target.
    Target {
        path: PathBuf,
        format: Option<String>,
        /// True if zeros must be written; false if the target already reads as zeros.
        write_zeros: bool,
        /// Maximum number of bytes per second; 0 means no limit.
        bps: u64,
    },
}

/// Lines of a map. The last line for a device wins.
#[derive(Debug, Default)]
pub(super) struct Map(Vec<(String, Entry)>);

impl Map {
    /// Reads the map from a file or FIFO.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io("open", e)).in_file(path)?;
        Self::from_reader(BufReader::new(file)).in_file(path)
    }

    /// Reads lines until `done`, an empty line or the end.
    pub(super) fn from_reader(mut reader: impl BufRead) -> Result<Self> {
        let mut map = Self::default();
        for _ in 0..MAX_LINES {
            let mut line = Vec::new();
            let read = |e| Error::io("read map", e);
            let len = (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line).map_err(read)?;
            if len as u64 == MAX_LINE && line.last() != Some(&b'\n') {
                return Err(failed(&format!("a line is longer than {MAX_LINE} bytes")));
            }
            let text = String::from_utf8(line).map_err(|_| failed("a line is not UTF-8"))?;
            let text = text.strip_suffix('\n').unwrap_or(&text);
            if len == 0 || text.is_empty() || text == "done" {
                return Ok(map);
            }
            map.0.push(parse(text)?);
        }
        Err(failed(&format!("more than {MAX_LINES} lines")))
    }

    pub(super) fn get(&self, device: &str) -> Option<&Entry> {
        self.0.iter().rev().find(|(name, _)| name == device).map(|(_, entry)| entry)
    }

    /// Returns the lowest rate limit of all lines, in bytes per second, if any line has one.
    pub(super) fn limit(&self) -> Option<u64> {
        let limits = self.0.iter().filter_map(|(_, entry)| match entry {
            Entry::Target { bps, .. } if *bps > 0 => Some(*bps),
            _ => None,
        });
        limits.min()
    }
}

/// Options of a line, each at most once.
#[derive(Default)]
struct Options<'a> {
    format: Option<&'a str>,
    bps: Option<&'a str>,
    group: Option<&'a str>,
    cache: Option<&'a str>,
}

fn parse(line: &str) -> Result<(String, Entry)> {
    if let Some(device) = line.strip_prefix("skip") {
        let device = device.strip_prefix('=').ok_or_else(|| failed("option 'skip' has no value"))?;
        return Ok((device.to_owned(), Entry::Skip));
    }
    let mut options = Options::default();
    let mut rest = line;
    while let Some(after) = options.take(rest)? {
        rest = after;
    }
    let bps = options.bps.map_or(Ok(0), number)?;
    if let Some(mode) = options.cache
        && !CACHE_MODES.contains(&mode)
    {
        return Err(failed(&format!("invalid cache option: {mode}")));
    }
    let (write_zeros, rest) = match (rest.strip_prefix("0:"), rest.strip_prefix("1:")) {
        (Some(rest), _) => (false, rest),
        (_, Some(rest)) => (true, rest),
        _ => return Err(failed(&format!("parse error ('{rest}')"))),
    };
    let (device, path) = rest
        .split_once('=')
        .filter(|(device, _)| !device.is_empty())
        .ok_or_else(|| failed("no dev name specified"))?;
    let format = options.format.map(str::to_owned);
    Ok((device.to_owned(), Entry::Target { path: PathBuf::from(path), format, write_zeros, bps }))
}

impl<'a> Options<'a> {
    /// Parses the first option of a line and returns the rest; `None` if the line does not start with an
    /// option.
    fn take(&mut self, line: &'a str) -> Result<Option<&'a str>> {
        let slots = [
            ("format", &mut self.format),
            ("throttling.bps", &mut self.bps),
            ("throttling.group", &mut self.group),
            ("cache", &mut self.cache),
        ];
        for (name, slot) in slots {
            let Some(value) = line.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')) else {
                continue;
            };
            let (value, rest) = value
                .split_once(':')
                .ok_or_else(|| failed(&format!("option '{name}' not terminated ('{line}')")))?;
            if slot.replace(value).is_some() {
                return Err(failed(&format!("duplicate value for option '{name}'")));
            }
            return Ok(Some(rest));
        }
        Ok(None)
    }
}

/// Parses a number as C does: decimal, octal with a leading 0, hexadecimal with a leading 0x.
fn number(text: &str) -> Result<u64> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16),
        None if text.len() > 1 && text.starts_with('0') => u64::from_str_radix(text, 8),
        None => text.parse(),
    };
    parsed.map_err(|_| failed(&format!("not a number: {text}")))
}

fn failed(what: &str) -> Error {
    usage(format!("read map failed - {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_map_lines() {
        let entry = |line: &str| parse(line).expect(line);
        assert_eq!(entry("skip=a"), ("a".to_owned(), Entry::Skip));
        let target = |path: &str, format: Option<&str>, write_zeros, bps| Entry::Target {
            path: PathBuf::from(path),
            format: format.map(str::to_owned),
            write_zeros,
            bps,
        };
        assert_eq!(entry("0:a=/x=y").1, target("/x=y", None, false, 0));
        let line = "cache=none:throttling.bps=0x10:format=qcow2:throttling.group=g:1:drive-scsi0=t";
        assert_eq!(entry(line), ("drive-scsi0".to_owned(), target("t", Some("qcow2"), true, 16)));
    }

    #[test]
    fn rejects_invalid_lines_with_the_reference_messages() {
        for (line, message) in [
            ("format=raw:format=raw:0:a=b", "read map failed - duplicate value for option 'format'"),
            ("format=raw", "read map failed - option 'format' not terminated ('format=raw')"),
            ("throttling.bps=x:0:a=b", "read map failed - not a number: x"),
            ("a=b", "read map failed - parse error ('a=b')"),
            ("0:b", "read map failed - no dev name specified"),
            ("skip", "read map failed - option 'skip' has no value"),
            ("cache=x:0:a=b", "read map failed - invalid cache option: x"),
        ] {
            assert_eq!(parse(line).expect_err(line).message(), message);
        }
    }
}
