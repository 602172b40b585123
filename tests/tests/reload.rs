//! Plugins of the real broker are replaced while it serves.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use wasmqtt_tests::traffic::{Report, Traffic, next_due};
use wasmqtt_tests::{Broker, Client, Got, Options, Version};

const REPLACED: &str = "plugin replaced";
const REJECTED: &str = "new build rejected, keeping the running one";

/// A folder with one plugin in `plugins/auth.wasm`.
fn folder_with(component: &str) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("plugins/auth.wasm");
    std::fs::create_dir(folder.path().join("plugins")).expect("make a folder");
    std::fs::copy(wasmqtt_guests::component(component), &file).expect("the guest is built");
    (folder, file)
}

/// As deploying does it: the file is there at once and whole.
fn replace(file: &Path, bytes: &[u8]) {
    let new = file.with_extension("new");
    std::fs::write(&new, bytes).expect("write");
    std::fs::rename(&new, file).expect("rename");
}

/// The same component as another build: with a custom section that is empty, `round` times.
fn build(component: &str, round: usize) -> Vec<u8> {
    let mut bytes = std::fs::read(wasmqtt_guests::component(component)).expect("the guest is built");
    (0..round).for_each(|_| bytes.extend([0, 2, 1, b'x']));
    bytes
}

fn login(client_id: &str, username: &str, password: &str) -> Options {
    let password = Some(password.into());
    Options { username: Some(username.into()), password, ..Options::new(Version::V5, client_id) }
}

/// CONNECT, CONNACK, DISCONNECT at a rate, every tenth with a wrong password; ends with the flag.
fn connects(broker: &Arc<Broker>, name: usize, per_sec: u32, stop: &Arc<AtomicBool>, count: &Arc<AtomicU64>) {
    let pause = Duration::from_secs(1) / per_sec;
    let mut due = Instant::now();
    for round in 0.. {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let client_id = format!("visitor-{name}-{round}");
        if round % 10 == 0 {
            broker.check_refused(&login(&client_id, "user", "wrong"), 0x86);
        } else {
            broker.connect(&login(&client_id, "user", "secret")).disconnect();
        }
        count.fetch_add(1, Ordering::SeqCst);
        due = next_due(due, pause);
        thread::sleep(due.saturating_duration_since(Instant::now()));
    }
}

/// Replacements in a row.
const PORTION: usize = 50;
/// How often the plugin is replaced; `WASMQTT_RELOADS` says otherwise.
const RELOADS: usize = 100;

/// Also: memory does not grow, and a build serves soon after its file was written.
#[test]
fn a_hundred_replacements_under_load_are_noticed_by_nobody() {
    let reloads = std::env::var("WASMQTT_RELOADS").map_or(RELOADS, |count| count.parse().expect("a number"));
    let (folder, file) = folder_with("auth-demo");
    let config = "[plugins]\ndir = \"plugins\"\n[[plugin]]\nname = \"auth\"\nconfig = { user = \"secret\" }\n";
    let broker = Arc::new(Broker::start_in(folder, config));
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let visitors: Vec<_> = (0..4)
        .map(|name| {
            let (broker, stop, count) = (Arc::clone(&broker), Arc::clone(&stop), Arc::clone(&count));
            thread::spawn(move || connects(&broker, name, 125, &stop, &count))
        })
        .collect();
    let load = || Traffic::start(broker.address(), 4, 20_000, Some(("user", "secret")));
    let (mut quiet, mut busy) = (Report::default(), Report::default());
    let mut taken = Vec::new();
    let mut memory = 0;
    // By turns, with and without: the machine may have other work at one time than at another.
    for portion in 0..reloads.div_ceil(PORTION) {
        let traffic = load();
        thread::sleep(Duration::from_secs(2));
        quiet.extend(traffic.stop());
        let traffic = load();
        for round in portion * PORTION + 1..=reloads.min((portion + 1) * PORTION) {
            let served = count.load(Ordering::SeqCst);
            let written = Instant::now();
            replace(&file, &build("auth-demo", round % 2));
            broker.await_log(REPLACED, round);
            taken.push(written.elapsed());
            if round == reloads / 2 {
                memory = broker.rss();
            }
            while count.load(Ordering::SeqCst) == served {
                thread::sleep(Duration::from_millis(1));
            }
        }
        busy.extend(traffic.stop());
    }
    stop.store(true, Ordering::SeqCst);
    for visitor in visitors {
        visitor.join().expect("a visitor was treated wrongly");
    }
    let connects = count.load(Ordering::SeqCst);
    taken.sort_unstable();
    let (median, growth) = (taken[taken.len() / 2], broker.rss().saturating_sub(memory));
    println!(
        "{reloads} replacements, each served after {median:.1?} (median); {connects} clients came and went; {} KiB more \
         since half of it\nwith:    {busy:?}\nwithout: {quiet:?}",
        growth / 1024
    );
    assert!(growth < 16 << 20, "{growth} bytes more");
    assert!(!broker.log().contains("plugin call failed"), "{}", broker.log());
}

/// The running build stays, and the log says what was wrong with the other one.
#[test]
fn builds_that_cannot_serve_are_rejected_and_the_old_one_goes_on() {
    let (folder, file) = folder_with("auth-demo");
    let mode = folder.path().join("mode");
    std::fs::create_dir(&mode).expect("make a folder");
    let config = format!(
        "[plugins]\ndir = \"plugins\"\n[[plugin]]\nname = \"auth\"\nconfig = {{ user = \"secret\", init_file = \"/mode/init\" }}\n\
         grants = {{ files = [{{ host = \"{}\", guest = \"/mode\" }}] }}\nlimits = {{ cpu_ms = 200, deadline_ms = 20000 }}\n",
        mode.display()
    );
    let broker = Broker::start_in(folder, &config);
    let good = build("auth-demo", 0);
    let misbehave = |round| build("misbehave", round);
    let cases: [(&str, Vec<u8>, &str); 8] = [
        ("", b"not a component".repeat(100), "not WebAssembly: build it with --target wasm32-wasip2"),
        ("", good[..good.len() / 2].to_vec(), "not a component that can be used"),
        ("", vec![0, b'a', b's', b'm', 1, 0, 0, 0], "a core module, not a component"),
        ("", another_world(), "exports no plug-point"),
        ("", table_bomb(), "it wanted more table elements than there may be"),
        ("trap", misbehave(1), "unreachable"),
        ("loop", misbehave(2), "computed longer than cpu_ms = 200"),
        ("memory", misbehave(3), "it wanted more memory than limits.memory_mib = 16"),
    ];
    for (round, (init, bytes, why)) in cases.into_iter().enumerate() {
        std::fs::write(mode.join("init"), init).expect("write");
        replace(&file, &bytes);
        broker.await_log(REJECTED, round + 1);
        let line = broker.log().lines().rfind(|line| line.contains(REJECTED)).map(str::to_owned);
        assert!(line.as_ref().is_some_and(|line| line.contains(why)), "{why:?} is not in {line:?}");
        broker.connect(&login("c", "user", "secret")).disconnect();
        broker.check_refused(&login("c", "user", "wrong"), 0x86);
    }
    std::fs::write(mode.join("init"), "").expect("write");
    replace(&file, &build("auth-demo", 5));
    broker.await_log(REPLACED, 1);
    broker.connect(&login("c", "user", "secret")).disconnect();
}

/// A component that is fine and exports nothing of ours.
fn another_world() -> Vec<u8> {
    vec![0, b'a', b's', b'm', 0x0d, 0, 1, 0]
}

/// Grows a table until it must not, when it is instantiated.
fn table_bomb() -> Vec<u8> {
    let text = r#"(component
        (core module $bomb
            (table $table 1 funcref)
            (func $grow
                (loop $again
                    (br_if $again (i32.ne (table.grow $table (ref.null func) (i32.const 1000)) (i32.const -1))))
                unreachable)
            (func (export "observed"))
            (start $grow))
        (core instance $bomb (instantiate $bomb))
        (func $observed (canon lift (core func $bomb "observed")))
        (instance $events (export "observed" (func $observed)))
        (export "wasmqtt:plugin/events@0.1.0" (instance $events)))"#;
    wat::parse_str(text).expect("a component")
}

/// 0x88 Server unavailable in 5.0, return code 3 in 3.1.1; MQTT 5.0 §3.2.2.2, 3.1.1 §3.2.2.3.
#[test]
fn a_plugin_that_loops_delays_nobody_else_of_its_shard() {
    let component = wasmqtt_guests::component("misbehave");
    let broker = Broker::start(&format!(
        "shards = 1\n[[plugin]]\nname = \"misbehave\"\npath = \"{}\"\nlimits = {{ cpu_ms = 300 }}\n",
        component.display()
    ));
    // Somebody else may have the machine for a moment, or for longer: then round trips are slow anyway.
    let is_quick = (0..3).any(|attempt| {
        let calm = round_trips(&broker, attempt, &[]);
        let looping = round_trips(&broker, attempt, &[Version::V5, Version::V311, Version::V5]);
        println!("99 of 100 round trips took at most {looping:?} while a plugin looped, {calm:?} before");
        looping < Duration::from_millis(20).max(3 * calm)
    });
    assert!(is_quick);
}

/// What 99 of 100 take at most, while these clients make the plugin loop.
fn round_trips(broker: &Broker, attempt: usize, looping: &[Version]) -> Duration {
    let mut other = broker.connect(&Options::new(Version::V5, "other"));
    let mut waiting: Vec<Client> = Vec::new();
    for (n, version) in looping.iter().copied().enumerate() {
        let mut client = Client::open(broker.address(), version);
        client.send_connect(&Options { version, ..login(&format!("loop-{attempt}-{n}"), "loop", "") });
        waiting.push(client);
    }
    let mut trips = Vec::new();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(600) {
        let sent = Instant::now();
        other.send_raw(&[0xC0, 0]);
        assert_eq!(other.recv(), Got::Pingresp);
        trips.push(sent.elapsed());
        thread::sleep(Duration::from_millis(1));
    }
    for mut client in waiting {
        let code = if client.version == Version::V5 { 0x88 } else { 3 };
        let Got::Connack(connack) = client.recv() else { panic!("no CONNACK") };
        assert_eq!(connack.reason, code);
    }
    trips.sort_unstable();
    trips[trips.len() * 99 / 100]
}
