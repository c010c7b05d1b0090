//! [`join`], which makes one disk of several images, one after the other.

use std::ops::Range;
use std::sync::Arc;

use imgtool_core::{
    Access, Device, DeviceId, Disk, Doubt, Error, Extent, ExtentKind, FileRange, ImageInfo, ImageSource,
    Location, Loss, RandomAccess, Registry, Result, ResultExt,
};

use crate::open::{self, Opened};
use crate::sources::OpenSource;

/// Unit in bytes to which the length of each image is rounded up; zeros fill it. QEMU counts sectors.
const SECTOR: u64 = 512;

/// ID of the only disk.
const DISK: DeviceId = DeviceId(0);

/// Disk of one image, at its place in the joined disk.
struct Part {
    disk: Disk,
    location: Location,
    /// Place in the joined disk, with the zeros that round the length up.
    place: Range<u64>,
}

/// Several images as one disk.
struct Joined {
    parts: Vec<Part>,
    info: ImageInfo,
}

/// Joins images of one disk each into one source. Its name is that of the first.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Unsupported`] if an image does not hold exactly one disk, or can only be read in
/// one pass.
pub(crate) fn join(registry: &Registry, sources: Vec<OpenSource>) -> Result<Vec<OpenSource>> {
    let Some(first) = sources.first() else { return Ok(sources) };
    let (name, location) = (first.name.clone(), first.opened.location.clone());
    let mut parts = Vec::new();
    let mut end = 0u64;
    for source in &sources {
        let opened = &source.opened;
        let disk = Disk::only(Arc::clone(&opened.image), "an image to join").in_file(&opened.location)?;
        let start = end;
        let next = disk.size().checked_next_multiple_of(SECTOR).and_then(|len| start.checked_add(len));
        end = next.ok_or_else(|| Error::limit("the joined disk would be larger than 2^64 bytes"))?;
        parts.push(Part { disk, location: opened.location.clone(), place: start..end });
    }
    let info = ImageInfo {
        format: "joined",
        devices: vec![Device::disk(DISK.0, open::stem(registry, &location), end)],
        ..ImageInfo::default()
    };
    let whole = Opened::in_memory(Joined { parts, info }, registry.verbatim()?);
    let parts = sources.into_iter().map(|source| source.opened).collect();
    Ok(vec![OpenSource { name, opened: Opened { location, parts, ..whole } }])
}

impl Joined {
    /// Returns the part that contains `position`, and the position in it.
    fn part_at(&self, position: u64) -> Result<(&Part, u64)> {
        let index = self.parts.partition_point(|part| part.place.end <= position);
        let part = self.parts.get(index);
        let part = part.ok_or_else(|| Error::out_of_bounds("a read after the end of the joined disk"))?;
        Ok((part, position - part.place.start))
    }

    /// Returns the extents from `range.start` to the end of its part at most, as `ask` reports those of the part.
    fn extents_of_part(
        &self,
        range: Range<u64>,
        ask: impl FnOnce(&Disk, Range<u64>) -> Result<Vec<Extent>>,
    ) -> Result<Vec<Extent>> {
        let (part, from) = self.part_at(range.start)?;
        let until = (range.end - part.place.start).min(part.place.end - part.place.start);
        if from >= part.disk.size() {
            return Ok(vec![Extent { start: range.start, len: until - from, kind: ExtentKind::Zero }]);
        }
        let mut extents =
            ask(&part.disk, from..until.min(part.disk.size())).map_err(|e| e.path(&part.location))?;
        for extent in &mut extents {
            extent.start += part.place.start;
        }
        Ok(extents)
    }
}

impl ImageSource for Joined {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn losses(&self) -> Vec<Loss> {
        let of = |part: &Part| {
            let start = part.place.start;
            let shift = move |loss: Loss| Loss {
                device: DISK,
                guest: loss.guest.start.saturating_add(start)..loss.guest.end.saturating_add(start),
                ..loss
            };
            part.disk.losses().into_iter().map(shift)
        };
        self.parts.iter().flat_map(of).collect()
    }

    fn doubts(&self) -> Vec<Doubt> {
        let doubts = self.parts.iter().flat_map(|part| part.disk.image().doubts());
        doubts.map(|doubt| Doubt { device: DISK, ..doubt }).collect()
    }

    fn notes(&self) -> Vec<String> {
        self.parts.iter().flat_map(|part| part.disk.image().notes()).collect()
    }

    fn verify(&self) -> Result<()> {
        let verify = |part: &Part| part.disk.image().verify().map_err(|e| e.path(&part.location));
        self.parts.iter().try_for_each(verify)
    }
}

impl RandomAccess for Joined {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.extents_of_part(range, Disk::extents)
    }

    fn rough_extents(&self, _device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.extents_of_part(range, |disk, range| disk.rough_extents(range, resolution))
    }

    fn read_at(&self, _device: DeviceId, mut buf: &mut [u8], mut guest_offset: u64) -> Result<()> {
        while !buf.is_empty() {
            let (part, from) = self.part_at(guest_offset)?;
            let within = |until: u64| usize::try_from(until - from).unwrap_or(usize::MAX).min(buf.len());
            let len = if from < part.disk.size() {
                let len = within(part.disk.size());
                part.disk.read_at(&mut buf[..len], from).map_err(|e| e.path(&part.location))?;
                len
            } else {
                let len = within(part.place.end - part.place.start);
                buf[..len].fill(0);
                len
            };
            buf = &mut buf[len..];
            guest_offset += len as u64;
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        self.parts.iter().map(|part| part.disk.read_granule()).max().unwrap_or(1)
    }

    fn reader_memory(&self, _device: DeviceId) -> u64 {
        // A thread reads one part after the other.
        self.parts.iter().map(|part| part.disk.reader_memory()).max().unwrap_or(0)
    }

    fn locate(&self, _device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        let (part, from) = self.part_at(range.start).ok()?;
        let until = (range.end - part.place.start).min(part.disk.size());
        part.disk.locate(from..until)
    }
}
