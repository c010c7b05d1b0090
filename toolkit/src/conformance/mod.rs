//! The laws of drivers as library functions, which every driver calls from its tests.
//!
//! Each law is one function over a driver and its create options. If the driver breaks the law, the
//! function panics with a message that names the driver, the image and the position. [`all`] runs every
//! law that the driver's [`crate::Capabilities`] imply, with images that any format must be able to hold:
//!
//! ```
//! use imgtool_toolkit::{CreateOptions, Driver, conformance};
//!
//! // In a test of the driver:
//! fn the_laws_hold(driver: &dyn Driver) {
//!     conformance::all(driver, &CreateOptions::default());
//!     conformance::faults::all(driver, &CreateOptions::default(), &conformance::mixed_image());
//! }
//! ```
//!
//! Laws about one format take more: [`hostile_bytes_do_not_panic`] takes a finished image, the ranges to
//! damage, and a function that repairs its checksums. [`faults`] has storage that fails on purpose.

pub mod faults;
mod harness;
mod hostile;
mod image;
mod laws;
mod memory;

pub use harness::{
    Pipe, assert_content, compare, fill_sink, make, make_bytes, make_with, new_file, open, open_with,
    scratch, write,
};
pub use hostile::{Hostile, hostile_bytes_do_not_panic, truncated_is_an_error};
pub use image::{Content, Fill, Image, Order, far_apart, patterns, several_devices};
pub use laws::*;
pub use memory::MemorySource;
