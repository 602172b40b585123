//! What commands print. Names of clients, errors of plugins and contents of files stand in it, so nothing in it may move
//! the cursor of a terminal or pass for a line of our own.

use std::fmt::Write as _;
use std::io::{self, Write};

use anyhow::Context;
use serde::Serialize;
use wasmqtt_protocol::text::{escaped, escaped_lines, is_unsafe};

use crate::settings::ConfigError;

/// Bytes of an error that a command prints.
const ERROR_BYTES_MAX: usize = 64 * 1024;

/// To standard output, each line without control characters. A reader that has seen enough (`| head`) is not an error.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let shown: String;
    let text = if text.contains(|c| c != '\n' && is_unsafe(c)) {
        let lines = text.split('\n').map(|line| escaped(line, usize::MAX).to_string());
        shown = lines.collect::<Vec<_>>().join("\n");
        &shown
    } else {
        text
    };
    match io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error).context("write to standard output"),
        _ => Ok(()),
    }
}

/// To standard error.
pub(crate) fn print_error(error: &anyhow::Error) {
    let text = format!("{error:#}");
    // Its lines are problems of a file, each with its place in front and escaped where it was made.
    let shown = if error.is::<ConfigError>() {
        text.lines().map(|line| escaped(line, ERROR_BYTES_MAX).to_string()).collect::<Vec<_>>().join("\n")
    } else {
        escaped_lines(&text, ERROR_BYTES_MAX).to_string()
    };
    eprintln!("error: {shown}");
}

/// For machines, and still harmless on a terminal: what it would obey is written as an escape of JSON.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<String> {
    let written = serde_json::to_string_pretty(value).context("write JSON")?;
    let mut text = String::with_capacity(written.len() + 1);
    for c in written.chars() {
        if c == '\n' || !is_unsafe(c) {
            text.push(c);
            continue;
        }
        // Outside of strings JSON has no such characters.
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(text, "\\u{unit:04x}");
        }
    }
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_means_the_same_and_moves_no_cursor() {
        let value = serde_json::json!({ "a\u{9b}": ["\u{202e}x\u{1b}\n\u{7f}", "ä\u{e0041}"] });
        let text = json(&value).expect("JSON");
        assert!(!text.chars().any(|c| c != '\n' && is_unsafe(c)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("JSON"), value);
    }
}
