//! Destination of a new archive: a file, a FIFO, or a command that reads it from a pipe.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};

use imgtool_core::sync::lock;
use imgtool_core::{Error, Location, Output, Result, ResultExt};
use imgtool_engine::Destination;
use imgtool_storage::os::{self, FileClass};

/// Returns the command that reads the archive, if `path` is one.
pub(super) fn exec_command(path: &Path) -> Option<&OsStr> {
    path.as_os_str().as_bytes().strip_prefix(b"exec:").map(OsStr::from_bytes)
}

/// Destination of the archive, and the command that reads it from a pipe, if any.
pub(super) struct NewArchive {
    pub(super) destination: Destination,
    pub(super) command: Option<Piped>,
    /// True if the archive goes into a FIFO or another stream, whose reader may leave.
    pub(super) is_stream: bool,
}

/// A running command that reads the archive from its standard input.
pub(super) struct Piped {
    location: Location,
    child: Child,
    stdin: SharedStdin,
}

impl NewArchive {
    pub(super) fn open(path: &Path) -> Result<Self> {
        if let Some(command) = exec_command(path) {
            return Self::exec(path, command);
        }
        let exists = fs::metadata(path).ok();
        let is_stream = exists.as_ref().is_some_and(|meta| os::classify(meta) == FileClass::Stream);
        if is_stream {
            let file = os::open_stream(path).map_err(|e| Error::io("open", e)).in_file(path)?;
            let output = Output::from_writer(path, Box::new(file));
            return Ok(Self { destination: Destination::Open(output), command: None, is_stream: true });
        }
        if exists.is_some() {
            return Err(Error::refused(format!("can't open file {} - File exists", path.display())));
        }
        // The reference program treats '-' as the name of a file.
        let path = if path == Path::new("-") { PathBuf::from("./-") } else { path.to_owned() };
        Ok(Self { destination: Destination::New(path), command: None, is_stream: false })
    }

    fn exec(path: &Path, command: &OsStr) -> Result<Self> {
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(command)
            .stdin(Stdio::piped())
            .spawn()
            .map_err(|e| Error::io("start", e))
            .in_file(path)?;
        let stdin = SharedStdin(Arc::new(Mutex::new(child.stdin.take())));
        let output = Output::from_writer(path, Box::new(stdin.clone()));
        Ok(Self {
            destination: Destination::Open(output),
            command: Some(Piped { location: path.into(), child, stdin }),
            is_stream: false,
        })
    }
}

impl Piped {
    /// Closes the command's standard input and waits for its exit status.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if the command failed.
    pub(super) fn finish(&mut self) -> Result<()> {
        // Dropping the handle closes the pipe. It has no buffer to flush.
        drop(lock(&self.stdin.0).take());
        let status = self.child.wait().map_err(|e| Error::io("wait for", e)).in_file(&self.location)?;
        if status.success() {
            return Ok(());
        }
        Err(Error::refused(format!("the command reading the archive failed: {status}")).path(&self.location))
    }

    /// Kills the command after `error`, so that it does not mistake an unfinished archive for a complete one.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] if the command had already failed. Its exit status then explains
    /// `error`, a broken pipe.
    pub(super) fn give_up(&mut self, error: &Error) -> Result<()> {
        if error.io_error().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe) {
            return self.finish();
        }
        self.kill();
        Ok(())
    }

    /// Kills the command.
    pub(super) fn kill(&mut self) {
        // Fails only if the command has just ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Standard input of a command, shared with the code that closes it.
#[derive(Clone)]
struct SharedStdin(Arc<Mutex<Option<ChildStdin>>>);

impl Write for SharedStdin {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).as_mut().ok_or(io::ErrorKind::BrokenPipe)?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        // After the pipe is closed, there is nothing left to flush.
        lock(&self.0).as_mut().map_or(Ok(()), ChildStdin::flush)
    }
}
