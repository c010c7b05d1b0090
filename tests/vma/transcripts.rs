//! Replays the transcripts of the reference program (`fixtures/vma-transcripts.txt`): every line on standard
//! output, every message, every file left. The differences are listed in `docs/vma-compat.md`, and
//! implemented here in one place: [`Ours::of`].

use std::path::Path;
use std::process::{Command, Output};

use imgtool_testing::{fixture, names, sha256, sha256_file, tempdir, text};

use super::{EFI, SCSI};
use crate::support::imgtool;
use crate::support::run::PROGRAM;

/// Size in bytes of the EFI disk, and the number of bytes by which a target may be larger.
const EFI_SIZE: usize = 540_672;
const TOLERANCE: usize = 4 << 20;

/// One command of the transcripts.
#[derive(Debug, Default)]
struct Block {
    command: String,
    stdout: Vec<String>,
    stderr: Vec<String>,
    exit: i32,
    /// A directory and the files in it, from a line such as `# d1 then holds: …`.
    holds: Option<(String, Vec<String>)>,
}

fn blocks() -> Vec<Block> {
    let transcripts = std::fs::read_to_string(fixture("vma-transcripts.txt")).unwrap();
    let mut blocks: Vec<Block> = Vec::new();
    let mut is_open = false;
    for line in transcripts.lines() {
        if let Some(command) = line.strip_prefix("$ vma ") {
            blocks.push(Block { command: command.to_owned(), ..Block::default() });
            is_open = true;
        }
        let Some(block) = blocks.last_mut() else { continue };
        if let Some((directory, files)) = line.strip_prefix("# ").and_then(|l| l.split_once(" then holds: "))
        {
            block.holds = Some((directory.to_owned(), files.split(' ').map(str::to_owned).collect()));
        }
        if !is_open || line.starts_with("$ ") {
            continue;
        }
        if let Some(code) = line.strip_prefix("exit ") {
            block.exit = code.parse().unwrap();
            is_open = false;
        } else if let Some(message) = line.strip_prefix("stderr: ") {
            block.stderr.push(message.to_owned());
        } else {
            block.stdout.push(line.to_owned());
        }
    }
    blocks
}

/// Expected result of our program.
struct Ours {
    exit: i32,
    stdout: Vec<String>,
    stderr: Vec<String>,
    holds: Option<(String, Vec<String>)>,
}

impl Ours {
    /// Returns the result in the transcript, with the differences that `docs/vma-compat.md` lists.
    fn of(block: &Block) -> Self {
        // Fatal messages end with exit code 1 instead of an abort.
        let exit = if block.exit == 133 { 1 } else { block.exit };
        // Progress ends at 100 %.
        let stdout = block.stdout.iter().map(|line| line.replace("progress 102%", "progress 100%")).collect();
        // No empty line follows a message.
        let stderr = block.stderr.iter().filter(|line| !line.is_empty()).cloned().collect();
        // A failed command leaves nothing.
        let holds = block
            .holds
            .clone()
            .map(|(directory, files)| (directory, if exit == 0 { files } else { Vec::new() }));
        Self { exit, stdout, stderr, holds }
    }
}

/// True if `lines` match a transcript. `(…)` in the transcript matches any number of lines of the same kind
/// as the line before, and seconds may differ.
fn same_lines(transcript: &[String], lines: &[&str]) -> bool {
    let seconds = |line: &str| match line.split_once(", duration ") {
        Some((front, _)) => front.to_owned(),
        None => line.to_owned(),
    };
    let mut lines = lines.iter().map(|line| seconds(line)).peekable();
    let mut kind = String::new();
    for expected in transcript {
        if expected.starts_with("(…") {
            while lines.next_if(|line| line.starts_with(&kind)).is_some() {}
            continue;
        }
        // The ellipsis has consumed the line after it, which the caller removes from the transcript.
        let expected = seconds(expected);
        if lines.peek() != Some(&expected) {
            return false;
        }
        lines.next();
        kind = expected.split(' ').next().unwrap_or_default().to_owned();
    }
    lines.next().is_none()
}

/// Like [`same_lines`], but the progress line after an ellipsis must occur exactly once.
fn with_last_of_ellipsis(transcript: &[String], lines: &[&str]) -> bool {
    let Some(at) = transcript.iter().position(|line| line.starts_with("(…")) else {
        return same_lines(transcript, lines);
    };
    let mut shortened = transcript.to_vec();
    if shortened.get(at + 1).is_some_and(|line| line.starts_with("progress ")) {
        let last = shortened.remove(at + 1);
        let front = last.split(", duration").next().unwrap().to_owned();
        if lines.iter().filter(|line| line.starts_with(&front)).count() != 1 {
            return false;
        }
    }
    same_lines(&shortened, lines)
}

fn run(directory: &Path, command: &str) -> Output {
    Command::new(PROGRAM)
        .arg("vma")
        .args(command.split(' '))
        .current_dir(directory)
        .env("TZ", "UTC")
        .output()
        .unwrap()
}

/// Creates the files that exist before a command, according to the comments in the transcripts.
fn set_the_scene(directory: &Path, block: &Block, number: usize) {
    let words: Vec<&str> = block.command.split(' ').collect();
    let output = match words[0] {
        "extract" => words.last().copied(),
        "create" => words.iter().find(|word| word.ends_with(".vma")).copied(),
        _ => None,
    };
    let is_refused = block.stderr.iter().any(|line| line.contains("File exists"));
    if let (Some(output), false) = (output, is_refused) {
        let path = directory.join(output);
        let _ = std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path));
    }
    let maps = [
        ("map.txt", "format=raw:0:drive-scsi0=t1.raw\nformat=raw:1:drive-efidisk0=t2.raw\ndone\n"),
        ("map2.txt", "skip=drive-scsi0\nformat=raw:1:drive-efidisk0=t2.raw\ndone\n"),
        ("map3.txt", "format=raw:1:drive-efidisk0=t2.raw\ndone\n"),
    ];
    for (name, content) in maps {
        std::fs::write(directory.join(name), content).unwrap();
    }
    std::fs::write(directory.join("t1.raw"), vec![0; 5_255_168]).unwrap();
    let said = block.stderr.join(" ");
    let size = [EFI_SIZE + TOLERANCE + 512, EFI_SIZE - 512]
        .into_iter()
        .find(|size| said.contains(&format!("unexpected size {size} ")))
        .unwrap_or(EFI_SIZE + TOLERANCE);
    std::fs::write(directory.join("t2.raw"), vec![number as u8 | 0x80; size]).unwrap();
}

#[test]
fn reproduces_the_transcripts_of_the_reference_program() {
    let dir = tempdir();
    let path = dir.path();
    for name in ["two-disks.vma", "vmstate.vma"] {
        let (from, to) = (fixture(&format!("{name}.zst")), path.join(name));
        imgtool(["convert", "-q", "-f", "raw", "--to", "raw", text(&from), text(&to)]).ok();
    }
    let whole = std::fs::read(path.join("two-disks.vma")).unwrap();
    std::fs::write(path.join("cut.vma"), &whole[..100_000]).unwrap();
    std::fs::copy(fixture("qemu-server.conf"), path.join("qemu-server.conf")).unwrap();
    imgtool(["convert", "-q", "two-disks.vma", "--to", "raw", "disks"]).within(path).ok();
    for (from, to) in [("drive-scsi0", "scsi0"), ("drive-efidisk0", "efidisk0")] {
        std::fs::rename(path.join(format!("disks/{from}.raw")), path.join(format!("{to}.raw"))).unwrap();
    }
    let blocks = blocks();
    assert_eq!(blocks.len(), 24);
    for (number, block) in blocks.iter().enumerate() {
        set_the_scene(path, block, number);
        let output = run(path, &block.command);
        let ours = Ours::of(block);
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        let what = format!("$ vma {}\n{stdout}\nstderr:\n{stderr}", block.command);
        assert_eq!(output.status.code(), Some(ours.exit), "{what}");
        let lines: Vec<&str> = stdout.lines().collect();
        assert!(with_last_of_ellipsis(&ours.stdout, &lines), "not {:#?}\nbut {what}", ours.stdout);
        // The position and the hint follow a message, indented.
        let said: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("  ")).collect();
        if block.command.starts_with("create -v") {
            // The number of progress lines depends on the buffers.
            assert_eq!(said.first().copied(), ours.stderr.first().map(String::as_str), "{what}");
            assert_eq!(said.last().copied(), ours.stderr.last().map(String::as_str), "{what}");
        } else {
            assert_eq!(said, ours.stderr, "{what}");
        }
        if let Some((directory, files)) = ours.holds {
            let made =
                if path.join(&directory).exists() { names(&path.join(&directory)) } else { Vec::new() };
            assert_eq!(made, files, "{what}");
        }
        check_targets(path, block, number, ours.exit);
    }
}

/// Asserts that the targets of a map contain the disks after a success, and their old content after a
/// failure.
fn check_targets(directory: &Path, block: &Block, number: usize, exit: i32) {
    let Some(map) = block.command.split(' ').find(|word| word.starts_with("map")) else { return };
    let efi = std::fs::read(directory.join("t2.raw")).unwrap();
    let (disk, tail) = if exit == 0 { efi.split_at(EFI_SIZE) } else { efi.split_at(0) };
    assert!(tail.iter().all(|byte| *byte == number as u8 | 0x80), "{}: the tail", block.command);
    assert!(exit != 0 || sha256(disk) == EFI, "{}", block.command);
    let is_mapped = exit == 0 && map == "map.txt";
    assert_eq!(sha256_file(&directory.join("t1.raw")) == SCSI, is_mapped, "{}", block.command);
}
