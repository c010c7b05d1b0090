//! What an image names outside itself is not opened, whatever the name; strace sees all that is.

use std::path::Path;
use std::process::Command;

use super::{clear, every_verb, qcow2};
use crate::support::images;
use crate::support::oracles::require;
use crate::support::run::PROGRAM;
use crate::support::{imgtool, snapshot, tempdir, text};

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
    for mut line in every_verb(file, true) {
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
