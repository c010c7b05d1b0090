//! Credentials: sent to the server that they are for, and printed nowhere.

use std::path::Path;

use imgtool_testing::http::{Answer, Server};
use imgtool_testing::tempdir;

use super::images;
use crate::support::imgtool;
use crate::support::run::Outcome;

/// Text in every place of a credential.
const CANARY: &str = "canary4711";

/// Asserts that a run printed no credential, and that no file of the directory has one.
fn keeps_silent(run: &Outcome, directory: &Path) {
    for text in [&run.text(), &run.stderr] {
        assert!(!text.contains(CANARY), "{}\n{text}", run.command);
    }
    for file in imgtool_testing::names(directory).iter().filter(|name| *name != "headers") {
        let found = std::fs::read(directory.join(file)).unwrap_or_default();
        let found = found.windows(CANARY.len()).any(|window| window == CANARY.as_bytes());
        assert!(!found && !file.contains(CANARY), "{file}");
    }
}

#[test]
fn credentials_are_never_printed() {
    let dir = tempdir();
    images(dir.path());
    std::fs::write(dir.path().join("headers"), format!("X-Token: {CANARY}\n")).unwrap();
    let content = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    let server = Server::start(move |asked| {
        assert_eq!(asked.header("x-token"), Some(CANARY));
        assert!(asked.header("authorization").is_some());
        match asked.path.split('?').next().unwrap_or_default() {
            "/none" => Answer::status("404 Not Found"),
            "/busy" => Answer::status("503 Service Unavailable"),
            "/loop" => Answer::redirect(&format!("/loop?sig={CANARY}")),
            "/wrong" => Answer::redirect(&format!("ftp://x/?sig={CANARY}")),
            "/text" => Answer::part(&[b'x'; 100_000], asked, "\"1\""),
            _ => Answer::part(&content, asked, "\"1\""),
        }
    });
    let url = |path: &str| format!("http://me:{CANARY}@{}{path}?sig={CANARY}#{CANARY}", server.address());
    let disk = url("/disk.qcow2");
    let mut lines: Vec<Vec<String>> = Vec::new();
    let mut add = |line: &str, url: &str| {
        lines.push(line.split(' ').map(|word| word.replace("URL", url)).collect());
    };
    for line in [
        "info URL",
        "info --output json URL",
        "info --backing-chain URL",
        "map URL",
        "map --output json URL",
        "map --output svg URL",
        "check URL",
        "check --output json URL",
        "checksum URL",
        "checksum --output json URL",
        "compare URL disk.raw",
        "compare --output json URL disk.raw",
        "measure -O qcow2 URL",
        "convert --force URL out.raw",
        "convert --force --progress json URL out.qcow2",
        "convert --force --output json x=URL out.vhdx",
        "convert --force --to raw URL out/",
        "convert --disk none URL out.raw",
        "convert disk.raw URL",
        "convert disk.raw --to raw --target x=URL",
        "map disk.raw URL",
        "URL",
    ] {
        add(line, &disk);
    }
    for path in ["/none", "/busy", "/loop", "/wrong", "/text"] {
        add("info URL", &url(path));
        add("convert --progress json URL out.raw", &url(path));
    }
    add("info URL", &format!("http://me:{CANARY}/x@{}/", server.address()));
    for line in &lines {
        let with_headers = line[0] != disk && !line.ends_with(&[disk.clone()]) || line.len() < 3;
        let headers = ["--header", "@headers"];
        let run = imgtool(line).args(headers.iter().filter(|_| with_headers || line[1] != "disk.raw"));
        keeps_silent(&run.within(dir.path()).go(), dir.path());
    }
    let run = imgtool(["info", &format!("--header={CANARY}"), &disk]).go();
    keeps_silent(&run, dir.path());
    run.exits(2).says("expected @FILE");
}

#[test]
fn a_password_in_a_url_gets_a_note() {
    let dir = tempdir();
    images(dir.path());
    let server = super::serve(dir.path());
    let url = format!("http://me:{CANARY}@{}/disk.qcow2", server.address());
    let run = imgtool(["info", &url]).ok();
    keeps_silent(&run, dir.path());
    run.says("other users see the user part").says("--header @FILE");
}
