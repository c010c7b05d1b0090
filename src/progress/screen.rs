//! Lines on a terminal that are drawn again and again.
//!
//! Each line ends before the last column, with a line feed, and the cursor waits below the lines. So a
//! message of another part of the program begins on a line of its own, and a terminal that is resized wraps
//! each line by itself: how many lines the old ones take up then is known.

use std::io::{self, Write};

use crate::report::{self, Paint, Stream, width};

/// The lines that are on the screen.
#[derive(Debug, Default)]
pub(super) struct Screen {
    /// Widths in columns of the lines drawn last.
    drawn: Vec<usize>,
    /// Columns and lines of the terminal then.
    size: (usize, usize),
}

/// A line with a bar between its name and its numbers.
#[derive(Debug)]
pub(super) struct Line {
    /// Name, padded to the width of all names.
    pub(super) name: String,
    /// Number of columns of the bar.
    pub(super) bar: usize,
    /// Share of the bar that is filled, from 0 to 1.
    pub(super) share: f64,
    /// Numbers after the bar, padded: a terminal that wraps a line may count blanks that were erased.
    pub(super) words: String,
}

impl Screen {
    /// Draws the lines in the place of the last ones. In a terminal with too few lines, draws only the last
    /// of them.
    pub(super) fn draw(&mut self, lines: &[Line], columns: usize, height: usize) {
        let hidden = (lines.len() + 1).saturating_sub(height).min(lines.len().saturating_sub(1));
        let style = BarStyle { has_blocks: report::unicode(), has_colours: Stream::Err.has_colours() };
        let mut frame = if self.size == (columns, height) { self.back(columns) } else { self.erase(columns) };
        self.drawn.clear();
        self.size = (columns, height);
        for line in lines.iter().skip(hidden) {
            let bar = style.bar(line.bar, line.share);
            frame.push_str(&format!("{} {bar} {}\x1b[K\n", line.name, line.words));
            self.drawn.push(width(&line.name) + 1 + line.bar + 1 + width(&line.words));
        }
        write(&(frame + "\x1b[J"));
    }

    /// Removes the lines.
    pub(super) fn clear(&mut self, columns: usize) {
        if !self.drawn.is_empty() {
            write(&(self.erase(columns) + "\x1b[J"));
            self.drawn.clear();
        }
    }

    /// Returns the sequence that erases the lines, and leaves the cursor at the start of the first one. It erases
    /// line by line: tmux would save lines at the top of the screen that are erased at once.
    fn erase(&self, columns: usize) -> String {
        let lines = lines_on_screen(&self.drawn, columns);
        format!("{}{}{}", self.back(columns), "\x1b[2K\n".repeat(lines), self.back(columns))
    }

    /// Returns the sequence that moves the cursor from below the lines to the start of the first one, in a
    /// terminal that has this number of columns now.
    fn back(&self, columns: usize) -> String {
        match lines_on_screen(&self.drawn, columns) {
            0 => "\r".to_owned(),
            lines => format!("\r\x1b[{lines}A"),
        }
    }
}

/// Returns the number of lines of a terminal that lines of these widths take up.
fn lines_on_screen(widths: &[usize], columns: usize) -> usize {
    widths.iter().map(|width| width.div_ceil(columns.max(1)).max(1)).sum()
}

/// Writes a frame in one call, so that it does not flicker. A failure is ignored, as it cannot be reported
/// anywhere.
fn write(frame: &str) {
    let _ = io::stderr().lock().write_all(frame.as_bytes());
}

/// Look of the bars.
#[derive(Debug, Clone, Copy)]
struct BarStyle {
    has_blocks: bool,
    has_colours: bool,
}

impl BarStyle {
    /// Draws a bar of this number of columns, filled up to `share`.
    fn bar(self, columns: usize, share: f64) -> String {
        const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
        let steps = (columns as f64 * 8.0 * share.clamp(0.0, 1.0)) as usize;
        let (full, rest) = (steps / 8, steps % 8);
        let mut bar = match self.has_blocks {
            true => "█".repeat(full) + EIGHTHS[rest],
            false if full == columns => "#".repeat(full),
            false => "#".repeat(full) + ">",
        };
        let blank = if self.has_blocks { " " } else { "-" };
        let used = width(&bar);
        if self.has_colours {
            bar = format!("\x1b[{}m{bar}\x1b[0m", Paint::Data.code());
        }
        bar + &blank.repeat(columns.saturating_sub(used))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_have_their_width_whatever_is_done() {
        for has_blocks in [true, false] {
            let style = BarStyle { has_blocks, has_colours: false };
            for step in 0..=100 {
                assert_eq!(width(&style.bar(17, f64::from(step) / 100.0)), 17);
            }
            assert_eq!(width(&style.bar(17, f64::NAN)), 17);
        }
        let blocks = BarStyle { has_blocks: true, has_colours: false };
        assert_eq!(blocks.bar(4, 0.0), "    ");
        assert_eq!(blocks.bar(4, 0.625), "██▌ ");
        assert_eq!(blocks.bar(4, 1.0), "████");
        let ascii = BarStyle { has_blocks: false, has_colours: false };
        assert_eq!(ascii.bar(4, 0.5), "##>-");
        assert_eq!(BarStyle { has_colours: true, ..blocks }.bar(4, 0.5), "\x1b[36m██\x1b[0m  ");
    }

    #[test]
    fn lines_that_a_narrower_terminal_wraps_are_counted() {
        assert_eq!(lines_on_screen(&[79, 12, 79], 80), 3);
        assert_eq!(lines_on_screen(&[79, 12, 79], 79), 3);
        assert_eq!(lines_on_screen(&[79, 12, 79], 78), 5);
        assert_eq!(lines_on_screen(&[79, 12, 79], 20), 9);
        // A wider terminal does not join lines.
        assert_eq!(lines_on_screen(&[79, 12, 79], 200), 3);
        assert_eq!(lines_on_screen(&[], 80), 0);
    }

    #[test]
    fn a_frame_begins_where_the_last_one_did() {
        let mut screen = Screen::default();
        assert_eq!(screen.back(80), "\r");
        screen.drawn = vec![79, 79, 79];
        assert_eq!(screen.back(80), "\r\x1b[3A");
        assert_eq!(screen.back(40), "\r\x1b[6A");
        screen.drawn = vec![79];
        assert_eq!(screen.erase(80), "\r\x1b[1A\x1b[2K\n\r\x1b[1A");
    }
}
