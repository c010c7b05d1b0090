//! Stack for the recursion along a chain of images.
//!
//! Each image of a chain calls the next one: to open it, to read it, to list its extents. A chain may have
//! hundreds of images, and a thread may have a small stack: 2 MiB in Rust programs, 128 KiB with musl.

/// Stack in bytes that must be left to go one image deeper. Our choice: several times what the drivers take.
const NEEDED: usize = 128 << 10;

/// Length in bytes of a further piece of stack. Our choice: enough for a chain of any length in use. The
/// kernel provides only the pages that are touched.
const PIECE: usize = 1 << 20;

/// Runs `step`, which may go one image deeper. Takes a further piece of stack from the heap if the current one
/// is nearly used up.
pub fn deeper<T>(step: impl FnOnce() -> T) -> T {
    stacker::maybe_grow(NEEDED, PIECE, step)
}
