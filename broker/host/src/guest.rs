//! What a guest finds around it: its bounds, its way to the log, and the functions it can import.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use wasmqtt_protocol::text::escaped;
use wasmtime::component::{HasSelf, Linker, Resource, ResourceTable};
use wasmtime::{Engine, ResourceLimiter};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::bindings::filesystem::types::Descriptor;
use wasmtime_wasi::p2::bindings::sockets::network::ErrorCode;
use wasmtime_wasi::p2::{OutputStream, Pollable, ReaddirIterator, StreamResult};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_config::WasiConfig;
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use crate::HostError;
use crate::bindings::imports;
use crate::bindings::imports::wasmqtt::plugin::host::{self as wit, Level};
use crate::bindings::types::Pair;
use crate::files;
use crate::held::Held;
use crate::http::{self, FIELDS_BYTES_MAX, Http};
use crate::keyvalue;
use crate::metrics::Kind;
use crate::network::allow_addresses;
use crate::plugin::Plugin;
use crate::services::Services;
use crate::share::Pace;
use crate::sockets;

/// Table elements an instance may have, over all its tables.
const TABLE_ELEMENTS_MAX: usize = 100_000;
/// Core instances, tables and memories of one component; Python needs over a hundred.
const PARTS_MAX: usize = 256;
/// WASI resources (open files, streams, timers, HTTP requests) an instance may hold. The largest is a request, of about
/// 128 KiB, see [`crate::http`].
const RESOURCES_MAX: usize = 256;
/// Folders an instance may be listing: each listing holds all names of its folder.
const LISTINGS_MAX: usize = 16;
/// Random bytes a guest may ask for at once.
const RANDOM_BYTES_MAX: u64 = 64 * 1024;
/// Log lines per second and instance, printed ones included. More are left out, and counted.
const LOG_LINES_MAX: u32 = 100;
/// Bytes of one log line; the rest is cut.
const LOG_LINE_BYTES_MAX: usize = 4096;
/// Requests to the broker in one call.
const CALLS_MAX: u32 = 10_000;
/// Calls of anything the broker offers, WASI included, that an instance may make in a second before it has to wait, and
/// how many it may be ahead.
const HOST_CALLS_PER_SEC: u64 = 100_000;
const HOST_CALLS_AHEAD: Duration = Duration::from_millis(100);
/// Bytes a guest may print in one piece.
const PRINT_BYTES_MAX: usize = 64 * 1024;

/// What the store knows about its guest.
pub(crate) struct Guest {
    wasi: WasiCtx,
    pub(crate) table: ResourceTable,
    pub(crate) limits: Limits,
    log: Log,
    pub(crate) denials: Denials,
    pub(crate) services: Arc<Services>,
    http: WasiHttpCtx,
    hooks: Http,
    calls: Allowance,
    /// Calls since the last look.
    called: u32,
    pace: Pace,
    held: Held,
    /// Folders it is listing.
    listings: usize,
}

impl Guest {
    /// `wasi` brings the grants; output goes to the log.
    pub(crate) fn new(
        services: &Arc<Services>,
        mut wasi: wasmtime_wasi::WasiCtxBuilder,
        memory_bytes_max: usize,
    ) -> Self {
        let log = Log::new(&services.plugin.name);
        wasi.stdout(Printed { log: log.clone(), level: Level::Debug })
            .stderr(Printed { log: log.clone(), level: Level::Warn });
        wasi.max_random_size(RANDOM_BYTES_MAX);
        let mut table = ResourceTable::new();
        table.set_max_capacity(RESOURCES_MAX);
        let limits = Limits { memory_bytes_max, ..Limits::default() };
        let calls = Allowance::new(services.calls_per_sec);
        let denials = Denials { plugin: Arc::clone(&services.plugin), log: log.clone() };
        allow_addresses(&mut wasi, services, &denials);
        let hooks = Http::new(&services.http, &denials);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(FIELDS_BYTES_MAX);
        let (services, held) = (Arc::clone(services), Held::new(&services.plugin));
        let wasi = wasi.build();
        let (called, pace) = (0, Pace::default());
        Self { wasi, table, limits, log, denials, services, http, hooks, calls, called, pace, held, listings: 0 }
    }

    /// How long a guest must wait that called the broker more often than it may. Asked while it computes.
    pub(crate) fn pause(&mut self) -> Option<Duration> {
        let called = std::mem::take(&mut self.called) as usize;
        if called == 0 {
            return None;
        }
        self.pace.take(Pace::price(called, HOST_CALLS_PER_SEC), HOST_CALLS_AHEAD)
    }

    fn count_call(&mut self) {
        self.called = self.called.saturating_add(1);
    }

    pub(crate) fn may_make_socket(&mut self) -> Result<(), ErrorCode> {
        if self.services.grants.sockets.is_empty() {
            self.denials.note("a socket; grants.sockets names no address");
            return Err(ErrorCode::AccessDenied);
        }
        let max = self.services.sockets_max;
        if !self.held.take_socket(max) {
            self.log.write(Level::Warn, &format!("no more than limits.sockets = {max} sockets at a time"));
            return Err(ErrorCode::NewSocketLimit);
        }
        Ok(())
    }

    pub(crate) fn socket_not_made(&mut self) {
        self.held.give_back_socket();
    }

    pub(crate) fn close_socket<T: 'static>(&mut self, socket: Resource<T>) -> wasmtime::Result<()> {
        // Its streams are gone: they are its children in the table.
        self.table.delete(socket)?;
        self.held.give_back_socket();
        Ok(())
    }

    pub(crate) fn may_open_file(&mut self) -> bool {
        let max = self.services.files_max;
        let may = self.held.take_file(&mut self.table, max);
        if !may {
            self.log.write(Level::Warn, &format!("no more than limits.files = {max} open files at a time"));
        }
        may
    }

    pub(crate) fn file_opened(&mut self, file: Option<&Resource<Descriptor>>) {
        self.held.file_opened(file);
    }

    pub(crate) fn close_file(&mut self, file: Resource<Descriptor>) -> wasmtime::Result<()> {
        self.held.close_file(&mut self.table, file)
    }

    pub(crate) fn may_list(&mut self) -> bool {
        let may = self.listings < LISTINGS_MAX;
        self.listings += usize::from(may);
        if !may {
            self.log.write(Level::Warn, &format!("no more than {LISTINGS_MAX} folders are listed at a time"));
        }
        may
    }

    pub(crate) fn listing_closed(&mut self) {
        self.listings = self.listings.saturating_sub(1);
    }

    pub(crate) fn close_listing(&mut self, listing: Resource<ReaddirIterator>) -> wasmtime::Result<()> {
        self.table.delete(listing)?;
        self.listing_closed();
        Ok(())
    }

    /// A call into the guest begins.
    pub(crate) fn begin_call(&mut self) {
        self.calls.in_call = 0;
    }
}

impl WasiView for Guest {
    /// Every function of WASI begins here.
    fn ctx(&mut self) -> WasiCtxView<'_> {
        self.count_call();
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for Guest {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        self.count_call();
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

/// Sums over all memories and tables of the store: a limit per memory would be none.
#[derive(Default)]
pub(crate) struct Limits {
    memory_bytes: usize,
    memory_bytes_max: usize,
    /// More memory was asked for than there may be; explains the trap that usually follows.
    pub(crate) memory_refused: bool,
    table_elements: usize,
    /// The same about tables.
    pub(crate) tables_refused: bool,
}

impl Limits {
    pub(crate) fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }
}

impl ResourceLimiter for Limits {
    fn memory_growing(&mut self, current: usize, desired: usize, _max: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.memory_bytes.saturating_sub(current).saturating_add(desired);
        if total > self.memory_bytes_max {
            self.memory_refused = true;
            return Ok(false);
        }
        self.memory_bytes = total;
        Ok(true)
    }

    /// `max`: of its own, and of what the pool has for one.
    fn table_growing(&mut self, current: usize, desired: usize, max: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_elements.saturating_sub(current).saturating_add(desired);
        if total > TABLE_ELEMENTS_MAX || max.is_some_and(|max| desired > max) {
            self.tables_refused = true;
            return Ok(false);
        }
        self.table_elements = total;
        Ok(true)
    }

    fn instances(&self) -> usize {
        PARTS_MAX
    }

    fn tables(&self) -> usize {
        PARTS_MAX
    }

    fn memories(&self) -> usize {
        PARTS_MAX
    }
}

/// A guest's lines on their way to the broker's log. All ways of one instance share one allowance.
#[derive(Clone)]
struct Log(Arc<Mutex<Lines>>);

struct Lines {
    plugin: Arc<str>,
    since: Instant,
    count: u32,
}

impl Log {
    fn new(plugin: &Arc<str>) -> Self {
        Self(Arc::new(Mutex::new(Lines { plugin: Arc::clone(plugin), since: Instant::now(), count: 0 })))
    }

    fn write(&self, level: Level, message: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(level, message);
    }
}

/// Counts what a guest tried without a grant, and says so in the log.
#[derive(Clone)]
pub(crate) struct Denials {
    plugin: Arc<Plugin>,
    log: Log,
}

impl Denials {
    pub(crate) fn note(&self, what: impl std::fmt::Display) {
        self.plugin.counters.denied.fetch_add(1, Ordering::Relaxed);
        self.log.write(Level::Warn, &format!("denied: {what}"));
    }
}

impl Lines {
    fn write(&mut self, level: Level, message: &str) {
        if self.since.elapsed() >= Duration::from_secs(1) {
            if let Some(left_out) = self.count.checked_sub(LOG_LINES_MAX + 1) {
                tracing::warn!(target: "plugin", plugin = %self.plugin, left_out = left_out + 1, "too many log lines");
            }
            (self.since, self.count) = (Instant::now(), 0);
        }
        self.count = self.count.saturating_add(1);
        if self.count > LOG_LINES_MAX {
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
}

impl imports::wasmqtt::plugin::host::Host for Guest {
    fn log(&mut self, level: Level, message: String) {
        self.count_call();
        self.log.write(level, &message);
    }

    fn publish(&mut self, message: wit::Outgoing) -> Result<(), wit::Refusal> {
        self.calls.take()?;
        self.services.publish(message, &self.denials)
    }

    fn disconnect(&mut self, client_id: String, reason: u8) -> Result<(), wit::Refusal> {
        self.calls.take()?;
        self.services.disconnect(&client_id, reason)
    }

    fn ban(&mut self, who: String, seconds: u32, note: String) -> Result<(), wit::Refusal> {
        self.calls.take()?;
        self.services.ban(&who, seconds, &note)
    }

    fn revoke(&mut self, client_id: String) -> Result<(), wit::Refusal> {
        self.calls.take()?;
        self.services.revoke(&client_id)
    }
}

impl imports::wasmqtt::plugin::metrics::Host for Guest {
    fn count(&mut self, name: String, labels: Vec<Pair>, by: f64) {
        self.count_call();
        self.services.record(Kind::Count, &name, &labels, by);
    }

    fn gauge(&mut self, name: String, labels: Vec<Pair>, value: f64) {
        self.count_call();
        self.services.record(Kind::Gauge, &name, &labels, value);
    }

    fn observe(&mut self, name: String, labels: Vec<Pair>, value: f64) {
        self.count_call();
        self.services.record(Kind::Observe, &name, &labels, value);
    }
}

/// Requests to the broker that one instance may make.
struct Allowance {
    /// In the call under way.
    in_call: u32,
    /// In this second.
    in_second: u32,
    since: Instant,
    per_sec: u32,
}

impl Allowance {
    fn new(per_sec: u32) -> Self {
        Self { in_call: 0, in_second: 0, since: Instant::now(), per_sec }
    }

    fn take(&mut self) -> Result<(), wit::Refusal> {
        if self.in_second >= self.per_sec && self.since.elapsed() >= Duration::from_secs(1) {
            (self.since, self.in_second) = (Instant::now(), 0);
        }
        if self.in_call >= CALLS_MAX || self.in_second >= self.per_sec {
            return Err(wit::Refusal::Busy);
        }
        self.in_call += 1;
        self.in_second += 1;
        Ok(())
    }
}

/// stdout and stderr of a guest: a log line for each line.
#[derive(Clone)]
struct Printed {
    log: Log,
    level: Level,
}

impl IsTerminal for Printed {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Printed {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(Printer { to: self.clone(), line: Vec::new() })
    }

    // Only WASI 0.3 asks for this one, and it is not linked.
    fn async_stream(&self) -> Box<dyn tokio::io::AsyncWrite + Send + Sync> {
        Box::new(tokio::io::sink())
    }
}

/// Collects a line.
struct Printer {
    to: Printed,
    line: Vec<u8>,
}

impl Printer {
    fn end_line(&mut self) {
        self.to.log.write(self.to.level, &String::from_utf8_lossy(&self.line));
        self.line.clear();
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Printer {
    async fn ready(&mut self) {}
}

impl OutputStream for Printer {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = LOG_LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                self.end_line();
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(PRINT_BYTES_MAX)
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.end_line();
        }
    }
}

/// Everything a guest can import, linked once.
pub(crate) fn linker(engine: &Engine) -> Result<Linker<Guest>, HostError> {
    let mut linker = Linker::new(engine);
    wasmtime_wasi::p2::add_to_linker_async(&mut linker).map_err(|error| HostError::new(format!("{error:#}")))?;
    imports::wasmqtt::plugin::host::add_to_linker::<Guest, HasSelf<Guest>>(&mut linker, |guest| guest)
        .and_then(|()| {
            imports::wasmqtt::plugin::metrics::add_to_linker::<Guest, HasSelf<Guest>>(&mut linker, |guest| guest)
        })
        .and_then(|()| wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker))
        .and_then(|()| {
            wasmtime_wasi_config::add_to_linker(&mut linker, |guest: &mut Guest| {
                WasiConfig::from(&guest.services.settings)
            })
        })
        .and_then(|()| keyvalue::bindings::Imports::add_to_linker::<Guest, HasSelf<Guest>>(&mut linker, |guest| guest))
        .map_err(|error| HostError::new(format!("{error:#}")))?;
    files::add_to_linker(&mut linker)?;
    http::add_to_linker(&mut linker)?;
    sockets::add_to_linker(&mut linker)?;
    Ok(linker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_bounded_per_call_and_per_second() {
        let mut allowance = Allowance::new(u32::MAX);
        assert!((0..CALLS_MAX).all(|_| allowance.take().is_ok()));
        assert!(allowance.take().is_err());
        let mut slow = Allowance::new(2);
        assert!(slow.take().is_ok() && slow.take().is_ok() && slow.take().is_err());
        slow.since = Instant::now().checked_sub(Duration::from_secs(1)).expect("the machine runs for a second");
        assert!(slow.take().is_ok());
    }

    #[test]
    fn memories_of_one_store_share_the_limit() {
        let mut limits = Limits { memory_bytes_max: 100, ..Limits::default() };
        assert!(limits.memory_growing(0, 60, None).expect("decides"));
        assert!(!limits.memory_growing(0, 41, None).expect("decides"));
        assert!(limits.memory_refused);
        assert!(limits.memory_growing(60, 100, None).expect("decides"));
    }
}
