//! Whether the node forwards packets at all.

use std::fs;

/// What is missing for packets to reach pods of this node, and the way out; nothing if the node
/// forwards, or that cannot be known.
#[must_use]
pub fn missing(v6: bool) -> Option<String> {
    let key = if v6 { "net.ipv6.conf.all.forwarding" } else { "net.ipv4.ip_forward" };
    let path = format!("/proc/sys/{}", key.replace('.', "/"));
    explain(key, &fs::read_to_string(path).ok()?)
}

fn explain(key: &str, value: &str) -> Option<String> {
    // IPv6 knows 2 as well: forwarding, and router advertisements all the same.
    (value.trim() == "0").then(|| {
        format!(
            "{key} is 0: packets do not reach backends behind devices of this node; run `sysctl -w {key}=1`"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_zero_is_off() {
        assert!(explain("net.ipv4.ip_forward", "0\n").unwrap().contains("sysctl -w net.ipv4.ip_forward=1"));
        for on in ["1\n", "2\n"] {
            assert_eq!(explain("net.ipv4.ip_forward", on), None);
        }
    }
}
