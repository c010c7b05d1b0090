//! Exit codes: part of the contract with scripts.

use std::process::ExitCode;

/// How a verb ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Done and complete; `compare`: same; `check`: clean.
    Done,
    /// Failed; `compare`: different; `check`: could not check.
    Failed,
    /// The command line makes no sense; `compare`: could not compare; `check`: corrupt.
    Usage,
    /// Finished with losses; `check`: leaks only.
    Losses,
    /// A code of its own, of a program that is stood in for.
    Other(u8),
}

impl Exit {
    /// `compare`: the contents differ.
    pub const DIFFERENT: Exit = Exit::Failed;
    /// `compare`: an image could not be opened or read.
    pub const NOT_COMPARED: Exit = Exit::Usage;
    /// `check`: the image contradicts itself.
    pub const CORRUPT: Exit = Exit::Usage;
    /// `check`: space is lost, content is right.
    pub const LEAKS: Exit = Exit::Losses;

    /// The number.
    pub fn code(self) -> u8 {
        match self {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Usage => 2,
            Exit::Losses => 3,
            Exit::Other(code) => code,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit.code())
    }
}
