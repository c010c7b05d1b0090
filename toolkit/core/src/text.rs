//! Text from images, made safe for terminals.

use std::borrow::Cow;

/// Escapes control characters and characters that change the text direction, so that text from an untrusted
/// image can't control the terminal. Leaves out the user part and query of every URL, since they may contain
/// credentials.
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

/// Leaves out the user part and query of every URL in a text. A URL ends at whitespace; a query also ends at
/// a quote. Users often leave passwords unescaped, so the function leaves out too much rather than too
/// little.
fn without_credentials(text: &str) -> Cow<'_, str> {
    if !text.contains("://") {
        return text.into();
    }
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("://").map(|at| at + 3) {
        out.push_str(&rest[..start]);
        let url_len = rest[start..].find(char::is_whitespace).unwrap_or(rest.len() - start);
        let url = &rest[start..start + url_len];
        let authority_len = url.find(['/', '?', '#']).unwrap_or(url.len());
        // An unescaped '/' in a password ends the authority early.
        let user_len = match url.rfind('@').filter(|_| url[..authority_len].contains([':', '@'])) {
            Some(at) => at + 1,
            None => 0,
        };
        let shown = &url[user_len..];
        let shown_len = shown.find(['?', '\'', '"']).unwrap_or(shown.len());
        let query_len = match shown[shown_len..].starts_with('?') {
            true => shown[shown_len..].find(['\'', '"']).unwrap_or(shown.len() - shown_len),
            false => 0,
        };
        out.push_str(&shown[..shown_len]);
        rest = &rest[start + user_len + shown_len + query_len..];
    }
    out.push_str(rest);
    out.into()
}

#[cfg(test)]
mod tests {
    use super::escape_control;

    #[test]
    fn removes_credentials_from_urls() {
        for (text, shown) in [
            (
                "directory https://user:secret@host/x does not exist",
                "directory https://host/x does not exist",
            ),
            ("{'url':'https://u:secret@h:80/x?sig=secret'}", "{'url':'https://h:80/x'}"),
            ("s3://u:sec/ret@h/b and nbd://u:p@k", "s3://h/b and nbd://k"),
            ("https://u:12/secret@h/x, https://u:se@cr/et@h/x", "https://h/x, https://h/x"),
            ("can't open 'https://u:se'cret@h/x'", "can't open 'https://h/x'"),
            ("https://h/a@b", "https://h/a@b"),
            ("a@b:c", "a@b:c"),
        ] {
            assert_eq!(escape_control(text), shown);
        }
    }

    #[test]
    fn many_urls_do_not_overflow_the_stack() {
        let text = "://u:p@h ".repeat(100_000);
        assert_eq!(escape_control(&text), "://h ".repeat(100_000));
    }
}
