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

#[cfg(test)]
mod tests {
    use super::*;

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
