//! Just enough Rust to look at code without its comments and strings.

/// The same text, byte for byte, with the content of comments, strings and character literals
/// replaced by spaces; line breaks stay, so that line numbers do.
pub fn blank_comments_and_strings(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let end = match bytes[at] {
            b'/' if bytes[at..].starts_with(b"//") => line_end(bytes, at),
            b'/' if bytes[at..].starts_with(b"/*") => block_comment_end(bytes, at),
            b'"' => string_end(bytes, at),
            b'r' if !follows_identifier(bytes, at) => raw_string_end(bytes, at).unwrap_or(at),
            b'\'' => char_literal_end(bytes, at).unwrap_or(at),
            _ => at,
        };
        if end == at {
            at += 1;
            continue;
        }
        out[at..end].iter_mut().filter(|byte| **byte != b'\n').for_each(|byte| *byte = b' ');
        at = end;
    }
    String::from_utf8(out).expect("whole literals are blanked, so no character is cut")
}

/// Start offsets of each place where `path` (`word` or `word::word`) stands as whole words.
pub fn find_path<'a>(code: &'a str, path: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(path).map(|(at, _)| at).filter(move |&at| {
        let bytes = code.as_bytes();
        let after = bytes.get(at + path.len()).copied().unwrap_or(b' ');
        !follows_identifier(bytes, at) && !is_identifier(after)
    })
}

/// 1 for the first line.
pub fn line_of(code: &str, at: usize) -> usize {
    code.as_bytes()[..at].iter().filter(|byte| **byte == b'\n').count() + 1
}

pub fn is_identifier(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

fn follows_identifier(bytes: &[u8], at: usize) -> bool {
    at > 0 && is_identifier(bytes[at - 1])
}

fn line_end(bytes: &[u8], at: usize) -> usize {
    bytes[at..].iter().position(|byte| *byte == b'\n').map_or(bytes.len(), |length| at + length)
}

/// Block comments nest.
fn block_comment_end(bytes: &[u8], mut at: usize) -> usize {
    let mut depth = 0;
    while at < bytes.len() {
        if bytes[at..].starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if bytes[at..].starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    bytes.len()
}

fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != b'"' {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}

/// `r"…"`, `r#"…"#`; `None` for an identifier that starts with r, or a raw identifier.
fn raw_string_end(bytes: &[u8], at: usize) -> Option<usize> {
    let hashes = bytes[at + 1..].iter().take_while(|byte| **byte == b'#').count();
    let open = at + 1 + hashes;
    if bytes.get(open) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &vec![b'#'; hashes]].concat();
    let length = bytes[open + 1..].windows(close.len()).position(|window| window == close);
    Some(length.map_or(bytes.len(), |length| open + 1 + length + close.len()))
}

/// `None` for a lifetime.
fn char_literal_end(bytes: &[u8], at: usize) -> Option<usize> {
    if bytes.get(at + 1) == Some(&b'\\') {
        let close = bytes.get(at + 3..)?.iter().position(|byte| *byte == b'\'')?;
        return Some(at + 3 + close + 1);
    }
    // One character of up to four bytes, then the quote.
    let text = std::str::from_utf8(&bytes[at + 1..(at + 5).min(bytes.len())])
        .or_else(|error| std::str::from_utf8(&bytes[at + 1..at + 1 + error.valid_up_to()]))
        .ok()?;
    let length = text.chars().next()?.len_utf8();
    (bytes.get(at + 1 + length) == Some(&b'\'')).then_some(at + length + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blank(text: &str) -> String {
        let out = blank_comments_and_strings(text);
        assert_eq!(out.len(), text.len());
        out.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_and_literals_go_and_code_stays() {
        let cases = [
            ("a // tokio\nb", "a b"),
            ("a /* x /* y */ z */ b", "a b"),
            (r#"a("tokio \" kube") b"#, "a( ) b"),
            (r###"a(r#"x " y"#) b"###, "a( ) b"),
            ("f('\"', '\\'', 'ü', '\\u{1f}') \"x\" b", "f( , , , ) b"),
            ("fn f<'a>(x: &'a str) -> &'a str", "fn f<'a>(x: &'a str) -> &'a str"),
            ("r#type + raw", "r#type + raw"),
            ("b\"tokio\" c\"kube\"", "b c"),
            ("\"open", ""),
            ("/* open", ""),
        ];
        for (text, expected) in cases {
            assert_eq!(blank(text), expected, "{text}");
        }
    }

    #[test]
    fn lines_keep_their_numbers() {
        let out = blank_comments_and_strings("\"a\nb\" /*\n*/ c");
        assert_eq!(line_of(&out, out.find('c').unwrap()), 3);
    }

    #[test]
    fn paths_are_found_as_whole_words() {
        let code = "tokio::spawn; my_tokio; tokio_util; x::tokio";
        assert_eq!(find_path(code, "tokio").collect::<Vec<_>>(), [0, 39]);
    }
}
