//! Opening the files of a disk: the image's own, and those that its descriptor names.

mod opener;

use std::sync::Arc;

use imgtool_core::input::PROBE_LEN;
use imgtool_core::{Error, Input, Lease, OpenOptions, RandomInput, Remedy, Result};

use crate::descriptor::{self, Descriptor};
use crate::grains::{FileSettings, GrainFile, TableCache, is_damage};
use crate::image::{Content, Extent, Image};
use crate::inflate::Inflater;
use crate::layout::{SECTOR_SIZE, cowd, hosted, sesparse};
use opener::Opener;

/// Memory in bytes for each byte of a descriptor: itself, as text, and its names. A byte of another encoding can
/// take three.
const TEXT_COPIES: u64 = 8;

impl Image {
    /// Opens an image: a sparse file, or a descriptor with the files that it names. With
    /// [`OpenOptions::info_only`], other files stay closed.
    ///
    /// # Errors
    /// `WrongFormat` if the file is no VMDK image; `Refused` for extents that the user did not allow;
    /// `Unsupported`, `Malformed` or `Corrupt` by its structures.
    pub(crate) fn open(input: Input, options: &OpenOptions) -> Result<Self> {
        let input = input.into_random()?;
        open_any(&input, options).map_err(|error| error.path(input.location()))
    }
}

/// Returns the settings for opening the file with this number.
fn settings<'a>(tables: &'a Arc<TableCache>, id: usize, options: &'a OpenOptions) -> FileSettings<'a> {
    let OpenOptions { salvage, ignore_trailing, memory, .. } = options;
    FileSettings { tables, id, memory, salvage: *salvage, ignore_trailing: *ignore_trailing }
}

fn open_any(input: &RandomInput, options: &OpenOptions) -> Result<Image> {
    let head = input.read_vec(0, head_len(input, PROBE_LEN))?;
    let tables = &TableCache::new(options.externals.depth(), &options.memory)?;
    let settings = settings(tables, 0, options);
    if head.starts_with(hosted::MAGIC) {
        let header = hosted::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
        let descriptor = embedded_descriptor(input, &header, options)?;
        return match descriptor {
            Some(descriptor) if header.is_wrapper() && descriptor.sectors() > 0 => {
                let lease = text_lease(header.descriptor_size * SECTOR_SIZE, options)?;
                open_described(input, descriptor, lease, tables, options)
            }
            Some(descriptor) if header.is_wrapper() => empty(input, descriptor, options),
            descriptor => {
                // A running machine can't write compressed grains, so such a file is no snapshot.
                let doubt = match descriptor.is_none() && !header.compressed {
                    true => {
                        refuse_bare("a part of a split disk or of a snapshot: it has no descriptor", options)?
                    }
                    false => None,
                };
                let (sectors, fault) = Descriptor::disk_sectors(descriptor.as_ref(), &header);
                let shape = (header.grain_size * SECTOR_SIZE, header.compressed);
                match GrainFile::hosted(input, &header, settings) {
                    Err(error) if options.info_only && is_damage(&error) => {
                        let len = sectors * SECTOR_SIZE;
                        let extent = Extent { start: 0, len, content: Content::Closed(Some(shape)), line: 0 };
                        let image = of_extent(input, extent, 0, descriptor, options)?;
                        Ok(Image { damage: Some(error.path(input.location())), ..image })
                    }
                    file => {
                        let image = single(input, file?.shortened(sectors), descriptor, options)?;
                        Ok(Image { doubt: doubt.or(fault), ..image })
                    }
                }
            }
        };
    }
    if head.starts_with(cowd::MAGIC) {
        let header = cowd::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
        let doubt = if !header.parent_name.is_empty() {
            refuse_bare("a redo log over another disk", options)?
        } else if !header.has_geometry {
            // Its descriptor may have the name of the disk below it.
            refuse_bare(
                "a COWD file without a geometry, which usually is a redo log over another disk",
                options,
            )?
        } else {
            None
        };
        let file = GrainFile::cowd(input, &header, settings)?;
        return Ok(Image { doubt, ..single(input, file, None, options)? });
    }
    if head.starts_with(&sesparse::MAGIC) {
        let doubt = refuse_bare("an SE sparse file, which usually is a snapshot of another disk", options)?;
        return Ok(Image { doubt, ..single(input, se_sparse(input, &head, settings)?, None, options)? });
    }
    if !Descriptor::probe(&head) {
        return Err(Error::wrong_format("has neither a magic number nor a descriptor of VMDK"));
    }
    let (descriptor, lease) = read_text(input, options)?;
    open_described(input, descriptor, lease, tables, options)
}

/// Reads the descriptor of an image without its extents; `None` if the file has none.
///
/// # Errors
/// I/O errors; those of a damaged header or descriptor.
pub(crate) fn read_descriptor(input: Input, options: &OpenOptions) -> Result<Option<Descriptor>> {
    let input = input.into_random()?;
    let head = input.read_vec(0, head_len(&input, PROBE_LEN))?;
    if head.starts_with(hosted::MAGIC) {
        let header = hosted::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
        return embedded_descriptor(&input, &header, options);
    }
    if !Descriptor::probe(&head) {
        return Ok(None);
    }
    Ok(Some(read_text(&input, options)?.0))
}

/// Reads a file that is a descriptor. Returns it with its memory.
fn read_text(input: &RandomInput, options: &OpenOptions) -> Result<(Descriptor, Lease)> {
    let len = head_len(input, descriptor::MAX_LEN + 1);
    let lease = text_lease(len as u64, options)?;
    let text = input.read_vec(0, len)?;
    Ok((Descriptor::parse(&text)?, lease))
}

/// Borrows memory for a descriptor of `len` bytes.
pub(crate) fn text_lease(len: u64, options: &OpenOptions) -> Result<Lease> {
    options.memory.lease(TEXT_COPIES * len, "the descriptor of a VMDK image")
}

/// Returns the number of bytes to read for a head of at most `most`.
fn head_len(input: &RandomInput, most: usize) -> usize {
    usize::try_from(input.len()).unwrap_or(usize::MAX).min(most)
}

/// Refuses a file that is a part of an image, and whose descriptor says what lies below it. Returns the reason why a
/// salvage can't prove that nothing is missing.
fn refuse_bare(what: &str, options: &OpenOptions) -> Result<Option<String>> {
    if options.salvage {
        return Ok(Some(format!("unverified: the file is {what}; what lies below it is not known")));
    }
    if options.force || options.info_only {
        return Ok(None);
    }
    Err(Error::unsupported(format!("is {what}; read alone, it would lack that disk's content"))
        .remedied_by(Remedy::OpenAnyway("name its descriptor, the small .vmdk file beside it".into())))
}

fn se_sparse(input: &RandomInput, head: &[u8], settings: FileSettings<'_>) -> Result<GrainFile> {
    let header =
        sesparse::Header::decode(head, input.len() / SECTOR_SIZE).map_err(|fault| fault.of("header", 0))?;
    GrainFile::se_sparse(input, &header, settings)
}

/// Reads the descriptor within a hosted sparse file, if there is one. A salvage does without a damaged one.
fn embedded_descriptor(
    input: &RandomInput,
    header: &hosted::Header,
    options: &OpenOptions,
) -> Result<Option<Descriptor>> {
    let salvage = options.salvage;
    if header.descriptor_size == 0 || header.descriptor_offset == 0 {
        return Ok(None);
    }
    let offset = header.descriptor_offset * SECTOR_SIZE;
    // The header bounds it to 2 MiB. The file may end within the padding.
    let len = (header.descriptor_size * SECTOR_SIZE).min(input.len().saturating_sub(offset)) as usize;
    let _lease = text_lease(len as u64, options)?;
    let text = match input.read_vec(offset, len) {
        Err(_) if salvage && !header.is_wrapper() => return Ok(None),
        text => text?,
    };
    Descriptor::embedded(&text, header, salvage).map_err(|error| error.at(offset))
}

/// Makes the image of a disk without sectors. Its header has no numbers that count.
fn empty(input: &RandomInput, descriptor: Descriptor, options: &OpenOptions) -> Result<Image> {
    Ok(Image {
        files: vec![input.clone()],
        virtual_size: 0,
        extents: Vec::new(),
        descriptor: Some(descriptor),
        single: true,
        doubt: None,
        faults: Vec::new(),
        damage: None,
        inflater: Inflater::new(0, 0, &options.memory)?,
        _lease: options.memory.lease(0, "the descriptor of a VMDK image")?,
    })
}

/// Makes the image of a single sparse file.
fn single(
    input: &RandomInput,
    file: GrainFile,
    descriptor: Option<Descriptor>,
    options: &OpenOptions,
) -> Result<Image> {
    let compressed =
        if file.hosted.as_ref().is_some_and(|header| header.compressed) { file.grain_size } else { 0 };
    let (len, file) = (file.capacity, Box::new(file));
    let extent = Extent { start: 0, len, content: Content::Grains { file, index: 0 }, line: 0 };
    of_extent(input, extent, compressed, descriptor, options)
}

/// Makes the image of a single sparse file, whose compressed grains have at most `compressed` bytes.
fn of_extent(
    input: &RandomInput,
    extent: Extent,
    compressed: u64,
    descriptor: Option<Descriptor>,
    options: &OpenOptions,
) -> Result<Image> {
    // The file's own descriptor has one line.
    let lease = options.memory.lease(0, "the descriptor of a VMDK image")?;
    Ok(Image {
        files: vec![input.clone()],
        virtual_size: extent.len,
        extents: std::iter::once(extent).filter(|extent| extent.len > 0).collect(),
        descriptor,
        single: true,
        doubt: None,
        faults: Vec::new(),
        damage: None,
        inflater: Inflater::new(compressed, options.externals.depth(), &options.memory)?,
        _lease: lease,
    })
}

/// Opens the extents of a descriptor in the file `own`. `lease` is the memory for the descriptor.
fn open_described(
    own: &RandomInput,
    descriptor: Descriptor,
    lease: Lease,
    tables: &Arc<TableCache>,
    options: &OpenOptions,
) -> Result<Image> {
    if descriptor.extents.is_empty() {
        return Err(Error::malformed("the descriptor has no extents"));
    }
    let mut opener = Opener::new(own, descriptor.is_child(), options, tables, lease);
    let mut extents = Vec::new();
    let mut start = 0;
    let mut largest_grain = 0;
    for (index, line) in descriptor.extents.iter().enumerate() {
        let len = line.sectors * SECTOR_SIZE;
        let content = opener.open(line)?;
        if let Content::Grains { file, .. } = &content
            && file.hosted.as_ref().is_some_and(|header| header.compressed)
        {
            largest_grain = file.grain_size.max(largest_grain);
        }
        if len > 0 {
            extents.push(Extent { start, len, content, line: index });
        }
        start += len;
    }
    let (files, lease, faults) = opener.finish();
    Ok(Image {
        files,
        virtual_size: start,
        extents,
        descriptor: Some(descriptor),
        single: false,
        doubt: None,
        faults,
        damage: None,
        inflater: Inflater::new(largest_grain, options.externals.depth(), &options.memory)?,
        _lease: lease,
    })
}
