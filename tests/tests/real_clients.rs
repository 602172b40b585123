//! Client libraries that others wrote, over loopback: all QoS pairs, retained messages, wills, Sessions, Shared
//! Subscriptions, payloads of no bytes and of one mebibyte.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use wasmqtt_tests::{Broker, Message, Options, Version};

const MEBIBYTE: usize = 1 << 20;
const TIMEOUT: Duration = Duration::from_secs(20);
/// Room for the header of a message of one mebibyte.
const CONFIG: &str = "[limits]\npacket_bytes_max = 1100000\n";

/// What the test wants of a client library.
trait Peer: Sized {
    /// With Session Present.
    fn connect(port: u16, id: &str, clean: bool, will: Option<(&str, &str)>) -> (Self, bool);
    /// Waits for SUBACK.
    fn subscribe(&mut self, filter: &str, qos: u8);
    /// Waits for the acknowledgement, if there is one.
    fn publish(&mut self, topic: &str, payload: &[u8], qos: u8, retain: bool);
    fn message(&mut self) -> Received;
    fn disconnect(self);
}

#[derive(Debug, PartialEq)]
struct Received {
    topic: String,
    payload: Vec<u8>,
    qos: u8,
    retain: bool,
}

/// rumqttc has the same types twice, for 3.1.1 and for 5.0.
macro_rules! rumqttc_peer {
    ($name:ident, $client:path, $connection:path, $packet:path, $event:path, $qos:path, $topic:expr) => {
        struct $name {
            client: $client,
            connection: $connection,
            messages: VecDeque<Received>,
        }

        impl $name {
            /// Drives the connection until `pick` has found what it waits for; messages are kept.
            fn until<T>(&mut self, mut pick: impl FnMut(&$packet) -> Option<T>) -> T {
                use $event as Event;
                use $packet as Packet;
                loop {
                    let event = self.connection.recv_timeout(TIMEOUT).expect("an event").expect("a connection");
                    let Event::Incoming(packet) = event else { continue };
                    if let Packet::Publish(publish) = &packet {
                        self.messages.push_back(Received {
                            topic: $topic(&publish.topic),
                            payload: publish.payload.to_vec(),
                            qos: publish.qos as u8,
                            retain: publish.retain,
                        });
                    }
                    if let Some(found) = pick(&packet) {
                        return found;
                    }
                }
            }

            fn qos(qos: u8) -> $qos {
                use $qos as QoS;
                [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce][usize::from(qos)]
            }

            fn over(client: $client, connection: $connection) -> (Self, bool) {
                use $packet as Packet;
                let mut peer = Self { client, connection, messages: VecDeque::new() };
                let present = peer.until(|packet| match packet {
                    Packet::ConnAck(connack) => Some(connack.session_present),
                    _ => None,
                });
                (peer, present)
            }

            fn subscribe_and_wait(&mut self, filter: &str, qos: u8) {
                use $packet as Packet;
                self.client.subscribe(filter, Self::qos(qos)).expect("subscribe");
                self.until(|packet| matches!(packet, Packet::SubAck(_)).then_some(()));
            }

            fn publish_and_wait(&mut self, topic: &str, payload: &[u8], qos: u8, retain: bool) {
                use $event as Event;
                use $packet as Packet;
                self.client.publish(topic, Self::qos(qos), retain, payload.to_vec()).expect("publish");
                match qos {
                    0 => {
                        while !matches!(
                            self.connection.recv_timeout(TIMEOUT).expect("an event").expect("a connection"),
                            Event::Outgoing(rumqttc::Outgoing::Publish(_))
                        ) {}
                    }
                    1 => self.until(|packet| matches!(packet, Packet::PubAck(_)).then_some(())),
                    _ => self.until(|packet| matches!(packet, Packet::PubComp(_)).then_some(())),
                }
            }

            fn next_message(&mut self) -> Received {
                use $packet as Packet;
                if self.messages.is_empty() {
                    self.until(|packet| matches!(packet, Packet::Publish(_)).then_some(()));
                }
                let message = self.messages.pop_front().expect("a message");
                // The acknowledgement is written when the connection is driven on.
                let _ = self.connection.recv_timeout(Duration::from_millis(20));
                message
            }

            fn say_goodbye(mut self) {
                self.client.disconnect().expect("disconnect");
                while let Ok(Ok(_)) = self.connection.recv_timeout(TIMEOUT) {}
            }
        }
    };
}

rumqttc_peer!(
    Rumqttc4,
    rumqttc::Client,
    rumqttc::Connection,
    rumqttc::Packet,
    rumqttc::Event,
    rumqttc::QoS,
    |topic: &String| topic.clone()
);
rumqttc_peer!(
    Rumqttc5,
    rumqttc::v5::Client,
    rumqttc::v5::Connection,
    rumqttc::v5::mqttbytes::v5::Packet,
    rumqttc::v5::Event,
    rumqttc::v5::mqttbytes::QoS,
    |topic: &[u8]| String::from_utf8(topic.to_vec()).expect("a Topic Name")
);

impl Peer for Rumqttc4 {
    fn connect(port: u16, id: &str, clean: bool, will: Option<(&str, &str)>) -> (Self, bool) {
        let mut options = rumqttc::MqttOptions::new(id, "127.0.0.1", port);
        options.set_clean_session(clean).set_max_packet_size(2 * MEBIBYTE, 2 * MEBIBYTE);
        if let Some((topic, payload)) = will {
            options.set_last_will(rumqttc::LastWill::new(topic, payload, rumqttc::QoS::AtLeastOnce, false));
        }
        let (client, connection) = rumqttc::Client::new(options, 100);
        Self::over(client, connection)
    }

    fn subscribe(&mut self, filter: &str, qos: u8) {
        self.subscribe_and_wait(filter, qos);
    }

    fn publish(&mut self, topic: &str, payload: &[u8], qos: u8, retain: bool) {
        self.publish_and_wait(topic, payload, qos, retain);
    }

    fn message(&mut self) -> Received {
        self.next_message()
    }

    fn disconnect(self) {
        self.say_goodbye();
    }
}

impl Peer for Rumqttc5 {
    fn connect(port: u16, id: &str, clean: bool, will: Option<(&str, &str)>) -> (Self, bool) {
        let mut options = rumqttc::v5::MqttOptions::new(id, "127.0.0.1", port);
        options.set_clean_start(clean);
        options.set_max_packet_size(Some(2 << 20));
        if !clean {
            options.set_session_expiry_interval(Some(3600));
        }
        if let Some((topic, payload)) = will {
            let qos = rumqttc::v5::mqttbytes::QoS::AtLeastOnce;
            options.set_last_will(rumqttc::v5::mqttbytes::v5::LastWill::new(topic, payload, qos, false, None));
        }
        let (client, connection) = rumqttc::v5::Client::new(options, 100);
        Self::over(client, connection)
    }

    fn subscribe(&mut self, filter: &str, qos: u8) {
        self.subscribe_and_wait(filter, qos);
    }

    fn publish(&mut self, topic: &str, payload: &[u8], qos: u8, retain: bool) {
        self.publish_and_wait(topic, payload, qos, retain);
    }

    fn message(&mut self) -> Received {
        self.next_message()
    }

    fn disconnect(self) {
        self.say_goodbye();
    }
}

fn received(topic: &str, payload: &[u8], qos: u8, retain: bool) -> Received {
    Received { topic: topic.into(), payload: payload.into(), qos, retain }
}

fn check_library<P: Peer>() {
    let broker = Broker::start(CONFIG);
    let port = broker.address().port();
    let connect = |id: &str, clean| P::connect(port, id, clean, None);

    let (mut publisher, present) = connect("publisher", true);
    assert!(!present);
    let (mut subscriber, _) = connect("subscriber", true);
    for published in [0, 1, 2] {
        for subscribed in [0, 1, 2] {
            subscriber.subscribe("pairs/+", subscribed);
            publisher.publish("pairs/x", b"text", published, false);
            let qos = published.min(subscribed);
            assert_eq!(subscriber.message(), received("pairs/x", b"text", qos, false));
        }
    }

    publisher.publish("kept", b"retained", 1, true);
    subscriber.subscribe("kept", 2);
    assert_eq!(subscriber.message(), received("kept", b"retained", 1, true));
    publisher.publish("kept", b"", 1, true);
    assert_eq!(subscriber.message(), received("kept", b"", 1, false));

    let large: Vec<u8> = (0..MEBIBYTE).map(|index| (index % 253) as u8).collect();
    subscriber.subscribe("large", 2);
    for qos in [0, 1, 2] {
        publisher.publish("large", &large, qos, false);
        assert!(subscriber.message() == received("large", &large, qos, false));
    }

    let (mortal, _) = P::connect(port, "mortal", true, Some(("wills", "gone")));
    subscriber.subscribe("wills", 1);
    drop(mortal);
    assert_eq!(subscriber.message(), received("wills", b"gone", 1, false));

    let (mut lasting, present) = connect("lasting", false);
    assert!(!present);
    lasting.subscribe("while/away", 2);
    lasting.disconnect();
    for qos in [1, 2] {
        publisher.publish("while/away", &[b'0' + qos], qos, false);
    }
    let (mut lasting, present) = connect("lasting", false);
    assert!(present);
    assert_eq!(lasting.message(), received("while/away", b"1", 1, false));
    assert_eq!(lasting.message(), received("while/away", b"2", 2, false));

    let (mut one, _) = connect("one", true);
    let (mut two, _) = connect("two", true);
    one.subscribe("$share/group/jobs", 1);
    two.subscribe("$share/group/jobs", 1);
    for job in 0..10_u8 {
        publisher.publish("jobs", &[job], 1, false);
    }
    let mut jobs: Vec<u8> = (0..5).flat_map(|_| [one.message().payload[0], two.message().payload[0]]).collect();
    jobs.sort_unstable();
    assert_eq!(jobs, (0..10).collect::<Vec<_>>());
}

#[test]
fn rumqttc_speaks_3_1_1() {
    check_library::<Rumqttc4>();
}

#[test]
fn rumqttc_speaks_5() {
    check_library::<Rumqttc5>();
}

static ONE_AT_A_TIME: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// A Python that can `import paho.mqtt`: the one of `WASMQTT_PYTHON`, or `python3`, or one in an environment of our own
/// that is made when it is missing.
fn python() -> PathBuf {
    let has_paho = |python: &Path| {
        Command::new(python)
            .args(["-c", "import paho.mqtt.enums"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    let named = std::env::var_os("WASMQTT_PYTHON").map(PathBuf::from);
    if let Some(python) = named.into_iter().chain([PathBuf::from("python3")]).find(|python| has_paho(python)) {
        return python;
    }
    let _guard = ONE_AT_A_TIME.lock();
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let python = folder.join("bin/python");
    if has_paho(&python) {
        return python;
    }
    let hint = "these tests need the Python package paho-mqtt 2; `./dev test` brings it, or set WASMQTT_PYTHON";
    let make = run(Command::new("python3").args(["-m", "venv"]).arg(&folder));
    assert!(make.status.success(), "{hint}\npython3 -m venv: {}", String::from_utf8_lossy(&make.stderr));
    let install = run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "paho-mqtt>=2,<3"]));
    assert!(install.status.success(), "{hint}\npip install: {}", String::from_utf8_lossy(&install.stderr));
    python
}

fn run(command: &mut Command) -> Output {
    command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("run {command:?}: {error}"))
}

fn check_paho(version: &str) {
    let broker = Broker::start(CONFIG);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("paho/check.py");
    let output = run(Command::new(python()).arg(script).arg(broker.address().port().to_string()).arg(version));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(text(&output.stdout).trim(), "good");
}

#[test]
fn paho_speaks_3_1_1() {
    check_paho("3.1.1");
}

#[test]
fn paho_speaks_5() {
    check_paho("5");
}

fn mosquitto(name: &str, broker: &Broker, version: &str) -> Command {
    let mut command = Command::new(name);
    command.args(["-h", "127.0.0.1", "-p", &broker.address().port().to_string(), "-V", version]);
    command
}

fn check_run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| {
        panic!("run {command:?}: {error}\nthese tests need the command line clients of mosquitto (mosquitto-clients)")
    });
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// `mosquitto_sub`, once it has subscribed.
struct Subscriber {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

fn mosquitto_sub(broker: &Broker, version: &str, arguments: &[&str]) -> Subscriber {
    // With -d it tells when it has subscribed; libc buffers that unless told otherwise.
    let mut command = Command::new("stdbuf");
    command.args([
        "-oL",
        "mosquitto_sub",
        "-h",
        "127.0.0.1",
        "-p",
        &broker.address().port().to_string(),
        "-V",
        version,
    ]);
    command.args(["-d", "-W", "20"]).args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    let mut stdout = BufReader::new(child.stdout.take().expect("stdout"));
    let mut line = String::new();
    while !line.starts_with("Subscribed") {
        line.clear();
        assert!(stdout.read_line(&mut line).expect("read") > 0, "{command:?} ended early");
    }
    Subscriber { child, stdout }
}

impl Subscriber {
    /// What it printed, without the lines in which it talks about itself.
    fn finish(mut self) -> Vec<String> {
        let mut text = String::new();
        self.stdout.read_to_string(&mut text).expect("text");
        let status = self.child.wait().expect("wait");
        assert!(status.success(), "{status}");
        text.lines().filter_map(|line| line.strip_prefix("> ")).map(Into::into).collect()
    }

    fn kill(mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }
}

/// Also [MQTT-7.0.0-2] (3.1.1): nothing but the standard is needed.
#[test]
fn mosquitto_clients_exchange_messages() {
    let broker = Broker::start(CONFIG);
    for version in ["mqttv31", "mqttv311", "mqttv5"] {
        for published in ["0", "1", "2"] {
            for subscribed in ["0", "1", "2"] {
                let arguments = ["-t", "pairs/+", "-q", subscribed, "-C", "2", "-F", "> %t %q %l %p"];
                let subscriber = mosquitto_sub(&broker, version, &arguments);
                let publish = |extra: &[&str]| {
                    check_run(
                        mosquitto("mosquitto_pub", &broker, version)
                            .args(["-t", "pairs/x", "-q", published])
                            .args(extra),
                    )
                };
                publish(&["-m", "text"]);
                publish(&["-n"]);
                let qos = published.min(subscribed);
                // Two publishers: nothing orders what they send.
                let mut got = subscriber.finish();
                got.sort();
                assert_eq!(got, [format!("pairs/x {qos} 0 "), format!("pairs/x {qos} 4 text")]);
            }
        }
    }
}

#[test]
fn mosquitto_clients_see_retained_messages_and_wills() {
    let broker = Broker::start(CONFIG);
    for version in ["mqttv31", "mqttv311", "mqttv5"] {
        check_run(mosquitto("mosquitto_pub", &broker, version).args(["-t", "kept", "-q", "1", "-r", "-m", "retained"]));
        let subscriber = mosquitto_sub(&broker, version, &["-t", "kept", "-q", "1", "-C", "1", "-F", "> %r %p"]);
        assert_eq!(subscriber.finish(), ["1 retained"]);
        check_run(mosquitto("mosquitto_pub", &broker, version).args(["-t", "kept", "-q", "1", "-r", "-n"]));

        let watcher = mosquitto_sub(&broker, version, &["-t", "wills", "-q", "1", "-C", "1", "-F", "> %p"]);
        let will = ["-t", "t", "--will-topic", "wills", "--will-payload", "gone", "--will-qos", "1"];
        mosquitto_sub(&broker, version, &will).kill();
        assert_eq!(watcher.finish(), ["gone"]);
    }
}

#[test]
fn mosquitto_clients_resume_sessions_and_share_subscriptions() {
    let broker = Broker::start(CONFIG);
    for version in ["mqttv311", "mqttv5"] {
        let id = format!("lasting-{version}");
        let mut lasting = vec!["-t", "away", "-q", "2", "-c", "-i", &id];
        if version == "mqttv5" {
            lasting.extend(["-x", "3600"]);
        }
        check_run(mosquitto("mosquitto_sub", &broker, version).args(&lasting).arg("-E"));
        for text in ["1", "2"] {
            check_run(mosquitto("mosquitto_pub", &broker, version).args(["-t", "away", "-q", text, "-m", text]));
        }
        let text = check_run(mosquitto("mosquitto_sub", &broker, version).args(&lasting).args(["-C", "2", "-W", "20"]));
        assert_eq!(text, "1\n2\n");

        let share = ["-t", "$share/group/jobs", "-q", "1", "-C", "2", "-F", "> %p"];
        let members = [mosquitto_sub(&broker, version, &share), mosquitto_sub(&broker, version, &share)];
        for job in ["1", "2", "3", "4"] {
            check_run(mosquitto("mosquitto_pub", &broker, version).args(["-t", "jobs", "-q", "1", "-m", job]));
        }
        let mut jobs: Vec<String> = members.into_iter().flat_map(Subscriber::finish).collect();
        jobs.sort();
        assert_eq!(jobs, ["1", "2", "3", "4"]);
    }
}

#[test]
fn mosquitto_clients_take_one_mebibyte() {
    let broker = Broker::start(CONFIG);
    let file = broker.folder().join("large");
    std::fs::write(&file, vec![b'x'; MEBIBYTE]).expect("write");
    for version in ["mqttv311", "mqttv5"] {
        let subscriber = mosquitto_sub(&broker, version, &["-t", "large", "-q", "2", "-C", "1", "-F", "> %l"]);
        check_run(mosquitto("mosquitto_pub", &broker, version).args(["-t", "large", "-q", "2", "-f"]).arg(&file));
        assert_eq!(subscriber.finish(), [MEBIBYTE.to_string()]);
    }
}

/// Response Topic and Correlation Data reach the responder and come back. MQTT 5.0 §4.10.
#[test]
fn mosquitto_rr_gets_its_response() {
    let broker = Broker::start(CONFIG);
    let mut responder = broker.connect(&Options::new(Version::V5, "responder"));
    responder.subscribe("ask", 1);
    let mut command = mosquitto("mosquitto_rr", &broker, "mqttv5");
    command.args(["-t", "ask", "-e", "answer/here", "-m", "question", "-q", "1", "-W", "20"]);
    command.args(["-D", "publish", "correlation-data", "42", "-F", "%D %p"]);
    let asker = command.stdout(Stdio::piped()).spawn().expect("mosquitto_rr");
    let start = Instant::now();
    let question = responder.message();
    assert_eq!((question.text(), question.response_topic.as_deref()), ("question", Some("answer/here")));
    let answer =
        Message { correlation_data: question.correlation_data, ..Message::new("answer/here", "answer").qos(1) };
    responder.publish(&answer);
    let output = asker.wait_with_output().expect("wait");
    assert!(output.status.success() && start.elapsed() < TIMEOUT);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "42 answer");
}
