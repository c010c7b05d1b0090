//! The table of internal snapshots.

use imgtool_toolkit::{Error, RandomInput, Result};

use super::header::{Header, check_table};
use super::{MAX_L1_BYTES, MAX_SNAPSHOT_TABLE_BYTES, be16, be32, be64};

/// Specification, "Snapshot table entry": bytes before the extra data.
const FIXED_LEN: usize = 40;

/// Ours: the extra data that is read; what is beyond is unknown and skipped. QEMU's limit is 1024.
const MAX_EXTRA: u32 = 1024;

/// One internal snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
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
}

/// The snapshot table.
#[derive(Debug, Clone, Default)]
pub struct SnapshotTable {
    /// Its entries.
    pub snapshots: Vec<Snapshot>,
    /// Its bytes.
    pub len: u64,
}

/// Reads the snapshot table.
pub fn read_snapshots(input: &RandomInput, header: &Header) -> Result<SnapshotTable> {
    let mut snapshots = Vec::new();
    let mut at = header.snapshots_offset;
    for number in 0..header.snapshot_count {
        let used = at - header.snapshots_offset;
        if used > MAX_SNAPSHOT_TABLE_BYTES {
            return Err(Error::limit(format!(
                "the snapshot table has more than {MAX_SNAPSHOT_TABLE_BYTES} bytes"
            ))
            .at(at));
        }
        let (snapshot, len) = read_snapshot(input, header, at).map_err(|e| {
            if e.kind() == imgtool_toolkit::ErrorKind::Corrupt {
                Error::corrupt(format!("snapshot {number} of {} is cut short", header.snapshot_count)).at(at)
            } else {
                e.at(at)
            }
        })?;
        snapshots.push(snapshot);
        at = at.checked_add(len).ok_or_else(|| Error::malformed("the snapshot table never ends").at(at))?;
    }
    Ok(SnapshotTable { snapshots, len: at - header.snapshots_offset })
}

fn read_snapshot(input: &RandomInput, header: &Header, at: u64) -> Result<(Snapshot, u64)> {
    let fixed = input.read_vec(at, FIXED_LEN)?;
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
    let entry = input.read_vec(at, len)?;
    let extra = &entry[FIXED_LEN..FIXED_LEN + extra_len as usize];
    let (id, name) = entry[FIXED_LEN + extra.len()..].split_at(id_len);
    let snapshot = Snapshot {
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
    };
    check_table(
        "a snapshot's L1 table",
        snapshot.l1_offset,
        u64::from(snapshot.l1_entries) * 8,
        MAX_L1_BYTES,
        header.shape.cluster_size(),
        at,
    )?;
    Ok((snapshot, len.next_multiple_of(8) as u64))
}

/// The snapshot that a user calls `wanted`: by ID, else by name.
pub fn find<'a>(snapshots: &'a [Snapshot], wanted: &str) -> Result<&'a Snapshot> {
    let by_id = snapshots.iter().find(|snapshot| snapshot.id == wanted);
    by_id.or_else(|| snapshots.iter().find(|snapshot| snapshot.name == wanted)).ok_or_else(|| {
        let known: Vec<String> = snapshots
            .iter()
            .take(16)
            .map(|snapshot| format!("{} ({})", snapshot.id, snapshot.name))
            .collect();
        let hint = if known.is_empty() {
            "the image has no internal snapshots".to_owned()
        } else {
            format!("its snapshots: {}", imgtool_toolkit::error::escape_control(&known.join(", ")))
        };
        Error::usage(format!("the image has no snapshot '{wanted}'")).hint(hint)
    })
}
