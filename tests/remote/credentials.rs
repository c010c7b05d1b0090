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

/// Returns a URL with a credential in every place.
fn url(server: &Server, path: &str) -> String {
    format!("http://me:{CANARY}@{}{path}?sig={CANARY}#{CANARY}", server.address())
}

/// Starts a server that demands all credentials.
fn demanding(content: Vec<u8>) -> Server {
    Server::start(move |asked| {
        let has_all = asked.header("x-token") == Some(CANARY)
            && asked.header("authorization").is_some()
            && asked.path.ends_with(&format!("?sig={CANARY}"));
        match asked.path.split('?').next().unwrap_or_default() {
            _ if !has_all => Answer::status("403 Forbidden"),
            "/none" => Answer::status("404 Not Found"),
            "/busy" => Answer::status("503 Service Unavailable"),
            "/loop" => Answer::redirect(&format!("/loop?sig={CANARY}")),
            "/wrong" => Answer::redirect(&format!("ftp://x/?sig={CANARY}")),
            "/text" => Answer::part(&[b'x'; 100_000], asked, "\"1\""),
            _ => Answer::part(&content, asked, "\"1\""),
        }
    })
}

#[test]
fn credentials_are_sent_and_never_printed() {
    let dir = tempdir();
    images(dir.path());
    std::fs::write(dir.path().join("headers"), format!("X-Token: {CANARY}\n")).unwrap();
    let server = demanding(std::fs::read(dir.path().join("disk.qcow2")).unwrap());
    let disk = url(&server, "/disk.qcow2");
    for line in [
        "info URL",
        "info --output json URL",
        "info --backing-chain URL",
        "map URL",
        "map --output json URL",
        "map --output svg URL",
        "check URL",
        "check --output json URL",
        "check --for libvirt URL",
        "check --for libvirt --output json disk.qcow2 URL",
        "checksum URL",
        "checksum --output json URL",
        "compare URL disk.raw",
        "compare --output json URL disk.raw",
        "measure -O qcow2 URL",
        "convert --force URL out.raw",
        "convert --force --progress json URL out.qcow2",
        "convert --force --output json x=URL out.vhdx",
        "convert --force --to raw URL out/",
        "convert --force URL out.vma",
    ] {
        let words = line.split(' ').map(|word| word.replace("URL", &disk));
        let run = imgtool(words).args(["--header", "@headers"]).within(dir.path()).go();
        keeps_silent(&run, dir.path());
        run.exits(0);
    }
}

#[test]
fn credentials_are_not_in_errors() {
    let dir = tempdir();
    images(dir.path());
    std::fs::write(dir.path().join("headers"), format!("X-Token: {CANARY}\n")).unwrap();
    let server = demanding(std::fs::read(dir.path().join("disk.qcow2")).unwrap());
    let mut lines: Vec<(&str, String)> = Vec::new();
    for path in ["/none", "/busy", "/loop", "/wrong", "/text"] {
        lines.push(("info --header @headers URL", url(&server, path)));
        lines.push((
            "convert --header @headers --progress json --to qcow2 URL out.raw.zst",
            url(&server, path),
        ));
    }
    for line in [
        "info URL",
        "convert --header @headers --disk none URL out.raw",
        "convert disk.raw URL",
        "convert disk.raw --to raw --target disk=URL",
        "map disk.raw URL",
        "URL",
    ] {
        lines.push((line, url(&server, "/disk.qcow2")));
    }
    lines.push(("info URL", format!("http://me:{CANARY}/x@{}/", server.address())));
    lines.push(("info URL", format!("nbd+unix:///x?socket=/none&password={CANARY}")));
    for (line, url) in lines.iter().filter(|(line, url)| !(line.contains("qcow2") && url.contains("/text"))) {
        let words = line.split(' ').map(|word| word.replace("URL", url));
        let run = imgtool(words).within(dir.path()).go();
        keeps_silent(&run, dir.path());
        assert!(!run.status.success() || url.contains("/text"), "{}", run.command);
    }
    let run = imgtool(["info", &format!("--header={CANARY}"), "http://host/"]).go();
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
