//! Numbers, durations and tables as text.

use std::fmt::Write as _;
use std::time::Duration;

use imgtool_core::error::escape_control;

use super::terminal::width;

/// Formats a size like qemu-img, with at most three digits and a binary unit.
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    // The limit is 1000, not 1024, so that three digits suffice: "0.98 MiB", not "1003 KiB".
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

/// Formats a size, rounded and exact: "4 MiB (4194304 bytes)".
pub fn exact_size(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", human_size(bytes))
}

/// Formats a share in percent ("62 %"); "-" if `whole` is zero. Only exact values become "0 %" and "100 %".
pub fn percent(part: u64, whole: u64) -> String {
    match (part, whole) {
        (_, 0) => "-".to_owned(),
        (part, whole) if part < whole && part as f64 >= whole as f64 * 0.995 => ">99 %".to_owned(),
        (part, whole) if part > 0 && (part as f64) < whole as f64 * 0.005 => "<1 %".to_owned(),
        (part, whole) => format!("{:.0} %", part as f64 / whole as f64 * 100.0),
    }
}

/// Formats a duration: "0.4 s", "12 s", "3 min 5 s", "2 h 10 min".
pub fn human_time(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Alignment of a column of a [`table`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    /// Left-aligned, for words.
    Left,
    /// Right-aligned, for numbers.
    Right,
}

/// Maximum width in columns of a cell that widens its column. Our limit: the longest file name is 255 bytes.
/// A name in an image may have 65535 characters, and padding 16000 rows to that width would take a gigabyte.
const WIDEST_CELL: usize = 255;

/// Formats rows as aligned columns and escapes control characters in cells. Omits a header without names. A
/// row with a cell wider than [`WIDEST_CELL`] is not aligned.
pub fn table(indent: usize, columns: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| escape_control(cell)).collect()).collect();
    let header: Vec<String> = columns.iter().map(|(name, _)| (*name).to_owned()).collect();
    let has_header = header.iter().any(|name| !name.is_empty());
    let lines: Vec<&Vec<String>> = has_header.then_some(&header).into_iter().chain(&rows).collect();
    let widest = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells.map(|cell| width(cell)).filter(|wide| *wide <= WIDEST_CELL).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(widest).collect();
    let mut out = String::new();
    for line in lines {
        let mut text = " ".repeat(indent);
        for (column, cell) in line.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(width(cell)));
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

/// Returns the width in columns of the longest line of a text.
pub fn widest(text: &str) -> usize {
    text.lines().map(width).max().unwrap_or(0)
}

/// Formats a count with its noun: "1 disk", "3 disks".
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_match_qemu_img() {
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
    fn percentages_never_round_to_0_or_100() {
        assert_eq!(percent(0, 10), "0 %");
        assert_eq!(percent(1, 10_000), "<1 %");
        assert_eq!(percent(9_999, 10_000), ">99 %");
        assert_eq!(percent(10, 10), "100 %");
        assert_eq!(percent(0, 0), "-");
    }

    #[test]
    fn tables_escape_control_characters() {
        let rows = vec![vec!["a\x1b[2J".to_owned(), "1".to_owned()], vec!["b".to_owned(), "22".to_owned()]];
        let text = table(2, &[("", Align::Left), ("", Align::Right)], &rows);
        assert_eq!(text, "  a\\u{1b}[2J   1\n  b           22\n");
    }

    #[test]
    fn a_huge_cell_does_not_widen_its_column() {
        let mut rows = vec![vec!["short".to_owned(), "1".to_owned()]; 100];
        rows.push(vec!["x".repeat(65_535), "2".to_owned()]);
        let text = table(0, &[("", Align::Left), ("", Align::Right)], &rows);
        assert!(text.starts_with("short  1\nshort  1\n"), "{}", &text[..40]);
        assert!(text.ends_with("x  2\n"));
    }
}
