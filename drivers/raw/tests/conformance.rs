//! The toolkit's conformance laws on raw images, and the refusals of the raw sink.

use imgtool_core::{CreateOptions, Device, Driver, ErrorKind, Manifest, OpenOptions, Result};
use imgtool_raw::RawDriver;
use imgtool_testing::{conformance, crafted, memory};

/// Returns creation options from pairs of name and value.
fn options(pairs: &[(&str, &str)]) -> Result<CreateOptions> {
    CreateOptions::parse("raw", RawDriver.options(), pairs.iter().copied())
}

#[test]
fn obeys_the_laws() {
    conformance::all(&RawDriver, &CreateOptions::default());
}

#[test]
fn keeps_content_with_every_preallocation() {
    for kind in ["off", "falloc", "full"] {
        conformance::round_trip(
            &RawDriver,
            &options(&[("preallocation", kind)]).expect("valid"),
            &conformance::mixed_image(),
        );
    }
}

#[test]
fn keeps_content_with_every_sparse_granularity() {
    for granularity in [0, 512, 4096, 65_536, 1 << 30] {
        let options = CreateOptions { sparse_granularity: Some(granularity), ..CreateOptions::default() };
        conformance::round_trip(&RawDriver, &options, &conformance::mixed_image());
    }
}

#[test]
fn refuses_a_small_output_before_writing() {
    let dir = conformance::scratch();
    let path = dir.path().join("small");
    std::fs::write(&path, [0xaa; 1000]).expect("write");
    let file = std::fs::File::options().read(true).write(true).open(&path).expect("open");
    let output = imgtool_storage::file::existing(&*path, file, false).expect("existing");
    let manifest = Manifest { devices: vec![Device::disk(0, "d", 1001)], ..Manifest::default() };
    let created = conformance::create(&RawDriver, output, &manifest, &CreateOptions::default());
    let error = created.expect_err("too small");
    assert!(error.to_string().contains("1000") && error.to_string().contains("1001"), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), [0xaa; 1000]);
}

#[test]
fn refuses_unknown_option_values() {
    let error = options(&[("preallocation", "metadata")]).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn salvage_loses_only_the_page_that_cannot_be_read() {
    let disk = vec![0xaa; 100_000];
    let open = |salvage| {
        let options = OpenOptions { salvage, ..OpenOptions::default() };
        RawDriver.open(memory::unreadable_at("disk.raw", &disk, 50_000), &options).expect("open")
    };
    assert_eq!(crafted::content(&open(false)).expect_err("unreadable").kind(), ErrorKind::Io);
    let source = open(true);
    let restored = crafted::content(&source).expect("salvaged");
    let losses = source.losses();
    assert_eq!((losses.len(), losses[0].guest.clone()), (1, 49_152..53_248));
    for (at, byte) in restored.into_iter().enumerate() {
        assert_eq!(byte, if losses[0].guest.contains(&(at as u64)) { 0 } else { 0xaa }, "{at}");
    }
}
