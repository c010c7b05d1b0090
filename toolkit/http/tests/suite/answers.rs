//! Answers that are not those to the request.

use imgtool_core::{ErrorKind, Remedy};
use imgtool_http::Settings;
use imgtool_testing::http::{Answer, Server};

use super::{content, open, open_with, random, read_all, stream};

/// Changes the header `Content-Range` of an answer.
fn with_range(mut answer: Answer, range: &str) -> Answer {
    answer.headers.retain(|(name, _)| name != "Content-Range");
    if range.is_empty() { answer } else { answer.with("Content-Range", range) }
}

#[test]
fn refuses_other_bytes_than_those_asked_for() {
    for range in
        ["bytes 0-1048575/5243003", "bytes 1048577-2097152/5243003", "bytes 0-9", "", "bytes 9-0/5243003"]
    {
        let (all, range_of_later) = (content(), range.to_owned());
        let server = Server::start(move |asked| {
            let answer = Answer::part(&all, asked, "\"1\"");
            if asked.number == 0 { answer } else { with_range(answer, &range_of_later) }
        });
        let error = read_all(&random(&server)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Malformed, "{range}: {error}");
    }
}

#[test]
fn refuses_a_first_answer_with_other_bytes() {
    for range in ["bytes 1-1048576/5243003", "bytes 0-2097151/5243003", "bytes 0-9/5", "x"] {
        let all = content();
        let server = Server::start(move |asked| with_range(Answer::part(&all, asked, "\"1\""), range));
        assert_eq!(open(&server.url("/x")).unwrap_err().kind(), ErrorKind::Malformed, "{range}");
    }
}

#[test]
fn refuses_more_bytes_than_announced() {
    let all = content();
    let server = Server::start(move |asked| {
        let mut answer = Answer::part(&all, asked, "\"1\"");
        if asked.number > 0 {
            answer.body.push(0);
        }
        answer
    });
    let error = read_all(&random(&server)).unwrap_err();
    assert_eq!(error.message(), "the server sent more bytes than it announced");
}

#[test]
fn refuses_the_whole_file_in_place_of_a_later_part() {
    let all = content();
    let server = Server::start(move |asked| match asked.number {
        0 => Answer::part(&all, asked, "\"1\""),
        _ => Answer::whole(&all).with("ETag", "\"1\""),
    });
    let error = read_all(&random(&server)).unwrap_err();
    assert_eq!(error.message(), "the server sends the whole file instead of a part, which it sent before");
}

#[test]
fn refuses_an_encoding_that_was_not_asked_for() {
    let all = content();
    let server =
        Server::start(move |asked| Answer::part(&all, asked, "\"1\"").with("Content-Encoding", "gzip"));
    let error = open(&server.url("/x")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.message().contains("(gzip)"), "{error}");
}

#[test]
fn a_server_without_ranges_gives_a_stream() {
    let (content, all) = (content(), content());
    let server = Server::start(move |_| Answer::whole(&all).with("Accept-Ranges", "bytes"));
    let input = open(&server.url("/disk.raw")).unwrap();
    assert!(input.is_stream());
    assert_eq!(stream(input).unwrap(), content);
    assert_eq!(server.seen().len(), 1);
}

#[test]
fn a_stream_that_is_cut_is_an_error() {
    let all = content();
    let server = Server::start(move |_| Answer { cut: Some(4 << 20), ..Answer::whole(&all) });
    let error = stream(open(&server.url("/disk.raw")).unwrap()).unwrap_err();
    let error = imgtool_core::Error::io("read", error);
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:#}");
}

#[test]
fn finds_the_length_that_no_answer_states() {
    let (content, all) = (content(), content());
    let server = Server::start(move |asked| {
        if asked.header("range") == Some("bytes=-1") {
            let last = all.len() - 1;
            let answer = Answer { body: vec![all[last]], ..Answer::status("206 Partial Content") };
            return answer.with("Content-Range", &format!("bytes {last}-{last}/*"));
        }
        let (first, last) = asked.range().unwrap();
        with_range(Answer::part(&all, asked, "\"1\""), &format!("bytes {first}-{last}/*"))
    });
    assert_eq!(read_all(&random(&server)).unwrap(), content);
}

#[test]
fn an_empty_file_has_no_range() {
    let server = Server::of_file(Vec::new());
    assert_eq!(random(&server).len(), 0);
}

#[test]
fn errors_of_a_server_name_what_helps() {
    let server = Server::start(|asked| match asked.path.as_str() {
        "/secret" => Answer::status("401 Unauthorized"),
        "/teapot" => Answer::status("418 I'm a teapot"),
        _ => Answer::status("404 Not Found"),
    });
    let error = open(&server.url("/secret")).unwrap_err();
    assert_eq!((error.kind(), error.remedy()), (ErrorKind::Refused, Some(&Remedy::SendHeaders)));
    assert_eq!(open(&server.url("/none")).unwrap_err().message(), "the server answers 404 Not Found");
    assert_eq!(open(&server.url("/teapot")).unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(server.seen().len(), 3);
}

#[test]
fn headers_and_user_parts_are_sent() {
    let all = content();
    let server = Server::start(move |asked| {
        assert_eq!(asked.header("authorization"), Some("Basic bWU6cEBzcw=="));
        assert_eq!(asked.header("x-token"), Some("canary"));
        Answer::part(&all, asked, "\"1\"")
    });
    let mut settings = Settings::default();
    settings.add_headers("X-Token: canary").unwrap();
    let url = format!("http://me:p%40ss@{}/x", server.address());
    let input = open_with(&url, settings).unwrap().into_random().unwrap();
    read_all(&input).unwrap();
    assert!(server.seen().len() > 1);
}
