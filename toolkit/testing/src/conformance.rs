//! Laws that every driver must obey, as library functions for the drivers' tests.
//!
//! Each law is one function over a driver and its create options. If the driver breaks the law, the function
//! panics with a message that names the driver, the image and the position. [`all`] runs every law that the
//! driver's [`imgtool_core::Capabilities`] imply, with images that any format must be able to store;
//! [`read_only()`] does the same for a driver that only reads, with images that other programs made:
//!
//! ```
//! use imgtool_core::{CreateOptions, Driver};
//! use imgtool_testing::conformance;
//!
//! // In a test of the driver:
//! fn the_laws_hold(driver: &dyn Driver) {
//!     conformance::all(driver, &CreateOptions::default());
//!     conformance::faults::all(driver, &CreateOptions::default(), &conformance::mixed_image());
//! }
//! ```
//!
//! Laws about damaged images need more: [`hostile_bytes_do_not_panic`] takes a finished image, the ranges to
//! damage, and a function that repairs its checksums. [`faults`] contains storage that fails on purpose.

mod compare;
pub mod faults;
mod harness;
mod hostile;
mod image;
mod laws;
mod memory;
mod read_only;
mod unlocked;

pub use compare::{assert_content, compare};
pub use harness::{
    FileOutputs, Pipe, SingleOutput, consume, create, fill_sink, input, make, make_bytes, make_with, members,
    new_file, open, open_with, scratch, write, write_to,
};
pub use hostile::{
    Hostile, hostile_bytes_do_not_panic, hostile_bytes_do_not_panic_with, truncated_is_an_error,
};
pub use image::{Content, Fill, Image, Order, far_apart, patterns, several_devices};
pub use laws::*;
pub use memory::MemorySource;
pub use read_only::{read_only, read_only_with, reads};
pub use unlocked::Unlocked;
