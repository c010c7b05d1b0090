//! The laws of a driver that only reads, over images that other programs made.

use imgtool_core::{CancelToken, CreateOptions, Driver, OpenOptions};

use super::faults::failing_reads_of_bytes_are_errors;
use super::harness::is_refusal;
use super::hostile::{Hostile, hostile_bytes_do_not_panic_with, random_input, truncated_bytes_are_an_error};
use super::image::Image;
use super::laws::{
    expect_bounds, expect_cancelled, expect_clean, expect_not_probed, expect_probed, expect_source,
    expect_stream, read_in_parallel,
};

/// Number of bytes to damage at the start of each image: enough for the headers of most formats.
const DAMAGED_LEN: usize = 512;

/// Runs every law that the capabilities of a read-only driver imply, over `samples`: each is the bytes of a
/// small image with its expected content ([`Image::from_bytes`]).
///
/// # Panics
/// If the driver breaks a law.
pub fn read_only(driver: &dyn Driver, samples: &[(&[u8], Image)]) {
    read_only_with(driver, samples, &OpenOptions::default());
}

/// Like [`read_only`], with options for opening. A container needs an opener for its members
/// ([`super::members`]).
///
/// # Panics
/// If the driver breaks a law.
pub fn read_only_with(driver: &dyn Driver, samples: &[(&[u8], Image)], options: &OpenOptions) {
    let can = driver.capabilities();
    assert!(can.read && !can.write, "{}: not a driver that only reads", driver.name());
    assert!(!samples.is_empty(), "{}: no image to read", driver.name());
    let writer = driver.writer(&CreateOptions::default()).err();
    assert!(writer.is_some_and(|error| is_refusal(&error)), "{}: makes a writer", driver.name());
    reads(driver, samples, options);
}

/// Runs the laws about reading over `samples`, for a driver whose images [`super::all`] can't make.
///
/// # Panics
/// If the driver breaks a law.
pub fn reads(driver: &dyn Driver, samples: &[(&[u8], Image)], options: &OpenOptions) {
    expect_not_probed(driver);
    for (bytes, image) in samples {
        reads_the_expected_content(driver, bytes, image, options);
        truncated_bytes_are_an_error(driver, bytes, image, options);
        hostile_bytes_do_not_panic_with(driver, &Hostile::head(bytes, DAMAGED_LEN), options);
        failing_reads_of_bytes_are_errors(driver, bytes, image, options);
        cancelled_opens_and_checks_end(driver, bytes, options);
    }
}

fn reads_the_expected_content(driver: &dyn Driver, bytes: &[u8], image: &Image, options: &OpenOptions) {
    expect_probed(driver, &random_input(bytes));
    let source = driver
        .open(random_input(bytes), options)
        .unwrap_or_else(|e| panic!("{}: {image} can't be opened: {e:#}", driver.name()));
    assert_eq!(source.info().format, driver.name(), "the format in its info is the driver's name");
    expect_source(driver, &source, image, "expected content");
    expect_bounds(driver, &source);
    read_in_parallel(driver, &source, image);
    if driver.capabilities().stream_read {
        expect_stream(driver, bytes, image, options);
    }
    if driver.capabilities().check {
        expect_clean(driver, random_input(bytes), image, options);
    }
}

fn cancelled_opens_and_checks_end(driver: &dyn Driver, bytes: &[u8], options: &OpenOptions) {
    let cancel = CancelToken::new();
    cancel.cancel();
    expect_cancelled(driver, &|| random_input(bytes).cancelled_by(cancel.clone()), options);
}
