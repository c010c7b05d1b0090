//! Drawing of the allocation of disks as an SVG document: for browsers, reports and web pages.
//!
//! The document refers to nothing outside of itself, and has no scripts. Its number of elements is bounded,
//! whatever the number of extents: a square stands for a part of the disk, and equal neighbours in a row are
//! one element.

use std::fmt::Write as _;

use super::cells::{Cells, Counts, Kind};
use crate::report::{human_size, percent, width};

/// Number of squares in a row: a power of two, so that every row begins at a round offset.
const COLUMNS: usize = 128;

/// Maximum number of rows of a disk. Our choice: 4096 squares fit half a screen.
const MAX_ROWS: usize = 32;

/// Number of rows that the disks of an image share. Our choice. An archive has at most 254 disks, and each of
/// them has at least one row, so a document has at most 254 × 128 squares.
const SHARED_ROWS: usize = 128;

/// Minimum number of guest bytes in a square. Our choice: the smallest block of a common file system.
const MIN_CELL_LEN: u64 = 4096;

/// Distance between two squares in pixels.
const PITCH: usize = 7;

/// Width of the document in pixels: margins, labels of the rows, and [`COLUMNS`] squares.
const WIDTH: usize = 1000;
const MARGIN: usize = 32;
const GRID_X: usize = WIDTH - MARGIN - COLUMNS * PITCH;

/// Width of the content in pixels.
const INNER: usize = WIDTH - 2 * MARGIN;

/// Distance in rows between two labels, so that they do not overlap.
const LABEL_ROWS: usize = 4;

/// Maximum width of a name in columns of a terminal. A longer one loses its middle.
const NAME_COLUMNS: usize = 72;

/// Maximum number of characters in a column of a name. Our choice: a letter with its accents.
const MAX_PER_COLUMN: usize = 4;

/// Size in a window that is narrower than the document, and colours for light and dark screens. Each kind has
/// a shape of its own, and the hues differ for people who are colour-blind: blue, orange and bluish green,
/// after Okabe and Ito.
const STYLE: &str = "\
svg{max-width:100%;height:auto}
text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif;fill:#1f2328;\
font-variant-numeric:tabular-nums}
.page{fill:#fff}.h1{font-size:20px;font-weight:650}.h2{font-size:15px;font-weight:600}
.note,.row{fill:#59636e;font-size:12px}.row{font-size:10px}.stat{font-size:13px}
.data{fill:#0072b2}.compressed{fill:#c46a00}.backing{fill:#00866a}.zero{fill:#8c959f}.hole{fill:#d5dae0}
.cut{stroke:#fff}.frame{fill:none;stroke:#b6bec7}.rule{stroke:#d5dae0}.run:hover{opacity:.6}
@media(prefers-color-scheme:dark){
text{fill:#e6edf3}.page{fill:#0d1117}.note,.row{fill:#9198a1}
.data{fill:#4aa8f0}.compressed{fill:#f0a030}.backing{fill:#2fc79a}.zero{fill:#6e7681}.hole{fill:#343b44}
.cut{stroke:#0d1117}.frame{stroke:#59616b}.rule{stroke:#343b44}}
";

/// Opacities of the squares, from a little to full.
const LEVELS: [&str; 4] = [".32", ".54", ".77", "1"];

/// A disk to be drawn.
#[derive(Debug)]
pub struct Chart {
    /// Name of the device.
    pub name: String,
    /// Content of the device.
    pub cells: Cells,
}

impl Chart {
    /// Creates an empty chart of a guest range, for a document with this many disks.
    pub fn new(name: &str, range: std::ops::Range<u64>, disks: usize) -> Self {
        let rows = (SHARED_ROWS / disks.max(1)).clamp(1, MAX_ROWS);
        Self { name: name.to_owned(), cells: Cells::new(range, rows * COLUMNS, MIN_CELL_LEN) }
    }

    /// Returns the kinds that the disk has, with their bytes.
    fn shares(&self) -> Vec<(Kind, u64)> {
        self.cells.total.shares(self.cells.len())
    }

    /// Returns the chart in one line of text.
    fn summary(&self) -> String {
        let len = self.cells.len();
        let shares = self.shares().into_iter().map(|(kind, bytes)| share_text(kind, bytes, len));
        let parts: Vec<String> = std::iter::once(human_size(len)).chain(shares).collect();
        format!("{}: {}", shorten(&self.name, NAME_COLUMNS), parts.join(", "))
    }
}

/// Returns the document.
pub fn document(title: &str, subtitle: &str, charts: &[Chart]) -> String {
    let title = shorten(title, NAME_COLUMNS);
    let mut body = format!(
        "<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         <text class=\"h1\" x=\"{MARGIN}\" y=\"46\">{}</text>\n<text class=\"note\" x=\"{MARGIN}\" y=\"68\">{}</text>\n",
        xml(&title),
        xml(subtitle)
    );
    legend(&mut body, charts, 96);
    let mut y = 116;
    for chart in charts {
        y = draw(&mut body, chart, y);
    }
    let summaries: Vec<String> = charts.iter().map(Chart::summary).collect();
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{y}\" viewBox=\"0 0 {WIDTH} {y}\" \
         role=\"img\" aria-labelledby=\"title desc\">\n<title id=\"title\">{}</title>\n<desc id=\"desc\">{}</desc>\n\
         <style>\n{STYLE}</style>\n{}{body}</svg>\n",
        xml(&format!("Map of {title}")),
        xml(&summaries.join("\n")),
        patterns(),
        y = y + MARGIN / 2
    )
}

/// Returns the definitions of the squares, one for each kind and opacity.
fn patterns() -> String {
    let mut text = String::from("<defs>\n");
    let open = |id: &str| {
        format!("<pattern id=\"{id}\" width=\"{PITCH}\" height=\"{PITCH}\" patternUnits=\"userSpaceOnUse\">")
    };
    const SQUARE: &str = "x=\".5\" y=\".5\" width=\"6\" height=\"6\" rx=\"1\"";
    for (kind, cut) in [
        (Kind::Data, ""),
        (Kind::Compressed, "<path class=\"cut\" d=\"M0 7 7 0\" stroke-width=\"1.2\"/>"),
        (Kind::Backing, "<path class=\"cut\" d=\"M3.5 0V7\" stroke-width=\"1.2\"/>"),
    ] {
        let class = class(kind);
        for (level, opacity) in LEVELS.iter().enumerate() {
            let id = format!("{class}{}", level + 1);
            let square = format!("<rect class=\"{class}\" {SQUARE} opacity=\"{opacity}\"/>");
            let _ = writeln!(text, "{}{square}{cut}</pattern>", open(&id));
        }
    }
    let frame = "<rect class=\"frame\" x=\"1.5\" y=\"1.5\" width=\"4\" height=\"4\" rx=\".5\"/>";
    let dot = "<circle class=\"hole\" cx=\"3.5\" cy=\"3.5\" r=\"1.1\"/>";
    let _ = writeln!(text, "{}{frame}</pattern>\n{}{dot}</pattern>\n</defs>", open("zero"), open("hole"));
    text
}

/// Draws the explanation of the squares. Kinds that no disk has are left out, but for data and holes.
fn legend(body: &mut String, charts: &[Chart], y: usize) {
    let has = |kind| charts.iter().any(|chart| chart.shares().iter().any(|(other, _)| *other == kind));
    let mut x = MARGIN;
    let _ = writeln!(body, "<g transform=\"translate(0 {y})\">");
    for kind in [Kind::Data, Kind::Compressed, Kind::Backing, Kind::Zero, Kind::Hole] {
        if !(has(kind) || matches!(kind, Kind::Data | Kind::Hole)) {
            continue;
        }
        let (ids, text): (Vec<String>, _) = match kind {
            Kind::Data => (steps(kind), "data: a little … full"),
            Kind::Compressed => (steps(kind), "compressed data"),
            Kind::Backing => (steps(kind), "data of a backing image"),
            Kind::Zero => (vec!["zero".to_owned()], "zero: marked as zeros"),
            Kind::Hole => (vec!["hole".to_owned()], "hole: nothing stored"),
        };
        let wide = ids.len() * PITCH;
        let _ = write!(body, "<g transform=\"translate({x} -{PITCH})\">");
        for (index, id) in ids.iter().enumerate() {
            let x = index * PITCH;
            let _ =
                write!(body, "<rect x=\"{x}\" width=\"{PITCH}\" height=\"{PITCH}\" fill=\"url(#{id})\"/>");
        }
        let _ = writeln!(body, "<text class=\"note\" x=\"{}\" y=\"8\">{text}</text></g>", wide + 6);
        // 6.2 pixels: more than the mean width of a letter of this size.
        x += wide + 28 + text.chars().count() * 62 / 10;
    }
    body.push_str("</g>\n");
}

fn steps(kind: Kind) -> Vec<String> {
    (1..=LEVELS.len()).map(|level| format!("{}{level}", class(kind))).collect()
}

/// Draws a disk below `top`. Returns the position of its lower end.
fn draw(body: &mut String, chart: &Chart, top: usize) -> usize {
    let len = chart.cells.len();
    let right = WIDTH - MARGIN;
    let _ = writeln!(
        body,
        "<path class=\"rule\" d=\"M{MARGIN} {top}.5H{right}\"/>\n\
         <text class=\"h2\" x=\"{MARGIN}\" y=\"{y}\">{}</text>\n\
         <text class=\"h2\" x=\"{right}\" y=\"{y}\" text-anchor=\"end\">{}</text>",
        xml(&shorten(&chart.name, NAME_COLUMNS)),
        human_size(len),
        y = top + 28
    );
    bar(body, chart, top + 40);
    let mut x = MARGIN;
    for (kind, bytes) in chart.shares() {
        let text = share_text(kind, bytes, len);
        let _ = writeln!(
            body,
            "<circle class=\"{}\" cx=\"{}\" cy=\"{}\" r=\"4\"/><text class=\"stat\" x=\"{}\" y=\"{}\">{text}</text>",
            class(kind),
            x + 4,
            top + 69,
            x + 14,
            top + 73
        );
        // 7.2 pixels: more than the mean width of a letter of this size.
        x += 32 + text.chars().count() * 72 / 10;
    }
    let rows = chart.cells.cells.len().div_ceil(COLUMNS);
    grid(body, chart, top + 88);
    let end = top + 88 + rows * PITCH;
    let square = human_size(chart.cells.cell_len);
    let row = human_size(chart.cells.cell_len.saturating_mul(COLUMNS as u64));
    let _ = writeln!(
        body,
        "<text class=\"note\" x=\"{right}\" y=\"{}\" text-anchor=\"end\">one square: {square}, one row: {row}</text>",
        end + 18
    );
    end + 34
}

/// Draws the shares of the kinds as a bar.
fn bar(body: &mut String, chart: &Chart, y: usize) {
    let len = chart.cells.len().max(1) as f64;
    let mut start = 0.0;
    for (kind, bytes) in chart.shares() {
        let wide = bytes as f64 / len * INNER as f64;
        // A gap of one pixel between parts; a tiny part stays visible.
        let _ = writeln!(
            body,
            "<rect class=\"{}\" x=\"{:.1}\" y=\"{y}\" width=\"{:.1}\" height=\"8\" rx=\"2\"/>",
            class(kind),
            MARGIN as f64 + start,
            (wide - 1.0).max(1.0)
        );
        start += wide;
    }
}

/// Draws the squares of a disk, with labels of its rows.
fn grid(body: &mut String, chart: &Chart, top: usize) {
    let Cells { range, cell_len, cells, .. } = &chart.cells;
    let _ = writeln!(body, "<g transform=\"translate({GRID_X} {top})\">");
    for (row, line) in cells.chunks(COLUMNS).enumerate() {
        let start_of = |column: usize| {
            range.start.saturating_add(((row * COLUMNS + column) as u64).saturating_mul(*cell_len))
        };
        let y = row * PITCH;
        if row % LABEL_ROWS == 0 {
            let label = human_size(start_of(0));
            let _ = writeln!(
                body,
                "<text class=\"row\" x=\"-6\" y=\"{}\" text-anchor=\"end\">{label}</text>",
                y + 7
            );
        }
        let mut column = 0;
        for run in line.chunk_by(|a, b| fill(a, *cell_len) == fill(b, *cell_len)) {
            let (start, end) = (start_of(column), start_of(column + run.len()).min(range.end));
            let _ = writeln!(
                body,
                "<rect class=\"run\" x=\"{}\" y=\"{y}\" width=\"{}\" height=\"{PITCH}\" fill=\"url(#{})\"><title>{}</title></rect>",
                column * PITCH,
                run.len() * PITCH,
                fill(&run[0], *cell_len),
                run_text(start, end, run)
            );
            column += run.len();
        }
    }
    body.push_str("</g>\n");
}

/// Returns the name of the pattern that fills a square.
fn fill(cell: &Counts, cell_len: u64) -> String {
    let Counts { data, compressed, backing, zero } = *cell;
    let stored = cell.stored();
    if stored == 0 {
        return class(if zero > 0 { Kind::Zero } else { Kind::Hole }).to_owned();
    }
    let kind = match data.max(compressed).max(backing) {
        most if most == data => Kind::Data,
        most if most == compressed => Kind::Compressed,
        _ => Kind::Backing,
    };
    let steps = LEVELS.len() as u128;
    let level = (u128::from(stored) * steps).div_ceil(u128::from(cell_len)).clamp(1, steps);
    format!("{}{level}", class(kind))
}

/// Words a run of equal squares.
fn run_text(start: u64, end: u64, run: &[Counts]) -> String {
    let mut sum = Counts::default();
    run.iter().for_each(|cell| sum.join(cell));
    let len = end.saturating_sub(start);
    let shares = sum.shares(len).into_iter().map(|(kind, bytes)| share_text(kind, bytes, len));
    let parts: Vec<String> = shares.collect();
    format!("{} to {}: {}", human_size(start), human_size(end), parts.join(", "))
}

fn share_text(kind: Kind, bytes: u64, whole: u64) -> String {
    format!(
        "{} {} ({})",
        human_size(bytes),
        class(kind),
        percent(bytes, whole).replace('>', "over ").replace('<', "under ")
    )
}

/// Returns the word for a kind, which is also its class and the beginning of its patterns' names.
fn class(kind: Kind) -> &'static str {
    match kind {
        Kind::Data => "data",
        Kind::Compressed => "compressed",
        Kind::Backing => "backing",
        Kind::Zero => "zero",
        Kind::Hole => "hole",
    }
}

/// Shortens a text in the middle to this many columns.
fn shorten(text: &str, columns: usize) -> String {
    // Characters without a width do not add up: the second bound is for them.
    if text.chars().nth(MAX_PER_COLUMN * columns).is_none() && width(text) <= columns {
        return text.to_owned();
    }
    let half = columns.saturating_sub(1) / 2;
    let head = leading(text.chars(), half);
    let tail: Vec<char> = leading(text.chars().rev(), half);
    head.into_iter().chain(['…']).chain(tail.into_iter().rev()).collect()
}

/// Returns the first characters that fit into this many columns.
fn leading(chars: impl Iterator<Item = char>, columns: usize) -> Vec<char> {
    let mut used = 0;
    let fits = |c: &char| {
        used += width(c.encode_utf8(&mut [0; 4]));
        used <= columns
    };
    chars.take_while(fits).take(MAX_PER_COLUMN * columns).collect()
}

/// Escapes a text for XML, in which control characters and noncharacters may not occur at all.
fn xml(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' => out.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(name: &str, len: u64, disks: usize) -> Chart {
        Chart::new(name, 0..len, disks)
    }

    #[test]
    fn elements_are_bounded_however_fragmented_the_disks() {
        let most = |disks: usize| {
            let charts: Vec<Chart> = (0..disks)
                .map(|_| {
                    let mut chart = chart("d", 2 << 40, disks);
                    let len = chart.cells.cell_len;
                    (0..(2u64 << 40) / len)
                        .step_by(2)
                        .for_each(|cell| chart.cells.add(cell * len, len, Kind::Data));
                    chart
                })
                .collect();
            document("image", "raw", &charts).matches("<rect").count()
        };
        assert!((4096..4200).contains(&most(1)), "{}", most(1));
        assert!(most(254) < 254 * 140, "{}", most(254));
    }

    #[test]
    fn squares_show_their_main_kind_and_how_full_they_are() {
        let cell = |data, compressed, backing, zero| Counts { data, compressed, backing, zero };
        for (counts, wanted) in [
            (cell(0, 0, 0, 0), "hole"),
            (cell(0, 0, 0, 1), "zero"),
            (cell(1, 0, 0, 4095), "data1"),
            (cell(2048, 0, 0, 0), "data2"),
            (cell(2049, 0, 0, 0), "data3"),
            (cell(4096, 0, 0, 0), "data4"),
            (cell(1000, 1001, 0, 0), "compressed2"),
            (cell(0, 1000, 3096, 0), "backing4"),
        ] {
            assert_eq!(fill(&counts, 4096), wanted);
        }
        assert_eq!(fill(&cell(u64::MAX, 0, 0, 0), 1 << 63), "data4");
    }

    #[test]
    fn names_are_escaped_and_shortened() {
        assert_eq!(xml("<a b=\"'&\u{1}\u{ffff}\u{9f}"), "&lt;a b=&quot;&#39;&amp;\u{fffd}\u{fffd}\u{fffd}");
        let short = shorten(&format!("begin{}end", "x".repeat(65_535)), 11);
        assert_eq!(short, "begin…xxend");
        assert!(shorten(&"\u{301}".repeat(65_535), 11).chars().count() < 100);
    }
}
