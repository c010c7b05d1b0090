//! Opening and reading an image.

use std::sync::Arc;

use imgtool_core::layered::{LayeredSource, Origin, Segment, SegmentMap, StoredBytes, check_stored};
use imgtool_core::table::PagedTable;
use imgtool_core::unit_check::SharedTables;
use imgtool_core::{
    Device, Disk, Error, ImageInfo, ImageSource, Input, Memory, OpenOptions, RandomInput, Reference, Result,
};

use crate::layout::{ENTRY_LEN, Entry, HEADER_LEN, Header};

/// The name of an image's only device.
const DISK_NAME: &str = "disk";

/// An open image, without its backing file.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) header: Header,
    /// Name of the backing file.
    backing: Option<String>,
    /// The whole file as a table: the tables of the image are at multiples of an entry's width.
    pub(crate) entries: PagedTable,
}

/// Opens an image and, unless only information is needed, its backing file.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let image = Image::open(input, options.externals.depth(), &options.memory)?;
    let location = image.input.location();
    let parent = match image.backing.as_deref().filter(|_| !options.info_only) {
        Some(name) => {
            let format = image.header.raw_backing.then_some("raw");
            let backing = options.externals.open_image("backing file", name, location, format, options)?;
            Some(Disk::only(backing, "the backing image")?)
        }
        None => None,
    };
    let info = describe(&image);
    Ok(Arc::new(LayeredSource::new(info, image, parent, options.salvage)))
}

impl Image {
    /// Reads and checks the header and the place of the first table. `depth` is the number of images above
    /// this one in a chain. The tables borrow from `memory`.
    ///
    /// # Errors
    /// Any error of [`Header::decode`]; `Corrupt` if the file ends within the first table.
    pub(crate) fn open(input: Input, depth: usize, memory: &Memory) -> Result<Self> {
        let input = input.into_random()?;
        let header =
            Header::decode(&input.read_head(HEADER_LEN as usize)?).map_err(|e| e.path(input.location()))?;
        let backing = match header.backing {
            // At most `MAX_NAME_LEN`, so it fits.
            Some((at, len)) => Some(String::from_utf8_lossy(&input.read_vec(at, len as usize)?).into_owned()),
            None => None,
        };
        check_stored(&input, "first table", header.l1_offset, header.table_len)
            .map_err(|e| e.path(input.location()))?;
        let entries = PagedTable::new(input.clone(), 0, input.len(), depth, memory)?;
        let image = Self { input, header, backing, entries };
        let header = &image.header;
        let first = header.l1_offset / ENTRY_LEN;
        let tables = first..first + header.virtual_size.div_ceil(header.l2_span());
        let offset = |entry| match Entry::decode(entry) {
            Entry::At(table) => Some(table),
            Entry::Zero | Entry::Absent => None,
        };
        SharedTables::check::<8>(&image.entries, tables, header.table_len, memory, offset)
            .map_err(|e| e.path(image.input.location()))?;
        Ok(image)
    }

    /// Returns the entry `index` of the table at `table_offset`, and the number of equal entries from there
    /// on, at most `max` and none past the end of the table.
    pub(crate) fn entry(&self, table_offset: u64, index: u64, max: u64) -> Result<(Entry, u64)> {
        let max = max.min(self.header.entries() - index);
        let (bytes, equal) = self.entries.run::<8>(table_offset / ENTRY_LEN + index, max)?;
        Ok((Entry::decode(bytes), equal))
    }

    /// Checks the place of a table of the second level, which the entry `index` of the first refers to.
    pub(crate) fn check_l2(&self, entry: Entry, index: u64) -> Result<u64> {
        let at = self.header.l1_offset + index * ENTRY_LEN;
        match entry {
            Entry::At(table) if self.is_cluster(table) => {
                check_stored(&self.input, "table", table, self.header.table_len)?;
                Ok(table)
            }
            Entry::At(table) => Err(Error::malformed(format!(
                "a table is at {table}, which is not a cluster offset after the header"
            ))
            .at(at)),
            Entry::Zero | Entry::Absent => {
                Err(Error::malformed(format!("entry {index} of the first table is no table")).at(at))
            }
        }
    }

    /// True if `file_offset` is that of a cluster after the header.
    pub(crate) fn is_cluster(&self, file_offset: u64) -> bool {
        file_offset.is_multiple_of(self.header.cluster_size) && file_offset >= self.header.header_len.max(1)
    }

    fn absent(&self) -> Origin {
        if self.backing.is_some() { Origin::Parent } else { Origin::Hole }
    }

    fn lookup(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let (span, cluster_size) = (self.header.l2_span(), self.header.cluster_size);
        let (l1_index, in_span) = (guest_offset / span, guest_offset % span);
        let max_tables = max_len.saturating_add(in_span).div_ceil(span);
        let (entry, equal) = self.entry(self.header.l1_offset, l1_index, max_tables)?;
        if entry == Entry::Absent {
            let len = equal.saturating_mul(span).saturating_sub(in_span).min(max_len);
            return Ok(Segment { len, origin: self.absent() });
        }
        let table = self.check_l2(entry, l1_index)?;
        let (index, within) = (in_span / cluster_size, in_span % cluster_size);
        let max_clusters = max_len.saturating_add(within).div_ceil(cluster_size);
        let (entry, equal) = self.entry(table, index, max_clusters)?;
        let (origin, clusters) = match entry {
            Entry::Absent => (self.absent(), equal),
            Entry::Zero => (Origin::Zero, equal),
            Entry::At(cluster) if !self.is_cluster(cluster) => {
                return Err(Error::malformed(format!(
                    "a cluster is at {cluster}, which is not a cluster offset after the header"
                ))
                .at(table + index * ENTRY_LEN));
            }
            Entry::At(cluster) => {
                let used = self.header.used_len(guest_offset / cluster_size);
                check_stored(&self.input, "cluster", cluster, used)?;
                (Origin::File { index: 0, file_offset: cluster + within }, 1)
            }
        };
        Ok(Segment { len: (clusters * cluster_size - within).min(max_len), origin })
    }
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        self.lookup(guest_offset, max_len).map_err(|error| {
            let start = guest_offset - guest_offset % self.header.cluster_size;
            let end = start + self.header.used_len(guest_offset / self.header.cluster_size);
            error.path(self.input.location()).device(DISK_NAME).guest(start..end)
        })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let span = self.header.l2_span();
        let index = guest_offset / span;
        let table = self.entry(self.header.l1_offset, index, 1);
        // All that a lost table maps is lost.
        let is_lost = table.and_then(|(entry, _)| self.check_l2(entry, index)).is_err();
        let unit = if is_lost { span } else { self.header.cluster_size };
        (unit - guest_offset % unit).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }
}

fn describe(image: &Image) -> ImageInfo {
    let header = &image.header;
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(0, DISK_NAME, header.virtual_size)],
        cluster_size: Some(header.cluster_size),
        ..ImageInfo::default()
    };
    if let Some(name) = &image.backing {
        let format = header.raw_backing.then(|| "raw".to_owned());
        info.top_fact("backing-filename", "backing file", name.clone());
        if let Some(format) = &format {
            info.top_fact("backing-filename-format", "backing file format", format.clone());
        }
        info.references.push(Reference { role: "backing file", name: name.clone(), format });
    }
    info.top_fact("dirty-flag", "dirty", header.needs_check);
    info.fact("table-size", "table size", header.table_len / header.cluster_size);
    if header.needs_check {
        info.notes
            .push("the image was not closed: clusters written last may be missing from its tables".into());
    }
    info
}
