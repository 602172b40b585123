//! Timers end with what they belong to.
#![allow(missing_docs, reason = "tests")]

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use wasmqtt_protocol::access::Rule;
use wasmqtt_protocol::ports::{AuthOutcome, AuthRequest, AuthStep, Call, Grant, Memory, Plugins, ShardPlugins};
use wasmqtt_protocol::topic::Filter;

use self::common::{Broker, CONNACK, SUBACK};

/// Lets everybody in for a day.
struct Day;

impl Plugins for Day {
    fn shard(&self, _index: usize) -> Box<dyn ShardPlugins> {
        Box::new(Day)
    }
}

impl ShardPlugins for Day {
    fn has_auth(&self) -> bool {
        true
    }
    fn authenticate(&self, _request: Arc<AuthRequest>) -> Call<AuthOutcome> {
        let rules = vec![Rule { action: None, filter: Filter::parse("#").unwrap(), allow: true }];
        let grant = Grant { expires: 24 * 3600, rules, complete: true, ..Grant::default() };
        Box::pin(std::future::ready(AuthOutcome::Allow(grant)))
    }
    fn proceed(&self, _step: AuthStep) -> Call<AuthOutcome> {
        Box::pin(std::future::ready(AuthOutcome::Next))
    }
}

fn settles(broker: &Broker, wanted: usize) {
    let until = Instant::now() + Duration::from_secs(20);
    while broker.timers() != wanted && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(broker.timers(), wanted);
}

/// The grant of a connection that is gone has no timer, however long it would have held; neither has anything else.
#[test]
fn connections_that_are_gone_have_no_timers() {
    let broker = Broker::start(Arc::new(Day), Arc::new(Memory));
    drop(broker.connect("first", true));
    // Housekeeping.
    let mut quiet = broker.connect("quiet", true);
    quiet.expect(CONNACK);
    quiet.ping();
    settles(&broker, 2);
    for n in 0..3000 {
        let mut client = broker.connect(&format!("c{}", n % 100), true);
        client.expect(CONNACK);
        if n % 10 == 0 {
            client.subscribe("a", 0);
            client.expect(SUBACK);
        }
        if n % 2 == 0 {
            client.send(0xe0, &[]);
        }
    }
    settles(&broker, 2);
}

/// Takeovers, too: a Session that lives on has at most one timer of each kind.
#[test]
fn a_session_has_one_timer_of_a_kind() {
    let broker = Broker::start(Arc::new(Day), Arc::new(Memory));
    let mut last = broker.connect("c", false);
    last.expect(CONNACK);
    last.subscribe("a", 1);
    last.expect(SUBACK);
    for _ in 0..200 {
        last = broker.connect("c", false);
        last.expect(CONNACK);
    }
    last.ping();
    settles(&broker, 2);
    drop(last);
    // Housekeeping, and the end of the Session in a week.
    settles(&broker, 2);
}
