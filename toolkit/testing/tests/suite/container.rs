//! The contract of containers, tested with a toy: an archive of images, which other drivers read.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{
    Access, Capabilities, Confidence, CreateOptions, Device, DeviceId, Disk, Driver, Error, ErrorKind,
    Extent, FileRange, ImageInfo, ImageSource, Input, MapExtent, OpenOptions, RandomAccess, Registry, Result,
};
use imgtool_testing::conformance::{self as laws, Content, Fill, Image};
use imgtool_testing::toy::{Flaw, Toy};

const MAGIC: &[u8; 8] = b"CRATE01\n";
/// Length in bytes of the header: magic number, checksum of the list, number of members.
const HEADER_LEN: u64 = 16;
/// Length in bytes of a list entry: name, position and length of a member.
const ENTRY_LEN: u64 = 32;
const NAME_LEN: usize = 16;
const MAX_MEMBERS: u32 = 16;

/// Driver of a toy container: a list of members, followed by their bytes.
struct CrateDriver;

impl Driver for CrateDriver {
    fn name(&self) -> &'static str {
        "crate"
    }

    fn description(&self) -> &'static str {
        "a container for tests"
    }

    fn extensions(&self) -> &'static [&'static str] {
        &["crate"]
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { read: true, container: true, size_multiple: 1, ..Capabilities::default() }
    }

    fn probe(&self, head: &[u8], _len: Option<u64>) -> Option<Confidence> {
        head.starts_with(MAGIC).then_some(Confidence::Magic)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        let input = input.into_random()?;
        let mut info = ImageInfo { format: "crate", ..ImageInfo::default() };
        let mut disks = Vec::new();
        for (name, range) in read_list(&input)? {
            let member = options.externals.open_member(input.section(range)?, None, options)?;
            let disk = Disk::only(member, "a member").map_err(|e| e.device(&name))?;
            let id = u32::try_from(disks.len()).map_err(|_| Error::limit("too many members"))?;
            info.devices.push(Device::disk(id, name, disk.size()));
            disks.push(disk);
        }
        Ok(Arc::new(Crate { info, disks }))
    }
}

/// Returns the names of the members and the ranges of their bytes.
fn read_list(input: &imgtool_core::RandomInput) -> Result<Vec<(String, Range<u64>)>> {
    let header = input.read_vec(0, HEADER_LEN as usize)?;
    if !header.starts_with(MAGIC) {
        return Err(Error::wrong_format("not a crate"));
    }
    let number = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let count = number(&header, 12);
    if count == 0 || count > MAX_MEMBERS {
        return Err(Error::limit(format!("{count} members, at most {MAX_MEMBERS}")));
    }
    let list = input.read_vec(HEADER_LEN, count as usize * ENTRY_LEN as usize)?;
    if crc32fast::hash(&list) != number(&header, 8) {
        return Err(Error::corrupt("checksum of the list does not match").at(HEADER_LEN));
    }
    let entry = |entry: &[u8]| {
        let name = String::from_utf8_lossy(&entry[..NAME_LEN]).trim_end_matches('\0').to_owned();
        let long = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
        let (start, len) = (long(NAME_LEN), long(NAME_LEN + 8));
        let end = start.checked_add(len).ok_or_else(|| Error::malformed("a member ends beyond 2^64"))?;
        Ok((name, start..end))
    };
    list.chunks(ENTRY_LEN as usize).map(entry).collect()
}

/// Returns the bytes of a container of these members.
fn crate_of(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut list = Vec::new();
    let mut start = HEADER_LEN + ENTRY_LEN * members.len() as u64;
    for (name, bytes) in members {
        let mut entry = [0; NAME_LEN];
        entry[..name.len()].copy_from_slice(name.as_bytes());
        list.extend(entry);
        list.extend(start.to_le_bytes());
        list.extend((bytes.len() as u64).to_le_bytes());
        start += bytes.len() as u64;
    }
    let mut file = MAGIC.to_vec();
    file.extend(crc32fast::hash(&list).to_le_bytes());
    file.extend(u32::try_from(members.len()).unwrap().to_le_bytes());
    file.extend(list);
    members.iter().for_each(|(_, bytes)| file.extend(*bytes));
    file
}

struct Crate {
    info: ImageInfo,
    disks: Vec<Disk>,
}

impl Crate {
    fn disk(&self, device: DeviceId) -> Result<&Disk> {
        self.disks.get(device.0 as usize).ok_or_else(|| Error::out_of_bounds(format!("no device {device}")))
    }
}

impl ImageSource for Crate {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }
}

impl RandomAccess for Crate {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.disk(device)?.extents(range)
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.disk(device)?.map(range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        self.disk(device)?.read_at(buf, guest_offset)
    }

    fn read_granule(&self, device: DeviceId) -> u64 {
        self.disk(device).map_or(1, Disk::read_granule)
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        self.disk(device).ok()?.locate(range)
    }
}

fn small(seed: u64) -> Image {
    let content = Content::zero().with(seed..70_000 + seed, Fill::Text).with(200_000..200_009, Fill::Byte(7));
    Image::disk("small", 250_000 + seed, content)
}

fn toy_bytes(image: &Image) -> Vec<u8> {
    laws::make_bytes(&Toy(Flaw::None), &CreateOptions::default(), image)
}

fn options() -> OpenOptions {
    let mut registry = Registry::new();
    registry.register(Toy(Flaw::None));
    registry.register(CrateDriver);
    OpenOptions { externals: laws::members(&registry), ..OpenOptions::default() }
}

fn two_members() -> (Vec<u8>, Image) {
    let (first, second) = (small(0), small(513));
    let bytes = crate_of(&[("first", &toy_bytes(&first)), ("second", &toy_bytes(&second))]);
    let (device, content) = second.devices[0].clone();
    (bytes, first.and_disk("second", device.size, content))
}

#[test]
fn container_of_images_obeys_the_laws() {
    let (bytes, image) = two_members();
    laws::read_only_with(&CrateDriver, &[(&bytes, image)], &options());
}

#[test]
fn members_may_be_containers() {
    let image = small(1);
    let inner = crate_of(&[("disk", &toy_bytes(&image))]);
    let outer = crate_of(&[("inner", &inner)]);
    let source = CrateDriver.open(Input::from_read_at("x", memory(&outer)), &options()).unwrap();
    assert_eq!(source.info().devices[0].name, "inner");
    laws::assert_content(&source, &image, 1);
}

#[test]
fn refuses_unknown_formats_and_a_missing_opener() {
    let bytes = crate_of(&[("notes.txt", b"no image")]);
    let open = |options| CrateDriver.open(Input::from_read_at("x", memory(&bytes)), &options).err().unwrap();
    assert_eq!(open(options()).kind(), ErrorKind::WrongFormat);
    assert_eq!(open(OpenOptions::default()).kind(), ErrorKind::Unsupported);
}

#[test]
fn refuses_members_beyond_the_end_of_the_container() {
    let (mut bytes, _) = two_members();
    bytes.truncate(bytes.len() - 1);
    let opened = CrateDriver.open(Input::from_read_at("x", memory(&bytes)), &options());
    assert_eq!(opened.err().unwrap().kind(), ErrorKind::OutOfBounds);
}

/// Bytes in memory, read by position.
struct Memory(Vec<u8>);

impl imgtool_core::ReadAt for Memory {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> std::io::Result<()> {
        let start = usize::try_from(position).unwrap();
        buf.copy_from_slice(self.0.get(start..start + buf.len()).ok_or(std::io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

fn memory(bytes: &[u8]) -> Arc<Memory> {
    Arc::new(Memory(bytes.to_vec()))
}
