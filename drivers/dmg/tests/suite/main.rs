//! Tests of the DMG driver: conformance laws, independent programs, and files built byte by byte.
#![allow(clippy::unwrap_used)]

mod builder;

use std::io;
use std::sync::Arc;

use imgtool_core::{Driver, ErrorKind, FileRun, Input, LossClass, Memory, OpenOptions, ReadAt};
use imgtool_dmg::DmgDriver;
use imgtool_testing::conformance::{self, Hostile, Image};
use imgtool_testing::crafted::{check, content, faults, open, qemu_content, read, refusal, salvage};
use imgtool_testing::images::{noise, prose};
use imgtool_testing::oracles::{run, try_run};
use imgtool_testing::{memory, require, tempdir, text};

use builder::{ADC, BZIP2, Builder, IGNORED, LZFSE, LZMA, RAW, ZERO, ZLIB};

/// Parts of a disk: types of chunks and their content.
fn parts(kinds: &[u32]) -> Vec<(u32, Vec<u8>)> {
    let content = |(index, kind): (usize, &u32)| match *kind {
        ZERO | IGNORED => vec![0; 512 * (index + 2)],
        RAW => noise(index as u64, 512 * 3),
        _ => prose(index as u64, 512 * (20 + index)),
    };
    kinds.iter().enumerate().map(|part| (*part.1, content(part))).collect()
}

/// Builds an image of two tables, the second with chunks of these types. Returns it with its disk.
fn build(kinds: &[u32]) -> (Builder, Vec<u8>) {
    let (first, parts) = (noise(9, 512), parts(kinds));
    let mut builder = Builder::default();
    builder.table(&[(ZLIB, &first)]);
    builder.table(&parts.iter().map(|(kind, content)| (*kind, &content[..])).collect::<Vec<_>>());
    let disk = [first, parts.iter().flat_map(|(_, content)| content.clone()).collect()].concat();
    (builder, disk)
}

/// Every type of chunk that is read.
const ALL: [u32; 7] = [ZLIB, RAW, ZERO, IGNORED, BZIP2, LZMA, ADC];

#[test]
fn obeys_the_laws() {
    // Without the types whose decoders take megabytes: the laws open thousands of images.
    let (builder, disk) = build(&[ZLIB, RAW, ZERO, IGNORED, ADC]);
    let listed = builder.build();
    let forked = Builder { fork: true, ..builder }.build();
    let image = || Image::from_bytes("built", &disk);
    conformance::read_only(&DmgDriver, &[(&listed, image()), (&forked, image())]);
}

#[test]
fn hostile_bytes_do_not_panic() {
    for fork in [false, true] {
        let (builder, _) = build(&[ZLIB, RAW]);
        let image = Builder { fork, ..builder }.build();
        let (len, list) = (image.len(), 2500);
        let places = if fork {
            // The trailer, and the tables as they are.
            vec![len - 512..len, len - 512 - 50 - 700..len - 512 - 40]
        } else {
            vec![len - 512..len - 512 + 96, len - 296..len - 280, len - 20..len, len - list..len - list + 200]
        };
        let hostile = Hostile { image: &image, places, repair: &|_: &mut [u8]| {} };
        conformance::hostile_bytes_do_not_panic(&DmgDriver, &hostile);
    }
}

#[test]
fn reads_every_type_of_chunk() {
    let (mut builder, disk) = build(&ALL);
    builder.before = vec![7; 1000];
    let image = builder.build();
    assert!(read(&DmgDriver, &image).unwrap() == disk);
    assert_eq!(faults(&DmgDriver, &image), (0, 0));
    let source = open(&DmgDriver, &image).unwrap();
    let fact = source.info().facts.iter().find(|fact| fact.key == "compression-type").unwrap();
    assert_eq!(fact.value, "adc, bzip2, lzma, zlib");
}

#[test]
fn sectors_without_chunks_are_holes() {
    let (mut builder, mut disk) = build(&[ZLIB, RAW]);
    builder.more_sectors = 100;
    disk.resize(disk.len() + 51_200, 0);
    assert!(read(&DmgDriver, &builder.build()).unwrap() == disk);
    // A gap between tables: the second begins ten sectors later.
    builder.with_table(1, |table| table[15] += 10);
    disk.splice(512..512, [0; 5120]);
    disk.truncate(disk.len() - 5120);
    assert!(read(&DmgDriver, &builder.build()).unwrap() == disk);
}

#[test]
fn the_size_covers_all_chunks() {
    let (builder, disk) = build(&[ZLIB]);
    let mut image = builder.build();
    let at = image.len() - 512 + 492;
    image[at..at + 8].copy_from_slice(&1_u64.to_be_bytes());
    let source = open(&DmgDriver, &image).unwrap();
    assert_eq!(source.info().devices[0].size, disk.len() as u64);
    assert!(source.info().notes[0].contains("states 512 bytes"));
}

#[test]
fn qemu_reads_the_built_images_alike() {
    require!("qemu-img");
    for kinds in [&[ZLIB, RAW, ZERO, IGNORED, ZLIB][..], &[RAW], &[ZLIB; 30]] {
        for fork in [false, true] {
            let (builder, disk) = build(kinds);
            let image = Builder { fork, before: vec![1; 512], ..builder }.build();
            assert!(qemu_content(&image, "dmg") == disk, "{kinds:?}, fork {fork}");
            assert!(read(&DmgDriver, &image).unwrap() == disk, "{kinds:?}, fork {fork}");
        }
    }
}

#[test]
fn dmg2img_reads_the_built_images_alike() {
    require!("dmg2img");
    let directory = tempdir();
    let (path, raw) = (directory.path().join("x.dmg"), directory.path().join("x.raw"));
    let (builder, disk) = build(&[ZLIB, RAW, ZERO, IGNORED, BZIP2]);
    std::fs::write(&path, builder.build()).unwrap();
    run("dmg2img", &["-s", text(&path), text(&raw)]);
    assert!(std::fs::read(&raw).unwrap() == disk);
}

#[test]
fn seven_zip_reads_the_built_images_and_their_checksums_alike() {
    require!("7zz");
    let directory = tempdir();
    let path = directory.path().join("x.dmg");
    let (builder, disk) = build(&[ZLIB, RAW, ZERO, IGNORED, BZIP2, LZMA, ADC]);
    let image = builder.build();
    std::fs::write(&path, &image).unwrap();
    run("7zz", &["t", "-tdmg", text(&path)]);
    // Each table is a file of the archive.
    let tables = run("7zz", &["e", "-so", "-tdmg", text(&path)]).stdout;
    assert!(tables == disk);
    let mut damaged = image;
    damaged[0] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    assert!(!try_run("7zz", &["t", "-tdmg", text(&path)]).status.success());
    assert!(check(&DmgDriver, &damaged).corruptions > 0);
}

#[test]
fn is_recognised_by_its_end() {
    let (builder, _) = build(&[BZIP2]);
    let image = builder.build();
    let driver = DmgDriver;
    assert!(driver.probe(&image[..4096.min(image.len())], None).is_none());
    assert!(driver.probe_end(Some(&image[image.len() - 512..])));
    assert!(!driver.probe_end(Some(&image[image.len() - 513..image.len() - 1])));
    // The end of a stream may be the trailer.
    assert!(!driver.probe_end(Some(b"koly")) && driver.probe_end(None));
}

#[test]
fn refuses_encryption_parts_and_lzfse_by_name() {
    let (builder, _) = build(&[ZLIB, LZFSE]);
    let error = refusal(&DmgDriver, &builder.build());
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("LZFSE"), "{error}");
    let options = OpenOptions { info_only: true, ..OpenOptions::default() };
    assert!(DmgDriver.open(memory::as_file("x.dmg", &builder.build()), &options).is_ok());
    // Nothing says that the image is damaged.
    let checked = DmgDriver.check(memory::as_file("x.dmg", &builder.build()), &OpenOptions::default());
    let error = checked.unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("LZFSE"), "{error}");

    let encrypted = [b"encrcdsa".to_vec(), vec![0; 5000]].concat();
    assert!(DmgDriver.probe(&encrypted, None).is_some());
    assert!(refusal(&DmgDriver, &encrypted).to_string().contains("encrypted"));

    let mut part = build(&[ZLIB]).0.build();
    let segments = part.len() - 512 + 63;
    part[segments] = 3;
    assert!(refusal(&DmgDriver, &part).to_string().contains("part 1 of 3"));
}

#[test]
fn refuses_trailers_that_contradict_themselves() {
    let image = build(&ALL).0.build();
    let trailer = image.len() - 512;
    let long = u64::to_be_bytes;
    let numbers: [(usize, &[u8], &str); 8] = [
        (0, b"kolx", "trailer at its end is missing"),
        (4, &[0, 0, 0, 5], "version 5"),
        (8, &[0, 0, 1, 0], "256 bytes"),
        (24, &long(u64::MAX), "beyond any file"),
        (216, &long(u64::MAX), "the file ends"),
        (224, &long(0), "neither a property list nor a resource fork"),
        (224, &long(65 << 20), "more than 67108864"),
        (492, &long(u64::MAX), "more than 18014398509481984"),
    ];
    for (at, value, text) in numbers {
        let mut damaged = image.clone();
        damaged[trailer + at..trailer + at + value.len()].copy_from_slice(value);
        let message = format!("{:#}", refusal(&DmgDriver, &damaged));
        assert!(message.contains(text), "{at} = {value:02x?}: {message}");
    }
}

#[test]
fn refuses_tables_that_contradict_themselves() {
    let long = u64::to_be_bytes;
    // Offsets in the second table: its first chunk is at 204, the second at 244.
    let numbers: [(usize, &[u8], &str); 14] = [
        (0, b"m", ""),
        (0, b"x", "no signature"),
        (7, &[2], "version 2"),
        (8, &long(u64::MAX), "exceeds"),
        (8, &long(1 << 54), "exceeds"),
        (8, &long(0), "two chunks store the sector 0"),
        (16, &long(1), "exceeds the 1 sectors of its table"),
        (200, &[1], "says that it has"),
        (204, &[0x70], "unknown type 0x70000005"),
        (212, &long(u64::MAX), "exceeds"),
        (252, &long(5), "two chunks store the sector"),
        (220, &long(200_000), "exceeds"),
        (276, &long(100), "stored in 100"),
        (236, &long(1 << 40), "the maximum is 67108864"),
    ];
    for (at, value, text) in numbers {
        let (mut builder, _) = build(&[ZLIB, RAW, ZERO]);
        builder.with_table(1, |table| table[at..at + value.len()].copy_from_slice(value));
        match read(&DmgDriver, &builder.build()) {
            Ok(_) => assert_eq!(text, "", "{at} = {value:02x?}"),
            Err(error) => assert!(format!("{error:#}").contains(text), "{at} = {value:02x?}: {error:#}"),
        }
    }
}

#[test]
fn refuses_property_lists_that_do_not_parse() {
    let image = build(&[ZLIB]).0.build();
    let position = |text: &str| image.windows(text.len()).position(|part| part == text.as_bytes()).unwrap();
    for (at, value, text) in [
        (position("</plist>"), "<!plist>", "property list is damaged"),
        (position("<data>") + 9, "\u{7f}", "property list is damaged"),
        (position("<key>blkx"), "<key>blky", "no table of chunks"),
    ] {
        let mut damaged = image.clone();
        damaged[at..at + value.len()].copy_from_slice(value.as_bytes());
        let message = format!("{:#}", refusal(&DmgDriver, &damaged));
        assert!(message.contains(text), "{value}: {message}");
    }
}

#[test]
fn check_finds_wrong_content() {
    let (builder, disk) = build(&[RAW, ZERO]);
    let mut image = builder.build();
    assert_eq!(faults(&DmgDriver, &image), (0, 0));
    // A bit in the raw chunk: the checksums of the chunks and of the second table.
    let raw = image.windows(100).position(|part| *part == disk[512..612]).unwrap();
    image[raw] ^= 4;
    assert_eq!(faults(&DmgDriver, &image), (2, 0));
    let (mut builder, _) = build(&[RAW, ZERO]);
    builder.with_table(1, |table| table[200..204].fill(0));
    builder.with_table(1, |table| {
        table[8..24].copy_from_slice(&[0_u64, 1 << 50].map(u64::to_be_bytes).concat())
    });
    assert_eq!(faults(&DmgDriver, &builder.build()), (1, 0));
    image.truncate(100);
    assert!(DmgDriver.check(memory::as_file("x.dmg", &image), &OpenOptions::default()).is_err());
}

/// Every chunk decodes, but to other bytes than those of the table's checksum.
#[test]
fn a_whole_read_compares_the_checksums_of_the_tables() {
    let (mut builder, disk) = build(&ALL);
    let verify = |image: &[u8]| {
        let source = open(&DmgDriver, image).unwrap();
        assert!(source.verify().is_ok(), "nothing was read");
        assert!(content(&source).unwrap() == disk);
        source.verify()
    };
    assert!(verify(&builder.build()).is_ok());
    builder.with_table(1, |table| table[75] ^= 1);
    let image = builder.build();
    let error = verify(&image).unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("sectors from 1 on"), "{error}");

    let options = OpenOptions { salvage: true, ..OpenOptions::default() };
    let source = DmgDriver.open(memory::as_file("x.dmg", &image), &options).unwrap();
    assert!(content(&source).unwrap() == disk);
    assert!(source.verify().is_ok());
    let losses = source.losses();
    assert_eq!(losses.len(), 1);
    assert_eq!((losses[0].class, losses[0].guest.clone()), (LossClass::Unverified, 512..disk.len() as u64));
    assert!(content(&source).unwrap() == disk, "the content stays");

    // Without a checksum of its own, a table relies on that of the chunks as stored.
    builder.with_table(1, |table| table[64..68].fill(0));
    let mut image = builder.build();
    assert!(verify(&image).is_ok());
    let stated = image.len() - 512 + 88;
    image[stated] ^= 1;
    assert!(verify(&image).unwrap_err().to_string().contains("the chunks have the checksum"));
}

/// A file of zeros, in which all but the end is a hole that can't be read.
struct MostlyHole {
    hole: u64,
    end: Vec<u8>,
}

impl ReadAt for MostlyHole {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        if position == 0 && buf.len() == 16 {
            // The head of the file, by which an encrypted image is recognised.
            buf.fill(0);
            return Ok(());
        }
        let at = position.checked_sub(self.hole).ok_or_else(|| io::Error::other("a hole was read"))?;
        buf.copy_from_slice(&self.end[at as usize..][..buf.len()]);
        Ok(())
    }

    fn len(&self) -> u64 {
        self.hole + self.end.len() as u64
    }

    fn run(&self, position: u64) -> io::Result<FileRun> {
        let is_data = position >= self.hole;
        Ok(FileRun { end: if is_data { self.len() } else { self.hole }, is_data })
    }
}

/// The first plain chunk of 512 bytes grows to a terabyte of zeros, which are a hole of the file.
#[test]
fn the_checksums_of_holes_are_not_read() {
    let (hole, tail) = (1_u64 << 40, noise(1, 4096));
    let mut builder = Builder::default();
    builder.table(&[(RAW, &[0; 512]), (RAW, &tail)]);
    let mut digest = crc32fast::Hasher::new();
    let mut zeros = crc32fast::Hasher::new();
    zeros.update(&[0; 512]);
    // 2^31 times 512 bytes.
    for _ in 0..31 {
        let half = zeros.clone();
        zeros.combine(&half);
    }
    digest.combine(&zeros);
    digest.update(&tail);
    builder.with_table(0, |table| {
        let mut put = |at: usize, number: u64| table[at..at + 8].copy_from_slice(&number.to_be_bytes());
        put(16, hole / 512 + 8);
        put(204 + 16, hole / 512);
        put(204 + 32, hole);
        put(244 + 8, hole / 512);
        put(244 + 24, hole);
        table[72..76].copy_from_slice(&digest.finalize().to_be_bytes());
    });
    builder.stored.drain(..512);
    let mut end = builder.build();
    let trailer = end.len() - 512;
    let list = u64::from_be_bytes(*end[trailer + 216..].first_chunk().unwrap()) + hole;
    end[trailer + 216..trailer + 224].copy_from_slice(&list.to_be_bytes());
    end[trailer + 32..trailer + 40].copy_from_slice(&(hole + 4096).to_be_bytes());
    let open = |end: Vec<u8>| {
        let file = MostlyHole { hole, end };
        DmgDriver.open(Input::from_read_at("x.dmg", Arc::new(file)), &OpenOptions::default()).unwrap()
    };
    open(end.clone()).verify().unwrap();
    end[100] ^= 1;
    assert!(open(end).verify().unwrap_err().to_string().contains("sectors from 0 on"));
}

/// 40 chunks use the stored bytes of one, in a file that is hardly longer than that one.
#[test]
fn check_does_not_decode_shared_bytes_for_ever() {
    let (chunks, content) = (40, noise(1, 100 << 10));
    for kind in [RAW, BZIP2] {
        let mut builder = Builder::default();
        builder.table(&vec![(kind, &content[..]); chunks]);
        builder.with_table(0, |table| {
            for chunk in 1..chunks {
                table.copy_within(204 + 24..204 + 40, 204 + 40 * chunk + 24);
            }
        });
        let mut image = builder.build();
        let trailer = image.len() - 512;
        let field = |at: usize| u64::from_be_bytes(*image[trailer + at..].first_chunk().unwrap());
        let stored_len = field(32) as usize / chunks;
        let unused = field(32) - stored_len as u64;
        let list = field(216) - unused;
        image[trailer + 216..trailer + 224].copy_from_slice(&list.to_be_bytes());
        image.drain(..unused as usize);
        let report = check(&DmgDriver, &image);
        let refused = report.findings.iter().filter(|finding| finding.contains("share stored bytes")).count();
        let decoded = (chunks - refused) * stored_len;
        assert!(refused > 30 && decoded <= image.len(), "{kind:#x}: {refused} refused");
    }
}

#[test]
fn the_check_borrows_the_memory_of_its_decoder() {
    let (builder, _) = build(&[LZMA]);
    let options = OpenOptions { memory: Memory::new(64 << 20), ..OpenOptions::default() };
    let checked = DmgDriver.check(memory::as_file("x.dmg", &builder.build()), &options);
    assert_eq!(checked.unwrap_err().kind(), ErrorKind::LimitExceeded);
}

#[test]
fn refuses_deep_property_lists() {
    let image = build(&[ZLIB]).0.build();
    let at = image.windows(7).position(|part| part == b"<plist ").unwrap();
    let deep = |depth: usize| {
        let nested = ["<a>".repeat(depth), "</a>".repeat(depth)].concat();
        let mut image = image.clone();
        image.splice(at..at, nested.into_bytes());
        let (trailer, len) = (image.len() - 512, 7 * depth as u64);
        let list = u64::from_be_bytes(*image[trailer + 224..].first_chunk().unwrap()) + len;
        image[trailer + 224..trailer + 232].copy_from_slice(&list.to_be_bytes());
        image
    };
    assert!(read(&DmgDriver, &deep(20)).is_ok());
    let message = refusal(&DmgDriver, &deep(1000)).to_string();
    assert!(message.contains("more than 64 deep"), "{message}");
}

#[test]
fn salvage_restores_the_other_chunks() {
    let (builder, disk) = build(&[ZLIB, BZIP2]);
    let mut image = builder.build();
    let bzip2 = image.windows(4).position(|part| part == b"BZh9").unwrap();
    image[bzip2 + 20] ^= 0xff;
    let (restored, lost) = salvage(&DmgDriver, &image);
    let from = 512 + 20 * 512;
    assert!(restored[..from] == disk[..from] && restored[from..].iter().all(|byte| *byte == 0));
    assert_eq!(lost, [(from as u64, disk.len() as u64)]);
}

#[test]
fn the_tables_borrow_their_memory() {
    let content = noise(1, 512);
    let mut builder = Builder::default();
    builder.table(&[(ZLIB, &content)]);
    // The property list has 21 MiB.
    builder.with_table(0, |table| table.resize(15 << 20, 0));
    let image = builder.build();
    let open = |limit| {
        let memory = Memory::new(limit);
        let options = OpenOptions { memory: memory.clone(), ..OpenOptions::default() };
        let free = memory.free();
        let opened = DmgDriver.open(memory::as_file("x.dmg", &image), &options).map(|_| ());
        assert_eq!(memory.free(), free);
        opened.map_err(|error| error.kind())
    };
    assert_eq!(open(256 << 20), Ok(()));
    assert_eq!(open(64 << 20), Err(ErrorKind::LimitExceeded));
}
