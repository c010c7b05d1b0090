//! [`Settings`] of the user: certificates and headers.

use std::fmt;
use std::sync::{Arc, OnceLock};

use imgtool_core::{Error, Result};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use ureq::http::header::{self, HeaderMap, HeaderName, HeaderValue};

/// Maximum number of lines in a file of headers. Our limit: an authorisation is one line, cookies are one
/// more.
const MAX_HEADERS: usize = 64;

/// Headers that decide what is read, or that the client sets itself.
const OWN: [HeaderName; 13] = [
    header::ACCEPT_ENCODING,
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::IF_MATCH,
    header::IF_MODIFIED_SINCE,
    header::IF_NONE_MATCH,
    header::IF_RANGE,
    header::IF_UNMODIFIED_SINCE,
    header::RANGE,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
];

/// Certificates and headers for the servers of the sources. Cloning is cheap.
#[derive(Clone, Default)]
pub struct Settings(Arc<Inner>);

#[derive(Clone, Default)]
struct Inner {
    roots: Vec<Vec<u8>>,
    headers: HeaderMap,
    /// Host of the first source that the headers were given for.
    host: OnceLock<String>,
}

impl Settings {
    /// Adds the authorities whose certificates a PEM file contains to those of the system.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Malformed`] if the file contains no certificate, or a damaged one.
    pub fn trust(&mut self, pem: &[u8]) -> Result<()> {
        let found: Vec<Vec<u8>> = CertificateDer::pem_slice_iter(pem)
            .map(|certificate| certificate.map(|der| der.to_vec()))
            .collect::<Result<_, _>>()
            .map_err(|_| Error::malformed("contains a damaged certificate"))?;
        if found.is_empty() {
            return Err(Error::malformed("contains no certificate")
                .hint("expected a PEM file: it has lines with BEGIN CERTIFICATE"));
        }
        Arc::make_mut(&mut self.0).roots.extend(found);
        Ok(())
    }

    /// Adds the headers in a text, one `NAME: VALUE` a line, for requests to the server that the user names.
    /// They are not sent where a server redirects to.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for a line that is no header, or a header that decides what is
    /// read. The error contains no value.
    pub fn add_headers(&mut self, text: &str) -> Result<()> {
        let headers = &mut Arc::make_mut(&mut self.0).headers;
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let (name, value) = parse(line).ok_or_else(|| {
                Error::usage(format!("line {number} is not a header")).hint("expected NAME: VALUE")
            })?;
            if OWN.contains(&name) {
                return Err(Error::usage(format!("line {number}: the header {name} can't be set"))
                    .hint("it decides which bytes the server sends"));
            }
            if headers.len() >= MAX_HEADERS {
                return Err(Error::limit(format!("more than {MAX_HEADERS} headers")));
            }
            headers.append(name, value);
        }
        Ok(())
    }

    /// Binds the headers, if there are any, to a host: that of the first source.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for another host.
    pub(crate) fn bind(&self, host: &str) -> Result<()> {
        if self.0.headers.is_empty() {
            return Ok(());
        }
        let bound = self.0.host.get_or_init(|| host.to_ascii_lowercase());
        if bound.eq_ignore_ascii_case(host) {
            return Ok(());
        }
        Err(Error::usage(format!("headers are for one server, but the sources are on {bound} and {host}"))
            .hint("save one of them to a file first"))
    }

    pub(crate) fn roots(&self) -> &[Vec<u8>] {
        &self.0.roots
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.0.headers
    }
}

fn parse(line: &str) -> Option<(HeaderName, HeaderValue)> {
    let (name, value) = line.split_once(':')?;
    let name = HeaderName::from_bytes(name.trim().as_bytes()).ok()?;
    let mut value = HeaderValue::from_str(value.trim()).ok()?;
    value.set_sensitive(true);
    Some((name, value))
}

/// Shows numbers alone: headers are credentials.
impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (roots, headers) = (self.0.roots.len(), self.0.headers.len());
        f.debug_struct("Settings").field("roots", &roots).field("headers", &headers).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_header_a_line() {
        let mut settings = Settings::default();
        settings.add_headers("Authorization: Bearer a:b\n\r\nCookie: x=1\r\n").expect("headers");
        let headers = settings.headers();
        assert_eq!(headers.get("authorization").map(HeaderValue::as_bytes), Some(&b"Bearer a:b"[..]));
        assert_eq!(headers.get("cookie").map(HeaderValue::as_bytes), Some(&b"x=1"[..]));
        assert!(!format!("{settings:?} {headers:?}").contains("Bearer"));
    }

    #[test]
    fn refuses_other_lines_without_repeating_them() {
        for text in
            ["secret", "a b: secret", ": secret", "Range: secret", "if-match: secret", "X: a\u{1}secret"]
        {
            let error = Settings::default().add_headers(text).expect_err("refused");
            assert!(
                error.message().starts_with("line 1") && !error.to_string().contains("secret"),
                "{error}"
            );
        }
        let many = "X: y\n".repeat(MAX_HEADERS + 1);
        assert!(Settings::default().add_headers(&many).is_err());
    }

    #[test]
    fn headers_are_for_one_host() {
        let mut settings = Settings::default();
        settings.bind("one.example").expect("no headers");
        settings.add_headers("X: secret").expect("headers");
        settings.bind("One.example").expect("the first host");
        settings.clone().bind("one.example").expect("the same host");
        let error = settings.bind("two.example").expect_err("another host").to_string();
        assert!(error.contains("one.example") && error.contains("two.example"), "{error}");
    }

    #[test]
    fn refuses_a_file_without_a_certificate() {
        let error = Settings::default().trust(b"no certificate").expect_err("none");
        assert_eq!(error.message(), "contains no certificate");
    }
}
