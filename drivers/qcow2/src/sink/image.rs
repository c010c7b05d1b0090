//! Sink type, with the options, outputs and state of a new image.

use std::sync::{Arc, Mutex};

use imgtool_core::{Bitmap, Error, Manifest, Output, OutputFactory, OutputId, Result, TableMemory};

use super::alloc::Allocator;
use super::base::Base;
use super::encrypted::Encrypted;
use super::mapping_tables::MappingTables;
use super::{memory, no_content_over_base};
use crate::compressed::Encoder;
use crate::layout::FORMAT;
use crate::options::{Preallocation, SIZE_MULTIPLE, WriteOptions};

/// ID of the output for the external data file.
const DATA_FILE: OutputId = OutputId(1);

/// Rule for the location of guest data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placement {
    /// In the image, in clusters allocated on demand.
    Packed,
    /// In the image, all guest clusters in order.
    Linear {
        /// Host offset of the first guest cluster.
        data_start: u64,
    },
    /// In the data file, at the guest offsets. Clusters without data have no L2 entry.
    External,
    /// In the data file, at the guest offsets. Every cluster has an L2 entry, so the data file by itself is a
    /// raw image of the disk.
    ExternalRaw,
}

/// Sink that writes a new image.
pub struct Qcow2Sink {
    pub(super) options: WriteOptions,
    /// Outputs of the image and, if it has one, of its external data file.
    pub(super) outputs: Vec<Output>,
    /// ID of the output for guest data.
    pub(super) data_id: OutputId,
    pub(super) placement: Placement,
    /// Backing image; `None` if there is none. Zeros then need no L2 entry.
    pub(super) base: Option<Base>,
    /// Persistent bitmaps of the image.
    pub(super) bitmaps: Vec<Bitmap>,
    pub(super) encoder: Option<Arc<Encoder>>,
    /// Encryption of the data clusters, if any.
    pub(super) encryption: Option<Encrypted>,
    /// Requested size in bytes of the disk, before rounding; `None` until the end of the source is known.
    pub(super) size: Mutex<Option<u64>>,
    /// Host offset of the L1 table; `None` if `finish` allocates it or the disk is empty.
    pub(super) l1_offset: Option<u64>,
    pub(super) state: Mutex<State>,
}

/// Structures that grow with each placed piece.
pub(super) struct State {
    pub(super) alloc: Allocator,
    pub(super) tables: MappingTables,
}

/// Rounds a disk size in bytes up to a multiple of [`SIZE_MULTIPLE`].
pub(super) fn round_up_size(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(SIZE_MULTIPLE)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::limit(format!("a disk of {size} bytes is too large; it must be below 2^63")))
}

impl Qcow2Sink {
    /// Creates the sink of a new image with its outputs, which compresses with `encoder`; writes nothing yet.
    pub fn create(
        factory: &mut dyn OutputFactory,
        manifest: &Manifest,
        options: &WriteOptions,
        encoder: Option<Arc<Encoder>>,
    ) -> Result<Self> {
        let options = options.clone();
        let device = manifest.single(FORMAT)?;
        let shape = options.shape;
        let size = (!device.open_ended).then_some(device.size);
        let division = memory::divide(&options, size, manifest.tables);
        let alloc = Allocator::new(shape.cluster_bits, options.refcount_order);
        let mut alloc = alloc.with_batch(division.batch);
        alloc.allocate(1)?;
        let encryption = Encrypted::create(&options, &mut alloc)?;
        let virtual_size = size.map(round_up_size).transpose()?;
        virtual_size.map_or(Ok(()), |size| options.check_size(size))?;
        let mut l1_offset = None;
        let mut allocate_l1 = |virtual_size| {
            let clusters = (shape.l1_entries(virtual_size) * 8).div_ceil(shape.cluster_size());
            l1_offset = (clusters > 0).then(|| alloc.allocate(clusters)).transpose()?;
            Ok::<u64, Error>(alloc.end())
        };
        if options.preallocation != Preallocation::Off && manifest.base.is_some() {
            return Err(no_content_over_base());
        }
        let placement = match (&options.data_file, options.preallocation, virtual_size) {
            (Some(_), Preallocation::Off, _) if !options.data_file_raw => Placement::External,
            (None, Preallocation::Off, _) => Placement::Packed,
            (_, _, None) => {
                return Err(Error::unsupported(
                    "preallocation and data_file_raw need a source whose size is known",
                ));
            }
            (Some(_), _, Some(size)) => {
                allocate_l1(size)?;
                Placement::ExternalRaw
            }
            // `finish` allocates these clusters, because only then can it write their refcounts.
            (None, _, Some(size)) => Placement::Linear { data_start: allocate_l1(size)? },
        };
        let mut outputs = vec![main_output(factory)?];
        if let Some(name) = &options.data_file {
            outputs.push(factory.beside(name)?);
        }
        let data_id = if options.data_file.is_some() { DATA_FILE } else { OutputId::MAIN };
        let base = options.backing.as_ref().map(|_| Base(manifest.base.clone()));
        let state = State { alloc, tables: MappingTables::new(shape, division.open_tables) };
        Ok(Self {
            options,
            outputs,
            data_id,
            placement,
            base,
            bitmaps: manifest.bitmaps.clone(),
            encoder,
            encryption,
            size: Mutex::new(size),
            l1_offset,
            state: Mutex::new(state),
        })
    }

    /// Returns the output of the image.
    pub(super) fn output(&self) -> &Output {
        &self.outputs[OutputId::MAIN.index()]
    }

    /// Returns the output for guest data.
    pub(super) fn data_output(&self) -> &Output {
        &self.outputs[self.data_id.index()]
    }

    /// Returns the size in bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        self.options.shape.cluster_size()
    }

    /// True if every guest cluster has its host offset from the start.
    pub(super) fn is_linear(&self) -> bool {
        matches!(self.placement, Placement::Linear { .. } | Placement::ExternalRaw)
    }

    /// True if the sink stores only whole clusters.
    pub(super) fn stores_whole_clusters(&self) -> bool {
        self.encoder.is_some() || self.base.is_some() || self.encryption.is_some()
    }
}

/// Returns the memory for the tables of a new image.
pub fn table_memory(manifest: &Manifest, options: &WriteOptions) -> TableMemory {
    let Ok(device) = manifest.single(FORMAT) else { return TableMemory::default() };
    let size = (!device.open_ended).then_some(device.size);
    let is_linear = options.preallocation != Preallocation::Off || options.data_file_raw;
    memory::table_memory(options, size, is_linear)
}

/// Creates the output of the image. Refuses a stream, because the sink writes at any offset.
fn main_output(factory: &mut dyn OutputFactory) -> Result<Output> {
    let output = factory.main()?;
    if output.is_stream() {
        return Err(Error::unsupported("cannot write qcow2 to a stream")
            .path(output.location())
            .hint("write to a file, or choose a format that can be streamed (raw, vma)"));
    }
    Ok(output)
}
