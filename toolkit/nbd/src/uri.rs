//! [`Uri`], the place of an export (uri.md of the NBD project).

use std::path::PathBuf;

use imgtool_core::{Error, Result};

/// Port of NBD servers (IANA).
const PORT: u16 = 10_809;

/// Maximum length of the name of an export in bytes (proto.md, "String values").
const MAX_NAME: usize = 4096;

/// Server of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Server {
    /// Host, without brackets, and port.
    Tcp(String, u16),
    /// Path of a socket.
    Unix(PathBuf),
}

/// Place of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uri {
    /// Server.
    pub server: Server,
    /// Name of the export; empty for the default one.
    pub export: String,
}

impl Uri {
    /// Parses `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
    ///
    /// # Errors
    /// [`imgtool_core::ErrorKind::Usage`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |what: &str| {
            Error::usage(what.to_owned())
                .hint("expected nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH")
        };
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong("is not a URL of NBD"))?;
        let rest = rest.split('#').next().unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = place.split_once('/').unwrap_or((place, ""));
        let export = decode(path).filter(|name| name.len() <= MAX_NAME && !name.contains('\0'));
        let export = export.ok_or_else(|| wrong("the name of the export is not valid"))?;
        let socket = socket(query).ok_or_else(|| wrong("an unknown key in the query"))?;
        let server = match (scheme.to_ascii_lowercase().as_str(), socket) {
            ("nbd+unix", Some(path)) if authority.is_empty() => Server::Unix(path.into()),
            ("nbd+unix", None) => return Err(wrong("no socket is named")),
            ("nbd", None) => tcp(authority).ok_or_else(|| wrong("the host or the port is not valid"))?,
            _ => return Err(wrong("is not a URL of NBD")),
        };
        Ok(Self { server, export })
    }
}

/// Parses the query. Returns `None` for a key that is not known; keys with `x-` have no meaning.
fn socket(query: &str) -> Option<Option<String>> {
    let mut socket = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=').unwrap_or((pair, "")) {
            ("socket", path) if !path.is_empty() && socket.is_none() => socket = Some(decode(path)?),
            (key, _) if key.starts_with("x-") => {}
            _ => return None,
        }
    }
    Some(socket)
}

/// Parses `HOST[:PORT]`. A user part has no meaning without TLS.
fn tcp(authority: &str) -> Option<Server> {
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")))
        }
        None => authority.split_once(':').map_or((authority, Some("")), |(host, port)| (host, Some(port))),
    };
    let port = match port? {
        "" => PORT,
        port => port.parse().ok().filter(|port| *port > 0)?,
    };
    (!host.is_empty() && !host.contains('@')).then(|| Server::Tcp(host.to_owned(), port))
}

/// Decodes `%XX`. Returns `None` if the result is not UTF-8, or for an incomplete code.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes().iter();
    while let Some(byte) = rest.next() {
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|digit| char::from(*digit).to_digit(16));
        let (high, low) = (digit()?, digit()?);
        bytes.push(u8::try_from(high * 16 + low).ok()?);
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_servers_and_exports() {
        let tcp = |host: &str, port, export: &str| {
            Some(Uri { server: Server::Tcp(host.to_owned(), port), export: export.to_owned() })
        };
        let parse = |text: &str| Uri::parse(text).ok();
        assert_eq!(parse("nbd://host"), tcp("host", 10_809, ""));
        assert_eq!(parse("NBD://host:1/a%20b/c?x-y=1"), tcp("host", 1, "a b/c"));
        assert_eq!(parse("nbd://[::1]:99//d"), tcp("::1", 99, "/d"));
        let unix = Uri { server: Server::Unix("/run/a b".into()), export: "disk".to_owned() };
        assert_eq!(parse("nbd+unix:///disk?socket=/run/a%20b"), Some(unix));
    }

    #[test]
    fn refuses_other_urls() {
        let long = format!("nbd://host/{}", "x".repeat(MAX_NAME + 1));
        let wrong = [
            "nbd:host",
            "nbd://",
            "nbd://host:0/",
            "nbd://host:x/",
            "nbd://host/%",
            "nbd://host/%ff",
            "nbd://host/%00",
            "nbd://host/?socket=/x",
            "nbd://host/?key=1",
            "nbd://me@host/",
            "nbd+unix:///x",
            "nbd+unix://host/x?socket=/y",
            "nbd+unix:///x?socket=/y&socket=/z",
            "http://host/",
            &long,
        ];
        for text in wrong {
            assert!(Uri::parse(text).is_err(), "{text}");
        }
    }
}
