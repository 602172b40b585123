//! An event as one line. Every value goes through [`wasmqtt_protocol::text`], whoever wrote it: a Client Identifier with
//! line breaks or control characters in it can neither forge a line nor move the cursor of a terminal, and a value with
//! spaces stands in quotes, so that it cannot pass for several fields.

use std::fmt::{self, Debug, Write as _};

use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::field::RecordFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;
use wasmqtt_protocol::text::{CUT_MARK_BYTES_MAX, Escaper};

/// Bytes of one value, escapes included.
const FIELD_BYTES_MAX: usize = 1024;
/// The same of the message itself, which may be the line of a plugin: the host cuts those at 4 KiB and says so.
const MESSAGE_BYTES_MAX: usize = 4 * 1024 + CUT_MARK_BYTES_MAX;
/// Bytes of all values of an event.
const LINE_BYTES_MAX: usize = 8 * 1024;
/// The field that is the message itself.
const MESSAGE: &str = "message";

/// Fields as `name=value`.
pub(super) struct TextFields;
/// Fields as a JSON object.
pub(super) struct JsonFields;

/// One line per event. Spans are not shown: the broker has none.
pub(super) struct Lines;

/// The form of a line, which that of its fields decides.
pub(super) trait Form: for<'w> FormatFields<'w> + 'static {
    const JSON: bool;
}
impl Form for TextFields {
    const JSON: bool = false;
}
impl Form for JsonFields {
    const JSON: bool = true;
}

impl<S, F> FormatEvent<S, F> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: Form,
{
    fn format_event(&self, context: &FmtContext<'_, S, F>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let (level, target) = (event.metadata().level(), event.metadata().target());
        if F::JSON {
            out.write_str("{\"timestamp\":\"")?;
            SystemTime.format_time(&mut out)?;
            write!(out, "\",\"level\":\"{level}\",\"fields\":")?;
            context.format_fields(out.by_ref(), event)?;
            return writeln!(out, ",\"target\":{}}}", Value::from(target));
        }
        let (dim, colour, plain) =
            if out.has_ansi_escapes() { ("\u{1b}[2m", colour(*level), "\u{1b}[0m") } else { ("", "", "") };
        write!(out, "{dim}")?;
        SystemTime.format_time(&mut out)?;
        write!(out, "{plain} {colour}{level:>5}{plain} {dim}{target}:{plain} ")?;
        context.format_fields(out.by_ref(), event)?;
        writeln!(out)
    }
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\u{1b}[31m",
        Level::WARN => "\u{1b}[33m",
        Level::INFO => "\u{1b}[32m",
        Level::DEBUG => "\u{1b}[34m",
        Level::TRACE => "\u{1b}[35m",
    }
}

impl<'w> FormatFields<'w> for TextFields {
    fn format_fields<R: RecordFields>(&self, mut out: Writer<'w>, fields: R) -> fmt::Result {
        let mut values = Values::new(true);
        fields.record(&mut values);
        // The message first, whatever the order in the source.
        values.fields.sort_by_key(|(name, _)| *name != MESSAGE);
        let ansi = out.has_ansi_escapes();
        for (place, (name, value)) in values.fields.iter().enumerate() {
            let separator = if place == 0 { "" } else { " " };
            match *name {
                MESSAGE => write!(out, "{separator}{value}")?,
                name if ansi => write!(out, "{separator}\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}")?,
                name => write!(out, "{separator}{name}={value}")?,
            }
        }
        Ok(())
    }
}

impl<'w> FormatFields<'w> for JsonFields {
    fn format_fields<R: RecordFields>(&self, mut out: Writer<'w>, fields: R) -> fmt::Result {
        let mut values = Values::new(false);
        fields.record(&mut values);
        let object = values.fields.into_iter().map(|(name, value)| match value {
            Shown::Text(text) => (name.to_owned(), Value::String(text)),
            Shown::Value(value) => (name.to_owned(), value),
        });
        write!(out, "{}", Value::Object(object.collect()))
    }
}

/// A value, safe to show.
enum Shown {
    Text(String),
    /// Number or flag.
    Value(Value),
}

impl fmt::Display for Shown {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(text) => out.write_str(text),
            Self::Value(value) => write!(out, "{value}"),
        }
    }
}

fn is_one_word(text: &str) -> bool {
    !text.is_empty() && !text.contains([' ', '"', '='])
}

/// Begins with a quote, and the quote that ends it is the last character.
fn is_quoted(text: &str) -> bool {
    let Some(inner) = text.strip_prefix('"') else { return false };
    let mut after_backslash = false;
    for (at, c) in inner.char_indices() {
        match c {
            _ if after_backslash => after_backslash = false,
            '\\' => after_backslash = true,
            '"' => return at + 1 == inner.len(),
            _ => {}
        }
    }
    false
}

/// Collects the fields of an event.
struct Values {
    fields: Vec<(&'static str, Shown)>,
    /// A text that is not one word stands in quotes.
    quotes: bool,
    left: usize,
}

impl Values {
    fn new(quotes: bool) -> Self {
        Self { fields: Vec::new(), quotes, left: LINE_BYTES_MAX }
    }

    fn put_text(&mut self, field: &Field, value: fmt::Arguments<'_>) {
        let most = if field.name() == MESSAGE { MESSAGE_BYTES_MAX } else { FIELD_BYTES_MAX };
        let mut start = Start { text: String::new(), seen: 0, most };
        // A value that cannot be formatted is shown as far as it came.
        let _ = start.write_fmt(value);
        let bytes_max = most.min(self.left);
        let plain = !self.quotes || field.name() == MESSAGE || is_one_word(&start.text) || is_quoted(&start.text);
        let quote = if plain { "" } else { "\"" };
        let mut text = quote.to_owned();
        let mut escaper =
            if plain { Escaper::new(&mut text, bytes_max) } else { Escaper::quoted(&mut text, bytes_max) };
        let _ = escaper.write_str(&start.text);
        escaper.skip(start.seen - start.text.len());
        let _ = escaper.finish();
        text.push_str(quote);
        self.left = self.left.saturating_sub(text.len());
        self.fields.push((field.name(), Shown::Text(text)));
    }

    fn put_value(&mut self, field: &Field, value: Value) {
        self.fields.push((field.name(), Shown::Value(value)));
    }
}

impl Visit for Values {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.put_text(field, format_args!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put_text(field, format_args!("{value}"));
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put_value(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put_value(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put_value(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put_value(field, value.into());
    }
}

/// The beginning of a text, as much as can be shown of it.
struct Start {
    text: String,
    seen: usize,
    most: usize,
}

impl fmt::Write for Start {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.text.len() == self.seen {
            self.text.push_str(&text[..text.floor_char_boundary(self.most - self.text.len())]);
        }
        self.seen += text.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    use tracing::{debug, warn};
    use tracing_subscriber::fmt;
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("sink").extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is logged meanwhile, without colours.
    fn logged<F: Form + Send + Sync>(form: F, log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let for_log = sink.clone();
        let layer =
            fmt::layer().with_ansi(false).with_writer(move || for_log.clone()).fmt_fields(form).event_format(Lines);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        let bytes = sink.0.lock().expect("sink").clone();
        String::from_utf8(bytes).expect("text")
    }

    const FORGED: &str = "x\n2026-01-01T00:00:00Z ERROR wasmqtt: forged\u{1b}[2J\u{202e} plugin=evil";

    #[test]
    fn a_line_of_text_has_message_and_fields_as_always() {
        let line = logged(TextFields, || warn!(plugin = %"acl", count = 3, ok = true, name = "ann", "call failed"));
        assert!(line.ends_with(": call failed plugin=acl count=3 ok=true name=ann\n"), "{line}");
        assert!(line.contains("  WARN wasmqtt::log::format::tests: "), "{line}");
    }

    #[test]
    fn no_value_forges_a_line_or_a_field() {
        let line =
            logged(TextFields, || warn!(client_id = %FORGED, other = ?Some(FORGED), text = FORGED, "call failed"));
        assert_eq!(line.matches('\n').count(), 1, "{line}");
        assert!(!line.trim_end().chars().any(wasmqtt_protocol::text::is_unsafe), "{line}");
        let shown = r#"client_id="x\n2026-01-01T00:00:00Z ERROR wasmqtt: forged\u{1b}[2J\u{202e} plugin=evil" "#;
        assert!(line.contains(shown), "{line}");
        // A quote within a value does not end it.
        let line = logged(TextFields, || warn!(client_id = %"\"a\" plugin=\"evil\"", "call failed"));
        assert!(line.ends_with("client_id=\"\\\"a\\\" plugin=\\\"evil\\\"\"\n"), "{line}");
    }

    #[test]
    fn a_message_that_is_a_text_of_others_is_one_line() {
        let line = logged(TextFields, || debug!(plugin = "p", "{FORGED}"));
        assert!(line.contains(r": x\n2026-01-01T00:00:00Z ERROR wasmqtt: forged\u{1b}[2J"), "{line}");
        assert_eq!(line.matches('\n').count(), 1, "{line}");
    }

    #[test]
    fn values_and_lines_are_bounded() {
        let long = "y".repeat(1 << 20);
        let line = logged(TextFields, || {
            warn!(a = %long, b = %long, c = %long, d = %long, e = %long, f = %long, g = %long, h = %long, i = %long, "m");
        });
        assert!(line.contains("y…(1048576 bytes) b="), "{line}");
        assert!(line.len() < LINE_BYTES_MAX + 1024, "{}", line.len());
        let (part, mark) = ("z".repeat(4 * 1024), "…(100000 bytes)");
        let line = logged(TextFields, || warn!("{part}{mark}"));
        assert!(line.trim_end().ends_with(&format!("{part}{mark}")), "what the host has cut is not cut again: {line}");
        let line = logged(TextFields, || warn!("{long}"));
        assert!(line.len() < MESSAGE_BYTES_MAX + 100 && line.contains("y…(1048576 bytes)"), "{line}");
    }

    #[test]
    fn json_lines_are_objects_and_as_safe() {
        let line = logged(JsonFields, || warn!(client_id = %FORGED, count = 3, ok = true, "call \"failed\""));
        let object: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(object["level"], "WARN");
        assert_eq!(object["fields"]["message"], "call \"failed\"");
        assert_eq!((&object["fields"]["count"], &object["fields"]["ok"]), (&Value::from(3), &Value::from(true)));
        let shown = object["fields"]["client_id"].as_str().expect("a string");
        assert!(!shown.chars().any(wasmqtt_protocol::text::is_unsafe), "{shown}");
        assert_eq!(line.matches('\n').count(), 1);
    }
}
