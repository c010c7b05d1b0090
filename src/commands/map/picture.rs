//! Drawing of the allocation of a disk: a grid of cells, for terminals.

use std::fmt::Write as _;
use std::ops::Range;

use imgtool_core::error::escape_control;
use imgtool_core::{Extent, ExtentKind};

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

/// Number of guest bytes of each kind in a cell.
#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    data: u64,
    zero: u64,
}

/// Drawing of a guest range of a device.
pub struct Picture {
    range: Range<u64>,
    columns: usize,
    /// Number of guest bytes in a cell.
    cell_len: u64,
    cells: Vec<Cell>,
    data: u64,
    zero: u64,
    hole: u64,
}

impl Picture {
    /// Creates an empty drawing for a terminal of this width; `None` means 80 columns.
    pub fn new(range: Range<u64>, terminal_columns: Option<usize>) -> Self {
        let free = terminal_columns.unwrap_or(80).saturating_sub(LABEL + 2);
        // A power of two, so that every line begins at a round offset.
        let columns = [MAX_COLUMNS, 32, 16].into_iter().find(|columns| *columns <= free).unwrap_or(8);
        let len = range.end.saturating_sub(range.start);
        let max_cells = (columns * MAX_LINES) as u64;
        let cell_len =
            len.div_ceil(max_cells).checked_next_power_of_two().unwrap_or(1 << 63).max(MIN_CELL_LEN);
        // At most `max_cells`, so at most 256.
        let cells = vec![Cell::default(); len.div_ceil(cell_len) as usize];
        Self { range, columns, cell_len, cells, data: 0, zero: 0, hole: 0 }
    }

    /// Adds an extent, which must be inside the range.
    pub fn add(&mut self, extent: Extent) {
        match extent.kind {
            ExtentKind::Data => self.data += extent.len,
            ExtentKind::Zero => self.zero += extent.len,
            ExtentKind::Hole => self.hole += extent.len,
        }
        if extent.kind == ExtentKind::Hole {
            return;
        }
        let mut at = extent.start.saturating_sub(self.range.start);
        let end = extent.end().saturating_sub(self.range.start);
        while at < end {
            let index = at / self.cell_len;
            let next = end.min((index + 1).saturating_mul(self.cell_len));
            if let Some(cell) = self.cells.get_mut(index as usize) {
                *if extent.kind == ExtentKind::Data { &mut cell.data } else { &mut cell.zero } += next - at;
            }
            at = next;
        }
    }

    /// Returns the drawing: a title with the device's name, the lines of cells and a legend.
    pub fn draw(&self, name: &str) -> String {
        let signs = if unicode() { SHADES } else { ASCII };
        let len = self.range.end.saturating_sub(self.range.start);
        let mut text = format!(
            "{}: {}, {} data ({})",
            Stream::Out.paint(Paint::Bold, &escape_control(name)),
            human_size(len),
            human_size(self.data),
            percent(self.data, len)
        );
        for (bytes, what) in [(self.zero, "zero"), (self.hole, "hole")] {
            if bytes > 0 {
                let _ = write!(text, ", {} {what}", human_size(bytes));
            }
        }
        text = flow(Stream::Out, &text, 2) + "\n";
        for (line, cells) in self.cells.chunks(self.columns).enumerate() {
            let start = self.range.start.saturating_add((line * self.columns) as u64 * self.cell_len);
            let bar: String = cells.iter().map(|cell| self.sign(cell, &signs)).collect();
            let _ = writeln!(text, "{:>LABEL$} {}", human_size(start), Stream::Out.paint(Paint::Data, &bar));
        }
        let Signs { full, most, some, zero, hole } = signs;
        let _ = writeln!(text, "{:LABEL$} {full} data  {most} most  {some} some", "");
        let _ =
            writeln!(text, "{:LABEL$} {zero} zero  {hole} hole  {full}={}", "", human_size(self.cell_len));
        text
    }

    fn sign(&self, cell: &Cell, signs: &Signs) -> char {
        match cell {
            Cell { data: 0, zero: 0 } => signs.hole,
            Cell { data: 0, .. } => signs.zero,
            // The last cell may cover fewer bytes than `cell_len`; then it is never full.
            Cell { data, .. } if *data >= self.cell_len => signs.full,
            Cell { data, .. } if *data > self.cell_len / 2 => signs.most,
            _ => signs.some,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_have_round_sizes_and_fit() {
        for (len, columns, cell_len, cells) in [
            (64u64 << 20, 80, 256 << 10, 256),
            (65 << 20, 80, 512 << 10, 130),
            (512, 80, 512, 1),
            (0, 80, 512, 0),
            (u64::MAX, 80, 1 << 56, 256),
            (64 << 20, 40, 1 << 20, 64),
        ] {
            let picture = Picture::new(0..len, Some(columns));
            assert_eq!((picture.cell_len, picture.cells.len()), (cell_len, cells), "{len}");
        }
    }

    #[test]
    fn extents_fill_their_cells() {
        let mut picture = Picture::new(1024..1024 + 4 * 512, Some(80));
        let add = |picture: &mut Picture, start, len, kind| picture.add(Extent { start, len, kind });
        add(&mut picture, 1024, 600, ExtentKind::Data);
        add(&mut picture, 1624, 424, ExtentKind::Hole);
        add(&mut picture, 2048, 512, ExtentKind::Zero);
        add(&mut picture, 2560, 512, ExtentKind::Hole);
        let signs: String = picture.cells.iter().map(|cell| picture.sign(cell, &ASCII)).collect();
        assert_eq!(signs, "#-0.");
        assert_eq!((picture.data, picture.zero, picture.hole), (600, 512, 936));
    }
}
