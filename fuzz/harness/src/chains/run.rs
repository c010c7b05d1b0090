//! Runs a chain, step by step, and has each output judged.

use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::judge::{self, OLD_BYTE};
use super::program::{self, Outcome, Program};
use super::spec::{Chain, Refusal, Step};

/// A broken promise.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Index of the step.
    pub step: usize,
    /// Kind, in a word: shrinking keeps it.
    pub kind: String,
    /// Message for people.
    pub message: String,
}

/// Counts of a fuzzing run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Totals {
    /// Chains.
    pub chains: u64,
    /// Runs of the program.
    pub runs: u64,
    /// Outputs whose content was judged.
    pub outputs: u64,
    /// Outputs that QEMU judged.
    pub by_qemu: u64,
    /// Outputs whose bytes were compared with those of another run.
    pub same_bytes: u64,
    /// Attempts that had to fail.
    pub refusals: u64,
}

/// Kind and message of a broken promise, or of a failure of the machine.
struct Broken(String, String);

type Done<T = ()> = Result<T, Broken>;

/// Runs a chain in a new directory within `scratch`, which is removed at the end.
///
/// # Errors
/// If the program breaks a promise, or the machine fails.
pub fn run(program: &Program, chain: &Chain, scratch: &Path, totals: &mut Totals) -> Result<(), Failure> {
    let failed = |step| move |Broken(kind, message)| Failure { step, kind, message };
    let directory = tempfile::Builder::new().prefix("chain-").tempdir_in(scratch);
    let directory = directory.map_err(Broken::from).map_err(failed(0))?;
    totals.chains += 1;
    let mut walk = Walk { program, chain, directory: directory.path(), totals, sources: Vec::new() };
    walk.start().map_err(failed(0))?;
    for index in 0..chain.steps.len() {
        walk.step(index).map_err(failed(index))?;
    }
    Ok(())
}

impl From<io::Error> for Broken {
    fn from(error: io::Error) -> Self {
        Self("machine".to_owned(), error.to_string())
    }
}

struct Walk<'a> {
    program: &'a Program,
    chain: &'a Chain,
    directory: &'a Path,
    totals: &'a mut Totals,
    /// Files with the disks: one for each, or an archive of all.
    sources: Vec<PathBuf>,
}

/// A run of one step: its sources, and the directory of its outputs.
#[derive(Clone)]
struct Attempt<'a> {
    step: &'a Step,
    /// Step that made the sources; `None` for raw files.
    previous: Option<&'a Step>,
    sources: &'a [PathBuf],
    /// True if another program has compressed the source.
    is_packed: bool,
    from_pipe: bool,
    threads: usize,
    directory: PathBuf,
}

impl Walk<'_> {
    fn disks(&self) -> usize {
        self.chain.disks.len()
    }

    /// Returns the path of the raw file with the expected content of a disk.
    fn expected(&self, disk: usize) -> PathBuf {
        self.directory.join("expected").join(format!("d{disk}.raw"))
    }

    fn expected_all(&self) -> Vec<PathBuf> {
        (0..self.disks()).map(|disk| self.expected(disk)).collect()
    }

    fn start(&mut self) -> Done {
        fs::create_dir(self.directory.join("expected"))?;
        for (index, disk) in self.chain.disks.iter().enumerate() {
            disk.write(&self.expected(index))?;
        }
        self.sources = self.expected_all();
        Ok(())
    }

    fn step(&mut self, index: usize) -> Done {
        let chain = self.chain;
        let step = &chain.steps[index];
        let sources = std::mem::take(&mut self.sources);
        let packed = self.pack(step, &sources)?;
        let first = Attempt {
            step,
            previous: index.checked_sub(1).map(|index| &chain.steps[index]),
            sources: if packed.is_empty() { &sources } else { &packed },
            is_packed: !packed.is_empty(),
            from_pipe: step.from_pipe,
            threads: step.threads,
            directory: self.directory.join(format!("{index}")),
        };
        let is_done = self.convert(&first)?;
        if is_done {
            self.repeat(&first)?;
            self.grow_expected(step)?;
            self.judge(&first)?;
            self.refusal(&first)?;
        }
        for source in &sources {
            if let Some(directory) = source.parent().filter(|parent| !parent.ends_with("expected")) {
                // With several files, the first has removed the directory.
                let _ = fs::remove_dir_all(directory);
            }
        }
        self.sources = if is_done {
            first.outputs(self.disks()).iter().map(|name| first.directory.join(name)).collect()
        } else {
            // The step needs a known size and was refused: the chain continues from the raw files.
            self.expected_all()
        };
        Ok(())
    }

    /// Compresses the source with another program, if the step says so.
    fn pack(&self, step: &Step, sources: &[PathBuf]) -> Done<Vec<PathBuf>> {
        let (false, [source]) = (step.packed.is_empty(), sources) else { return Ok(Vec::new()) };
        let name = source.file_name().unwrap_or_default().to_string_lossy();
        let packed = self.directory.join(format!("{name}.{}", step.packed));
        judge::pack(&step.packed, source, &packed)
            .map_err(|(kind, message)| Broken(kind.to_owned(), message))?;
        Ok(vec![packed])
    }

    /// Repeats a step with another number of threads, and from raw files.
    fn repeat(&mut self, first: &Attempt<'_>) -> Done {
        let threads = 1 + (first.threads + 2) % 5;
        let raw = self.expected_all();
        let named = |name| first.directory.with_extension(name);
        let again = Attempt { threads, directory: named("again"), ..*first };
        let plain = Attempt {
            threads,
            directory: named("plain"),
            previous: None,
            sources: &raw,
            is_packed: false,
            from_pipe: false,
            ..*first
        };
        for attempt in [again, plain] {
            self.convert(&attempt)?;
            self.same_bytes(first, &attempt)?;
            fs::remove_dir_all(&attempt.directory)?;
        }
        Ok(())
    }

    /// Runs a step into a new directory. Returns false if it was refused because the size of the source is not
    /// known.
    fn convert(&mut self, attempt: &Attempt<'_>) -> Done<bool> {
        let outputs = attempt.outputs(self.disks());
        fs::create_dir(&attempt.directory)?;
        if let Some(extra) = attempt.step.in_place {
            for (disk, name) in outputs.iter().enumerate() {
                let len = fs::metadata(self.expected(disk))?.len() + extra;
                old_file(&attempt.directory.join(name), len)?;
            }
        }
        let outcome = self.run(attempt, self.command(attempt, &attempt.directory), false)?;
        let found = program::files(&attempt.directory)?;
        if attempt.may_be_refused() && outcome.code == Some(1) {
            return if found.is_empty() { Ok(false) } else { Err(left_behind(&outcome, &found)) };
        }
        if outcome.code != Some(0) {
            return Err(Broken(
                "exit".to_owned(),
                format!("{}: {:?}\n{}", outcome.line, outcome.code, outcome.text),
            ));
        }
        let mut wanted = outputs;
        if attempt.step.has("data_file=") {
            wanted.push("data".into());
        }
        wanted.sort();
        if found == wanted { Ok(true) } else { Err(left_behind(&outcome, &found)) }
    }

    /// Runs a command with the pipes of the step, or without if it is another command.
    fn run(&mut self, attempt: &Attempt<'_>, command: Command, is_other: bool) -> Done<Outcome> {
        let from = (attempt.from_pipe && !is_other).then(|| attempt.sources[0].as_path());
        let name = &attempt.outputs(self.disks())[0];
        let to = (attempt.step.to_pipe && !is_other).then(|| attempt.directory.join(name));
        self.totals.runs += 1;
        let outcome = program::run(command, from, to.as_deref())?;
        if outcome.text.contains("panicked at") || outcome.code.is_none() {
            return Err(Broken(
                "panic".to_owned(),
                format!("{}: {:?}\n{}", outcome.line, outcome.code, outcome.text),
            ));
        }
        Ok(outcome)
    }

    /// Returns the command of a step with outputs in `directory`.
    fn command(&self, attempt: &Attempt<'_>, directory: &Path) -> Command {
        let step = attempt.step;
        let mut command = self.program.command(directory);
        command.args(["convert", "-q", "--to", &step.format, "-m", &attempt.threads.to_string()]);
        if attempt.previous.is_some_and(|step| step.has("data_file=")) {
            command.args(["--allow-external", "chain"]);
        }
        command.args(step.options.iter().flat_map(|option| option.split(' ')));
        let is_archive = attempt.previous.is_some_and(Step::is_archive);
        for (disk, source) in attempt.sources.iter().enumerate() {
            let path = if attempt.from_pipe { "-".into() } else { source.to_string_lossy() };
            command.arg(if is_archive { path.into_owned() } else { format!("d{disk}={path}") });
        }
        let outputs = attempt.outputs(self.disks());
        if step.to_pipe {
            command.arg("-");
        } else if step.in_place.is_some() {
            for (disk, name) in outputs.iter().enumerate() {
                command.arg("--target").arg(format!("d{disk}={}", name.display()));
            }
        } else if let [output] = outputs.as_slice() {
            command.arg(output);
        } else {
            command.arg("./");
        }
        command
    }

    fn same_bytes(&mut self, first: &Attempt<'_>, second: &Attempt<'_>) -> Done {
        for name in program::files(&first.directory)? {
            let digests = [first, second].map(|attempt| judge::digest(&attempt.directory.join(&name)));
            let [one, two] = digests;
            self.totals.same_bytes += 1;
            let (one, two) = (one?, two?);
            if one != two {
                let lines = [first, second].map(|attempt| {
                    format!("{:?}", self.command(attempt, &attempt.directory)).replace('"', "")
                });
                let kind =
                    if second.previous.is_none() && first.previous.is_some() { "source" } else { "threads" };
                let message =
                    format!("{} of {}\nand {}\ndiffer: {one:?} {two:?}", name.display(), lines[0], lines[1]);
                return Err(Broken(format!("bytes-{kind}"), message));
            }
        }
        Ok(())
    }

    /// Makes the expected disks longer, as a format rounds them up.
    fn grow_expected(&self, step: &Step) -> Done {
        let unit = match step.format.as_str() {
            "raw" => 1,
            "vhdx" if step.has("logical_sector_size=4096") => 4096,
            _ => 512,
        };
        for path in self.expected_all() {
            let file = File::options().write(true).open(path)?;
            let len = file.metadata()?.len();
            file.set_len(len.next_multiple_of(unit))?;
        }
        Ok(())
    }

    fn judge(&mut self, attempt: &Attempt<'_>) -> Done {
        let step = attempt.step;
        let verdict =
            |(kind, message)| Broken(format!("{}-{kind}", step.format), format!("{step}\n{message}"));
        let outputs = attempt.outputs(self.disks());
        for (disk, name) in outputs.iter().enumerate() {
            let output = attempt.directory.join(name);
            self.check(step, &output)?;
            self.judge_output(step, output, disk).map_err(verdict)?;
        }
        if let Some(extra) = step.in_place.filter(|extra| *extra > 0) {
            for name in &outputs {
                let file = File::options().write(true).open(attempt.directory.join(name))?;
                let len = file.metadata()?.len();
                file.set_len(len - extra)?;
            }
        }
        Ok(())
    }

    /// Asserts that `check` finds nothing.
    fn check(&mut self, step: &Step, output: &Path) -> Done {
        if step.format == "raw" {
            return Ok(());
        }
        let mut check = self.program.command(self.directory);
        check.args(["check", "-q", "--allow-external", "chain"]).arg(output);
        self.totals.runs += 1;
        let outcome = program::run(check, None, None)?;
        if outcome.code == Some(0) {
            return Ok(());
        }
        let message = format!("{step}\n{}: {:?} {}", outcome.line, outcome.code, outcome.text);
        Err(Broken(format!("{}-check", step.format), message))
    }

    /// Compares an output with the expected content of a disk, or of all disks if it is an archive.
    fn judge_output(&mut self, step: &Step, mut output: PathBuf, disk: usize) -> judge::Verdict {
        if !step.outer.is_empty() {
            let plain = self.directory.join("plain");
            judge::unpack(&step.outer, &output, &plain)?;
            output = plain;
        }
        self.totals.outputs += 1;
        match step.format.as_str() {
            "vma" => self.judge_archive(&output).map_err(|message| ("content", message)),
            // QEMU refuses such sectors; the next step reads the image.
            "vhdx" if step.has("logical_sector_size=4096") => Ok(()),
            "qcow2" | "vhdx" => {
                self.totals.by_qemu += 1;
                judge::by_qemu(&step.format, &output, &self.expected(disk))
            }
            _ => {
                let is_plain = step.outer.is_empty() && step.in_place.is_none() && !step.to_pipe;
                let is_sparse = is_plain && !step.has("-S") && !step.has("preallocation");
                judge::raw(&output, &self.expected(disk), is_sparse, step.in_place.unwrap_or(0))
            }
        }
    }

    fn judge_archive(&self, path: &Path) -> Result<(), String> {
        let directory = self.directory.join("devices");
        fs::create_dir(&directory).map_err(|error| error.to_string())?;
        let file = File::open(path).map_err(|error| error.to_string())?;
        let disks = judge::read_archive(&mut BufReader::new(file), &directory);
        let disks = disks.map_err(|error| error.to_string())?;
        let names: Vec<&str> = disks.iter().map(|disk| disk.name.as_str()).collect();
        if names != ["d0", "d1", "d2"][..self.disks()] {
            return Err(format!("devices {names:?}"));
        }
        for disk in 0..names.len() {
            let output = directory.join(disk.to_string());
            judge::raw(&output, &self.expected(disk), false, 0)
                .map_err(|(kind, message)| format!("{kind}: {message}"))?;
        }
        fs::remove_dir_all(directory).map_err(|error| error.to_string())
    }

    /// Makes the attempt of a step that must fail.
    fn refusal(&mut self, attempt: &Attempt<'_>) -> Done {
        let Some(refusal) = attempt.step.refusal else { return Ok(()) };
        let scratch = self.directory.join("refusal");
        fs::create_dir(&scratch)?;
        let (command, watched) = match refusal {
            Refusal::Cut(thousandths) => (self.cut(attempt, thousandths, &scratch)?, &scratch),
            Refusal::Overwrite => (self.command(attempt, &attempt.directory), &attempt.directory),
            Refusal::Small => {
                let outputs = attempt.outputs(self.disks());
                let len = fs::metadata(attempt.directory.join(&outputs[0]))?.len();
                for name in outputs {
                    old_file(&scratch.join(name), (len - 1).min(5000))?;
                }
                (self.command(attempt, &scratch), &scratch)
            }
        };
        // The size of a raw stream is known only at its end, after the target was written.
        if refusal != Refusal::Small || !attempt.size_is_unknown() {
            let before = state(watched)?;
            self.totals.refusals += 1;
            let outcome = self.run(attempt, command, matches!(refusal, Refusal::Cut(_)))?;
            if outcome.code != Some(1) || state(watched)? != before {
                let message = format!("{}: {:?} {}", outcome.line, outcome.code, outcome.text);
                return Err(Broken(format!("refusal-{refusal:?}").replace(char::is_numeric, ""), message));
            }
        }
        Ok(fs::remove_dir_all(scratch)?)
    }

    /// Cuts the output of a step, and returns a command that converts it.
    fn cut(&self, attempt: &Attempt<'_>, thousandths: u64, directory: &Path) -> Done<Command> {
        let output = attempt.directory.join(&attempt.outputs(self.disks())[0]);
        let cut = self.directory.join(format!("cut.{}", attempt.step.extension()));
        let bytes = fs::read(output)?;
        fs::write(&cut, &bytes[..bytes.len() * thousandths as usize / 1000])?;
        let mut command = self.program.command(directory);
        command.args(["convert", "-q", "--to", "raw", "-f", &attempt.step.format]).arg(cut).arg("./");
        Ok(command)
    }
}

/// Returns names and digests of all files in a directory.
fn state(directory: &Path) -> Done<Vec<(PathBuf, judge::Digest)>> {
    let files = program::files(directory)?;
    let digests = files.into_iter().map(|name| {
        let digest = judge::digest(&directory.join(&name))?;
        Ok((name, digest))
    });
    Ok(digests.collect::<io::Result<_>>()?)
}

impl Attempt<'_> {
    /// Returns the names of the outputs.
    fn outputs(&self, disks: usize) -> Vec<PathBuf> {
        let extension = self.step.extension();
        if self.step.is_archive() {
            return vec![format!("vm.{extension}").into()];
        }
        (0..disks).map(|disk| format!("d{disk}.{extension}").into()).collect()
    }

    /// True if the program can learn the size of the source only by reading it.
    fn size_is_unknown(&self) -> bool {
        let is_raw = self.previous.is_none_or(|step| step.format == "raw");
        is_raw && (self.from_pipe || self.is_packed || self.previous.is_some_and(|step| step.outer == "gz"))
    }

    /// True if the program may refuse the step because it needs the size of the source.
    fn may_be_refused(&self) -> bool {
        self.size_is_unknown() && (self.step.has("preallocation") || self.step.has("data_file_raw"))
    }
}

fn left_behind(outcome: &Outcome, found: &[PathBuf]) -> Broken {
    Broken(
        "files".to_owned(),
        format!("{}: {:?}\nthe directory has {found:?}\n{}", outcome.line, outcome.code, outcome.text),
    )
}

/// Creates an existing target of `len` bytes.
fn old_file(path: &Path, len: u64) -> io::Result<()> {
    let file = File::create(path)?;
    let bytes = vec![OLD_BYTE; 1 << 16];
    let mut at = 0;
    while at < len {
        let part = usize::try_from(len - at).unwrap_or(usize::MAX).min(bytes.len());
        file.write_all_at(&bytes[..part], at)?;
        at += part as u64;
    }
    Ok(())
}
