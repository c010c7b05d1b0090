//! File names for what an image calls by names that nobody vouches for.

use std::collections::HashSet;

/// Longest name made from an image's name, bytes: with an extension, a suffix and what a partial
/// name adds it stays below NAME_MAX (255).
const MAX_LEN: usize = 200;

/// One safe path component: no separator, no control character, no leading dot, not empty, not
/// longer than a file name may be.
pub fn safe(name: &str, fallback: &str) -> String {
    let mut out = component(name, MAX_LEN);
    if out.starts_with('.') {
        out.replace_range(..1, "_");
    }
    if out.trim_matches(['_', '.', ' ']).is_empty() { fallback.to_owned() } else { out }
}

/// As much of a name as can be a part of a path component: no separator, no control character, at
/// most `max_len` bytes. May be empty, `.` or `..`.
pub fn component(name: &str, max_len: usize) -> String {
    let mut out = String::new();
    for c in name.chars() {
        let hostile = c.is_control()
            || matches!(c, '/' | '\\')
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        let c = if hostile { '_' } else { c };
        if out.len() + c.len_utf8() > max_len {
            break;
        }
        out.push(c);
    }
    out
}

/// A device name that every reader of archives takes: A-Z a-z 0-9 . _ -
pub fn portable(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    safe(&name.chars().map(plain).collect::<String>(), "disk")
}

/// Gives out names, each once; upper and lower case count as the same, as on many file systems.
#[derive(Debug, Default)]
pub struct Unique {
    given: HashSet<String>,
    by_case: bool,
}

impl Unique {
    /// Tells upper and lower case apart.
    pub fn by_case() -> Self {
        Self { by_case: true, ..Self::default() }
    }

    /// Whether a name was free; it is not from now on.
    fn take(&mut self, name: &str) -> bool {
        self.given.insert(if self.by_case { name.to_owned() } else { name.to_lowercase() })
    }

    /// `stem` and `extension`, with a number between them if the name was given out before.
    pub fn give(&mut self, stem: &str, extension: &str) -> String {
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

    /// [`Unique::give`] for a whole file name.
    pub fn give_file(&mut self, name: &str) -> String {
        match name.rsplit_once('.') {
            Some((stem, extension)) if !stem.is_empty() => self.give(stem, extension),
            _ => self.give(name, ""),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_directory() {
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
            ("ö ä.img", "ö ä.img"),
        ] {
            assert_eq!(safe(name, "disk"), safe_name, "{name:?}");
        }
        assert!(safe(&"ä".repeat(1000), "disk").len() <= MAX_LEN);
    }

    #[test]
    fn names_are_given_once() {
        let mut unique = Unique::default();
        assert_eq!(unique.give("a", "raw"), "a.raw");
        assert_eq!(unique.give("A", "raw"), "A-2.raw");
        assert_eq!(unique.give("a", "raw"), "a-3.raw");
        assert_eq!(unique.give_file("qemu-server.conf"), "qemu-server.conf");
        assert_eq!(unique.give_file("qemu-server.conf"), "qemu-server-2.conf");
        assert_eq!(unique.give_file("noext"), "noext");
    }
}
