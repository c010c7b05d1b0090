//! Opening an image: headers, log, region table and metadata, each checked before the next is read.

use imgtool_core::layered::StoredBytes;
use imgtool_core::{DeviceId, Error, ErrorKind, Input, Memory, RandomInput, Remedy, Result};

use crate::file::ReplayedFile;
use crate::layout::MIB;
use crate::layout::bat::{BatEntry, BatShape, ENTRY_LEN};
use crate::layout::header::{
    CREATOR_LEN, FILE_SIGNATURE, HEADER_LEN, HEADER_OFFSETS, Header, current, decode_creator,
};
use crate::layout::metadata::{
    ItemRange, METADATA_TABLE_LEN, Metadata, MetadataFault, MetadataTable, RawItems, decode_parent_locator,
};
use crate::layout::region::{REGION_TABLE_LEN, REGION_TABLE_OFFSETS, Region, RegionTable, TableFault};
use crate::overlay::Overlay;
use crate::replay::{Replay, replay};

/// The id of an image's only device.
pub(crate) const DISK: DeviceId = DeviceId(0);
/// The name of an image's only device.
pub(crate) const DISK_NAME: &str = "disk";

/// An image with all structures decoded except for the BAT.
pub(crate) struct Image {
    /// The file after log replay.
    pub(crate) file: ReplayedFile,
    /// Name of the program that created the file (section 2.2.1).
    pub(crate) creator: String,
    /// Both headers. An error is worded to follow "the header".
    pub(crate) headers: [Result<Header, String>; 2],
    /// The current header.
    pub(crate) header: Header,
    /// Counts of the log replay; `None` if the log was empty.
    pub(crate) replay_stats: Option<ReplayStats>,
    /// Fault of each copy of the region table, worded to follow "the region table"; `None` if the copy is
    /// valid.
    pub(crate) region_faults: [Option<String>; 2],
    /// True if both copies of the region table are valid but differ.
    pub(crate) region_tables_differ: bool,
    /// The first valid copy of the region table.
    pub(crate) regions: RegionTable,
    /// Properties of the disk.
    pub(crate) metadata: Metadata,
    /// Keys and values of the parent locator, in the file's order; empty if the disk has no parent.
    pub(crate) parent_locator: Vec<(String, String)>,
    /// Dimensions of the BAT.
    pub(crate) shape: BatShape,
}

/// Counts of a log replay.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReplayStats {
    /// Number of log entries applied.
    pub(crate) entries: usize,
    /// Number of 4 KiB pages overwritten.
    pub(crate) pages: usize,
}

/// Treatment of a header that can't be read because of an I/O error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnreadableHeader {
    /// Fail. The unreadable header may be the current one, and the other may not mention a log that must be
    /// replayed. A header that is read but damaged does not count as unreadable: an interrupted update
    /// leaves one damaged header, and the other is then current.
    Fail,
    /// Use the other header, as if this one were damaged: for salvage and `check`.
    UseOther,
}

impl Image {
    /// Reads and checks all structures except for the BAT. `depth` is the number of images above this one in
    /// a chain; the greater it is, the less memory the image may use for its log and tables, which borrow
    /// from `memory`.
    pub(crate) fn open(
        input: Input,
        unreadable: UnreadableHeader,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        let input = input.into_random()?;
        let location = input.location().clone();
        Self::open_random(input, unreadable, depth, memory).map_err(|e| e.path(location))
    }

    fn open_random(
        input: RandomInput,
        unreadable: UnreadableHeader,
        depth: usize,
        memory: &Memory,
    ) -> Result<Self> {
        let creator = read_identifier(&input)?;
        let [first, second] = HEADER_OFFSETS;
        let headers = [read_header(&input, first, unreadable)?, read_header(&input, second, unreadable)?];
        let header = current(&headers)
            .map_err(|why| {
                Error::corrupt(why)
                    .at(HEADER_OFFSETS[0])
                    .hint("the image is damaged: use a backup; its blocks may still be intact")
            })?
            .clone();
        if let Some(fault) = header.fault() {
            return Err(Error::malformed(format!("the header {fault}")).at(HEADER_OFFSETS[0]));
        }
        let (file, replay_stats) = read_log(input, &header, depth, memory)?;
        let RegionCopies { table: regions, faults: region_faults, differ } = read_regions(&file)?;
        check_log_region(&header, &regions)?;
        let (metadata, parent_locator) = read_metadata(&file, &regions.metadata)?;
        let shape = BatShape::new(
            metadata.virtual_size,
            metadata.block_size.into(),
            metadata.logical_sector_size.into(),
        );
        let image = Self {
            file,
            creator,
            headers,
            header,
            replay_stats,
            region_faults,
            region_tables_differ: differ,
            regions,
            metadata,
            parent_locator,
            shape,
        };
        image.check_bat_region()?;
        Ok(image)
    }

    /// Reads the BAT entry at `bat_index`, which must be below [`BatShape::entries`].
    pub(crate) fn bat_entry(&self, bat_index: u64) -> Result<BatEntry> {
        let entry_at = self.regions.bat.file_offset + bat_index * ENTRY_LEN;
        Ok(BatEntry(self.file.table_page(entry_at)?.u64_at(entry_at)))
    }

    /// Returns the names and ranges of the structures that blocks must not overlap.
    pub(crate) fn reserved_regions(&self) -> [(&'static str, Region); 4] {
        let header = Region { file_offset: 0, length: MIB as u32 };
        let log = Region { file_offset: self.header.log_offset, length: self.header.log_length };
        [
            ("header section", header),
            ("log", log),
            ("BAT", self.regions.bat),
            ("metadata", self.regions.metadata),
        ]
    }

    /// Checks that the BAT fits into its region and into the file.
    fn check_bat_region(&self) -> Result<()> {
        let needed = self.shape.entries(self.metadata.has_parent) * ENTRY_LEN;
        let bat = &self.regions.bat;
        if needed > u64::from(bat.length) {
            return Err(Error::malformed(format!(
                "the BAT has {} bytes, but a disk of {} bytes needs {needed}",
                bat.length, self.metadata.virtual_size
            ))
            .at(bat.file_offset));
        }
        if bat.file_offset.saturating_add(needed) > self.file.len() {
            return Err(Error::corrupt(format!(
                "the file ends at {}, within its BAT, which needs {needed} bytes",
                self.file.len()
            ))
            .at(bat.file_offset)
            .hint("the file is cut short: copy it again, or use a backup"));
        }
        Ok(())
    }
}

/// Reads the file type identifier and returns its creator string.
fn read_identifier(input: &RandomInput) -> Result<String> {
    let mut identifier = [0; FILE_SIGNATURE.len() + CREATOR_LEN];
    let readable = usize::try_from(input.len()).unwrap_or(usize::MAX).min(identifier.len());
    input.read_exact_at(&mut identifier[..readable], 0)?;
    match identifier.strip_prefix(FILE_SIGNATURE) {
        Some(creator) => Ok(decode_creator(creator)),
        None => Err(Error::wrong_format("is not a VHDX image: the signature 'vhdxfile' is missing")),
    }
}

/// Reads the header at `file_offset`. The inner error is worded to follow "the header".
fn read_header(
    input: &RandomInput,
    file_offset: u64,
    unreadable_header: UnreadableHeader,
) -> Result<Result<Header, String>> {
    match input.read_vec(file_offset, HEADER_LEN) {
        Ok(bytes) => Ok(Header::decode(&bytes)),
        Err(error) if error.kind() == ErrorKind::Io && unreadable_header == UnreadableHeader::Fail => {
            let advice = "copy it again, or use a backup: the other header may be older";
            Err(error.remedied_by(Remedy::Salvage(advice.into())))
        }
        Err(error) => Ok(Err(unreadable_fault(&error))),
    }
}

/// Describes a read error in words that follow the name of a structure. The caller's message names the file
/// and the structure, so the description omits the file and the offset.
fn unreadable_fault(error: &Error) -> String {
    match error.io_error() {
        Some(cause) => format!("can't be read ({cause})"),
        None => format!("can't be read ({})", error.message()),
    }
}

/// Replays the log in memory unless it is empty.
fn read_log(
    input: RandomInput,
    header: &Header,
    depth: usize,
    memory: &Memory,
) -> Result<(ReplayedFile, Option<ReplayStats>)> {
    if header.log_guid.is_nil() {
        return Ok((ReplayedFile::new(input, Overlay::new(depth), 0, depth, memory)?, None));
    }
    let Replay { overlay, min_len, entries } = replay(&input, header, depth)?;
    let stats = ReplayStats { entries, pages: overlay.page_count() };
    Ok((ReplayedFile::new(input, overlay, min_len, depth, memory)?, Some(stats)))
}

/// Result of reading both copies of the region table.
struct RegionCopies {
    /// The first valid copy.
    table: RegionTable,
    /// Fault of each copy, worded to follow "the region table"; `None` if the copy is valid.
    faults: [Option<String>; 2],
    /// True if both copies are valid but differ.
    differ: bool,
}

/// Reads both copies of the region table. One valid copy is enough, even if an I/O error prevents reading the
/// other: both are written when the file is created, with the same content.
fn read_regions(file: &ReplayedFile) -> Result<RegionCopies> {
    let copies = REGION_TABLE_OFFSETS.map(|file_offset| match file.read_vec(file_offset, REGION_TABLE_LEN) {
        Ok(bytes) => RegionTable::decode(&bytes),
        Err(error) => Err(TableFault::Damaged(unreadable_fault(&error))),
    });
    let mut faults = [None, None];
    let mut table = None;
    for (copy, fault) in copies.iter().zip(&mut faults) {
        match copy {
            Ok(copy) => {
                table.get_or_insert_with(|| copy.clone());
            }
            Err(TableFault::Damaged(why)) => *fault = Some(why.clone()),
            Err(TableFault::Unsupported(why)) if table.is_none() => {
                return Err(Error::unsupported(format!("the region table {why}"))
                    .at(REGION_TABLE_OFFSETS[0])
                    .hint(
                        "the image uses an extension of the format: open it with the program that made it",
                    ));
            }
            Err(TableFault::Unsupported(why)) => *fault = Some(why.clone()),
        }
    }
    match (table, &faults) {
        (Some(table), _) => {
            let differ = matches!(&copies, [Ok(first), Ok(second)] if first != second);
            Ok(RegionCopies { table, faults, differ })
        }
        (None, [first, second]) => {
            let why = |fault: &Option<String>| fault.clone().unwrap_or_default();
            Err(Error::corrupt(format!(
                "neither region table is valid: the first {}, the second {}",
                why(first),
                why(second)
            ))
            .at(REGION_TABLE_OFFSETS[0])
            .hint("the image is damaged: use a backup"))
        }
    }
}

/// Checks that the log overlaps neither the BAT nor the metadata.
fn check_log_region(header: &Header, regions: &RegionTable) -> Result<()> {
    for (name, region) in [("BAT", regions.bat), ("metadata", regions.metadata)] {
        if header.log_length > 0 && region.overlaps(header.log_offset, header.log_length.into()) {
            return Err(Error::malformed(format!(
                "the log at {} and the {name} at {} overlap",
                header.log_offset, region.file_offset
            )));
        }
    }
    Ok(())
}

/// Reads the disk's properties and its parent locator.
fn read_metadata(file: &ReplayedFile, region: &Region) -> Result<(Metadata, Vec<(String, String)>)> {
    let fault = |fault: MetadataFault| {
        match fault {
            MetadataFault::Malformed(why) => Error::malformed(why),
            MetadataFault::Unsupported(why) => Error::unsupported(why),
        }
        .at(region.file_offset)
    };
    let bytes = file.read_vec(region.file_offset, METADATA_TABLE_LEN)?;
    let table = MetadataTable::decode(&bytes, region.length).map_err(fault)?;
    let mut items = RawItems::default();
    let fixed_len: [(&str, Option<ItemRange>, &mut [u8]); 5] = [
        ("file parameters", Some(table.file_parameters), &mut items.file_parameters),
        ("virtual disk size", Some(table.virtual_disk_size), &mut items.virtual_disk_size),
        ("virtual disk ID", table.virtual_disk_id, &mut items.virtual_disk_id),
        ("logical sector size", Some(table.logical_sector_size), &mut items.logical_sector_size),
        ("physical sector size", table.physical_sector_size, &mut items.physical_sector_size),
    ];
    for (name, range, buf) in fixed_len {
        let Some(range) = range else { continue };
        let file_offset = region.file_offset + u64::from(range.offset);
        if range.length as usize != buf.len() {
            return Err(Error::malformed(format!(
                "metadata item '{name}' has {} bytes instead of {}",
                range.length,
                buf.len()
            ))
            .at(file_offset));
        }
        file.read_exact_at(buf, file_offset)?;
    }
    let metadata = Metadata::decode(&items).map_err(fault)?;
    let locator = match table.parent_locator {
        Some(range) if metadata.has_parent => {
            let item = file.read_vec(region.file_offset + u64::from(range.offset), range.length as usize)?;
            decode_parent_locator(&item).map_err(fault)?
        }
        None if metadata.has_parent => {
            return Err(fault(MetadataFault::Malformed(
                "the disk is differencing, but has no parent locator".to_owned(),
            )));
        }
        _ => Vec::new(),
    };
    Ok((metadata, locator))
}
