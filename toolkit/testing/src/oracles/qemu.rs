//! qemu-img and qemu-io.

use std::path::Path;

use serde_json::Value;

use super::{run, run_in};
use crate::text;

/// Standard output of qemu-img, which must succeed.
#[track_caller]
pub fn qemu_img(args: &[&str]) -> String {
    String::from_utf8_lossy(&run("qemu-img", args).stdout).into_owned()
}

/// qemu-img finds the same content in both; the longer may go on with zeros.
#[track_caller]
pub fn qemu_compare(a: &Path, a_format: &str, b: &Path, b_format: &str) {
    run("qemu-img", &["compare", "-f", a_format, "-F", b_format, text(a), text(b)]);
}

/// qemu-img finds no fault and no leak.
#[track_caller]
pub fn qemu_check(path: &Path, format: &str) {
    run("qemu-img", &["check", "-q", "-f", format, text(path)]);
}

/// Makes an image of another format with qemu-img.
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

/// What `qemu-img info --output=json` says.
#[track_caller]
pub fn qemu_info(path: &Path, format: &str) -> Value {
    let info = qemu_img(&["info", "--output=json", "-f", format, text(path)]);
    serde_json::from_str(&info).expect("qemu-img prints JSON")
}

/// qemu-img finds no fault in a qcow2 image and no difference to a raw one. Both are named relative to
/// `directory`, as is what the image names.
#[track_caller]
pub fn assert_clean_qcow2(directory: &Path, image: &str, raw: &str) {
    run_in("qemu-img", directory, &["check", "-f", "qcow2", image]);
    run_in("qemu-img", directory, &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}
