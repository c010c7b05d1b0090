//! `Content-Range`, the header by which a server says which bytes it sends (RFC 9110, 14.4).

/// Bytes that a server sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentRange {
    /// Position of the first byte.
    pub first: u64,
    /// Position of the last byte.
    pub last: u64,
    /// Length of the whole object in bytes; `None` if the server does not know it.
    pub total: Option<u64>,
}

impl ContentRange {
    /// Parses `bytes FIRST-LAST/TOTAL`, in which TOTAL may be `*`. Returns `None` for anything else, and for
    /// a range that is reversed or beyond the total.
    pub fn parse(text: &str) -> Option<Self> {
        let (range, total) = bytes(text)?.split_once('/')?;
        let (first, last) = range.split_once('-')?;
        let total = match total.trim() {
            "*" => None,
            total => Some(number(total)?),
        };
        let (first, last) = (number(first)?, number(last)?);
        let is_valid = first <= last && last < total.unwrap_or(u64::MAX);
        is_valid.then_some(Self { first, last, total })
    }

    /// Returns the number of bytes, at least 1.
    pub fn count(self) -> u64 {
        self.last - self.first + 1
    }
}

/// Parses `bytes */TOTAL`, the header of a refused range. Returns the length of the whole object in bytes.
pub fn refused_total(text: &str) -> Option<u64> {
    number(bytes(text)?.strip_prefix("*/")?)
}

/// Returns the text behind the unit. No other unit is in use.
fn bytes(text: &str) -> Option<&str> {
    let (unit, rest) = text.trim().split_once(' ')?;
    unit.eq_ignore_ascii_case("bytes").then(|| rest.trim())
}

/// Parses a number of digits alone: `u64::from_str` accepts a sign.
fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ranges_with_and_without_a_total() {
        let range = |first, last, total| Some(ContentRange { first, last, total });
        assert_eq!(ContentRange::parse("bytes 0-9/100"), range(0, 9, Some(100)));
        assert_eq!(ContentRange::parse(" Bytes  5-5/* "), range(5, 5, None));
        assert_eq!(ContentRange::parse("bytes 0-9/10").map(ContentRange::count), Some(10));
        assert_eq!(refused_total("bytes */0"), Some(0));
    }

    #[test]
    fn refuses_ranges_that_make_no_sense() {
        let wrong = [
            "",
            "bytes",
            "bytes 0-9",
            "bytes 9-0/100",
            "bytes 0-100/100",
            "bytes +0-9/100",
            "bytes -9/100",
            "bytes */100",
            "items 0-9/100",
            "bytes 0-18446744073709551615/*",
            "bytes 0-99999999999999999999/*",
        ];
        for text in wrong {
            assert_eq!(ContentRange::parse(text), None, "{text}");
        }
        assert_eq!(refused_total("bytes */-1"), None);
        assert_eq!(refused_total("bytes 0-9/10"), None);
    }
}
