//! Standard error as JSON lines, for programs that show the progress themselves (`--progress json`):
//! messages, notes and errors are objects too.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::sync::atomic::{AtomicBool, Ordering};

use imgtool_core::{Error, ErrorKind};
use serde::Serialize;
use serde_json::json;

use super::{json_for_terminals, say};

/// True if standard error holds JSON lines only.
static JSON: AtomicBool = AtomicBool::new(false);

/// Makes all further messages JSON lines.
pub fn speak() {
    JSON.store(true, Ordering::Relaxed);
}

/// True if messages are JSON lines.
pub fn are_json() -> bool {
    JSON.load(Ordering::Relaxed)
}

/// Prints a value as one line on standard error.
pub fn line(value: &impl Serialize) {
    if let Ok(text) = serde_json::to_string(value) {
        say(&json_for_terminals(&text));
    }
}

/// Prints a message under the name of its class: `info` or `note`.
pub(super) fn message(class: &str, text: &str) {
    line(&BTreeMap::from([(class, json!({ "message": text }))]));
}

/// An error; docs/json.md describes the fields.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct ErrorRecord<'a> {
    kind: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    location: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_start: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    guest_end: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    offset: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    compressed_offset: Option<u64>,
}

/// Prints an error.
pub(super) fn error(error: &Error, hint: Option<String>) {
    let guest = error.guest_range();
    let record = ErrorRecord {
        kind: kind(error.kind()),
        message: words(error),
        hint,
        location: error.location().map(|location| location.name().into_owned()),
        device: error.device_name(),
        guest_start: guest.as_ref().map(|guest| guest.start),
        guest_end: guest.map(|guest| guest.end),
        offset: error.file_offset(),
        compressed_offset: error.compressed_offset(),
    };
    line(&json!({ "error": record }));
}

/// Returns the message and its causes, without the places, which are fields of their own.
fn words(error: &Error) -> String {
    let can_t = if error.act().is_some() { "can't " } else { "" };
    let mut text = format!("{can_t}{}", error.message());
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    match error.io_error().and_then(std::io::Error::raw_os_error) {
        Some(number) => text.replacen(&format!(" (os error {number})"), "", 1),
        None => text,
    }
}

/// Returns the stable name of a kind.
fn kind(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::WrongFormat => "wrong-format",
        ErrorKind::Malformed => "malformed",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Unsupported => "unsupported",
        ErrorKind::OutOfOrder => "out-of-order",
        ErrorKind::OutOfBounds => "out-of-bounds",
        ErrorKind::LimitExceeded => "limit-exceeded",
        ErrorKind::Usage => "usage",
        ErrorKind::Refused => "refused",
        ErrorKind::Io => "io",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Cancelled => "cancelled",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_errors_have_their_causes_and_no_places() {
        let cause = std::io::Error::from_raw_os_error(2);
        assert_eq!(
            words(&Error::io("open", cause).path("a.raw").at(7)),
            "can't open: No such file or directory"
        );
        assert_eq!(words(&Error::corrupt("is short").device("scsi0")), "is short");
    }
}
