//! How many connections a client may open, as an annotation says it.

use lb_common::abi::ConnectionLimit;

/// Reads `RATE` or `RATE/BURST`: new connections of one client in a second, and at once after a pause.
/// Without a burst, it is what the rate allows in a second.
///
/// The kernel counts time in ticks of 16.8 ms: a burst that holds less than a tick's worth would cut
/// the rate, and is refused; one that is not given is made large enough.
///
/// # Errors
/// What is wrong with the text, as a sentence.
pub fn parse_connection_limit(text: &str) -> Result<ConnectionLimit, String> {
    let maximum = ConnectionLimit::MAXIMUM;
    let number = |part: &str| part.trim().parse().ok().filter(|number| (1..=maximum).contains(number));
    let (rate, burst) = text.split_once('/').map_or((text, None), |(rate, burst)| (rate, Some(burst)));
    let form = || format!("`{text}`: write RATE or RATE/BURST, each a number from 1 to {maximum}");
    let rate: u32 = number(rate).ok_or_else(form)?;
    let least = ConnectionLimit::least_burst(rate);
    let burst = match burst {
        Some(burst) => number(burst).ok_or_else(form)?,
        None => rate.max(least),
    };
    if burst < least {
        return Err(format!(
            "`{text}`: a rate of {rate} needs a burst of {least} or more, because time is counted in ticks \
             of 16.8 ms"
        ));
    }
    Ok(ConnectionLimit { rate, burst })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_burst() {
        for (text, rate, burst) in [
            ("100", 100, 100),
            ("100/200", 100, 200),
            (" 5 / 9 ", 5, 9),
            ("1", 1, 2),
            ("1/2", 1, 2),
            ("100/3", 100, 3),
            ("1000000", 1_000_000, 1_000_000),
        ] {
            assert_eq!(parse_connection_limit(text), Ok(ConnectionLimit { rate, burst }), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, why) in [
            ("", "write RATE"),
            ("0", "from 1"),
            ("-1", "from 1"),
            ("many", "write RATE"),
            ("1000001", "to 1000000"),
            ("100/", "write RATE"),
            ("100/0", "from 1"),
            ("/5", "write RATE"),
            ("1/2/3", "write RATE"),
            ("100/2", "a burst of 3 or more"),
        ] {
            let error = parse_connection_limit(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
