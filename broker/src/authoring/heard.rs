//! What a component prints and logs while it is tried, and why its calls fail: in a broker, that stands in the log.

use std::fmt::{self, Write as _};
use std::sync::{Mutex, OnceLock, PoisonError};

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Context;
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use wasmqtt_protocol::text::escaped;

/// Lines that are shown; a component that prints in each call writes thousands.
const LINES_MAX: usize = 40;
/// Bytes of one of them.
const LINE_BYTES_MAX: usize = 1000;
/// Events of a component's own: what it logs, and its standard output and error.
const GUEST: &str = "plugin";

/// Collects them for one command.
#[derive(Debug, Default)]
pub(super) struct Heard(Mutex<Lines>);

#[derive(Debug, Default)]
struct Lines {
    shown: Vec<String>,
    left_out: usize,
    /// Why the last call that failed did.
    failure: Option<String>,
}

impl Heard {
    /// From now on everything is collected here; the same for the whole process.
    pub(super) fn start() -> &'static Self {
        static HEARD: OnceLock<Heard> = OnceLock::new();
        let mut is_first = false;
        let heard = HEARD.get_or_init(|| {
            is_first = true;
            Self::default()
        });
        if is_first {
            let targets = Targets::new().with_target(GUEST, Level::DEBUG).with_target("wasmqtt_host", Level::WARN);
            // Somebody else may collect events already, as tests do; then they are not shown here.
            let _ = tracing_subscriber::registry().with(Layer(heard).with_filter(targets)).try_init();
        }
        heard
    }

    fn lines(&self) -> std::sync::MutexGuard<'_, Lines> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the last call that failed did, once.
    pub(super) fn take_failure(&self) -> Option<String> {
        self.lines().failure.take()
    }

    /// Everything since the last time, for standard error.
    pub(super) fn take_text(&self) -> String {
        let Lines { shown, left_out, .. } = std::mem::take(&mut *self.lines());
        let mut text = String::new();
        for line in shown {
            let _ = writeln!(text, "  {line}");
        }
        if left_out > 0 {
            let _ = writeln!(text, "  and {left_out} more lines");
        }
        text
    }

    fn take(&self, level: Level, is_guest: bool, fields: Fields) {
        let mut lines = self.lines();
        let line = if is_guest {
            let level = level.as_str().to_ascii_lowercase();
            format!("component ({level}): {}", escaped(&fields.message, LINE_BYTES_MAX))
        } else {
            let error = fields.error.unwrap_or_default();
            let line = format!("{}: {}", fields.message, escaped(&error, LINE_BYTES_MAX));
            lines.failure = Some(error);
            line
        };
        if lines.shown.len() < LINES_MAX {
            lines.shown.push(line);
        } else {
            lines.left_out += 1;
        }
    }
}

struct Layer(&'static Heard);

impl<S: Subscriber + for<'a> LookupSpan<'a>> tracing_subscriber::Layer<S> for Layer {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut fields = Fields::default();
        event.record(&mut fields);
        self.0.take(*event.metadata().level(), event.metadata().target() == GUEST, fields);
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    error: Option<String>,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "error" => self.error = Some(format!("{value:?}")),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_many_lines_are_shown_and_none_drives_the_terminal() {
        let heard = Heard::default();
        for _ in 0..LINES_MAX + 3 {
            let fields = Fields { message: "panicked\x1B[31m".into(), error: None };
            heard.take(Level::WARN, true, fields);
        }
        let text = heard.take_text();
        assert_eq!(text.lines().count(), LINES_MAX + 1);
        assert!(text.starts_with("  component (warn): panicked") && text.ends_with("  and 3 more lines\n"), "{text}");
        assert!(!text.contains('\x1B'), "{text}");
        assert_eq!(heard.take_text(), "");
    }

    #[test]
    fn the_reason_of_a_failed_call_is_kept() {
        let heard = Heard::default();
        let fields = Fields { message: "plugin call failed".into(), error: Some("wasm trap: unreachable".into()) };
        heard.take(Level::WARN, false, fields);
        assert_eq!(heard.take_failure().as_deref(), Some("wasm trap: unreachable"));
        assert_eq!(heard.take_failure(), None);
        assert_eq!(heard.take_text(), "  plugin call failed: wasm trap: unreachable\n");
    }
}
