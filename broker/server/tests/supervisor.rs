//! A thread that panics is noticed.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Call, Memory, NoPlugins, Plugins, ShardPlugins};

use self::common::{Broker, CONNACK};

/// Panics on the thread of the shard when a client called `panic` comes.
struct Panics;

impl Plugins for Panics {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Self)
    }
}

impl ShardPlugins for Panics {
    fn has_auth(&self) -> bool {
        true
    }
    fn authenticate(&self, request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        assert!(&*request.client_id != "panic", "a test");
        Box::pin(std::future::ready(AuthOutcome::Allow(wasmqtt_protocol::ports::Grant::default())))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
}

#[test]
fn a_shard_that_panics_is_noticed_and_the_others_can_be_drained() {
    let broker = Broker::start_with(Arc::new(Panics), Arc::new(Memory), 2);
    let watch = broker.watch();
    let mut client = broker.connect("c", true);
    client.expect(CONNACK);
    assert_eq!(watch.ended(), None);
    let _panics = broker.connect("panic", true);
    let until = Instant::now() + Duration::from_secs(20);
    let name = loop {
        if let Some(name) = watch.ended() {
            break name;
        }
        assert!(Instant::now() < until, "nobody noticed");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(name.starts_with("shard-"), "{name}");
    client.ping();
    drop(broker);
    assert!(client.is_closed(), "the other shard was drained");
    assert_eq!(watch.ended(), None, "an end that was asked for");
}

#[test]
fn a_server_that_is_stopped_has_lost_no_thread() {
    let broker = Broker::start_with(Arc::new(NoPlugins), Arc::new(Memory), 2);
    let watch = broker.watch();
    drop(broker);
    assert_eq!(watch.ended(), None);
}
