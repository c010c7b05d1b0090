//! Our images, read by independent libraries, and round trips over random content.

use imgtool_qcow2::Qcow2Driver;
use imgtool_toolkit::conformance::{self as laws, Content, Fill, Image};
use proptest::prelude::*;

use crate::tools::options;

const MIB: u64 = 1 << 20;

fn sets() -> impl Strategy<Value = String> {
    let shape = prop_oneof![
        Just("cluster_size=512"),
        Just("cluster_size=4k"),
        Just("cluster_size=64k"),
        Just("cluster_size=2M"),
        Just("extended_l2=on,cluster_size=16k"),
    ];
    let kind = prop_oneof![
        Just(""),
        Just(",compress"),
        Just(",compress,compression_type=zstd"),
        Just(",preallocation=metadata"),
    ];
    (shape, kind, 0u32..7)
        .prop_map(|(shape, kind, order)| format!("{shape}{kind},refcount_bits={}", 1 << order))
}

fn images() -> impl Strategy<Value = Image> {
    let areas = proptest::collection::vec((0u64..300_000, 1u64..200_000, 0u8..4), 0..12);
    (areas, 0u64..700_000).prop_map(|(areas, tail)| {
        let (mut content, mut at) = (Content::zero(), 0);
        for (gap, len, fill) in areas {
            let fill = match fill {
                0 => Fill::Random,
                1 => Fill::Text,
                2 => Fill::Byte(0xee),
                _ => Fill::Checker(4096),
            };
            content = content.with(at + gap..at + gap + len, fill);
            at += gap + len;
        }
        Image::disk("random areas", at + tail, content)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read_and_clean(image in images(), set in sets()) {
        laws::round_trip(&Qcow2Driver, &options(&set), &image);
    }
}

fn sample() -> Image {
    let content = Content::zero()
        .with(0..200_000, Fill::Text)
        .with(3 * MIB..4 * MIB, Fill::Checker(4096))
        .with(600 * MIB..600 * MIB + 70_000, Fill::Random);
    Image::disk("sample", 700 * MIB, content)
}
