//! Files that an image names are not opened, whatever the name. strace records every file that is opened.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use imgtool_storage::os::{DirectoryHandle, Rename};
use imgtool_testing::images::{self, Image};
use imgtool_testing::vma::Archive;
use imgtool_testing::{names, require, snapshot, tempdir, text};

use super::{clear, every_command, qcow2};
use crate::support::imgtool;
use crate::support::trace::opened_outside;

/// Returns names by which an image in `from` may ask for the file `secret` outside of it.
fn secret_names(secret: &Path, from: &Path) -> Vec<String> {
    let path = text(secret);
    let up = "../".repeat(from.components().count());
    vec![
        path.to_owned(),
        format!("{up}{}", path.trim_start_matches('/')),
        format!("file:{path}"),
        format!("./.././.{path}"),
        format!("json:{{\"driver\":\"raw\",\"file\":{{\"driver\":\"file\",\"filename\":\"{path}\"}}}}"),
        format!("nbd+unix:///?socket={path}"),
        format!("fat:{path}"),
        "link".to_owned(),
        "/proc/self/environ".to_owned(),
        "/dev/zero".to_owned(),
    ]
}

/// Runs every command on `file` under strace, and asserts that none opens a file outside of `directory`.
#[track_caller]
fn opens_nothing(directory: &Path, file: &str, extra: &[&str]) {
    for mut line in every_command(file, true) {
        line.extend(extra);
        let opened = opened_outside(directory, &line);
        assert!(opened.is_empty(), "{line:?}: {opened:?}");
        if directory.join("out").exists() {
            clear(&directory.join("out"));
        }
    }
}

#[test]
fn never_opens_outside_files_named_in_a_vmdk_descriptor() {
    require!("strace");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    std::fs::write(&secret, images::noise(3, 1 << 20)).unwrap();
    std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
    for (number, name) in secret_names(&secret, dir.path()).iter().enumerate() {
        for (kind, line) in [("flat", "FLAT"), ("sparse", "SPARSE"), ("parent", "ZERO")] {
            let file = format!("{kind}{number}.vmdk");
            let cid = if kind == "parent" { "1" } else { "ffffffff" };
            let text = format!(
                "# Disk DescriptorFile\nversion=1\nCID=2\nparentCID={cid}\nparentFileNameHint=\"{name}\"\n\
                 RW 2048 {line} \"{name}\"\n"
            );
            std::fs::write(dir.path().join(&file), text).unwrap();
            imgtool(["convert", &file, "--to", "raw", "out"]).within(dir.path()).go().exits(1);
            for extra in [[].as_slice(), &["--allow-external", "chain"]] {
                opens_nothing(dir.path(), &file, extra);
            }
            std::fs::remove_file(dir.path().join(&file)).unwrap();
        }
    }
}

#[test]
fn never_opens_outside_files_named_in_a_qcow2_image() {
    require!("strace");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    std::fs::write(&secret, images::noise(3, 1 << 20)).unwrap();
    std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
    for (number, name) in secret_names(&secret, dir.path()).iter().enumerate() {
        for format in ["", "raw", "qcow2", "nbd"] {
            let file = format!("backing{number}{format}.qcow2");
            let craft = qcow2(dir.path(), &file, 16 << 20, 16, 1 << 20, 1);
            craft.be64(8, 4096).be32(16, name.len() as u32).put(4096, name.as_bytes());
            if !format.is_empty() {
                craft.be32(104, 0xe279_2aca).be32(108, format.len() as u32).put(112, format.as_bytes());
            }
            let before = snapshot(dir.path());
            imgtool(["convert", &file, "--to", "raw", "out"]).within(dir.path()).go().exits(1);
            assert_eq!(snapshot(dir.path()), before, "{name}");
            if format == "raw" {
                // `chain` allows files in the image's directory; links must not lead out of it.
                for extra in [[].as_slice(), &["--allow-external", "chain"]] {
                    opens_nothing(dir.path(), &file, extra);
                }
            }
            std::fs::remove_file(craft.path).unwrap();
        }
        // An external data file: incompatible feature bit 2, and the name in a header extension.
        let file = format!("data{number}.qcow2");
        let craft = qcow2(dir.path(), &file, 16 << 20, 16, 1 << 20, 1);
        craft.be64(72, 4).be32(104, 0x4441_5441).be32(108, name.len() as u32).put(112, name.as_bytes());
        let before = snapshot(dir.path());
        imgtool(["convert", &file, "--to", "raw", "out"]).within(dir.path()).go().exits(1);
        assert_eq!(snapshot(dir.path()), before, "{name}");
        opens_nothing(dir.path(), &file, &["--allow-external", "chain"]);
        std::fs::remove_file(craft.path).unwrap();
    }
}

/// Turns a dynamic image into a differencing image with a parent locator of these entries.
pub(super) fn with_parent(directory: &Path, file: &str, entries: &[(&str, &str)]) {
    const PARENT_LOCATOR: [u8; 16] =
        [0x2d, 0x5f, 0xd3, 0xa8, 0x0b, 0xb3, 0x4d, 0x45, 0xab, 0xf7, 0xd3, 0xd8, 0x48, 0x34, 0xab, 0x0c];
    const LOCATOR_TYPE: [u8; 16] =
        [0xb7, 0xef, 0x4a, 0xb0, 0x9e, 0xd1, 0x81, 0x4a, 0xb7, 0x89, 0x25, 0xb8, 0xe9, 0x44, 0x59, 0x13];
    let path = directory.join(file);
    let mut bytes = std::fs::read(&path).unwrap();
    let table = bytes.windows(8).position(|window| window == b"metadata").unwrap();
    let parameters = bytes.windows(4).position(|window| window == [0x37, 0x67, 0xa1, 0xca]).unwrap();
    let item = u32::from_le_bytes(bytes[parameters + 16..parameters + 20].try_into().unwrap()) as usize;
    bytes[table + item + 4] |= 2;
    let count = usize::from(u16::from_le_bytes(bytes[table + 10..table + 12].try_into().unwrap()));
    bytes[table + 10..table + 12].copy_from_slice(&(count as u16 + 1).to_le_bytes());
    let mut locator = [LOCATOR_TYPE.as_slice(), &[0, 0], &(entries.len() as u16).to_le_bytes()].concat();
    let mut strings: Vec<u8> = Vec::new();
    let start = 20 + 12 * entries.len();
    for (key, value) in entries {
        let utf16 = |text: &str| text.encode_utf16().flat_map(u16::to_le_bytes).collect::<Vec<u8>>();
        let (key, value) = (utf16(key), utf16(value));
        locator.extend(((start + strings.len()) as u32).to_le_bytes());
        locator.extend(((start + strings.len() + key.len()) as u32).to_le_bytes());
        locator.extend((key.len() as u16).to_le_bytes());
        locator.extend((value.len() as u16).to_le_bytes());
        strings.extend(key);
        strings.extend(value);
    }
    locator.extend(strings);
    let place = 512 << 10;
    let entry = table + 32 + 32 * count;
    bytes[entry..entry + 16].copy_from_slice(&PARENT_LOCATOR);
    bytes[entry + 16..entry + 20].copy_from_slice(&(place as u32).to_le_bytes());
    bytes[entry + 20..entry + 24].copy_from_slice(&(locator.len() as u32).to_le_bytes());
    bytes[entry + 24..entry + 28].copy_from_slice(&4u32.to_le_bytes());
    bytes[table + place..table + place + locator.len()].copy_from_slice(&locator);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn never_opens_outside_files_named_in_a_vhdx_image() {
    require!("strace");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    imgtool(["create", "-f", "vhdx", text(&secret), "1M"]).ok();
    std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
    let linkage = ("parent_linkage", "{dddddddd-0000-4000-8000-000000000001}");
    for (number, name) in secret_names(&secret, dir.path()).iter().enumerate() {
        let windows = name.replace('/', "\\");
        let unc = format!("\\\\localhost\\share{windows}");
        let file = format!("child{number}.vhdx");
        imgtool(["create", "-f", "vhdx", &file, "1M"]).within(dir.path()).ok();
        let entries =
            [linkage, ("relative_path", &*windows), ("absolute_win32_path", name), ("volume_path", &unc)];
        with_parent(dir.path(), &file, &entries);
        let before = snapshot(dir.path());
        imgtool(["convert", &file, "--to", "raw", "out"]).within(dir.path()).go().exits(1).says("parent");
        assert_eq!(snapshot(dir.path()), before, "{name}");
        for extra in [[].as_slice(), &["--allow-external", "chain"]] {
            opens_nothing(dir.path(), &file, extra);
        }
        std::fs::remove_file(dir.path().join(&file)).unwrap();
    }
}

/// Names of disks and configuration files, and paths in a configuration file, are only text.
#[test]
fn never_opens_files_named_in_an_archive() {
    require!("strace");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    std::fs::write(&secret, images::noise(3, 1 << 20)).unwrap();
    std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
    let untouched = snapshot(outside.path());
    for (number, name) in secret_names(&secret, dir.path()).iter().enumerate() {
        let config = format!(
            "scsi0: {name},size=1M\nscsi1: local:{name}\nargs: -drive file={name}\n\
             #qmdump#map:scsi0:{name}:{name}:raw:\n[special]\nvmstate: {name}\n"
        );
        let disk = Image::hole("disk", 2 * 65_536).with(4096, images::noise(1, 4096));
        let archive = Archive::of([(name.as_str(), disk)])
            .config("qemu-server.conf", config.as_bytes())
            .config(name, b"file: x\n");
        let file = format!("archive{number}.vma");
        std::fs::write(dir.path().join(&file), archive.build().bytes).unwrap();
        let before = names(dir.path());
        opens_nothing(dir.path(), &file, &[]);
        assert_eq!(names(dir.path()), before, "{name}");
        std::fs::remove_file(dir.path().join(&file)).unwrap();
    }
    assert_eq!(snapshot(outside.path()), untouched);
}

/// gzip and lzop store the name of the file that they compressed.
#[test]
fn never_opens_the_stored_name_of_a_compressed_file() {
    require!("strace", "gzip", "lzop");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    std::fs::write(&secret, images::noise(3, 100_000)).unwrap();
    for (program, file) in [("gzip", "disk.raw.gz"), ("lzop", "disk.raw.lzo")] {
        let options = if program == "gzip" { "-cN" } else { "-cP" };
        let bytes = std::process::Command::new(program).args([options, text(&secret)]).output().unwrap();
        assert!(bytes.status.success(), "{bytes:?}");
        std::fs::write(dir.path().join(file), &bytes.stdout).unwrap();
        let contains_the_name = bytes.stdout.windows(6).any(|window| window == b"secret");
        assert!(contains_the_name, "{program} does not keep the name");
        let before = snapshot(dir.path());
        opens_nothing(dir.path(), file, &[]);
        assert_eq!(snapshot(dir.path()), before, "{program}");
    }
}

/// Names of bitmaps and snapshots in a qcow2 image are not names of files.
#[test]
fn never_opens_names_of_bitmaps_or_snapshots() {
    require!("strace", "qemu-img");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    std::fs::write(&secret, images::noise(3, 100_000)).unwrap();
    let qemu_img = |line: &[&str]| {
        let done =
            std::process::Command::new("qemu-img").args(line).current_dir(dir.path()).output().unwrap();
        assert!(done.status.success(), "{line:?}: {done:?}");
    };
    qemu_img(&["create", "-q", "-f", "qcow2", "snapshot.qcow2", "1M"]);
    for name in secret_names(&secret, dir.path()) {
        if name.len() < 200 {
            qemu_img(&["bitmap", "--add", "snapshot.qcow2", &name]);
            qemu_img(&["snapshot", "-c", &name, "snapshot.qcow2"]);
        }
    }
    opens_nothing(dir.path(), "snapshot.qcow2", &[]);
    opens_nothing(dir.path(), "snapshot.qcow2", &["--allow-external", "chain"]);
    assert_eq!(names(dir.path()), ["snapshot.qcow2"]);
}

/// Sets a flag when dropped.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// While the program looks and opens, another program exchanges the backing file with a link to a secret, its
/// directory with a link to another one, and the image itself with a link to an image elsewhere.
#[test]
fn exchanged_names_let_no_outside_file_in() {
    const ROUNDS: usize = 150;
    let (dir, outside) = (tempdir(), tempdir());
    let path = |name: &str| dir.path().join(name);
    let (allowed, secret) = (vec![b'a'; 1 << 20], vec![b's'; 1 << 20]);
    std::fs::create_dir(path("sub")).unwrap();
    for (directory, content) in [(dir.path(), &allowed), (&path("sub"), &allowed), (outside.path(), &secret)]
    {
        std::fs::write(directory.join("b.raw"), content).unwrap();
    }
    let overlay = |directory: &Path, file: &str, name: &str, virtual_size: u64| {
        let craft = qcow2(directory, file, 16 << 20, 16, virtual_size, 1);
        craft.be64(8, 4096).be32(16, name.len() as u32).put(4096, name.as_bytes());
        craft.be32(104, 0xe279_2aca).be32(108, 3).put(112, b"raw");
    };
    overlay(dir.path(), "top.qcow2", "b.raw", 1 << 20);
    overlay(dir.path(), "deep.qcow2", "sub/b.raw", 1 << 20);
    // The link may lead to this image from the start: then it is the image that the user named.
    overlay(outside.path(), "top.qcow2", "b.raw", 2 << 20);
    let of_the_link = [secret.as_slice(), &[0; 1 << 20]].concat();
    let cases =
        [("top.qcow2", "b.raw", "b.raw"), ("deep.qcow2", "sub", ""), ("top.qcow2", "top.qcow2", "top.qcow2")];
    for (image, exchanged, target) in cases {
        std::os::unix::fs::symlink(outside.path().join(target), path("link")).unwrap();
        let home = DirectoryHandle::open(dir.path()).unwrap();
        let exchange = || home.rename(exchanged.as_ref(), "link".as_ref(), Rename::Exchange).unwrap();
        let stop = AtomicBool::new(false);
        let mut done = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    exchange();
                }
            });
            // A failed assertion must end the other thread as well.
            let _stopped = StopOnDrop(&stop);
            for _ in 0..ROUNDS {
                let line = ["convert", "--force", "--allow-external", "chain", image, "--to", "raw", "out"];
                let run = imgtool(line).within(dir.path()).go();
                let code = run.status.code();
                assert!(matches!(code, Some(0 | 1)), "{code:?}: {}", run.stderr);
                if code == Some(0) {
                    done += 1;
                    let out = std::fs::read(path("out")).unwrap();
                    let is_allowed = out == allowed || exchanged == image && out == of_the_link;
                    assert!(is_allowed, "the secret was let in through {exchanged}");
                }
            }
        });
        println!("{exchanged}: {done} of {ROUNDS} conversions finished");
        if std::fs::symlink_metadata(path("link")).is_ok_and(|meta| !meta.is_symlink()) {
            exchange();
        }
        std::fs::remove_file(path("link")).unwrap();
    }
}

/// Links inside of the directory are followed as long as they stay there.
#[test]
fn follows_links_within_the_directory() {
    let (dir, outside) = (tempdir(), tempdir());
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir_all(path("images/deep")).unwrap();
    std::fs::write(path("images/deep/base.raw"), images::noise(1, 1 << 20)).unwrap();
    std::fs::write(outside.path().join("base.raw"), images::noise(2, 1 << 20)).unwrap();
    std::os::unix::fs::symlink("deep", path("images/way")).unwrap();
    std::os::unix::fs::symlink("way/base.raw", path("images/link")).unwrap();
    std::os::unix::fs::symlink(path("images/deep/base.raw"), path("images/whole")).unwrap();
    std::os::unix::fs::symlink(outside.path().join("base.raw"), path("images/out-of-here")).unwrap();
    for (name, code) in
        [("link", 0), ("way/base.raw", 0), ("whole", 0), ("deep/../link", 0), ("out-of-here", 1)]
    {
        let craft = qcow2(&path("images"), "top.qcow2", 16 << 20, 16, 1 << 20, 1);
        craft.be64(8, 4096).be32(16, name.len() as u32).put(4096, name.as_bytes());
        craft.be32(104, 0xe279_2aca).be32(108, 3).put(112, b"raw");
        // The directory is that of the image, even if the user names it by a link.
        std::os::unix::fs::symlink("images/top.qcow2", path("top")).unwrap();
        let line = ["convert", "--allow-external", "chain", "top", "--to", "raw", "out.raw"];
        imgtool(line).within(dir.path()).go().exits(code);
        if code == 0 {
            assert!(std::fs::read(path("out.raw")).unwrap() == images::noise(1, 1 << 20), "{name}");
            std::fs::remove_file(path("out.raw")).unwrap();
        }
        std::fs::remove_file(path("top")).unwrap();
        std::fs::remove_file(path("images/top.qcow2")).unwrap();
    }
}
