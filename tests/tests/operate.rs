//! Operators' commands against a running broker.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wasmqtt_tests::{Broker, Options, Version, wasmqtt};

/// A folder with the probe in `plugins/acl.wasm`.
fn folder() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("plugins/acl.wasm");
    std::fs::create_dir(folder.path().join("plugins")).expect("make a folder");
    std::fs::copy(wasmqtt_guests::component("probe"), &file).expect("the guest is built");
    (folder, file)
}

const CONFIG: &str = "\
[plugins]
dir = \"plugins\"
[[plugin]]
name = \"acl\"
grants = { publish = [\"#\"], disconnect = true, ban = true, revoke = true }
";

fn another_build(folder: &Path) -> PathBuf {
    let mut bytes = std::fs::read(wasmqtt_guests::component("probe")).expect("the guest is built");
    bytes.extend([0, 2, 1, b'x']);
    let file = folder.join("acl.wasm");
    std::fs::write(&file, bytes).expect("write");
    file
}

/// Standard output of a command that succeeds, or what it says when it fails.
fn run(broker: &Broker, arguments: &[&str]) -> Result<String, String> {
    let config = broker.folder().join("wasmqtt.toml");
    let output = wasmqtt().arg("plugin").args(arguments).arg("--config").arg(config).output().expect("runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[test]
fn plugins_are_listed_deployed_and_rolled_back() {
    let (folder, _) = folder();
    let broker = Broker::start_in(folder, CONFIG);
    let shown = run(&broker, &["list"]).expect("lists");
    assert!(shown.contains("acl   1") && shown.contains("acl,storage-hook,cluster,events"), "{shown}");
    let new = another_build(broker.folder());
    let said = run(&broker, &["deploy", new.to_str().expect("UTF-8")]).expect("deploys");
    assert_eq!(said, "deployed acl\n");
    broker.await_log("plugin replaced", 1);
    let rubbish = broker.folder().join("rubbish.wasm");
    std::fs::write(&rubbish, "rubbish").expect("write");
    let refused = run(&broker, &["deploy", "--name", "acl", rubbish.to_str().expect("UTF-8")]).expect_err("is refused");
    assert!(refused.contains("not WebAssembly") && refused.contains("nothing was changed"), "{refused}");
    assert_eq!(run(&broker, &["rollback", "acl"]).expect("rolls back"), "rolled acl back\n");
    broker.await_log("plugin replaced", 2);
    // Whatever is wrong with the file by now, commands find the broker.
    let config = broker.folder().join("wasmqtt.toml");
    let right = std::fs::read_to_string(&config).expect("read");
    std::fs::write(&config, format!("shards = 0.5\n{right}path = \"gone.wasm\"\n")).expect("write");
    assert!(run(&broker, &["list"]).expect("lists").contains("acl   3"));
    std::fs::write(&config, right).expect("write");
    let refused = run(&broker, &["promote", "acl"]).expect_err("nothing is on trial");
    assert!(refused.contains("on trial"), "{refused}");
    let listed: String = run(&broker, &["list", "--json"]).expect("lists");
    assert!(listed.contains("\"generation\": 3"), "{listed}");
}

#[test]
fn an_explanation_names_who_decides_and_why() {
    let (folder, _) = folder();
    let broker = Broker::start_in(folder, CONFIG);
    let explain =
        |action: &str, topic: &str| run(&broker, &["explain", "--client", "c", action, topic]).expect("explains");
    let shown = explain("--publish", "a/secret");
    assert!(shown.contains("not connected") && shown.contains("acl (build 1): deny 0x87 Not authorized"), "{shown}");
    assert!(shown.ends_with("=> deny 0x87 Not authorized, by acl\n"), "{shown}");
    let mut client = broker.connect(&Options::new(Version::V5, "c").resume());
    assert_eq!(client.subscribe("a/#", 0), 0);
    let shown = explain("--subscribe", "a/x");
    assert!(!shown.contains("not connected") && shown.contains("a lease that holds for"), "{shown}");
    assert!(shown.contains("=> allow, by a lease"), "{shown}");
    client.disconnect();
    let begun = Instant::now();
    while !explain("--subscribe", "a/x").contains("not connected") {
        assert!(begun.elapsed() < Duration::from_secs(10), "its Session is taken for a connection");
    }
}

/// What a plugin is not asked about, and what a failure counts as.
#[test]
fn an_explanation_knows_the_configuration() {
    let (folder, _) = folder();
    let scope = "topics = [\"a/#\", \"b/#\"]\non_error = \"allow\"\n";
    let second = "[[plugin]]\nname = \"second\"\npath = \"acl.wasm\"\norder = 200\ntopics = [\"b/#\"]\n\
                  listeners = [\"other.sock\"]\n\
                  grants = { publish = [\"#\"], disconnect = true, ban = true, revoke = true }\n";
    let other = "[[listener]]\nbind = \"other.sock\"\nprotocol = \"unix\"\n";
    let broker = Broker::start_in(folder, &format!("{CONFIG}{scope}{second}{other}"));
    let explain = |topic: &str| run(&broker, &["explain", "--client", "c", "--publish", topic]).expect("explains");
    let shown = explain("c/x");
    assert!(shown.contains("acl (build 1): not asked — its `topics` leave this out"), "{shown}");
    assert!(shown.ends_with("=> allow: no plugin decides about it\n"), "{shown}");
    let shown = explain("a/fail");
    assert!(
        shown.contains("acl (build 1): failed — unavailable: as told; by `on_error`, that counts as allow"),
        "{shown}"
    );
    assert!(shown.ends_with("=> allow, by acl\n"), "{shown}");
    let shown = explain("b/secret");
    assert!(shown.contains("second (build 1): not asked — it has `listeners`"), "{shown}");
    assert!(shown.ends_with("=> deny 0x87 Not authorized, by acl\n"), "{shown}");
}

#[test]
fn without_a_broker_the_command_says_so() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = wasmqtt().args(["plugin", "list"]).current_dir(folder.path()).output().expect("runs");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("no broker runs with"), "{output:?}");
}

/// Whoever sends one command more than are carried out at a time is told so at once, and may try again.
#[test]
fn commands_at_a_time_are_bounded() {
    const COMMANDS_MAX: usize = 16;
    let (folder, _) = folder();
    let broker = Broker::start_in(folder, CONFIG);
    let socket = broker.folder().join("data/control.sock");
    // They are connected, and say nothing.
    let mut silent: Vec<UnixStream> =
        (0..COMMANDS_MAX).map(|_| UnixStream::connect(&socket).expect("the broker listens")).collect();
    let begun = Instant::now();
    let wait = |what: &str, is_so: &dyn Fn(&Result<String, String>) -> bool| {
        while !is_so(&run(&broker, &["list"])) {
            assert!(begun.elapsed() < Duration::from_secs(8), "still not: {what}");
        }
    };
    let is_refused = |said: &Result<String, String>| {
        said.as_ref().is_err_and(|error| error.contains("the broker carries out 16 commands already"))
    };
    wait("all are taken", &is_refused);
    assert!(is_refused(&run(&broker, &["list"])), "and one more is refused again");
    silent.pop();
    wait("there is room", &|said| said.is_ok());
    assert_eq!(silent.len(), COMMANDS_MAX - 1);
}

/// A user whose name has a `/` wonders why a pattern gives nothing.
#[test]
fn an_explanation_has_what_the_plugin_says() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(folder.path().join("acl"), "pattern readwrite users/%u/#\n").expect("write");
    let acl = wasmqtt_guests::component("acl-rules");
    let config = format!(
        "[[plugin]]\nname = \"acl-rules\"\npath = \"{}\"\nconfig = {{ file = \"/acl\", format = \"mosquitto\" }}\n\
         grants = {{ files = [{{ host = \"acl\", guest = \"/acl\" }}] }}\n",
        acl.display()
    );
    let broker = Broker::start_in(folder, &config);
    let shown = run(&broker, &["explain", "--client", "c", "--principal", "org/dev1", "--publish", "users/org/dev1/x"]);
    let shown = shown.expect("explains");
    assert!(shown.contains("deny") && shown.contains("see the setting allow_slash"), "{shown}");
}
