//! Text from images, made safe for terminals.

use std::borrow::Cow;

/// Escapes every character for which [`is_hidden`] is true, so that text from an untrusted image can't control
/// the terminal or look like other text. Leaves out the user part and query of every URL, since they may
/// contain credentials.
pub fn escape_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in without_credentials(text).chars() {
        if is_hidden(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// True for a character that a terminal obeys or does not show: the general categories Cc (control), Cf
/// (format: direction marks, joiners, tags), Zl and Zp (line and paragraph separators) of Unicode 17.
///
/// The ranges of Cf include unassigned characters within the blocks of format characters and of tags.
/// Variation selectors (category Mn) are not included: they belong to visible characters.
pub fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{890}'..='\u{891}' | '\u{8e2}'
            | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
            | '\u{fff9}'..='\u{fffb}' | '\u{110bd}' | '\u{110cd}' | '\u{13430}'..='\u{1343f}'
            | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e007f}')
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
    use super::{escape_control, is_hidden};

    #[test]
    fn hidden_characters_are_escaped_and_all_others_stay() {
        let mut hidden = 0;
        for c in '\0'..=char::MAX {
            let escaped = escape_control(c.encode_utf8(&mut [0; 4]));
            assert_eq!(escaped == c.to_string(), !is_hidden(c), "{c:?}");
            if is_hidden(c) {
                assert!(escaped.is_ascii() && escaped.starts_with('\\'), "{c:?} becomes {escaped}");
                hidden += 1;
            }
        }
        // 65 of Cc, 170 of Cf, one each of Zl and Zp, and the unassigned U+2065 and 31 in the block of tags.
        assert_eq!(hidden, 65 + 170 + 2 + 1 + 31);
        assert_eq!(escape_control("\u{61c}a\u{e0041}\u{200b}"), "\\u{61c}a\\u{e0041}\\u{200b}");
        assert_eq!(escape_control("ö 日本 ❤\u{fe0f} مرحبا"), "ö 日本 ❤\u{fe0f} مرحبا");
    }

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
