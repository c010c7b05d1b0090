//! Runs the program under test.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_imgtool");

/// Result of a run.
#[derive(Debug)]
pub struct Outcome {
    /// The command line, for messages.
    pub command: String,
    /// Exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// Peak resident memory in bytes; 0 if it was not measured.
    pub peak_memory: u64,
    /// Changed files in the directory in which the program ran, and in those that its arguments name.
    pub changes: Vec<String>,
}

impl Outcome {
    /// Asserts an exit code, and that the program did not panic. After a failure or a refusal (1 or 2), no
    /// file may have changed.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        if matches!(code, 1 | 2) {
            assert!(self.changes.is_empty(), "{}: {:?}\n{}", self.command, self.changes, self.stderr);
        }
        self.ends_with(code)
    }

    /// Like [`Self::exits`], but files may have changed, such as a target that is written in place, or a file
    /// that another process writes meanwhile.
    #[track_caller]
    pub fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{}\n--- stderr:\n{}", self.command, self.stderr);
        assert!(!self.stderr.contains("panicked at"), "{}\n{}", self.command, self.stderr);
        self
    }

    /// Asserts that standard error contains `wanted`, ignoring case.
    #[track_caller]
    pub fn says(self, wanted: &str) -> Self {
        assert!(
            self.stderr.to_lowercase().contains(&wanted.to_lowercase()),
            "{}\n--- no '{wanted}' in stderr:\n{}",
            self.command,
            self.stderr
        );
        self
    }

    /// Returns standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Returns standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|e| panic!("{}: stdout is no JSON: {e}\n{}", self.command, self.text()))
    }
}

/// A run of the program, to be set up and started.
pub struct Run {
    command: Command,
    input: Input,
    measure: bool,
}

enum Input {
    Nothing,
    Pipe(PathBuf),
    Bytes(Vec<u8>),
}

/// Sets up a run of the program with these arguments. Standard input is empty, and the time of day is fixed
/// so that outputs can be compared.
pub fn imgtool<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    let mut command = Command::new(PROGRAM);
    command.args(args).env("SOURCE_DATE_EPOCH", "1790000000");
    Run { command, input: Input::Nothing, measure: false }
}

impl Run {
    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.command.env(name, value);
        self
    }

    /// Runs the program in this directory.
    pub fn within(mut self, directory: &Path) -> Self {
        self.command.current_dir(directory);
        self
    }

    /// Feeds the content of a file through a pipe to standard input.
    pub fn pipe_from(mut self, path: &Path) -> Self {
        self.input = Input::Pipe(path.to_owned());
        self
    }

    /// Feeds these bytes through a pipe to standard input.
    pub fn pipe_bytes(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = Input::Bytes(bytes.into());
        self
    }

    /// Ends the program after this much processor time, which does not depend on the load of the machine,
    /// unlike elapsed time. Must be the last setting.
    pub fn cpu_limit(self, seconds: u32) -> Self {
        self.through("prlimit", &format!("--cpu={seconds}"))
    }

    /// Runs the program through a helper that executes it: `helper argument PROGRAM …`.
    fn through(mut self, helper: &str, argument: &str) -> Self {
        let mut command = Command::new(helper);
        command.arg(argument).arg(self.command.get_program()).args(self.command.get_args());
        command.envs(self.command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        if let Some(directory) = self.command.get_current_dir() {
            command.current_dir(directory);
        }
        self.command = command;
        self
    }

    /// Measures the peak memory of the run.
    pub fn measured(mut self) -> Self {
        self.measure = true;
        self
    }

    /// Runs the program to its end, which must be a success.
    #[track_caller]
    pub fn ok(self) -> Outcome {
        self.go().exits(0)
    }

    /// Runs the program to its end.
    #[track_caller]
    pub fn go(mut self) -> Outcome {
        let name = format!("{:?}", self.command);
        let watched = watched_directories(&self.command);
        let before = files_in(&watched);
        let stdin = if matches!(self.input, Input::Nothing) { Stdio::null() } else { Stdio::piped() };
        self.command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.command.spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
        let feeder = feed(&mut child, self.input);
        let mut stdout = child.stdout.take().expect("stdout is piped");
        let mut stderr = child.stderr.take().expect("stderr is piped");
        let out = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stdout.read_to_end(&mut bytes).map(|_| bytes).expect("read stdout")
        });
        let err = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).map(|_| bytes).expect("read stderr")
        });
        let (status, peak_memory) = watch(&mut child, self.measure, &name);
        if let Some(feeder) = feeder {
            feeder.join().expect("feeder");
        }
        let stderr = String::from_utf8_lossy(&err.join().expect("stderr")).into_owned();
        let changes = differences(&before, &files_in(&watched));
        Outcome { command: name, status, stdout: out.join().expect("stdout"), stderr, peak_memory, changes }
    }

    /// Starts the program with a pipe as standard input, which the caller feeds; its output is discarded.
    /// SIGHUP and SIGINT have their default effect, even if the tests run under nohup or in the background.
    pub fn start(self) -> Child {
        let mut run = self.through("env", "--default-signal=HUP,INT");
        run.command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        run.command.spawn().expect("spawn")
    }

    /// Starts the program with pipes as standard input and standard output.
    pub fn start_piped(mut self) -> Child {
        self.command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        self.command.spawn().expect("spawn")
    }
}

/// Returns the directories that a command could write to: its own, and those of paths among its arguments.
/// Only temporary directories, which no other test uses.
fn watched_directories(command: &Command) -> Vec<PathBuf> {
    let values = command.get_args().filter_map(OsStr::to_str).flat_map(|text| text.split(['=', ',']));
    let paths = values.map(PathBuf::from).filter(|path| path.is_absolute());
    let directories = paths.filter_map(|path| {
        let is_directory = path.is_dir();
        if is_directory { Some(path) } else { path.parent().map(Path::to_owned) }
    });
    let root = std::env::temp_dir();
    directories
        .chain(command.get_current_dir().map(Path::to_owned))
        .filter(|directory| directory.starts_with(&root) && *directory != root)
        .collect()
}

/// Returns the inode and the times of each file by its path; they change when a file is written or replaced.
/// Directories have zeros.
fn files_in(directories: &[PathBuf]) -> BTreeMap<PathBuf, [i64; 5]> {
    let mut found = BTreeMap::new();
    let mut rest = directories.to_vec();
    while let Some(directory) = rest.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            // Links are not followed: a link out of the directory counts as a file of it.
            let Ok(meta) = entry.metadata() else { continue };
            let mut facts = [0; 5];
            if meta.is_dir() {
                rest.push(entry.path());
            } else {
                let inode = meta.ino() as i64;
                facts = [inode, meta.mtime(), meta.mtime_nsec(), meta.ctime(), meta.ctime_nsec()];
            }
            found.insert(entry.path(), facts);
        }
    }
    found
}

fn differences(before: &BTreeMap<PathBuf, [i64; 5]>, after: &BTreeMap<PathBuf, [i64; 5]>) -> Vec<String> {
    let new = after.keys().filter(|path| !before.contains_key(*path)).map(|path| ("new", path));
    let old = before.iter().filter_map(|(path, facts)| match after.get(path) {
        None => Some(("gone", path)),
        Some(now) => (now != facts).then_some(("changed", path)),
    });
    new.chain(old).map(|(what, path)| format!("{what}: {}", path.display())).collect()
}

fn feed(child: &mut Child, input: Input) -> Option<std::thread::JoinHandle<()>> {
    let mut stdin = child.stdin.take()?;
    Some(std::thread::spawn(move || {
        // A program that refuses its input closes the pipe early, which is no error.
        let _ = match input {
            Input::Nothing => Ok(0),
            Input::Pipe(path) => {
                std::io::copy(&mut std::fs::File::open(path).expect("open the input"), &mut stdin)
            }
            Input::Bytes(bytes) => stdin.write_all(&bytes).map(|()| 0),
        };
    }))
}

/// Maximum duration of a run. Our limit: longer than any run takes, so that only a program that hangs fails.
const PATIENCE: Duration = Duration::from_secs(400);

/// Waits for the program to end, and polls its peak resident memory in bytes if `measure` is set. Until the
/// process has the program's name, its memory is still that of the test process.
#[track_caller]
fn watch(child: &mut Child, measure: bool, name: &str) -> (ExitStatus, u64) {
    let proc_status = format!("/proc/{}/status", child.id());
    let began = Instant::now();
    let mut pause = Duration::from_micros(500);
    let mut peak = 0;
    loop {
        if let Some(status) = child.try_wait().expect("wait") {
            return (status, peak);
        }
        if measure
            && let Ok(text) = std::fs::read_to_string(&proc_status)
            && text.starts_with("Name:\timgtool\n")
            && let Some(line) = text.lines().find(|line| line.starts_with("VmHWM:"))
            && let Some(kib) = line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok())
        {
            peak = peak.max(kib * 1024);
        }
        if began.elapsed() > PATIENCE {
            child.kill().expect("kill");
            panic!("{name}: still running after {PATIENCE:?}");
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(4));
    }
}
