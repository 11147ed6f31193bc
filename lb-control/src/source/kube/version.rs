//! Versions of the API server.

use k8s_openapi::apimachinery::pkg::version::Info;

use super::Fatal;

/// `discovery.k8s.io/v1` came with 1.21.
const OLDEST: (u32, u32) = (1, 21);
/// Streaming lists (KEP-3157) are on by default since.
const STREAMING: (u32, u32) = (1, 32);

/// Whether lists can be streamed; the server may refuse all the same.
///
/// # Errors
/// When the server is too old. A version that cannot be read passes.
pub fn check(info: &Info) -> Result<bool, Fatal> {
    // Vendors append to the numbers: `21+`.
    let number = |text: &str| {
        let end = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
        text[..end].parse::<u32>().ok()
    };
    let (Some(major), Some(minor)) = (number(&info.major), number(&info.minor)) else { return Ok(false) };
    if (major, minor) < OLDEST {
        return Err(Fatal(format!(
            "the API server is Kubernetes {}, and Pointsman needs {}.{} or newer: upgrade the cluster",
            info.git_version, OLDEST.0, OLDEST.1
        )));
    }
    Ok((major, minor) >= STREAMING)
}

/// Whether a version is older than one that was seen before: the server's state was restored from a
/// backup, and what it says now counts, however old. Versions of etcd are numbers that only grow
/// (KEP-5504); of a server whose versions are none nothing follows.
#[must_use]
pub fn went_back(seen: Option<&str>, now: &str) -> bool {
    let number = |text: &str| text.parse::<u64>().ok();
    seen.and_then(number).zip(number(now)).is_some_and(|(seen, now)| now < seen)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_go_back() {
        for (seen, now, expected) in [
            (None, "7", false),
            (Some("7"), "7", false),
            (Some("9"), "10", false),
            (Some("10"), "9", true),
            (Some("10"), "", false),
            (Some("10"), "abc", false),
            (Some("abc"), "9", false),
        ] {
            assert_eq!(went_back(seen, now), expected, "{seen:?} {now}");
        }
    }

    #[test]
    fn old_servers_are_refused() {
        let info = |major: &str, minor: &str| Info {
            major: major.into(),
            minor: minor.into(),
            git_version: format!("v{major}.{minor}.3"),
            ..Info::default()
        };
        for (major, minor, expected) in [
            ("1", "20", None),
            ("1", "9+", None),
            ("1", "21", Some(false)),
            ("1", "21+", Some(false)),
            ("1", "32", Some(true)),
            ("2", "0", Some(true)),
            ("", "", Some(false)),
        ] {
            assert_eq!(check(&info(major, minor)).ok(), expected, "{major}.{minor}");
        }
        let text = check(&info("1", "20")).unwrap_err().to_string();
        assert!(text.contains("v1.20.3") && text.contains("1.21 or newer"), "{text}");
    }
}
