//! The toolkit's conformance laws, hostile bytes, and random disks.

use imgtool_core::CreateOptions;
use imgtool_testing::conformance;
use imgtool_vhdx::VhdxDriver;
use proptest::prelude::*;

use crate::support::builder::{
    BAT_AT, Change, HEADERS_AT, LOG_AT, LogEntry, METADATA_AT, REGIONS_AT, VhdxBuilder,
};
use crate::support::{MIB, check_file, options};

#[test]
fn obeys_the_laws() {
    conformance::all(&VhdxDriver, &CreateOptions::default());
}

#[test]
fn obeys_the_laws_with_small_blocks() {
    conformance::all(&VhdxDriver, &options(&[("block_size", "1M")]));
}

#[test]
fn obeys_the_laws_with_fixed_files() {
    conformance::all(&VhdxDriver, &options(&[("subformat", "fixed"), ("block_size", "2M")]));
}

/// Corrects all checksums of the file that [`hostile_bytes_do_not_panic`] builds.
fn repair(bytes: &mut [u8]) {
    let sealed = HEADERS_AT.map(|at| (at, 4096)).into_iter().chain(REGIONS_AT.map(|at| (at, 65_536)));
    for (at, len) in sealed.chain([(LOG_AT as usize, 8192)]) {
        bytes[at + 4..at + 8].fill(0);
        let crc = crc32c::crc32c(&bytes[at..at + len]);
        bytes[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
    }
}

#[test]
fn hostile_bytes_do_not_panic() {
    let entry = LogEntry::new(
        5,
        0,
        vec![
            Change::Page { at: 4 * MIB, bytes: vec![7; 4096] },
            Change::Zero { at: 4 * MIB + 8192, len: 4096 },
        ],
    );
    let vhdx = VhdxBuilder::new(2 * MIB, MIB, 512)
        .bat(0, 4 * MIB, 6)
        .fill(4 * MIB, MIB, 1)
        .log_entry(0, &entry.bytes());
    let place = |at: u64, len: usize| at as usize..at as usize + len;
    let places = vec![
        HEADERS_AT[1] + 48..HEADERS_AT[1] + 80,
        REGIONS_AT[0] + 8..REGIONS_AT[0] + 56,
        place(LOG_AT + 8, 96),
        place(METADATA_AT + 8, 64),
        place(METADATA_AT + 65_536, 40),
        place(BAT_AT, 16),
    ];
    let hostile = conformance::Hostile { image: &vhdx.bytes, places, repair: &repair };
    conformance::hostile_bytes_do_not_panic(&VhdxDriver, &hostile);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_disk_round_trips(
        sectors in 1u64..20_000,
        areas in prop::collection::vec((0u64..10_000_000, 1u64..300_000), 0..12),
        block in prop::sample::select(vec!["1M", "2M", "8M"]),
        subformat in prop::sample::select(vec!["dynamic", "fixed"]),
        logical in prop::sample::select(vec!["512", "4096"]),
        ragged in 0u64..512,
    ) {
        let size = sectors * 512 + ragged;
        let mut content = conformance::Content::zero();
        let mut starts: Vec<(u64, u64)> = areas.into_iter().map(|(start, len)| (start % size, len)).collect();
        starts.sort_unstable();
        let mut at = 0;
        for (start, len) in starts {
            let (start, end) = (start.max(at), (start + len).min(size));
            if start < end {
                content = content.with(start..end, conformance::Fill::Random);
                at = end;
            }
        }
        let image = conformance::Image::disk("proptest", size, content);
        let options = options(&[("block_size", block), ("subformat", subformat), ("logical_sector_size", logical)]);
        let directory = conformance::scratch();
        let path = conformance::make(&VhdxDriver, &options, &image, directory.path());
        let source = conformance::open(&VhdxDriver, &path).unwrap();
        let multiple = logical.parse().unwrap();
        prop_assert_eq!(conformance::compare(&source, &image, multiple), Ok(()));
        let report = check_file(&path);
        prop_assert_eq!(report.corruptions, 0, "{:?}", report.findings);
    }
}
