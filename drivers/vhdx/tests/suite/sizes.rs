//! Sizes and options of new files, and their cost in time and space.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use imgtool_core::{Compress, CreateOptions, Driver, ErrorKind};
use imgtool_testing::conformance::{self, Content, Fill, Image, MemorySource};
use imgtool_vhdx::VhdxDriver;

use crate::support::{GIB, KIB, MIB, TIB, check_file, disk_of, open_file, options};

/// Reads and compares only the data extents, like a conversion.
fn assert_data(path: &std::path::Path, image: &Image) {
    let disk = disk_of(&open_file(path).unwrap());
    let content = &image.devices[0].1;
    let (mut at, mut data) = (0, 0);
    while at < disk.size() {
        for extent in disk.extents(at..disk.size()).unwrap() {
            at = extent.end();
            if !extent.is_data() {
                assert!(content.is_zero(&extent.range()) || extent.len < 64 * KIB, "{extent:?} hides data");
                continue;
            }
            data += extent.len;
            let mut found = vec![0; extent.len as usize];
            let mut expected = found.clone();
            disk.read_at(&mut found, extent.start).unwrap();
            content.read(&mut expected, extent.start);
            assert!(found == expected, "{extent:?}");
        }
    }
    assert!(data <= content.data_len(64 * KIB) + MIB, "{data} bytes of data");
}

/// Returns a disk of `size` bytes with little data far apart.
fn far_apart(size: u64) -> Image {
    let content = Content::zero()
        .with(1000..2000, Fill::Random)
        .with(size / 2..size / 2 + 100_000, Fill::Random)
        .with(size - 5000..size, Fill::Random);
    Image::disk(format!("{size} bytes"), size, content)
}

#[test]
fn cost_depends_on_data_not_disk_size() {
    let sizes = [
        (10 * GIB, "1M"),
        (10 * GIB, "0"),
        (5 * TIB, "1M"),
        (5 * TIB, "0"),
        (64 * TIB, "1M"),
        (64 * TIB, "0"),
    ];
    for (size, block_size) in sizes {
        let directory = tempfile::tempdir().unwrap();
        let image = far_apart(size);
        let started = Instant::now();
        let path =
            conformance::make(&VhdxDriver, &options(&[("block_size", block_size)]), &image, directory.path());
        let written = started.elapsed();
        assert_data(&path, &image);
        let read = started.elapsed() - written;
        println!("{size} bytes in blocks of {block_size}: written in {written:?}, read in {read:?}");
        assert!(written + read < Duration::from_secs(5), "{size}: {written:?} + {read:?}");
        let allocated = std::fs::metadata(&path).unwrap().blocks() * 512;
        assert!(allocated < 4 * MIB, "{allocated} bytes on disk");
    }
}

#[test]
fn allocates_whole_blocks_sparsely() {
    let directory = tempfile::tempdir().unwrap();
    let image =
        Image::disk("one sector", GIB, Content::zero().with(100 * MIB..100 * MIB + 512, Fill::Byte(1)));
    let path = conformance::make(&VhdxDriver, &options(&[("block_size", "32M")]), &image, directory.path());
    let meta = std::fs::metadata(&path).unwrap();
    assert_eq!(meta.len(), 4 * MIB + 32 * MIB);
    assert!(meta.blocks() * 512 < MIB, "{} bytes on disk", meta.blocks() * 512);
}

#[test]
fn default_block_sizes_match_qemu() {
    for (size, expected) in
        [(MIB, 8), (GIB, 8), (GIB + 512, 16), (101 * GIB, 32), (32 * TIB, 32), (33 * TIB, 64), (64 * TIB, 64)]
    {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::disk("empty", size, Content::zero());
        let path = conformance::make(&VhdxDriver, &CreateOptions::default(), &image, directory.path());
        let source = open_file(&path).unwrap();
        assert_eq!(source.info().cluster_size, Some(expected * MIB), "{size}");
    }
}

#[test]
fn rounds_sizes_up_with_a_note() {
    for (size, logical, expected) in [(1000, "512", 1024), (1, "4096", 4096), (4096, "4096", 4096)] {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::disk("ragged", size, Content::zero().with(0..size, Fill::Random));
        let output = conformance::new_file(&directory.path().join("x"));
        let options = options(&[("logical_sector_size", logical)]);
        let sink = conformance::create(&VhdxDriver, output, &image.manifest(), &options).unwrap();
        conformance::fill_sink(&MemorySource::new(&image), &*sink, 1).unwrap();
        let notes = sink.notes();
        assert_eq!(notes.len(), usize::from(size != expected));
        assert!(notes.iter().all(|note| note.contains(&expected.to_string())), "{notes:?}");
        let source = open_file(&directory.path().join("x")).unwrap();
        assert_eq!(source.info().devices[0].size, expected);
    }
}

#[test]
fn refuses_bad_options_naming_the_bounds() {
    let refusal = |pairs: &[(&str, &str)]| {
        let parsed = CreateOptions::parse("vhdx", VhdxDriver.options(), pairs.iter().copied());
        let error = parsed.and_then(|options| VhdxDriver.writer(&options)).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
        error.to_string()
    };
    for bad in ["512k", "3M", "512M", "1", "x"] {
        assert!(refusal(&[("block_size", bad)]).contains("block_size"));
    }
    assert!(refusal(&[("subformat", "sparse")]).contains("'subformat' can't be 'sparse'"));
    assert!(refusal(&[("logical_sector_size", "1024")]).contains("512|4096"));
    assert!(refusal(&[("physical_sector_size", "0")]).contains("512|4096"));
    for bad in ["0", "1000", "4G", "1.5M"] {
        assert!(refusal(&[("log_size", bad)]).contains("log_size"));
    }
    assert!(refusal(&[("disk_id", "00000000-0000-0000-0000-000000000000")]).contains("GUID"));
    assert!(refusal(&[("file_write_guid", "x")]).contains("GUID"));
    assert!(refusal(&[("preallocation", "full")]).contains("unknown option"));
    let compressed = CreateOptions { compress: Some(Compress::default()), ..CreateOptions::default() };
    assert!(VhdxDriver.writer(&compressed).is_err());
}

#[test]
fn refuses_disks_above_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let image = Image::disk("huge", 64 * TIB + 1, Content::zero());
    let output = conformance::new_file(&directory.path().join("x"));
    let Err(error) = conformance::create(&VhdxDriver, output, &image.manifest(), &CreateOptions::default())
    else {
        panic!()
    };
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("64 TiB"), "{error}");
}

#[test]
fn guids_follow_content_and_options() {
    let identity = |fill: Fill, size: u64, pairs: &[(&str, &str)]| {
        let directory = tempfile::tempdir().unwrap();
        let image = Image::disk("x", size, Content::zero().with(0..4096, fill));
        let path = conformance::make(&VhdxDriver, &options(pairs), &image, directory.path());
        let source = open_file(&path).unwrap();
        ["disk-id", "data-write-guid", "file-write-guid"].map(|key| {
            source
                .info()
                .facts
                .iter()
                .find(|fact| fact.key == key)
                .unwrap()
                .value
                .as_str()
                .unwrap()
                .to_owned()
        })
    };
    let one = identity(Fill::Byte(1), MIB, &[]);
    assert_eq!(one, identity(Fill::Byte(1), MIB, &[]));
    for other in [
        identity(Fill::Byte(2), MIB, &[]),
        identity(Fill::Byte(1), 2 * MIB, &[]),
        identity(Fill::Byte(1), MIB, &[("block_size", "1M")]),
    ] {
        assert!(one.iter().zip(&other).all(|(one, other)| one != other), "{one:?} {other:?}");
    }
    assert!(one[0] != one[1] && one[1] != one[2] && one[0] != one[2]);
    let prefix = "6a1b2c3d-0000-4000-8000-00000000000";
    let ids = [1, 2, 3].map(|digit| format!("{prefix}{digit}"));
    let from_options = identity(
        Fill::Byte(1),
        MIB,
        &[("disk_id", &ids[0]), ("data_write_guid", &ids[1]), ("file_write_guid", &ids[2])],
    );
    assert_eq!(from_options, ids);
}

#[test]
fn measures_the_exact_length() {
    for image in [far_apart(10 * GIB), conformance::mixed_image(), Image::disk("none", MIB, Content::zero())]
    {
        for pairs in [&[][..], &[("block_size", "1M")], &[("subformat", "fixed"), ("block_size", "1M")]] {
            let directory = tempfile::tempdir().unwrap();
            let options = options(pairs);
            let measured = VhdxDriver.writer(&options).unwrap().measure(&MemorySource::new(&image)).unwrap();
            let path = conformance::make(&VhdxDriver, &options, &image, directory.path());
            assert_eq!(std::fs::metadata(&path).unwrap().len(), measured.required, "{image} {pairs:?}");
            assert!(measured.required <= measured.fully_allocated);
        }
    }
}

#[test]
fn refuses_a_small_output() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("x");
    std::fs::write(&path, vec![0xaa; MIB as usize]).unwrap();
    let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let output = imgtool_storage::file::existing(&*path, file, false).unwrap();
    let image = Image::disk("x", MIB, Content::zero());
    let Err(error) = conformance::create(&VhdxDriver, output, &image.manifest(), &CreateOptions::default())
    else {
        panic!()
    };
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
}

#[test]
fn checks_a_large_bat_quickly() {
    let directory = tempfile::tempdir().unwrap();
    let image = far_apart(64 * TIB);
    let path = conformance::make(&VhdxDriver, &options(&[("block_size", "1M")]), &image, directory.path());
    let started = Instant::now();
    let report = check_file(&path);
    assert_eq!((report.corruptions, report.allocated_clusters), (0, Some(3)), "{:?}", report.findings);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}
