//! [`GrainFile`], a sparse file: a grain directory, grain tables, and grains. The three kinds of sparse files
//! differ in their headers and in the form of their entries.

mod directory;
mod footer;
mod found;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Cache, Error, Lease, Memory, RandomInput, Remedy, Result};

use crate::layout::hosted::{self, GD_AT_END};
use crate::layout::marker::{BARE_HEAD, GRAIN_HEAD};
use crate::layout::sesparse::{self, Grain};
use crate::layout::{SECTOR_SIZE, cowd};

use directory::Shared;
pub(crate) use directory::is_damage;
use found::FoundGrains;

/// Maximum number of grain tables in memory for an image. Our limit: since many threads read at different
/// places. An image deeper in a chain gets less.
const MAX_CACHED_TABLES: u64 = 64;

/// Memory in bytes for the longest table: 4096 entries.
const TABLE_BYTES: u64 = 4096 * size_of::<Place>() as u64;

/// Place of a grain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in this file: the parent has it, or it is zeros.
    Absent,
    /// Explicit zeros.
    Zero,
    /// At this file offset.
    At(u64),
    /// Not known, in a salvage: neither a table nor a marker of the grain is left.
    Lost,
}

/// Form of the grains of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Form {
    /// As the guest has them.
    Plain,
    /// Compressed, after a head of this many bytes.
    Compressed(usize),
}

/// A sparse file.
pub(crate) struct GrainFile {
    pub(crate) input: RandomInput,
    /// Size of a grain in bytes, a power of two.
    pub(crate) grain_size: u64,
    /// Capacity in bytes.
    pub(crate) capacity: u64,
    pub(crate) form: Form,
    /// Header of a hosted file.
    pub(crate) hosted: Option<hosted::Header>,
    /// Name of the kind, for messages.
    pub(crate) kind: &'static str,
    /// File offset of each grain table; 0 for none.
    pub(crate) directory: Vec<u64>,
    /// Number of entries of a grain table.
    pub(crate) table_entries: u64,
    /// Parts of the file that contain no grain: headers, the descriptor, the directory.
    pub(crate) reserved: Vec<Range<u64>>,
    entries: Entries,
    tables: Arc<TableCache>,
    /// Number of the file in `tables`.
    id: usize,
    /// File offset of the redundant directory, with whose tables those of `directory` are compared.
    pub(crate) redundant: Option<u64>,
    /// True in a salvage, which takes a grain that only one of both tables has.
    salvage: bool,
    /// True once a salvage has found tables that differ.
    differs: AtomicBool,
    /// The grains of a stream by their markers, in a salvage.
    found: Option<FoundGrains>,
    /// True once a salvage has taken a grain by its marker, or missed a table.
    is_rebuilt: AtomicBool,
    /// Reason why a salvage can't prove that the file is complete.
    doubt: Option<String>,
    /// Tables that several entries of the directory share, by file offset.
    shared: Vec<(u64, Shared)>,
    /// Memory for them.
    shared_lease: Option<Lease>,
    /// Memory for the directory.
    _lease: Lease,
}

/// Form of the entries of a grain table.
#[derive(Debug, Clone, Copy)]
enum Entries {
    /// 32-bit sectors; 1 means zeros if `zeroed`.
    Sectors { zeroed: bool },
    /// Numbers of grains from this file offset on, in SE sparse form.
    SeSparse { grains: u64 },
}

impl Entries {
    /// Width of an entry in bytes.
    fn width(self) -> u64 {
        match self {
            Self::Sectors { .. } => 4,
            Self::SeSparse { .. } => 8,
        }
    }
}

/// Places of the grains of one table.
type Table = Arc<[Place]>;

/// Grain tables of all files of an image, by file and by their number in the directory.
pub(crate) struct TableCache {
    tables: Mutex<Cache<(usize, u64), Table>>,
    /// Memory for the tables.
    _lease: Lease,
}

impl TableCache {
    /// Creates a cache for an image with `depth` images above it in a chain.
    pub(crate) fn new(depth: usize, memory: &Memory) -> Result<Arc<Self>> {
        let tables = memory.cache_share(MAX_CACHED_TABLES) / (depth as u64).saturating_add(1);
        let lease = memory.lease(tables.max(1) * TABLE_BYTES, "the grain tables of a VMDK image")?;
        // At most MAX_CACHED_TABLES, so it fits.
        let tables = Mutex::new(Cache::new(tables as usize));
        Ok(Arc::new(Self { tables, _lease: lease }))
    }
}

/// Settings for opening one file.
#[derive(Clone, Copy)]
pub(crate) struct FileSettings<'a> {
    /// Cache of its tables.
    pub(crate) tables: &'a Arc<TableCache>,
    /// Number of the file in the cache.
    pub(crate) id: usize,
    /// Lends memory for its directory.
    pub(crate) memory: &'a Memory,
    /// True to use what is intact of a damaged directory.
    pub(crate) salvage: bool,
    /// True to accept bytes behind the end of a stream.
    pub(crate) ignore_trailing: bool,
}

/// Place and form of a file's tables, by its header.
struct Shape {
    grain_size: u64,
    capacity: u64,
    form: Form,
    kind: &'static str,
    directory: u64,
    /// Sector of another directory that should list the same tables.
    redundant_directory: Option<u64>,
    directory_entries: u64,
    table_entries: u64,
    entries: Entries,
    reserved: Vec<Range<u64>>,
    /// The grains of a stream by their markers, in a salvage.
    found: Option<FoundGrains>,
}

impl GrainFile {
    /// Opens a hosted sparse file with this header. If the directory is at the end, the footer counts.
    pub(crate) fn hosted(
        input: &RandomInput,
        header: &hosted::Header,
        settings: FileSettings<'_>,
    ) -> Result<Self> {
        let is_stream = settings.salvage && header.markers;
        let found = is_stream.then(|| FoundGrains::search(input, header, settings.memory)).transpose()?;
        let (header, doubt) = match footer::complete(input, header, settings) {
            Err(error) if found.is_some() && is_damage(&error) => (
                hosted::Header { directory: GD_AT_END, ..header.clone() },
                Some(format!("unverified: {error}")),
            ),
            read => read?,
        };
        let sectors = |start: u64, len: u64| {
            let start = start.saturating_mul(SECTOR_SIZE);
            start..start.saturating_add(len.saturating_mul(SECTOR_SIZE))
        };
        let form = match (header.compressed, header.markers) {
            (false, _) => Form::Plain,
            (true, true) => Form::Compressed(GRAIN_HEAD),
            (true, false) => Form::Compressed(BARE_HEAD),
        };
        let shape = Shape {
            grain_size: header.grain_size * SECTOR_SIZE,
            capacity: header.capacity * SECTOR_SIZE,
            form,
            kind: "hosted sparse",
            directory: header.directory,
            redundant_directory: header.redundant_directory.filter(|sector| *sector != 0),
            directory_entries: header.directory_entries(),
            table_entries: header.table_entries.into(),
            entries: Entries::Sectors { zeroed: header.zeroed_grains },
            reserved: vec![
                0..hosted::HEADER_LEN as u64,
                sectors(header.descriptor_offset, header.descriptor_size),
            ],
            found,
        };
        let file = Self::open(input, shape, settings)?;
        Ok(Self { doubt: doubt.or(file.doubt), hosted: Some(header), ..file })
    }

    /// Adds a reason why a salvage can't prove that nothing is missing.
    pub(crate) fn doubted(self, doubt: Option<String>) -> Self {
        Self { doubt: self.doubt.or(doubt), ..self }
    }

    /// Opens a COWD file.
    pub(crate) fn cowd(
        input: &RandomInput,
        header: &cowd::Header,
        settings: FileSettings<'_>,
    ) -> Result<Self> {
        let shape = Shape {
            grain_size: header.grain_size * SECTOR_SIZE,
            capacity: header.capacity * SECTOR_SIZE,
            form: Form::Plain,
            kind: "COWD",
            directory: header.directory,
            redundant_directory: None,
            directory_entries: header.directory_entries,
            table_entries: cowd::TABLE_ENTRIES,
            entries: Entries::Sectors { zeroed: false },
            reserved: std::iter::once(0..cowd::HEADER_LEN as u64).collect(),
            found: None,
        };
        Self::open(input, shape, settings)
    }

    /// Opens an SE sparse file.
    pub(crate) fn se_sparse(
        input: &RandomInput,
        header: &sesparse::Header,
        settings: FileSettings<'_>,
    ) -> Result<Self> {
        let volatile = header.volatile_header * SECTOR_SIZE;
        let bytes = input.read_vec(volatile, sesparse::HEADER_LEN)?;
        sesparse::Header::check_volatile(&bytes).map_err(|fault| fault.of("volatile header", volatile))?;
        let tables = header.tables.offset * SECTOR_SIZE;
        let shape = Shape {
            grain_size: sesparse::GRAIN_SECTORS * SECTOR_SIZE,
            capacity: header.capacity * SECTOR_SIZE,
            form: Form::Plain,
            kind: "SE sparse",
            directory: header.directory.offset,
            redundant_directory: None,
            directory_entries: header.directory_entries,
            table_entries: sesparse::TABLE_ENTRIES,
            entries: Entries::SeSparse { grains: header.grains.offset.saturating_mul(SECTOR_SIZE) },
            reserved: vec![0..sesparse::HEADER_LEN as u64, tables..tables + header.tables.size * SECTOR_SIZE],
            found: None,
        };
        let table_len = sesparse::TABLE_SECTORS * SECTOR_SIZE;
        let mut file = Self::open(input, shape, settings)?;
        for (index, table) in file.directory.iter_mut().enumerate() {
            let at = header.directory.offset * SECTOR_SIZE + index as u64 * 8;
            let entry = sesparse::directory_entry(*table).map_err(|fault| fault.of("directory entry", at))?;
            *table = match entry {
                None => 0,
                // Both factors are bounded, so the product fits.
                Some(number) if (number + 1) * sesparse::TABLE_SECTORS <= header.tables.size => {
                    tables + number * table_len
                }
                Some(number) => {
                    return Err(Error::malformed(format!(
                        "the directory names table {number}; the file has {}",
                        header.tables.size / sesparse::TABLE_SECTORS
                    ))
                    .at(at));
                }
            };
        }
        file.check_shares(settings.memory)?;
        Ok(file)
    }

    fn open(input: &RandomInput, shape: Shape, settings: FileSettings<'_>) -> Result<Self> {
        let (directory, lease, is_lost) = match shape.found {
            Some(_) => directory::read_damaged(input, &shape, settings)?,
            None => {
                directory::read(input, &shape, settings).map(|(entries, lease)| (entries, lease, false))?
            }
        };
        let offset = shape.directory.saturating_mul(SECTOR_SIZE);
        // Bounded when the directory was read.
        let len = shape.directory_entries * shape.entries.width();
        let mut reserved = shape.reserved;
        if !is_lost {
            reserved.push(offset..offset.saturating_add(len));
        }
        let redundant = shape.redundant_directory.filter(|copy| *copy != shape.directory);
        let redundant = redundant.map(|copy| copy.saturating_mul(SECTOR_SIZE));
        let mut file = Self {
            // One outside of the file is a finding of the check.
            redundant: redundant.filter(|copy| copy.checked_add(len).is_some_and(|end| end <= input.len())),
            salvage: settings.salvage,
            differs: AtomicBool::new(false),
            found: None,
            is_rebuilt: AtomicBool::new(is_lost),
            doubt: None,
            input: input.clone(),
            grain_size: shape.grain_size,
            capacity: shape.capacity,
            form: shape.form,
            hosted: None,
            kind: shape.kind,
            directory,
            table_entries: shape.table_entries,
            reserved,
            entries: shape.entries,
            tables: Arc::clone(settings.tables),
            id: settings.id,
            shared: Vec::new(),
            shared_lease: None,
            _lease: lease,
        };
        if let Entries::Sectors { .. } = file.entries {
            match file.check_shares(settings.memory) {
                Err(error) if shape.found.is_some() && is_damage(&error) => {
                    file.directory.fill(directory::LOST);
                    file.is_rebuilt.store(true, Ordering::Relaxed);
                }
                checked => checked?,
            }
        }
        file.found = shape.found;
        Ok(file)
    }

    /// Returns the reason why a salvage can't prove what it has read so far.
    pub(crate) fn doubt(&self) -> Option<String> {
        let reason = |is_set: &AtomicBool, text: &str| {
            is_set.load(Ordering::Relaxed).then(|| format!("unverified: {text}"))
        };
        self.doubt
            .clone()
            .or_else(|| reason(&self.differs, "grain tables differ from their redundant copies"))
            .or_else(|| {
                reason(&self.is_rebuilt, "the tables are damaged; grains were found by their markers")
            })
    }

    /// Ends the disk at `sectors`, which are at most the capacity.
    pub(crate) fn shortened(mut self, sectors: u64) -> Self {
        self.capacity = self.capacity.min(sectors.saturating_mul(SECTOR_SIZE));
        self
    }

    /// Returns the number of bytes from `within` to the end of what is lost if the lookup there fails: the
    /// grain, or the table if it can't be read. Tables that are known to be lost count together up to `max_len`.
    pub(crate) fn to_unit_end(&self, within: u64, max_len: u64) -> u64 {
        let table_span = self.grain_size.saturating_mul(self.table_entries);
        let index = within / table_span;
        let place = usize::try_from(index).ok();
        if let Some(place) = place.filter(|place| self.known_table(*place) == Some(Shared::Lost)) {
            let tables = self.known_tables(place, Shared::Lost, (max_len / table_span).saturating_add(2));
            return tables.saturating_mul(table_span) - within % table_span;
        }
        let offset = place.and_then(|place| self.directory.get(place));
        let is_readable = offset.is_some_and(|offset| *offset == 0 || self.table(index, *offset).is_ok());
        let unit = if is_readable { self.grain_size } else { table_span };
        unit - within % unit
    }

    /// Returns the number of grains of the capacity.
    pub(crate) fn grains(&self) -> u64 {
        self.capacity.div_ceil(self.grain_size)
    }

    /// Returns the number of bytes of a grain that the capacity includes.
    pub(crate) fn used_len(&self, grain: u64) -> u64 {
        self.capacity.saturating_sub(grain.saturating_mul(self.grain_size)).min(self.grain_size)
    }

    /// Returns the place of the grain `grain`, and the number of grains from there on, at least 1 and at most
    /// `max`, that continue it: equal states, and for plain grains neighbours in the file.
    pub(crate) fn run(&self, grain: u64, max: u64) -> Result<(Place, u64)> {
        let (table, entry) = (grain / self.table_entries, grain % self.table_entries);
        let past_end = || Error::out_of_bounds(format!("the file has no grain {grain}"));
        let index = usize::try_from(table).map_err(|_| past_end())?;
        let offset = *self.directory.get(index).ok_or_else(past_end)?;
        if let Some(Shared::Same(place)) = self.known_table(index) {
            let tables = self.known_tables(index, Shared::Same(place), max / self.table_entries + 2);
            return Ok((place, (tables * self.table_entries - entry).min(max).max(1)));
        }
        let places = self.table(table, offset)?;
        // A table has at most 4096 entries.
        let rest = &places[entry as usize..];
        let max = usize::try_from(max).unwrap_or(usize::MAX).clamp(1, rest.len());
        let first = rest[0];
        let is_next = |(distance, place): (u64, &Place)| match (first, *place, self.form) {
            (Place::At(first), Place::At(next), Form::Plain) => {
                // A run has at most 4096 grains of 1 MiB.
                first.checked_add(distance * self.grain_size) == Some(next)
                    && self.check_place(grain + distance, next).is_ok()
            }
            (Place::At(_), Place::At(_), Form::Compressed(_)) => true,
            (first, next, _) => first == next,
        };
        let len = 1 + (1..).zip(&rest[1..max]).take_while(|pair| is_next(*pair)).count() as u64;
        if let Place::At(offset) = first {
            self.check_place(grain, offset)?;
        }
        Ok((first, len))
    }

    /// Checks that the grain `grain`, stored at `offset`, is behind the structures and within the file.
    pub(crate) fn check_place(&self, grain: u64, offset: u64) -> Result<()> {
        let len = match self.form {
            Form::Plain => self.used_len(grain),
            Form::Compressed(head) => head as u64 + 1,
        };
        let end = offset.saturating_add(len);
        if self.reserved.iter().any(|range| range.start < end && offset < range.end) {
            return Err(Error::malformed(format!("grain {grain} overlaps the structures of the file"))
                .at(offset)
                .remedied_by(Remedy::Salvage("use a backup".into())));
        }
        if end > self.input.len() {
            return Err(Error::corrupt(format!(
                "grain {grain} needs {len} bytes at {offset}, but the file ends at {}",
                self.input.len()
            ))
            .at(offset)
            .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into())));
        }
        Ok(())
    }

    fn table(&self, index: u64, offset: u64) -> Result<Table> {
        if let Some(table) = lock(&self.tables.tables).get(&(self.id, index)) {
            return Ok(Arc::clone(table));
        }
        let table = self.read_table(index, offset)?;
        lock(&self.tables.tables).insert((self.id, index), Arc::clone(&table));
        Ok(table)
    }

    /// Refuses a table that differs from its redundant copy: one of them has lost a grain, which would become a hole.
    /// A salvage takes the grain. A copy that can't be read is a finding of the check.
    fn compare_copy(&self, index: u64, offset: u64, places: &mut [Place], zeroed: bool) -> Result<()> {
        let Some(directory) = self.redundant else { return Ok(()) };
        let mut entry = [0; 4];
        self.input.read_exact_at(&mut entry, directory.saturating_add(index * 4))?;
        let copy = u64::from(u32::from_le_bytes(entry)) * SECTOR_SIZE;
        if copy == 0 || copy == offset {
            return Ok(());
        }
        let Ok(bytes) = self.input.read_vec(copy, places.len() * 4) else { return Ok(()) };
        // What is behind the end of the disk does not count.
        let first = index.saturating_mul(self.table_entries);
        let used = usize::try_from(self.grains().saturating_sub(first)).unwrap_or(usize::MAX);
        for (at, (own, other)) in places.iter_mut().zip(sectors(&bytes, zeroed)).take(used).enumerate() {
            if *own == other {
                continue;
            }
            if !self.salvage {
                let (grain, at) = (first.saturating_add(at as u64), offset.saturating_add(at as u64 * 4));
                return Err(Error::malformed(format!(
                    "grain table {index} and its redundant copy disagree about grain {grain}"
                ))
                .at(at)
                .remedied_by(Remedy::Salvage("use a backup".into())));
            }
            self.differs.store(true, Ordering::Relaxed);
            if !matches!(own, Place::At(_)) {
                *own = other;
            }
        }
        Ok(())
    }

    /// Reads the grain table `index` at `offset`. In a salvage of a stream, the grains that were found by
    /// their markers complete or replace it.
    fn read_table(&self, index: u64, offset: u64) -> Result<Table> {
        let stored = self.read_stored_table(index, offset);
        let Some(found) = &self.found else { return stored };
        let stored = match stored {
            Err(error) if !is_damage(&error) => return Err(error),
            stored => stored.ok(),
        };
        let (table, differs) = found.merge(index, stored.as_deref());
        self.is_rebuilt.fetch_or(differs, Ordering::Relaxed);
        Ok(table)
    }

    /// Reads the grain table `index` at `offset`. A table is complete even if the capacity ends within it.
    fn read_stored_table(&self, index: u64, offset: u64) -> Result<Table> {
        // At most 32 KiB.
        let len = (self.table_entries * self.entries.width()) as usize;
        let name = |error: Error| error.device(crate::image::DISK_NAME);
        if self.reserved.first().is_some_and(|header| offset < header.end) {
            return Err(Error::malformed(format!("grain table {index} overlaps the header")).at(offset));
        }
        let bytes = self.input.read_vec(offset, len).map_err(name)?;
        match self.entries {
            Entries::Sectors { zeroed } => {
                let mut places: Vec<Place> = sectors(&bytes, zeroed).collect();
                self.compare_copy(index, offset, &mut places, zeroed)?;
                Ok(places.into())
            }
            Entries::SeSparse { grains } => {
                let place = |(at, entry): (u64, &[u8; 8])| {
                    let entry = u64::from_le_bytes(*entry);
                    let grain = sesparse::table_entry(entry)
                        .map_err(|fault| fault.of("grain table entry", offset + at * 8))?;
                    Ok(match grain {
                        Grain::Absent => Place::Absent,
                        Grain::Zero => Place::Zero,
                        // A grain has a number below 2^60; the product saturates, and is beyond the file.
                        Grain::Data(number) => {
                            Place::At(grains.saturating_add(number.saturating_mul(self.grain_size)))
                        }
                    })
                };
                (0..).zip(bytes.as_chunks().0).map(place).collect()
            }
        }
    }
}

/// Decodes a table of 32-bit sectors.
fn sectors(bytes: &[u8], zeroed: bool) -> impl Iterator<Item = Place> {
    bytes.as_chunks().0.iter().map(move |entry| sector(u32::from_le_bytes(*entry), zeroed))
}

/// Decodes an entry of a table of 32-bit sectors.
fn sector(entry: u32, zeroed: bool) -> Place {
    match entry {
        0 => Place::Absent,
        1 if zeroed => Place::Zero,
        sector => Place::At(u64::from(sector) * SECTOR_SIZE),
    }
}
