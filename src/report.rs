//! Output for people: errors, notes, sizes and tables. Text from an image is escaped before it reaches
//! the terminal.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::sync::OnceLock;

use imgtool_core::error::{escape_control, is_hidden};
use imgtool_core::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::exit::Exit;
use crate::{compat, remedy, sandbox};

mod json_lines;
mod terminal;
mod text;

pub use json_lines::{are_json as speaks_json, line as json_line, speak as speak_json};
pub use terminal::{Paint, Stream, fit, flow, flow_within, shorten, unicode, width, wrap};
pub use text::{Align, count, exact_size, human_size, human_time, percent, table, widest};

/// Name of the program that this one stands in for.
static STANDS_IN_FOR: OnceLock<&str> = OnceLock::new();

/// Makes messages begin with the name of another program, and without a label as that program prints them.
pub fn speak_as(program: &'static str) {
    // The first call counts.
    let _ = STANDS_IN_FOR.set(program);
}

/// Prints a line to standard error. A failure is ignored, as it cannot be reported anywhere.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints a message to standard error, after the program's name.
pub fn tell(text: &str) {
    if speaks_json() {
        return json_lines::message("info", text);
    }
    tell_person(text);
}

fn tell_person(text: &str) {
    let program = STANDS_IN_FOR.get().unwrap_or(&"imgtool");
    say(&flow(Stream::Err, &format!("{program}: {text}"), 2));
}

/// Prints an error and its hint.
pub fn error(error: &Error) {
    if speaks_json() {
        return json_lines::error(error, hint(error));
    }
    let mut text = match STANDS_IN_FOR.get() {
        Some(program) => format!("{program}: {}", sentence(error)),
        None => {
            let label = Stream::Err.paint(Paint::Bad, "error:");
            flow(Stream::Err, &format!("imgtool: {label} {}", sentence(error)), 2)
        }
    };
    if STANDS_IN_FOR.get().is_some() && !compat::is_on() {
        return say(&text);
    }
    if let Some(hint) = hint(error) {
        let hint = compat::as_called(escape_control(&hint));
        let _ = write!(text, "\n{}", flow(Stream::Err, &format!("  hint: {hint}"), 4));
    }
    say(&text);
}

/// Returns what the user can do about an error.
fn hint(error: &Error) -> Option<String> {
    error.remedy().map(remedy::words).or_else(|| confinement(error))
}

/// Returns a hint for an error that the confinement of this process may have caused.
fn confinement(error: &Error) -> Option<String> {
    let is_denied = error.io_error().is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    (is_denied && sandbox::is_narrowed()).then(|| {
        "the program had confined itself to the files of the run: if another program has put a file in the place of \
         one of them, try again"
            .to_owned()
    })
}

/// Returns the text of an error with its cause, without the error number that the standard library appends.
fn sentence(error: &Error) -> String {
    let text = format!("{error:#}");
    match error.io_error().and_then(io::Error::raw_os_error) {
        Some(number) => text.replacen(&format!(" (os error {number})"), "", 1),
        None => text,
    }
}

/// Returns the exit code for an error.
pub fn exit_of(error: &Error) -> Exit {
    match error.kind() {
        ErrorKind::Usage if !compat::is_on() => Exit::Usage,
        ErrorKind::Unavailable if !compat::is_on() => Exit::TryAgain,
        _ => Exit::Failed,
    }
}

/// Prints a note: information that the user needs, but not an error. In the place of qemu-img, standard error
/// holds errors alone.
pub fn note(text: &str) {
    if !compat::is_on() {
        warning(text);
    }
}

/// Prints a note that belongs to an error.
pub fn warning(text: &str) {
    if speaks_json() {
        return json_lines::message("note", text);
    }
    tell_person(&format!("{} {}", Stream::Err.paint(Paint::Warning, "note:"), escape_control(text)));
}

/// Prints a note if the report on finished outputs could not be printed. They are complete all the same, so
/// the exit code must not say that the command failed.
pub fn note_unprinted(printed: Result<()>) {
    if let Err(error) = printed {
        note(&unprinted(&error));
    }
}

/// Words the failure to print the report on finished outputs.
pub fn unprinted(error: &Error) -> String {
    format!("{}; the outputs are complete", sentence(error))
}

/// Prints a result to standard output. A closed pipe is not an error.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// Prints bytes to standard output, like [`print()`].
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|e| Error::io("write to standard output", e)),
    }
}

/// Prints a JSON document and a line feed.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    // Scripts also look for lines of qemu-img's JSON.
    let indent: &[u8] = if compat::is_on() { b"    " } else { b"  " };
    let mut text = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(indent);
    let written = value.serialize(&mut serde_json::Serializer::with_formatter(&mut text, formatter));
    written.map_err(|e| Error::io("write JSON", io::Error::other(e)))?;
    print(&(json_for_terminals(&String::from_utf8_lossy(&text)) + "\n"))
}

/// Escapes the characters that JSON permits in strings but a terminal would obey or not show (DEL, C1 controls,
/// direction marks, tags). The values stay the same for a JSON parser.
pub fn json_for_terminals(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // Line feeds occur only between values: inside strings the serializer has escaped them.
        if c != '\n' && is_hidden(c) {
            // JSON escapes a character above U+FFFF as two UTF-16 units.
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        } else {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_keeps_the_value_of_hidden_characters() {
        let all: String = ('\0'..=char::MAX).collect();
        let shown = json_for_terminals(&serde_json::to_string(&all).expect("a string"));
        assert!(!shown.contains(is_hidden));
        assert_eq!(serde_json::from_str::<String>(&shown).expect("JSON"), all);
    }

    #[test]
    fn io_errors_omit_the_errno() {
        let cause = io::Error::from_raw_os_error(2);
        let error = Error::io("open", cause).path("a.raw");
        assert_eq!(sentence(&error), "a.raw: can't open: No such file or directory");
        assert_eq!(sentence(&Error::refused("already exists").path("a")), "a: already exists");
        assert_eq!(
            sentence(&Error::corrupt("is empty").path(imgtool_core::Location::Stdin)),
            "standard input: is empty"
        );
    }
}
