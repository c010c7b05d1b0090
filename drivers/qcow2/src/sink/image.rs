//! New image: options, outputs and state.

use std::sync::{Mutex, MutexGuard, PoisonError};

use imgtool_toolkit::{CreateOptions, Error, Manifest, Output, Result};

use super::alloc::Allocator;
use super::base::Base;
use super::mapping_tables::MappingTables;
use crate::compressed::Encoder;
use crate::options::{Preallocation, SIZE_MULTIPLE, WriteOptions};

/// Rule for the place of guest data.
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
    /// In the data file, at the guest offsets. Every cluster has an L2 entry, so that the data file alone
    /// is the disk.
    ExternalRaw,
}

/// Sink that writes a new image.
pub struct Qcow2Sink {
    pub(super) options: WriteOptions,
    pub(super) output: Output,
    /// Output of the external data file.
    pub(super) data_output: Option<Output>,
    pub(super) placement: Placement,
    /// Backing file. `None` if the image has none, so that zeros need no L2 entry.
    pub(super) base: Option<Base>,
    pub(super) encoder: Option<Encoder>,
    /// Requested bytes of the disk, before rounding; `None` until the end of the source is known.
    pub(super) size: Mutex<Option<u64>>,
    /// Host offset of the L1 table; `None` if it follows the data.
    pub(super) l1_offset: Option<u64>,
    pub(super) state: Mutex<State>,
}

/// Structures that grow with each placed piece.
pub(super) struct State {
    pub(super) alloc: Allocator,
    pub(super) tables: MappingTables,
}

/// Locks a mutex, also after another thread panicked.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Rounds a disk size up to sectors, as the header stores it.
pub(super) fn round_up_size(size: u64) -> Result<u64> {
    size.checked_next_multiple_of(SIZE_MULTIPLE)
        .filter(|size| i64::try_from(*size).is_ok())
        .ok_or_else(|| Error::limit(format!("a disk of {size} bytes is too large; it must be below 2^63")))
}

impl Qcow2Sink {
    /// Creates the sink of a new image; writes nothing yet.
    pub fn create(output: Output, manifest: &Manifest, options: &CreateOptions) -> Result<Self> {
        let device = manifest.single("qcow2")?;
        let write_options = WriteOptions::parse(options)?;
        let shape = write_options.shape;
        let size = (!device.open_ended).then_some(device.size);
        if output.is_stream() {
            return Err(Error::unsupported("cannot write qcow2 to a stream")
                .path(output.path())
                .hint("write to a file, or choose a format that can be streamed (raw, vma)"));
        }
        let data_output = options.extras.outputs.get("data_file").cloned();
        if write_options.data_file.is_some() && data_output.is_none() {
            return Err(Error::usage("the option data_file needs an output for the data file"));
        }
        let mut alloc = Allocator::new(shape.cluster_bits, write_options.refcount_order);
        alloc.allocate(1)?;
        let mut l1_offset = None;
        if let Some(size) = size {
            let virtual_size = round_up_size(size)?;
            write_options.check_size(virtual_size)?;
            let clusters = (shape.l1_entries(virtual_size) * 8).div_ceil(shape.cluster_size());
            l1_offset = (clusters > 0).then(|| alloc.allocate(clusters)).transpose()?;
        }
        let placement = match (&write_options.data_file, write_options.preallocation, size) {
            (Some(_), Preallocation::Off, _) if !write_options.data_file_raw => Placement::External,
            (None, Preallocation::Off, _) => Placement::Packed,
            (_, _, None) => {
                return Err(Error::unsupported(
                    "preallocation and data_file_raw need a source whose size is known",
                ));
            }
            (Some(_), ..) => Placement::ExternalRaw,
            // `finish` allocates these clusters, when it can write their refcounts.
            (None, _, Some(_)) => Placement::Linear { data_start: alloc.end() },
        };
        let base =
            write_options.backing.as_ref().map(|_| Base::new(options.extras.base.clone())).transpose()?;
        let encoder = match write_options.compress {
            Some(level) => Some(Encoder::new(write_options.compression, level)?),
            None => None,
        };
        let state = State { alloc, tables: MappingTables::new(shape) };
        Ok(Self {
            options: write_options,
            output,
            data_output,
            placement,
            base,
            encoder,
            size: Mutex::new(size),
            l1_offset,
            state: Mutex::new(state),
        })
    }

    /// Output of guest data.
    pub(super) fn data_output(&self) -> &Output {
        self.data_output.as_ref().unwrap_or(&self.output)
    }

    /// Bytes of a cluster.
    pub(super) fn cluster_size(&self) -> u64 {
        self.options.shape.cluster_size()
    }

    /// True if every guest cluster has its host offset from the start.
    pub(super) fn is_linear(&self) -> bool {
        matches!(self.placement, Placement::Linear { .. } | Placement::ExternalRaw)
    }

    /// True if clusters are only stored whole.
    pub(super) fn stores_whole_clusters(&self) -> bool {
        self.encoder.is_some() || self.base.is_some()
    }
}
