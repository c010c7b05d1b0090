//! Prediction of the file size of a new image.

use imgtool_core::source::data_bytes;
use imgtool_core::{DeviceId, Error, ImageSource, Measure, RandomAccess, Result};

use crate::layout::bitmap::stored_len;
use crate::layout::entry::Shape;
use crate::options::{Preallocation, SIZE_MULTIPLE, WriteOptions};
use crate::refcounts::refcount_clusters;

/// Predicts the file size of an image of `source`, its size with every cluster allocated, and the space that
/// it occupies. The two sizes follow `qemu-img measure`, which assumes full tables and no gain from
/// compression.
pub fn measure(source: &dyn ImageSource, options: &WriteOptions) -> Result<Measure> {
    let device = source.info().single("a qcow2 image")?;
    let size = device.size.checked_next_multiple_of(SIZE_MULTIPLE);
    let Some(size) = size else { return Err(Error::limit("the disk is too large")) };
    options.check_size(size)?;
    let shape = options.shape;
    let cluster_size = shape.cluster_size();
    let too_large = || Error::limit("the disk is too large");
    let guest = size.checked_next_multiple_of(cluster_size).ok_or_else(too_large)?;
    let tables = tables_len(shape, guest, options.refcount_order);
    let fully_allocated = tables.checked_add(guest).ok_or_else(too_large)?;
    let random = source.access().random().ok_or_else(|| Error::unsupported("cannot measure a stream"))?;
    // With a backing image, this is an upper bound, because the contents are not compared.
    let data = match options.preallocation {
        _ if options.backing.is_some() || options.zero_unit.is_none() => guest,
        // Metadata preallocation makes the file longer, but its data clusters stay holes.
        Preallocation::Off | Preallocation::Metadata => {
            data_clusters(random, device.id, device.size, cluster_size)? * cluster_size
        }
        Preallocation::Falloc | Preallocation::Full => guest,
    };
    // Empty tables are not written, unless they are preallocated.
    let occupied = match options.preallocation {
        // Every cluster is stored. With compression, the size is unpredictable.
        _ if options.zero_unit.is_none() && options.compress.is_none() => fully_allocated,
        _ if options.backing.is_some() => 0,
        Preallocation::Off => data_bytes(source, device)?,
        Preallocation::Metadata => tables,
        Preallocation::Falloc | Preallocation::Full => fully_allocated,
    };
    let bitmaps = source.bitmaps().filter(|_| options.version >= 3).map(|bitmaps| {
        stored_len(bitmaps.iter().filter(|bitmap| bitmap.fault.is_none()), size, cluster_size)
    });
    // The header with all key slots; only the first is stored.
    let header =
        options.encryption.map_or(0, |volume| volume.payload_offset().next_multiple_of(cluster_size));
    Ok(Measure {
        required: tables.saturating_add(data).saturating_add(header),
        fully_allocated: fully_allocated.saturating_add(header),
        bitmaps,
        occupied,
    })
}

/// Returns the size in bytes of the header and the L1, L2 and refcount structures of a fully allocated disk
/// of `guest` bytes.
fn tables_len(shape: Shape, guest: u64, refcount_order: u32) -> u64 {
    let cluster_size = shape.cluster_size();
    let l2_tables = shape.l1_entries(guest);
    let l1_clusters = (l2_tables * 8).div_ceil(cluster_size);
    let counted = 1 + l2_tables + l1_clusters + guest / cluster_size;
    let entries = (cluster_size * 8) >> refcount_order;
    let (blocks, table) = refcount_clusters(counted, entries, cluster_size);
    (1 + l2_tables + l1_clusters + blocks + table) * cluster_size
}

/// Returns the number of clusters that contain data.
fn data_clusters(random: &dyn RandomAccess, device: DeviceId, size: u64, cluster_size: u64) -> Result<u64> {
    let mut clusters = 0;
    let mut next_cluster = 0;
    let mut position = 0;
    while position < size {
        for extent in random.map(device, position..size)? {
            position = extent.end();
            if extent.data && !extent.zero {
                let first = (extent.start / cluster_size).max(next_cluster);
                let end = position.div_ceil(cluster_size);
                clusters += end.saturating_sub(first);
                next_cluster = next_cluster.max(end);
            }
        }
    }
    Ok(clusters)
}
