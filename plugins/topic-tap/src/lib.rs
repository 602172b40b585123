//! Hands messages to a web service, for collecting data: at least once, in order, in batches.
//!
//! POSTs lines of JSON, `{"topic", "client", "qos", "retain", "payload"}` each, to the setting `url`; a payload that is not
//! UTF-8 is in `payload_base64`. With a status from 200 to 299 they are done; after anything else the same batch comes
//! again, later and later. Messages that wait do so in the broker, see `limits.feed_messages_max`.
//!
//! Settings: `url`, `filters` (Topic Filters with spaces between them), `timeout_ms` (5000), `header.NAME` for each header.
//! Needs `grants = { http = ["https://…"] }`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use wasmqtt_sdk::{Batch, HttpRequest, Message, Plugin, Registration, Settings, StorageHook, export_plugin};

/// Milliseconds.
const TIMEOUT_DEFAULT: u64 = 5000;

/// Where they go.
#[derive(Debug)]
pub struct TopicTap {
    url: String,
    filters: Vec<String>,
    timeout_ms: u64,
    headers: Vec<(String, String)>,
}

impl Plugin for TopicTap {
    fn new(settings: &Settings) -> Result<Self, String> {
        let header = |(name, value): (&str, &str)| Some((name.strip_prefix("header.")?.to_owned(), value.to_owned()));
        Ok(Self {
            url: settings.require("url")?.to_owned(),
            filters: settings.require("filters")?.split_whitespace().map(str::to_owned).collect(),
            timeout_ms: settings.parse("timeout_ms", TIMEOUT_DEFAULT)?,
            headers: settings.iter().filter_map(header).collect(),
        })
    }

    fn registration(&self) -> Registration {
        Registration { filters: self.filters.clone(), committed: true, payload: true, ..Registration::default() }
    }
}

fn line(message: &Message<'_>) -> String {
    let mut line = json!({
        "topic": message.topic,
        "client": message.client_id,
        "qos": message.qos,
        "retain": message.retain,
    });
    match std::str::from_utf8(message.payload) {
        Ok(text) => line["payload"] = text.into(),
        Err(_) => line["payload_base64"] = STANDARD.encode(message.payload).into(),
    }
    format!("{line}\n")
}

impl StorageHook for TopicTap {
    fn committed(&self, messages: &Batch) -> Result<(), String> {
        let lines: String = messages.iter().map(|message| line(&message)).collect();
        let mut request = HttpRequest::post(&self.url, "application/x-ndjson", lines);
        request.headers.extend(self.headers.iter().cloned());
        request.timeout_ms = self.timeout_ms;
        match request.send()?.status {
            200..=299 => Ok(()),
            other => Err(format!("{}: status {other}", self.url)),
        }
    }
}

export_plugin!(TopicTap: storage_hook);

#[cfg(test)]
mod tests {
    use wasmqtt_sdk::{HttpResponse, testing};

    use super::*;

    fn plugin() -> TopicTap {
        TopicTap::new(&Settings::from_pairs(&[("url", "http://tap/in"), ("filters", "a/# b")]))
            .expect("settings are good")
    }

    #[test]
    fn messages_are_lines_in_their_order() {
        testing::respond(Ok(HttpResponse { status: 202, body: Vec::new() }));
        let batch = testing::batch(&[("a/1", "c", b"one"), ("b", "", b"\xff\x00")]);
        assert_eq!(plugin().committed(&batch), Ok(()));
        let [request] = &testing::take_requests()[..] else { panic!("one request") };
        assert_eq!(
            String::from_utf8(request.body.clone()).expect("text"),
            "{\"client\":\"c\",\"payload\":\"one\",\"qos\":1,\"retain\":false,\"topic\":\"a/1\"}\n\
             {\"client\":\"\",\"payload_base64\":\"/wA=\",\"qos\":1,\"retain\":false,\"topic\":\"b\"}\n"
        );
    }

    #[test]
    fn what_is_not_taken_comes_again() {
        let batch = testing::batch(&[("a", "c", b"x")]);
        testing::respond(Ok(HttpResponse { status: 503, body: Vec::new() }));
        assert_eq!(plugin().committed(&batch), Err("http://tap/in: status 503".into()));
        assert!(plugin().committed(&batch).is_err(), "nobody there");
    }

    #[test]
    fn it_registers_for_its_filters() {
        let wanted = plugin().registration();
        assert_eq!(wanted.filters, ["a/#", "b"]);
        assert!(wanted.committed && wanted.payload && !wanted.before_store);
    }
}
