//! `plugin feed`: messages that a plugin of a running broker has not taken, and what is to become of them.

use std::fmt::Write as _;

use anyhow::bail;
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use wasmqtt_host::PluginHost;
use wasmqtt_protocol::text::escaped;

use crate::control::{Answer, Request, ask};
use crate::operate::{Which, number, table, text};
use crate::output;

/// Bytes of a topic, a Client Identifier or an error in a line.
const SHOWN_BYTES_MAX: usize = 200;

#[derive(Debug, Subcommand)]
pub(crate) enum FeedCommand {
    /// Show what waits for a plugin and what is set aside.
    #[command(after_help = "\
Numbers hold until the broker ends; those of messages that are set aside begin with `a`.

Examples:
  wasmqtt plugin feed list topic-tap
  wasmqtt plugin feed list topic-tap --json --config /etc/wasmqtt.toml")]
    List {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin.
        name: String,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Show one message, with the beginning of its payload.
    #[command(after_help = "Example:\n  wasmqtt plugin feed show topic-tap a1")]
    Show {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin.
        name: String,
        /// Number of the message.
        id: String,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Forget messages: the plugin never gets them.
    #[command(after_help = "Example:\n  wasmqtt plugin feed skip topic-tap a1 a2")]
    Skip {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin.
        name: String,
        /// Numbers of the messages.
        #[arg(required = true)]
        ids: Vec<String>,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
    /// Try messages that are set aside again, behind those that wait.
    #[command(after_help = "\
Examples:
  wasmqtt plugin feed retry topic-tap            all that are set aside
  wasmqtt plugin feed retry topic-tap a1")]
    Retry {
        #[command(flatten)]
        which: Which,
        /// Name of the plugin.
        name: String,
        /// Numbers of the messages; none: all.
        ids: Vec<String>,
        /// For machines.
        #[arg(long)]
        json: bool,
    },
}

/// What the running broker is asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FeedRequest {
    List,
    Show(String),
    Skip(Vec<String>),
    Retry(Vec<String>),
}

/// In the broker.
pub(crate) fn answer(plugins: &PluginHost, name: &str, request: &FeedRequest) -> anyhow::Result<Value> {
    Ok(match request {
        FeedRequest::List => serde_json::to_value(plugins.feed(name)?)?,
        FeedRequest::Show(id) => serde_json::to_value(plugins.feed_message(name, id)?)?,
        FeedRequest::Skip(ids) => serde_json::json!({ "skipped": plugins.feed_skip(name, ids)? }),
        FeedRequest::Retry(ids) => serde_json::json!({ "retried": plugins.feed_retry(name, ids)? }),
    })
}

/// What the command prints.
pub(crate) fn run(command: FeedCommand) -> anyhow::Result<String> {
    let (which, name, request, json) = match command {
        FeedCommand::List { which, name, json } => (which, name, FeedRequest::List, json),
        FeedCommand::Show { which, name, id, json } => (which, name, FeedRequest::Show(id), json),
        FeedCommand::Skip { which, name, ids, json } => (which, name, FeedRequest::Skip(ids), json),
        FeedCommand::Retry { which, name, ids, json } => (which, name, FeedRequest::Retry(ids), json),
    };
    let shown = match &request {
        FeedRequest::List => listed,
        FeedRequest::Show(_) => shown,
        FeedRequest::Skip(_) => |answer: &Value| format!("skipped {}\n", number(answer, "skipped")),
        FeedRequest::Retry(_) => |answer: &Value| format!("{} will be tried again\n", number(answer, "retried")),
    };
    let request = Request::Feed { name, request };
    let Answer::Feed(answer) = ask(&which.data_dir()?, &request, &[])? else { bail!("an unexpected answer") };
    if json {
        return output::json(&answer);
    }
    Ok(shown(&answer))
}

fn listed(list: &Value) -> String {
    let mut text = format!(
        "{} wait ({} bytes), {} are set aside ({} bytes), {} were dropped\n",
        number(list, "waiting"),
        number(list, "waiting_bytes"),
        number(list, "aside"),
        number(list, "aside_bytes"),
        number(list, "dropped")
    );
    let messages = list["messages"].as_array().map(Vec::as_slice).unwrap_or_default();
    if messages.is_empty() {
        return text;
    }
    let head = ["ID", "BYTES", "TRIES", "TOPIC", "LAST ERROR"].map(str::to_owned);
    let rows = messages.iter().map(|message| {
        [
            one(message, "id"),
            number(message, "bytes").to_string(),
            number(message, "tries").to_string(),
            one(message, "topic"),
            one(message, "error"),
        ]
    });
    text += &table(&std::iter::once(head).chain(rows).collect::<Vec<_>>());
    text
}

fn one(value: &Value, key: &str) -> String {
    escaped(text(value, key), SHOWN_BYTES_MAX).to_string()
}

fn shown(message: &Value) -> String {
    let mut shown = String::new();
    let is_aside = message["aside"] == Value::Bool(true);
    let _ = writeln!(shown, "message     {} ({})", one(message, "id"), if is_aside { "set aside" } else { "waits" });
    let _ = writeln!(shown, "topic       {}", one(message, "topic"));
    let _ = writeln!(shown, "client      {}", one(message, "client_id"));
    let _ = writeln!(shown, "qos         {}, retain {}", number(message, "qos"), message["retain"]);
    let (payload, properties) = (number(message, "payload_bytes"), number(message, "property_bytes"));
    let _ = writeln!(shown, "bytes       {payload} of payload, {properties} of properties");
    let _ = writeln!(shown, "tries       {}", number(message, "tries"));
    let _ = writeln!(shown, "last error  {}", one(message, "error"));
    let _ = writeln!(shown, "payload     {}", escaped(text(message, "payload"), 4 * 1024));
    shown
}
