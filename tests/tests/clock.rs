//! Whatever the clock of the system does: nothing is lost that would not have expired, and what did while no broker ran is
//! gone.

use tempfile::TempDir;
use wasmqtt_tests::clock::Clock;
use wasmqtt_tests::{Broker, Got, Message, Options, Version};

const V5: Version = Version::V5;
const HOUR: i64 = 3600;
const YEARS: i64 = 30 * 365 * 24 * HOUR;

/// A broker whose clock can be set, and what it was to keep.
struct World {
    broker: Broker,
    clock: Clock,
    config: String,
}

fn lasting(client_id: &str) -> Options {
    Options::new(V5, client_id).resume().session_expiry(7 * 24 * 3600)
}

fn short_lived() -> Options {
    Options::new(V5, "short").resume().session_expiry(600)
}

impl World {
    /// With the right clock. Everything that is called `short` lives for ten minutes, the ban for one, all else for a week.
    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let clock = Clock::new(folder.path());
        clock.set(0);
        let config = format!(
            "[store]\ndurability = \"os\"\n[[plugin]]\nname = \"probe\"\npath = \"{}\"\n\
             config = {{ events = \"subscribed\" }}\n\
             grants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n",
            wasmqtt_guests::component("probe").display()
        );
        let broker = Broker::start_with(folder, &config, &clock.environment());
        let world = Self { broker, clock, config };
        for options in [lasting("long"), short_lived()] {
            let mut client = world.broker.connect(&options);
            client.subscribe("queue/#", 1);
            client.disconnect();
        }
        let mut publisher = world.broker.connect(&Options::new(V5, "publisher"));
        for (name, seconds) in [("long", 7 * 24 * 3600), ("short", 600)] {
            for topic in ["queue", "kept"] {
                let message = Message::new(&format!("{topic}/{name}"), name).qos(1).expiry(seconds);
                let message = if topic == "kept" { message.retained() } else { message };
                assert!(matches!(publisher.publish(&message), 0 | 0x10));
            }
        }
        let mut banned = world.broker.connect(&Options::new(V5, "banned"));
        banned.subscribe("ban/me", 0);
        assert!(matches!(banned.recv(), Got::Disconnect(0x98, ..)));
        // What is kept a moment later is there when this is answered.
        let mut last = world.broker.connect(&lasting("last"));
        assert_eq!(last.subscribe("last", 1), 1);
        world
    }

    fn restart(self, shift: i64) -> Self {
        let Self { broker, clock, config } = self;
        let folder: TempDir = broker.crash();
        clock.set(shift);
        let broker = Broker::start_with(folder, &config, &clock.environment());
        Self { broker, clock, config }
    }

    /// What is there: everything, or all but what lives for a short time.
    fn check(&self, shorts: bool, what: &str) {
        let expected: &[&str] = if shorts { &["long", "short"] } else { &["long"] };
        assert_eq!(self.broker.connect(&short_lived()).connack.session_present, shorts, "Session: {what}");
        let mut looker = self.broker.connect(&Options::new(V5, "looker"));
        looker.subscribe("kept/#", 0);
        let mut kept = looker.texts(expected.len());
        kept.sort_unstable();
        assert_eq!(kept, expected, "retained: {what}");
        looker.check_silent();
        let mut long = self.broker.connect(&lasting("long"));
        assert!(long.connack.session_present, "{what}");
        assert_eq!(long.texts(expected.len()), expected, "queue: {what}");
        long.check_silent();
        let banned = Options::new(V5, "banned");
        if shorts {
            self.broker.check_refused(&banned, 0x8A);
        } else {
            self.broker.connect(&banned).disconnect();
        }
    }
}

#[test]
fn what_expired_while_no_broker_ran_is_gone() {
    World::start().restart(HOUR).check(false, "an hour");
}

#[test]
fn years_before_a_start_lose_nothing() {
    for shift in [YEARS, -YEARS] {
        let world = World::start().restart(shift);
        world.broker.await_log("cannot be believed", 1);
        world.check(true, &shift.to_string());
    }
}

#[test]
fn years_while_it_runs_lose_nothing() {
    for shift in [YEARS, -YEARS] {
        let world = World::start().restart(0);
        world.clock.set(shift);
        // It looks once a second.
        std::thread::sleep(std::time::Duration::from_secs(3));
        world.check(true, &shift.to_string());
    }
}

/// The clock was wrong at one start and is right at the next: the time off between is known all the same.
#[test]
fn years_between_two_starts_lose_nothing_and_the_time_off_counts() {
    for shift in [YEARS, -YEARS] {
        let world = World::start().restart(shift);
        let mut publisher = world.broker.connect(&Options::new(V5, "publisher"));
        assert_eq!(publisher.publish(&Message::new("queue/young", "young").qos(1).expiry(600)), 0);
        let world = world.restart(HOUR);
        let mut long = world.broker.connect(&lasting("long"));
        // It may have been published after that hour, and then it lives on.
        assert_eq!(long.texts(2), ["long", "young"], "{shift}");
        long.disconnect();
        assert!(!world.broker.connect(&short_lived()).connack.session_present, "{shift}");
    }
}

/// A machine without a battery: the clock is years, or hours, behind until the network tells.
#[test]
fn a_clock_that_is_right_after_the_start_tells_of_the_time_off() {
    for shift in [-YEARS, 0] {
        let world = World::start().restart(shift);
        let mut publisher = world.broker.connect(&Options::new(V5, "publisher"));
        assert_eq!(publisher.publish(&Message::new("queue/young", "young").qos(1).expiry(600)), 0);
        world.clock.set(HOUR);
        world.broker.await_log("the time since the last broker ended is counted now", 1);
        let mut long = world.broker.connect(&lasting("long"));
        assert_eq!(long.texts(2), ["long", "young"], "{shift}");
        long.check_silent();
        long.disconnect();
        assert!(!world.broker.connect(&short_lived()).connack.session_present, "{shift}");
        let mut looker = world.broker.connect(&Options::new(V5, "looker"));
        looker.subscribe("kept/#", 0);
        assert_eq!(looker.texts(1), ["long"], "{shift}");
        looker.check_silent();
        world.broker.connect(&Options::new(V5, "banned")).disconnect();
        // And the next broker knows it, too.
        let world = world.restart(HOUR);
        let mut looker = world.broker.connect(&Options::new(V5, "looker"));
        looker.subscribe("kept/#", 0);
        assert_eq!(looker.texts(1), ["long"], "{shift}");
        looker.check_silent();
    }
}
