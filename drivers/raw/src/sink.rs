//! Writing raw images to sparse files, existing targets and streams.

use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Device, Error, Geometry, ImageSink, Output, OutputId, Part, Prepared,
    Result, Sharing, SinkDevice, SinkPiece, WriteList,
};

use crate::options::{Preallocation, WriteOptions};

/// Length in bytes of a piece. Our choice: the read buffer and the page cache's copy fit into a core's cache.
/// From 128 KiB to 2 MiB, the speed of copies from the page cache to tmpfs differs by 4 %; shorter pieces
/// take less memory.
const PIECE_LEN: u64 = 256 * 1024;

/// A raw image being written.
pub(crate) struct RawSink {
    outputs: [Output; 1],
    /// Virtual size in bytes; for an open-ended device, 0 until [`Consumer::resize`] sets it.
    size: AtomicU64,
    /// True if the device's size is unknown until the source ends.
    open_ended: bool,
    options: WriteOptions,
}

impl RawSink {
    /// Creates a sink that writes `device` to `output`.
    pub(crate) fn new(output: Output, device: &Device, options: WriteOptions) -> Self {
        Self { outputs: [output], size: AtomicU64::new(device.size), open_ended: device.open_ended, options }
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }

    /// Refuses a piece of a stream beyond the end of an existing target. A hole there is never written, so no
    /// write would fail.
    fn check_capacity(&self, piece: &SinkPiece) -> Result<()> {
        match self.output().capacity() {
            Some(capacity) if self.open_ended && piece.end() > capacity => Err(Error::refused(format!(
                "the target is too small: it has {capacity} bytes, the stream has more"
            ))
            .path(self.output().location())
            .hint("a larger target is needed")),
            _ => Ok(()),
        }
    }
}

impl Consumer for RawSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let piece_len = PIECE_LEN.max(self.options.zero_unit);
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len,
            // Zeros that are stored like data must fit into the buffer of one piece.
            max_zero_len: if self.options.stores_zeros { piece_len } else { u64::MAX },
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        self.check_capacity(&piece)?;
        if self.options.stores_zeros {
            return Ok(prepare_with_zeros(piece, pool));
        }
        // `CreateOptions::zero_unit` limits the unit to 2 MiB.
        let unit = self.options.zero_unit as usize;
        let runs = piece.dense_runs(unit.min(ZERO_GRANULARITY), unit);
        Ok(Prepared::sparse(piece, runs, self.output().needs_zeros()))
    }

    fn resize(&self, _device: SinkDevice, size: u64) -> Result<()> {
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }
}

impl ImageSink for RawSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        if !self.open_ended {
            let size = self.size.load(Ordering::Relaxed);
            // Fails before any data is written if the file system or a resource limit forbids this length.
            self.output().set_len(size)?;
            if self.options.preallocation == Preallocation::Falloc {
                self.output().allocate(0, size)?;
            }
        }
        Ok(Vec::new())
    }

    fn append_only(&self) -> bool {
        self.output().is_stream()
    }

    fn in_guest_order(&self) -> bool {
        self.append_only()
    }

    fn sharing(&self, _device: SinkDevice) -> Sharing {
        if self.options.stores_zeros || self.options.preallocation == Preallocation::Falloc {
            // The options ask for allocated space; blocks shared with the source would replace it.
            Sharing::Never
        } else if self.output().needs_zeros() {
            Sharing::Parts(OutputId::MAIN)
        } else {
            Sharing::Whole(OutputId::MAIN)
        }
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        for part in &prepared.parts {
            writes.push(OutputId::MAIN, part.guest.start, part.bytes.clone());
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.output().set_len(self.size.load(Ordering::Relaxed))
    }
}

/// Prepares a piece as a single part of data that includes the zeros.
fn prepare_with_zeros(piece: SinkPiece, pool: &BufferPool) -> Prepared {
    let piece = piece.with_zeros_as_data(pool);
    let len = piece.data.as_ref().map_or(0, |data| data.len());
    let guest = piece.start..piece.end();
    let mut prepared = Prepared::new(piece);
    prepared.parts.push(Part { guest, bytes: Bytes::Data(0..len) });
    prepared
}
