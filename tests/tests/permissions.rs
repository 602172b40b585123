//! Permissions by an `acl` plugin of the real broker.

use wasmqtt_tests::{BOTH, Broker, Got, Message, Options, Version, Will, at_most};

const V5: Version = Version::V5;

fn start(settings: &str) -> Broker {
    Broker::start(&format!(
        "[[plugin]]\nname = \"probe\"\npath = \"{}\"\nconfig = {{ {settings} }}\n\
         grants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n",
        wasmqtt_guests::component("probe").display()
    ))
}

/// 0x87 Not authorized in SUBACK, PUBACK and PUBREC of 5.0; 0x80 in SUBACK of 3.1.1, which has no code in PUBACK.
/// MQTT 5.0 §3.9.3, §3.4.2.1, §3.5.2.1; 3.1.1 §3.9.3, [MQTT-3.3.5-2].
#[test]
fn what_is_denied_is_answered_with_its_reason_code() {
    let broker = start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        let denied = if version == V5 { 0x87 } else { 0x80 };
        let filters = ["a/#", "secret/#", "$share/g/secret/x", "$share/g/a"].map(|filter| (filter, at_most(1)));
        assert_eq!(client.subscribe_with(None, &filters), [1, denied, denied, 1]);
        let denied = if version == V5 { 0x87 } else { 0 };
        for qos in [1, 2] {
            assert_eq!(client.publish(&Message::new("a/secret", "x").qos(qos)), denied, "QoS {qos}");
        }
        client.publish(&Message::new("a/plain", "y"));
        assert!(matches!(client.recv(), Got::Publish(Message { topic, .. }) if topic == "a/plain"));
        client.disconnect();
    }
}

/// A will is published with the permissions its client had. MQTT 5.0 §3.1.2.5.
#[test]
fn a_will_needs_permission() {
    let broker = start("");
    let mut watcher = broker.connect(&Options::new(V5, "watcher"));
    assert_eq!(watcher.subscribe("a/#", 0), 0);
    for topic in ["a/secret", "a/plain"] {
        let will = Some(Will { message: Message::new(topic, "gone"), delay: None });
        let mut client = broker.connect(&Options { will, ..Options::new(V5, "c") });
        client.send_raw(&[0xFF]);
        assert!(matches!(client.recv(), Got::Disconnect(..)));
    }
    assert!(matches!(watcher.recv(), Got::Publish(Message { topic, .. }) if topic == "a/plain"));
    watcher.check_silent();
}

/// What a plugin takes back ends: the subscription is gone, and publishing is asked about again.
#[test]
fn a_revoked_subscription_ends() {
    let broker = start("events = \"subscribed\", ttl = 1");
    let mut watcher = broker.connect(&Options::new(V5, "watcher"));
    assert_eq!(watcher.subscribe("event/#", 0), 0);
    let mut client = broker.connect(&Options::new(V5, "c"));
    assert_eq!(client.subscribe("kick/me", 0), 0);
    let Got::Disconnect(reason, ..) = client.recv() else { panic!("not disconnected") };
    assert_eq!(reason, 0x98, "the plugin's");
    let mut banned = broker.connect(&Options::new(V5, "banned"));
    assert_eq!(banned.subscribe("ban/me", 0), 0);
    let Got::Disconnect(reason, ..) = banned.recv() else { panic!("not disconnected") };
    assert_eq!(reason, 0x98, "Banned is for CONNACK alone");
    broker.check_refused(&Options::new(V5, "banned"), 0x8A);
}

/// `$SYS/broker/plugins/…` says what plugins do.
#[test]
fn plugins_have_topics_of_their_own() {
    let broker = start("");
    let mut client = broker.connect(&Options::new(V5, "c"));
    assert_eq!(client.subscribe("$SYS/broker/plugins/#", 0), 0);
    let mut seen = Vec::new();
    while !["probe/calls", "probe/failures", "probe/generation"]
        .iter()
        .all(|name| seen.iter().any(|t: &String| t.ends_with(name)))
    {
        if let Got::Publish(Message { topic, .. }) = client.recv() {
            seen.push(topic);
        }
    }
}
