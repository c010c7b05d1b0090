//! Reading a stream of compressed grains in one pass, from a pipe or in a salvage.
//!
//! Grains are in ascending order, each after a marker with its place in the guest. The tables are in front
//! (layout A of qemu-img and VMware's libraries), or behind their grains and at the end (layout B of vCenter).
//! Either way, they must list exactly the grains of the stream, so a missing one is noticed.

use std::sync::{Arc, Mutex};

use imgtool_core::source::second_pass;
use imgtool_core::sync::lock;
use imgtool_core::zero::is_zero;
use imgtool_core::{
    Access, Buffer, BufferPool, Device, Doubt, Error, ErrorKind, ImageInfo, ImageSource, Input, Lease, Loss,
    Losses, OpenOptions, Piece, Remedy, Result, Stream, StreamAccess,
};
use libdeflater::Decompressor;

use crate::descriptor::{Descriptor, NO_PARENT};
use crate::extents::text_lease;
use crate::image::{DISK, DISK_NAME};
use crate::inflate::{check_len, inflate};
use crate::layout::SECTOR_SIZE;
use crate::layout::hosted::{self, GD_AT_END, Header};
use crate::layout::marker::{GRAIN_HEAD, Kind, Marker};
use crate::source::{CID, CREATE_TYPE};

mod salvage;
mod tables;
use salvage::unverified;
use tables::Tables;

/// Length of a sector as an index.
const SECTOR: usize = SECTOR_SIZE as usize;

/// Maximum number of sectors before the first grain besides descriptor, tables and two grains. Our limit: 1 MiB.
const MAX_PADDING: u64 = 2048;

/// Place of the tables in a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TablePlace {
    /// Before the first grain.
    Front,
    /// Behind their grains; the directory at the end.
    Behind,
}

/// A stream that can be read in one pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StreamLayout {
    header: Header,
    tables: TablePlace,
}

/// Returns the layout of an image that begins with `head`, if it can be read in one pass: it has markers, and
/// everything before its first grain is in order. A snapshot can't, since its parent has the other grains.
pub(crate) fn layout(head: &[u8]) -> Option<StreamLayout> {
    let header = head.starts_with(hosted::MAGIC).then(|| Header::decode(head).ok()).flatten()?;
    let descriptor_end = header.descriptor_offset.saturating_add(header.descriptor_size);
    if !header.markers || header.is_wrapper() || header.overhead == 0 || descriptor_end > header.overhead {
        return None;
    }
    let start = usize::try_from(header.descriptor_offset.checked_mul(SECTOR_SIZE)?).ok()?;
    if header.descriptor_size > 0 {
        let text = String::from_utf8_lossy(head.get(start..)?).to_ascii_lowercase();
        let parent = text.lines().find_map(|line| line.trim().strip_prefix("parentcid"));
        let cid = parent.map(|value| value.trim_start_matches([' ', '=']).trim());
        if cid.is_some_and(|cid| cid != "ffffffff") {
            return None;
        }
    }
    let directory_len = header.directory_entries().checked_mul(4)?.div_ceil(SECTOR_SIZE);
    let table_len = (u64::from(header.table_entries) * 4).div_ceil(SECTOR_SIZE);
    let tables_len = header.directory_entries().checked_mul(table_len)?.checked_add(directory_len)?;
    // Both sets of tables, and padding. Everything before the first grain is read, so its length is bounded.
    let most = descriptor_end
        .checked_add(tables_len.checked_mul(2)?)?
        .checked_add(2 * header.grain_size + MAX_PADDING)?;
    if header.overhead > most {
        return None;
    }
    let tables = match header.directory {
        GD_AT_END => TablePlace::Behind,
        directory if directory.checked_add(directory_len)? <= header.overhead => TablePlace::Front,
        _ => TablePlace::Behind,
    };
    Some(StreamLayout { header, tables })
}

/// Opens a stream, reading what precedes the first grain.
pub(crate) fn open(
    input: Input,
    layout: StreamLayout,
    options: &OpenOptions,
) -> Result<Arc<dyn ImageSource>> {
    let mut stream = input.into_stream()?;
    let located = |error: Error, stream: &Stream| error.path(stream.location());
    let front = Front::read(&mut stream, &layout, options).map_err(|e| located(e, &stream))?;
    if front.descriptor.as_ref().is_some_and(|descriptor| descriptor.is_child()) {
        return Err(Error::unsupported(
            "a snapshot can't be read from a stream: its parent has other grains",
        )
        .path(stream.location())
        .hint("save the stream to a file beside its parent"));
    }
    let contradiction = match front.descriptor.as_ref().and_then(Descriptor::contradiction) {
        Some(error) if !options.salvage => return Err(located(error, &stream)),
        contradiction => contradiction.as_ref().map(unverified),
    };
    let header = layout.header;
    let grain_size = header.grain_size * SECTOR_SIZE;
    // Stored bytes of a grain, and the decoder.
    let lease = options.memory.lease(3 * grain_size + (64 << 10), "a compressed grain")?;
    let (sectors, fault) = Descriptor::disk_sectors(front.descriptor.as_ref(), &header);
    let size = sectors * SECTOR_SIZE;
    let info = describe(&header, size, front.descriptor.as_ref());
    let pass = Pass {
        stream,
        exhausted: false,
        tables: front.tables,
        header,
        size,
        codec: Decompressor::new(),
        stored: Vec::new(),
        at: 0,
        pending: None,
        state: State::Grains,
        damage: None,
        salvage: options.salvage,
        ignore_trailing: options.ignore_trailing,
        losses: Arc::default(),
        doubt: fault.or(front.doubt).or(contradiction),
        _lease: lease,
    };
    Ok(Arc::new(GrainStream { info, losses: Arc::clone(&pass.losses), pass: Mutex::new(pass) }))
}

fn describe(header: &Header, size: u64, descriptor: Option<&Descriptor>) -> ImageInfo {
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(DISK.0, DISK_NAME, size)],
        cluster_size: Some(header.grain_size * SECTOR_SIZE),
        ..ImageInfo::default()
    };
    if let Some(descriptor) = descriptor {
        if let Some(create_type) = &descriptor.create_type {
            info.fact(CREATE_TYPE, "type", create_type.clone());
        }
        if let Some(cid) = descriptor.cid {
            info.worded_fact(CID, "content identifier", cid, format!("{cid:08x}"));
        }
        info.worded_fact("parent-cid", "content identifier of the parent", NO_PARENT, "none".to_owned());
    }
    info
}

/// Structures before the first grain.
struct Front {
    descriptor: Option<Descriptor>,
    tables: Tables,
    /// Reason why a salvage can't prove that the tables list all grains.
    doubt: Option<String>,
}

impl Front {
    fn read(stream: &mut Stream, layout: &StreamLayout, options: &OpenOptions) -> Result<Self> {
        let header = &layout.header;
        let mut lease = options.memory.lease(0, "the tables of a stream")?;
        let wanted = match layout.tables {
            TablePlace::Front => header.overhead,
            TablePlace::Behind => header.descriptor_offset.saturating_add(header.descriptor_size),
        };
        let wanted = wanted.saturating_mul(SECTOR_SIZE);
        let end = header.overhead.saturating_mul(SECTOR_SIZE);
        let mut bytes = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        while stream.position() < end {
            let len = (end - stream.position()).min(chunk.len() as u64) as usize;
            let keep = wanted.saturating_sub(stream.position()).min(len as u64) as usize;
            let read = stream.read_full(&mut chunk[..len])?;
            lease.raise(2 * (bytes.len() + keep) as u64, "the tables of a stream")?;
            bytes.extend_from_slice(&chunk[..keep.min(read)]);
            if read < len {
                return Err(cut(stream.position()));
            }
        }
        let text = (header.descriptor_offset * SECTOR_SIZE) as usize;
        let text = bytes.get(text..text + (header.descriptor_size * SECTOR_SIZE) as usize);
        let text = text.filter(|_| header.descriptor_offset > 0 && header.descriptor_size > 0);
        let descriptor = match text {
            Some(text) => {
                let _lease = text_lease(text.len() as u64, options)?;
                Descriptor::embedded(text, header, options.salvage)?
            }
            None => None,
        };
        let tables = match layout.tables {
            TablePlace::Front => Tables::in_front(header, &bytes, lease),
            TablePlace::Behind => Tables::behind(header, lease),
        };
        match tables {
            Err(error) if options.salvage && error.kind() != ErrorKind::LimitExceeded => {
                let lease = options.memory.lease(0, "the tables of a stream")?;
                let (tables, doubt) = (Tables::unknown(header, lease), Some(unverified(&error)));
                Ok(Self { descriptor, tables, doubt })
            }
            tables => Ok(Self { descriptor, tables: tables?, doubt: None }),
        }
    }
}

/// Fills `buf` as far as the stream goes. Sets `exhausted` if that is not all of it.
fn fill(stream: &mut Stream, exhausted: &mut bool, buf: &mut [u8]) -> Result<usize> {
    let read = stream.read_full(buf);
    *exhausted |= !matches!(read, Ok(read) if read == buf.len());
    read
}

/// Returns the error for a stream that ends at `position`.
fn cut(position: u64) -> Error {
    Error::corrupt("the stream ends early")
        .at(position)
        .remedied_by(Remedy::Salvage("it was cut short: copy it again, or use a backup".into()))
}

/// An image that is read in one pass.
struct GrainStream {
    info: ImageInfo,
    losses: Arc<Losses>,
    pass: Mutex<Pass>,
}

impl ImageSource for GrainStream {
    fn info(&self) -> &ImageInfo {
        &self.info
    }

    fn access(&self) -> Access<'_> {
        Access::Stream(&self.pass)
    }

    fn losses(&self) -> Vec<Loss> {
        let _ended = lock(&self.pass);
        self.losses.list(DISK)
    }

    fn doubts(&self) -> Vec<Doubt> {
        let doubt = lock(&self.pass).doubt.clone();
        doubt.into_iter().map(|reason| Doubt { device: DISK, reason }).collect()
    }
}

/// State of the one pass over a stream.
struct Pass {
    stream: Stream,
    /// True once the stream has ended or could not be read.
    exhausted: bool,
    tables: Tables,
    header: Header,
    /// Size of the disk in bytes.
    size: u64,
    codec: Decompressor,
    /// Compressed bytes of a grain.
    stored: Vec<u8>,
    /// Guest offset of the next piece.
    at: u64,
    /// A grain that was read: its guest offset and content.
    pending: Option<(u64, Buffer)>,
    state: State,
    /// Damage of a marker after which a salvage looks for the next one, sector by sector.
    damage: Option<Error>,
    salvage: bool,
    ignore_trailing: bool,
    losses: Arc<Losses>,
    /// Reason why a salvage can't prove that nothing is missing.
    doubt: Option<String>,
    /// Memory for a grain.
    _lease: Lease,
}

/// Progress of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// More grains may follow.
    Grains,
    /// The stream has ended and was complete.
    Ended,
    /// The caller knows that.
    Finished,
}

impl StreamAccess for Pass {
    fn next_piece(&mut self, pool: &BufferPool) -> Result<Option<Piece>> {
        if self.state == State::Finished {
            return Err(second_pass());
        }
        while self.pending.is_none() && self.state == State::Grains {
            if let Err(error) = self.step(pool) {
                self.survive(self.placed(error, self.stream.position()))?;
            }
        }
        let next = self.pending.as_ref().map_or(self.size, |(start, _)| *start);
        if self.at < next {
            let piece = Piece::zero(DISK, self.at, next - self.at);
            self.at = next;
            return Ok(Some(piece));
        }
        if let Some((start, data)) = self.pending.take() {
            self.at = start + data.len() as u64;
            return Ok(Some(Piece::data(DISK, start, data)));
        }
        self.state = State::Finished;
        Ok(None)
    }

    fn in_order(&self) -> bool {
        true
    }
}

impl Pass {
    /// Adds the place of an error at `position`, and where the decoder of a compressed file is.
    fn placed(&self, error: Error, position: u64) -> Error {
        let error = error.path(self.stream.location()).device(DISK_NAME).at(position);
        error.compressed_at(self.stream.compressed_position())
    }

    /// Reads the next marker and what it announces.
    fn step(&mut self, pool: &BufferPool) -> Result<()> {
        let position = self.stream.position() / SECTOR_SIZE;
        let mut sector = [0; SECTOR];
        let read = fill(&mut self.stream, &mut self.exhausted, &mut sector)?;
        if read < SECTOR {
            // Some programs end a stream without its marker.
            if self.tables.is_complete_without_end() && is_zero(&sector[..read]) {
                self.state = State::Ended;
                return Ok(());
            }
            return Err(cut(self.stream.position()));
        }
        let head = sector.first_chunk().map_or(Marker::Unknown(0), Marker::decode);
        if self.damage.is_some() && !head.is_plausible(&sector, &self.header) {
            return Ok(());
        }
        match head {
            Marker::Grain { lba, len } => self.read_grain(lba, len, position, &sector, pool),
            Marker::Metadata { kind: Kind::End, .. } => self.end(),
            // Nothing follows, whatever its number says.
            Marker::Metadata { kind: Kind::Progress, .. } => Ok(()),
            Marker::Metadata { kind: Kind::Table, sectors } => {
                let bytes = self.read_sectors(sectors, self.tables.table_sectors(), "grain table")?;
                let met = self.tables.meet_table(&bytes, position + 1);
                self.agree(met)
            }
            Marker::Metadata { kind: Kind::Directory, sectors } => {
                let bytes = self.read_sectors(sectors, self.tables.directory_sectors(), "grain directory")?;
                let met = self.tables.meet_directory(&bytes, position + 1);
                self.agree(met)
            }
            Marker::Metadata { kind: Kind::Footer, sectors } => {
                let bytes = self.read_sectors(sectors, 1, "footer")?;
                let met = self.meet_footer(&bytes, (position + 1) * SECTOR_SIZE);
                self.agree(met)
            }
            Marker::Unknown(kind) => Err(Error::malformed(format!("the stream has a marker of type {kind}"))),
        }
    }

    fn meet_footer(&mut self, bytes: &[u8], file_offset: u64) -> Result<()> {
        let footer = Header::decode(bytes).map_err(|fault| fault.of("footer", file_offset))?;
        if (footer.capacity, footer.grain_size) != (self.header.capacity, self.header.grain_size) {
            return Err(Error::corrupt("the footer contradicts the header"));
        }
        self.tables.meet_footer(footer.directory)
    }

    /// Reads the metadata that follows a marker, which must have the expected number of sectors.
    fn read_sectors(&mut self, sectors: u64, expected: u64, name: &str) -> Result<Vec<u8>> {
        if sectors != expected {
            return Err(Error::malformed(format!("the {name} has {sectors} sectors, not {expected}")));
        }
        // `Tables` bounds the directory, and has borrowed memory for it.
        let mut bytes = vec![0; (sectors * SECTOR_SIZE) as usize];
        if fill(&mut self.stream, &mut self.exhausted, &mut bytes)? < bytes.len() {
            return Err(cut(self.stream.position()));
        }
        Ok(bytes)
    }

    fn read_grain(
        &mut self,
        lba: u64,
        len: u32,
        position: u64,
        sector: &[u8; SECTOR],
        pool: &BufferPool,
    ) -> Result<()> {
        let start = lba.saturating_mul(SECTOR_SIZE);
        if !lba.is_multiple_of(self.header.grain_size) || lba >= self.header.capacity {
            return Err(Error::corrupt(format!(
                "a marker names sector {lba}, which is no grain of {} sectors within {}",
                self.header.grain_size, self.header.capacity
            )));
        }
        if start < self.at {
            return Err(Error::out_of_order(format!(
                "the grain of sector {lba} comes after that of sector {}",
                self.at / SECTOR_SIZE
            ))
            .hint("save the stream to a file first"));
        }
        let grain_size = self.header.grain_size * SECTOR_SIZE;
        check_len(len, grain_size)?;
        if let Some(damage) = self.damage.take() {
            self.lose(self.at..start, &damage);
        }
        self.read_stored(len, sector)?;
        let met = self.tables.meet_grain(lba / self.header.grain_size, position);
        self.agree(met)?;
        // Nothing, if the capacity of the header is rounded up beyond the disk.
        let used = self.size.saturating_sub(start).min(grain_size);
        let mut data = pool.take(grain_size as usize);
        let stored = &self.stored[GRAIN_HEAD..GRAIN_HEAD + len as usize];
        if let Err(error) = inflate(&mut self.codec, stored, &mut data, used) {
            let error = self.placed(error, position * SECTOR_SIZE).guest(start..start + used);
            if !self.salvage {
                return Err(error);
            }
            data.fill(0);
            if used > 0 {
                self.losses.add(start..start + used, &error);
            }
        }
        if used > 0 {
            data.truncate(used as usize);
            self.pending = Some((start, data));
        }
        Ok(())
    }

    /// Reads the `len` compressed bytes of a grain, which begin in the sector of its marker.
    fn read_stored(&mut self, len: u32, sector: &[u8; SECTOR]) -> Result<()> {
        // At most 2 MiB and a sector.
        let end = (GRAIN_HEAD + len as usize).next_multiple_of(SECTOR);
        self.stored.clear();
        self.stored.extend_from_slice(sector);
        self.stored.resize(end, 0);
        let rest = fill(&mut self.stream, &mut self.exhausted, &mut self.stored[SECTOR..])?;
        if SECTOR + rest < GRAIN_HEAD + len as usize {
            return Err(cut(self.stream.position()));
        }
        Ok(())
    }

    /// Ends the stream. Zeros may follow: qemu-img writes up to 64 KiB of them.
    fn end(&mut self) -> Result<()> {
        // A salvage goes on after an end marker that may be zeros of a damaged part.
        self.tables.check_complete()?;
        self.state = State::Ended;
        if self.ignore_trailing || self.salvage {
            return Ok(());
        }
        let mut rest = vec![0; 64 << 10];
        loop {
            let read = self.stream.read_full(&mut rest)?;
            if !is_zero(&rest[..read]) {
                return Err(
                    Error::corrupt("bytes follow the end of the stream").remedied_by(Remedy::IgnoreTrailing)
                );
            }
            if read < rest.len() {
                return Ok(());
            }
        }
    }
}
