//! The log of the real broker: one line per event whatever clients call themselves, and nobody waits for its reader.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, wasmqtt};

const V5: Version = Version::V5;
/// A Client Identifier that would be a line of its own, clear the screen, and turn the text behind it round.
const FORGED: &str = "c\n2026-01-01T00:00:00.000000Z ERROR wasmqtt: forged\u{1b}[2J\u{9b}2J\u{202e} plugin=evil";

fn probe(more: &str) -> String {
    format!(
        "{more}[[plugin]]\nname = \"probe\"\npath = \"{}\"\ntopics = [\"evil/#\"]\n\
         grants = {{ publish = [\"storm/#\"], disconnect = true, ban = true, revoke = true }}\n",
        wasmqtt_guests::component("probe").display()
    )
}

/// Has a plugin call fail for a client of that name, and gives the log.
fn log_of_failure(config: &str) -> String {
    let broker = Broker::start(config);
    let mut client = broker.connect(&Options::new(V5, FORGED));
    assert_eq!(client.publish(&Message::new("evil/trap", "x").qos(1)), 0x87);
    broker.await_log("plugin call failed", 1);
    client.disconnect();
    broker.stop()
}

#[test]
fn a_client_identifier_cannot_forge_a_line() {
    let log = log_of_failure(&probe("log.level = \"debug\"\n"));
    assert!(log.contains("forged"), "it is shown, {log}");
    for line in log.lines().filter(|line| !line.starts_with("listening on ")) {
        assert!(line.starts_with("20") && !line.contains(" ERROR wasmqtt: forged\u{1b}"), "{line:?}");
        assert!(!line.starts_with("2026-01-01T00:00:00.000000Z"), "{line:?}");
        assert!(!line.chars().any(|c| c.is_control() || c == '\u{202e}'), "{line:?}");
        assert!(line.len() < 16 * 1024, "{} bytes", line.len());
    }
}

#[test]
fn a_client_identifier_cannot_forge_a_line_of_json() {
    let log = log_of_failure(&probe("log = { level = \"debug\", format = \"json\" }\n"));
    let mut seen = false;
    for line in log.lines().filter(|line| !line.starts_with("listening on ")) {
        assert!(line.starts_with("{\"timestamp\":") && line.ends_with('}'), "{line:?}");
        assert!(!line.chars().any(|c| c.is_control() || c == '\u{202e}'), "{line:?}");
        seen |= line.contains("forged");
    }
    assert!(seen, "{log}");
}

/// A line for tools that block addresses, and no more of them than they need.
#[test]
fn a_refused_login_is_logged_with_its_address_but_not_each() {
    let broker = Broker::start("[auth]\nanonymous = false\n");
    for n in 0..60 {
        broker.check_refused(&Options::new(V5, &format!("c{n}")), 0x87);
    }
    broker.await_log("login refused address=127.0.0.1 client_id=c0", 1);
    let log = broker.stop();
    let lines = log.lines().filter(|line| line.contains("login refused")).count();
    assert!((10..30).contains(&lines), "{lines} lines\n{log}");
}

/// What a client does is no news to an operator. At `info` a client that misbehaves in all sorts of ways is silent.
#[test]
fn mistakes_of_clients_are_not_in_the_log() {
    let broker = Broker::start(&probe(""));
    let before = broker.log().lines().count();
    let mut client = broker.connect(&Options::new(V5, "c").will(Message::new("evil/deny", "x")));
    client.send_raw(&[0xff, 0xff]);
    assert!(matches!(client.recv(), Got::Disconnect { .. } | Got::Closed));
    let mut client = Client::open(broker.address(), V5);
    client.send_raw(b"GET / HTTP/1.1\r\n\r\n");
    assert_eq!(client.recv(), Got::Closed);
    let log = broker.stop();
    let lines: Vec<&str> = log.lines().skip(before).filter(|line| !line.contains("stopped")).collect();
    assert!(lines.iter().all(|line| line.contains("draining")), "{lines:?}");
}

/// A broker whose standard error is a pipe that nobody reads.
struct Unread {
    child: Child,
    address: SocketAddr,
}

impl Unread {
    fn start(folder: &Path, config: &str) -> Self {
        let file = folder.join("wasmqtt.toml");
        std::fs::write(&file, config).expect("write the configuration");
        let mut command = wasmqtt();
        command.args(["serve", "--listen", "127.0.0.1:0", "--config"]).arg(file).current_dir(folder);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
        out.read_line(&mut line).expect("a line");
        let address = line.trim().strip_prefix("listening on mqtt://").and_then(|address| address.parse().ok());
        Self { child, address: address.unwrap_or_else(|| panic!("{line:?}")) }
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn clients_go_on_while_nobody_reads_the_log() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut broker = Unread::start(folder.path(), "log.level = \"debug\"\nauth.anonymous = false\n");
    // A pipe holds 64 KiB, and the log waits for its reader with 1 MiB; each of these is a line of more than 1 KiB.
    for n in 0..2_000 {
        let mut client = Client::open(broker.address, V5);
        client.send_connect(&Options::new(V5, &format!("{n}-{}", "x".repeat(2_000))));
        assert!(matches!(client.recv(), Got::Connack(connack) if connack.reason == 0x87), "{n}");
    }
    let mut log = BufReader::new(broker.child.stderr.take().expect("a pipe"));
    let (mut lines, mut lost) = (0, 0);
    let mut line = String::new();
    while lost == 0 && log.read_line(&mut line).expect("text") > 0 {
        lines += 1;
        if let Some(report) = line.strip_prefix("wasmqtt: ") {
            lost = report.split(' ').next().and_then(|number| number.parse().ok()).expect("a number");
        }
        line.clear();
    }
    assert!(lost > 0 && lines > 60, "{lines} lines, {lost} lost");
}

/// With a pipe that is full the end must not wait for ever either.
#[test]
fn the_end_does_not_wait_for_a_reader_of_the_log() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut broker = Unread::start(folder.path(), "log.level = \"debug\"\nauth.anonymous = false\n");
    for n in 0..200 {
        let mut client = Client::open(broker.address, V5);
        client.send_connect(&Options::new(V5, &format!("{n}-{}", "x".repeat(2_000))));
        assert!(matches!(client.recv(), Got::Connack(_)), "{n}");
    }
    let pid = i32::try_from(broker.child.id()).ok().and_then(rustix::process::Pid::from_raw).expect("process id");
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("signal the broker");
    let begun = std::time::Instant::now();
    while broker.child.try_wait().expect("our child").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(30), "the broker does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    let mut rest = String::new();
    broker.child.stderr.take().expect("a pipe").read_to_string(&mut rest).expect("text");
    assert!(rest.contains("login refused"), "{rest}");
}
