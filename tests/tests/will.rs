//! The Will Message. MQTT 5.0 §3.1.2.5, §3.1.3.2, §3.14.4 and 3.1.1 §3.1.2.5, §3.14.4.

use std::time::{Duration, Instant};

use wasmqtt_tests::{BOTH, Broker, Client, Message, Options, Version, raw};

const V5: Version = Version::V5;

fn watcher(broker: &Broker, version: Version) -> Client {
    let mut client = broker.connect(&Options::new(version, "watcher"));
    client.subscribe("will", 2);
    client
}

fn with_will(version: Version) -> Options {
    Options::new(version, "mortal").will(Message::new("will", "gone").qos(1))
}

/// [MQTT-3.1.2-7], [MQTT-3.1.2-8], [MQTT-3.1.2-9] (5.0); [MQTT-3.1.2-8], [MQTT-3.1.2-9] (3.1.1).
#[test]
fn will_is_published_when_the_connection_is_lost() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = watcher(&broker, version);
        for qos in [0, 1, 2] {
            let mortal = broker.connect(&Options::new(version, "mortal").will(Message::new("will", "gone").qos(qos)));
            watcher.check_silent();
            mortal.vanish();
            let message = watcher.message();
            assert_eq!((message.text(), message.qos, message.retain), ("gone", qos, false));
        }
    }
}

/// A reset is a loss as well.
#[test]
fn will_is_published_when_the_connection_is_reset() {
    let broker = Broker::start("");
    let mut watcher = watcher(&broker, V5);
    let mut mortal = broker.connect(&with_will(V5));
    mortal.subscribe("t", 0);
    mortal.send_publish(&Message::new("t", vec![0; 10_000]));
    std::thread::sleep(Duration::from_millis(100));
    drop(mortal); // with bytes unread, which resets it
    assert_eq!(watcher.message().text(), "gone");
}

/// The end of the stream in one go with the last packet: it was once overlooked until the Keep Alive was over.
#[test]
fn connection_that_closes_right_behind_a_packet_is_lost_at_once() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = watcher(&broker, version);
        for _ in 0..50 {
            let mut mortal = broker.connect(&with_will(version).keep_alive(0));
            mortal.send_raw(&raw::publish(version, 0x30, b"t", None, &[], b"last words"));
            drop(mortal);
            assert_eq!(watcher.message().text(), "gone");
        }
    }
}

/// [MQTT-3.14.4-3], [MQTT-3.1.2-10] (5.0); [MQTT-3.14.4-3], [MQTT-3.1.2-10], [MQTT-3.1.2-12] (3.1.1).
#[test]
fn disconnect_discards_the_will() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = watcher(&broker, version);
        broker.connect(&with_will(version)).disconnect();
        // Nor does the next connection find it.
        broker.connect(&Options::new(version, "mortal").resume()).vanish();
        watcher.check_silent();
        broker.connect(&Options::new(version, "mortal")).disconnect();
    }
}

/// [MQTT-3.1.2-10] (both), [MQTT-3.1.2-12] (3.1.1).
#[test]
fn will_is_published_once() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = watcher(&broker, version);
        broker.connect(&with_will(version).resume()).vanish();
        assert_eq!(watcher.message().text(), "gone");
        broker.connect(&Options::new(version, "mortal").resume()).vanish();
        watcher.check_silent();
        broker.connect(&Options::new(version, "mortal")).disconnect();
    }
}

/// Reason Code 0x04, or any error. MQTT 5.0 §3.14.2.1.
#[test]
fn disconnect_with_will_publishes_it() {
    let broker = Broker::start("");
    let mut watcher = watcher(&broker, V5);
    for reason in [0x04, 0x80, 0x82, 0x97] {
        broker.connect(&with_will(V5)).disconnect_with(reason, None);
        assert_eq!(watcher.message().text(), "gone", "0x{reason:02x}");
    }
}

/// MQTT 5.0 and 3.1.1 §3.1.2.5: an error on the connection, Keep Alive, takeover.
#[test]
fn will_is_published_when_the_server_ends_the_connection() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = watcher(&broker, version);
        let mut wrong = broker.connect(&with_will(version));
        wrong.send_raw(&raw::packet(0x32, &[0, 1, b't', 0, 0]));
        wrong.check_ended(0x82);
        assert_eq!(watcher.message().text(), "gone");
        let mut quiet = broker.connect(&with_will(version).keep_alive(1));
        quiet.check_ended(0x8D);
        assert_eq!(watcher.message().text(), "gone");
        let mut taken = broker.connect(&with_will(version));
        let taker = broker.connect(&Options::new(version, "mortal"));
        taken.check_ended(0x8E);
        assert_eq!(watcher.message().text(), "gone");
        taker.disconnect();
        watcher.check_silent();
    }
}

/// [MQTT-3.1.2-14], [MQTT-3.1.2-15] (5.0); [MQTT-3.1.2-16], [MQTT-3.1.2-17] (3.1.1).
#[test]
fn will_retain_keeps_the_message() {
    let broker = Broker::start("");
    for version in BOTH {
        let plain = Message::new("will", "plain").qos(1);
        broker.connect(&Options::new(version, "mortal").will(plain)).vanish();
        let mut late = watcher(&broker, version);
        late.check_silent();
        broker.connect(&Options::new(version, "mortal").will(Message::new("will", "kept").retained().qos(1))).vanish();
        assert!(!late.message().retain);
        let mut later = watcher(&broker, version);
        let message = later.message();
        assert_eq!((message.text(), message.retain), ("kept", true));
        later.publish(&Message::new("will", "").retained().qos(1));
    }
}

/// [MQTT-3.1.2-8] (5.0): not before the Will Delay Interval is over.
#[test]
fn will_delay_holds_the_will_back() {
    let broker = Broker::start("");
    let mut watcher = watcher(&broker, V5);
    let mortal = broker.connect(&with_will(V5).resume().will_delay(1));
    mortal.vanish();
    let start = Instant::now();
    assert_eq!(watcher.message().text(), "gone");
    let waited = start.elapsed();
    assert!(waited > Duration::from_millis(900) && waited < Duration::from_secs(8), "{waited:?}");
}

/// [MQTT-3.1.3-9] (5.0).
#[test]
fn reconnect_within_the_will_delay_cancels_the_will() {
    let broker = Broker::start("");
    let mut watcher = watcher(&broker, V5);
    broker.connect(&with_will(V5).resume().will_delay(2)).vanish();
    let back = broker.connect(&Options::new(V5, "mortal").resume());
    assert!(back.connack.session_present);
    std::thread::sleep(Duration::from_millis(2500));
    watcher.check_silent();
    back.vanish();
    watcher.check_silent();
    // A takeover by a client that resumes cancels it the same way.
    let mut old = broker.connect(&with_will(V5).resume().will_delay(2));
    let _new = broker.connect(&Options::new(V5, "mortal").resume());
    old.check_ended(0x8E);
    std::thread::sleep(Duration::from_millis(2500));
    watcher.check_silent();
}

/// [MQTT-3.1.2-8] (5.0): the end of the Session ends the delay.
#[test]
fn delayed_will_is_published_at_the_latest_when_the_session_ends() {
    let broker = Broker::start("");
    let mut watcher = watcher(&broker, V5);
    // No Session behind the connection.
    broker.connect(&with_will(V5).will_delay(100)).vanish();
    assert_eq!(watcher.message().text(), "gone");
    // It expires.
    let start = Instant::now();
    broker.connect(&with_will(V5).session_expiry(1).will_delay(100)).vanish();
    assert_eq!(watcher.message().text(), "gone");
    assert!(start.elapsed() > Duration::from_millis(900));
    // A clean start ends it.
    broker.connect(&with_will(V5).resume().will_delay(100)).vanish();
    watcher.check_silent();
    let _new = broker.connect(&Options::new(V5, "mortal"));
    assert_eq!(watcher.message().text(), "gone");
}

/// [MQTT-3.1.3-10] (5.0), and the others as in PUBLISH. MQTT 5.0 §3.1.3.2.
#[test]
fn will_carries_its_properties_in_order() {
    let broker = Broker::start("");
    let mut watcher = watcher(&broker, V5);
    let will = Message {
        payload_format: Some(true),
        content_type: Some("text/plain".into()),
        response_topic: Some("answers".into()),
        correlation_data: Some(vec![1, 2, 3]),
        ..Message::new("will", "gone").user("b", "1").user("a", "2").user("b", "0").qos(2).expiry(50)
    };
    broker.connect(&Options::new(V5, "mortal").will(will.clone())).vanish();
    let got = watcher.message();
    assert_eq!(got, Message { id: got.id, ..will });
}

/// The interval begins when the will is published. MQTT 5.0 §3.1.3.2.4.
#[test]
fn message_expiry_of_a_will_counts_from_its_publication() {
    let broker = Broker::start("");
    let options = Options::new(V5, "late").resume();
    let mut late = broker.connect(&options);
    late.subscribe("will", 1);
    late.disconnect();
    let will = Message::new("will", "gone").qos(1).expiry(3);
    let mortal = broker.connect(&Options::new(V5, "mortal").will(will));
    std::thread::sleep(Duration::from_millis(3500));
    mortal.vanish();
    let message = broker.connect(&options).message();
    assert!(message.expiry.is_some_and(|left| (1..=3).contains(&left)), "{message:?}");
}

/// A will with an empty payload is a message like others. MQTT 5.0 §3.1.3.4; 3.1.1 §3.1.3.3.
#[test]
fn will_payload_may_be_empty() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = watcher(&broker, version);
        broker.connect(&Options::new(version, "mortal").will(Message::new("will", "").qos(1))).vanish();
        assert_eq!(watcher.message().payload, b"");
    }
}
