//! [`Secret`], a passphrase that is never printed and is erased after use.

use std::fmt;
use std::sync::Arc;

use zeroize::Zeroizing;

/// A passphrase. Its bytes are overwritten when the last copy is dropped; `Debug` does not show them.
#[derive(Clone)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// Creates a secret of exactly these bytes.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    /// Returns the bytes. A caller that copies them must erase the copy.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_output_does_not_contain_the_secret() {
        let secret = Secret::new(b"hunter2".to_vec());
        assert_eq!(secret.bytes(), b"hunter2");
        assert_eq!(format!("{:?}", Some(secret)), "Some(<secret>)");
    }
}
