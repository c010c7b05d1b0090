//! End of a new image: tables, refcounts, and the header last.

use imgtool_toolkit::{Error, Result};
use zerocopy::IntoBytes;

use super::alloc::{Allocator, RefcountTable};
use super::image::{Placement, Qcow2Sink, State, lock, round_up_size};
use crate::layout::entry::{L1Entry, L2Entry, Subclusters};
use crate::layout::extension::Extensions;
use crate::layout::header::{
    AUTOCLEAR_DATA_FILE_RAW, COMPATIBLE_LAZY_REFCOUNTS, CompressionType, INCOMPATIBLE_COMPRESSION_TYPE,
    INCOMPATIBLE_DATA_FILE, INCOMPATIBLE_EXTENDED_L2, MAGIC, RawHeader, V2_HEADER_LEN, V3_HEADER_LEN,
    known_feature_names,
};
use crate::layout::table::{encode_table, write_table};

/// Bytes of generated tables in one write. Our choice.
const WRITE_LEN: usize = 1 << 20;

impl Qcow2Sink {
    /// Writes all structures. The header comes last, so that an incomplete image has none.
    pub(super) fn write_tables(&self) -> Result<()> {
        let Some(size) = *lock(&self.size) else {
            return Err(Error::usage("the disk size was never set"));
        };
        let virtual_size = round_up_size(size)?;
        let mut state = lock(&self.state);
        let State { alloc, tables } = &mut *state;
        let l1 = match self.placement {
            Placement::Packed | Placement::External => tables.finish(virtual_size, alloc, &self.output)?,
            Placement::Linear { data_start } => self.write_linear_tables(virtual_size, data_start, alloc)?,
            Placement::ExternalRaw => self.write_linear_tables(virtual_size, 0, alloc)?,
        };
        let shape = self.options.shape;
        let l1_entries = l1.len();
        let l1_offset = match self.l1_offset {
            Some(offset) => offset,
            // A disk of 0 bytes has no L1 table.
            None if l1_entries == 0 => 0,
            None => {
                let clusters = (l1_entries as u64 * 8).div_ceil(shape.cluster_size());
                alloc.allocate(clusters)?
            }
        };
        let mut bytes = Vec::new();
        encode_table(&l1, &mut bytes);
        bytes.resize(bytes.len().next_multiple_of(shape.cluster_size() as usize), 0);
        write_table(&self.output, &bytes, l1_offset)?;
        drop(bytes);
        let refcount_table = alloc.finish(&self.output)?;
        if let Some(data) = &self.data_output {
            data.set_len(virtual_size)?;
        }
        self.output.set_len(alloc.end())?;
        let header = self.header(virtual_size, l1_offset, l1_entries as u64, refcount_table)?;
        self.output.write_at(&header, 0)
    }

    /// Writes L2 tables in which every guest cluster has a host offset, `data_start` plus its guest
    /// offset. Returns their L1 table.
    fn write_linear_tables(
        &self,
        virtual_size: u64,
        data_start: u64,
        alloc: &mut Allocator,
    ) -> Result<Vec<u64>> {
        let shape = self.options.shape;
        let tables = shape.l1_entries(virtual_size);
        let clusters = virtual_size.div_ceil(shape.cluster_size());
        if matches!(self.placement, Placement::Linear { .. }) {
            alloc.allocate_run(clusters, &self.output)?;
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
                    batch.extend_from_slice(&Subclusters::ALL_ALLOCATED.0.to_be_bytes());
                }
            }
            batch.resize(filled + shape.cluster_size() as usize, 0);
            if batch.len() >= WRITE_LEN {
                write_table(&self.output, &batch, batch_offset)?;
                batch_offset += batch.len() as u64;
                batch.clear();
                alloc.write_finished_blocks(&self.output)?;
            }
        }
        write_table(&self.output, &batch, batch_offset)?;
        Ok(l1)
    }

    /// Encodes the first cluster: header, extensions and the backing file's name.
    fn header(
        &self,
        virtual_size: u64,
        l1_offset: u64,
        l1_entries: u64,
        refcount_table: RefcountTable,
    ) -> Result<Vec<u8>> {
        let options = &self.options;
        let shape = options.shape;
        let v3 = options.version >= 3;
        let header_len = if v3 { V3_HEADER_LEN } else { V2_HEADER_LEN };
        let name = options.backing.as_ref().map_or("", |backing| backing.name.as_str());
        let extensions = Extensions {
            backing_format: options.backing.as_ref().map(|backing| backing.format.clone()),
            data_file: options.data_file.clone(),
            feature_names: if v3 { known_feature_names() } else { Vec::new() },
            ..Extensions::default()
        };
        // At most 2 MiB.
        let cluster_size = shape.cluster_size() as usize;
        let max_len = cluster_size.saturating_sub(header_len as usize + name.len());
        let extensions = extensions.encode(max_len);
        if extensions.len() > max_len {
            return Err(Error::limit(format!(
                "the names of the backing file and the data file do not fit into a header of {cluster_size} bytes"
            ))
            .hint("use a larger cluster_size or shorter names"));
        }
        let value_if = |on: bool, value: u64| if on { value } else { 0 };
        let zstd = options.compression == CompressionType::Zstd;
        let raw = RawHeader {
            magic: MAGIC,
            version: options.version.into(),
            backing_file_offset: value_if(!name.is_empty(), u64::from(header_len) + extensions.len() as u64)
                .into(),
            // At most 1023.
            backing_file_size: (name.len() as u32).into(),
            cluster_bits: shape.cluster_bits.into(),
            size: virtual_size.into(),
            crypt_method: 0.into(),
            // Both within QEMU's limits, which are far below 2^32.
            l1_size: (l1_entries as u32).into(),
            l1_table_offset: l1_offset.into(),
            refcount_table_offset: refcount_table.offset.into(),
            refcount_table_clusters: (refcount_table.clusters as u32).into(),
            nb_snapshots: 0.into(),
            snapshots_offset: 0.into(),
            incompatible_features: (value_if(options.data_file.is_some(), INCOMPATIBLE_DATA_FILE)
                | value_if(zstd, INCOMPATIBLE_COMPRESSION_TYPE)
                | value_if(shape.extended_l2, INCOMPATIBLE_EXTENDED_L2))
            .into(),
            compatible_features: value_if(options.lazy_refcounts, COMPATIBLE_LAZY_REFCOUNTS).into(),
            autoclear_features: value_if(options.data_file_raw, AUTOCLEAR_DATA_FILE_RAW).into(),
            refcount_order: options.refcount_order.into(),
            header_length: header_len.into(),
            compression_type: u8::from(zstd),
            padding: [0; 7],
        };
        let mut bytes = raw.as_bytes()[..header_len as usize].to_vec();
        bytes.extend_from_slice(&extensions);
        bytes.extend_from_slice(name.as_bytes());
        if self.output.needs_zeros() {
            bytes.resize(cluster_size, 0);
        }
        Ok(bytes)
    }
}
