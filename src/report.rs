//! What a person reads: errors, notes, sizes, tables. Everything that may come from an image is
//! escaped before it reaches the terminal.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Error, ErrorKind, Result};
use serde::Serialize;

use crate::exit::Exit;

/// Whether standard error may be coloured: <https://no-color.org>.
fn colours() -> bool {
    let asked_not_to = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    !asked_not_to && !dumb && io::stderr().is_terminal()
}

/// Prints to standard error; when nobody can read it there is nobody to tell.
pub fn say(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints an error: what and where, then what to do about it.
pub fn error(error: &Error) {
    let label = if colours() { "\x1b[1;31merror:\x1b[0m" } else { "error:" };
    let mut text = format!("imgtool: {label} {}", sentence(error));
    if let Some(hint) = error.hint_text() {
        let _ = write!(text, "\n  hint: {}", escape_control(hint));
    }
    say(&text);
}

/// The error's text. What the system refused is said as a sentence, without the number that the
/// standard library adds: it says nothing that the words do not.
fn sentence(error: &Error) -> String {
    let text = error.to_string();
    let Some(cause) = error.io_error() else { return text };
    let step = format!("{}: {cause}", escape_control(error.message()));
    let plain = match cause.raw_os_error() {
        Some(number) => step.replacen(&format!(" (os error {number})"), "", 1),
        None => step.clone(),
    };
    text.replacen(&step, &format!("can't {plain}"), 1)
}

/// The exit code that an error stands for.
pub fn exit_of(error: &Error) -> Exit {
    if error.kind() == ErrorKind::Usage { Exit::Usage } else { Exit::Failed }
}

/// Something that a person should know, and that is no error.
pub fn note(text: &str) {
    say(&format!("imgtool: note: {}", escape_control(text)));
}

/// Prints a result to standard output. A reader that has gone away is no error.
///
/// # Errors
/// When it can't be written.
pub fn print(text: &str) -> Result<()> {
    print_bytes(text.as_bytes())
}

/// [`print()`], for bytes as they are.
///
/// # Errors
/// When they can't be written.
pub fn print_bytes(bytes: &[u8]) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(|e| Error::io("write to standard output", e)),
    }
}

/// Prints a JSON document and a line feed.
///
/// # Errors
/// When it can't be written.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_string_pretty(value).map_err(|e| Error::io("write JSON", io::Error::other(e)))?;
    print(&(text + "\n"))
}

/// Bytes as qemu-img prints them: at most three digits and a power of 1024.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // 1000, not 1024: "0.98 MiB" is shorter than "1003 KiB".
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        v if v >= 99.95 || unit == 0 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    };
    let digits =
        if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { &digits };
    format!("{digits} {}", UNITS[unit])
}

/// Bytes for a person and exactly: "4 MiB (4194304 bytes)".
pub fn exact_size(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}

/// A share in percent: "62 %"; "-" of nothing.
pub fn percent(part: u64, whole: u64) -> String {
    match (part, whole) {
        (_, 0) => "-".to_owned(),
        (part, whole) if part < whole && part as f64 >= whole as f64 * 0.995 => ">99 %".to_owned(),
        (part, whole) if part > 0 && (part as f64) < whole as f64 * 0.005 => "<1 %".to_owned(),
        (part, whole) => format!("{:.0} %", part as f64 / whole as f64 * 100.0),
    }
}

/// A duration: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min".
pub fn human_time(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// How a column of a [`table`] is aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows in columns, each line ended; cells are escaped. An empty header row is left out.
pub fn table(indent: usize, columns: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| escape_control(cell)).collect()).collect();
    let header: Vec<String> = columns.iter().map(|(name, _)| (*name).to_owned()).collect();
    let has_header = header.iter().any(|name| !name.is_empty());
    let lines: Vec<&Vec<String>> = has_header.then_some(&header).into_iter().chain(&rows).collect();
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut out = String::new();
    for line in lines {
        let mut text = " ".repeat(indent);
        for (column, cell) in line.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(cell.chars().count()));
            let gap = if column > 0 { "  " } else { "" };
            match columns[column].1 {
                Align::Left => write!(text, "{gap}{cell}{pad}"),
                Align::Right => write!(text, "{gap}{pad}{cell}"),
            }
            .unwrap_or_default();
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_like_qemu_imgs() {
        for (bytes, text) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.98 KiB"),
            (1024, "1 KiB"),
            (196_608, "192 KiB"),
            (4 << 20, "4 MiB"),
            (5_255_168, "5.01 MiB"),
            (3 << 29, "1.5 GiB"),
            (64 << 40, "64 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(human_size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn what_the_system_refused_is_a_sentence() {
        let cause = io::Error::from_raw_os_error(2);
        let error = Error::io("open", cause).path("a.raw");
        assert_eq!(sentence(&error), "a.raw: can't open: No such file or directory");
        assert_eq!(sentence(&Error::refused("exists").path("a")), "a: exists");
    }

    #[test]
    fn shares_never_round_to_all_or_nothing() {
        assert_eq!(percent(0, 10), "0 %");
        assert_eq!(percent(1, 10_000), "<1 %");
        assert_eq!(percent(9_999, 10_000), ">99 %");
        assert_eq!(percent(10, 10), "100 %");
        assert_eq!(percent(0, 0), "-");
    }

    #[test]
    fn tables_escape_what_images_say() {
        let rows = vec![vec!["a\x1b[2J".to_owned(), "1".to_owned()], vec!["b".to_owned(), "22".to_owned()]];
        let text = table(2, &[("", Align::Left), ("", Align::Right)], &rows);
        assert_eq!(text, "  a\\u{1b}[2J   1\n  b           22\n");
    }
}
