//! Choice of an internal snapshot.

use std::fmt;

use crate::error::escape_control;

/// Internal snapshot that the user chose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotChoice {
    /// The snapshot with this ID or, failing that, with this name.
    Either(String),
    /// The first snapshot with this ID and this name, as far as they are set.
    Exact {
        /// ID.
        id: Option<String>,
        /// Name.
        name: Option<String>,
    },
}

impl SnapshotChoice {
    /// True if a snapshot with this ID is chosen before all others.
    pub fn prefers(&self, id: &str, name: &str) -> bool {
        match self {
            Self::Either(chosen) => chosen == id,
            Self::Exact { id: chosen, name: named } => {
                chosen.as_deref().is_none_or(|chosen| chosen == id)
                    && named.as_deref().is_none_or(|named| named == name)
            }
        }
    }

    /// True if a snapshot with this name is chosen if none is preferred.
    pub fn accepts(&self, name: &str) -> bool {
        matches!(self, Self::Either(chosen) if chosen == name)
    }
}

impl From<&str> for SnapshotChoice {
    fn from(text: &str) -> Self {
        Self::Either(text.to_owned())
    }
}

impl From<String> for SnapshotChoice {
    fn from(text: String) -> Self {
        Self::Either(text)
    }
}

/// Formats the choice for messages: `'3'`, `with ID '3' and name 'clean'`.
impl fmt::Display for SnapshotChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Either(text) => write!(f, "'{}'", escape_control(text)),
            Self::Exact { id, name } => {
                let part = |what: &str, text: &String| format!("{what} '{}'", escape_control(text));
                let parts =
                    [id.as_ref().map(|id| part("ID", id)), name.as_ref().map(|name| part("name", name))];
                let parts: Vec<String> = parts.into_iter().flatten().collect();
                write!(f, "with {}", parts.join(" and "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_choices_need_every_stated_part() {
        let exact = |id: Option<&str>, name: Option<&str>| SnapshotChoice::Exact {
            id: id.map(Into::into),
            name: name.map(Into::into),
        };
        assert!(exact(Some("1"), None).prefers("1", "a"));
        assert!(exact(None, Some("a")).prefers("1", "a"));
        assert!(exact(Some("1"), Some("a")).prefers("1", "a"));
        assert!(!exact(Some("2"), Some("a")).prefers("1", "a"));
        assert!(!exact(Some("a"), None).prefers("1", "a"));
        assert!(!exact(Some("a"), None).accepts("a"));
        let either = SnapshotChoice::from("a");
        assert!(either.prefers("a", "b") && !either.prefers("1", "a") && either.accepts("a"));
        assert_eq!(exact(Some("1"), Some("a")).to_string(), "with ID '1' and name 'a'");
    }
}
