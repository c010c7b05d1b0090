//! The protocol: negotiation and replies (proto.md of the NBD project; all numbers are big-endian).
//!
//! Every function works on a reader or writer, and trusts nothing that it reads.

use std::io::{self, Read, Write};
use std::ops::Range;

use imgtool_core::{Error, Result};

/// Maximum length of a reply to an option in bytes. Our limit: names have 4096, and several come in one
/// reply.
const MAX_OPTION: u32 = 64 << 10;

/// Maximum number of replies to an option. Our limit: one for each piece of information.
const MAX_REPLIES: usize = 64;

/// Maximum length of the text of an error in bytes.
const MAX_TEXT: u32 = 64 << 10;

/// Maximum number of errors in one reply. Our limit: servers send one.
const MAX_ERRORS: u32 = 64;

/// Number of extents that are kept of one reply. Our limit; the rest takes another request.
const MAX_EXTENTS: usize = 64 << 10;

/// Maximum number of extents in one reply (proto.md: 2^20).
const MAX_SENT_EXTENTS: u32 = 1 << 20;

/// Payload that a server takes if it states nothing (proto.md, "Block size constraints").
const PAYLOAD: u32 = 32 << 20;

const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;
const CHUNK: u32 = 0x668e_33ef;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_GO: u32 = 7;
const OPT_STRUCTURED_REPLY: u32 = 8;
const OPT_SET_META_CONTEXT: u32 = 10;

const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
const REP_META_CONTEXT: u32 = 4;
/// Bit of the types of errors.
const REP_ERROR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
const REP_ERR_TLS_REQD: u32 = REP_ERROR + 5;
const REP_ERR_UNKNOWN: u32 = REP_ERROR + 6;
const REP_ERR_SHUTDOWN: u32 = REP_ERROR + 7;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const CAN_MULTI_CONN: u16 = 1 << 8;

const CMD_READ: u16 = 0;
const CMD_DISC: u16 = 2;
const CMD_BLOCK_STATUS: u16 = 7;

const CHUNK_DONE: u16 = 1;
const CHUNK_NONE: u16 = 0;
const CHUNK_DATA: u16 = 1;
const CHUNK_HOLE: u16 = 2;
const CHUNK_STATUS: u16 = 5;
/// Bit of the types of errors.
const CHUNK_ERROR: u16 = 1 << 15;

/// Bit of an extent that reads as zeros. Bit 0, a hole, says nothing about content.
const STATE_ZERO: u32 = 2;

/// Metadata context of the extents.
const ALLOCATION: &[u8] = b"base:allocation";

const ESHUTDOWN: u32 = 108;

/// Facts about an export, as the negotiation found them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Export {
    /// Size in bytes.
    pub size: u64,
    /// True if several connections read the same content.
    pub multi_conn: bool,
    /// Alignment of requests in bytes, a power of two.
    pub block: u32,
    /// Maximum length of a request in bytes.
    pub payload: u32,
    /// True if replies are structured.
    structured: bool,
    /// Number of the context of the extents; `None` if the server has none.
    allocation: Option<u32>,
}

impl Export {
    /// True if the server tells which parts are zeros.
    pub fn has_extents(&self) -> bool {
        self.allocation.is_some()
    }
}

/// A part of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, at least 1.
    pub len: u64,
    /// True if it reads as zeros.
    pub is_zero: bool,
}

/// Negotiates the export `name`.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Refused`] if the server has no such export,
/// [`imgtool_core::ErrorKind::Malformed`] if it breaks the protocol, I/O errors.
pub fn negotiate(stream: &mut (impl Read + Write), name: &str) -> Result<Export> {
    if u64_of(stream)? != NBDMAGIC {
        return Err(Error::malformed("the server does not speak NBD"));
    }
    let is_newstyle = u64_of(stream)? == IHAVEOPT;
    let flags = if is_newstyle { u16_of(stream)? } else { 0 };
    if flags & FIXED_NEWSTYLE == 0 {
        return Err(Error::unsupported("the server speaks an old version of NBD"));
    }
    let no_zeroes = flags & NO_ZEROES;
    send(stream, &u32::from(FIXED_NEWSTYLE | no_zeroes).to_be_bytes())?;
    let structured = option(stream, OPT_STRUCTURED_REPLY, &[], |_, _| Ok(()))?.is_ok();
    let allocation = if structured { allocation_context(stream, name)? } else { None };
    let mut found = Found { structured, allocation, ..Found::default() };
    // One request of information: the sizes of blocks.
    let data = [&named(name), &1u16.to_be_bytes()[..], &INFO_BLOCK_SIZE.to_be_bytes()].concat();
    match option(stream, OPT_GO, &data, |kind, data| found.take(kind, data))? {
        Ok(()) => {}
        Err(REP_ERR_UNSUP) => found.export_name(stream, name, no_zeroes != 0)?,
        Err(error) => return Err(refused(error, name)),
    }
    found.finish()
}

/// Words the refusal of an export.
fn refused(error: u32, name: &str) -> Error {
    match error {
        REP_ERR_UNKNOWN => Error::refused(format!("the server has no export called '{name}'"))
            .hint("'nbdinfo --list' shows the exports of a server"),
        REP_ERR_TLS_REQD => Error::unsupported("the server demands TLS, which is not supported yet")
            .hint("tunnel the connection with another program"),
        REP_ERR_SHUTDOWN => Error::unavailable("the server shuts down"),
        _ => Error::refused(format!("the server refuses the export '{name}' (error {})", error & !REP_ERROR)),
    }
}

/// Information in the replies to `GO`.
#[derive(Default)]
struct Found {
    size_and_flags: Option<(u64, u16)>,
    /// Minimum and maximum block.
    blocks: Option<(u32, u32)>,
    structured: bool,
    allocation: Option<u32>,
}

impl Found {
    fn take(&mut self, kind: u32, data: &[u8]) -> Result<()> {
        let mut data = data;
        if kind != REP_INFO {
            return Err(Error::malformed(format!("the server answers with a reply of type {kind}")));
        }
        match u16_of(&mut data)? {
            INFO_EXPORT => self.size_and_flags = Some((u64_of(&mut data)?, u16_of(&mut data)?)),
            INFO_BLOCK_SIZE => {
                let (least, _preferred, most) = (u32_of(&mut data)?, u32_of(&mut data)?, u32_of(&mut data)?);
                self.blocks = Some((least, most));
            }
            // Name and description, for which nobody asked.
            _ => {}
        }
        Ok(())
    }

    /// Chooses the export in the way of servers that do not know `GO`. They close the connection on a
    /// mistake.
    fn export_name(&mut self, stream: &mut (impl Read + Write), name: &str, no_zeroes: bool) -> Result<()> {
        send_option(stream, OPT_EXPORT_NAME, name.as_bytes())?;
        self.size_and_flags = Some((u64_of(stream)?, u16_of(stream)?));
        if !no_zeroes {
            read(stream, &mut [0; 124])?;
        }
        Ok(())
    }

    fn finish(self) -> Result<Export> {
        let (size, flags) = self
            .size_and_flags
            .ok_or_else(|| Error::malformed("the server does not state the size of the export"))?;
        // A server that does not state its blocks takes 512 bytes.
        let (least, most) = self.blocks.unwrap_or((512, PAYLOAD));
        let is_valid =
            least.is_power_of_two() && least <= 64 << 10 && most >= least && size <= i64::MAX as u64;
        if !is_valid {
            return Err(Error::malformed(format!(
                "the server states a size of {size} bytes, blocks of {least} and requests of {most}"
            )));
        }
        let payload = most.min(PAYLOAD) / least * least;
        Ok(Export {
            size,
            multi_conn: flags & CAN_MULTI_CONN != 0,
            block: least,
            payload,
            structured: self.structured,
            allocation: self.allocation,
        })
    }
}

/// Selects the context of the extents. Returns its number; `None` if the server has no such context.
fn allocation_context(stream: &mut (impl Read + Write), name: &str) -> Result<Option<u32>> {
    let mut data = named(name);
    data.extend(1u32.to_be_bytes());
    // The constant is short.
    data.extend((ALLOCATION.len() as u32).to_be_bytes());
    data.extend(ALLOCATION);
    let mut id = None;
    let answer = option(stream, OPT_SET_META_CONTEXT, &data, |kind, data| {
        let mut data = data;
        if kind == REP_META_CONTEXT {
            let number = u32_of(&mut data)?;
            if data == ALLOCATION {
                id = Some(number);
            }
        }
        Ok(())
    })?;
    Ok(id.filter(|_| answer.is_ok()))
}

/// Returns a name with its length before it. [`crate::uri`] limits its length.
fn named(name: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat()
}

/// Sends an option and passes each reply to `take`. Returns the type of the error that ends the replies, if
/// one does.
fn option(
    stream: &mut (impl Read + Write),
    number: u32,
    data: &[u8],
    mut take: impl FnMut(u32, &[u8]) -> Result<()>,
) -> Result<Result<(), u32>> {
    send_option(stream, number, data)?;
    for _ in 0..MAX_REPLIES {
        let (magic, echo) = (u64_of(stream)?, u32_of(stream)?);
        if magic != OPTION_REPLY || echo != number {
            return Err(Error::malformed(
                "the server answers with something other than a reply to an option",
            ));
        }
        let (kind, len) = (u32_of(stream)?, u32_of(stream)?);
        if len > MAX_OPTION {
            return Err(Error::limit(format!("a reply of {len} bytes to an option, more than {MAX_OPTION}")));
        }
        let mut data = vec![0; len as usize];
        read(stream, &mut data)?;
        match kind {
            REP_ACK => return Ok(Ok(())),
            kind if kind & REP_ERROR != 0 => return Ok(Err(kind)),
            kind => take(kind, &data)?,
        }
    }
    Err(Error::limit(format!("more than {MAX_REPLIES} replies to an option")))
}

fn send_option(stream: &mut impl Write, number: u32, data: &[u8]) -> Result<()> {
    // Names are short.
    let len = (data.len() as u32).to_be_bytes();
    send(stream, &[&IHAVEOPT.to_be_bytes()[..], &number.to_be_bytes(), &len, data].concat())
}

/// Reads `buf.len()` bytes at `position`. The request must be aligned, and no longer than the export permits.
///
/// # Errors
/// [`imgtool_core::ErrorKind::Io`] or [`imgtool_core::ErrorKind::Unavailable`] if the server can't read;
/// [`imgtool_core::ErrorKind::Malformed`] if it breaks the protocol: the connection is of no use then.
pub fn read_at(
    stream: &mut (impl Read + Write),
    export: &Export,
    cookie: u64,
    buf: &mut [u8],
    position: u64,
) -> Result<()> {
    // Within the payload.
    request(stream, CMD_READ, cookie, position, buf.len() as u32)?;
    if !export.structured {
        let error = simple_reply(stream, cookie)?;
        return if error == 0 { read(stream, buf) } else { Err(server_error(error)) };
    }
    let range = position..position + buf.len() as u64;
    let mut parts = Parts::default();
    let (mut failure, mut errors) = (None, 0);
    loop {
        let chunk = Chunk::read(stream, cookie)?;
        match chunk.kind {
            CHUNK_NONE if chunk.len == 0 && chunk.is_last => {}
            CHUNK_DATA if chunk.len > 8 => {
                let at = u64_of(stream)?;
                let part = parts.add(&range, at, u64::from(chunk.len) - 8)?;
                read(stream, &mut buf[part])?;
            }
            CHUNK_HOLE if chunk.len == 12 => {
                let (at, len) = (u64_of(stream)?, u32_of(stream)?);
                let part = parts.add(&range, at, u64::from(len))?;
                buf[part].fill(0);
            }
            kind if kind & CHUNK_ERROR != 0 && errors < MAX_ERRORS => {
                errors += 1;
                failure = Some(chunk.error(stream)?);
            }
            _ => return Err(chunk.unknown()),
        }
        if chunk.is_last {
            break;
        }
    }
    match failure {
        Some(error) => Err(error),
        None if parts.total == buf.len() as u64 => Ok(()),
        None => Err(Error::malformed("the server left out a part of what was read")),
    }
}

/// Asks for the extents of `range`. Returns at least one; they may end before the range, but not after it.
///
/// # Errors
/// Same as [`read_at`].
pub fn extents(
    stream: &mut (impl Read + Write),
    export: &Export,
    cookie: u64,
    range: Range<u64>,
) -> Result<Vec<Extent>> {
    let asked = range.end - range.start;
    // At most 1 GiB.
    request(stream, CMD_BLOCK_STATUS, cookie, range.start, asked as u32)?;
    let (mut extents, mut failure, mut errors) = (Vec::new(), None, 0);
    if !export.structured {
        return Err(server_error(simple_reply(stream, cookie)?));
    }
    loop {
        let chunk = Chunk::read(stream, cookie)?;
        match chunk.kind {
            CHUNK_NONE if chunk.len == 0 && chunk.is_last => {}
            CHUNK_STATUS if extents.is_empty() => extents = chunk.extents(stream, export, asked)?,
            kind if kind & CHUNK_ERROR != 0 && errors < MAX_ERRORS => {
                errors += 1;
                failure = Some(chunk.error(stream)?);
            }
            _ => return Err(chunk.unknown()),
        }
        if chunk.is_last {
            break;
        }
    }
    match failure {
        Some(error) => Err(error),
        None if extents.is_empty() => Err(Error::malformed("the server states no extents")),
        None => Ok(extents),
    }
}

/// Tells the server that the connection ends. There is no reply.
pub fn disconnect(stream: &mut impl Write) {
    let _ = request(stream, CMD_DISC, 0, 0, 0);
}

fn request(stream: &mut impl Write, kind: u16, cookie: u64, position: u64, len: u32) -> Result<()> {
    let mut bytes = Vec::with_capacity(28);
    bytes.extend(REQUEST.to_be_bytes());
    bytes.extend(0u16.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(position.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    send(stream, &bytes)
}

/// Reads the head of a simple reply. Returns its error, 0 for none.
fn simple_reply(stream: &mut impl Read, cookie: u64) -> Result<u32> {
    let (magic, error, echo) = (u32_of(stream)?, u32_of(stream)?, u64_of(stream)?);
    match magic == SIMPLE_REPLY && echo == cookie {
        true => Ok(error),
        false => Err(Error::malformed("the server answers with something other than a reply")),
    }
}

/// Head of a chunk of a structured reply.
struct Chunk {
    is_last: bool,
    kind: u16,
    len: u32,
}

impl Chunk {
    fn read(stream: &mut impl Read, cookie: u64) -> Result<Self> {
        let (magic, flags, kind) = (u32_of(stream)?, u16_of(stream)?, u16_of(stream)?);
        let (echo, len) = (u64_of(stream)?, u32_of(stream)?);
        match magic == CHUNK && echo == cookie {
            true => Ok(Self { is_last: flags & CHUNK_DONE != 0, kind, len }),
            false => Err(Error::malformed("the server answers with something other than a chunk")),
        }
    }

    fn unknown(&self) -> Error {
        Error::malformed(format!("the server sends a chunk of type {} with {} bytes", self.kind, self.len))
    }

    /// Reads an error. Its text is not passed on, since it may be of any kind.
    fn error(&self, stream: &mut impl Read) -> Result<Error> {
        if !(6..=MAX_TEXT).contains(&self.len) {
            return Err(self.unknown());
        }
        let error = u32_of(stream)?;
        discard(stream, u64::from(self.len) - 4)?;
        Ok(server_error(error))
    }

    fn extents(&self, stream: &mut impl Read, export: &Export, asked: u64) -> Result<Vec<Extent>> {
        let count = self.len.checked_sub(4).filter(|len| len % 8 == 0).map(|len| len / 8);
        let count = count.filter(|count| (1..=MAX_SENT_EXTENTS).contains(count));
        let count = count.ok_or_else(|| self.unknown())?;
        if Some(u32_of(stream)?) != export.allocation {
            return Err(self.unknown());
        }
        let (mut extents, mut left) = (Vec::new(), asked);
        for _ in 0..count {
            let (len, state) = (u32_of(stream)?, u32_of(stream)?);
            if len == 0 {
                return Err(Error::malformed("the server states an extent of 0 bytes"));
            }
            // The last one may be longer than what was asked for.
            let len = u64::from(len).min(left);
            if len > 0 && extents.len() < MAX_EXTENTS {
                extents.push(Extent { len, is_zero: state & STATE_ZERO != 0 });
                left -= len;
            }
        }
        Ok(extents)
    }
}

/// Parts of a read that have come: in any order, without overlaps.
#[derive(Default)]
struct Parts {
    ranges: std::collections::BTreeMap<u64, u64>,
    total: u64,
}

impl Parts {
    /// Adds a part. Returns its range in the buffer.
    fn add(&mut self, asked: &Range<u64>, at: u64, len: u64) -> Result<Range<usize>> {
        let wrong =
            || Error::malformed(format!("the server sends {len} bytes at {at}, which nobody asked for"));
        let end = at.checked_add(len).filter(|end| len > 0 && at >= asked.start && *end <= asked.end);
        let end = end.ok_or_else(wrong)?;
        let before = self.ranges.range(..end).next_back();
        if before.is_some_and(|(_, before)| *before > at) {
            return Err(Error::malformed(format!("the server sends the bytes at {at} twice")));
        }
        // Our limit: servers send a part for each extent, and a block has 512 bytes.
        if self.ranges.len() as u64 > (asked.end - asked.start) / 512 + 64 {
            return Err(Error::limit("the server sends too many parts"));
        }
        self.ranges.insert(at, end);
        self.total += len;
        // Within the buffer, so they fit.
        Ok((at - asked.start) as usize..(end - asked.start) as usize)
    }
}

/// Words an error of the server.
fn server_error(error: u32) -> Error {
    let message = match error {
        0 => return Error::malformed("the server answers without content"),
        ESHUTDOWN => return Error::unavailable("the server shuts down").hint("another try may help"),
        1 => "operation not permitted",
        5 => "input/output error",
        12 => "out of memory",
        22 => "invalid argument",
        _ => "an unknown error",
    };
    Error::io("read", io::Error::other(format!("the server reports: {message}")))
}

fn discard(stream: &mut impl Read, len: u64) -> Result<()> {
    let count = io::copy(&mut stream.take(len), &mut io::sink()).map_err(broken)?;
    if count == len { Ok(()) } else { Err(broken(io::ErrorKind::UnexpectedEof.into())) }
}

fn send(stream: &mut impl Write, bytes: &[u8]) -> Result<()> {
    stream.write_all(bytes).map_err(broken)
}

fn read(stream: &mut impl Read, buf: &mut [u8]) -> Result<()> {
    stream.read_exact(buf).map_err(broken)
}

fn u16_of(stream: &mut impl Read) -> Result<u16> {
    let mut bytes = [0; 2];
    read(stream, &mut bytes).map(|()| u16::from_be_bytes(bytes))
}

fn u32_of(stream: &mut impl Read) -> Result<u32> {
    let mut bytes = [0; 4];
    read(stream, &mut bytes).map(|()| u32::from_be_bytes(bytes))
}

fn u64_of(stream: &mut impl Read) -> Result<u64> {
    let mut bytes = [0; 8];
    read(stream, &mut bytes).map(|()| u64::from_be_bytes(bytes))
}

/// Words a broken connection.
#[expect(clippy::needless_pass_by_value, reason = "it is passed to map_err")]
pub(crate) fn broken(error: io::Error) -> Error {
    let message = match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "the server does not answer in time".to_owned()
        }
        io::ErrorKind::UnexpectedEof => "the server closed the connection".to_owned(),
        kind => format!("the connection failed: {kind}"),
    };
    Error::unavailable(message)
}
