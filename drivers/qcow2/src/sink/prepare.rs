//! Preparation of pieces by several threads: zero detection, comparison with the backing file,
//! compression.

use std::ops::Range;

use imgtool_toolkit::{BufferPool, Bytes, Part, Piece, Prepared, Result};

use super::base::Base;
use super::image::Qcow2Sink;
use crate::compressed::Encoder;
use crate::options::ZERO_GRANULARITY;

impl Qcow2Sink {
    /// Splits a piece into parts with data. Zeros become parts only where they must be written.
    pub(super) fn prepare_plain(&self, piece: Piece) -> Prepared {
        let (start, len) = (piece.start, piece.len);
        if self.options.stores_zeros() {
            let mut prepared = Prepared::new(piece);
            // The piece is in memory.
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
        let mut prepared = Prepared::new(piece);
        let mut zeros_from = start;
        for run in runs {
            let guest = start + run.start as u64..start + run.end as u64;
            if needs_zeros && self.is_linear() && guest.start > zeros_from {
                push_zeros(&mut prepared, zeros_from..guest.start);
            }
            zeros_from = guest.end;
            prepared.parts.push(Part { guest, bytes: Bytes::Data(run) });
        }
        if needs_zeros && self.is_linear() && zeros_from < start + len {
            push_zeros(&mut prepared, zeros_from..start + len);
        }
        prepared
    }

    /// Prepares whole clusters one by one. Each is left out, zeros, compressed or plain.
    pub(super) fn prepare_clusters(
        &self,
        piece: Piece,
        pool: &BufferPool,
        encoder: Option<&Encoder>,
        base: Option<&Base>,
    ) -> Result<Prepared> {
        if piece.data.is_none() {
            return self.prepare_zeros(piece, base);
        }
        // At most 2 MiB.
        let cluster_size = self.cluster_size() as usize;
        let mut stored = self.stored_runs(&piece, self.cluster_size()).into_iter().peekable();
        let mut prepared = Prepared::new(piece);
        let Some(data) = prepared.data.take() else { return Ok(prepared) };
        let mut context = encoder.map(Encoder::context).transpose()?;
        let mut encoded = context.as_ref().map(|_| pool.take(data.len().max(cluster_size)));
        let mut used = 0;
        let mut scratch = vec![0; if base.is_some() { cluster_size } else { 0 }];
        for (index, cluster) in data.chunks(cluster_size).enumerate() {
            let range = index * cluster_size..index * cluster_size + cluster.len();
            let guest = prepared.start + range.start as u64..prepared.start + range.end as u64;
            while stored.next_if(|run| run.end <= range.start).is_some() {}
            let is_zero = stored.peek().is_none_or(|run| run.start >= range.end);
            match base {
                // Every cluster is stored, even if the backing file has the same bytes.
                _ if self.options.stores_zeros() => {}
                None if is_zero => continue,
                Some(base)
                    if base.matches(guest.clone(), Some(cluster), &mut scratch[..cluster.len()])? =>
                {
                    continue;
                }
                Some(_) if is_zero => {
                    push_zeros(&mut prepared, guest);
                    continue;
                }
                _ => {}
            }
            let bytes = match (&mut context, &mut encoded) {
                (Some(context), Some(encoded)) => {
                    let padded;
                    let whole = if cluster.len() == cluster_size {
                        cluster
                    } else {
                        // The disk may end within its last cluster.
                        let mut copy = cluster.to_vec();
                        copy.resize(cluster_size, 0);
                        padded = copy;
                        &padded
                    };
                    match context.encode(whole, &mut encoded[used..]) {
                        Some(len) => {
                            used += len;
                            Bytes::Encoded(used - len..used)
                        }
                        None => Bytes::Data(range),
                    }
                }
                _ => Bytes::Data(range),
            };
            prepared.parts.push(Part { guest, bytes });
        }
        if let (Some(encoder), Some(context)) = (encoder, context) {
            encoder.give_back(context);
        }
        prepared.data = Some(data);
        prepared.encoded = encoded;
        Ok(prepared)
    }

    /// Returns the runs of a piece that are stored, found in units of `finest` bytes. Zeros shorter than
    /// the option `zero_unit` join the data around them. Compressed images ignore that option: short
    /// zeros cost them next to nothing.
    fn stored_runs(&self, piece: &Piece, finest: u64) -> Vec<Range<usize>> {
        let requested = self.options.zero_unit.filter(|_| self.encoder.is_none());
        // Both at most 2 MiB.
        piece.dense_runs(finest as usize, requested.unwrap_or(finest).max(finest) as usize)
    }

    /// Splits a piece of zeros into the clusters that need an entry, as the backing file has data there.
    fn prepare_zeros(&self, piece: Piece, base: Option<&Base>) -> Result<Prepared> {
        let (start, end) = (piece.start, piece.end());
        let mut prepared = Prepared::new(piece);
        let Some(base) = base else { return Ok(prepared) };
        let cluster_size = self.cluster_size();
        // At most 2 MiB.
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
            if !base.matches(cluster..cluster_end, None, &mut scratch[..len])? {
                push_zeros(&mut prepared, cluster..cluster_end);
            }
            position = cluster_end;
        }
        Ok(prepared)
    }
}

/// Appends zeros, joined with zeros that end where they begin.
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
