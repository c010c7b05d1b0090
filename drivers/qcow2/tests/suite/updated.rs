//! Content written into images that exist: what qemu-img made is kept, whenever the writer is interrupted.

use imgtool_core::{Compress, CreateOptions, Driver, ErrorKind, OpenOptions};
use imgtool_qcow2::Qcow2Driver;
use imgtool_testing::conformance::scratch;
use imgtool_testing::images::{noise, prose};
use imgtool_testing::journal::{Journal, is_old_or_new, overwritten};
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::{crafted, memory, require};

/// Size in bytes of the images.
const SIZE: usize = 3 << 20;

/// Options of images with every kind of table.
const OPTIONS: [&str; 8] = [
    "",
    "cluster_size=512,refcount_bits=64",
    "cluster_size=4k,compat=0.10",
    "cluster_size=16k,extended_l2=on",
    "cluster_size=2M",
    "refcount_bits=8",
    "preallocation=metadata",
    "lazy_refcounts=on,compression_type=zstd",
];

/// Makes an image with data, zeros, compressed clusters, a snapshot, and changes after it.
fn scribbled(options: &str) -> Vec<u8> {
    let directory = scratch();
    let path = directory.path();
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    create.extend([options].iter().filter(|text| !text.is_empty()).flat_map(|text| ["-o", text]));
    let size = SIZE.to_string();
    create.extend(["x", &size]);
    run_in("qemu-img", path, &create);
    if !options.contains("preallocation") {
        run_in("qemu-io", path, &["-c", "write -c -P 7 2M 1M", "x"]);
    }
    let writes = ["write -P 1 0 300k", "write -P 2 1M 70k", "write -z 1100k 200k", "write -P 3 1500k 4k"];
    let after = ["write -P 4 100k 100k", "discard 1500k 100k", "write -P 5 1200k 13k"];
    let io = |commands: &[&str]| {
        let args: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).chain(["x"]).collect();
        run_in("qemu-io", path, &args);
    };
    io(&writes);
    run_in("qemu-img", path, &["snapshot", "-c", "before", "x"]);
    io(&after);
    std::fs::read(path.join("x")).unwrap()
}

/// Returns `len` bytes: noise, zeros, noise, and zeros again, in pieces that no cluster size divides.
fn new_content(len: usize) -> Vec<u8> {
    let mut bytes = noise(9, len);
    for start in (150_000..len).step_by(500_000) {
        let end = (start + 290_000).min(len);
        bytes[start..end].fill(0);
    }
    bytes
}

fn content_of(image: &[u8], snapshot: Option<&str>) -> Vec<u8> {
    let options = OpenOptions { snapshot: snapshot.map(Into::into), ..OpenOptions::default() };
    crafted::content(&Qcow2Driver.open(memory::as_file("image", image), &options).unwrap()).unwrap()
}

#[test]
fn qemu_finds_the_new_content_and_no_fault() {
    require!("qemu-img", "qemu-io");
    for options in OPTIONS {
        let image = scribbled(options);
        let (old, snapshot) = (content_of(&image, None), content_of(&image, Some("before")));
        for len in [SIZE, SIZE - 700_000, 131_072, 512] {
            for zeros_stored in [false, true] {
                if zeros_stored && len != SIZE - 700_000 {
                    continue;
                }
                let journal = Journal::new(image.clone());
                let sparse_granularity = zeros_stored.then_some(0);
                let create = CreateOptions { sparse_granularity, ..CreateOptions::default() };
                let new = new_content(len);
                journal.write(&Qcow2Driver, &create, &new).unwrap();
                let directory = scratch();
                std::fs::write(directory.path().join("x"), journal.now()).unwrap();
                let what = format!("{options}, {len} bytes, zeros stored: {zeros_stored}");
                let (status, output, errors) =
                    try_run_in("qemu-img", directory.path(), &["check", "-f", "qcow2", "x"]);
                assert_eq!(status, 0, "{what}: {output}{errors}");
                let expected = overwritten(&old, &new);
                assert!(crafted::qemu_content(&journal.now(), "qcow2") == expected, "{what}");
                run_in("qemu-img", directory.path(), &["snapshot", "-a", "before", "x"]);
                let reverted = std::fs::read(directory.path().join("x")).unwrap();
                assert!(crafted::qemu_content(&reverted, "qcow2") == snapshot, "{what}: the snapshot");
            }
        }
    }
}

/// Asserts that an image left by an interrupted writer is sound: its tables, the snapshot, the part that is
/// not written, and each sector of the rest.
fn assert_sound(image: &[u8], old: &[u8], new: &[u8], snapshot: &[u8], what: &str) {
    let report = crafted::check(&Qcow2Driver, image);
    assert_eq!((report.corruptions, report.check_errors), (0, 0), "{what}: {:?}", report.findings);
    assert!(is_old_or_new(&content_of(image, None), old, new), "{what}: the content");
    assert!(content_of(image, Some("before")) == snapshot, "{what}: the snapshot");
}

#[test]
fn every_write_leaves_a_sound_image() {
    require!("qemu-img", "qemu-io");
    for options in OPTIONS {
        let image = scribbled(options);
        let (old, snapshot) = (content_of(&image, None), content_of(&image, Some("before")));
        let len = 1_300_000;
        let journal = Journal::new(image);
        let new = new_content(len);
        journal.write(&Qcow2Driver, &CreateOptions::default(), &new).unwrap();
        let new = overwritten(&old, &new);
        let mut count = 0;
        journal.each_prefix(|image| {
            assert_sound(image, &old, &new, &snapshot, &format!("{options}, {count} writes"));
            count += 1;
        });
        // With clusters of 2 MiB, the only write is that of the data.
        assert!(count > 4 || options.contains("2M"), "{options}: {count} writes");
        journal.each_crash(3, 12, |image| {
            assert_sound(image, &old, &new, &snapshot, &format!("{options}, a crash"));
        });
        assert!(content_of(&journal.now(), None) == new, "{options}");
    }
}

fn compressing() -> CreateOptions {
    CreateOptions { compress: Some(Compress { algorithm: None, level: None }), ..CreateOptions::default() }
}

/// Text that compresses, between noise that does not.
fn compressible(len: usize) -> Vec<u8> {
    let mut bytes = new_content(len);
    for start in (0..len).step_by(400_000) {
        let end = (start + 200_000).min(len);
        bytes[start..end].copy_from_slice(&prose(3, end - start));
    }
    bytes
}

#[test]
fn every_write_of_compressed_clusters_leaves_a_sound_image() {
    require!("qemu-img", "qemu-io");
    for options in [OPTIONS[0], OPTIONS[1], OPTIONS[2], OPTIONS[3], OPTIONS[7]] {
        let image = scribbled(options);
        let (old, snapshot) = (content_of(&image, None), content_of(&image, Some("before")));
        let len = 1_300_000;
        let journal = Journal::new(image);
        let new = compressible(len);
        journal.write(&Qcow2Driver, &compressing(), &new).unwrap();
        let new = overwritten(&old, &new);
        let mut count = 0;
        journal.each_prefix(|image| {
            assert_sound(image, &old, &new, &snapshot, &format!("{options}, {count} writes"));
            count += 1;
        });
        journal.each_crash(3, 12, |image| {
            assert_sound(image, &old, &new, &snapshot, &format!("{options}, a crash"));
        });
        assert_eq!(crafted::faults(&Qcow2Driver, &journal.now()), (0, 0), "{options}");
        assert!(crafted::qemu_content(&journal.now(), "qcow2") == new, "{options}");
        // Once more: compressed clusters are replaced by others, and their space becomes free again.
        let mut sizes = Vec::new();
        for _ in 0..6 {
            journal.write(&Qcow2Driver, &compressing(), &new).unwrap();
            assert_eq!(crafted::faults(&Qcow2Driver, &journal.now()), (0, 0), "{options}");
            sizes.push(journal.now().len());
        }
        assert!(sizes[5] <= sizes[1] / 8 * 9, "{options}: a file that only grows: {sizes:?}");
    }
}

#[test]
fn qemu_finds_no_corruption_after_any_write() {
    require!("qemu-img", "qemu-io");
    let journal = Journal::new(scribbled("cluster_size=16k,extended_l2=on"));
    journal.write(&Qcow2Driver, &CreateOptions::default(), &new_content(900_000)).unwrap();
    let directory = scratch();
    journal.each_prefix(|image| {
        std::fs::write(directory.path().join("x"), image).unwrap();
        let (status, output, errors) =
            try_run_in("qemu-img", directory.path(), &["check", "-f", "qcow2", "x"]);
        // 3: only leaked clusters.
        assert!(status == 0 || status == 3, "{output}{errors}");
    });
}

#[test]
fn what_is_replaced_becomes_free_again() {
    require!("qemu-img", "qemu-io");
    let journal = Journal::new(scribbled("cluster_size=4k"));
    let mut sizes = Vec::new();
    for _ in 0..4 {
        journal.write(&Qcow2Driver, &CreateOptions::default(), &new_content(SIZE)).unwrap();
        assert_eq!(crafted::faults(&Qcow2Driver, &journal.now()), (0, 0));
        sizes.push(journal.now().len());
    }
    assert_eq!(sizes[1], sizes[3], "a file that only grows: {sizes:?}");
}

#[test]
fn the_refcount_table_moves_when_it_is_full() {
    require!("qemu-img");
    let directory = scratch();
    // A table of one cluster has 64 entries, each for 64 clusters of 512 bytes: 2 MiB.
    let args = ["create", "-q", "-f", "qcow2", "-o", "cluster_size=512,refcount_bits=64", "x", "12M"];
    run_in("qemu-img", directory.path(), &args);
    let image = std::fs::read(directory.path().join("x")).unwrap();
    let table = |image: &[u8]| image[48..60].to_vec();
    let journal = Journal::new(image.clone());
    let disk = noise(4, 12 << 20);
    journal.write(&Qcow2Driver, &CreateOptions::default(), &disk).unwrap();
    assert_ne!(table(&journal.now()), table(&image));
    assert_eq!(crafted::faults(&Qcow2Driver, &journal.now()), (0, 0));
    assert!(crafted::qemu_content(&journal.now(), "qcow2") == disk);
    let empty = vec![0; 12 << 20];
    let mut seen = 0u64;
    journal.each_crash(8, 2, |image| {
        let report = crafted::check(&Qcow2Driver, image);
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
        assert!(is_old_or_new(&content_of(image, None), &empty, &disk));
        seen += 1;
    });
    assert!(seen >= 8);
}

#[test]
fn refuses_what_it_can_not_keep() {
    require!("qemu-img", "qemu-io");
    let image = scribbled("");
    let refusal = |image: &[u8], size: usize| {
        let journal = Journal::new(image.to_vec());
        let error =
            journal.update(&Qcow2Driver, &CreateOptions::default(), size as u64).map(|_| ()).unwrap_err();
        assert!(journal.now() == image, "refused, but changed");
        error
    };
    assert_eq!(refusal(&image, SIZE + 512).kind(), ErrorKind::Refused);
    let mut dirty = image.clone();
    dirty[79] |= 1;
    assert_eq!(refusal(&dirty, SIZE).kind(), ErrorKind::Refused);
    let mut corrupt = image.clone();
    corrupt[79] |= 2;
    assert_eq!(refusal(&corrupt, SIZE).kind(), ErrorKind::Refused);
    // A refcount of 0 for the cluster of the header.
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize;
    let mut uncounted = image.clone();
    uncounted[block..block + 2].fill(0);
    assert!(refusal(&uncounted, SIZE).message().contains("damaged"));
    assert_eq!(refusal(&[0; 4096], 512).kind(), ErrorKind::WrongFormat);
}

#[test]
fn bitmaps_mark_the_whole_disk() {
    require!("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo");
    let directory = scratch();
    let path = directory.path();
    run_in("qemu-img", path, &["create", "-q", "-f", "qcow2", "x", "3M"]);
    for bitmap in ["tracking", "frozen"] {
        run_in("qemu-img", path, &["bitmap", "--add", "-g", "64k", "x", bitmap]);
    }
    run_in("qemu-io", path, &["-c", "write -P 3 1M 64k", "x"]);
    run_in("qemu-img", path, &["bitmap", "--disable", "x", "frozen"]);
    let journal = Journal::new(std::fs::read(path.join("x")).unwrap());
    journal.write(&Qcow2Driver, &CreateOptions::default(), &noise(1, 100_000)).unwrap();
    journal.each_prefix(|image| {
        let report = crafted::check(&Qcow2Driver, image);
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{:?}", report.findings);
    });
    std::fs::write(path.join("x"), journal.now()).unwrap();
    run_in("qemu-img", path, &["check", "-f", "qcow2", "x"]);
    let dirty = |bitmap: &str| {
        let serve = format!(
            "qemu-nbd -r -f qcow2 -k $PWD/s -B {bitmap} --fork --pid-file p x && \
             nbdinfo --map=qemu:dirty-bitmap:{bitmap} 'nbd+unix:///?socket=s' | grep -w dirty; kill $(cat p)"
        );
        let map = run_in("sh", path, &["-c", &serve]);
        map.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(dirty("tracking"), ["0", "3145728"]);
    assert_eq!(dirty("frozen"), ["1048576", "65536"]);
}
