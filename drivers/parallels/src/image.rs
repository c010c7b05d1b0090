//! Opening and reading an image.

use std::sync::Arc;

use imgtool_core::layered::{LayeredSource, Origin, Segment, SegmentMap, StoredBytes, check_stored};
use imgtool_core::table::PagedTable;
use imgtool_core::{Device, Error, ImageInfo, ImageSource, Input, Memory, OpenOptions, RandomInput, Result};

use crate::bundle::Bundle;
use crate::layout::{ENTRY_LEN, HEADER_LEN, Header};

/// The name of an image's only device.
const DISK_NAME: &str = "disk";

/// An open image.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) header: Header,
    pub(crate) table: PagedTable,
}

/// Opens an image.
///
/// # Errors
/// `Unsupported` for a file of a bundle that is only a part of its disk, unless only information or salvage is
/// needed.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let image = Image::open(input, options.externals.depth(), &options.memory)?;
    let mut info = describe(&image.header);
    let location = image.input.location();
    let mut doubt = None;
    if let Some(message) = Bundle::doubt(location, &options.externals) {
        if !options.info_only && !options.salvage {
            return Err(Error::unsupported(message).path(location).hint(
                "let Parallels merge the snapshots and parts, or copy the file out of the bundle to read it alone",
            ));
        }
        doubt = Some(format!("unverified: {message}"));
        info.notes.push(message);
    }
    Ok(Arc::new(LayeredSource::new(info, image, None, options.salvage).doubted(doubt)))
}

impl Image {
    /// Reads and checks the header and the place of the table. `depth` is the number of images above this one
    /// in a chain. The table borrows from `memory`.
    ///
    /// # Errors
    /// Any error of [`Header::decode`]; `Corrupt` if the file ends within the table.
    pub(crate) fn open(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let header =
            Header::decode(&input.read_head(HEADER_LEN as usize)?).map_err(|e| e.path(input.location()))?;
        let table = PagedTable::new(input.clone(), HEADER_LEN, header.entries * ENTRY_LEN, depth, memory)?;
        Ok(Self { input, header, table })
    }

    /// Looks up the cluster `index` and at most `max` clusters from there on. Returns the file offset of the
    /// cluster, or `None` and the number of clusters that are absent.
    fn cluster(&self, index: u64, max: u64) -> Result<(Option<u64>, u64)> {
        let (bytes, equal) = self.table.run::<4>(index, max)?;
        let Some(file_offset) = self.header.cluster_offset(bytes) else { return Ok((None, equal)) };
        if file_offset < self.header.table_end() {
            return Err(Error::malformed(format!(
                "the cluster at {file_offset} overlaps the table, which ends at {}",
                self.header.table_end()
            ))
            .at(self.table.entry_offset::<4>(index)));
        }
        check_stored(&self.input, "cluster", file_offset, self.header.used_len(index))?;
        Ok((Some(file_offset), 1))
    }
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let cluster_size = self.header.cluster_size;
        let (index, within) = (guest_offset / cluster_size, guest_offset % cluster_size);
        let (stored, clusters) =
            self.cluster(index, (within + max_len).div_ceil(cluster_size)).map_err(|error| {
                let start = index * cluster_size;
                let end = start + self.header.used_len(index);
                error.path(self.input.location()).device(DISK_NAME).guest(start..end)
            })?;
        let origin =
            stored.map_or(Origin::Hole, |start| Origin::File { index: 0, file_offset: start + within });
        Ok(Segment { len: (clusters * cluster_size - within).min(max_len), origin })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        (self.header.cluster_size - guest_offset % self.header.cluster_size).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }
}

fn describe(header: &Header) -> ImageInfo {
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(0, DISK_NAME, header.virtual_size)],
        cluster_size: Some(header.cluster_size),
        ..ImageInfo::default()
    };
    info.top_fact("dirty-flag", "in use", header.in_use);
    info.fact("clusters", "clusters of the disk", header.clusters());
    if header.in_use {
        info.notes
            .push("a program had the image open, or was stopped while it had: it may be out of date".into());
    }
    if header.has_extension {
        info.notes.push("the image has an extension, such as dirty bitmaps, which is not read".into());
    }
    info
}
