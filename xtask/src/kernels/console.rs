//! What a guest printed, read: `tests/src/bin/pointsman-guest.rs` says it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

const MARK: &str = "@pointsman ";

/// All that is known of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// As the kernel calls itself.
    pub release: Option<String>,
    pub verified: Vec<Verified>,
    /// Programs that the kernel refuses, with its words.
    pub refused: Vec<(String, String)>,
    pub ended: Vec<Ended>,
    /// What kept the guest from going on.
    pub failure: Option<String>,
    /// Whether the guest came to its end by itself.
    pub complete: bool,
    /// What had begun and not ended.
    pub unfinished: Option<String>,
}

/// A program that the kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    pub program: String,
    pub instructions: u32,
    /// Bytes, of the function that takes most.
    pub stack: u32,
}

/// Something that was run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub name: String,
    /// `None` when it took too long.
    pub status: Option<ExitStatus>,
    pub took: Duration,
    pub output: String,
}

/// Reads a console's text, in which the kernel's own messages may stand anywhere.
pub fn read(text: &str) -> Transcript {
    let mut transcript = Transcript::default();
    let mut output = String::new();
    for line in text.lines().map(|line| line.trim_end_matches('\r')) {
        let Some(message) = line.strip_prefix(MARK).or((line == MARK.trim_end()).then_some("")) else {
            output.push_str(line);
            output.push('\n');
            continue;
        };
        let (kind, rest) = message.split_once(' ').unwrap_or((message, ""));
        match kind {
            "kernel" => transcript.release = Some(rest.to_owned()),
            "verified" => transcript.verified.extend(verified(rest)),
            "refused" => transcript.refused.extend(
                rest.split_once(' ').map(|(program, reason)| (program.to_owned(), reason.to_owned())),
            ),
            "begin" => {
                output.clear();
                transcript.unfinished = Some(rest.to_owned());
            }
            "done" => {
                transcript.unfinished = None;
                transcript.ended.extend(ended(rest, std::mem::take(&mut output)));
            }
            "failed" => transcript.failure = Some(rest.to_owned()),
            "end" => transcript.complete = true,
            _ => {}
        }
    }
    transcript
}

fn verified(text: &str) -> Option<Verified> {
    let mut words = text.split(' ');
    Some(Verified {
        program: words.next()?.to_owned(),
        instructions: words.next()?.parse().ok()?,
        stack: words.next()?.parse().ok()?,
    })
}

fn ended(text: &str, output: String) -> Option<Ended> {
    let mut words = text.split(' ');
    let (name, status, milliseconds) = (words.next()?, words.next()?, words.next()?);
    Some(Ended {
        name: name.to_owned(),
        status: status.parse().ok().map(ExitStatus::from_raw),
        took: Duration::from_millis(milliseconds.parse().ok()?),
        output,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_run_is_read() {
        let text = "[    0.0] Linux version\r\n\r\n@pointsman kernel 6.1.0-56\r\n@pointsman begin verify\r\n\
            @pointsman verified slow_v4 120 64\r\n@pointsman refused slow_v6 Permission denied | R1 !read_ok\r\n\
            \r\n@pointsman done verify 0 1500\r\n@pointsman begin late\r\nwords\r\n@pointsman done late timeout 9\r\n\
            @pointsman begin bad\r\n@pointsman done bad 256 1\r\n@pointsman end\r\nreboot: Power down\r\n";
        let transcript = read(text);
        assert_eq!(transcript.release.as_deref(), Some("6.1.0-56"));
        let slow = Verified { program: "slow_v4".into(), instructions: 120, stack: 64 };
        assert_eq!(transcript.verified, [slow]);
        assert_eq!(
            transcript.refused,
            [("slow_v6".to_owned(), "Permission denied | R1 !read_ok".to_owned())]
        );
        let ended: Vec<_> = transcript
            .ended
            .iter()
            .map(|ended| (ended.name.as_str(), ended.status.and_then(|status| status.code())))
            .collect();
        assert_eq!(ended, [("verify", Some(0)), ("late", None), ("bad", Some(1))]);
        assert_eq!(transcript.ended[1].output, "words\n");
        assert!(transcript.complete && transcript.unfinished.is_none());
    }

    #[test]
    fn a_guest_that_dies_leaves_what_it_was_doing() {
        let transcript = read("@pointsman begin e2e\nKernel panic - not syncing\n");
        assert_eq!(transcript.unfinished.as_deref(), Some("e2e"));
        assert!(!transcript.complete);
        assert_eq!(
            read("@pointsman failed cannot mount /sys | no\n@pointsman end\n").failure.as_deref(),
            Some("cannot mount /sys | no")
        );
    }
}
