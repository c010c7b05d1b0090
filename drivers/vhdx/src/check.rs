//! The structural check of an image: both headers, both copies of the region table, every BAT entry, and the
//! identifier of the parent.

use imgtool_core::unit_check::{opened, report_parent};
use imgtool_core::{CheckReport, Input, Memory, OpenOptions, Result};
use roaring::RoaringBitmap;

use crate::image::{Image, UnreadableHeader};
use crate::layout::MIB;
use crate::layout::bat::{BatEntry, ENTRY_LEN, PayloadState, SECTOR_BITMAP_LEN, SectorBitmapState};
use crate::layout::header::Header;
use crate::layout::region::REGION_TABLE_OFFSETS;
use crate::parent;

/// File offset in MiB up to which the check detects overlapping blocks; a block beyond it counts as a check
/// error. Our limit: 256 TiB bounds the memory to 32 MiB, and the file of the largest disk (64 TiB) ends long
/// before that.
const MAX_CHECKED_MIB: u32 = 1 << 28;

/// Checks an image alone. A log that needs to be replayed is a finding, but not a corruption.
///
/// # Errors
/// Fails if the file can't be read, is not a VHDX image, requires an unsupported feature or exceeds a limit.
/// Damage is not an error: the report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    Ok(examine(input, memory)?.0)
}

/// Checks an image, and whether its parent is the disk that it was made from.
///
/// # Errors
/// Same as [`check`].
pub(crate) fn check_with_parent(input: Input, options: &OpenOptions) -> Result<CheckReport> {
    let (mut report, image) = examine(input, &options.memory)?;
    if let Some(image) = image.filter(|image| image.metadata.has_parent) {
        report_parent(parent::open(&image, options), image.metadata.virtual_size, &mut report)?;
    }
    Ok(report)
}

/// Checks an image alone. Returns it with the report, unless it can't be opened.
fn examine(input: Input, memory: &Memory) -> Result<(CheckReport, Option<Image>)> {
    let mut report = CheckReport::default();
    let image = opened(Image::open(input, UnreadableHeader::UseOther, 0, memory), &mut report)?;
    let Some(image) = image else { return Ok((report, None)) };
    check_copies(&image, &mut report);
    BatCheck::new(&image).run(&mut report)?;
    if let Some(stats) = image.replay_stats {
        // Not a corruption: an interrupted writer leaves a log to replay, and the content is complete.
        report.findings.push(format!(
            "the log is not empty: {} entries were replayed in memory; the file is unchanged",
            stats.entries
        ));
    }
    Ok((report, Some(image)))
}

/// Returns the number of damaged copies of headers and region tables, whose other copy is valid.
pub(crate) fn faults_of_copies(image: &Image) -> u64 {
    let is_damaged = |header: &std::result::Result<Header, String>| {
        header.as_ref().map_or(true, |one| one.fault().is_some())
    };
    let headers = image.headers.iter().filter(|header| is_damaged(header)).count();
    (headers + image.region_faults.iter().flatten().count()) as u64
}

/// Reports invalid headers, invalid copies of the region table, and copies that differ. One valid header and
/// one valid copy are enough to read the image.
fn check_copies(image: &Image, report: &mut CheckReport) {
    for (ordinal, header) in ["first", "second"].iter().zip(&image.headers) {
        match header {
            Err(why) => report.corruption(format!("the {ordinal} header {why}")),
            Ok(header) => {
                if let Some(fault) = header.fault() {
                    report.corruption(format!("the {ordinal} header {fault}"));
                }
            }
        }
    }
    for (ordinal, fault) in ["first", "second"].iter().zip(&image.region_faults) {
        if let Some(why) = fault {
            report.corruption(format!("the {ordinal} region table {why}"));
        }
    }
    if image.region_tables_differ {
        let [first, second] = REGION_TABLE_OFFSETS;
        report.corruption(format!("the region tables at {first} and {second} differ"));
    }
}

/// A walk over the BAT, with its counts so far.
struct BatCheck<'a> {
    image: &'a Image,
    /// Mebibytes of the file that blocks use, each as its file offset in MiB.
    used_mib: RoaringBitmap,
    /// File offset at which the last structure or block ends.
    end: u64,
    /// Number of payload blocks allocated in the file.
    allocated: u64,
    /// Number of payload blocks that do not directly follow the previous one in the file.
    fragmented: u64,
    /// File offset at which the previous payload block ends.
    previous_end: Option<u64>,
}

impl<'a> BatCheck<'a> {
    fn new(image: &'a Image) -> Self {
        let end = image.reserved_regions().iter().map(|(_, region)| region.end()).max().unwrap_or(0);
        Self { image, used_mib: RoaringBitmap::new(), end, allocated: 0, fragmented: 0, previous_end: None }
    }

    /// Checks every entry, and fills in the end offset and the block counts of the report.
    fn run(mut self, report: &mut CheckReport) -> Result<()> {
        let shape = self.image.shape;
        let bat_at = self.image.regions.bat.file_offset;
        let entries = shape.entries(self.image.metadata.has_parent);
        let mut bat_index = 0;
        while bat_index < entries {
            let page = self.image.file.table_page(bat_at + bat_index * ENTRY_LEN)?;
            let page_end = ((page.end() - bat_at) / ENTRY_LEN).min(entries);
            if page.is_zero() {
                bat_index = page_end;
                continue;
            }
            for index in bat_index..page_end {
                let entry = BatEntry(page.u64_at(bat_at + index * ENTRY_LEN));
                let payload_block = shape.payload_block_from(index);
                if shape.payload_bat_index(payload_block) != index {
                    self.check_sector_bitmap(index, entry, report);
                } else if payload_block < shape.payload_blocks {
                    self.check_payload(index, payload_block, entry, report)?;
                }
            }
            bat_index = page_end;
        }
        report.image_end_offset = Some(self.end.min(self.image.file.len()));
        report.total_clusters = Some(shape.payload_blocks);
        report.allocated_clusters = Some(self.allocated);
        report.fragmented_clusters = Some(self.fragmented);
        Ok(())
    }

    /// Checks the entry of a payload block.
    fn check_payload(
        &mut self,
        bat_index: u64,
        payload_block: u64,
        entry: BatEntry,
        report: &mut CheckReport,
    ) -> Result<()> {
        let name = format!("BAT entry {bat_index} (payload block {payload_block})");
        match entry.payload_state() {
            PayloadState::NotPresent
            | PayloadState::Undefined
            | PayloadState::Zero
            | PayloadState::Unmapped => return Ok(()),
            PayloadState::Reserved(state) => {
                report.corruption(format!("{name} has the reserved state {state}"));
                return Ok(());
            }
            PayloadState::PartiallyPresent if !self.image.metadata.has_parent => {
                report.corruption(format!("{name} is partially present, but the disk has no parent"));
            }
            PayloadState::PartiallyPresent => {
                let bitmap = self.image.bat_entry(self.image.shape.sector_bitmap_bat_index(payload_block))?;
                if bitmap.sector_bitmap_state() != SectorBitmapState::Present {
                    report.corruption(format!("{name} is partially present, but has no sector bitmap"));
                }
            }
            PayloadState::FullyPresent => {}
        }
        let shape = &self.image.shape;
        // The file may end within the disk's last block, after the bytes that the guest uses.
        let used = shape.block_size.min(self.image.metadata.virtual_size - payload_block * shape.block_size);
        self.allocated += 1;
        let file_offset = entry.file_offset();
        if self.previous_end.is_some_and(|end| end != file_offset) {
            self.fragmented += 1;
        }
        self.previous_end = Some(file_offset.saturating_add(shape.block_size));
        self.claim(&name, file_offset, used, shape.block_size, report);
        Ok(())
    }

    /// Checks the entry of a sector-bitmap block.
    fn check_sector_bitmap(&mut self, bat_index: u64, entry: BatEntry, report: &mut CheckReport) {
        let name = format!("BAT entry {bat_index} (sector bitmap)");
        match entry.sector_bitmap_state() {
            SectorBitmapState::NotPresent => {}
            SectorBitmapState::Reserved(state) => {
                report.corruption(format!("{name} has the reserved state {state}"));
            }
            SectorBitmapState::Present if !self.image.metadata.has_parent => {
                report.corruption(format!("{name} is present, but the disk has no parent"));
            }
            SectorBitmapState::Present => {
                self.claim(&name, entry.file_offset(), SECTOR_BITMAP_LEN, SECTOR_BITMAP_LEN, report);
            }
        }
    }

    /// Claims `len` bytes of the file for a block; the file must contain at least the first `used` bytes.
    /// Reports the block if it overlaps a structure or another block, or if the file is too short.
    fn claim(&mut self, name: &str, file_offset: u64, used: u64, len: u64, report: &mut CheckReport) {
        for (other, region) in self.image.reserved_regions() {
            if region.overlaps(file_offset, used) {
                report.corruption(format!(
                    "{name} points to {file_offset}, where the block overlaps the {other}"
                ));
                return;
            }
        }
        let file_len = self.image.file.len();
        if file_offset.checked_add(used).is_none_or(|end| end > file_len) {
            report.corruption(format!(
                "{name} needs {used} bytes at {file_offset}, but the file ends at {file_len}"
            ));
            return;
        }
        self.end = self.end.max(file_offset.saturating_add(len));
        let mebibytes = (u32::try_from(file_offset / MIB), u32::try_from(len / MIB));
        let (Ok(first @ ..MAX_CHECKED_MIB), Ok(count)) = mebibytes else {
            report.check_errors += 1;
            return;
        };
        let new = self.used_mib.insert_range(first..first.saturating_add(count));
        if new < u64::from(count) {
            report.corruption(format!("{name} points to {file_offset}, which another block uses as well"));
        }
    }
}
