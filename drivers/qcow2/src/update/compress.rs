//! Compressed clusters in an existing image. Each gets new space: what was there before is released at the end.

use std::ops::Range;

use imgtool_core::{BufferPool, Bytes, Error, OutputId, Part, Prepared, Result, WriteList};

use super::{State, UpdateOptions, Updater};
use crate::compressed::{Encoder, check_level};
use crate::layout::entry::{CompressedRange, L2Entry};
use crate::layout::header::{Header, INCOMPATIBLE_DATA_FILE};
use crate::sink::Compression;

/// Returns the compressor for the image, if the options ask for one.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] if the image has no compressed clusters, or those of another algorithm.
pub(super) fn encoder(header: &Header, options: UpdateOptions) -> Result<Option<Encoder>> {
    let Some(level) = options.level else { return Ok(None) };
    if header.has(INCOMPATIBLE_DATA_FILE) {
        return Err(Error::usage("an image with a data file holds no compressed clusters")
            .hint("leave out the compression"));
    }
    let Ok(compression) = header.compression else {
        return Err(Error::unsupported("the image has an unknown compression type"));
    };
    if options.algorithm.is_some_and(|stated| stated != compression) {
        return Err(Error::usage(format!("the image is compressed with {}", compression.name()))
            .hint("the algorithm of an image that exists can't be changed: do not name one"));
    }
    Ok(Some(Encoder::new(compression, check_level(compression, Some(level))?)))
}

/// Splits the data of a prepared piece into clusters, and compresses each of them. The last one of the disk stays
/// as it is if the disk ends within it, since other bytes may follow.
pub(super) fn clusters(
    prepared: Prepared,
    encoder: &Encoder,
    pool: &BufferPool,
    cluster_size: u64,
) -> Result<Prepared> {
    let Some(data) = &prepared.data else { return Ok(prepared) };
    // At most 2 MiB.
    let cluster_size = cluster_size as usize;
    let mut compression = Compression::begin(encoder, pool, data.len(), cluster_size)?;
    let mut parts = Vec::new();
    for part in prepared.parts {
        let Bytes::Data(run) = &part.bytes else {
            parts.push(part);
            continue;
        };
        for start in run.clone().step_by(cluster_size) {
            let range = start..(start + cluster_size).min(run.end);
            let guest = part.guest.start + (start - run.start) as u64;
            let guest = guest..guest + range.len() as u64;
            let cluster = Some(&data[range.clone()]).filter(|cluster| cluster.len() == cluster_size);
            let encoded = cluster.and_then(|cluster| compression.encode(cluster));
            parts.push(Part { guest, bytes: encoded.map_or(Bytes::Data(range), Bytes::Encoded) });
        }
    }
    let encoded = Some(compression.finish());
    Ok(Prepared { parts, encoded, ..prepared })
}

impl Updater {
    /// Places the compressed cluster for the guest offset `cluster`.
    pub(super) fn place_compressed(
        &self,
        state: &mut State,
        cluster: u64,
        encoded: &Range<usize>,
        writes: &mut WriteList,
    ) -> Result<()> {
        let State { tables, refcounts } = state;
        let max_len = encoded.len() as u64;
        let host_offset = refcounts.allocate_bytes(max_len)?;
        let entry = L2Entry::compressed(self.shape(), CompressedRange { host_offset, max_len });
        let entry = entry.ok_or_else(|| {
            Error::limit("the image is too large for compressed clusters of this size")
                .hint("leave out the compression")
        })?;
        tables.set(cluster, [entry.0, 0], refcounts)?;
        writes.push(OutputId::MAIN, host_offset, Bytes::Encoded(encoded.clone()));
        Ok(())
    }
}
