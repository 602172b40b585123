//! Text that others wrote, made safe to show: names of clients, topics, errors of plugins, contents of files.
//!
//! A terminal obeys control characters, a reader of the log takes a line break for the end of an entry, and some
//! characters turn round what stands beside them. [`escaped`] shows each of these as an escape sequence, and bounds the
//! length. A backslash stays as it is, so that text which passes through twice does not change the second time; what
//! is shown is for reading, not for parsing back.

use std::fmt::{self, Write};

/// Bytes that the mark of a cut text can take: `…(18446744073709551615 bytes)`.
pub const CUT_MARK_BYTES_MAX: usize = 32;

/// Shows `text` on one line, without control characters, in at most `bytes_max` bytes; what does not fit is replaced by
/// `…(N bytes)`, where N is the length of the whole `text`.
pub fn escaped(text: &str, bytes_max: usize) -> Escaped<'_> {
    Escaped { text, bytes_max, line_breaks: false }
}

/// Like [`escaped`], with line breaks that stay line breaks: for messages of several lines. Each line after the first
/// is indented, so that none can pass for a message of its own.
pub fn escaped_lines(text: &str, bytes_max: usize) -> Escaped<'_> {
    Escaped { text, bytes_max, line_breaks: true }
}

/// A text that is safe to show. See [`escaped`]. `Debug` puts it in quotes.
#[derive(Clone, Copy)]
pub struct Escaped<'a> {
    text: &'a str,
    bytes_max: usize,
    line_breaks: bool,
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut escaper = Escaper { line_breaks: self.line_breaks, ..Escaper::new(out, self.bytes_max) };
        escaper.write_str(self.text)?;
        escaper.finish()
    }
}

impl fmt::Debug for Escaped<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_char('"')?;
        let mut escaper = Escaper::quoted(out, self.bytes_max);
        escaper.write_str(self.text)?;
        escaper.finish()?;
        out.write_char('"')
    }
}

/// A writer that passes on what is written to it as [`escaped`] shows it.
pub struct Escaper<'w> {
    out: &'w mut dyn fmt::Write,
    left: usize,
    /// Bytes that were to be written, and whether some were left out.
    seen: usize,
    cut: bool,
    line_breaks: bool,
    quoted: bool,
}

impl<'w> Escaper<'w> {
    /// Passes on at most `bytes_max` bytes to `out`.
    pub fn new(out: &'w mut dyn fmt::Write, bytes_max: usize) -> Self {
        Self { out, left: bytes_max, seen: 0, cut: false, line_breaks: false, quoted: false }
    }

    /// The same for text that will stand in quotes: those in it, and backslashes, are escaped.
    pub fn quoted(out: &'w mut dyn fmt::Write, bytes_max: usize) -> Self {
        Self { quoted: true, ..Self::new(out, bytes_max) }
    }

    /// Counts `bytes` that the caller leaves out; nothing is passed on after them.
    pub fn skip(&mut self, bytes: usize) {
        self.seen += bytes;
        self.cut |= bytes > 0;
    }

    /// Says so if something was left out. Returns what `out` says.
    pub fn finish(self) -> fmt::Result {
        if self.cut { write!(self.out, "…({} bytes)", self.seen) } else { Ok(()) }
    }

    fn put(&mut self, shown: &str) -> fmt::Result {
        if self.cut || shown.len() > self.left {
            self.cut = true;
            return Ok(());
        }
        self.left -= shown.len();
        self.out.write_str(shown)
    }

    fn put_escape(&mut self, c: char) -> fmt::Result {
        match c {
            '\n' if self.line_breaks => self.put("\n  "),
            '\n' => self.put("\\n"),
            '\r' => self.put("\\r"),
            '\t' => self.put("\\t"),
            '"' => self.put("\\\""),
            '\\' => self.put("\\\\"),
            // At most 10 bytes: `\u{10ffff}`.
            _ => {
                let mut shown = [0; 10];
                let mut length = 0;
                for digit in c.escape_unicode() {
                    digit.encode_utf8(&mut shown[length..]);
                    length += 1;
                }
                self.put(std::str::from_utf8(&shown[..length]).unwrap_or_default())
            }
        }
    }
}

impl fmt::Write for Escaper<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.seen += text.len();
        let mut rest = text;
        while !self.cut && !rest.is_empty() {
            let quoted = self.quoted;
            // No more than may be shown, and a character: the rest may be megabytes.
            let head = &rest[..rest.floor_char_boundary(self.left.saturating_add(4))];
            let plain = head.find(|c| is_unsafe(c) || quoted && matches!(c, '"' | '\\')).unwrap_or(head.len());
            let (harmless, after) = rest.split_at(plain);
            if harmless.len() > self.left {
                let fits = &harmless[..harmless.floor_char_boundary(self.left)];
                self.put(fits)?;
                self.cut = true;
                break;
            }
            self.put(harmless)?;
            let mut after = after.chars();
            if let Some(c) = after.next() {
                self.put_escape(c)?;
            }
            rest = after.as_str();
        }
        Ok(())
    }
}

/// Stands for a secret where a value is shown for debugging.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret;

impl Secret {
    /// Tells whether there is one, and neither its bytes nor how many.
    pub fn of<T>(secret: Option<T>) -> Option<Self> {
        secret.map(|_| Self)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("(secret)")
    }
}

/// A character that a terminal, a reader of lines or a reader's eye could take for something else than itself.
pub fn is_unsafe(c: char) -> bool {
    // Nearly all text that is shown is ASCII.
    if c.is_ascii() {
        return c.is_ascii_control();
    }
    matches!(c,
        // C1 control characters, which some terminals obey as they do ESC.
        '\u{80}'..='\u{9f}'
        // Direction of what follows: Arabic letter mark, left-to-right and right-to-left marks, embeddings, isolates.
        | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{206f}'
        // Line and paragraph separator.
        | '\u{2028}' | '\u{2029}'
        // Shown as nothing: zero width space, byte order mark, annotations, tags.
        | '\u{200b}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}'
        // Noncharacters of the basic plane.
        | '\u{fdd0}'..='\u{fdef}' | '\u{fffe}' | '\u{ffff}')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, shown: &str) {
        assert_eq!(escaped(text, 1_000).to_string(), shown);
    }

    #[test]
    fn what_a_terminal_obeys_is_shown_as_an_escape() {
        check("sensor-7", "sensor-7");
        check("Zähler/⚡ 5", "Zähler/⚡ 5");
        check("a\nb\r\tc", "a\\nb\\r\\tc");
        check("\u{1b}[31mred\u{7}\u{7f}", "\\u{1b}[31mred\\u{7}\\u{7f}");
        check("\u{9b}2J\u{85}", "\\u{9b}2J\\u{85}");
        check("\u{202e}txt.exe\u{2066}\u{200f}", "\\u{202e}txt.exe\\u{2066}\\u{200f}");
        check("one\u{2028}two\u{2029}", "one\\u{2028}two\\u{2029}");
        check("\0", "\\u{0}");
        check("a\u{e0041}b\u{ffff}", "a\\u{e0041}b\\u{ffff}");
    }

    #[test]
    fn debug_puts_quotes_around_it_that_cannot_be_left() {
        assert_eq!(format!("{:?}", escaped("a\" b=\"\\\n", 100)), r#""a\" b=\"\\\n""#);
    }

    #[test]
    fn lines_that_stay_lines_are_indented() {
        assert_eq!(escaped_lines("one\ntwo\u{1b}\n", 100).to_string(), "one\n  two\\u{1b}\n  ");
    }

    #[test]
    fn what_is_too_long_is_cut_and_says_so() {
        assert_eq!(escaped("abcdef", 6).to_string(), "abcdef");
        assert_eq!(escaped("abcdef", 5).to_string(), "abcde…(6 bytes)");
        assert_eq!(escaped("äöü", 3).to_string(), "ä…(6 bytes)");
        assert_eq!(escaped("ab\u{1b}c", 5).to_string(), "ab…(4 bytes)");
        assert_eq!(escaped("abc", 0).to_string(), "…(3 bytes)");
        assert_eq!(escaped("", 0).to_string(), "");
    }

    /// Characters of all kinds, the dangerous ones often.
    fn any_text() -> impl Strategy<Value = String> {
        let c = prop_oneof![
            any::<char>(),
            (0_u8..0xa0).prop_map(char::from),
            (0x2000_u32..0x2070).prop_map(|code| char::from_u32(code).unwrap_or(' '))
        ];
        proptest::collection::vec(c, 0..60).prop_map(String::from_iter)
    }

    proptest! {
        #[test]
        fn nothing_unsafe_is_shown(text in any_text(), bytes_max in 0_usize..200) {
            for shown in [escaped(&text, bytes_max).to_string(), format!("{:?}", escaped(&text, bytes_max))] {
                prop_assert!(!shown.chars().any(is_unsafe), "{shown:?}");
                prop_assert!(shown.len() <= bytes_max + CUT_MARK_BYTES_MAX + 2);
            }
            let lines = escaped_lines(&text, bytes_max).to_string();
            prop_assert!(lines.lines().skip(1).all(|line| line.starts_with("  ")));
            prop_assert!(!lines.chars().any(|c| c != '\n' && is_unsafe(c)));
        }

        #[test]
        fn showing_twice_is_showing_once(text in any_text()) {
            let once = escaped(&text, usize::MAX).to_string();
            prop_assert_eq!(escaped(&once, usize::MAX).to_string(), once);
        }

        /// A value is written piece by piece when it is formatted.
        #[test]
        fn pieces_are_shown_as_the_whole(pieces in proptest::collection::vec(any_text(), 0..5), bytes_max in 0_usize..200) {
            let mut shown = String::new();
            let mut escaper = Escaper::new(&mut shown, bytes_max);
            for piece in &pieces {
                escaper.write_str(piece).expect("a string takes everything");
            }
            escaper.finish().expect("a string takes everything");
            prop_assert_eq!(shown, escaped(&pieces.concat(), bytes_max).to_string());
        }
    }
}
