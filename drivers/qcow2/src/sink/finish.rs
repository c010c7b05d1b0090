//! Finishing a new image: writing the tables, the refcounts and, last, the header.

use imgtool_core::sync::lock;
use imgtool_core::{Error, OutputId, Result};
use zerocopy::IntoBytes;

use super::alloc::{Allocator, RefcountTable};
use super::encrypted::Encrypted;
use super::image::{Placement, Qcow2Sink, State, round_up_size};
use crate::layout::entry::{L1Entry, L2Entry, Subclusters};
use crate::layout::extension::{BitmapsExtension, Extensions};
use crate::layout::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, CRYPT_LUKS, CompressionType,
    INCOMPATIBLE_COMPRESSION_TYPE, INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, MAGIC, RawHeader,
    V2_HEADER_LEN, V3_HEADER_LEN, known_feature_names,
};
use crate::layout::table::{encode_table, write_table};

/// Length in bytes at which a batch of generated tables is written. Our choice.
const WRITE_LEN: usize = 1 << 20;

impl Qcow2Sink {
    /// Writes all structures, the header last, so that an incomplete image has no header.
    pub(super) fn write_tables(&self) -> Result<()> {
        let Some(size) = *lock(&self.size) else {
            return Err(Error::usage("the disk size was never set"));
        };
        let virtual_size = round_up_size(size)?;
        let mut state = lock(&self.state);
        let State { alloc, tables } = &mut *state;
        let l1 = match self.placement {
            Placement::Packed | Placement::External => tables.finish(virtual_size, alloc, self.output())?,
            Placement::Linear { data_start } => self.write_linear_tables(virtual_size, data_start, alloc)?,
            Placement::ExternalRaw => self.write_linear_tables(virtual_size, 0, alloc)?,
        };
        let l1_entries = l1.len();
        let l1_clusters = (l1_entries as u64 * 8).div_ceil(self.cluster_size());
        // As in QEMU's images, the refcounts come first if nothing else does.
        let is_blank = alloc.end() == self.cluster_size() && self.bitmaps.is_empty();
        let (first_refcounts, l1_offset) = match self.l1_offset {
            Some(offset) => (None, offset),
            // A disk of 0 bytes has no L1 table.
            None if l1_entries == 0 => (None, 0),
            None if is_blank => {
                let (table, offset) = alloc.finish_before(self.output(), l1_clusters)?;
                (Some(table), offset)
            }
            None => (None, alloc.allocate(l1_clusters)?),
        };
        self.write_l1(&l1, l1_offset)?;
        drop(l1);
        let bitmaps = self.write_bitmaps(virtual_size, alloc)?;
        let refcount_table = first_refcounts.map_or_else(|| alloc.finish(self.output()), Ok)?;
        if self.data_id != OutputId::MAIN {
            self.data_output().set_len(virtual_size)?;
        }
        self.output().set_len(alloc.end())?;
        self.encryption.as_ref().map_or(Ok(()), |encryption| encryption.write_header(self.output()))?;
        let l1_entries = l1_entries as u64;
        let places = Places { virtual_size, l1_offset, l1_entries, refcount_table, bitmaps };
        let header = self.header(&places)?;
        self.output().write_at(&header, 0)
    }

    /// Writes the L1 table, filled up to whole clusters.
    fn write_l1(&self, l1: &[u64], l1_offset: u64) -> Result<()> {
        let mut bytes = Vec::new();
        encode_table(l1, &mut bytes);
        bytes.resize(bytes.len().next_multiple_of(self.cluster_size() as usize), 0);
        write_table(self.output(), &bytes, l1_offset)
    }

    /// Writes L2 tables that map each guest cluster to `data_start` plus its guest offset. Over a backing
    /// image, no subcluster is allocated: the guest sees that image. Returns the L1 table.
    fn write_linear_tables(
        &self,
        virtual_size: u64,
        data_start: u64,
        alloc: &mut Allocator,
    ) -> Result<Vec<u64>> {
        let shape = self.options.shape;
        let tables = shape.l1_entries(virtual_size);
        let clusters = virtual_size.div_ceil(shape.cluster_size());
        let subclusters = if self.base.is_some() { Subclusters(0) } else { Subclusters::ALL_ALLOCATED };
        if matches!(self.placement, Placement::Linear { .. }) {
            alloc.allocate_run(clusters, self.output())?;
        }
        let first_table = alloc.allocate(tables)?;
        let mut l1 = Vec::new();
        let mut batch = Vec::new();
        let mut batch_offset = first_table;
        for table in 0..tables {
            let offset = first_table + (table << shape.cluster_bits);
            l1.push(L1Entry::new(offset).0);
            let first = table << shape.l2_bits();
            let end = (first + shape.l2_entries()).min(clusters);
            let filled = batch.len();
            for cluster in first..end {
                let entry = L2Entry::data(data_start + (cluster << shape.cluster_bits));
                batch.extend_from_slice(&entry.0.to_be_bytes());
                if shape.extended_l2 {
                    batch.extend_from_slice(&subclusters.0.to_be_bytes());
                }
            }
            batch.resize(filled + shape.cluster_size() as usize, 0);
            if batch.len() >= WRITE_LEN {
                write_table(self.output(), &batch, batch_offset)?;
                batch_offset += batch.len() as u64;
                batch.clear();
                alloc.write_finished_blocks(self.output())?;
            }
        }
        write_table(self.output(), &batch, batch_offset)?;
        Ok(l1)
    }

    /// Encodes the first cluster: header, extensions and the backing file's name.
    fn header(&self, places: &Places) -> Result<Vec<u8>> {
        let header_len = self.header_len();
        let name = self.backing_name();
        let extensions = self.extensions(places, header_len as usize + name.len())?;
        let name_offset = if name.is_empty() { 0 } else { u64::from(header_len) + extensions.len() as u64 };
        let raw = self.raw_header(places, name_offset);
        let mut bytes = raw.as_bytes()[..header_len as usize].to_vec();
        bytes.extend_from_slice(&extensions);
        bytes.extend_from_slice(name.as_bytes());
        if self.output().needs_zeros() {
            // A cluster has at most 2 MiB.
            bytes.resize(self.options.shape.cluster_size() as usize, 0);
        }
        Ok(bytes)
    }

    /// Returns the length in bytes of the header for the image's version.
    fn header_len(&self) -> u32 {
        if self.options.version >= 3 { V3_HEADER_LEN } else { V2_HEADER_LEN }
    }

    /// Returns the name of the backing file, or an empty string if there is none.
    fn backing_name(&self) -> &str {
        self.options.backing.as_ref().map_or("", |backing| backing.name.as_str())
    }

    /// Encodes the header extensions, which share the first cluster with `taken` other bytes.
    fn extensions(&self, places: &Places, taken: usize) -> Result<Vec<u8>> {
        let options = &self.options;
        let extensions = Extensions {
            backing_format: options.backing.as_ref().map(|backing| backing.format.clone()),
            data_file: options.data_file.clone(),
            bitmaps: places.bitmaps,
            crypto_header: self.encryption.as_ref().map(Encrypted::place),
            feature_names: if options.version >= 3 { known_feature_names() } else { Vec::new() },
        };
        // A cluster has at most 2 MiB.
        let cluster_size = options.shape.cluster_size() as usize;
        let max_len = cluster_size.saturating_sub(taken);
        let extensions = extensions.encode(max_len);
        if extensions.len() > max_len {
            return Err(Error::limit(format!(
                "the names of the backing file and the data file do not fit into a header of {cluster_size} bytes"
            ))
            .hint("use a larger cluster_size or shorter names"));
        }
        Ok(extensions)
    }

    /// Fills the fields of the header. `name_offset` is the host offset of the backing file's name, or 0 if
    /// there is none.
    fn raw_header(&self, places: &Places, name_offset: u64) -> RawHeader {
        let options = &self.options;
        RawHeader {
            magic: MAGIC,
            version: options.version.into(),
            backing_file_offset: name_offset.into(),
            // The name has at most 1023 bytes.
            backing_file_size: (self.backing_name().len() as u32).into(),
            cluster_bits: options.shape.cluster_bits.into(),
            size: places.virtual_size.into(),
            crypt_method: if self.encryption.is_some() { CRYPT_LUKS } else { 0 }.into(),
            // This and `refcount_table_clusters` are within QEMU's limits, which are far below 2^32.
            l1_size: (places.l1_entries as u32).into(),
            l1_table_offset: places.l1_offset.into(),
            refcount_table_offset: places.refcount_table.offset.into(),
            refcount_table_clusters: (places.refcount_table.clusters as u32).into(),
            nb_snapshots: 0.into(),
            snapshots_offset: 0.into(),
            incompatible_features: self.incompatible_features().into(),
            compatible_features: value_if(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS).into(),
            autoclear_features: (value_if(options.data_file_raw, AUTOCLEAR_DATA_FILE_RAW)
                | value_if(places.bitmaps.is_some(), AUTOCLEAR_BITMAPS))
            .into(),
            refcount_order: options.refcount_order.into(),
            header_length: self.header_len().into(),
            compression_type: u8::from(options.compression == CompressionType::Zstd),
            padding: [0; 7],
        }
    }

    /// Returns the feature bits that a program must know to read the image.
    fn incompatible_features(&self) -> u64 {
        let options = &self.options;
        value_if(options.data_file.is_some(), INCOMPATIBLE_DATA_FILE)
            | value_if(options.compression == CompressionType::Zstd, INCOMPATIBLE_COMPRESSION_TYPE)
            | value_if(options.shape.extended_l2, INCOMPATIBLE_EXTENDED_L2)
    }
}

/// Virtual size, and locations of the tables and of the bitmap directory, for the header.
struct Places {
    virtual_size: u64,
    l1_offset: u64,
    l1_entries: u64,
    refcount_table: RefcountTable,
    bitmaps: Option<BitmapsExtension>,
}

/// Returns `value` if `on`, otherwise 0.
fn value_if(on: bool, value: u64) -> u64 {
    if on { value } else { 0 }
}
