//! TOML with a memory of where each value stood.
//!
//! A [`Section`] hands out values by key, says what is wrong with one in the words of an operator, and at the end names
//! the keys nobody asked for. It knows nothing of MQTT or of what the keys mean.

use std::cell::RefCell;
use std::fmt::Write as _;
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};
use wasmqtt_protocol::text::escaped;

use super::Problem;

/// Most characters of a value that a message repeats.
const VALUE_CHARS_MAX: usize = 60;
/// Bytes of a message about one problem.
const PROBLEM_BYTES_MAX: usize = 2048;

/// A file's text, and the problems found in it so far.
pub(super) struct Source<'a> {
    text: &'a str,
    problems: RefCell<Vec<Problem>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, problems: RefCell::default() }
    }

    /// The document, or everything that keeps it from being TOML.
    pub(super) fn parse(&self) -> Result<DeTable<'a>, Vec<Problem>> {
        let (document, errors) = DeTable::parse_recoverable(self.text);
        if errors.is_empty() {
            return Ok(document.into_inner());
        }
        let problem = |error: &toml::de::Error| Problem {
            line: self.line(error.span().map_or(0, |span| span.start)),
            text: escaped(&format!("not TOML: {}", error.message()), PROBLEM_BYTES_MAX).to_string(),
        };
        Err(errors.iter().map(problem).collect())
    }

    pub(super) fn root(&'a self, document: &'a DeTable<'a>) -> Section<'a> {
        Section { source: self, path: String::new(), table: Some(document), known: Vec::new() }
    }

    /// Problems by line, if there were any.
    pub(super) fn finish(&self) -> Result<(), Vec<Problem>> {
        let mut problems = self.problems.take();
        problems.sort_by_key(|problem| problem.line);
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn line(&self, at: usize) -> usize {
        1 + self.text.as_bytes().iter().take(at).filter(|byte| **byte == b'\n').count()
    }

    fn report(&self, at: usize, text: &str) {
        // Keys and values of the file stand in it, and it is shown on a terminal.
        let text = escaped(text, PROBLEM_BYTES_MAX).to_string();
        self.problems.borrow_mut().push(Problem { line: self.line(at), text });
    }
}

/// A string and where it was written.
pub(super) struct Text<'a> {
    pub(super) value: &'a str,
    key: &'static str,
    span: Range<usize>,
}

/// One table of the file; without a table, each key has its default.
pub(super) struct Section<'a> {
    source: &'a Source<'a>,
    path: String,
    table: Option<&'a DeTable<'a>>,
    known: Vec<&'static str>,
}

impl<'a> Section<'a> {
    pub(super) fn text(&mut self, key: &'static str) -> Option<Text<'a>> {
        let found = self.take(key)?;
        match found.get_ref().as_str() {
            Some(value) => Some(Text { value, key, span: found.span() }),
            None => self.wrong(key, found, "must be a string in quotes"),
        }
    }

    /// A list of strings; empty if absent.
    pub(super) fn texts(&mut self, key: &'static str) -> Vec<Text<'a>> {
        let Some(found) = self.take(key) else { return Vec::new() };
        let allowed = "must be a list of strings in quotes";
        let Some(array) = found.get_ref().as_array() else {
            return self.wrong(key, found, allowed).unwrap_or_default();
        };
        let text = |item: &'a Spanned<DeValue<'a>>| match item.get_ref().as_str() {
            Some(value) => Some(Text { value, key, span: item.span() }),
            None => self.wrong(key, item, allowed),
        };
        array.iter().filter_map(text).collect()
    }

    /// Like [`Self::text`]; its absence is a problem.
    pub(super) fn required(&mut self, key: &'static str, what: &str) -> Option<Text<'a>> {
        if self.table.is_some_and(|table| !table.contains_key(key)) {
            self.known.push(key);
            let at = self.table.and_then(|table| table.iter().map(|(key, _)| key.span().start).min());
            let header = self.path.clone();
            self.source.report(at.unwrap_or(0), &format!("{header}: `{key}` is missing: {what}"));
        }
        self.text(key)
    }

    pub(super) fn flag(&mut self, key: &'static str) -> Option<bool> {
        let found = self.take(key)?;
        match found.get_ref().as_bool() {
            Some(value) => Some(value),
            None => self.wrong(key, found, "allowed are true and false"),
        }
    }

    /// `allowed` must lie within the type.
    pub(super) fn number<T: TryFrom<i64>>(&mut self, key: &'static str, default: T, allowed: RangeInclusive<i64>) -> T {
        let Some(found) = self.take(key) else { return default };
        let number = found.get_ref().as_integer().and_then(|n| i64::from_str_radix(n.as_str(), n.radix()).ok());
        if let Some(number) = number
            && allowed.contains(&number)
            && let Ok(number) = T::try_from(number)
        {
            return number;
        }
        let allowed = format!("allowed is a whole number from {} to {}", allowed.start(), allowed.end());
        self.wrong(key, found, &allowed).unwrap_or(default)
    }

    pub(super) fn seconds(&mut self, key: &'static str, default: Duration, allowed: RangeInclusive<i64>) -> Duration {
        Duration::from_secs(self.number(key, default.as_secs(), allowed))
    }

    pub(super) fn choice<T: Copy>(&mut self, key: &'static str, allowed: &[(&str, T)]) -> Option<T> {
        let found = self.take(key)?;
        let chosen = found.get_ref().as_str().and_then(|text| allowed.iter().find(|(name, _)| *name == text));
        if let Some((_, value)) = chosen {
            return Some(*value);
        }
        let names: Vec<_> = allowed.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let verb = if names.len() == 1 { "the only value is" } else { "allowed are" };
        self.wrong(key, found, &format!("{verb} {}", names.join(", ")))
    }

    /// A table whose keys are somebody else's business; empty if absent.
    pub(super) fn table(&mut self, key: &'static str) -> toml::Table {
        let Some(found) = self.take(key) else { return toml::Table::new() };
        if found.get_ref().is_table()
            && let Ok(table) = toml::Table::deserialize(ValueDeserializer::from(found.clone()))
        {
            return table;
        }
        self.wrong(key, found, "must be a table").unwrap_or_default()
    }

    /// A table of this one; empty if absent.
    pub(super) fn section(&mut self, key: &'static str) -> Section<'a> {
        let table = self.take(key).and_then(|found| match found.get_ref().as_table() {
            Some(table) => Some(table),
            None => self.wrong(key, found, "must be a table"),
        });
        Section { source: self.source, path: self.full(key), table, known: Vec::new() }
    }

    /// The tables of `[[key]]`; none if absent.
    pub(super) fn sections(&mut self, key: &'static str) -> Vec<Section<'a>> {
        let Some(found) = self.take(key) else { return Vec::new() };
        let path = self.full(key);
        let Some(array) = found.get_ref().as_array() else {
            return self
                .wrong(key, found, &format!("must be a list of tables, each begun by [[{path}]]"))
                .unwrap_or_default();
        };
        let mut sections = Vec::new();
        for item in array {
            match item.get_ref().as_table() {
                Some(table) => sections.push(Section {
                    source: self.source,
                    path: path.clone(),
                    table: Some(table),
                    known: Vec::new(),
                }),
                None => _ = self.wrong::<()>(key, item, "each must be a table"),
            }
        }
        sections
    }

    /// The file says something about `key`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    /// Says what is wrong with the value of `key`, whatever it is.
    pub(super) fn complain(&self, key: &'static str, what: &str) {
        if let Some(found) = self.table.and_then(|table| table.get(key)) {
            self.report(key, found.span(), what);
        }
    }

    /// Says what is wrong with a value that was found.
    pub(super) fn problem(&self, text: &Text<'_>, what: &str) {
        self.report(text.key, text.span.clone(), what);
    }

    /// Names the keys that nobody asked for.
    pub(super) fn finish(&mut self) {
        let Some(table) = self.table else { return };
        for (key, value) in table {
            if self.known.iter().any(|known| known == key.get_ref()) {
                continue;
            }
            let written = match value.get_ref() {
                DeValue::Table(_) | DeValue::Array(_) => String::new(),
                _ => format!(" = {}", self.excerpt(value.span())),
            };
            let mut message = format!("unknown key `{}`{written}", self.full(key.get_ref()));
            if let Some(close) = closest(key.get_ref(), &self.known) {
                let _ = write!(message, ": did you mean `{close}`?");
            }
            let _ = write!(message, " (known are {})", self.known.join(", "));
            self.source.report(key.span().start, &message);
        }
    }

    fn take(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'a>>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        self.table?.get(key)
    }

    fn wrong<T>(&self, key: &str, found: &Spanned<DeValue<'_>>, what: &str) -> Option<T> {
        self.report(key, found.span(), what);
        None
    }

    fn report(&self, key: &str, span: Range<usize>, what: &str) {
        let value = self.excerpt(span.clone());
        self.source.report(span.start, &format!("{} = {value}: {what}", self.full(key)));
    }

    fn full(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    /// The value as written, on one line and not too long.
    fn excerpt(&self, span: Range<usize>) -> String {
        let written = self.source.text.get(span).unwrap_or_default();
        let mut shown: String =
            written.chars().take(VALUE_CHARS_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
        if shown.len() < written.len() {
            shown.push('…');
        }
        shown
    }
}

pub(super) fn closest<'k>(key: &str, known: &[&'k str]) -> Option<&'k str> {
    let scored = known.iter().map(|known| (strsim::jaro_winkler(key, known), *known));
    scored.filter(|(score, _)| *score > 0.8).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, known)| known)
}
