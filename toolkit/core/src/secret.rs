//! [`Secret`], a passphrase that is never printed and is erased after use, and [`Secrets`], all those of a run.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock};

use zeroize::{Zeroize, Zeroizing};

use crate::error::{Error, Result};

/// A passphrase. Its bytes are overwritten by [`Secret::erase`], or when the last copy is dropped; `Debug` does not
/// show them.
#[derive(Clone)]
pub struct Secret(Arc<RwLock<Zeroizing<Vec<u8>>>>);

impl Secret {
    /// Creates a secret of exactly these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(RwLock::new(Zeroizing::new(bytes))))
    }

    /// Returns the bytes; none after [`Secret::erase`]. A caller that copies them must erase the copy.
    pub fn bytes(&self) -> impl Deref<Target = Zeroizing<Vec<u8>>> + '_ {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Overwrites the bytes, also those of all copies. A program calls it when every image is open and every new
    /// header is made, since copying content needs only keys. Waits for a caller that holds the bytes.
    pub fn erase(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

/// The passphrases of a run. Each is tried for each encrypted image, so their order means nothing.
#[derive(Debug, Clone, Default)]
pub struct Secrets(Vec<Secret>);

impl Secrets {
    /// Maximum number of passphrases. Our limit: each costs a key derivation for each key slot of each image, which
    /// programs make two seconds long.
    pub const MAX: usize = 16;

    /// Creates a set of passphrases. Equal ones count once.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] for more than [`Secrets::MAX`].
    pub fn new(secrets: impl IntoIterator<Item = Secret>) -> Result<Self> {
        let mut known = Self::default();
        secrets.into_iter().for_each(|secret| known.add(secret));
        match known.0.len() {
            0..=Self::MAX => Ok(known),
            count => Err(Error::usage(format!("{count} passphrases are given, more than {}", Self::MAX))
                .hint("each is tried for each image: give those of the images of this run")),
        }
    }

    /// Returns the set with one more passphrase, beyond the limit as well.
    #[must_use]
    pub fn with(mut self, secret: &Secret) -> Self {
        self.add(secret.clone());
        self
    }

    /// Returns the passphrases that are not erased.
    pub fn iter(&self) -> impl Iterator<Item = &Secret> {
        self.0.iter().filter(|secret| !secret.bytes().is_empty())
    }

    /// Returns the number of passphrases that are not erased.
    pub fn len(&self) -> usize {
        self.iter().count()
    }

    /// True if there is no passphrase, or all are erased.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the passphrase if there is exactly one.
    pub fn single(&self) -> Option<&Secret> {
        let mut all = self.iter();
        all.next().filter(|_| all.next().is_none())
    }

    /// Overwrites all passphrases; see [`Secret::erase`].
    pub fn erase(&self) {
        self.0.iter().for_each(Secret::erase);
    }

    fn add(&mut self, secret: Secret) {
        let is_known = self.0.iter().any(|known| Arc::ptr_eq(&known.0, &secret.0) || same(known, &secret));
        if !is_known {
            self.0.push(secret);
        }
    }
}

/// True if two passphrases have the same bytes.
fn same(one: &Secret, other: &Secret) -> bool {
    **one.bytes() == **other.bytes()
}

impl From<Secret> for Secrets {
    fn from(secret: Secret) -> Self {
        Self(vec![secret])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_does_not_contain_the_secret() {
        let secret = Secret::new(b"hunter2".to_vec());
        assert_eq!(**secret.bytes(), *b"hunter2");
        assert_eq!(format!("{:?}", Some(secret.clone())), "Some(<secret>)");
        assert!(!format!("{:?}", Secrets::from(secret)).contains("hunter2"));
    }

    #[test]
    fn erasing_empties_every_copy() {
        let secret = Secret::new(b"hunter2".to_vec());
        let (copy, all) = (secret.clone(), Secrets::from(secret.clone()));
        secret.erase();
        assert!(copy.bytes().is_empty() && all.is_empty() && all.single().is_none());
    }

    #[test]
    fn passphrases_are_counted_once_and_bounded() {
        let numbered = |count: usize| (0..count).map(|n| Secret::new(vec![b'a', n as u8]));
        let all = Secrets::new(numbered(Secrets::MAX).chain(numbered(1))).expect("as many as allowed");
        assert_eq!(all.len(), Secrets::MAX);
        assert!(Secrets::new(numbered(Secrets::MAX + 1)).is_err());
        let one = Secrets::new(numbered(1).chain(numbered(1))).expect("one");
        assert!(one.single().is_some());
        assert_eq!(one.with(&Secret::new(b"b".to_vec())).len(), 2);
    }
}
