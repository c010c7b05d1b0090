//! The toolkit's conformance laws, applied to the driver.

use imgtool_core::CreateOptions;
use imgtool_testing::conformance::{self, Content, Fill, Hostile, Image};
use imgtool_vma::VmaDriver;
use imgtool_vma::layout::{EXTENT_HEADER, extent_md5, header_md5};

#[test]
fn the_laws_hold() {
    conformance::all(&VmaDriver, &CreateOptions::default());
}

#[test]
fn round_trips_many_clusters_of_three_devices() {
    let unit = 65_536;
    let image =
        Image::disk("70 clusters", 70 * unit, Content::zero().with(0..70 * unit, Fill::Checker(4096)))
            .and_disk(
                "drive-scsi1",
                131 * unit + 4608,
                Content::zero().with(0..131 * unit + 4608, Fill::Random),
            )
            .and_disk("drive-scsi2", 60 * unit + 512, Content::zero())
            .and_attachment("qemu-server.conf", b"name: test\n");
    conformance::round_trip(&VmaDriver, &CreateOptions::default(), &image);
    conformance::sequential_equals_random(&VmaDriver, &CreateOptions::default(), &image);
    conformance::same_bytes_for_any_thread_count(&VmaDriver, &CreateOptions::default(), &image);
}

#[test]
fn hostile_bytes_do_not_panic() {
    let content = Content::zero().with(0..8192, Fill::Random);
    let image = Image::disk("small", 70_144, content).and_attachment("a", b"x");
    let archive = conformance::make_bytes(&VmaDriver, &CreateOptions::default(), &image);
    let extent = 12_800;
    let places = vec![
        // Magic number, version, sizes.
        0..60,
        // First entries of the configuration and device tables.
        2044..2052,
        3068..3076,
        4096..4192,
        // Blobs.
        12_288..12_336,
        // Extent header with its first slots.
        extent..extent + 64,
    ];
    let without_repair = Hostile { image: &archive, places: places.clone(), repair: &|_| () };
    conformance::hostile_bytes_do_not_panic(&VmaDriver, &without_repair);
    let repair = |bytes: &mut [u8]| {
        let header_size = u32::from_be_bytes(bytes[56..60].try_into().unwrap()) as usize;
        if (12_288..=bytes.len()).contains(&header_size) {
            let md5 = header_md5(&bytes[..header_size]);
            bytes[32..48].copy_from_slice(&md5);
        }
        let header: &mut [u8; EXTENT_HEADER] =
            (&mut bytes[extent..extent + EXTENT_HEADER]).try_into().unwrap();
        let md5 = extent_md5(header);
        header[24..40].copy_from_slice(&md5);
    };
    let repaired = Hostile { image: &archive, places, repair: &repair };
    conformance::hostile_bytes_do_not_panic(&VmaDriver, &repaired);
}
