//! [`Object`], a file on a server that answers ranges, read by position.

use std::io::{self, Read};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use imgtool_core::sync::lock;
use imgtool_core::{Error, Lease, Location, Memory, ReadAt, Result};
use ureq::http::header::{self, HeaderMap, HeaderValue};
use ureq::http::{Response, StatusCode};
use ureq::{Body, BodyReader};

use crate::ahead::Ahead;
use crate::blocks::{BLOCK, Blocks};
use crate::client::{Client, Failure, io_failure, named};
use crate::range::{ContentRange, refused_total};
use crate::retry::{Retry, TRIES_TO_READ, check_rate};
use crate::target::Target;

/// Number of requests at once. Our choice: with a round trip of 20 ms and 40 MB/s for a connection, a program
/// gains up to 16; servers permit at least that many connections.
pub(crate) const CONCURRENCY: usize = 16;

/// Version of a file: what every answer must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Version {
    /// Length in bytes.
    pub(crate) len: u64,
    pub(crate) etag: Option<HeaderValue>,
    pub(crate) modified: Option<HeaderValue>,
}

impl Version {
    /// Returns the version that the headers of an answer describe.
    pub(crate) fn new(len: u64, headers: &HeaderMap) -> Self {
        let get = |name| headers.get(name).cloned();
        Self { len, etag: get(header::ETAG), modified: get(header::LAST_MODIFIED) }
    }

    /// Adds the condition that the file has not changed. `If-Range` would bring the whole of a changed file.
    /// A weak tag can't be used, since it says nothing about bytes.
    fn pin(&self, headers: &mut HeaderMap) {
        let strong = self.etag.as_ref().filter(|etag| !etag.as_bytes().starts_with(b"W/"));
        match (strong, &self.modified) {
            (Some(etag), _) => drop(headers.insert(header::IF_MATCH, etag.clone())),
            (None, Some(modified)) => drop(headers.insert(header::IF_UNMODIFIED_SINCE, modified.clone())),
            (None, None) => {}
        }
    }

    /// Compares what an answer says, whatever the request asked for: many servers ignore conditions.
    fn check(&self, total: Option<u64>, headers: &HeaderMap) -> Result<()> {
        let is_other = |known: &Option<HeaderValue>, name| {
            known.as_ref().zip(headers.get(name)).is_some_and(|(known, found)| known != found)
        };
        let is_changed = total.is_some_and(|total| total != self.len)
            || is_other(&self.etag, header::ETAG)
            || (self.etag.is_none() && is_other(&self.modified, header::LAST_MODIFIED));
        if is_changed { Err(changed()) } else { Ok(()) }
    }
}

/// Returns the error for a file of which another version is there now.
fn changed() -> Error {
    Error::corrupt("the file on the server changed while it was read").hint("start again")
}

/// A file on a server. Clones share it.
#[derive(Clone)]
pub(crate) struct Object(Arc<Inner>);

struct Inner {
    location: Location,
    client: Client,
    /// Where the redirects of the URL ended, and how often they were followed.
    current: Mutex<(Target, u32)>,
    version: Version,
    /// First bytes, from the request that opened the file.
    prefix: Vec<u8>,
    blocks: Blocks,
    memory: Memory,
    _lease: Lease,
}

impl Object {
    /// Creates a file from the answer to the first request.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::LimitExceeded`] if `memory` can't lend the cache.
    pub(crate) fn new(
        location: Location,
        client: Client,
        target: Target,
        version: Version,
        prefix: Vec<u8>,
        memory: &Memory,
    ) -> Result<Self> {
        let lease = memory.lease(prefix.len() as u64, "the first bytes of a remote file")?;
        let (blocks, memory) = (Blocks::new(memory)?, memory.clone());
        let current = Mutex::new((target, 0));
        Ok(Self(Arc::new(Inner {
            location,
            client,
            current,
            version,
            prefix,
            blocks,
            memory,
            _lease: lease,
        })))
    }

    /// Fills `buf` by requests of its own.
    pub(crate) fn fetch(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let known = self.0.copy_prefix(buf, position);
        self.0.fetch(&mut buf[known..], position + known as u64).map_err(|e| e.path(&self.0.location).into())
    }

    /// Returns the bytes of a block.
    fn block(&self, index: u64) -> io::Result<Arc<[u8]>> {
        self.0.blocks.get(index, || {
            let start = index * BLOCK;
            // At most the length of a block.
            let mut bytes = vec![0; (self.0.version.len - start).min(BLOCK) as usize];
            self.fetch(&mut bytes, start)?;
            Ok(bytes)
        })
    }
}

impl Inner {
    /// Copies the part of `buf` that the first request brought. Returns its length.
    fn copy_prefix(&self, buf: &mut [u8], position: u64) -> usize {
        let known =
            usize::try_from(position).ok().and_then(|start| self.prefix.get(start..)).unwrap_or_default();
        let count = known.len().min(buf.len());
        buf[..count].copy_from_slice(&known[..count]);
        count
    }

    fn fetch(&self, buf: &mut [u8], position: u64) -> Result<()> {
        let (mut filled, mut retry, mut renewals) = (0, Retry::new(TRIES_TO_READ), 0);
        while filled < buf.len() {
            let (before, begun) = (filled, Instant::now());
            let (target, generation) = lock(&self.current).clone();
            let mut result = self.fetch_once(&target, buf, position, &mut filled);
            if matches!(result, Err(Failure::Denied(_))) && renewals == 0 && &target != self.client.origin() {
                result = self.renew(generation);
                renewals += u32::from(result.is_ok());
            }
            // Without the time to wait, for which the server may have asked.
            let spent = begun.elapsed();
            match result {
                Ok(()) => {}
                Err(Failure::Passing { error, wait }) => {
                    retry.wait(error.at(position + filled as u64), wait, filled > before)?;
                }
                Err(Failure::Denied(status)) => return Err(denied(status)),
                Err(Failure::Final(error)) => return Err(error.at(position + filled as u64)),
            }
            retry.count(spent, filled)?;
        }
        Ok(())
    }

    /// Sends one request for what is missing of `buf`, and fills it as far as the answer reaches.
    fn fetch_once(
        &self,
        target: &Target,
        buf: &mut [u8],
        position: u64,
        filled: &mut usize,
    ) -> Result<(), Failure> {
        let (first, last) = (position + *filled as u64, position + buf.len() as u64 - 1);
        let mut headers = range(&format!("bytes={first}-{last}"));
        self.version.pin(&mut headers);
        let response = self.client.get(target, &headers)?;
        let sent = self.sent_range(&response)?;
        if sent.first != first || sent.last > last {
            let ContentRange { first: other, last: end, .. } = sent;
            return Err(Error::malformed(format!(
                "the server sent bytes {other} to {end} instead of {first} to {last}"
            ))
            .into());
        }
        self.version.check(sent.total, response.headers())?;
        // At most the length of the rest of `buf`.
        let expected = *filled + sent.count() as usize;
        receive(response.into_body().into_reader(), &mut buf[..expected], filled)
    }

    /// Checks the status of an answer to a request for a range. Returns the range.
    fn sent_range(&self, response: &Response<Body>) -> Result<ContentRange, Failure> {
        match response.status() {
            StatusCode::PARTIAL_CONTENT => content_range(response.headers()).map_err(Failure::from),
            StatusCode::PRECONDITION_FAILED | StatusCode::RANGE_NOT_SATISFIABLE => Err(changed().into()),
            StatusCode::OK => {
                self.version.check(body_len(response.headers()), response.headers())?;
                Err(Error::unsupported(
                    "the server sends the whole file instead of a part, which it sent before",
                )
                .into())
            }
            status if is_denied(status) || status.is_redirection() => Err(Failure::Denied(status)),
            status => Err(Error::unsupported(format!("the server answers {}", named(status))).into()),
        }
    }

    /// Follows the redirects of the URL again: those of presigned URLs expire, and mirrors vanish. Does
    /// nothing if another thread has done so since `generation`.
    fn renew(&self, generation: u32) -> Result<(), Failure> {
        let mut current = lock(&self.current);
        if current.1 != generation {
            return Ok(());
        }
        let (response, target) = self.client.follow(&range("bytes=0-0"))?;
        let sent = self.sent_range(&response)?;
        self.version.check(sent.total, response.headers())?;
        *current = (target, generation + 1);
        Ok(())
    }
}

impl ReadAt for Object {
    fn read_exact_at(&self, buf: &mut [u8], position: u64) -> io::Result<()> {
        let end = position.checked_add(buf.len() as u64).filter(|end| *end <= self.len());
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let known = self.0.copy_prefix(buf, position);
        if (buf.len() - known) as u64 >= BLOCK {
            return self.fetch(buf, position);
        }
        let mut at = position + known as u64;
        while at < end {
            let block = self.block(at / BLOCK)?;
            // Within a block, so it fits.
            let rest = &block[(at % BLOCK) as usize..];
            let target = &mut buf[(at - position) as usize..];
            let count = rest.len().min(target.len());
            target[..count].copy_from_slice(&rest[..count]);
            at += count as u64;
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.0.version.len
    }

    fn concurrency(&self) -> usize {
        CONCURRENCY
    }

    fn reader(&self) -> Option<Box<dyn Read + Send>> {
        Ahead::new(self, self.len(), &self.0.memory).map(|ahead| Box::new(ahead) as Box<dyn Read + Send>)
    }

    fn release(&self) {
        self.0.blocks.clear();
    }
}

/// Fills `buf` from `filled` on. The body must end there.
pub(crate) fn receive(mut body: BodyReader<'_>, buf: &mut [u8], filled: &mut usize) -> Result<(), Failure> {
    let (begun, start) = (Instant::now(), *filled);
    while *filled < buf.len() {
        match body.read(&mut buf[*filled..]) {
            Ok(0) => return Err(Failure::passing("the server ended its answer early")),
            Ok(count) => *filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_failure(error)),
        }
        check_rate(begun.elapsed(), *filled - start)?;
    }
    // Reads the end as well, so that the connection can be used again.
    match body.read(&mut [0]) {
        Ok(1..) => Err(Error::malformed("the server sent more bytes than it announced").into()),
        _ => Ok(()),
    }
}

/// Returns a header that asks for a range.
pub(crate) fn range(text: &str) -> HeaderMap {
    let value = HeaderValue::from_str(text).ok();
    value.map(|value| (header::RANGE, value)).into_iter().collect()
}

/// Parses the range of an answer.
pub(crate) fn content_range(headers: &HeaderMap) -> Result<ContentRange> {
    let text = headers.get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let range = text.and_then(ContentRange::parse);
    range.ok_or_else(|| Error::malformed("the server does not say which bytes it sends (Content-Range)"))
}

/// Returns the length of an object whose server refused a range.
pub(crate) fn refused_len(headers: &HeaderMap) -> Option<u64> {
    refused_total(headers.get(header::CONTENT_RANGE)?.to_str().ok()?)
}

/// Returns the length of a body, if the server says it.
pub(crate) fn body_len(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}

/// True for a status by which a server refuses a URL.
pub(crate) fn is_denied(status: StatusCode) -> bool {
    use StatusCode as Code;
    matches!(status, Code::UNAUTHORIZED | Code::FORBIDDEN | Code::NOT_FOUND | Code::GONE)
}

/// Returns the error for a refused URL.
pub(crate) fn denied(status: StatusCode) -> Error {
    let error = Error::refused(format!("the server answers {}", named(status)));
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            error.remedied_by(imgtool_core::Remedy::SendHeaders)
        }
        _ => error.hint("check the URL"),
    }
}

/// Returns the error of a failure after which nothing is tried again.
pub(crate) fn final_error(failure: Failure) -> Error {
    match failure {
        Failure::Passing { error, .. } => error.hint("another try may help"),
        Failure::Denied(status) => denied(status),
        Failure::Final(error) => error,
    }
}
