//! The table of internal snapshots.

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Error, RandomInput, Result};

use super::header::{Header, check_table};
use super::{
    LISTED_ENTRY_BYTES, MAX_L1_BYTES, MAX_LISTED_BYTES, MAX_SNAPSHOT_TABLE_BYTES, be16, be32, be64,
    read_zero_filled,
};

/// Specification, "Snapshot table entry": bytes before the extra data.
const FIXED_LEN: usize = 40;

/// Ours: the extra data that is read; what is beyond is unknown and skipped. QEMU's limit is 1024.
const MAX_EXTRA: u32 = 1024;

/// Specification, "extra data": the sizes that version 3 asks for.
const V3_EXTRA: u32 = 16;

/// Snapshots that a message lists. Ours.
const MAX_SHOWN: usize = 16;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its entry is.
    pub at: u64,
    /// Where its L1 table starts.
    pub l1_offset: u64,
    /// Its entries.
    pub l1_entries: u32,
    /// Its unique ID; not trusted.
    pub id: String,
    /// Its name; not trusted.
    pub name: String,
    /// When it was taken: seconds since the epoch.
    pub date_sec: u32,
    /// The rest of it, nanoseconds.
    pub date_nsec: u32,
    /// For how long the guest had run, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// Bytes of disk; the image's where the entry is too old to say.
    pub virtual_size: u64,
    /// QEMU's instruction counter, if it was on.
    pub icount: Option<u64>,
    /// The entry says neither the machine state's nor the disk's size, which version 3 asks for.
    pub incomplete: bool,
}

/// What of the snapshot table is kept in memory.
#[derive(Debug, Default)]
pub struct Snapshots {
    /// The first of them: all, unless there are very many.
    pub listed: Vec<Snapshot>,
    /// How many there are.
    pub count: usize,
    /// The one that was asked for.
    pub wanted: Option<Snapshot>,
}

/// Reads the whole table: finds the snapshot that a user calls `wanted` (by ID, else by name), and
/// lists all of them if `list` says so.
pub fn read_snapshots(
    input: &RandomInput,
    header: &Header,
    wanted: Option<&str>,
    list: bool,
) -> Result<Snapshots> {
    let mut found = Snapshots::default();
    let (mut by_id, mut by_name) = (None, None);
    let mut room = MAX_LISTED_BYTES;
    walk_snapshots(input, header, |_, snapshot| {
        let snapshot = snapshot?;
        check_l1(header, &snapshot).map_err(|e| e.at(snapshot.at))?;
        found.count += 1;
        if wanted == Some(snapshot.id.as_str()) && by_id.is_none() {
            by_id = Some(snapshot.clone());
        } else if wanted == Some(snapshot.name.as_str()) && by_name.is_none() {
            by_name = Some(snapshot.clone());
        }
        let bytes = snapshot.id.len() + snapshot.name.len() + LISTED_ENTRY_BYTES;
        let is_listed = list || found.listed.len() < MAX_SHOWN;
        if is_listed && bytes <= room && found.listed.len() + 1 == found.count {
            room -= bytes;
            found.listed.push(snapshot);
        }
        Ok(())
    })?;
    found.wanted = by_id.or(by_name);
    match wanted {
        Some(wanted) if found.wanted.is_none() => Err(not_there(wanted, &found)),
        _ => Ok(found),
    }
}

/// Calls `see` with the number and the entry of every snapshot: an error for one that is cut short,
/// which ends the walk if `see` returns it, and else reads as if the file went on with zeros. The
/// table's length.
pub fn walk_snapshots(
    input: &RandomInput,
    header: &Header,
    mut see: impl FnMut(u32, Result<Snapshot>) -> Result<()>,
) -> Result<u64> {
    let mut at = header.snapshots_offset;
    for number in 0..header.snapshot_count {
        let used = at - header.snapshots_offset;
        if used > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::limit(format!(
                "the snapshot table has more than {MAX_SNAPSHOT_TABLE_BYTES} bytes"
            ))
            .at(at));
        }
        let (snapshot, len) = read_snapshot(input, header, at).map_err(|e| e.at(at))?;
        let end = at.checked_add(len);
        let end = end.ok_or_else(|| Error::malformed("the snapshot table never ends").at(at))?;
        if end > input.len().next_multiple_of(8) {
            let count = header.snapshot_count;
            see(number, Err(Error::corrupt(format!("snapshot {number} of {count} is cut short")).at(at)))?;
        }
        see(number, Ok(snapshot))?;
        at = end;
    }
    Ok(at - header.snapshots_offset)
}

fn read_snapshot(input: &RandomInput, header: &Header, at: u64) -> Result<(Snapshot, u64)> {
    let fixed = read_zero_filled(input, at, FIXED_LEN)?;
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
    let entry = read_zero_filled(input, at, len)?;
    let extra = &entry[FIXED_LEN..FIXED_LEN + extra_len as usize];
    let (id, name) = entry[FIXED_LEN + extra.len()..].split_at(id_len);
    let snapshot = Snapshot {
        at,
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

/// Whether a snapshot's L1 table can be one.
pub fn check_l1(header: &Header, snapshot: &Snapshot) -> Result<()> {
    check_table(
        "a snapshot's L1 table",
        snapshot.l1_offset,
        u64::from(snapshot.l1_entries) * 8,
        MAX_L1_BYTES,
        header.shape.cluster_size(),
        snapshot.at,
    )
}

fn not_there(wanted: &str, found: &Snapshots) -> Error {
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
    Error::usage(format!("the image has no snapshot '{wanted}'")).hint(hint)
}
