//! Images made by qemu-img and qemu-io, read by this driver.

use std::path::Path;

use imgtool_core::{CreateOptions, ErrorKind, OpenOptions};
use imgtool_qcow2::Qcow2Driver;
use imgtool_raw::RawDriver;
use imgtool_testing::conformance::{self as laws, scratch};
use imgtool_testing::oracles::{run_in, try_run_in};
use imgtool_testing::require;

use crate::tools::{convert, open_options};

/// Asserts that this driver and qemu-img convert `image` to the same raw file.
#[track_caller]
fn assert_same_content(directory: &Path, image: &str) {
    assert_same_snapshot(directory, image, None);
}

#[track_caller]
fn assert_same_snapshot(directory: &Path, image: &str, snapshot: Option<&str>) {
    let theirs = directory.join("theirs.raw");
    let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
    args.extend(snapshot.iter().flat_map(|name| ["-l", name]));
    args.extend([image, "theirs.raw"]);
    run_in("qemu-img", directory, &args);
    for threads in [1, 3] {
        let options = OpenOptions { snapshot: snapshot.map(Into::into), ..open_options() };
        let ours = convert(
            (&Qcow2Driver, &directory.join(image), &options),
            (&RawDriver, &directory.join("ours.raw"), &CreateOptions::default()),
            threads,
        )
        .unwrap();
        if std::fs::metadata(&ours).unwrap().len() > 64 << 20 {
            // Mostly holes, which qemu-img compare skips.
            run_in("qemu-img", directory, &["compare", "-f", "raw", "-F", "raw", "ours.raw", "theirs.raw"]);
            continue;
        }
        let (mut theirs, ours) = (std::fs::read(&theirs).unwrap(), std::fs::read(ours).unwrap());
        if snapshot.is_some() && theirs.len() > ours.len() {
            // qemu-img uses the size of the active state, this driver the size of the snapshot.
            assert!(theirs.drain(ours.len()..).all(|byte| byte == 0));
        }
        assert_eq!(theirs.len(), ours.len());
        let differs = theirs.iter().zip(&ours).position(|(a, b)| a != b);
        assert_eq!(differs, None, "{image} snapshot {snapshot:?}");
    }
}

/// Fills an image of 8 MiB with all kinds of clusters; with zero clusters if `v3` is set.
fn scribble(directory: &Path, image: &str, compressed: bool, v3: bool) {
    let text: Vec<u8> =
        (0..9_000u32).flat_map(|i| format!("line {} of the text\n", i * i % 1009).into_bytes()).collect();
    std::fs::write(directory.join("text"), text).unwrap();
    let mut commands = Vec::new();
    if compressed {
        // Compressed writes need unallocated clusters.
        commands.extend(["write -c -P 77 4M 2M", "write -c -s text 6M 2M"]);
    }
    commands.extend([
        "write -P 1 0 70k",
        "write -P 2 300000 1234",
        "write -P 3 1M 512",
        "write -s text 2M 2M",
        "write -P 5 3140000 5",
        "write -z 2200k 300k",
        "discard 2600k 200k",
        "write -P 78 6300k 9k",
    ]);
    if v3 {
        commands.extend(["write -z -u 2900k 64k", "write -z 500k 100k"]);
    }
    commands.push("write -P 9 7167k 1k");
    let mut args: Vec<&str> = Vec::new();
    for command in commands {
        args.extend(["-c", command]);
    }
    args.extend(["-f", "qcow2", image]);
    let (code, out, err) = try_run_in("qemu-io", directory, &args);
    assert_eq!(code, 0, "{out}{err}");
}

fn create(directory: &Path, image: &str, options: &str, size: &str) {
    run_in("qemu-img", directory, &["create", "-q", "-f", "qcow2", "-o", options, image, size]);
}

#[test]
fn reads_every_version_cluster_size_refcount_and_compression() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for cluster in ["512", "4k", "64k", "2M"] {
        for compat in ["0.10", "1.1"] {
            let widths: &[u32] = match (compat, cluster) {
                ("0.10", _) => &[16],
                (_, "512" | "64k") => &[1, 2, 4, 8, 16, 32, 64],
                _ => &[1, 16, 64],
            };
            for width in widths {
                for compression in ["zlib", "zstd"] {
                    if compression == "zstd" && (compat == "0.10" || ![1, 16].contains(width)) {
                        continue;
                    }
                    let set = format!(
                        "compat={compat},cluster_size={cluster},refcount_bits={width},compression_type={compression}"
                    );
                    create(directory.path(), "x", &set, "8M");
                    scribble(directory.path(), "x", true, compat == "1.1");
                    println!("{set}");
                    assert_same_content(directory.path(), "x");
                }
            }
        }
    }
}

#[test]
fn reads_subclusters() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for cluster in ["16k", "64k", "2M"] {
        for compressed in [false, true] {
            create(directory.path(), "base", "cluster_size=4k", "7M");
            scribble(directory.path(), "base", false, true);
            let set = format!("extended_l2=on,cluster_size={cluster},backing_file=base,backing_fmt=qcow2");
            create(directory.path(), "x", &set, "8M");
            scribble(directory.path(), "x", compressed, true);
            assert_same_content(directory.path(), "x");
        }
    }
    create(directory.path(), "x", "extended_l2=on,preallocation=metadata", "8M");
    scribble(directory.path(), "x", false, true);
    assert_same_content(directory.path(), "x");
}

#[test]
fn reads_backing_chains() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    // A chain of three images with different cluster sizes, over a raw image that is shorter and of odd size.
    std::fs::write(directory.path().join("bottom"), vec![0xb0; 3_000_321]).unwrap();
    create(directory.path(), "one", "cluster_size=2M,backing_file=bottom,backing_fmt=raw", "8M");
    scribble(directory.path(), "one", true, true);
    create(directory.path(), "two", "compat=0.10,cluster_size=4k,backing_file=one,backing_fmt=qcow2", "9M");
    run_in("qemu-io", directory.path(), &["-c", "write -P 7 5M 300k", "-c", "write -P 8 600k 10k", "two"]);
    create(directory.path(), "three", "cluster_size=64k,backing_file=two,backing_fmt=qcow2", "12M");
    run_in("qemu-io", directory.path(), &["-c", "write -z 5100k 100k", "-c", "write -P 8 11M 10k", "three"]);
    for image in ["one", "two", "three"] {
        assert_same_content(directory.path(), image);
    }
    // Without permission the driver opens nothing, and the error names the backing file.
    let error = laws::open(&Qcow2Driver, &directory.path().join("three")).err().unwrap();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(error.to_string().contains("backing file 'two'"), "{error}");
    // A loop is an error.
    run_in("qemu-img", directory.path(), &["rebase", "-u", "-b", "three", "-F", "qcow2", "one"]);
    assert!(laws::open_with(&Qcow2Driver, &directory.path().join("three"), &open_options()).is_err());
}

#[test]
fn reads_data_files() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for set in [
        "data_file=d",
        "data_file=d,data_file_raw=on",
        "data_file=d,extended_l2=on",
        "data_file=d,cluster_size=2M",
    ] {
        create(directory.path(), "x", set, "8M");
        scribble(directory.path(), "x", false, true);
        assert_same_content(directory.path(), "x");
        let error = laws::open(&Qcow2Driver, &directory.path().join("x")).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().contains("data file 'd'"), "{error}");
        std::fs::remove_file(directory.path().join("d")).unwrap();
    }
}

#[test]
fn reads_snapshots() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for set in ["compat=0.10", "cluster_size=512", "extended_l2=on"] {
        create(directory.path(), "x", set, "8M");
        run_in("qemu-img", directory.path(), &["snapshot", "-c", "empty", "x"]);
        scribble(directory.path(), "x", true, set != "compat=0.10");
        run_in("qemu-img", directory.path(), &["snapshot", "-c", "first state", "x"]);
        run_in("qemu-io", directory.path(), &["-c", "write -P 100 0 8M", "x"]);
        run_in("qemu-img", directory.path(), &["snapshot", "-c", "zwei", "x"]);
        if set != "compat=0.10" {
            run_in("qemu-img", directory.path(), &["resize", "-q", "x", "10M"]);
        }
        for snapshot in [None, Some("empty"), Some("first state"), Some("3"), Some("zwei")] {
            assert_same_snapshot(directory.path(), "x", snapshot);
        }
        let options = OpenOptions { snapshot: Some("nobody".into()), ..OpenOptions::default() };
        let error = laws::open_with(&Qcow2Driver, &directory.path().join("x"), &options).err().unwrap();
        assert!(error.hint_text().unwrap().contains("first state"));
        let source = laws::open(&Qcow2Driver, &directory.path().join("x")).unwrap();
        assert!(source.info().notes.iter().any(|note| note.starts_with("3 internal snapshots")));
    }
}

#[test]
fn reads_odd_and_large_sizes() {
    require!("qemu-img", "qemu-io");
    let directory = scratch();
    for size in ["0", "512", "66048", "1000960"] {
        create(directory.path(), "x", "compat=1.1", size);
        let size: u64 = size.parse().unwrap();
        if size > 0 {
            let command = format!("write -P 6 {} {}", size / 2, size - size / 2);
            run_in("qemu-io", directory.path(), &["-c", &command, "x"]);
        }
        assert_same_content(directory.path(), "x");
        run_in("qemu-img", directory.path(), &["convert", "-c", "-O", "qcow2", "x", "y"]);
        assert_same_content(directory.path(), "y");
    }
    // Data beyond the first L2 table, with and without compression.
    create(directory.path(), "x", "compat=1.1", "1200M");
    for command in
        ["write -P 6 511M 2M", "write -P 7 1100M 70k", "write -P 8 1228799k 1k", "write -c -P 9 600M 64k"]
    {
        run_in("qemu-io", directory.path(), &["-c", command, "x"]);
    }
    assert_same_content(directory.path(), "x");
}

#[test]
fn encryption_errors_name_the_method() {
    require!("qemu-img");
    let directory = scratch();
    for format in ["aes", "luks"] {
        let set = format!("encrypt.format={format},encrypt.key-secret=s");
        let args =
            ["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=geheim00", "-o", &set, "x", "1M"];
        run_in("qemu-img", directory.path(), &args);
        let path = directory.path().join("x");
        let error = laws::open(&Qcow2Driver, &path).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.to_string().to_lowercase().contains(&format!("encrypted ({format})")), "{error}");
        // Its facts are available nevertheless.
        let options = OpenOptions { info_only: true, ..OpenOptions::default() };
        let source = laws::open_with(&Qcow2Driver, &path, &options).unwrap();
        assert!(source.info().facts.iter().any(|fact| fact.key == "encrypted"));
    }
}
