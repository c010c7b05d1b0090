//! A file that is read in parts, over a network that fails.

use imgtool_core::ErrorKind;
use imgtool_testing::http::{Answer, Server};

use super::{content, open, random, read_all, stream};

#[test]
fn reads_by_position_and_as_a_stream() {
    let content = content();
    let server = Server::of_file(content.clone());
    assert_eq!(read_all(&random(&server)).unwrap(), content);
    assert_eq!(stream(open(&server.url("/disk.raw")).unwrap()).unwrap(), content);
    let seen = server.seen();
    assert!(seen.iter().all(|asked| asked.header("accept-encoding") == Some("identity")));
    assert!(
        seen.iter()
            .skip(1)
            .filter(|asked| asked.range() != Some((0, (1 << 20) - 1)))
            .all(|asked| { asked.header("if-match") == Some("\"1\"") && asked.header("if-range").is_none() })
    );
}

#[test]
fn small_reads_share_a_block() {
    let content = content();
    let server = Server::of_file(content.clone());
    let input = random(&server);
    let mut bytes = [0; 512];
    // The first MiB came with the first request.
    for position in (0..1 << 20).step_by(4096) {
        input.read_exact_at(&mut bytes, position).unwrap();
    }
    assert_eq!(server.seen().len(), 1);
    let start = 2 << 20;
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (input, content) = (&input, &content);
            scope.spawn(move || {
                let mut bytes = [0; 512];
                for position in (start + thread * 512..start + (256 << 10)).step_by(4096) {
                    input.read_exact_at(&mut bytes, position as u64).unwrap();
                    assert_eq!(bytes, content[position..position + 512]);
                }
            });
        }
    });
    assert_eq!(server.seen().len(), 2);
    assert_eq!(server.sent(), (1 << 20) + (256 << 10));
    let end = content.len() as u64;
    assert_eq!(input.read_exact_at(&mut bytes, end - 511).unwrap_err().kind(), ErrorKind::Corrupt);
}

#[test]
fn goes_on_where_a_connection_broke() {
    let content = content();
    let all = content.clone();
    let server = Server::start(move |asked| {
        let answer = Answer::part(&all, asked, "\"1\"");
        match asked.number % 3 {
            0 => answer,
            1 => Answer { cut: Some(700_000), ..answer },
            _ => Answer { cut: Some(0), ..answer },
        }
    });
    assert_eq!(read_all(&random(&server)).unwrap(), content);
    assert_eq!(stream(open(&server.url("/x")).unwrap()).unwrap(), content);
    // What came is not transferred again: two readers, and the first bytes twice.
    assert!(server.sent() <= 2 * content.len() + (2 << 20), "{}", server.sent());
}

#[test]
fn waits_for_a_busy_server() {
    let content = content();
    let all = content.clone();
    let server = Server::start(move |asked| match asked.number {
        // Error pages may be encoded.
        0 => Answer::status("503 Service Unavailable")
            .with("Retry-After", "0")
            .with("Content-Encoding", "gzip"),
        2 => Answer::status("429 Too Many Requests"),
        4 => Answer::status("500 Internal Server Error"),
        _ => Answer::part(&all, asked, "\"1\""),
    });
    assert_eq!(read_all(&random(&server)).unwrap(), content);
}

#[test]
fn a_server_that_stays_busy_is_unavailable() {
    let server = Server::start(|_| Answer::status("503 Service Unavailable"));
    let error = open(&server.url("/disk.raw?sig=canary")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    let address = server.address();
    assert_eq!(
        format!("{error:#}"),
        format!("http://{address}/disk.raw: the server answers 503 Service Unavailable")
    );
    assert_eq!(server.seen().len(), 4);
    // Nobody listens.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = open(&format!("http://{address}/x")).unwrap_err();
    assert_eq!(
        (error.kind(), error.message()),
        (ErrorKind::Unavailable, "the connection failed: connection refused")
    );
}

#[test]
fn never_mixes_two_versions() {
    let content = content();
    // By the ETag, against a server that knows no conditions; by the length; by the time.
    let other = content.iter().map(|byte| !byte).collect::<Vec<u8>>();
    for kind in 0..4 {
        let (old, new) = (content.clone(), other.clone());
        let server = Server::start(move |asked| match (asked.number, kind) {
            (0, 3) => {
                let mut answer = Answer::part(&old, asked, "");
                answer.headers.pop();
                answer.with("Last-Modified", "Sun, 01 Nov 2026 00:00:00 GMT")
            }
            (0, _) => Answer::part(&old, asked, "\"1\""),
            // Answers 412.
            (_, 0) => Answer::part(&new, asked, "\"2\""),
            (_, 1) => {
                let mut answer = Answer::part(&new, asked, "\"1\"");
                answer.headers.pop();
                answer.with("ETag", "\"2\"")
            }
            (_, 2) => Answer::part(&new[..new.len() - 1], asked, "\"1\""),
            _ => {
                assert_eq!(asked.header("if-unmodified-since"), Some("Sun, 01 Nov 2026 00:00:00 GMT"));
                let mut answer = Answer::part(&new, asked, "");
                answer.headers.pop();
                answer.with("Last-Modified", "Mon, 02 Nov 2026 00:00:00 GMT")
            }
        });
        let error = read_all(&random(&server)).unwrap_err();
        assert_eq!(error.message(), "the file on the server changed while it was read", "{kind}");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{kind}");
    }
}

#[test]
fn a_weak_tag_is_compared_but_not_sent() {
    let content = content();
    let all = content.clone();
    let server = Server::start(move |asked| {
        assert_eq!(asked.header("if-match"), None);
        Answer::part(&all, asked, if asked.number < 3 { "W/\"1\"" } else { "W/\"2\"" })
    });
    let input = random(&server);
    let mut bytes = vec![0; 1 << 20];
    input.read_exact_at(&mut bytes, 2 << 20).unwrap();
    input.read_exact_at(&mut bytes, 3 << 20).unwrap();
    let error = input.read_exact_at(&mut bytes, 4 << 20).unwrap_err();
    assert_eq!(error.message(), "the file on the server changed while it was read");
}
