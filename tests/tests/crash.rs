//! The broker is killed again and again in the middle of its work. What it acknowledged is there afterwards.
//!
//! `WASMQTT_CRASHES` says how often.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wasmqtt_tests::lasting::{Changer, Mortal, Place, Publisher, Subscriber, Wills};
use wasmqtt_tests::{Broker, Got, Options, Version, disk};

const CRASHES: usize = 50;
/// Starting with plugins takes longer.
const CRASHES_WITH_PLUGINS: usize = 20;
/// Topic of Will Messages.
const WILL: &str = "m/will";
/// How long everything that is on its way may take in the end.
const PATIENCE: Duration = Duration::from_mins(2);

/// Not for secrets.
fn random(below: u64) -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(Instant::now()) % below
}

struct World {
    place: Place,
    broker: Option<Broker>,
    config: String,
    notes: Option<(PathBuf, PathBuf)>,
}

impl World {
    fn start(durability: &str, power_loss: bool, plugins: bool) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("key"), "0f".repeat(32)).expect("write");
        let notes = power_loss.then(|| (disk::library(folder.path()), folder.path().join("notes")));
        let config = format!(
            "[store]\ndurability = \"{durability}\"\nwrite_buffer_mib = 1\n[limits]\nqueue_messages_max = 10000000\n\
             queue_bytes_max = 1000000000\n{}",
            if plugins { in_the_way() } else { String::new() }
        );
        let mut world = Self { place: Place::default(), broker: None, config, notes };
        world.begin(folder);
        world
    }

    fn begin(&mut self, folder: TempDir) {
        let environment: Vec<(&str, &Path)> = match &self.notes {
            Some((library, notes)) => vec![("LD_PRELOAD", library), ("SYNC_NOTES", notes)],
            None => Vec::new(),
        };
        let broker = Broker::start_with(folder, &self.config, &environment);
        *self.place.lock().expect("not poisoned") = Some(broker.address());
        self.broker = Some(broker);
    }

    fn crash(&mut self) {
        *self.place.lock().expect("not poisoned") = None;
        let folder = self.broker.take().expect("it runs").crash();
        if let Some((_, notes)) = &self.notes {
            disk::forget_unsynced(&folder.path().join("data/store"), notes);
            disk::forget_names(notes);
        }
        self.begin(folder);
    }

    fn broker(&self) -> &Broker {
        self.broker.as_ref().expect("it runs")
    }
}

/// A storage hook that rewrites, takes its time and fails now and then, and has to be asked for permissions all the time;
/// behind it one that seals what is stored.
fn in_the_way() -> String {
    format!(
        "[[plugin]]\nname = \"probe\"\npath = \"{}\"\non_error = \"allow\"\n\
         config = {{ filters = \"m/# kept\", before = \"true\", rewrite = \"zero\", slow_every = \"7\", slow_ms = \"15\", \
         fail_every = \"50\", ttl = \"1\" }}\n\
         grants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n\
         [[plugin]]\nname = \"seal\"\npath = \"{}\"\nconfig = {{ key_file = \"/key\" }}\n\
         grants = {{ files = [{{ host = \"key\", guest = \"/key\" }}] }}\n",
        wasmqtt_guests::component("probe").display(),
        wasmqtt_guests::component("payload-seal").display()
    )
}

/// The highest number that was acknowledged, plus one.
fn watch() -> (Arc<AtomicU64>, impl Fn(u64) + Send + 'static) {
    let highest = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&highest);
    let note = move |number| {
        seen.fetch_max(number + 1, Ordering::SeqCst);
    };
    (highest, note)
}

fn check_subscriptions(broker: &Broker, known: &[Option<bool>]) {
    let client = broker.connect(&Options::new(Version::V311, "changing").unclean());
    assert!(client.connack.session_present);
    let mut publisher = broker.connect(&Options::new(Version::V5, "checker"));
    for (place, wanted) in known.iter().enumerate().filter_map(|(place, known)| Some((place, (*known)?))) {
        let reason = publisher.publish(&wasmqtt_tests::Message::new(&format!("change/{place}"), "x").qos(1));
        assert_eq!(reason == 0, wanted, "change/{place}");
    }
    drop(client);
}

fn check_crashes(durability: &str, power_loss: bool, plugins: bool, crashes: usize) {
    let mut world = World::start(durability, power_loss, plugins);
    let (stop, ended) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let subscribers = [("once", "m/+", 2), ("least", "m/+", 1), ("away", "m/+", 2)]
        .map(|(client_id, filter, qos)| Subscriber::start(&world.place, client_id, filter, qos, &ended));
    let until = Instant::now() + PATIENCE;
    while !subscribers.iter().all(|subscriber| subscriber.ready.load(Ordering::SeqCst)) {
        assert!(Instant::now() < until, "not subscribed");
        thread::sleep(Duration::from_millis(5));
    }
    let topics = [("m/0", 1), ("m/1", 2), ("m/2", 1), ("m/3", 2)];
    let publishers =
        topics.map(|(topic, qos)| (topic, qos, Publisher::start(&world.place, topic, qos, false, &stop, |_| {})));
    let (retained, note) = watch();
    let keeper = Publisher::start(&world.place, "kept", 1, true, &stop, note);
    let mortal = Mortal::start(&world.place, "mortal", WILL, &stop);
    let changer = Changer::start(&world.place, "changing", "change", &stop);
    for round in 0..crashes {
        subscribers[2].away.store(round % 2 == 0, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20 + random(300)));
        let kept = retained.load(Ordering::SeqCst);
        world.crash();
        check_retained(world.broker(), kept);
        if (round + 1) % 50 == 0 {
            println!("killed {} of {crashes} times, nothing lost so far", round + 1);
        }
    }
    subscribers[2].away.store(false, Ordering::SeqCst);
    stop.store(true, Ordering::SeqCst);
    let known = changer.join();
    let wills = mortal.join();
    let published = publishers.map(|(topic, qos, publisher)| (topic, qos, publisher.join()));
    let kept = keeper.join();
    check_retained(world.broker(), kept);
    let until = Instant::now() + PATIENCE;
    let has_all = |subscriber: &Subscriber| {
        published.iter().all(|(topic, _, count)| subscriber.seen(topic) >= *count)
            && wills.acknowledged.iter().all(|number| subscriber.has(WILL, *number))
    };
    let all_there = || subscribers.iter().all(has_all);
    while !all_there() && Instant::now() < until {
        thread::sleep(Duration::from_millis(10));
    }
    // What should not come would come now.
    thread::sleep(Duration::from_millis(200));
    ended.store(true, Ordering::SeqCst);
    let [once, least, away] = subscribers.map(Subscriber::join);
    let mut wrong = String::new();
    for (topic, qos, count) in published {
        for (name, got, exactly) in [("once", &once, qos == 2), ("least", &least, false), ("away", &away, qos == 2)] {
            check_numbers(
                &mut wrong,
                &format!("{name} {topic}"),
                got.get(topic).map_or(&[], Vec::as_slice),
                count,
                exactly,
            );
        }
        println!("{topic}: {count} messages with QoS {qos}");
    }
    for (name, got) in [("once", &once), ("away", &away)] {
        check_wills(&mut wrong, name, got.get(WILL).map_or(&[], Vec::as_slice), &wills);
    }
    println!("{WILL}: {} wills", wills.acknowledged.len());
    assert!(wrong.is_empty(), "{wrong}");
    check_subscriptions(world.broker(), &known);
}

/// Each number once and in order; where the publisher may repeat itself, repetitions were left out by the subscriber.
fn check_numbers(wrong: &mut String, what: &str, numbers: &[u64], count: u64, exactly: bool) {
    let seen: HashSet<u64> = numbers.iter().copied().collect();
    let missing: Vec<u64> = (0..count).filter(|number| !seen.contains(number)).take(5).collect();
    let mut first_seen = HashSet::new();
    let firsts: Vec<u64> = numbers.iter().copied().filter(|number| first_seen.insert(*number)).collect();
    if !missing.is_empty() {
        let _ = writeln!(wrong, "{what}: {} of {count} are missing: {missing:?} …", count - seen.len() as u64);
    }
    if exactly && numbers.len() != seen.len() {
        let _ = writeln!(wrong, "{what}: {} came twice", numbers.len() - seen.len());
    }
    if let Some([before, after]) = firsts.array_windows().find(|[before, after]| before > after) {
        let _ = writeln!(wrong, "{what}: {before} came before {after}");
    }
}

/// Each will that was promised once and in order; of the others nobody knows more than that they come once at most.
fn check_wills(wrong: &mut String, name: &str, numbers: &[u64], wills: &Wills) {
    let seen: HashSet<u64> = numbers.iter().copied().collect();
    let missing: Vec<u64> = wills.acknowledged.iter().copied().filter(|number| !seen.contains(number)).collect();
    if !missing.is_empty() {
        let _ = writeln!(wrong, "{name}: wills are missing: {missing:?}");
    }
    if let Some([before, after]) = numbers.array_windows().find(|[before, after]| before >= after) {
        let _ = writeln!(wrong, "{name}: will {before} came before {after}");
    }
    if let Some(unknown) =
        seen.iter().find(|number| !wills.acknowledged.contains(number) && !wills.uncertain.contains(number))
    {
        let _ = writeln!(wrong, "{name}: nobody has left will {unknown}");
    }
}

fn check_retained(broker: &Broker, acknowledged: u64) {
    if acknowledged == 0 {
        return;
    }
    let mut client = broker.connect(&Options::new(Version::V5, "looker"));
    assert_eq!(client.subscribe("kept", 0), 0);
    let Got::Publish(message) = client.recv() else { panic!("the retained message is gone") };
    let number: u64 = message.text().parse().expect("a number");
    assert!(number + 1 >= acknowledged, "{number} is retained, and {acknowledged} were acknowledged");
}

fn crashes(default: usize) -> usize {
    std::env::var("WASMQTT_CRASHES").map_or(default, |count| count.parse().expect("a number"))
}

#[test]
fn what_was_acknowledged_survives_the_end_of_the_broker() {
    check_crashes("os", false, false, crashes(CRASHES));
}

/// Also when everything that was not synced is gone, names of files and folders included.
#[test]
fn what_was_acknowledged_survives_a_power_loss() {
    check_crashes("fsync", true, false, crashes(CRASHES));
}

/// Also when storage hooks and an `acl` plugin are in the way of everything, Will Messages included.
#[test]
fn what_was_acknowledged_survives_with_plugins_in_the_way() {
    check_crashes("os", false, true, crashes(CRASHES_WITH_PLUGINS));
}

/// Both.
#[test]
fn what_was_acknowledged_survives_a_power_loss_with_plugins_in_the_way() {
    check_crashes("fsync", true, true, crashes(CRASHES_WITH_PLUGINS));
}
