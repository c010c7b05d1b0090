//! Properties of the terminal, and text that fits it.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};

use unicode_width::UnicodeWidthStr;

/// An output stream of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output: results.
    Out,
    /// Standard error: everything else.
    Err,
}

impl Stream {
    /// True if the stream is a terminal.
    pub fn is_terminal(self) -> bool {
        match self {
            Stream::Out => io::stdout().is_terminal(),
            Stream::Err => io::stderr().is_terminal(),
        }
    }

    /// True if the stream is a terminal with a movable cursor.
    pub fn can_draw(self) -> bool {
        self.is_terminal() && std::env::var_os("TERM").is_some_and(|term| term != "dumb")
    }

    /// True if the stream may be coloured; `NO_COLOR` forbids it (<https://no-color.org>).
    pub fn has_colours(self) -> bool {
        let is_forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        !is_forbidden && self.can_draw()
    }

    /// Returns the width of the terminal in columns; `None` if the stream is not a terminal.
    pub fn columns(self) -> Option<usize> {
        self.size().map(|(width, _)| usize::from(width.0))
    }

    /// Returns the height of the terminal in lines; `None` if the stream is not a terminal.
    pub fn lines(self) -> Option<usize> {
        self.size().map(|(_, height)| usize::from(height.0))
    }

    fn size(self) -> Option<(terminal_size::Width, terminal_size::Height)> {
        match self {
            Stream::Out => terminal_size::terminal_size_of(io::stdout()),
            Stream::Err => terminal_size::terminal_size_of(io::stderr()),
        }
    }

    /// Colours `text` if the stream has colours.
    pub fn paint(self, paint: Paint, text: &str) -> String {
        if self.has_colours() { format!("\x1b[{}m{text}\x1b[0m", paint.code()) } else { text.to_owned() }
    }
}

/// Style of highlighted text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paint {
    /// Heading.
    Bold,
    /// Success.
    Good,
    /// Note or partial success.
    Warning,
    /// Failure.
    Bad,
    /// Data in a drawing.
    Data,
}

impl Paint {
    /// Returns the parameters of the escape sequence (ECMA-48, SGR).
    pub fn code(self) -> &'static str {
        match self {
            Paint::Bold => "1",
            Paint::Good => "1;32",
            Paint::Warning => "1;33",
            Paint::Bad => "1;31",
            Paint::Data => "36",
        }
    }
}

/// True if the character set of the locale is UTF-8.
pub fn unicode() -> bool {
    let var = |name| std::env::var(name).ok().filter(|value: &String| !value.is_empty());
    let locale = var("LC_ALL").or_else(|| var("LC_CTYPE")).or_else(|| var("LANG")).unwrap_or_default();
    let locale = locale.to_ascii_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Returns the number of terminal columns that a text occupies.
pub fn width(text: &str) -> usize {
    text.width()
}

/// Pads or shortens a text to exactly `columns`.
pub fn fit(text: &str, columns: usize) -> String {
    let text = shorten(text, columns);
    let pad = columns.saturating_sub(width(&text));
    format!("{text}{}", " ".repeat(pad))
}

/// Shortens a text to at most `columns`. An ellipsis replaces the middle: names of disks and files differ at
/// their start or at their end.
pub fn shorten(text: &str, columns: usize) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let Some(kept) = columns.checked_sub(1) else { return String::new() };
    let mark = if unicode() { "…" } else { "~" };
    // The end is kept first, since it has the extension.
    let end = kept.div_ceil(2);
    let tail: Vec<char> = within(text.chars().rev(), end);
    let head: String = within(text.chars(), kept - end).into_iter().collect();
    head + mark + &tail.into_iter().rev().collect::<String>()
}

/// Returns the first of `chars`, as many as fit into `columns`.
fn within(chars: impl Iterator<Item = char>, columns: usize) -> Vec<char> {
    let mut used = 0;
    let fits = |c: &char| {
        used += width(c.encode_utf8(&mut [0; 4]));
        used <= columns
    };
    chars.take_while(fits).collect()
}

/// Wraps a text between words at the width of the terminal, and indents the further lines. On any other
/// stream the text stays one line, which is easier to parse.
pub fn flow(stream: Stream, text: &str, indent: usize) -> String {
    match stream.columns() {
        Some(columns) => flow_within(columns, text, indent),
        None => text.to_owned(),
    }
}

/// Wraps a text like [`flow`], at this number of columns.
pub fn flow_within(columns: usize, text: &str, indent: usize) -> String {
    let mut out = String::new();
    let mut used = 0;
    for (index, word) in text.split(' ').enumerate() {
        let wide = width_without_colours(word);
        if index > 0 && used + 1 + wide > columns && used > indent {
            let _ = write!(out, "\n{:indent$}", "");
            used = indent;
        } else if index > 0 {
            out.push(' ');
            used += 1;
        }
        out.push_str(word);
        used += wide;
    }
    out
}

/// Returns the width of a text without the escape sequences of [`Stream::paint`].
fn width_without_colours(text: &str) -> usize {
    let mut parts = text.split('\x1b');
    let first = parts.next().map_or(0, width);
    first + parts.map(|part| width(part.split_once('m').map_or(part, |(_, rest)| rest))).sum::<usize>()
}

/// Splits a text between words into lines of at most `columns`. A longer word is not split.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last().map_or(0, |line| width(line));
        if line > 0 && line + 1 + width(word) > columns {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_padded_or_shortened() {
        assert_eq!(fit("a", 3), "a  ");
        assert_eq!(width(&fit("drive-scsi0", 8)), 8);
        // Each of these characters is two columns wide.
        assert_eq!(width(&fit("磁盘磁盘磁盘", 6)), 6);
        assert_eq!(width(&fit("磁盘", 6)), 6);
        assert_eq!(width(&fit("磁盘磁盘磁盘", 5)), 5);
        assert_eq!(fit("abc", 0), "");
        // Combining marks occupy no column.
        assert_eq!(width(&shorten(&"e\u{301}".repeat(40), 9)), 9);
    }

    #[test]
    fn long_names_keep_their_start_and_their_end() {
        let shown = shorten("/srv/backups/2026/vm-100-disk-0.qcow2", 20);
        let (head, tail) = shown.split_once(['…', '~']).expect("a mark");
        assert_eq!((head, tail), ("/srv/back", "isk-0.qcow2".split_at(1).1));
        assert_eq!(shorten("a.raw", 5), "a.raw");
        assert_eq!(width(&shorten("a.raw", 1)), 1);
    }

    #[test]
    fn messages_wrap_between_words_and_keep_inner_blanks() {
        assert_eq!(flow_within(12, "name: one two  three", 2), "name: one\n  two  three");
        assert_eq!(flow_within(80, "a  b", 2), "a  b");
        assert_eq!(flow_within(4, "unbreakable", 2), "unbreakable");
        // Escape sequences occupy no columns.
        assert_eq!(flow_within(9, "\x1b[1;31mone\x1b[0m two x", 0), "\x1b[1;31mone\x1b[0m two x");
    }

    #[test]
    fn paragraphs_wrap_between_words() {
        assert_eq!(wrap("one two  three", 7), ["one two", "three"]);
        assert_eq!(wrap("unbreakable", 3), ["unbreakable"]);
    }
}
