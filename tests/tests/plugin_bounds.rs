//! What a plugin can take from the broker and from clients that do not need it: file descriptors, computing time, time to
//! wait, room in the log.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, prlimit};
use wasmqtt_tests::{Broker, Client, Got, Message, Options, Version, wasmqtt};

const V5: Version = Version::V5;

/// Answers each request that it may connect, `pause` later; as long as `hangs` is set, not at all.
fn auth_service(pause: Duration, hangs: &Arc<AtomicBool>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let hangs = Arc::clone(hangs);
    // Ends with the test's process.
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let hangs = Arc::clone(&hangs);
            thread::spawn(move || {
                let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
                let mut line = String::new();
                while reader.read_line(&mut line).is_ok_and(|count| count > 2) {
                    line.clear();
                }
                thread::sleep(pause);
                while hangs.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(10));
                }
                let answer = r#"{"result":"allow"}"#;
                let head = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", answer.len());
                let _ = stream.write_all((head + answer).as_bytes());
                // Reads what is left of the request, so that closing does not reset the connection.
                let _ = std::io::copy(&mut reader, &mut std::io::sink());
            });
        }
    });
    url
}

fn auth_http(url: &str, limits: &str) -> String {
    format!(
        "[[plugin]]\nname = \"auth-http\"\npath = \"{}\"\nconfig = {{ url = \"{url}/auth\" }}\n\
         grants = {{ http = [\"{url}\"] }}\nlimits = {{ {limits} }}\n",
        wasmqtt_guests::component("auth-http").display()
    )
}

fn misbehave(grants: &str, limits: &str) -> String {
    format!(
        "[[plugin]]\nname = \"misbehave\"\npath = \"{}\"\ngrants = {{ {grants} }}\nlimits = {{ {limits} }}\n",
        wasmqtt_guests::component("misbehave").display()
    )
}

/// It imports `publish`, so that must be granted.
fn hoard(grants: &str) -> String {
    format!(
        "shards = 1\n[[plugin]]\nname = \"hoard\"\npath = \"{}\"\ngrants = {{ publish = [\"granted\"], {grants} }}\n",
        wasmqtt_guests::component("hoard").display()
    )
}

fn login(client_id: &str, username: &str) -> Options {
    Options { username: Some(username.into()), password: Some(b"secret".into()), ..Options::new(V5, client_id) }
}

/// The Reason Code of CONNACK.
fn try_login(broker: &Broker, client_id: &str, username: &str) -> u8 {
    match broker.try_connect(&login(client_id, username)).1 {
        Got::Connack(connack) => connack.reason,
        other => panic!("{other:?}"),
    }
}

/// Figures of the only plugin.
fn figure(broker: &Broker, name: &str) -> u64 {
    let config = broker.folder().join("wasmqtt.toml");
    let output = wasmqtt().args(["plugin", "list", "--json", "--config"]).arg(config).output().expect("runs");
    let listed = String::from_utf8(output.stdout).expect("UTF-8");
    let found = listed.split_once(&format!("\"{name}\": ")).unwrap_or_else(|| panic!("no {name} in {listed}")).1;
    found.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).expect("a number")
}

fn descriptors(broker: &Broker) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", broker.pid())).expect("descriptors").count()
}

/// A plugin without grants makes no socket, so that descriptors are left for clients.
#[test]
fn a_plugin_without_grants_makes_no_sockets() {
    let broker = Broker::start(&misbehave("", ""));
    let pid = Pid::from_raw(i32::try_from(broker.pid()).expect("small")).expect("not 0");
    let few = Rlimit { current: Some(256), maximum: Some(256) };
    prlimit(Some(pid), Resource::Nofile, few).expect("may be lowered");
    let before = descriptors(&broker);
    for n in 0..16 {
        assert_eq!(try_login(&broker, &format!("c{n}"), "sockets:0"), 0);
    }
    assert!(descriptors(&broker) < before + 40, "{} and before {before}", descriptors(&broker));
    let clients: Vec<Client> = (0..50).map(|n| broker.connect(&login(&format!("d{n}"), "ann"))).collect();
    assert_eq!(clients.len(), 50);
    assert!(figure(&broker, "denied") >= 1024);
}

/// With a grant all instances of a plugin together have as many as `limits.sockets` and `limits.files` say.
#[test]
fn sockets_and_files_of_a_plugin_are_bounded() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("granted")).expect("make a folder");
    std::fs::write(folder.path().join("granted/file"), "x").expect("write");
    let broker = Broker::start_in(
        folder,
        &misbehave(
            "sockets = [\"127.0.0.1:*\"], files = [{ host = \"granted\", guest = \"/granted\" }]",
            "sockets = 10, files = 20",
        ),
    );
    for n in 0..4 {
        assert_eq!(try_login(&broker, &format!("f{n}"), "files:20:/granted/file"), 0, "closed files do not count");
    }
    assert_eq!(try_login(&broker, "s", "sockets:10"), 0);
    for n in 0..8 {
        assert_eq!(try_login(&broker, &format!("t{n}"), "sockets:0"), 0, "the first ones are still there");
    }
    assert_eq!((figure(&broker, "sockets"), figure(&broker, "files")), (10, 0));
    broker.await_log("limits.files = 20", 1);
}

/// What goes into buckets has a rate, so that one plugin does not take the store from everybody.
#[test]
fn values_of_a_plugin_have_a_rate() {
    let broker = Broker::start(&misbehave("keyvalue_mib = 16", "cpu_ms = 20000, deadline_ms = 20000"));
    let mut publisher = broker.connect(&login("p", "ann"));
    let mut slowest = |count: usize| {
        let times = (0..count).map(|n| {
            let begun = Instant::now();
            publisher.publish(&Message::new("a", n.to_string()).qos(1).retained());
            begun.elapsed()
        });
        let mut times: Vec<Duration> = times.collect();
        times.sort();
        times[count * 9 / 10]
    };
    let quiet = slowest(100);
    // Values of 900 KB for a fifth of a second, as many as it can; the plugin says whether more than 12 were kept.
    assert_eq!(try_login(&broker, "c", "rewrite"), 0, "most were refused");
    let attacked = thread::scope(|scope| {
        let attack = scope.spawn(|| {
            for n in 0..6 {
                try_login(&broker, &format!("r{n}"), "rewrite");
            }
        });
        let attacked = slowest(100);
        attack.join().expect("connects");
        attacked
    });
    assert!(attacked < 20 * quiet + Duration::from_millis(100), "{attacked:?}, quiet {quiet:?}");
}

/// A plugin that computes within its budget keeps to its share of a shard's thread, so others are hardly slower.
#[test]
fn a_plugin_that_computes_keeps_to_its_share() {
    let broker = Broker::start(&format!(
        "shards = 1\n[[plugin]]\nname = \"probe\"\npath = \"{}\"\ntopics = [\"hog/#\"]\nconfig = {{ ttl = \"0\" }}\n\
         grants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n\
         limits = {{ hook_cpu_ms = 2000, deadline_ms = 60000, cpu_share = 40 }}\n",
        wasmqtt_guests::component("probe").display()
    ));
    let mut receiver = broker.connect(&Options::new(V5, "receiver"));
    receiver.subscribe("stranger", 0);
    let mut sender = broker.connect(&Options::new(V5, "sender"));
    let mut median = |time: Duration| {
        let (begun, mut times) = (Instant::now(), Vec::new());
        while begun.elapsed() < time {
            let sent = Instant::now();
            sender.send_publish(&Message::new("stranger", "x"));
            receiver.message();
            times.push(sent.elapsed());
            thread::sleep(Duration::from_micros(1500));
        }
        times.sort();
        times[times.len() / 2]
    };
    let quiet = median(Duration::from_millis(500));
    let (stop, published) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (busy, cpu, elapsed) = thread::scope(|scope| {
        for n in 0..16 {
            let (broker, stop, published) = (&broker, &stop, &published);
            scope.spawn(move || {
                let mut hog = broker.connect(&Options::new(V5, &format!("hog-{n}")));
                while !stop.load(Ordering::Relaxed) {
                    hog.publish(&Message::new(&format!("hog/{n}/compute"), "x").qos(1));
                    published.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        thread::sleep(Duration::from_millis(500));
        let (begun, cpu_before) = (Instant::now(), figure(&broker, "cpu_ms"));
        let busy = median(Duration::from_secs(4));
        let (elapsed, cpu) = (begun.elapsed().as_millis(), u128::from(figure(&broker, "cpu_ms") - cpu_before));
        stop.store(true, Ordering::Relaxed);
        (busy, cpu, elapsed)
    });
    println!("quiet {quiet:?}, busy {busy:?}; {cpu} of {elapsed} ms; {published:?} messages of 16 hogs");
    assert!(cpu > 0 && cpu * 100 <= elapsed * 55, "{cpu} ms of computing in {elapsed} ms, {published:?} messages");
    assert!(figure(&broker, "cpu_waits") > 0);
    assert!(busy < 20 * quiet + Duration::from_millis(3), "{busy:?}, quiet {quiet:?}");
}

/// A service that hung for a while lets clients in as soon as it answers again.
#[test]
fn a_short_hang_of_a_service_is_over_when_it_answers() {
    let hangs = Arc::new(AtomicBool::new(true));
    let url = auth_service(Duration::ZERO, &hangs);
    let broker = Broker::start(&auth_http(&url, "deadline_ms = 1500"));
    thread::scope(|scope| {
        for n in 0..25 {
            let broker = &broker;
            scope.spawn(move || assert_eq!(try_login(broker, &format!("c{n}"), "ann"), 0x88));
        }
    });
    broker.await_log("circuit breaker open", 1);
    hangs.store(false, Ordering::Relaxed);
    let begun = Instant::now();
    for n in 0..25 {
        while try_login(&broker, &format!("c{n}"), "ann") != 0 {
            assert!(begun.elapsed() < Duration::from_secs(15), "client {n} of 25 is not let in");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// More clients than a service can let in at once wait for their turn instead of being refused.
#[test]
fn a_storm_of_clients_is_let_in() {
    let url = auth_service(Duration::from_millis(100), &Arc::default());
    let broker = Broker::start(&format!("shards = 1\n{}", auth_http(&url, "deadline_ms = 2000")));
    let begun = Instant::now();
    let mut clients: Vec<Client> = (0..300).map(|_| Client::open(broker.address(), V5)).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send_connect(&login(&format!("c{n}"), "ann"));
    }
    for client in &mut clients {
        let reason = match client.recv_within(Duration::from_mins(1)) {
            Some(Got::Connack(connack)) => connack.reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(reason, 0, "after {:?}", begun.elapsed());
    }
    let instances = figure(&broker, "instances");
    assert!((5..=16).contains(&instances), "more were made when they were needed, and no more than there may be");
}

/// Text of a plugin is one bounded line wherever it is shown, without control characters.
#[test]
fn a_plugin_cannot_forge_lines() {
    let broker = Broker::start(&format!(
        "[[plugin]]\nname = \"probe\"\npath = \"{}\"\ngrants = {{ publish = [\"#\"], disconnect = true, ban = true, revoke = true }}\n",
        wasmqtt_guests::component("probe").display()
    ));
    let mut client = broker.connect(&Options::new(V5, "c\n2026-01-01T00:00:00Z ERROR forged"));
    client.subscribe("a/forge", 0);
    broker.await_log("plugin call failed", 1);
    let log = broker.log();
    assert!(!log.lines().any(|line| line.starts_with("2026-01-01")), "{log}");
    assert!(!log.contains("\u{1b}[31m") && log.lines().all(|line| line.len() < 8_000), "{log}");
    let config = broker.folder().join("wasmqtt.toml");
    let explain = ["plugin", "explain", "--client", "d", "--publish", "a/forge", "--config"];
    let output = wasmqtt().args(explain).arg(config).output().expect("runs");
    let said = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(said.contains("forged") && !said.contains('\u{1b}') && said.len() < 4_000, "{said}");
    assert!(said.contains("…(1000") && log.contains("…(1000"), "what is cut is said with its length: {said} {log}");
    assert!(!said.lines().any(|line| line.starts_with("2026-01-01")), "{said}");
}

/// A fresh instance takes the place of one that traps, but its lines are those that the other one had left.
#[test]
fn a_trap_gives_no_further_log_lines() {
    let broker = Broker::start(&hoard(""));
    let begun = Instant::now();
    for n in 0..4 {
        assert_eq!(try_login(&broker, &format!("c{n}"), "shout:100"), 0x88, "it traps");
    }
    broker.await_log("plugin call failed", 1);
    let most = 100 * (begun.elapsed().as_secs() as usize + 1);
    let lines = broker.log().matches("shout ").count();
    assert!((100..=most).contains(&lines), "{lines} lines and at most {most}");
}

/// What a plugin wanted without a grant is named in short, so that a name of megabytes is not formatted for the log.
#[test]
fn long_names_are_cut_before_they_are_logged() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("granted")).expect("make a folder");
    let files = "files = [{ host = \"granted\", guest = \"/granted\" }]";
    let broker = Broker::start_in(folder, &hoard(files));
    assert_eq!(try_login(&broker, "c", "names:500000"), 0);
    broker.await_log("denied: publishing to", 1);
    broker.await_log("denied: opening", 1);
    let log = broker.log();
    let denials: Vec<&str> = log.lines().filter(|line| line.contains("denied: ")).collect();
    assert!(denials.len() == 2 && denials.iter().all(|line| line.len() < 600), "{denials:?}");
}

/// Lines beyond those of a second are left out and counted, and one that is too long is cut.
#[test]
fn lines_of_a_plugin_are_bounded() {
    let broker = Broker::start(&format!("shards = 1\n{}", misbehave("", "cpu_ms = 20000, deadline_ms = 20000")));
    let begun = Instant::now();
    assert_eq!(try_login(&broker, "c", "chatter"), 0);
    let seconds = begun.elapsed().as_secs() as usize + 1;
    // The next line says how many were left out before it.
    thread::sleep(Duration::from_millis(1100));
    assert_eq!(try_login(&broker, "d", "long"), 0);
    broker.await_log("yyyy", 1);
    let log = broker.log();
    let shown = log.matches("and \\u{1b}[31mred").count();
    let counts =
        log.split("left_out=").skip(1).filter_map(|rest| rest.split_whitespace().next()?.parse::<usize>().ok());
    assert_eq!(shown + counts.sum::<usize>(), 100_000, "{log}");
    assert!((100..=100 * seconds).contains(&shown), "{shown} lines in {seconds} seconds");
    let long = log.lines().find(|line| line.contains("yyyy")).expect("it is there");
    assert!(long.len() < 4500 && long.contains("…(100000 bytes)"), "{long}");
}
