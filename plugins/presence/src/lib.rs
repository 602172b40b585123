//! Who is connected, as retained messages: `presence/{client-id}` tells when a client came or went.
//!
//! Settings: `topic` (`presence/%c`; `%c` is the Client Identifier, `%u` the principal), `retain` = `true` or `false`.
//! Needs `grants = { publish = ["presence/#"] }`, or whatever `topic` is below.

use std::fmt::Write as _;

use serde_json::json;
use wasmqtt_sdk::host::{Outgoing, publish};
use wasmqtt_sdk::{Event, Events, Plugin, Registration, Settings, export_plugin, is_valid_filter, warn};

/// Its settings.
#[derive(Debug)]
pub struct Presence {
    topic: String,
    retain: bool,
}

impl Plugin for Presence {
    fn new(settings: &Settings) -> Result<Self, String> {
        settings.only(&["topic", "retain"])?;
        let topic = settings.get("topic").unwrap_or("presence/%c").to_owned();
        if !is_valid_filter(&topic) || topic.contains(['+', '#']) {
            return Err(format!("setting `topic` = {topic:?}: must be a topic name, in which %c and %u are replaced"));
        }
        Ok(Self { topic, retain: settings.parse("retain", true)? })
    }

    fn registration(&self) -> Registration {
        let events = ["client-connected", "client-disconnected"].map(str::to_owned).to_vec();
        Registration { events, ..Registration::default() }
    }
}

impl Presence {
    fn topic_of(&self, event: &Event) -> String {
        let client = &event.who;
        self.topic.replace("%c", &level(&client.client_id)).replace("%u", &level(&client.principal))
    }
}

/// A text that is one level of a topic: what would be more, or a wildcard, is written as `%2F`.
fn level(text: &str) -> String {
    let mut level = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '/' | '+' | '#' | '%' | '\0' => {
                let _ = write!(level, "%{:02X}", char as u32);
            }
            char => level.push(char),
        }
    }
    level
}

fn payload(event: &Event) -> String {
    let mut json = json!({
        "online": event.kind == "client-connected",
        "at": event.at,
        "client": event.who.client_id,
        "principal": event.who.principal,
    });
    for name in ["address", "version", "reason"] {
        if let Some(value) = event.field(name) {
            json[name] = value.into();
        }
    }
    json.to_string()
}

impl Events for Presence {
    fn observed(&self, events: &[Event]) {
        for event in events {
            let message = Outgoing { retain: self.retain, ..Outgoing::new(self.topic_of(event), payload(event)) };
            if let Err(refusal) = publish(&message) {
                warn(&format!("{} not published: {refusal:?}", message.topic));
            }
        }
    }
}

export_plugin!(Presence: events);

#[cfg(test)]
mod tests {
    use wasmqtt_sdk::host::Refusal;
    use wasmqtt_sdk::{Pair, testing};

    use super::*;

    fn event(kind: &str, client_id: &str) -> Event {
        let field = |name: &str, value: &str| Pair { name: name.into(), value: value.into() };
        Event {
            kind: kind.into(),
            at: 1.5,
            who: testing::client(client_id, "ann"),
            fields: vec![field("address", "10.0.0.1"), field("reason", "say \"bye\"")],
        }
    }

    #[test]
    fn clients_come_and_go() {
        let plugin = Presence::new(&Settings::default()).expect("has defaults");
        plugin.observed(&[event("client-connected", "c"), event("client-disconnected", "a/+")]);
        let published = testing::take().published;
        let topics: Vec<&str> = published.iter().map(|message| message.topic.as_str()).collect();
        assert_eq!(topics, ["presence/c", "presence/a%2F%2B"]);
        assert!(published.iter().all(|message| message.retain));
        let text = String::from_utf8(published[0].payload.clone()).expect("JSON");
        assert_eq!(
            text,
            r#"{"address":"10.0.0.1","at":1.5,"client":"c","online":true,"principal":"ann","reason":"say \"bye\""}"#
        );
    }

    #[test]
    fn what_is_not_published_is_logged() {
        let plugin =
            Presence::new(&Settings::from_pairs(&[("topic", "who/%u/%c"), ("retain", "false")])).expect("right");
        testing::refuse(Some(Refusal::Denied));
        plugin.observed(&[event("client-connected", "c")]);
        let host = testing::take();
        assert_eq!((host.published[0].topic.as_str(), host.published[0].retain), ("who/ann/c", false));
        assert!(host.lines[0].1.contains("not published"));
    }

    #[test]
    fn wrong_settings_are_named() {
        let wrong = Presence::new(&Settings::from_pairs(&[("topic", "presence/#")])).expect_err("is refused");
        assert!(wrong.contains("`topic`"), "{wrong}");
    }
}
