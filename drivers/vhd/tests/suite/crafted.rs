//! Images built byte by byte: what no program at hand writes, and what none should.

use imgtool_core::{Access, BufferPool, Disk, Driver, Error, ErrorKind, Memory, OpenOptions, Remedy};
use imgtool_testing::conformance::{self, Content, Image};
use imgtool_testing::memory;
use imgtool_vhd::VhdDriver;

use crate::support::{check, content, open, options, save};

pub const BLOCK: u64 = 4096;
/// Bitmap of a block: one sector for up to 2 MiB.
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

/// A small image, with blocks of 4 KiB unless stated.
pub struct Builder {
    size: u64,
    block_size: u64,
    kind: u32,
    uuid: [u8; 16],
    pub header: Vec<u8>,
    bat: Vec<u32>,
    blocks: Vec<u8>,
    /// Bytes after the BAT, for names of the parent.
    names: Vec<u8>,
}

impl Builder {
    /// Creates an empty disk of `blocks` blocks.
    pub fn new(blocks: u32) -> Self {
        Self::with_block_size(blocks, BLOCK)
    }

    /// Creates an empty disk of `blocks` blocks of `block_size` bytes.
    pub fn with_block_size(blocks: u32, block_size: u64) -> Self {
        let mut header = vec![0; 1024];
        header[..8].copy_from_slice(b"cxsparse");
        header[8..16].fill(0xff);
        header[16..24].copy_from_slice(&1536u64.to_be_bytes());
        header[24..28].copy_from_slice(&0x0001_0000_u32.to_be_bytes());
        header[28..32].copy_from_slice(&blocks.to_be_bytes());
        header[32..36].copy_from_slice(&(block_size as u32).to_be_bytes());
        let bat = vec![u32::MAX; blocks as usize];
        let size = u64::from(blocks) * block_size;
        Self { size, block_size, kind: 3, uuid: UUID, header, bat, blocks: Vec::new(), names: vec![0; 512] }
    }

    /// Sets an entry of the BAT.
    pub fn entry(mut self, index: usize, sector: u32) -> Self {
        self.bat[index] = sector;
        self
    }

    /// Stores a block filled with `byte`, whose sectors have these bits.
    pub fn block(mut self, index: usize, byte: u8, bits: u8) -> Self {
        self.begin_block(index, &[bits]);
        self.blocks.extend(vec![byte; self.block_size as usize]);
        self
    }

    /// Stores a block with this content, whose sectors have these bits.
    pub fn block_of(mut self, index: usize, content: &[u8], bits: &[u8]) -> Self {
        self.begin_block(index, bits);
        self.blocks.extend(content);
        self
    }

    fn begin_block(&mut self, index: usize, bits: &[u8]) {
        // BAT and names take a sector each.
        self.bat[index] = ((1536 + 512 + 512 + self.blocks.len()) / 512) as u32;
        let bitmap = bits.len().next_multiple_of(BITMAP as usize);
        self.blocks.extend(bits);
        self.blocks.extend(vec![0; bitmap - bits.len()]);
    }

    /// Makes it a differencing image over a parent with this UUID and relative name.
    pub fn child_of(mut self, uuid: [u8; 16], name: &str) -> Self {
        self.kind = 4;
        self.uuid = [9; 16];
        self.header[40..56].copy_from_slice(&uuid);
        let units = |name: &str| name.encode_utf16().collect::<Vec<u16>>();
        let full: Vec<u8> = units(&format!(r"C:\vm\{name}")).into_iter().flat_map(u16::to_be_bytes).collect();
        self.header[64..64 + full.len()].copy_from_slice(&full);
        self.header[576..580].copy_from_slice(b"W2ru");
        self.named(&format!(r".\{name}"))
    }

    /// Sets the relative name of the parent.
    pub fn named(mut self, name: &str) -> Self {
        self.names = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
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

/// A guest that wrote a dynamic image at the start of its disk, and a damaged footer at the end.
#[test]
fn a_damaged_fixed_footer_does_not_let_the_guest_choose() {
    let dynamic = Builder::new(2).bytes();
    let guest = [&dynamic[..dynamic.len() - 512], &[5; 8192]].concat();
    let sound = [guest.clone(), footer(guest.len() as u64, 2, UUID)].concat();
    assert_eq!(open_bytes(&sound).unwrap(), guest);
    // A byte of the creator, the type, the data offset, the signature.
    for (from_end, text) in [(484, "checksum"), (449, "checksum"), (490, "checksum"), (512, "no signature")] {
        let mut bytes = sound.clone();
        let at = bytes.len() - from_end;
        bytes[at] ^= 1;
        let error = open_bytes(&bytes).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{from_end}: {error}");
        assert!(error.to_string().contains(text), "{from_end}: {error}");
    }
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
    // The footer of 511 bytes of old versions.
    assert_eq!(read(&good[..good.len() - 1]).unwrap(), disk);
    for bad in [&good[..good.len() - 2], &good[..100_000], &[], &good[512..], &disk] {
        assert_eq!(read(bad).unwrap_err().kind(), ErrorKind::Corrupt, "{} bytes", bad.len());
    }
    for (bytes, corruptions) in [(&good[..], 0), (&good[..100_000], 1)] {
        let input = memory::as_stream("x.vhd", bytes);
        let report = VhdDriver.check(input, &OpenOptions::default()).unwrap();
        assert_eq!(report.corruptions, corruptions, "{:?}", report.findings);
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
        (28, u32::MAX, "the maximum is 4194304"),
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

/// A file of a few KiB could be a disk of terabytes with content everywhere.
#[test]
fn neighbouring_entries_may_not_refer_to_one_block() {
    let shared = Builder::new(3).block(0, 1, 0xff).entry(1, 5);
    let error = open_bytes(&shared.bytes()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("BAT entries 0 to 1 refer to one block, at 2560"), "{error}");
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
fn blocks_do_not_reach_into_the_footer_or_the_header() {
    let directory = tempfile::tempdir().unwrap();
    // A block whose last sector is the footer, which is found although the file is long enough.
    let image = Builder::new(2).block(0, 5, 0xff).bytes();
    let short = [&image[..image.len() - 1024], &image[image.len() - 512..]].concat();
    let message = open_bytes(&short).unwrap_err().to_string();
    assert!(message.contains("the footer begins at 6656"), "{message}");
    assert_eq!(check(&save(directory.path(), "end.vhd", &short)).corruptions, 1);
    // A header after the BAT, and a block over it.
    let sound = Builder::new(2);
    let mut bytes = vec![0xff; 8192];
    let mut head = footer(8192, 3, UUID);
    head[16..24].copy_from_slice(&4096u64.to_be_bytes());
    seal(&mut head, 64);
    let mut header = sound.header.clone();
    header[16..24].copy_from_slice(&512u64.to_be_bytes());
    seal(&mut header, 36);
    bytes[..512].copy_from_slice(&head);
    bytes[512..516].copy_from_slice(&8u32.to_be_bytes());
    bytes[4096..5120].copy_from_slice(&header);
    bytes.resize(4096 + 512 + 4096, 5);
    bytes.extend(&head);
    let message = open_bytes(&bytes).unwrap_err().to_string();
    assert!(message.contains("overlaps the structures before 5120"), "{message}");
    assert_eq!(check(&save(directory.path(), "over.vhd", &bytes)).corruptions, 1);
}

#[test]
fn the_check_borrows_the_memory_of_its_list() {
    // A BAT of 16 MiB without blocks.
    let entries = 4 << 20;
    let mut image = Builder::new(entries).bytes();
    let bat = image.split_off(1536);
    image.extend(vec![0xff; 4 * entries as usize]);
    image.extend(&bat[bat.len() - 512..]);
    let memory = Memory::new(64 << 20);
    let options = OpenOptions { memory: memory.clone(), ..OpenOptions::default() };
    let check = || VhdDriver.check(memory::as_file("x.vhd", &image), &options);
    assert_eq!(check().unwrap().corruptions, 0);
    let others = memory.lease(25 << 20, "the rest of a run").unwrap();
    assert_eq!(check().unwrap_err().kind(), ErrorKind::LimitExceeded);
    drop(others);
    assert_eq!(memory.free(), 40 << 20);
}

#[test]
fn fixed_disks_have_a_limit_of_their_own() {
    for (subformat, text) in [("fixed", "the limit of fixed VHD images"), ("dynamic", "2040 GiB")] {
        let image = Image::disk("huge", (1 << 62) + 1, Content::zero());
        let output = conformance::Pipe::default().output();
        let options = options(&[("subformat", subformat)]);
        let error = conformance::write(&VhdDriver, &options, &image, &output, 1).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
    }
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

/// Salvage takes the bytes before a lost footer for the disk, and reports that nothing confirms their number.
#[test]
fn salvage_takes_a_file_without_its_footer_for_a_fixed_disk() {
    let disk = vec![5; 4096];
    let sound = [disk.clone(), footer(4096, 2, UUID)].concat();
    let salvage = |bytes: &[u8]| {
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        VhdDriver.open(memory::as_file("x.vhd", bytes), &options)
    };
    assert!(salvage(&sound).unwrap().doubts().is_empty());
    let mut damaged = sound.clone();
    damaged[4096 + 30] ^= 1;
    for (bytes, expected) in [(&damaged[..], &disk[..]), (&sound[..3000], &disk[..2560]), (&disk, &disk)] {
        let error = open_bytes(bytes).unwrap_err();
        assert!(matches!(error.remedy(), Some(Remedy::Salvage(_))), "{error:#}");
        let source = salvage(bytes).unwrap();
        assert!(content(&source).unwrap() == expected, "{} bytes", bytes.len());
        let [doubt] = &source.doubts()[..] else { panic!("one doubt") };
        assert!(doubt.reason.contains("footer") && doubt.reason.contains("unverified"), "{}", doubt.reason);
    }
    // A pipe loses as much, and a footer that states more than there is.
    let mut larger = sound.clone();
    larger[4096..].copy_from_slice(&footer(8192, 2, UUID));
    let cut = [(&damaged[..], &disk[..]), (&sound[..3000], &disk[..2560]), (&disk, &disk), (&larger, &disk)];
    for (bytes, expected) in cut {
        let options = OpenOptions { salvage: true, ..OpenOptions::default() };
        let piped = VhdDriver.open(memory::as_stream("x.vhd", bytes), &options).unwrap();
        let Access::Stream(pass) = piped.access() else { panic!("a stream is read in one pass") };
        let mut content = Vec::new();
        while let Some(piece) = pass.lock().unwrap().next_piece(&BufferPool::new()).unwrap() {
            content.extend_from_slice(piece.data.as_deref().unwrap_or_default());
        }
        assert!(content == expected, "{} bytes", bytes.len());
        assert_eq!(pass.lock().unwrap().final_size(imgtool_core::DeviceId(0)), Some(expected.len() as u64));
        assert_eq!(piped.doubts().len(), 1);
        assert_eq!(piped.doubts().len(), salvage(bytes).unwrap().doubts().len());
    }
    // Bytes before the footer that the disk has not: a note, but a pipe has passed them.
    let gap = [&disk[..], &[7; 1024], &footer(4096, 2, UUID)].concat();
    let source = VhdDriver.open(memory::as_file("x.vhd", &gap), &OpenOptions::default()).unwrap();
    assert!(content(&source).unwrap() == disk);
    assert!(source.info().notes[0].contains("1024 bytes lie between"), "{:?}", source.info().notes);
    // A dynamic image that lost both footers has blocks in any order.
    let mut dynamic = Builder::new(1).bytes();
    dynamic[10] ^= 1;
    dynamic.truncate(2000);
    assert!(salvage(&dynamic).is_err());
}
