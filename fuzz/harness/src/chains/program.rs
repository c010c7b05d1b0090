//! The program under test and the judges, as child processes.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Maximum time for a child. Our limit: the images are small, and a debug build on a busy machine needs a few
/// seconds.
const MOST_TIME: Duration = Duration::from_secs(120);

/// Environment variable that names the program under test.
const VARIABLE: &str = "IMGTOOL_FUZZ_PROGRAM";

/// The program under test.
#[derive(Debug, Clone)]
pub struct Program(pub PathBuf);

/// Result of a child process.
#[derive(Debug)]
pub struct Outcome {
    /// The command line.
    pub line: String,
    /// Exit code; `None` if a signal or the time limit ended it.
    pub code: Option<i32>,
    /// Standard error, and standard output unless it went to a file.
    pub text: String,
}

impl Program {
    /// Finds the program: in the environment variable `IMGTOOL_FUZZ_PROGRAM`, or beside this program, where
    /// Cargo builds both.
    pub fn find() -> Option<Self> {
        if let Some(path) = std::env::var_os(VARIABLE) {
            return Some(Self(path.into()));
        }
        let this = std::env::current_exe().ok()?;
        let found = this.ancestors().skip(1).take(2).map(|directory| directory.join("imgtool"));
        found.into_iter().find(|path| path.is_file()).map(Self)
    }

    /// Returns a command that runs the program within `directory`.
    pub fn command(&self, directory: &Path) -> Command {
        let mut command = Command::new(&self.0);
        command.current_dir(directory).env("SOURCE_DATE_EPOCH", "1790000000").env_remove("RUST_BACKTRACE");
        command
    }
}

/// Runs a command to its end. `from` is fed through a pipe, and standard output is copied to the file `to`.
///
/// # Errors
/// If the command can't be started, or a file can't be read or written.
pub fn run(command: Command, from: Option<&Path>, to: Option<&Path>) -> io::Result<Outcome> {
    run_within(MOST_TIME, command, from, to)
}

/// Like [`run`], with another time limit.
///
/// # Errors
/// Same as [`run`].
pub fn run_within(
    time: Duration,
    mut command: Command,
    from: Option<&Path>,
    to: Option<&Path>,
) -> io::Result<Outcome> {
    let line = line(&command, from, to);
    command.stdin(if from.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let feeder = from.map(File::open).transpose()?.zip(child.stdin.take()).map(|(mut file, mut pipe)| {
        // The program may stop reading early, which closes the pipe.
        thread::spawn(move || drop(io::copy(&mut file, &mut pipe)))
    });
    let mut output: Box<dyn Write + Send> = match to {
        Some(path) => Box::new(File::create(path)?),
        None => Box::new(Vec::new()),
    };
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let is_file = to.is_some();
    let reader = thread::spawn(move || -> io::Result<String> {
        let mut text = String::new();
        if let Some(stdout) = &mut stdout {
            if is_file { io::copy(stdout, &mut output).map(drop) } else { read_text(stdout, &mut text) }?;
        }
        Ok(text)
    });
    let errors = thread::spawn(move || {
        let mut text = String::new();
        stderr.as_mut().map_or(Ok(()), |stderr| read_text(stderr, &mut text)).map(|()| text)
    });
    let code = wait(&mut child, time)?;
    let join = |thread: thread::JoinHandle<io::Result<String>>| thread.join().unwrap_or(Ok(String::new()));
    let text = join(errors)? + &join(reader)?;
    if let Some(feeder) = feeder {
        let _ = feeder.join();
    }
    Ok(Outcome { line, code, text })
}

fn read_text(from: &mut impl Read, text: &mut String) -> io::Result<()> {
    let mut bytes = Vec::new();
    from.read_to_end(&mut bytes)?;
    text.push_str(&String::from_utf8_lossy(&bytes));
    Ok(())
}

fn wait(child: &mut Child, time: Duration) -> io::Result<Option<i32>> {
    let started = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code());
        }
        if started.elapsed() > time {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns the command as a line for a shell.
fn line(command: &Command, from: Option<&Path>, to: Option<&Path>) -> String {
    let mut line = from.map_or(String::new(), |path| format!("cat {} | ", path.display()));
    line += &command.get_program().to_string_lossy();
    for argument in command.get_args() {
        line += &format!(" {}", argument.to_string_lossy());
    }
    line + &to.map_or(String::new(), |path| format!(" | cat > {}", path.display()))
}

/// Returns all files below `directory`, as paths relative to it, sorted; without descriptions of machines: a domain
/// has the path of its directory, so it differs from run to run.
///
/// # Errors
/// If a directory can't be read.
pub fn files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fn walk(root: &Path, directory: &Path, found: &mut Vec<PathBuf>) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                walk(root, &path, found)?;
            } else if path.extension().is_none_or(|extension| extension != "conf" && extension != "xml") {
                found.push(path.strip_prefix(root).unwrap_or(&path).to_owned());
            }
        }
        Ok(())
    }
    let mut found = Vec::new();
    walk(directory, directory, &mut found)?;
    found.sort();
    Ok(found)
}
