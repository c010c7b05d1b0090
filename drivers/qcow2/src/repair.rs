//! Repair of refcounts, copied flags and the dirty and corrupt bits.
//!
//! The tables that map the disk are right by definition, as long as they are intact: refcounts and flags follow
//! from them. A refcount that is too low could let a writer use a cluster twice, so those are raised first, and a
//! crash in between leaves leaks at worst. Lost tables are not rebuilt.

use imgtool_core::{CheckReport, Error, OpenOptions, Output, RandomInput, Repair, Result};

use crate::check::{self, Correction};
use crate::layout::entry::{L1Entry, L2Entry, Shape};
use crate::layout::header::{Header, INCOMPATIBLE_CORRUPT, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_DIRTY};
use crate::layout::table::{decode_table, encode_table};
use crate::update::refcounts::{NEW_IMAGE, RefcountEditor};

/// File offset of the field "incompatible_features". Specification, "Header".
const INCOMPATIBLE_FIELD: u64 = 72;

/// Repairs the image in `output`. Returns the report of a check before the repair.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if tables are damaged in a way that this repair does not mend; nothing has
/// been written then.
pub fn repair(output: &Output, what: Repair, options: &OpenOptions) -> Result<CheckReport> {
    let open = || output.reopen(&options.memory)?.into_random();
    let header = Header::read(&open()?)?;
    let found = check::check_counting(open()?, options)?;
    if found.report.check_errors > 0 || found.report.corruptions > found.refcount_faults {
        let first = found.report.findings.first().map(|finding| format!(" ({finding})")).unwrap_or_default();
        return Err(Error::refused(format!("the tables of the image are damaged{first}"))
            .path(output.location())
            .hint(NEW_IMAGE));
    }
    header.clear_unknown_autoclear(output)?;
    let mut refcounts = RefcountEditor::open(output, &header, &options.memory)?;
    if what == Repair::All {
        check::correct(open()?, options, &mut refcounts, Correction::Raise)?;
        flush(output, &mut refcounts)?;
    }
    check::correct(open()?, options, &mut refcounts, Correction::Lower)?;
    flush(output, &mut refcounts)?;
    // A refcount that was lowered to one makes a copied flag wrong. Beside refcounts that are too low, the flags stay:
    // they would promise that nobody else uses the cluster.
    if what == Repair::All || found.report.corruptions == 0 {
        correct_flags(&open()?, output, &header, &mut refcounts)?;
        output.sync()?;
    }
    if what == Repair::All {
        let clean = header.incompatible & !(INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT);
        if header.version >= 3 && clean != header.incompatible {
            output.write_at(&clean.to_be_bytes(), INCOMPATIBLE_FIELD)?;
        }
    }
    output.sync()?;
    Ok(found.report)
}

fn flush(output: &Output, refcounts: &mut RefcountEditor) -> Result<()> {
    refcounts.write_changed()?;
    output.sync()
}

/// Sets the copied flag of each entry of the active tables if and only if the refcount is one.
fn correct_flags(
    input: &RandomInput,
    output: &Output,
    header: &Header,
    refcounts: &mut RefcountEditor,
) -> Result<()> {
    // The header check bounds the table to 32 MiB.
    let len = usize::try_from(u64::from(header.l1_entries) * 8).unwrap_or(usize::MAX);
    let old = decode_table(&input.read_vec(header.l1_offset, len)?);
    let mut new = old.clone();
    for entry in new.iter_mut().filter(|entry| L1Entry(**entry).l2_offset() != 0) {
        let l2_offset = L1Entry(*entry).l2_offset();
        correct_l2(input, output, header, l2_offset, refcounts)?;
        *entry = L1Entry(*entry).with_copied(refcounts.get(l2_offset)? == 1).0;
    }
    write_changes(output, header.l1_offset, &old, &new)
}

fn correct_l2(
    input: &RandomInput,
    output: &Output,
    header: &Header,
    l2_offset: u64,
    refcounts: &mut RefcountEditor,
) -> Result<()> {
    let shape: Shape = header.shape;
    let old = decode_table(&input.read_vec(l2_offset, shape.cluster_size() as usize)?);
    let mut new = old.clone();
    for words in new.chunks_mut(shape.l2_entry_words()) {
        let entry = L2Entry(words[0]);
        let copied = if header.has(INCOMPATIBLE_DATA_FILE) {
            // Every cluster in a data file has the flag, and an entry without it has no cluster.
            entry.is_copied() || entry.host_offset() != 0
        } else {
            !entry.is_compressed() && entry.host_offset() != 0 && refcounts.get(entry.host_offset())? == 1
        };
        words[0] = entry.with_copied(copied).0;
    }
    write_changes(output, l2_offset, &old, &new)
}

/// Writes the part of a table from the first to the last entry that changed.
fn write_changes(output: &Output, table_offset: u64, old: &[u64], new: &[u64]) -> Result<()> {
    let changed = |index: &usize| old[*index] != new[*index];
    let Some(first) = (0..new.len()).find(changed) else { return Ok(()) };
    let last = (0..new.len()).rfind(changed).unwrap_or(first);
    let mut bytes = Vec::new();
    encode_table(&new[first..=last], &mut bytes);
    output.write_at(&bytes, table_offset + first as u64 * 8)
}
