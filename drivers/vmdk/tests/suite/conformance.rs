//! The toolkit's conformance laws, hostile bytes, and random disks.

use imgtool_core::CreateOptions;
use imgtool_testing::conformance::{self, Content, Fill, Image};
use imgtool_vmdk::VmdkDriver;
use proptest::prelude::*;

use crate::support::{assert_clean, make, open_plainly, options};

#[test]
fn obeys_the_laws() {
    conformance::all(&VmdkDriver, &CreateOptions::default());
}

#[test]
fn obeys_the_laws_with_sparse_images() {
    conformance::all(&VmdkDriver, &options(&[("subformat", "monolithicSparse")]));
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
