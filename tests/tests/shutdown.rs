//! How the broker ends. MQTT 5.0 §4.13.2, §3.14.2.1.

use rustix::process::Signal;
use wasmqtt_tests::{BOTH, Broker, Got, Message, Options, Version};

/// [MQTT-4.13.2-1], [MQTT-3.14.2-2] (5.0).
#[test]
fn signals_end_the_broker_politely() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut broker = Broker::start("");
        let mut clients = BOTH.map(|version| broker.connect(&Options::new(version, "")));
        let lasting = broker.connect(&Options::new(Version::V5, "lasting").resume());
        lasting.disconnect();
        broker.signal(signal);
        for client in &mut clients {
            client.check_ended(0x8B);
        }
        let status = broker.wait();
        assert!(status.success(), "{status}");
        assert!(std::net::TcpStream::connect(broker.address()).is_err());
    }
}

/// What was acknowledged is delivered first.
#[test]
fn messages_on_their_way_are_delivered_before_the_end() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(Version::V5, "publisher"));
    let mut subscriber = broker.connect(&Options::new(Version::V5, "subscriber"));
    subscriber.subscribe("t", 1);
    for index in 0..200 {
        publisher.publish(&Message::new("t", index.to_string()).qos(1));
    }
    broker.stop();
    for index in 0..200 {
        assert_eq!(subscriber.recv_publish().text(), index.to_string());
    }
    assert!(matches!(subscriber.recv(), Got::Disconnect(0x8B, _)));
    assert_eq!(subscriber.recv(), Got::Closed);
}

/// Nobody is connected, nothing happens.
#[test]
fn idle_broker_stops() {
    Broker::start("").stop();
}
