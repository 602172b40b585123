//! Hands messages to a web service, for collecting data: at least once, in order, in batches.
//!
//! POSTs lines of JSON, `{"topic", "client", "qos", "retain", "payload"}` each, to the setting `url`. A payload that is
//! not UTF-8, or that JSON would make more than twice as long, is in `payload_base64` instead. With a status from 200 to
//! 299 the lines are taken; after anything else the same messages come again, later and later. Messages that wait do so
//! in the broker, see `limits.feed_messages_max`.
//!
//! A request has at most `request_bytes_max` bytes, so one batch of messages may take several; only a message that is
//! longer by itself is sent in a longer request, alone. When the service answers 400, 413, 415 or 422, the messages are
//! at fault and not the service: the broker offers fewer at a time, and sets aside the one that is refused alone.
//!
//! Settings: `url`, `filters` (a list of Topic Filters, or a text with spaces between them), `request_bytes_max` (524288, allowed are 1024 to
//! 67108864), `timeout_ms` (5000), `header.NAME` for each header. Needs `grants = { http = ["https://…"] }`.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use wasmqtt_sdk::{
    Batch, Failure, HttpRequest, Message, Plugin, Registration, Settings, StorageHook, export_plugin, is_valid_filter,
    shown_url,
};

/// Milliseconds.
const TIMEOUT_DEFAULT: u64 = 5000;
/// Bytes of one request's body. nginx takes 1 MiB unless it is told otherwise.
const REQUEST_BYTES_DEFAULT: usize = 512 << 10;
const REQUEST_BYTES: std::ops::RangeInclusive<usize> = 1 << 10..=64 << 20;
/// JSON writes most bytes as one, and control characters as six. Beyond this factor base64 is used.
const TEXT_FACTOR_MAX: usize = 2;

/// Where they go.
#[derive(Debug)]
pub struct TopicTap {
    url: String,
    filters: Vec<String>,
    request_bytes_max: usize,
    timeout_ms: u64,
    headers: Vec<(String, String)>,
}

impl Plugin for TopicTap {
    fn new(settings: &Settings) -> Result<Self, String> {
        let header = |(name, value): (&str, &str)| Some((name.strip_prefix("header.")?.to_owned(), value.to_owned()));
        settings.only(&["url", "filters", "filters.*", "request_bytes_max", "timeout_ms", "header.*"])?;
        let filters = settings.list("filters")?.ok_or("setting `filters` is missing")?;
        if let Some(wrong) = filters.iter().find(|filter| !is_valid_filter(filter)) {
            return Err(format!("setting `filters`: {wrong:?} is not a topic filter"));
        }
        let request_bytes_max = settings.parse("request_bytes_max", REQUEST_BYTES_DEFAULT)?;
        if !REQUEST_BYTES.contains(&request_bytes_max) {
            let (least, most) = (REQUEST_BYTES.start(), REQUEST_BYTES.end());
            return Err(format!("setting `request_bytes_max` = {request_bytes_max}: allowed are {least} to {most}"));
        }
        Ok(Self {
            url: settings.require("url")?.to_owned(),
            filters: filters.into_iter().map(str::to_owned).collect(),
            request_bytes_max,
            timeout_ms: settings.parse("timeout_ms", TIMEOUT_DEFAULT)?,
            headers: settings.iter().filter_map(header).collect(),
        })
    }

    fn registration(&self) -> Registration {
        Registration { filters: self.filters.clone(), committed: true, payload: true, ..Registration::default() }
    }
}

/// One message on its way into a request.
struct Line<'a> {
    message: Message<'a>,
    /// The payload, if it is written as text.
    text: Option<&'a str>,
    /// Bytes of the line, or a few more.
    bytes: usize,
}

/// Bytes of a text between the quotation marks of JSON.
fn escaped_bytes(text: &[u8]) -> usize {
    let escaped = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0C => 2,
        0x00..=0x1F => 6,
        _ => 1,
    };
    text.iter().map(escaped).sum()
}

impl<'a> Line<'a> {
    fn new(message: Message<'a>) -> Self {
        /// The longest frame of a line.
        const FRAME: &str = r#"{"client":"","payload_base64":"","qos":0,"retain":false,"topic":""}"#;
        let payload = message.payload;
        let escaped = escaped_bytes(payload);
        let is_cheap = escaped <= TEXT_FACTOR_MAX * payload.len();
        let text = std::str::from_utf8(payload).ok().filter(|_| is_cheap);
        let payload = if text.is_some() { escaped } else { payload.len().div_ceil(3) * 4 };
        let names = escaped_bytes(message.client_id.as_bytes()) + escaped_bytes(message.topic.as_bytes());
        Self { message, text, bytes: FRAME.len() + names + payload + 1 }
    }

    /// Straight into the body: the plugin has little memory, and messages may be large.
    fn write(&self, body: &mut Vec<u8>) -> Result<(), String> {
        let Message { topic, client_id, payload, qos, retain, .. } = self.message;
        body.extend_from_slice(b"{\"client\":");
        write_text(body, client_id)?;
        if let Some(text) = self.text {
            body.extend_from_slice(b",\"payload\":");
            write_text(body, text)?;
        } else {
            body.extend_from_slice(b",\"payload_base64\":\"");
            let start = body.len();
            body.resize(start + payload.len().div_ceil(3) * 4, 0);
            STANDARD.encode_slice(payload, &mut body[start..]).map_err(|error| error.to_string())?;
            body.push(b'"');
        }
        body.extend_from_slice(format!(",\"qos\":{qos},\"retain\":{retain},\"topic\":").as_bytes());
        write_text(body, topic)?;
        body.extend_from_slice(b"}\n");
        Ok(())
    }
}

fn write_text(body: &mut Vec<u8>, text: &str) -> Result<(), String> {
    serde_json::to_writer(body, text).map_err(|error| error.to_string())
}

impl TopicTap {
    /// One request. `bytes`: of all lines, or a few more.
    fn send(&self, lines: &[Line<'_>], bytes: usize) -> Result<(), Failure> {
        let mut body = Vec::new();
        body.try_reserve_exact(bytes).map_err(|_| {
            let count = lines.len();
            let text =
                format!("no memory for a request of {bytes} bytes with {count} messages; raise limits.memory_mib");
            Failure::Internal(text)
        })?;
        lines.iter().try_for_each(|line| line.write(&mut body))?;
        let sent_bytes = body.len();
        let mut request = HttpRequest::post(&self.url, "application/x-ndjson", body);
        request.headers.extend(self.headers.iter().cloned());
        request.timeout_ms = self.timeout_ms;
        match request.send()?.status {
            200..=299 => Ok(()),
            // The next attempt would be answered alike, however long it is waited for.
            status @ (400 | 413 | 415 | 422) => Err(Failure::Internal(format!(
                "{}: status {status} for a request of {sent_bytes} bytes with {}",
                shown_url(&self.url),
                match lines {
                    [line] => format!("one message, of topic {:?}", line.message.topic),
                    lines => format!("{} messages", lines.len()),
                }
            ))),
            other => Err(Failure::Unavailable(format!("{}: status {other}", shown_url(&self.url)))),
        }
    }
}

impl StorageHook for TopicTap {
    fn committed(&self, messages: &Batch) -> Result<(), Failure> {
        let mut lines: Vec<Line<'_>> = Vec::new();
        let mut bytes = 0;
        for line in messages.iter().map(Line::new) {
            if !lines.is_empty() && bytes + line.bytes > self.request_bytes_max {
                self.send(&lines, bytes)?;
                lines.clear();
                bytes = 0;
            }
            bytes += line.bytes;
            lines.push(line);
        }
        if lines.is_empty() { Ok(()) } else { self.send(&lines, bytes) }
    }
}

export_plugin!(TopicTap: storage_hook);

#[cfg(test)]
mod tests;
