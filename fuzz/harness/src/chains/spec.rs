//! Text form of a chain, and random chains.
//!
//! ```text
//! disk 5242881 noise:4096+70000 zeros:65536+65536
//! step qcow2 threads=3 -o cluster_size=512 -S 64k
//! step vma.zst from-pipe to-pipe threads=1 cut=400
//! ```

use std::fmt;
use std::str::FromStr;

use super::content::Content;
use crate::random::Random;

/// A chain: disks, and the conversions that they pass through.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    /// Disks at the start, as raw files.
    pub disks: Vec<Content>,
    /// Conversions, in order.
    pub steps: Vec<Step>,
}

/// One conversion of all disks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Format of the output.
    pub format: String,
    /// Extension of its outer compression (`zst`, `gz`); empty for none.
    pub outer: String,
    /// Extension of the compression in which another program packs the source first; empty for none.
    pub packed: String,
    /// True to feed the source through a pipe.
    pub from_pipe: bool,
    /// True to read the output from a pipe.
    pub to_pipe: bool,
    /// `Some` to write into existing files, which are longer than the disks by this many bytes.
    pub in_place: Option<u64>,
    /// Number of worker threads of the first run.
    pub threads: usize,
    /// An attempt that must fail, after the conversion.
    pub refusal: Option<Refusal>,
    /// Options with their values, one for each element: `-S 64k`.
    pub options: Vec<String>,
}

/// An attempt that must fail and change nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The output of the step, cut to this many thousandths of its length, is converted.
    Cut(u64),
    /// The step is repeated onto its own output.
    Overwrite,
    /// The step writes into an existing file that is too small.
    Small,
}

/// Compressions of other programs.
const PACKED: [&str; 5] = ["zst", "gz", "xz", "bz2", "lzo"];

impl Step {
    /// True if all disks are in one file.
    pub fn is_archive(&self) -> bool {
        self.format == "vma"
    }

    /// Returns the extension of the output: `raw.zst`.
    pub fn extension(&self) -> String {
        if self.outer.is_empty() { self.format.clone() } else { format!("{}.{}", self.format, self.outer) }
    }

    /// True if an option contains `text`.
    pub fn has(&self, text: &str) -> bool {
        self.options.iter().any(|option| option.contains(text))
    }

    /// Removes the parts of the step that make no sense together, or after `previous`. `disks` is the number
    /// of disks.
    pub fn settle(&mut self, previous: Option<&Self>, disks: usize) {
        let is_one_file = previous.map_or(disks == 1, |step| step.is_archive() || disks == 1);
        let is_split = previous.is_some_and(|step| step.has("data_file"));
        self.from_pipe &= is_one_file && !is_split;
        if !is_one_file || is_split {
            self.packed.clear();
        }
        if !matches!(self.format.as_str(), "raw" | "vma") || disks > 1 && !self.is_archive() {
            self.outer.clear();
        }
        self.to_pipe &= self.outer.is_empty() && (self.is_archive() || self.format == "raw" && disks == 1);
        self.to_pipe &= !self.has("preallocation");
        if self.format != "raw" || self.to_pipe || !self.outer.is_empty() || self.has("preallocation") {
            self.in_place = None;
        }
        if self.to_pipe {
            self.options.retain(|option| option != "--verify");
        }
        if disks > 1 {
            self.options.retain(|option| !option.contains("data_file"));
        }
        match self.refusal {
            Some(Refusal::Cut(_)) if !self.is_archive() && self.outer.is_empty() => self.refusal = None,
            Some(Refusal::Overwrite) if self.to_pipe || self.in_place.is_some() => self.refusal = None,
            Some(Refusal::Small) if self.in_place.is_none() => self.refusal = None,
            _ => {}
        }
    }
}

impl Chain {
    /// Makes a random chain.
    pub fn random(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x6368_6169_6e73);
        let random = &mut random;
        let count = [1, 1, 1, 2, 3][random.below(5)];
        let max_size = [200_000, 3 << 20, 9 << 20, 24 << 20, 600 << 20][random.below(5)];
        let disks: Vec<Content> = (0..count).map(|_| Content::random(random, max_size)).collect();
        let mut steps: Vec<Step> = Vec::new();
        for _ in 0..1 + random.below(4) {
            let mut step = random_step(random, max_size);
            step.settle(steps.last(), count);
            steps.push(step);
        }
        let mut chain = Self { disks, steps };
        chain.settle();
        chain
    }

    /// Makes all steps fit each other.
    pub fn settle(&mut self) {
        for index in 0..self.steps.len() {
            let (before, rest) = self.steps.split_at_mut(index);
            rest[0].settle(before.last(), self.disks.len());
        }
    }
}

fn random_step(random: &mut Random, max_size: u64) -> Step {
    let is_small = max_size <= 24 << 20;
    let format = random.pick(&["raw", "qcow2", "qcow2", "qcow2", "vhdx", "vma", "vma"]);
    let mut options = match format {
        "raw" => raw_options(random, is_small),
        "qcow2" => qcow2_options(random, is_small),
        "vhdx" => vhdx_options(random, is_small),
        _ => Vec::new(),
    };
    if random.once_in(3) {
        let sizes = ["512", "4k", "16k", "64k", "128k", "1M", "16M", "1536", "0"];
        let size = sizes[random.below(sizes.len() - usize::from(!is_small))];
        options.push(format!("-S {size}"));
    }
    if random.once_in(12) {
        // Must change nothing, since the sources are intact.
        options.push("--salvage".to_owned());
    }
    if random.once_in(12) {
        options.push("--verify".to_owned());
    }
    Step {
        format: format.to_owned(),
        outer: random.pick(&["", "", "zst", "gz"]).to_owned(),
        packed: if is_small && random.once_in(6) { random.pick(&PACKED).to_owned() } else { String::new() },
        from_pipe: is_small && random.once_in(4),
        to_pipe: is_small && random.once_in(4),
        in_place: (is_small && random.once_in(2)).then(|| [0, 0, 1, 512, 70_000, 4 << 20][random.below(6)]),
        threads: [1, 2, 3, 5, 16][random.below(5)],
        refusal: match random.below(12) {
            0 => Some(Refusal::Cut(random.below(1000) as u64)),
            1 => Some(Refusal::Overwrite),
            2 => Some(Refusal::Small),
            _ => None,
        },
        options,
    }
}

fn raw_options(random: &mut Random, is_small: bool) -> Vec<String> {
    let ways = ["falloc", "full"];
    if is_small && random.once_in(4) {
        return vec![format!("-o preallocation={}", ways[random.below(2)])];
    }
    Vec::new()
}

fn qcow2_options(random: &mut Random, is_small: bool) -> Vec<String> {
    let mut options = Vec::new();
    let bits = match random.below(3) {
        0 => 16,
        _ => 9 + random.below(13),
    };
    options.push(format!("-o cluster_size={}", 1 << bits));
    let is_old = random.once_in(6);
    if is_old {
        options.push("-o compat=0.10".to_owned());
    } else {
        if random.once_in(3) {
            options.push(format!("-o refcount_bits={}", 1 << random.below(7)));
        }
        if bits >= 14 && random.once_in(3) {
            options.push("-o extended_l2=on".to_owned());
        }
        if random.once_in(5) {
            options.push("-o lazy_refcounts=on".to_owned());
        }
    }
    match random.below(6) {
        0 | 1 => {
            let is_zstd = !is_old && random.once_in(2);
            options.push(if is_zstd { "--compress=zstd:1".to_owned() } else { "-c".to_owned() });
        }
        2 if is_small => {
            let kinds = ["metadata", "falloc", "full"];
            options.push(format!("-o preallocation={}", kinds[random.below(3)]));
        }
        3 if !is_old => {
            options.push("-o data_file=data".to_owned());
            if random.once_in(2) {
                options.push("-o data_file_raw=on".to_owned());
            }
        }
        _ => {}
    }
    options
}

fn vhdx_options(random: &mut Random, is_small: bool) -> Vec<String> {
    let mut options = Vec::new();
    if random.once_in(2) {
        let sizes = ["1M", "2M", "4M", "32M", "256M"];
        options.push(format!("-o block_size={}", sizes[random.below(if is_small { 5 } else { 3 })]));
    }
    if is_small && random.once_in(4) {
        options.push("-o subformat=fixed".to_owned());
    }
    if random.once_in(8) {
        options.push("-o logical_sector_size=4096".to_owned());
    }
    if random.once_in(8) {
        options.push(format!("-o log_size={}M", 1 + random.below(3)));
    }
    options
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.disks.iter().try_for_each(|disk| writeln!(f, "{disk}"))?;
        self.steps.iter().try_for_each(|step| writeln!(f, "{step}"))
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "step {}", self.extension())?;
        for (flag, name) in [(self.from_pipe, "from-pipe"), (self.to_pipe, "to-pipe")] {
            if flag {
                write!(f, " {name}")?;
            }
        }
        if !self.packed.is_empty() {
            write!(f, " packed={}", self.packed)?;
        }
        if let Some(extra) = self.in_place {
            write!(f, " in-place={extra}")?;
        }
        match self.refusal {
            Some(Refusal::Cut(thousandths)) => write!(f, " cut={thousandths}")?,
            Some(Refusal::Overwrite) => write!(f, " overwrite")?,
            Some(Refusal::Small) => write!(f, " small")?,
            None => {}
        }
        write!(f, " threads={}", self.threads)?;
        self.options.iter().try_for_each(|option| write!(f, " {option}"))
    }
}

impl FromStr for Chain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut chain = Self::default();
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            match line.split_once(' ') {
                Some(("disk", rest)) => chain.disks.push(rest.parse()?),
                Some(("step", rest)) => chain.steps.push(rest.parse()?),
                _ => return Err(format!("neither disk nor step: {line}")),
            }
        }
        if chain.disks.is_empty() {
            return Err("no disk".to_owned());
        }
        chain.settle();
        Ok(chain)
    }
}

impl FromStr for Step {
    type Err = String;

    /// Parses the text after `step`.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split_whitespace().peekable();
        let name = words.next().ok_or("a step without a format")?;
        let (format, outer) = name.split_once('.').unwrap_or((name, ""));
        let mut step = Self {
            format: format.to_owned(),
            outer: outer.to_owned(),
            packed: String::new(),
            from_pipe: false,
            to_pipe: false,
            in_place: None,
            threads: 1,
            refusal: None,
            options: Vec::new(),
        };
        while let Some(word) = words.next_if(|word| !word.starts_with('-')) {
            let (key, value) = word.split_once('=').unwrap_or((word, "0"));
            if let Some(packed) = PACKED.into_iter().find(|packed| (key, value) == ("packed", packed)) {
                packed.clone_into(&mut step.packed);
                continue;
            }
            let number = value.parse::<u64>().map_err(|error| format!("{word}: {error}"))?;
            match key {
                "from-pipe" => step.from_pipe = true,
                "to-pipe" => step.to_pipe = true,
                "in-place" => step.in_place = Some(number),
                "threads" => step.threads = number as usize,
                "cut" => step.refusal = Some(Refusal::Cut(number)),
                "overwrite" => step.refusal = Some(Refusal::Overwrite),
                "small" => step.refusal = Some(Refusal::Small),
                _ => return Err(format!("unknown word: {word}")),
            }
        }
        for word in words {
            match step.options.last_mut() {
                Some(option) if !word.starts_with('-') => *option = format!("{option} {word}"),
                _ => step.options.push(word.to_owned()),
            }
        }
        Ok(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_chains_round_trip_as_text() {
        for seed in 0..500 {
            let chain = Chain::random(seed);
            assert_eq!(chain.to_string().parse::<Chain>().as_ref(), Ok(&chain), "{chain}");
        }
    }
}
