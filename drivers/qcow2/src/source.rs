//! Reading: what the guest sees of an image, its backing files included.

use std::ops::Range;
use std::sync::OnceLock;

use imgtool_toolkit::storage::os::FileRun;
use imgtool_toolkit::{
    Access, Device, DeviceId, Error, ErrorKind, Extent, ExtentKind, ExtentList, FileRange, ImageInfo,
    ImageSource, Input, MapExtent, OpenOptions, RandomAccess, RandomInput, Result,
};

use crate::compressed::Decoder;
use crate::info;
use crate::layout::bitmap::list_bitmaps;
use crate::layout::header::{CompressionType, Header, INCOMPATIBLE_DATA_FILE, check_table};
use crate::layout::snapshot::{Snapshot, Snapshots, read_snapshots};
use crate::layout::{MAX_L1_BYTES, entry::Shape};
use crate::mapping::{Mapped, Mapping};
use crate::refcounts::RefcountPlace;
use imgtool_toolkit::Losses;

mod map;

/// The only device of an image.
const DISK: DeviceId = DeviceId(0);

/// Bytes of L2 tables that one answer of [`RandomAccess::extents`] looks at. Ours: a question must
/// not read all tables of a large image before the first piece is under way.
const L2_BYTES_PER_ANSWER: u64 = 1 << 20;

/// An opened image.
pub struct Qcow2Source {
    info: ImageInfo,
    virtual_size: u64,
    shape: Shape,
    input: RandomInput,
    /// Where the refcounts are, which `map` looks at.
    refcount_table: RefcountPlace,
    /// Found when `map` first asks.
    sparse_clusters: OnceLock<bool>,
    /// `None`: opened for its facts only.
    content: Option<Content>,
}

/// What is needed to read guest data.
struct Content {
    mapping: Mapping,
    decoder: Decoder,
    /// The file that guest data is in: the image itself or its external data file.
    data: RandomInput,
    backing: Option<Backing>,
    losses: Option<Losses>,
}

struct Backing {
    source: Box<dyn ImageSource>,
    device: DeviceId,
    size: u64,
    read_granule: u64,
}

impl Qcow2Source {
    /// Opens an image and whatever it needs.
    pub fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        let input = input.into_random()?;
        let header = Header::read(&input)?;
        if !options.info_only {
            header.check_readable(options.force)?;
        }
        let mut trouble = Vec::new();
        let depth = options.externals.depth();
        let snapshots = match &options.snapshot {
            // An image below another one is read as it is now.
            None if !options.info_only && depth > 0 => {
                Snapshots { count: header.snapshot_count as usize, ..Snapshots::default() }
            }
            wanted => match read_snapshots(&input, &header, wanted.as_deref(), options.info_only) {
                // The disk as it is now does not need them.
                Err(e) if (options.info_only || options.salvage) && wanted.is_none() => {
                    trouble.push(e.to_string());
                    Snapshots::default()
                }
                read => read?,
            },
        };
        // Bitmaps are not converted: a damaged directory does not touch the content.
        let bitmaps = match options.info_only.then(|| list_bitmaps(&input, &header)) {
            Some(Ok(bitmaps)) => bitmaps,
            Some(Err(e)) => {
                trouble.push(e.to_string());
                Vec::new()
            }
            None => Vec::new(),
        };
        let wanted = snapshots.wanted.as_ref();
        let virtual_size = wanted.map_or(header.virtual_size, |snapshot| snapshot.virtual_size);
        let mut image_info = info::describe(&input, &header, &snapshots, &bitmaps, options.info_only);
        image_info.notes.extend(trouble);
        image_info.devices = vec![Device::disk(0, device_name(&input), virtual_size)];
        let content = if options.info_only {
            None
        } else {
            Some(Content::open(&input, &header, wanted, virtual_size, options)?)
        };
        let refcount_table = RefcountPlace::of(&header);
        Ok(Self {
            info: image_info,
            virtual_size,
            shape: header.shape,
            input,
            refcount_table,
            sparse_clusters: OnceLock::new(),
            content,
        })
    }

    fn content(&self) -> Result<&Content> {
        self.content.as_ref().ok_or_else(|| Error::usage("the image was opened for its facts only"))
    }

    fn check_range(&self, device: DeviceId, range: &Range<u64>) -> Result<()> {
        if device != DISK {
            return Err(Error::out_of_bounds(format!("the image has no device {device}")));
        }
        if range.start > range.end || range.end > self.virtual_size {
            return Err(Error::out_of_bounds(format!(
                "bytes {}..{} of a disk of {} bytes",
                range.start, range.end, self.virtual_size
            )));
        }
        Ok(())
    }
}

/// A device is named after its file.
fn device_name(input: &RandomInput) -> String {
    let stem = input.path().file_stem().map(|stem| stem.to_string_lossy().into_owned());
    stem.filter(|stem| !stem.is_empty() && stem != "-").unwrap_or_else(|| "disk".to_owned())
}

impl Content {
    fn open(
        input: &RandomInput,
        header: &Header,
        snapshot: Option<&Snapshot>,
        virtual_size: u64,
        options: &OpenOptions,
    ) -> Result<Self> {
        // What is refused is refused before anything large is read.
        let data = open_data_file(input, header, options)?;
        let backing = open_backing(input, header, options)?;
        let (l1_offset, l1_entries) = match snapshot {
            Some(snapshot) => (snapshot.l1_offset, snapshot.l1_entries),
            None => (header.l1_offset, header.l1_entries),
        };
        let needed = header.shape.l1_entries(virtual_size);
        if u64::from(l1_entries) < needed {
            return Err(Error::malformed(format!(
                "the snapshot's L1 table has {l1_entries} entries, but {virtual_size} bytes of disk need {needed}"
            )));
        }
        // Entries beyond the disk point to saved machine state.
        let l1_entries = l1_entries.min(u32::try_from(needed).unwrap_or(u32::MAX));
        check_table(
            "the L1 table",
            l1_offset,
            u64::from(l1_entries) * 8,
            MAX_L1_BYTES,
            header.shape.cluster_size(),
            40,
        )?;
        let mapping = Mapping::read(
            input.clone(),
            header.shape,
            header.version,
            header.has(INCOMPATIBLE_DATA_FILE),
            l1_offset,
            l1_entries,
            options.externals.depth(),
        )?;
        let compression = header.compression.unwrap_or(CompressionType::Zlib);
        let decoder = Decoder::new(compression, header.shape.cluster_size(), options.externals.depth());
        let losses = options.salvage.then(Losses::default);
        Ok(Self { mapping, decoder, data, backing, losses })
    }

    /// Fills `buf` from one run; `guest` is its range.
    fn read_run(
        &self,
        input: &RandomInput,
        mapped: Mapped,
        shape: Shape,
        buf: &mut [u8],
        guest_offset: u64,
    ) -> Result<()> {
        match mapped {
            Mapped::Zero { .. } => buf.fill(0),
            Mapped::Unallocated { .. } => self.read_backing(buf, guest_offset)?,
            // A guest offset within a cluster of at most 2 MiB.
            Mapped::Compressed(place) => {
                self.decoder.read(input, place, buf, shape.within_cluster(guest_offset) as usize)?;
            }
            Mapped::Data { host_offset } => self.data.read_exact_at(buf, host_offset)?,
        }
        Ok(())
    }

    fn read_backing(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let Some(backing) = &self.backing else {
            buf.fill(0);
            return Ok(());
        };
        let there = backing.size.saturating_sub(guest_offset).min(buf.len() as u64);
        // Not above the buffer's length.
        let (below, beyond) = buf.split_at_mut(there as usize);
        beyond.fill(0);
        match backing.source.random() {
            Some(random) if !below.is_empty() => random.read_at(backing.device, below, guest_offset),
            Some(_) => Ok(()),
            None => Err(Error::unsupported("the backing file can only be read as a stream")),
        }
    }

    /// The extents of clusters with data: what is a hole in the file (preallocated, never written)
    /// is zero.
    fn push_data(
        &self,
        list: &mut ExtentList,
        guest_offset: u64,
        host_offset: u64,
        len: u64,
        resolution: Option<u64>,
    ) -> Result<()> {
        let mut done = 0;
        while done < len {
            let host = host_offset + done;
            let (run_end, is_data) = if host < self.data.len() {
                let run = self.file_run(host, guest_offset + done, resolution)?;
                (run.end, run.is_data)
            } else {
                // Reading it will be an error.
                (u64::MAX, true)
            };
            let part = (len - done).min(run_end.saturating_sub(host).max(1));
            list.push(guest_offset + done, part, if is_data { ExtentKind::Data } else { ExtentKind::Zero });
            done += part;
        }
        Ok(())
    }

    /// The run of the file at `host`, where the guest's byte at `guest_offset` stands.
    fn file_run(&self, host: u64, guest_offset: u64, resolution: Option<u64>) -> Result<FileRun> {
        match resolution {
            Some(resolution) => {
                let to_cut = resolution - guest_offset % resolution;
                self.data.rough_run(host, host.saturating_add(to_cut))
            }
            None => self.data.run(host),
        }
    }

    /// The extents of an unallocated range.
    fn push_backing(&self, list: &mut ExtentList, range: Range<u64>, resolution: Option<u64>) -> Result<u64> {
        let below = match &self.backing {
            Some(backing) if range.start < backing.size => range.start..range.end.min(backing.size),
            _ => {
                list.push(range.start, range.end - range.start, ExtentKind::Hole);
                return Ok(range.end);
            }
        };
        let Some((backing, random)) = self.backing.as_ref().and_then(|b| Some((b, b.source.random()?)))
        else {
            return Err(Error::unsupported("the backing file can only be read as a stream"));
        };
        let mut reached = range.start;
        let extents = match resolution {
            Some(resolution) => random.rough_extents(backing.device, below, resolution)?,
            None => random.extents(backing.device, below)?,
        };
        for extent in extents {
            list.push(extent.start, extent.len, extent.kind);
            reached = extent.end();
        }
        Ok(reached)
    }
}

fn open_data_file(input: &RandomInput, header: &Header, options: &OpenOptions) -> Result<RandomInput> {
    if !header.has(INCOMPATIBLE_DATA_FILE) {
        return Ok(input.clone());
    }
    let Some(name) = &header.extensions.data_file else {
        return Err(Error::unsupported("the image keeps its data in an external file that it does not name"));
    };
    options.externals.open_file("data file", name, input.path())?.into_random()
}

fn open_backing(input: &RandomInput, header: &Header, options: &OpenOptions) -> Result<Option<Backing>> {
    let Some(name) = &header.backing_file else { return Ok(None) };
    let format = header.extensions.backing_format.as_deref();
    let source = options.externals.open_image("backing file", name, input.path(), format, options)?;
    let [device] = source.info().devices.as_slice() else {
        return Err(Error::unsupported(format!(
            "the backing file holds {} devices, not one",
            source.info().devices.len()
        )));
    };
    let (device, size) = (device.id, device.size);
    let Some(random) = source.random() else {
        return Err(Error::unsupported("the backing file can only be read as a stream"));
    };
    let read_granule = random.read_granule(device);
    Ok(Some(Backing { device, size, read_granule, source }))
}

impl ImageSource for Qcow2Source {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&mut self) -> Access<'_> {
        Access::Random(self)
    }

    fn random(&self) -> Option<&dyn RandomAccess> {
        Some(self)
    }

    fn losses(&self) -> Vec<imgtool_toolkit::Loss> {
        let Some(content) = &self.content else { return Vec::new() };
        let mut losses = content.losses.as_ref().map(|losses| losses.list(DISK)).unwrap_or_default();
        if let Some(backing) = &content.backing {
            losses.extend(backing.source.losses());
        }
        losses
    }
}

impl Qcow2Source {
    /// The extents of `range`, or what is said of them in pieces of `resolution`.
    fn list_extents(
        &self,
        device: DeviceId,
        range: Range<u64>,
        resolution: Option<u64>,
    ) -> Result<Vec<Extent>> {
        self.check_range(device, &range)?;
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
                // Reading will fill it with zeros and say so.
                Err(e) if content.losses.is_some() && is_damage(&e) => {
                    let end = self.unit_end(position).min(range.end);
                    list.push(position, end - position, ExtentKind::Data);
                    position = end;
                    continue;
                }
                Err(e) => return Err(e),
            };
            position = match run.mapped {
                Mapped::Unallocated { .. } => {
                    content.push_backing(&mut list, position..position + run.len, resolution)?
                }
                Mapped::Zero { .. } => {
                    list.push(position, run.len, ExtentKind::Zero);
                    position + run.len
                }
                Mapped::Data { host_offset } => {
                    content.push_data(&mut list, position, host_offset, run.len, resolution)?;
                    position + run.len
                }
                Mapped::Compressed(_) => {
                    list.push(position, run.len, ExtentKind::Data);
                    position + run.len
                }
            };
        }
        Ok(list.into_vec())
    }
}

impl RandomAccess for Qcow2Source {
    fn extents(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<Extent>> {
        self.list_extents(device, range, None)
    }

    fn rough_extents(&self, device: DeviceId, range: Range<u64>, resolution: u64) -> Result<Vec<Extent>> {
        self.list_extents(device, range, Some(resolution))
    }

    fn map(&self, device: DeviceId, range: Range<u64>) -> Result<Vec<MapExtent>> {
        self.check_range(device, &range)?;
        self.map_extents(range)
    }

    fn read_at(&self, device: DeviceId, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let end = guest_offset.saturating_add(buf.len() as u64);
        self.check_range(device, &(guest_offset..end))?;
        let content = self.content()?;
        let mut position = guest_offset;
        let mut rest = buf;
        while !rest.is_empty() {
            let run = content.mapping.run(position..end);
            let step = match &run {
                // Salvage gives up one unit, not all of its neighbours.
                Ok(run) if content.losses.is_none() => run.len,
                Ok(run) => run.len.min(self.unit_end(position) - position),
                Err(_) => self.unit_end(position).min(end) - position,
            };
            // Not above the buffer's length.
            let (part, after) = rest.split_at_mut(step as usize);
            let guest = position..position + step;
            let host = run.as_ref().ok().and_then(|run| run.host_offset());
            let done =
                run.and_then(|run| content.read_run(&self.input, run.mapped, self.shape, part, position));
            if let Err(e) = done {
                let e = e.guest(guest.clone());
                let Some(losses) = content.losses.as_ref().filter(|_| is_damage(&e)) else { return Err(e) };
                match host {
                    Some(host_offset) => content.data.read_what_is_there(part, host_offset, |lost, e| {
                        losses.add(position + lost.start as u64..position + lost.end as u64, &e);
                    }),
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
        self.shape.cluster_size().max(backing.map_or(1, |backing| backing.read_granule))
    }

    fn locate(&self, device: DeviceId, range: Range<u64>) -> Option<FileRange<'_>> {
        if range.is_empty() || self.check_range(device, &range).is_err() {
            return None;
        }
        let content = self.content.as_ref()?;
        let run = content.mapping.run(range.clone()).ok()?;
        match run.mapped {
            Mapped::Data { host_offset } => {
                let file = content.data.file()?;
                let len = run.len.min(content.data.len().saturating_sub(host_offset));
                (len > 0).then_some(FileRange { file, file_offset: host_offset, len })
            }
            Mapped::Unallocated { .. } => {
                let backing = content.backing.as_ref()?;
                let end = (range.start + run.len).min(backing.size);
                if range.start >= end {
                    return None;
                }
                backing.source.random()?.locate(backing.device, range.start..end)
            }
            Mapped::Zero { .. } | Mapped::Compressed(_) => None,
        }
    }
}

impl Qcow2Source {
    /// The end of what the tables tell of as one: a cluster, or a subcluster.
    fn unit_end(&self, guest_offset: u64) -> u64 {
        let unit = self.shape.subcluster_size();
        (guest_offset - guest_offset % unit).saturating_add(unit)
    }
}

/// What salvage may replace by zeros: damage, and sectors that can't be read.
fn is_damage(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed | ErrorKind::Io)
}
