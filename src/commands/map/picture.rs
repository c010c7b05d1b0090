//! The allocation of a disk as a bar of blocks.

use std::fmt::Write as _;
use std::ops::Range;

use imgtool_toolkit::error::escape_control;
use imgtool_toolkit::{Extent, ExtentKind};

use crate::report::{Paint, Stream, flow, human_size, percent, unicode};

/// Blocks in a line at most, and lines: what the eye takes in at once.
const MAX_COLUMNS: usize = 64;
const MAX_LINES: usize = 4;

/// In front of each line stands where it begins.
const LABEL: usize = 10;

/// A block stands for at least a sector.
const MIN_UNIT: u64 = 512;

/// How a block is drawn.
struct Signs {
    /// All of it is data; more than half; some.
    full: char,
    most: char,
    some: char,
    /// No data, but space is taken.
    zero: char,
    /// Nothing.
    hole: char,
}

const SHADES: Signs = Signs { full: '█', most: '▓', some: '▒', zero: '░', hole: '·' };
const ASCII: Signs = Signs { full: '#', most: '+', some: '-', zero: '0', hole: '.' };

/// What a block holds, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    data: u64,
    zero: u64,
}

/// A part of a device in blocks.
pub struct Picture {
    part: Range<u64>,
    columns: usize,
    /// Guest bytes of a block.
    unit: u64,
    blocks: Vec<Block>,
    data: u64,
    zero: u64,
    hole: u64,
}

impl Picture {
    /// An empty one, for a terminal of this width.
    pub fn new(part: Range<u64>, terminal: Option<usize>) -> Self {
        let room = terminal.unwrap_or(80).saturating_sub(LABEL + 2);
        // Labels are round numbers only if a line has a round number of blocks.
        let columns = [MAX_COLUMNS, 32, 16].into_iter().find(|columns| *columns <= room).unwrap_or(8);
        let len = part.end.saturating_sub(part.start);
        let most = (columns * MAX_LINES) as u64;
        let unit = len.div_ceil(most).checked_next_power_of_two().unwrap_or(1 << 63).max(MIN_UNIT);
        // At most 256 blocks.
        let blocks = vec![Block::default(); len.div_ceil(unit) as usize];
        Self { part, columns, unit, blocks, data: 0, zero: 0, hole: 0 }
    }

    /// Adds an extent of the part.
    pub fn add(&mut self, extent: Extent) {
        match extent.kind {
            ExtentKind::Data => self.data += extent.len,
            ExtentKind::Zero => self.zero += extent.len,
            ExtentKind::Hole => self.hole += extent.len,
        }
        if extent.kind == ExtentKind::Hole {
            return;
        }
        let mut at = extent.start.saturating_sub(self.part.start);
        let end = extent.end().saturating_sub(self.part.start);
        while at < end {
            let index = at / self.unit;
            let next = end.min((index + 1).saturating_mul(self.unit));
            // `index` is below the number of blocks as long as the extent is within the part.
            if let Some(block) = self.blocks.get_mut(index as usize) {
                *if extent.kind == ExtentKind::Data { &mut block.data } else { &mut block.zero } += next - at;
            }
            at = next;
        }
    }

    /// The lines.
    pub fn draw(&self, name: &str) -> String {
        let signs = if unicode() { SHADES } else { ASCII };
        let len = self.part.end.saturating_sub(self.part.start);
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
        for (line, blocks) in self.blocks.chunks(self.columns).enumerate() {
            let begin = self.part.start.saturating_add((line * self.columns) as u64 * self.unit);
            let bar: String = blocks.iter().map(|block| self.sign(block, &signs)).collect();
            let _ = writeln!(text, "{:>LABEL$} {}", human_size(begin), Stream::Out.paint(Paint::Data, &bar));
        }
        let Signs { full, most, some, zero, hole } = signs;
        let _ = writeln!(text, "{:LABEL$} {full} data  {most} most  {some} some", "");
        let _ = writeln!(text, "{:LABEL$} {zero} zero  {hole} hole  {full}={}", "", human_size(self.unit));
        text
    }

    fn sign(&self, block: &Block, signs: &Signs) -> char {
        match block {
            Block { data: 0, zero: 0 } => signs.hole,
            Block { data: 0, .. } => signs.zero,
            // The last block may be shorter than the others: it counts as full a little late.
            Block { data, .. } if *data >= self.unit => signs.full,
            Block { data, .. } if *data > self.unit / 2 => signs.most,
            _ => signs.some,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_round_and_few() {
        for (len, columns, unit, blocks) in [
            (64u64 << 20, 80, 256 << 10, 256),
            (65 << 20, 80, 512 << 10, 130),
            (512, 80, 512, 1),
            (0, 80, 512, 0),
            (u64::MAX, 80, 1 << 56, 256),
            (64 << 20, 40, 1 << 20, 64),
        ] {
            let picture = Picture::new(0..len, Some(columns));
            assert_eq!((picture.unit, picture.blocks.len()), (unit, blocks), "{len}");
        }
    }

    #[test]
    fn extents_fill_their_blocks() {
        let mut picture = Picture::new(1024..1024 + 4 * 512, Some(80));
        let add = |picture: &mut Picture, start, len, kind| picture.add(Extent { start, len, kind });
        add(&mut picture, 1024, 600, ExtentKind::Data);
        add(&mut picture, 1624, 424, ExtentKind::Hole);
        add(&mut picture, 2048, 512, ExtentKind::Zero);
        add(&mut picture, 2560, 512, ExtentKind::Hole);
        let signs: String = picture.blocks.iter().map(|block| picture.sign(block, &ASCII)).collect();
        assert_eq!(signs, "#-0.");
        assert_eq!((picture.data, picture.zero, picture.hole), (600, 512, 936));
    }
}
