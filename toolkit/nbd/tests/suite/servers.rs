//! qemu-nbd and nbdkit.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use imgtool_core::{ErrorKind, Extent};
use imgtool_testing::images::{Image, noise};
use imgtool_testing::{require, tempdir, text};

use super::open;

/// A server that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program that listens at `socket`.
fn start(program: &str, args: &[&str], socket: &Path) -> Running {
    let child = Command::new(program).args(args).stderr(Stdio::null()).spawn().unwrap();
    let running = Running(child);
    for _ in 0..400 {
        if socket.exists() {
            return running;
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    panic!("{program} {args:?} does not listen");
}

fn disk() -> Image {
    Image::hole("nbd", (8 << 20) + 512).with(0, noise(1, 1 << 20)).with(4 << 20, noise(2, 1_500_000))
}

fn check(url: &str, expected: &[u8], has_holes: bool) {
    let input = open(url).unwrap();
    assert_eq!(input.len(), expected.len() as u64, "{url}");
    let mut bytes = vec![0; expected.len()];
    input.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes == expected, "{url}: other content");
    for (start, len) in [(1, 1), (511, 2), (1000, 70_001), (4_194_303, 1_300_000), (expected.len() - 1, 1)] {
        let mut bytes = vec![0; len];
        input.read_exact_at(&mut bytes, start as u64).unwrap();
        assert!(bytes == expected[start..start + len], "{url}: {len} bytes at {start}");
    }
    let extents: Vec<Extent> = input.extents(0..input.len()).unwrap();
    assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), input.len(), "{url}");
    let data: u64 = extents.iter().filter(|extent| extent.is_data()).map(|extent| extent.len).sum();
    assert_eq!(data < 3 << 20, has_holes, "{url}: {extents:?}");
    for hole in extents.iter().filter(|extent| !extent.is_data()) {
        let range = hole.start as usize..(hole.start + hole.len) as usize;
        assert!(expected[range].iter().all(|byte| *byte == 0), "{url}: {hole:?}");
    }
}

#[test]
fn reads_what_qemu_nbd_exports() {
    require!("qemu-nbd");
    let dir = tempdir();
    let (raw, socket) = (dir.path().join("disk.raw"), dir.path().join("socket"));
    disk().write_raw(&raw);
    let expected = std::fs::read(&raw).unwrap();
    for shared in ["1", "8"] {
        let args = ["-t", "-r", "-e", shared, "-k", text(&socket), "-x", "my disk", "-f", "raw", text(&raw)];
        let server = start("qemu-nbd", &args, &socket);
        check(&format!("nbd+unix:///my%20disk?socket={}", text(&socket)), &expected, true);
        let error = open(&format!("nbd+unix:///other?socket={}", text(&socket))).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.message().contains("no export called 'other'"), "{error}");
        drop(server);
        std::fs::remove_file(&socket).unwrap();
    }
    let error = open(&format!("nbd+unix:///x?socket={}", text(&socket))).unwrap_err();
    assert_eq!(error.act(), Some("connect"), "{error:#}");
}

#[test]
fn reads_what_nbdkit_exports() {
    require!("nbdkit");
    let dir = tempdir();
    let (raw, socket) = (dir.path().join("disk.raw"), dir.path().join("socket"));
    disk().write_raw(&raw);
    let expected = std::fs::read(&raw).unwrap();
    let file = format!("file={}", text(&raw));
    let variants: [(&[&str], bool); 5] = [
        (&["file", &file], true),
        (&["--filter=noextents", "file", &file], false),
        // Reads in blocks of 4 KiB alone; the odd end is cut off by the filter.
        (&["--no-sr", "file", &file], false),
        (&["-o", "file", &file], false),
        (&["--mask-handshake=0", "file", &file], false),
    ];
    for (args, has_holes) in variants {
        let all = [&["-f", "-r", "-U", text(&socket)], args].concat();
        // Old versions of the protocol: newstyle without GO and oldstyle.
        let server = start("nbdkit", &all, &socket);
        let url = format!("nbd+unix:///?socket={}", text(&socket));
        match args[0] {
            "-o" | "--mask-handshake=0" => {
                assert_eq!(open(&url).unwrap_err().kind(), ErrorKind::Unsupported, "{args:?}");
            }
            _ => check(&url, &expected, has_holes),
        }
        drop(server);
        let _ = std::fs::remove_file(&socket);
    }
}

#[test]
fn errors_of_a_server_are_errors() {
    require!("nbdkit");
    let dir = tempdir();
    let (raw, socket) = (dir.path().join("disk.raw"), dir.path().join("socket"));
    disk().write_raw(&raw);
    let file = format!("file={}", text(&raw));
    let args = ["-f", "-r", "-U", text(&socket), "--filter=error", "file", &file, "error-pread-rate=100%"];
    let _server = start("nbdkit", &args, &socket);
    let input = open(&format!("nbd+unix:///?socket={}", text(&socket))).unwrap();
    let error = input.read_exact_at(&mut [0; 512], 0).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Io);
    assert!(format!("{error:#}").contains("the server reports: input/output error"), "{error:#}");
}
