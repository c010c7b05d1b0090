//! Opening an image: header → log → region table → metadata, each checked before the next is read.

use imgtool_toolkit::{Error, ErrorKind, Input, RandomInput, Result};

use crate::file::{Overlay, ReplayedFile};
use crate::layout::MIB;
use crate::layout::bat::{BatEntry, BatShape, ENTRY_LEN};
use crate::layout::header::{
    CREATOR_LEN, FILE_SIGNATURE, HEADER_LEN, HEADER_OFFSETS, Header, current, decode_creator,
};
use crate::layout::metadata::{
    ItemPlace, METADATA_TABLE_LEN, Metadata, MetadataFault, MetadataTable, RawItems, decode_parent_locator,
};
use crate::layout::region::{REGION_TABLE_LEN, REGION_TABLE_OFFSETS, Region, RegionTable, TableFault};
use crate::log::{Replay, replay};

/// An image whose structures have been read.
pub(crate) struct Image {
    pub(crate) file: ReplayedFile,
    pub(crate) creator: String,
    /// Both headers, or what is wrong with them.
    pub(crate) headers: [Result<Header, String>; 2],
    /// The one that holds.
    pub(crate) header: Header,
    /// What the log changed, if it was not empty.
    pub(crate) replayed: Option<Replayed>,
    /// What is wrong with the copies of the region table.
    pub(crate) region_faults: [Option<String>; 2],
    /// Both copies of the region table are whole, and say different things.
    pub(crate) region_tables_differ: bool,
    pub(crate) regions: RegionTable,
    pub(crate) metadata: Metadata,
    /// Keys and values, in the file's order; empty unless differencing.
    pub(crate) parent_locator: Vec<(String, String)>,
    pub(crate) shape: BatShape,
}

/// How much a log changed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Replayed {
    pub(crate) entries: usize,
    pub(crate) pages: usize,
}

/// What becomes of a header that the disk does not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum UnreadableHeader {
    /// An error: it may be the current one, and what the other says out of date (that there is no log to
    /// replay, for one). A header that was read and is damaged is another matter: the format has two
    /// since a write may be cut off, and then the other one holds.
    Error,
    /// As one that is damaged, with a note: for who wants what can be had.
    Damaged,
}

impl Image {
    /// Reads and checks everything but the BAT. `depth`: images above this one in a chain, which share
    /// what memory there is for logs and tables.
    pub(crate) fn open(input: Input, unreadable: UnreadableHeader, depth: usize) -> Result<Self> {
        let input = input.into_random()?;
        let path = input.path().to_owned();
        Self::open_random(input, unreadable, depth).map_err(|e| e.path(path))
    }

    fn open_random(input: RandomInput, unreadable: UnreadableHeader, depth: usize) -> Result<Self> {
        let creator = read_identifier(&input)?;
        let [first, second] = HEADER_OFFSETS;
        let headers = [read_header(&input, first, unreadable)?, read_header(&input, second, unreadable)?];
        let header = current(&headers)
            .map_err(|why| {
                Error::corrupt(why)
                    .at(HEADER_OFFSETS[0])
                    .hint("the image is damaged: use a backup; its blocks may still be whole")
            })?
            .clone();
        if let Some(fault) = header.fault() {
            return Err(Error::malformed(format!("the header {fault}")).at(HEADER_OFFSETS[0]));
        }
        let (file, replayed) = read_log(input, &header, depth)?;
        let Regions { table: regions, faults: region_faults, differ } = read_regions(&file)?;
        check_log_place(&header, &regions)?;
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
            replayed,
            region_faults,
            region_tables_differ: differ,
            regions,
            metadata,
            parent_locator,
            shape,
        };
        image.check_bat_place()?;
        Ok(image)
    }

    /// The BAT entry with an index below [`BatShape::entries`].
    pub(crate) fn bat_entry(&self, bat_index: u64) -> Result<BatEntry> {
        let position = self.regions.bat.file_offset + bat_index * ENTRY_LEN;
        Ok(BatEntry(self.file.table_page(position)?.u64_at(position)))
    }

    /// What else stands in the file: blocks must not touch it.
    pub(crate) fn reserved_places(&self) -> [(&'static str, Region); 4] {
        let header = Region { file_offset: 0, length: MIB as u32 };
        let log = Region { file_offset: self.header.log_offset, length: self.header.log_length };
        [
            ("header section", header),
            ("log", log),
            ("BAT", self.regions.bat),
            ("metadata", self.regions.metadata),
        ]
    }

    fn check_bat_place(&self) -> Result<()> {
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

fn read_identifier(input: &RandomInput) -> Result<String> {
    let mut identifier = [0; FILE_SIGNATURE.len() + CREATOR_LEN];
    let readable = usize::try_from(input.len()).unwrap_or(usize::MAX).min(identifier.len());
    input.read_exact_at(&mut identifier[..readable], 0)?;
    match identifier.strip_prefix(FILE_SIGNATURE) {
        Some(creator) => Ok(decode_creator(creator)),
        None => Err(Error::wrong_format("is not a VHDX image: the signature 'vhdxfile' is missing")),
    }
}

fn read_header(input: &RandomInput, offset: u64, policy: UnreadableHeader) -> Result<Result<Header, String>> {
    match input.read_vec(offset, HEADER_LEN) {
        Ok(bytes) => Ok(Header::decode(&bytes)),
        Err(error) if error.kind() == ErrorKind::Io && policy == UnreadableHeader::Error => {
            Err(error.hint("with --salvage the other header is used, which may be older"))
        }
        Err(error) => Ok(Err(unreadable(&error))),
    }
}

/// Why one of two copies is out, for an error that names file and place itself.
fn unreadable(error: &Error) -> String {
    match error.io_error() {
        Some(cause) => format!("can't be read ({cause})"),
        None => format!("can't be read ({})", error.message()),
    }
}

fn read_log(input: RandomInput, header: &Header, depth: usize) -> Result<(ReplayedFile, Option<Replayed>)> {
    if header.log_guid.is_nil() {
        return Ok((ReplayedFile::new(input, Overlay::new(depth), 0, depth), None));
    }
    let Replay { overlay, least_len, entries } = replay(&input, header, depth)?;
    let replayed = Replayed { entries, pages: overlay.page_count() };
    Ok((ReplayedFile::new(input, overlay, least_len, depth), Some(replayed)))
}

/// What the two copies of the region table say.
struct Regions {
    /// The first whole copy.
    table: RegionTable,
    /// What is wrong with each.
    faults: [Option<String>; 2],
    /// Both are whole and they differ.
    differ: bool,
}

/// One copy is enough, and it does not matter which: they are written once, with the same content, so
/// that a copy that the disk does not give is no loss.
fn read_regions(file: &ReplayedFile) -> Result<Regions> {
    let copies = REGION_TABLE_OFFSETS.map(|offset| match file.read_vec(offset, REGION_TABLE_LEN) {
        Ok(bytes) => RegionTable::decode(&bytes),
        Err(error) => Err(TableFault::Damaged(unreadable(&error))),
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
                    .hint("the image was made by a program that knows more than the specification"));
            }
            Err(TableFault::Unsupported(why)) => *fault = Some(why.clone()),
        }
    }
    match (table, &faults) {
        (Some(table), _) => {
            let differ = matches!(&copies, [Ok(first), Ok(second)] if first != second);
            Ok(Regions { table, faults, differ })
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

fn check_log_place(header: &Header, regions: &RegionTable) -> Result<()> {
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
    let fixed: [(&str, Option<ItemPlace>, &mut [u8]); 5] = [
        ("file parameters", Some(table.file_parameters), &mut items.file_parameters),
        ("virtual disk size", Some(table.virtual_disk_size), &mut items.virtual_disk_size),
        ("virtual disk ID", table.virtual_disk_id, &mut items.virtual_disk_id),
        ("logical sector size", Some(table.logical_sector_size), &mut items.logical_sector_size),
        ("physical sector size", table.physical_sector_size, &mut items.physical_sector_size),
    ];
    for (name, place, buf) in fixed {
        let Some(place) = place else { continue };
        let file_offset = region.file_offset + u64::from(place.offset);
        if place.length as usize != buf.len() {
            return Err(Error::malformed(format!(
                "the {name} have {} bytes instead of {}",
                place.length,
                buf.len()
            ))
            .at(file_offset));
        }
        file.read_exact_at(buf, file_offset)?;
    }
    let metadata = Metadata::decode(&items).map_err(fault)?;
    let locator = match table.parent_locator {
        Some(place) if metadata.has_parent => {
            let item = file.read_vec(region.file_offset + u64::from(place.offset), place.length as usize)?;
            decode_parent_locator(&item).map_err(fault)?
        }
        None if metadata.has_parent => {
            return Err(fault(MetadataFault::Malformed(
                "the disk is differencing, but names no parent".to_owned(),
            )));
        }
        _ => Vec::new(),
    };
    Ok((metadata, locator))
}
