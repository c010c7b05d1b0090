//! Fields of qcow2 images (QEMU's docs/interop/qcow2.txt).

use imgtool_core::ReadAt;

use super::Kind::{Count, Flags, Pointer};
use super::{Field, Group, MOST_FIELDS, number};
use crate::sparse::SparseFile;

/// Fields of the header: position, length, kind.
const HEADER: [(u64, usize, super::Kind); 20] = [
    (4, 4, Count),
    (8, 8, Pointer),
    (16, 4, Count),
    (20, 4, Count),
    (24, 8, Count),
    (32, 4, Count),
    (36, 4, Count),
    (40, 8, Pointer),
    (48, 8, Pointer),
    (56, 4, Count),
    (60, 4, Count),
    (64, 8, Pointer),
    (72, 8, Flags),
    (80, 8, Flags),
    (88, 8, Flags),
    (96, 4, Count),
    (100, 4, Count),
    (104, 1, Count),
    (105, 1, Flags),
    (108, 4, Flags),
];

const EXTENDED_L2: u64 = 1 << 4;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const BITMAPS: u64 = 0x2385_2875;

pub(super) fn groups(file: &SparseFile) -> Vec<Group> {
    let read = |at, len| number(file, at, len, false);
    let header: Group = HEADER.iter().map(|(at, len, kind)| Field::big(*at, *len, *kind)).collect();
    let cluster_bits = read(20, 4);
    if !(9..=21).contains(&cluster_bits) {
        return vec![header];
    }
    let cluster = 1 << cluster_bits;
    let is_extended = read(4, 4) >= 3 && read(72, 8) & EXTENDED_L2 != 0;
    let l1 = table(read(40, 8), read(36, 4));
    let refcounts = table(read(48, 8), read(56, 4).saturating_mul(cluster / 8));
    let mut groups = vec![header];
    groups.extend(extensions(file, cluster));
    let snapshots = snapshots(file);
    for (at, count) in [(read(40, 8), read(36, 4))].into_iter().chain(snapshots.1) {
        for entry in table(at, count).iter().filter(|entry| entry.read(file) & OFFSET != 0).take(4) {
            groups.push(l2_table(entry.read(file) & OFFSET, cluster, is_extended, file));
        }
    }
    groups.push(snapshots.0);
    for entry in refcounts.iter().filter(|entry| entry.read(file) & OFFSET != 0).take(3) {
        groups.push(
            (0..MOST_FIELDS as u64).map(|i| Field::big((entry.read(file) & OFFSET) + i, 1, Flags)).collect(),
        );
    }
    groups.extend([l1, refcounts]);
    groups
}

/// Returns the entries of a table of 8-byte numbers.
fn table(at: u64, count: u64) -> Group {
    let count = count.min(MOST_FIELDS as u64);
    (0..count).map(|index| Field::big(at.saturating_add(index * 8), 8, Pointer)).collect()
}

/// Returns the entries of an L2 table that are in use, and some that are not.
fn l2_table(at: u64, cluster: u64, is_extended: bool, file: &SparseFile) -> Group {
    let entry_len = if is_extended { 16 } else { 8 };
    let mut group: Group = Vec::new();
    for start in (0..cluster / entry_len).map(|index| at.saturating_add(index * entry_len)) {
        let is_used = number(file, start, 8, false) != 0;
        if is_used || start < at + 64 {
            group.push(Field::big(start, 8, Pointer));
            if is_extended {
                group.push(Field::big(start + 8, 4, Flags));
                group.push(Field::big(start + 12, 4, Flags));
            }
        }
    }
    group
}

/// Returns the fields of the header extensions, and of the bitmap directory.
fn extensions(file: &SparseFile, cluster: u64) -> Vec<Group> {
    let mut group = Vec::new();
    let mut directory = Vec::new();
    let mut at = if number(file, 4, 4, false) >= 3 { number(file, 100, 4, false) } else { 72 };
    while at + 8 <= cluster.min(file.len()) && group.len() < MOST_FIELDS {
        let (kind, len) = (number(file, at, 4, false), number(file, at + 4, 4, false));
        group.push(Field::big(at, 4, Flags));
        group.push(Field::big(at + 4, 4, Count));
        if kind == 0 {
            break;
        }
        if kind == BITMAPS {
            group.push(Field::big(at + 8, 4, Count));
            group.push(Field::big(at + 16, 8, Count));
            group.push(Field::big(at + 24, 8, Pointer));
            directory.extend(bitmap_entry(number(file, at + 24, 8, false)));
        }
        at = at.saturating_add(8).saturating_add(len.next_multiple_of(8));
    }
    vec![group, directory]
}

fn bitmap_entry(at: u64) -> Group {
    let fields =
        [(0, 8, Pointer), (8, 4, Count), (12, 4, Flags), (16, 1, Count), (17, 1, Count), (18, 2, Count)];
    fields.into_iter().map(|(offset, len, kind)| Field::big(at.saturating_add(offset), len, kind)).collect()
}

/// Returns the fields of the snapshot table, and position and length of each snapshot's L1 table.
fn snapshots(file: &SparseFile) -> (Group, Vec<(u64, u64)>) {
    let mut group = Vec::new();
    let mut tables = Vec::new();
    let mut at = number(file, 64, 8, false);
    for _ in 0..number(file, 60, 4, false).min(4) {
        let fields =
            [(0, 8, Pointer), (8, 4, Count), (12, 2, Count), (14, 2, Count), (32, 4, Count), (36, 4, Count)];
        group.extend(fields.map(|(offset, len, kind)| Field::big(at.saturating_add(offset), len, kind)));
        group.extend([40, 48, 56].map(|offset| Field::big(at.saturating_add(offset), 8, Count)));
        tables.push((number(file, at, 8, false), number(file, at.saturating_add(8), 4, false)));
        let lens = [(36, 4), (12, 2), (14, 2)]
            .map(|(offset, len)| number(file, at.saturating_add(offset), len, false));
        let len = lens.iter().fold(40, |sum: u64, len| sum.saturating_add(*len));
        at = at.saturating_add(len.next_multiple_of(8));
    }
    (group, tables)
}
