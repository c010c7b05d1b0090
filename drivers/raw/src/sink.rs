//! Writing raw images: sparse files, existing files and block devices, streams.

use std::sync::atomic::{AtomicU64, Ordering};

use imgtool_toolkit::zero::ZERO_GRANULARITY;
use imgtool_toolkit::{
    BufferPool, Bytes, CreateOptions, DeviceId, Error, Geometry, ImageSink, Manifest, Output, Part, Piece,
    Prepared, Result, WriteList,
};

/// Bytes per piece. Our choice: the read buffer and the page cache's copy fit a core's cache. From page
/// cache to tmpfs, 128 KiB to 2 MiB differ by 4 %, and smaller pieces take less memory.
const PIECE_LEN: u64 = 256 * 1024;

/// Smallest sparse granularity, bytes. qemu-img's limit for `-S`.
const SECTOR: u64 = 512;

/// Creates an image on `output` for the manifest's only device.
pub(crate) fn create(
    output: Output,
    manifest: &Manifest,
    options: &CreateOptions,
) -> Result<Box<dyn ImageSink>> {
    let device = manifest.single(crate::FORMAT)?;
    let preallocation = match options.get("preallocation") {
        None | Some("off") => Preallocation::Off,
        Some("falloc") => Preallocation::Falloc,
        Some("full") => Preallocation::Full,
        Some(other) => {
            return Err(Error::usage(format!(
                "option 'preallocation' must be off, falloc or full, not '{other}'"
            )));
        }
    };
    if options.compress.is_some() {
        return Err(Error::usage("raw images can't be compressed")
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
    let stores_zeros = zero_unit.is_none() || preallocation == Preallocation::Full;
    Ok(Box::new(RawSink {
        output,
        size: AtomicU64::new(device.size),
        open_ended: device.open_ended,
        zero_unit: zero_unit.unwrap_or(ZERO_GRANULARITY as u64),
        stores_zeros,
        preallocation,
    }))
}

/// Values of the option `preallocation`, named as in qemu-img.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Preallocation {
    /// The file starts as a hole.
    Off,
    /// The file system reserves the space.
    Falloc,
    /// Every byte is written, zeros too.
    Full,
}

/// A raw image being written.
struct RawSink {
    output: Output,
    /// Guest bytes; of an open-ended device, known only at the end.
    size: AtomicU64,
    /// True if the device's size is known only at the end.
    open_ended: bool,
    /// Shortest run of zeros that becomes a hole, bytes; a power of two.
    zero_unit: u64,
    /// True if zeros are written as bytes.
    stores_zeros: bool,
    preallocation: Preallocation,
}

impl ImageSink for RawSink {
    fn geometry(&self, _device: DeviceId) -> Geometry {
        let piece_len = PIECE_LEN.max(self.zero_unit);
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len,
            // Zeros that are written as bytes fill the piece's own buffer.
            max_zero_len: if self.stores_zeros { piece_len } else { u64::MAX },
            ordered: false,
        }
    }

    fn keeps_bytes(&self, _device: DeviceId) -> bool {
        !self.stores_zeros && self.preallocation == Preallocation::Off
    }

    fn output(&self, _device: DeviceId) -> &Output {
        &self.output
    }

    fn is_verbatim(&self, _device: DeviceId) -> bool {
        !self.stores_zeros && !self.output.needs_zeros()
    }

    fn append_only(&self) -> bool {
        self.output.is_stream()
    }

    fn begin(&self) -> Result<()> {
        if !self.open_ended {
            // Fails before any data is written if the file system or a resource limit forbids this length.
            self.output.set_len(self.size.load(Ordering::Relaxed))?;
        }
        if self.preallocation == Preallocation::Falloc && !self.open_ended {
            self.output.allocate(0, self.size.load(Ordering::Relaxed))?;
        }
        Ok(())
    }

    fn prepare(&self, piece: Piece, pool: &BufferPool) -> Result<Prepared> {
        if self.stores_zeros {
            return Ok(prepare_with_zeros(piece, pool));
        }
        // `CreateOptions::zero_unit` bounds it to 2 MiB.
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

/// Makes one part of all bytes of a piece, zeros included.
fn prepare_with_zeros(piece: Piece, pool: &BufferPool) -> Prepared {
    let piece = piece.with_zeros_as_data(pool);
    let len = piece.data.as_ref().map_or(0, |data| data.len());
    let guest = piece.start..piece.end();
    let mut prepared = Prepared::new(piece);
    prepared.parts.push(Part { guest, bytes: Bytes::Data(0..len) });
    prepared
}
