//! The log on standard error: one line per event, whatever the texts in it are, written by a thread of its own.
mod format; // an event → one bounded line, as text or JSON
mod writer; // lines → standard error, without making anybody wait

use std::io::{self, IsTerminal};
use std::panic;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use anyhow::Context;
use tracing::error;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use self::format::{JsonFields, Lines, TextFields};
use self::writer::{LogQueue, QueuedLine};
use crate::settings::Log;

/// How long the end of the process waits for a standard error that nobody reads.
const FLUSH_PATIENCE: Duration = Duration::from_secs(1);

/// What carries out HTTP for guests; logged only if `log.level` names it.
const GUEST_HTTP: &str = "wasmtime_wasi_http";

/// The log of the process, once it is started.
static QUEUE: OnceLock<Arc<LogQueue>> = OnceLock::new();

/// The running log; the end of it waits until what was logged is written, but not for ever.
pub(crate) struct LogGuard {
    queue: Arc<LogQueue>,
    level: LogLevel,
}

/// Changes what is logged.
#[derive(Clone)]
pub(crate) struct LogLevel(reload::Handle<Targets, Registry>);

impl LogLevel {
    /// As in `log.level` of the configuration.
    pub(crate) fn set(&self, level: &str) -> anyhow::Result<()> {
        self.0.reload(targets(level)?).context("change the log level")
    }
}

fn targets(level: &str) -> anyhow::Result<Targets> {
    let targets: Targets = level.parse().with_context(|| format!("log.level = {level:?}"))?;
    let is_named = targets.iter().any(|(target, _)| target == GUEST_HTTP);
    // It warns of every wrong request, as often as a guest makes one; what matters is logged by the host, with a bound.
    Ok(if is_named { targets } else { targets.with_target(GUEST_HTTP, LevelFilter::OFF) })
}

impl LogGuard {
    /// Changes what is logged.
    pub(crate) fn level(&self) -> LogLevel {
        self.level.clone()
    }

    /// The thread that writes has ended, and this is its name.
    pub(crate) fn ended(&self) -> Option<String> {
        self.queue.is_dead().then(|| "log".to_owned())
    }

    /// Waits until everything that was logged so far is written, or nobody has read it for a second.
    pub(crate) fn flush(&self) {
        self.queue.flush(FLUSH_PATIENCE);
    }
}

impl Drop for LogGuard {
    fn drop(&mut self) {
        self.flush();
    }
}

/// Waits until what was logged is written, where the process ends at once.
pub(crate) fn flush() {
    if let Some(queue) = QUEUE.get() {
        queue.flush(FLUSH_PATIENCE);
    }
}

/// Starts the log of the process. A panic is logged from now on, on one line as everything else.
pub(crate) fn start(log: &Log) -> anyhow::Result<LogGuard> {
    let (filter, level) = reload::Layer::new(targets(&log.level)?);
    let queue = LogQueue::start(io::stderr()).context("start the log")?;
    let for_lines = Arc::clone(&queue);
    let layer = fmt::layer()
        .with_writer(move || QueuedLine::new(&for_lines))
        .with_ansi(io::stderr().is_terminal())
        // It would be written to standard error past the queue.
        .log_internal_errors(false);
    let layer = if log.json {
        layer.fmt_fields(JsonFields).event_format(Lines).boxed()
    } else {
        layer.fmt_fields(TextFields).event_format(Lines).boxed()
    };
    tracing_subscriber::registry().with(layer.with_filter(filter)).try_init().context("start the log")?;
    log_panics(Arc::clone(&queue));
    let _ = QUEUE.set(Arc::clone(&queue));
    Ok(LogGuard { queue, level: LogLevel(level) })
}

/// Has panics in the log, where operators look. The standard library would write them to standard error itself, where a
/// full pipe holds up whoever writes.
fn log_panics(queue: Arc<LogQueue>) {
    panic::set_hook(Box::new(move |panic| {
        let thread = std::thread::current();
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload_as_str().unwrap_or("without a text");
        error!(thread = thread.name().unwrap_or("unnamed"), location, "panic: {text}");
        // What ends the process now may not wait for the log.
        queue.flush(FLUSH_PATIENCE);
    }));
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn requests_of_guests_are_not_logged_unless_wanted() {
        let is_logged = |level: &str, target| targets(level).expect("is right").would_enable(target, &Level::WARN);
        assert!(is_logged("info", "plugin") && is_logged("info", "wasmtime"));
        assert!(!is_logged("info", "wasmtime_wasi_http::p2::error"));
        assert!(!is_logged("trace,plugin=warn", "wasmtime_wasi_http::p2::error"));
        assert!(is_logged("info,wasmtime_wasi_http=warn", "wasmtime_wasi_http::p2::error"));
    }
}
