//! The bundled plugins in the real broker, each with the settings that its documentation shows.

use std::path::Path;

use tempfile::TempDir;
use wasmqtt_tests::{Broker, Got, Message, Options, Version};

const V5: Version = Version::V5;

/// Of ann until 2100, who may publish below `up` and subscribe below `down`; signed with `s3cret`, key `a`.
const TOKEN: &str = "eyJhbGciOiJIUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJhbm4iLCJleHAiOjQxMDI0NDQ4MDAsImFjbCI6eyJwdWIiOlsidXAvIyJdLCJzdWIiOlsiZG93bi8jIl19fQ.w8DXLmJFhzl5KN56pvv8IcR7i4dRBT1fRGrWvYqjY2Q";
/// Of ann until 1970.
const OLD_TOKEN: &str =
    "eyJhbGciOiJIUzI1NiIsImtpZCI6ImEifQ.eyJzdWIiOiJhbm4iLCJleHAiOjF9.e-SStMDsx-jenE3gxABDqp5qm4pGaypFYM-45m0nQMo";

fn folder_with(name: &str, text: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join(name), text).expect("write");
    folder
}

fn entry(plugin: &str, more: &str) -> String {
    let path = wasmqtt_guests::component(plugin);
    format!("[[plugin]]\nname = \"{plugin}\"\npath = \"{}\"\n{more}\n", path.display())
}

fn file_grant(file: &Path, guest: &str) -> String {
    format!("files = [{{ host = \"{}\", guest = \"{guest}\" }}]", file.display())
}

fn login(client_id: &str, username: &str, password: &str) -> Options {
    Options { username: Some(username.into()), password: Some(password.into()), ..Options::new(V5, client_id) }
}

/// Claims become the permissions of the client.
#[test]
fn auth_jwt_takes_tokens() {
    let folder = folder_with("keys.json", r#"{"keys":[{"kty":"oct","kid":"a","alg":"HS256","k":"czNjcmV0"}]}"#);
    let grant = file_grant(&folder.path().join("keys.json"), "/keys.json");
    let more = format!("config = {{ jwks_file = \"/keys.json\" }}\ngrants = {{ {grant} }}");
    let broker = Broker::start(&entry("auth-jwt", &more));
    let mut ann = broker.connect(&login("c", "anything", TOKEN));
    assert_eq!((ann.subscribe("down/x", 1), ann.subscribe("up/x", 1)), (1, 0x87));
    assert_eq!(ann.publish(&Message::new("up/x", "x").qos(1)), 0x10);
    assert_eq!(ann.publish(&Message::new("down/x", "x").qos(1)), 0x87);
    broker.check_refused(&login("d", "anything", OLD_TOKEN), 0x86);
    broker.check_refused(&login("d", "anything", &TOKEN.replace('A', "B")), 0x86);
}

fn check_rules(format: &str, text: &str) {
    let folder = folder_with("rules", text);
    let grant = file_grant(&folder.path().join("rules"), "/rules");
    let more = format!("config = {{ file = \"/rules\", format = \"{format}\" }}\ngrants = {{ {grant} }}");
    let broker = Broker::start(&entry("acl-rules", &more));
    let mut one = broker.connect(&Options::new(V5, "one"));
    let filters = ["down/one/#", "down/two/#", "down/#", "$share/g/down/one/#"];
    assert_eq!(filters.map(|filter| one.subscribe(filter, 1)), [1, 0x87, 0x87, 1], "{format}");
    for (topic, reason) in [("up/one/a", 0x10), ("up/two/a", 0x87), ("else", 0x87)] {
        assert_eq!(one.publish(&Message::new(topic, "x").qos(1)), reason, "{format}: {topic}");
    }
}

/// The two forms of the same rules.
#[test]
fn acl_rules_decides_by_its_file() {
    check_rules("rules", "allow publish up/%c/#\nallow subscribe down/%c/#\n");
    check_rules("mosquitto", "pattern write up/%c/#\npattern read down/%c/#\n");
}

/// Subscribers that are there, and those that come for a retained message, get what was published.
#[test]
fn payload_seal_is_noticed_by_nobody() {
    let folder = folder_with("key", &"0f".repeat(32));
    let grant = file_grant(&folder.path().join("key"), "/key");
    let more = format!("config = {{ key_file = \"/key\" }}\ngrants = {{ {grant} }}");
    let broker = Broker::start(&entry("payload-seal", &more));
    let mut early = broker.connect(&Options::new(V5, "early"));
    assert_eq!(early.subscribe("a", 1), 1);
    let mut publisher = broker.connect(&Options::new(V5, "publisher"));
    assert_eq!(publisher.publish(&Message::new("a", "plain").qos(1).retained()), 0);
    let mut late = broker.connect(&Options::new(V5, "late"));
    assert_eq!(late.subscribe("a", 1), 1);
    for client in [&mut early, &mut late] {
        let Got::Publish(message) = client.recv() else { panic!("no message") };
        assert_eq!(&message.payload[..], b"plain");
    }
}

#[test]
fn presence_tells_who_is_connected() {
    let broker = Broker::start(&entry("presence", "grants = { publish = [\"presence/#\"] }"));
    let mut watcher = broker.connect(&Options::new(V5, "watcher"));
    assert_eq!(watcher.subscribe("presence/one", 0), 0);
    let mut heard = || {
        let Got::Publish(message) = watcher.recv() else { panic!("no message") };
        String::from_utf8_lossy(&message.payload).into_owned()
    };
    let one = broker.connect(&Options::new(V5, "one"));
    let came = heard();
    assert!(came.contains("\"online\":true"), "{came}");
    one.disconnect();
    let went = heard();
    assert!(went.contains("\"online\":false"), "{went}");
}

/// The users of mosquitto's password file log in with the passwords that they have.
#[test]
fn users_of_mosquitto_are_taken_over() {
    let theirs = "ann:$7$101$05dZjo3mzDhz6tOY$w+1EGs+bjOxkMISPxerliH93uDyq4M6V+QruAUZGaONje8unXks179Eoos5H+yNylwPCg37y/yO1Q/fj6YAIAg==\n\
        bob:$6$ZW6YXY9QBS1b/9bR$dNb7x6RGxO+O08MiNqHat9NIKpGY2tJE630zRGf0svOlQfF1IKTzJIWVQMnUNAbVcfumr/h7Rol+W2kFWwZ2XA==\n\
        carl:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n\
        dora:plain\n";
    let folder = folder_with("theirs", theirs);
    let ours = folder.path().join("ours");
    let import = || {
        let mut command = wasmqtt_tests::wasmqtt();
        command.args(["passwd", "--import"]).arg(folder.path().join("theirs")).arg(&ours).output().expect("runs")
    };
    let output = import();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "one was refused: {said}");
    for line in
        ["line 1: ann taken, PBKDF2", "line 4: refused: the password is not hashed", "3 taken into", "1 refused"]
    {
        assert!(said.contains(line), "{line:?} is not in {said}");
    }
    let again = String::from_utf8_lossy(&import().stderr).into_owned();
    assert!(again.contains("0 taken into") && again.contains("3 there already"), "{again}");
    let more = format!("config = {{ file = \"/passwords\" }}\ngrants = {{ {} }}", file_grant(&ours, "/passwords"));
    let broker = Broker::start(&entry("auth-file", &more));
    for user in ["ann", "bob", "carl"] {
        broker.connect(&login("c", user, "secret")).disconnect();
        broker.check_refused(&login("c", user, "wrong"), 0x86);
    }
    broker.check_refused(&login("c", "dora", "plain"), 0x86);
}
