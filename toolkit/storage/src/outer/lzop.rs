//! The lzop container: a header, then blocks of LZO1X data with checksums.
//!
//! All numbers are big-endian. The magic is followed by the header (see [`Member::read`]) with its checksum,
//! then by blocks: plain length (0 ends the member), stored length, checksums of the plain bytes, checksums
//! of the stored bytes (in compressed blocks only), stored bytes. A block that did not shrink is stored
//! uncompressed, with equal lengths. Members follow each other without padding. The container has no
//! specification; this is the format that lzop 1.04 writes.

use std::io::{self, Read};

use imgtool_core::input::{Decode, retry};

/// First nine bytes of an lzop file.
pub(super) const MAGIC: [u8; 9] = [0x89, 0x4c, 0x5a, 0x4f, 0x00, 0x0d, 0x0a, 0x1a, 0x0a];

/// Flags in the header.
mod flag {
    /// Adler-32 of the plain bytes of each block.
    pub(super) const ADLER32_D: u32 = 0x1;
    /// Adler-32 of the stored bytes of each compressed block.
    pub(super) const ADLER32_C: u32 = 0x2;
    /// An extra field follows the header.
    pub(super) const EXTRA_FIELD: u32 = 0x40;
    /// CRC-32 of the plain bytes of each block.
    pub(super) const CRC32_D: u32 = 0x100;
    /// CRC-32 of the stored bytes of each compressed block.
    pub(super) const CRC32_C: u32 = 0x200;
    /// The file is one part of a multi-part archive.
    pub(super) const MULTIPART: u32 = 0x400;
    /// A filter changed the bytes before compression.
    pub(super) const FILTER: u32 = 0x800;
    /// The header's checksum is a CRC-32, not an Adler-32.
    pub(super) const HEADER_CRC32: u32 = 0x1000;
}

/// Oldest lzop version with this layout.
const VERSION_MIN: u16 = 0x0900;
/// First version whose header has the version needed to extract, the level, and the upper half of the
/// time.
const VERSION_LONG_HEADER: u16 = 0x0940;
/// Version number of lzop 1.04, the latest release. The decoder refuses a file that needs a later version.
const VERSION_NEEDED_MAX: u16 = 0x1040;

/// Compression methods LZO1X-1, LZO1X-1(15) and LZO1X-999: one decoder reads all three.
const METHODS: std::ops::RangeInclusive<u8> = 1..=3;

/// Maximum plain length of a block, in bytes. Our limit: lzop writes 256 KiB and allows 64 MiB, but the
/// decoder allocates two buffers of this length, which comes from an untrusted file.
const MAX_BLOCK_LEN: u32 = 16 << 20;

/// Memory in bytes of a decoder: the two buffers of the longest block.
pub(super) const MEMORY: u64 = 2 * MAX_BLOCK_LEN as u64;

/// Maximum length of the extra field, in bytes. Our limit: lzop writes no extra field.
const MAX_EXTRA_LEN: u32 = 64 << 10;

/// Decoder of all members of an lzop file.
pub(super) struct LzopReader<R> {
    inner: R,
    state: State,
    /// The current block, decoded.
    plain: Vec<u8>,
    /// Number of bytes of `plain` returned so far.
    returned: usize,
    /// The current block as stored.
    stored: Vec<u8>,
    /// Number of members begun so far.
    members: u64,
}

#[derive(Clone, Copy)]
enum State {
    /// Between members.
    Header,
    /// Within a member, with the flags of its header.
    Blocks(u32),
    /// After the last member.
    Ended,
    /// After an error, which is final.
    Failed,
}

impl<R: Read> LzopReader<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, state: State::Header, plain: Vec::new(), returned: 0, stored: Vec::new(), members: 0 }
    }

    /// Reads a header or the next block.
    fn advance(&mut self) -> io::Result<()> {
        self.state = match self.state {
            State::Ended => State::Ended,
            State::Failed => return Err(invalid("read after an error".to_owned())),
            State::Header => self.read_header()?.map_or(State::Ended, State::Blocks),
            State::Blocks(flags) => {
                if self.read_block(flags)? {
                    State::Blocks(flags)
                } else {
                    State::Header
                }
            }
        };
        Ok(())
    }

    /// Reads a member's header and returns its flags; `None` at the end of the file.
    fn read_header(&mut self) -> io::Result<Option<u32>> {
        let mut magic = [0; MAGIC.len()];
        if !self.read_magic(&mut magic)? {
            return Ok(None);
        }
        let member = Member::read(Header { inner: &mut self.inner, bytes: Vec::new() })?;
        if member.flags & flag::EXTRA_FIELD != 0 {
            self.skip_extra_field()?;
        }
        member.check_supported()?;
        self.members += 1;
        Ok(Some(member.flags))
    }

    /// Reads a member's magic; returns false at the end of the file.
    fn read_magic(&mut self, magic: &mut [u8; MAGIC.len()]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < magic.len() {
            match retry(|| self.inner.read(&mut magic[filled..]))? {
                0 if filled == 0 && self.members > 0 => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => filled += count,
            }
            if magic[..filled] != MAGIC[..filled] {
                return Err(invalid("bytes after the end".to_owned()));
            }
        }
        Ok(true)
    }

    /// Skips the extra field. Its checksum is not verified: lzop writes no extra field, and no document says
    /// which bytes the checksum covers.
    fn skip_extra_field(&mut self) -> io::Result<()> {
        let mut extra = Header { inner: &mut self.inner, bytes: Vec::new() };
        let len = extra.u32()?;
        if len > MAX_EXTRA_LEN {
            return Err(invalid(format!("extra field of {len} bytes, at most {MAX_EXTRA_LEN}")));
        }
        extra.take(len as usize)?;
        let _checksum = extra.u32()?;
        Ok(())
    }

    /// Reads and decodes a block; returns false at the end of the member.
    fn read_block(&mut self, flags: u32) -> io::Result<bool> {
        let plain_len = read_u32(&mut self.inner)?;
        if plain_len == 0 {
            return Ok(false);
        }
        let stored_len = read_u32(&mut self.inner)?;
        if plain_len > MAX_BLOCK_LEN {
            return Err(refused(format!("a block of {plain_len} bytes, at most {MAX_BLOCK_LEN}")));
        }
        if stored_len == 0 || stored_len > plain_len {
            return Err(invalid(format!("a block of {plain_len} bytes is stored in {stored_len}")));
        }
        let is_compressed = stored_len < plain_len;
        let plain_sums = Checksums::read(&mut self.inner, flags & flag::ADLER32_D, flags & flag::CRC32_D)?;
        let stored_sums = if is_compressed {
            Checksums::read(&mut self.inner, flags & flag::ADLER32_C, flags & flag::CRC32_C)?
        } else {
            Checksums::default()
        };
        // The reader returns no byte of the block until its checksums match.
        self.returned = 0;
        self.plain.clear();
        self.stored.resize(stored_len as usize, 0);
        self.inner.read_exact(&mut self.stored)?;
        if !stored_sums.match_bytes(&self.stored) {
            return Err(invalid("checksum of a compressed block does not match".to_owned()));
        }
        if is_compressed {
            self.plain.resize(plain_len as usize, 0);
            match lzokay::decompress::decompress(&self.stored, &mut self.plain) {
                Ok(len) if len == self.plain.len() => {}
                result => {
                    self.plain.clear();
                    let why =
                        result.map_or_else(|e| e.to_string(), |len| format!("{len} of {plain_len} bytes"));
                    return Err(invalid(format!("a block can't be decompressed: {why}")));
                }
            }
        } else {
            std::mem::swap(&mut self.plain, &mut self.stored);
        }
        if !plain_sums.match_bytes(&self.plain) {
            self.plain.clear();
            return Err(invalid("checksum of a block does not match".to_owned()));
        }
        Ok(true)
    }
}

/// The reader verifies every block before it returns the first byte, so no byte is ever unchecked.
impl<R: Read + Send> Decode for LzopReader<R> {}

impl<R: Read> Read for LzopReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.returned == self.plain.len() && !matches!(self.state, State::Ended) && !buf.is_empty() {
            self.advance().inspect_err(|_| {
                self.plain.clear();
                self.returned = 0;
                self.state = State::Failed;
            })?;
        }
        let left = &self.plain[self.returned..];
        let count = left.len().min(buf.len());
        buf[..count].copy_from_slice(&left[..count]);
        self.returned += count;
        Ok(count)
    }
}

/// Checksums of a block that the header's flags announce.
#[derive(Default)]
struct Checksums {
    adler32: Option<u32>,
    crc32: Option<u32>,
}

impl Checksums {
    /// Reads the checksums whose flag is set, Adler-32 before CRC-32.
    fn read(inner: &mut impl Read, adler32_flag: u32, crc32_flag: u32) -> io::Result<Self> {
        let adler32 = if adler32_flag != 0 { Some(read_u32(inner)?) } else { None };
        let crc32 = if crc32_flag != 0 { Some(read_u32(inner)?) } else { None };
        Ok(Self { adler32, crc32 })
    }

    /// True if every checksum matches `bytes`.
    fn match_bytes(&self, bytes: &[u8]) -> bool {
        self.adler32.is_none_or(|sum| sum == adler2::adler32_slice(bytes))
            && self.crc32.is_none_or(|sum| sum == crc32fast::hash(bytes))
    }
}

fn header_checksum(flags: u32, bytes: &[u8]) -> u32 {
    if flags & flag::HEADER_CRC32 != 0 { crc32fast::hash(bytes) } else { adler2::adler32_slice(bytes) }
}

/// Fields of a member's header that the decoder needs to read the blocks.
struct Member {
    method: u8,
    flags: u32,
    /// Filter that changed the bytes; 0 for none.
    filter: u32,
}

impl Member {
    /// Reads the header after the magic and verifies its checksum.
    fn read<R: Read>(mut header: Header<'_, R>) -> io::Result<Self> {
        let long = read_versions(&mut header)?;
        let method = header.u8()?;
        if long {
            let _level = header.u8()?;
        }
        let flags = header.u32()?;
        let filter = if flags & flag::FILTER != 0 { header.u32()? } else { 0 };
        let _mode = header.u32()?;
        let _time = header.u32()?;
        if long {
            let _time_high = header.u32()?;
        }
        let name_len = header.u8()?;
        header.take(usize::from(name_len))?;
        let expected = header_checksum(flags, &header.bytes);
        if header.u32()? != expected {
            return Err(invalid("header checksum does not match".to_owned()));
        }
        Ok(Self { method, flags, filter })
    }

    /// Refuses a member that the decoder can't read.
    fn check_supported(&self) -> io::Result<()> {
        if !METHODS.contains(&self.method) {
            return Err(refused(format!("compression method {} is not LZO1X", self.method)));
        }
        if self.filter != 0 || self.flags & flag::MULTIPART != 0 {
            let feature = match self.filter {
                0 => "one part of several".to_owned(),
                filter => format!("filter {filter}"),
            };
            return Err(refused(format!("{feature} is not supported")));
        }
        Ok(())
    }
}

/// Reads and checks the versions at the start of a header. Returns true if the header has the fields of
/// [`VERSION_LONG_HEADER`].
fn read_versions<R: Read>(header: &mut Header<'_, R>) -> io::Result<bool> {
    let version = header.u16()?;
    if version < VERSION_MIN {
        return Err(invalid(format!("version {version:#06x} is below {VERSION_MIN:#06x}")));
    }
    let long = version >= VERSION_LONG_HEADER;
    let _library_version = header.u16()?;
    if long {
        let needed = header.u16()?;
        if needed > VERSION_NEEDED_MAX {
            return Err(refused(format!(
                "it needs lzop version {needed:#06x}, above {VERSION_NEEDED_MAX:#06x}"
            )));
        }
    }
    Ok(long)
}

/// Reader of header fields that keeps their bytes for the checksum.
struct Header<'a, R> {
    inner: &'a mut R,
    bytes: Vec<u8>,
}

impl<R: Read> Header<'_, R> {
    /// Reads `len` bytes. The caller must have checked `len` against a limit.
    fn take(&mut self, len: usize) -> io::Result<&[u8]> {
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        self.inner.read_exact(&mut self.bytes[start..])?;
        Ok(&self.bytes[start..])
    }

    fn number(&mut self, len: usize) -> io::Result<u32> {
        Ok(self.take(len)?.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
    }

    fn u8(&mut self) -> io::Result<u8> {
        Ok(self.take(1)?[0])
    }

    fn u16(&mut self) -> io::Result<u16> {
        // Lossless: the number has two bytes.
        Ok(self.number(2)? as u16)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.number(4)
    }
}

fn read_u32(inner: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    inner.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}

fn refused(message: String) -> io::Error {
    super::unsupported(message, "decompress it with lzop -d first")
}
