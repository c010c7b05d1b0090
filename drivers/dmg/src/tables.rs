//! The tables of chunks as the file stores them: in Base64 in a property list, or in a resource fork.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use imgtool_core::{Error, RandomInput, Result};
use quick_xml::Reader;
use quick_xml::events::Event;

use crate::layout::Trailer;

/// Maximum length in bytes of the property list or the resource fork. Our limit: a list of this length has a
/// million chunks, a disk of 1 TiB in chunks of 1 MiB.
const MAX_LEN: u64 = 64 << 20;

/// Factor of the memory for the tables: the list, the Base64 of its longest entry, and that entry decoded.
const MEMORY_FACTOR: u64 = 3;

/// Maximum depth of the elements of the property list. Our limit: lists have 7, and the parser keeps the name of
/// each open element.
const MAX_DEPTH: u64 = 64;

/// Length in bytes of the start of a resource fork.
const FORK_HEADER_LEN: usize = 16;

/// Returns the memory in bytes that [`read`] needs.
pub(crate) fn memory(trailer: &Trailer) -> u64 {
    let len = trailer.list.or(trailer.resources).map_or(0, |(_, len)| len);
    len.min(MAX_LEN) * MEMORY_FACTOR
}

/// Calls `table` with the bytes of every table of chunks.
///
/// # Errors
/// Any error of `table`; `Corrupt` if the file ends early; `Malformed` for a list that can't be parsed;
/// `LimitExceeded` for one that is too long.
pub(crate) fn read(
    input: &RandomInput,
    trailer: &Trailer,
    mut table: impl FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let Some((offset, len)) = trailer.list.or(trailer.resources) else {
        return Err(Error::malformed("the image has neither a property list nor a resource fork"));
    };
    if len > MAX_LEN {
        return Err(
            Error::limit(format!("the tables of chunks have {len} bytes, more than {MAX_LEN}")).at(offset)
        );
    }
    // At most `MAX_LEN`, so it fits.
    let bytes = input.read_vec(offset, len as usize)?;
    let mut found = 0_u64;
    let mut visit = |bytes: &[u8]| {
        found += 1;
        table(bytes)
    };
    let parsed = if trailer.list.is_some() {
        each_in_list(&bytes, &mut visit)
    } else {
        each_in_fork(&bytes, &mut visit)
    };
    parsed.map_err(|error| error.at(offset))?;
    if found == 0 {
        return Err(Error::malformed("the image has no table of chunks").at(offset));
    }
    Ok(())
}

/// Finds the tables in a property list: the entries `Data` of the dictionaries in the array `blkx`.
fn each_in_list(list: &[u8], visit: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let mut reader = Reader::from_reader(list);
    let malformed =
        |why: &dyn std::fmt::Display| Error::malformed(format!("the property list is damaged: {why}"));
    // Depth of the open elements; that of the array of tables, while it is open; the element with the text.
    let (mut depth, mut array) = (0_u64, None);
    let (mut text, mut key) = (String::new(), String::new());
    loop {
        match reader.read_event().map_err(|e| malformed(&e))? {
            Event::Start(element) => {
                depth += 1;
                if depth > MAX_DEPTH {
                    return Err(malformed(&format_args!("its elements are more than {MAX_DEPTH} deep")));
                }
                text.clear();
                if element.name().as_ref() == "array" && key == "blkx" && array.is_none() {
                    array = Some(depth);
                }
            }
            Event::End(element) => {
                match element.name().as_ref() {
                    "key" => key = std::mem::take(&mut text),
                    "data" if array.is_some() && key == "Data" => {
                        text.retain(|c| !c.is_ascii_whitespace());
                        visit(&STANDARD.decode(&text).map_err(|e| malformed(&e))?)?;
                    }
                    _ => {}
                }
                if array == Some(depth) {
                    array = None;
                }
                depth = depth.saturating_sub(1);
                text.clear();
            }
            // Keys and Base64 contain no references.
            Event::Text(part) => text.push_str(&part),
            Event::Eof if depth > 0 => return Err(malformed(&"it ends within an element")),
            Event::Eof => return Ok(()),
            _ => {}
        }
    }
}

/// Finds the tables in a resource fork: the resources that begin with their signature.
fn each_in_fork(fork: &[u8], visit: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
    let number = |at: usize| {
        let bytes = fork.get(at..).and_then(|rest| rest.first_chunk::<4>());
        bytes.map(|bytes| u32::from_be_bytes(*bytes) as usize)
    };
    let (data, len) = match (number(0), number(8)) {
        (Some(data), Some(len)) if data >= FORK_HEADER_LEN => (data, len),
        _ => return Err(Error::malformed("the resource fork has no data")),
    };
    let end = data.saturating_add(len).min(fork.len());
    let mut at = data;
    while let Some(len) = number(at).filter(|_| at < end) {
        let start = at + 4;
        let resource = fork.get(start..start.saturating_add(len)).ok_or_else(|| {
            Error::malformed(format!("a resource of {len} bytes exceeds the resource fork"))
        })?;
        if resource.starts_with(b"mish") {
            visit(resource)?;
        }
        at = start + len;
    }
    Ok(())
}
