//! SUBSCRIBE, UNSUBSCRIBE, Topic Filters, Shared Subscriptions. MQTT 5.0 §3.8 to §3.11, §4.7, §4.8; 3.1.1 the same.

use std::time::{Duration, Instant};

use wasmqtt_protocol::codec::Packet;
use wasmqtt_tests::{BOTH, Broker, Client, Got, Message, Options, SubscribeOptions, Version, at_most, raw};

const V311: Version = Version::V311;
const V5: Version = Version::V5;

fn pair(broker: &Broker, version: Version) -> (Client, Client) {
    (broker.connect(&Options::new(version, "publisher")), broker.connect(&Options::new(version, "subscriber")))
}

fn invalid(version: Version) -> u8 {
    if version == V5 { 0x8F } else { 0x80 }
}

/// [MQTT-3.8.4-1], [MQTT-3.8.4-2], [MQTT-2.2.1-6], [MQTT-3.8.4-5], [MQTT-3.8.4-6], [MQTT-3.8.4-7], [MQTT-3.9.3-1],
/// [MQTT-3.9.3-2] (5.0); [MQTT-3.8.4-1], [MQTT-3.8.4-2], [MQTT-2.3.1-7], [MQTT-3.8.4-4], [MQTT-3.8.4-5],
/// [MQTT-3.9.3-1], [MQTT-3.9.3-2] (3.1.1). What is well formed and not taken has a code of its own.
#[test]
fn suback_has_a_code_for_each_filter_in_order() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        let bad = invalid(version);
        let deep = &vec!["t"; 201].join("/")[..];
        let cases = [
            ("a", 2, 2),
            ("$share", 1, bad),
            ("#", 0, 0),
            ("+/+/#", 1, 1),
            (deep, 2, bad),
            ("/", 2, 2),
            ("+", 1, 1),
            ("/+/", 0, 0),
        ];
        let filters: Vec<_> = cases.iter().map(|(filter, qos, _)| (*filter, at_most(*qos))).collect();
        let id = client.send_subscribe(None, &filters);
        assert_eq!(client.recv(), Got::Suback(id, cases.iter().map(|case| case.2).collect()));
        // What was refused has no effect, what was granted has.
        client.publish(&Message::new("a/x/b", "x"));
        assert_eq!(client.message().qos, 0);
    }
}

/// [MQTT-3.8.4-3], [MQTT-3.8.4-4], [MQTT-3.8.4-5] (5.0); [MQTT-3.8.4-3], [MQTT-3.8.4-4] (3.1.1).
#[test]
fn same_filter_replaces_the_subscription_and_sends_retained_messages_again() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut client) = pair(&broker, version);
        publisher.publish(&Message::new("t", "kept").retained().qos(2));
        for qos in [0, 2, 1] {
            client.subscribe("t", qos);
            let message = client.message();
            assert_eq!((message.text(), message.qos, message.retain), ("kept", qos, true));
            publisher.publish(&Message::new("t", "live").qos(2));
            let message = client.message();
            assert_eq!((message.text(), message.qos), ("live", qos));
            client.check_silent();
        }
        // Twice in one packet: the last one stands, and retained messages come once.
        client.unsubscribe(&["t"]);
        client.subscribe_with(None, &[("t", at_most(2)), ("t", at_most(0))]);
        let message = client.message();
        assert_eq!((message.text(), message.qos), ("kept", 0));
        client.check_silent();
        publisher.publish(&Message::new("t", "live").qos(2));
        assert_eq!(client.message().qos, 0);
        client.check_silent();
        publisher.publish(&Message::new("t", "").retained().qos(1));
    }
}

/// No message is lost while a subscription is being replaced. [MQTT-3.8.4-4] (5.0), [MQTT-3.8.4-3] (3.1.1).
#[test]
fn flow_of_messages_is_not_interrupted_by_subscribing_again() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut client) = pair(&broker, version);
        client.subscribe("t", 1);
        for index in 0..200 {
            publisher.send_publish(&Message::new("t", index.to_string()).qos(1));
            if index % 3 == 0 {
                client.send_subscribe(None, &[("t", at_most(1))]);
            }
        }
        let expected: Vec<_> = (0..200).map(|index| index.to_string()).collect();
        assert_eq!(client.texts(200), expected);
    }
}

/// [MQTT-3.10.4-1], [MQTT-3.10.4-2], [MQTT-3.10.4-4], [MQTT-3.10.4-5], [MQTT-3.10.4-6], [MQTT-3.11.3-1],
/// [MQTT-3.11.3-2] (5.0); [MQTT-3.10.4-1], [MQTT-3.10.4-2], [MQTT-3.10.4-4], [MQTT-3.10.4-5], [MQTT-3.10.4-6] (3.1.1).
#[test]
fn unsubscribe_ends_exactly_the_filters_it_names() {
    let broker = Broker::start("");
    for version in BOTH {
        let (mut publisher, mut client) = pair(&broker, version);
        client.subscribe_with(None, &[("a/+", at_most(1)), ("a/b", at_most(0)), ("c", at_most(0))]);
        // `a/#` and `A/b` match, but are not the same filter.
        let reasons = client.unsubscribe(&["a/#", "c", "A/b", "a/+", "a/+"]);
        let expected = [0x11, 0, 0x11, 0, 0x11];
        assert_eq!(reasons, if version == V5 { expected.to_vec() } else { vec![] });
        publisher.publish(&Message::new("c", "x"));
        publisher.publish(&Message::new("a/b", "x").qos(1));
        assert_eq!(client.message().qos, 0, "of a/b alone");
        client.check_silent();
        assert_eq!(client.unsubscribe(&["never/there"]).len(), usize::from(version == V5));
    }
}

/// [MQTT-3.10.4-3] (both).
#[test]
fn unsubscribe_does_not_stop_deliveries_that_have_begun() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let options = Options::new(version, "subscriber").resume();
        let mut client = broker.connect(&options);
        client.subscribe("t", 2);
        publisher.publish(&Message::new("t", "one").qos(1));
        publisher.publish(&Message::new("t", "two").qos(2));
        let one = client.recv_publish();
        let two = client.recv_publish();
        client.unsubscribe(&["t"]);
        client.vanish();
        let mut client = broker.connect(&options);
        for sent in [one, two] {
            let again = client.message();
            assert_eq!((again.id, again.dup, again.text()), (sent.id, true, sent.text()));
        }
        client.check_silent();
        client.disconnect();
        broker.connect(&Options::new(version, "subscriber")).disconnect();
    }
}

fn check_matches(filters: &[&str], topic: &str, expected: &[&str]) {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        for filter in filters {
            let mut client = broker.connect(&Options::new(version, "c"));
            assert_eq!(client.subscribe(filter, 0), 0, "{filter}");
            publisher.publish(&Message::new(topic, "x").qos(1));
            if expected.contains(filter) {
                assert_eq!(client.message().topic, topic, "{filter}");
            } else {
                client.check_silent();
            }
        }
    }
}

/// MQTT 5.0 and 3.1.1 §4.7.1, [MQTT-3.3.2-3] (both).
#[test]
fn wildcards_match_levels() {
    let filters = ["sport/tennis/player1/#", "sport/#", "#", "+/+", "sport/+", "+/tennis", "+", "sport/tennis", "/+"];
    check_matches(&filters, "sport/tennis", &["sport/#", "#", "+/+", "sport/+", "+/tennis", "sport/tennis"]);
    check_matches(&["sport/#", "sport/+", "sport", "+", "+/#"], "sport", &["sport/#", "sport", "+", "+/#"]);
    check_matches(&["/finance", "+/+", "/+", "+", "#", "/#"], "/finance", &["/finance", "+/+", "/+", "#", "/#"]);
    check_matches(&["a/+/b", "a//b", "a/b", "a/#", "+/+/+"], "a//b", &["a/+/b", "a//b", "a/#", "+/+/+"]);
}

/// [MQTT-4.7.2-1] (both).
#[test]
fn leading_wildcard_does_not_match_dollar_topics() {
    check_matches(&["#", "+/uptime", "+/#", "$other/+", "$other/#"], "$other/uptime", &["$other/+", "$other/#"]);
}

/// [MQTT-4.7.3-4], [MQTT-1.5.4-3] (5.0); [MQTT-4.7.3-4], [MQTT-1.5.3-3] (3.1.1): case, composed and decomposed letters,
/// a byte order mark, spaces and empty levels all make a difference.
#[test]
fn topics_are_compared_byte_by_byte() {
    check_matches(&["Åland", "A\u{30A}land", "åland"], "Åland", &["Åland"]);
    check_matches(&["\u{FEFF}a", "a"], "\u{FEFF}a", &["\u{FEFF}a"]);
    check_matches(&["a", "\u{FEFF}a", "A", " a", "a ", "a/", "/a"], "a", &["a"]);
    check_matches(&["\u{FFFF}/\u{1F600}", "\u{FFFD}/\u{1F600}"], "\u{FFFF}/\u{1F600}", &["\u{FFFF}/\u{1F600}"]);
}

/// [MQTT-4.7.3-3] (both).
#[test]
fn topics_of_65535_bytes_work() {
    let topic = "t".repeat(65_535);
    check_matches(&[&topic, "#"], &topic, &[&topic, "#"]);
}

/// What the broker says about itself: retained, below `$SYS`, not matched by `#`.
#[test]
fn sys_topics_tell_about_the_broker() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V311, "c"));
    client.subscribe("$SYS/#", 0);
    // The first ones are published while the broker starts: what comes now may be live.
    client.message();
    client.subscribe("$SYS/#", 0);
    let message = loop {
        let message = client.message();
        assert!(message.topic.starts_with("$SYS/broker/"), "{message:?}");
        if message.retain {
            break message;
        }
    };
    assert!(!message.payload.is_empty(), "{message:?}");
    let mut other = broker.connect(&Options::new(V5, "other"));
    other.subscribe("#", 0);
    other.check_silent();
}

/// [MQTT-4.8.2-1], [MQTT-4.8.2-2] (5.0).
#[test]
fn shared_subscription_has_a_share_name_and_a_filter() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        // Those that are ill-formed end the connection.
        assert_eq!(client.subscribe("$share", 1), invalid(version));
        for filter in ["$share/g/t", "$share/g/#", "$share/g//", "$share/g/$other/x"] {
            assert_eq!(client.subscribe(filter, 1), 1, "{filter}");
        }
    }
}

/// MQTT 5.0 §4.8.2; offered to 3.1.1 clients as well.
#[test]
fn each_message_goes_to_one_member_of_each_group() {
    const COUNT: usize = 60;
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let join = |group: &str, index: usize, filter: &str| {
            let mut client = broker.connect(&Options::new(version, &format!("{group}{index}")));
            assert_eq!(client.subscribe(filter, 1), 1);
            client
        };
        let mut groups = [
            (0..3).map(|index| join("one", index, "$share/one/t/#")).collect::<Vec<_>>(),
            (0..2).map(|index| join("two", index, "$share/two/t/#")).collect(),
            vec![join("plain", 0, "t/+")],
        ];
        for index in 0..COUNT {
            publisher.publish(&Message::new("t/1", index.to_string()).qos(1));
        }
        for group in &mut groups {
            let members = group.len();
            let shares = gather(group, COUNT);
            for own in &shares {
                assert!(own.is_sorted(), "{own:?}");
                // Round robin: nobody has much more than others.
                assert!(own.len().abs_diff(COUNT / members) <= 2, "{} of {COUNT}", own.len());
            }
            let mut seen = shares.concat();
            seen.sort_unstable();
            assert_eq!(seen, (0..COUNT).collect::<Vec<_>>(), "each once");
        }
    }
}

/// The numbers each member was sent, `count` of them together, and no more.
fn gather(members: &mut [Client], count: usize) -> Vec<Vec<usize>> {
    let mut shares = vec![Vec::new(); members.len()];
    let begun = Instant::now();
    while shares.iter().map(Vec::len).sum::<usize>() < count {
        assert!(begun.elapsed() < Duration::from_secs(20), "{shares:?}");
        for (member, share) in members.iter_mut().zip(&mut shares) {
            while let Some(got) = member.recv_within(Duration::from_millis(5)) {
                let Got::Publish(message) = got else { panic!("{got:?}") };
                member.ack(Packet::Puback, message.id, 0);
                share.push(message.text().parse().expect("number"));
            }
        }
    }
    members.iter_mut().for_each(Client::check_silent);
    shares
}

/// [MQTT-4.8.2-3] (5.0).
#[test]
fn members_of_a_group_get_messages_at_their_own_qos() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut members: Vec<_> = (0..3)
        .map(|qos| {
            let mut client = broker.connect(&Options::new(V5, &format!("m{qos}")));
            client.subscribe_with(Some(u32::from(qos) + 1), &[("$share/g/t", at_most(qos))]);
            client
        })
        .collect();
    for _ in 0..9 {
        publisher.publish(&Message::new("t", "x").qos(2));
    }
    for (qos, member) in (0..).zip(&mut members) {
        for _ in 0..3 {
            let message = member.message();
            assert_eq!((message.qos, &*message.subscription_ids), (qos, &[u32::from(qos) + 1][..]));
        }
    }
}

/// [MQTT-3.8.3-4] (5.0).
#[test]
fn no_local_on_a_shared_subscription_is_a_protocol_error() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.send_subscribe(None, &[("$share/g/t", SubscribeOptions { no_local: true, ..at_most(0) })]);
    client.check_ended(0x82);
}

/// MQTT 5.0 §4.8.2: a publisher may be a member; retained messages are not sent to Shared Subscriptions.
#[test]
fn shared_subscriptions_get_no_retained_messages_but_their_own() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        client.publish(&Message::new("t", "kept").retained().qos(1));
        client.subscribe("$share/g/t", 1);
        client.check_silent();
        client.publish(&Message::new("t", "live").qos(1));
        assert_eq!(client.message().text(), "live");
        // The same filter unshared is another subscription.
        client.subscribe("t", 1);
        assert_eq!(client.message().text(), "kept");
        client.publish(&Message::new("t", "both").qos(1));
        assert_eq!(client.texts(2), ["both", "both"]);
        let gone = client.unsubscribe(&["$share/other/t", "$share/g/t"]);
        assert!(version == V311 || gone == [0x11, 0], "{gone:?}");
        client.publish(&Message::new("t", "one").qos(1));
        assert_eq!(client.message().text(), "one");
        client.check_silent();
    }
}

fn member(broker: &Broker, version: Version, name: &str, lasting: bool) -> Client {
    let options = Options::new(version, name);
    let mut client = broker.connect(&if lasting { options.resume() } else { options });
    if !client.connack.session_present {
        assert_eq!(client.subscribe("$share/g/t", 2), 2);
    }
    client
}

/// MQTT 5.0 §4.8.2: QoS 1 messages a member did not acknowledge may go to another one when its Session ends.
#[test]
fn unacknowledged_messages_of_a_member_that_ends_go_to_another() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let mut first = member(&broker, version, "first", false);
        for index in 0..5 {
            publisher.publish(&Message::new("t", index.to_string()).qos(1));
            assert_eq!(first.recv_publish().text(), index.to_string());
        }
        let mut second = member(&broker, version, "second", false);
        first.vanish();
        assert_eq!(second.texts(5), ["0", "1", "2", "3", "4"]);
        second.disconnect();
    }
}

/// MQTT 5.0 §4.8.2: a member without a connection is passed over while there are others, and gets what nobody else can.
#[test]
fn members_that_are_away_are_passed_over() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let away = member(&broker, version, "away", true);
        away.vanish();
        let mut here = member(&broker, version, "here", false);
        for index in 0..10 {
            publisher.publish(&Message::new("t", index.to_string()).qos(1));
        }
        let expected: Vec<_> = (0..10).map(|index| index.to_string()).collect();
        assert_eq!(here.texts(10), expected);
        here.vanish();
        publisher.publish(&Message::new("t", "alone").qos(1));
        let mut back = member(&broker, version, "away", true);
        assert_eq!(back.message().text(), "alone");
        back.check_silent();
        back.disconnect();
        broker.connect(&Options::new(version, "away")).disconnect();
    }
}

/// A member that takes no more is passed over. MQTT 5.0 §4.8.2.
#[test]
fn members_at_their_receive_maximum_are_passed_over() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut narrow = broker.connect(&Options { receive_maximum: Some(1), ..Options::new(V5, "narrow") });
    let mut wide = broker.connect(&Options::new(V5, "wide"));
    narrow.subscribe("$share/g/t", 1);
    wide.subscribe("$share/g/t", 1);
    // One for each; then one of them is known to have all it may.
    for text in ["a", "b"] {
        publisher.publish(&Message::new("t", text).qos(1));
    }
    let held = narrow.recv_publish();
    let other = wide.message();
    assert_eq!(if held.text() == "a" { "b" } else { "a" }, other.text());
    for index in 0..20 {
        publisher.publish(&Message::new("t", index.to_string()).qos(1));
        assert_eq!(wide.message().text(), index.to_string());
    }
    narrow.ack(Packet::Puback, held.id, 0);
    narrow.check_silent();
}

/// [MQTT-4.8.2-4] (5.0).
#[test]
fn qos_2_message_of_a_member_waits_for_its_return() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let mut first = member(&broker, version, "first", true);
        publisher.publish(&Message::new("t", "begun").qos(2));
        let begun = first.recv_publish();
        let mut second = member(&broker, version, "second", false);
        first.vanish();
        second.check_silent();
        let mut first = member(&broker, version, "first", true);
        let again = first.message();
        assert_eq!((again.id, again.dup, again.text()), (begun.id, true, "begun"));
        first.disconnect();
        second.disconnect();
        broker.connect(&Options::new(version, "first")).disconnect();
    }
}

/// [MQTT-4.8.2-5] (5.0).
#[test]
fn qos_2_message_of_a_member_that_ends_goes_to_nobody_else() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut publisher = broker.connect(&Options::new(version, "publisher"));
        let mut first = member(&broker, version, "first", false);
        publisher.publish(&Message::new("t", "begun").qos(2));
        assert_eq!(first.recv_publish().qos, 2);
        let mut second = member(&broker, version, "second", false);
        first.vanish();
        second.check_silent();
        second.disconnect();
    }
}

/// [MQTT-4.8.2-6] (5.0).
#[test]
fn message_a_member_refused_goes_to_nobody_else() {
    let broker = Broker::start("");
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for qos in [1, 2] {
        let mut first = member(&broker, V5, "first", false);
        publisher.publish(&Message::new("t", "unwanted").qos(qos));
        let message = first.recv_publish();
        let mut second = member(&broker, V5, "second", false);
        first.ack(if qos == 1 { Packet::Puback } else { Packet::Pubrec }, message.id, 0x83);
        second.check_silent();
        first.vanish();
        second.check_silent();
        second.disconnect();
    }
}

/// Each level costs memory: 200 are enough. The standard sets no number, §4.7.1 lets a server refuse a filter.
#[test]
fn topics_of_more_than_200_levels_are_refused() {
    let broker = Broker::start("");
    for version in BOTH {
        let mut client = broker.connect(&Options::new(version, "c"));
        let deepest = vec!["t"; 200].join("/");
        assert_eq!(client.subscribe(&deepest, 1), 1);
        client.publish(&Message::new(&deepest, "deep").qos(1));
        assert_eq!(client.message().text(), "deep");
        let deeper = vec!["t"; 201].join("/");
        assert_eq!(client.subscribe(&deeper, 1), invalid(version));
        client.send_publish(&Message::new(&deeper, "too deep"));
        client.check_ended(0x90);
    }
}

/// Beyond `limits.subscriptions_max` new subscriptions are refused, and those that are there can be changed.
/// MQTT 5.0 §3.9.3, 3.1.1 §3.9.3.
#[test]
fn subscriptions_beyond_the_limit_are_refused() {
    let broker = Broker::start("[limits]\nsubscriptions_max = 2\n");
    for (version, refused) in [(Version::V311, 0x80), (Version::V5, 0x97)] {
        let mut client = broker.connect(&Options::new(version, "c"));
        assert_eq!(
            client.subscribe_with(None, &[("a", at_most(1)), ("b", at_most(1)), ("c", at_most(1))]),
            [1, 1, refused]
        );
        assert_eq!(client.subscribe_with(None, &[("a", at_most(0)), ("$share/g/a", at_most(0))]), [0, refused]);
        client.disconnect();
    }
}

/// `limits.filters_per_packet_max` is for UNSUBSCRIBE as well. MQTT 5.0 has a Reason Code for each filter, none of which
/// is Quota exceeded (§3.11.3, table 3-9); 3.x has none, and a filter that stays must not seem to be gone
/// [MQTT-3.10.4-1] (3.1.1), so that the connection ends and all stay.
#[test]
fn unsubscribe_is_bounded_in_filters() {
    let broker = Broker::start("[limits]\nfilters_per_packet_max = 20\n");
    for version in BOTH {
        let options = Options::new(version, "c").resume();
        let mut client = broker.connect(&options);
        let filters: Vec<String> = (0..30).map(|n| format!("t/{n}")).collect();
        let filters: Vec<&str> = filters.iter().map(String::as_str).collect();
        for filter in &filters {
            client.subscribe(filter, 0);
        }
        // The same filter many times counts once, and is there once.
        let packet = [&["t/0"; 10][..], &filters[..20]].concat();
        let expected = [&[0][..], &[0x11; 10], &[0; 19]].concat();
        assert_eq!(client.unsubscribe(&packet), if version == V5 { expected } else { Vec::new() });
        for filter in &filters[..20] {
            client.subscribe(filter, 0);
        }
        let mut left = filters.clone();
        if version == V5 {
            assert_eq!(client.unsubscribe(&filters), [[0; 20].as_slice(), &[0x83; 10]].concat());
            left = filters[20..].to_vec();
        } else {
            let entries: Vec<u8> = filters.iter().flat_map(raw::text).collect();
            client.send_raw(&raw::filters(version, 0xA2, 7, &[], &entries));
            client.check_ended(0x97);
            client = broker.connect(&options);
        }
        for filter in &filters {
            client.publish(&Message::new(filter, "x"));
        }
        let got: Vec<String> = left.iter().map(|_| client.message().topic).collect();
        assert_eq!(got, left, "{version:?}");
        client.check_silent();
        client.disconnect();
        broker.connect(&Options::new(version, "c")).disconnect();
    }
}
