//! Exit codes: part of the contract with scripts.

use std::process::ExitCode;

/// Outcome of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Success; `compare`: identical; `check`: clean.
    Done,
    /// Failed; `compare`: different; `check`: could not check, or usage error.
    Failed,
    /// Usage error; `compare`: usage error, or could not compare; `check`: corrupt.
    Usage,
    /// Finished with losses; `check`: leaks only.
    Losses,
    /// Failed, but another try may help: the network or a server. The code of sysexits.h (EX_TEMPFAIL).
    TryAgain,
    /// Exit code of another program that imgtool replaces.
    Other(u8),
}

impl Exit {
    /// `compare`: the images differ.
    pub const DIFFERENT: Exit = Exit::Failed;
    /// `compare`: an image could not be opened or read.
    pub const NOT_COMPARED: Exit = Exit::Usage;
    /// `check`: the image is inconsistent.
    pub const CORRUPT: Exit = Exit::Usage;
    /// `check`: the platform refuses an image.
    pub const MISFIT: Exit = Exit::Usage;
    /// `check`: the format has no structure to check. The code of qemu-img.
    pub const NO_CHECK: Exit = Exit::Other(63);
    /// `check`: space is wasted, the content is intact.
    pub const LEAKS: Exit = Exit::Losses;

    /// Returns the numeric exit code.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Losses => 3,
            Exit::TryAgain => 75,
            Exit::Other(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}
