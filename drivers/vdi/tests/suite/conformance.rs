//! The toolkit's conformance laws, hostile bytes, and random disks.

use imgtool_core::CreateOptions;
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_vdi::VdiDriver;
use proptest::prelude::*;

use crate::support::{check, options};

#[test]
fn obeys_the_laws() {
    conformance::all(&VdiDriver, &CreateOptions::default());
}

#[test]
fn obeys_the_laws_with_fixed_images() {
    conformance::all(&VdiDriver, &options(&[("static", "on")]));
}

#[test]
fn obeys_the_laws_with_large_blocks() {
    conformance::all(&VdiDriver, &options(&[("block_size", "4M")]));
}

#[test]
fn hostile_bytes_do_not_panic() {
    let image = Image::disk("hostile", 5 << 20, Content::zero().with(0..3 << 20, Fill::Random));
    let directory = conformance::scratch();
    let path = conformance::make(&VdiDriver, &CreateOptions::default(), &image, directory.path());
    let bytes = std::fs::read(path).unwrap();
    let places = vec![64..84, 340..472, 1 << 20..(1 << 20) + 20];
    let hostile = conformance::Hostile { image: &bytes, places, repair: &|_: &mut [u8]| {} };
    conformance::hostile_bytes_do_not_panic(&VdiDriver, &hostile);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_disk_round_trips(
        sectors in 1u64..20_000,
        areas in prop::collection::vec((0u64..10_000_000, 1u64..300_000), 0..12),
        block in prop::sample::select(vec!["1M", "2M", "8M"]),
        fixed in prop::sample::select(vec!["on", "off"]),
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
        let options = options(&[("block_size", block), ("static", fixed)]);
        let path = conformance::make(&VdiDriver, &options, &image, directory.path());
        let source = conformance::open(&VdiDriver, &path).unwrap();
        prop_assert_eq!(conformance::compare(&source, &image, 512), Ok(()));
        let report = check(&path);
        prop_assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    }
}
