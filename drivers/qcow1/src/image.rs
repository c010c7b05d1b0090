//! Opening and reading an image.

use std::sync::Arc;

use imgtool_core::decoded::DecodedUnits;
use imgtool_core::layered::{LayeredSource, Origin, Segment, SegmentMap, StoredBytes, check_stored};
use imgtool_core::table::PagedTable;
use imgtool_core::unit_check::SharedTables;
use imgtool_core::{
    Device, Disk, Error, ImageInfo, ImageSource, Input, Memory, OpenOptions, RandomInput, Reference, Result,
};
use imgtool_crypt::{LEGACY_NOTE, SectorCipher, in_sectors};

use crate::inflate::inflate;
use crate::layout::{ENTRY_LEN, Entry, HEADER_LEN, Header, SECTOR_SIZE};

/// The name of an image's only device.
const DISK_NAME: &str = "disk";

/// Memory in bytes of a decoder besides its buffers. Measured for the decoders of deflate: 11 and 48 KiB.
const DECODER_MEMORY: u64 = 64 << 10;

/// An open image, without its backing file.
pub(crate) struct Image {
    pub(crate) input: RandomInput,
    pub(crate) header: Header,
    /// Name of the backing file.
    backing: Option<String>,
    /// The whole file as a table: the tables of the image are at multiples of an entry's width.
    pub(crate) entries: PagedTable,
    decoded: DecodedUnits,
    /// Cipher of the clusters that are not compressed; `None` if they are not encrypted, or if the caller reads
    /// no content.
    cipher: Option<SectorCipher>,
}

/// Opens an image and, unless only information is needed, its backing file.
///
/// # Errors
/// `Refused` for an encrypted image without exactly one passphrase, if its content is needed.
pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
    let mut image = Image::open(input, options.externals.depth(), &options.memory)?;
    if image.header.encrypted && !options.info_only && !options.layout_only {
        let cipher = SectorCipher::legacy_aes(&options.secrets);
        image.cipher = Some(cipher.map_err(|e| e.path(image.input.location()).at(36))?);
    }
    let location = image.input.location();
    let parent = match image.backing.as_deref().filter(|_| !options.info_only) {
        Some(name) => {
            let backing = options.externals.open_image("backing file", name, location, None, options)?;
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
        // At most 2^48 entries.
        check_stored(&input, "first table", header.l1_offset, header.l1_entries() * ENTRY_LEN)
            .map_err(|e| e.path(input.location()))?;
        let entries = PagedTable::new(input.clone(), 0, input.len(), depth, memory)?;
        let decoded = DecodedUnits::new(header.cluster_size(), depth, memory)?;
        let image = Self { input, header, backing, entries, decoded, cipher: None };
        let header = &image.header;
        let first = header.l1_offset / ENTRY_LEN;
        let tables = first..first + header.l1_entries();
        let offset = |entry| Some(u64::from_be_bytes(entry)).filter(|table| *table != 0);
        SharedTables::check::<8>(&image.entries, tables, header.l2_len(), memory, offset)
            .map_err(|e| e.path(image.input.location()))?;
        Ok(image)
    }

    /// Returns the bytes of the entry `index` of the table at `table_offset`, and the number of equal entries
    /// from there on, at most `max`.
    pub(crate) fn entry(&self, table_offset: u64, index: u64, max: u64) -> Result<([u8; 8], u64)> {
        self.entries.run::<8>(table_offset / ENTRY_LEN + index, max)
    }

    /// Checks the place of a table of the second level, which the entry `index` of the first refers to.
    pub(crate) fn check_l2(&self, table: u64, index: u64) -> Result<()> {
        if !table.is_multiple_of(ENTRY_LEN) || table < HEADER_LEN {
            return Err(Error::malformed(format!(
                "a table is at {table}, not at a multiple of {ENTRY_LEN} after the header"
            ))
            .at(self.header.l1_offset + index * ENTRY_LEN));
        }
        check_stored(&self.input, "table", table, self.header.l2_len())
    }

    /// Checks the place of a cluster that is stored as it is, of which the disk uses `used` bytes.
    fn check_cluster(&self, cluster: u64, used: u64) -> Result<()> {
        if !is_cluster(cluster) {
            return Err(Error::malformed(format!(
                "a cluster is at {cluster}, not a sector offset after the header"
            )));
        }
        check_stored(&self.input, "cluster", cluster, used)
    }

    fn absent(&self) -> Origin {
        if self.backing.is_some() { Origin::Parent } else { Origin::Hole }
    }

    /// Looks up the cluster at `guest_offset`, and absent clusters up to `max_len` bytes from there. Returns
    /// the entry, and the number of bytes that have it.
    fn lookup(&self, guest_offset: u64, max_len: u64) -> Result<(Entry, u64)> {
        let (span, cluster_size) = (self.header.l2_span(), self.header.cluster_size());
        let (l1_index, in_span) = (guest_offset / span, guest_offset % span);
        let max_tables = max_len.saturating_add(in_span).div_ceil(span);
        let (bytes, equal) = self.entry(self.header.l1_offset, l1_index, max_tables)?;
        let table = u64::from_be_bytes(bytes);
        if table == 0 {
            return Ok((Entry::Absent, equal.saturating_mul(span).saturating_sub(in_span).min(max_len)));
        }
        self.check_l2(table, l1_index)?;
        let (index, within) = (in_span / cluster_size, in_span % cluster_size);
        let max_clusters = max_len.saturating_add(within).div_ceil(cluster_size);
        let max_clusters = max_clusters.min(self.header.l2_entries() - index);
        let (bytes, equal) = self.entry(table, index, max_clusters)?;
        let entry = self.header.entry(bytes);
        let clusters = if entry == Entry::Absent { equal } else { 1 };
        Ok((entry, (clusters * cluster_size - within).min(max_len)))
    }

    fn place(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let (entry, len) = self.lookup(guest_offset, max_len)?;
        let origin = match entry {
            Entry::Absent => self.absent(),
            Entry::Compressed { .. } => Origin::Encoded,
            Entry::Stored(cluster) => {
                let cluster_size = self.header.cluster_size();
                self.check_cluster(cluster, self.header.used_len(guest_offset / cluster_size))?;
                if self.header.encrypted {
                    return Ok(Segment { len, origin: Origin::Encrypted });
                }
                Origin::File { index: 0, file_offset: cluster + guest_offset % cluster_size }
            }
        };
        Ok(Segment { len, origin })
    }

    /// Adds the place of the cluster at `guest_offset` to an error.
    fn in_cluster(&self, error: Error, guest_offset: u64) -> Error {
        let cluster_size = self.header.cluster_size();
        let start = guest_offset - guest_offset % cluster_size;
        let end = start + self.header.used_len(guest_offset / cluster_size);
        error.path(self.input.location()).device(DISK_NAME).guest(start..end)
    }

    /// Fills `buf` with the guest's bytes from `guest_offset` on, within the encrypted cluster at the file
    /// offset `cluster`.
    fn decrypt(&self, cluster: u64, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let cipher =
            self.cipher.as_ref().ok_or_else(|| Error::usage("the image was opened without its content"))?;
        in_sectors(buf, guest_offset, |sectors, guest| {
            // The sum was checked with the place of the cluster.
            let position = cluster + guest % self.header.cluster_size();
            cipher.read(&self.input, sectors, position, guest / SECTOR_SIZE, None)
        })
    }

    /// Decodes a compressed cluster into `cluster`.
    fn decode(&self, file_offset: u64, len: u64, cluster: &mut [u8]) -> Result<()> {
        check_stored(&self.input, "compressed cluster", file_offset, len)?;
        // Less than a cluster, so it fits.
        let stored = self.input.read_vec(file_offset, len as usize)?;
        inflate(&stored, cluster).map_err(|why| {
            Error::corrupt(format!("cannot decode a compressed cluster: {why}")).at(file_offset)
        })
    }
}

/// True if `file_offset` may be that of a cluster: that of a sector after the header.
pub(crate) fn is_cluster(file_offset: u64) -> bool {
    file_offset.is_multiple_of(SECTOR_SIZE) && file_offset >= HEADER_LEN
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        self.place(guest_offset, max_len).map_err(|error| self.in_cluster(error, guest_offset))
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let span = self.header.l2_span();
        let index = guest_offset / span;
        let table = self.entry(self.header.l1_offset, index, 1).map(|(bytes, _)| u64::from_be_bytes(bytes));
        // All that a lost table maps is lost.
        let is_lost = table.and_then(|table| self.check_l2(table, index)).is_err();
        let unit = if is_lost { span } else { self.header.cluster_size() };
        (unit - guest_offset % unit).min(max_len)
    }

    fn file(&self, _index: usize) -> &dyn StoredBytes {
        &self.input
    }

    fn read_encoded(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let mut read = || match self.lookup(guest_offset, 1)?.0 {
            Entry::Compressed { file_offset, len } => {
                let within = guest_offset % cluster_size;
                self.decoded.read(guest_offset / cluster_size, cluster_size, buf, within, |cluster| {
                    self.decode(file_offset, len, cluster)
                })
            }
            Entry::Stored(cluster) if self.header.encrypted => self.decrypt(cluster, buf, guest_offset),
            Entry::Absent | Entry::Stored(_) => Err(Error::corrupt("the file changed while it was read")),
        };
        read().map_err(|error| self.in_cluster(error, guest_offset))
    }

    fn read_granule(&self) -> u64 {
        self.header.cluster_size().max(self.input.granule())
    }

    fn reader_memory(&self) -> u64 {
        // The compressed bytes are fewer than those of a cluster.
        self.decoded.reader_memory() + self.header.cluster_size() + DECODER_MEMORY
    }
}

fn describe(image: &Image) -> ImageInfo {
    let header = &image.header;
    let mut info = ImageInfo {
        format: crate::FORMAT,
        devices: vec![Device::disk(0, DISK_NAME, header.virtual_size)],
        cluster_size: Some(header.cluster_size()),
        ..ImageInfo::default()
    };
    if let Some(name) = &image.backing {
        info.top_fact("backing-filename", "backing file", name.clone());
        info.references.push(Reference { role: "backing file", name: name.clone(), format: None });
    }
    if header.encrypted {
        info.top_fact("encrypted", "encrypted", true);
        info.notes.push(LEGACY_NOTE.to_owned());
    }
    if !header.virtual_size.is_multiple_of(SECTOR_SIZE) {
        info.notes.push(format!("the virtual size is no multiple of a sector of {SECTOR_SIZE} bytes"));
    }
    info
}
