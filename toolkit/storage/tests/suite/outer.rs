//! Tests of outer decompression: all frames, members and streams, and errors for everything else.

use std::io::{Cursor, Read};

use imgtool_core::input::Consumed;
use imgtool_core::{ErrorKind, Input, Memory, Result};
use imgtool_storage::outer::{Compression, by_name, decoder, detect};
use imgtool_storage::{OpenInput, Opening, open::open};
use imgtool_testing::conformance::{Content, Fill};
use imgtool_testing::oracles::filter;
use imgtool_testing::require;

fn content() -> Vec<u8> {
    let mut bytes = vec![0; 700_001];
    let content = Content::zero().with(0..200_000, Fill::Text).with(300_000..500_000, Fill::Random);
    content.read(&mut bytes, 0);
    bytes
}

fn decode(compression: Compression, bytes: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut plain = Vec::new();
    decoder(compression, Box::new(Cursor::new(bytes.to_vec())), &Memory::default(), Consumed::default())
        .unwrap()
        .read_to_end(&mut plain)?;
    Ok(plain)
}

/// A program, with its options, that writes files of a compression.
struct Packer {
    compression: Compression,
    program: &'static str,
    args: &'static [&'static str],
    /// True if the file has a checksum of its content.
    has_checksum: bool,
}

const PACKERS: [Packer; 11] = [
    packer(Compression::Zstd, "zstd", &["-c", "-q"], true),
    packer(Compression::Zstd, "zstd", &["-c", "-q", "-19"], true),
    packer(Compression::Zstd, "zstd", &["-c", "-q", "--no-check"], false),
    packer(Compression::Zstd, "zstd", &["-c", "-q", "--long=27"], true),
    packer(Compression::Zstd, "pzstd", &["-c", "-q", "-p", "2"], true),
    packer(Compression::Gzip, "gzip", &["-c"], true),
    packer(Compression::Gzip, "gzip", &["-c", "-9", "-n"], true),
    packer(Compression::Xz, "xz", &["-c", "-0"], true),
    packer(Compression::Xz, "xz", &["-c", "-0", "--check=none"], false),
    packer(Compression::Bzip2, "bzip2", &["-c"], true),
    packer(Compression::Bzip2, "bzip2", &["-c", "-1"], true),
];

const fn packer(
    compression: Compression,
    program: &'static str,
    args: &'static [&'static str],
    has_checksum: bool,
) -> Packer {
    Packer { compression, program, args, has_checksum }
}

impl Packer {
    fn pack(&self, plain: &[u8]) -> Vec<u8> {
        filter(self.program, self.args, plain)
    }
}

#[test]
fn reads_the_output_of_every_program() {
    require!("zstd", "pzstd", "gzip", "xz", "bzip2");
    let content = content();
    for packer in &PACKERS {
        for len in [0, 1, 100, 4096, content.len()] {
            let packed = packer.pack(&content[..len]);
            assert_eq!(detect(&packed), Some(packer.compression), "{} {:?}", packer.program, packer.args);
            assert!(
                decode(packer.compression, &packed).unwrap() == content[..len],
                "{} {:?}",
                packer.program,
                packer.args
            );
        }
    }
}

#[test]
fn reads_all_frames_members_and_streams() {
    require!("zstd", "pzstd", "gzip", "xz", "bzip2");
    let content = content();
    for packer in &PACKERS {
        let first = packer.pack(&content[..300_000]);
        let second = packer.pack(&content[300_000..]);
        let empty = packer.pack(b"");
        let joined = [&first[..], &empty, &second, &empty].concat();
        assert!(
            decode(packer.compression, &joined).unwrap() == content,
            "{} {:?}",
            packer.program,
            packer.args
        );
    }
}

#[test]
fn skips_skippable_frames_anywhere() {
    require!("zstd");
    let content = content();
    let first = filter("zstd", &["-c", "-q"], &content[..300_000]);
    let second = filter("zstd", &["-c", "-q"], &content[300_000..]);
    for number in [0x50u8, 0x5a, 0x5e, 0x5f] {
        let skippable = [&[number, 0x2a, 0x4d, 0x18, 5, 0, 0, 0][..], b"12345"].concat();
        let joined = [&skippable[..], &first, &skippable, &skippable, &second, &skippable].concat();
        assert_eq!(detect(&joined), Some(Compression::Zstd));
        assert!(decode(Compression::Zstd, &joined).unwrap() == content);
        assert!(
            decode(Compression::Zstd, &joined[..joined.len() - 1]).is_err(),
            "a truncated skippable frame"
        );
    }
}

#[test]
fn rejects_truncation_anywhere() {
    require!("zstd", "pzstd", "gzip", "xz", "bzip2");
    let content = content();
    for packer in &PACKERS {
        let first = packer.pack(&content[..250_000]);
        let second = packer.pack(&content[250_000..]);
        let both = [&first[..], &second].concat();
        let cuts = (0..20).chain(first.len() - 15..first.len() + 15).chain((20..both.len()).step_by(60_011));
        let cuts = cuts.chain(both.len() - 20..both.len());
        // pzstd writes several frames, so the end of each is a valid end of the file.
        let could_end =
            |cut: usize| cut == first.len() || packer.program == "pzstd" && is_frame_end(&both, cut);
        for cut in cuts.filter(|cut| !could_end(*cut)) {
            let result = decode(packer.compression, &both[..cut]);
            assert!(result.is_err(), "{} {:?} cut to {cut} of {}", packer.program, packer.args, both.len());
        }
    }
}

/// True if a zstd frame begins at `cut`, so that the bytes before it are complete.
fn is_frame_end(bytes: &[u8], cut: usize) -> bool {
    detect(&bytes[cut..]) == Some(Compression::Zstd)
}

#[test]
fn rejects_bytes_after_the_end() {
    require!("zstd", "pzstd", "gzip", "xz", "bzip2");
    let content = &content()[..100_000];
    for packer in &PACKERS {
        let packed = packer.pack(content);
        // Three zeros: xz allows padding only in multiples of four bytes, and the other formats allow none.
        for tail in [
            &b"x"[..],
            b"garbage that is longer than a header",
            &[0; 3],
            &packed[..packed.len() / 2],
            &packed[..3],
        ] {
            let joined = [&packed[..], tail].concat();
            let result = decode(packer.compression, &joined);
            assert!(result.is_err(), "{} {:?} followed by {} bytes", packer.program, packer.args, tail.len());
        }
    }
}

/// Flips one bit at a time. Returns each flip with the decoded content; `None` after an error.
fn with_flipped_bits(packer: &Packer, content: &[u8]) -> Vec<(String, Option<Vec<u8>>)> {
    let packed = packer.pack(content);
    let places = (0..40).chain((40..packed.len()).step_by(25_003)).chain(packed.len() - 30..packed.len());
    let flips = places.flat_map(|at| [0, 3, 7].map(|bit| (at, bit)));
    flips
        .map(|(at, bit)| {
            let mut damaged = packed.clone();
            damaged[at] ^= 1 << bit;
            let what = format!("{} {:?}: bit {bit} of byte {at}", packer.program, packer.args);
            (what, decode(packer.compression, &damaged).ok())
        })
        .collect()
}

/// Some bits do not affect the content: those of the time, the file name and the operating system.
#[test]
fn flipped_bits_never_change_checksummed_content() {
    require!("zstd", "pzstd", "gzip", "xz", "bzip2");
    let content = &content()[150_000..350_000];
    let (mut errors, mut unnoticed) = (0, 0);
    for packer in PACKERS.iter().filter(|packer| packer.has_checksum) {
        for (what, plain) in with_flipped_bits(packer, content) {
            match plain {
                Some(plain) => {
                    assert!(plain == content, "{what} changes the content");
                    unnoticed += 1;
                }
                None => errors += 1,
            }
        }
    }
    assert!(errors > 0 && unnoticed > 0, "{errors} errors, {unnoticed} unnoticed");
}

#[test]
fn flipped_bits_without_a_checksum_do_not_panic() {
    require!("zstd", "xz");
    let content = &content()[150_000..350_000];
    let (mut errors, mut unnoticed) = (0, 0);
    for packer in PACKERS.iter().filter(|packer| !packer.has_checksum) {
        for (_, plain) in with_flipped_bits(packer, content) {
            if plain.is_some() { unnoticed += 1 } else { errors += 1 }
        }
    }
    assert!(errors > 0 && unnoticed > 0, "{errors} errors, {unnoticed} unnoticed");
}

#[test]
fn errors_name_the_file_and_the_compression() {
    require!("zstd", "pzstd", "gzip", "xz", "bzip2");
    let content = content();
    for packer in &PACKERS {
        let packed = packer.pack(&content);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive");
        std::fs::write(&path, &packed[..packed.len() - 20]).unwrap();
        let error = read_through(&path).expect_err("the file is cut short");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        let text = error.to_string();
        assert!(text.contains("archive") && text.contains(packer.compression.name()), "{text}");
    }
}

/// Opens bytes as if they came through a pipe.
fn from_pipe(name: &str, bytes: impl AsRef<[u8]>) -> Result<OpenInput> {
    let bytes = Cursor::new(bytes.as_ref().to_vec());
    OpenInput::of(Input::from_reader(name, Box::new(bytes))?).decompressed()
}

/// Opens a file and reads all of it. A damaged file of a single bzip2 block already fails to open.
fn read_through(path: &std::path::Path) -> Result<()> {
    let mut stream = open(&path.into(), Opening::ByContent, &Memory::default())?.input.into_stream()?;
    let mut chunk = vec![0; 10_000];
    while stream.read_full(&mut chunk)? > 0 {}
    Ok(())
}

#[test]
fn refuses_windows_above_the_limit_with_a_hint() {
    require!("zstd");
    // A frame header that needs a window of 256 MiB or 2 GiB, and a block.
    for exponent in [18u8, 21] {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, exponent << 3, 0x01, 0, 0];
        let error = from_pipe("x.zst", frame).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("128 MiB"), "{error}");
        assert!(error.hint_text().unwrap().contains("zstd -d --long=31"), "{error}");
    }
    // A file with a window of 2 GiB from zstd itself.
    let packed = filter("zstd", &["-c", "-q", "--ultra", "--long=31", "-1"], &content());
    let error = from_pipe("x.zst", packed).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[test]
fn accepts_a_window_of_128_mib() {
    let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, 17 << 3, 0x01, 0, 0];
    assert!(from_pipe("x.zst", frame).is_ok());
}

/// Opens an xz file whose header names this dictionary size, which determines the memory of the decoder. -T1
/// keeps xz from reducing it.
fn xz_with_dictionary(dictionary: &str) -> Result<OpenInput> {
    from_pipe(
        "x.xz",
        filter("xz", &["-c", "-T1", &format!("--lzma2=preset=0,dict={dictionary}")], &content()),
    )
}

#[test]
fn reads_xz_with_a_dictionary_of_64_mib() {
    require!("xz");
    let mut plain = Vec::new();
    let input = xz_with_dictionary("64MiB").unwrap().input;
    input.into_stream().unwrap().read_to_end(&mut plain).unwrap();
    assert!(plain == content());
}

#[test]
fn refuses_xz_above_the_memory_limit_with_a_hint() {
    require!("xz");
    for dictionary in ["128MiB", "1GiB"] {
        let error = xz_with_dictionary(dictionary).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("100 MiB"), "{error}");
        assert!(error.hint_text().unwrap().contains("xz -d"), "{error}");
    }
}

#[test]
fn decompresses_nested_layers_up_to_a_limit() {
    require!("gzip", "xz", "bzip2", "zstd");
    let content = content();
    let mut packed = content.clone();
    for (program, layers) in [("gzip", 1), ("xz", 2), ("bzip2", 3), ("zstd", 4)] {
        packed = filter(program, &["-c"], &packed);
        let input = from_pipe("x", &packed).unwrap();
        assert_eq!(input.compression.len(), layers);
        let mut plain = Vec::new();
        input.input.into_stream().unwrap().read_to_end(&mut plain).unwrap();
        assert!(plain == content, "{layers} layers");
    }
    let fifth = filter("gzip", &["-c"], &packed);
    let error = from_pipe("x", fifth).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded, "{error}");
}

#[test]
fn leaves_lookalikes_unchanged() {
    for plain in [
        &b"BZh9 is how a story begins"[..],
        b"\x1f\x8b\x07",
        b"\xfd7zXY",
        b"(\xb5/",
        b"\x89LZO\0\r\n\x1a",
        b"",
    ] {
        let input = from_pipe("x", plain).unwrap();
        assert!(input.compression.is_empty(), "{plain:?}");
        let mut found = Vec::new();
        input.input.into_stream().unwrap().read_to_end(&mut found).unwrap();
        assert_eq!(found, plain);
    }
}

#[test]
fn detects_the_compression_by_file_extension() {
    let cases = [
        ("a.zst", Some(Compression::Zstd)),
        ("b.VMA.GZ", Some(Compression::Gzip)),
        ("c.zst.raw", None),
        ("zst", None),
    ];
    for (name, expected) in cases {
        assert_eq!(by_name(&name.into()), expected, "{name}");
    }
}
