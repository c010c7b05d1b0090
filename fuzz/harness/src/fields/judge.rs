//! Comparison of a mutated image's content with that of other programs.

use std::fs::{self, File};
use std::io::BufReader;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use imgtool_core::{CancelToken, Error, Input, NoProgress, OpenOptions, ReadAt, Result};
use imgtool_engine::{Request, RunOptions};

use crate::chains::{judge, program};
use crate::exercise;
use crate::sparse::SparseFile;

/// Maximum size in bytes of a disk that is compared. Our limit, for the time per input.
const MOST_SIZE: u64 = 4 << 30;

/// Maximum length in bytes of a file that is compared: ext4 allows 16 TiB.
const MOST_LEN: u64 = 8 << 40;

/// Maximum time for QEMU, which some images keep busy without end.
const MOST_TIME: Duration = Duration::from_secs(4);

/// Result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Both refuse the image.
    BothRefuse,
    /// Both read the same content.
    Same,
    /// The image is too large to compare.
    Skipped,
    /// Only imgtool reads it; the other program's message.
    OnlyOurs(String),
    /// Only the other program reads it; our message.
    OnlyTheirs(String),
    /// Both read it, with different content.
    Differs(String),
    /// Only one finds the structure sound: ours, theirs.
    Check(String),
    /// A refused conversion left files behind.
    LeftBehind(String),
}

/// Writes the image to `directory`, converts it to raw, and compares the result with QEMU's reading (qcow2,
/// VHDX) or with [`judge::read_archive`] (VMA).
///
/// # Errors
/// If the machine fails.
pub fn compare(format: &str, file: &SparseFile, directory: &Path) -> std::io::Result<Verdict> {
    if file.len() > MOST_LEN {
        return Ok(Verdict::Skipped);
    }
    let image = directory.join("image");
    file.save(&image)?;
    let out = directory.join("out");
    fs::create_dir(&out)?;
    let ours = convert(format, &image, &out);
    if let Err(error) = &ours {
        exercise::printed(error);
        let left = program::files(&out)?;
        if !left.is_empty() {
            return Ok(Verdict::LeftBehind(format!("{left:?}")));
        }
    }
    if matches!(&ours, Err(error) if error.message() == TOO_LARGE) {
        return Ok(Verdict::Skipped);
    }
    let ours = ours.map_err(|error| kind_of(&error.to_string()));
    if format == "vma" {
        archive(&image, &out, &ours, directory)
    } else {
        by_qemu(format, file, &image, &out, &ours)
    }
}

const TOO_LARGE: &str = "too large to compare";

/// Converts an image to raw files in the directory `out`.
fn convert(format: &str, image: &Path, out: &Path) -> Result<()> {
    let mut request = Request::new(image, out);
    request.format = Some("raw".to_owned());
    request.source_format = Some(format.to_owned());
    let registry = exercise::registry();
    let cancel = CancelToken::new();
    let conversion = request.open(&registry, &cancel)?;
    let sources = conversion.sources();
    let devices = sources.iter().flat_map(|source| source.opened.image.info().devices.iter());
    if devices.fold(0u64, |sum, device| sum.saturating_add(device.size)) > MOST_SIZE {
        return Err(Error::limit(TOO_LARGE));
    }
    let options = RunOptions { threads: 2, ..RunOptions::default() };
    conversion.plan()?.run(&options, &NoProgress).map(drop)
}

/// Returns a message without its numbers and names, so that messages of one kind are equal.
fn kind_of(message: &str) -> String {
    let mut kind = String::new();
    for word in message.split_whitespace().filter(|word| !word.contains('/')) {
        let has_digit = word.contains(|letter: char| letter.is_ascii_digit());
        kind += if has_digit { "N " } else { word };
        kind += if has_digit { "" } else { " " };
    }
    kind.chars().take(160).collect()
}

fn qemu(args: &[&str], paths: &[&Path], directory: &Path) -> std::io::Result<program::Outcome> {
    let mut command = Command::new("qemu-img");
    command.current_dir(directory).args(args).args(paths);
    program::run_within(MOST_TIME, command, None, None)
}

fn by_qemu(
    format: &str,
    file: &SparseFile,
    image: &Path,
    out: &Path,
    ours: &std::result::Result<(), String>,
) -> std::io::Result<Verdict> {
    let replayed = image.with_extension("replayed");
    let mut image = image;
    loop {
        let Err(error) = ours else {
            let outputs = program::files(out)?;
            let [name] = outputs.as_slice() else { return Ok(Verdict::LeftBehind(format!("{outputs:?}"))) };
            let raw = out.join(name);
            // QEMU omits an incomplete sector at the end of a disk.
            let len = fs::metadata(&raw)?.len();
            File::options().write(true).open(&raw)?.set_len(len / 512 * 512)?;
            let outcome = qemu(&["compare", "-f", "raw", "-F", format], &[&raw, image], out)?;
            return Ok(match outcome.code {
                Some(0) if !outcome.text.contains("size mismatch") => check(format, file, image, out)?,
                Some(0 | 1) => difference(format, file, outcome.text),
                _ if replay(format, &mut image, &replayed, &outcome.text, out)? => continue,
                None => Verdict::OnlyOurs("without end".to_owned()),
                _ => Verdict::OnlyOurs(kind_of(&outcome.text)),
            });
        };
        let outcome = qemu(&["compare", "-f", format, "-F", format], &[image, image], out)?;
        return Ok(match outcome.code {
            Some(0) => Verdict::OnlyTheirs(error.clone()),
            _ if replay(format, &mut image, &replayed, &outcome.text, out)? => continue,
            _ => Verdict::BothRefuse,
        });
    }
}

/// Replays the log of a VHDX image in a copy, if QEMU asks for that and can do it. Returns false otherwise.
fn replay<'a>(
    format: &str,
    image: &mut &'a Path,
    copy: &'a Path,
    message: &str,
    directory: &Path,
) -> std::io::Result<bool> {
    if *image == copy || !message.contains("needs to be replayed") {
        return Ok(false);
    }
    fs::copy(*image, copy)?;
    *image = copy;
    let outcome = qemu(&["check", "-r", "all", "-f", format], &[copy], directory)?;
    Ok(outcome.code == Some(0))
}

/// Finds the first corruption of the structure with the driver's `check`; `None` if it is sound.
fn corruption(format: &str, file: &SparseFile) -> Option<String> {
    let input = Input::from_read_at("image", Arc::new(file.clone()));
    let driver = exercise::registry().get(format).ok()?;
    let report = driver.check(input, &OpenOptions::default()).ok()?;
    let finding = || report.findings.first().map_or(String::new(), |text| kind_of(text));
    (report.corruptions > 0).then(finding)
}

/// Judges a difference in content. Of two contradicting copies of a VHDX structure, imgtool uses the one that
/// follows the specification, which QEMU does not verify; `check` reports the other one.
fn difference(format: &str, file: &SparseFile, message: String) -> Verdict {
    match corruption(format, file).filter(|_| format == "vhdx") {
        Some(finding) => Verdict::Check(format!("ours: {finding}; theirs: other content")),
        None => Verdict::Differs(message),
    }
}

/// Compares the findings of both programs about the structure. Leaks count as sound.
fn check(format: &str, file: &SparseFile, image: &Path, directory: &Path) -> std::io::Result<Verdict> {
    let outcome = qemu(&["check", "-f", format], &[image], directory)?;
    let is_sound = match outcome.code {
        Some(0 | 3) => true,
        Some(2) => false,
        // QEMU cannot check the image, or cannot write the repair of its header.
        _ => return Ok(Verdict::Same),
    };
    let ours = corruption(format, file);
    if ours.is_none() == is_sound {
        return Ok(Verdict::Same);
    }
    let theirs = kind_of(outcome.text.lines().next().unwrap_or(""));
    Ok(Verdict::Check(format!("ours: {}; theirs: {theirs}", ours.unwrap_or_default())))
}

fn archive(
    image: &Path,
    out: &Path,
    ours: &std::result::Result<(), String>,
    directory: &Path,
) -> std::io::Result<Verdict> {
    let theirs = directory.join("theirs");
    fs::create_dir(&theirs)?;
    let read = judge::read_archive(&mut BufReader::new(File::open(image)?), &theirs);
    Ok(match (ours, read) {
        (Err(_), Err(_)) => Verdict::BothRefuse,
        (Err(error), Ok(_)) => Verdict::OnlyTheirs(error.clone()),
        (Ok(()), Err(error)) => Verdict::OnlyOurs(kind_of(&error.to_string())),
        (Ok(()), Ok(disks)) => {
            // Names are reduced on the way to a file, so contents are compared as sets.
            let digests = |directory: &Path| -> std::io::Result<Vec<String>> {
                let files = program::files(directory)?;
                let found =
                    files.iter().map(|name| Ok(format!("{:?}", judge::digest(&directory.join(name))?)));
                let mut found = found.collect::<std::io::Result<Vec<_>>>()?;
                found.sort();
                Ok(found)
            };
            let (ours, theirs) = (digests(out)?, digests(&theirs)?);
            // Configurations become files, too.
            let is_same = theirs.iter().all(|digest| ours.contains(digest));
            if is_same { Verdict::Same } else { Verdict::Differs(format!("{} disks", disks.len())) }
        }
    })
}

impl SparseFile {
    /// Writes the file to disk, with its holes.
    ///
    /// # Errors
    /// If it can't be written.
    pub fn save(&self, path: &Path) -> std::io::Result<()> {
        use std::os::unix::fs::FileExt;
        let file = File::create(path)?;
        file.set_len(self.len())?;
        self.written(0..self.len()).try_for_each(|at| {
            let end = (at + crate::sparse::SECTOR).min(self.len());
            file.write_all_at(&self.bytes(at..end), at)
        })
    }
}
