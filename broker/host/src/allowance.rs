//! What instances of a plugin may ask of the broker in a second: lines in its log, requests, calls of anything.
//!
//! It belongs to the plugin, for each shard and for calls that no client waits for: an instance that traps is followed by
//! a fresh one, and its allowance must not be.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use wasmqtt_protocol::text::escaped;

use crate::bindings::imports::wasmqtt::plugin::host::Level;
use crate::share::Pace;

/// Log lines per second, printed ones included. More are left out, and counted.
const LOG_LINES_MAX: u32 = 100;
/// Bytes of one log line; the rest is cut.
pub(crate) const LOG_LINE_BYTES_MAX: usize = 4096;
/// Calls of anything the broker offers, WASI included, that instances may make in a second before they have to wait, and
/// how many they may be ahead.
const HOST_CALLS_PER_SEC: u64 = 100_000;
const HOST_CALLS_AHEAD: Duration = Duration::from_millis(100);

/// Shared by all instances of one plugin in one place, whatever builds they are of.
pub(crate) struct Allowance {
    plugin: Arc<str>,
    lines: Mutex<Window>,
    requests: Mutex<Window>,
    pace: Mutex<Pace>,
}

impl Allowance {
    pub(crate) fn new(plugin: &Arc<str>) -> Arc<Self> {
        let plugin = Arc::clone(plugin);
        Arc::new(Self { plugin, lines: Mutex::default(), requests: Mutex::default(), pace: Mutex::default() })
    }

    /// A guest's line for the broker's log.
    pub(crate) fn log(&self, level: Level, message: &str) {
        let mut lines = locked(&self.lines);
        if let Some(left_out) = lines.turn().checked_sub(LOG_LINES_MAX + 1) {
            tracing::warn!(target: "plugin", plugin = %self.plugin, left_out = left_out + 1, "too many log lines");
        }
        lines.count = lines.count.saturating_add(1);
        if lines.count > LOG_LINES_MAX {
            return;
        }
        let (plugin, message) = (&self.plugin, escaped(message.trim_end(), LOG_LINE_BYTES_MAX));
        match level {
            Level::Trace => tracing::trace!(target: "plugin", %plugin, "{message}"),
            Level::Debug => tracing::debug!(target: "plugin", %plugin, "{message}"),
            Level::Info => tracing::info!(target: "plugin", %plugin, "{message}"),
            Level::Warn => tracing::warn!(target: "plugin", %plugin, "{message}"),
            Level::Error => tracing::error!(target: "plugin", %plugin, "{message}"),
        }
    }

    /// Whether another request to the broker may be made.
    pub(crate) fn take_request(&self, per_sec: u32) -> bool {
        let mut requests = locked(&self.requests);
        if requests.count >= per_sec {
            requests.turn();
        }
        let may = requests.count < per_sec;
        requests.count += u32::from(may);
        may
    }

    /// How long an instance must wait that has called the broker so often.
    pub(crate) fn pause(&self, calls: u32) -> Option<Duration> {
        locked(&self.pace).take(Pace::price(calls as usize, HOST_CALLS_PER_SEC), HOST_CALLS_AHEAD)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was done in the second that began then.
struct Window {
    since: Instant,
    count: u32,
}

impl Default for Window {
    fn default() -> Self {
        Self { since: Instant::now(), count: 0 }
    }
}

impl Window {
    /// Begins another one if this one is over. Returns the count of the one that ended.
    fn turn(&mut self) -> u32 {
        if self.since.elapsed() < Duration::from_secs(1) {
            return 0;
        }
        self.since = Instant::now();
        std::mem::take(&mut self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_bounded_per_second() {
        let allowance = Allowance::new(&"p".into());
        assert!(allowance.take_request(2) && allowance.take_request(2) && !allowance.take_request(2));
        let before = Instant::now().checked_sub(Duration::from_secs(1)).expect("the machine runs for a second");
        locked(&allowance.requests).since = before;
        assert!(allowance.take_request(2));
    }
}
