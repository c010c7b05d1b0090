//! NBD exports: of a stopped image, and of an image that another program serves.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use imgtool_testing::{assert_same, occupied, require, tempdir, text};

use super::images;
use crate::support::imgtool;

/// A server that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts qemu-nbd for an image, at a local socket. Returns it with the URL of the export.
fn serve(image: &Path, format: &str, connections: &str) -> (Running, String) {
    let socket = image.with_extension("socket");
    let args = ["-t", "-r", "-e", connections, "-k", text(&socket), "-x", "disk", "-f", format, text(image)];
    let running = Running(Command::new("qemu-nbd").args(args).stderr(Stdio::null()).spawn().unwrap());
    for _ in 0..400 {
        if socket.exists() {
            return (running, format!("nbd+unix:///disk?socket={}", text(&socket)));
        }
        std::thread::sleep(Duration::from_millis(25));
    }
    panic!("qemu-nbd does not listen");
}

#[test]
fn every_command_reads_an_export() {
    require!("qemu-nbd");
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    let (_server, url) = serve(&qcow2, "qcow2", "4");
    for line in ["info", "map", "checksum", "measure -O qcow2"] {
        imgtool(line.split(' ').chain(["-f", "raw", &url])).ok();
    }
    imgtool(["check", "-f", "raw", &url]).go().ends_with(63);
    imgtool(["compare", "-f", "raw", &url, text(&raw)]).ok();
    let found = imgtool(["checksum", "-f", "raw", &url]).ok().text();
    let expected = imgtool(["checksum", text(&raw)]).ok().text();
    assert_eq!(found[..64], expected[..64]);
    for threads in ["1", "8"] {
        let out = dir.path().join(format!("out-{threads}.raw"));
        imgtool(["convert", "-f", "raw", "-m", threads, &url, text(&out)]).ok();
        assert_same(&raw, &out, threads);
        // Its zeros are not transferred, and stay holes.
        assert!(occupied(&out) <= 10 << 20);
    }
    let (remote, local) = (dir.path().join("remote.qcow2"), dir.path().join("local.qcow2"));
    imgtool(["convert", "-f", "raw", "--verify", &url, text(&remote)]).ok();
    imgtool(["convert", text(&raw), text(&local)]).ok();
    assert_same(&local, &remote, "the same bytes as from a file");
}

#[test]
fn an_image_in_an_export_is_recognised() {
    require!("qemu-nbd");
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    // One connection alone.
    let (_server, url) = serve(&qcow2, "raw", "1");
    let out = dir.path().join("out.raw");
    imgtool(["convert", &url, text(&out)]).ok();
    assert_same(&raw, &out, "qcow2");
    imgtool(["check", &url]).ok();
}

#[test]
fn a_server_that_does_not_listen_is_unavailable() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let run = imgtool(["info", &format!("nbd://{nobody}/disk")]).go();
    run.ends_with(75).says("connection refused").says("another try may help");
    let dir = tempdir();
    let missing = dir.path().join("none");
    let run = imgtool(["info", &format!("nbd+unix:///disk?socket={}", text(&missing))]).go();
    run.exits(1).says("can't connect: No such file or directory");
    imgtool(["info", "nbds://host/disk"]).go().exits(1).says("TLS is not supported yet");
    imgtool(["info", "nbd+unix:///disk"]).go().exits(2).says("no socket is named");
}
