//! Parser for the map of `vma extract -r`, which gives the target of each device.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::ffi::OsStrExt;
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

/// Lines of a map. The last line for a device wins. Names are bytes, as in an archive and in a file system.
#[derive(Debug, Default)]
pub(super) struct Map(Vec<(Vec<u8>, Entry)>);

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
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            if len == 0 || text.is_empty() || text == b"done" {
                return Ok(map);
            }
            map.0.push(parse(text)?);
        }
        Err(failed(&format!("more than {MAX_LINES} lines")))
    }

    pub(super) fn get(&self, device: &[u8]) -> Option<&Entry> {
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
struct Options {
    format: Option<String>,
    bps: Option<String>,
    group: Option<String>,
    cache: Option<String>,
}

fn parse(line: &[u8]) -> Result<(Vec<u8>, Entry)> {
    if let Some(device) = line.strip_prefix(b"skip") {
        let device = device.strip_prefix(b"=").ok_or_else(|| failed("option 'skip' has no value"))?;
        return Ok((device.to_owned(), Entry::Skip));
    }
    let mut options = Options::default();
    let mut rest = line;
    while let Some(after) = options.take(rest)? {
        rest = after;
    }
    let bps = options.bps.as_deref().map_or(Ok(0), number)?;
    if let Some(mode) = options.cache.as_deref()
        && !CACHE_MODES.contains(&mode)
    {
        return Err(failed(&format!("invalid cache option: {mode}")));
    }
    let (write_zeros, rest) = match (rest.strip_prefix(b"0:"), rest.strip_prefix(b"1:")) {
        (Some(rest), _) => (false, rest),
        (_, Some(rest)) => (true, rest),
        _ => return Err(failed(&format!("parse error ('{}')", String::from_utf8_lossy(rest)))),
    };
    let (device, path) = split_once(rest, b'=')
        .filter(|(device, _)| !device.is_empty())
        .ok_or_else(|| failed("no dev name specified"))?;
    let path = PathBuf::from(OsStr::from_bytes(path));
    Ok((device.to_owned(), Entry::Target { path, format: options.format, write_zeros, bps }))
}

impl Options {
    /// Parses the first option of a line and returns the rest; `None` if the line does not start with an
    /// option.
    fn take<'a>(&mut self, line: &'a [u8]) -> Result<Option<&'a [u8]>> {
        let slots = [
            ("format", &mut self.format),
            ("throttling.bps", &mut self.bps),
            ("throttling.group", &mut self.group),
            ("cache", &mut self.cache),
        ];
        for (name, slot) in slots {
            let Some(value) = line.strip_prefix(name.as_bytes()).and_then(|rest| rest.strip_prefix(b"="))
            else {
                continue;
            };
            let (value, rest) = split_once(value, b':').ok_or_else(|| {
                let line = String::from_utf8_lossy(line);
                failed(&format!("option '{name}' not terminated ('{line}')"))
            })?;
            // No value that is accepted has other characters.
            if slot.replace(String::from_utf8_lossy(value).into_owned()).is_some() {
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
    // Rust accepts a plus sign before the digits.
    parsed.ok().filter(|_| !text.contains('+')).ok_or_else(|| failed(&format!("not a number: {text}")))
}

/// Splits bytes at the first `at`, which neither half contains.
pub(super) fn split_once(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let position = bytes.iter().position(|byte| *byte == at)?;
    Some((&bytes[..position], &bytes[position + 1..]))
}

fn failed(what: &str) -> Error {
    usage(format!("read map failed - {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_map_lines() {
        let entry = |line: &str| parse(line.as_bytes()).expect(line);
        assert_eq!(entry("skip=a"), (b"a".to_vec(), Entry::Skip));
        let target = |path: &str, format: Option<&str>, write_zeros, bps| Entry::Target {
            path: PathBuf::from(path),
            format: format.map(str::to_owned),
            write_zeros,
            bps,
        };
        assert_eq!(entry("0:a=/x=y").1, target("/x=y", None, false, 0));
        let line = "cache=none:throttling.bps=0x10:format=qcow2:throttling.group=g:1:drive-scsi0=t";
        assert_eq!(entry(line), (b"drive-scsi0".to_vec(), target("t", Some("qcow2"), true, 16)));
    }

    #[test]
    fn rejects_invalid_lines_with_the_reference_messages() {
        for (line, message) in [
            ("format=raw:format=raw:0:a=b", "read map failed - duplicate value for option 'format'"),
            ("format=raw", "read map failed - option 'format' not terminated ('format=raw')"),
            ("throttling.bps=x:0:a=b", "read map failed - not a number: x"),
            ("throttling.bps=+5:0:a=b", "read map failed - not a number: +5"),
            ("throttling.bps=0x+5:0:a=b", "read map failed - not a number: 0x+5"),
            ("throttling.bps= 5:0:a=b", "read map failed - not a number:  5"),
            ("a=b", "read map failed - parse error ('a=b')"),
            ("0:b", "read map failed - no dev name specified"),
            ("skip", "read map failed - option 'skip' has no value"),
            ("cache=x:0:a=b", "read map failed - invalid cache option: x"),
        ] {
            assert_eq!(parse(line.as_bytes()).expect_err(line).message(), message);
        }
    }
}
