//! Mosquitto as a bridge to this broker, as it comes.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use wasmqtt_tests::{Broker, Client, Message, Options, Version};

const V311: Version = Version::V311;
const PATIENCE: Duration = Duration::from_secs(30);

/// A mosquitto that bridges everything in both directions; ends with the test.
struct Mosquitto {
    child: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Mosquitto {
    fn start(to: &Broker, settings: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let address = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
        let mut text = format!("listener {} 127.0.0.1\nallow_anonymous true\n", address.port());
        let _ = write!(
            text,
            "connection up\naddress {}\ntopic # both 1\nrestart_timeout 1\nremote_clientid bridge\n{settings}\n",
            to.address()
        );
        let file = folder.path().join("mosquitto.conf");
        std::fs::write(&file, text).expect("write the configuration");
        let child = Command::new("mosquitto")
            .arg("-c")
            .arg(file)
            .env("PATH", format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("mosquitto is installed");
        let mosquitto = Self { child, address, _folder: folder };
        let start = Instant::now();
        while TcpStream::connect(address).is_err() {
            assert!(start.elapsed() < PATIENCE, "mosquitto does not listen");
            thread::sleep(Duration::from_millis(20));
        }
        mosquitto
    }

    fn connect(&self, id: &str) -> Client {
        let mut client = Client::open(self.address, V311);
        client.send_connect(&Options::new(V311, id));
        client.recv();
        client
    }
}

impl Drop for Mosquitto {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Publishes until the other side has it, and gives what came there first.
fn crosses(from: &mut Client, to: &mut Client, topic: &str) -> Message {
    let start = Instant::now();
    loop {
        from.publish(&Message::new(topic, "across").qos(1));
        if let Some(wasmqtt_tests::Got::Publish(message)) = to.recv_within(Duration::from_millis(500)) {
            return message;
        }
        assert!(start.elapsed() < PATIENCE, "{topic}: nothing came across");
    }
}

/// Both directions, whether the bridge says that it is one (which 3.1.1 cannot) or not, and with its state message, whose
/// topic and will lie below `$SYS/`.
#[test]
fn mosquitto_bridges_in_both_directions() {
    for settings in [
        "",
        "try_private true\nbridge_protocol_version mqttv31",
        "try_private false\nnotifications false",
        "try_private false\nnotifications_local_only true",
        "try_private false",
        "bridge_protocol_version mqttv50",
    ] {
        let broker = Broker::start("");
        let mosquitto = Mosquitto::start(&broker, settings);
        let (mut here, mut there) = (broker.connect(&Options::new(V311, "here")), mosquitto.connect("there"));
        here.subscribe("from/there", 1);
        there.subscribe("from/here", 1);
        assert_eq!(crosses(&mut there, &mut here, "from/there").text(), "across", "{settings}");
        assert_eq!(crosses(&mut here, &mut there, "from/here").text(), "across", "{settings}");
    }
}

/// A bridge that says so does not get its own messages back, so that nothing goes round between the brokers.
#[test]
fn messages_of_a_bridge_do_not_come_back() {
    let broker = Broker::start("");
    let mosquitto = Mosquitto::start(&broker, "");
    let (mut here, mut there) = (broker.connect(&Options::new(V311, "here")), mosquitto.connect("there"));
    here.subscribe("#", 1);
    there.subscribe("loop", 1);
    crosses(&mut there, &mut here, "first");
    while here.recv_within(Duration::from_millis(700)).is_some() {}
    there.publish(&Message::new("loop", "once").qos(1));
    assert_eq!(there.message().text(), "once");
    assert_eq!(here.message().text(), "once");
    assert!(there.recv_within(Duration::from_secs(1)).is_none(), "its own message came back");
    assert!(here.recv_within(Duration::from_millis(100)).is_none(), "and went round");
}
