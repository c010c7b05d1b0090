//! Opening the files of a disk: the image's own, and those that its descriptor names.

use std::collections::HashMap;
use std::sync::Arc;

use imgtool_core::error::escape_control;
use imgtool_core::input::PROBE_LEN;
use imgtool_core::{Error, Input, OpenOptions, RandomInput, Remedy, Result};

use crate::descriptor::{self, Access, Descriptor, ExtentLine, Kind};
use crate::grains::{FileMemory, GrainFile, TableCache};
use crate::image::{Content, Extent, Image};
use crate::inflate::Inflater;
use crate::layout::{SECTOR_SIZE, cowd, hosted, sesparse};

/// Role of an extent's file in messages.
const ROLE: &str = "extent";

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

fn open_any(input: &RandomInput, options: &OpenOptions) -> Result<Image> {
    let head = input.read_vec(0, head_len(input, PROBE_LEN))?;
    let tables = &TableCache::new(options.externals.depth(), &options.memory)?;
    let budget = FileMemory { tables, id: 0, memory: &options.memory };
    if head.starts_with(hosted::MAGIC) {
        let header = hosted::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
        let descriptor = embedded_descriptor(input, &header, options.salvage)?;
        return match descriptor {
            Some(descriptor) if header.is_wrapper() && descriptor.sectors() > 0 => {
                open_described(input, descriptor, tables, options)
            }
            Some(descriptor) if header.is_wrapper() => empty(input, descriptor, options),
            descriptor => single(input, GrainFile::hosted(input, header, budget)?, descriptor, options),
        };
    }
    if head.starts_with(cowd::MAGIC) {
        let header = cowd::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
        if !header.parent_name.is_empty() {
            refuse_bare("a redo log over another disk", options)?;
        }
        return single(input, GrainFile::cowd(input, &header, budget)?, None, options);
    }
    if head.starts_with(&sesparse::MAGIC) {
        refuse_bare("an SE sparse file, which usually is a snapshot of another disk", options)?;
        return single(input, se_sparse(input, &head, budget)?, None, options);
    }
    if !Descriptor::probe(&head) {
        return Err(Error::wrong_format("has neither a magic number nor a descriptor of VMDK"));
    }
    let text = input.read_vec(0, head_len(input, descriptor::MAX_LEN + 1))?;
    open_described(input, Descriptor::parse(&text)?, tables, options)
}

/// Returns the number of bytes to read for a head of at most `most`.
fn head_len(input: &RandomInput, most: usize) -> usize {
    usize::try_from(input.len()).unwrap_or(usize::MAX).min(most)
}

/// Refuses a file that is a part of an image, and whose descriptor says what lies below it.
fn refuse_bare(what: &str, options: &OpenOptions) -> Result<()> {
    if options.force || options.info_only {
        return Ok(());
    }
    Err(Error::unsupported(format!("is {what}; read alone, it would lack that disk's content"))
        .remedied_by(Remedy::OpenAnyway("name its descriptor, the small .vmdk file beside it".into())))
}

fn se_sparse(input: &RandomInput, head: &[u8], budget: FileMemory<'_>) -> Result<GrainFile> {
    let header =
        sesparse::Header::decode(head, input.len() / SECTOR_SIZE).map_err(|fault| fault.of("header", 0))?;
    GrainFile::se_sparse(input, &header, budget)
}

/// Reads the descriptor within a hosted sparse file, if there is one. A salvage does without a damaged one.
fn embedded_descriptor(
    input: &RandomInput,
    header: &hosted::Header,
    salvage: bool,
) -> Result<Option<Descriptor>> {
    if header.descriptor_size == 0 || header.descriptor_offset == 0 {
        return Ok(None);
    }
    let offset = header.descriptor_offset * SECTOR_SIZE;
    // The header bounds it to 2 MiB. The file may end within the padding.
    let len = (header.descriptor_size * SECTOR_SIZE).min(input.len().saturating_sub(offset)) as usize;
    let parsed = input
        .read_vec(offset, len)
        .and_then(|text| Descriptor::parse(&text))
        .map_err(|error| error.at(offset));
    match parsed {
        Ok(descriptor) => Ok(Some(descriptor)),
        Err(_) if salvage && !header.is_wrapper() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Makes the image of a disk without sectors. Its header has no numbers that count.
fn empty(input: &RandomInput, descriptor: Descriptor, options: &OpenOptions) -> Result<Image> {
    Ok(Image {
        files: vec![input.clone()],
        virtual_size: 0,
        extents: Vec::new(),
        descriptor: Some(descriptor),
        single: true,
        inflater: Inflater::new(0, 0, &options.memory)?,
    })
}

/// Makes the image of a single sparse file.
fn single(
    input: &RandomInput,
    file: GrainFile,
    descriptor: Option<Descriptor>,
    options: &OpenOptions,
) -> Result<Image> {
    if descriptor.as_ref().is_some_and(|descriptor| descriptor.extents.len() > 1) {
        return Err(Error::unsupported("the descriptor in the sparse file has more than one extent")
            .hint("save the descriptor as a file beside it, and name that"));
    }
    let compressed =
        if file.hosted.as_ref().is_some_and(|header| header.compressed) { file.grain_size } else { 0 };
    let extent =
        Extent { start: 0, len: file.capacity, content: Content::Grains { file: Box::new(file), index: 0 } };
    Ok(Image {
        files: vec![input.clone()],
        virtual_size: extent.len,
        extents: std::iter::once(extent).filter(|extent| extent.len > 0).collect(),
        descriptor,
        single: true,
        inflater: Inflater::new(compressed, options.externals.depth(), &options.memory)?,
    })
}

/// Opens the extents of a descriptor in the file `own`.
fn open_described(
    own: &RandomInput,
    descriptor: Descriptor,
    tables: &Arc<TableCache>,
    options: &OpenOptions,
) -> Result<Image> {
    if descriptor.extents.is_empty() {
        return Err(Error::malformed("the descriptor has no extents"));
    }
    let mut opener = Opener { own, options, tables, files: vec![own.clone()], flat: HashMap::new() };
    let mut extents = Vec::new();
    let mut start = 0;
    let mut largest_grain = 0;
    for line in &descriptor.extents {
        let len = line.sectors * SECTOR_SIZE;
        let content = opener.open(line)?;
        if let Content::Grains { file, .. } = &content
            && file.hosted.as_ref().is_some_and(|header| header.compressed)
        {
            largest_grain = file.grain_size.max(largest_grain);
        }
        if len > 0 {
            extents.push(Extent { start, len, content });
        }
        start += len;
    }
    let files = opener.files;
    Ok(Image {
        files,
        virtual_size: start,
        extents,
        descriptor: Some(descriptor),
        single: false,
        inflater: Inflater::new(largest_grain, options.externals.depth(), &options.memory)?,
    })
}

/// Opens the files of extents.
struct Opener<'a> {
    own: &'a RandomInput,
    options: &'a OpenOptions,
    tables: &'a Arc<TableCache>,
    files: Vec<RandomInput>,
    /// Files with the guest's bytes, by name: several extents may be in one.
    flat: HashMap<String, usize>,
}

impl Opener<'_> {
    fn open(&mut self, line: &ExtentLine) -> Result<Content> {
        match (line.access, line.kind) {
            (Access::None, _) => Ok(Content::NoAccess),
            (_, Kind::Zero) => Ok(Content::Zero),
            _ if self.options.info_only => Ok(Content::Closed),
            (_, Kind::Flat) => self.open_flat(line),
            (_, kind) => self.open_sparse(line, kind),
        }
    }

    fn file(&mut self, name: &str) -> Result<usize> {
        let input = self.options.externals.open_part(ROLE, name, self.own.location())?.into_random()?;
        self.files.push(input);
        Ok(self.files.len() - 1)
    }

    fn open_flat(&mut self, line: &ExtentLine) -> Result<Content> {
        let index = match self.flat.get(&line.name) {
            Some(index) => *index,
            None => self.file(&line.name)?,
        };
        self.flat.insert(line.name.clone(), index);
        let file = &self.files[index];
        // The parser bounds both numbers to 2^54 sectors.
        let end = (line.offset + line.sectors) * SECTOR_SIZE;
        if end > file.len() {
            return Err(Error::corrupt(format!(
                "the extent needs {} bytes at {}, but the file ends at {}",
                line.sectors * SECTOR_SIZE,
                line.offset * SECTOR_SIZE,
                file.len()
            ))
            .path(file.location())
            .at(file.len())
            .hint("the file is cut short: copy it again, or use a backup"));
        }
        Ok(Content::Flat { file: index, file_offset: line.offset * SECTOR_SIZE })
    }

    fn open_sparse(&mut self, line: &ExtentLine, kind: Kind) -> Result<Content> {
        if line.offset != 0 {
            return Err(Error::unsupported(format!(
                "the sparse extent '{}' begins at sector {} of its file",
                escape_control(&line.name),
                line.offset
            )));
        }
        let index = self.file(&line.name)?;
        let input = &self.files[index];
        let budget = FileMemory { tables: self.tables, id: index, memory: &self.options.memory };
        let opened = open_grains(input, kind, budget).and_then(|file| {
            if file.capacity < line.sectors * SECTOR_SIZE {
                return Err(Error::malformed(format!(
                    "the descriptor says that the extent has {} sectors, but the file has {}",
                    line.sectors,
                    file.capacity / SECTOR_SIZE
                )));
            }
            Ok(file)
        });
        let file = opened.map_err(|error| error.path(input.location()))?;
        Ok(Content::Grains { file: Box::new(file), index })
    }
}

/// Opens the sparse file of an extent, which must be of the kind that the descriptor states.
fn open_grains(input: &RandomInput, kind: Kind, budget: FileMemory<'_>) -> Result<GrainFile> {
    let head = input.read_vec(0, head_len(input, cowd::HEADER_LEN))?;
    let (magic, name): (&[u8], _) = match kind {
        Kind::VmfsSparse => (cowd::MAGIC, "COWD"),
        Kind::SeSparse => (&sesparse::MAGIC, "SE sparse"),
        Kind::Flat | Kind::Zero | Kind::Sparse => (hosted::MAGIC, "hosted sparse"),
    };
    if !head.starts_with(magic) {
        return Err(Error::malformed(format!("the extent is not a {name} file, as its descriptor says")));
    }
    match kind {
        Kind::VmfsSparse => {
            let header = cowd::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
            GrainFile::cowd(input, &header, budget)
        }
        Kind::SeSparse => se_sparse(input, &head, budget),
        Kind::Flat | Kind::Zero | Kind::Sparse => {
            let header = hosted::Header::decode(&head).map_err(|fault| fault.of("header", 0))?;
            if header.is_wrapper() {
                return Err(Error::malformed("the extent is a descriptor, not a sparse file"));
            }
            GrainFile::hosted(input, header, budget)
        }
    }
}
