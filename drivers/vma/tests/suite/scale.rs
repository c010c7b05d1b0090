//! An archive of a terabyte: offsets above 32 bits, and an index that stays small.

use std::io;
use std::sync::Arc;

use imgtool_core::{DeviceId, Extent, ExtentKind, ImageSource, Input, OpenOptions, ReadAt};
use imgtool_testing::vma::{ArchiveBuilder, UUID};
use imgtool_vma::VmaSource;
use imgtool_vma::extent::{BlockInfo, ExtentHeader};

const CLUSTER: u64 = 65_536;
/// Number of clusters in each extent, all stored in full.
const PER_EXTENT: u64 = 59;
const EXTENT: u64 = 512 + PER_EXTENT * CLUSTER;
const EXTENTS: u64 = 285_000;
const SIZE: u64 = EXTENTS * PER_EXTENT * CLUSTER;

/// An archive generated as it is read. Each cluster repeats its own number.
struct GeneratedArchive {
    header: Vec<u8>,
}

impl GeneratedArchive {
    fn extent_header(number: u64) -> [u8; 512] {
        let mut header = ExtentHeader::empty();
        header.block_count = 944;
        for (slot, cluster) in header.slots.iter_mut().zip(number * PER_EXTENT..) {
            *slot = BlockInfo { mask: 0xffff, dev_id: 1, cluster_num: u32::try_from(cluster).unwrap() };
        }
        header.encode(&UUID)
    }

    fn byte(&self, position: u64) -> u8 {
        let Some(behind) = position.checked_sub(self.header.len() as u64) else {
            return self.header[position as usize];
        };
        let (extent, within) = (behind / EXTENT, behind % EXTENT);
        match within.checked_sub(512) {
            None => Self::extent_header(extent)[within as usize],
            Some(data) => content(extent * PER_EXTENT * CLUSTER + data),
        }
    }
}

/// Returns the byte of the device at guest offset `guest`.
fn content(guest: u64) -> u8 {
    (guest / CLUSTER).to_be_bytes()[(guest % 8) as usize]
}

impl ReadAt for GeneratedArchive {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let behind = position.checked_sub(self.header.len() as u64);
        if let (512, Some(behind)) = (buf.len(), behind)
            && behind.is_multiple_of(EXTENT)
        {
            buf.copy_from_slice(&Self::extent_header(behind / EXTENT));
            return Ok(());
        }
        for (byte, position) in buf.iter_mut().zip(position..) {
            *byte = self.byte(position);
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.header.len() as u64 + EXTENTS * EXTENT
    }
}

#[test]
fn reads_a_terabyte_archive_by_position() {
    let header = ArchiveBuilder::new().device(1, "a", SIZE).header();
    let input = Input::from_read_at("generated.vma", Arc::new(GeneratedArchive { header }));
    let source = VmaSource::open(input, &OpenOptions::default()).unwrap();
    let random = source.access().random().unwrap();
    for start in [0, 4 << 30, (4 << 30) - 5, SIZE / 2 + 12_345, SIZE - 10_000] {
        let mut bytes = vec![0; 10_000];
        random.read_at(DeviceId(1), &mut bytes, start).unwrap();
        let expected: Vec<u8> = (start..start + 10_000).map(content).collect();
        assert!(bytes == expected, "at {start}");
    }
    let start = SIZE - 100_000_000;
    let extents = random.extents(DeviceId(1), start..SIZE).unwrap();
    assert_eq!(extents, [Extent { start, len: 100_000_000, kind: ExtentKind::Data }]);
}
