//! Anti-forensic splitter: a key spread over many times its length, so that a part that is overwritten destroys
//! it. LUKS 1.2.3, section 2.4.

use zeroize::Zeroizing;

use crate::hash::Hash;

/// Number of stripes, copies of the key's length. LUKS 1.2.3, section 6, "LUKS_STRIPES": other numbers are not
/// in use.
pub(crate) const STRIPES: u32 = 4000;

/// Restores the key of `key_len` bytes from its stripes.
pub(crate) fn merge(material: &[u8], key_len: usize, hash: Hash) -> Zeroizing<Vec<u8>> {
    let mut key = Zeroizing::new(vec![0; key_len]);
    let mut stripes = material.chunks_exact(key_len).peekable();
    while let Some(stripe) = stripes.next() {
        xor(&mut key, stripe);
        if stripes.peek().is_some() {
            diffuse(&mut key, hash);
        }
    }
    key
}

/// Spreads `key` over `material`, whose stripes but the last are random already.
pub(crate) fn split(key: &[u8], material: &mut [u8], hash: Hash) {
    let mut state = Zeroizing::new(vec![0; key.len()]);
    let (random, last) = material.split_at_mut(material.len().saturating_sub(key.len()));
    for stripe in random.chunks_exact(key.len()) {
        xor(&mut state, stripe);
        diffuse(&mut state, hash);
    }
    xor(&mut state, key);
    last.copy_from_slice(&state);
}

/// Replaces each part of `bytes` of the digest's length by its digest, behind its number.
fn diffuse(bytes: &mut [u8], hash: Hash) {
    let len = hash.digest(&[]).len();
    for (number, part) in (0u32..).zip(bytes.chunks_mut(len)) {
        let digest = hash.digest(&[&number.to_be_bytes(), part]);
        part.copy_from_slice(&digest[..part.len()]);
    }
}

fn xor(bytes: &mut [u8], others: &[u8]) {
    for (byte, other) in bytes.iter_mut().zip(others) {
        *byte ^= other;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_undoes_splitting() {
        for (hash, key_len) in [(Hash::Sha1, 16), (Hash::Sha256, 64), (Hash::Sha512, 32), (Hash::Md5, 24)] {
            let key: Vec<u8> = (0..key_len).map(|i| i as u8 ^ 0x5a).collect();
            let mut material: Vec<u8> =
                (0..key_len * STRIPES as usize).map(|i| (i * 7 + i / 251) as u8).collect();
            split(&key, &mut material, hash);
            assert_eq!(*merge(&material, key_len, hash), key, "{hash:?}");
            material[5] ^= 1;
            assert_ne!(*merge(&material, key_len, hash), key);
        }
    }
}
