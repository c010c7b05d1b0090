//! [`Error`], the error type of the whole toolkit. Programs match on its kind; users read its message, place
//! (file, device, guest range, file offset), cause and remedy.
//!
//! A driver creates an error with one of the constructors and adds the parts of the place that it knows:
//!
//! ```
//! use imgtool_core::{Error, ErrorKind, Remedy};
//! let error = Error::corrupt("extent header checksum does not match")
//!     .at(12_800)
//!     .device("drive-scsi0")
//!     .guest(0..65_536)
//!     .remedied_by(Remedy::Salvage("copy the archive again, or use another backup".into()));
//! assert_eq!(error.kind(), ErrorKind::Corrupt);
//! ```

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::ops::Range;

use crate::location::Location;
use crate::remedy::Remedy;
pub use crate::text::{escape_control, is_hidden};

/// Kind of an error, as far as programs need to tell errors apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The input is not in the format that the caller opened it as.
    WrongFormat,
    /// The input breaks a rule of its format: a field has a forbidden value.
    Malformed,
    /// The input is damaged: a checksum does not match, or data is missing or occurs twice.
    Corrupt,
    /// A legal input or request that the toolkit does not support.
    Unsupported,
    /// Content arrived in an order that the operation can't handle.
    OutOfOrder,
    /// A range beyond the end of a device or file.
    OutOfBounds,
    /// A legal value above a limit that protects memory or time.
    LimitExceeded,
    /// A usage error: an invalid option or argument.
    Usage,
    /// An operation that the user did not allow: opening an external file, overwriting, writing to a busy
    /// device.
    Refused,
    /// A failed system call.
    Io,
    /// A failure of the network or of a server that may pass: another try may help.
    Unavailable,
    /// The operation was cancelled.
    Cancelled,
}

/// An error with its place: location, device, guest range and file offset.
///
/// `{}` prints one line without the cause, which [`StdError::source`] returns; `{:#}` includes all causes.
/// Neither prints the remedy.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    location: Option<Location>,
    device: Option<String>,
    guest: Option<Range<u64>>,
    file_offset: Option<u64>,
    compressed_offset: Option<u64>,
    remedy: Option<Remedy>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

/// Result type of the toolkit.
pub type Result<T, E = Error> = std::result::Result<T, E>;

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $kind:ident;)*) => {
        $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self { Self::new(ErrorKind::$kind, message) })*
    };
}

impl Error {
    /// Creates an error of `kind`. The message is in lower case, has no full stop, and states the value and
    /// the bound.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            location: None,
            device: None,
            guest: None,
            file_offset: None,
            compressed_offset: None,
            remedy: None,
            source: None,
        }))
    }

    constructors! {
        /// Creates an [`ErrorKind::WrongFormat`] error.
        wrong_format => WrongFormat;
        /// Creates an [`ErrorKind::Malformed`] error.
        malformed => Malformed;
        /// Creates an [`ErrorKind::Corrupt`] error.
        corrupt => Corrupt;
        /// Creates an [`ErrorKind::Unsupported`] error.
        unsupported => Unsupported;
        /// Creates an [`ErrorKind::OutOfOrder`] error.
        out_of_order => OutOfOrder;
        /// Creates an [`ErrorKind::OutOfBounds`] error.
        out_of_bounds => OutOfBounds;
        /// Creates an [`ErrorKind::LimitExceeded`] error.
        limit => LimitExceeded;
        /// Creates an [`ErrorKind::Usage`] error.
        usage => Usage;
        /// Creates an [`ErrorKind::Refused`] error.
        refused => Refused;
        /// Creates an [`ErrorKind::Unavailable`] error.
        unavailable => Unavailable;
        /// Creates an [`ErrorKind::Cancelled`] error.
        cancelled => Cancelled;
    }

    /// Creates the error for a failed system call. `act` names the operation ("read", "write", "open" …).
    ///
    /// If `source` carries an [`Error`], returns that error instead.
    pub fn io(act: impl Into<String>, source: io::Error) -> Self {
        match source.downcast::<Self>() {
            Ok(carried) => carried,
            Err(source) => Self::new(ErrorKind::Io, act).because(source),
        }
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Sets the location of the file, unless it is already set: the innermost location wins.
    #[must_use]
    pub fn path(mut self, location: impl Into<Location>) -> Self {
        self.0.location.get_or_insert_with(|| location.into());
        self
    }

    /// Sets the name of the device, unless it is already set.
    #[must_use]
    pub fn device(mut self, name: impl Into<String>) -> Self {
        self.0.device.get_or_insert_with(|| name.into());
        self
    }

    /// Sets the guest range in bytes, unless it is already set.
    #[must_use]
    pub fn guest(mut self, range: Range<u64>) -> Self {
        self.0.guest.get_or_insert(range);
        self
    }

    /// Sets the file offset in bytes, unless it is already set.
    #[must_use]
    pub fn at(mut self, file_offset: u64) -> Self {
        self.0.file_offset.get_or_insert(file_offset);
        self
    }

    /// Sets the position in the compressed file, unless it is already set; `None` leaves it unknown. The file
    /// offset is then a position in the decompressed data.
    #[must_use]
    pub fn compressed_at(mut self, position: Option<u64>) -> Self {
        self.0.compressed_offset = self.0.compressed_offset.or(position);
        self
    }

    /// Sets the remedy, an action that the user can take, unless it is already set.
    #[must_use]
    pub fn remedied_by(mut self, remedy: Remedy) -> Self {
        self.0.remedy.get_or_insert(remedy);
        self
    }

    /// Sets the remedy, also if another one is set: for a caller that can't offer that one.
    #[must_use]
    pub fn with_remedy(mut self, remedy: impl Into<Remedy>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Sets the remedy to advice that fits every program, without command-line flags; see [`Remedy`].
    #[must_use]
    pub fn hint(self, advice: impl Into<Remedy>) -> Self {
        self.remedied_by(advice.into())
    }

    /// Returns the kind.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the message without place and cause.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the remedy, if any.
    pub fn remedy(&self) -> Option<&Remedy> {
        self.0.remedy.as_ref()
    }

    /// Returns the text of the remedy, if any, without command-line flags; see [`Remedy`].
    pub fn hint_text(&self) -> Option<String> {
        self.0.remedy.as_ref().map(Remedy::to_string)
    }

    /// Returns the location of the affected file, if known.
    pub fn location(&self) -> Option<&Location> {
        self.0.location.as_ref()
    }

    /// Returns the name of the affected device, if known.
    pub fn device_name(&self) -> Option<&str> {
        self.0.device.as_deref()
    }

    /// Returns the guest range of the fault, in bytes, if known.
    pub fn guest_range(&self) -> Option<Range<u64>> {
        self.0.guest.clone()
    }

    /// Returns the file offset of the fault, in bytes, if known.
    pub fn file_offset(&self) -> Option<u64> {
        self.0.file_offset
    }

    /// Returns the position of the fault in the compressed file, in bytes, if the file is compressed and the
    /// position is known: that which the decoder had reached, or the start of the damaged frame.
    pub fn compressed_offset(&self) -> Option<u64> {
        self.0.compressed_offset
    }

    /// Returns the operation that failed ("open", "read" …); `None` unless the kind is [`ErrorKind::Io`].
    pub fn act(&self) -> Option<&str> {
        (self.0.kind == ErrorKind::Io).then_some(&*self.0.message)
    }

    /// Returns the operating system's error that caused this one, if any.
    pub fn io_error(&self) -> Option<&io::Error> {
        self.0.source.as_deref()?.downcast_ref()
    }

    /// Formats the device, guest range and file offset for the end of the message.
    fn places(&self) -> String {
        let inner = &*self.0;
        let device = inner.device.as_ref().map(|device| format!("device {}", escape_control(device)));
        let guest = inner.guest.as_ref().map(|guest| format!("guest bytes {}..{}", guest.start, guest.end));
        let offset = inner.file_offset.map(|offset| format!("file offset {offset}"));
        let compressed = inner.compressed_offset.map(|position| format!("compressed byte {position}"));
        let places: Vec<String> = [device, guest, offset, compressed].into_iter().flatten().collect();
        if places.is_empty() { String::new() } else { format!(" ({})", places.join(", ")) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(location) = &self.0.location {
            write!(f, "{location}: ")?;
        }
        if self.act().is_some() {
            f.write_str("can't ")?;
        }
        f.write_str(&escape_control(&self.0.message))?;
        if f.alternate() {
            let mut cause = self.source();
            while let Some(error) = cause {
                write!(f, ": {}", escape_control(&error.to_string()))?;
                cause = error.source();
            }
        }
        f.write_str(&self.places())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}({self:#})", self.0.kind)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as &(dyn StdError + 'static))
    }
}

/// Wraps an [`Error`] so that it can pass through interfaces that return [`io::Error`]. [`Error::io`] unwraps
/// it.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match error.kind() {
            ErrorKind::Corrupt => io::ErrorKind::InvalidData,
            ErrorKind::Unsupported => io::ErrorKind::Unsupported,
            _ => io::ErrorKind::Other,
        };
        Self::new(kind, error)
    }
}

/// Adds the file or the device to the error of a [`Result`].
pub trait ResultExt<T> {
    /// Applies [`Error::path`] to the error.
    ///
    /// # Errors
    /// The error of `self`, with the location.
    fn in_file(self, location: impl Into<Location>) -> Result<T>;
    /// Applies [`Error::device`] to the error.
    ///
    /// # Errors
    /// The error of `self`, with the device.
    fn on_device(self, name: &str) -> Result<T>;
}

impl<T> ResultExt<T> for Result<T> {
    fn in_file(self, location: impl Into<Location>) -> Result<T> {
        self.map_err(|e| e.path(location))
    }

    fn on_device(self, name: &str) -> Result<T> {
        self.map_err(|e| e.device(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_shows_the_first_path_and_every_location() {
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
    fn alternate_display_appends_the_cause() {
        let error = Error::io("open", io::Error::from_raw_os_error(2)).path("a.raw");
        assert_eq!(error.to_string(), "a.raw: can't open");
        assert_eq!(format!("{error:#}"), "a.raw: can't open: No such file or directory (os error 2)");
        assert!(error.source().is_some());
        assert_eq!(error.io_error().and_then(io::Error::raw_os_error), Some(2));
    }

    #[test]
    fn errors_survive_conversion_to_io_error() {
        let through_std = io::Error::from(Error::limit("too large").hint("use another"));
        let error = Error::io("read", through_std);
        assert_eq!((error.kind(), error.message()), (ErrorKind::LimitExceeded, "too large"));
        assert_eq!(error.hint_text().as_deref(), Some("use another"));
    }

    #[test]
    fn control_characters_are_escaped() {
        let error = Error::malformed("bad name").device("a\x1b[2Jb\nc");
        assert!(!error.to_string().contains('\x1b'));
        assert!(!error.to_string().contains('\n'));
    }
}
