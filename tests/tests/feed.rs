//! Messages for `committed` that the plugin cannot take, and the bounds of what waits for a plugin.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wasmqtt_tests::{Broker, Client, Message, Options, SubscribeOptions, Version, at_most, wasmqtt};

const V5: Version = Version::V5;
const PATIENCE: Duration = Duration::from_secs(90);

/// Takes each request and notes its body.
fn collect(listener: TcpListener) -> Arc<Mutex<String>> {
    let bodies = Arc::new(Mutex::new(String::new()));
    let noted = Arc::clone(&bodies);
    // Ends with the test's process.
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let Some(body) = read_body(&stream) else { continue };
            noted.lock().expect("not poisoned").push_str(&body);
            let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        }
    });
    bodies
}

fn read_body(stream: &std::net::TcpStream) -> Option<String> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    let mut reader = BufReader::new(stream);
    let (mut length, mut is_chunked) = (0, false);
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let line = line.trim().to_ascii_lowercase();
        if line.is_empty() {
            break;
        }
        length = line.strip_prefix("content-length:").map_or(length, |value| value.trim().parse().unwrap_or(0));
        is_chunked |= line.contains("chunked");
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    while is_chunked {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let size = usize::from_str_radix(line.trim(), 16).ok()?;
        let mut chunk = vec![0; size + 2];
        reader.read_exact(&mut chunk).ok()?;
        body.extend_from_slice(&chunk[..size]);
        is_chunked = size > 0;
    }
    String::from_utf8(body).ok()
}

fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !until() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Standard output of `wasmqtt plugin …`, or what it says when it fails.
fn run(broker: &Broker, arguments: &[&str]) -> Result<String, String> {
    let config = broker.folder().join("wasmqtt.toml");
    let output = wasmqtt().arg("plugin").args(arguments).arg("--config").arg(config).output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

/// A figure of the only plugin.
fn figure(broker: &Broker, name: &str) -> u64 {
    let listed = run(broker, &["list", "--json"]).expect("lists");
    let found = listed.split_once(&format!("\"{name}\": ")).unwrap_or_else(|| panic!("no {name} in {listed}")).1;
    found.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).expect("a number")
}

fn probe(config: &str, limits: &str) -> String {
    let file = wasmqtt_guests::component("probe");
    format!(
        "[[plugin]]\nname = \"probe\"\npath = \"{}\"\nconfig = {{ {config} }}\nlimits = {{ {limits} }}\n\
         grants = {{ publish = [\"committed/#\", \"event/#\"], disconnect = true, ban = true, revoke = true }}\n",
        file.display()
    )
}

fn listening(broker: &Broker) -> Client {
    let mut client = broker.connect(&Options::new(V5, "listener"));
    assert_eq!(client.subscribe("committed/#", 1), 1);
    client
}

/// While its server is away, a plugin is sent messages that do not fit into its memory; when the server comes back,
/// all others arrive.
#[test]
fn messages_that_are_too_large_do_not_stop_those_behind_them() {
    let reserved = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address: SocketAddr = reserved.local_addr().expect("an address");
    drop(reserved);
    let broker = Broker::start(&format!(
        "[[plugin]]\nname = \"topic-tap\"\npath = \"{}\"\nconfig = {{ url = \"http://{address}/in\", filters = \"p/#\" }}\n\
         grants = {{ http = [\"http://{address}\"] }}\n",
        wasmqtt_guests::component("topic-tap").display()
    ));
    let mut client = broker.connect(&Options::new(V5, "c"));
    let large = (0..14).fold(Message::new("p/x", "").qos(1), |message, _| message.user("n", &"v".repeat(64_000)));
    for _ in 0..20 {
        client.publish(&large);
    }
    for n in 0..5 {
        client.publish(&Message::new(&format!("p/small-{n}"), "x").qos(1));
    }
    broker.await_log("plugin did not take messages, will try again", 3);
    let bodies = collect(TcpListener::bind(address).expect("the port is still free"));
    let all = |bodies: &str| (0..5).all(|n| bodies.contains(&format!("p/small-{n}")));
    wait("small messages arrive", || all(&bodies.lock().expect("not poisoned")));
    wait("nothing waits any more", || figure(&broker, "feed_waiting") == 0);
}

/// What a plugin cannot take is set aside, also after a restart, until an operator skips it or has it tried again.
#[test]
fn a_message_that_is_never_taken_is_set_aside() {
    let config = probe("filters = \"a/#\", committed = \"true\"", "feed_tries = 2");
    let broker = Broker::start(&config);
    let mut listener = listening(&broker);
    let mut client = broker.connect(&Options::new(V5, "c"));
    for topic in ["a/1/committed-fail", "a/2", "a/3/committed-trap", "a/4/committed-refuse", "a/5"] {
        client.publish(&Message::new(topic, topic).qos(1));
    }
    let mut got = listener.texts(2);
    got.sort();
    got.dedup();
    assert_eq!(got.first().map(String::as_str), Some("a/2"), "{got:?}");
    wait("three are set aside", || figure(&broker, "feed_aside") == 3 && figure(&broker, "feed_waiting") == 0);
    broker.await_log("message set aside", 3);
    let listed = run(&broker, &["feed", "list", "probe"]).expect("lists");
    assert!(listed.contains("3 are set aside") && listed.contains("a/1/committed-fail"), "{listed}");
    assert!(listed.contains("as told") && listed.contains("a/3/committed-trap"), "{listed}");

    let folder: TempDir = broker.crash();
    let broker = Broker::start_in(folder, &config);
    assert_eq!((figure(&broker, "feed_aside"), figure(&broker, "feed_waiting")), (3, 0));
    let mut listener = listening(&broker);
    let mut client = broker.connect(&Options::new(V5, "c"));
    client.publish(&Message::new("a/6", "a/6").qos(1));
    assert_eq!(listener.message().text(), "a/6");
    let shown = run(&broker, &["feed", "show", "probe", "a1"]).expect("shows");
    assert!(shown.contains("payload     a/1/committed-fail") && shown.contains("client      c"), "{shown}");
    assert_eq!(run(&broker, &["feed", "skip", "probe", "a1"]), Ok("skipped 1\n".into()));
    assert!(run(&broker, &["feed", "skip", "probe", "a1"]).is_err_and(|error| error.contains("no message a1")));
    assert!(run(&broker, &["feed", "list", "nobody"]).is_err_and(|error| error.contains("no plugin")));
    assert_eq!(run(&broker, &["feed", "retry", "probe"]), Ok("2 will be tried again\n".into()));
    wait("the trap and the refusal fail again", || {
        figure(&broker, "feed_aside") == 2 && figure(&broker, "feed_waiting") == 0
    });

    let folder = broker.crash();
    let broker = Broker::start_in(folder, &config);
    assert_eq!((figure(&broker, "feed_aside"), figure(&broker, "feed_waiting")), (2, 0), "the other one was skipped");
}

/// A plugin that takes nothing at all loses nothing: what fails alone is set aside only if others succeed.
#[test]
fn nothing_is_set_aside_while_nothing_succeeds() {
    let broker =
        Broker::start(&probe("filters = \"a/#\", committed = \"true\", committed_fails = \"true\"", "feed_tries = 1"));
    let mut client = broker.connect(&Options::new(V5, "c"));
    for n in 0..5 {
        client.publish(&Message::new(&format!("a/{n}"), "x").qos(1));
    }
    broker.await_log("plugin did not take messages, will try again", 7);
    assert_eq!((figure(&broker, "feed_aside"), figure(&broker, "feed_waiting")), (0, 5));
}

/// The oldest make room, in the store as well: after a crash, as many wait as before.
#[test]
fn messages_that_wait_are_bounded_in_number_and_bytes() {
    for (limits, payload, kept) in [("feed_messages_max = 10", 1, 10), ("feed_mib = 1", 300_000, 3)] {
        let config = probe("filters = \"a/#\", committed = \"true\", committed_fails = \"true\"", limits);
        let broker = Broker::start(&config);
        let mut client = broker.connect(&Options::new(V5, "c"));
        for n in 0..25 {
            client.publish(&Message::new(&format!("a/{n}"), "x".repeat(payload)).qos(1));
        }
        let figures = |broker: &Broker| (figure(broker, "feed_waiting"), figure(broker, "feed_dropped"));
        wait("so many were dropped", || figures(&broker) == (kept, 25 - kept));
        let listed = run(&broker, &["feed", "list", "probe"]).expect("lists");
        let is_there = |n: u64| listed.split_whitespace().any(|word| word == format!("a/{n}"));
        assert!(is_there(25 - kept) && is_there(24) && !is_there(24 - kept), "the newest are there: {listed}");
        broker.await_log("messages for `committed` are dropped", 1);
        let broker = Broker::start_in(broker.crash(), &config);
        assert_eq!(figures(&broker), (kept, 0), "with {limits}");
    }
}

/// What waits for a plugin that does not keep up is bounded in bytes; the rest is dropped and counted.
#[test]
fn events_and_filters_that_wait_are_bounded_in_bytes() {
    let broker = Broker::start(&probe("events = \"subscribed unsubscribed\", slow = \"true\"", "deadline_ms = 600000"));
    let before = broker.rss();
    let mut client = broker.connect(&Options::new(V5, "c"));
    for n in 0..1500 {
        let filter = format!("{n}/{}", "x".repeat(60_000));
        let filters: [(&str, SubscribeOptions); 1] = [(&filter, at_most(0))];
        client.subscribe_with(None, &filters);
        client.unsubscribe(&[&filter]);
    }
    // Without bounds in bytes these are 180 MB for `events`, and as much for `cluster`.
    let grown = broker.rss().saturating_sub(before);
    assert!(grown < 130 << 20, "{} MiB", grown >> 20);
    wait("events were dropped", || figure(&broker, "events_dropped") > 500);
    wait("changes were dropped", || figure(&broker, "interest_dropped") > 500);
    let listed = run(&broker, &["list"]).expect("lists");
    assert!(listed.contains("events were dropped"), "{listed}");
}
