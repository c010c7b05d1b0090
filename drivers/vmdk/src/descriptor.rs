//! The text that describes a disk: its content identifiers, its parent, and its extents.

pub(crate) mod identity;

use std::borrow::Cow;

use encoding_rs::Encoding;
use imgtool_core::error::escape_control;
use imgtool_core::{Error, Remedy, Result};

use crate::layout::MAX_SECTORS;
use crate::layout::hosted::Header;
use identity::Uuids;

/// Maximum length of a descriptor in bytes. Our limit: a split disk of 62 TiB has 32 000 lines of 50 bytes.
pub(crate) const MAX_LEN: usize = 2 << 20;
/// Maximum length of a line in bytes. Our limit: the longest path of Linux.
const MAX_LINE_LEN: usize = 4096;
/// Maximum number of extents. Our limit: a split disk of 62 TiB.
const MAX_EXTENTS: usize = 32_768;
/// Number of sectors to which VirtualBox rounds the capacity of a header up: 64 KiB.
const CAPACITY_UNIT: u64 = 128;
/// Content identifier that means "no parent".
pub(crate) const NO_PARENT: u32 = u32::MAX;

/// Access to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// RW or RDONLY: the same for reading.
    Readable,
    /// NOACCESS: there is nothing behind the extent.
    None,
}

/// Kind of an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// FLAT, VMFS: the guest's bytes.
    Flat,
    Zero,
    /// A hosted sparse file.
    Sparse,
    /// A COWD file.
    VmfsSparse,
    SeSparse,
}

/// A line of an extent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ExtentLine {
    pub(crate) access: Access,
    pub(crate) sectors: u64,
    pub(crate) kind: Kind,
    /// Type as written, for messages and facts.
    pub(crate) type_name: String,
    /// Name of the file; empty for zeros.
    pub(crate) name: String,
    /// Sector of the file at which the extent begins.
    pub(crate) offset: u64,
}

/// A descriptor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub(crate) cid: Option<u32>,
    pub(crate) parent_cid: Option<u32>,
    pub(crate) create_type: Option<String>,
    pub(crate) parent_hint: Option<String>,
    pub(crate) uuids: Uuids,
    pub(crate) adapter: Option<String>,
    pub(crate) hardware_version: Option<String>,
    pub(crate) extents: Vec<ExtentLine>,
}

impl Descriptor {
    /// True if a text begins like a descriptor. `head` contains its first bytes.
    pub(crate) fn probe(head: &[u8]) -> bool {
        let text = without_mark(head.split(|byte| *byte == 0).next().unwrap_or_default());
        let is_text = |byte: &u8| *byte >= b' ' || matches!(byte, b'\t' | b'\r' | b'\n');
        if text.len() < 16 || !text.iter().all(is_text) {
            return false;
        }
        text.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).any(|line| {
            let line = line.to_ascii_lowercase();
            let comment = line.strip_prefix(b"#").map(<[u8]>::trim_ascii_start).unwrap_or_default();
            let key = line.split(|byte| *byte == b'=').next().unwrap_or_default();
            comment.starts_with(b"disk descriptor")
                || comment.starts_with(b"description file created by vmdk")
                || key.trim_ascii() == b"createtype" && line.contains(&b'=')
        })
    }

    /// Parses a text, which ends at its first NUL.
    ///
    /// # Errors
    /// `Malformed` for lines that are neither settings nor extents and for numbers out of bounds;
    /// `LimitExceeded`; `Unsupported` for encrypted disks and devices.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let text = without_mark(bytes.split(|byte| *byte == 0).next().unwrap_or_default());
        if text.len() > MAX_LEN {
            return Err(Error::limit(format!("the descriptor is longer than {MAX_LEN} bytes")));
        }
        let text = decode(text)?;
        let mut descriptor = Self::default();
        let mut sectors = 0u64;
        for (number, line) in (1..).zip(text.split('\n')) {
            let on_line = |what: String| format!("line {number} of the descriptor {what}");
            if line.len() > MAX_LINE_LEN {
                return Err(Error::limit(on_line(format!("is longer than {MAX_LINE_LEN} bytes"))));
            }
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(access) = access(line) {
                let extent = ExtentLine::parse(access, line, &on_line)?;
                sectors = sectors.saturating_add(extent.sectors);
                if sectors >= MAX_SECTORS || descriptor.extents.len() == MAX_EXTENTS {
                    return Err(Error::limit(format!(
                        "the descriptor has more than {MAX_EXTENTS} extents, or more than 2^54 sectors"
                    )));
                }
                descriptor.extents.push(extent);
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                return Err(Error::malformed(on_line(format!(
                    "is neither a setting nor an extent: '{}'",
                    shorten(line)
                ))));
            };
            descriptor.set(&key.trim().to_ascii_lowercase(), unquote(value.trim()), &on_line)?;
        }
        let is_unidentified = descriptor.parent_cid.is_none() && descriptor.uuids.parent.is_none();
        if let Some(hint) = descriptor.hint().filter(|_| is_unidentified) {
            return Err(Error::malformed(format!(
                "the descriptor names a parent, '{}', but no content identifier of it (parentCID)",
                shorten(hint)
            )));
        }
        Ok(descriptor)
    }

    /// Parses the descriptor within a sparse file that has this header. A salvage does without a damaged one, and
    /// accepts one that contradicts the file.
    ///
    /// # Errors
    /// Same as [`Descriptor::parse`]; `Malformed` or `Unsupported` if it has no extent or several, or contradicts
    /// the header.
    pub(crate) fn embedded(text: &[u8], header: &Header, salvage: bool) -> Result<Option<Self>> {
        let parsed = Self::parse(text).and_then(|descriptor| {
            if descriptor.extents.is_empty() {
                return Err(Error::malformed("the descriptor in the file has no extents").remedied_by(
                    Remedy::Salvage("if this is a part of a split disk, name the disk's descriptor".into()),
                ));
            }
            Ok(descriptor)
        });
        let descriptor = match parsed {
            Err(_) if salvage && !header.is_wrapper() => return Ok(None),
            parsed => parsed?,
        };
        if !salvage && !header.is_wrapper() {
            descriptor.single_sectors(header)?;
        }
        Ok(Some(descriptor))
    }

    /// Returns the size in sectors of the disk in a single sparse file that has this descriptor and this
    /// header. In a salvage, the two may contradict each other: then the header counts, and the fault is
    /// returned.
    pub(crate) fn disk_sectors(descriptor: Option<&Self>, header: &Header) -> (u64, Option<String>) {
        match descriptor.map(|descriptor| descriptor.single_sectors(header)) {
            None => (header.capacity, None),
            Some(Ok(sectors)) => (sectors, None),
            Some(Err(error)) => (header.capacity, Some(format!("unverified: {}", error.message()))),
        }
    }

    /// Checks that the descriptor is that of a single sparse file with this header, and returns the number of
    /// sectors of its line. The capacity of the header may be rounded up.
    fn single_sectors(&self, header: &Header) -> Result<u64> {
        let capacity = header.capacity;
        let contradiction = |what: String| {
            Error::malformed(what)
                .remedied_by(Remedy::Salvage("make the image again, or use a backup".into()))
        };
        let [line] = &self.extents[..] else {
            return Err(Error::unsupported("the descriptor in the sparse file has more than one extent")
                .hint("save the descriptor as a file beside it, and name that"));
        };
        if line.kind != Kind::Sparse || line.access != Access::Readable {
            let access = if line.access == Access::None { " without access" } else { "" };
            return Err(contradiction(format!(
                "the descriptor in the sparse file has an extent of type {}{access}, not SPARSE",
                line.type_name
            )));
        }
        // The parser bounds the line to 2^54 sectors.
        let rounded = line.sectors.next_multiple_of(header.grain_size.max(CAPACITY_UNIT));
        if line.sectors > capacity || capacity > rounded {
            return Err(contradiction(format!(
                "the descriptor says that the disk has {} sectors, but the header {capacity}",
                line.sectors
            )));
        }
        Ok(line.sectors)
    }

    fn set(&mut self, key: &str, value: &str, on_line: &dyn Fn(String) -> String) -> Result<()> {
        let is_filter = key == "ddb.iofilters" && value.to_ascii_lowercase().contains("vmwarevmcrypt");
        if key.starts_with("encryption") || is_filter {
            return Err(Error::unsupported("the disk is encrypted, which is not supported")
                .hint("decrypt it with the program that made it"));
        }
        let text = match key {
            "cid" => return set_cid(&mut self.cid, value, on_line),
            "parentcid" => return set_cid(&mut self.parent_cid, value, on_line),
            "createtype" => &mut self.create_type,
            "parentfilenamehint" => &mut self.parent_hint,
            "ddb.adaptertype" => &mut self.adapter,
            "ddb.virtualhwversion" => &mut self.hardware_version,
            _ => return self.uuids.set(key, value, on_line),
        };
        if text.as_ref().is_some_and(|known| known != value) {
            return Err(Error::malformed(on_line(format!("sets {key} a second time"))));
        }
        *text = Some(value.to_owned());
        Ok(())
    }

    /// Returns the size of the disk in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        // The parser bounds the sum.
        self.extents.iter().map(|extent| extent.sectors).sum()
    }
}

impl ExtentLine {
    /// Parses `ACCESS LENGTH TYPE ["NAME" [OFFSET]]`.
    fn parse(access: Access, line: &str, on_line: &dyn Fn(String) -> String) -> Result<Self> {
        let malformed = |what: &str| Error::malformed(on_line(format!("{what}: '{}'", shorten(line))));
        let (before, name, after) = match line.split_once('"') {
            None => (line, None, ""),
            Some((before, rest)) => {
                let (name, after) = rest.split_once('"').ok_or_else(|| malformed("has an unclosed name"))?;
                (before, Some(name), after)
            }
        };
        let mut words = before.split_whitespace().skip(1);
        let sectors = words.next().and_then(number).ok_or_else(|| malformed("has no valid length"))?;
        let type_name = words.next().ok_or_else(|| malformed("has no type of extent"))?.to_ascii_uppercase();
        let kind = match &*type_name {
            "FLAT" | "VMFS" => Kind::Flat,
            "ZERO" => Kind::Zero,
            "SPARSE" => Kind::Sparse,
            "VMFSSPARSE" => Kind::VmfsSparse,
            "SESPARSE" => Kind::SeSparse,
            "VMFSRDM" | "VMFSRDMP" | "VMFSRAW" => {
                return Err(Error::unsupported(on_line(format!("names a device ({type_name})")))
                    .hint("read the device itself as a raw disk"));
            }
            _ => return Err(Error::unsupported(on_line(format!("has the unknown type '{type_name}'")))),
        };
        if words.next().is_some() || sectors >= MAX_SECTORS {
            return Err(malformed("is not a valid extent"));
        }
        let name = name.unwrap_or_default().to_owned();
        if name.is_empty() && kind != Kind::Zero && access == Access::Readable {
            return Err(malformed("has no name of a file"));
        }
        let mut words = after.split_whitespace();
        let offset = match words.next() {
            None => 0,
            Some(word) => number(word)
                .filter(|offset| *offset < MAX_SECTORS)
                .ok_or_else(|| malformed("has no valid offset"))?,
        };
        // A partition of a device has its identifier there.
        if words.next().is_some_and(|word| !word.eq_ignore_ascii_case("partitionUUID")) {
            return Err(malformed("continues after the offset"));
        }
        Ok(Self { access, sectors, kind, type_name, name, offset })
    }
}

/// Removes the byte order mark of UTF-8, which text editors of Windows put in front.
fn without_mark(text: &[u8]) -> &[u8] {
    text.strip_prefix(b"\xef\xbb\xbf").unwrap_or(text)
}

fn access(line: &str) -> Option<Access> {
    let word = line.split_whitespace().next()?.to_ascii_uppercase();
    match &*word {
        "RW" | "RDONLY" => Some(Access::Readable),
        "NOACCESS" => Some(Access::None),
        _ => None,
    }
}

/// Parses an unsigned decimal number of digits alone.
fn number(word: &str) -> Option<u64> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok()).flatten()
}

fn set_cid(field: &mut Option<u32>, value: &str, on_line: &dyn Fn(String) -> String) -> Result<()> {
    let is_hex = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_hexdigit());
    let cid = is_hex.then(|| u32::from_str_radix(value, 16).ok()).flatten();
    let Some(cid) = cid else {
        return Err(Error::malformed(on_line(format!(
            "has the content identifier '{}', which is not a hexadecimal number of 32 bits",
            shorten(value)
        ))));
    };
    if field.is_some_and(|known| known != cid) {
        return Err(Error::malformed(on_line("sets a content identifier a second time".to_owned())));
    }
    *field = Some(cid);
    Ok(())
}

fn unquote(value: &str) -> &str {
    value.strip_prefix('"').and_then(|value| value.strip_suffix('"')).unwrap_or(value)
}

/// Shortens a line for a message.
fn shorten(line: &str) -> String {
    let short: String = line.chars().take(60).collect();
    escape_control(if short.len() < line.len() { &short } else { line })
}

/// Decodes a text: as UTF-8 or, if it is not, in the encoding that it states. Encodings matter only for names.
fn decode(text: &[u8]) -> Result<String> {
    if let Ok(text) = std::str::from_utf8(text) {
        return Ok(text.to_owned());
    }
    let lines = text.split(|byte| *byte == b'\n').map(|line| line.trim_ascii().to_ascii_lowercase());
    let mut stated = lines.filter_map(|line| {
        let (key, value) = std::str::from_utf8(&line).ok()?.split_once('=')?;
        (key.trim() == "encoding").then(|| unquote(value.trim()).to_owned())
    });
    let stated = stated.next().unwrap_or_else(|| "utf-8".to_owned());
    let encoding = Encoding::for_label(stated.as_bytes()).filter(|encoding| encoding.is_ascii_compatible());
    let decoded = encoding.and_then(|e| e.decode_without_bom_handling_and_without_replacement(text));
    decoded.map(Cow::into_owned).ok_or_else(|| {
        let what =
            if encoding.is_some() { "has characters that are not" } else { "has an unknown encoding:" };
        Error::unsupported(format!("the descriptor {what} {}", escape_control(&stated)))
            .hint("rename the files of the disk to plain names, in the descriptor too")
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TEXT: &str = "# Disk DescriptorFile\r\nversion=1\r\nCID = fffffffe\nparentCID=ffffffff\n\
        createType=\"custom\"\n\n  rw 10 flat \"a b.vmdk\" 7\nRDONLY 20 ZERO\nNOACCESS 5 FLAT \"x\"\n\
        RW 3 VMFS \"c-flat.vmdk\"\n#DDB\nddb.adapterType = \"ide\"\n\0\0garbage \"";

    #[test]
    fn parses_settings_and_extents() {
        let found = Descriptor::parse(TEXT.as_bytes()).unwrap();
        assert_eq!((found.cid, found.is_child()), (Some(0xffff_fffe), false));
        assert_eq!((found.create_type.as_deref(), found.adapter.as_deref()), (Some("custom"), Some("ide")));
        assert_eq!((found.extents.len(), found.sectors()), (4, 38));
        let first = &found.extents[0];
        assert_eq!((&*first.name, first.offset, first.kind), ("a b.vmdk", 7, Kind::Flat));
        assert_eq!(found.extents[2].access, Access::None);
    }

    #[test]
    fn refuses_what_is_no_number_and_what_is_no_setting() {
        let lines = [
            ("RW 0x10 ZERO", "length"),
            ("RW -1 ZERO", "length"),
            ("RW +1 ZERO", "length"),
            ("RW 99999999999999999999999 ZERO", "length"),
            ("RW 1 FLAT \"a\" -1", "offset"),
            ("RW 1 FLAT", "no name"),
            ("RW 1 FLAT \"a", "unclosed"),
            ("RW 1 STRANGE \"a\"", "unknown type"),
            ("RW 1 VMFSRDM \"a\"", "device"),
            ("R W 1 ZERO", "neither"),
            ("CID=xyz", "hexadecimal"),
            ("CID=+1", "hexadecimal"),
            ("CID=1\nCID=2", "second time"),
            ("encryption.keySafe = \"x\"", "encrypted"),
            ("ddb.iofilters = \"vmwarevmcrypt\"", "encrypted"),
            ("RW 18014398509481984 ZERO", "valid extent"),
            ("RW 18014398509481983 ZERO\nRW 1 ZERO", "2^54"),
        ];
        for (line, expected) in lines {
            let error = Descriptor::parse(line.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(expected), "{line}: {error}");
        }
        assert!(Descriptor::parse("x".repeat(5000).as_bytes()).unwrap_err().to_string().contains("longer"));
    }

    #[test]
    fn recognises_descriptors_of_several_programs() {
        for text in [
            "# Disk DescriptorFile\nversion=1\n",
            "#Disk Descriptor File\nversion=1\n",
            "# Description file created by VMDK stream converter\n",
            "version=1\nCID=123\ncreateType=\"vmfs\"\n",
        ] {
            assert!(Descriptor::probe(text.as_bytes()), "{text}");
        }
        for text in ["# a script\necho createTypes\n", "", "createType=\u{1}xxxxxxxxxxxxxxxxxxxx"] {
            assert!(!Descriptor::probe(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn decodes_names_as_the_text_states() {
        let parse = |encoding: &str, name: &[u8]| {
            let head = format!("encoding=\"{encoding}\"\nRW 1 FLAT \"").into_bytes();
            let text = [&head[..], name, b".vmdk\" 0\n"].concat();
            Descriptor::parse(&text).map(|found| found.extents[0].name.clone())
        };
        for (encoding, name, expected) in [
            ("windows-1252", &b"\xe4"[..], "\u{e4}"),
            ("GBK", b"\xb4\xc5\xc5\xcc", "\u{78c1}\u{76d8}"),
            ("Shift_JIS", b"\x95\x5c", "\u{8868}"),
            ("Big5", b"\xba\xcf", "\u{78c1}"),
            ("EUC-KR", b"\xb0\xa1", "\u{ac00}"),
            ("UTF-8", "\u{8868}".as_bytes(), "\u{8868}"),
        ] {
            assert_eq!(parse(encoding, name).unwrap(), format!("{expected}.vmdk"), "{encoding}");
        }
        for (encoding, name, expected) in [
            ("GBK", &b"\x80\xff"[..], "not gbk"),
            ("UTF-8", b"\xe4", "not utf-8"),
            ("UTF-16", b"\xe4", "unknown encoding: utf-16"),
            ("klingon", b"\xe4", "unknown encoding: klingon"),
        ] {
            let error = parse(encoding, name).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}, not {expected}");
        }
    }

    #[test]
    fn a_name_ends_at_its_quote() {
        let line = "RW 8 FLAT \"a\" 7 partitionUUID \"abc\"";
        let found = Descriptor::parse(line.as_bytes()).unwrap();
        assert_eq!((&*found.extents[0].name, found.extents[0].offset), ("a", 7));
    }
}
