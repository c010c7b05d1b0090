//! The toolkit's conformance laws on raw images, and the refusals of the raw sink.

use imgtool_raw::RawDriver;
use imgtool_toolkit::conformance;
use imgtool_toolkit::{CreateOptions, Device, Driver, ErrorKind, Manifest, Output};

/// Creation options from `-o` pairs.
fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions {
        options: pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..CreateOptions::default()
    }
}

#[test]
fn keeps_the_laws() {
    conformance::all(&RawDriver, &CreateOptions::default());
}

#[test]
fn keeps_content_with_every_preallocation() {
    for kind in ["off", "falloc", "full"] {
        conformance::round_trip(
            &RawDriver,
            &options(&[("preallocation", kind)]),
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
    let output = Output::from_existing(&path, file, false).expect("existing");
    let manifest = Manifest { devices: vec![Device::disk(0, "d", 1001)], attachments: Vec::new() };
    let error = RawDriver.create(output, &manifest, &CreateOptions::default()).err().expect("too small");
    assert!(error.to_string().contains("1000") && error.to_string().contains("1001"), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), [0xaa; 1000]);
}

#[test]
fn refuses_unknown_option_values() {
    let dir = conformance::scratch();
    let output = conformance::new_file(&dir.path().join("x"));
    let manifest = Manifest { devices: vec![Device::disk(0, "d", 1)], attachments: Vec::new() };
    let error = RawDriver.create(output, &manifest, &options(&[("preallocation", "metadata")])).err();
    assert_eq!(error.expect("refused").kind(), ErrorKind::Usage);
}
