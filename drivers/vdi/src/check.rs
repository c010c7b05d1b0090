//! The structural check of an image: its header and every entry of its block map.

use imgtool_core::{CheckReport, ErrorKind, Input, Memory, Result};
use roaring::RoaringBitmap;

use crate::image::Image;
use crate::layout::Entry;

/// Checks an image.
///
/// # Errors
/// If the file can't be read, is not a VDI image or requires an unsupported feature. Damage is not an error:
/// the report lists it.
pub(crate) fn check(input: Input, memory: &Memory) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let image = match Image::open(input, 0, memory) {
        Ok(image) => image,
        Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Malformed) => {
            report.corruption(format!("{error:#}"));
            return Ok(report);
        }
        Err(error) => return Err(error),
    };
    MapCheck::new(&image).run(&mut report)?;
    Ok(report)
}

/// A walk over the block map, with its counts so far.
struct MapCheck<'a> {
    image: &'a Image,
    /// Positions in the file that entries refer to.
    used: RoaringBitmap,
    /// File offset at which the last structure or block ends.
    end: u64,
    /// Number of blocks in the file that the disk uses.
    allocated: u64,
    /// Number of blocks that do not directly follow the previous one in the file.
    fragmented: u64,
    /// Position after that of the previous block.
    expected: Option<u32>,
}

impl<'a> MapCheck<'a> {
    fn new(image: &'a Image) -> Self {
        let end = image.header.map_end();
        Self { image, used: RoaringBitmap::new(), end, allocated: 0, fragmented: 0, expected: None }
    }

    /// Checks every entry, and fills in the counts of the report.
    fn run(mut self, report: &mut CheckReport) -> Result<()> {
        let header = &self.image.header;
        let mut index = 0;
        while index < header.blocks {
            let (bytes, equal) = self.image.map.run::<4>(index, header.blocks - index)?;
            if let Entry::Stored(position) = Entry::decode(bytes) {
                // Equal neighbours share a block, which `check_block` reports for each of them.
                (index..index + equal).for_each(|index| self.check_block(index, position, report));
            }
            index += equal;
        }
        self.check_count(report);
        report.image_end_offset = Some(self.end.min(self.image.input.len()));
        report.total_clusters = Some(header.disk_blocks());
        report.allocated_clusters = Some(self.allocated);
        report.fragmented_clusters = Some(self.fragmented);
        Ok(())
    }

    fn check_block(&mut self, index: u64, position: u32, report: &mut CheckReport) {
        let header = &self.image.header;
        let name = format!("map entry {index}");
        if !self.used.insert(position) {
            report.corruption(format!("{name} points to block {position} of the file, which another uses"));
            return;
        }
        let used = self.image.used_len(index);
        let file_offset = header.block_data(position);
        if file_offset.saturating_add(used) > self.image.input.len() {
            report.corruption(format!(
                "{name} needs {used} bytes at {file_offset}, but the file ends at {}",
                self.image.input.len()
            ));
            return;
        }
        self.allocated += 1;
        if self.expected.is_some_and(|expected| expected != position) {
            self.fragmented += 1;
        }
        self.expected = position.checked_add(1);
        self.end = self.end.max(file_offset.saturating_add(header.block_size));
    }

    /// Compares the number of blocks with the header's: a block that no entry refers to wastes space.
    fn check_count(&self, report: &mut CheckReport) {
        let (stated, found) = (self.image.header.allocated, self.used.len());
        if stated > found {
            report.leak(stated - found, format!("the header counts {stated} blocks, the map has {found}"));
        } else if stated < found {
            report.corruption(format!("the header counts {stated} blocks, but the map has {found}"));
        }
    }
}
