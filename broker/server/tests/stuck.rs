//! A shard that hangs, and a client that does not read: what is for them is bounded, and others go on.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use wasmqtt_protocol::codec::Qos;
use wasmqtt_protocol::ports::{
    AuthOutcome, AuthRequest, AuthStep, Broker as Port, Call, Interest, Memory, Outgoing, Plugins, Refusal,
    ShardPlugins,
};

use self::common::{Broker, CONNACK, Client, PINGRESP, PUBACK, PUBLISH, SUBACK, publish};

/// Bytes of a mailbox beyond which nothing more is sent to it.
const MAILBOX_BYTES: usize = 16 << 20;

/// Has the shard hang that gets a message for `stuck`, for as long as it is told to.
#[derive(Clone, Default)]
struct Stuck(Arc<AtomicBool>, Arc<Mutex<Option<Arc<dyn Port>>>>);

impl Plugins for Stuck {
    fn attach(&self, broker: Arc<dyn Port>) {
        *self.1.lock().unwrap() = Some(broker);
    }
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(self.clone())
    }
}

impl ShardPlugins for Stuck {
    fn has_auth(&self) -> bool {
        false
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
    fn interest(&self, topic: &str) -> Interest {
        while topic == "stuck" && self.0.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Interest::default()
    }
}

impl Stuck {
    /// The shard of that client hangs from now on.
    fn hang(&self, client: &mut Client) {
        self.0.store(true, Ordering::SeqCst);
        client.publish("stuck", 0, false);
        client.send(0xc0, &[]);
        client.expect_silence();
    }

    fn go_on(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

fn connect(broker: &Broker, client_id: &str) -> Client {
    let mut client = broker.connect(client_id, true);
    client.expect(CONNACK);
    client
}

/// A plugin that publishes is told that the broker is busy.
#[test]
fn a_plugin_is_refused_when_the_mailbox_is_full() {
    let stuck = Stuck::default();
    let broker = Broker::start(Arc::new(stuck.clone()), Arc::new(Memory));
    let mut client = connect(&broker, "client");
    client.subscribe("t", 0);
    client.expect(SUBACK);
    let port = stuck.1.lock().unwrap().clone().unwrap();
    let send = || {
        port.publish(Outgoing {
            origin: 1,
            topic: "t".into(),
            payload: Bytes::from(vec![b'x'; 60_000]),
            properties: Bytes::new(),
            qos: Qos::AtMostOnce,
            retain: false,
            expiry: None,
        })
    };
    stuck.hang(&mut client);
    let taken = (0..1000).take_while(|_| send().is_ok()).count();
    assert!((MAILBOX_BYTES / 61_000..=MAILBOX_BYTES / 60_000 + 1).contains(&taken), "{taken} messages");
    assert!(matches!(send(), Err(Refusal::Busy)));
    stuck.go_on();
    client.expect(PINGRESP);
    client.expect(PUBLISH);
    send().unwrap();
}

/// A client of another shard is not read while its messages would wait there.
#[test]
fn senders_are_not_read_when_the_mailbox_is_full() {
    /// What one turn reads of a client.
    const TURN_BYTES: usize = 17 * 64 * 1024;
    let stuck = Stuck::default();
    let broker = Broker::start_with(Arc::new(stuck.clone()), Arc::new(Memory), 2);
    let mut clients: Vec<Client> = (0..8).map(|n| connect(&broker, &format!("c{n}"))).collect();
    let (first, others) = clients.split_first_mut().unwrap();
    first.subscribe("t", 0);
    first.expect(SUBACK);
    stuck.hang(first);
    let is_answered = |client: &mut Client| {
        client.send(0xc0, &[]);
        client.next(Duration::from_millis(500)).is_some()
    };
    let sender = others.iter_mut().find_map(|client| is_answered(client).then_some(client)).expect("on another shard");
    let written = sender.stuff(&publish(PUBLISH, "t", None, &[b'x'; 10_000]));
    let taken = written - sender.bytes_in_kernel();
    assert!((MAILBOX_BYTES / 2..MAILBOX_BYTES + TURN_BYTES).contains(&taken), "{taken} of {written} bytes were read");
    stuck.go_on();
    first.expect(PINGRESP);
}

/// Towards a client that does not read, QoS 0 is dropped and counted beyond `outbound_bytes_max`, and QoS 1 waits in the
/// queue. MQTT 5.0 and 3.1.1 §4.3.1, §4.3.2.
#[test]
fn a_client_that_does_not_read_misses_qos_0_only() {
    const MESSAGES: usize = 3000;
    const LASTING: usize = 50;
    let broker = Broker::start_config(Arc::new(Stuck::default()), Arc::new(Memory), |config| {
        config.sys_interval = Duration::from_millis(100);
    });
    let mut watcher = connect(&broker, "watcher");
    watcher.subscribe("$SYS/broker/messages/dropped", 0);
    watcher.expect(SUBACK);
    let mut slow = connect(&broker, "slow");
    slow.subscribe("t", 1);
    slow.expect(SUBACK);
    let mut publisher = connect(&broker, "publisher");
    for n in 0..MESSAGES {
        publisher.write(&publish(PUBLISH, "t", None, &[b'0'; 10_000]));
        if n % (MESSAGES / LASTING) == 0 {
            publisher.write(&publish(PUBLISH | 2, "t", Some(7), b"1"));
            publisher.expect(PUBACK);
        }
    }
    let dropped = watcher.settled();
    let (mut passed, mut lasted) = (0, 0);
    while let Some((PUBLISH, body)) = slow.next(Duration::from_millis(500)) {
        match body.last() {
            Some(b'0') => passed += 1,
            _ => lasted += 1,
        }
    }
    assert!(dropped > 0 && passed > 0, "{dropped} were dropped, {passed} passed");
    assert_eq!((passed + dropped, lasted), (MESSAGES, LASTING));
}
