//! Images by description, for the laws to write and to compare with.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use imgtool_core::zero::{self, ZERO_GRANULARITY};
use imgtool_core::{Attachment, Device, Extent, ExtentKind, ExtentList, Manifest};

/// Content of an area of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Pseudorandom bytes, which no compressor shortens.
    Random,
    /// Bytes that compress to about a third.
    Text,
    /// Alternating runs of random bytes and zeros, random bytes first. The number is the length of each run
    /// in bytes.
    Checker(u64),
    /// The same byte everywhere.
    Byte(u8),
}

/// Content of a device: given bytes at its start, then areas with a fill, and zeros elsewhere.
#[derive(Debug, Clone, Default)]
pub struct Content {
    areas: Vec<(Range<u64>, Fill)>,
    /// Given bytes at the start of the device, before all areas.
    bytes: Arc<[u8]>,
    /// Runs of `bytes` that are not all zeros, in units of [`ZERO_GRANULARITY`].
    runs: Arc<[Range<usize>]>,
}

/// Shortest run of a checker, in bytes, that [`Content::extents`] reports as a hole. A file system with 4 KiB
/// blocks reports finer checkers as data.
const FINEST_EXTENT: u64 = 4096;

impl Content {
    /// Returns content of zeros.
    pub fn zero() -> Self {
        Self::default()
    }

    /// Returns content of `bytes`, followed by zeros: the content of an image that another program made.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut runs = Vec::new();
        zero::push_nonzero_runs(bytes, 0..bytes.len(), ZERO_GRANULARITY, &mut runs);
        Self { areas: Vec::new(), bytes: bytes.into(), runs: runs.into() }
    }

    /// Adds an area after all earlier ones.
    ///
    /// # Panics
    /// If the area begins before the end of an earlier one, or of the given bytes.
    #[must_use]
    pub fn with(mut self, area: Range<u64>, fill: Fill) -> Self {
        let last = self.areas.last().map_or(self.bytes.len() as u64, |(area, _)| area.end);
        assert!(area.start >= last && area.start <= area.end, "areas must ascend: {area:?} after {last}");
        if area.start < area.end {
            self.areas.push((area, fill));
        }
        self
    }

    /// Fills `buf` with the bytes from `start` on.
    pub fn read(&self, buf: &mut [u8], start: u64) {
        buf.fill(0);
        let end = start + buf.len() as u64;
        let given = usize::try_from(start).ok().and_then(|start| self.bytes.get(start..));
        if let Some(given) = given {
            let len = given.len().min(buf.len());
            buf[..len].copy_from_slice(&given[..len]);
        }
        for (area, fill) in &self.areas {
            let part = area.start.max(start)..area.end.min(end);
            if part.start < part.end {
                let target = &mut buf[(part.start - start) as usize..(part.end - start) as usize];
                fill.write(target, part.start, area.start);
            }
        }
    }

    /// Returns true if `range` is outside of all areas and of all runs of given bytes, and therefore zero.
    pub fn is_zero(&self, range: &Range<u64>) -> bool {
        let is_outside = |part: &Range<u64>| part.end <= range.start || part.start >= range.end;
        self.areas.iter().all(|(area, _)| is_outside(area)) && self.byte_runs().all(|run| is_outside(&run))
    }

    /// Returns the runs of the given bytes that may not be zero.
    fn byte_runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.runs.iter().map(|run| run.start as u64..run.end as u64)
    }

    /// Returns the extents of `range`. Like the list of a driver, it may end before the range does.
    pub fn extents(&self, range: Range<u64>) -> Vec<Extent> {
        let mut list = ExtentList::new();
        let mut at = range.start;
        let bytes = self.byte_runs().map(|run| (run, Fill::Byte(0)));
        for (area, fill) in bytes.chain(self.areas.iter().cloned()) {
            for run in fill.data_runs(&area, &(at..range.end)) {
                if list.is_full() {
                    return list.into_vec();
                }
                list.push(at, run.start - at, ExtentKind::Hole);
                list.push(run.start, run.end - run.start, ExtentKind::Data);
                at = run.end;
            }
        }
        list.push(at, range.end - at, ExtentKind::Hole);
        list.into_vec()
    }

    /// Returns the total length in bytes of all areas and runs of given bytes, each extended outward to
    /// multiples of `unit`.
    pub fn data_len(&self, unit: u64) -> u64 {
        let rounded =
            |(area, _): &(Range<u64>, Fill)| area.end.next_multiple_of(unit) - area.start / unit * unit;
        let bytes = self.byte_runs().map(|run| (run, Fill::Byte(0)));
        self.areas.iter().cloned().chain(bytes).map(|area| rounded(&area)).sum()
    }
}

impl Fill {
    /// Fills `target` with the bytes at `start` in an area that begins at `area_start`.
    fn write(self, target: &mut [u8], start: u64, area_start: u64) {
        match self {
            Fill::Byte(byte) => target.fill(byte),
            Fill::Random => fill_random(target, start),
            Fill::Text => {
                fill_random(target, start);
                target.iter_mut().for_each(|byte| *byte = b"etaoin s"[usize::from(*byte & 7)]);
            }
            Fill::Checker(unit) => {
                fill_random(target, start);
                let mut at = start;
                while at < start + target.len() as u64 {
                    let number = (at - area_start) / unit;
                    let next = (area_start + (number + 1) * unit).min(start + target.len() as u64);
                    if number % 2 == 1 {
                        target[(at - start) as usize..(next - start) as usize].fill(0);
                    }
                    at = next;
                }
            }
        }
    }

    /// Returns the runs of `area` within `range` that count as data.
    fn data_runs(self, area: &Range<u64>, range: &Range<u64>) -> Vec<Range<u64>> {
        let overlap = area.start.max(range.start)..area.end.min(range.end);
        if overlap.start >= overlap.end {
            return Vec::new();
        }
        let Fill::Checker(unit @ FINEST_EXTENT..) = self else { return vec![overlap] };
        let first = (overlap.start - area.start) / (2 * unit);
        (first..)
            .map(|pair| area.start + pair * 2 * unit)
            .take_while(|start| *start < overlap.end)
            .map(|start| start.max(overlap.start)..(start + unit).min(overlap.end))
            .filter(|run| run.start < run.end)
            .collect()
    }
}

/// Fills `target` with pseudorandom bytes that depend only on their position.
fn fill_random(target: &mut [u8], start: u64) {
    let mut at = start;
    let mut rest = target;
    while !rest.is_empty() {
        let word = mix(at / 8).to_le_bytes();
        let skip = (at % 8) as usize;
        let count = rest.len().min(8 - skip);
        rest[..count].copy_from_slice(&word[skip..skip + count]);
        rest = &mut rest[count..];
        at += count as u64;
    }
}

/// Applies the output function of SplitMix64, a bijection that mixes its input well.
pub(super) fn mix(input: u64) -> u64 {
    let mut z = input.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Access that a [`super::MemorySource`] offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// By position.
    Random,
    /// In one pass: one device after the other, in order, in pieces of 64 KiB.
    Stream,
    /// In one pass: devices in turn, in pieces of 64 KiB that are out of order within about 4 MiB, like the
    /// output of a backup program.
    Shuffled,
}

/// An image described by its devices, their content, and the access to them.
#[derive(Debug, Clone)]
pub struct Image {
    /// Name used in messages.
    pub name: String,
    /// The devices and their content; a device's id is its index in this list.
    pub devices: Vec<(Device, Content)>,
    /// The attachments, such as configuration files.
    pub attachments: Vec<Attachment>,
    /// Access to the devices.
    pub order: Order,
}

impl Image {
    /// Returns an image of one disk of `len` bytes.
    pub fn disk(name: impl Into<String>, len: u64, content: Content) -> Self {
        let device = Device::disk(0, "drive-scsi0", len);
        Self {
            name: name.into(),
            devices: vec![(device, content)],
            attachments: Vec::new(),
            order: Order::Random,
        }
    }

    /// Writes the content of the only disk into a sparse raw file.
    ///
    /// # Panics
    /// If the file can't be written.
    pub fn write_raw(&self, path: &Path) {
        let [(device, content)] = &self.devices[..] else { panic!("{self} has several disks") };
        let file = File::create(path).expect("create the raw file");
        file.set_len(device.size).expect("set the length");
        let mut part = vec![0; 1 << 20];
        let mut at = 0;
        while at < device.size {
            for extent in content.extents(at..device.size) {
                while extent.is_data() && at < extent.end() {
                    let len = (extent.end() - at).min(1 << 20);
                    let part = &mut part[..len as usize];
                    content.read(part, at);
                    file.write_all_at(part, at).expect("write the raw file");
                    at += len;
                }
                at = extent.end();
            }
        }
    }

    /// Returns an image of one disk with these bytes.
    pub fn from_bytes(name: impl Into<String>, bytes: &[u8]) -> Self {
        Self::disk(name, bytes.len() as u64, Content::from_bytes(bytes))
    }

    /// Adds a disk.
    #[must_use]
    pub fn and_disk(mut self, name: &str, len: u64, content: Content) -> Self {
        let id = u32::try_from(self.devices.len()).expect("a handful of devices");
        self.devices.push((Device::disk(id, name, len), content));
        self
    }

    /// Adds an attachment.
    #[must_use]
    pub fn and_attachment(mut self, name: &str, data: &[u8]) -> Self {
        self.attachments.push(Attachment { name: name.to_owned(), data: data.to_owned() });
        self
    }

    /// Returns a copy of the image that is read in `order`.
    #[must_use]
    pub fn read_as(&self, order: Order) -> Self {
        Self { order, ..self.clone() }
    }

    /// Returns the manifest that a sink is created with.
    pub fn manifest(&self) -> Manifest {
        Manifest {
            devices: self.devices.iter().map(|(device, _)| device.clone()).collect(),
            attachments: self.attachments.clone(),
            ..Manifest::default()
        }
    }
}

impl fmt::Display for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "image '{}' read as {:?}", self.name, self.order)
    }
}

const MIB: u64 = 1 << 20;

/// Returns images of one disk that every format must be able to store: empty, sparse, full, with ragged
/// areas, and with data far apart.
pub fn patterns() -> Vec<Image> {
    let checker = |unit: u64| Content::zero().with(0..3 * MIB, Fill::Checker(unit));
    vec![
        Image::disk("all zero", 5 * MIB, Content::zero()),
        Image::disk(
            "one byte in the last sector",
            3 * MIB,
            Content::zero().with(3 * MIB - 512..3 * MIB - 511, Fill::Byte(7)),
        ),
        Image::disk(
            "first and last byte",
            2 * MIB,
            Content::zero().with(0..1, Fill::Byte(1)).with(2 * MIB - 1..2 * MIB, Fill::Byte(2)),
        ),
        Image::disk("checkers of 512 bytes", 3 * MIB, checker(512)),
        Image::disk("checkers of 4 KiB", 3 * MIB, checker(4096)),
        Image::disk("checkers of 64 KiB", 3 * MIB, checker(65_536)),
        Image::disk("checkers of 1 MiB", 5 * MIB, Content::zero().with(0..5 * MIB, Fill::Checker(MIB))),
        Image::disk("random throughout", 4 * MIB, Content::zero().with(0..4 * MIB, Fill::Random)),
        Image::disk("text throughout", 4 * MIB, Content::zero().with(0..4 * MIB, Fill::Text)),
        Image::disk("bytes of ff", 2 * MIB, Content::zero().with(0..2 * MIB, Fill::Byte(0xff))),
        Image::disk("ragged areas", 4 * MIB, ragged_areas()),
        far_apart(),
    ]
}

/// Returns an image with little data on both sides of 512 MiB, which needs more than one L2 table in a qcow2
/// file with 64 KiB clusters, and many BAT entries in VHDX.
pub fn far_apart() -> Image {
    let content = Content::zero()
        .with(MIB + 512..MIB + 70_000, Fill::Random)
        .with(511 * MIB + 999 * 1024..512 * MIB + 4096, Fill::Text)
        .with(530 * MIB..530 * MIB + 1, Fill::Byte(0x80))
        .with(544 * MIB - 700..544 * MIB, Fill::Random);
    Image::disk("data past 512 MiB", 544 * MIB, content)
}

fn ragged_areas() -> Content {
    let mut content = Content::zero();
    let mut at = 0;
    for number in 0..40 {
        let start = at + mix(number) % 90_000;
        at = (start + 1 + mix(number + 1000) % 60_000).min(4 * MIB);
        if start < at {
            content = content.with(start..at, if number % 3 == 0 { Fill::Text } else { Fill::Random });
        }
    }
    content
}

/// Returns three disks of different sizes and two configuration files, for formats that store several
/// devices.
pub fn several_devices() -> Image {
    let second = Content::zero().with(100_000..900_001, Fill::Text);
    let third = Content::zero().with(0..MIB, Fill::Checker(4096)).with(6 * MIB..6 * MIB + 9, Fill::Byte(3));
    Image::disk("three devices", 3 * MIB, Content::zero().with(0..3 * MIB, Fill::Checker(65_536)))
        .and_disk("drive-virtio1", 1_000_448, second)
        .and_disk("drive-sata2", 7 * MIB, third)
        .and_attachment("qemu-server.conf", b"memory: 512\n")
        .and_attachment("qemu-server.fw", b"[OPTIONS]\nenable: 1\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_reads_match_a_whole_read() {
        for image in patterns().into_iter().filter(|image| image.devices[0].0.size < 8 * MIB) {
            let (device, content) = &image.devices[0];
            let mut whole = vec![0; device.size as usize];
            content.read(&mut whole, 0);
            for start in [1, 511, 4095, 65_537, device.size / 2 + 3] {
                let mut part = vec![1; 70_001.min((device.size - start) as usize)];
                content.read(&mut part, start);
                assert_eq!(part, whole[start as usize..][..part.len()], "{image} at {start}");
            }
        }
    }

    #[test]
    fn extents_are_contiguous_and_holes_are_zero() {
        for image in patterns() {
            let (device, content) = &image.devices[0];
            for start in [0, 1, 70_000] {
                let mut at = start;
                while at < device.size {
                    for extent in content.extents(at..device.size) {
                        assert_eq!(extent.start, at, "{image}");
                        assert!(extent.len > 0);
                        at = extent.end();
                        if !extent.is_data() {
                            let mut bytes = vec![1; extent.len.min(MIB) as usize];
                            content.read(&mut bytes, extent.start);
                            assert!(zero::is_zero(&bytes), "{image} at {}", extent.start);
                        }
                    }
                }
                assert_eq!(at, device.size);
            }
        }
    }
}
