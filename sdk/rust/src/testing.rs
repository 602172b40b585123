//! For tests that run a plugin natively, as any other Rust type: what it asks of the broker is recorded here, and
//! requests have defaults.
//!
//! ```
//! use wasmqtt_sdk::{host, testing};
//!
//! host::warn("odd");
//! assert_eq!(testing::take().lines.len(), 1);
//! ```

use std::cell::RefCell;

use crate::host::{Level, Outgoing, Refusal};
use crate::{Batch, Client, Request};

/// What the plugin asked of the broker on this thread.
#[derive(Debug, Default, Clone)]
pub struct Host {
    /// Log lines.
    pub lines: Vec<(Level, String)>,
    /// Messages.
    pub published: Vec<Outgoing>,
    /// Everything else.
    pub asked: Vec<Asked>,
    /// Values for metrics.
    pub samples: Vec<Sample>,
    refusal: Option<Refusal>,
}

/// A request to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as the arguments of the functions in `host`")]
pub enum Asked {
    Disconnect { client_id: String, reason: u8 },
    Ban { who: String, seconds: u32, note: String },
    Revoke { client_id: String },
}

/// A value for a metric.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// `count`, `gauge` or `observe`.
    pub kind: &'static str,
    /// Name of the metric.
    pub name: String,
    /// Its labels.
    pub labels: Vec<(String, String)>,
    /// The value.
    pub value: f64,
}

impl Sample {
    pub(crate) fn new(kind: &'static str, name: &str, labels: &[(&str, &str)], value: f64) -> Self {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { kind, name: name.to_owned(), labels, value }
    }
}

impl Host {
    pub(crate) fn answer(&self) -> Result<(), Refusal> {
        self.refusal.clone().map_or(Ok(()), Err)
    }
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::default();
}

pub(crate) fn record<T>(with: impl FnOnce(&mut Host) -> T) -> T {
    HOST.with_borrow_mut(with)
}

/// What was asked since the last time.
pub fn take() -> Host {
    HOST.with_borrow_mut(|host| {
        let refusal = host.refusal.clone();
        std::mem::replace(host, Host { refusal, ..Host::default() })
    })
}

/// From now on the broker refuses what it is asked; `None`: no more.
pub fn refuse(refusal: Option<Refusal>) {
    HOST.with_borrow_mut(|host| host.refusal = refusal);
}

#[cfg(feature = "http")]
thread_local! {
    static REQUESTS: RefCell<Vec<crate::HttpRequest>> = RefCell::default();
    static ANSWERS: RefCell<std::collections::VecDeque<Result<crate::HttpResponse, String>>> = RefCell::default();
}

/// The next HTTP request gets this answer.
#[cfg(feature = "http")]
pub fn respond(answer: Result<crate::HttpResponse, String>) {
    ANSWERS.with_borrow_mut(|answers| answers.push_back(answer));
}

/// HTTP requests since the last time.
#[cfg(feature = "http")]
pub fn take_requests() -> Vec<crate::HttpRequest> {
    REQUESTS.take()
}

#[cfg(feature = "http")]
pub(crate) fn answer_http(request: &crate::HttpRequest) -> Result<crate::HttpResponse, String> {
    REQUESTS.with_borrow_mut(|requests| requests.push(request.clone()));
    ANSWERS.with_borrow_mut(|answers| answers.pop_front().unwrap_or_else(|| Err("nobody answers".into())))
}

/// A CONNECT of MQTT 5.0 from 127.0.0.1 without a user name.
pub fn request(client_id: &str) -> Request {
    Request {
        client_id: client_id.to_owned(),
        username: None,
        password: None,
        method: None,
        data: None,
        address: "127.0.0.1".into(),
        listener: "mqtt://127.0.0.1:1883".into(),
        protocol_level: 5,
        certificate_subject: None,
        user_properties: Vec::new(),
    }
}

/// The same, with user name and password.
pub fn login(client_id: &str, username: &str, password: &str) -> Request {
    Request { username: Some(username.into()), password: Some(password.into()), ..request(client_id) }
}

/// A connected client; its principal is its user name.
pub fn client(client_id: &str, principal: &str) -> Client {
    Client { client_id: client_id.into(), principal: principal.into(), listener: "mqtt://127.0.0.1:1883".into() }
}

/// Messages as a storage hook sees them: topic, Client Identifier, payload; QoS 1, without properties.
pub fn batch(messages: &[(&str, &str, &[u8])]) -> Batch {
    let mut batch = Batch::default();
    for (topic, client_id, payload) in messages {
        batch.push(topic, client_id, payload, &[], 1, false);
    }
    batch
}
