//! Making raw images: sparse files, existing files and block devices, streams.

use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_toolkit::zero::ZERO_GRANULARITY;
use imgtool_toolkit::{
    BufferPool, Bytes, CreateOptions, DeviceId, Error, Geometry, ImageSink, Manifest, Output, Part, Piece,
    Prepared, Result, WriteList,
};

/// Bytes in a piece: read buffer and page cache copy fit a core's cache (measured from page cache to
/// tmpfs: 128 KiB to 2 MiB differ by 4 %, and smaller ones take less memory).
const PIECE_LEN: u64 = 256 * 1024;

/// The finest unit of `-S`: qemu-img's.
const SECTOR: u64 = 512;

pub(crate) fn create(
    output: Output,
    manifest: &Manifest,
    options: &CreateOptions,
) -> Result<Box<dyn ImageSink>> {
    let device = manifest.single("raw")?;
    let preallocation = match options.get("preallocation") {
        None | Some("off") => Preallocation::Off,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => {
            return Err(Error::usage(format!(
                "option 'preallocation' is off, falloc or full, not '{other}'"
            )));
        }
    };
    if options.compress.is_some() {
        return Err(Error::usage("raw images are not compressed")
            .hint("choose another format, or a name that ends in .zst or .gz"));
    }
    if let Some(capacity) = output.capacity()
        && capacity < device.size
    {
        return Err(Error::refused(format!(
            "the target holds {capacity} bytes, the device needs {}",
            device.size
        ))
        .device(&*device.name));
    }
    let zero_unit = match options.sparse_granularity {
        None => Some(ZERO_GRANULARITY as u64),
        Some(_) => options.zero_unit(SECTOR),
    };
    let write_zeros_plainly = zero_unit.is_none() || preallocation == Preallocation::Full;
    Ok(Box::new(RawSink {
        output,
        size: AtomicU64::new(device.size),
        open_ended: device.open_ended,
        zero_unit: zero_unit.unwrap_or(ZERO_GRANULARITY as u64),
        write_zeros_plainly,
        preallocation,
    }))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preallocation {
    Off,
    Falloc,
    Full,
}

struct RawSink {
    output: Output,
    size: AtomicU64,
    open_ended: bool,
    /// Bytes; a power of two.
    zero_unit: u64,
    write_zeros_plainly: bool,
    preallocation: Preallocation,
}

impl ImageSink for RawSink {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        let piece_len = PIECE_LEN.max(self.zero_unit);
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len,
            // Zeros that must be written as bytes are made from the piece's own buffer.
            max_zero_len: if self.write_zeros_plainly { piece_len } else { u64::MAX },
            ordered: false,
        }
    }

    fn keeps_bytes(&self, _device: DeviceId) -> bool {
        !self.write_zeros_plainly && self.preallocation == Preallocation::Off
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.output
    }

    fn is_verbatim(&self, _device: DeviceId) -> bool {
        !self.write_zeros_plainly && !self.output.needs_zeros()
    }

    fn append_only(&self) -> bool {
        self.output.is_stream()
    }

    fn begin(&self) -> Result<()> {
        if !self.open_ended {
            // A length that the file system or a limit does not allow is refused before any data.
            self.output.set_len(self.size.load(Ordering::Relaxed))?;
        }
        if self.preallocation == Preallocation::Falloc && !self.open_ended {
            self.output.allocate(0, self.size.load(Ordering::Relaxed))?;
        }
        Ok(())
    }

    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        if self.write_zeros_plainly {
            return Ok(self.prepare_plainly(piece, pool));
        }
        // At most 2 MiB.
        let unit = self.zero_unit as usize;
        let runs = piece.dense_runs(unit.min(ZERO_GRANULARITY), unit);
        Ok(Prepared::sparse(piece, runs, self.output.needs_zeros()))
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        for part in &prepared.parts {
            writes.push(part.guest.start, part.bytes.clone());
        }
        Ok(())
    }

    fn resize(&self, _device: DeviceId, size: u64) -> Result<()> {
        self.size.store(size, Ordering::Relaxed);
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.output.set_len(self.size.load(Ordering::Relaxed))
    }
}

impl RawSink {
    /// Everything is written as bytes, zeros too.
    fn prepare_plainly(&self, piece: Piece, pool: &BufferPool) -> Prepared {
        let piece = piece.with_zeros_as_data(pool);
        let len = piece.data.as_ref().map_or(0, |data| data.len());
        let guest = piece.start..piece.end();
        let mut prepared = Prepared::new(piece);
        prepared.parts.push(Part { guest, bytes: Bytes::Data(0..len) });
        prepared
    }
}
