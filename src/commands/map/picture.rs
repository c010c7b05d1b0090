//! Drawing of the allocation of a disk: a grid of cells, for terminals.

use std::fmt::Write as _;
use std::ops::Range;

use imgtool_core::MapExtent;
use imgtool_core::error::escape_control;

use super::cells::{Cells, Counts, Kind};
use crate::report::{Paint, Stream, flow, human_size, percent, unicode};

/// Maximum number of cells in a line. Our choice: the line fits a terminal of 80 columns.
const MAX_COLUMNS: usize = 64;

/// Maximum number of lines. Our choice: the list of extents below stays visible.
const MAX_LINES: usize = 4;

/// Width of the guest offset that begins each line, in columns.
const LABEL: usize = 10;

/// Minimum number of guest bytes in a cell: one sector.
const MIN_CELL_LEN: u64 = 512;

/// Characters for the states of a cell.
struct Signs {
    /// Only data.
    full: char,
    /// More than half data.
    most: char,
    /// At most half data.
    some: char,
    /// Allocated zeros without data.
    zero: char,
    /// Nothing allocated.
    hole: char,
}

const SHADES: Signs = Signs { full: '█', most: '▓', some: '▒', zero: '░', hole: '·' };
const ASCII: Signs = Signs { full: '#', most: '+', some: '-', zero: '0', hole: '.' };

/// Drawing of a guest range of a device.
pub struct Picture {
    /// Number of cells in a line.
    columns: usize,
    cells: Cells,
}

impl Picture {
    /// Creates an empty drawing for a terminal of this width; `None` means 80 columns.
    pub fn new(range: Range<u64>, terminal_columns: Option<usize>) -> Self {
        let free = terminal_columns.unwrap_or(80).saturating_sub(LABEL + 2);
        // A power of two, so that every line begins at a round offset.
        let columns = [MAX_COLUMNS, 32, 16].into_iter().find(|columns| *columns <= free).unwrap_or(8);
        Self { columns, cells: Cells::new(range, columns * MAX_LINES, MIN_CELL_LEN) }
    }

    /// Adds an extent, which must be inside the range.
    pub fn add(&mut self, extent: &MapExtent) {
        self.cells.add(extent.start, extent.len, Kind::of(extent));
    }

    /// Returns the drawing: a title with the device's name, the lines of cells and a legend.
    pub fn draw(&self, name: &str) -> String {
        let signs = if unicode() { SHADES } else { ASCII };
        let Cells { range, cell_len, cells, total } = &self.cells;
        let len = self.cells.len();
        let mut text = format!(
            "{}: {}, {} data ({})",
            Stream::Out.paint(Paint::Bold, &escape_control(name)),
            human_size(len),
            human_size(total.stored()),
            percent(total.stored(), len)
        );
        for (kind, bytes) in total.shares(len) {
            if let Kind::Zero | Kind::Hole = kind {
                let what = if kind == Kind::Zero { "zero" } else { "hole" };
                let _ = write!(text, ", {} {what}", human_size(bytes));
            }
        }
        text = flow(Stream::Out, &text, 2) + "\n";
        for (line, cells) in cells.chunks(self.columns).enumerate() {
            let start = range.start.saturating_add((line * self.columns) as u64 * cell_len);
            let bar: String = cells.iter().map(|cell| self.sign(cell, &signs)).collect();
            let _ = writeln!(text, "{:>LABEL$} {}", human_size(start), Stream::Out.paint(Paint::Data, &bar));
        }
        let Signs { full, most, some, zero, hole } = signs;
        let _ = writeln!(text, "{:LABEL$} {full} data  {most} most  {some} some", "");
        let _ = writeln!(text, "{:LABEL$} {zero} zero  {hole} hole  {full}={}", "", human_size(*cell_len));
        text
    }

    fn sign(&self, cell: &Counts, signs: &Signs) -> char {
        let cell_len = self.cells.cell_len;
        match cell.stored() {
            0 if cell.zero == 0 => signs.hole,
            0 => signs.zero,
            // The last cell may cover fewer bytes than `cell_len`; then it is never full.
            stored if stored >= cell_len => signs.full,
            stored if stored > cell_len / 2 => signs.most,
            _ => signs.some,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_fit_the_terminal() {
        for (columns, cells) in [(Some(80), 256), (Some(76), 256), (Some(40), 64), (Some(5), 32), (None, 256)]
        {
            assert_eq!(Picture::new(0..64 << 20, columns).cells.cells.len(), cells, "{columns:?}");
        }
    }

    #[test]
    fn signs_tell_full_cells_from_partial_ones() {
        let mut picture = Picture::new(1024..1024 + 5 * 512, Some(80));
        for (start, len, kind) in
            [(1024, 600, Kind::Data), (2048, 512, Kind::Zero), (3072, 300, Kind::Compressed)]
        {
            picture.cells.add(start, len, kind);
        }
        let signs: String = picture.cells.cells.iter().map(|cell| picture.sign(cell, &ASCII)).collect();
        assert_eq!(signs, "#-0.+");
    }
}
