//! Content of the disks at the start of a chain.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::str::FromStr;

use crate::random::Random;

/// Kind of the bytes in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Nonzero bytes that do not compress.
    Noise,
    /// Nonzero bytes that compress.
    Prose,
    /// Zeros that are stored in the raw file, not a hole.
    Zeros,
}

const FILLS: [(Fill, &str); 3] = [(Fill::Noise, "noise"), (Fill::Prose, "prose"), (Fill::Zeros, "zeros")];

/// A written range of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Kind of its bytes, which depend on the position too.
    pub fill: Fill,
    /// Position in bytes.
    pub at: u64,
    /// Length in bytes.
    pub len: u64,
}

/// A disk: everything outside of the runs is a hole. A later run overwrites an earlier one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Size in bytes.
    pub size: u64,
    /// Written ranges.
    pub runs: Vec<Run>,
}

impl Run {
    fn bytes(&self) -> Vec<u8> {
        let mut random = Random::new(self.at.wrapping_mul(31) ^ self.len);
        let letters = b"etaoin shrdlu\n";
        let mut byte = || match self.fill {
            Fill::Noise => (random.number() >> 32) as u8 | 1,
            Fill::Prose => letters[random.below(letters.len())],
            Fill::Zeros => 0,
        };
        (0..self.len).map(|_| byte()).collect()
    }
}

impl Content {
    /// Makes a random disk of at most `max_size` bytes.
    pub fn random(random: &mut Random, max_size: u64) -> Self {
        let units = [1, 512, 4096, 65_536, 1 << 20, 2 << 20];
        let size = match random.below(8) {
            0 => 1 + random.below(5000) as u64,
            1 => max_size,
            _ => {
                let size = random.number() % max_size;
                let unit = units[random.below(units.len())];
                size / unit * unit + [0, 0, 1, 511, 512, 513, 4096][random.below(7)]
            }
        };
        let size = size.clamp(1, max_size);
        let mut runs = Vec::new();
        for _ in 0..random.below(9) {
            let unit = units[random.below(units.len())];
            let at = random.number() % size / unit * unit;
            let at = at.saturating_add_signed([0, 0, 0, -1, 1, 512, -512][random.below(7)]).min(size - 1);
            let longest = [1, 600, 4096, 70_000, 300_000, 2 << 20][random.below(6)];
            let len = match random.below(4) {
                0 => longest,
                1 => size - at,
                _ => 1 + random.number() % longest,
            };
            let fill = FILLS[random.below(FILLS.len())].0;
            runs.push(Run { fill, at, len: len.min(size - at).min(2 << 20) });
        }
        Self { size, runs }
    }

    /// Writes the disk as a raw file.
    ///
    /// # Errors
    /// If the file can't be written.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let file = File::create(path)?;
        file.set_len(self.size)?;
        self.runs.iter().try_for_each(|run| file.write_all_at(&run.bytes(), run.at))
    }
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {}", self.size)?;
        for run in &self.runs {
            let name = FILLS.iter().find(|(fill, _)| *fill == run.fill).map_or("", |(_, name)| name);
            write!(f, " {name}:{}+{}", run.at, run.len)?;
        }
        Ok(())
    }
}

impl FromStr for Content {
    type Err = String;

    /// Parses the text after `disk`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split_whitespace();
        let size = words.next().and_then(|word| word.parse().ok()).ok_or("a disk without a size")?;
        let run = |word: &str| {
            let (name, range) = word.split_once(':')?;
            let (at, len) = range.split_once('+')?;
            let (fill, _) = FILLS.iter().find(|(_, known)| *known == name)?;
            let (at, len) = (at.parse().ok()?, len.parse::<u64>().ok()?);
            Some(Run { fill: *fill, at, len: len.min(u64::checked_sub(size, at)?) })
        };
        let runs = words.map(|word| run(word).ok_or(format!("no run: {word}"))).collect::<Result<_, _>>()?;
        Ok(Self { size, runs })
    }
}
