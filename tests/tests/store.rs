//! What outlives the broker, and what happens when it cannot be kept.

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, Will, disk, wasmqtt};

const V5: Version = Version::V5;
const CONFIG: &str = "[store]\ndurability = \"os\"\n";
/// For what the broker does without an answer: more than a busy machine needs for it.
const A_MOMENT: Duration = Duration::from_secs(1);

fn lasting(client_id: &str) -> Options {
    Options::new(V5, client_id).resume().session_expiry(3600)
}

fn restart(broker: Broker) -> Broker {
    Broker::start_in(broker.crash(), CONFIG)
}

/// Subscriptions with their options and identifiers, queued messages with their properties, in order. MQTT 5.0 §4.1.
#[test]
fn a_session_goes_on_after_the_broker_was_killed() {
    let broker = Broker::start(CONFIG);
    let mut keeper = broker.connect(&lasting("keeper"));
    assert_eq!(keeper.subscribe_with(Some(7), &[("a/#", wasmqtt_tests::at_most(2))]), [2]);
    assert_eq!(keeper.subscribe("gone", 1), 1);
    keeper.unsubscribe(&["gone"]);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for n in 0..5 {
        let message = Message::new("a/b", format!("{n}")).qos(1 + n % 2).user("n", &n.to_string()).expiry(600);
        assert_eq!(publisher.publish(&message), 0);
    }
    assert_eq!(publisher.publish(&Message::new("gone", "x").qos(1)), 0x10);
    let broker = restart(broker);
    let mut keeper = broker.connect(&lasting("keeper"));
    assert!(keeper.connack.session_present);
    for n in 0..5_u8 {
        let message = keeper.message();
        assert_eq!((message.text(), message.qos), (n.to_string().as_str(), 1 + n % 2));
        assert_eq!(message.user, [("n".to_owned(), n.to_string())]);
        assert!(message.expiry.is_some_and(|left| (590..=600).contains(&left)), "{message:?}");
        assert_eq!(message.subscription_ids, [7]);
    }
    keeper.check_silent();
}

/// Both directions of the QoS 2 handshake. [MQTT-4.3.3-10], [MQTT-4.4.0-1]
#[test]
fn handshakes_go_on_where_they_were() {
    let broker = Broker::start(CONFIG);
    let mut keeper = broker.connect(&lasting("keeper"));
    assert_eq!(keeper.subscribe("q", 2), 2);
    let mut publisher = broker.connect(&lasting("publisher"));
    let id = publisher.send_publish(&Message::new("q", "once").qos(2));
    publisher.recv_where(|got| matches!(got, Got::Pubrec(other, 0) if *other == id).then_some(()));
    let sent = keeper.recv_publish();
    let broker = restart(broker);
    // The message was taken over: the same packet again is no second message.
    let mut publisher = broker.connect(&lasting("publisher"));
    publisher.send_publish(&Message::new("q", "once").qos(2).id(id).dup());
    publisher.recv_where(|got| matches!(got, Got::Pubrec(other, 0) if *other == id).then_some(()));
    let mut keeper = broker.connect(&lasting("keeper"));
    let again = keeper.recv_publish();
    assert_eq!((again.id, again.dup, again.text()), (sent.id, true, "once"));
    keeper.check_silent();
}

#[test]
fn retained_messages_outlive_the_broker_and_removed_ones_do_not() {
    let broker = Broker::start(CONFIG);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for (topic, payload) in [("r/1", "one"), ("r/2", "two"), ("r/1", "")] {
        publisher.publish(&Message::new(topic, payload).qos(1).retained());
    }
    let broker = restart(broker);
    // `$SYS` is not kept.
    broker.await_log("retained=1 ", 1);
    let mut client = broker.connect(&Options::new(V5, "client"));
    client.subscribe("r/#", 0);
    let Got::Publish(message) = client.recv() else { panic!("nothing is retained") };
    assert_eq!((message.topic.as_str(), message.text(), message.retain), ("r/2", "two", true));
    client.check_silent();
}

/// A client that was connected when the broker was killed is gone; one with a delay may come back in time.
/// MQTT 5.0 §3.1.2.5.
#[test]
fn wills_of_clients_that_were_there_are_published() {
    let broker = Broker::start(CONFIG);
    let mut watcher = broker.connect(&lasting("watcher"));
    assert_eq!(watcher.subscribe("will/#", 1), 1);
    let with_will = |name: &str, delay| {
        let will = Some(Will { message: Message::new(&format!("will/{name}"), "gone").qos(1), delay });
        Options { will, ..lasting(name) }
    };
    broker.connect(&with_will("polite", None)).disconnect();
    // Nothing is answered to DISCONNECT: give it time to be kept.
    std::thread::sleep(A_MOMENT);
    let _at_once = broker.connect(&with_will("at-once", None));
    let _late = broker.connect(&with_will("late", Some(1)));
    let _back = broker.connect(&with_will("back", Some(60)));
    let broker = restart(broker);
    let _back = broker.connect(&lasting("back"));
    let mut watcher = broker.connect(&lasting("watcher"));
    assert_eq!(watcher.message().topic, "will/at-once");
    assert_eq!(watcher.message().topic, "will/late");
    watcher.check_silent();
}

/// MQTT 5.0 §3.1.2.11.2.
#[test]
fn sessions_expire_while_no_broker_runs() {
    let broker = Broker::start(CONFIG);
    for (client_id, expiry) in [("short", 1), ("long", 3600)] {
        let mut client = broker.connect(&Options::new(V5, client_id).resume().session_expiry(expiry));
        client.subscribe("a", 1);
        client.disconnect();
    }
    // Nothing is answered to DISCONNECT: give it time to be kept.
    std::thread::sleep(A_MOMENT);
    let folder = broker.crash();
    std::thread::sleep(Duration::from_secs(2));
    let broker = Broker::start_in(folder, CONFIG);
    for (client_id, present) in [("short", false), ("long", true)] {
        assert_eq!(broker.connect(&lasting(client_id)).connack.session_present, present, "{client_id}");
    }
}

#[test]
fn bans_outlive_the_broker() {
    let config = format!(
        "{CONFIG}[[plugin]]\nname = \"probe\"\npath = \"{}\"\nconfig = {{ events = \"subscribed\" }}\n\
         grants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n",
        wasmqtt_guests::component("probe").display()
    );
    let broker = Broker::start(&config);
    let mut banned = broker.connect(&Options::new(V5, "banned"));
    banned.subscribe("ban/me", 0);
    assert!(matches!(banned.recv(), Got::Disconnect(0x98, ..)));
    // Kept a moment later.
    std::thread::sleep(A_MOMENT);
    let broker = Broker::start_in(broker.crash(), &config);
    broker.check_refused(&Options::new(V5, "banned"), 0x8A);
    broker.connect(&Options::new(V5, "other")).disconnect();
}

/// What plugins keep in `wasi:keyvalue`.
#[test]
fn buckets_outlive_the_broker() {
    let config = format!(
        "{CONFIG}[[plugin]]\nname = \"counter\"\npath = \"{}\"\ngrants = {{ keyvalue_mib = 1 }}\n",
        wasmqtt_guests::component("misbehave").display()
    );
    let counting = Options { username: Some("count".into()), ..Options::new(V5, "c") };
    let mut folder = tempfile::tempdir().expect("a temporary folder");
    for round in 1..=2 {
        let broker = Broker::start_in(folder, &config);
        broker.connect(&counting).disconnect();
        // Kept a moment later.
        std::thread::sleep(A_MOMENT);
        folder = broker.crash();
        let exported = text_of(&run(folder.path(), &["store", "export"]));
        let line = exported.lines().find(|line| line.contains("plugin counter, bucket count: asked"));
        assert!(line.is_some_and(|line| line.contains(&format!("\"0{round}00000000000000\""))), "{exported}");
    }
}

/// Instances are told to end, and what they keep then is kept, before the store is closed.
#[test]
fn plugins_say_goodbye_before_the_store_is_closed() {
    let mut broker = Broker::start(&format!(
        "{CONFIG}[[plugin]]\nname = \"counter\"\npath = \"{}\"\nconfig = {{ end = \"count\" }}\n\
         grants = {{ keyvalue_mib = 1 }}\n",
        wasmqtt_guests::component("misbehave").display()
    ));
    broker.signal(Signal::TERM);
    assert!(broker.wait().success());
    assert!(!broker.log().contains("instances of plugins are still in use"), "{}", broker.log());
    let exported = text_of(&run(broker.folder(), &["store", "export"]));
    assert!(exported.contains("plugin counter, bucket count: asked"), "{exported}");
}

/// What a plugin collects is kept with the message, and comes again until the plugin has it.
#[test]
fn what_plugins_collect_outlives_the_broker() {
    let config = |fails: &str| {
        format!(
            "{CONFIG}[[plugin]]\nname = \"tap\"\npath = \"{}\"\nconfig = {{ filters = \"fed/#\", committed = \"true\", \
             committed_fails = \"{fails}\" }}\ngrants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n",
            wasmqtt_guests::component("probe").display()
        )
    };
    let collected = |folder: &Path| {
        let exported = text_of(&run(folder, &["store", "export"]));
        exported.lines().filter(|line| line.contains("for plugins tap")).count()
    };
    let broker = Broker::start(&config("true"));
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for n in 0..3 {
        assert_eq!(publisher.publish(&Message::new(&format!("fed/{n}"), "x").qos(1)), 0x10);
    }
    let folder = broker.crash();
    assert_eq!(collected(folder.path()), 3);
    let broker = Broker::start_in(folder, &config("false"));
    // The store hears of it a moment later.
    std::thread::sleep(A_MOMENT);
    let folder = broker.crash();
    assert_eq!(collected(folder.path()), 0);
}

/// With `plugins/payload-seal`, and its configuration.
fn start_sealing() -> (Broker, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("key"), "0f".repeat(32)).expect("write");
    let config = format!(
        "{CONFIG}[[plugin]]\nname = \"seal\"\npath = \"{}\"\nconfig = {{ key_file = \"/key\" }}\n\
         grants = {{ files = [{{ host = \"key\", guest = \"/key\" }}] }}\n",
        wasmqtt_guests::component("payload-seal").display()
    );
    (Broker::start_in(folder, &config), config)
}

/// The broker is killed: the store has so many messages to `a`, none of them open. Another broker takes over.
fn restart_sealing(broker: Broker, config: &str, messages: usize) -> Broker {
    let folder = broker.crash();
    let exported = text_of(&run(folder.path(), &["store", "export"]));
    assert_eq!(exported.matches("message to a").count(), messages, "{exported}");
    assert!(!exported.contains("706c61696e2074657874"), "{exported}");
    Broker::start_in(folder, config)
}

/// On their way to a lasting Session, too, retained messages are in the store, in the form that the hooks gave them.
#[test]
fn sealed_retained_messages_are_stored_sealed_on_their_way() {
    let (mut broker, config) = start_sealing();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("a", "plain text").qos(1).retained());
    // The second time, the retained message itself has come from the store.
    for name in ["first", "second"] {
        let mut keeper = broker.connect(&lasting(name));
        keeper.subscribe("a", 1);
        assert_eq!(keeper.recv_publish().text(), "plain text");
        broker = restart_sealing(broker, &config, 1);
        let mut keeper = broker.connect(&lasting(name));
        let again = keeper.message();
        assert_eq!((again.text(), again.dup, again.retain), ("plain text", true, true), "{name}");
        keeper.check_silent();
    }
}

/// A member of a Shared Subscription is gone, and another one's Session gets what it has left. MQTT 5.0 §4.8.2
#[test]
fn what_another_member_gets_is_stored_sealed() {
    let (broker, config) = start_sealing();
    let mut two = broker.connect(&lasting("two"));
    two.subscribe("$share/g/a", 1);
    two.disconnect();
    let mut one = broker.connect(&lasting("one"));
    one.subscribe("$share/g/a", 1);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("a", "plain text").qos(1));
    assert_eq!(one.recv_publish().text(), "plain text");
    // Ends the Session of the first one, with what it has not acknowledged.
    let _one = broker.connect(&Options::new(V5, "one"));
    // Nothing is answered to that: give it time to be kept.
    std::thread::sleep(A_MOMENT);
    let broker = restart_sealing(broker, &config, 1);
    let mut two = broker.connect(&lasting("two"));
    assert_eq!(two.message().text(), "plain text");
    two.check_silent();
}

/// The store has the sealed form alone, and subscribers the open one. See `plugins/payload-seal`.
#[test]
fn what_is_sealed_is_stored_sealed_and_comes_out_open() {
    let (broker, config) = start_sealing();
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("a", "plain text").qos(1).retained());
    publisher.publish(&Message::new("a", "more plain text").qos(1));
    let folder = broker.crash();
    let plain = "706c61696e2074657874";
    let exported = text_of(&run(folder.path(), &["store", "export"]));
    assert!(exported.contains("message to a") && !exported.contains(plain), "{exported}");
    // Without the plugin nobody gets the sealed form, and others need not wait.
    let broker = Broker::start_in(folder, CONFIG);
    let mut late = broker.connect(&Options::new(V5, "late"));
    late.subscribe("a", 0);
    late.check_silent();
    let mut keeper = broker.connect(&lasting("keeper"));
    broker.await_log("a sealed message cannot be opened", 2);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("a", "not sealed").qos(1));
    assert_eq!(keeper.message().text(), "not sealed");
    keeper.disconnect();
    std::thread::sleep(A_MOMENT);
    // Nothing of it is lost.
    let broker = Broker::start_in(broker.crash(), &config);
    assert_eq!(queued(&broker, 2), ["plain text", "more plain text"]);
    let mut late = broker.connect(&Options::new(V5, "late"));
    late.subscribe("a", 0);
    assert_eq!(late.message().text(), "plain text");
}

/// A slow client gets its messages from the store, in order, however many there are.
#[test]
fn a_long_queue_is_read_back_in_order() {
    let broker = Broker::start("[store]\ndurability = \"os\"\n[limits]\nqueue_messages_max = 100000\n");
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let ids: Vec<u16> = (0..5000).map(|n| publisher.send_publish(&Message::new("a", format!("{n}")).qos(1))).collect();
    for id in ids {
        assert!(matches!(publisher.recv(), Got::Puback(other, _) if other == id));
    }
    let mut keeper = broker.connect(&lasting("keeper"));
    for n in 0..5000 {
        assert_eq!(keeper.message().text(), n.to_string());
    }
    keeper.check_silent();
}

fn fill(policy: &str) -> (Broker, Vec<u8>) {
    let config = "[limits]\nqueue_messages_max = 3\n";
    let folder = tempfile::tempdir().expect("a temporary folder");
    let address =
        std::net::TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port");
    let listener = format!("[[listener]]\nbind = \"{address}\"\nqueue_full = \"{policy}\"\n");
    let broker = Broker::start_in(folder, &format!("{config}{listener}"));
    let mut keeper = Client::open(address, V5);
    keeper.send_connect(&lasting("keeper"));
    assert!(matches!(keeper.recv(), Got::Connack(_)));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let reasons = (0..5).map(|n| publisher.publish(&Message::new("a", format!("{n}")).qos(1))).collect();
    (broker, reasons)
}

fn queued(broker: &Broker, count: usize) -> Vec<String> {
    let mut keeper = broker.connect(&lasting("keeper"));
    let texts = keeper.texts(count);
    keeper.check_silent();
    texts
}

#[test]
fn a_full_queue_drops_or_refuses_as_its_listener_says() {
    let (broker, reasons) = fill("drop-newest");
    assert_eq!((reasons, queued(&broker, 3)), (vec![0; 5], vec!["0".into(), "1".into(), "2".into()]));
    let (broker, reasons) = fill("drop-oldest");
    assert_eq!((reasons, queued(&broker, 3)), (vec![0; 5], vec!["2".into(), "3".into(), "4".into()]));
    let (broker, reasons) = fill("reject-publish");
    assert_eq!((reasons, queued(&broker, 3)), (vec![0, 0, 0, 0x97, 0x97], vec!["0".into(), "1".into(), "2".into()]));
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    assert_eq!(publisher.publish(&Message::new("a", "room again").qos(1)), 0);
}

/// What needs the store is refused, everything else goes on, and it recovers by itself.
#[test]
fn a_full_disk_refuses_what_would_have_to_be_kept() {
    check_fault(28); // ENOSPC
}

#[test]
fn a_read_only_disk_refuses_what_would_have_to_be_kept() {
    check_fault(30); // EROFS
}

#[test]
fn a_broken_disk_refuses_what_would_have_to_be_kept() {
    check_fault(5); // EIO
}

fn check_fault(number: i32) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (library, fault) = (disk::library(folder.path()), folder.path().join("fault"));
    let broker = Broker::start_with(
        folder,
        "[store]\ndurability = \"fsync\"\n",
        &[("LD_PRELOAD", &library), ("DISK_FAULT", &fault)],
    );
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("kept", 1);
    keeper.disconnect();
    let mut visitor = broker.connect(&lasting("visitor"));
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    assert_eq!(publisher.publish(&Message::new("kept", "before").qos(1)), 0);
    std::fs::write(&fault, number.to_string()).expect("write");
    // The first one finds out, and is refused like all others.
    assert_eq!(publisher.publish(&Message::new("kept", "first").qos(1)), 0x97);
    broker.await_log("store cannot be written", 1);
    let mut other = broker.connect(&Options::new(V5, "other"));
    assert_eq!(other.publish(&Message::new("kept", "refused").qos(1)), 0x97);
    assert_eq!(other.publish(&Message::new("retained", "refused").qos(1).retained()), 0x97);
    broker.check_refused(&lasting("new"), 0x97);
    assert_eq!(visitor.subscribe("wanted", 1), 0x97);
    assert_eq!(other.subscribe("live", 1), 1);
    assert_eq!(other.publish(&Message::new("live", "goes on").qos(1)), 0);
    assert_eq!(other.message().text(), "goes on");
    std::fs::remove_file(&fault).expect("delete");
    broker.await_log("store can be written again", 1);
    assert_eq!(other.publish(&Message::new("kept", "after").qos(1)), 0);
    assert_eq!(visitor.subscribe("wanted", 1), 1);
    let broker = Broker::start_in(broker.crash(), "");
    assert_eq!(queued(&broker, 2), ["before", "after"]);
}

/// A broker with a disk that can be made to fail.
fn with_disk(config: &str) -> (Broker, PathBuf, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (library, fault) = (disk::library(folder.path()), folder.path().join("fault"));
    let broker = Broker::start_with(folder, config, &[("LD_PRELOAD", &library), ("DISK_FAULT", &fault)]);
    (broker, library, fault)
}

/// One shard, so that everybody is behind everybody.
const FSYNC: &str = "shards = 1\n[store]\ndurability = \"fsync\"\n";

/// Nobody waits for the disk while it takes nothing: neither those who were refused, nor those who come after somebody
/// who told the store of something without waiting for it.
#[test]
fn while_the_disk_is_full_everything_else_goes_on() {
    let (broker, _, fault) = with_disk(FSYNC);
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("kept", 1);
    keeper.disconnect();
    let leaving = broker.connect(&lasting("leaving"));
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let mut old = broker.connect(&Options::new(Version::V311, "old"));
    std::fs::write(&fault, "28").expect("write");
    assert_eq!(publisher.publish(&Message::new("kept", "refused").qos(1)), 0x97);
    publisher.ping();
    old.send_publish(&Message::new("kept", "refused").qos(1));
    old.ping();
    leaving.disconnect();
    publisher.send_publish(&Message::new("retained", "x").retained());
    let mut other = broker.connect(&Options::new(V5, "other"));
    assert_eq!(other.publish(&Message::new("nobody", "x").qos(1)), 0x10);
    assert_eq!(other.publish(&Message::new("nobody", "x").qos(2)), 0x10);
    publisher.ping();
    std::fs::remove_file(&fault).expect("delete");
    broker.await_log("store can be written again", 1);
    assert_eq!(publisher.publish(&Message::new("kept", "taken").qos(1)), 0);
    let broker = Broker::start_in(broker.crash(), "");
    assert_eq!(queued(&broker, 1), ["taken"]);
    assert!(broker.connect(&lasting("leaving")).connack.session_present);
}

/// Reading goes on while writing does not.
#[test]
fn a_long_queue_is_read_while_the_disk_is_full() {
    let (broker, _, fault) = with_disk(&format!("{FSYNC}[limits]\nqueue_messages_max = 10000\n"));
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    let ids: Vec<u16> = (0..3000).map(|n| publisher.send_publish(&Message::new("a", format!("{n}")).qos(1))).collect();
    for id in ids {
        assert!(matches!(publisher.recv(), Got::Puback(other, 0) if other == id));
    }
    let mut keeper = broker.connect(&lasting("keeper"));
    assert_eq!(keeper.message().text(), "0");
    std::fs::write(&fault, "28").expect("write");
    for n in 1..3000 {
        assert_eq!(keeper.message().text(), n.to_string());
    }
    broker.await_log("store cannot be written", 1);
    std::fs::remove_file(&fault).expect("delete");
    broker.await_log("store can be written again", 1);
    // What was acknowledged meanwhile does not come again.
    keeper.ping();
    let broker = Broker::start_in(broker.stop_and_keep(), CONFIG);
    assert_eq!(queued(&broker, 0), Vec::<String>::new());
}

/// After a clean stop and after a kill.
#[test]
fn a_broker_starts_on_a_full_disk_and_takes_messages_when_there_is_space() {
    for is_clean in [true, false] {
        let (broker, library, fault) = with_disk(FSYNC);
        let mut keeper = broker.connect(&lasting("keeper"));
        keeper.subscribe("a", 1);
        keeper.disconnect();
        let mut publisher = broker.connect(&Options::new(V5, "publisher"));
        assert_eq!(publisher.publish(&Message::new("a", "before").qos(1)), 0);
        assert_eq!(publisher.publish(&Message::new("r", "kept").qos(1).retained()), 0x10);
        let folder = if is_clean { broker.stop_and_keep() } else { broker.crash() };
        std::fs::write(&fault, "28").expect("write");
        let environment: [(&str, &Path); 2] = [("LD_PRELOAD", &library), ("DISK_FAULT", &fault)];
        let broker = Broker::start_with(folder, FSYNC, &environment);
        broker.await_log("store cannot be written", 1);
        let mut other = broker.connect(&Options::new(V5, "other"));
        assert_eq!(other.subscribe("#", 1), 1);
        assert_eq!(other.message().text(), "kept");
        assert_eq!(other.publish(&Message::new("live", "goes on").qos(1)), 0);
        assert_eq!(other.message().text(), "goes on");
        assert_eq!(other.publish(&Message::new("a", "refused").qos(1)), 0x97);
        broker.check_refused(&lasting("new"), 0x97);
        std::fs::remove_file(&fault).expect("delete");
        broker.await_log("store can be written again", 1);
        assert_eq!(other.publish(&Message::new("a", "after").qos(1)), 0);
        let broker = Broker::start_in(broker.crash(), FSYNC);
        assert_eq!(queued(&broker, 2), ["before", "after"]);
    }
}

/// On some file systems a new file or folder is there after a power loss only if the folder around it was synced.
#[test]
fn a_new_store_survives_a_power_loss_that_forgets_names() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (library, notes) = (disk::library(folder.path()), folder.path().join("notes"));
    let environment: [(&str, &Path); 2] = [("LD_PRELOAD", &library), ("SYNC_NOTES", &notes)];
    let broker = Broker::start_with(folder, "[store]\npath = \"deep/er/store\"\n", &environment);
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for n in 0..100 {
        assert_eq!(publisher.publish(&Message::new("a", n.to_string()).qos(1)), 0);
    }
    let folder = broker.crash();
    disk::forget_unsynced(&folder.path().join("deep/er/store"), &notes);
    disk::forget_names(&notes);
    let broker = Broker::start_in(folder, "[store]\npath = \"deep/er/store\"\n");
    assert_eq!(queued(&broker, 100), (0..100).map(|n| n.to_string()).collect::<Vec<_>>());
}

/// What operators make lasts as well when the command says that it is done.
#[test]
fn what_commands_write_survives_a_power_loss_that_forgets_names() {
    let folder = Broker::start(CONFIG).stop_and_keep();
    let (library, notes) = (disk::library(folder.path()), folder.path().join("notes"));
    let run = |arguments: &[&str], input: &str| {
        let mut command = wasmqtt();
        command.current_dir(folder.path()).args(arguments).env("LD_PRELOAD", &library).env("SYNC_NOTES", &notes);
        command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::null());
        let mut child = command.spawn().expect("the binary runs");
        std::io::Write::write_all(child.stdin.as_mut().expect("is piped"), input.as_bytes()).expect("write");
        assert!(child.wait().expect("ends").success(), "{arguments:?}");
    };
    run(&["store", "backup", "copy", "--config", "wasmqtt.toml"], "");
    run(&["store", "export", "all.jsonl", "--config", "wasmqtt.toml"], "");
    run(&["passwd", "passwords", "ann"], "secret\n");
    let names = disk::unsynced_names(&notes);
    // RocksDB's own log and its lock are worth nothing after a crash.
    let lost: Vec<_> = names.iter().filter(|name| !name.ends_with("LOG") && !name.ends_with("LOCK")).collect();
    for made in ["copy", "copy/CURRENT", "all.jsonl", "passwords"] {
        assert!(folder.path().join(made).exists(), "{made}");
        assert!(!lost.iter().any(|name| name.ends_with(made)), "{made} would be gone: {lost:?}");
    }
}

fn run(folder: &Path, arguments: &[&str]) -> Output {
    wasmqtt().current_dir(folder).args(arguments).args(["--config", "wasmqtt.toml"]).output().expect("the binary runs")
}

fn text_of(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// One folder, one broker.
#[test]
fn a_second_broker_is_refused() {
    let broker = Broker::start(CONFIG);
    let second = run(broker.folder(), &["serve"]);
    assert!(!second.status.success() && text_of(&second).contains("another broker uses it"), "{}", text_of(&second));
}

#[test]
fn operators_look_at_a_store_check_it_and_move_it() {
    let broker = Broker::start(CONFIG);
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    publisher.publish(&Message::new("a", "queued").qos(1));
    publisher.publish(&Message::new("r", "retained").qos(1).retained());
    let backup = broker.folder().join("backup");
    let done = run(broker.folder(), &["store", "backup", "backup"]);
    assert!(done.status.success() && backup.join("CURRENT").is_file(), "{}", text_of(&done));
    publisher.publish(&Message::new("a", "after the backup").qos(1));
    let busy = run(broker.folder(), &["store", "stats"]);
    assert!(!busy.status.success() && text_of(&busy).contains("another broker uses it"), "{}", text_of(&busy));

    let folder = broker.crash();
    let stats = run(folder.path(), &["store", "stats", "--json"]);
    let text = text_of(&stats);
    for family in ["\"family\": \"session\",\n    \"rows\": 1", "\"family\": \"message\",\n    \"rows\": 2"] {
        assert!(text.contains(family), "{family} is not in {text}");
    }
    assert!(text_of(&run(folder.path(), &["store", "check"])).contains("ok"));
    assert!(run(folder.path(), &["store", "compact"]).status.success());
    let exported = run(folder.path(), &["store", "export", "all.jsonl"]);
    assert!(exported.status.success(), "{}", text_of(&exported));
    let lines = std::fs::read_to_string(folder.path().join("all.jsonl")).expect("written");
    assert!(lines.contains("message to a for 1 Sessions") && lines.contains("retained on r"), "{lines}");

    std::fs::remove_dir_all(folder.path().join("data/store")).expect("delete");
    let imported = run(folder.path(), &["store", "import", "all.jsonl"]);
    assert!(imported.status.success(), "{}", text_of(&imported));
    let broker = Broker::start_in(folder, CONFIG);
    assert_eq!(queued(&broker, 2), ["queued", "after the backup"]);

    let folder = broker.crash();
    std::fs::remove_dir_all(folder.path().join("data/store")).expect("delete");
    std::fs::rename(folder.path().join("backup"), folder.path().join("data/store")).expect("put back");
    let broker = Broker::start_in(folder, CONFIG);
    assert_eq!(queued(&broker, 1), ["queued"]);
}

/// Files that are damaged are an error that says so, not a crash and not silence.
#[test]
fn damaged_files_are_noticed() {
    let broker = Broker::start(CONFIG);
    let mut keeper = broker.connect(&lasting("keeper"));
    keeper.subscribe("a", 1);
    keeper.disconnect();
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    for n in 0..200 {
        publisher.publish(&Message::new("a", format!("{n}-{}", "x".repeat(500))).qos(1));
    }
    let folder = broker.crash();
    assert!(run(folder.path(), &["store", "compact"]).status.success());
    let store = folder.path().join("data/store");
    for entry in std::fs::read_dir(&store).expect("the store").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "sst") {
            let mut bytes = std::fs::read(&path).expect("read");
            let middle = bytes.len() / 4;
            bytes[middle..middle + 8].copy_from_slice(b"damaged!");
            std::fs::write(&path, bytes).expect("write");
        }
    }
    let begun = Instant::now();
    let served = run(folder.path(), &["serve", "--listen", "127.0.0.1:0"]);
    assert!(!served.status.success() && begun.elapsed() < Duration::from_secs(20));
    let text = text_of(&served);
    assert!(text.contains("data/store") && text.to_lowercase().contains("corrupt"), "{text}");
}
