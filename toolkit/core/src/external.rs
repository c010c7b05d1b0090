//! Settings for opening an image, and the opener of the external files that the image names: a backing image
//! or a data file.
//!
//! A driver never opens a file by name. It calls [`Externals`]; the [`ExternalOpener`] behind it checks that
//! the user allowed the file, detects loops in the chain, and chooses the driver.

use std::fmt;
use std::sync::Arc;

use crate::error::{Error, Result, escape_control};
use crate::input::{FilePart, Input};
use crate::location::{Location, Url};
use crate::memory::Memory;
use crate::options::OptionValues;
use crate::remedy::Remedy;
use crate::secret::Secrets;
use crate::snapshot::SnapshotChoice;
use crate::source::ImageSource;
use crate::stack::deeper;

/// Settings for opening an image.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// True to restore the intact parts of a damaged image. The rest reads as zeros and is reported by
    /// [`ImageSource::losses`].
    pub salvage: bool,
    /// True to open an image that is marked as unsafe (the corrupt bit of qcow2).
    pub force: bool,
    /// True to read a file that another program may write. By default it is refused, as QEMU's programs do.
    pub force_share: bool,
    /// True to accept bytes after the end of an archive.
    pub ignore_trailing: bool,
    /// True to read a file as it is: outer compression is not removed, and a file that no driver recognises is a raw
    /// disk, whatever its name and content suggest. The size of a raw disk is rounded up to whole sectors of 512
    /// bytes. QEMU's programs do so.
    pub plain: bool,
    /// Part of the file that is the image; the rest is not read. It does not apply to the files that the
    /// image names.
    pub part: Option<FilePart>,
    /// Name of the file in an archive ([`crate::Capabilities::container`]) that is the image. Other drivers
    /// ignore it.
    pub member: Option<String>,
    /// The internal snapshot to read instead of the active state.
    pub snapshot: Option<SnapshotChoice>,
    /// True if the caller needs the persistent bitmaps ([`ImageSource::bitmaps`]).
    pub bitmaps: bool,
    /// True if the caller needs only facts, not content. The driver may then skip work that requires external
    /// files or a whole stream.
    pub info_only: bool,
    /// Passphrases of encrypted images, also of those below in a chain. Each is tried.
    pub secrets: Secrets,
    /// True if the caller needs the extents, but reads no content: an encrypted image then opens without its
    /// passphrase.
    pub layout_only: bool,
    /// Maximum number of bytes of a stream to read with `info_only`, for facts that are known only at its
    /// end.
    pub info_stream_len: u64,
    /// The opener of external files.
    pub externals: Externals,
    /// Ledger from which the image's tables and caches borrow.
    pub memory: Memory,
}

/// Opens the external files of images, if the user allowed them.
pub trait ExternalOpener: Send + Sync {
    /// Opens the external image that the image at `from` refers to as `name`. `format` is the name of the
    /// driver; if it is `None`, the opener probes the content. `role` describes the file in errors ("backing
    /// file").
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the file, or any error from opening it.
    fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Location,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>>;

    /// Opens the external file that the image at `from` refers to as `name`, as plain bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the file, or any error from opening it.
    fn open_file(&self, role: &str, name: &str, from: &Location) -> Result<Input>;

    /// Opens a file that is a part of the image at `from`, such as an extent of a split disk: a regular file
    /// in the image's own directory, called `name` without any directory. Such a file needs no permission,
    /// since the user named its image; any other name is treated as in [`ExternalOpener::open_file`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the file, as by default; or any error from
    /// opening it.
    fn open_part(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        self.open_file(role, name, from)
    }

    /// Returns the names of files that may be the external image which the image at `from` identifies by
    /// `identity` instead of a name: the files that the user allowed by path and, if the user allowed the
    /// files of the directory, those in it with this extension. [`ExternalOpener::open_file`] opens them.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user allowed no file, as by default; or an error of listing the
    /// directory.
    fn candidates(
        &self,
        role: &str,
        identity: &str,
        from: &Location,
        _extension: &str,
    ) -> Result<Vec<String>> {
        Err(refusal(role, identity, from))
    }

    /// Opens a member of a container as an image. This needs no permission: the member's bytes are a section
    /// of the container's input ([`Input::section`]).
    ///
    /// # Errors
    /// Any error from opening the member.
    fn open_member(
        &self,
        member: Input,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>>;

    /// Removes the outer compression `compression` ("gzip") from a member of a container. If the result can't
    /// be read by position, it is copied to temporary storage.
    ///
    /// # Errors
    /// [`crate::ErrorKind::WrongFormat`] if the member is not compressed in this way;
    /// [`crate::ErrorKind::Unsupported`] by default.
    fn decompressed(&self, member: Input, compression: &str) -> Result<Input> {
        Err(no_decoder(&member, compression))
    }

    /// Copies a stream to temporary storage, so that it is read by position.
    ///
    /// # Errors
    /// I/O errors; [`crate::ErrorKind::Unsupported`] by default.
    fn saved(&self, stream: Input) -> Result<Input> {
        Err(no_storage(&stream))
    }

    /// Called before the driver opens the image at `image`, which is the file with this device and inode. The
    /// opener can tell from them that the path leads to another file when the image names a file.
    fn image_opened(&self, _image: &Location, _id: (u64, u64)) {}

    /// Describes, in a sentence each, what has changed since the external files were opened.
    fn changes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Returns the number of overlays above the image that is being opened. The more there are, the less
    /// memory a driver uses for the image's tables.
    fn depth(&self) -> usize;
}

/// The handle through which a driver opens external files. The default refuses every file.
#[derive(Clone, Default)]
pub struct Externals(Option<Arc<dyn ExternalOpener>>);

impl Externals {
    /// Creates a handle that opens external files with `opener`.
    pub fn new(opener: Arc<dyn ExternalOpener>) -> Self {
        Self(Some(opener))
    }

    /// See [`ExternalOpener::open_image`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the file, or any error from opening it.
    pub fn open_image(
        &self,
        role: &str,
        name: &str,
        from: &Location,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        match &self.0 {
            Some(opener) => deeper(|| opener.open_image(role, name, from, format, options)),
            None => Err(refusal(role, name, from)),
        }
    }

    /// See [`ExternalOpener::open_file`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the file, or any error from opening it.
    pub fn open_file(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        match &self.0 {
            Some(opener) => opener.open_file(role, name, from),
            None => Err(refusal(role, name, from)),
        }
    }

    /// See [`ExternalOpener::open_part`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user did not allow the file, or any error from opening it.
    pub fn open_part(&self, role: &str, name: &str, from: &Location) -> Result<Input> {
        match &self.0 {
            Some(opener) => opener.open_part(role, name, from),
            None => Err(refusal(role, name, from)),
        }
    }

    /// See [`ExternalOpener::candidates`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if the user allowed no file, or an error of listing the directory.
    pub fn candidates(
        &self,
        role: &str,
        identity: &str,
        from: &Location,
        extension: &str,
    ) -> Result<Vec<String>> {
        match &self.0 {
            Some(opener) => opener.candidates(role, identity, from, extension),
            None => Err(refusal(role, identity, from)),
        }
    }

    /// See [`ExternalOpener::open_member`].
    ///
    /// # Errors
    /// Any error from opening the member; [`crate::ErrorKind::Unsupported`] without an opener, since only
    /// the opener has the drivers.
    pub fn open_member(
        &self,
        member: Input,
        format: Option<&str>,
        options: &OpenOptions,
    ) -> Result<Arc<dyn ImageSource>> {
        match &self.0 {
            Some(opener) => deeper(|| opener.open_member(member, format, options)),
            None => Err(Error::unsupported("no drivers are available for the members of a container")
                .path(member.location())),
        }
    }

    /// See [`ExternalOpener::decompressed`].
    ///
    /// # Errors
    /// Same as there; [`crate::ErrorKind::Unsupported`] without an opener, since only the opener has the decoders.
    pub fn decompressed(&self, member: Input, compression: &str) -> Result<Input> {
        match &self.0 {
            Some(opener) => opener.decompressed(member, compression),
            None => Err(no_decoder(&member, compression)),
        }
    }

    /// See [`ExternalOpener::saved`].
    ///
    /// # Errors
    /// Same as there; [`crate::ErrorKind::Unsupported`] without an opener, since only the opener has storage.
    pub fn saved(&self, stream: Input) -> Result<Input> {
        match &self.0 {
            Some(opener) => opener.saved(stream),
            None => Err(no_storage(&stream)),
        }
    }

    /// See [`ExternalOpener::image_opened`].
    pub fn image_opened(&self, image: &Location, id: (u64, u64)) {
        if let Some(opener) = &self.0 {
            opener.image_opened(image, id);
        }
    }

    /// See [`ExternalOpener::changes`]; none without an opener.
    pub fn changes(&self) -> Vec<String> {
        self.0.as_ref().map_or_else(Vec::new, |opener| opener.changes())
    }

    /// True if there is no opener.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// See [`ExternalOpener::depth`]; 0 without an opener.
    pub fn depth(&self) -> usize {
        self.0.as_ref().map_or(0, |opener| opener.depth())
    }
}

impl fmt::Debug for Externals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Externals").field(&self.0.is_some()).finish()
    }
}

/// Returns the error for an external file that the user did not allow.
pub fn refusal(role: &str, name: &str, from: &Location) -> Error {
    // A URL in an image may contain a password.
    let shown = Url::parse(name).map_or_else(|| escape_control(name), |url| url.to_string());
    let refused =
        Error::refused(format!("refusing to open the {role} '{shown}' that the image names")).path(from);
    match from.path() {
        Some(_) => refused.remedied_by(Remedy::AllowExternal { name: shown }),
        // A pipe has no directory, from which the name could lead to a file.
        None => refused.hint("name the image by its path: a pipe can't lead to other files"),
    }
}

fn no_decoder(member: &Input, compression: &str) -> Error {
    Error::unsupported(format!("no decoder for {compression} is available")).path(member.location())
}

fn no_storage(stream: &Input) -> Error {
    Error::unsupported("this stream can't be read in one pass")
        .path(stream.location())
        .hint("save it to a file first")
}

/// True if `name` is the name of a file without any directory, on every system: neither a path, nor a drive
/// letter, nor a URL.
pub fn is_plain_name(name: &str) -> bool {
    let forbidden = |c: char| c.is_control() || matches!(c, '/' | '\\' | ':');
    !name.is_empty() && name != "." && name != ".." && !name.contains(forbidden)
}

/// Name and format of the backing image of a new image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// Name relative to the new image, which will store it in this form.
    pub name: String,
    /// Name of the backing image's format.
    pub format: String,
}

impl BackingName {
    /// Parses the options `backing_file` and `backing_fmt` of a format whose images can only be the children
    /// of images of the same format, which is called one of `names`, and store the name as a Windows path.
    ///
    /// # Errors
    /// Same as [`BackingName::of_same_format`]; [`crate::ErrorKind::Unsupported`] for a file name that has no
    /// counterpart on Windows.
    pub fn storable(values: &OptionValues, names: &[&str]) -> Result<Option<Self>> {
        let backing = Self::of_same_format(values, names)?;
        let is_foreign = |c: char| c == '\\' || c == '"' || c.is_control();
        match backing {
            Some(Self { name, format }) if name.contains(is_foreign) => Err(Error::unsupported(format!(
                "a {format} image can't name the parent '{}'",
                escape_control(&name)
            ))
            .hint("choose a name without quotes, backslashes and control characters")),
            backing => Ok(backing),
        }
    }

    /// Parses the options `backing_file` and `backing_fmt` of a format whose images can only be the children
    /// of images of the same format, which is called one of `names`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if one is missing, or names another format.
    pub fn of_same_format(values: &OptionValues, names: &[&str]) -> Result<Option<Self>> {
        let format = names.first().copied().unwrap_or_default();
        match (values.text("backing_file"), values.text("backing_fmt")) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(Error::usage("backing_fmt needs backing_file")),
            (Some(_), None) => Err(Error::usage("the format of the backing file is missing (backing_fmt)")
                .remedied_by(Remedy::SetOption(format!("backing_fmt={format}")))),
            (Some(_), Some(other)) if !names.contains(&other) => Err(Error::usage(format!(
                "the parent of a {format} image must be a {format} image, not {other}"
            ))
            .hint("convert the parent first, or choose qcow2 for the new image")),
            (Some(name), Some(_)) => Ok(Some(Self { name: name.to_owned(), format: format.to_owned() })),
        }
    }

    /// Returns the name as a path of Windows: relative to the image, or absolute.
    pub fn windows_path(&self) -> String {
        let path = self.name.strip_prefix("file:").unwrap_or(&self.name).replace('/', r"\");
        let is_relative = !path.starts_with('\\') && !path.starts_with(r".\") && !path.starts_with(r"..\");
        if is_relative { format!(r".\{path}") } else { path }
    }

    /// True if the name is not relative to the image.
    pub fn is_absolute(&self) -> bool {
        self.name.strip_prefix("file:").unwrap_or(&self.name).starts_with('/')
    }
}

/// Converts a Windows path to a path of this system by replacing the separators. Returns `None` for an empty
/// path, and for a path with a drive letter, a volume or a share, which this system does not have.
pub fn local_name(name: &str) -> Option<String> {
    let path = name.strip_prefix(r"\\?\").unwrap_or(name).replace('\\', "/");
    let has_drive = path.as_bytes().get(1) == Some(&b':');
    let is_foreign = has_drive || path.starts_with("//") || path.starts_with("Volume{") || path.is_empty();
    (!is_foreign).then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converts_windows_paths_that_have_a_counterpart() {
        assert_eq!(local_name(r".\base.vhdx").as_deref(), Some("./base.vhdx"));
        assert_eq!(local_name(r"..\a\base.vhdx").as_deref(), Some("../a/base.vhdx"));
        assert_eq!(local_name("/srv/base.vhdx").as_deref(), Some("/srv/base.vhdx"));
        for foreign in [r"C:\base.vhdx", r"\\?\C:\base.vhdx", r"\\server\x", r"\\?\Volume{1}\x", ""] {
            assert_eq!(local_name(foreign), None, "{foreign}");
        }
    }
}
