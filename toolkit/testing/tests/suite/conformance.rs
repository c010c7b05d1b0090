//! The laws accept a correct driver, and each law rejects the driver with the flaw that it is about.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use imgtool_core::{
    Capabilities, Confidence, CreateOptions, Driver, ImageSource, Input, OpenOptions, Result,
};
use imgtool_testing::conformance::{self as laws, Hostile, Image};
use imgtool_testing::toy::{Flaw, Toy};

fn options() -> CreateOptions {
    CreateOptions::default()
}

#[test]
fn accepts_a_correct_driver() {
    laws::all(&Toy(Flaw::None), &options());
}

#[test]
fn correct_driver_survives_hostile_bytes() {
    let toy = Toy(Flaw::None);
    let image = laws::make_bytes(&toy, &options(), &small());
    laws::hostile_bytes_do_not_panic(&toy, &Hostile::head(&image, 128));
}

fn small() -> Image {
    Image::disk("small", 200_000, laws::Content::zero().with(0..200_000, laws::Fill::Text))
}

/// Returns the panic message of `law` for a toy with this flaw.
fn rejection(flaw: Flaw, law: impl FnOnce(&Toy)) -> String {
    let panic =
        catch_unwind(AssertUnwindSafe(|| law(&Toy(flaw)))).expect_err("the law must reject a broken driver");
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap()
}

#[track_caller]
fn assert_contains(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

#[test]
fn finds_a_lost_byte() {
    let message =
        rejection(Flaw::DropsLastByte, |toy| laws::round_trip(toy, &options(), &laws::mixed_image()));
    assert_contains(&message, &["toy", "a bit of everything", "device 0 byte 65535", "instead of"]);
}

#[test]
fn finds_a_gap_in_extents() {
    let message = rejection(Flaw::ExtentGap, |toy| laws::round_trip(toy, &options(), &laws::mixed_image()));
    assert_contains(&message, &["the driver returned an invalid extent at"]);
}

#[test]
fn finds_a_hole_over_data() {
    let message =
        rejection(Flaw::HoleOverData, |toy| laws::round_trip(toy, &options(), &laws::patterns()[7]));
    assert_contains(&message, &["is reported as zeros", "there is data"]);
}

#[test]
fn finds_stored_zeros() {
    let message = rejection(Flaw::StoresZeros, |toy| laws::sparse_stays_sparse(toy, &options()));
    assert_contains(&message, &["occupies", "more than"]);
}

#[test]
fn finds_output_that_depends_on_timing() {
    let message = rejection(Flaw::OrderOfThreads, |toy| {
        laws::same_bytes_for_any_thread_count(toy, &options(), &laws::mixed_image());
    });
    assert_contains(&message, &["threads write other bytes"]);
}

#[test]
fn finds_an_unnoticed_truncation() {
    let message = rejection(Flaw::NoEndNeeded, |toy| {
        laws::truncated_is_an_error(toy, &options(), &laws::mixed_image())
    });
    assert_contains(&message, &["cut to", "without an error"]);
}

#[test]
fn finds_an_unchecked_header() {
    let image = laws::make_bytes(&Toy(Flaw::None), &options(), &small());
    let message = rejection(Flaw::TrustsHeader, |toy| {
        laws::hostile_bytes_do_not_panic(toy, &Hostile::head(&image, 128));
    });
    assert_contains(&message, &["byte", "set to"]);
}

#[test]
fn finds_a_shared_position() {
    let message = rejection(Flaw::SharedPosition, |toy| {
        // The panic of the thread scope replaces the message of the reader's panic.
        laws::parallel_reads(toy, &options());
    });
    assert_contains(&message, &["thread panicked"]);
}

#[test]
fn finds_unfilled_holes() {
    let message = rejection(Flaw::LeavesHoles, |toy| laws::round_trip(toy, &options(), &laws::patterns()[0]));
    assert_contains(&message, &["0xee", "instead of 0x00"]);
}

#[test]
fn finds_a_lost_tail() {
    let message = rejection(Flaw::RoundsDown, |toy| laws::sizes(toy, &options()));
    assert_contains(&message, &["1 bytes"]);
}

#[test]
fn finds_pipe_output_that_differs_from_a_file() {
    let message = rejection(Flaw::PipeWithoutEnd, |toy| {
        laws::stream_output_equals_file_output(toy, &options(), &laws::mixed_image());
    });
    assert_contains(&message, &["a pipe gets", "a file"]);
}

#[test]
fn correct_driver_reports_every_fault() {
    laws::faults::all(&Toy(Flaw::None), &options(), &laws::mixed_image());
}

#[test]
fn finds_a_swallowed_read_error() {
    let message = rejection(Flaw::SwallowsErrors, |toy| {
        laws::faults::failing_reads_are_errors(toy, &options(), &laws::mixed_image());
    });
    assert_contains(&message, &["fails, 1 threads", "succeeded without an error"]);
}

#[test]
fn finds_a_swallowed_pipe_error() {
    let message = rejection(Flaw::SwallowsErrors, |toy| {
        laws::faults::failing_pipes_are_errors(toy, &options(), &laws::mixed_image());
    });
    assert_contains(&message, &["of a pipe fails", "succeeded without an error"]);
}

/// A toy driver that only reads.
struct ReadOnly(Toy);

impl Driver for ReadOnly {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn description(&self) -> &'static str {
        self.0.description()
    }

    fn extensions(&self) -> &'static [&'static str] {
        self.0.extensions()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { write: false, stream_write: false, ..self.0.capabilities() }
    }

    fn probe(&self, head: &[u8], len: Option<u64>) -> Option<Confidence> {
        self.0.probe(head, len)
    }

    fn open(&self, input: Input, options: &OpenOptions) -> Result<Arc<dyn ImageSource>> {
        self.0.open(input, options)
    }
}

/// Returns an image of the toy format and its content, in place of an image made by another program.
fn sample() -> (Vec<u8>, Image) {
    let (device, content) = small().devices[0].clone();
    let mut plain = vec![0; device.size as usize];
    content.read(&mut plain, 0);
    (laws::make_bytes(&Toy(Flaw::None), &options(), &small()), Image::from_bytes("sample", &plain))
}

#[test]
fn accepts_a_correct_read_only_driver() {
    let (bytes, image) = sample();
    laws::read_only(&ReadOnly(Toy(Flaw::None)), &[(&bytes, image)]);
}

#[test]
fn finds_flaws_in_read_only_drivers() {
    let (bytes, image) = sample();
    let flaws = [
        (Flaw::ExtentGap, "the driver returned an invalid extent at"),
        (Flaw::HoleOverData, "is reported as zeros"),
        (Flaw::SharedPosition, "panicked"),
        (Flaw::TrustsHeader, "panics on"),
        (Flaw::SwallowsErrors, "succeeded without an error"),
        (Flaw::ClaimsAll, "claims content that is not its own"),
    ];
    for (flaw, words) in flaws {
        let message = rejection(flaw, |_| laws::read_only(&ReadOnly(Toy(flaw)), &[(&bytes, image.clone())]));
        assert_contains(&message, &[words]);
    }
    let message = rejection(Flaw::None, |toy| laws::read_only(toy, &[(&bytes, image.clone())]));
    assert_contains(&message, &["not a driver that only reads"]);
}
