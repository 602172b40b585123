//! Enhanced authentication where no plugin offers any. MQTT 5.0 §3.15, §4.12.

use wasmqtt_tests::{Broker, Options, Version, raw};

const V5: Version = Version::V5;

fn with_method() -> Options {
    let method = Some("SCRAM-SHA-1".into());
    Options {
        authentication_method: method,
        authentication_data: Some(b"client-first".into()),
        ..Options::new(V5, "c")
    }
}

/// [MQTT-4.12.0-1], [MQTT-4.12.0-4] (5.0).
#[test]
fn unknown_authentication_method_is_refused() {
    Broker::start("").check_refused(&with_method(), 0x8C);
}

/// [MQTT-4.12.0-6] (5.0).
#[test]
fn connack_names_no_method_that_the_client_did_not() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c"));
    assert_eq!(client.connack.authentication_method, None);
    client.check_silent();
}

/// [MQTT-4.12.0-7] seen from the server (5.0).
#[test]
fn auth_from_a_client_without_a_method_is_a_protocol_error() {
    let broker = Broker::start("");
    let method = [&[0x15][..], &raw::text("PLAIN")].concat();
    for reason in [0x18, 0x19] {
        let mut client = broker.connect(&Options::new(V5, "c"));
        client.send_raw(&raw::packet(0xF0, &[vec![reason], raw::properties(V5, &method)].concat()));
        client.check_ended(0x82);
    }
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_raw(&[0xF0, 0x00]);
    client.check_ended(0x82);
}

/// AUTH does not exist in 3.1.1. [MQTT-2.2.2-2], [MQTT-4.8.0-1] (3.1.1).
#[test]
fn auth_in_3_1_1_ends_the_connection() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(Version::V311, "c"));
    client.send_raw(&[0xF0, 0x00]);
    client.check_ended(0);
}

/// Without plugins names are not checked, unless anonymous clients are not allowed either. MQTT 5.0 §3.1.3.5.
#[test]
fn user_names_mean_nothing_without_a_plugin() {
    let named = Options { username: Some("alice".into()), password: Some(b"secret".into()), ..Options::new(V5, "c") };
    let broker = Broker::start("");
    broker.connect(&named).disconnect();
    broker.connect(&Options { version: Version::V311, ..named.clone() }).disconnect();
    let closed = Broker::start("[auth]\nanonymous = false\n");
    closed.check_refused(&named, 0x87);
    closed.check_refused(&Options { version: Version::V311, ..named }, 5);
}
