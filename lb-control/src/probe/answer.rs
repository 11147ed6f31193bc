//! The beginning of an HTTP/1 answer.

/// What can be told of an answer by what has come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// Not yet anything.
    More,
    /// The status.
    Status(u16),
    /// It is no HTTP/1.
    Bad,
}

/// Reads what has come of an answer. Interim answers (RFC 9110, 15.2: a client must be able to take
/// them although it did not ask for them) are passed over.
pub(super) fn read(mut bytes: &[u8]) -> Reading {
    loop {
        let status = match status(bytes) {
            Reading::Status(status) => status,
            other => return other,
        };
        if !(100..200).contains(&status) || status == 101 {
            return Reading::Status(status);
        }
        match end_of_head(bytes) {
            Some(end) => bytes = &bytes[end..],
            None => return Reading::More,
        }
    }
}

/// `HTTP/1.d ddd`, and then a blank or the end of the line.
fn status(bytes: &[u8]) -> Reading {
    const FORM: &[u8; 13] = b"HTTP/1.d ddd ";
    let fits = |(byte, form): (&u8, &u8)| match form {
        b'd' => byte.is_ascii_digit(),
        b' ' => byte.is_ascii_whitespace(),
        _ => byte == form,
    };
    if !bytes.iter().zip(FORM).all(fits) {
        return Reading::Bad;
    }
    let Some(digits) = bytes.get(9..12).filter(|_| bytes.len() >= FORM.len()) else { return Reading::More };
    match digits.iter().fold(0, |sum, digit| sum * 10 + u16::from(digit - b'0')) {
        status @ 100..=999 => Reading::Status(status),
        _ => Reading::Bad,
    }
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let ends = [&b"\r\n\r\n"[..], b"\n\n"];
    let find = |end: &&[u8]| {
        let at = bytes.windows(end.len()).position(|window| window == *end)?;
        Some(at + end.len())
    };
    ends.iter().filter_map(find).min()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_status_is_found() {
        for (text, reading) in [
            ("", Reading::More),
            ("HTTP/1.1", Reading::More),
            ("HTTP/1.1 200", Reading::More),
            ("HTTP/1.1 200\n", Reading::Status(200)),
            ("HTTP/1.1 200 OK\r\n", Reading::Status(200)),
            ("HTTP/1.0 503 no\r\n\r\n", Reading::Status(503)),
            ("HTTP/1.1 100 Continue\r\n", Reading::More),
            ("HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 204 \r\n", Reading::Status(204)),
            ("HTTP/1.1 100 \n\nHTTP/1.1 100 \n\nHTTP/1.1 302 \n", Reading::Status(302)),
            ("HTTP/1.1 101 Switching\r\n", Reading::Status(101)),
            ("HTTP/2 200 OK\r\n", Reading::Bad),
            ("HTTP/1.1 2000\r\n", Reading::Bad),
            ("HTTP/1.1 099 \r\n", Reading::Bad),
            ("HTTP/1.1 20", Reading::More),
            ("HTTP/1.1 2x", Reading::Bad),
            ("SSH-2.0-x\r\n", Reading::Bad),
        ] {
            assert_eq!(read(text.as_bytes()), reading, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn in_pieces_as_at_once(
            interim in 0..3usize, status in 200u16..=999, noise in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut text = "HTTP/1.1 102 Processing\r\nA: b\r\n\r\n".repeat(interim).into_bytes();
            let until = text.len() + 13;
            text.extend(format!("HTTP/1.1 {status} Word\r\n\r\n").into_bytes());
            text.extend(&noise);
            for end in 0..=text.len() {
                let expected = if end < until { Reading::More } else { Reading::Status(status) };
                prop_assert_eq!(read(&text[..end]), expected);
            }
            let _ = read(&noise);
        }
    }
}
