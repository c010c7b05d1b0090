//! Helpers for tables and big-endian fields: bounds checks, decoding and encoding, reading and writing.

use imgtool_core::{Error, Output, RandomInput, Result, zero};

/// Checks a table's location and size: at most `max_len` bytes, aligned to clusters, and ending below 2^63.
/// `field_offset` is the file offset of the field that contains the location, for the error.
pub fn check_table(
    what: &str,
    host_offset: u64,
    len: u64,
    max_len: u64,
    cluster_size: u64,
    field_offset: u64,
) -> Result<()> {
    if len > max_len {
        return Err(Error::limit(format!("{what} has {len} bytes, above {max_len}")).at(field_offset));
    }
    // QEMU's limit and ours: file positions are signed 64-bit numbers.
    let fits = host_offset.checked_add(len).is_some_and(|end| i64::try_from(end).is_ok());
    if !host_offset.is_multiple_of(cluster_size) || !fits {
        return Err(Error::malformed(format!(
            "{what} is at offset {host_offset}, which is not aligned to clusters of {cluster_size} bytes or too large"
        ))
        .at(field_offset));
    }
    Ok(())
}

/// Reads `len` bytes at `host_offset`, with zeros in place of bytes beyond the end of the file, so that a
/// truncated structure can still be examined. The caller bounds `len`.
pub fn read_zero_filled(input: &RandomInput, host_offset: u64, len: usize) -> Result<Vec<u8>> {
    let available = input.len().saturating_sub(host_offset).min(len as u64);
    let mut bytes = vec![0; len];
    if available > 0 {
        // At most `len`, so the cast is lossless.
        input.read_exact_at(&mut bytes[..available as usize], host_offset)?;
    }
    Ok(bytes)
}

/// Writes `table` at `host_offset`. Zeros, which make up much of a table, take no space in a new file.
pub fn write_table(output: &Output, table: &[u8], host_offset: u64) -> Result<()> {
    let mut runs = Vec::new();
    zero::push_nonzero_runs(table, 0..table.len(), zero::ZERO_GRANULARITY, &mut runs);
    let mut done = 0;
    for run in runs {
        output.write_zeros_at(host_offset + done as u64, (run.start - done) as u64)?;
        output.write_at(&table[run.clone()], host_offset + run.start as u64)?;
        done = run.end;
    }
    output.write_zeros_at(host_offset + done as u64, (table.len() - done) as u64)
}

/// Decodes a table of eight-byte entries. Ignores bytes after the last whole entry.
pub fn decode_table(bytes: &[u8]) -> Vec<u64> {
    let (entries, _) = bytes.as_chunks::<8>();
    entries.iter().map(|entry| u64::from_be_bytes(*entry)).collect()
}

/// Encodes a table of eight-byte entries and appends it to `bytes`.
pub fn encode_table(entries: &[u64], bytes: &mut Vec<u8>) {
    bytes.reserve(entries.len() * 8);
    for entry in entries {
        bytes.extend_from_slice(&entry.to_be_bytes());
    }
}

/// Decodes the eight-byte number at index `at`; `None` if it extends past the end of `bytes`.
pub fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(field.try_into().ok()?))
}

/// Decodes the four-byte number at index `at`; `None` if it extends past the end of `bytes`.
pub fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(field.try_into().ok()?))
}

/// Decodes the two-byte number at index `at`; `None` if it extends past the end of `bytes`.
pub fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let field = bytes.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(field.try_into().ok()?))
}
