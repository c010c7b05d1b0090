//! Servers and networks that fail, and images that name servers.

use std::net::TcpListener;
use std::process::Command;

use imgtool_testing::http::{Answer, Server};
use imgtool_testing::{assert_same, names, require, tempdir, text};

use super::{images, serve};
use crate::support::imgtool;

#[test]
fn an_unavailable_server_exits_with_75() {
    let dir = tempdir();
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{nobody}/disk.qcow2");
    let out = dir.path().join("out.raw");
    let run = imgtool(["convert", &url, text(&out)]).go();
    assert!(run.changes.is_empty());
    run.ends_with(75).says("connection refused").says("hint: another try may help");
    imgtool(["info", &url]).go().ends_with(75);
    let run = imgtool(["convert", "--progress", "json", &url, text(&out)]).go().ends_with(75);
    assert!(run.stderr.contains(r#""kind":"unavailable""#), "{}", run.stderr);
    // Their codes have other meanings.
    imgtool(["compare", &url, &url]).go().exits(2);
    imgtool(["check", &url]).go().exits(1);
}

#[test]
fn errors_that_stay_exit_with_1() {
    let dir = tempdir();
    images(dir.path());
    let server = serve(dir.path());
    let run = imgtool(["convert", &server.url("/none.qcow2"), "out.raw"]).within(dir.path()).go();
    run.exits(1).says("the server answers 404 Not Found");
    let run =
        imgtool(["convert", "--salvage", &server.url("/disk.qcow2"), "out.raw"]).within(dir.path()).go();
    run.exits(1).says("can't be salvaged over a network");
    imgtool(["info", "s3://bucket/disk.qcow2"]).go().exits(1).says("s3:// is not supported yet");
    imgtool(["info", "http://host:port/"]).go().exits(2).says("is not a valid URL");
}

#[test]
fn a_change_in_the_middle_leaves_no_output() {
    let dir = tempdir();
    images(dir.path());
    let content = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    let server = Server::start(move |asked| {
        Answer::part(&content, asked, if asked.number < 4 { "\"1\"" } else { "\"2\"" })
    });
    let before = names(dir.path());
    let run = imgtool(["convert", &server.url("/disk.qcow2"), "out.raw"]).within(dir.path()).go();
    run.exits(1).says("changed while it was read");
    assert_eq!(names(dir.path()), before);
}

#[test]
fn a_conversion_survives_a_network_that_cuts() {
    let dir = tempdir();
    let [raw, _] = images(dir.path());
    let content = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    let server = Server::start(move |asked| {
        let answer = Answer::part(&content, asked, "\"1\"");
        let cut = answer.body.len() * (asked.number % 5) / 6;
        if asked.number % 2 == 1 { Answer { cut: Some(cut), ..answer } } else { answer }
    });
    let out = dir.path().join("out.raw");
    imgtool(["convert", &server.url("/disk.qcow2"), text(&out)]).ok();
    assert_same(&raw, &out, "cut");
}

#[test]
fn images_name_no_server_and_servers_no_file() {
    require!("qemu-img");
    let dir = tempdir();
    images(dir.path());
    let server = serve(dir.path());
    // A local image over a URL, and a remote image over a local file.
    let url = server.url("/disk.qcow2");
    let create = |backing: &str, name: &str| {
        let line = ["create", "-q", "-f", "qcow2", "-u", "-b", backing, "-F", "qcow2", name, "64M"];
        let run = Command::new("qemu-img").args(line).current_dir(dir.path()).status().unwrap();
        assert!(run.success());
    };
    create(&url, "over-url.qcow2");
    create("/etc/passwd", "over-file.qcow2");
    create("disk.qcow2", "over-neighbour.qcow2");
    for allowed in [&[][..], &["--allow-external", "chain"]] {
        let run = imgtool(["convert", "over-url.qcow2", "out.raw"]).args(allowed).within(dir.path()).go();
        run.exits(1);
        for name in ["/over-file.qcow2", "/over-neighbour.qcow2"] {
            let run =
                imgtool(["convert", &server.url(name), "out.raw"]).args(allowed).within(dir.path()).go();
            run.exits(1);
        }
    }
    let asked: Vec<String> = server.seen().into_iter().map(|asked| asked.path).collect();
    assert!(asked.iter().all(|path| path.starts_with("/over-")), "{asked:?}");
}

#[test]
fn a_proxy_is_used_and_its_redirects_are_checked() {
    let dir = tempdir();
    let [raw, _] = images(dir.path());
    let content = std::fs::read(dir.path().join("disk.qcow2")).unwrap();
    // Names of hosts are looked up by the proxy alone.
    let server = Server::start(move |asked| match asked.path.as_str() {
        "images.example:80" => Answer::status("200 OK"),
        "/metadata" => Answer::redirect("http://169.254.169.254/latest/meta-data"),
        "/mapped" => Answer::redirect("http://[::ffff:127.0.0.1]:1/"),
        _ => Answer::part(&content, asked, "\"1\""),
    });
    let through = |path: &str| {
        let url = format!("http://images.example{path}");
        let run = imgtool(["convert", &url, "out.raw"]).within(dir.path());
        run.env("http_proxy", &format!("http://{}", server.address()))
    };
    through("/disk.qcow2").ok();
    assert_same(&raw, &dir.path().join("out.raw"), "proxy");
    for path in ["/metadata", "/mapped"] {
        through(path).go().exits(1).says("redirects to the private address");
    }
    let run = imgtool(["info", "http://images.example/"]).env("http_proxy", "canary://me:canary@x").go();
    assert!(!run.stderr.contains("canary"), "{}", run.stderr);
    run.exits(2).says("http_proxy is not the URL of a proxy");
}
