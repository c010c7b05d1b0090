//! Commands whose sources are URLs.

use imgtool_testing::http::{Answer, Server};
use imgtool_testing::{assert_same, fixture, names, oracles, require, tempdir, text};

use super::{images, serve};
use crate::support::imgtool;

#[test]
fn every_command_reads_a_url_as_a_file() {
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    let server = serve(dir.path());
    let url = server.url("/disk.qcow2");
    for line in ["info", "map", "check", "checksum", "measure -O qcow2", "map --output json"] {
        let words: Vec<&str> = line.split(' ').collect();
        let remote = imgtool(words.iter().chain([&&*url])).ok().text();
        let local = imgtool(words.iter().chain([&text(&qcow2)])).ok().text();
        // `info` shows how much of a file its file system stores.
        let local: String =
            local.lines().filter(|line| !line.starts_with("disk size")).map(|l| format!("{l}\n")).collect();
        let local = local.replace(text(&qcow2), &url);
        if line != "map --output json" && line != "info" {
            assert_eq!(remote, local, "{line}");
        }
    }
    imgtool(["compare", &url, text(&raw)]).ok();
    imgtool(["compare", text(&raw), &url]).ok();
    let json = imgtool(["info", "--output", "json", &url]).ok().json();
    assert_eq!((json["format"].as_str(), json["filename"].as_str()), (Some("qcow2"), Some(&*url)));
}

#[test]
fn a_conversion_transfers_what_the_image_stores() {
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    let server = serve(dir.path());
    for threads in ["1", "16"] {
        let before = (server.sent(), server.seen().len());
        let out = dir.path().join(format!("out-{threads}.raw"));
        imgtool(["convert", "-m", threads, &server.url("/disk.qcow2"), text(&out)]).ok();
        assert_same(&raw, &out, threads);
        let stored = std::fs::metadata(&qcow2).unwrap().len() as usize;
        let (sent, requests) = (server.sent() - before.0, server.seen().len() - before.1);
        assert!(sent <= stored * 102 / 100 + (1 << 20), "{sent} of {stored}");
        assert!(requests <= 80, "{requests} requests");
    }
    // The output has the same bytes as that of the file.
    let (remote, local) = (dir.path().join("remote.vhdx"), dir.path().join("local.vhdx"));
    imgtool(["convert", "--verify", &server.url("/disk.qcow2"), text(&remote)]).ok();
    imgtool(["convert", text(&qcow2), text(&local)]).ok();
    assert_same(&local, &remote, "vhdx");
}

#[test]
fn an_output_in_a_directory_is_named_after_the_url() {
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    std::fs::rename(qcow2, dir.path().join("my disk.qcow2")).unwrap();
    let server = serve(dir.path());
    let url = server.url("/my%20disk.qcow2?name=/x.vhd");
    imgtool(["convert", "--to", "raw", &url, "out/"]).within(dir.path()).ok();
    assert_eq!(names(&dir.path().join("out")), ["my disk.raw"]);
    assert_same(&raw, &dir.path().join("out/my disk.raw"), "named");
}

#[test]
fn archives_and_compressed_disks_are_read_from_urls() {
    require!("zstd", "xz");
    let dir = tempdir();
    let [raw, _] = images(dir.path());
    let bytes = std::fs::read(&raw).unwrap();
    for (name, tool) in [("disk.raw.zst", "zstd"), ("disk.raw.xz", "xz")] {
        std::fs::write(dir.path().join(name), oracles::filter(tool, &["-c", "-T1"], &bytes)).unwrap();
    }
    imgtool(["convert", "-c", "disk.raw", "seekable.raw.zst"]).within(dir.path()).ok();
    imgtool(["convert", "a=disk.qcow2", "b=disk.raw", "vm.ova"]).within(dir.path()).ok();
    std::fs::copy(fixture("two-disks.vma.zst"), dir.path().join("vm.vma.zst")).unwrap();
    std::fs::copy(fixture("sparse.vma"), dir.path().join("sparse.vma")).unwrap();
    let server = serve(dir.path());
    for name in ["disk.raw.zst", "disk.raw.xz", "seekable.raw.zst"] {
        let out = dir.path().join(format!("{name}.raw"));
        imgtool(["convert", &server.url(&format!("/{name}")), text(&out)]).ok();
        assert_same(&raw, &out, name);
    }
    for name in ["vm.ova", "vm.vma.zst", "sparse.vma"] {
        let (remote, local) = (format!("remote-{name}/"), format!("local-{name}/"));
        imgtool(["convert", "--to", "qcow2", &server.url(&format!("/{name}")), &remote])
            .within(dir.path())
            .ok();
        imgtool(["convert", "--to", "qcow2", name, &local]).within(dir.path()).ok();
        let (remote, local) = (dir.path().join(remote), dir.path().join(local));
        assert_eq!(names(&remote), names(&local), "{name}");
        // The description of a machine contains the paths of its disks.
        for file in names(&local).into_iter().filter(|name| name.ends_with(".qcow2")) {
            assert_same(&local.join(&file), &remote.join(&file), &file);
        }
    }
}

#[test]
fn a_server_without_ranges_gives_a_stream() {
    let dir = tempdir();
    let [raw, qcow2] = images(dir.path());
    let (as_raw, as_qcow2) = (std::fs::read(&raw).unwrap(), std::fs::read(qcow2).unwrap());
    let server = Server::start(move |asked| match asked.path.as_str() {
        "/disk.raw" => Answer::whole(&as_raw),
        _ => Answer::whole(&as_qcow2),
    });
    for name in ["/disk.raw", "/disk.qcow2"] {
        let out = dir.path().join("out.raw");
        imgtool(["convert", "--force", &server.url(name), text(&out)]).ok();
        assert_same(&raw, &out, name);
    }
    assert_eq!(server.seen().len(), 2);
}

#[test]
fn memory_stays_within_the_limit() {
    let dir = tempdir();
    let [raw, _] = images(dir.path());
    let server = serve(dir.path());
    let out = dir.path().join("out.raw");
    let run = imgtool(["convert", &server.url("/disk.qcow2"), text(&out)]).measured().go();
    assert!(run.exits(0).peak_memory <= 256 << 20);
    assert_same(&raw, &out, "256 MiB");
}
