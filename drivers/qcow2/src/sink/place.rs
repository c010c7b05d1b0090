//! Placement of the parts of a piece: host clusters and L2 entries, in guest order.
//!
//! Finished refcount blocks are written after each cluster, not after each piece, so the layout does not depend
//! on the length of the pieces.

use std::ops::Range;

use imgtool_core::{Bytes, Error, Result, WriteList};

use super::image::{Placement, Qcow2Sink, State};
use crate::layout::entry::{CompressedRange, L2Entry, Subclusters};

impl Qcow2Sink {
    /// Places the uncompressed bytes of one or more clusters and adds their writes to `writes`.
    pub(super) fn place_plain(
        &self,
        state: &mut State,
        guest: Range<u64>,
        bytes: &Bytes,
        writes: &mut WriteList,
    ) -> Result<()> {
        let cluster_size = self.cluster_size();
        let mut host_run: Option<(u64, Range<u64>)> = None;
        let mut position = guest.start;
        while position < guest.end {
            let cluster = position - self.options.shape.within_cluster(position);
            let end = cluster.saturating_add(cluster_size).min(guest.end);
            let host = self.host_cluster(state, cluster, position..end)? + (position - cluster);
            state.alloc.write_finished_blocks(self.output())?;
            match &mut host_run {
                Some((start, run)) if *start + (run.end - run.start) == host => run.end = end,
                _ => {
                    if let Some((start, run)) = host_run.take() {
                        writes.push(self.data_id, start, slice_of(bytes, &guest, &run));
                    }
                    host_run = Some((host, position..end));
                }
            }
            position = end;
        }
        if let Some((start, run)) = host_run {
            writes.push(self.data_id, start, slice_of(bytes, &guest, &run));
        }
        Ok(())
    }

    /// Returns the host offset of the guest cluster at `cluster`; allocates it if it is new. `part` is the
    /// guest range within the cluster that the caller writes next.
    fn host_cluster(&self, state: &mut State, cluster: u64, part: Range<u64>) -> Result<u64> {
        let shape = self.options.shape;
        let State { alloc, tables } = state;
        let words = tables.entry(cluster, alloc, self.output())?;
        let entry = L2Entry(words[0]);
        let known = entry.is_copied().then(|| entry.host_offset());
        let host = match known {
            Some(host) => host,
            None => {
                let host = match self.placement {
                    Placement::External | Placement::ExternalRaw => cluster,
                    Placement::Packed | Placement::Linear { .. } => alloc.allocate(1)?,
                };
                let whole = part.end - part.start == shape.cluster_size();
                if !whole && self.data_output().needs_zeros() {
                    // Bypass the pipeline, which may write the data before the zeros.
                    let output = self.data_output();
                    let max_len =
                        output.capacity().map_or(u64::MAX, |capacity| capacity.saturating_sub(host));
                    output.write_zeros_at(host, shape.cluster_size().min(max_len))?;
                }
                host
            }
        };
        words[0] = L2Entry::data(host).0;
        if let Some(bitmap) = words.get_mut(1) {
            let subcluster_size = shape.subcluster_size();
            // At most 31 and 32.
            let first = ((part.start - cluster) / subcluster_size) as u32;
            let end = (part.end - cluster).div_ceil(subcluster_size) as u32;
            let mut subclusters = Subclusters(*bitmap);
            subclusters.allocate(first, end - first);
            if self.base.is_some() {
                subclusters.zero_the_rest();
            }
            *bitmap = subclusters.0;
        }
        Ok(host)
    }

    /// Marks whole clusters as zeros, which hide the data of the backing image.
    pub(super) fn mark_zeros(&self, state: &mut State, guest: Range<u64>) -> Result<()> {
        let State { alloc, tables } = state;
        let mut cluster = guest.start;
        while cluster < guest.end {
            let words = tables.entry(cluster, alloc, self.output())?;
            match words {
                [entry] => *entry = L2Entry::ZEROS.0,
                [entry, bitmap] => (*entry, *bitmap) = (0, Subclusters::ALL_ZERO.0),
                _ => {}
            }
            alloc.write_finished_blocks(self.output())?;
            cluster = cluster.saturating_add(self.cluster_size());
        }
        Ok(())
    }

    /// Places a compressed cluster of `len` bytes. Returns its host offset.
    pub(super) fn place_compressed(&self, state: &mut State, cluster: u64, len: u64) -> Result<u64> {
        let State { alloc, tables } = state;
        let host_offset = alloc.allocate_bytes(len)?;
        let entry = L2Entry::compressed(self.options.shape, CompressedRange { host_offset, max_len: len })
            .ok_or_else(|| {
                Error::limit("the image is too large for compressed clusters of this size")
                    .hint("use a smaller cluster_size")
            })?;
        tables.entry(cluster, alloc, self.output())?[0] = entry.0;
        alloc.write_finished_blocks(self.output())?;
        Ok(host_offset)
    }
}

/// Returns the part of `bytes` for the guest range `run`. `bytes` covers the guest range `guest`.
fn slice_of(bytes: &Bytes, guest: &Range<u64>, run: &Range<u64>) -> Bytes {
    // Within the piece, which is in memory.
    let from = (run.start - guest.start) as usize;
    let len = (run.end - run.start) as usize;
    match bytes {
        Bytes::Zero(_) => Bytes::Zero(len as u64),
        Bytes::Data(range) => Bytes::Data(range.start + from..range.start + from + len),
        Bytes::Encoded(range) => Bytes::Encoded(range.start + from..range.start + from + len),
        Bytes::Owned(owned) => Bytes::Owned(owned[from..from + len].to_vec()),
    }
}
