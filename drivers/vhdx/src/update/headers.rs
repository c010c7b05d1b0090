//! The two headers of an existing image, changed in turns.

use imgtool_core::{Output, Result};

use crate::image::Image;
use crate::layout::header::{HEADER_OFFSETS, Header};

/// The headers of an image that is changed.
pub(crate) struct HeaderPair {
    output: Output,
    current: Header,
    /// Index of the older header, which the next change overwrites.
    older: usize,
}

impl HeaderPair {
    pub(crate) fn new(output: &Output, image: &Image) -> Self {
        let is_first = image.headers[0].as_ref().is_ok_and(|first| *first == image.header);
        Self { output: output.clone(), current: image.header.clone(), older: usize::from(is_first) }
    }

    /// Returns the current header.
    pub(crate) fn current(&self) -> &Header {
        &self.current
    }

    /// Makes a changed header current. Flushes what was written before, and the header.
    pub(crate) fn change(&mut self, change: impl FnOnce(&mut Header)) -> Result<()> {
        self.output.sync()?;
        change(&mut self.current);
        self.current.sequence_number = self.current.sequence_number.wrapping_add(1);
        self.output.write_at(&self.current.encode(), HEADER_OFFSETS[self.older])?;
        self.older = 1 - self.older;
        self.output.sync()
    }
}
