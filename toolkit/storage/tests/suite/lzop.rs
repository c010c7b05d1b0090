//! Tests of the lzop decoder with files from lzop itself, intact and damaged.

use std::io::{Cursor, Read};

use imgtool_core::input::Consumed;
use imgtool_core::{ErrorKind, Input, Memory};
use imgtool_storage::outer::{Compression, decoder};
use imgtool_storage::{OpenInput, Opening, open::open};
use imgtool_testing::conformance::{Content, Fill};
use imgtool_testing::oracles::filter;
use imgtool_testing::{fixture, require};

fn decode(bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    decoder(
        Compression::Lzop,
        Box::new(Cursor::new(bytes.to_vec())),
        &Memory::default(),
        Consumed::default(),
    )
    .unwrap()
    .read_to_end(&mut plain)?;
    Ok(plain)
}

/// Returns text, random bytes and zeros, which lzop packs into compressed and stored blocks.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; 1_500_001];
    let content = Content::zero()
        .with(0..400_000, Fill::Text)
        .with(500_000..1_100_000, Fill::Random)
        .with(1_100_000..1_100_007, Fill::Byte(9));
    content.read(&mut bytes, 0);
    bytes
}

#[test]
fn reads_files_made_with_any_lzop_option() {
    require!("lzop");
    let content = content();
    let option_sets: &[&[&str]] = &[
        &["-1"],
        &["-3"],
        &["-6"],
        &["-7"],
        &["-9"],
        &["--crc32"],
        &["-F"],
        &["-CC"],
        &["--crc32", "-C", "-9"],
        &["--no-name"],
        &["-P"],
    ];
    for options in option_sets {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plain with a name");
        std::fs::write(&path, &content).unwrap();
        let mut args = options.to_vec();
        let name = path.to_str().unwrap();
        args.extend(["-c", name]);
        let packed = filter("lzop", &args, &[]);
        assert_eq!(decode(&packed).unwrap(), content, "lzop {options:?}");
        let piped = filter("lzop", options, &content);
        assert_eq!(decode(&piped).unwrap(), content, "lzop {options:?} from a pipe");
    }
}

#[test]
fn reads_empty_and_tiny_content() {
    require!("lzop");
    for len in [0, 1, 2, 3, 4, 100, 262_143, 262_144, 262_145] {
        let content = &content()[..len];
        let packed = filter("lzop", &[], content);
        assert_eq!(decode(&packed).unwrap(), content, "{len} bytes");
    }
}

#[test]
fn reads_all_members() {
    require!("lzop");
    let content = content();
    let first = filter("lzop", &["--crc32"], &content[..700_000]);
    let second = filter("lzop", &["-9"], &content[700_000..]);
    let empty = filter("lzop", &[], &[]);
    let joined = [first, empty.clone(), second, empty].concat();
    assert_eq!(decode(&joined).unwrap(), content);
}

#[test]
fn rejects_truncation_anywhere() {
    require!("lzop");
    let content = &content()[300_000..700_000];
    let first = filter("lzop", &[], content);
    let both = [first.as_slice(), &first].concat();
    let ends_of_members = [first.len(), both.len()];
    let interesting =
        (0..200).chain(first.len() - 200..first.len() + 200).chain((200..both.len()).step_by(4999));
    for cut in interesting.filter(|cut| !ends_of_members.contains(cut)) {
        assert!(decode(&both[..cut]).is_err(), "cut to {cut} of {}", both.len());
    }
}

#[test]
fn rejects_bytes_after_the_end() {
    require!("lzop");
    let packed = filter("lzop", &[], b"content");
    for tail in [
        &b"\0"[..],
        b"\0\0\0\0\0\0\0\0\0\0\0\0",
        b"x",
        &[0x89],
        &[0x89, 0x4c, 0x5a, 0x4f, 0, 0x0d, 0x0a, 0x1a, 0x0a],
    ] {
        assert!(decode(&[&packed, tail].concat()).is_err(), "{tail:?}");
    }
}

#[test]
fn every_flipped_bit_is_an_error() {
    require!("lzop");
    let content = &content()[350_000..560_000];
    for options in [&["-C", "--crc32"][..], &["-C"], &["-9"]] {
        let packed = filter("lzop", options, content);
        // The header and all blocks have checksums.
        for at in (0..100).chain((100..packed.len()).step_by(2503)) {
            for bit in 0..8 {
                let mut damaged = packed.clone();
                damaged[at] ^= 1 << bit;
                assert!(decode(&damaged).is_err(), "{options:?}: bit {bit} of byte {at} is not noticed");
            }
        }
    }
}

#[test]
fn damage_without_checksums_does_not_panic() {
    require!("lzop");
    let content = &content()[300_000..500_000];
    let packed = filter("lzop", &["-F"], content);
    // Without checksums, the decoder notices some damage and misses some. The test must meet both.
    let (mut noticed, mut unnoticed) = (0, 0);
    for at in (0..packed.len()).step_by(311) {
        for change in [0xff, 0x01, 0x80] {
            let mut damaged = packed.clone();
            damaged[at] ^= change;
            match decode(&damaged) {
                Ok(_) => unnoticed += 1,
                Err(_) => noticed += 1,
            }
        }
    }
    assert!(noticed > 0 && unnoticed > 0, "{noticed} noticed, {unnoticed} not");
}

/// Returns a file with a header of lzop 1.04 that has the given fields and a valid checksum.
fn crafted(version_needed: u16, method: u8, flags: u32, blocks: &[u8]) -> Vec<u8> {
    let mut header = vec![0x10, 0x40, 0x20, 0xa0];
    header.extend(version_needed.to_be_bytes());
    header.extend([method, 5]);
    header.extend(flags.to_be_bytes());
    if flags & 0x800 != 0 {
        header.extend([0, 0, 0, 1]);
    }
    header.extend([0, 0, 0x81, 0xa4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let sum = adler2::adler32_slice(&header).to_be_bytes();
    let magic = [0x89, 0x4c, 0x5a, 0x4f, 0x00, 0x0d, 0x0a, 0x1a, 0x0a];
    let mut file = [&magic[..], &header, &sum].concat();
    if flags & 0x40 != 0 {
        file.extend([0, 0, 0, 3, b'a', b'b', b'c', 0, 0, 0, 0]);
    }
    file.extend(blocks);
    file
}

const HELLO: [u8; 17] = [0, 0, 0, 5, 0, 0, 0, 5, b'h', b'e', b'l', b'l', b'o', 0, 0, 0, 0];

#[test]
fn errors_name_the_unsupported_feature() {
    assert_eq!(decode(&crafted(0x0940, 1, 0, &HELLO)).unwrap(), b"hello");
    assert_eq!(decode(&crafted(0x0940, 1, 0x40, &HELLO)).unwrap(), b"hello", "an extra field is skipped");
    let large = [1, 0, 0, 1, 0, 0, 0, 5, 0];
    let refusals = [
        (crafted(0x1050, 1, 0, &HELLO), "needs lzop version 0x1050"),
        (crafted(0x0940, 128, 0, &HELLO), "method 128"),
        (crafted(0x0940, 1, 0x400, &HELLO), "one part of several"),
        (crafted(0x0940, 1, 0x800, &HELLO), "filter 1"),
        (crafted(0x0940, 1, 0, &large), "16777217 bytes, at most 16777216"),
    ];
    for (file, words) in refusals {
        let error = Input::from_reader("x.lzo", Box::new(Cursor::new(file)))
            .and_then(|input| OpenInput::of(input).decompressed())
            .err()
            .unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(error.hint_text().unwrap().contains("lzop -d"), "{error}");
    }
}

#[test]
fn archive_reads_the_same_in_every_compression() {
    let read = |name: &str| {
        let mut plain = Vec::new();
        let opened = open(&fixture(name).into(), Opening::ByContent, &Memory::default()).unwrap();
        opened.input.into_stream().unwrap().read_to_end(&mut plain).unwrap();
        plain
    };
    let zst = read("two-disks.vma.zst");
    assert!(zst.starts_with(b"VMA\0"));
    assert!(read("two-disks.vma.lzo") == zst);
    assert!(read("two-disks.vma.gz") == zst);
}
