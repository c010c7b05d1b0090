//! [`Image`], the open files of a disk, and the lookup of guest bytes in them.

use imgtool_core::layered::{Origin, Segment, SegmentMap, StoredBytes};
use imgtool_core::{DeviceId, Error, Lease, RandomInput, Remedy, Result};

use crate::descriptor::Descriptor;
use crate::descriptor::identity::ParentId;
use crate::grains::{Form, GrainFile, Place};
use crate::inflate::Inflater;
use crate::layout::SECTOR_SIZE;

/// The id of an image's only device.
pub(crate) const DISK: DeviceId = DeviceId(0);

/// The name of an image's only device.
pub(crate) const DISK_NAME: &str = "disk";

/// An open image, without its parent.
pub(crate) struct Image {
    /// The image's own file, then those of its extents.
    pub(crate) files: Vec<RandomInput>,
    /// Size of the disk in bytes.
    pub(crate) virtual_size: u64,
    /// Extents by ascending start, without gaps.
    pub(crate) extents: Vec<Extent>,
    /// Descriptor, unless a sparse file has none.
    pub(crate) descriptor: Option<Descriptor>,
    /// True if the image is one sparse file.
    pub(crate) single: bool,
    /// Reason why a salvage can't prove that nothing is missing.
    pub(crate) doubt: Option<String>,
    /// Faults of the files of extents that stayed closed.
    pub(crate) faults: Vec<String>,
    /// Fault of a single file that was opened for its facts alone.
    pub(crate) damage: Option<Error>,
    pub(crate) inflater: Inflater,
    /// Memory for the descriptor, the extents and their open files.
    pub(crate) _lease: Lease,
}

/// A part of the disk.
pub(crate) struct Extent {
    /// Guest offset.
    pub(crate) start: u64,
    /// Length in bytes, never 0.
    pub(crate) len: u64,
    pub(crate) content: Content,
    /// Number of its line in the descriptor.
    pub(crate) line: usize,
}

/// Content of an extent.
pub(crate) enum Content {
    /// The guest's bytes in a file.
    Flat {
        file: usize,
        file_offset: u64,
    },
    Zero,
    /// A sparse file, the one with this index.
    Grains {
        file: Box<GrainFile>,
        index: usize,
    },
    /// Nothing: reading it is an error.
    NoAccess,
    /// Not opened, because only information is needed: the size of a grain, and true if grains are compressed, of a
    /// sparse file that was looked at.
    Closed(Option<(u64, bool)>),
    /// Not opened in a salvage, for this reason.
    Lost {
        reason: String,
    },
}

impl Image {
    /// True if what the image does not store is in a parent.
    pub(crate) fn is_child(&self) -> bool {
        self.descriptor.as_ref().is_some_and(|descriptor| descriptor.is_child())
    }

    /// Returns the descriptor of a child, and the identifier of its parent.
    pub(crate) fn parent_id(&self) -> Option<(&Descriptor, ParentId)> {
        let descriptor = self.descriptor.as_ref()?;
        Some((descriptor, descriptor.parent_id()?))
    }

    /// Returns the error for a descriptor that contradicts itself about a parent.
    pub(crate) fn contradiction(&self) -> Option<Error> {
        let error = self.descriptor.as_ref()?.contradiction()?;
        Some(error.path(self.files[0].location()))
    }

    /// Returns the index of the extent that contains a guest offset of the disk.
    fn extent_at(&self, guest_offset: u64) -> usize {
        self.extents.partition_point(|extent| extent.start <= guest_offset).saturating_sub(1)
    }

    fn lookup(&self, index: usize, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let Some(extent) = self.extents.get(index) else {
            return Err(Error::out_of_bounds(format!("the disk has no byte {guest_offset}")));
        };
        let within = guest_offset - extent.start;
        let max_len = (extent.len - within).min(max_len);
        let segment = |origin| Ok(Segment { len: max_len, origin });
        match &extent.content {
            Content::Flat { file, file_offset } => {
                let file_offset = file_offset + within;
                let stored = self.stored(*file).saturating_sub(file_offset);
                if stored == 0 {
                    // Only a salvage opens such an extent.
                    return Err(cut(extent, self.stored(*file)));
                }
                Ok(Segment { len: max_len.min(stored), origin: Origin::File { index: *file, file_offset } })
            }
            Content::Zero => segment(Origin::Zero),
            Content::NoAccess => Err(Error::unsupported(
                "the descriptor allows no access to this extent (NOACCESS): its content is not in the image",
            )
            .guest(extent.start..extent.start + extent.len)),
            Content::Closed(_) => Err(Error::unsupported("the image was opened for information only")),
            Content::Lost { reason } => Err(Error::corrupt(reason.clone())),
            Content::Grains { file, .. } if within >= file.capacity => Err(cut(extent, file.capacity)),
            Content::Grains { file, index } => self.lookup_grain(file, *index, within, max_len),
        }
    }

    /// Returns the length of a file.
    fn stored(&self, index: usize) -> u64 {
        self.files.get(index).map_or(0, RandomInput::len)
    }

    fn lookup_grain(&self, file: &GrainFile, index: usize, within: u64, max_len: u64) -> Result<Segment> {
        let (grain, in_grain) = (within / file.grain_size, within % file.grain_size);
        let (place, grains) = file.run(grain, (in_grain + max_len).div_ceil(file.grain_size))?;
        let len = (grains * file.grain_size - in_grain).min(max_len).min(file.capacity - within);
        let origin = match (place, file.form) {
            (Place::Absent, _) if self.is_child() => Origin::Parent,
            (Place::Absent, _) => Origin::Hole,
            (Place::Zero, _) => Origin::Zero,
            (Place::Lost, _) => {
                return Err(Error::corrupt("no table and no marker of the damaged stream lists the grain"));
            }
            (Place::At(offset), Form::Plain) => Origin::File { index, file_offset: offset + in_grain },
            (Place::At(_), Form::Compressed(_)) => Origin::Encoded,
        };
        Ok(Segment { len, origin })
    }
}

impl SegmentMap for Image {
    fn segment(&self, guest_offset: u64, max_len: u64) -> Result<Segment> {
        let index = self.extent_at(guest_offset);
        self.lookup(index, guest_offset, max_len).map_err(|error| {
            let file = match self.extents.get(index).map(|extent| &extent.content) {
                Some(Content::Grains { file, .. }) => file.input.location(),
                _ => self.file(0).location(),
            };
            let unit = self.to_unit_end(guest_offset, max_len);
            error.path(file).device(DISK_NAME).guest(guest_offset..guest_offset + unit)
        })
    }

    fn to_unit_end(&self, guest_offset: u64, max_len: u64) -> u64 {
        let Some(extent) = self.extents.get(self.extent_at(guest_offset)) else { return max_len };
        let within = guest_offset - extent.start;
        let rest = match &extent.content {
            Content::Grains { file, .. } if within >= file.capacity => extent.len,
            Content::Grains { file, .. } => file.to_unit_end(within, max_len),
            Content::Flat { file, file_offset } if file_offset + within >= self.stored(*file) => extent.len,
            Content::NoAccess | Content::Closed(_) | Content::Lost { .. } => extent.len,
            Content::Flat { .. } | Content::Zero => SECTOR_SIZE - within % SECTOR_SIZE,
        };
        rest.min(extent.len - within).min(max_len)
    }

    fn file(&self, index: usize) -> &dyn StoredBytes {
        // There is always the image's own file.
        self.files.get(index).unwrap_or(&self.files[0])
    }

    fn read_encoded(&self, buf: &mut [u8], guest_offset: u64) -> Result<()> {
        let index = self.extent_at(guest_offset);
        let Some(Extent { start, content: Content::Grains { file, .. }, .. }) = self.extents.get(index)
        else {
            return Err(Error::unsupported("the extent is not compressed"));
        };
        let mut at = guest_offset - start;
        let mut rest = buf;
        while !rest.is_empty() {
            let (grain, within) = (at / file.grain_size, at % file.grain_size);
            // A grain has at most 1 MiB.
            let len = rest.len().min((file.grain_size - within) as usize);
            let (part, next) = rest.split_at_mut(len);
            let read = self.inflater.read(file, index, grain, part, within as usize);
            read.map_err(|error| error.path(file.input.location()).device(DISK_NAME))?;
            at += len as u64;
            rest = next;
        }
        Ok(())
    }

    fn doubt(&self) -> Option<String> {
        let of_file = |extent: &Extent| match &extent.content {
            Content::Grains { file, .. } => file.doubt(),
            _ => None,
        };
        self.doubt.clone().or_else(|| self.extents.iter().find_map(of_file))
    }

    fn read_granule(&self) -> u64 {
        let grain = |extent: &Extent| match &extent.content {
            Content::Grains { file, .. } if file.form != Form::Plain => file.grain_size,
            _ => 1,
        };
        self.extents.iter().map(grain).max().unwrap_or(1).max(self.file(0).granule())
    }

    fn reader_memory(&self) -> u64 {
        self.inflater.context_memory()
    }
}

/// Returns the error for an extent of which the file has only this many bytes.
fn cut(extent: &Extent, bytes: u64) -> Error {
    Error::corrupt(format!("the extent has {} bytes, but its file ends at {bytes}", extent.len))
        .remedied_by(Remedy::Salvage("the file is cut short: copy it again, or use a backup".into()))
}
