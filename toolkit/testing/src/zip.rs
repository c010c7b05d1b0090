//! Builder of zip archives, byte by byte.

/// Method of a member that is stored as it is.
pub const STORED: u16 = 0;
/// Method of a member that is compressed with deflate.
pub const DEFLATED: u16 = 8;

/// A member, with what its header and its entry say.
#[derive(Debug, Clone)]
pub struct Member {
    /// Name.
    pub name: String,
    /// Method.
    pub method: u16,
    /// Flags.
    pub flags: u16,
    /// Mode of the file in Unix, 0 if the archive is of another system.
    pub mode: u32,
    /// CRC-32 of the file.
    pub crc: u32,
    /// Length of the file.
    pub size: u64,
    /// Bytes in the archive.
    pub stored: Vec<u8>,
}

impl Member {
    /// Returns a file that is stored as it is.
    pub fn stored(name: &str, content: &[u8]) -> Self {
        let (crc, size) = (crc32fast::hash(content), content.len() as u64);
        let (name, stored) = (name.to_owned(), content.to_vec());
        Self { name, method: STORED, flags: 0, mode: 0o100_644, crc, size, stored }
    }

    /// Returns a file in the form of deflate, in blocks that are stored (RFC 1951, 3.2.4).
    pub fn deflated(name: &str, content: &[u8]) -> Self {
        let mut stored = Vec::new();
        let last = content.chunks(0xffff).count().max(1) - 1;
        for (number, block) in content.chunks(0xffff).enumerate() {
            let len = u16::try_from(block.len()).unwrap();
            stored.push(u8::from(number == last));
            stored.extend(len.to_le_bytes());
            stored.extend((!len).to_le_bytes());
            stored.extend(block);
        }
        Self { method: DEFLATED, stored, ..Self::stored(name, content) }
    }
}

/// A zip archive that is being built.
#[derive(Debug, Clone, Default)]
pub struct Zip {
    bytes: Vec<u8>,
    directory: Vec<u8>,
    entries: u64,
    /// True to write all numbers as those of zip64.
    wide: bool,
}

impl Zip {
    /// Creates an archive without members.
    pub fn new() -> Self {
        Self::default()
    }

    /// Writes the numbers of the directory in 64 bits.
    #[must_use]
    pub fn wide(self) -> Self {
        Self { wide: true, ..self }
    }

    /// Appends a file that is stored as it is.
    #[must_use]
    pub fn file(self, name: &str, content: &[u8]) -> Self {
        self.member(&Member::stored(name, content))
    }

    /// Appends a member.
    #[must_use]
    pub fn member(mut self, member: &Member) -> Self {
        let at = self.bytes.len() as u64;
        let header = self.local(member);
        self.bytes.extend(header);
        self.bytes.extend(&member.stored);
        self.entry(member, at)
    }

    fn local(&self, member: &Member) -> Vec<u8> {
        let mut header = b"PK\x03\x04\x14\0".to_vec();
        header.extend(member.flags.to_le_bytes());
        header.extend(member.method.to_le_bytes());
        header.extend([0; 4]);
        header.extend(member.crc.to_le_bytes());
        header.extend(narrow(member.stored.len() as u64).to_le_bytes());
        header.extend(narrow(member.size).to_le_bytes());
        header.extend((member.name.len() as u16).to_le_bytes());
        header.extend([0; 2]);
        header.extend(member.name.as_bytes());
        header
    }

    /// Appends an entry of the directory, for a member whose header is at `at`.
    #[must_use]
    pub fn entry(mut self, member: &Member, at: u64) -> Self {
        let mut extra = Vec::new();
        let numbers = [member.size, member.stored.len() as u64, at];
        if self.wide {
            extra.extend([1, 0, 24, 0]);
            extra.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        }
        let field = |number: u64| if self.wide { u32::MAX } else { narrow(number) };
        let entry = &mut self.directory;
        entry.extend(b"PK\x01\x02\x14");
        entry.extend(if member.mode == 0 { [0, 20, 0] } else { [3, 20, 0] });
        entry.extend(member.flags.to_le_bytes());
        entry.extend(member.method.to_le_bytes());
        entry.extend([0; 4]);
        entry.extend(member.crc.to_le_bytes());
        entry.extend(field(numbers[1]).to_le_bytes());
        entry.extend(field(numbers[0]).to_le_bytes());
        entry.extend((member.name.len() as u16).to_le_bytes());
        entry.extend((extra.len() as u16).to_le_bytes());
        entry.extend([0; 6]);
        entry.extend((member.mode << 16).to_le_bytes());
        entry.extend(field(at).to_le_bytes());
        entry.extend(member.name.as_bytes());
        entry.extend(extra);
        self.entries += 1;
        self
    }

    /// Returns the archive.
    pub fn build(mut self) -> Vec<u8> {
        let (start, len) = (self.bytes.len() as u64, self.directory.len() as u64);
        self.bytes.append(&mut self.directory);
        if self.wide {
            let record = self.bytes.len() as u64;
            self.bytes.extend(b"PK\x06\x06");
            self.bytes.extend(44_u64.to_le_bytes());
            self.bytes.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            for number in [self.entries, self.entries, len, start] {
                self.bytes.extend(number.to_le_bytes());
            }
            self.bytes.extend(b"PK\x06\x07\0\0\0\0");
            self.bytes.extend(record.to_le_bytes());
            self.bytes.extend(1_u32.to_le_bytes());
        }
        let entries = if self.wide { u16::MAX } else { self.entries as u16 };
        let field = |number: u64| if self.wide { u32::MAX } else { narrow(number) };
        self.bytes.extend(b"PK\x05\x06\0\0\0\0");
        self.bytes.extend(entries.to_le_bytes());
        self.bytes.extend(entries.to_le_bytes());
        self.bytes.extend(field(len).to_le_bytes());
        self.bytes.extend(field(start).to_le_bytes());
        self.bytes.extend([0; 2]);
        self.bytes
    }
}

/// Returns the number for a field of 32 bits.
fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
