//! What outlives a Network Connection, and how long. MQTT 5.0 §3.1.2.11.2, §3.14.2.2.2, §4.1; 3.1.1 §3.1.2.4, §4.1.

use std::time::Duration;

use wasmqtt_tests::{BOTH, Broker, Client, Message, Options, Version};

const V311: Version = Version::V311;
const V5: Version = Version::V5;

fn exists(broker: &Broker, id: &str) -> bool {
    let client = broker.connect(&Options::new(V5, id).resume());
    let present = client.connack.session_present;
    client.disconnect();
    present
}

/// [MQTT-4.1.0-2] (5.0), [MQTT-3.1.2-6] (3.1.1).
#[test]
fn session_without_expiry_ends_with_its_connection() {
    let broker = Broker::start("");
    broker.connect(&Options::new(V5, "a").unclean()).disconnect();
    broker.connect(&Options::new(V5, "b").session_expiry(0)).vanish();
    broker.connect(&Options::new(V311, "c")).disconnect();
    for id in ["a", "b", "c"] {
        assert!(!exists(&broker, id), "{id}");
    }
}

/// [MQTT-3.1.2-23], [MQTT-4.1.0-2] (5.0).
#[test]
fn session_lives_for_its_expiry_interval() {
    let broker = Broker::start("");
    for leave in [Client::disconnect, Client::vanish] {
        let mut client = broker.connect(&Options::new(V5, "c").session_expiry(2));
        client.subscribe("t", 1);
        leave(client);
        let again = broker.connect(&Options::new(V5, "c").unclean().session_expiry(2));
        assert!(again.connack.session_present, "within it");
        leave(again);
        std::thread::sleep(Duration::from_secs(3));
        assert!(!exists(&broker, "c"), "beyond it");
        broker.connect(&Options::new(V5, "c")).disconnect();
    }
}

/// [MQTT-3.1.2-4], [MQTT-4.1.0-1], [MQTT-4.1.0-2] (3.1.1).
#[test]
fn session_of_3_1_1_lives_on_without_clean_session() {
    let broker = Broker::start("");
    for leave in [Client::disconnect, Client::vanish] {
        let options = Options::new(V311, "c").unclean();
        leave(broker.connect(&options));
        assert!(broker.connect(&options).connack.session_present);
        broker.connect(&Options::new(V311, "c")).disconnect();
        assert!(!broker.connect(&options).connack.session_present);
        broker.connect(&Options::new(V311, "c")).disconnect();
    }
}

/// [MQTT-4.1.0-1] (both), [MQTT-4.1.0-2] (3.1.1): the interval begins when the connection ends.
#[test]
fn session_state_is_kept_while_the_connection_is_open() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c").session_expiry(1));
    client.subscribe("t", 1);
    std::thread::sleep(Duration::from_millis(2500));
    client.publish(&Message::new("t", "still here").qos(1));
    assert_eq!(client.message().text(), "still here");
}

/// MQTT 5.0 §3.2.2.3.2.
#[test]
fn server_shortens_the_session_expiry_and_says_so() {
    let broker = Broker::start("[limits]\nsession_expiry_max_secs = 1\n");
    let client = broker.connect(&Options::new(V5, "c").session_expiry(u32::MAX));
    assert_eq!(client.connack.session_expiry, Some(1));
    client.vanish();
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!exists(&broker, "c"));
    assert_eq!(broker.connect(&Options::new(V5, "d").session_expiry(1)).connack.session_expiry, None);
    // 3.1.1 cannot be told, but is bound.
    broker.connect(&Options::new(V311, "old").unclean()).disconnect();
    std::thread::sleep(Duration::from_millis(2500));
    assert!(!broker.connect(&Options::new(V311, "old").unclean()).connack.session_present);
}

/// MQTT 5.0 §3.14.2.2.2.
#[test]
fn disconnect_changes_the_session_expiry() {
    let broker = Broker::start("");
    broker.connect(&Options::new(V5, "ended").session_expiry(100)).disconnect_with(0, Some(0));
    assert!(!exists(&broker, "ended"));
    broker.connect(&Options::new(V5, "longer").session_expiry(1)).disconnect_with(0, Some(100));
    broker.connect(&Options::new(V5, "shorter").session_expiry(100)).disconnect_with(0, Some(1));
    std::thread::sleep(Duration::from_millis(2500));
    assert!(exists(&broker, "longer"));
    assert!(!exists(&broker, "shorter"));
}

/// MQTT 5.0 §3.14.2.2.2: zero at CONNECT stays zero.
#[test]
fn session_expiry_cannot_be_raised_from_zero_at_disconnect() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c").unclean());
    client.send_raw(&[0xE0, 0x07, 0x00, 0x05, 0x11, 0, 0, 0, 100]);
    client.check_ended(0x82);
    assert!(!exists(&broker, "c"));
    // Zero again is no change.
    broker.connect(&Options::new(V5, "c").unclean()).disconnect_with(0, Some(0));
}

/// [MQTT-4.5.0-1] (both), [MQTT-3.1.2-5] (3.1.1), [MQTT-4.6.0-5] (5.0).
#[test]
fn messages_wait_for_clients_that_are_away_in_order() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let options = Options::new(version, "away").resume();
        let mut client = broker.connect(&options);
        client.subscribe("q/#", 2);
        client.subscribe("zero", 0);
        client.disconnect();
        let mut expected = Vec::new();
        for index in 0..100_u8 {
            let qos = index % 3;
            publisher.publish(&Message::new(&format!("q/{}", index % 4), index.to_string()).qos(qos));
            publisher.publish(&Message::new("zero", "not kept").qos(2));
            if qos > 0 {
                expected.push((index.to_string(), qos));
            }
        }
        let mut client = broker.connect(&options);
        for (text, qos) in expected {
            let message = client.message();
            assert_eq!((message.text(), message.qos, message.dup), (&*text, qos, false));
        }
        client.check_silent();
        client.disconnect();
        broker.connect(&Options::new(version, "away")).disconnect();
    }
}

/// More than fits into flight at once waits its turn. [MQTT-4.9.0-2] (5.0).
#[test]
fn long_queue_is_delivered_through_a_small_receive_maximum() {
    let broker = Broker::start("[limits]\ninflight_max = 4\n");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let options = Options { receive_maximum: Some(3), ..Options::new(version, "away").resume() };
        let mut client = broker.connect(&options);
        client.subscribe("t", 2);
        client.disconnect();
        for index in 0..200_u8 {
            publisher.publish(&Message::new("t", index.to_string()).qos(1 + index % 2));
        }
        let mut client = broker.connect(&options);
        assert_eq!(client.texts(200), (0..200).map(|index| index.to_string()).collect::<Vec<_>>());
        client.disconnect();
        broker.connect(&Options::new(version, "away")).disconnect();
    }
}

/// The queue is bounded in messages and bytes: what does not fit is dropped, what is there stays.
#[test]
fn full_queue_drops_what_comes_last() {
    let broker = Broker::start("[limits]\nqueue_messages_max = 5\nqueue_bytes_max = 10000\n");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let options = Options::new(version, "away").resume();
        let mut client = broker.connect(&options);
        client.subscribe("t", 1);
        client.disconnect();
        for index in 0..10 {
            publisher.publish(&Message::new("t", index.to_string()).qos(1));
        }
        let mut client = broker.connect(&options);
        assert_eq!(client.texts(5), ["0", "1", "2", "3", "4"]);
        client.check_silent();
        client.disconnect();
        for size in [4000, 4000, 4000, 1000] {
            publisher.publish(&Message::new("t", vec![b'x'; size]).qos(1));
        }
        let mut client = broker.connect(&options);
        let sizes = [(); 3].map(|()| client.message().payload.len());
        assert_eq!(sizes, [4000, 4000, 1000]);
        client.check_silent();
        client.disconnect();
        broker.connect(&Options::new(version, "away")).disconnect();
    }
}

/// A Session is the client's, whatever version it speaks next.
#[test]
fn session_may_be_resumed_in_another_version() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut client = broker.connect(&Options::new(V311, "c").unclean());
    client.subscribe("t", 2);
    client.vanish();
    publisher.publish(&Message::new("t", "1").qos(2).user("a", "b"));
    let mut client = broker.connect(&Options::new(V5, "c").resume());
    assert!(client.connack.session_present);
    let message = client.recv_publish();
    assert_eq!((message.text(), message.user.len()), ("1", 1));
    client.vanish();
    let mut client = broker.connect(&Options::new(V311, "c").unclean());
    assert!(client.connack.session_present);
    let again = client.message();
    assert_eq!((again.text(), again.id, again.dup), ("1", message.id, true));
}

/// [MQTT-3.14.4-1], [MQTT-3.14.4-2] (5.0), [MQTT-3.14.4-1], [MQTT-3.14.4-2] (3.1.1): what comes behind DISCONNECT is
/// not looked at.
#[test]
fn nothing_counts_after_disconnect() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut watcher = broker.connect(&Options::new(version, "watcher"));
        watcher.subscribe("t", 0);
        let mut client = broker.connect(&Options::new(version, "c"));
        client.send_raw(&[&[0xE0, 0x00][..], &[0x30, 0x04, 0x00, 0x01, b't', 0x00]].concat());
        assert_eq!(client.recv(), wasmqtt_tests::Got::Closed);
        watcher.check_silent();
    }
}
