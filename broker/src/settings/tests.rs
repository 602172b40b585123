use std::fs;

use tempfile::TempDir;
use wasmqtt_server::Bind;

use super::*;

/// A folder with the files that the full example names.
fn folder() -> TempDir {
    let folder = TempDir::new().expect("temporary folder");
    fs::create_dir_all(folder.path().join("plugins")).expect("folder");
    fs::create_dir_all(folder.path().join("etc")).expect("folder");
    fs::write(folder.path().join("plugins/auth-file.wasm"), "").expect("file");
    fs::write(folder.path().join("etc/passwords"), "").expect("file");
    folder
}

/// As if it stood in `wasmqtt.toml` of the folder.
fn read(text: &str, base: &Path) -> Result<Settings, Vec<Problem>> {
    parse(text, &Place { base, file: Some(&base.join("wasmqtt.toml")), listen: &[], reads_components: false })
}

fn meant(text: &str) -> Settings {
    let folder = folder();
    read(text, folder.path()).unwrap_or_else(|problems| panic!("{problems:?}"))
}

/// Checks that `text` has exactly these problems, each a line and words of its message.
fn check_problems(text: &str, expected: &[(usize, &[&str])]) {
    let folder = folder();
    let problems = read(text, folder.path()).expect_err("has problems");
    assert_eq!(problems.len(), expected.len(), "{problems:?}");
    for (problem, (line, words)) in problems.iter().zip(expected) {
        assert_eq!(problem.line, *line, "{problem:?}");
        for word in *words {
            assert!(problem.text.contains(word), "{word:?} is not in {:?}", problem.text);
        }
    }
}

const FULL: &str = r#"
data_dir = "data"
shards = 3
[[listener]]
bind = "127.0.0.1:1884"
protocol = "mqtt"
[[listener]]
bind = "run/wasmqtt.sock"
protocol = "unix"
proxied = true
[auth]
anonymous = false
client_id_taken = "new-session"
wildcard_identifiers = "allow"
[limits]
packet_bytes_max = 2_000_000
receive_maximum = 10
inflight_max = 20
topic_alias_maximum = 0
maximum_qos = 1
retain_available = false
keep_alive_max_secs = 60
connect_timeout_secs = 5
session_expiry_max_secs = 0
queue_messages_max = 7
queue_bytes_max = 8192
outbound_bytes_max = 4096
topic_levels_max = 20
topic_bytes_max = 1000
connect_bytes_max = 5000
connections_max = 100
connecting_max = 10
[plugins]
dir = "plugins"
compile_memory_mib = 1024
compile_cpu_secs = 60
compiled_mib_max = 64
compile_at_once = 1
[[plugin]]
name = "auth-file"
path = "auth-file.wasm"
order = 10
on_error = "skip"
sha256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
config = { file = "/passwords", depth = { most = 3, names = ["a", "b"] } }
grants = { files = [{ host = "etc/passwords", guest = "/passwords", mode = "read" }] }
limits = { memory_mib = 32, deadline_ms = 4000, cpu_ms = 300, instances = 2 }
[store]
durability = "os"
path = "kept"
write_buffer_mib = 8
cache_mib = 16
sync_interval_ms = 500
[log]
level = "info,wasmqtt_host=debug"
format = "json"
"#;

/// Left out, they would have the plugin take its default, which may be to allow everything.
#[test]
fn empty_settings_of_a_plugin_arrive_as_empty_texts() {
    let folder = folder();
    let config = r#"config = { audience = [], claims = {}, secret = "x", more = [[], { a = [] }] }"#;
    let text = format!("[[plugin]]\nname = \"auth-file\"\npath = \"auth-file.wasm\"\n{config}\n");
    let settings = read(&text, folder.path()).expect("valid");
    let pairs: Vec<_> =
        settings.plugins[0].config.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(pairs, [("audience", ""), ("claims", ""), ("more.0", ""), ("more.1.a", ""), ("secret", "x")]);
}

#[test]
fn each_key_of_a_full_file_arrives() {
    let folder = folder();
    let settings = read(FULL, folder.path()).expect("valid");
    assert_eq!(settings.data_dir, folder.path().join("data"));
    assert_eq!(settings.shards, 3);
    assert_eq!(&*settings.listeners[0].name, "mqtt://127.0.0.1:1884");
    assert!(matches!(&settings.listeners[1].bind, Bind::Unix(path) if *path == folder.path().join("run/wasmqtt.sock")));
    assert_eq!(settings.anonymous, Anonymous::Deny);
    let identity = Identity { client_id_taken: ClientIdTaken::NewSession, allow_wildcards: true };
    assert_eq!(settings.identity, identity);
    assert!(!settings.listeners[0].proxied && settings.listeners[1].proxied);
    let limits = &settings.limits;
    assert_eq!((limits.topic_levels_max, limits.topic_bytes_max), (20, 1000));
    assert_eq!((limits.connect_bytes_max, limits.connecting_max), (5000, 10));
    let limits = &settings.limits;
    assert_eq!(limits.packet_bytes_max, 2_000_000);
    assert_eq!((limits.receive_maximum, limits.inflight_max, limits.topic_alias_maximum), (10, 20, 0));
    assert_eq!((limits.maximum_qos, limits.retain_available), (Qos::AtLeastOnce, false));
    assert_eq!(limits.keep_alive_max, Some(Duration::from_mins(1)));
    assert_eq!((limits.connect_timeout, limits.session_expiry_max), (Duration::from_secs(5), Duration::ZERO));
    assert_eq!((limits.queue_messages_max, limits.queue_bytes_max), (7, 8192));
    assert_eq!((limits.outbound_bytes_max, limits.connections_max), (4096, 100));
    assert_eq!(settings.plugin_dir, Some(folder.path().join("plugins")));
    let limits = CompileLimits { memory_mib: 1024, cpu_secs: 60, compiled_mib: 64 };
    assert_eq!(settings.compile, Compile { limits, at_once: 1 });
    let plugin = &settings.plugins[0];
    assert_eq!((plugin.name.as_str(), plugin.order, plugin.on_error), ("auth-file", 10, OnError::Skip));
    assert_eq!(plugin.path, folder.path().join("plugins/auth-file.wasm"));
    let pairs: Vec<_> = plugin.config.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(pairs, [("depth.most", "3"), ("depth.names.0", "a"), ("depth.names.1", "b"), ("file", "/passwords")]);
    assert!(plugin.sha256.as_ref().is_some_and(|digest| digest.starts_with("e3b0")));
    assert_eq!(plugin.files[0].host, folder.path().join("etc/passwords"));
    assert_eq!((plugin.files[0].guest.as_str(), plugin.files[0].mode), ("/passwords", Mode::Read));
    let limits = &plugin.limits;
    assert_eq!((limits.memory_mib, limits.deadline_ms, limits.cpu_ms, limits.instances), (32, 4000, 300, 2));
    let store = settings.store.as_ref().expect("there is one");
    assert_eq!((store.durability, &store.path), (Durability::Os, &folder.path().join("kept")));
    assert_eq!((store.write_buffer_mib, store.cache_mib, store.sync_interval), (8, 16, Duration::from_millis(500)));
    assert_eq!(settings.log, Log { level: "info,wasmqtt_host=debug".into(), json: true });
}

#[test]
fn an_empty_file_means_the_documented_defaults() {
    let settings = meant("");
    assert_eq!(settings.listeners.len(), 1);
    assert_eq!(&*settings.listeners[0].name, "mqtt://127.0.0.1:1883");
    assert_eq!(settings.anonymous, Anonymous::Loopback);
    assert_eq!(settings.identity, Identity { client_id_taken: ClientIdTaken::Refuse, allow_wildcards: false });
    assert!(!settings.listeners[0].proxied);
    assert_eq!((settings.limits.topic_levels_max, settings.limits.topic_bytes_max), (200, 65_535));
    assert_eq!((settings.limits.connect_bytes_max, settings.limits.connecting_max), (262_144, 20_000));
    assert_eq!(settings.limits.packet_bytes_max, 1_048_576);
    assert_eq!(settings.limits.session_expiry_max, Duration::from_hours(7 * 24));
    assert_eq!(settings.limits.queue_bytes_max, 16_777_216);
    assert_eq!(settings.limits.keep_alive_max, None);
    assert!(settings.plugin_dir.is_some(), "the folder `plugins` beside the file");
    let store = settings.store.as_ref().expect("there is one");
    assert_eq!((store.durability, &store.path), (Durability::Fsync, &settings.data_dir.join("store")));
    assert_eq!(settings.log, Log { level: "info".into(), json: false });
}

#[test]
fn without_a_store_nothing_is_kept() {
    assert!(meant("[store]\ndurability = \"memory\"\n").store.is_none());
}

#[test]
fn without_a_plugins_folder_there_is_none() {
    let empty = TempDir::new().expect("temporary folder");
    assert_eq!(read("", empty.path()).expect("valid").plugin_dir, None);
}

/// What `config show` prints is a configuration with the same meaning.
#[test]
fn shown_settings_read_back_alike() {
    let folder = folder();
    for text in
        ["", FULL, "auth.anonymous = true", "listener = [{ bind = \"localhost:1884\", tcp_keepalive_secs = 0 }]"]
    {
        let settings = read(text, folder.path()).expect("valid");
        let shown = toml::to_string(&settings.shown()).expect("TOML");
        let again = read(&shown, folder.path()).unwrap_or_else(|problems| panic!("{problems:?}\n{shown}"));
        assert_eq!(toml::to_string(&again.shown()).expect("TOML"), shown);
    }
}

#[test]
fn unknown_keys_come_with_a_suggestion() {
    check_problems(
        "data_dir = \"data\"\n[limits]\nrecieve_maximum = 10\n",
        &[(3, &["limits.recieve_maximum", "= 10", "did you mean `receive_maximum`?", "known are packet_bytes_max"])],
    );
    check_problems("[limit]\n", &[(1, &["unknown key `limit`", "did you mean `limits`?"])]);
    check_problems(
        "[[plugin]]\nname = \"auth-file\"\nlimits = { zebra = 1 }\n",
        &[(3, &["plugin.limits.zebra", "= 1"])],
    );
}

#[test]
fn names_of_clients_have_two_answers_each() {
    check_problems(
        "[auth]\nclient_id_taken = \"share\"\nwildcard_identifiers = true\n[[listener]]\nbind = \"127.0.0.1:0\"\nproxied = 1\n",
        &[
            (2, &["auth.client_id_taken = \"share\"", "\"refuse\", \"new-session\""]),
            (3, &["auth.wildcard_identifiers = true", "\"refuse\", \"allow\""]),
            (6, &["listener.proxied = 1", "true and false"]),
        ],
    );
}

#[test]
fn numbers_name_their_range() {
    check_problems(
        "[limits]\nreceive_maximum = 70000\nmaximum_qos = -1\nqueue_messages_max = \"many\"\ninflight_max = 99999999999999999999\n",
        &[
            (2, &["limits.receive_maximum = 70000", "from 1 to 65535"]),
            (3, &["limits.maximum_qos = -1", "from 0 to 2"]),
            (4, &["limits.queue_messages_max = \"many\"", "whole number"]),
            (5, &["limits.inflight_max = 99999999999999999999", "from 1 to 65535"]),
        ],
    );
}

#[test]
fn words_name_what_is_allowed() {
    check_problems(
        "[store]\ndurability = \"disk\"\n[log]\nformat = \"xml\"\nlevel = \"inof\"\n[auth]\nanonymous = \"yes\"\n",
        &[
            (2, &["store.durability = \"disk\"", "allowed are \"fsync\", \"os\", \"memory\""]),
            (4, &["log.format = \"xml\"", "allowed are \"text\", \"json\""]),
            (5, &["log.level = \"inof\"", "info"]),
            (7, &["auth.anonymous = \"yes\"", "true and false"]),
        ],
    );
}

#[test]
fn listeners_say_what_is_wrong_with_them() {
    check_problems(
        "[[listener]]\nbind = \"127.0.0.1\"\n[[listener]]\nbind = \"127.0.0.1:8883\"\nprotocol = \"mqtts\"\n\
         [[listener]]\nprotocol = \"mqtt\"\n[[listener]]\nbind = \"127.0.0.1:1\"\n[[listener]]\nbind = \"127.0.0.1:1\"\n\
         [[listener]]\nbind = \"127.0.0.1:2\"\nprotocol = \"amqp\"\n",
        &[
            (2, &["listener.bind = \"127.0.0.1\"", "address and a port"]),
            (5, &["listener.protocol = \"mqtts\"", "not available yet"]),
            (7, &["listener", "`bind` is missing"]),
            (11, &["listener.bind = \"127.0.0.1:1\"", "already"]),
            (14, &["listener.protocol = \"amqp\"", "allowed are \"mqtt\" and \"unix\""]),
        ],
    );
}

#[test]
fn several_listeners_may_take_any_free_port() {
    assert_eq!(meant("listener = [{ bind = \"127.0.0.1:0\" }, { bind = \"127.0.0.1:0\" }]").listeners.len(), 2);
}

#[test]
fn missing_files_are_named() {
    check_problems(
        "[plugins]\ndir = \"modules\"\n[[plugin]]\nname = \"a\"\npath = \"/nowhere/a.wasm\"\n\
         grants = { files = [{ host = \"etc/shadow\", guest = \"passwords\" }] }\n",
        &[
            (2, &["plugins.dir = \"modules\"", "no such folder"]),
            (5, &["plugin.path = \"/nowhere/a.wasm\"", "no such file (/nowhere/a.wasm)"]),
            (6, &["plugin.grants.files.host = \"etc/shadow\"", "no such file or folder"]),
            (6, &["plugin.grants.files.guest = \"passwords\"", "absolute"]),
        ],
    );
    check_problems(
        "[[plugin]]\nname = \"auth-file\"\n[[plugin.grants.files]]\nhost = \"etc/passwords\"\nguest = \"/p\"\nmode = \"write\"\n",
        &[(4, &["plugin.grants.files.host = \"etc/passwords\"", "can only be read"])],
    );
    check_problems("[[plugin]]\nname = \"b\"\n", &[(2, &["plugin.name = \"b\"", "b.wasm"])]);
}

#[test]
fn plugins_need_names_of_their_own() {
    check_problems(
        "[[plugin]]\nname = \"auth-file\"\n[[plugin]]\nname = \"auth-file\"\n[[plugin]]\nname = \"../x\"\npath = \"auth-file.wasm\"\n\
         on_error = \"explode\"\n[[plugin]]\npath = \"auth-file.wasm\"\n",
        &[
            (4, &["plugin.name = \"auth-file\"", "already"]),
            (6, &["plugin.name = \"../x\"", "letters"]),
            (8, &["plugin.on_error = \"explode\"", "\"deny\""]),
            (10, &["`name` is missing"]),
        ],
    );
}

#[test]
fn what_is_not_toml_is_said_with_its_line() {
    check_problems("data_dir = \"data\"\n[limits\n", &[(2, &["not TOML"])]);
    check_problems("[limits]\n[limits]\n", &[(2, &["not TOML"])]);
    check_problems("limits = 3\n[[auth]]\n", &[(1, &["limits = 3", "table"]), (2, &["auth", "table"])]);
}

#[test]
fn an_unreadable_file_is_named() {
    let error = load(Path::new("/nowhere/wasmqtt.toml"), &[]).expect_err("absent").to_string();
    assert!(error.contains("/nowhere/wasmqtt.toml"), "{error}");
}

#[test]
fn invalid_files_are_named_on_each_line() {
    let folder = folder();
    let path = folder.path().join("wasmqtt.toml");
    fs::write(&path, "a = 1\nb = 2\n").expect("file");
    let error = load(&path, &[]).expect_err("unknown keys").to_string();
    let lines: Vec<_> = error.lines().collect();
    assert!(lines[0].starts_with(&format!("{}:1: unknown key `a` = 1", path.display())), "{error}");
    assert!(lines[1].starts_with(&format!("{}:2: unknown key `b` = 2", path.display())), "{error}");
}

#[test]
fn listen_arguments_are_addresses_or_sockets() {
    assert_eq!(&*parse_listen("0.0.0.0:1883").expect("valid").0[0].name, "mqtt://0.0.0.0:1883");
    assert_eq!(&*parse_listen("[::1]:0").expect("valid").0[0].name, "mqtt://[::1]:0");
    assert_eq!(&*parse_listen("unix:/run/wasmqtt.sock").expect("valid").0[0].name, "unix:/run/wasmqtt.sock");
    for wrong in ["", "1883", ":1883", "localhost", "127.0.0.1:99999", "unix:"] {
        assert!(parse_listen(wrong).is_err(), "{wrong}");
    }
}

/// The command line of `plugin check`, `test` and `bench` knows the same limits as the file.
#[test]
fn limits_of_the_command_line_are_those_of_the_file() {
    let limits = |pairs: &[(&str, &str)]| {
        let pairs: Vec<_> = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        super::limits(&pairs, wasmqtt_host::PluginLimits { hook_cpu_ms: 7, ..Default::default() })
    };
    let meant = limits(&[("memory_mib", "32"), ("instances", "1")]).expect("are right");
    assert_eq!((meant.memory_mib, meant.instances, meant.hook_cpu_ms), (32, 1, 7));
    for (pair, why) in [
        (("memory_mib", "0"), "memory_mib"),
        (("memory_mib", "lots"), "memory_mib"),
        (("memory_mb", "32"), "memory_mib"),
        (("memory_mib", "1\n[x]"), "allowed are a key of `limits` and a number"),
    ] {
        let error = limits(&[pair]).expect_err("is refused");
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn everything_that_is_wrong_with_a_listener_is_said_at_once() {
    check_problems(
        "[[listener]]\nbind = \"0.0.0.0:99999\"\nprotocol = \"mqtts\"\nqueue_full = \"never\"\ntcp_keepalive_secs = 9999\n\
         mode = \"rw\"\ngroup = \"no such group\"\n",
        &[
            (2, &["listener.bind = \"0.0.0.0:99999\"", "address and a port"]),
            (3, &["listener.protocol = \"mqtts\"", "not available yet"]),
            (4, &["listener.queue_full", "drop-newest"]),
            (5, &["listener.tcp_keepalive_secs = 9999", "from 0 to 7200"]),
            (6, &["listener.mode = \"rw\"", "octal digits"]),
            (7, &["listener.group = \"no such group\"", "given by its number"]),
        ],
    );
    check_problems(
        "[[listener]]\nbind = \"127.0.0.1:1\"\nmode = \"0600\"\n[[listener]]\nbind = \"a.sock\"\nprotocol = \"unix\"\ntcp_keepalive_secs = 5\n",
        &[(3, &["listener.mode", "is for a Unix socket"]), (7, &["listener.tcp_keepalive_secs", "is for TCP"])],
    );
}

#[test]
fn a_unix_socket_has_a_mode_and_a_group() {
    let settings = meant("[[listener]]\nbind = \"a.sock\"\nprotocol = \"unix\"\nmode = \"0660\"\ngroup = \"root\"\n");
    let listener = &settings.listeners[0];
    assert_eq!((listener.socket_mode, listener.socket_group, listener.keepalive), (Some(0o660), Some(0), None));
    let shown = toml::to_string(&settings.shown()).expect("TOML");
    assert!(shown.contains("mode = \"0660\"") && shown.contains("group = \"0\""), "{shown}");
}

#[test]
fn tcp_keepalive_is_on_unless_it_is_off() {
    let settings = meant(
        "listener = [{ bind = \"127.0.0.1:1\" }, { bind = \"127.0.0.1:2\", tcp_keepalive_secs = 0 }, \
         { bind = \"127.0.0.1:3\", tcp_keepalive_secs = 30 }]",
    );
    let keepalives: Vec<_> = settings.listeners.iter().map(|listener| listener.keepalive).collect();
    assert_eq!(keepalives, [Some(Duration::from_mins(5)), None, Some(Duration::from_secs(30))]);
}

/// A host name stands for all its addresses, and may be called by any of them.
#[test]
fn a_host_name_listens_on_all_its_addresses() {
    let settings = meant("listener = [{ bind = \"localhost:1884\" }]");
    let names: Vec<&str> = settings.listeners.iter().map(|listener| &*listener.name).collect();
    assert!(names.contains(&"mqtt://127.0.0.1:1884"), "{names:?}");
    let shown = toml::to_string(&settings.shown()).expect("TOML");
    assert_eq!(shown.matches("[[listener]]").count(), 1, "{shown}");
}

const TWO_LISTENERS: &str = "[[listener]]\nbind = \"localhost:1884\"\n[[listener]]\nbind = \"run/mqtt.sock\"\n\
                             protocol = \"unix\"\n[[plugin]]\nname = \"auth-file\"\n";

#[test]
fn a_plugin_names_a_listener_as_it_is_written_or_by_its_address() {
    let names_of = |named: &str| {
        let settings = meant(&format!("{TWO_LISTENERS}listeners = [{named}]\n"));
        settings.plugins[0].listeners.clone()
    };
    for named in ["\"localhost:1884\"", "\"mqtt://localhost:1884\""] {
        assert!(names_of(named).contains(&"mqtt://127.0.0.1:1884".to_owned()), "{named}");
    }
    for named in ["\"127.0.0.1:1884\"", "\"mqtt://127.0.0.1:1884\"", "\"127.0.0.1:1884\", \"mqtt://127.0.0.1:1884\""] {
        assert_eq!(names_of(named), ["mqtt://127.0.0.1:1884"], "{named}");
    }
    let socket = names_of("\"run/mqtt.sock\"");
    assert!(socket[0].starts_with("unix:/") && socket[0].ends_with("/run/mqtt.sock"), "{socket:?}");
    assert_eq!(names_of("\"unix:run/mqtt.sock\"").len(), 1);
}

/// Otherwise the plugin would be asked about nobody, and what no `acl` plugin is asked about is allowed.
#[test]
fn a_listener_that_does_not_exist_is_a_problem() {
    check_problems(
        &format!("{TWO_LISTENERS}listeners = [\"mqtt://localhost:1885\"]\n"),
        &[(8, &["plugin.listeners = \"mqtt://localhost:1885\"", "no listener", "did you mean \"localhost:1884\"?"])],
    );
    // `--listen` replaces what the file says, and with it the names.
    let text = format!("{TWO_LISTENERS}listeners = [\"localhost:1884\"]\n");
    let folder = folder();
    let listen = [parse_listen("127.0.0.1:1900").expect("an address")];
    let place = Place { base: folder.path(), file: None, listen: &listen, reads_components: false };
    let problems = parse(&text, &place).expect_err("the name is gone");
    assert!(problems[0].text.contains("(listeners are \"127.0.0.1:1900\")"), "{problems:?}");
}

#[test]
fn names_of_listeners_on_any_port_are_their_own() {
    let settings =
        meant("listener = [{ bind = \"127.0.0.1:0\" }, { bind = \"127.0.0.1:0\", queue_full = \"drop-oldest\" }]");
    let names: Vec<&str> = settings.listeners.iter().map(|listener| &*listener.name).collect();
    assert_eq!(names, ["mqtt://127.0.0.1:0", "mqtt://127.0.0.1:0#2"]);
}

/// Checks that granting `host` in this mode is refused with these words, or not at all.
fn check_grant(host: &str, mode: &str, words: Option<&str>) {
    let folder = folder();
    for path in ["data/store", "data/plugin-cache", "shared/in", "data/mine"] {
        fs::create_dir_all(folder.path().join(path)).expect("folder");
    }
    fs::write(folder.path().join("wasmqtt.toml"), "").expect("file");
    fs::write(folder.path().join("data/own.key"), "").expect("file");
    std::os::unix::fs::symlink("../data", folder.path().join("shared/link")).expect("link");
    let text = format!(
        "[[plugin]]\nname = \"auth-file\"\n[[plugin.grants.files]]\nhost = \"etc/passwords\"\nguest = \"/p\"\n\
         [[plugin.grants.files]]\nhost = {host:?}\nguest = \"/x\"\nmode = {mode:?}\n"
    );
    match (read(&text, folder.path()), words) {
        (Ok(_), None) => {}
        (Err(problems), Some(words)) => assert!(problems[0].text.contains(words), "{host} {mode}: {problems:?}"),
        (got, _) => panic!("{host} {mode}: {:?}", got.err()),
    }
}

#[test]
fn no_plugin_writes_to_what_the_broker_trusts() {
    check_grant("shared/in", "write", None);
    for own in ["data", ".", "/", "data/store", "data/mine", "shared/link", "shared/link/store", "shared/../data"] {
        check_grant(own, "write", Some("no plugin may write to"));
    }
    check_grant("plugins", "write", Some("the plugin folder"));
    check_grant("etc", "write", Some("a file that a plugin trusts"));
}

#[test]
fn no_plugin_reads_the_store_or_the_cache() {
    for fine in ["shared/in", "etc", "data/mine", "plugins"] {
        check_grant(fine, "read", None);
    }
    for own in ["data", ".", "/", "data/store", "shared/link", "data/plugin-cache", "data/own.key"] {
        check_grant(own, "read", Some("no plugin may read"));
    }
}

#[test]
fn what_a_file_says_is_repeated_without_control_characters() {
    let problems = {
        let folder = folder();
        read("\"a\\u001b[2J\\n\" = 1\nlog.level = \"\u{9b}\u{202e}\"\n", folder.path()).expect_err("has problems")
    };
    assert_eq!(problems.len(), 2, "{problems:?}");
    for problem in problems {
        assert!(!problem.text.chars().any(wasmqtt_protocol::text::is_unsafe), "{problem:?}");
    }
}
