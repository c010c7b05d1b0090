//! Records of a pax header: `LENGTH KEY=VALUE\n`, where the length in decimal counts the whole record.

use imgtool_core::{Error, Result};

use super::MAX_SIZE;

/// Records that change how the next member is read.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Records {
    /// Name of the member.
    pub(super) path: Option<Vec<u8>>,
    /// Length of its content in bytes.
    pub(super) size: Option<u64>,
    /// True if the content is a sparse file in a form of GNU tar that is not read.
    pub(super) sparse: bool,
}

impl Records {
    /// True if no record was found.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Parses the content of a header. If a key occurs twice, the last value counts.
    pub(super) fn parse(mut bytes: &[u8]) -> Result<Self> {
        let mut records = Self::default();
        while !bytes.is_empty() {
            let (key, value, rest) = split_record(bytes).ok_or_else(|| {
                Error::malformed("a pax header contains something other than 'length key=value'")
            })?;
            match key {
                b"path" => records.path = Some(value.to_vec()),
                b"size" => records.size = Some(size_of(value)?),
                key if key.starts_with(b"GNU.sparse.") => records.sparse = true,
                _ => {}
            }
            bytes = rest;
        }
        Ok(records)
    }
}

/// Splits the first record off: its key, its value, and the bytes behind it.
fn split_record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = bytes.iter().take(8).position(|byte| *byte == b' ')?;
    let len: usize = decimal(&bytes[..blank]).and_then(|len| usize::try_from(len).ok())?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let pair = record.get(blank + 1..)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|byte| *byte == b'=')?;
    Some((&pair[..equals], &pair[equals + 1..], rest))
}

fn size_of(value: &[u8]) -> Result<u64> {
    decimal(value)
        .filter(|size| *size <= MAX_SIZE)
        .ok_or_else(|| Error::malformed("the size in a pax header is no number below 2^63"))
}

/// Returns the number that these bytes spell in decimal digits.
fn decimal(digits: &[u8]) -> Option<u64> {
    let is_number = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(digits).ok().filter(|_| is_number)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_path_and_size() {
        let records = Records::parse(b"22 path=d/a=b\xc3\xa4.vmdk\n17 size=1234567\n18 comment=nothing\n");
        assert!(records.is_err(), "a record of another length");
        let records = Records::parse(b"20 path=d/a=b\xc3\xa4.raw\n16 size=1234567\n19 comment=nothing\n");
        let records = records.expect("sound");
        assert_eq!(records.path.as_deref(), Some("d/a=bä.raw".as_bytes()));
        assert_eq!((records.size, records.sparse), (Some(1_234_567), false));
    }

    #[test]
    fn refuses_what_is_no_record() {
        for bytes in [
            &b"size=1"[..],
            b"0 ",
            b"5 a=b",
            b"99 size=1\n",
            b"18446744073709551615 a=b\n",
            b"8 size=\n",
            b"10 size=-1\n",
            b"28 size=9223372036854775808\n",
            b"6 path\n",
        ] {
            assert!(Records::parse(bytes).is_err(), "{}", bytes.escape_ascii());
        }
    }
}
