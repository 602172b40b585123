//! Enhanced authentication and re-authentication, with a plugin that plays ping and pong. MQTT 5.0 §4.12.

use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, raw};

const V5: Version = Version::V5;

fn broker() -> Broker {
    let component = wasmqtt_guests::component("auth-demo");
    Broker::start(&format!(
        "[[plugin]]\nname = \"auth-demo\"\npath = \"{}\"\nconfig = {{ alice = \"secret\" }}\n",
        component.display()
    ))
}

fn options(method: &str) -> Options {
    Options { authentication_method: Some(method.into()), ..Options::new(V5, "player") }
}

fn auth(reason: u8, method: &str, data: &str) -> Vec<u8> {
    let block = [vec![0x15], raw::text(method), vec![0x16], raw::text(data)].concat();
    raw::packet(0xF0, &[vec![reason], raw::properties(V5, &block)].concat())
}

fn check_challenged(client: &mut Client) {
    assert_eq!(client.recv(), Got::Auth(0x18, Some("ping".into()), Some(b"ping".into())));
}

/// Through the challenge to CONNACK.
fn enter(broker: &Broker) -> Client {
    let mut client = Client::open(broker.address(), V5);
    client.send_connect(&options("ping"));
    check_challenged(&mut client);
    client.send_raw(&auth(0x18, "ping", "pong"));
    let Got::Connack(connack) = client.recv() else { panic!("no CONNACK") };
    assert_eq!((connack.reason, connack.authentication_method.as_deref()), (0, Some("ping")));
    client
}

/// [MQTT-4.12.0-2], [MQTT-4.12.0-5], [MQTT-3.2.0-1] (5.0).
#[test]
fn challenge_is_answered_before_connack() {
    let broker = broker();
    let mut client = enter(&broker);
    client.subscribe("t", 1);
    client.publish(&Message::new("t", "in").qos(1));
    assert_eq!(client.message().text(), "in");
}

/// [MQTT-4.12.0-4] (5.0).
#[test]
fn wrong_answer_ends_the_connection() {
    let broker = broker();
    let mut client = Client::open(broker.address(), V5);
    client.send_connect(&options("ping"));
    check_challenged(&mut client);
    client.send_raw(&auth(0x18, "ping", "peng"));
    let got = client.recv();
    assert!(matches!(&got, Got::Connack(connack) if connack.reason == 0x87), "{got:?}");
    assert_eq!(client.recv(), Got::Closed);
}

/// [MQTT-4.12.0-1] (5.0).
#[test]
fn method_the_plugin_does_not_know_is_refused() {
    broker().check_refused(&options("pong"), 0x8C);
}

/// [MQTT-3.1.2-30] and [MQTT-4.12.0-5] seen from the server, [MQTT-3.14.0-1] (5.0): no DISCONNECT before CONNACK.
#[test]
fn nothing_but_auth_of_the_same_method_is_taken_before_connack() {
    let broker = broker();
    for packet in [vec![0xC0, 0x00], auth(0x18, "pong", "pong"), auth(0x19, "ping", "pong"), auth(0x00, "ping", "pong")]
    {
        let mut client = Client::open(broker.address(), V5);
        client.send_connect(&options("ping"));
        check_challenged(&mut client);
        client.send_raw(&packet);
        let got = client.recv();
        assert!(matches!(&got, Got::Connack(connack) if connack.reason >= 0x80), "{got:?} {packet:02x?}");
        assert_eq!(client.recv(), Got::Closed);
    }
}

/// [MQTT-4.12.1-1] (5.0); traffic goes on meanwhile.
#[test]
fn authentication_may_be_repeated_while_connected() {
    let broker = broker();
    let mut client = enter(&broker);
    client.subscribe("t", 0);
    for _ in 0..3 {
        client.send_raw(&auth(0x19, "ping", ""));
        check_challenged(&mut client);
        client.publish(&Message::new("t", "meanwhile"));
        assert_eq!(client.message().text(), "meanwhile");
        client.send_raw(&auth(0x18, "ping", "pong"));
        let got = client.recv();
        assert!(matches!(&got, Got::Auth(0, Some(method), _) if method == "ping"), "{got:?}");
    }
    client.send_raw(&auth(0x19, "pong", ""));
    client.check_ended(0x82);
}

/// [MQTT-4.12.1-2] (5.0).
#[test]
fn failed_re_authentication_ends_the_connection() {
    let broker = broker();
    let mut client = enter(&broker);
    client.send_raw(&auth(0x19, "ping", ""));
    check_challenged(&mut client);
    client.send_raw(&auth(0x18, "ping", "peng"));
    client.check_ended(0x87);
}

/// MQTT 5.0 §4.12.1: an answer to no challenge, or a second beginning.
#[test]
fn re_authentication_out_of_turn_is_a_protocol_error() {
    let broker = broker();
    let mut client = enter(&broker);
    client.send_raw(&auth(0x18, "ping", "pong"));
    client.check_ended(0x82);
    let mut client = enter(&broker);
    client.send_raw(&auth(0x19, "ping", ""));
    check_challenged(&mut client);
    client.send_raw(&auth(0x19, "ping", ""));
    client.check_ended(0x82);
}

/// MQTT 5.0 §3.1.3.5, §3.1.3.6; 3.1.1 §3.2.2.3: 0x86, and 4.
#[test]
fn wrong_password_is_told_in_the_version_of_the_client() {
    let broker = broker();
    for (version, code) in [(V5, 0x86), (Version::V311, 4), (Version::V31, 4)] {
        let with = |name: &str, word: &str| Options {
            username: Some(name.into()),
            password: Some(word.into()),
            ..Options::new(version, "c")
        };
        broker.check_refused(&with("alice", "wrong"), code);
        broker.check_refused(&with("bob", "secret"), code);
        broker.connect(&with("alice", "secret")).ping();
    }
}
