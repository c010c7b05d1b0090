//! Images made to harm: every verb ends, within 256 MiB, without a panic, without opening what the
//! image names, and leaves nothing unless it succeeded.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use md5::{Digest, Md5};

use crate::support::archive::Archive;
use crate::support::images::{self, Image};
use crate::support::oracles::{self, require};
use crate::support::run::PROGRAM;
use crate::support::{imgtool, names, snapshot, tempdir, text};

/// What a program may have resident for any image.
const MEMORY: u64 = 256 << 20;

/// A file in the making, mostly a hole.
struct Craft {
    path: PathBuf,
    file: File,
}

impl Craft {
    fn new(directory: &Path, name: &str, len: u64) -> Self {
        let path = directory.join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        Self { path, file }
    }

    fn put(&self, at: u64, bytes: &[u8]) -> &Self {
        self.file.write_all_at(bytes, at).unwrap();
        self
    }

    fn be32(&self, at: u64, value: u32) -> &Self {
        self.put(at, &value.to_be_bytes())
    }

    fn be64(&self, at: u64, value: u64) -> &Self {
        self.put(at, &value.to_be_bytes())
    }
}

/// A qcow2 header that is right, with everything at 64 KiB boundaries: L1 in the second cluster, the
/// refcount table in the third.
fn qcow2(
    directory: &Path,
    name: &str,
    len: u64,
    cluster_bits: u32,
    virtual_size: u64,
    l1_size: u32,
) -> Craft {
    let craft = Craft::new(directory, name, len);
    craft.put(0, b"QFI\xfb").be32(4, 3).be32(20, cluster_bits).be64(24, virtual_size).be32(36, l1_size);
    craft.be64(40, 1 << 21).be64(48, 1 << 22).be32(56, 1).be32(96, 4).be32(100, 104);
    craft
}

/// Puts the checksum of an archive's header right.
fn seal_vma(bytes: &mut [u8]) {
    let header_size = u32::from_be_bytes(bytes[56..60].try_into().unwrap()) as usize;
    bytes[32..48].fill(0);
    let digest = Md5::digest(&bytes[..header_size.min(bytes.len())]);
    bytes[32..48].copy_from_slice(&digest);
}

/// VMA archives made to harm.
fn vma_images(directory: &Path) -> Vec<PathBuf> {
    let good = Archive::of([("drive-scsi0", Image::hole("x", 1 << 20).with(0, images::noise(1, 65_536)))])
        .config("qemu-server.conf", b"cores: 1\n")
        .build();
    let mut all = Vec::new();
    let mut edit = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.bytes.clone();
        change(&mut bytes);
        let path = directory.join(format!("{name}.vma"));
        std::fs::write(&path, bytes).unwrap();
        all.push(path);
    };
    let put32 =
        |bytes: &mut Vec<u8>, at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    let device = |bytes: &mut Vec<u8>, id: usize, size: u64| {
        let name: [u8; 4] = bytes[4096 + 32..][..4].try_into().unwrap();
        bytes[4096 + 32 * id..][..4].copy_from_slice(&name);
        bytes[4096 + 32 * id + 8..][..8].copy_from_slice(&size.to_be_bytes());
    };
    edit("a-device-of-16-eib", &|b| {
        device(b, 1, u64::MAX);
        seal_vma(b);
    });
    edit("254-devices-of-256-tib", &|b| {
        (1..255).for_each(|id| device(b, id, 1 << 48));
        seal_vma(b);
    });
    edit("254-devices-of-8-eib", &|b| {
        (1..255).for_each(|id| device(b, id, 1 << 63));
        seal_vma(b);
    });
    edit("header-of-4-gib", &|b| put32(b, 56, 0xffff_fe00));
    edit("header-of-2-gib-in-a-hole", &|b| put32(b, 56, 0x7fff_fe00));
    edit("blobs-of-4-gib", &|b| {
        put32(b, 52, u32::MAX);
        seal_vma(b);
    });
    edit("blobs-that-overlap-everything", &|b| {
        (0..256).for_each(|i| {
            let (name, data): ([u8; 4], [u8; 4]) =
                (b[2044..2048].try_into().unwrap(), b[3068..3072].try_into().unwrap());
            b[2044 + 4 * i..][..4].copy_from_slice(&name);
            b[3068 + 4 * i..][..4].copy_from_slice(&data);
        });
        seal_vma(b);
    });
    edit("names-that-point-outside", &|b| {
        put32(b, 4096 + 32, u32::MAX);
        seal_vma(b);
    });
    // Extents without a cluster, one after the other.
    edit("extents-of-nothing", &|b| {
        let extent = {
            let at = good.extents[0];
            let mut header = b[at..at + 512].to_vec();
            header[6..8].fill(0);
            header[40..].fill(0);
            header[24..40].fill(0);
            let digest = Md5::digest(&header);
            header[24..40].copy_from_slice(&digest);
            header
        };
        b.truncate(good.extents[0]);
        (0..20_000).for_each(|_| b.extend(&extent));
    });
    let hole = &all[all.iter().position(|path| text(path).contains("in-a-hole")).unwrap()];
    File::options().write(true).open(hole).unwrap().set_len(3 << 30).unwrap();
    all
}

/// Every verb on one file.
fn every_verb(file: &str) -> Vec<Vec<&str>> {
    let mut lines: Vec<Vec<&str>> = vec![
        vec!["info", file],
        vec!["info", "--output", "json", file],
        vec!["check", file],
        vec!["map", file],
        vec!["compare", file, file],
        vec!["measure", "--to", "qcow2", file],
        vec!["convert", "--salvage", file, "--to", "qcow2", "out/"],
    ];
    lines.extend(["raw", "qcow2", "vhdx"].map(|to| vec!["convert", file, "--to", to, "out/"]));
    lines.push(vec!["convert", file, "--to", "vma", "out"]);
    if file.ends_with(".vma") {
        lines.extend([
            vec!["vma", "list", file],
            vec!["vma", "verify", file],
            vec!["vma", "extract", file, "out"],
        ]);
    }
    lines
}

/// Runs every verb on every file; the largest peak of memory.
fn all_end_within_memory(directory: &Path, files: &[PathBuf]) {
    let mut worst = (0, String::new());
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        let before = names(directory);
        for line in every_verb(name) {
            let run = imgtool(&line).within(directory).measured().go();
            let code = run.status.code();
            assert!(matches!(code, Some(0..=3)), "{}: {:?}\n{}", run.command, run.status, run.stderr);
            assert!(!run.stderr.contains("panicked"), "{}\n{}", run.command, run.stderr);
            assert!(run.peak_memory < MEMORY, "{}: {} bytes resident", run.command, run.peak_memory);
            worst = worst.max((run.peak_memory, run.command.clone()));
            if line[0] == "convert" || line.contains(&"extract") {
                let after = names(directory);
                match code {
                    Some(0 | 3) => clear(&directory.join("out")),
                    _ => assert_eq!(after, before, "{}", run.command),
                }
            }
            assert_eq!(names(directory), before, "{}", run.command);
        }
    }
    eprintln!("{} files, worst {} MiB: {}", files.len(), worst.0 >> 20, worst.1);
}

fn clear(out: &Path) {
    if out.is_dir() { std::fs::remove_dir_all(out) } else { std::fs::remove_file(out) }.unwrap();
}

#[test]
fn hostile_vma_archives_end_within_memory() {
    let dir = tempdir();
    all_end_within_memory(dir.path(), &vma_images(dir.path()));
}

/// A file outside, and names by which an image may ask for it.
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

/// Runs every verb on `file` under strace: none opens what `forbidden` accepts.
#[track_caller]
fn opens_nothing(directory: &Path, file: &str, extra: &[&str], forbidden: impl Fn(&str) -> bool) {
    for mut line in every_verb(file) {
        line.extend(extra);
        let log = tempfile::NamedTempFile::new().unwrap();
        Command::new("strace")
            .args([
                "-f",
                "-y",
                "-e",
                "trace=open,openat,openat2,creat,connect,execve",
                "-o",
                text(log.path()),
                PROGRAM,
            ])
            .args(&line)
            .current_dir(directory)
            .output()
            .unwrap();
        let trace = std::fs::read_to_string(log.path()).unwrap();
        assert!(trace.contains(file), "{line:?}: {trace}");
        let opened = trace.lines().find(|call| forbidden(call));
        assert!(opened.is_none(), "{line:?}: {opened:?}");
        if directory.join("out").exists() {
            clear(&directory.join("out"));
        }
    }
}

#[test]
fn what_a_qcow2_image_names_is_not_opened() {
    require!("strace");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    std::fs::write(&secret, images::noise(3, 1 << 20)).unwrap();
    std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
    let is_secret = |call: &str| {
        ["secret", "environ", "/dev/zero", "\"link\"", "/link\"", "connect("]
            .iter()
            .any(|word| call.contains(word))
    };
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
                // `chain` allows files of the image's own directory: links do not lead out of it.
                for extra in [[].as_slice(), &["--allow-external", "chain"]] {
                    opens_nothing(dir.path(), &file, extra, is_secret);
                }
            }
            std::fs::remove_file(craft.path).unwrap();
        }
        // An external data file: incompatible feature bit 2, the name in an extension.
        let file = format!("data{number}.qcow2");
        let craft = qcow2(dir.path(), &file, 16 << 20, 16, 1 << 20, 1);
        craft.be64(72, 4).be32(104, 0x4441_5441).be32(108, name.len() as u32).put(112, name.as_bytes());
        let before = snapshot(dir.path());
        imgtool(["convert", &file, "--to", "raw", "out"]).within(dir.path()).go().exits(1);
        assert_eq!(snapshot(dir.path()), before, "{name}");
        opens_nothing(dir.path(), &file, &["--allow-external", "chain"], is_secret);
        std::fs::remove_file(craft.path).unwrap();
    }
}

/// Makes a differencing image of a dynamic one: a parent locator with these paths.
fn with_parent(directory: &Path, file: &str, entries: &[(&str, &str)]) {
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
fn what_a_vhdx_image_names_is_not_opened() {
    require!("strace");
    let (dir, outside) = (tempdir(), tempdir());
    let secret = outside.path().join("secret");
    imgtool(["create", "-f", "vhdx", text(&secret), "1M"]).ok();
    std::os::unix::fs::symlink(&secret, dir.path().join("link")).unwrap();
    let is_secret = |call: &str| {
        ["secret", "environ", "/dev/zero", "\"link\"", "/link\"", "connect("]
            .iter()
            .any(|word| call.contains(word))
    };
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
            opens_nothing(dir.path(), &file, extra, is_secret);
        }
        std::fs::remove_file(dir.path().join(&file)).unwrap();
    }
}

#[test]
fn a_chain_as_deep_as_is_followed_fits_on_the_stack_and_one_deeper_is_refused() {
    require!("qemu-img");
    let dir = tempdir();
    Image::hole("x", 1 << 20).with(0, images::noise(1, 100_000)).write_raw(&dir.path().join("0.raw"));
    oracles::qemu_make(&dir.path().join("0.raw"), "qcow2", "", &dir.path().join("0.qcow2"));
    for number in 1..=258 {
        let craft = qcow2(dir.path(), &format!("{number}.qcow2"), 16 << 20, 16, 1 << 20, 1);
        let name = format!("{}.qcow2", number - 1);
        craft.be64(8, 4096).be32(16, name.len() as u32).put(4096, name.as_bytes());
        craft.be32(104, 0xe279_2aca).be32(108, 5).put(112, b"qcow2");
    }
    let line = |top: &str| {
        ["convert", "--allow-external", "chain", top, "--to", "raw", "out.raw"].map(str::to_owned)
    };
    let run = imgtool(line("256.qcow2")).within(dir.path()).measured().ok();
    assert!(run.peak_memory < MEMORY, "{} bytes", run.peak_memory);
    crate::support::assert_same(&dir.path().join("0.raw"), &dir.path().join("out.raw"), "256 images");
    std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    imgtool(line("258.qcow2")).within(dir.path()).go().exits(1).says("deeper than");
    assert!(!dir.path().join("out.raw").exists());
    // A loop is told at once.
    let craft = Craft {
        path: dir.path().join("1.qcow2"),
        file: File::options().write(true).open(dir.path().join("1.qcow2")).unwrap(),
    };
    craft.put(4096, b"9.qcow2");
    imgtool(line("9.qcow2"))
        .within(dir.path())
        .go()
        .exits(1)
        .says("'9.qcow2' leads back to an image of the same chain");
    assert!(!dir.path().join("out.raw").exists());
}

#[test]
fn an_image_is_taken_for_the_format_that_was_named() {
    let dir = tempdir();
    // The guest of a raw disk wrote a qcow2 header with a backing file into its first sectors.
    let craft = qcow2(dir.path(), "guest.raw", 16 << 20, 16, 1 << 30, 1);
    craft.be64(8, 4096).be32(16, 11).put(4096, b"/etc/passwd");
    imgtool(["convert", "-f", "raw", "guest.raw", "--to", "raw", "out.raw"]).within(dir.path()).ok();
    crate::support::assert_same(&craft.path, &dir.path().join("out.raw"), "raw is raw");
    std::fs::remove_file(dir.path().join("out.raw")).unwrap();
    let before = snapshot(dir.path());
    for format in ["vhdx", "vma"] {
        imgtool(["convert", "-f", format, "guest.raw", "--to", "raw", "out.raw"])
            .within(dir.path())
            .go()
            .exits(1);
    }
    // Bytes that look compressed are the disk's own, too.
    std::fs::write(
        dir.path().join("zip.raw"),
        [&[0x1f, 0x8b, 8, 0], images::noise(1, 5000).as_slice()].concat(),
    )
    .unwrap();
    imgtool(["convert", "-f", "raw", "zip.raw", "--to", "raw", "zip.out"]).within(dir.path()).ok();
    crate::support::assert_same(&dir.path().join("zip.raw"), &dir.path().join("zip.out"), "not undone");
    std::fs::remove_file(dir.path().join("zip.raw")).unwrap();
    std::fs::remove_file(dir.path().join("zip.out")).unwrap();
    assert_eq!(snapshot(dir.path()), before);
}
