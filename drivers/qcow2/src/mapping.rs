//! Two-level mapping from guest to host offsets: L1 and L2 tables.

mod l2_cache;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use imgtool_toolkit::{Error, RandomInput, Result};

use crate::layout::MAX_L1_BYTES;
use crate::layout::entry::{CompressedRange, L1Entry, L2Entry, Shape, SubclusterStatus, Subclusters};
use crate::layout::table::decode_table;
use l2_cache::L2Cache;

/// Bytes of L2 tables cached for an image. Our limit: the pipeline works on a window of neighbouring
/// pieces, so it needs few; 8 MiB cover 64 GiB of disk with clusters of 64 KiB.
const L2_CACHE_BYTES: u64 = 8 << 20;

/// Bytes of L2 tables cached for backing images, divided by the depth. Our limit.
const BACKING_L2_CACHE_BYTES: u64 = 4 << 20;

/// Bytes of a slice, the unit in which L2 tables of backing images are read and cached. Our limit: with
/// clusters of 2 MiB, whole tables of a long chain exceed the cache.
const BACKING_L2_SLICE: u64 = 32 << 10;

/// Maximum bytes of a backing image's L1 table in memory, divided by the depth. Our limit: enough for
/// 64 TiB with clusters of 64 KiB at depth 1.
const BACKING_L1_BYTES: u64 = 1 << 20;

/// Bytes of a page, the unit in which larger L1 tables are read and cached.
const L1_PAGE: u64 = 4096;

/// Bytes of L1 pages cached for a backing image. Our limit.
const L1_PAGES_BYTES: u64 = 64 << 10;

/// Maximum number of L1 entries that repeat the L2 table of another entry. Our limit: a sound image has
/// none, since each table describes its own part of the disk, and with many of them a small file is a
/// disk of terabytes of data.
const MAX_SHARED_L2: usize = 1024;

/// Words that the cache keeps of a table of equal entries; an entry has one or two.
const UNIFORM_WORDS: usize = 2;

/// Source of the bytes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Plain bytes of the data file.
    Data {
        /// Host offset of the run's first byte.
        host_offset: u64,
    },
    /// Zeros, whatever the backing file holds.
    Zero {
        /// Host offset of the run's first byte, if a cluster is allocated nevertheless.
        host_offset: Option<u64>,
    },
    /// The backing file, or zeros without one.
    Unallocated {
        /// Host offset of the run's first byte, if a cluster is allocated for its neighbours.
        host_offset: Option<u64>,
    },
    /// Part of one compressed cluster.
    Compressed(CompressedRange),
}

/// Guest range whose bytes have one source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Length in guest bytes, never 0.
    pub len: u64,
    /// Source of the bytes.
    pub kind: RunKind,
}

impl Run {
    /// Host offset of the first byte, if the data file has the bytes uncompressed.
    pub fn host_offset(&self) -> Option<u64> {
        match self.kind {
            RunKind::Data { host_offset } => Some(host_offset),
            _ => None,
        }
    }
}

/// Mapping of one state of the disk: the active one or a snapshot.
pub struct Mapping {
    input: RandomInput,
    shape: Shape,
    version: u32,
    /// True if guest data is in a data file, where host offsets equal guest offsets.
    external_data: bool,
    l1: L1Table,
    /// Range of L1 entries without an L2 table, from the latest walk. Readers of a chain ask for the
    /// same range again after every run of an overlay.
    known_empty: Mutex<Range<u64>>,
    /// Slices of L2 tables, by host offset.
    cache: L2Cache,
    /// Bytes of a slice as a power of two; those of a whole table in the image on top.
    slice_bits: u32,
}

/// L1 table, whole in memory or in pages.
enum L1Table {
    Whole(Vec<u64>),
    Paged { offset: u64, entries: u32, pages: L2Cache },
}

impl Mapping {
    /// Reads the L1 table, whose place the caller has checked. `depth` is the number of overlays above
    /// this image; the images of a chain share the memory for tables.
    pub fn read(
        input: RandomInput,
        shape: Shape,
        version: u32,
        external_data: bool,
        l1_offset: u64,
        l1_entries: u32,
        depth: usize,
    ) -> Result<Self> {
        let len = u64::from(l1_entries) * 8;
        debug_assert!(len <= MAX_L1_BYTES);
        let depth = depth as u64;
        let l1 = if depth == 0 || len <= BACKING_L1_BYTES / depth {
            let len = usize::try_from(len);
            let len = len.map_err(|_| Error::limit("the L1 table does not fit into memory"))?;
            let table = if len == 0 { Vec::new() } else { decode_table(&input.read_vec(l1_offset, len)?) };
            L1Table::Whole(table)
        } else {
            let pages = L2Cache::new(L1_PAGES_BYTES, L1_PAGE);
            L1Table::Paged { offset: l1_offset, entries: l1_entries, pages }
        };
        let (cache_len, slice) = match depth {
            0 => (L2_CACHE_BYTES, shape.cluster_size()),
            _ => (BACKING_L2_CACHE_BYTES / (depth + 1), shape.cluster_size().min(BACKING_L2_SLICE)),
        };
        let cache = L2Cache::new(cache_len, slice);
        let slice_bits = slice.ilog2();
        let known_empty = Mutex::default();
        let mapping = Self { input, shape, version, external_data, l1, known_empty, cache, slice_bits };
        mapping.check_sharing().map_err(|e| e.at(l1_offset))?;
        Ok(mapping)
    }

    /// Refuses an L1 table with many entries for the same L2 tables, unless those are empty.
    fn check_sharing(&self) -> Result<()> {
        let L1Table::Whole(l1) = &self.l1 else { return Ok(()) };
        let mut l2_offsets: Vec<u64> = l1.iter().map(|entry| L1Entry(*entry).l2_offset()).collect();
        l2_offsets.retain(|offset| *offset != 0);
        l2_offsets.sort_unstable();
        let groups = l2_offsets.chunk_by(|a, b| a == b).filter(|group| group.len() > 1);
        let mut shared = 0;
        for group in groups {
            if !self.is_empty_table(group[0]) {
                shared += group.len() - 1;
            }
            if shared > MAX_SHARED_L2 {
                return Err(Error::corrupt(format!(
                    "more than {MAX_SHARED_L2} L1 entries share an L2 table with another entry"
                ))
                .hint("'check' lists what is wrong with the image; use a backup"));
            }
        }
        Ok(())
    }

    /// True if no entry of the L2 table at `l2_offset` has a host cluster, and all entries are equal.
    fn is_empty_table(&self, l2_offset: u64) -> bool {
        let slices = self.shape.cluster_size() >> self.slice_bits;
        (0..slices).all(|slice| {
            let words =
                self.read_slice(l2_offset.saturating_add(slice << self.slice_bits)).unwrap_or_default();
            words.len() == UNIFORM_WORDS
                && self.unit(&words, 0).is_ok_and(|run| {
                    matches!(
                        run.kind,
                        RunKind::Unallocated { host_offset: None } | RunKind::Zero { host_offset: None }
                    )
                })
        })
    }

    /// True if an L2 table describes `guest_offset`.
    pub fn has_l2(&self, guest_offset: u64) -> Result<bool> {
        Ok(self.l1_entry(guest_offset)?.l2_offset() != 0)
    }

    /// Guest bytes that a slice of an L2 table describes.
    fn slice_reach(&self) -> u64 {
        let entry_bits = if self.shape.extended_l2 { 4 } else { 3 };
        1 << (self.slice_bits - entry_bits + self.shape.cluster_bits)
    }

    /// First run of `range`, which must not be empty. A run ends with its slice of an L2 table at the
    /// latest.
    pub fn run(&self, range: Range<u64>) -> Result<Run> {
        let end_of = |start: u64, reach: u64| (start & !(reach - 1)).saturating_add(reach).min(range.end);
        if !self.has_l2(range.start)? {
            let reach_bits = self.shape.l2_reach_bits();
            // The range has a last byte, as it is not empty.
            let next = self.next_l2(range.start >> reach_bits..((range.end - 1) >> reach_bits) + 1)?;
            let end = next.checked_mul(1 << reach_bits).map_or(range.end, |end| end.min(range.end));
            return Ok(Run { len: end - range.start, kind: RunKind::Unallocated { host_offset: None } });
        }
        let slice_end = end_of(range.start, self.slice_reach());
        let slice = self.l2_slice(range.start)?;
        let mut run = self.unit(&slice, range.start)?;
        let has_no_host = matches!(
            run.kind,
            RunKind::Unallocated { host_offset: None } | RunKind::Zero { host_offset: None }
        );
        if slice.len() == UNIFORM_WORDS && has_no_host {
            return Ok(Run { len: slice_end - range.start, ..run });
        }
        while range.start + run.len < slice_end {
            // Damage to the next cluster does not affect this run.
            let Ok(next) = self.unit(&slice, range.start + run.len) else { break };
            let continues = match (run.kind, next.kind) {
                (RunKind::Data { host_offset }, RunKind::Data { host_offset: next }) => {
                    host_offset.checked_add(run.len) == Some(next)
                }
                (RunKind::Zero { host_offset }, RunKind::Zero { host_offset: next })
                | (RunKind::Unallocated { host_offset }, RunKind::Unallocated { host_offset: next }) => {
                    host_offset.map(|host| host.checked_add(run.len)) == next.map(Some)
                }
                _ => false,
            };
            if !continues {
                break;
            }
            run.len += next.len;
        }
        run.len = run.len.min(slice_end - range.start);
        Ok(run)
    }

    /// Index of the first L1 entry of `indices` with an L2 table, or their end. The first entry of
    /// `indices` must have none.
    fn next_l2(&self, indices: Range<u64>) -> Result<u64> {
        let known = self.known_empty.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let from = if known.contains(&indices.start) { known.end } else { indices.start };
        if from >= indices.end {
            return Ok(indices.end);
        }
        let next = self.walk_l1(from..indices.end)?;
        let mut known = self.known_empty.lock().unwrap_or_else(PoisonError::into_inner);
        // Planning runs ahead of reading. The range that reaches farthest serves both.
        if next > known.end {
            let start = if from == known.end { known.start } else { indices.start };
            *known = start..next;
        }
        Ok(next)
    }

    /// Searches the L1 table, or its pages, for [`Self::next_l2`].
    fn walk_l1(&self, indices: Range<u64>) -> Result<u64> {
        let has_table = |entry: &u64| L1Entry(*entry).l2_offset() != 0;
        let (offset, entries, pages) = match &self.l1 {
            L1Table::Whole(table) => {
                // At most the length of a table in memory.
                let from = indices.start.min(table.len() as u64) as usize;
                let to = indices.end.min(table.len() as u64) as usize;
                let found = table.get(from..to).and_then(|part| part.iter().position(has_table));
                return Ok(found.map_or(indices.end, |found| indices.start + found as u64));
            }
            L1Table::Paged { offset, entries, pages } => (*offset, u64::from(*entries), pages),
        };
        let end = indices.end.min(entries);
        let mut index = indices.start;
        while index < end {
            let at = index * 8;
            let run = self.input.run(offset + at)?;
            if !run.is_data && run.end >= offset + at + 8 {
                index = (run.end - offset) / 8;
                continue;
            }
            let page = self.l1_page(offset, entries, pages, at)?;
            // Less than the entries of a page.
            let within = (at % L1_PAGE / 8) as usize;
            let rest = page.get(within..).unwrap_or_default();
            match rest.iter().position(has_table) {
                Some(found) => return Ok((index + found as u64).min(indices.end)),
                None => index += (rest.len() as u64).max(1),
            }
        }
        Ok(indices.end)
    }

    /// L1 entry for `guest_offset`.
    fn l1_entry(&self, guest_offset: u64) -> Result<L1Entry> {
        let index = guest_offset >> self.shape.l2_reach_bits();
        // The header check ensures that the table covers the disk.
        let entry = match &self.l1 {
            L1Table::Whole(table) => usize::try_from(index).ok().and_then(|index| table.get(index).copied()),
            L1Table::Paged { offset, entries, pages } if index < u64::from(*entries) => {
                let page = self.l1_page(*offset, u64::from(*entries), pages, index * 8)?;
                // Less than the entries of a page.
                page.get((index * 8 % L1_PAGE / 8) as usize).copied()
            }
            L1Table::Paged { .. } => None,
        };
        Ok(L1Entry(entry.unwrap_or(0)))
    }

    /// Page with the byte `at` of the L1 table of `entries` entries at `offset`.
    fn l1_page(&self, offset: u64, entries: u64, pages: &L2Cache, at: u64) -> Result<Arc<[u64]>> {
        let start = at - at % L1_PAGE;
        // At most a page.
        let len = (entries * 8 - start).min(L1_PAGE) as usize;
        cached(pages, offset + start, || Ok(decode_table(&self.input.read_vec(offset + start, len)?)))
    }

    /// Slice of an L2 table that describes `guest_offset`, whose L1 entry must have a table.
    fn l2_slice(&self, guest_offset: u64) -> Result<Arc<[u64]>> {
        let table_offset = self.l1_entry(guest_offset)?.l2_offset();
        let cluster_size = self.shape.cluster_size();
        let reach = self.slice_reach();
        let first = guest_offset & !(reach - 1);
        let guest = first..first.saturating_add(reach);
        if !table_offset.is_multiple_of(cluster_size) {
            return Err(Error::corrupt(format!(
                "the L2 table at offset {table_offset} is not aligned to clusters of {cluster_size} bytes"
            ))
            .guest(guest)
            .at(table_offset));
        }
        let slices = (1u64 << self.shape.l2_reach_bits()) / reach;
        let slice_offset = table_offset + ((guest_offset / reach % slices) << self.slice_bits);
        cached(&self.cache, slice_offset, || self.read_slice(slice_offset)).map_err(|e| e.guest(guest))
    }

    /// Reads a slice of an L2 table, of which only [`UNIFORM_WORDS`] remain if all entries are equal. A
    /// slice in a hole of the file is not read.
    fn read_slice(&self, slice_offset: u64) -> Result<Vec<u64>> {
        let len = 1u64 << self.slice_bits;
        let end = slice_offset.saturating_add(len);
        if end <= self.input.len() {
            let run = self.input.run(slice_offset)?;
            if !run.is_data && run.end >= end {
                return Ok(vec![0; UNIFORM_WORDS]);
            }
        }
        // At most a cluster, 2 MiB.
        let mut words = decode_table(&self.input.read_vec(slice_offset, len as usize)?);
        let equals_first = |pair: &[u64]| pair == &words[..UNIFORM_WORDS];
        let first_pair_is_uniform = self.shape.extended_l2 || words[0] == words[1];
        if first_pair_is_uniform && words.chunks_exact(UNIFORM_WORDS).all(equals_first) {
            words.truncate(UNIFORM_WORDS);
        }
        Ok(words)
    }

    /// Run from `guest_offset` to the end of its cluster or of equal subclusters, from a slice.
    fn unit(&self, slice: &[u64], guest_offset: u64) -> Result<Run> {
        let shape = self.shape;
        let words = shape.l2_entry_words();
        // The number of words is a power of two, and at least that of an entry.
        let index = ((guest_offset >> shape.cluster_bits) as usize * words) & slice.len().wrapping_sub(1);
        let entry = L2Entry(slice.get(index).copied().unwrap_or(0));
        let within = shape.within_cluster(guest_offset);
        let rest = shape.cluster_size() - within;
        let cluster = guest_offset - within;
        let corrupt = |what: String| {
            Err(Error::corrupt(what).guest(cluster..cluster.saturating_add(shape.cluster_size())))
        };
        if entry.is_compressed() {
            if self.external_data {
                return corrupt("a compressed cluster in an image with an external data file".into());
            }
            return Ok(Run { len: rest, kind: RunKind::Compressed(entry.compressed_range(shape)) });
        }
        let host_cluster = entry.host_offset();
        if !host_cluster.is_multiple_of(shape.cluster_size()) {
            return corrupt(format!(
                "the data cluster at offset {host_cluster} is not aligned to clusters of {} bytes",
                shape.cluster_size()
            ));
        }
        // Offset 0 is valid in a data file only.
        let has_host = host_cluster != 0 || (self.external_data && entry.is_copied());
        if self.external_data && has_host && host_cluster != cluster {
            return corrupt(format!(
                "the cluster is at offset {host_cluster} of the data file instead of {cluster}"
            ));
        }
        let data = RunKind::Data { host_offset: host_cluster + within };
        let zero = RunKind::Zero { host_offset: has_host.then_some(host_cluster + within) };
        if !shape.extended_l2 {
            let kind = match (entry.reads_as_zeros(), has_host) {
                (true, _) if self.version < 3 => {
                    return corrupt("a zero cluster in a version 2 image".into());
                }
                (true, _) => zero,
                (false, true) => data,
                (false, false) => RunKind::Unallocated { host_offset: None },
            };
            return Ok(Run { len: rest, kind });
        }
        let bitmap = Subclusters(slice.get(index + 1).copied().unwrap_or(0));
        let subcluster_size = shape.subcluster_size();
        // Below 32.
        let first = (within / subcluster_size) as u32;
        let (status, count) = bitmap.run(first);
        let len = (u64::from(first) + u64::from(count)) * subcluster_size - within;
        let kind = match status {
            SubclusterStatus::Allocated if has_host => data,
            SubclusterStatus::Allocated => {
                return corrupt("subclusters are marked as data, but the cluster has no host offset".into());
            }
            SubclusterStatus::Zero => zero,
            SubclusterStatus::Unallocated => {
                RunKind::Unallocated { host_offset: has_host.then_some(host_cluster + within) }
            }
            SubclusterStatus::Invalid => {
                return corrupt(format!("subcluster {first} is marked as both data and zeros"));
            }
        };
        Ok(Run { len, kind })
    }
}

/// Returns the table at `host_offset` from the cache, or reads it into the cache.
fn cached(cache: &L2Cache, host_offset: u64, read: impl FnOnce() -> Result<Vec<u64>>) -> Result<Arc<[u64]>> {
    if let Some(table) = cache.get(host_offset) {
        return Ok(table);
    }
    let table: Arc<[u64]> = read()?.into();
    cache.put(host_offset, Arc::clone(&table));
    Ok(table)
}
