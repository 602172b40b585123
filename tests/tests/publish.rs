//! PUBLISH, its acknowledgements, retained messages, delivery. MQTT 5.0 and 3.1.1 §3.3 to §3.7, §4.3 to §4.6.

use std::time::Duration;

use wasmqtt_protocol::codec::Packet;
use wasmqtt_tests::{
    BOTH, Broker, Client, Got, Message, Options, RetainHandling, SubscribeOptions, Version, at_most, raw,
};

const V311: Version = Version::V311;
const V5: Version = Version::V5;

fn pair(broker: &Broker, version: Version) -> (Client, Client) {
    (broker.connect(&Options::new(version, "publisher")), broker.connect(&Options::new(version, "subscriber")))
}

/// [MQTT-3.8.4-8], [MQTT-3.3.4-1], [MQTT-3.3.2-3], [MQTT-4.3.1-1], [MQTT-4.3.2-4], [MQTT-4.3.3-8], [MQTT-2.2.1-2],
/// [MQTT-2.2.1-4], [MQTT-2.2.1-5] (5.0); [MQTT-3.8.4-6], [MQTT-3.3.4-1], [MQTT-3.3.2-3], [MQTT-4.3.1-1],
/// [MQTT-4.3.2-2], [MQTT-4.3.3-2], [MQTT-2.3.1-4], [MQTT-2.3.1-5], [MQTT-2.3.1-6] (3.1.1).
#[test]
fn all_qos_pairs_are_delivered_at_the_lower_one() {
    let broker = Broker::start("");
    for from in BOTH {
        for to in BOTH {
            let mut publisher = broker.connect(&Options::new(from, "publisher"));
            let mut subscriber = broker.connect(&Options::new(to, "subscriber"));
            for published in [0, 1, 2] {
                for subscribed in [0, 1, 2] {
                    assert_eq!(subscriber.subscribe("a/+", subscribed), subscribed);
                    let text = format!("{published} {subscribed}");
                    assert_eq!(publisher.publish(&Message::new("a/b", &text).qos(published)), 0);
                    let message = subscriber.message();
                    let qos = published.min(subscribed);
                    assert_eq!((message.topic.as_str(), message.text(), message.qos), ("a/b", text.as_str(), qos));
                    assert_eq!(message.id > 0, qos > 0);
                    assert_eq!((message.dup, message.retain), (false, false));
                }
            }
        }
    }
}

/// [MQTT-4.3.3-10], [MQTT-4.3.3-11], [MQTT-4.3.3-12], [MQTT-3.3.1-3] (5.0); [MQTT-4.3.3-2], [MQTT-3.3.1-3] (3.1.1).
#[test]
fn qos_2_message_sent_twice_is_delivered_once() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        subscriber.subscribe("t", 2);
        let message = Message::new("t", "once").qos(2).id(7);
        for message in [message.clone(), message.clone().dup(), message.clone()] {
            publisher.send_publish(&message);
            assert!(matches!(publisher.recv(), Got::Pubrec(7, 0)));
        }
        publisher.ack(Packet::Pubrel, 7, 0);
        assert_eq!(publisher.recv(), Got::Pubcomp(7, 0));
        let got = subscriber.message();
        assert_eq!((got.text(), got.dup), ("once", false));
        subscriber.check_silent();
        // After PUBCOMP the identifier is free; a DUP flag of the publisher is not passed on.
        publisher.publish(&Message::new("t", "new").qos(2).id(7).dup());
        let got = subscriber.message();
        assert_eq!((got.text(), got.dup), ("new", false));
    }
}

/// The same over two Network Connections. [MQTT-4.3.3-10] (5.0), [MQTT-4.3.3-2], [MQTT-3.1.2-4] (3.1.1),
/// [MQTT-3.1.2-5] (5.0).
#[test]
fn qos_2_message_sent_again_after_a_reconnect_is_delivered_once() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut subscriber = broker.connect(&Options::new(version, "subscriber"));
        subscriber.subscribe("t", 2);
        let options = Options::new(version, "publisher").resume();
        let mut publisher = broker.connect(&options);
        publisher.send_publish(&Message::new("t", "once").qos(2).id(7));
        assert_eq!(publisher.recv(), Got::Pubrec(7, 0));
        publisher.vanish();
        let mut publisher = broker.connect(&options);
        publisher.send_publish(&Message::new("t", "once").qos(2).id(7).dup());
        assert_eq!(publisher.recv(), Got::Pubrec(7, 0));
        publisher.vanish();
        let mut publisher = broker.connect(&options);
        publisher.ack(Packet::Pubrel, 7, 0);
        assert_eq!(publisher.recv(), Got::Pubcomp(7, 0));
        assert_eq!(subscriber.message().text(), "once");
        subscriber.check_silent();
        publisher.disconnect();
        broker.connect(&Options::new(version, "publisher")).disconnect();
    }
}

/// [MQTT-4.3.2-5] (5.0), [MQTT-4.3.2-2] (3.1.1): an identifier is free once PUBACK was sent.
#[test]
fn qos_1_identifier_used_again_is_a_new_message() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        subscriber.subscribe("t", 1);
        for text in ["first", "second"] {
            publisher.publish(&Message::new("t", text).qos(1).id(7));
        }
        assert_eq!(subscriber.texts(2), ["first", "second"]);
    }
}

/// [MQTT-3.3.1-1], [MQTT-4.3.2-1], [MQTT-4.3.2-2], [MQTT-4.3.2-3], [MQTT-4.3.3-1], [MQTT-4.3.3-2], [MQTT-4.3.3-3],
/// [MQTT-4.4.0-1], [MQTT-4.6.0-1] (5.0); [MQTT-3.3.1-1], [MQTT-2.3.1-3], [MQTT-4.3.2-1], [MQTT-4.3.3-1],
/// [MQTT-4.4.0-1], [MQTT-4.6.0-1] (3.1.1).
#[test]
fn unacknowledged_messages_are_sent_again_with_dup_after_a_reconnect() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let options = Options::new(version, "subscriber").resume();
        let mut subscriber = broker.connect(&options);
        subscriber.subscribe("t", 2);
        let mut sent = Vec::new();
        for (index, qos) in [1, 2, 1, 2].into_iter().enumerate() {
            publisher.publish(&Message::new("t", index.to_string()).qos(qos));
            sent.push(subscriber.recv_publish());
            assert!(!sent[index].dup);
        }
        // No retry while the connection lasts.
        subscriber.check_silent();
        subscriber.vanish();
        let mut subscriber = broker.connect(&options);
        let again: Vec<_> = (0..4).map(|_| subscriber.recv_publish()).collect();
        for (before, after) in sent.iter().zip(&again) {
            assert_eq!(*after, Message { dup: true, ..before.clone() });
        }
        // Acknowledged now: not sent a third time.
        for message in &again {
            if message.qos == 1 {
                subscriber.ack(Packet::Puback, message.id, 0);
            } else {
                subscriber.ack(Packet::Pubrec, message.id, 0);
                assert_eq!(subscriber.recv(), Got::Pubrel(message.id, 0));
                subscriber.ack(Packet::Pubcomp, message.id, 0);
            }
        }
        subscriber.ping();
        subscriber.vanish();
        let mut subscriber = broker.connect(&options);
        subscriber.check_silent();
        subscriber.disconnect();
        broker.connect(&Options::new(version, "subscriber")).disconnect();
    }
}

/// [MQTT-4.3.3-4], [MQTT-4.3.3-5], [MQTT-4.3.3-6], [MQTT-4.4.0-1], [MQTT-4.6.0-4] (5.0);
/// [MQTT-4.3.3-1], [MQTT-4.4.0-1], [MQTT-4.6.0-4] (3.1.1).
#[test]
fn pubrel_is_sent_again_after_a_reconnect_and_the_message_is_not() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let options = Options::new(version, "subscriber").resume();
        let mut subscriber = broker.connect(&options);
        subscriber.subscribe("t", 2);
        publisher.publish(&Message::new("t", "1").qos(2));
        publisher.publish(&Message::new("t", "2").qos(2));
        let ids = [subscriber.recv_publish().id, subscriber.recv_publish().id];
        for id in ids {
            subscriber.ack(Packet::Pubrec, id, 0);
        }
        for id in ids {
            assert_eq!(subscriber.recv(), Got::Pubrel(id, 0));
        }
        subscriber.vanish();
        let mut subscriber = broker.connect(&options);
        for id in ids {
            assert_eq!(subscriber.recv(), Got::Pubrel(id, 0));
            subscriber.ack(Packet::Pubcomp, id, 0);
        }
        subscriber.check_silent();
        subscriber.disconnect();
        broker.connect(&Options::new(version, "subscriber")).disconnect();
    }
}

/// [MQTT-4.4.0-2] (5.0), and 0x80 and above in PUBREC ends the exchange. [MQTT-4.3.3-4]
#[test]
fn messages_the_client_refused_are_not_sent_again() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let options = Options::new(V5, "subscriber").resume();
    let mut subscriber = broker.connect(&options);
    subscriber.subscribe("t", 2);
    for qos in [1, 2] {
        publisher.publish(&Message::new("t", "unwanted").qos(qos));
        let message = subscriber.recv_publish();
        let kind = if qos == 1 { Packet::Puback } else { Packet::Pubrec };
        subscriber.ack(kind, message.id, 0x83);
    }
    subscriber.check_silent();
    subscriber.vanish();
    broker.connect(&options).check_silent();
}

/// PUBREL for what the server does not know, and acknowledgements nobody waits for. MQTT 5.0 §3.6.2.1
/// [MQTT-3.6.2-1], §3.7.2.1 [MQTT-3.7.2-1]; MQTT 3.1.1 §4.3.3.
#[test]
fn acknowledgements_without_a_message_do_no_harm() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        let unknown = if version == V5 { 0x92 } else { 0 };
        client.ack(Packet::Pubrel, 9, 0);
        assert_eq!(client.recv(), Got::Pubcomp(9, unknown));
        client.ack(Packet::Puback, 9, 0);
        client.ack(Packet::Pubcomp, 9, 0);
        client.ack(Packet::Pubrec, 9, 0);
        assert_eq!(client.recv(), Got::Pubrel(9, unknown));
        client.ping();
    }
}

/// [MQTT-4.6.0-5], [MQTT-4.6.0-6], [MQTT-4.6.0-2], [MQTT-4.6.0-3] (5.0); [MQTT-4.6.0-2], [MQTT-4.6.0-3],
/// [MQTT-4.6.0-5], [MQTT-4.6.0-6] (3.1.1).
#[test]
fn messages_of_a_topic_and_their_acknowledgements_keep_their_order() {
    const COUNT: u16 = 300;
    let broker = Broker::start("");
    for version in BOTH {
        for qos in [0, 1, 2] {
            let (mut publisher, mut subscriber) = pair(&broker, version);
            subscriber.subscribe("t", 2);
            for id in 1..=COUNT {
                publisher.send_publish(&Message::new("t", id.to_string()).qos(qos).id(if qos == 0 { 0 } else { id }));
            }
            let mut released = 0;
            for id in (1..=COUNT).filter(|_| qos > 0) {
                let expected = if qos == 1 { Got::Puback(id, 0) } else { Got::Pubrec(id, 0) };
                assert_eq!(publisher.recv(), expected);
            }
            for id in (1..=COUNT).filter(|_| qos == 2) {
                publisher.ack(Packet::Pubrel, id, 0);
                released += 1;
                assert_eq!(publisher.recv(), Got::Pubcomp(id, 0));
            }
            assert_eq!(released, if qos == 2 { COUNT } else { 0 });
            for id in 1..=COUNT {
                assert_eq!(subscriber.message().text(), id.to_string());
            }
        }
    }
}

/// [MQTT-3.3.1-5], [MQTT-3.3.1-9] (5.0); [MQTT-3.3.1-5], [MQTT-3.3.1-6], [MQTT-3.3.1-8], [MQTT-3.3.1-9] (3.1.1).
#[test]
fn last_retained_message_goes_to_new_subscriptions() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        subscriber.subscribe("r/1", 1);
        publisher.publish(&Message::new("r/1", "old").retained().qos(1));
        let live = subscriber.message();
        assert_eq!((live.text(), live.retain), ("old", false), "to an established subscription");
        publisher.publish(&Message::new("r/1", "new").retained().qos(1));
        assert_eq!(subscriber.message().text(), "new");
        publisher.publish(&Message::new("r/2", "other").retained());
        // Answered behind the message: QoS 0 has no answer of its own.
        publisher.ping();
        let mut late = broker.connect(&Options::new(version, "late"));
        late.subscribe("r/+", 2);
        let mut got = [late.message(), late.message()];
        got.sort_by(|a, b| a.topic.cmp(&b.topic));
        let seen = got.each_ref().map(|m| (m.topic.as_str(), m.text(), m.qos, m.retain));
        assert_eq!(seen, [("r/1", "new", 1, true), ("r/2", "other", 0, true)]);
        late.check_silent();
        publisher.publish(&Message::new("r/1", "").retained().qos(1));
        publisher.publish(&Message::new("r/2", "").retained().qos(1));
    }
}

/// [MQTT-3.3.1-6], [MQTT-3.3.1-7], [MQTT-3.3.1-8] (5.0); [MQTT-3.3.1-10], [MQTT-3.3.1-11], [MQTT-3.3.1-12] (3.1.1).
#[test]
fn empty_retained_message_removes_and_is_not_kept() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        let late = |expected: Option<&str>| {
            let mut late = broker.connect(&Options::new(version, "late"));
            late.subscribe("r", 1);
            match expected {
                Some(text) => assert_eq!(late.message().text(), text),
                None => late.check_silent(),
            }
        };
        publisher.publish(&Message::new("r", "kept").retained().qos(1));
        // Neither of these touches it.
        publisher.publish(&Message::new("r", "passing").qos(1));
        publisher.publish(&Message::new("r", "").qos(1));
        late(Some("kept"));
        subscriber.subscribe("r", 1);
        assert_eq!(subscriber.message().text(), "kept");
        publisher.publish(&Message::new("r", "").retained().qos(1));
        let live = subscriber.message();
        assert_eq!((live.text(), live.retain), ("", false), "subscribers see it as any other");
        late(None);
    }
}

/// A retained message of QoS 0 takes the place of one of QoS 1. [MQTT-3.3.1-5] (5.0), [MQTT-3.3.1-7] (3.1.1); it is no
/// part of a Session: [MQTT-3.1.2-7] (3.1.1).
#[test]
fn retained_messages_outlive_the_session_that_published_them() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        publisher.publish(&Message::new("r", "one").retained().qos(1));
        publisher.publish(&Message::new("r", "zero").retained());
        publisher.ping();
        publisher.disconnect();
        subscriber.subscribe("r", 2);
        let message = subscriber.message();
        assert_eq!((message.text(), message.qos, message.retain), ("zero", 0, true));
        subscriber.check_silent();
        subscriber.publish(&Message::new("r", "").retained().qos(1));
    }
}

/// [MQTT-3.3.1-9], [MQTT-3.3.1-10], [MQTT-3.3.1-11], [MQTT-3.8.4-4] (5.0).
#[test]
fn retain_handling_decides_who_gets_retained_messages() {
    let broker = Broker::start("");
    let (mut publisher, mut client) = pair(&broker, V5);
    publisher.publish(&Message::new("r", "kept").retained().qos(1));
    let with = |handling| SubscribeOptions { retain_handling: handling, ..at_most(1) };
    let mut check = |handling, comes: bool| {
        client.subscribe_with(None, &[("r", with(handling))]);
        if comes {
            assert_eq!(client.message().text(), "kept");
        } else {
            client.check_silent();
        }
    };
    check(RetainHandling::DoNotSend, false);
    check(RetainHandling::SendIfNew, false);
    check(RetainHandling::Send, true);
    check(RetainHandling::Send, true);
    check(RetainHandling::SendIfNew, false);
    let mut fresh = broker.connect(&Options::new(V5, "fresh"));
    fresh.subscribe_with(None, &[("r", with(RetainHandling::SendIfNew))]);
    assert_eq!(fresh.message().text(), "kept");
}

/// [MQTT-3.3.1-12], [MQTT-3.3.1-13] (5.0).
#[test]
fn retain_as_published_keeps_the_flag() {
    let broker = Broker::start("");
    let (mut publisher, mut client) = pair(&broker, V5);
    for keeps in [false, true] {
        let options = SubscribeOptions { retain_as_published: keeps, ..at_most(1) };
        client.subscribe_with(None, &[("r", options)]);
        for retain in [false, true] {
            publisher.publish(&Message { retain, ..Message::new("r", "x").qos(1) });
            assert_eq!(client.message().retain, keeps && retain);
        }
        publisher.publish(&Message::new("r", "").retained().qos(1));
        client.message();
    }
}

/// [MQTT-3.8.3-3] (5.0).
#[test]
fn no_local_keeps_a_clients_own_messages_from_it() {
    let broker = Broker::start("");
    let (mut other, mut client) = pair(&broker, V5);
    client.subscribe_with(None, &[("t", SubscribeOptions { no_local: true, ..at_most(2) })]);
    other.subscribe("t", 2);
    for qos in [0, 1, 2] {
        client.publish(&Message::new("t", "mine").qos(qos));
        assert_eq!(other.message().text(), "mine");
    }
    client.check_silent();
    other.publish(&Message::new("t", "theirs").qos(1));
    assert_eq!(client.message().text(), "theirs");
    // An overlapping subscription without it still gets them.
    client.subscribe("#", 0);
    client.publish(&Message::new("t", "mine"));
    let message = client.message();
    assert_eq!((message.text(), message.qos), ("mine", 0));
}

/// [MQTT-3.3.4-2], [MQTT-3.3.4-3], [MQTT-3.3.4-4], [MQTT-3.3.4-5] (5.0), [MQTT-3.3.5-1] (3.1.1): one copy, of the
/// highest QoS, with all identifiers.
#[test]
fn overlapping_subscriptions_get_one_copy_at_the_highest_qos() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut client) = pair(&broker, version);
        let id = |id| (version == V5).then_some(id);
        client.subscribe_with(id(11), &[("a/#", at_most(0))]);
        client.subscribe_with(id(22), &[("a/+", at_most(2))]);
        client.subscribe_with(id(268_435_455), &[("a/b", at_most(1))]);
        client.subscribe_with(None, &[("+/b", at_most(0))]);
        client.subscribe_with(id(44), &[("b/#", at_most(2))]);
        publisher.publish(&Message::new("a/b", "x").qos(2));
        let mut message = client.message();
        assert_eq!(message.qos, 2);
        message.subscription_ids.sort_unstable();
        assert_eq!(message.subscription_ids, if version == V5 { vec![11, 22, 268_435_455] } else { vec![] });
        client.check_silent();
    }
}

/// The identifier goes with a retained message as well, and with a new SUBSCRIBE it changes. MQTT 5.0 §3.3.4, §3.8.4.
#[test]
fn subscription_identifier_is_that_of_the_last_subscribe() {
    let broker = Broker::start("");
    let (mut publisher, mut client) = pair(&broker, V5);
    publisher.publish(&Message::new("t", "kept").retained().qos(1));
    client.subscribe_with(Some(1), &[("t", at_most(1))]);
    assert_eq!(client.message().subscription_ids, [1]);
    client.subscribe_with(Some(2), &[("t", at_most(1))]);
    assert_eq!(client.message().subscription_ids, [2]);
    publisher.publish(&Message::new("t", "x"));
    assert_eq!(client.message().subscription_ids, [2]);
    client
        .subscribe_with(None, &[("t", SubscribeOptions { retain_handling: RetainHandling::DoNotSend, ..at_most(1) })]);
    publisher.publish(&Message::new("t", "x"));
    assert_eq!(client.message().subscription_ids, Vec::<u32>::new());
}

/// [MQTT-3.3.4-6] seen from the server (5.0).
#[test]
fn client_may_not_send_subscription_identifiers() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_raw(&raw::publish(V5, 0x30, b"t", None, &[0x0B, 1], b"x"));
    client.check_ended(0x82);
}

/// [MQTT-3.3.2-6] (5.0).
#[test]
fn message_expiry_is_forwarded_less_the_time_it_waited() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut online = broker.connect(&Options::new(V5, "online"));
    online.subscribe("t", 1);
    let options = Options::new(V5, "offline").resume();
    let mut offline = broker.connect(&options);
    offline.subscribe("t", 1);
    offline.vanish();
    publisher.publish(&Message::new("t", "x").qos(1).expiry(100).retained());
    assert_eq!(online.message().expiry, Some(100));
    std::thread::sleep(Duration::from_millis(2100));
    let mut late = broker.connect(&Options::new(V5, "late"));
    late.subscribe("t", 1);
    for client in [&mut broker.connect(&options), &mut late] {
        let left = client.message().expiry.expect("an interval");
        assert!((95..=98).contains(&left), "{left}");
    }
}

/// [MQTT-3.3.2-5] (5.0); for 3.1.1 subscribers as well.
#[test]
fn expired_messages_are_not_delivered() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for version in BOTH {
        let options = Options::new(version, "offline").resume();
        let mut offline = broker.connect(&options);
        offline.subscribe("t", 1);
        offline.vanish();
        publisher.publish(&Message::new("t", "short").qos(1).expiry(1));
        publisher.publish(&Message::new("t", "long").qos(1).expiry(100));
        publisher.publish(&Message::new("r", "short").qos(1).expiry(1).retained());
        std::thread::sleep(Duration::from_millis(2100));
        let mut back = broker.connect(&options);
        assert_eq!(back.message().text(), "long");
        back.subscribe("r", 1);
        back.check_silent();
        back.disconnect();
        broker.connect(&Options::new(version, "offline")).disconnect();
    }
}

/// [MQTT-4.3.3-7], [MQTT-4.3.3-13] (5.0).
#[test]
fn expiry_does_not_stop_what_was_begun() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let options = Options::new(V5, "subscriber").resume();
    let mut subscriber = broker.connect(&options);
    subscriber.subscribe("t", 2);
    publisher.publish(&Message::new("t", "1").qos(2).expiry(2));
    publisher.publish(&Message::new("t", "2").qos(2).expiry(2));
    let first = subscriber.recv_publish();
    let second = subscriber.recv_publish();
    subscriber.ack(Packet::Pubrec, first.id, 0);
    assert_eq!(subscriber.recv(), Got::Pubrel(first.id, 0));
    subscriber.vanish();
    std::thread::sleep(Duration::from_millis(3100));
    let mut subscriber = broker.connect(&options);
    let got = [subscriber.recv(), subscriber.recv()];
    assert!(got.contains(&Got::Pubrel(first.id, 0)), "{got:?}");
    assert!(got.iter().any(|got| matches!(got, Got::Publish(m) if m.id == second.id && m.dup)), "{got:?}");
}

/// [MQTT-3.3.2-4], [MQTT-3.3.2-15], [MQTT-3.3.2-16], [MQTT-3.3.2-17], [MQTT-3.3.2-18], [MQTT-3.3.2-20] (5.0), and they
/// do not confuse 3.1.1 subscribers.
#[test]
fn properties_are_forwarded_unaltered_and_in_order() {
    let broker = Broker::start("");
    let (mut publisher, mut subscriber) = pair(&broker, V5);
    let mut old = broker.connect(&Options::new(V311, "old"));
    subscriber.subscribe("t", 2);
    old.subscribe("t", 2);
    let full = Message {
        payload_format: Some(true),
        content_type: Some("text/plain; ü".into()),
        response_topic: Some("answers/here".into()),
        correlation_data: Some(vec![0, 255, 1]),
        ..Message::new("t", "x").user("b", "2").user("a", "1").user("b", "2").user("", "").user("a", "0")
    };
    for qos in [0, 1, 2] {
        for retain in [false, true] {
            let sent = Message { retain, ..full.clone().qos(qos) };
            publisher.publish(&sent);
            let got = subscriber.message();
            assert_eq!(got, Message { id: got.id, retain: false, ..sent.clone() });
            let plain = old.message();
            assert_eq!(plain, Message { id: plain.id, ..Message::new("t", "x").qos(qos) });
        }
        let mut late = broker.connect(&Options::new(V5, "late"));
        late.subscribe("t", 2);
        let got = late.message();
        assert_eq!(got, Message { id: got.id, ..full.clone().qos(qos).retained() });
    }
    let bare = Message { payload_format: Some(false), ..Message::new("t", "x") };
    publisher.publish(&bare);
    assert_eq!(subscriber.message(), bare);
}

/// [MQTT-3.2.2-11] seen from the server, MQTT 5.0 §3.2.2.3.4; 3.1.1 knows no limit and is closed.
#[test]
fn publish_above_the_maximum_qos_ends_the_connection() {
    let broker = Broker::start("[limits]\nmaximum_qos = 1\n");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        assert!(client.publish(&Message::new("t", "x").qos(1)) < 0x80);
        client.send_publish(&Message::new("t", "x").qos(2));
        client.check_ended(0x9B);
    }
}

/// [MQTT-3.2.2-14] seen from the server (5.0).
#[test]
fn retained_publish_ends_the_connection_where_nothing_is_retained() {
    let broker = Broker::start("[limits]\nretain_available = false\n");
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_publish(&Message::new("t", "x").retained());
    client.check_ended(0x9A);
}

/// [MQTT-3.3.2-2], [MQTT-4.7.0-1] (5.0); [MQTT-3.3.2-2], [MQTT-4.7.1-1] (3.1.1).
#[test]
fn wildcards_in_a_topic_name_end_the_connection() {
    let broker = Broker::start("");
    for version in BOTH {
        for topic in ["#", "a/#", "+", "a/+/b", "a+", "a#b"] {
            let mut client = broker.connect(&Options::new(version, "c"));
            client.send_raw(&raw::publish(version, 0x30, topic.as_bytes(), None, &[], b"x"));
            client.check_ended(0x90);
        }
    }
}

/// [MQTT-3.4.2-1], [MQTT-3.5.2-1] (5.0): 0x10 where nobody listens, or 0x00.
#[test]
fn message_without_subscribers_is_acknowledged() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        for qos in [1, 2] {
            let reason = client.publish(&Message::new("nobody", "x").qos(qos));
            assert!(reason == 0 || version == V5 && reason == 0x10, "0x{reason:02x}");
        }
    }
}

/// [MQTT-3.3.5-2] (3.1.1): acknowledged, and thrown away. 5.0 is told: 0x87.
#[test]
fn message_that_is_not_allowed_is_acknowledged_and_dropped() {
    let broker = Broker::start("");
    for (version, reason) in [(V311, 0), (V5, 0x87)] {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        subscriber.subscribe("$SYS/forged", 2);
        for qos in [1, 2] {
            assert_eq!(publisher.publish(&Message::new("$SYS/forged", "x").qos(qos)), reason);
        }
        subscriber.check_silent();
    }
}

/// [MQTT-4.3.3-9] (5.0): a PUBREC with an error ends the exchange, its identifier is free.
#[test]
fn identifier_of_a_refused_qos_2_message_is_free() {
    let broker = Broker::start("");
    let (mut publisher, mut subscriber) = pair(&broker, V5);
    subscriber.subscribe("t", 2);
    publisher.send_publish(&Message::new("$SYS/forged", "x").qos(2).id(5));
    assert_eq!(publisher.recv(), Got::Pubrec(5, 0x87));
    assert_eq!(publisher.publish(&Message::new("t", "x").qos(2).id(5)), 0);
    assert_eq!(subscriber.message().text(), "x");
}

/// Two publishers and two subscribers do not mix their identifiers. [MQTT-2.2.1-4] (5.0), [MQTT-2.3.1-4] (3.1.1).
#[test]
fn packet_identifiers_belong_to_one_session_and_direction() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut one, mut two) = pair(&broker, version);
        one.subscribe("t", 2);
        two.subscribe("t", 2);
        for client in [&mut one, &mut two] {
            client.send_publish(&Message::new("t", "x").qos(2).id(1));
            client.recv_where(|got| matches!(got, Got::Pubrec(1, 0)).then_some(()));
        }
        for client in [&mut one, &mut two] {
            client.ack(Packet::Pubrel, 1, 0);
            client.recv_where(|got| matches!(got, Got::Pubcomp(1, 0)).then_some(()));
            let messages = [client.recv_publish(), client.recv_publish()];
            assert_ne!(messages[0].id, messages[1].id);
            assert!(messages.iter().all(|message| message.id > 0));
        }
    }
}

/// MQTT 5.0 and 3.1.1 §3.3.3: a payload of no bytes is valid.
#[test]
fn empty_payload_is_delivered() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut subscriber) = pair(&broker, version);
        subscriber.subscribe("t", 2);
        for qos in [0, 1, 2] {
            publisher.publish(&Message::new("t", "").qos(qos));
            let message = subscriber.message();
            assert_eq!((message.payload.len(), message.qos), (0, qos));
        }
    }
}

/// [MQTT-4.5.0-1] (5.0), [MQTT-4.5.0-1] (3.1.1): everyone with a matching subscription gets it, the publisher too.
#[test]
fn every_matching_session_gets_the_message() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.subscribe("t/1", 0);
    let mut subscribers: Vec<_> = (0..10)
        .map(|index| {
            let mut client = broker.connect(&Options::new(BOTH[index % 2], &format!("s{index}")));
            client.subscribe(["t/1", "t/+", "#", "+/1", "t/#"][index % 5], (index % 3) as u8);
            client
        })
        .collect();
    publisher.publish(&Message::new("t/1", "all").qos(2));
    assert_eq!(publisher.message().qos, 0);
    for (index, client) in subscribers.iter_mut().enumerate() {
        let message = client.message();
        assert_eq!((message.text(), message.qos), ("all", (index % 3) as u8));
    }
}
