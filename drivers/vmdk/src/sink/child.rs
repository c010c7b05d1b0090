//! The parent of a new image: the properties that its child depends on.

use imgtool_core::{Error, ImageInfo, Result};

use crate::layout::SECTOR_SIZE;
use crate::options::{GRAIN_SIZE, VmdkOptions};
use crate::source::{CID, CREATE_TYPE};

/// The parent of a new image.
#[derive(Debug, Clone)]
pub(super) struct Parent {
    /// Content identifier of the parent.
    pub(super) cid: u32,
    /// Name of the parent, as the descriptor has it.
    pub(super) hint: String,
    virtual_size: u64,
    /// True if its content identifier does not depend on its content.
    pub(super) is_stream: bool,
}

impl Parent {
    /// Takes the properties from the facts about the parent called `hint`.
    pub(super) fn new(info: &ImageInfo, hint: &str) -> Result<Self> {
        let fact = info.facts.iter().find(|fact| fact.key == CID);
        let cid = fact.and_then(|fact| fact.value.as_u64()).and_then(|cid| u32::try_from(cid).ok());
        Ok(Self {
            cid: cid.ok_or_else(|| {
                Error::unsupported(
                    "the parent of a VMDK image must be a VMDK image with a content identifier",
                )
            })?,
            hint: hint.strip_prefix("file:").unwrap_or(hint).to_owned(),
            is_stream: info.facts.iter().any(|fact| {
                fact.key == CREATE_TYPE
                    && fact.value.as_str().is_some_and(|text| text.eq_ignore_ascii_case("streamOptimized"))
            }),
            virtual_size: info.single("a VMDK image")?.size,
        })
    }

    /// Returns the number of sectors of a child for a device of `size` bytes: that of the parent, which may
    /// have been rounded up to whole grains.
    ///
    /// # Errors
    /// `Unsupported` for another size: the images of a chain have one size, and readers differ in what follows the
    /// end of a parent.
    pub(super) fn sectors(&self, options: &VmdkOptions, size: u64) -> Result<u64> {
        let own = options.sectors(size)?;
        let rounded = size.checked_next_multiple_of(GRAIN_SIZE);
        if own * SECTOR_SIZE == self.virtual_size || rounded == Some(self.virtual_size) {
            return options.sectors(self.virtual_size);
        }
        Err(Error::unsupported(format!(
            "the disk has {} bytes, and its parent {}: a VMDK image is as large as its parent",
            own * SECTOR_SIZE,
            self.virtual_size
        ))
        .hint("choose VHDX or qcow2 for the new image, or a parent of the same size"))
    }
}
