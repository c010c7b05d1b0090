//! Block ciphers with a key, behind one trait.

use aes::{Aes128, Aes192, Aes256};
use cast5::Cast5;
use cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit};
use serpent::Serpent;
use twofish::Twofish;

use crate::spec::Algorithm;

/// A block cipher with its key. The crates erase the key when it is dropped.
pub(crate) trait BlockKey: Send + Sync {
    /// Encrypts every block in place. `blocks` has a multiple of the block length.
    fn encrypt(&self, blocks: &mut [u8]);

    /// Decrypts every block in place.
    fn decrypt(&self, blocks: &mut [u8]);
}

/// Adapter for the ciphers of RustCrypto, which work on several blocks at once where the processor can.
struct Keyed<C>(C);

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync> BlockKey for Keyed<C> {
    fn encrypt(&self, blocks: &mut [u8]) {
        self.0.encrypt_blocks(Block::<C>::slice_as_chunks_mut(blocks).0);
    }

    fn decrypt(&self, blocks: &mut [u8]) {
        self.0.decrypt_blocks(Block::<C>::slice_as_chunks_mut(blocks).0);
    }
}

/// Returns the cipher with `key`, or `None` if it has no keys of this length.
pub(crate) fn keyed(algorithm: Algorithm, key: &[u8]) -> Option<Box<dyn BlockKey>> {
    if !algorithm.key_lens().contains(&key.len()) {
        return None;
    }
    match (algorithm, key.len()) {
        (Algorithm::Aes, 16) => boxed::<Aes128>(key),
        (Algorithm::Aes, 24) => boxed::<Aes192>(key),
        (Algorithm::Aes, _) => boxed::<Aes256>(key),
        (Algorithm::Serpent, _) => boxed::<Serpent>(key),
        (Algorithm::Twofish, _) => boxed::<Twofish>(key),
        (Algorithm::Cast5, _) => boxed::<Cast5>(key),
    }
}

/// Returns AES-128 with `key`.
pub(crate) fn aes_128(key: &[u8; 16]) -> Box<dyn BlockKey> {
    Box::new(Keyed(Aes128::new(key.into())))
}

fn boxed<C>(key: &[u8]) -> Option<Box<dyn BlockKey>>
where
    C: KeyInit + BlockCipherEncrypt + BlockCipherDecrypt + BlockSizeUser + Send + Sync + 'static,
{
    Some(Box::new(Keyed(C::new_from_slice(key).ok()?)))
}
