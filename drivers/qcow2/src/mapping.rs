//! The two-level mapping from guest to host: L1 and L2 tables.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use imgtool_toolkit::{Error, RandomInput, Result};

use crate::l2_cache::L2Cache;
use crate::layout::entry::{CompressedPlace, L1Entry, L2Entry, Shape, SubclusterStatus, Subclusters};
use crate::layout::{MAX_L1_BYTES, decode_table};

/// Bytes of L2 tables kept for one image. Ours: the pipeline works on a window of neighbours, so few
/// are needed; 8 MiB cover 64 GiB of disk with clusters of 64 KiB.
const L2_CACHE_BYTES: u64 = 8 << 20;

/// Bytes of L2 tables kept for an image below another one; those of a chain share them.
const L2_CACHE_BYTES_BELOW: u64 = 4 << 20;

/// L2 tables of images below another one are read in parts of this many bytes: with clusters of
/// 2 MiB whole tables of a long chain would not fit.
const L2_SLICE_BELOW: u64 = 32 << 10;

/// The largest L1 table of an image below another one that is held as a whole, divided by the depth.
/// Ours: enough for 64 TiB with clusters of 64 KiB right below the first.
const L1_BYTES_BELOW: u64 = 1 << 20;

/// Larger ones are read in pages of this many bytes.
const L1_PAGE: u64 = 4096;

/// Bytes of such pages kept for one image.
const L1_PAGES_BYTES: u64 = 64 << 10;

/// Entries of an L1 table that may name an L2 table which another one names too. A sound image has
/// none, since each table is of its own part of the disk; many make a small file a disk of many
/// terabytes of anything. Ours.
const MAX_SHARED_L2: usize = 1024;

/// Words of a table whose entries all say the same, as the cache keeps it; an entry has one or two.
const UNIFORM_WORDS: usize = 2;

/// What a guest range is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapped {
    /// Bytes of the data file as they are, from this offset on.
    Data {
        /// The host offset of the run's first byte.
        host_offset: u64,
    },
    /// Reads as zeros, whatever a backing file holds.
    Zero {
        /// The host offset of the cluster that is allocated for it all the same, if there is one.
        host_offset: Option<u64>,
    },
    /// The backing file's, or zeros.
    Unallocated {
        /// The host offset of the cluster that is allocated for its neighbours, if there is one.
        host_offset: Option<u64>,
    },
    /// A part of one compressed cluster.
    Compressed(CompressedPlace),
}

/// A run of one status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Guest bytes, never 0.
    pub len: u64,
    /// What they are.
    pub mapped: Mapped,
}

impl Run {
    /// Where the run stands in the data file, if it stands there as it is.
    pub fn host_offset(&self) -> Option<u64> {
        match self.mapped {
            Mapped::Data { host_offset } => Some(host_offset),
            _ => None,
        }
    }
}

/// One state of the disk: the active one or a snapshot's.
pub struct Mapping {
    input: RandomInput,
    shape: Shape,
    version: u32,
    /// Guest data is in another file, at the guest's own offsets.
    external_data: bool,
    l1: L1Table,
    /// L1 entries without an L2 table that were walked last. An image of a chain is asked again and
    /// again about the same ones, whenever something stands in an image above it.
    known_empty: Mutex<Range<u64>>,
    /// L2 tables, or slices of them, of 2^`slice_bits` bytes.
    cache: L2Cache,
    slice_bits: u32,
}

/// The L1 table: in memory, unless it is one of many.
enum L1Table {
    Whole(Vec<u64>),
    Paged { offset: u64, entries: u32, pages: L2Cache },
}

impl Mapping {
    /// Reads the L1 table; its place has been checked. `depth`: images above this one in a chain,
    /// which share the memory for L2 tables.
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
        let below = depth as u64;
        let l1 = if below == 0 || len <= L1_BYTES_BELOW / below {
            let len = usize::try_from(len);
            let len = len.map_err(|_| Error::limit("the L1 table does not fit into memory"))?;
            let table = if len == 0 { Vec::new() } else { decode_table(&input.read_vec(l1_offset, len)?) };
            L1Table::Whole(table)
        } else {
            let pages = L2Cache::new(L1_PAGES_BYTES, L1_PAGE);
            L1Table::Paged { offset: l1_offset, entries: l1_entries, pages }
        };
        let (cache_len, slice) = match below {
            0 => (L2_CACHE_BYTES, shape.cluster_size()),
            _ => (L2_CACHE_BYTES_BELOW / (below + 1), shape.cluster_size().min(L2_SLICE_BELOW)),
        };
        let cache = L2Cache::new(cache_len, slice);
        let slice_bits = slice.ilog2();
        let known_empty = Mutex::default();
        let mapping = Self { input, shape, version, external_data, l1, known_empty, cache, slice_bits };
        mapping.check_sharing().map_err(|e| e.at(l1_offset))?;
        Ok(mapping)
    }

    /// Refuses an L1 table of which many entries name the same L2 tables, unless nothing is in these.
    fn check_sharing(&self) -> Result<()> {
        let L1Table::Whole(l1) = &self.l1 else { return Ok(()) };
        let mut places: Vec<u64> = l1.iter().map(|entry| L1Entry(*entry).l2_offset()).collect();
        places.retain(|place| *place != 0);
        places.sort_unstable();
        let groups = places.chunk_by(|a, b| a == b).filter(|group| group.len() > 1);
        let mut shared = 0;
        for group in groups {
            if !self.is_empty_table(group[0]) {
                shared += group.len() - 1;
            }
            if shared > MAX_SHARED_L2 {
                return Err(Error::corrupt(format!(
                    "more than {MAX_SHARED_L2} entries of the L1 table name an L2 table that another one names too"
                ))
                .hint("'check' lists what is wrong with the image; use a backup"));
            }
        }
        Ok(())
    }

    /// Whether an L2 table says the same of all clusters, and places none.
    fn is_empty_table(&self, offset: u64) -> bool {
        let slices = self.shape.cluster_size() >> self.slice_bits;
        (0..slices).all(|slice| {
            let words = self.read_slice(offset.saturating_add(slice << self.slice_bits)).unwrap_or_default();
            words.len() == UNIFORM_WORDS
                && self.unit(&words, 0).is_ok_and(|run| {
                    matches!(
                        run.mapped,
                        Mapped::Unallocated { host_offset: None } | Mapped::Zero { host_offset: None }
                    )
                })
        })
    }

    /// Whether an L2 table has to be looked at for `guest_offset`.
    pub fn has_l2(&self, guest_offset: u64) -> Result<bool> {
        Ok(self.l1_entry(guest_offset)?.l2_offset() != 0)
    }

    /// Guest bytes that one slice of an L2 table describes.
    fn slice_reach(&self) -> u64 {
        let entry_bits = if self.shape.extended_l2 { 4 } else { 3 };
        1 << (self.slice_bits - entry_bits + self.shape.cluster_bits)
    }

    /// The first run of `range`, which is not empty: as long as one slice of an L2 table says the
    /// same.
    pub fn run(&self, range: Range<u64>) -> Result<Run> {
        let end_of = |start: u64, reach: u64| (start & !(reach - 1)).saturating_add(reach).min(range.end);
        if !self.has_l2(range.start)? {
            let reach_bits = self.shape.l2_reach_bits();
            // Not empty, so its last byte is there.
            let next = self.next_l2(range.start >> reach_bits..((range.end - 1) >> reach_bits) + 1)?;
            let end = next.checked_mul(1 << reach_bits).map_or(range.end, |end| end.min(range.end));
            return Ok(Run { len: end - range.start, mapped: Mapped::Unallocated { host_offset: None } });
        }
        let table_end = end_of(range.start, self.slice_reach());
        let table = self.l2_table(range.start)?;
        let mut run = self.unit(&table, range.start)?;
        let nowhere = matches!(
            run.mapped,
            Mapped::Unallocated { host_offset: None } | Mapped::Zero { host_offset: None }
        );
        if table.len() == UNIFORM_WORDS && nowhere {
            return Ok(Run { len: table_end - range.start, ..run });
        }
        while range.start + run.len < table_end {
            // What is wrong with the next cluster is no fault of this run.
            let Ok(next) = self.unit(&table, range.start + run.len) else { break };
            let continues = match (run.mapped, next.mapped) {
                (Mapped::Data { host_offset }, Mapped::Data { host_offset: next }) => {
                    host_offset.checked_add(run.len) == Some(next)
                }
                (Mapped::Zero { host_offset }, Mapped::Zero { host_offset: next })
                | (Mapped::Unallocated { host_offset }, Mapped::Unallocated { host_offset: next }) => {
                    host_offset.map(|host| host.checked_add(run.len)) == next.map(Some)
                }
                _ => false,
            };
            if !continues {
                break;
            }
            run.len += next.len;
        }
        run.len = run.len.min(table_end - range.start);
        Ok(run)
    }

    /// The first L1 entry of `indices` with an L2 table, or their end; the first of them has none.
    fn next_l2(&self, indices: Range<u64>) -> Result<u64> {
        let known = self.known_empty.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let from = if known.contains(&indices.start) { known.end } else { indices.start };
        if from >= indices.end {
            return Ok(indices.end);
        }
        let next = self.walk_l1(from..indices.end)?;
        let mut known = self.known_empty.lock().unwrap_or_else(PoisonError::into_inner);
        // Whoever reads comes behind the one who plans: what reaches farthest is asked for next.
        if next > known.end {
            let start = if from == known.end { known.start } else { indices.start };
            *known = start..next;
        }
        Ok(next)
    }

    /// The first L1 entry of `indices` with an L2 table, or their end.
    fn walk_l1(&self, indices: Range<u64>) -> Result<u64> {
        let has_table = |entry: &u64| L1Entry(*entry).l2_offset() != 0;
        let (offset, entries, pages) = match &self.l1 {
            L1Table::Whole(table) => {
                // A table in memory has a length that fits.
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
            // Below the entries of a page.
            let within = (at % L1_PAGE / 8) as usize;
            let rest = page.get(within..).unwrap_or_default();
            match rest.iter().position(has_table) {
                Some(found) => return Ok((index + found as u64).min(indices.end)),
                None => index += (rest.len() as u64).max(1),
            }
        }
        Ok(indices.end)
    }

    fn l1_entry(&self, guest_offset: u64) -> Result<L1Entry> {
        let index = guest_offset >> self.shape.l2_reach_bits();
        // The header's check made sure that the table covers the disk.
        let entry = match &self.l1 {
            L1Table::Whole(table) => usize::try_from(index).ok().and_then(|index| table.get(index).copied()),
            L1Table::Paged { offset, entries, pages } if index < u64::from(*entries) => {
                let page = self.l1_page(*offset, u64::from(*entries), pages, index * 8)?;
                // Below the entries of a page.
                page.get((index * 8 % L1_PAGE / 8) as usize).copied()
            }
            L1Table::Paged { .. } => None,
        };
        Ok(L1Entry(entry.unwrap_or(0)))
    }

    /// The page of the L1 table that its byte `at` is in.
    fn l1_page(&self, offset: u64, entries: u64, pages: &L2Cache, at: u64) -> Result<Arc<[u64]>> {
        let start = at - at % L1_PAGE;
        // Not above a page.
        let len = (entries * 8 - start).min(L1_PAGE) as usize;
        cached(pages, offset + start, || Ok(decode_table(&self.input.read_vec(offset + start, len)?)))
    }

    /// The slice of the L2 table that `guest_offset` is in.
    fn l2_table(&self, guest_offset: u64) -> Result<Arc<[u64]>> {
        let table_offset = self.l1_entry(guest_offset)?.l2_offset();
        let cluster_size = self.shape.cluster_size();
        let reach = self.slice_reach();
        let first = guest_offset & !(reach - 1);
        let guest = first..first.saturating_add(reach);
        if !table_offset.is_multiple_of(cluster_size) {
            return Err(Error::corrupt(format!(
                "an L2 table is at {table_offset}, which is no multiple of the cluster size {cluster_size}"
            ))
            .guest(guest)
            .at(table_offset));
        }
        let slices = (1u64 << self.shape.l2_reach_bits()) / reach;
        let slice_offset = table_offset + ((guest_offset / reach % slices) << self.slice_bits);
        cached(&self.cache, slice_offset, || self.read_slice(slice_offset)).map_err(|e| e.guest(guest))
    }

    /// A slice of an L2 table; [`UNIFORM_WORDS`] of it if all entries say the same. What is a hole of
    /// the file needs no reading.
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
        let same = |pair: &[u64]| pair == &words[..UNIFORM_WORDS];
        let entry_is_same = self.shape.extended_l2 || words[0] == words[1];
        if entry_is_same && words.chunks_exact(UNIFORM_WORDS).all(same) {
            words.truncate(UNIFORM_WORDS);
        }
        Ok(words)
    }

    /// What the cluster or the subclusters at `guest_offset` are, from there to their end.
    fn unit(&self, table: &[u64], guest_offset: u64) -> Result<Run> {
        let shape = self.shape;
        let words = shape.l2_entry_words();
        // A slice has a power of two of words, and at least as many as an entry.
        let index = ((guest_offset >> shape.cluster_bits) as usize * words) & table.len().wrapping_sub(1);
        let entry = L2Entry(table.get(index).copied().unwrap_or(0));
        let within = shape.within_cluster(guest_offset);
        let rest = shape.cluster_size() - within;
        let cluster = guest_offset - within;
        let bad = |what: String| {
            Err(Error::corrupt(what).guest(cluster..cluster.saturating_add(shape.cluster_size())))
        };
        if entry.is_compressed() {
            if self.external_data {
                return bad("a compressed cluster in an image with an external data file".into());
            }
            return Ok(Run { len: rest, mapped: Mapped::Compressed(entry.compressed_place(shape)) });
        }
        let host_cluster = entry.host_offset();
        if !host_cluster.is_multiple_of(shape.cluster_size()) {
            return bad(format!(
                "the cluster's data is at {host_cluster}, which is no multiple of the cluster size {}",
                shape.cluster_size()
            ));
        }
        // Offset 0 is a place only in an external data file.
        let has_host = host_cluster != 0 || (self.external_data && entry.is_copied());
        if self.external_data && has_host && host_cluster != cluster {
            return bad(format!("the cluster is at {host_cluster} of the data file instead of {cluster}"));
        }
        let data = Mapped::Data { host_offset: host_cluster + within };
        let zero = Mapped::Zero { host_offset: has_host.then_some(host_cluster + within) };
        if !shape.extended_l2 {
            let mapped = match (entry.reads_as_zeros(), has_host) {
                (true, _) if self.version < 3 => {
                    return bad("a zero cluster in a version 2 image".into());
                }
                (true, _) => zero,
                (false, true) => data,
                (false, false) => Mapped::Unallocated { host_offset: None },
            };
            return Ok(Run { len: rest, mapped });
        }
        let bitmap = Subclusters(table.get(index + 1).copied().unwrap_or(0));
        let subcluster_size = shape.subcluster_size();
        // Below 32.
        let first = (within / subcluster_size) as u32;
        let (status, count) = bitmap.run(first);
        let len = (u64::from(first) + u64::from(count)) * subcluster_size - within;
        let mapped = match status {
            SubclusterStatus::Allocated if has_host => data,
            SubclusterStatus::Allocated => {
                return bad("subclusters are marked as data, but the cluster has no place".into());
            }
            SubclusterStatus::Zero => zero,
            SubclusterStatus::Unallocated => {
                Mapped::Unallocated { host_offset: has_host.then_some(host_cluster + within) }
            }
            SubclusterStatus::Invalid => {
                return bad(format!("subcluster {first} is marked as data and as zeros"));
            }
        };
        Ok(Run { len, mapped })
    }
}

/// A table from the cache, or as it is read.
fn cached(cache: &L2Cache, offset: u64, read: impl FnOnce() -> Result<Vec<u64>>) -> Result<Arc<[u64]>> {
    if let Some(table) = cache.get(offset) {
        return Ok(table);
    }
    let table: Arc<[u64]> = read()?.into();
    cache.put(offset, Arc::clone(&table));
    Ok(table)
}
