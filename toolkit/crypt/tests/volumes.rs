//! Headers and sectors that other programs made, and damaged headers.

#![allow(clippy::unwrap_used, missing_docs)]

use std::io;
use std::sync::Arc;

use imgtool_core::{ErrorKind, Input, Memory, RandomInput, ReadAt, Remedy, Result, Secret, Secrets};
use imgtool_crypt::{
    Algorithm, CipherSpec, HEADER_LEN, Hash, Header, Iterations, IvRule, Mode, NewVolume, SectorCipher,
    in_sectors,
};
use sha2::{Digest, Sha256};

/// Header, material of the first key slot and two sectors of a container that qemu-img 10 made: AES-128 in CBC
/// mode, essiv:sha256, SHA-512.
const QEMU: &[u8] = include_bytes!("qemu.luks");

/// Length of the header and the material; the content follows.
const QEMU_HEADER: usize = 4096 + 64_000;

/// File in memory.
struct Bytes(Vec<u8>);

impl ReadAt for Bytes {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let start = usize::try_from(position).unwrap();
        let bytes = self.0.get(start..start.saturating_add(buf.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.len() as u64
    }
}

fn input(bytes: &[u8]) -> RandomInput {
    Input::from_read_at("image", Arc::new(Bytes(bytes.to_vec()))).into_random().unwrap()
}

fn secret(text: &str) -> Secret {
    Secret::new(text.as_bytes().to_vec())
}

/// The content of the container, and of the sectors below.
fn pattern() -> Vec<u8> {
    (0..1024u32).map(|i| (i * 7 + i / 251) as u8).collect()
}

/// Unlocks a container with one of the passphrases.
fn unlock(bytes: &[u8], passphrases: &[&str]) -> Result<SectorCipher> {
    let secrets = Secrets::new(passphrases.iter().map(|text| secret(text)))?;
    let header = Header::parse(bytes)?;
    header.unlock(&input(bytes), 0..bytes.len() as u64, &secrets, &Memory::default())
}

#[test]
fn unlocks_a_container_of_qemu() {
    let cipher = unlock(QEMU, &["secret one"]).unwrap();
    let mut content = QEMU[QEMU_HEADER..].to_vec();
    cipher.decrypt(&mut content, 0);
    assert_eq!(content, pattern());
    cipher.encrypt(&mut content, 0);
    assert_eq!(content, QEMU[QEMU_HEADER..]);
    let header = Header::parse(QEMU).unwrap();
    assert_eq!(header.cipher().unwrap().iv, IvRule::Essiv(Hash::Sha256));
    assert_eq!(header.slots.iter().filter(|slot| slot.active).count(), 1);
    assert!(!format!("{cipher:?} {header:?}").contains("secret"));
}

#[test]
fn a_missing_and_a_wrong_passphrase_are_refused() {
    let error = unlock(QEMU, &[]).unwrap_err();
    assert_eq!((error.kind(), error.remedy()), (ErrorKind::Refused, Some(&Remedy::GiveSecret)));
    for wrong in ["secret on", "secret one\n", "Secret one"] {
        assert_eq!(unlock(QEMU, &[wrong]).unwrap_err().kind(), ErrorKind::Refused, "{wrong:?}");
    }
}

#[test]
fn each_of_several_passphrases_is_tried() {
    for right in [&["wrong", "secret one"][..], &["secret one", "wrong"], &["a", "b", "secret one", "a"]] {
        assert!(unlock(QEMU, right).is_ok(), "{right:?}");
    }
    let error = unlock(QEMU, &["a", "b"]).unwrap_err();
    assert!(error.to_string().contains("none of the 2 opens the only key slot"), "{error}");
}

/// Digests of the pattern as OpenSSL encrypts it, from sector 0x1234567890 on with a key of 0, 1, 2 …
#[test]
fn sectors_are_those_of_openssl() {
    let spec = |algorithm, key_bits, mode, iv| CipherSpec { algorithm, key_bits, mode, iv };
    let (aes, cast5) = (Algorithm::Aes, Algorithm::Cast5);
    for (spec, digest) in [
        (CipherSpec::DEFAULT, "95be73e09bc890c2a2661333ef56c5da42fc0866773fe01b12127f7b7fd79a6d"),
        (
            spec(aes, 128, Mode::Xts, IvRule::Plain64),
            "a4efaf2fea331c461e9e34e4c3b3f31573f137cd49dbad1adf4d10efffaed4fc",
        ),
        (
            spec(aes, 256, Mode::Cbc, IvRule::Plain64),
            "163fc096d8af884bef53f62401dd3946d4fdf858ca475ae95b3d360c81e0aed4",
        ),
        (
            spec(aes, 128, Mode::Cbc, IvRule::Plain),
            "33f67de452e15f7eebab44f180509d6d7de2a84fd8e49406d3137c7d867b90d5",
        ),
        (
            spec(aes, 256, Mode::Cbc, IvRule::Essiv(Hash::Sha256)),
            "8ef0d2ddb98b3a7012c4277bbbdaabeba48d12560c11fd9ab858e28b59b9611a",
        ),
        (
            spec(aes, 256, Mode::Ctr, IvRule::Plain64),
            "048c32502ac54580b3c400a96e7d22868055221facee1ad973084e207a506c62",
        ),
        (
            spec(aes, 192, Mode::Ecb, IvRule::Plain64),
            "60cfdc1bceb8b2df793b1fad05f365e7edfa981c42ce97759a7d2e5898ac9fa4",
        ),
        (
            spec(cast5, 128, Mode::Cbc, IvRule::Plain64),
            "02c6c94a8ab19961b97e165f8da37f2f296f8710e74efae534f83872b305cdf7",
        ),
    ] {
        let key: Vec<u8> = (0..spec.key_len()).map(|i| i as u8).collect();
        let cipher = SectorCipher::new(spec, &key).unwrap();
        let mut bytes = pattern();
        cipher.encrypt(&mut bytes, 0x12_3456_7890);
        let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, digest, "{spec:?}");
        cipher.decrypt(&mut bytes, 0x12_3456_7890);
        assert_eq!(bytes, pattern());
    }
}

#[test]
fn a_new_header_opens_with_its_passphrase_alone() {
    let volume = NewVolume { iterations: Iterations::Count(1000), ..NewVolume::default() };
    let new = volume.create(&secret("a")).unwrap();
    let mut bytes = new.bytes.clone();
    assert_eq!(new.payload_offset, 2_068_480);
    bytes.resize(new.payload_offset as usize, 0);
    let mut content = pattern();
    new.cipher.encrypt(&mut content, 7);
    unlock(&bytes, &["a"]).unwrap().decrypt(&mut content, 7);
    assert_eq!(content, pattern());
    assert!(unlock(&bytes, &["b"]).is_err());
    let other = volume.create(&secret("a")).unwrap();
    assert_ne!(new.bytes[4096..], other.bytes[4096..]);
    assert!(!format!("{volume:?} {:?}", new.cipher).contains('"'));
}

#[test]
fn damaged_headers_are_refused() {
    let with = |at: usize, bytes: &[u8]| {
        let mut header = QEMU.to_vec();
        header[at..at + bytes.len()].copy_from_slice(bytes);
        header
    };
    for (header, kind, text) in [
        (with(0, b"x"), ErrorKind::WrongFormat, "magic"),
        (with(6, &[0, 2]), ErrorKind::Unsupported, "LUKS version 2"),
        (with(6, &[0, 9]), ErrorKind::Unsupported, "LUKS version 9"),
        (with(8, b"tea"), ErrorKind::Unsupported, "'tea'"),
        (with(40, b"lrw"), ErrorKind::Unsupported, "lrw-essiv"),
        (with(72, b"tiger\0"), ErrorKind::Unsupported, "tiger"),
        (with(108, &[0, 0, 0, 0]), ErrorKind::Malformed, "0 bytes"),
        (with(108, &[0, 0, 0, 65]), ErrorKind::Malformed, "65 bytes"),
        (with(108, &[0, 0, 0, 17]), ErrorKind::Unsupported, "17 bytes"),
        (with(164, &[0; 4]), ErrorKind::Malformed, "0 iterations"),
        (with(164, &[0xff; 4]), ErrorKind::LimitExceeded, "iterations"),
        (with(208, &[1, 2, 3, 4]), ErrorKind::Malformed, "unknown state"),
        (with(212, &[0; 4]), ErrorKind::Malformed, "0 iterations"),
        (with(212, &[0xff; 4]), ErrorKind::LimitExceeded, "iterations"),
        (with(248, &[0, 0, 0, 1]), ErrorKind::Malformed, "inside the header"),
        (with(248, &[0xff; 4]), ErrorKind::Malformed, "leave the header"),
        (with(252, &[0, 0, 0x0f, 0xa1]), ErrorKind::Malformed, "4001 stripes"),
        (with(208, &[0, 0, 0xde, 0xad]), ErrorKind::Refused, "no key slot"),
        (QEMU[..HEADER_LEN - 1].to_vec(), ErrorKind::Corrupt, "ends within"),
    ] {
        let error = unlock(&header, &["secret one"]).unwrap_err();
        assert!(error.kind() == kind && format!("{error}").contains(text), "{error:?}: not {kind:?}, {text}");
    }
}

#[test]
fn parts_of_sectors_come_from_whole_sectors() {
    let content: Vec<u8> = (0..5 * 512).map(|i| (i % 251) as u8).collect();
    for (offset, len) in
        [(0, 2560), (1, 10), (511, 2), (512, 512), (700, 1500), (2559, 1), (100, 412), (3, 0)]
    {
        let mut buf = vec![0; len];
        in_sectors(&mut buf, offset as u64, |sectors, at| {
            assert!(sectors.len().is_multiple_of(512) && at.is_multiple_of(512));
            sectors.copy_from_slice(&content[at as usize..at as usize + sectors.len()]);
            Ok(())
        })
        .unwrap();
        assert_eq!(buf, content[offset..offset + len], "{len} bytes at {offset}");
    }
}
