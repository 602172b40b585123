//! The configuration of the real broker is read again while clients are connected: SIGHUP and `wasmqtt ctl reload`.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use rustix::process::Signal;
use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, wasmqtt};

const V5: Version = Version::V5;
const RELOADED: &str = "configuration reloaded";
/// What the harness adds to each configuration.
const OWN_LISTENER: &str = "\n[[listener]]\nbind = \"127.0.0.1:0\"\nprotocol = \"mqtt\"\n";

/// Writes the file anew; the broker does not look at it by itself.
fn rewrite(broker: &Broker, config: &str) {
    std::fs::write(broker.folder().join("wasmqtt.toml"), format!("{config}{OWN_LISTENER}")).expect("write");
}

/// Exit status and what was printed.
fn ctl(folder: &Path, args: &[&str]) -> (bool, String) {
    let out = wasmqtt().arg("ctl").args(args).args(["--config", "wasmqtt.toml"]).current_dir(folder).output();
    let out = out.expect("the binary runs");
    (out.status.success(), format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr)))
}

fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).expect("a free port")
}

fn connect_to(address: SocketAddr, client_id: &str) -> Client {
    let mut client = Client::open(address, V5);
    client.send_connect(&Options::new(V5, client_id));
    assert!(matches!(client.recv(), Got::Connack(connack) if connack.reason == 0));
    client
}

/// CONNACK tells a client what it may send, so that holds for as long as it is connected. MQTT 5.0 §3.2.2.3.6.
#[test]
fn new_limits_are_for_clients_that_connect_afterwards() {
    let broker = Broker::start("[limits]\npacket_bytes_max = 100_000\n");
    let mut before = broker.connect(&Options::new(V5, "before"));
    assert_eq!(before.connack.maximum_packet_size, Some(100_000));
    rewrite(&broker, "[limits]\npacket_bytes_max = 1_000\n");
    broker.signal(Signal::HUP);
    broker.await_log(RELOADED, 1);
    broker.await_log("limits.packet_bytes_max: 100000 -> 1000", 1);
    let mut after = broker.connect(&Options::new(V5, "after"));
    assert_eq!(after.connack.maximum_packet_size, Some(1_000));
    let large = Message::new("t", "x".repeat(50_000)).qos(1);
    assert_eq!(before.publish(&large), 0x10, "it was told that it may");
    after.send_publish(&large);
    after.check_ended(0x95);
}

#[test]
fn bounds_of_queues_and_rules_about_names_change_at_once() {
    let broker = Broker::start("[limits]\nsubscriptions_max = 2\n");
    let mut client = broker.connect(&Options::new(V5, "c"));
    assert_eq!((client.subscribe("a", 0), client.subscribe("b", 0), client.subscribe("c", 0)), (0, 0, 0x97));
    broker.check_refused(&Options::new(V5, "#"), 0x85);
    rewrite(&broker, "[limits]\nsubscriptions_max = 2\n[auth]\nwildcard_identifiers = \"allow\"\n");
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(ok && said.contains("  auth.wildcard_identifiers: \"refuse\" -> \"allow\"\n"), "{said}");
    broker.connect(&Options::new(V5, "#")).ping();
    rewrite(&broker, "[limits]\nsubscriptions_max = 3\n[auth]\nanonymous = false\n");
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(ok && said.contains("  limits.subscriptions_max: 2 -> 3\n"), "{said}");
    assert!(said.contains("  auth.anonymous: not set -> false\n"), "{said}");
    assert_eq!(client.subscribe("c", 0), 0, "who is in stays in, with the new bound");
    broker.check_refused(&Options::new(V5, "d"), 0x87);
}

#[test]
fn a_wrong_file_changes_nothing_and_says_why() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c"));
    rewrite(&broker, "[limits]\nsubscriptions_max = 1\nreceive_maximum = 0\n");
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(!ok && said.contains("wasmqtt.toml:3: limits.receive_maximum = 0: allowed is"), "{said}");
    broker.signal(Signal::HUP);
    broker.await_log("configuration not reloaded, nothing has changed", 1);
    assert_eq!((client.subscribe("a", 0), client.subscribe("b", 0)), (0, 0));
    // One that cannot be used is no better than one that is misspelt.
    let listener = format!("[[listener]]\nbind = \"{}\"\n", broker.address());
    let socket = "[[listener]]\nbind = \"s.sock\"\nprotocol = \"unix\"\n";
    rewrite(&broker, &format!("[limits]\nsubscriptions_max = 1\n{socket}{listener}"));
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(!ok && said.contains(&format!("cannot listen on mqtt://{}", broker.address())), "{said}");
    assert!(!broker.folder().join("s.sock").exists(), "a socket on which nobody listens");
    broker.await_log("configuration not reloaded, nothing has changed", 2);
    assert_eq!(client.subscribe("c", 0), 0);
}

#[test]
fn the_log_level_changes_while_it_runs() {
    let broker = Broker::start("");
    broker.connect(&Options::new(V5, "quiet")).send_raw(&[0xff, 0xff]);
    rewrite(&broker, "log.level = \"debug\"\n");
    let (ok, said) = ctl(broker.folder(), &["reload", "--json"]);
    assert!(ok && said.contains("\"log.level: \\\"info\\\" -> \\\"debug\\\"\""), "{said}");
    broker.connect(&Options::new(V5, "loud")).send_raw(&[0xff, 0xff]);
    broker.await_log(": malformed packet address=", 1);
    assert_eq!(broker.log().matches(": malformed packet address=").count(), 1, "{}", broker.log());
}

#[test]
fn listeners_come_and_go_and_clients_stay() {
    let (first, second) = (free_address(), free_address());
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Broker::start_in(folder, &format!("[[listener]]\nbind = \"{first}\"\n"));
    let mut stays = connect_to(first, "stays");
    rewrite(
        &broker,
        &format!("[[listener]]\nbind = \"{second}\"\n[[listener]]\nbind = \"s.sock\"\nprotocol = \"unix\"\n"),
    );
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(ok && said.contains(&format!("listener mqtt://{second}: added")), "{said}");
    assert!(said.contains(&format!("listener mqtt://{first}: closed, its clients stay connected")), "{said}");
    connect_to(second, "new").ping();
    stays.ping();
    let socket = broker.folder().join("s.sock");
    std::os::unix::net::UnixStream::connect(&socket).expect("it listens");
    // Taken down by the acceptor, a moment after the answer.
    let begun = std::time::Instant::now();
    while TcpStream::connect(first).is_ok() {
        assert!(begun.elapsed() < std::time::Duration::from_secs(30), "it still listens");
    }
    rewrite(&broker, &format!("[[listener]]\nbind = \"{first}\"\n"));
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(ok, "{said}");
    connect_to(first, "again").ping();
    let begun = std::time::Instant::now();
    while socket.exists() {
        assert!(begun.elapsed() < std::time::Duration::from_secs(30), "its file is left behind");
    }
}

#[test]
fn an_open_door_is_refused_when_it_is_added_too() {
    let broker = Broker::start("");
    let port = free_address().port();
    rewrite(&broker, &format!("[[listener]]\nbind = \"0.0.0.0:{port}\"\n"));
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(!ok && said.contains("nothing says who may connect"), "{said}");
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[test]
fn what_needs_a_restart_is_named_and_left_as_it_is() {
    let broker = Broker::start("shards = 1\n");
    rewrite(
        &broker,
        "shards = 2\ndata_dir = \"elsewhere\"\n[limits]\nqueue_messages_max = 5\n[plugins]\ncompile_cpu_secs = 7\n",
    );
    // The command finds the broker by the folder that it still has.
    let socket = broker.folder().join("data");
    std::os::unix::fs::symlink(socket, broker.folder().join("elsewhere")).expect("link");
    for _ in 0..2 {
        let (ok, said) = ctl(broker.folder(), &["reload"]);
        let (_, restart) = said.split_once("needs a restart:\n").expect("some do");
        for wanted in ["shards: 1 -> 2", "data_dir: ", "plugins.compile_cpu_secs: 300 -> 7"] {
            assert!(ok && restart.contains(wanted), "{said}");
        }
    }
    assert!(ctl(broker.folder(), &["status"]).1.contains("0 connections"), "it still answers");
}

/// SIGHUP is what `systemctl reload`, logrotate and the end of a terminal send.
#[test]
fn no_signal_but_term_and_int_ends_the_broker() {
    let broker = Broker::start("");
    let mut client = broker.connect(&Options::new(V5, "c"));
    for (signal, line) in [
        (Signal::HUP, RELOADED),
        (Signal::USR1, "1 connections, 1 Sessions, 0 subscriptions"),
        (Signal::USR2, "SIGUSR2 does nothing"),
    ] {
        broker.signal(signal);
        broker.await_log(line, 1);
        client.ping();
    }
    broker.stop();
}

/// As the loader would say it when the broker starts, and without compiling anything.
#[test]
fn a_check_knows_what_plugins_import_and_are_not_granted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let check = |grants: &str| {
        let probe = wasmqtt_guests::component("probe");
        let plugin = format!("[[plugin]]\nname = \"probe\"\npath = \"{}\"\n{grants}", probe.display());
        std::fs::write(folder.path().join("wasmqtt.toml"), plugin).expect("write");
        let out = wasmqtt().args(["config", "check", "wasmqtt.toml"]).current_dir(folder.path()).output();
        let out = out.expect("the binary runs");
        (out.status.success(), String::from_utf8_lossy(&out.stderr).into_owned())
    };
    let (ok, said) = check("grants = { publish = [\"a\"], disconnect = true, ban = true, revoke = true }\n");
    assert!(ok, "{said}");
    let (ok, said) = check("grants = { publish = [\"a\"], ban = true, revoke = true }\n");
    assert!(
        !ok && said.contains("wasmqtt.toml:2: plugin.name = \"probe\"") && said.contains("disconnect = true"),
        "{said}"
    );
}

fn demo(password: &str, more: &str) -> String {
    let demo = wasmqtt_guests::component("auth-demo");
    let entry = format!("name = \"auth-demo\"\npath = \"{}\"\nconfig = {{ ann = \"{password}\" }}\n", demo.display());
    format!("[limits]\nsubscriptions_max = 7\n[[plugin]]\n{entry}{more}")
}

/// Its settings are part of what a build is made of.
#[test]
fn plugins_take_other_settings_while_clients_stay() {
    let broker = Broker::start(&demo("one", ""));
    let login = |client_id: &str, password: &str| {
        let password = Some(password.into());
        Options { username: Some("ann".into()), password, ..Options::new(V5, client_id) }
    };
    let mut stays = broker.connect(&login("stays", "one"));
    rewrite(&broker, &demo("two", ""));
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(ok && said.contains("  plugin auth-demo: config.ann\n"), "{said}");
    assert!(!said.contains("two"), "a password, {said}");
    broker.check_refused(&login("c", "one"), 0x86);
    broker.connect(&login("c", "two")).ping();
    stays.ping();
    // Its queue is as large as it was made, and that is said as long as it is so.
    let smaller = demo("two", "limits = { feed_mib = 7, feed_tries = 9, memory_mib = 64, cpu_ms = 900 }\n");
    rewrite(&broker, &smaller);
    for _ in 0..2 {
        let (ok, said) = ctl(broker.folder(), &["reload"]);
        let (_, restart) = said.split_once("needs a restart:\n").expect("something does");
        let made_once = "plugin auth-demo: limits.feed_mib, limits.feed_tries, limits.memory_mib\n";
        assert!(ok && restart.contains(made_once), "{said}");
    }
    // One that cannot be had changes nothing, not even what could be.
    let more = "[[plugin]]\nname = \"broken\"\npath = \"wasmqtt.toml\"\n";
    rewrite(&broker, &demo("three", more).replace("subscriptions_max = 7", "subscriptions_max = 1"));
    let (ok, said) = ctl(broker.folder(), &["reload"]);
    assert!(!ok && said.contains("broken"), "{said}");
    let mut client = broker.connect(&login("d", "two"));
    assert_eq!((client.subscribe("a", 0), client.subscribe("b", 0)), (0, 0));
    broker.check_refused(&login("e", "three"), 0x86);
}
