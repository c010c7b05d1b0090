//! [`Bitmap`], a persistent bitmap of an image: a bit for each part of the disk that was written since the
//! bitmap was created.

use std::fmt;
use std::sync::Arc;

use crate::error::Result;

/// A bitmap of an open image.
#[derive(Clone)]
pub struct Bitmap {
    /// Name; untrusted.
    pub name: String,
    /// Number of guest bytes that one bit covers, a power of two.
    pub granularity: u64,
    /// True if programs that write to the disk set bits.
    pub auto: bool,
    /// Reason why the bits can't be relied on, worded to follow the name; `None` if they can.
    pub fault: Option<String>,
    /// The bits.
    pub content: Arc<dyn BitmapContent>,
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bitmap").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Bitmap {
    /// Returns the length of the bits in bytes, for a disk of `size` bytes.
    pub fn byte_len(&self, size: u64) -> u64 {
        size.div_ceil(self.granularity).div_ceil(8)
    }
}

/// The bits of a bitmap. The first is the least significant one of byte 0; the bits after the last are zero.
pub trait BitmapContent: Send + Sync {
    /// Fills `buf` with the bytes from `offset` on.
    ///
    /// # Errors
    /// If the bits can't be read, or the image places them outside of the file.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}
