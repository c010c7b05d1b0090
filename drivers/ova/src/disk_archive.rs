//! A tar archive with one raw disk, `disk.raw`, as Google Compute Engine imports it.
//!
//! The header is that of GNU tar before POSIX. The disk is stored whole, and not as a sparse file: where a
//! source has holes would decide about the bytes of the archive otherwise. Zeros compress a thousandfold.

use std::sync::Mutex;

use imgtool_core::source::data_bytes;
use imgtool_core::sync::lock;
use imgtool_core::zero::ZERO_GRANULARITY;
use imgtool_core::{
    BufferPool, Consumer, CreateOptions, DeviceKind, Error, Geometry, ImageSink, ImageSource, ImageWriter,
    Manifest, Measure, Output, OutputFactory, OutputId, Prepared, Result, SinkDevice, SinkPiece, WriteList,
};

use crate::tar::{BLOCK, write};

/// Name of the file that Google Compute Engine looks for.
pub(crate) const DISK_NAME: &str = "disk.raw";

/// Length in bytes of the header.
const HEADER: u64 = BLOCK as u64;

/// Length in bytes of a piece. Our choice, as for raw images.
const PIECE_LEN: u64 = 256 * 1024;

/// Length in bytes of the units that GNU tar writes: 20 blocks. Older programs read whole units.
const RECORD: u64 = 20 * HEADER;

/// Writer of archives with one disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DiskArchiveWriter {
    /// Time of the last change, in seconds since 1970.
    mtime: u64,
}

impl DiskArchiveWriter {
    /// Parses the options.
    pub(crate) fn new(options: &CreateOptions) -> Result<Self> {
        if options.compress.is_some() {
            return Err(Error::usage("a tar archive has no compression of its own")
                .hint("a name that ends in .tar.gz compresses the whole file"));
        }
        if options.blank {
            return Err(
                Error::unsupported("an archive without content is of no use").hint("convert a disk into one")
            );
        }
        let mtime = options.source_date_epoch.and_then(|time| u64::try_from(time).ok()).unwrap_or(0);
        Ok(Self { mtime })
    }
}

/// Returns the bytes that follow a disk of `size` bytes: its last block, the end mark, and the rest of the
/// record.
fn end(size: u64) -> Vec<u8> {
    let mark = HEADER + size.next_multiple_of(HEADER) + 2 * HEADER;
    // At most two blocks and a record.
    vec![0; (mark.next_multiple_of(RECORD) - HEADER - size) as usize]
}

impl ImageWriter for DiskArchiveWriter {
    fn needs_guest_order(&self) -> bool {
        true
    }

    fn measure(&self, source: &dyn ImageSource) -> Result<Measure> {
        let device = source.info().single("an archive of one disk")?;
        let whole = HEADER.saturating_add(device.size).saturating_add(end(device.size % RECORD).len() as u64);
        let occupied = data_bytes(source, device)?;
        Ok(Measure { required: whole, fully_allocated: whole, occupied, ..Measure::default() })
    }

    fn create(&self, outputs: &mut dyn OutputFactory, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
        let [device] = manifest.devices.as_slice() else {
            return Err(Error::unsupported(format!(
                "a new tar archive holds one disk, not {}",
                manifest.devices.len()
            ))
            .hint("choose one disk, and make an archive of each"));
        };
        if device.kind == DeviceKind::VmState {
            return Err(Error::unsupported("a tar archive of a disk does not hold the state of a machine")
                .device(&*device.name));
        }
        let output = outputs.main()?;
        let name = output.location().file_name().unwrap_or_default().to_ascii_lowercase();
        if name.ends_with(".tgz") {
            return Err(Error::unsupported("a name that ends in .tgz is read, but not written")
                .path(output.location())
                .hint("give a name that ends in .tar.gz"));
        }
        // Only the numbers of a header limit the size.
        if device.size > i64::MAX as u64 {
            return Err(Error::unsupported("the disk is larger than any file").device(&*device.name));
        }
        let header = write::old_gnu_header(DISK_NAME, device.size, self.mtime)?;
        Ok(Box::new(DiskArchiveSink { outputs: [output], size: device.size, header, next: Mutex::new(0) }))
    }
}

/// An archive being written.
#[derive(Debug)]
struct DiskArchiveSink {
    outputs: [Output; 1],
    /// Size of the disk in bytes.
    size: u64,
    header: [u8; BLOCK],
    /// Guest offset up to which the disk was placed.
    next: Mutex<u64>,
}

impl Consumer for DiskArchiveSink {
    fn geometry(&self, _device: SinkDevice) -> Geometry {
        Geometry {
            granule: 1,
            granule_required: false,
            piece_len: PIECE_LEN,
            max_zero_len: u64::MAX,
            ordered: self.append_only(),
        }
    }

    fn prepare(&self, piece: SinkPiece, _pool: &BufferPool) -> Result<Prepared> {
        let runs = piece.dense_runs(ZERO_GRANULARITY, ZERO_GRANULARITY);
        Ok(Prepared::sparse(piece, runs, self.outputs[0].needs_zeros()))
    }
}

impl ImageSink for DiskArchiveSink {
    fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    fn begin(&self) -> Result<Vec<u8>> {
        if !self.append_only() {
            // Fails before any data is written if the file system or a resource limit forbids this length.
            self.outputs[0].set_len(HEADER + self.size + end(self.size).len() as u64)?;
        }
        Ok(self.header.to_vec())
    }

    fn append_only(&self) -> bool {
        self.outputs[0].is_stream()
    }

    fn in_guest_order(&self) -> bool {
        self.append_only()
    }

    fn place(&self, prepared: &Prepared, writes: &mut WriteList) -> Result<()> {
        if self.append_only() {
            let mut next = lock(&self.next);
            if prepared.start != *next {
                return Err(Error::out_of_order("a disk in an archive must be written in guest order")
                    .hint("save the source to a file, and convert from there"));
            }
            *next = prepared.start + prepared.len;
        }
        for part in &prepared.parts {
            writes.push(OutputId::MAIN, HEADER + part.guest.start, part.bytes.clone());
        }
        Ok(())
    }

    fn end(&self) -> Result<Vec<u8>> {
        Ok(if self.append_only() { end(self.size) } else { Vec::new() })
    }

    fn finish(&self) -> Result<()> {
        if self.append_only() {
            return Ok(());
        }
        self.outputs[0].write_at(&end(self.size), HEADER + self.size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archives_end_with_two_blocks_and_a_whole_record() {
        for size in [0, 1, 511, 512, 513, 8192, 8704, 9216, 10240, (1 << 30) + 7] {
            let whole = HEADER + size + end(size).len() as u64;
            assert!(whole.is_multiple_of(RECORD), "{size}");
            assert!(end(size).len() as u64 >= 2 * HEADER, "{size}");
            assert!((end(size).len() as u64) < 2 * HEADER + HEADER + RECORD, "{size}");
        }
    }
}
