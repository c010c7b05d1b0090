//! Headers of HTTP: the range in a server's answer, and a file of headers.

use imgtool_http::Settings;
use imgtool_http::range::{ContentRange, refused_total};

use crate::exercise;

/// Parses the first line as a range, and the others as headers.
pub(super) fn run(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    if let Some(range) = ContentRange::parse(first) {
        assert!(range.first <= range.last && range.count() > 0);
        assert!(range.total.is_none_or(|total| range.last < total));
        assert_eq!(refused_total(first), None);
        let shown = match range.total {
            Some(total) => format!("bytes {}-{}/{total}", range.first, range.last),
            None => format!("bytes {}-{}/*", range.first, range.last),
        };
        assert_eq!(ContentRange::parse(&shown), Some(range));
    }
    let mut settings = Settings::default();
    let _ = exercise::opened(settings.add_headers(rest));
    let _ = exercise::opened(settings.trust(input));
}
