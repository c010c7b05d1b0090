//! [`Location`] names the source or target of an image's bytes: a path, a URL, or a standard stream.
//!
//! A location is only a name: two locations may refer to the same bytes, and only the opened inputs and
//! outputs can tell. Messages contain locations, so `Display` and `Debug` leave out the user part and the
//! query of a URL, which may contain credentials.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};

use crate::text::escape_control;

/// Name of a source or target.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Location {
    /// Standard input.
    Stdin,
    /// Standard output.
    Stdout,
    /// The path of a regular file, a block device or a FIFO.
    Path(PathBuf),
    /// A URL (`https`, `s3`, `nbd` …).
    Url(Url),
}

/// Scheme of QEMU for a plain path. A file whose name begins with it is `./file:NAME`.
const FILE_SCHEME: &str = "file:";

impl Location {
    /// Parses the name of a source as a user types it: `-` is standard input, `SCHEME://…` is a URL, and
    /// anything else is a path. As in QEMU, `file:NAME` is the path `NAME`.
    pub fn source(text: &OsStr) -> Self {
        Self::parse(text, Self::Stdin)
    }

    /// Parses the name of a target as a user types it: `-` is standard output, `SCHEME://…` is a URL, and
    /// anything else is a path. As in QEMU, `file:NAME` is the path `NAME`.
    pub fn target(text: &OsStr) -> Self {
        Self::parse(text, Self::Stdout)
    }

    fn parse(text: &OsStr, dash: Self) -> Self {
        match text.to_str() {
            Some("-") => dash,
            Some(text) => match text.strip_prefix(FILE_SCHEME) {
                Some(path) => Self::Path(path.into()),
                None => Url::parse(text).map_or_else(|| Self::Path(text.into()), Self::Url),
            },
            None => Self::Path(text.into()),
        }
    }

    /// Returns the path, if the location is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            _ => None,
        }
    }

    /// Returns the last component of a path or of a URL's path; `None` for standard input and output.
    pub fn file_name(&self) -> Option<Cow<'_, str>> {
        match self {
            Self::Stdin | Self::Stdout => None,
            Self::Path(path) => path.file_name().map(OsStr::to_string_lossy),
            Self::Url(url) => url.file_name().map(decoded),
        }
    }

    /// Resolves a name stored in the image at this location, relative to the image's directory. Beside a
    /// path, an absolute name is returned unchanged. Returns `None` for standard input and output.
    pub fn beside(&self, name: &str) -> Option<Self> {
        match self {
            Self::Stdin | Self::Stdout => None,
            Self::Path(path) => Some(Self::Path(path.parent().unwrap_or(Path::new("")).join(name))),
            Self::Url(url) => Some(Self::Url(url.beside(name))),
        }
    }

    /// Returns the name as the user typed it, but without the credentials of a URL, for output that scripts
    /// read. Standard input and output are `-`.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::Stdin | Self::Stdout => Cow::Borrowed("-"),
            Self::Path(path) => path.to_string_lossy(),
            Self::Url(url) => Cow::Owned(url.to_string()),
        }
    }
}

/// Formats the location for messages: escapes control characters and leaves out credentials.
impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::Stdout => f.write_str("standard output"),
            Self::Path(path) => f.write_str(&escape_control(&path.to_string_lossy())),
            Self::Url(url) => url.fmt(f),
        }
    }
}

/// Same as `Display`, because debug output may end up in logs.
impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<&Location> for Location {
    fn from(location: &Location) -> Self {
        location.clone()
    }
}

impl From<&Path> for Location {
    fn from(path: &Path) -> Self {
        Self::Path(path.to_owned())
    }
}

impl From<&PathBuf> for Location {
    fn from(path: &PathBuf) -> Self {
        Self::Path(path.clone())
    }
}

impl From<PathBuf> for Location {
    fn from(path: PathBuf) -> Self {
        Self::Path(path)
    }
}

/// Parses `SCHEME://…` as a URL and anything else as a path. Unlike with [`Location::source`], `-` is a file
/// of that name.
impl From<&str> for Location {
    fn from(text: &str) -> Self {
        Url::parse(text).map_or_else(|| Self::Path(text.into()), Self::Url)
    }
}

/// Same as `From<&str>`.
impl From<String> for Location {
    fn from(text: String) -> Self {
        text.as_str().into()
    }
}

impl From<OsString> for Location {
    fn from(path: OsString) -> Self {
        Self::Path(path.into())
    }
}

impl From<Url> for Location {
    fn from(url: Url) -> Self {
        Self::Url(url)
    }
}

/// A URL, parsed only as far as needed to choose an opener and print messages.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Url {
    text: String,
    /// Length of the scheme in bytes.
    scheme_len: usize,
}

impl Url {
    /// Parses `SCHEME://…`. The scheme follows RFC 3986, 3.1, and has at least two characters, because a
    /// single letter is a drive on some systems. Returns `None` for anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let (scheme, _) = text.split_once("://")?;
        let is_scheme = scheme.len() > 1
            && scheme.starts_with(|c: char| c.is_ascii_alphabetic())
            && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
        is_scheme.then(|| Self { text: text.to_owned(), scheme_len: scheme.len() })
    }

    /// Returns the full text including credentials: for the opener, never for a message.
    pub fn secret_text(&self) -> &str {
        &self.text
    }

    /// Returns the scheme as the user typed it.
    pub fn scheme(&self) -> &str {
        &self.text[..self.scheme_len]
    }

    /// Returns host, port and path: the text after `://` without user part, query and fragment. Returns an
    /// empty string if a password may be in an unexpected place, because users type `/`, `?` and `#` in
    /// passwords without escaping them.
    pub fn authority_and_path(&self) -> &str {
        let rest = &self.text[self.scheme_len + 3..];
        let authority = &rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())];
        if authority.contains([':', '@']) && rest[authority.len()..].contains('@') {
            return "";
        }
        let rest = rest.find(['?', '#']).map_or(rest, |end| &rest[..end]);
        let authority_len = rest.find('/').unwrap_or(rest.len());
        match rest[..authority_len].rfind('@') {
            Some(at) => &rest[at + 1..],
            None => rest,
        }
    }

    /// True if the URL has a user part, which may contain a password.
    pub fn has_user(&self) -> bool {
        let rest = &self.text[self.scheme_len + 3..];
        rest[..rest.find(['/', '?', '#']).unwrap_or(rest.len())].contains('@')
    }

    fn file_name(&self) -> Option<&str> {
        let (_, path) = self.authority_and_path().split_once('/')?;
        path.rsplit('/').next().filter(|name| !name.is_empty())
    }

    /// Returns the URL of `name` beside this one. Keeps the user part and the query, since they may grant
    /// access.
    fn beside(&self, name: &str) -> Self {
        let end = self.text.find(['?', '#']).unwrap_or(self.text.len());
        let start = self.text[..end].rfind('/').map_or(end, |slash| slash + 1);
        // The slashes of `://` do not separate directories.
        let start = start.max(self.scheme_len + 3);
        let text = format!("{}{name}{}", &self.text[..start], &self.text[end..]);
        Self { text, scheme_len: self.scheme_len }
    }
}

/// Decodes `%XX` in the last component of a URL's path, unless the result is no file name.
fn decoded(name: &str) -> Cow<'_, str> {
    let digit = |byte: Option<&u8>| byte.and_then(|byte| char::from(*byte).to_digit(16));
    let bytes = name.as_bytes();
    let (mut out, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while let Some(byte) = bytes.get(at) {
        let code = (digit(bytes.get(at + 1)).zip(digit(bytes.get(at + 2)))).filter(|_| *byte == b'%');
        match code.and_then(|(high, low)| u8::try_from(high * 16 + low).ok()) {
            Some(decoded) => out.push(decoded),
            None => out.push(*byte),
        }
        at += if code.is_some() { 3 } else { 1 };
    }
    match String::from_utf8(out) {
        Ok(text) if !text.contains(['/', '\0']) => Cow::Owned(text),
        _ => Cow::Borrowed(name),
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme(), escape_control(self.authority_and_path()))
    }
}

impl fmt::Debug for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distinguishes_dashes_paths_and_urls() {
        let source = |text: &str| Location::source(OsStr::new(text));
        assert_eq!(source("-"), Location::Stdin);
        assert_eq!(Location::target(OsStr::new("-")), Location::Stdout);
        assert_eq!(source("a/b.raw"), Location::Path("a/b.raw".into()));
        assert_eq!(source("c:/x"), Location::Path("c:/x".into()));
        assert_eq!(source("./-"), Location::Path("./-".into()));
        assert!(matches!(source("nbd+unix:///disk?socket=/run/x"), Location::Url(_)));
        assert!(matches!(source("://x"), Location::Path(_)));
        assert_eq!(source("file:a:b.raw"), Location::Path("a:b.raw".into()));
        assert_eq!(source("file:-"), Location::Path("-".into()));
        assert_eq!(source("file:///a"), Location::Path("///a".into()));
        assert_eq!(source("./file:a"), Location::Path("./file:a".into()));
    }

    #[test]
    fn display_and_debug_omit_credentials() {
        let location = Location::source(OsStr::new("https://me:secret@host:8/a/b.qcow2?sig=secret#x"));
        assert_eq!(location.to_string(), "https://host:8/a/b.qcow2");
        assert_eq!(format!("{location:?}"), "https://host:8/a/b.qcow2");
        assert_eq!(location.name(), "https://host:8/a/b.qcow2");
        for unescaped in ["https://me:p/w@host/x", "https://me:p?w@host/x", "https://me:p#w@host/x"] {
            assert_eq!(Location::source(OsStr::new(unescaped)).to_string(), "https://");
        }
        let at_in_path = Location::source(OsStr::new("s3://bucket/a@b/c"));
        assert_eq!(at_in_path.to_string(), "s3://bucket/a@b/c");
    }

    #[test]
    fn resolves_names_relative_to_the_image() {
        let beside = |text: &str, name: &str| Location::source(OsStr::new(text)).beside(name);
        assert_eq!(beside("d/a.qcow2", "b.raw"), Some("d/b.raw".into()));
        assert_eq!(beside("a.qcow2", "/x/b.raw"), Some("/x/b.raw".into()));
        assert_eq!(beside("-", "b.raw"), None);
        let url = beside("http://host/d/a.vmdk?token=1", "b.vmdk").expect("a URL");
        assert!(matches!(&url, Location::Url(url) if url.secret_text() == "http://host/d/b.vmdk?token=1"));
        assert_eq!(url.file_name().as_deref(), Some("b.vmdk"));
    }

    #[test]
    fn file_names_of_urls_are_decoded() {
        let name = |text: &str| Location::source(OsStr::new(text)).file_name().map(Cow::into_owned);
        assert_eq!(name("http://host/d/my%20disk%2.qcow2?x=/y").as_deref(), Some("my disk%2.qcow2"));
        assert_eq!(name("http://host/a%2fb%00").as_deref(), Some("a%2fb%00"));
        assert_eq!(name("http://host/%ff%").as_deref(), Some("%ff%"));
        assert_eq!(name("http://host/d/"), None);
    }

    #[test]
    fn user_parts_are_before_the_path() {
        let has_user = |text: &str| Url::parse(text).expect("a URL").has_user();
        assert!(has_user("http://me:p@host/x") && has_user("http://me@host"));
        assert!(!has_user("http://host/a@b") && !has_user("http://host?me@x"));
    }
}
