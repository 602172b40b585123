//! What a guest finds around it: its bounds, its way to the log, and the functions it can import.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

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
use crate::allowance::{Allowance, LOG_LINE_BYTES_MAX};
use crate::bindings::TEXT_BYTES_MAX;
use crate::bindings::imports;
use crate::bindings::imports::wasmqtt::plugin::host::{self as wit, Level};
use crate::bindings::types::Pair;
use crate::engine::{CORE_INSTANCES_MAX, MEMORIES_MAX, TABLES_MAX};
use crate::files;
use crate::held::Held;
use crate::http::{self, FIELDS_BYTES_MAX, Http};
use crate::keyvalue;
use crate::lookup;
use crate::metrics::Kind;
use crate::network::allow_addresses;
use crate::plugin::Plugin;
use crate::services::Services;
use crate::sockets;

/// Table elements an instance may have, over all its tables.
const TABLE_ELEMENTS_MAX: usize = 100_000;
/// WASI resources (open files, streams, timers, HTTP requests) an instance may hold. The largest is a request, of about
/// 128 KiB, see [`crate::http`].
const RESOURCES_MAX: usize = 256;
/// Folders an instance may be listing: each listing holds all names of its folder.
const LISTINGS_MAX: usize = 16;
/// Random bytes a guest may ask for at once.
const RANDOM_BYTES_MAX: u64 = 64 * 1024;
/// Requests to the broker in one call.
const REQUESTS_MAX: u32 = 10_000;
/// Log lines that are kept of a call for somebody who wants to know.
const HEARD_MAX: usize = 10;
/// Bytes a guest may print in one piece.
const PRINT_BYTES_MAX: usize = 64 * 1024;

/// What the store knows about its guest.
pub(crate) struct Guest {
    wasi: WasiCtx,
    pub(crate) table: ResourceTable,
    pub(crate) limits: Limits,
    allowance: Arc<Allowance>,
    pub(crate) denials: Denials,
    pub(crate) services: Arc<Services>,
    http: WasiHttpCtx,
    hooks: Http,
    /// Requests to the broker in this call.
    requested: u32,
    /// Calls since the last look.
    called: u32,
    held: Held,
    /// Folders it is listing.
    listings: usize,
    /// What it logs is wanted, as far as [`HEARD_MAX`] lines go; each is as long as a text of a guest may be.
    pub(crate) heard: Option<Vec<String>>,
}

impl Guest {
    /// `wasi` brings the grants; output goes to the log.
    pub(crate) fn new(
        services: &Arc<Services>,
        allowance: &Arc<Allowance>,
        mut wasi: wasmtime_wasi::WasiCtxBuilder,
        memory_bytes_max: usize,
    ) -> Self {
        let allowance = Arc::clone(allowance);
        wasi.stdout(Printed { log: Arc::clone(&allowance), level: Level::Debug })
            .stderr(Printed { log: Arc::clone(&allowance), level: Level::Warn });
        wasi.max_random_size(RANDOM_BYTES_MAX);
        let mut table = ResourceTable::new();
        table.set_max_capacity(RESOURCES_MAX);
        let limits = Limits { memory_bytes_max, ..Limits::default() };
        let denials = Denials { plugin: Arc::clone(&services.plugin), log: Arc::clone(&allowance) };
        allow_addresses(&mut wasi, services, &denials);
        let hooks = Http::new(services, &denials);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(FIELDS_BYTES_MAX);
        let (services, held) = (Arc::clone(services), Held::new(&services.plugin));
        let wasi = wasi.build();
        let (requested, called) = (0, 0);
        let (listings, heard) = (0, None);
        Self {
            wasi,
            table,
            limits,
            allowance,
            denials,
            services,
            http,
            hooks,
            requested,
            called,
            held,
            listings,
            heard,
        }
    }

    /// How long a guest must wait that called the broker more often than it may. Asked while it computes.
    pub(crate) fn pause(&mut self) -> Option<Duration> {
        let called = std::mem::take(&mut self.called);
        if called == 0 { None } else { self.allowance.pause(called) }
    }

    fn take_request(&mut self) -> Result<(), wit::Refusal> {
        if self.requested >= REQUESTS_MAX || !self.allowance.take_request(self.services.calls_per_sec) {
            return Err(wit::Refusal::Busy);
        }
        self.requested += 1;
        Ok(())
    }

    pub(crate) fn count_call(&mut self) {
        self.called = self.called.saturating_add(1);
    }

    pub(crate) fn may_make_socket(&mut self) -> Result<(), ErrorCode> {
        if self.services.grants.sockets.is_empty() {
            self.denials.note("a socket; grants.sockets names no address");
            return Err(ErrorCode::AccessDenied);
        }
        let max = self.services.sockets_max;
        if !self.held.take_socket(max) {
            self.allowance.log(Level::Warn, &format!("no more than limits.sockets = {max} sockets at a time"));
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
            self.allowance.log(Level::Warn, &format!("no more than limits.files = {max} open files at a time"));
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
            self.allowance.log(Level::Warn, &format!("no more than {LISTINGS_MAX} folders are listed at a time"));
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
        self.requested = 0;
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

    // As in the pool, where there is none.
    fn instances(&self) -> usize {
        CORE_INSTANCES_MAX as usize
    }

    fn tables(&self) -> usize {
        TABLES_MAX as usize
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX as usize
    }
}

/// Counts what a guest tried without a grant, and says so in the log.
#[derive(Clone)]
pub(crate) struct Denials {
    plugin: Arc<Plugin>,
    log: Arc<Allowance>,
}

impl Denials {
    pub(crate) fn note(&self, what: impl std::fmt::Display) {
        self.plugin.counters.denied.fetch_add(1, Ordering::Relaxed);
        self.log.log(Level::Warn, &format!("denied: {what}"));
    }
}

impl imports::wasmqtt::plugin::host::Host for Guest {
    fn log(&mut self, level: Level, message: String) {
        self.count_call();
        if let Some(heard) = self.heard.as_mut().filter(|heard| heard.len() < HEARD_MAX) {
            heard.push(escaped(message.trim_end(), TEXT_BYTES_MAX).to_string());
        }
        self.allowance.log(level, &message);
    }

    fn publish(&mut self, message: wit::Outgoing) -> Result<(), wit::Refusal> {
        self.take_request()?;
        self.services.publish(message, &self.denials)
    }

    fn disconnect(&mut self, client_id: String, reason: u8) -> Result<(), wit::Refusal> {
        self.take_request()?;
        self.services.disconnect(&client_id, reason)
    }

    fn ban(&mut self, who: String, seconds: u32, note: String) -> Result<(), wit::Refusal> {
        self.take_request()?;
        self.services.ban(&who, seconds, &note)
    }

    fn revoke(&mut self, client_id: String) -> Result<(), wit::Refusal> {
        self.take_request()?;
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

/// stdout and stderr of a guest: a log line for each line.
#[derive(Clone)]
struct Printed {
    log: Arc<Allowance>,
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
        self.to.log.log(self.to.level, &String::from_utf8_lossy(&self.line));
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
    lookup::add_to_linker(&mut linker)?;
    sockets::add_to_linker(&mut linker)?;
    Ok(linker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memories_of_one_store_share_the_limit() {
        let mut limits = Limits { memory_bytes_max: 100, ..Limits::default() };
        assert!(limits.memory_growing(0, 60, None).expect("decides"));
        assert!(!limits.memory_growing(0, 41, None).expect("decides"));
        assert!(limits.memory_refused);
        assert!(limits.memory_growing(60, 100, None).expect("decides"));
    }
}
