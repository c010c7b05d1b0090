//! The toolkit's conformance laws, hostile bytes, and random disks.

use imgtool_core::CreateOptions;
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_vhd::VhdDriver;
use proptest::prelude::*;

use crate::support::{check, options};

#[test]
fn obeys_the_laws() {
    conformance::all(&VhdDriver, &CreateOptions::default());
}

#[test]
fn obeys_the_laws_with_fixed_images() {
    conformance::all(&VhdDriver, &options(&[("subformat", "fixed"), ("align", "512")]));
}

/// Corrects the checksums of the footers and of the header of an image.
fn repair(bytes: &mut [u8]) {
    let end = bytes.len() - 512;
    for (at, len, checksum_at) in [(0, 512, 64), (512, 1024, 36), (end, 512, 64)] {
        let part = &mut bytes[at..at + len];
        part[checksum_at..checksum_at + 4].fill(0);
        let sum = part.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        part[checksum_at..checksum_at + 4].copy_from_slice(&(!sum).to_be_bytes());
    }
}

#[test]
fn hostile_bytes_do_not_panic() {
    let image = Image::disk("hostile", 5 << 20, Content::zero().with(0..3 << 20, Fill::Random));
    let directory = conformance::scratch();
    let path = conformance::make(&VhdDriver, &CreateOptions::default(), &image, directory.path());
    let bytes = std::fs::read(path).unwrap();
    let end = bytes.len() - 512;
    let places = vec![0..86, 512..600, 1088..1200, 1536..1548, end..end + 86];
    let hostile = conformance::Hostile { image: &bytes, places, repair: &repair };
    conformance::hostile_bytes_do_not_panic(&VhdDriver, &hostile);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_disk_round_trips(
        sectors in 1u64..20_000,
        areas in prop::collection::vec((0u64..10_000_000, 1u64..300_000), 0..12),
        subformat in prop::sample::select(vec!["dynamic", "fixed"]),
        align in prop::sample::select(vec!["512", "1M"]),
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
        let options = options(&[("subformat", subformat), ("align", align)]);
        let path = conformance::make(&VhdDriver, &options, &image, directory.path());
        let source = conformance::open(&VhdDriver, &path).unwrap();
        let multiple = if align == "512" { 512 } else { 1 << 20 };
        prop_assert_eq!(conformance::compare(&source, &image, multiple), Ok(()));
        let report = check(&path);
        prop_assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    }
}
