//! Two-level mapping from guest to host offsets: reads and caches L1 and L2 tables, and returns the run at a
//! guest offset.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Cache, Error, Lease, Memory, RandomInput, Result};

use crate::layout::MAX_L1_BYTES;
use crate::layout::entry::{CompressedRange, L1Entry, L2Entry, Shape, SubclusterStatus, Subclusters};
use crate::layout::table::decode_table;

/// Size in bytes of the L2 table cache of the top image. Our limit: the pipeline works on a window of
/// neighbouring pieces, so a few tables suffice. 8 MiB cover 64 GiB of disk with clusters of 64 KiB.
const L2_CACHE_BYTES: u64 = 8 << 20;

/// Size in bytes of a backing image's L2 table cache, to be divided by one more than its depth. Our limit.
const BACKING_L2_CACHE_BYTES: u64 = 4 << 20;

/// Size in bytes of a slice, the unit in which L2 tables of backing images are read and cached. Our limit:
/// with clusters of 2 MiB, whole tables do not fit into the caches of a long chain.
const BACKING_L2_SLICE: u64 = 32 << 10;

/// Maximum size in bytes of a backing image's L1 table that is kept in memory, to be divided by the image's
/// depth. Our limit: enough for 64 TiB with clusters of 64 KiB at depth 1.
const BACKING_L1_BYTES: u64 = 1 << 20;

/// Size in bytes of a page, the unit in which larger L1 tables are read and cached.
const L1_PAGE: u64 = 4096;

/// Size in bytes of a backing image's cache of L1 pages. Our limit.
const L1_PAGES_BYTES: u64 = 64 << 10;

/// Maximum size in bytes of the L2 tables that L1 entries repeat after another entry. Our limit: an intact
/// image has none, since each table describes a different part of the disk. With many of them, a small file
/// could describe terabytes of data, or hundreds of millions of extents: 16 for every byte of a table with
/// subclusters. All tables of this size together have 16 million, which take two seconds.
const MAX_SHARED_BYTES: usize = 1 << 20;

/// Number of L1 entries that may repeat a table whatever its size: a few of a damaged image.
const MIN_SHARED_L2: usize = 4;

/// Number of words that the cache keeps of a slice whose entries are all equal. An entry has one or two.
const UNIFORM_WORDS: usize = 2;

/// Minimum number of tables in a cache, since several threads read neighbouring tables at once.
const MIN_TABLES: usize = 2;

/// Source of the bytes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// Uncompressed bytes of the file that stores the guest data.
    Data {
        /// Host offset of the run's first byte.
        host_offset: u64,
    },
    /// Zeros, regardless of the backing image.
    Zero {
        /// Host offset of the run's first byte, if a host cluster is allocated nevertheless.
        host_offset: Option<u64>,
    },
    /// Content of the backing image, or zeros without one.
    Unallocated {
        /// Host offset of the run's first byte, if a host cluster is allocated for other subclusters.
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
    /// Returns the host offset of the first byte, if the bytes are stored uncompressed.
    pub fn host_offset(&self) -> Option<u64> {
        match self.kind {
            RunKind::Data { host_offset } => Some(host_offset),
            _ => None,
        }
    }
}

/// Mapping of one state of the disk: the active state or a snapshot.
pub struct Mapping {
    input: RandomInput,
    shape: Shape,
    version: u32,
    /// True if guest data is in an external data file, where host offsets equal guest offsets.
    external_data: bool,
    l1: L1Table,
    /// Indices of consecutive L1 entries without an L2 table, found by an earlier search. A read through a
    /// chain queries the same range again after every run of an overlay.
    known_empty: Mutex<Range<u64>>,
    /// Cached slices of L2 tables.
    slices: TableCache,
    /// Length in bytes of a slice, as a power of two. In the top image, a slice is a whole table.
    slice_bits: u32,
    _lease: Lease,
}

/// L1 table, either whole in memory or read page by page.
enum L1Table {
    Whole(Vec<u64>),
    Paged { l1_offset: u64, entries: u32, pages: TableCache },
}

impl Mapping {
    /// Reads the L1 table, whose file range the caller has checked. `depth` is the number of overlays above
    /// this image; the images of a chain share the memory for tables, which they borrow from `memory`.
    #[expect(clippy::too_many_arguments, reason = "the fields of a header, and two shares")]
    pub fn read(
        input: RandomInput,
        shape: Shape,
        version: u32,
        external_data: bool,
        l1_offset: u64,
        l1_entries: u32,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        let len = u64::from(l1_entries) * 8;
        debug_assert!(len <= MAX_L1_BYTES);
        if l1_offset.saturating_add(len) > input.len() {
            return Err(Error::corrupt(format!(
                "the L1 table needs {len} bytes at {l1_offset}, but the file ends at {}",
                input.len()
            ))
            .path(input.location())
            .at(l1_offset)
            .hint("the file is cut short: copy it again, or use a backup"));
        }
        let depth = depth as u64;
        let is_whole = depth == 0 || len <= BACKING_L1_BYTES / depth;
        // The slices of an image that shares the memory with others are short, like those of a backing image.
        let (cache_len, slice) = match (depth, memory.cache_share(L2_CACHE_BYTES)) {
            (0, L2_CACHE_BYTES) => (L2_CACHE_BYTES, shape.cluster_size()),
            (0, share) => (share, shape.cluster_size().min(BACKING_L2_SLICE)),
            (_, _) => {
                let share = memory.cache_share(BACKING_L2_CACHE_BYTES) / (depth + 1);
                (share, shape.cluster_size().min(BACKING_L2_SLICE))
            }
        };
        let l1_bytes = if is_whole { len } else { L1_PAGES_BYTES };
        let lease = memory.lease(l1_bytes + cache_len, "the tables of a qcow2 image")?;
        let l1 = if is_whole {
            let len = usize::try_from(len);
            let len = len.map_err(|_| Error::limit("the L1 table does not fit into memory"))?;
            let table = if len == 0 { Vec::new() } else { decode_table(&input.read_vec(l1_offset, len)?) };
            L1Table::Whole(table)
        } else {
            let pages = TableCache::new(L1_PAGES_BYTES, L1_PAGE);
            L1Table::Paged { l1_offset, entries: l1_entries, pages }
        };
        let slices = TableCache::new(cache_len, slice);
        let slice_bits = slice.ilog2();
        let known_empty = Mutex::default();
        let mapping =
            Self { input, shape, version, external_data, l1, known_empty, slices, slice_bits, _lease: lease };
        mapping.check_sharing().map_err(|e| e.at(l1_offset))?;
        Ok(mapping)
    }

    /// Refuses an L1 table in memory with many entries that share L2 tables, unless those tables are empty.
    fn check_sharing(&self) -> Result<()> {
        let L1Table::Whole(l1) = &self.l1 else { return Ok(()) };
        let mut l2_offsets: Vec<u64> = l1.iter().map(|entry| L1Entry(*entry).l2_offset()).collect();
        l2_offsets.retain(|offset| *offset != 0);
        l2_offsets.sort_unstable();
        let groups = l2_offsets.chunk_by(|a, b| a == b).filter(|group| group.len() > 1);
        let max_shared = (MAX_SHARED_BYTES >> self.shape.cluster_bits).max(MIN_SHARED_L2);
        let mut shared = 0;
        for group in groups {
            if !self.is_empty_table(group[0]) {
                shared += group.len() - 1;
            }
            if shared > max_shared {
                return Err(Error::corrupt(format!(
                    "more than {max_shared} L1 entries share an L2 table with another entry"
                ))
                .hint("check the image to list its damage, or use a backup"));
            }
        }
        Ok(())
    }

    /// True if all entries of the L2 table at `l2_offset` are equal and have no host cluster.
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

    /// Returns the number of guest bytes that a slice of an L2 table describes.
    fn slice_reach(&self) -> u64 {
        let entry_bits = if self.shape.extended_l2 { 4 } else { 3 };
        1 << (self.slice_bits - entry_bits + self.shape.cluster_bits)
    }

    /// Returns the first run of `range`, which must not be empty. A run within an L2 table ends with its
    /// slice at the latest.
    pub fn run(&self, range: Range<u64>) -> Result<Run> {
        let end_of = |start: u64, reach: u64| (start & !(reach - 1)).saturating_add(reach).min(range.end);
        if !self.has_l2(range.start)? {
            let reach_bits = self.shape.l2_reach_bits();
            // The range is not empty, so it has a last byte.
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

    /// Returns the index of the first L1 entry in `indices` that has an L2 table, or `indices.end`. The entry
    /// at `indices.start` must have none.
    fn next_l2(&self, indices: Range<u64>) -> Result<u64> {
        let known = lock(&self.known_empty).clone();
        let from = if known.contains(&indices.start) { known.end } else { indices.start };
        if from >= indices.end {
            return Ok(indices.end);
        }
        let next = self.walk_l1(from..indices.end)?;
        let mut known = lock(&self.known_empty);
        // The planner searches farther ahead than the readers. The range that reaches farthest serves both.
        if next > known.end {
            let start = if from == known.end { known.start } else { indices.start };
            *known = start..next;
        }
        Ok(next)
    }

    /// Searches the L1 entries in `indices` like [`Self::next_l2`], but without the cached range.
    fn walk_l1(&self, indices: Range<u64>) -> Result<u64> {
        let has_table = |entry: &u64| L1Entry(*entry).l2_offset() != 0;
        let (l1_offset, entries, pages) = match &self.l1 {
            L1Table::Whole(table) => {
                // At most the length of a table in memory, so both fit into a `usize`.
                let from = indices.start.min(table.len() as u64) as usize;
                let to = indices.end.min(table.len() as u64) as usize;
                let found = table.get(from..to).and_then(|part| part.iter().position(has_table));
                return Ok(found.map_or(indices.end, |found| indices.start + found as u64));
            }
            L1Table::Paged { l1_offset, entries, pages } => (*l1_offset, u64::from(*entries), pages),
        };
        let end = indices.end.min(entries);
        let mut index = indices.start;
        while index < end {
            let at = index * 8;
            let run = self.input.run(l1_offset + at)?;
            if !run.is_data && run.end >= l1_offset + at + 8 {
                index = (run.end - l1_offset) / 8;
                continue;
            }
            let page = self.l1_page(l1_offset, entries, pages, at)?;
            // Below the number of entries in a page.
            let within = (at % L1_PAGE / 8) as usize;
            let rest = page.get(within..).unwrap_or_default();
            match rest.iter().position(has_table) {
                Some(found) => return Ok((index + found as u64).min(indices.end)),
                None => index += (rest.len() as u64).max(1),
            }
        }
        Ok(indices.end)
    }

    /// Returns the L1 entry for `guest_offset`.
    fn l1_entry(&self, guest_offset: u64) -> Result<L1Entry> {
        let index = guest_offset >> self.shape.l2_reach_bits();
        // The caller of `read` has checked that the table covers the disk.
        let entry = match &self.l1 {
            L1Table::Whole(table) => usize::try_from(index).ok().and_then(|index| table.get(index).copied()),
            L1Table::Paged { l1_offset, entries, pages } if index < u64::from(*entries) => {
                let page = self.l1_page(*l1_offset, u64::from(*entries), pages, index * 8)?;
                // Below the number of entries in a page.
                page.get((index * 8 % L1_PAGE / 8) as usize).copied()
            }
            L1Table::Paged { .. } => None,
        };
        Ok(L1Entry(entry.unwrap_or(0)))
    }

    /// Returns the page that contains byte `at` of the L1 table at `l1_offset`, which has `entries` entries.
    fn l1_page(&self, l1_offset: u64, entries: u64, pages: &TableCache, at: u64) -> Result<Arc<[u64]>> {
        let start = at - at % L1_PAGE;
        // At most one page.
        let len = (entries * 8 - start).min(L1_PAGE) as usize;
        let page_offset = l1_offset + start;
        pages.get_or_read(page_offset, || Ok(decode_table(&self.input.read_vec(page_offset, len)?)))
    }

    /// Returns the slice of an L2 table that describes `guest_offset`, whose L1 entry must have a table.
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
        self.slices.get_or_read(slice_offset, || self.read_slice(slice_offset)).map_err(|e| e.guest(guest))
    }

    /// Reads a slice of an L2 table. If all its entries are equal, returns only the first [`UNIFORM_WORDS`]
    /// words. Does not read a slice in a hole of the file, which contains only zeros.
    fn read_slice(&self, slice_offset: u64) -> Result<Vec<u64>> {
        let len = 1u64 << self.slice_bits;
        let end = slice_offset.saturating_add(len);
        if end <= self.input.len() {
            let run = self.input.run(slice_offset)?;
            if !run.is_data && run.end >= end {
                return Ok(vec![0; UNIFORM_WORDS]);
            }
        }
        // At most one cluster, 2 MiB.
        let mut words = decode_table(&self.input.read_vec(slice_offset, len as usize)?);
        let equals_first = |pair: &[u64]| pair == &words[..UNIFORM_WORDS];
        let first_pair_is_uniform = self.shape.extended_l2 || words[0] == words[1];
        if first_pair_is_uniform && words.chunks_exact(UNIFORM_WORDS).all(equals_first) {
            words.truncate(UNIFORM_WORDS);
        }
        Ok(words)
    }

    /// Returns the run from `guest_offset` to the end of its cluster, or of its sequence of equal
    /// subclusters. `slice` must describe `guest_offset`.
    fn unit(&self, slice: &[u64], guest_offset: u64) -> Result<Run> {
        let (entry, subclusters) = self.l2_entry(slice, guest_offset);
        let within = self.shape.within_cluster(guest_offset);
        let cluster = guest_offset - within;
        let run = if entry.is_compressed() {
            self.compressed_unit(entry, within)
        } else {
            self.standard_unit(entry, subclusters, cluster, within)
        };
        run.map_err(|e| e.guest(cluster..cluster.saturating_add(self.shape.cluster_size())))
    }

    /// Returns the entry for `guest_offset` from the slice that describes it, with the subcluster bitmap of
    /// an extended entry.
    fn l2_entry(&self, slice: &[u64], guest_offset: u64) -> (L2Entry, Option<Subclusters>) {
        let words = self.shape.l2_entry_words();
        // The number of words is a power of two, and at least one entry long. The mask therefore also maps
        // every index into a slice that was cut to its first words.
        let index =
            ((guest_offset >> self.shape.cluster_bits) as usize * words) & slice.len().wrapping_sub(1);
        let word = |index: usize| slice.get(index).copied().unwrap_or(0);
        (L2Entry(word(index)), self.shape.extended_l2.then(|| Subclusters(word(index + 1))))
    }

    /// Returns the run from byte `within` of a compressed cluster to its end.
    fn compressed_unit(&self, entry: L2Entry, within: u64) -> Result<Run> {
        if self.external_data {
            return Err(Error::corrupt("a compressed cluster in an image with an external data file"));
        }
        let kind = RunKind::Compressed(entry.compressed_range(self.shape));
        Ok(Run { len: self.shape.cluster_size() - within, kind })
    }

    /// Returns the run from byte `within` of the uncompressed cluster at guest offset `cluster`.
    fn standard_unit(
        &self,
        entry: L2Entry,
        subclusters: Option<Subclusters>,
        cluster: u64,
        within: u64,
    ) -> Result<Run> {
        let host_offset = self.host_cluster(entry, cluster)?.map(|host| host + within);
        match subclusters {
            Some(bitmap) => self.subcluster_unit(bitmap, host_offset, within),
            None => {
                let kind = self.cluster_kind(entry, host_offset)?;
                Ok(Run { len: self.shape.cluster_size() - within, kind })
            }
        }
    }

    /// Checks and returns the host offset of the uncompressed cluster at guest offset `cluster`; `None` if it
    /// has no host cluster.
    fn host_cluster(&self, entry: L2Entry, cluster: u64) -> Result<Option<u64>> {
        let host_cluster = entry.host_offset();
        let cluster_size = self.shape.cluster_size();
        if !host_cluster.is_multiple_of(cluster_size) {
            return Err(Error::corrupt(format!(
                "the data cluster at offset {host_cluster} is not aligned to clusters of {cluster_size} bytes"
            )));
        }
        // Host offset 0 is valid only in a data file.
        let has_host = host_cluster != 0 || (self.external_data && entry.is_copied());
        if self.external_data && has_host && host_cluster != cluster {
            return Err(Error::corrupt(format!(
                "the cluster is at offset {host_cluster} of the data file instead of {cluster}"
            )));
        }
        Ok(has_host.then_some(host_cluster))
    }

    /// Returns the source of the bytes at `host_offset` in an uncompressed cluster without subclusters.
    fn cluster_kind(&self, entry: L2Entry, host_offset: Option<u64>) -> Result<RunKind> {
        match (entry.reads_as_zeros(), host_offset) {
            (true, _) if self.version < 3 => Err(Error::corrupt("a zero cluster in a version 2 image")),
            (true, _) => Ok(RunKind::Zero { host_offset }),
            (false, Some(host_offset)) => Ok(RunKind::Data { host_offset }),
            (false, None) => Ok(RunKind::Unallocated { host_offset: None }),
        }
    }

    /// Returns the run from byte `within` of a cluster to the end of its sequence of equal subclusters.
    /// `host_offset` is the host offset of that byte.
    fn subcluster_unit(&self, bitmap: Subclusters, host_offset: Option<u64>, within: u64) -> Result<Run> {
        let subcluster_size = self.shape.subcluster_size();
        // At most 31: a cluster has 32 subclusters.
        let first = (within / subcluster_size) as u32;
        let (status, count) = bitmap.run(first);
        let len = (u64::from(first) + u64::from(count)) * subcluster_size - within;
        let kind = match (status, host_offset) {
            (SubclusterStatus::Allocated, Some(host_offset)) => RunKind::Data { host_offset },
            (SubclusterStatus::Allocated, None) => {
                return Err(Error::corrupt(
                    "subclusters are marked as data, but the cluster has no host offset",
                ));
            }
            (SubclusterStatus::Zero, _) => RunKind::Zero { host_offset },
            (SubclusterStatus::Unallocated, _) => RunKind::Unallocated { host_offset },
            (SubclusterStatus::Invalid, _) => {
                return Err(Error::corrupt(format!("subcluster {first} is marked as both data and zeros")));
            }
        };
        Ok(Run { len, kind })
    }
}

/// Cache of tables or parts of tables, by host offset. Its lock is not held while a table is read.
struct TableCache(Mutex<Cache<u64, Arc<[u64]>>>);

impl TableCache {
    /// Creates a cache of `bytes` bytes for tables of `table_len` bytes.
    fn new(bytes: u64, table_len: u64) -> Self {
        let capacity = usize::try_from(bytes / table_len).unwrap_or(MIN_TABLES).max(MIN_TABLES);
        Self(Mutex::new(Cache::new(capacity)))
    }

    /// Returns the table at `host_offset` from the cache, or calls `read` and caches the result.
    fn get_or_read(&self, host_offset: u64, read: impl FnOnce() -> Result<Vec<u64>>) -> Result<Arc<[u64]>> {
        if let Some(table) = lock(&self.0).get(&host_offset) {
            return Ok(Arc::clone(table));
        }
        let table: Arc<[u64]> = read()?.into();
        let mut cache = lock(&self.0);
        if cache.is_full() {
            cache.evict_older_half();
        }
        cache.insert(host_offset, Arc::clone(&table));
        Ok(table)
    }
}
