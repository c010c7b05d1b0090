//! Makes safe and unique file names from untrusted names in images.

use std::collections::HashSet;

use imgtool_core::error::is_hidden;

/// Maximum length in bytes of a name from [`safe`]. Our limit: with an extension, a number and the parts of a
/// temporary name, a file name stays below NAME_MAX (255).
const MAX_LEN: usize = 200;

/// Returns a safe path component: no separator, no hidden character, no leading dot, not empty, and short
/// enough for a file name. `fallback` replaces an unusable name.
pub fn safe(name: &str, fallback: &str) -> String {
    let mut out = component(name, MAX_LEN);
    if out.starts_with('.') {
        out.replace_range(..1, "_");
    }
    if out.trim_matches(['_', '.', ' ']).is_empty() { fallback.to_owned() } else { out }
}

/// Returns a name that is safe as a part of a path component: no separator, no hidden character, at most
/// `max_len` bytes. It may be empty, `.` or `..`.
pub fn component(name: &str, max_len: usize) -> String {
    let mut out = String::new();
    for c in name.chars() {
        let c = if is_hidden(c) || matches!(c, '/' | '\\') { '_' } else { c };
        if out.len() + c.len_utf8() > max_len {
            break;
        }
        out.push(c);
    }
    out
}

/// Returns a device name that every reader of archives accepts: `A-Z a-z 0-9 . _ -`.
pub fn portable(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    safe(&name.chars().map(plain).collect::<String>(), "disk")
}

/// Issues unique names. By default, names that differ only in case count as equal, as on many file systems.
#[derive(Debug, Default)]
pub struct Unique {
    issued: HashSet<String>,
    by_case: bool,
}

impl Unique {
    /// Creates an issuer for which names that differ only in case are distinct.
    pub fn by_case() -> Self {
        Self { by_case: true, ..Self::default() }
    }

    /// Reserves a name. Returns true if it was free.
    fn take(&mut self, name: &str) -> bool {
        self.issued.insert(if self.by_case { name.to_owned() } else { name.to_lowercase() })
    }

    /// Issues `stem.extension`, with a number after the stem if that name was issued before.
    pub fn issue(&mut self, stem: &str, extension: &str) -> String {
        let join = |stem: &str| match extension {
            "" => stem.to_owned(),
            extension => format!("{stem}.{extension}"),
        };
        let mut name = join(stem);
        let mut number = 2u64;
        while !self.take(&name) {
            name = join(&format!("{stem}-{number}"));
            number += 1;
        }
        name
    }

    /// Like [`Unique::issue`], for a whole file name.
    pub fn issue_file(&mut self, name: &str) -> String {
        match name.rsplit_once('.') {
            Some((stem, extension)) if !stem.is_empty() => self.issue(stem, extension),
            _ => self.issue(name, ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn safe_names_stay_in_their_directory() {
        for (name, safe_name) in [
            ("drive-scsi0", "drive-scsi0"),
            ("../evil", "_._evil"),
            ("/etc/passwd", "_etc_passwd"),
            ("..", "disk"),
            (".", "disk"),
            ("", "disk"),
            (".hidden", "_hidden"),
            ("a\nb\x1b[2J", "a_b_[2J"),
            ("c:\\x", "c:_x"),
            ("a\u{61c}b\u{200b}c\u{e0041}", "a_b_c_"),
            ("ö ä.img", "ö ä.img"),
        ] {
            assert_eq!(safe(name, "disk"), safe_name, "{name:?}");
        }
        assert!(safe(&"ä".repeat(1000), "disk").len() <= MAX_LEN);
    }

    #[test]
    fn issues_each_name_once() {
        let mut unique = Unique::default();
        assert_eq!(unique.issue("a", "raw"), "a.raw");
        assert_eq!(unique.issue("A", "raw"), "A-2.raw");
        assert_eq!(unique.issue("a", "raw"), "a-3.raw");
        assert_eq!(unique.issue_file("qemu-server.conf"), "qemu-server.conf");
        assert_eq!(unique.issue_file("qemu-server.conf"), "qemu-server-2.conf");
        assert_eq!(unique.issue_file("noext"), "noext");
    }
}
