//! Passphrases from a file, the environment or a file descriptor. No flag takes the passphrase itself: other
//! users of the system can read the command line of a process.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use imgtool_core::error::escape_control;
use imgtool_core::sync::lock;
use imgtool_core::{Error, Result, Secret, Secrets};
use imgtool_storage::os;
use zeroize::Zeroizing;

use crate::commands::options::split_options;

/// Longest passphrase in bytes. Our limit: a file of this length is hardly a passphrase.
const MAX_LEN: usize = 64 << 10;

/// Time until another try to read a descriptor whose other end has sent nothing yet.
const PATIENCE: Duration = Duration::from_millis(10);

/// Forms of the value of `--secret`, with the start of each.
pub const FORMS: [(&str, &str); 3] = [
    ("file=", "path of a file that holds the passphrase"),
    ("env=", "name of an environment variable"),
    ("fd=", "number of an open file descriptor"),
];

/// Every passphrase that was read, for [`forget_all`].
static READ: Mutex<Vec<Secret>> = Mutex::new(Vec::new());

/// Place of a passphrase: the value of `--secret`.
#[derive(Debug, Clone)]
pub enum SecretSource {
    /// File at this path.
    File(PathBuf),
    /// Environment variable with this name.
    Environment(String),
    /// Descriptor with this number, and the file that it was when the command line was parsed: the program opens
    /// files of its own later.
    Descriptor(u32, Arc<io::Result<File>>),
    /// File whose bytes are the passphrase, a line end at its end included, as for qemu-img.
    Whole(PathBuf),
}

/// Reads the passphrases of all `sources`.
///
/// # Errors
/// If one can't be read, or if there are too many.
pub fn read_all(sources: &[SecretSource]) -> Result<Secrets> {
    Secrets::new(sources.iter().map(SecretSource::read).collect::<Result<Vec<_>>>()?)
}

/// Overwrites every passphrase that was read. Called when all images are open and all new headers are made.
pub fn forget_all() {
    lock(&READ).drain(..).for_each(|secret| secret.erase());
}

/// Returns the passphrase of the object with this ID, as `--object secret,id=ID,file=PATH` describes it.
///
/// # Errors
/// Same as [`check_objects`], if there is no such object, or if the passphrase can't be read.
pub fn of_object(objects: &[String], id: &str) -> Result<Secret> {
    let parsed = objects.iter().map(|text| parse_object(text)).collect::<Result<Vec<_>>>()?;
    match parsed.into_iter().rfind(|(known, _)| known == id) {
        Some((_, source)) => source.read(),
        None => Err(Error::usage(format!("no object with a passphrase is called '{}'", escape_control(id)))
            .hint(OBJECT_FORM)),
    }
}

/// Refuses objects that are no passphrase in a file.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Usage`] for such an object.
pub fn check_objects(objects: &[String]) -> Result<()> {
    objects.iter().try_for_each(|text| parse_object(text).map(drop))
}

/// Hint with the only form of an object.
const OBJECT_FORM: &str = "--object secret,id=ID,file=PATH";

/// Parses `secret,id=ID,file=PATH[,format=raw]`. No message repeats a value, which may be a passphrase.
fn parse_object(text: &str) -> Result<(String, SecretSource)> {
    let refused = |what: &str| Error::usage(format!("--object: {what}")).hint(OBJECT_FORM);
    let (mut id, mut file) = (None, None);
    for (number, (key, value)) in split_options(text).into_iter().enumerate() {
        match (key.as_str(), value.as_str()) {
            ("secret", "on") if number == 0 => {}
            ("qom-type", "secret") | ("format", "raw") => {}
            ("id", _) => id = Some(value),
            ("file", _) => file = Some(PathBuf::from(value)),
            ("data", _) => {
                return Err(refused("a passphrase in the command line is readable for other users"));
            }
            _ if number == 0 => return Err(refused("only passphrases (secret) are supported")),
            ("format" | "keyid" | "iv", _) => return Err(refused("an encoded passphrase is not supported")),
            _ => return Err(refused("unknown key")),
        }
    }
    match (id, file) {
        (Some(id), Some(file)) => Ok((id, SecretSource::Whole(file))),
        _ => Err(refused("expected an ID and a file")),
    }
}

/// Parses `file=PATH`, `env=NAME` or `fd=N`. The message of a mistake does not repeat the text, which may be a
/// passphrase.
pub fn parse(text: &str) -> Result<SecretSource, String> {
    let source = match text.split_once('=') {
        Some(("file", path)) if !path.is_empty() => Some(SecretSource::File(path.into())),
        Some(("env", name)) if !name.is_empty() => Some(SecretSource::Environment(name.to_owned())),
        Some(("fd", number)) => number.parse().ok().map(descriptor),
        _ => None,
    };
    source.ok_or_else(|| "expected file=PATH, env=NAME or fd=N".to_owned())
}

/// Returns the descriptor with this number.
fn descriptor(number: u32) -> SecretSource {
    SecretSource::Descriptor(number, Arc::new(open_descriptor(number)))
}

/// Duplicates the descriptor. To open it again by its name would fail for a socket, may wait for ever for a FIFO, and
/// may not be allowed to this user; it remains for systems that can't duplicate.
fn open_descriptor(number: u32) -> io::Result<File> {
    os::duplicate(number).or_else(|_| File::open(format!("/dev/fd/{number}")))
}

impl SecretSource {
    /// Reads the passphrase. Removes one line end, LF or CRLF, from a file or descriptor, and changes nothing
    /// else.
    ///
    /// # Errors
    /// If it can't be read, is empty, or is longer than [`MAX_LEN`].
    pub fn read(&self) -> Result<Secret> {
        let mut bytes = match self {
            Self::File(path) | Self::Whole(path) => {
                let file = File::open(path).map_err(|e| Error::io("open the passphrase", e));
                file.and_then(|file| read(&file)).map_err(|e| explain(e).path(path.as_path()))?
            }
            Self::Descriptor(number, file) => match &**file {
                Ok(file) => read(file).map_err(|e| of_descriptor(*number, &format!("{e:#}")))?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    return Err(of_descriptor(*number, "is not open"));
                }
                Err(e) => return Err(of_descriptor(*number, &format!("can't open the passphrase: {e}"))),
            },
            Self::Environment(name) => bytes_of(env::var_os(name).ok_or_else(|| unset(name))?),
        };
        if matches!(self, Self::File(_) | Self::Descriptor(..)) && bytes.last() == Some(&b'\n') {
            bytes.pop();
            // A line end of Windows has two bytes.
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        let secret = Secret::new(bytes);
        self.check_len(secret.bytes().len())?;
        lock(&READ).push(secret.clone());
        Ok(secret)
    }

    /// Refuses a passphrase of no bytes, or of more than [`MAX_LEN`].
    fn check_len(&self, len: usize) -> Result<()> {
        let message = match len {
            0 => "the passphrase is empty".to_owned(),
            1..=MAX_LEN => return Ok(()),
            _ => format!("the passphrase is longer than {MAX_LEN} bytes"),
        };
        let hint = match (self, len) {
            (Self::Descriptor(..), 0) => "input is empty; did the command before the pipe fail?",
            (Self::Environment(_), 0) => "the variable is set, but has no value",
            (_, 0) => "write the passphrase into the file; a line end at its end does not count",
            _ => "the file holds the passphrase alone: is this the right one?",
        };
        Err(match self {
            Self::File(path) | Self::Whole(path) => Error::usage(message).path(path.as_path()),
            Self::Descriptor(number, _) => Error::usage(format!("file descriptor {number}: {message}")),
            Self::Environment(name) => Error::usage(format!("the environment variable {name}: {message}")),
        }
        .hint(hint))
    }
}

/// Reads at most a little more than a passphrase may have, to the end. Leaves the position of a regular file where it
/// is, so that its descriptor can be named twice. The buffer never grows, since growing would leave a copy behind.
fn read(mut file: &File) -> Result<Vec<u8>> {
    let position = file.stream_position().ok();
    let mut bytes = Zeroizing::new(vec![0; MAX_LEN + 2]);
    let mut filled = 0;
    while filled < bytes.len() {
        let read = match position {
            Some(position) => file.read_at(&mut bytes[filled..], position.saturating_add(filled as u64)),
            None => file.read(&mut bytes[filled..]),
        };
        match read {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            // The other end of a socket may have made both ends non-blocking.
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(PATIENCE),
            Err(e) => return Err(Error::io("read the passphrase", e)),
        }
    }
    Ok(bytes[..filled].to_vec())
}

/// Adds advice to the error of a file that can't be opened or read.
fn explain(error: Error) -> Error {
    let advice = match error.io_error().map(io::Error::kind) {
        Some(io::ErrorKind::IsADirectory) => "name the file with the passphrase in this directory",
        Some(io::ErrorKind::NotFound) => "file= takes the path of a file that holds the passphrase",
        Some(io::ErrorKind::PermissionDenied) => {
            "this user can't read it: run as its owner, or use env= or fd="
        }
        _ => return error,
    };
    error.hint(advice)
}

/// Returns the error for a descriptor, with what is wrong with it.
fn of_descriptor(number: u32, what: &str) -> Error {
    let separator = if what.starts_with("is ") { "" } else { ":" };
    Error::usage(format!("file descriptor {number}{separator} {what}"))
        .hint("the shell opens it: --secret fd=3 3<FILE")
}

/// Returns the error for a variable that is not set.
fn unset(name: &str) -> Error {
    Error::usage(format!("the environment variable {} is not set", escape_control(name)))
        .hint("the shell must export it: read -rs NAME; export NAME; imgtool … --secret env=NAME")
}

#[cfg(unix)]
fn bytes_of(value: OsString) -> Vec<u8> {
    std::os::unix::ffi::OsStringExt::into_vec(value)
}

#[cfg(not(unix))]
fn bytes_of(value: OsString) -> Vec<u8> {
    value.to_string_lossy().into_owned().into_bytes()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn mistakes_do_not_repeat_the_text() {
        for bad in ["hunter2", "file=", "env=", "fd=x", "fd=-1", "pass=hunter2", ""] {
            let message = parse(bad).expect_err("no place");
            assert!(!message.contains("hunter2"), "{message}");
        }
        assert!(matches!(parse("fd=3"), Ok(SecretSource::Descriptor(3, _))));
        assert!(matches!(parse("file=a=b"), Ok(SecretSource::File(path)) if path == Path::new("a=b")));
    }

    #[test]
    fn objects_are_passphrases_in_files() {
        let objects = |text: &str| [text.to_owned()];
        for bad in [
            "secret,id=s0,data=hunter2",
            "secret,id=s0",
            "secret,file=hunter2",
            "secret,id=s0,file=x,format=base64",
            "secret,id=s0,file=x,keyid=hunter2",
            "tls-creds-x509,id=t,dir=hunter2",
            "hunter2",
            "",
        ] {
            let error = check_objects(&objects(bad)).expect_err(bad);
            assert!(!format!("{error:#} {:?}", error.remedy()).contains("hunter2"), "{error:#}");
        }
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a,b");
        std::fs::write(&path, "x\n").expect("write");
        let text = path.display().to_string().replace(',', ",,");
        let good = [format!("secret,id=s0,file={text}"), "secret,id=s1,file=/missing".to_owned()];
        // Every byte counts.
        assert_eq!(of_object(&good, "s0").expect("a passphrase").bytes()[..], *b"x\n");
        assert!(of_object(&good, "s1").is_err() && of_object(&good, "s2").is_err());
    }

    #[test]
    fn one_line_end_is_removed_from_a_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("passphrase");
        for (content, passphrase) in
            [("a b\n", "a b"), ("a b", "a b"), ("a\n\n", "a\n"), (" a\r\n", " a"), ("a\r", "a\r")]
        {
            std::fs::write(&path, content).expect("write");
            let secret = SecretSource::File(path.clone()).read().expect("a passphrase");
            assert_eq!(secret.bytes()[..], *passphrase.as_bytes());
        }
        for bad in [Vec::new(), b"\n".to_vec(), vec![b'x'; MAX_LEN + 2]] {
            std::fs::write(&path, bad).expect("write");
            assert!(SecretSource::File(path.clone()).read().is_err());
        }
    }
}
