//! Writing containers. The workers encrypt, since the number of a sector follows from its guest offset.

use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_core::{
    BufferPool, Bytes, Consumer, CreateOptions, Error, Geometry, ImageSink, ImageSource, ImageWriter,
    Manifest, Measure, Output, OutputFactory, OutputId, Part, Prepared, Remedy, Result, Secret, SinkDevice,
    SinkPiece, WriteList,
};
use imgtool_crypt::{NewHeader, NewVolume, SECTOR};

use crate::options;

/// Length in bytes of a piece. Our choice: it fits into a core's cache.
const PIECE_LEN: u64 = 256 * 1024;

/// Alignment of pieces in bytes.
const GRANULE: u64 = 4096;

/// Writer of containers with these options.
#[derive(Debug)]
pub(crate) struct LuksWriter {
    volume: NewVolume,
    secret: Option<Secret>,
}

impl LuksWriter {
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        Ok(Self { volume: options::parse(options)?, secret: options.secret.clone() })
    }
}

impl ImageWriter for LuksWriter {
    fn encrypts(&self) -> bool {
        true
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let device = source.info().single("a LUKS container")?;
        let size = round_up(device.size)?.checked_add(self.volume.payload_offset());
        let size = size.ok_or_else(|| Error::limit("the disk is too large"))?;
        // Zeros are encrypted, too.
        Ok(Measure { required: size, fully_allocated: size, bitmaps: None, occupied: size })
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let device = manifest.single(crate::FORMAT)?;
        let Some(secret) = &self.secret else {
            return Err(
                Error::usage("a LUKS container needs a passphrase").remedied_by(Remedy::GiveTargetSecret)
            );
        };
        let size = if device.open_ended { 0 } else { device.size };
        round_up(size)?;
        let output = outputs.main()?;
        let header = self.volume.create(secret)?;
        Ok(Box::new(LuksSink { outputs: [output], header, requested: AtomicU64::new(size) }))
    }
}

/// Rounds a disk size up to whole sectors.
fn round_up(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(SECTOR as u64).ok_or_else(|| Error::limit("the disk is too large"))
}

/// A container being written.
struct LuksSink {
    outputs: [Output; 1],
    header: NewHeader,
    /// Size of the disk in bytes, before rounding; for an open-ended device, 0 until [`Consumer::resize`] sets it.
    requested: AtomicU64,
}

impl LuksSink {
    fn output(&self) -> &Output {
        let [output] = &self.outputs;
        output
    }
}

impl Consumer for LuksSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: GRANULE,
            granule_required: false,
            piece_len: PIECE_LEN,
            // Zeros are encrypted like data, in the buffer of one piece.
            max_zero_len: PIECE_LEN,
            ordered: false,
        }
    }

    fn prepare(&self, piece: SinkPiece, pool: &BufferPool) -> Result<Prepared> {
        let piece = piece.with_zeros_as_data(pool);
        let (start, end) = (piece.start, piece.end());
        let mut prepared = Prepared::new(piece);
        let Some(data) = &mut prepared.data else { return Ok(prepared) };
        let sector = start / SECTOR as u64;
        let whole = data.len() - data.len() % SECTOR;
        self.header.cipher.encrypt(&mut data[..whole], sector);
        let middle = start + whole as u64;
        // The disk may end within its last sector.
        let mut last = data[whole..].to_vec();
        if whole > 0 {
            prepared.parts.push(Part { guest: start..middle, bytes: Bytes::Data(0..whole) });
        }
        if !last.is_empty() {
            last.resize(SECTOR, 0);
            self.header.cipher.encrypt(&mut last, middle / SECTOR as u64);
            prepared.parts.push(Part { guest: middle..end, bytes: Bytes::Owned(last) });
        }
        Ok(prepared)
    }

    fn resize(&self, _device: SinkDevice, size: u64) -> Result<()> {
        round_up(size)?;
        self.requested.store(size, Ordering::Relaxed);
        Ok(())
    }
}

impl ImageSink for LuksSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// Returns the header for a stream. A file gets it last.
    fn begin(&self) -> Result<Vec<u8>> {
        if !self.output().is_stream() {
            return Ok(Vec::new());
        }
        let mut bytes = self.header.bytes.clone();
        // Below 3 MiB.
        bytes.resize(self.header.payload_offset as usize, 0);
        Ok(bytes)
    }

    fn append_only(&self) -> bool {
        self.output().is_stream()
    }

    fn in_guest_order(&self) -> bool {
        self.append_only()
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        for part in &prepared.parts {
            let position = self.header.payload_offset.checked_add(part.guest.start);
            let position = position.ok_or_else(|| Error::limit("the disk is too large"))?;
            writes.push(OutputId::MAIN, position, part.bytes.clone());
        }
        Ok(())
    }

    fn notes(&self) -> Vec<String> {
        let size = self.requested.load(Ordering::Relaxed);
        match size.is_multiple_of(SECTOR as u64) {
            true => Vec::new(),
            false => vec![format!(
                "the virtual size was rounded up from {size} to {} bytes",
                size.next_multiple_of(SECTOR as u64)
            )],
        }
    }

    fn finish(&self) -> Result<()> {
        if self.output().is_stream() {
            return Ok(());
        }
        let size = round_up(self.requested.load(Ordering::Relaxed))?;
        self.output().set_len(self.header.payload_offset.saturating_add(size))?;
        self.output().write_at(&self.header.bytes, 0)
    }
}
