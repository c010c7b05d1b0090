//! Snapshot table: the internal snapshots of an image.

use imgtool_core::error::escape_control;
use imgtool_core::{Error, RandomInput, Result, SnapshotChoice};

use super::header::Header;
use super::table::{be16, be32, be64, check_table, read_zero_filled};
use super::{LISTED_ENTRY_BYTES, MAX_L1_BYTES, MAX_LISTED_BYTES, MAX_SNAPSHOT_TABLE_BYTES};

/// Length in bytes of an entry before its extra data. Specification, "Snapshots".
const FIXED_LEN: usize = 40;

/// Maximum length in bytes of an entry's extra data. QEMU's limit.
const MAX_EXTRA: u32 = 1024;

/// Minimum length in bytes of the extra data in version 3. Specification, "Snapshots", "extra data".
const V3_EXTRA: u32 = 16;

/// Maximum number of snapshots in a message. Our limit.
const MAX_SHOWN: usize = 16;

/// Entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Host offset of the entry.
    pub entry_offset: u64,
    /// Host offset of the L1 table.
    pub l1_offset: u64,
    /// Number of entries in the L1 table.
    pub l1_entries: u32,
    /// Unique ID; untrusted.
    pub id: String,
    /// Name; untrusted.
    pub name: String,
    /// Creation time in seconds since the epoch.
    pub date_sec: u32,
    /// Nanoseconds of the creation time after `date_sec`.
    pub date_nsec: u32,
    /// Run time of the guest in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Size in bytes of the saved machine state.
    pub vm_state_size: u64,
    /// Virtual size in bytes; the image's if the entry has none.
    pub virtual_size: u64,
    /// QEMU's instruction counter, if it was enabled.
    pub icount: Option<u64>,
    /// True if the entry lacks the sizes of machine state and disk, which version 3 requires.
    pub incomplete: bool,
}

/// Part of the snapshot table that is kept in memory.
#[derive(Debug, Default)]
pub struct Snapshots {
    /// First snapshots of the table, as many as fit into [`MAX_LISTED_BYTES`]; only a few unless the caller
    /// requested all.
    pub listed: Vec<Snapshot>,
    /// Number of snapshots in the table.
    pub count: usize,
    /// Snapshot that the caller selected, if any.
    pub selected: Option<Snapshot>,
}

/// Reads the whole table and finds the snapshot that `choice` means. Lists all snapshots if `list` is set,
/// otherwise the first few for messages.
pub fn read_snapshots(
    input: &RandomInput,
    header: &Header,
    choice: Option<&SnapshotChoice>,
    list: bool,
) -> Result<Snapshots> {
    let mut found = Snapshots::default();
    let (mut preferred, mut accepted) = (None, None);
    let mut budget = MAX_LISTED_BYTES;
    walk_snapshots(input, header, |_, snapshot| {
        let snapshot = snapshot?;
        check_l1(header, &snapshot).map_err(|e| e.at(snapshot.entry_offset))?;
        found.count += 1;
        let is_chosen = |by: &dyn Fn(&SnapshotChoice) -> bool| choice.is_some_and(by);
        if preferred.is_none() && is_chosen(&|choice| choice.prefers(&snapshot.id, &snapshot.name)) {
            preferred = Some(snapshot.clone());
        } else if accepted.is_none() && is_chosen(&|choice| choice.accepts(&snapshot.name)) {
            accepted = Some(snapshot.clone());
        }
        let bytes = snapshot.id.len() + snapshot.name.len() + LISTED_ENTRY_BYTES;
        let is_listed = list || found.listed.len() < MAX_SHOWN;
        if is_listed && bytes <= budget && found.listed.len() + 1 == found.count {
            budget -= bytes;
            found.listed.push(snapshot);
        }
        Ok(())
    })?;
    found.selected = preferred.or(accepted);
    match choice {
        Some(choice) if found.selected.is_none() => Err(unknown_snapshot(choice, &found)),
        _ => Ok(found),
    }
}

/// Calls `visit` with the index and the entry of every snapshot. Returns the table's length in bytes.
///
/// For an entry that the end of the file cuts short, `visit` first receives an error. If it returns the
/// error, the walk ends; otherwise it then receives the entry, with zeros in place of the missing bytes.
pub fn walk_snapshots(
    input: &RandomInput,
    header: &Header,
    mut visit: impl FnMut(u32, Result<Snapshot>) -> Result<()>,
) -> Result<u64> {
    let mut entry_offset = header.snapshots_offset;
    for index in 0..header.snapshot_count {
        let used = entry_offset - header.snapshots_offset;
        if used > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::limit(format!(
                "the snapshot table has more than {MAX_SNAPSHOT_TABLE_BYTES} bytes"
            ))
            .at(entry_offset));
        }
        let (snapshot, len) = read_snapshot(input, header, entry_offset).map_err(|e| e.at(entry_offset))?;
        let end = entry_offset.checked_add(len);
        let end = end.ok_or_else(|| {
            Error::malformed("the snapshot table extends beyond 2^64 bytes").at(entry_offset)
        })?;
        if end > input.len().next_multiple_of(8) {
            let count = header.snapshot_count;
            visit(
                index,
                Err(Error::corrupt(format!("snapshot {index} of {count} is cut short")).at(entry_offset)),
            )?;
        }
        visit(index, Ok(snapshot))?;
        entry_offset = end;
    }
    Ok(entry_offset - header.snapshots_offset)
}

/// Reads the entry at `entry_offset`. Returns it with its padded length in bytes.
fn read_snapshot(input: &RandomInput, header: &Header, entry_offset: u64) -> Result<(Snapshot, u64)> {
    let fixed = read_zero_filled(input, entry_offset, FIXED_LEN)?;
    let cut = || Error::corrupt("a snapshot entry is cut short");
    let id_len = usize::from(be16(&fixed, 12).ok_or_else(cut)?);
    let name_len = usize::from(be16(&fixed, 14).ok_or_else(cut)?);
    let extra_len = be32(&fixed, 36).ok_or_else(cut)?;
    if extra_len > MAX_EXTRA {
        return Err(Error::limit(format!(
            "a snapshot has {extra_len} bytes of extra data, above {MAX_EXTRA}"
        )));
    }
    // At most 40 + 1 KiB + 2 * 64 KiB.
    let len = FIXED_LEN + extra_len as usize + id_len + name_len;
    let entry = read_zero_filled(input, entry_offset, len)?;
    let extra = &entry[FIXED_LEN..FIXED_LEN + extra_len as usize];
    let (id, name) = entry[FIXED_LEN + extra.len()..].split_at(id_len);
    let snapshot = Snapshot {
        entry_offset,
        l1_offset: be64(&entry, 0).ok_or_else(cut)?,
        l1_entries: be32(&entry, 8).ok_or_else(cut)?,
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        date_sec: be32(&entry, 16).ok_or_else(cut)?,
        date_nsec: be32(&entry, 20).ok_or_else(cut)?,
        vm_clock_nsec: be64(&entry, 24).ok_or_else(cut)?,
        vm_state_size: be64(extra, 0).unwrap_or(u64::from(be32(&entry, 32).ok_or_else(cut)?)),
        virtual_size: be64(extra, 8).unwrap_or(header.virtual_size),
        icount: be64(extra, 16).filter(|icount| *icount != u64::MAX),
        incomplete: header.version >= 3 && extra_len < V3_EXTRA,
    };
    Ok((snapshot, len.next_multiple_of(8) as u64))
}

/// Checks the location and size of a snapshot's L1 table.
pub fn check_l1(header: &Header, snapshot: &Snapshot) -> Result<()> {
    check_table(
        "a snapshot's L1 table",
        snapshot.l1_offset,
        u64::from(snapshot.l1_entries) * 8,
        MAX_L1_BYTES,
        header.shape.cluster_size(),
        snapshot.entry_offset,
    )
}

fn unknown_snapshot(choice: &SnapshotChoice, found: &Snapshots) -> Error {
    let known: Vec<String> = found
        .listed
        .iter()
        .take(MAX_SHOWN)
        .map(|snapshot| format!("{} ({})", snapshot.id, snapshot.name))
        .collect();
    let hint = if known.is_empty() {
        "the image has no internal snapshots".to_owned()
    } else {
        format!("its snapshots: {}", escape_control(&known.join(", ")))
    };
    Error::usage(format!("the image has no snapshot {choice}")).hint(hint)
}
