//! Text from images, made safe for terminals.

use std::borrow::Cow;

/// Escapes control characters and those that change the direction of text, so that text from an untrusted
/// image can't control the terminal. Leaves out what may be a credential in a URL: its user part and query.
pub fn escape_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in without_credentials(text).chars() {
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Leaves out user part and query of every URL in a text. A URL ends at a blank or a quote.
fn without_credentials(text: &str) -> Cow<'_, str> {
    let Some(start) = text.find("://").map(|at| at + 3) else { return text.into() };
    let (before, rest) = text.split_at(start);
    let end = rest.find(|c: char| c.is_whitespace() || matches!(c, '\'' | '"')).unwrap_or(rest.len());
    let (url, after) = rest.split_at(end);
    let authority_len = url.find(['/', '?', '#']).unwrap_or(url.len());
    // A password with a '/' that is not escaped ends the authority early.
    let host = match url.rfind('@').filter(|_| url[..authority_len].contains([':', '@'])) {
        Some(at) => &url[at + 1..],
        None => url,
    };
    let host = host.find('?').map_or(host, |query| &host[..query]);
    format!("{before}{host}{}", without_credentials(after)).into()
}

#[cfg(test)]
mod tests {
    use super::escape_control;

    #[test]
    fn credentials_in_urls_are_left_out() {
        for (text, shown) in [
            (
                "directory https://user:secret@host/x does not exist",
                "directory https://host/x does not exist",
            ),
            ("{'url':'https://u:secret@h:80/x?sig=secret'}", "{'url':'https://h:80/x'}"),
            ("s3://u:sec/ret@h/b and nbd://u:p@k", "s3://h/b and nbd://k"),
            ("https://u:12/secret@h/x, https://u:se@cr/et@h/x", "https://h/x, https://h/x"),
            ("https://h/a@b", "https://h/a@b"),
            ("a@b:c", "a@b:c"),
        ] {
            assert_eq!(escape_control(text), shown);
        }
    }
}
