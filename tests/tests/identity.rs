//! Who a client is: whose Session it is, which names it may have, and what it may send before it is let in.

use std::time::Duration;

use wasmqtt_tests::{ALL, BOTH, Broker, Client, Got, Message, Options, Version, Will, raw};

const V311: Version = Version::V311;
const V5: Version = Version::V5;

fn not_authorized(version: Version) -> u8 {
    if version == V5 { 0x87 } else { 5 }
}

/// Begins a Session as `name`, with a message in its queue.
fn leave_message(broker: &Broker, options: &Options) {
    let mut client = broker.connect(options);
    client.subscribe("t", 1);
    client.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("t", "for ann only").qos(1));
    publisher.disconnect();
}

/// Another user name gets neither messages nor subscriptions of a Session by naming its Client Identifier, and cannot
/// end it. MQTT 5.0 §3.1.3.1, §5.4.2; 3.1.1 §5.4.1
#[test]
fn a_session_belongs_to_the_identity_that_began_it() {
    let broker = Broker::start("shards = 3\n");
    for version in BOTH {
        for id in ["a", "b", "c", "d"] {
            let ann = Options::new(version, id).resume().named("ann");
            leave_message(&broker, &ann);
            for other in [ann.clone().named("bob"), Options { username: None, password: None, ..ann.clone() }] {
                broker.check_refused(&other, not_authorized(version));
                broker.check_refused(&Options { clean: true, ..other }, not_authorized(version));
            }
            let mut client = broker.connect(&ann);
            assert!(client.connack.session_present);
            assert_eq!(client.message().text(), "for ann only");
            // Nor is a connection taken over.
            broker.check_refused(&ann.clone().named("bob"), not_authorized(version));
            client.ping();
            client.disconnect();
            broker.connect(&Options { clean: true, session_expiry: None, ..ann }).disconnect();
        }
    }
}

/// The same over a restart of the broker.
#[test]
fn the_store_knows_whose_session_it_is() {
    let broker = Broker::start("shards = 3\n");
    let ids = ["a", "b", "c", "d"];
    let ann = |version, id| Options::new(version, id).resume().named("ann");
    for (version, id) in BOTH.iter().cycle().zip(ids) {
        leave_message(&broker, &ann(*version, id));
    }
    let broker = Broker::start_in(broker.crash(), "shards = 2\n");
    for (version, id) in BOTH.iter().cycle().zip(ids) {
        broker.check_refused(&ann(*version, id).named("bob"), not_authorized(*version));
    }
    let broker = Broker::start_in(broker.crash(), "shards = 2\n[auth]\nclient_id_taken = \"new-session\"\n");
    for (place, (version, id)) in BOTH.iter().cycle().zip(ids).enumerate() {
        if place < 2 {
            let mut client = broker.connect(&ann(*version, id));
            assert!(client.connack.session_present);
            assert_eq!(client.message().text(), "for ann only");
        } else {
            let mut client = broker.connect(&ann(*version, id).named("bob"));
            assert!(!client.connack.session_present);
            client.check_silent();
        }
    }
}

/// Where it is wanted, another identity begins a Session of its own, and the old one ends as by Clean Start, with its
/// connection. [MQTT-3.1.4-3] of 5.0, [MQTT-3.1.4-2] of 3.1.1.
#[test]
fn another_identity_may_begin_a_session_of_its_own() {
    let broker = Broker::start("[auth]\nclient_id_taken = \"new-session\"\n");
    for version in BOTH {
        let ann = Options::new(version, "c").resume().named("ann");
        leave_message(&broker, &ann);
        let mut bob = broker.connect(&ann.clone().named("bob"));
        assert!(!bob.connack.session_present);
        let mut publisher = broker.connect(&Options::new(V5, "publisher"));
        publisher.publish(&Message::new("t", "also for ann").qos(1));
        bob.check_silent();
        let mut again = broker.connect(&ann);
        assert!(!again.connack.session_present, "bob's has ended in turn");
        bob.check_ended(0x8E);
        again.check_silent();
        broker.connect(&Options { clean: true, session_expiry: None, ..ann }).disconnect();
    }
}

/// Who has no name owns nothing: a broker that begins to ask for names does not lock clients out.
#[test]
fn a_session_without_a_name_gives_way() {
    let broker = Broker::start("");
    for version in BOTH {
        let nobody = Options::new(version, "c").resume();
        leave_message(&broker, &nobody);
        let mut client = broker.connect(&nobody.clone().named("ann"));
        assert!(!client.connack.session_present);
        client.check_silent();
        client.disconnect();
        broker.check_refused(&nobody, not_authorized(version));
        broker.connect(&Options { clean: true, session_expiry: None, ..nobody.named("ann") }).disconnect();
    }
}

/// Rules build Topic Filters of names, and a name such as `+` would be everybody's. MQTT 5.0 §3.1.3.1: a server may
/// allow other characters than letters and digits. [MQTT-3.1.3-8] of 5.0, [MQTT-3.1.3-9] of 3.1.1.
#[test]
fn names_with_wildcards_are_refused() {
    let names = ["+", "#", "a/#", "+/a", "a+b"];
    let broker = Broker::start("");
    for version in BOTH {
        let (id_refused, name_refused) = if version == V5 { (0x85, 0x86) } else { (2, 4) };
        for name in names {
            broker.check_refused(&Options::new(version, name), id_refused);
            broker.check_refused(&Options::new(version, "c").named(name), name_refused);
        }
        broker.connect(&Options::new(version, "a/b $x").named("ann@example")).disconnect();
    }
    let broker = Broker::start("[auth]\nwildcard_identifiers = \"allow\"\n");
    for version in BOTH {
        for name in names {
            broker.connect(&Options::new(version, name).named(name)).disconnect();
        }
    }
}

/// Nobody can guess the next one, to ask for the Session. [MQTT-3.1.3-6] (5.0)
#[test]
fn assigned_client_identifiers_are_random() {
    let broker = Broker::start("");
    let mut seen = std::collections::HashSet::new();
    for _ in 0..20 {
        let client = broker.connect(&Options::new(V5, ""));
        let id = client.connack.assigned_client_id.clone().expect("there is one");
        assert!(id.len() == 37 && id.starts_with("auto-") && seen.insert(id.clone()), "{id}");
    }
}

/// Below `$SYS/` only the broker publishes; a bridge of mosquitto whose will is there is let in all the same.
#[test]
fn a_will_below_sys_is_left_out() {
    let broker = Broker::start("");
    let mut watcher = broker.connect(&Options::new(V5, "watcher"));
    watcher.subscribe("$SYS/broker/connection/#", 0);
    for version in ALL {
        let will = Some(Will { message: Message::new("$SYS/broker/connection/x/state", "0").retained(), delay: None });
        broker.connect(&Options { will, ..Options::new(version, "c") }).vanish();
    }
    watcher.check_silent();
}

/// Mosquitto sets the highest bit of the Protocol Level: what it publishes does not come back to it, and RETAIN is
/// forwarded as it was published, as 5.0 has options for.
#[test]
fn a_bridge_does_not_get_its_own_messages() {
    let broker = Broker::start("");
    for version in [Version::V31, V311] {
        let mut bridge = broker.connect(&Options { bridge: true, ..Options::new(version, "bridge") });
        bridge.subscribe("#", 1);
        bridge.publish(&Message::new("t", "its own").qos(1));
        bridge.check_silent();
        let mut other = broker.connect(&Options::new(version, "other"));
        other.publish(&Message::new("t", "another's").qos(1).retained());
        let message = bridge.message();
        assert_eq!((message.text(), message.retain), ("another's", true));
        let mut plain = broker.connect(&Options::new(version, "plain"));
        plain.subscribe("u", 0);
        plain.publish(&Message::new("u", "its own"));
        assert_eq!(plain.message().text(), "its own");
        other.publish(&Message::new("t", "").qos(1).retained());
    }
}

/// An unfinished CONNECT takes only so much memory; one that was announced larger is refused before it is there.
/// [MQTT-3.1.2-24] is about the other direction; 0x95: MQTT 5.0 §3.2.2.2.
#[test]
fn a_connect_is_bounded_in_bytes() {
    let broker = Broker::start("[limits]\nconnect_bytes_max = 2000\n");
    let will = |bytes: usize| Some(Will { message: Message::new("w", "x".repeat(bytes)), delay: None });
    for version in BOTH {
        broker.connect(&Options { will: will(1900), ..Options::new(version, "c") }).disconnect();
        let (mut client, got) = {
            let mut client = Client::open(broker.address(), version);
            client.send_connect(&Options { will: will(2000), ..Options::new(version, "c") });
            let got = client.recv();
            (client, got)
        };
        match version {
            V5 => {
                assert!(matches!(&got, Got::Connack(connack) if connack.reason == 0x95), "{got:?}");
                assert_eq!(client.recv(), Got::Closed);
            }
            _ => assert_eq!(got, Got::Closed),
        }
        let mut client = broker.connect(&Options::new(version, "c"));
        client.subscribe("t", 0);
        client.publish(&Message::new("t", "x".repeat(5000)).qos(1));
        assert_eq!(client.message().payload.len(), 5000, "others may be larger");
    }
}

/// The operator is told that a proxy stands in front and what to do, once.
#[test]
fn a_proxy_that_says_so_is_named_in_the_log() {
    let broker = Broker::start("");
    for header in [&b"PROXY TCP4 192.0.2.1 192.0.2.2 4000 1883\r\n"[..], b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"] {
        let mut client = Client::open(broker.address(), V311);
        client.send_raw(header);
        client.send_connect(&Options::new(V311, "c"));
        assert_eq!(client.recv(), Got::Closed);
    }
    broker.await_log("PROXY protocol header", 1);
    assert_eq!(broker.log().matches("PROXY protocol header").count(), 1);
}

/// 3.x clients cannot be told the Server Keep Alive: the server goes by its own all the same, also where the client
/// asked for none. MQTT 3.1.1 §3.1.2.10
#[test]
fn keep_alive_max_holds_for_clients_that_cannot_be_told() {
    let broker = Broker::start("[limits]\nkeep_alive_max_secs = 1\n");
    for keep_alive in [100, 0] {
        let mut silent = broker.connect(&Options::new(V311, "silent").keep_alive(keep_alive));
        let mut busy = broker.connect(&Options::new(V311, "busy").keep_alive(keep_alive));
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(400));
            busy.ping();
        }
        silent.check_ended(0);
        busy.ping();
    }
}

/// `limits.topic_levels_max` and `limits.topic_bytes_max` hold for whatever has a topic.
#[test]
fn topics_are_bounded_in_levels_and_bytes() {
    let broker = Broker::start("[limits]\ntopic_levels_max = 3\ntopic_bytes_max = 20\n");
    for version in BOTH {
        let refused = if version == V5 { 0x8F } else { 0x80 };
        for (fits, beyond) in [("a/b/c", "a/b/c/d"), ("12345678901234567890", "123456789012345678901")] {
            let mut client = broker.connect(&Options::new(version, "c"));
            assert_eq!(client.subscribe(fits, 1), 1);
            assert_eq!(client.subscribe(beyond, 1), refused, "{beyond}");
            client.publish(&Message::new(fits, "x").qos(1));
            assert_eq!(client.message().text(), "x");
            client.send_publish(&Message::new(beyond, "x"));
            client.check_ended(0x90);
            let will = |topic| Options::new(version, "w").will(Message::new(topic, "x"));
            broker.connect(&will(fits)).disconnect();
            let (mut client, got) = broker.try_connect(&will(beyond));
            if version == V5 {
                assert!(matches!(&got, Got::Connack(connack) if connack.reason == 0x90), "{got:?}");
                assert_eq!(client.recv(), Got::Closed);
            } else {
                assert_eq!(got, Got::Closed);
            }
        }
    }
}

/// An empty or ill-formed Topic Filter ends the connection, whatever stands beside it. [MQTT-4.7.1-1], [MQTT-4.7.1-2],
/// [MQTT-4.7.3-1], [MQTT-4.8.2-1], [MQTT-4.8.2-2], [MQTT-4.13.1-1] (5.0); [MQTT-4.7.1-2], [MQTT-4.7.1-3],
/// [MQTT-4.7.3-1], [MQTT-4.8.0-1] (3.1.1).
#[test]
fn filters_that_are_none_end_the_connection() {
    let broker = Broker::start("");
    for version in ALL {
        for filter in ["", "a#", "a/#/b", "+a", "$share/", "$share/g", "$share/g/", "$share//t", "$share/+/t"] {
            let option = [raw::text("fine"), vec![0], raw::text(filter), vec![0]].concat();
            let names = [raw::text("fine"), raw::text(filter)].concat();
            for (first, body) in [(0x82, option), (0xA2, names)] {
                let mut client = broker.connect(&Options::new(version, "c"));
                client.send_raw(&raw::filters(version, first, 7, &[], &body));
                client.check_ended(0x81);
            }
        }
    }
}
