//! Opens a URL: one request for the first bytes, whose answer says how the file can be read.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use imgtool_core::location::Url;
use imgtool_core::{Error, Input, Location, Memory, Result};
use ureq::http::StatusCode;
use ureq::http::header::HeaderMap;
use ureq::{Body, BodyReader};

use crate::client::{Client, Failure};
use crate::object::{self, CONCURRENCY, Object, Version, content_range, range};
use crate::range::ContentRange;
use crate::retry::{Retry, TRIES_TO_OPEN, check_rate};
use crate::settings::Settings;

/// Number of bytes that the first request asks for. Our choice: tables near the front of most images come
/// with it. `HEAD` would be an error for a presigned URL, whose signature is for one method.
const FIRST: u64 = 1 << 20;

/// Opens a URL.
///
/// # Errors
/// As [`imgtool_core::UrlOpener::open`].
pub(crate) fn open(url: &Url, settings: &Settings, memory: &Memory) -> Result<Input> {
    let client = Client::new(url.secret_text(), settings, CONCURRENCY)?;
    let location = Location::Url(url.clone());
    let mut retry = Retry::new(TRIES_TO_OPEN);
    loop {
        match first(&client) {
            Ok(First::Parts { target, version, prefix }) => {
                let object = Object::new(location.clone(), client, target, version, prefix, memory)?;
                return Ok(Input::from_read_at(location, Arc::new(object)));
            }
            Ok(First::Whole { len, body }) => {
                return Input::from_reader(
                    location,
                    Box::new(Whole { len, received: 0, spent: Duration::ZERO, is_broken: false, body }),
                );
            }
            Err(Failure::Passing { error, wait }) => retry.wait(error, wait, false)?,
            Err(failure) => return Err(object::final_error(failure)),
        }
    }
}

/// Answer to the first request.
enum First {
    /// The server sends parts: the file is read by position.
    Parts { target: crate::target::Target, version: Version, prefix: Vec<u8> },
    /// The server sends the whole file alone: this answer is read as a stream.
    Whole { len: Option<u64>, body: BodyReader<'static> },
}

fn first(client: &Client) -> Result<First, Failure> {
    let (response, target) = client.follow(&range(&format!("bytes=0-{}", FIRST - 1)))?;
    let (parts, body) = response.into_parts();
    match parts.status {
        StatusCode::PARTIAL_CONTENT => {
            let sent = content_range(&parts.headers)?;
            let prefix = receive_prefix(sent, body)?;
            let len = match sent.total {
                Some(total) => total,
                None => total_by_end(client, &target)?,
            };
            if len < prefix.len() as u64 {
                return Err(Error::malformed(format!(
                    "the server sent more than the {len} bytes of the file"
                ))
                .into());
            }
            Ok(First::Parts { target, version: Version::new(len, &parts.headers), prefix })
        }
        StatusCode::OK => {
            Ok(First::Whole { len: object::body_len(&parts.headers), body: body.into_reader() })
        }
        StatusCode::RANGE_NOT_SATISFIABLE if object::refused_len(&parts.headers) == Some(0) => {
            Ok(First::Parts { target, version: Version::new(0, &HeaderMap::new()), prefix: Vec::new() })
        }
        status if object::is_denied(status) => Err(Failure::Denied(status)),
        status => {
            Err(Error::unsupported(format!("the server answers {}", crate::client::named(status))).into())
        }
    }
}

/// Receives the first bytes, which must be those that were asked for.
fn receive_prefix(sent: ContentRange, body: Body) -> Result<Vec<u8>, Failure> {
    if sent.first != 0 || sent.last >= FIRST {
        let ContentRange { first, last, .. } = sent;
        return Err(Error::malformed(format!(
            "the server sent bytes {first} to {last} instead of the first"
        ))
        .into());
    }
    // At most `FIRST`.
    let mut prefix = vec![0; sent.count() as usize];
    object::receive(body.into_reader(), &mut prefix, &mut 0)?;
    Ok(prefix)
}

/// Finds the length by asking for the last byte: some servers do not state it otherwise.
fn total_by_end(client: &Client, target: &crate::target::Target) -> Result<u64, Failure> {
    let response = client.get(target, &range("bytes=-1"))?;
    let unknown = || Error::unsupported("the server does not say how long the file is");
    if response.status() != StatusCode::PARTIAL_CONTENT {
        return Err(unknown().into());
    }
    let sent = content_range(response.headers())?;
    let len = sent.last.checked_add(1).filter(|_| sent.first == sent.last);
    Ok(len.ok_or_else(unknown)?)
}

/// The one answer of a server that sends no parts.
struct Whole {
    /// Length in bytes, if the server states it.
    len: Option<u64>,
    received: usize,
    /// Time spent in reads.
    spent: Duration,
    /// True after an error: nothing must follow it.
    is_broken: bool,
    body: BodyReader<'static>,
}

impl Whole {
    /// Reads what is there, and sorts the errors.
    fn receive(&mut self, buf: &mut [u8]) -> Result<usize> {
        let begun = Instant::now();
        let count = loop {
            match self.body.read(buf) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(object::final_error(crate::client::io_failure(error))),
                Ok(count) => break count,
            }
        };
        self.spent += begun.elapsed();
        self.received = self.received.saturating_add(count);
        let is_early =
            count == 0 && !buf.is_empty() && self.len.is_some_and(|len| (self.received as u64) < len);
        if is_early {
            return Err(Error::unavailable("the server ended its answer early"));
        }
        check_rate(self.spent, self.received).map(|()| count)
    }
}

impl Read for Whole {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if std::mem::replace(&mut self.is_broken, true) {
            return Err(io::Error::other("the stream is broken"));
        }
        let count = self.receive(buf).map_err(|error| {
            // The server sends no part, so nothing can be tried again here.
            io::Error::from(error.hint("another try may help"))
        })?;
        self.is_broken = false;
        Ok(count)
    }
}
