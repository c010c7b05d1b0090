//! The check of a container: its header, the key slots in use with their key material, and its end.

use imgtool_core::unit_check::opened;
use imgtool_core::zero::is_zero;
use imgtool_core::{CheckReport, ErrorKind, Input, OpenOptions, RandomInput, Result};
use imgtool_crypt::{HEADER_LEN, Header, SECTOR};

use crate::source::{content_len, refer_to_raw};

/// Checks a container. With passphrases, also checks that one of them opens it.
///
/// # Errors
/// If the file can't be read, is not a LUKS container, or has a version, a cipher or a hash function that is
/// not supported; `Refused` for a wrong passphrase. Damage is not an error: the report lists it.
pub(crate) fn check(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let input = input.into_random()?;
    let header = input.read_head(HEADER_LEN).and_then(|head| Header::parse(&head)).map_err(refer_to_raw);
    let Some(header) = opened(header, &mut report)? else { return Ok(report) };
    header.cipher()?;
    header.hash()?;
    let len = opened(content_len(&input, header.payload_offset), &mut report)?;
    if let Some(rest) = len.map(|len| len % SECTOR as u64).filter(|rest| *rest != 0) {
        report.corruption(format!(
            "the file ends within a sector, {rest} bytes behind the last whole one: it is cut"
        ));
    }
    check_slots(&input, &header, options, &mut report)?;
    if report.corruptions == 0 && !options.secrets.is_empty() {
        header.unlock(&input, 0..header.payload_offset, &options.secrets, &options.memory)?;
    }
    report.image_end_offset = Some(input.len());
    Ok(report)
}

/// Checks that the key material of each slot in use is before the content, in bytes of its own, and not
/// erased.
fn check_slots(
    input: &RandomInput,
    header: &Header,
    options: &OpenOptions,
    report: &mut CheckReport,
) -> Result<()> {
    let len = header.material_len();
    let _lease = options.memory.lease(len as u64, "the key material of a LUKS header")?;
    let mut used: Vec<(u64, usize)> = Vec::new();
    for (number, slot) in header.slots.iter().enumerate().filter(|(_, slot)| slot.active) {
        // Both are bounded: a sector number of 32 bits, and 4000 keys of 64 bytes.
        let end = slot.offset + len as u64;
        if end > header.payload_offset {
            report.corruption(format!(
                "the key material of slot {number} ends at {end}, but the content begins at {}",
                header.payload_offset
            ));
            continue;
        }
        match input.read_vec(slot.offset, len) {
            Ok(bytes) if is_zero(&bytes) => {
                report.corruption(format!("the key material of slot {number} at {} is erased", slot.offset));
            }
            Err(error) if error.kind() == ErrorKind::Corrupt => report.corruption(format!("{error:#}")),
            read => drop(read?),
        }
        if let Some((_, other)) = used.iter().find(|(start, _)| start.abs_diff(slot.offset) < len as u64) {
            report.corruption(format!("the key material of the slots {other} and {number} overlaps"));
        }
        used.push((slot.offset, number));
    }
    if header.slots.iter().all(|slot| !slot.active) {
        report.corruption("no key slot is in use, so that no passphrase opens the content");
    }
    Ok(())
}
