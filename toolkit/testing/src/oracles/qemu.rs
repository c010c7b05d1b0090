//! qemu-img and qemu-io.

use std::path::Path;

use serde_json::Value;

use super::{run, run_in};
use crate::text;

/// Runs qemu-img, which must succeed, and returns its standard output.
#[track_caller]
pub fn qemu_img(args: &[&str]) -> String {
    String::from_utf8_lossy(&run("qemu-img", args).stdout).into_owned()
}

/// Asserts that qemu-img finds the same content in both images. The longer one may end with zeros.
#[track_caller]
pub fn qemu_compare(a: &Path, a_format: &str, b: &Path, b_format: &str) {
    run("qemu-img", &["compare", "-f", a_format, "-F", b_format, text(a), text(b)]);
}

/// Asserts that qemu-img finds no errors and no leaks.
#[track_caller]
pub fn qemu_check(path: &Path, format: &str) {
    run("qemu-img", &["check", "-q", "-f", format, text(path)]);
}

/// Converts a raw file to `format` with qemu-img. `options` are the options of the format, after `-c` to
/// compress.
#[track_caller]
pub fn qemu_make(raw: &Path, format: &str, options: &str, to: &Path) {
    let mut args = vec!["convert", "-f", "raw", "-O", format];
    if options.contains("-c") {
        args.push("-c");
    }
    let options = options.trim_start_matches("-c").trim();
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([text(raw), text(to)]);
    run("qemu-img", &args);
}

/// Returns the output of `qemu-img info --output=json`.
#[track_caller]
pub fn qemu_info(path: &Path, format: &str) -> Value {
    let info = qemu_img(&["info", "--output=json", "-f", format, text(path)]);
    serde_json::from_str(&info).expect("qemu-img prints JSON")
}

/// Asserts that qemu-img finds no errors in a qcow2 image and no difference from a raw one. Both names are
/// relative to `directory`, as are the names that the image refers to.
#[track_caller]
pub fn assert_clean_qcow2(directory: &Path, image: &str, raw: &str) {
    run_in("qemu-img", directory, &["check", "-f", "qcow2", image]);
    run_in("qemu-img", directory, &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}
