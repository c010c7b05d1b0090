//! Sources on servers: every command over HTTP, against nginx and a server that misbehaves.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use imgtool_testing::http::{Answer, Server};
use imgtool_testing::images::{Image, noise, prose};

use crate::support::imgtool;

mod commands;
mod credentials;
mod failures;
mod nbd;
mod nginx;

/// A disk of 64 MiB with 9 MiB of content.
fn disk() -> Image {
    Image::hole("remote", 64 << 20)
        .with(0, noise(1, 3 << 20))
        .with(20 << 20, prose(2, 2 << 20))
        .with(40 << 20, noise(3, (4 << 20) + 777))
}

/// Writes the disk as `disk.raw` and `disk.qcow2`. Returns their paths.
fn images(directory: &Path) -> [PathBuf; 2] {
    let paths = ["disk.raw", "disk.qcow2"].map(|name| directory.join(name));
    disk().write_raw(&paths[0]);
    imgtool(["convert", "disk.raw", "disk.qcow2"]).within(directory).ok();
    paths
}

/// Starts a server with ranges for the files that a directory has now.
fn serve(directory: &Path) -> Server {
    let files: BTreeMap<String, Vec<u8>> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.path().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap()))
        .collect();
    Server::start(move |asked| {
        let path = asked.path.split('?').next().unwrap_or_default();
        let name = path.trim_start_matches('/').replace("%20", " ");
        match files.get(&name) {
            Some(content) => Answer::part(content, asked, "\"1\""),
            None => Answer::status("404 Not Found"),
        }
    })
}
