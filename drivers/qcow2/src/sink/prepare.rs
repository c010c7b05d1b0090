//! Preparation of pieces on several threads at once: zero detection, comparison with the backing image,
//! compression.

use std::ops::Range;

use imgtool_core::{Buffer, BufferPool, Bytes, Part, Prepared, Result, SinkPiece};

use super::base::Base;
use super::image::Qcow2Sink;
use crate::compressed::{EncodeContext, Encoder};
use crate::options::{SIZE_MULTIPLE, ZERO_GRANULARITY};

impl Qcow2Sink {
    /// Splits a piece into parts with data. Zeros become parts only where they must be written.
    pub(super) fn prepare_plain(&self, piece: SinkPiece) -> Prepared {
        let (start, len) = (piece.start, piece.len);
        if self.options.stores_zeros() {
            let mut prepared = Prepared::new(piece);
            // `prepare` has already expanded zeros into a buffer, so the whole piece is in memory.
            prepared.parts.push(Part { guest: start..start + len, bytes: Bytes::Data(0..len as usize) });
            return prepared;
        }
        let needs_zeros = self.data_output().needs_zeros();
        let finest = if self.options.shape.extended_l2 && !needs_zeros {
            self.options.shape.subcluster_size()
        } else if needs_zeros && !self.is_linear() {
            self.cluster_size().max(ZERO_GRANULARITY)
        } else {
            ZERO_GRANULARITY
        };
        let runs = self.stored_runs(&piece, finest);
        Prepared::sparse(piece, runs, needs_zeros && self.is_linear())
    }

    /// Prepares whole clusters one by one. Each is left out, marked as zeros, or stored, compressed or not.
    pub(super) fn prepare_clusters(
        &self,
        piece: SinkPiece,
        pool: &BufferPool,
        encoder: Option<&Encoder>,
        base: Option<&Base>,
    ) -> Result<Prepared> {
        if piece.data.is_none() {
            return self.prepare_zeros(piece, base);
        }
        // A cluster is at most 2 MiB, so the cast is lossless.
        let cluster_size = self.cluster_size() as usize;
        let mut stored = self.stored_runs(&piece, self.cluster_size()).into_iter().peekable();
        let mut prepared = Prepared::new(piece);
        let Some(data) = prepared.data.take() else { return Ok(prepared) };
        let begin = |encoder| Compression::begin(encoder, pool, data.len(), cluster_size);
        let mut compression = encoder.map(begin).transpose()?;
        let mut scratch = vec![0; if base.is_some() { cluster_size } else { 0 }];
        for (index, cluster) in data.chunks(cluster_size).enumerate() {
            let range = index * cluster_size..index * cluster_size + cluster.len();
            let guest = prepared.start + range.start as u64..prepared.start + range.end as u64;
            while stored.next_if(|run| run.end <= range.start).is_some() {}
            let is_zero = stored.peek().is_none_or(|run| run.start >= range.end);
            match self.treatment(cluster, guest.start, is_zero, base, &mut scratch)? {
                Treatment::LeaveOut => {}
                Treatment::Zeros => push_zeros(&mut prepared, guest),
                Treatment::Store => {
                    let encoded = compression.as_mut().and_then(|compression| compression.encode(cluster));
                    let bytes = encoded.map_or(Bytes::Data(range), Bytes::Encoded);
                    prepared.parts.push(Part { guest, bytes });
                }
            }
        }
        prepared.data = Some(data);
        prepared.encoded = compression.map(Compression::finish);
        Ok(prepared)
    }

    /// Decides on the treatment of `cluster`, which starts at the guest offset `guest`. `is_zero` is true if the
    /// cluster reads as zeros. With a `base`, `scratch` must be a cluster long.
    fn treatment(
        &self,
        cluster: &[u8],
        guest: u64,
        is_zero: bool,
        base: Option<&Base>,
        scratch: &mut [u8],
    ) -> Result<Treatment> {
        // Store every cluster, even if the backing image has the same bytes.
        if self.options.stores_zeros() {
            return Ok(Treatment::Store);
        }
        Ok(match base {
            None if is_zero => Treatment::LeaveOut,
            // If the disk ends within a sector, zeros follow to the end of the virtual disk, not the base's bytes.
            Some(base) if base.matches(guest, cluster, &mut scratch[..whole_sectors(cluster.len())])? => {
                Treatment::LeaveOut
            }
            Some(_) if is_zero => Treatment::Zeros,
            _ => Treatment::Store,
        })
    }

    /// Returns the runs of a piece that are stored, in units of `finest` bytes or, if longer, of the option
    /// `zero_unit`: a unit with data is stored whole. Compressed images ignore that option, because short runs
    /// of zeros cost them next to nothing.
    fn stored_runs(&self, piece: &SinkPiece, finest: u64) -> Vec<Range<usize>> {
        let requested = self.options.zero_unit.filter(|_| self.encoder.is_none());
        // Both units are at most 2 MiB.
        piece.nonzero_runs(requested.unwrap_or(finest).max(finest) as usize)
    }

    /// Splits a piece of zeros into the clusters that need an entry because the backing image has data there.
    fn prepare_zeros(&self, piece: SinkPiece, base: Option<&Base>) -> Result<Prepared> {
        // The last piece of a disk may end within a sector. Zeros follow to the end of the virtual disk.
        let (start, end) = (piece.start, piece.end().next_multiple_of(SIZE_MULTIPLE));
        let mut prepared = Prepared::new(piece);
        let Some(base) = base else { return Ok(prepared) };
        let cluster_size = self.cluster_size();
        // A cluster is at most 2 MiB, so the cast is lossless.
        let mut scratch = vec![0; cluster_size as usize];
        let mut position = start;
        while position < end {
            let same_until = base.zeros_until(position..end)?;
            if same_until >= end {
                break;
            }
            let cluster = (same_until - self.options.shape.within_cluster(same_until)).max(position);
            let cluster_end = cluster.saturating_add(cluster_size).min(end);
            let len = (cluster_end - cluster) as usize;
            if !base.matches(cluster, &[], &mut scratch[..len])? {
                push_zeros(&mut prepared, cluster..cluster_end);
            }
            position = cluster_end;
        }
        Ok(prepared)
    }
}

/// Rounds the length of a cluster up to whole sectors of the virtual disk.
fn whole_sectors(len: usize) -> usize {
    len.next_multiple_of(SIZE_MULTIPLE as usize)
}

/// Treatment of a cluster.
enum Treatment {
    /// Nothing is written, because the cluster reads correctly without an entry.
    LeaveOut,
    /// The cluster gets an entry that reads as zeros.
    Zeros,
    /// The bytes of the cluster are stored, compressed or not.
    Store,
}

/// Compression of the clusters of one piece, one after the other, into one buffer.
pub struct Compression<'a> {
    encoder: &'a Encoder,
    context: EncodeContext,
    cluster_size: usize,
    encoded: Buffer,
    /// Number of bytes of `encoded` in use.
    used: usize,
}

impl<'a> Compression<'a> {
    /// Begins the compression of a piece of `len` bytes.
    pub fn begin(encoder: &'a Encoder, pool: &BufferPool, len: usize, cluster_size: usize) -> Result<Self> {
        let context = encoder.context()?;
        let encoded = pool.take(len.max(cluster_size));
        Ok(Self { encoder, context, cluster_size, encoded, used: 0 })
    }

    /// Compresses a cluster. Returns its range in the buffer, or `None` if it does not shrink.
    pub fn encode(&mut self, cluster: &[u8]) -> Option<Range<usize>> {
        let padded;
        let whole = if cluster.len() == self.cluster_size {
            cluster
        } else {
            // The disk may end within its last cluster.
            let mut copy = cluster.to_vec();
            copy.resize(self.cluster_size, 0);
            padded = copy;
            &padded
        };
        let len = self.context.encode(whole, &mut self.encoded[self.used..])?;
        self.used += len;
        Some(self.used - len..self.used)
    }

    /// Gives the context back to the encoder and returns the buffer.
    pub fn finish(self) -> Buffer {
        self.encoder.give_back(self.context);
        self.encoded
    }
}

/// Appends zeros for `guest`. Extends the last part if it consists of zeros and ends at `guest.start`.
fn push_zeros(prepared: &mut Prepared, guest: Range<u64>) {
    if let Some(last) = prepared.parts.last_mut()
        && last.guest.end == guest.start
        && let Bytes::Zero(len) = &mut last.bytes
    {
        *len += guest.end - guest.start;
        last.guest.end = guest.end;
        return;
    }
    let len = guest.end - guest.start;
    prepared.parts.push(Part { guest, bytes: Bytes::Zero(len) });
}
