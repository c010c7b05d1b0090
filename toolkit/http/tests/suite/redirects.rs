//! Redirects: followed once, and to nothing that the user would not have named.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use imgtool_core::ErrorKind;
use imgtool_http::Settings;
use imgtool_testing::http::{Answer, Server};

use super::{content, open, open_with, random, read_all};

#[test]
fn follows_a_redirect_once() {
    let (content, all) = (content(), content());
    let mirror = Server::start(move |asked| {
        assert_eq!(asked.header("authorization"), None);
        assert_eq!(asked.header("x-token"), None);
        Answer::part(&all, asked, "\"1\"")
    });
    let to = mirror.url("/mirror?sig=1");
    let server = Server::start(move |asked| match asked.path.as_str() {
        "/disk.raw" => Answer::redirect("there"),
        _ => Answer::redirect(&to),
    });
    let mut settings = Settings::default();
    settings.add_headers("X-Token: canary").unwrap();
    let url = format!("http://me:secret@{}/disk.raw", server.address());
    let input = open_with(&url, settings).unwrap().into_random().unwrap();
    assert_eq!(read_all(&input).unwrap(), content);
    let paths: Vec<String> = server.seen().into_iter().map(|asked| asked.path).collect();
    assert_eq!(paths, ["/disk.raw", "/there"]);
    assert!(server.seen().iter().all(|asked| asked.header("x-token") == Some("canary")));
}

#[test]
fn follows_again_when_a_target_expires() {
    let (content, all) = (content(), content());
    let is_expired = Arc::new(AtomicBool::new(false));
    let expired = Arc::clone(&is_expired);
    // The redirecting server is busy once.
    let is_busy = AtomicBool::new(true);
    let server = Server::start(move |asked| match asked.path.as_str() {
        "/disk.raw" if expired.load(Ordering::SeqCst) && is_busy.swap(false, Ordering::SeqCst) => {
            Answer::status("503 Service Unavailable")
        }
        "/disk.raw" if expired.load(Ordering::SeqCst) => Answer::redirect("/new"),
        "/disk.raw" => Answer::redirect("/old"),
        "/old" if expired.load(Ordering::SeqCst) => Answer::status("403 Forbidden"),
        _ => Answer::part(&all, asked, "\"1\""),
    });
    let input = random(&server);
    is_expired.store(true, Ordering::SeqCst);
    assert_eq!(read_all(&input).unwrap(), content);
    let followed = server.seen().iter().filter(|asked| asked.path == "/disk.raw").count();
    assert_eq!(followed, 3);
}

#[test]
fn another_version_behind_the_redirect_is_a_change() {
    let (old, new) = (content(), content());
    let server = Server::start(move |asked| match (asked.number, asked.path.as_str()) {
        (0, _) => Answer::redirect("/old"),
        (1, _) => Answer::part(&old, asked, "\"1\""),
        (_, "/disk.raw") => Answer::redirect("/new"),
        (_, "/old") => Answer::status("404 Not Found"),
        _ => Answer::part(&new, asked, "\"2\""),
    });
    let error = read_all(&random(&server)).unwrap_err();
    assert_eq!(error.message(), "the file on the server changed while it was read");
}

#[test]
fn refuses_loops_and_other_schemes() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/file" => Answer::redirect("file:///etc/passwd"),
        "/nbd" => Answer::redirect("nbd://localhost/x"),
        _ => Answer::redirect("/loop"),
    });
    for path in ["/file", "/nbd"] {
        assert_eq!(open(&server.url(path)).unwrap_err().kind(), ErrorKind::Refused, "{path}");
    }
    let error = open(&server.url("/loop")).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::LimitExceeded, "more than 10 redirects"));
}
