//! Fields of VHDX images (MS-VHDX).

use super::Kind::{Count, Flags, Pointer};
use super::{Field, Group, MOST_FIELDS, number};
use crate::sparse::SparseFile;

/// Both headers and both region tables.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];

pub(super) fn groups(file: &SparseFile) -> Vec<Group> {
    let mut groups = Vec::new();
    for at in HEADERS {
        groups.push(header(at));
        let (len, log) = (number(file, at + 68, 4, true), number(file, at + 72, 8, true));
        groups.extend(log_entries(file, log, len));
    }
    for at in REGION_TABLES {
        let mut group = vec![Field::little(at + 8, 4, Count)];
        for entry in (0..3).map(|index| at + 16 + 32 * index) {
            group.push(Field::little(entry, 4, Flags));
            group.push(Field::little(entry + 16, 8, Pointer));
            group.push(Field::little(entry + 24, 4, Count));
            group.push(Field::little(entry + 28, 4, Flags));
        }
        groups.push(group);
    }
    for entry in (0..2).map(|index| REGION_TABLES[0] + 16 + 32 * index) {
        let (at, len) = (number(file, entry + 16, 8, true), number(file, entry + 24, 4, true));
        if number(file, at, 8, true) == u64::from_le_bytes(*b"metadata") {
            groups.extend(metadata(file, at));
        } else {
            groups.push(bat(file, at, len));
        }
    }
    groups
}

fn header(at: u64) -> Group {
    let mut group = vec![
        Field::little(at + 8, 8, Count),
        Field::little(at + 64, 2, Count),
        Field::little(at + 66, 2, Count),
        Field::little(at + 68, 4, Count),
        Field::little(at + 72, 8, Pointer),
    ];
    // The GUIDs: of the file, of the data, of the log.
    group.extend([16, 32, 48, 56].map(|offset| Field::little(at + offset, 8, Flags)));
    group
}

/// Returns the fields of the first log entries, and of their descriptors and data sectors.
fn log_entries(file: &SparseFile, log: u64, len: u64) -> Vec<Group> {
    let mut groups = Vec::new();
    let end = log.saturating_add(len);
    let sectors = file.written(log..end).filter(|at| at % 4096 == 0);
    let entries = sectors.filter(|at| file.bytes(*at..at + 4) == b"loge").take(6);
    for at in entries {
        let fields = [(8, 4, Count), (12, 4, Pointer), (16, 8, Count), (24, 4, Count), (28, 4, Flags)];
        let mut group: Group = fields.map(|(offset, len, kind)| Field::little(at + offset, len, kind)).into();
        group.extend(
            [(32, 8, Flags), (48, 8, Count), (56, 8, Count)]
                .map(|(offset, len, kind)| Field::little(at + offset, len, kind)),
        );
        groups.push(group);
        let mut descriptors = Vec::new();
        let count = number(file, at + 24, 4, true).min(8);
        for descriptor in (0..count).map(|index| at + 64 + 32 * index) {
            let fields = [(0, 4, Flags), (4, 4, Count), (8, 8, Count), (16, 8, Pointer), (24, 8, Count)];
            descriptors
                .extend(fields.map(|(offset, len, kind)| Field::little(descriptor + offset, len, kind)));
        }
        let first_data = at + (64 + 32 * count).next_multiple_of(4096);
        for sector in (0..count).map(|index| first_data + 4096 * index) {
            let fields = [(0, 4, Flags), (4, 4, Count), (8, 8, Pointer), (4092, 4, Count)];
            descriptors.extend(fields.map(|(offset, len, kind)| Field::little(sector + offset, len, kind)));
        }
        groups.push(descriptors);
    }
    groups
}

/// Returns the fields of the metadata table, and of the items.
fn metadata(file: &SparseFile, at: u64) -> Vec<Group> {
    let mut table = vec![Field::little(at.saturating_add(10), 2, Count)];
    let mut items = Vec::new();
    for entry in (0..6).map(|index| at.saturating_add(32 + 32 * index)) {
        let fields = [(0, 4, Flags), (16, 4, Pointer), (20, 4, Count), (24, 4, Flags)];
        table
            .extend(fields.map(|(offset, len, kind)| Field::little(entry.saturating_add(offset), len, kind)));
        let item = at.saturating_add(number(file, entry.saturating_add(16), 4, true));
        let len = number(file, entry.saturating_add(20), 4, true).min(64);
        for word in 0..len / 4 {
            items.push(Field::little(item.saturating_add(4 * word), 4, Count));
        }
        items.push(Field::little(item, 8, Count));
    }
    vec![table, items]
}

/// Returns the entries of the BAT that are in use, and the first.
fn bat(file: &SparseFile, at: u64, len: u64) -> Group {
    let entries = (0..(len / 8).min(1 << 13)).map(|index| at.saturating_add(8 * index));
    let used = entries.filter(|entry| *entry < at.saturating_add(64) || number(file, *entry, 8, true) != 0);
    used.take(MOST_FIELDS / 2)
        // State and file offset.
        .flat_map(|entry| [Field::little(entry, 1, Flags), Field::little(entry, 8, Pointer)])
        .collect()
}
