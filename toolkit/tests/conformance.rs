//! The laws let a right driver pass and stop a wrong one, each by the law that is about it.

#![allow(clippy::unwrap_used)]

mod toy;

use std::panic::{AssertUnwindSafe, catch_unwind};

use imgtool_toolkit::CreateOptions;
use imgtool_toolkit::conformance::{self as laws, Hostile, Image};
use toy::{Flaw, Toy};

fn options() -> CreateOptions {
    CreateOptions::default()
}

#[test]
fn a_right_driver_passes() {
    laws::all(&Toy(Flaw::None), &options());
}

#[test]
fn a_right_driver_survives_hostile_bytes() {
    let toy = Toy(Flaw::None);
    let image = laws::make_bytes(&toy, &options(), &small());
    laws::hostile_bytes_do_not_panic(&toy, &Hostile::head(&image, 128));
}

fn small() -> Image {
    Image::disk("small", 200_000, laws::Content::zero().with(0..200_000, laws::Fill::Text))
}

/// The message with which `law` stops a toy with this flaw.
fn stopped(flaw: Flaw, law: impl FnOnce(&Toy)) -> String {
    let panic =
        catch_unwind(AssertUnwindSafe(|| law(&Toy(flaw)))).expect_err("the law let a broken driver pass");
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap()
}

#[track_caller]
fn assert_says(message: &str, words: &[&str]) {
    for word in words {
        assert!(message.contains(word), "'{word}' is not in: {message}");
    }
}

#[test]
fn a_lost_byte_is_found() {
    let message = stopped(Flaw::DropsLastByte, |toy| laws::round_trip(toy, &options(), &laws::mixed_image()));
    assert_says(&message, &["toy", "a bit of everything", "device 0 byte 65535", "instead of"]);
}

#[test]
fn a_gap_in_extents_is_found() {
    let message = stopped(Flaw::ExtentGap, |toy| laws::round_trip(toy, &options(), &laws::mixed_image()));
    assert_says(&message, &["extent", "should be"]);
}

#[test]
fn a_hole_over_data_is_found() {
    let message = stopped(Flaw::HoleOverData, |toy| laws::round_trip(toy, &options(), &laws::patterns()[7]));
    assert_says(&message, &["stands for zeros", "there is data"]);
}

#[test]
fn stored_zeros_are_found() {
    let message = stopped(Flaw::StoresZeros, |toy| laws::sparse_stays_sparse(toy, &options()));
    assert_says(&message, &["occupies", "more than"]);
}

#[test]
fn an_output_that_depends_on_timing_is_found() {
    let message = stopped(Flaw::OrderOfThreads, |toy| {
        laws::same_bytes_for_any_thread_count(toy, &options(), &laws::mixed_image());
    });
    assert_says(&message, &["threads write other bytes"]);
}

#[test]
fn an_unnoticed_end_is_found() {
    let message =
        stopped(Flaw::NoEndNeeded, |toy| laws::truncated_is_an_error(toy, &options(), &laws::mixed_image()));
    assert_says(&message, &["cut to", "without an error"]);
}

#[test]
fn trust_in_a_header_is_found() {
    let image = laws::make_bytes(&Toy(Flaw::None), &options(), &small());
    let message = stopped(Flaw::TrustsHeader, |toy| {
        laws::hostile_bytes_do_not_panic(toy, &Hostile::head(&image, 128));
    });
    assert_says(&message, &["byte", "set to"]);
}

#[test]
fn a_shared_position_is_found() {
    let message = stopped(Flaw::SharedPosition, |toy| {
        // The reader's panic is replaced by the scope's.
        laws::parallel_reads(toy, &options());
    });
    assert_says(&message, &["thread panicked"]);
}

#[test]
fn unfilled_holes_are_found() {
    let message = stopped(Flaw::LeavesHoles, |toy| laws::round_trip(toy, &options(), &laws::patterns()[0]));
    assert_says(&message, &["0xee", "instead of 0x00"]);
}

#[test]
fn a_lost_tail_is_found() {
    let message = stopped(Flaw::RoundsDown, |toy| laws::sizes(toy, &options()));
    assert_says(&message, &["1 bytes"]);
}

#[test]
fn a_pipe_that_gets_other_bytes_is_found() {
    let message = stopped(Flaw::PipeWithoutEnd, |toy| {
        laws::stream_output_equals_file_output(toy, &options(), &laws::mixed_image());
    });
    assert_says(&message, &["a pipe gets", "a file"]);
}

#[test]
fn a_right_driver_reports_every_fault() {
    laws::faults::all(&Toy(Flaw::None), &options(), &laws::mixed_image());
}

#[test]
fn a_swallowed_read_error_is_found() {
    let message = stopped(Flaw::SwallowsErrors, |toy| {
        laws::faults::failing_reads_are_errors(toy, &options(), &laws::mixed_image());
    });
    assert_says(&message, &["fails, 1 threads", "no error came out"]);
}

#[test]
fn a_swallowed_end_of_a_pipe_is_found() {
    let message = stopped(Flaw::SwallowsErrors, |toy| {
        laws::faults::failing_pipes_are_errors(toy, &options(), &laws::mixed_image());
    });
    assert_says(&message, &["of a pipe fails", "no error came out"]);
}
