//! `--watch`.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use anyhow::Result;

use super::show::write;

/// Cursor home, clear to the end of the line at each line's end, clear the rest: no flicker, as a
/// cleared screen gives (ECMA-48 CUP, EL, ED).
fn frame(text: &str) -> String {
    format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n"))
}

/// Shows what `show` gives (text and a note), again and again until the process is ended. An error is
/// shown as well: an agent that is being replaced comes back.
///
/// On a terminal a table takes the place of the one before it; else they follow each other.
pub(super) async fn repeat(
    seconds: u64,
    is_table: bool,
    mut show: impl AsyncFnMut() -> Result<(String, Option<String>)>,
) -> Result<()> {
    let in_place = is_table && stdout().is_terminal();
    if in_place {
        write("\x1b[2J")?;
    }
    let mut timer = tokio::time::interval(Duration::from_secs(seconds));
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let (text, note) = match show().await {
            Ok(shown) => shown,
            Err(error) => (String::new(), Some(format!("{error:#}"))),
        };
        if in_place {
            let note = note.map(|note| format!("pointsman: {note}\n")).unwrap_or_default();
            write(&frame(&format!("{note}{text}")))?;
        } else {
            note.inspect(|note| eprintln!("pointsman: {note}"));
            write(&text)?;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_leaves_nothing_of_the_one_before() {
        assert_eq!(frame("a\nb\n"), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
    }
}
