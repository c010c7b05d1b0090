//! A server of HTTP for tests, which can misbehave: each test says what it answers.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// A request, as the server received it.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Number of the request, from 0 on.
    pub number: usize,
    /// Path and query.
    pub path: String,
    /// Names, in lower case, and values.
    pub headers: Vec<(String, String)>,
}

impl Asked {
    /// Returns the value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Returns the first and the last byte of the range.
    pub fn range(&self) -> Option<(usize, usize)> {
        let (first, last) = self.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse().ok()?, last.parse().ok()?))
    }
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Number and name of the status.
    pub status: String,
    /// Further headers.
    pub headers: Vec<(String, String)>,
    /// Bytes of the body.
    pub body: Vec<u8>,
    /// Number of bytes after which the connection is cut, if it is.
    pub cut: Option<usize>,
}

impl Answer {
    /// Creates an answer without a body.
    pub fn status(status: &str) -> Self {
        Self { status: status.to_owned(), headers: Vec::new(), body: Vec::new(), cut: None }
    }

    /// Adds a header.
    #[must_use]
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Creates a redirect.
    pub fn redirect(to: &str) -> Self {
        Self::status("302 Found").with("Location", to)
    }

    /// Answers with the whole content, whatever was asked for.
    pub fn whole(content: &[u8]) -> Self {
        Self { body: content.to_vec(), ..Self::status("200 OK") }
    }

    /// Answers as a server with ranges does, with this ETag.
    pub fn part(content: &[u8], asked: &Asked, etag: &str) -> Self {
        if asked.header("if-match").is_some_and(|wanted| wanted != etag) {
            return Self::status("412 Precondition Failed");
        }
        let Some((first, last)) = asked.range() else { return Self::whole(content).with("ETag", etag) };
        if first >= content.len() {
            let all = format!("bytes */{}", content.len());
            return Self::status("416 Range Not Satisfiable").with("Content-Range", &all);
        }
        let last = last.min(content.len() - 1);
        let range = format!("bytes {first}-{last}/{}", content.len());
        Self { body: content[first..=last].to_vec(), ..Self::status("206 Partial Content") }
            .with("Content-Range", &range)
            .with("ETag", etag)
    }
}

/// A server on a port of its own. It serves until the test ends.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Asked>>>,
    sent: Arc<Mutex<usize>>,
}

impl Server {
    /// Starts a server that answers each request by `answer`.
    pub fn start(answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = Self { address, seen: Arc::default(), sent: Arc::default() };
        let (seen, sent, answer) = (Arc::clone(&server.seen), Arc::clone(&server.sent), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, sent, answer) = (Arc::clone(&seen), Arc::clone(&sent), Arc::clone(&answer));
                // A client that leaves is none of the server's business.
                thread::spawn(move || serve(stream, &seen, &sent, &*answer));
            }
        });
        server
    }

    /// Starts a server with ranges for one file.
    pub fn of_file(content: Vec<u8>) -> Self {
        Self::start(move |asked| Answer::part(&content, asked, "\"1\""))
    }

    /// Returns the URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Returns the host and the port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns all requests so far.
    pub fn seen(&self) -> Vec<Asked> {
        self.seen.lock().unwrap().clone()
    }

    /// Returns the number of bytes of all bodies so far.
    pub fn sent(&self) -> usize {
        *self.sent.lock().unwrap()
    }
}

fn serve(
    stream: TcpStream,
    seen: &Mutex<Vec<Asked>>,
    sent: &Mutex<usize>,
    answer: &dyn Fn(&Asked) -> Answer,
) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut reader, mut writer) = (BufReader::new(stream.try_clone()?), stream);
    while let Some(mut asked) = read_request(&mut reader)? {
        {
            let mut seen = seen.lock().unwrap();
            asked.number = seen.len();
            seen.push(asked.clone());
        }
        let Answer { status, headers, body, cut } = answer(&asked);
        let mut head = format!("HTTP/1.1 {status}\r\n");
        if !headers.iter().any(|(name, _)| name == "Content-Length") {
            head += &format!("Content-Length: {}\r\n", body.len());
        }
        headers.iter().for_each(|(name, value)| head += &format!("{name}: {value}\r\n"));
        let body = &body[..cut.unwrap_or(body.len()).min(body.len())];
        *sent.lock().unwrap() += body.len();
        writer.write_all(format!("{head}\r\n").as_bytes())?;
        writer.write_all(body)?;
        if cut.is_some() {
            return Ok(());
        }
    }
    Ok(())
}

fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Asked>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let path = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
    let headers = lines.iter().skip(1).filter_map(|line| line.split_once(':'));
    let headers = headers.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
    Ok(Some(Asked { number: 0, path, headers }))
}
