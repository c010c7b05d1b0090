//! [`Target`], the URL of a request, and where a redirect leads.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use imgtool_core::{Error, Result};
use ureq::http::uri::{Authority, PathAndQuery, Scheme, Uri};

/// Maximum length of a URL in bytes. Our limit: presigned URLs have 2 KiB, servers accept 8 KiB.
const MAX_LEN: usize = 16 << 10;

/// URL of a request, without user part and fragment.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Target {
    uri: Uri,
}

impl Target {
    /// Parses a URL that the user named. Returns it without the user part, and the value of the header
    /// `Authorization` for that.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for an invalid URL. The error does not contain it.
    pub(crate) fn parse(text: &str) -> Result<(Self, Option<String>)> {
        let uri = escape(text).and_then(|text| text.parse::<Uri>().ok()).and_then(|uri| checked(&uri));
        let (uri, user) = uri.ok_or_else(|| {
            Error::usage("is not a valid URL")
                .hint("write characters with a meaning in URLs as %XX: %40 for @, %3A for :, %2F for /")
        })?;
        Ok((Self { uri }, user.map(|user| format!("Basic {}", BASE64_STANDARD.encode(decode(&user))))))
    }

    /// Returns where a redirect to `location` leads. A user part in it is ignored.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Refused`] for another scheme than http and https, and for one from https to
    /// http; [`imgtool_core::ErrorKind::Malformed`] for an invalid URL.
    pub(crate) fn redirected(&self, location: &str) -> Result<Self> {
        let malformed = || Error::malformed("the server redirects to an invalid URL");
        let location = escape(location.trim()).ok_or_else(malformed)?;
        if let Some((scheme, _)) = location.split_once(':').filter(|(scheme, _)| is_scheme(scheme))
            && !["http", "https"].iter().any(|known| known.eq_ignore_ascii_case(scheme))
        {
            return Err(Error::refused(format!("the server redirects to a URL of the scheme {scheme}")));
        }
        let absolute = self.absolute(&location);
        let uri = absolute.parse::<Uri>().ok().and_then(|uri| checked(&uri));
        let target = Self { uri: uri.ok_or_else(malformed)?.0 };
        match self.is_tls() && !target.is_tls() {
            true => Err(Error::refused("the server redirects from https to http")),
            false => Ok(target),
        }
    }

    /// Resolves a reference (RFC 3986, 5.2). The server removes dots in a path.
    fn absolute(&self, reference: &str) -> String {
        let (scheme, authority) = (if self.is_tls() { "https" } else { "http" }, self.authority());
        let path = self.uri.path();
        if reference.contains("://") && reference.split(':').next().is_some_and(is_scheme) {
            reference.to_owned()
        } else if reference.starts_with("//") {
            format!("{scheme}:{reference}")
        } else if reference.starts_with('/') {
            format!("{scheme}://{authority}{reference}")
        } else if reference.starts_with('?') {
            format!("{scheme}://{authority}{path}{reference}")
        } else {
            let directory = &path[..path.rfind('/').map_or(0, |slash| slash + 1)];
            format!("{scheme}://{authority}{directory}{reference}")
        }
    }

    /// Returns the URL for the request: never for a message, since its query may grant access.
    pub(crate) fn uri(&self) -> &Uri {
        &self.uri
    }

    /// Returns the host, in brackets if it is an IPv6 address.
    pub(crate) fn host(&self) -> &str {
        self.uri.host().unwrap_or_default()
    }

    /// True for https.
    pub(crate) fn is_tls(&self) -> bool {
        self.uri.scheme() == Some(&Scheme::HTTPS)
    }

    /// True if credentials for `self` may be sent to `other`: the same server, which may have moved to https.
    pub(crate) fn shares_credentials_with(&self, other: &Self) -> bool {
        let is_moved = !self.is_tls() && other.is_tls() && (self.port(), other.port()) == (80, 443);
        let is_same = self.is_tls() == other.is_tls() && self.port() == other.port();
        self.host().eq_ignore_ascii_case(other.host()) && (is_same || is_moved)
    }

    fn port(&self) -> u16 {
        self.uri.port_u16().unwrap_or(if self.is_tls() { 443 } else { 80 })
    }

    fn authority(&self) -> &str {
        self.uri.authority().map_or("", Authority::as_str)
    }
}

/// Returns a URL of http or https without its user part, and that part; `None` if it is invalid.
fn checked(uri: &Uri) -> Option<(Uri, Option<String>)> {
    let scheme = uri.scheme().filter(|scheme| [Scheme::HTTP, Scheme::HTTPS].contains(scheme))?;
    let authority = uri.authority()?.as_str();
    let (user, server) = match authority.rsplit_once('@') {
        Some((user, server)) => (Some(user.to_owned()), server),
        None => (None, authority),
    };
    let server: Authority = server.parse().ok()?;
    // Another user part, an empty host, or a port that is no number.
    let port = server.as_str().strip_prefix(server.host())?;
    let is_valid =
        !server.host().is_empty() && (port.is_empty() || server.port_u16().is_some_and(|port| port > 0));
    let path = uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
    let uri = Uri::builder().scheme(scheme.clone()).authority(server).path_and_query(path).build().ok()?;
    is_valid.then_some((uri, user))
}

/// Removes the fragment of a URL, and escapes the characters that may not be in one: users paste spaces and
/// letters beyond ASCII. Returns `None` for a control character, or if the text is too long.
fn escape(text: &str) -> Option<String> {
    let text = text.split('#').next().unwrap_or_default();
    if text.chars().any(char::is_control) {
        return None;
    }
    let escaped: String = text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b' ' | b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}' | 0x80.. => {
                out.push_str(&format!("%{byte:02X}"));
            }
            byte => out.push(char::from(byte)),
        }
        out
    });
    (escaped.len() <= MAX_LEN).then_some(escaped)
}

/// Decodes `%XX`. Anything else stays as it is.
fn decode(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()).filter(|_| *first == b'%') {
            Some(byte) => {
                out.push(byte);
                rest = &tail[2..];
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// True if a text is a scheme (RFC 3986, 3.1).
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

/// Shows the server alone: the rest may grant access.
impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Target({})", self.authority())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(text: &str) -> Target {
        Target::parse(text).expect("a URL").0
    }

    #[test]
    fn takes_the_user_part_out_of_a_url() {
        let (target, user) = Target::parse("HTTPS://me:p%40ss@host:8443/a b?x=1#y").expect("a URL");
        assert_eq!(target.uri().to_string(), "https://host:8443/a%20b?x=1");
        assert_eq!(user.as_deref(), Some(&*format!("Basic {}", BASE64_STANDARD.encode("me:p@ss"))));
        assert_eq!(format!("{target:?}"), "Target(host:8443)");
        assert_eq!(Target::parse("http://host").expect("a URL").0.uri().to_string(), "http://host/");
        assert_eq!(target.host(), "host");
    }

    #[test]
    fn refuses_invalid_urls_without_repeating_them() {
        for text in [
            "http://",
            "http://me:p/w@host/x",
            "http://host:port/",
            "http://host:0/",
            "http://@/",
            "http://a\nb/",
        ] {
            let error = Target::parse(text).expect_err("invalid");
            assert_eq!(error.to_string(), "is not a valid URL", "{text}");
        }
        let long = format!("http://host/{}", "x".repeat(MAX_LEN));
        assert!(Target::parse(&long).is_err());
    }

    #[test]
    fn follows_relative_and_absolute_redirects() {
        let from = target("http://host:81/a/b.qcow2?sig=1");
        let to = |location: &str| from.redirected(location).map(|target| target.uri().to_string()).ok();
        assert_eq!(to("c.qcow2").as_deref(), Some("http://host:81/a/c.qcow2"));
        assert_eq!(to("/c?d").as_deref(), Some("http://host:81/c?d"));
        assert_eq!(to("?e").as_deref(), Some("http://host:81/a/b.qcow2?e"));
        assert_eq!(to("//other/c").as_deref(), Some("http://other/c"));
        assert_eq!(to("https://u:p@other/c#f").as_deref(), Some("https://other/c"));
        assert_eq!(to("c?next=http://x/").as_deref(), Some("http://host:81/a/c?next=http://x/"));
    }

    #[test]
    fn refuses_redirects_to_other_schemes_and_to_less_security() {
        let from = target("https://host/a");
        for location in ["file:///etc/passwd", "nbd://host/", "ftp://host/a", "data:,x", "http://host/a"] {
            assert!(from.redirected(location).is_err(), "{location}");
        }
        let message = from.redirected("http://host/a").expect_err("less").to_string();
        assert_eq!(message, "the server redirects from https to http");
        assert!(target("http://host/").redirected("http://a b\u{1}/").is_err());
    }

    #[test]
    fn credentials_stay_with_their_server() {
        let from = target("http://host/a");
        let may = |to: &str| from.shares_credentials_with(&target(to));
        assert!(may("http://HOST/b") && may("https://host/a") && may("http://host:80/"));
        assert!(!may("http://other/a") && !may("http://host:81/a") && !may("https://host:8443/a"));
        assert!(!target("https://host/").shares_credentials_with(&from));
    }
}
