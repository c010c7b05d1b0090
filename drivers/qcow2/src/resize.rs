//! Change of an image's virtual size.
//!
//! One write of the header switches the size, and the L1 table if it has moved. What the old header alone refers
//! to is released after it.

use std::sync::Arc;

use imgtool_core::{Disk, Error, OpenOptions, Output, Remedy, Resize, Result, zero};

use crate::layout::entry::L2Entry;
use crate::layout::header::{AUTOCLEAR_BITMAPS, Header, INCOMPATIBLE_DATA_FILE};
use crate::layout::table::encode_table;
use crate::layout::{MAX_L1_BYTES, bitmap};
use crate::options::SIZE_MULTIPLE;
use crate::source::Qcow2Source;
use crate::update::refcounts::{Clusters, RefcountEditor};
use crate::update::tables::ShadowTables;
use crate::update::{check_changeable, check_intact};

/// File offset of the field "size", which crypt_method, l1_size and l1_table_offset follow. Specification, "Header".
const SIZE_FIELD: u64 = 24;

/// Length in bytes of a read that looks for data in the part that is cut off. Our choice.
const READ_LEN: u64 = 1 << 20;

/// Sets the virtual size of the image in `output` to `resize.size` bytes, rounded up to whole sectors.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if data would be cut off without permission, or if the image has parts that
/// a new size would make wrong; nothing has been written then.
pub fn resize(output: &Output, resize: Resize, options: &OpenOptions) -> Result<()> {
    let header = Header::read(&output.reopen(&options.memory)?.into_random()?)?;
    header.check_readable(false)?;
    check_changeable(&header)?;
    check_resizable(&header).map_err(|e| e.path(output.location()))?;
    check_intact(output, options)?;
    let size = resize.size.checked_next_multiple_of(SIZE_MULTIPLE);
    let size = size.filter(|size| i64::try_from(*size).is_ok());
    let size = size.ok_or_else(|| Error::limit("a disk must be smaller than 2^63 bytes"))?;
    header.clear_unknown_autoclear(output)?;
    match size.cmp(&header.virtual_size) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Greater => grow(output, &header, size, options),
        std::cmp::Ordering::Less => shrink(output, &header, size, resize.discards, options),
    }
}

fn check_resizable(header: &Header) -> Result<()> {
    if header.has(INCOMPATIBLE_DATA_FILE) {
        return Err(Error::unsupported("an image with an external data file can't be resized").at(72));
    }
    if header.version < 3 && header.snapshot_count > 0 {
        return Err(Error::unsupported("a version 2 image with snapshots can't be resized").at(60));
    }
    if header.autoclear & AUTOCLEAR_BITMAPS != 0 && bitmap::count(header) > 0 {
        return Err(Error::refused("the image has persistent bitmaps, which have the old size")
            .hint("remove them first: qemu-img bitmap --remove"));
    }
    Ok(())
}

fn grow(output: &Output, header: &Header, size: u64, options: &OpenOptions) -> Result<()> {
    let shape = header.shape;
    let entries = shape.l1_entries(size);
    if entries * 8 > MAX_L1_BYTES {
        return Err(Error::limit(format!(
            "a disk of {size} bytes with clusters of {} bytes needs an L1 table above {MAX_L1_BYTES} bytes",
            shape.cluster_size()
        ))
        .hint("convert the image, with a larger cluster_size"));
    }
    check_backing(output, header, options)?;
    clear_tail(output, header, options)?;
    let entries = entries.max(header.l1_entries.into());
    let space = (u64::from(header.l1_entries) * 8).next_multiple_of(shape.cluster_size());
    if entries * 8 <= space {
        // The rest of the last cluster of the table may hold anything.
        let end = header.l1_offset + u64::from(header.l1_entries) * 8;
        output.write_plain_zeros_at(end, (entries - u64::from(header.l1_entries)) * 8)?;
        output.sync()?;
        return write_size(output, header, size, entries, header.l1_offset);
    }
    let mut refcounts = RefcountEditor::open(output, header, &options.memory)?;
    let tables = ShadowTables::open(output, header, &options.memory)?;
    let mut bytes = Vec::new();
    encode_table(tables.l1(), &mut bytes);
    // At most 32 MiB.
    bytes.resize(((entries * 8).next_multiple_of(shape.cluster_size())) as usize, 0);
    let clusters = bytes.len() as u64 / shape.cluster_size();
    let place = refcounts.allocate_run(clusters)?;
    output.write_at(&bytes, place.offset)?;
    refcounts.commit()?;
    output.sync()?;
    write_size(output, header, size, entries, place.offset)?;
    output.sync()?;
    let old = (u64::from(header.l1_entries) * 8).div_ceil(shape.cluster_size());
    if old > 0 {
        refcounts.release(Clusters { offset: header.l1_offset, count: old })?;
    }
    refcounts.write_changed()
}

/// Refuses an overlay whose backing image reaches beyond it: a larger overlay would show that part of it.
fn check_backing(output: &Output, header: &Header, options: &OpenOptions) -> Result<()> {
    let Some(name) = &header.backing_file else { return Ok(()) };
    let format = header.extensions.backing_format.as_deref();
    let location = output.location();
    let image = options.externals.open_image("backing file", name, location, format, options)?;
    let backing = Disk::only(image, "the backing image")?.size();
    if backing <= header.virtual_size {
        return Ok(());
    }
    Err(Error::refused(format!(
        "the backing file has {backing} bytes, more than the {} of the image: a larger image would show the rest",
        header.virtual_size
    ))
    .path(location)
    .hint("convert the image with its backing file, then resize the copy"))
}

/// Zeroes the part of the last cluster that follows the disk, which becomes a part of it.
fn clear_tail(output: &Output, header: &Header, options: &OpenOptions) -> Result<()> {
    let shape = header.shape;
    let within = shape.within_cluster(header.virtual_size);
    if within == 0 {
        return Ok(());
    }
    let mut refcounts = RefcountEditor::open(output, header, &options.memory)?;
    let mut tables = ShadowTables::open(output, header, &options.memory)?;
    let entry = L2Entry(tables.get(header.virtual_size, &mut refcounts)?[0]);
    if entry.is_compressed() || entry.host_offset() == 0 {
        // The compressors of all known programs end a short cluster with zeros.
        return Ok(());
    }
    // At most 2 MiB.
    let mut tail = vec![0; (shape.cluster_size() - within) as usize];
    let tail_offset = entry.host_offset() + within;
    output.read_exact_at(&mut tail, tail_offset)?;
    if zero::is_zero(&tail) {
        return Ok(());
    }
    if refcounts.get(entry.host_offset())? != 1 {
        return Err(Error::refused("a snapshot shares the last cluster, whose end is not zeros")
            .path(output.location())
            .at(tail_offset)
            .hint("delete the snapshot first, or resize a converted copy"));
    }
    output.write_plain_zeros_at(tail_offset, tail.len() as u64)
}

fn shrink(output: &Output, header: &Header, size: u64, discards: bool, options: &OpenOptions) -> Result<()> {
    if !discards {
        check_zeros(output, header, size, options)?;
    }
    let mut refcounts = RefcountEditor::open(output, header, &options.memory)?;
    let mut tables = ShadowTables::open(output, header, &options.memory)?;
    write_size(output, header, size, header.l1_entries.into(), header.l1_offset)?;
    output.sync()?;
    tables.empty_from(size, &mut refcounts)?;
    tables.write_changed(&mut refcounts)?;
    refcounts.commit()?;
    output.sync()?;
    tables.switch()?;
    output.sync()?;
    tables.release_replaced(&mut refcounts)?;
    refcounts.write_changed()
}

/// Refuses to cut off data.
fn check_zeros(output: &Output, header: &Header, size: u64, options: &OpenOptions) -> Result<()> {
    let open = OpenOptions {
        externals: options.externals.clone(),
        memory: options.memory.clone(),
        ..OpenOptions::default()
    };
    let source = Qcow2Source::open(output.reopen(&options.memory)?, &open)?;
    let disk = Disk::only(Arc::new(source), "the image")?;
    let mut position = size;
    let mut buf = Vec::new();
    while position < header.virtual_size {
        for extent in disk.extents(position..header.virtual_size)? {
            while extent.is_data() && position < extent.end() {
                // At most 1 MiB.
                buf.resize(READ_LEN.min(extent.end() - position) as usize, 0);
                disk.read_at(&mut buf, position)?;
                if !zero::is_zero(&buf) {
                    return Err(Error::refused("the part that would be cut off contains data")
                        .path(output.location())
                        .guest(position..position + buf.len() as u64)
                        .remedied_by(Remedy::DiscardData));
                }
                position += buf.len() as u64;
            }
            position = extent.end();
        }
    }
    Ok(())
}

/// Writes the fields of the header that say how long the disk is and where its L1 table is.
fn write_size(output: &Output, header: &Header, size: u64, entries: u64, l1_offset: u64) -> Result<()> {
    let mut fields = size.to_be_bytes().to_vec();
    fields.extend_from_slice(&header.crypt_method().to_be_bytes());
    // Far below 2^32, as the table has at most 32 MiB.
    fields.extend_from_slice(&(entries as u32).to_be_bytes());
    fields.extend_from_slice(&l1_offset.to_be_bytes());
    output.write_at(&fields, SIZE_FIELD)
}
