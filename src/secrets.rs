//! Passphrases from a file, the environment or a file descriptor. No flag takes the passphrase itself: other
//! users of the system can read the command line of a process.

use std::env;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::path::PathBuf;

use imgtool_core::error::escape_control;
use imgtool_core::{Error, Result, Secret};
use zeroize::Zeroizing;

use crate::commands::options::split_options;

/// Longest passphrase in bytes. Our limit: a file of this length is hardly a passphrase.
const MAX_LEN: usize = 64 << 10;

/// Place of a passphrase: the value of `--secret`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretSource {
    /// File at this path.
    File(PathBuf),
    /// Environment variable with this name.
    Environment(String),
    /// Open file descriptor with this number.
    Descriptor(u32),
    /// File whose bytes are the passphrase, a line end at its end included, as for qemu-img.
    Whole(PathBuf),
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
        Some(("fd", number)) => number.parse().ok().map(SecretSource::Descriptor),
        _ => None,
    };
    source.ok_or_else(|| "expected file=PATH, env=NAME or fd=N".to_owned())
}

impl SecretSource {
    /// Reads the passphrase. Removes one line end from a file or descriptor, and changes nothing else.
    ///
    /// # Errors
    /// If it can't be read, is empty, or is longer than [`MAX_LEN`].
    pub fn read(&self) -> Result<Secret> {
        let (mut bytes, place) = match self {
            Self::File(path) | Self::Whole(path) => {
                (read_file(path).map_err(|e| e.path(path))?, path.display().to_string())
            }
            Self::Descriptor(number) => {
                let place = format!("file descriptor {number}");
                (read_file(&PathBuf::from(format!("/dev/fd/{number}"))).map_err(|e| of(&place, &e))?, place)
            }
            Self::Environment(name) => {
                let value = env::var_os(name).ok_or_else(|| {
                    Error::usage(format!("the environment variable {name} is not set"))
                        .hint("--secret env=NAME takes the passphrase from the variable NAME")
                })?;
                (bytes_of(&value), format!("the environment variable {name}"))
            }
        };
        if !matches!(self, Self::Environment(_) | Self::Whole(_)) && bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        let secret = Secret::new(bytes);
        match secret.bytes().len() {
            0 => Err(Error::usage(format!("{place}: the passphrase is empty"))),
            1..=MAX_LEN => Ok(secret),
            _ => Err(Error::usage(format!("{place}: the passphrase is longer than {MAX_LEN} bytes"))),
        }
    }
}

/// Reads at most a little more than a passphrase may have. The buffer never grows, since growing would leave a
/// copy behind.
fn read_file(path: &PathBuf) -> Result<Vec<u8>> {
    let mut file = File::open(path).map_err(|e| Error::io("open the passphrase", e))?;
    let mut bytes = Zeroizing::new(vec![0; MAX_LEN + 2]);
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read(&mut bytes[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(Error::io("read the passphrase", e)),
        }
    }
    Ok(bytes[..filled].to_vec())
}

fn of(place: &str, error: &Error) -> Error {
    Error::usage(format!("{place}: {error:#}")).hint("the shell opens it: --secret fd=3 3<FILE")
}

#[cfg(unix)]
fn bytes_of(value: &OsStr) -> Vec<u8> {
    std::os::unix::ffi::OsStrExt::as_bytes(value).to_vec()
}

#[cfg(not(unix))]
fn bytes_of(value: &OsStr) -> Vec<u8> {
    value.to_string_lossy().into_owned().into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_do_not_repeat_the_text() {
        for bad in ["hunter2", "file=", "env=", "fd=x", "fd=-1", "pass=hunter2", ""] {
            let message = parse(bad).expect_err("no place");
            assert!(!message.contains("hunter2"), "{message}");
        }
        assert_eq!(parse("fd=3"), Ok(SecretSource::Descriptor(3)));
        assert_eq!(parse("file=a=b"), Ok(SecretSource::File("a=b".into())));
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
        assert_eq!(of_object(&good, "s0").expect("a passphrase").bytes(), b"x\n");
        assert!(of_object(&good, "s1").is_err() && of_object(&good, "s2").is_err());
    }

    #[test]
    fn one_line_end_is_removed_from_a_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("passphrase");
        for (content, passphrase) in [("a b\n", "a b"), ("a b", "a b"), ("a\n\n", "a\n"), (" a\r\n", " a\r")]
        {
            std::fs::write(&path, content).expect("write");
            let secret = SecretSource::File(path.clone()).read().expect("a passphrase");
            assert_eq!(secret.bytes(), passphrase.as_bytes());
        }
        for bad in [Vec::new(), b"\n".to_vec(), vec![b'x'; MAX_LEN + 2]] {
            std::fs::write(&path, bad).expect("write");
            assert!(SecretSource::File(path.clone()).read().is_err());
        }
    }
}
