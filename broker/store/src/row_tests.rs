//! Rows survive, and any bytes are a row or none.

use std::num::NonZeroU64;

use bytes::Bytes;
use proptest::collection::vec;
use proptest::prelude::*;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{Client, Receiver};
use wasmqtt_protocol::router::Message;
use wasmqtt_protocol::session::{WillMessage, Wish};

use super::rows::{MessageRow, Put, put_message, put_retained, put_session, read_any, take_retained, take_session};

fn qos() -> impl Strategy<Value = Qos> {
    (0_u8..3).prop_map(|bits| Qos::from_bits(bits).expect("a QoS"))
}

fn message() -> impl Strategy<Value = Message> {
    let bytes = || vec(any::<u8>(), 0..50);
    (".{0,20}", bytes(), bytes(), qos(), any::<bool>(), any::<Option<u64>>()).prop_map(
        |(topic, payload, properties, qos, retain, expires_at_ms)| Message {
            topic: topic.as_str().into(),
            payload: payload.into(),
            properties: Bytes::from(properties),
            qos,
            retain,
            expires_at_ms,
            publisher: None,
        },
    )
}

fn same(a: &Message, b: &Message) -> bool {
    let parts =
        |m: &Message| (m.topic.to_string(), m.payload.clone(), m.properties.clone(), m.qos, m.retain, m.expires_at_ms);
    parts(a) == parts(b)
}

proptest! {
    #[test]
    fn messages_survive(message in message(), sealed in any::<bool>(), sessions in vec((1..u64::MAX, qos()), 0..5)) {
        let receivers: Vec<Receiver<'_>> = sessions.iter().map(|(session, qos)| Receiver {
            session: NonZeroU64::new(*session).expect("not zero"),
            wish: Wish { qos: *qos, retain: sealed, ids: &[], id: None },
        }).collect();
        let mut row = Vec::new();
        put_message(&mut row, (&message).into(), sealed, &receivers);
        let parsed = MessageRow::parse(&row).expect("a row");
        let found = parsed.receivers().expect("receivers");
        prop_assert_eq!((parsed.sealed(), parsed.expires_at_ms()), (sealed, message.expires_at_ms));
        prop_assert!(same(&parsed.message(found.payload), &message));
        let found: Vec<(u64, Qos)> = found.to.iter().map(|to| (to.session.get(), to.qos)).collect();
        prop_assert_eq!(found, sessions);
    }

    #[test]
    fn retained_messages_and_wills_survive(message in message(), sealed in any::<bool>(), stamp in any::<u64>(), now in any::<u64>()) {
        let mut row = Vec::new();
        put_retained(&mut row, (&message).into(), sealed, stamp, now);
        let found = take_retained(message.topic.as_bytes(), &row).expect("a row");
        prop_assert!(same(&found.message, &message));
        let written_ms = if message.expires_at_ms.is_some() { now } else { 0 };
        prop_assert_eq!((found.sealed, found.stamp, found.written_ms), (sealed, stamp, written_ms));

        let client = Client { client_id: "c".into(), principal: "p".into(), listener: "l".into() };
        let will = WillMessage { message: message.clone(), expiry: Some(3), delay: 4 };
        for will in [None, Some(&will)] {
            let mut row = Vec::new();
            put_session(&mut row, &client, 5, Some(7), will, now);
            let found = take_session(&row).expect("a row");
            prop_assert_eq!((found.expiry, found.closed_at_ms, found.written_ms), (5, Some(7), now));
            prop_assert_eq!(found.will.is_some(), will.is_some());
            prop_assert!(found.will.is_none_or(|will| same(&will.message, &message) && will.delay == 4));
        }
    }

    /// Of the first schema, which had no times of writing.
    #[test]
    fn rows_of_older_brokers_are_read(message in message()) {
        let mut row = Vec::new();
        put_message(&mut row, (&message).into(), false, &[]);
        // Head and expiry are the same; a retained row has neither topic nor receivers.
        let head = 1 + if message.expires_at_ms.is_some() { 8 } else { 0 };
        let mut old = row[..head].to_vec();
        old.put_blob(&message.properties);
        old.extend_from_slice(&message.payload);
        let found = take_retained(message.topic.as_bytes(), &old).expect("a row");
        prop_assert!(same(&found.message, &message));
        prop_assert_eq!((found.stamp, found.written_ms), (0, 0));
    }

    #[test]
    fn any_bytes_are_a_row_or_none(family in 0_usize..12, key in vec(any::<u8>(), 0..40), row in vec(any::<u8>(), 0..80)) {
        read_any(family, &key, &row);
    }

    /// A damaged row is read to its end or not at all.
    #[test]
    fn rows_that_are_cut_off_are_none_or_another(message in message(), cut in any::<prop::sample::Index>()) {
        let mut row = Vec::new();
        put_message(&mut row, (&message).into(), false, &[]);
        row.truncate(cut.index(row.len()));
        if let Some(parsed) = MessageRow::parse(&row) {
            prop_assert!(parsed.receivers().is_some_and(|found| found.payload.len() <= message.payload.len()));
        }
    }
}
