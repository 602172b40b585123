//! The real binary, as an operator meets it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

/// CONNECT of MQTT 5.0: Clean Start, Keep Alive 60, Client Identifier `c`.
const CONNECT: &[u8] = b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c";
/// For anything that should take milliseconds, on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(20);

fn wasmqtt(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wasmqtt"));
    command.current_dir(folder).args(args).stdin(Stdio::null());
    command
}

fn output(folder: &Path, args: &[&str]) -> Output {
    wasmqtt(folder, args).output().expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A broker that ends with the test.
struct Broker {
    child: Child,
    listeners: Vec<String>,
}

impl Broker {
    fn start(folder: &Path, args: &[&str], listeners: usize) -> Self {
        let mut child = wasmqtt(folder, args).stdout(Stdio::piped()).spawn().expect("the binary runs");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let listeners = lines.take(listeners).map(|line| {
            let line = line.expect("text");
            line.strip_prefix("listening on ").unwrap_or_else(|| panic!("unexpected line {line:?}")).to_owned()
        });
        let listeners = listeners.collect();
        Self { child, listeners }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a process id")).expect("not zero");
        kill_process(pid, signal).expect("the process is there");
    }

    fn exit_code(&mut self) -> Option<i32> {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().expect("our child") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the broker did not end");
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends CONNECT and takes CONNACK, which must be a success.
fn connect(stream: &mut (impl Read + Write)) {
    stream.write_all(CONNECT).expect("written");
    let mut head = [0; 4];
    stream.read_exact(&mut head).expect("CONNACK");
    assert_eq!((head[0], head[3]), (0x20, 0), "{head:x?}");
    let mut rest = vec![0; usize::from(head[1]) - 2];
    stream.read_exact(&mut rest).expect("the rest of CONNACK");
}

fn connect_tcp(listener: &str) -> TcpStream {
    let address = listener.strip_prefix("mqtt://").expect("a TCP listener");
    let mut stream = TcpStream::connect(address).expect("a listening broker");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    connect(&mut stream);
    stream
}

#[test]
fn serve_prints_real_ports_and_takes_clients() {
    let folder = TempDir::new().expect("temporary folder");
    let socket = format!("unix:{}", folder.path().join("mqtt.sock").display());
    let broker = Broker::start(folder.path(), &["serve", "--listen", "127.0.0.1:0", "--listen", &socket], 2);
    assert!(!broker.listeners[0].ends_with(":0"), "{:?}", broker.listeners);
    assert_eq!(broker.listeners[1], socket);
    connect_tcp(&broker.listeners[0]);
    connect(&mut UnixStream::connect(folder.path().join("mqtt.sock")).expect("a listening broker"));
}

/// MQTT 5.0 §3.14.2.1: 0x8B Server shutting down.
#[test]
fn a_signal_drains_and_ends_with_success() {
    for signal in [Signal::TERM, Signal::INT] {
        let folder = TempDir::new().expect("temporary folder");
        let mut broker = Broker::start(folder.path(), &["serve", "--listen", "127.0.0.1:0"], 1);
        let mut client = connect_tcp(&broker.listeners[0]);
        broker.signal(signal);
        let mut last = Vec::new();
        client.read_to_end(&mut last).expect("the end of the connection");
        assert!(last.starts_with(&[0xe0]) && last.get(2) == Some(&0x8b), "{last:x?}");
        drop(client);
        assert_eq!(broker.exit_code(), Some(0));
    }
}

#[test]
fn a_taken_address_is_named() {
    let folder = TempDir::new().expect("temporary folder");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address").to_string();
    let out = output(folder.path(), &["serve", "--listen", &address]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains(&address), "{}", text(&out.stderr));
}

#[test]
fn an_open_door_is_refused_with_what_to_set() {
    let folder = TempDir::new().expect("temporary folder");
    let out = output(folder.path(), &["serve", "--listen", "0.0.0.0:0"]);
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(1));
    assert!(said.contains("anonymous = true") && said.contains("auth-file"), "{said}");
    fs::write(folder.path().join("open.toml"), "[auth]\nanonymous = true\n").expect("file");
    Broker::start(folder.path(), &["serve", "--config", "open.toml", "--listen", "0.0.0.0:0"], 1);
}

#[test]
fn config_check_tells_by_its_exit_status() {
    let folder = TempDir::new().expect("temporary folder");
    fs::write(folder.path().join("good.toml"), "[limits]\nmaximum_qos = 1\n").expect("file");
    fs::write(folder.path().join("bad.toml"), "[limits]\nmaximum_qos = 3\nkeep_alive = 1\n").expect("file");
    let good = output(folder.path(), &["config", "check", "good.toml"]);
    assert_eq!(good.status.code(), Some(0), "{}", text(&good.stderr));
    let bad = output(folder.path(), &["config", "check", "bad.toml"]);
    assert_eq!(bad.status.code(), Some(1));
    let said = text(&bad.stderr);
    assert!(said.contains("bad.toml:2: limits.maximum_qos = 3: allowed is a whole number from 0 to 2"), "{said}");
    assert!(said.contains("bad.toml:3: unknown key `limits.keep_alive` = 1: did you mean"), "{said}");
    assert_eq!(output(folder.path(), &["config", "check", "none.toml"]).status.code(), Some(1));
    assert_eq!(output(folder.path(), &["serve", "--config", "bad.toml"]).status.code(), Some(1));
}

#[test]
fn config_show_prints_every_value() {
    let folder = TempDir::new().expect("temporary folder");
    fs::write(folder.path().join("some.toml"), "[limits]\nmaximum_qos = 1\n").expect("file");
    let shown = text(&output(folder.path(), &["config", "show", "some.toml"]).stdout);
    for line in ["maximum_qos = 1", "packet_bytes_max = 1048576", "bind = \"127.0.0.1:1883\"", "durability = \"fsync\""]
    {
        assert!(shown.lines().any(|shown| shown == line), "{line} is not in\n{shown}");
    }
    let json = output(folder.path(), &["config", "show", "--json", "some.toml"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(json["limits"]["maximum_qos"], 1);
    assert_eq!(json["listener"][0]["bind"], "127.0.0.1:1883");
}

#[test]
fn passwd_takes_the_password_from_standard_input() {
    let folder = TempDir::new().expect("temporary folder");
    let file = folder.path().join("passwords");
    let set = |user: &str, password: &str| {
        let mut command =
            wasmqtt(folder.path(), &["passwd", "--memory-kib", "64", "--iterations", "1", "passwords", user]);
        let mut child = command.stdin(Stdio::piped()).spawn().expect("the binary runs");
        child.stdin.take().expect("a pipe").write_all(password.as_bytes()).expect("written");
        child.wait().expect("our child").success()
    };
    assert!(set("ann", "secret\n"));
    let first = fs::read_to_string(&file).expect("file");
    assert!(first.starts_with("ann:$argon2id$v=19$m=64,t=1,p=1$") && first.ends_with('\n'), "{first}");
    assert_eq!(fs::metadata(&file).expect("file").permissions().mode() & 0o777, 0o600);
    assert!(set("ann", "other"));
    assert!(set("bob", "secret"));
    let second = fs::read_to_string(&file).expect("file");
    assert_eq!(second.lines().count(), 2);
    assert_ne!(second.lines().next(), first.lines().next());
    assert!(!set("ann", ""), "an empty password");
    assert!(!set("a:b", "secret"), "a name that would break the file");
    assert!(output(folder.path(), &["passwd", "--delete", "passwords", "ann"]).status.success());
    assert!(!output(folder.path(), &["passwd", "--delete", "passwords", "ann"]).status.success());
    assert!(fs::read_to_string(&file).expect("file").starts_with("bob:"));
}

#[test]
fn help_shows_examples() {
    let folder = TempDir::new().expect("temporary folder");
    for args in [&["--help"][..], &["serve", "--help"], &["passwd", "--help"], &["ctl", "reload", "--help"]] {
        let out = output(folder.path(), args);
        assert!(out.status.success() && text(&out.stdout).contains("Examples:"), "{args:?}");
    }
    assert!(text(&output(folder.path(), &["--version"]).stdout).starts_with("wasmqtt "));
    assert_eq!(output(folder.path(), &["swerve"]).status.code(), Some(2));
}

#[test]
fn what_is_no_component_cannot_be_inspected() {
    let folder = TempDir::new().expect("temporary folder");
    fs::write(folder.path().join("x.wasm"), "not wasm").expect("file");
    let out = output(folder.path(), &["plugin", "inspect", "x.wasm"]);
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stderr).contains("x.wasm"), "{}", text(&out.stderr));
}
