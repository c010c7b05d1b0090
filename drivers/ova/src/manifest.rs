//! Manifests of OVF packages: a digest of each file, in lines such as `SHA256(vm.ovf)= 0123…`. The checksums
//! of a zip archive make one as well.

use std::collections::HashMap;
use std::fmt;

use imgtool_core::{Error, RandomInput, Result};
use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Digest, Sha256, Sha512};

/// Maximum length of a manifest in bytes. Our limit: one of 254 disks takes less than 64 KiB.
pub(crate) const MAX_LEN: u64 = 1 << 20;

/// Length in bytes of a read while a file is digested.
const PIECE: usize = 1 << 20;

/// Algorithm of a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Algorithm {
    Sha1,
    Sha256,
    Sha512,
    /// The checksum of a zip archive. No manifest has it.
    Crc32,
}

impl Algorithm {
    /// All algorithms of manifests, in the order of their strength.
    pub(crate) const ALL: [Self; 3] = [Self::Sha1, Self::Sha256, Self::Sha512];

    /// Returns the name in manifests.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sha1 => "SHA1",
            Self::Sha256 => "SHA256",
            Self::Sha512 => "SHA512",
            Self::Crc32 => "CRC-32",
        }
    }

    /// Returns a digest of nothing.
    pub(crate) fn hasher(self) -> Hasher {
        match self {
            Self::Sha1 => Hasher::Digest(Box::new(Sha1::new())),
            Self::Sha256 => Hasher::Digest(Box::new(Sha256::new())),
            Self::Sha512 => Hasher::Digest(Box::new(Sha512::new())),
            Self::Crc32 => Hasher::Crc(crc32fast::Hasher::new()),
        }
    }

    /// Returns the length of a digest in bytes.
    pub(crate) fn len(self) -> usize {
        match self.hasher() {
            Hasher::Digest(digest) => digest.output_size(),
            Hasher::Crc(_) => size_of::<u32>(),
        }
    }
}

/// A digest that is being computed.
pub(crate) enum Hasher {
    Digest(Box<dyn DynDigest + Send>),
    Crc(crc32fast::Hasher),
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Digest(digest) => digest.update(bytes),
            Self::Crc(crc) => crc.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Vec<u8> {
        match self {
            Self::Digest(digest) => digest.finalize().into_vec(),
            Self::Crc(crc) => crc.finalize().to_be_bytes().to_vec(),
        }
    }
}

/// Digest of one file, as the manifest states it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) algorithm: Algorithm,
    /// Name of the file; untrusted.
    pub(crate) name: String,
    pub(crate) digest: Vec<u8>,
}

impl Line {
    /// Refuses content with another digest.
    ///
    /// # Errors
    /// `Corrupt` in this case.
    pub(crate) fn check(&self, found: &[u8]) -> Result<()> {
        if found == self.digest {
            return Ok(());
        }
        let stated = match self.algorithm {
            Algorithm::Crc32 => "CRC-32 checksum that the archive",
            Algorithm::Sha1 => "SHA1 digest that the manifest",
            Algorithm::Sha256 => "SHA256 digest that the manifest",
            Algorithm::Sha512 => "SHA512 digest that the manifest",
        };
        Err(Error::corrupt(format!("'{}' does not have the {stated} states", self.name))
            .hint("the file was changed or damaged since the package was made: copy it again"))
    }

    /// Reads and checks the whole file.
    ///
    /// # Errors
    /// `Corrupt` for another digest; any error of the reads.
    pub(crate) fn check_file(&self, file: &RandomInput) -> Result<()> {
        let mut hasher = self.algorithm.hasher();
        let mut buf = vec![0; PIECE];
        let mut position = 0;
        while position < file.len() {
            let len = usize::try_from(file.len() - position).unwrap_or(usize::MAX).min(buf.len());
            file.read_exact_at(&mut buf[..len], position)?;
            hasher.update(&buf[..len]);
            position += len as u64;
        }
        self.check(&hasher.finish())
    }
}

/// A manifest.
#[derive(Debug, Clone, Default)]
pub(crate) struct Manifest {
    /// Lines in the order of the text.
    pub(crate) lines: Vec<Line>,
    /// Index of the line of each file.
    by_name: HashMap<String, usize>,
}

impl Manifest {
    /// Parses the text of a manifest. The case of its words does not count, nor do blanks and the kind of
    /// line ends.
    ///
    /// # Errors
    /// `Malformed` for a line that is none, or a file that is listed twice; `Unsupported` for an unknown algorithm.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let text =
            std::str::from_utf8(bytes).map_err(|_| Error::malformed("the manifest is no text in UTF-8"))?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let mut manifest = Self::default();
        for (number, text) in (1..).zip(text.lines()).filter(|(_, text)| !text.trim().is_empty()) {
            let line = parse_line(text.trim(), number)?;
            if manifest.by_name.insert(line.name.clone(), manifest.lines.len()).is_some() {
                return Err(Error::malformed(format!("the manifest lists '{}' twice", line.name)));
            }
            manifest.lines.push(line);
        }
        Ok(manifest)
    }

    /// Returns a manifest of the checksums of these files of a zip archive.
    pub(crate) fn of_crcs(files: impl Iterator<Item = (String, u32)>) -> Self {
        let line = |(name, crc): (String, u32)| Line {
            algorithm: Algorithm::Crc32,
            name,
            digest: crc.to_be_bytes().to_vec(),
        };
        let lines: Vec<Line> = files.map(line).collect();
        let by_name = (0..).zip(&lines).map(|(index, line)| (line.name.clone(), index)).collect();
        Self { lines, by_name }
    }

    /// Returns the line of a file.
    pub(crate) fn line(&self, name: &str) -> Option<&Line> {
        self.by_name.get(name).and_then(|index| self.lines.get(*index))
    }

    /// Returns a note about the files that have no line, if there are any.
    pub(crate) fn note_unlisted<'a>(&self, files: impl Iterator<Item = &'a str>) -> Option<String> {
        let names = first_names(files.filter(|name| self.line(name).is_none()))?;
        Some(format!("the manifest has no digest of {names}, so damage may go unnoticed"))
    }

    /// Returns the names of the algorithms.
    pub(crate) fn algorithms(&self) -> Vec<&'static str> {
        let is_used = |algorithm: &Algorithm| self.lines.iter().any(|line| line.algorithm == *algorithm);
        Algorithm::ALL.into_iter().filter(is_used).map(Algorithm::name).collect()
    }
}

/// Maximum number of names in a note. Our limit: a person reads no more.
pub(crate) const MAX_LISTED: usize = 5;

/// Returns the first names for a note; `None` if there is none.
pub(crate) fn first_names<'a>(mut names: impl Iterator<Item = &'a str>) -> Option<String> {
    let first: Vec<String> = names.by_ref().take(MAX_LISTED).map(|name| format!("'{name}'")).collect();
    let more = if names.next().is_some() { " and others" } else { "" };
    (!first.is_empty()).then(|| format!("{}{more}", first.join(", ")))
}

fn parse_line(text: &str, number: usize) -> Result<Line> {
    let malformed = |what: &str| Error::malformed(format!("line {number} of the manifest {what}"));
    let (algorithm, rest) =
        text.split_once('(').ok_or_else(|| malformed("is not 'ALGORITHM(NAME)= DIGEST'"))?;
    // A name may contain parentheses, a digest none.
    let (name, digest) =
        rest.rsplit_once(')').ok_or_else(|| malformed("is not 'ALGORITHM(NAME)= DIGEST'"))?;
    let stated = algorithm.trim();
    let plain = stated.replace('-', "");
    let algorithm = Algorithm::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(&plain));
    let algorithm = algorithm.ok_or_else(|| {
        Error::unsupported(format!("the manifest has digests of the unknown algorithm '{stated}'"))
            .hint("SHA1, SHA256 and SHA512 are known")
    })?;
    let digest = digest.trim_start().strip_prefix('=').ok_or_else(|| malformed("has no '='"))?;
    let digest = hex(digest.trim()).filter(|digest| digest.len() == algorithm.len());
    let digest = digest
        .ok_or_else(|| malformed(&format!("has no digest of {} hexadecimal digits", 2 * algorithm.len())))?;
    Ok(Line { algorithm, name: name.strip_prefix("./").unwrap_or(name).to_owned(), digest })
}

/// Returns the bytes that these hexadecimal digits spell.
fn hex(digits: &str) -> Option<Vec<u8>> {
    let pair = |pair: &[u8]| {
        let digit = |at: usize| char::from(*pair.get(at)?).to_digit(16);
        u8::try_from(digit(0)? * 16 + digit(1)?).ok()
    };
    digits.as_bytes().chunks(2).map(pair).collect()
}

#[cfg(test)]
mod tests {
    use imgtool_core::ErrorKind;

    use super::*;

    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn reads_the_spellings_in_use() {
        let text = format!(
            "SHA256(vm.ovf)= {EMPTY}\r\nsha-256 (a (1).vmdk) = {}\n\nSHA1(./b)=da39a3ee5e6b4b0d3255bfef95601890afd80709",
            EMPTY.to_uppercase()
        );
        let manifest = Manifest::parse(text.as_bytes()).expect("sound");
        let names: Vec<_> = manifest.lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["vm.ovf", "a (1).vmdk", "b"]);
        assert_eq!(manifest.algorithms(), ["SHA1", "SHA256"]);
        for line in &manifest.lines {
            line.check(&line.algorithm.hasher().finish()).expect("the digest of nothing");
            let mut hasher = line.algorithm.hasher();
            hasher.update(b"x");
            assert_eq!(line.check(&hasher.finish()).expect_err("other").kind(), ErrorKind::Corrupt);
        }
    }

    #[test]
    fn refuses_what_is_no_manifest() {
        for (text, kind) in [
            (format!("MD5(a)= {EMPTY}"), ErrorKind::Unsupported),
            (format!("SHA1(a)= {EMPTY}"), ErrorKind::Malformed),
            (format!("SHA256(a) {EMPTY}"), ErrorKind::Malformed),
            (format!("SHA256 a = {EMPTY}"), ErrorKind::Malformed),
            (format!("SHA256(a)= {}", &EMPTY[1..]), ErrorKind::Malformed),
            (format!("SHA256(a)= {}g", &EMPTY[1..]), ErrorKind::Malformed),
            (format!("SHA256(a)= {EMPTY}\nSHA512(a)= {EMPTY}{EMPTY}"), ErrorKind::Malformed),
            (format!("SHA256(a)= é{}", &EMPTY[2..]), ErrorKind::Malformed),
        ] {
            assert_eq!(Manifest::parse(text.as_bytes()).expect_err(&text).kind(), kind, "{text}");
        }
        assert!(Manifest::parse(b"SHA1(\xff)= 00").is_err());
    }
}
