//! Sink that writes a new image in one pass.
//!
//! Order in a new file: the header, data in order of arrival with finished refcount blocks in between, L2
//! tables, the L1 table, the refcount table and the remaining refcount blocks. The L1 table follows the data
//! because a stream shows the disk's size only at its end, and the same content must give the same bytes.
//! With preallocation or a raw data file, the L1 table follows the header, the host offset of every guest
//! cluster is fixed from the start, and `finish` generates the L2 tables.

mod alloc;
mod base;
mod bitmaps;
mod encrypted;
mod finish;
mod image;
mod mapping_tables;
mod memory;
mod place;
mod prepare;

use imgtool_core::sync::lock;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Output, Prepared, Result, Sharing, SinkDevice,
    SinkPiece, WriteList,
};

pub use image::{Qcow2Sink, table_memory};
pub use prepare::Compression;

use crate::options::{Preallocation, SIZE_MULTIPLE, ZERO_GRANULARITY};
use image::{Placement, round_up_size};

/// Length in bytes of a piece without compression. Measurements show that pieces that fit into the cache of
/// one core are written fastest.
const PIECE_LEN: u64 = 256 << 10;

/// Length in bytes of a piece with compression. Our choice: large enough that passing it between threads
/// costs next to nothing.
const COMPRESSED_PIECE_LEN: u64 = 1 << 20;

/// Maximum length in bytes of a piece of zeros whose clusters are marked one by one. Our limit.
const MARKED_ZERO_LEN: u64 = 64 << 20;

impl Consumer for Qcow2Sink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let cluster_size = self.cluster_size();
        let whole = self.stores_whole_clusters();
        let granule = if whole || self.data_output().needs_zeros() || self.options.shape.extended_l2 {
            cluster_size.max(ZERO_GRANULARITY)
        } else {
            // Parts of larger clusters are placed one by one, because gathering them would only add a copy.
            cluster_size.clamp(ZERO_GRANULARITY, 64 << 10)
        };
        let zero_unit = self.options.zero_unit.unwrap_or(0);
        // A unit of zero detection is stored or left out as a whole.
        let granule = granule.max(zero_unit);
        let piece_len = if self.encoder.is_some() { COMPRESSED_PIECE_LEN } else { PIECE_LEN }
            .max(cluster_size)
            .max(zero_unit);
        let max_zero_len = if self.options.stores_zeros() {
            piece_len
        } else if self.base.is_some() {
            MARKED_ZERO_LEN
        } else {
            u64::MAX
        };
        Geometry { granule, granule_required: whole, piece_len, max_zero_len, ordered: !self.is_linear() }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        if self.stores_whole_clusters() && !piece.start.is_multiple_of(self.cluster_size()) {
            return Err(Error::malformed("a piece does not start at a cluster boundary"));
        }
        if self.is_linear() && self.base.is_some() {
            return Err(no_content_over_base());
        }
        let piece = if self.options.stores_zeros() { piece.with_zeros_as_data(pool) } else { piece };
        match (&self.encoder, &self.base) {
            (None, None) if self.encryption.is_none() => Ok(self.prepare_plain(piece)),
            (encoder, base) => self.prepare_clusters(piece, pool, encoder.as_deref(), base.as_ref()),
        }
    }

    fn worker_memory(&self) -> u64 {
        self.encoder.as_ref().map_or(0, |encoder| encoder.context_memory(self.cluster_size()))
    }

    fn resize(&self, _device: SinkDevice, size: u64) -> Result<()> {
        let mut known = lock(&self.size);
        if known.is_some_and(|known| known != size) {
            return Err(Error::unsupported("the disk size is already set and cannot change"));
        }
        self.options.check_size(round_up_size(size)?)?;
        *known = Some(size);
        Ok(())
    }
}

impl ImageSink for Qcow2Sink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        if matches!(self.options.preallocation, Preallocation::Falloc | Preallocation::Full) {
            let size = round_up_size(lock(&self.size).unwrap_or(0))?;
            let start = match self.placement {
                Placement::Linear { data_start } => data_start,
                _ => 0,
            };
            self.data_output().allocate(start, size.next_multiple_of(self.cluster_size()))?;
        }
        Ok(Vec::new())
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        let keeps_bytes = self.encryption.is_none() && !self.options.stores_zeros();
        if self.options.preallocation == Preallocation::Off && keeps_bytes {
            Sharing::Parts(self.data_id)
        } else {
            Sharing::Never
        }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        let start = match self.placement {
            Placement::Linear { data_start } => Some(data_start),
            Placement::ExternalRaw => Some(0),
            Placement::Packed | Placement::External => None,
        };
        if let Some(start) = start {
            for part in &prepared.parts {
                writes.push(self.data_id, start + part.guest.start, part.bytes.clone());
            }
            return Ok(());
        }
        let mut state = lock(&self.state);
        for part in &prepared.parts {
            match &part.bytes {
                Bytes::Encoded(range) => {
                    let offset = self.place_compressed(&mut state, part.guest.start, range.len() as u64)?;
                    writes.push(self.data_id, offset, part.bytes.clone());
                }
                Bytes::Zero(_) if self.options.version >= 3 => {
                    self.mark_zeros(&mut state, part.guest.clone())?
                }
                bytes => self.place_plain(&mut state, part.guest.clone(), bytes, writes)?,
            }
        }
        Ok(())
    }

    fn seals(&self) -> bool {
        self.encryption.is_some()
    }

    fn seal(&self, prepared: &mut Prepared, writes: &mut WriteList) -> Result<()> {
        match &self.encryption {
            Some(encryption) => encryption.seal(prepared, writes, self.output()),
            None => Ok(()),
        }
    }

    fn finish(&self) -> Result<()> {
        self.write_tables()
    }

    fn notes(&self) -> Vec<String> {
        match *lock(&self.size) {
            Some(size) if !size.is_multiple_of(SIZE_MULTIPLE) => vec![format!(
                "the virtual size was rounded up from {size} to {} bytes",
                size.next_multiple_of(SIZE_MULTIPLE)
            )],
            _ => Vec::new(),
        }
    }
}

/// Returns the error for content of an image with preallocation over a backing image: its tables show the backing
/// image.
fn no_content_over_base() -> Error {
    Error::unsupported("preallocation over a backing file needs an empty image")
        .hint("leave out preallocation, or create the image without content")
}
