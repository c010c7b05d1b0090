//! The one error type: a small kind to match on, and everything a person needs to find the place.
//!
//! A driver makes an error with one of the constructors and adds what it knows:
//!
//! ```
//! use imgtool_toolkit::Error;
//! let error = Error::corrupt("extent header checksum does not match")
//!     .at(12_800)
//!     .device("drive-scsi0")
//!     .guest(0..65_536)
//!     .hint("the archive is damaged; --salvage restores what is whole");
//! assert_eq!(error.kind(), imgtool_toolkit::ErrorKind::Corrupt);
//! ```

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// What went wrong, as far as a program has to tell errors apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The input is not of the format it was opened as.
    WrongFormat,
    /// The input breaks the rules of its format: a field has a value that it must not have.
    Malformed,
    /// The input was whole once: a checksum does not match, data is missing or comes twice.
    Corrupt,
    /// A legal input or request that this program does not serve.
    Unsupported,
    /// An address beyond the end of a device or file.
    OutOfBounds,
    /// A legal value above a limit that protects memory or time.
    LimitExceeded,
    /// An option or argument that makes no sense.
    Usage,
    /// Something that was not allowed: an external file, overwriting, a busy device.
    Refused,
    /// The operating system said no.
    Io,
    /// The work was cancelled from outside.
    Cancelled,
}

/// An error with its place: file, device, guest range and file offset.
///
/// `Display` prints one line without the hint; [`Error::hint_text`] holds what to do about it.
#[derive(Debug, thiserror::Error)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    path: Option<PathBuf>,
    device: Option<String>,
    guest: Option<Range<u64>>,
    file_offset: Option<u64>,
    hint: Option<String>,
    source: Option<io::Error>,
}

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident;)*) => {
        $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self { Self::new(ErrorKind::$kind, message) })*
    };
}

impl Error {
    /// An error of `kind`; the message is lower case, without a full stop, with value and bound.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            path: None,
            device: None,
            guest: None,
            file_offset: None,
            hint: None,
            source: None,
        }))
    }

    constructors! {
        /// [`ErrorKind::WrongFormat`].
        wrong_format => WrongFormat;
        /// [`ErrorKind::Malformed`].
        malformed => Malformed;
        /// [`ErrorKind::Corrupt`].
        corrupt => Corrupt;
        /// [`ErrorKind::Unsupported`].
        unsupported => Unsupported;
        /// [`ErrorKind::OutOfBounds`].
        out_of_bounds => OutOfBounds;
        /// [`ErrorKind::LimitExceeded`].
        limit => LimitExceeded;
        /// [`ErrorKind::Usage`].
        usage => Usage;
        /// [`ErrorKind::Refused`].
        refused => Refused;
        /// [`ErrorKind::Cancelled`].
        cancelled => Cancelled;
    }

    /// An error of the operating system while doing `what` ("read", "write", "open" …).
    pub fn io(what: impl Into<String>, source: io::Error) -> Self {
        let mut error = Self::new(ErrorKind::Io, what);
        error.0.source = Some(source);
        error
    }

    /// Names the file, unless one is named already (the innermost place knows best).
    #[must_use]
    pub fn path(mut self, path: impl AsRef<Path>) -> Self {
        self.0.path.get_or_insert_with(|| path.as_ref().to_owned());
        self
    }

    /// Names the device, unless one is named already.
    #[must_use]
    pub fn device(mut self, name: impl Into<String>) -> Self {
        self.0.device.get_or_insert_with(|| name.into());
        self
    }

    /// Names the guest range in bytes, unless one is named already.
    #[must_use]
    pub fn guest(mut self, range: Range<u64>) -> Self {
        self.0.guest.get_or_insert(range);
        self
    }

    /// Names the offset in the file in bytes, unless one is named already.
    #[must_use]
    pub fn at(mut self, file_offset: u64) -> Self {
        self.0.file_offset.get_or_insert(file_offset);
        self
    }

    /// Says what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// What went wrong, as far as a program has to tell errors apart.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The bare message, without place.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// What to do about it, if there is something.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The file the error is about.
    pub fn file(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// The device the error is about.
    pub fn device_name(&self) -> Option<&str> {
        self.0.device.as_deref()
    }

    /// The guest range the error is about, in bytes.
    pub fn guest_range(&self) -> Option<Range<u64>> {
        self.0.guest.clone()
    }

    /// The offset in the file the error is about, in bytes.
    pub fn file_offset(&self) -> Option<u64> {
        self.0.file_offset
    }

    /// The operating system's error behind this one.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.0.source.as_ref()
    }
}

/// Control characters from an image must not reach a terminal: they are printed escaped.
pub fn escape_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &*self.0;
        if let Some(path) = &inner.path {
            write!(f, "{}: ", escape_control(&path.to_string_lossy()))?;
        }
        f.write_str(&escape_control(&inner.message))?;
        if let Some(source) = &inner.source {
            write!(f, ": {source}")?;
        }
        let mut places = Vec::new();
        if let Some(device) = &inner.device {
            places.push(format!("device {}", escape_control(device)));
        }
        if let Some(guest) = &inner.guest {
            places.push(format!("guest bytes {}..{}", guest.start, guest.end));
        }
        if let Some(offset) = inner.file_offset {
            places.push(format!("file offset {offset}"));
        }
        if !places.is_empty() {
            write!(f, " ({})", places.join(", "))?;
        }
        Ok(())
    }
}

/// Adds the place to an error on its way up.
pub trait ResultExt<T> {
    /// [`Error::path`] on the error, if there is one.
    ///
    /// # Errors
    /// The same, with the place.
    fn in_file(self, path: impl AsRef<Path>) -> Result<T>;
    /// [`Error::device`] on the error, if there is one.
    ///
    /// # Errors
    /// The same, with the place.
    fn on_device(self, name: &str) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn in_file(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| e.path(path))
    }

    fn on_device(self, name: &str) -> Result<T> {
        self.map_err(|e| e.device(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_every_place_once() {
        let error = Error::corrupt("short extent")
            .path("vm.vma")
            .path("outer.zst")
            .device("drive-scsi0")
            .guest(0..4096)
            .at(12_800);
        assert_eq!(
            error.to_string(),
            "vm.vma: short extent (device drive-scsi0, guest bytes 0..4096, file offset 12800)"
        );
    }

    #[test]
    fn control_characters_are_escaped() {
        let error = Error::malformed("bad name").device("a\x1b[2Jb\nc");
        assert!(!error.to_string().contains('\x1b'));
        assert!(!error.to_string().contains('\n'));
    }
}
