//! Numbers as people read them.

/// A count in at most four characters before the unit: `999`, `1.2k`, `45k`, `3.4M`.
#[must_use]
pub fn count(number: u64) -> String {
    scaled(number, 1000, &["", "k", "M", "G", "T", "P", "E"])
}

/// A size: `999 B`, `1.2 KiB`, `45 MiB`.
#[must_use]
pub fn bytes(number: u64) -> String {
    scaled(number, 1024, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"])
}

fn scaled(number: u64, base: u64, units: &[&str]) -> String {
    let mut divisor: u64 = 1;
    let mut unit = 0;
    while number / divisor >= base && unit + 1 < units.len() {
        divisor *= base;
        unit += 1;
    }
    let whole = number / divisor;
    // Truncated, not rounded: 1,999 is never shown as more than there is.
    let tenth = u128::from(number % divisor) * 10 / u128::from(divisor);
    match unit {
        0 => format!("{whole}{}", units[0]),
        _ if whole < 10 => format!("{whole}.{tenth}{}", units[unit]),
        _ => format!("{whole}{}", units[unit]),
    }
}

/// A time span by its two largest units: `0s`, `59s`, `3m12s`, `2h5m`, `4d7h`.
#[must_use]
pub fn seconds(span: u64) -> String {
    let (minute, hour, day) = (60, 3_600, 86_400);
    let two = |major: u64, unit: &str, minor: u64, minor_unit: &str| match minor {
        0 => format!("{major}{unit}"),
        _ => format!("{major}{unit}{minor}{minor_unit}"),
    };
    match span {
        _ if span < minute => format!("{span}s"),
        _ if span < hour => two(span / minute, "m", span % minute, "s"),
        _ if span < day => two(span / hour, "h", span % hour / minute, "m"),
        _ => two(span / day, "d", span % day / hour, "h"),
    }
}

/// A number with thousands separated: `1,234,567`.
#[must_use]
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1 flow`, `2 flows`, `1,234 flows`.
#[must_use]
pub fn plural(number: u64, noun: &str) -> String {
    format!("{} {noun}{}", grouped(number), if number == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_read_well() {
        let counts = [(0, "0"), (999, "999"), (1_000, "1.0k"), (1_999, "1.9k"), (45_600, "45k")];
        for (number, text) in counts {
            assert_eq!(count(number), text);
        }
        assert_eq!(count(u64::MAX), "18E");
        assert_eq!(
            (bytes(1_023), bytes(1_536), bytes(1 << 30)),
            ("1023 B".into(), "1.5 KiB".into(), "1.0 GiB".into())
        );
        let spans =
            [(0, "0s"), (60, "1m"), (192, "3m12s"), (7_500, "2h5m"), (86_400, "1d"), (370_800, "4d7h")];
        for (span, text) in spans {
            assert_eq!(seconds(span), text);
        }
        assert_eq!(
            (grouped(7), grouped(123_456), grouped(1_234_567)),
            ("7".into(), "123,456".into(), "1,234,567".into())
        );
        assert_eq!((plural(1, "flow"), plural(2_000, "flow")), ("1 flow".into(), "2,000 flows".into()));
    }
}
