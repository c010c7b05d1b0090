//! Writing flat images: the guest's bytes in one file or several, and a descriptor beside them.

use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Error, Geometry, ImageSink, Output, OutputId, Part, Prepared, Result,
    SinkDevice, SinkPiece, WriteList,
};

use super::{NewImage, SPLIT_SECTORS};
use crate::layout::SECTOR_SIZE;

/// Length of a piece in bytes. Our choice: the read buffer and the page cache's copy fit into a core's cache.
const PIECE_LEN: u64 = 256 << 10;

/// A flat image being written.
#[derive(Debug)]
pub(super) struct FlatSink {
    /// The descriptor, then the extents.
    outputs: Vec<Output>,
    image: NewImage,
    /// Length in bytes of every extent but the last.
    extent_len: u64,
    fingerprint: Fingerprint,
}

impl FlatSink {
    /// Creates a sink for `image`, which writes its descriptor to the first output and its extents to the others.
    pub(super) fn new(outputs: Vec<Output>, image: NewImage) -> Self {
        let extent_len = if image.extents.len() > 1 { SPLIT_SECTORS * SECTOR_SIZE } else { u64::MAX };
        Self { outputs, image, extent_len, fingerprint: Fingerprint::default() }
    }

    /// Cuts parts where an extent ends.
    fn cut(&self, parts: Vec<Part>) -> Result<Vec<Part>> {
        if self.extent_len == u64::MAX {
            return Ok(parts);
        }
        let mut cut = Vec::new();
        for part in parts {
            let mut at = part.guest.start;
            while at < part.guest.end {
                let end = (at / self.extent_len + 1).saturating_mul(self.extent_len).min(part.guest.end);
                let bytes = match &part.bytes {
                    Bytes::Data(range) => {
                        let start = range.start + (at - part.guest.start) as usize;
                        Bytes::Data(start..start + (end - at) as usize)
                    }
                    Bytes::Zero(_) => Bytes::Zero(end - at),
                    _ => return Err(Error::unsupported("a flat extent has only data and zeros")),
                };
                cut.push(Part { guest: at..end, bytes });
                at = end;
            }
        }
        Ok(cut)
    }
}

impl Consumer for FlatSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let piece_len = PIECE_LEN.max(self.image.options.zero_unit.unwrap_or(0));
        Geometry {
            granule: ZERO_GRANULARITY as u64,
            granule_required: false,
            piece_len,
            max_zero_len: if self.image.options.zero_unit.is_some() { u64::MAX } else { piece_len },
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let nonzero = piece.nonzero_runs(ZERO_GRANULARITY);
        for run in &nonzero {
            if let Some(data) = &piece.data {
                self.fingerprint.add(piece.start + run.start as u64, &data[run.clone()]);
            }
        }
        let mut prepared = match self.image.options.zero_unit {
            None => {
                let piece = piece.with_zeros_as_data(pool);
                let runs = piece.runs.clone();
                Prepared::sparse(piece, runs, false)
            }
            Some(unit) if unit as usize == ZERO_GRANULARITY => Prepared::sparse(piece, nonzero, false),
            Some(unit) => {
                let runs = piece.dense_runs(ZERO_GRANULARITY, unit as usize);
                Prepared::sparse(piece, runs, false)
            }
        };
        prepared.parts = self.cut(std::mem::take(&mut prepared.parts))?;
        Ok(prepared)
    }
}

impl ImageSink for FlatSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        // Fails before any data is written if the file system or a resource limit forbids this length.
        for (output, extent) in self.outputs.iter().skip(1).zip(&self.image.extents) {
            output.set_len(extent.sectors * SECTOR_SIZE)?;
        }
        Ok(Vec::new())
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        for part in &prepared.parts {
            let extent = part.guest.start / self.extent_len;
            let output = u32::try_from(extent + 1).map(OutputId);
            let output = output.map_err(|_| Error::out_of_bounds(format!("no extent {extent}")))?;
            writes.push(output, part.guest.start % self.extent_len, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        for (output, extent) in self.outputs.iter().skip(1).zip(&self.image.extents) {
            output.set_len(extent.sectors * SECTOR_SIZE)?;
        }
        let Some(main) = self.outputs.first() else { return Ok(()) };
        let text = self.image.descriptor(&self.fingerprint);
        main.write_at(text.as_bytes(), 0)?;
        main.set_len(text.len() as u64)
    }

    fn notes(&self) -> Vec<String> {
        self.image.notes()
    }
}
