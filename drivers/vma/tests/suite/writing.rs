//! The writer: exact header bytes, refusals, and archives read back by other readers.

use imgtool_core::machine::ControllerModel;
use imgtool_core::{
    Attachment, CreateOptions, Device, DeviceId, DeviceKind, Driver, ErrorKind, ImageSink, Machine, Manifest,
    OpenOptions, Output, Result,
};
use imgtool_testing::conformance::{self, Content, Fill, Image, Pipe, new_file};
use imgtool_testing::oracles::SeenDevice;
use imgtool_testing::{fixture, oracles, require, sha256};
use imgtool_vma::layout::{CLUSTERS_PER_EXTENT, VMSTATE_NAME};
use imgtool_vma::{ArchiveHeader, VmaDriver};
use proptest::prelude::*;

use crate::support::{as_file, as_stream, open_file, read};

const CLUSTER: u64 = 65_536;

fn options(pairs: &[(&str, &str)]) -> CreateOptions {
    CreateOptions::parse("vma", VmaDriver.options(), pairs.iter().copied()).unwrap()
}

/// Writes the archive of an image to memory.
fn archive(image: &Image, options: &CreateOptions) -> Vec<u8> {
    let pipe = Pipe::default();
    conformance::write(&VmaDriver, options, image, &pipe.output(), 2).unwrap();
    pipe.bytes()
}

fn small() -> Image {
    Image::disk("small", CLUSTER, Content::zero().with(0..1, Fill::Byte(1)))
        .and_attachment("qemu-server.conf", b"memory: 512\n")
}

/// Creates a sink for an archive of `manifest`, with default options.
fn create_in(output: Output, manifest: &Manifest) -> Result<Box<dyn ImageSink>> {
    conformance::create(&VmaDriver, output, manifest, &CreateOptions::default())
}

fn create(manifest: &Manifest) -> Result<()> {
    create_in(Pipe::default().output(), manifest).map(drop)
}

#[test]
fn header_bytes_match_the_specification() {
    let uuid = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let bytes = archive(&small(), &options(&[("uuid", uuid), ("ctime", "1795341838")]));
    assert_eq!(&bytes[..8], b"VMA\0\0\0\0\x01");
    assert_eq!(&bytes[8..16], &[0x6b, 0xa7, 0xb8, 0x10, 0x9d, 0xad, 0x41, 0xd1]);
    assert_eq!(&bytes[24..32], &1_795_341_838u64.to_be_bytes());
    // Blobs at 12288, 1 + 2 + 17 + 2 + 12 + 2 + 12 bytes long; header padded to 12800.
    assert_eq!(&bytes[48..60], &[0, 0, 0x30, 0, 0, 0, 0, 48, 0, 0, 0x32, 0]);
    assert_eq!(&bytes[2044..2048], &[0, 0, 0, 1]);
    assert_eq!(&bytes[3068..3072], &[0, 0, 0, 20]);
    assert_eq!(&bytes[12_288..12_336], b"\0\x11\0qemu-server.conf\0\x0c\0memory: 512\n\x0c\0drive-scsi0\0");
    assert_eq!(&bytes[4128..4144], &[0, 0, 0, 34, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0]);
    // One extent: one sub-block of cluster 0 of device 1.
    assert_eq!(&bytes[12_800..12_808], b"VMAE\0\0\0\x01");
    assert_eq!(&bytes[12_808..12_816], &bytes[8..16]);
    assert_eq!(&bytes[12_840..12_848], &[0, 1, 0, 1, 0, 0, 0, 0]);
    assert_eq!(bytes.len(), 12_800 + 512 + 4096);
}

#[test]
fn bytes_and_uuid_depend_only_on_the_input() {
    let uuid = |image: &Image, options: &CreateOptions| {
        ArchiveHeader::read(as_file(&archive(image, options))).unwrap().uuid
    };
    let plain = CreateOptions::default();
    assert_eq!(archive(&small(), &plain), archive(&small(), &plain));
    let first = uuid(&small(), &plain);
    assert_eq!((first.get_version_num(), first.get_variant()), (8, uuid::Variant::RFC4122));
    assert_ne!(first, uuid(&small().and_attachment("x", b""), &plain));
    let dated = CreateOptions { source_date_epoch: Some(1), ..CreateOptions::default() };
    assert_ne!(first, uuid(&small(), &dated));
    assert_eq!(ArchiveHeader::read(as_file(&archive(&small(), &dated))).unwrap().ctime, 1);
    assert_eq!(ArchiveHeader::read(as_file(&archive(&small(), &plain))).unwrap().ctime, 315_532_800);
}

#[test]
fn all_zero_disks_take_one_header_per_59_clusters() {
    let image = Image::disk("1 GiB of zeros", 1 << 30, Content::zero());
    let extents = 16_384u64.div_ceil(CLUSTERS_PER_EXTENT as u64);
    assert_eq!(archive(&image, &CreateOptions::default()).len() as u64, 12_800 + 512 * extents);
}

#[test]
fn rounds_sizes_up_to_sectors_with_a_note() {
    let image = Image::disk("odd", 1000, Content::zero().with(0..1000, Fill::Byte(9)));
    let sink = create_in(Pipe::default().output(), &image.manifest()).unwrap();
    assert_eq!(
        sink.notes(),
        ["device drive-scsi0: size rounded up from 1000 to 1024 bytes (whole sectors); the tail is zero"]
    );
    let content =
        read(as_file(&archive(&image, &CreateOptions::default())), &OpenOptions::default()).unwrap();
    assert_eq!(content[&1], [[9; 1000].as_slice(), &[0; 24]].concat());
}

#[test]
fn writes_archives_without_devices() {
    let manifest = Manifest {
        attachments: vec![Attachment { name: "a/b/qemu-server.conf".to_owned(), data: b"x".to_vec() }],
        ..Manifest::default()
    };
    for manifest in [manifest, Manifest::default()] {
        let pipe = Pipe::default();
        let output = pipe.output();
        let sink = create_in(output.clone(), &manifest).unwrap();
        output.write_at(&sink.begin().unwrap(), 0).unwrap();
        sink.finish().unwrap();
        let header = ArchiveHeader::read(as_stream(&pipe.bytes())).unwrap();
        assert_eq!(header.header_size, 12_800);
        assert_eq!(header.configs.len(), manifest.attachments.len());
        assert!(header.configs.iter().all(|config| config.name == "qemu-server.conf"));
        read(as_file(&pipe.bytes()), &OpenOptions::default()).unwrap();
    }
}

#[test]
fn makes_configuration_names_safe_and_unique() {
    let image = small().and_attachment("x/qemu-server.conf", b"2").and_attachment("/etc/../z", b"");
    let header = ArchiveHeader::read(as_file(&archive(&image, &CreateOptions::default()))).unwrap();
    let names: Vec<&str> = header.configs.iter().map(|config| config.name.as_str()).collect();
    assert_eq!(names, ["qemu-server.conf", "qemu-server.conf.2", "z"]);
    for name in ["", ".", "..", "a/", "a/..", "x\ny", "a\\b", "a\0b"] {
        let manifest = small().and_attachment(name, b"").manifest();
        let error = create(&manifest).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage, "{name:?}");
    }
}

#[test]
fn machine_without_a_configuration_gets_one() {
    let image = small();
    let names: Vec<String> = image.manifest().devices.iter().map(|device| device.name.clone()).collect();
    let mut machine = Machine::of_disks("web", ControllerModel::VirtioScsi, names.iter().map(String::as_str));
    machine.memory = Some(3 << 30);
    machine.extra.push("agent: 1".to_owned());
    let written = |manifest: &Manifest| {
        let pipe = Pipe::default();
        let output = pipe.output();
        let sink = create_in(output.clone(), manifest).unwrap();
        output.write_at(&sink.begin().unwrap(), 0).unwrap();
        (ArchiveHeader::read(as_stream(&pipe.bytes())).unwrap(), sink.notes())
    };
    let described = Manifest { machine: Some(Box::new(machine)), ..image.manifest() };
    let own: Vec<Attachment> =
        described.attachments.iter().filter(|config| config.name != "qemu-server.conf").cloned().collect();
    let (header, notes) = written(&Manifest { attachments: own.clone(), ..described.clone() });
    let config = header.configs.iter().find(|config| config.name == "qemu-server.conf").unwrap();
    let text = String::from_utf8(config.data.clone()).unwrap();
    assert!(text.contains("\nmemory: 3072\nname: web\n"), "{text}");
    assert!(text.contains(&format!("#qmdump#map:scsi0:{}:local:raw:\n", names[0])), "{text}");
    assert!(notes.contains(&"qemu-server.conf lacks agent: 1".to_owned()), "{notes:?}");
    // A configuration that comes along stays as it is.
    let mut given = own;
    given.push(Attachment { name: "etc/qemu-server.conf".to_owned(), data: b"memory: 1\n".to_vec() });
    let (header, notes) = written(&Manifest { attachments: given.clone(), ..described });
    assert_eq!(header.configs.len(), given.len());
    assert!(header.configs.iter().any(|config| config.data == b"memory: 1\n"));
    assert!(!notes.iter().any(|note| note.contains("lacks")), "{notes:?}");
}

#[test]
fn refuses_manifests_that_other_readers_reject() {
    let disk =
        |name: &str, size| Manifest { devices: vec![Device::disk(0, name, size)], ..Manifest::default() };
    for (manifest, message) in [
        (disk("", 512), "the device name '' is empty"),
        (disk("a b", 512), "the device name 'a b' has characters other than A-Z a-z 0-9 . _ -"),
        (disk("../x", 512), "the device name '../x' has characters other than A-Z a-z 0-9 . _ -"),
        (disk("ä", 512), "the device name 'ä' has characters other than A-Z a-z 0-9 . _ -"),
        (disk("a", 0), "an archive can't hold a device of 0 bytes"),
        (disk("a", (1 << 48) + 1), "device size 281474976710657 is above 281474976710656"),
        (disk("a", u64::MAX), "device size 18446744073709551615 is above 281474976710656"),
    ] {
        assert_eq!(create(&manifest).unwrap_err().message(), message);
    }
    assert!(create(&disk(&"n".repeat(242), 1 << 48)).is_ok());
    assert!(create(&disk(&"n".repeat(243), 512)).unwrap_err().message().contains("243 bytes long"));
    let twice = Manifest {
        devices: vec![Device::disk(0, "a", 512), Device::disk(1, "a", 512)],
        ..Manifest::default()
    };
    assert_eq!(create(&twice).unwrap_err().message(), "two devices are named 'a'");
    let many = |count: u32| Manifest {
        devices: (0..count).map(|id| Device::disk(id, format!("d{id}"), 512)).collect(),
        ..Manifest::default()
    };
    assert!(create(&many(254)).is_ok());
    assert_eq!(create(&many(255)).unwrap_err().kind(), ErrorKind::LimitExceeded);
    let open_ended = Manifest {
        devices: vec![Device { open_ended: true, ..Device::disk(0, "a", 0) }],
        ..Manifest::default()
    };
    assert_eq!(create(&open_ended).unwrap_err().kind(), ErrorKind::Unsupported);
    let config = |count: usize, len: usize| Manifest {
        attachments: (0..count).map(|n| Attachment { name: format!("c{n}"), data: vec![1; len] }).collect(),
        ..Manifest::default()
    };
    assert!(create(&config(7, 65_535)).is_ok());
    assert_eq!(create(&config(1, 65_536)).unwrap_err().kind(), ErrorKind::LimitExceeded);
    assert_eq!(create(&config(9, 65_535)).unwrap_err().kind(), ErrorKind::LimitExceeded);
    assert!(create(&config(256, 1)).is_ok());
    assert_eq!(create(&config(257, 1)).unwrap_err().kind(), ErrorKind::LimitExceeded);
}

#[test]
fn refuses_to_finish_before_every_cluster_is_written() {
    let sink = create_in(Pipe::default().output(), &small().manifest()).unwrap();
    sink.begin().unwrap();
    let error = sink.finish().unwrap_err();
    assert_eq!(error.message(), "0 of 1 clusters were written: the source was not read in full");
}

/// Returns an image whose first device is guest state.
fn with_state(len: u64, content: Content) -> Image {
    let mut image = Image::disk("with state", len, content);
    let state = &mut image.devices[0].0;
    *state = Device {
        id: DeviceId(0),
        name: VMSTATE_NAME.to_owned(),
        size: len,
        open_ended: false,
        kind: DeviceKind::VmState,
    };
    image.and_disk("drive-scsi0", CLUSTER, Content::zero())
}

/// The reference program drops unstored sub-blocks when it reads guest state, which shifts the rest.
#[test]
fn stores_every_sub_block_of_guest_state() {
    for len in [199_680, 4096, 512, 60 * CLUSTER + 5120] {
        for content in [Content::zero(), Content::zero().with(5000..len.max(5001), Fill::Checker(4096))] {
            let image = with_state(len, content);
            let bytes = archive(&image, &CreateOptions::default());
            let extents = len.div_ceil(59 * CLUSTER);
            let expected = 12_800 + len.next_multiple_of(4096) + extents * 512 + 512;
            assert_eq!(bytes.len() as u64, expected, "{len}");
            let source = VmaDriver.open(as_file(&bytes), &OpenOptions::default()).unwrap();
            assert_eq!(source.info().devices[0].kind, DeviceKind::VmState);
            conformance::assert_content(&source, &image, 512);
            // An archive in a file, where zeros become holes, has the same bytes.
            let dir = tempfile::tempdir().unwrap();
            let path = conformance::make(&VmaDriver, &CreateOptions::default(), &image, dir.path());
            assert!(std::fs::read(path).unwrap() == bytes);
        }
    }
}

#[test]
fn round_trips_fixtures() {
    for name in ["two-disks.vma.lzo", "vmstate.vma.zst", "sparse.vma"] {
        let truth = read(open_file(&fixture(name)), &OpenOptions::default()).unwrap();
        let source = VmaDriver.open(open_file(&fixture(name)), &OpenOptions::default()).unwrap();
        let info = source.info().clone();
        let manifest = Manifest {
            devices: info.devices.clone(),
            attachments: info.attachments.clone(),
            ..Manifest::default()
        };
        let pipe = Pipe::default();
        let sink = create_in(pipe.output(), &manifest).unwrap();
        conformance::fill_sink(&*source, &*sink, 2).unwrap();
        let copy = VmaDriver.open(as_stream(&pipe.bytes()), &OpenOptions::default()).unwrap();
        assert_eq!(copy.info().attachments, info.attachments);
        assert_eq!(copy.info().devices, info.devices);
        assert!(read(as_file(&pipe.bytes()), &OpenOptions::default()).unwrap() == truth, "{name}");
    }
}

#[test]
fn measure_bounds_the_archive_size() {
    for image in conformance::patterns().into_iter().chain([conformance::several_devices()]) {
        let writer = VmaDriver.writer(&CreateOptions::default()).unwrap();
        let measure = writer.measure(&conformance::MemorySource::new(&image)).unwrap();
        let len = archive(&image, &CreateOptions::default()).len() as u64;
        assert!(len <= measure.required && measure.required <= measure.fully_allocated, "{image}");
        // If the source is an archive, the size is exact, because its data is known to the sub-block.
        let bytes = archive(&image, &CreateOptions::default());
        let source = VmaDriver.open(as_file(&bytes), &OpenOptions::default()).unwrap();
        assert_eq!(writer.measure(&*source).unwrap().required, len, "{image}");
    }
}

#[test]
fn dissect_reads_written_archives() {
    require!("dissect");
    let unit = 65_536;
    let several = conformance::several_devices()
        .and_disk("drive-efidisk0", 540_672, Content::zero().with(0..540_672, Fill::Checker(4096)))
        .and_disk(
            "drive-big",
            131 * unit + 512,
            Content::zero().with(60 * unit..131 * unit + 512, Fill::Text),
        );
    let state = with_state(199_680, Content::zero().with(8192..100_000, Fill::Random));
    let dir = tempfile::tempdir().unwrap();
    for (number, image) in [several, state, conformance::far_apart(), small()].iter().enumerate() {
        let path = dir.path().join(number.to_string());
        conformance::write(&VmaDriver, &CreateOptions::default(), image, &new_file(&path), 2).unwrap();
        let seen = oracles::dissect_vma(&[&path]).remove(0);
        let configs =
            image.attachments.iter().map(|config| (config.name.clone(), sha256(&config.data))).collect();
        assert_eq!(seen.configs, configs, "{image}");
        let mut expected = Vec::new();
        for (device, content) in &image.devices {
            let mut bytes = vec![0; device.size as usize];
            content.read(&mut bytes, 0);
            expected.push(SeenDevice {
                id: device.id.0 + 1,
                name: device.name.clone(),
                size: device.size,
                sha256: sha256(&bytes),
            });
        }
        assert_eq!(seen.devices, expected, "{image}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn round_trips_any_content_of_any_sizes(
        sizes in prop::collection::vec(1u64..300_000, 1..5),
        areas in prop::collection::vec((0usize..4, 0u64..300_000, 1u64..80_000, 0usize..4), 0..12),
    ) {
        let fills = [Fill::Random, Fill::Text, Fill::Checker(4096), Fill::Byte(0xff)];
        let mut contents = vec![Vec::new(); sizes.len()];
        for (device, start, len, fill) in areas {
            let device = device % sizes.len();
            contents[device].push((start..(start + len).min(sizes[device]), fills[fill]));
        }
        let mut image: Option<Image> = None;
        for (number, (size, mut areas)) in sizes.iter().zip(contents).enumerate() {
            areas.retain(|(area, _)| area.start < area.end);
            areas.sort_by_key(|(area, _)| area.start);
            let mut content = Content::zero();
            let mut from = 0;
            for (area, fill) in areas {
                if area.start >= from {
                    from = area.end;
                    content = content.with(area, fill);
                }
            }
            image = Some(match image {
                None => Image::disk("any", *size, content),
                Some(image) => image.and_disk(&format!("disk{number}"), *size, content),
            });
        }
        let image = image.unwrap();
        let bytes = archive(&image, &CreateOptions::default());
        for input in [as_file(&bytes), as_stream(&bytes)] {
            let source = VmaDriver.open(input, &OpenOptions::default()).unwrap();
            conformance::assert_content(&source, &image, 512);
        }
    }
}
