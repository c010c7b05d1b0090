//! Writing fixed images, to files and streams: the guest's bytes, then the footer.

use imgtool_core::fingerprint::Fingerprint;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Bytes, Consumer, Geometry, ImageSink, Output, OutputId, Part, Prepared, Result, SinkDevice,
    SinkPiece, WriteList,
};

use super::{footer, rounding_note};
use crate::layout::footer::FOOTER_LEN;
use crate::options::{MAX_DYNAMIC_SIZE, VhdOptions};

/// Length in bytes of a piece. Our choice: the read buffer and the page cache's copy fit into a core's cache.
const PIECE_LEN: u64 = 256 << 10;

/// A fixed image being written.
#[derive(Debug)]
pub(super) struct FixedSink {
    outputs: [Output; 1],
    /// Size of the device in bytes, before it is rounded up.
    device_size: u64,
    virtual_size: u64,
    options: VhdOptions,
    /// Name of an image without content, as parameters of its UUID.
    own_name: Vec<u64>,
    fingerprint: Fingerprint,
}

impl FixedSink {
    /// Creates a sink that writes to `output`.
    pub(super) fn new(
        output: Output,
        device_size: u64,
        virtual_size: u64,
        options: VhdOptions,
        own_name: Vec<u64>,
    ) -> Self {
        let fingerprint = Fingerprint::default();
        Self { outputs: [output], device_size, virtual_size, options, own_name, fingerprint }
    }

    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }

    fn footer(&self) -> [u8; FOOTER_LEN] {
        let mut parameters = vec![self.device_size, self.virtual_size];
        parameters.extend(&self.own_name);
        let uuid = self.fingerprint.guid("fixed vhd", &parameters);
        footer(&self.options, self.virtual_size, uuid).encode()
    }
}

impl Consumer for FixedSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        let piece_len = PIECE_LEN.max(self.options.zero_unit.unwrap_or(0));
        Geometry {
            // A unit of zero detection is stored or left out as a whole.
            granule: self.options.zero_unit.unwrap_or(0).max(ZERO_GRANULARITY as u64),
            granule_required: false,
            piece_len,
            max_zero_len: if self.options.zero_unit.is_some() { u64::MAX } else { piece_len },
            ordered: self.output().is_stream(),
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let nonzero = piece.nonzero_runs(ZERO_GRANULARITY);
        for run in &nonzero {
            if let Some(data) = &piece.data {
                self.fingerprint.add(piece.start + run.start as u64, &data[run.clone()]);
            }
        }
        let Some(unit) = self.options.zero_unit else {
            let piece = piece.with_zeros_as_data(pool);
            let part = Part { guest: piece.start..piece.end(), bytes: Bytes::Data(0..piece.len as usize) };
            return Ok(Prepared { parts: vec![part], ..Prepared::new(piece) });
        };
        let runs = match unit as usize {
            ZERO_GRANULARITY => nonzero,
            unit => piece.nonzero_runs(unit),
        };
        Ok(Prepared::sparse(piece, runs, self.output().needs_zeros()))
    }
}

impl ImageSink for FixedSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        if !self.output().is_stream() {
            // Fails before any data is written if the file system or a resource limit forbids this length.
            self.output().set_len(self.virtual_size)?;
        }
        Ok(Vec::new())
    }

    fn append_only(&self) -> bool {
        self.output().is_stream()
    }

    fn in_guest_order(&self) -> bool {
        self.append_only()
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        for part in &prepared.parts {
            writes.push(OutputId::MAIN, part.guest.start, part.bytes.clone());
        }
        Ok(())
    }

    fn end(&self) -> Result<Vec<u8>> {
        if !self.append_only() {
            return Ok(Vec::new());
        }
        // Less than a MiB, the largest alignment.
        let mut bytes = vec![0; (self.virtual_size - self.device_size) as usize];
        bytes.extend_from_slice(&self.footer());
        Ok(bytes)
    }

    fn finish(&self) -> Result<()> {
        if self.append_only() {
            return Ok(());
        }
        if self.output().needs_zeros() {
            self.output().write_zeros_at(self.device_size, self.virtual_size - self.device_size)?;
        }
        self.output().set_len(self.virtual_size)?;
        // Readers look for the footer at the end of the file, which may be an existing one, or of the device.
        let end = self.output().capacity().map_or(self.virtual_size, |capacity| capacity - FOOTER_LEN as u64);
        self.output().write_at(&self.footer(), end)
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = rounding_note(self.device_size, self.virtual_size);
        if self.virtual_size > MAX_DYNAMIC_SIZE {
            notes.push(format!(
                "the disk has {} bytes; Hyper-V and QEMU write no VHD image above {MAX_DYNAMIC_SIZE} (2040 GiB)",
                self.virtual_size
            ));
        }
        notes
    }
}
