//! The toolkit's conformance laws, hostile bytes, and random disks.

use imgtool_core::{CreateOptions, Driver, ErrorKind, Output, OutputFactory, Result};
use imgtool_testing::conformance::{self, Content, Fill, Image, Order};
use imgtool_vmdk::VmdkDriver;
use proptest::prelude::*;

use crate::support::{SEVERAL, assert_clean, make, open_plainly, options};

#[test]
fn obeys_the_laws() {
    conformance::all(&VmdkDriver, &CreateOptions::default());
}

#[test]
fn obeys_the_laws_with_sparse_images() {
    conformance::all(&VmdkDriver, &options(&[("subformat", "monolithicSparse")]));
}

/// Returns the files of an image, by name.
fn files(image: &std::path::Path) -> Vec<(std::ffi::OsString, Vec<u8>)> {
    let entries = std::fs::read_dir(image.parent().unwrap()).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap())
        .map(|e| (e.file_name(), std::fs::read(e.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// The laws of the toolkit make images of one file, so this repeats those about content for several.
#[test]
fn obeys_the_laws_with_several_files() {
    let small = |image: &Image| image.devices.iter().all(|(device, _)| device.size <= 64 << 20);
    for subformat in SEVERAL {
        let options = options(&[("subformat", subformat)]);
        for image in conformance::patterns().iter().filter(|image| small(image)) {
            let directory = conformance::scratch();
            let mut known: Option<Vec<_>> = None;
            for (order, threads) in
                [(Order::Random, 1), (Order::Random, 2), (Order::Stream, 7), (Order::Shuffled, 7)]
            {
                let image = image.read_as(order);
                let path = conformance::make_with(&VmdkDriver, &options, &image, directory.path(), threads);
                let source = open_plainly(&path).unwrap();
                assert_eq!(conformance::compare(&source, &image, 512), Ok(()), "{subformat}: {image}");
                assert_clean(&path);
                let files = files(&path);
                // The grains of a shuffled source are in its order.
                if order == Order::Shuffled && subformat.contains("Sparse") {
                    continue;
                }
                assert!(
                    *known.get_or_insert_with(|| files.clone()) == files,
                    "{subformat}: {image}, {threads}"
                );
            }
        }
    }
}

#[test]
fn a_failing_file_of_several_is_an_error() {
    let image = conformance::mixed_image();
    for subformat in SEVERAL {
        for failing in [0, 1] {
            let mut outputs = OneFails { failing, made: 0, directory: conformance::scratch() };
            let options = options(&[("subformat", subformat)]);
            let error = conformance::write_to(&VmdkDriver, &options, &image, &mut outputs, 2).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Io, "{subformat}, output {failing}: {error}");
            assert_eq!(outputs.made, 2);
        }
    }
}

/// Outputs of an image, one of which has no space.
#[derive(Debug)]
struct OneFails {
    failing: usize,
    made: usize,
    directory: tempfile::TempDir,
}

impl OneFails {
    fn next(&mut self) -> Result<Output> {
        let number = self.made;
        self.made += 1;
        let path = self.directory.path().join(number.to_string());
        if number == self.failing {
            // Every write fails with EBADF.
            std::fs::write(&path, "").unwrap();
            let file = std::fs::File::open(&path).unwrap();
            return Ok(imgtool_storage::file::new_file(&path, file));
        }
        Ok(conformance::new_file(&path))
    }
}

impl OutputFactory for OneFails {
    fn main(&mut self) -> Result<Output> {
        self.next()
    }

    fn beside(&mut self, _name: &str) -> Result<Output> {
        self.next()
    }
}

#[test]
fn failing_storage_is_an_error() {
    let image = conformance::mixed_image();
    conformance::faults::all(&VmdkDriver, &CreateOptions::default(), &image);
    conformance::faults::all(&VmdkDriver, &options(&[("subformat", "monolithicSparse")]), &image);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let content = Content::zero().with(0..20_000, Fill::Random).with(1 << 18..300_000, Fill::Text);
    let image = Image::disk("hostile", 1 << 19, content);
    for subformat in ["streamOptimized", "monolithicSparse"] {
        let directory = conformance::scratch();
        let options = options(&[("subformat", subformat)]);
        let path = conformance::make(&VmdkDriver, &options, &image, directory.path());
        let bytes = std::fs::read(path).unwrap();
        let end = bytes.len();
        let places = match subformat {
            // The header, two grains, the table, the directory and the footer.
            "streamOptimized" => {
                let head = [0..80, 512..600, 65_536..65_552];
                let tail = [end - 4608..end - 4560, end - 2560..end - 2544, end - 2048..end - 1450];
                head.into_iter().chain(tail).collect()
            }
            _ => vec![0..80, 512..600, 26 * 512..26 * 512 + 8, 27 * 512..27 * 512 + 48],
        };
        let hostile = conformance::Hostile { image: &bytes, places, repair: &|_| {} };
        conformance::hostile_bytes_do_not_panic(&VmdkDriver, &hostile);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_disk_round_trips(
        sectors in 1u64..20_000,
        areas in prop::collection::vec((0u64..10_000_000, 1u64..300_000), 0..12),
        subformat in prop::sample::select(crate::support::SUBFORMATS.to_vec()),
        align in prop::sample::select(vec!["512", "64k"]),
        ragged in 0u64..512,
    ) {
        let size = sectors * 512 + ragged;
        let mut content = Content::zero();
        let mut starts: Vec<(u64, u64)> = areas.into_iter().map(|(start, len)| (start % size, len)).collect();
        starts.sort_unstable();
        let mut at = 0;
        for (start, len) in starts {
            let (start, end) = (start.max(at), (start + len).min(size));
            if start < end {
                content = content.with(start..end, Fill::Random);
                at = end;
            }
        }
        let image = Image::disk("proptest", size, content);
        let directory = conformance::scratch();
        let path = make(&image, &[("subformat", subformat), ("align", align)], directory.path());
        let source = open_plainly(&path).unwrap();
        let multiple = if align == "512" { 512 } else { 65_536 };
        prop_assert_eq!(conformance::compare(&source, &image, multiple), Ok(()));
        assert_clean(&path);
    }
}

/// No machine can write a stream, so an image without content is not one.
#[test]
fn an_image_without_content_is_for_machines() {
    let subformat = |blank, pairs: &[(&str, &str)]| {
        let options = CreateOptions { blank, ..options(pairs) };
        VmdkDriver.writer(&options).unwrap().writes_stream()
    };
    assert!(subformat(false, &[]));
    assert!(!subformat(true, &[]));
    assert!(subformat(true, &[("subformat", "streamOptimized")]));
}

/// A disk of several files has tables in each of them, and a descriptor with their names.
#[test]
fn a_measured_size_suffices_for_all_files() {
    let image = Image::disk("5 GiB", 5 << 30, Content::zero().with(0..1 << 20, Fill::Random));
    for subformat in SEVERAL.into_iter().chain(["monolithicSparse"]) {
        let directory = tempfile::tempdir().unwrap();
        let pairs = [("subformat", subformat)];
        let path = make(&image, &pairs, directory.path());
        let files = std::fs::read_dir(path.parent().unwrap()).unwrap();
        let stored: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
        let source = open_plainly(&path).unwrap();
        let measured = VmdkDriver.writer(&options(&pairs)).unwrap().measure(&*source).unwrap().required;
        let room = 64 << 10;
        assert!((stored..stored + room).contains(&measured), "{subformat}: {measured}, {stored} stored");
    }
}
