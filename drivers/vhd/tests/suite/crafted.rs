//! Images built byte by byte: what no program at hand writes, and what none should.

use imgtool_core::{Access, BufferPool, Disk, Driver, Error, ErrorKind, OpenOptions};
use imgtool_testing::memory;
use imgtool_vhd::VhdDriver;

use crate::support::{check, content, open, save};

pub const BLOCK: u64 = 4096;
/// Bitmap of a block: one sector.
const BITMAP: u64 = 512;
pub const UUID: [u8; 16] = [7; 16];

/// Sets the checksum of a structure at `checksum_at`.
fn seal(bytes: &mut [u8], checksum_at: usize) {
    bytes[checksum_at..checksum_at + 4].fill(0);
    let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    bytes[checksum_at..checksum_at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

/// Returns a footer for a disk of `size` bytes.
pub fn footer(size: u64, kind: u32, uuid: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; 512];
    bytes[..8].copy_from_slice(b"conectix");
    bytes[12..16].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
    bytes[16..24].copy_from_slice(&if kind == 2 { u64::MAX } else { 512 }.to_be_bytes());
    bytes[28..32].copy_from_slice(b"win ");
    bytes[48..56].copy_from_slice(&size.to_be_bytes());
    bytes[60..64].copy_from_slice(&kind.to_be_bytes());
    bytes[68..84].copy_from_slice(&uuid);
    seal(&mut bytes, 64);
    bytes
}

/// A small image with blocks of 4 KiB.
pub struct Builder {
    size: u64,
    kind: u32,
    uuid: [u8; 16],
    pub header: Vec<u8>,
    bat: Vec<u32>,
    blocks: Vec<u8>,
    /// Bytes behind the BAT, for names of the parent.
    names: Vec<u8>,
}

impl Builder {
    /// Creates an empty disk of `blocks` blocks.
    pub fn new(blocks: u32) -> Self {
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[8..16].fill(0xff);
        header[16..24].copy_from_slice(&1536u64.to_be_bytes());
        header[24..28].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
        header[28..32].copy_from_slice(&blocks.to_be_bytes());
        header[32..36].copy_from_slice(&(BLOCK as u32).to_be_bytes());
        let bat = vec![u32::MAX; blocks as usize];
        let size = u64::from(blocks) * BLOCK;
        Self { size, kind: 3, uuid: UUID, header, bat, blocks: Vec::new(), names: vec![0; 512] }
    }

    /// Sets an entry of the BAT.
    pub fn entry(mut self, index: usize, sector: u32) -> Self {
        self.bat[index] = sector;
        self
    }

    /// Stores a block filled with `byte`, whose sectors have these bits.
    pub fn block(mut self, index: usize, byte: u8, bits: u8) -> Self {
        // BAT and names take a sector each.
        self.bat[index] = ((1536 + 512 + 512 + self.blocks.len()) / 512) as u32;
        self.blocks.push(bits);
        self.blocks.extend(vec![0; BITMAP as usize - 1]);
        self.blocks.extend(vec![byte; BLOCK as usize]);
        self
    }

    /// Makes it a differencing image over a parent with this UUID and relative name.
    pub fn child_of(mut self, uuid: [u8; 16], name: &str) -> Self {
        self.kind = 4;
        self.uuid = [9; 16];
        self.header[40..56].copy_from_slice(&uuid);
        let units = |name: &str| name.encode_utf16().collect::<Vec<u16>>();
        let full: Vec<u8> = units(&format!(r"C:\vm\{name}")).into_iter().flat_map(u16::to_be_bytes).collect();
        self.header[64..64 + full.len()].copy_from_slice(&full);
        self.names = units(&format!(r".\{name}")).into_iter().flat_map(u16::to_le_bytes).collect();
        self.header[576..580].copy_from_slice(b"W2ru");
        self.header[584..588].copy_from_slice(&(self.names.len() as u32).to_be_bytes());
        self.header[592..600].copy_from_slice(&2048u64.to_be_bytes());
        self.names.resize(512, 0);
        self
    }

    /// Returns the file.
    pub fn bytes(&self) -> Vec<u8> {
        let footer = footer(self.size, self.kind, self.uuid);
        let mut header = self.header.clone();
        seal(&mut header, 36);
        let mut bat: Vec<u8> = self.bat.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bat.resize(512, 0xff);
        [footer.clone(), header, bat, self.names.clone(), self.blocks.clone(), footer].concat()
    }
}

pub fn filled(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().flat_map(|byte| [*byte; BLOCK as usize]).collect()
}

fn open_bytes(bytes: &[u8]) -> imgtool_core::Result<Vec<u8>> {
    content(&VhdDriver.open(memory::as_file("x.vhd", bytes), &OpenOptions::default())?)
}

#[test]
fn reads_blocks_in_any_order_and_ignores_their_bitmaps() {
    let image = Builder::new(5).block(3, 3, 0xff).block(0, 1, 0);
    assert_eq!(open_bytes(&image.bytes()).unwrap(), filled(&[1, 0, 0, 3, 0]));
}

#[test]
fn uses_the_copy_if_the_footer_is_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let mut bytes = Builder::new(2).block(0, 1, 0xff).bytes();
    let end = bytes.len();
    bytes[end - 400] ^= 1;
    let path = save(directory.path(), "x.vhd", &bytes);
    let source = open(&path).unwrap();
    assert_eq!(content(&source).unwrap(), filled(&[1, 0]));
    assert!(source.info().notes[0].contains("using its copy"), "{:?}", source.info().notes);
    assert_eq!(check(&path).corruptions, 1);
    bytes[10] ^= 1;
    assert_eq!(open_bytes(&bytes).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn reads_fixed_images_whose_guest_wrote_a_footer_first() {
    let disk = [footer(1 << 30, 3, UUID), vec![5; 4096]].concat();
    let bytes = [disk.clone(), footer(disk.len() as u64, 2, UUID)].concat();
    assert_eq!(open_bytes(&bytes).unwrap(), disk);
}

#[test]
fn reads_footers_of_511_bytes() {
    let disk = vec![5; 4096];
    let mut bytes = [disk.clone(), footer(4096, 2, UUID)].concat();
    bytes.pop();
    assert_eq!(open_bytes(&bytes).unwrap(), disk);
}

#[test]
fn fixed_streams_must_end_with_their_footer() {
    let disk = vec![5; 700_000 / 512 * 512];
    let good = [disk.clone(), footer(disk.len() as u64, 2, UUID)].concat();
    let read = |bytes: &[u8]| {
        let source = VhdDriver.open(memory::as_stream("x.vhd", bytes), &OpenOptions::default())?;
        let Access::Stream(pass) = source.access() else { panic!("a stream is read in one pass") };
        let mut content = Vec::new();
        while let Some(piece) = pass.lock().unwrap().next_piece(&BufferPool::new())? {
            content.extend_from_slice(piece.data.as_deref().unwrap_or_default());
        }
        Ok::<_, Error>(content)
    };
    assert_eq!(read(&good).unwrap(), disk);
    for bad in [&good[..good.len() - 1], &good[..100_000], &[], &good[512..], &disk] {
        assert_eq!(read(bad).unwrap_err().kind(), ErrorKind::Corrupt, "{} bytes", bad.len());
    }
}

#[test]
fn refuses_structures_that_contradict_themselves() {
    let refusal = |at: usize, value: u32| {
        let mut image = Builder::new(2);
        image.header[at..at + 4].copy_from_slice(&value.to_be_bytes());
        open_bytes(&image.bytes()).unwrap_err().to_string()
    };
    for (at, value, text) in [
        (0, 0, "no signature"),
        (24, 0x0002_0000, "version 2"),
        (28, 1, "has 1 BAT entries"),
        (32, 3000, "blocks of 3000 bytes"),
        (20, 900_000, "the table needs"),
    ] {
        let message = refusal(at, value);
        assert!(message.contains(text), "{at} = {value:#x}: {message}");
    }
    let mut bytes = Builder::new(2).bytes();
    bytes[700] ^= 1;
    assert!(open_bytes(&bytes).unwrap_err().to_string().contains("checksum"));
    for (kind, text) in [(0, "disk type 0"), (5, "disk type 5")] {
        let message = open_bytes(&footer(4096, kind, UUID)).unwrap_err().to_string();
        assert!(message.contains(text), "{message}");
    }
    assert!(open_bytes(&footer(4096, 2, UUID)).unwrap_err().to_string().contains("the disk has 4096 bytes"));
    // A disk that ends within the footer.
    let bytes = [vec![5; 4096 - 512], footer(4096, 2, UUID)].concat();
    assert!(open_bytes(&bytes).unwrap_err().to_string().contains("the file has 3584 before its footer"));
}

#[test]
fn damage_names_the_guest_range_and_check_finds_it() {
    let directory = tempfile::tempdir().unwrap();
    let image = Builder::new(5).block(0, 1, 0xff).block(2, 3, 0xff).entry(1, 9000).entry(3, 1).entry(4, 6);
    let path = save(directory.path(), "x.vhd", &image.bytes());
    let disk = Disk::only(open(&path).unwrap(), "the image").unwrap();
    for (index, kind) in [(1, ErrorKind::Corrupt), (3, ErrorKind::Malformed)] {
        let error = disk.read_at(&mut [0; 10], index * BLOCK + 5).unwrap_err();
        assert_eq!((error.kind(), error.guest_range()), (kind, Some(index * BLOCK..(index + 1) * BLOCK)));
    }
    let report = check(&path);
    // A block past the end, one in the header, and two that overlap.
    assert!(report.corruptions >= 3, "{:?}", report.findings);
    assert!(report.findings.iter().any(|finding| finding.contains("overlap")), "{:?}", report.findings);
}

#[test]
fn salvage_restores_the_other_blocks() {
    let image = Builder::new(3).block(0, 1, 0xff).entry(1, 9000).block(2, 3, 0xff);
    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = VhdDriver.open(memory::as_file("x.vhd", &image.bytes()), &options).unwrap();
    assert_eq!(content(&source).unwrap(), filled(&[1, 0, 3]));
    let [loss] = &source.losses()[..] else { panic!("one loss") };
    assert_eq!(loss.guest, BLOCK..2 * BLOCK);
}
