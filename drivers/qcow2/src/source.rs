//! Source of an image: the guest's view of the image and its backing files.

mod bitmaps;
mod content;
mod map;

use std::borrow::Cow;
use std::ffi::OsStr;
use std::ops::Range;
use std::path::Path;

use imgtool_core::{
    Access, Bitmap, Device, DeviceId, Disk, Error, ErrorKind, Extent, ExtentKind, ExtentList, FileRange,
    ImageInfo, ImageSource, Input, Loss, MapExtent, OpenOptions, RandomAccess, RandomInput, Result,
};
use imgtool_crypt::LEGACY_NOTE;

use crate::info;
use crate::layout::bitmap::list_bitmaps;
use crate::layout::entry::Shape;
use crate::layout::header::{Encryption, Header};
use crate::layout::snapshot::{Snapshots, read_snapshots};
use crate::mapping::RunKind;
use bitmaps::Bitmaps;
use content::Content;
use map::PreallocationTest;

/// ID of the only device of an image.
const DISK: DeviceId = DeviceId(0);

/// Maximum size in bytes of the L2 tables that one call of [`RandomAccess::extents`] examines. Our limit: the
/// first piece must not wait until all tables of a large image are read.
const L2_BYTES_PER_ANSWER: u64 = 1 << 20;

/// Opened image.
pub struct Qcow2Source {
    info: ImageInfo,
    shape: Shape,
    input: RandomInput,
    preallocation: PreallocationTest,
    /// `None` if the image was opened for its facts only.
    content: Option<Content>,
    /// `None` if the caller did not ask for them.
    bitmaps: Option<Bitmaps>,
}

impl Qcow2Source {
    /// Opens an image, with its data file and backing files.
    pub fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        let input = input.into_random()?;
        let header = Header::read(&input)?;
        if options.plain {
            header.check_known()?;
        }
        if !options.info_only {
            header.check_readable(options.force)?;
        }
        let mut notes = Vec::new();
        let depth = options.externals.depth();
        let snapshots = match &options.snapshot {
            // A backing image is read in its active state, so its snapshots do not matter.
            None if !options.info_only && depth > 0 => {
                Snapshots { count: header.snapshot_count as usize, ..Snapshots::default() }
            }
            choice => match read_snapshots(&input, &header, choice.as_ref(), options.info_only) {
                // The active state does not depend on the snapshots.
                Err(e) if (options.info_only || options.salvage) && choice.is_none() => {
                    notes.push(format!("{e:#}"));
                    Snapshots::default()
                }
                read => read?,
            },
        };
        let copied =
            if options.bitmaps { Some(Bitmaps::read(&input, &header, &options.memory)?) } else { None };
        // Without a copy of the bitmaps, a damaged directory does not affect the content.
        let bitmaps = match options.info_only.then(|| list_bitmaps(&input, &header)) {
            Some(Ok(bitmaps)) => bitmaps,
            Some(Err(e)) => {
                notes.push(format!("{e:#}"));
                Vec::new()
            }
            None => Vec::new(),
        };
        let selected = snapshots.selected.as_ref();
        let virtual_size = selected.map_or(header.virtual_size, |snapshot| snapshot.virtual_size);
        let mut image_info = info::describe(&input, &header, &snapshots, &bitmaps, options);
        image_info.notes.extend(notes);
        if header.encryption == Encryption::Aes && !options.info_only && !options.layout_only {
            image_info.notes.push(LEGACY_NOTE.to_owned());
        }
        image_info.devices = vec![Device::disk(0, device_name(&input), virtual_size)];
        let content = if options.info_only {
            None
        } else {
            Some(Content::open(&input, &header, selected, virtual_size, options)?)
        };
        let preallocation = PreallocationTest::new(&input, &header);
        Ok(Self { info: image_info, shape: header.shape, input, preallocation, content, bitmaps: copied })
    }

    fn content(&self) -> Result<&Content> {
        self.content.as_ref().ok_or_else(|| Error::usage("the image was opened for its facts only"))
    }
}

/// Names the device after the image file, or `disk` if the file has no usable name.
fn device_name(input: &RandomInput) -> String {
    let name = input.location().file_name();
    let stem = name.as_deref().and_then(|name| Path::new(name).file_stem()).map(OsStr::to_string_lossy);
    stem.filter(|stem| !stem.is_empty() && stem != "-").map_or_else(|| "disk".to_owned(), Cow::into_owned)
}

impl ImageSource for Qcow2Source {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Random(self)
    }

    fn bitmaps(&self) -> Option<&[Bitmap]> {
        self.bitmaps.as_ref().map(|bitmaps| bitmaps.list.as_slice())
    }

    fn losses(&self) -> Vec<Loss> {
        let Some(content) = &self.content else { return Vec::new() };
        let mut losses = content.losses.as_ref().map(|losses| losses.list(DISK)).unwrap_or_default();
        if let Some(backing) = &content.backing {
            losses.extend(backing.losses());
        }
        losses
    }

    fn verify(&self) -> Result<()> {
        let backing = self.content.as_ref().and_then(|content| content.backing.as_ref());
        backing.map_or(Ok(()), |backing| backing.image().verify())
    }
}

impl Qcow2Source {
    /// Lists the extents of `range`, like [`RandomAccess::rough_extents`] if there is a `resolution`.
    fn list_extents(&self, range: Range<u64>, resolution: Option<u64>) -> Result<Vec<Extent>> {
        let content = self.content()?;
        let mut list = ExtentList::new();
        let mut tables = (L2_BYTES_PER_ANSWER >> self.shape.cluster_bits).max(1);
        let mut position = range.start;
        let reach_bits = self.shape.l2_reach_bits();
        while position < range.end && !list.is_full() {
            if content.mapping.has_l2(position)? && position & ((1 << reach_bits) - 1) == 0 {
                if tables == 0 {
                    break;
                }
                tables -= 1;
            }
            let run = match content.mapping.run(position..range.end) {
                Ok(run) => run,
                // A read fills this unit with zeros and records the loss.
                Err(e) if content.losses.is_some() && is_damage(&e) => {
                    let end = self.unit_end(position).min(range.end);
                    list.push(position, end - position, ExtentKind::Data);
                    position = end;
                    continue;
                }
                Err(e) => return Err(e),
            };
            position = match run.kind {
                RunKind::Unallocated { .. } => {
                    content.push_backing(&mut list, position..position + run.len, resolution)?
                }
                RunKind::Zero { .. } => {
                    list.push(position, run.len, ExtentKind::Zero);
                    position + run.len
                }
                RunKind::Data { host_offset } => {
                    content.push_data(&mut list, position, host_offset, run.len, resolution)?;
                    position + run.len
                }
                RunKind::Compressed(_) => {
                    list.push(position, run.len, ExtentKind::Data);
                    position + run.len
                }
            };
        }
        Ok(list.into_vec())
    }
}

impl RandomAccess for Qcow2Source {
    fn extents(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.list_extents(range, None)
    }

    fn rough_extents(&self, _device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.list_extents(range, Some(resolution))
    }

    fn map(&self, _device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.content()?.map(range, &self.preallocation)
    }

    fn read_at(&self, _device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let end = guest_offset.saturating_add(buf.len() as u64);
        let content = self.content()?;
        let mut position = guest_offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let run = content.mapping.run(position..end);
            let step = match &run {
                // Salvage reads unit by unit, so that it loses only damaged units.
                Ok(run) if content.losses.is_none() => run.len,
                Ok(run) => run.len.min(self.unit_end(position) - position),
                Err(_) => self.unit_end(position).min(end) - position,
            };
            // At most the buffer's length.
            let (part, after) = rest.split_at_mut(step as usize);
            let guest = position..position + step;
            let host = run.as_ref().ok().and_then(|run| run.host_offset());
            let result =
                run.and_then(|run| content.read_run(&self.input, run.kind, self.shape, part, position));
            if let Err(e) = result {
                let e = e.guest(guest.clone());
                let Some(losses) = content.losses.as_ref().filter(|_| is_damage(&e)) else { return Err(e) };
                match host {
                    Some(host_offset) => content.salvage_data(part, host_offset, position, losses),
                    None => {
                        part.fill(0);
                        losses.add(guest, &e);
                    }
                }
            }
            position += step;
            rest = after;
        }
        Ok(())
    }

    fn read_granule(&self, _device: DeviceId) -> u64 {
        let backing = self.content.as_ref().and_then(|content| content.backing.as_ref());
        self.shape.cluster_size().max(backing.map_or(1, Disk::read_granule))
    }

    fn reader_memory(&self, _device: DeviceId) -> u64 {
        self.content.as_ref().map_or(0, Content::reader_memory) + self.input.granule()
    }

    fn locate(&self, _device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        let content = self.content.as_ref()?;
        let run = content.mapping.run(range.clone()).ok()?;
        match run.kind {
            // The file stores other bytes than the guest's.
            RunKind::Data { .. } if content.is_encrypted => None,
            RunKind::Data { host_offset } => {
                let file = content.data.file()?;
                let len = run.len.min(content.data.len().saturating_sub(host_offset));
                (len > 0).then_some(FileRange { file, file_offset: host_offset, len })
            }
            RunKind::Unallocated { .. } => {
                let backing = content.backing.as_ref()?;
                backing.locate(range.start..(range.start + run.len).min(backing.size()))
            }
            RunKind::Zero { .. } | RunKind::Compressed(_) => None,
        }
    }
}

impl Qcow2Source {
    /// Returns the end of the subcluster at `guest_offset`, or of the cluster if it has no subclusters.
    fn unit_end(&self, guest_offset: u64) -> u64 {
        let unit = self.shape.subcluster_size();
        (guest_offset - guest_offset % unit).saturating_add(unit)
    }
}

/// True if salvage may replace the affected bytes with zeros: for damage and unreadable sectors.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed | ErrorKind::Io)
}
