//! Components are compiled by a process of their own, which hurts nobody whatever it is given.

use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tempfile::TempDir;
use wasmqtt_tests::{Broker, Options, Version, wasmqtt};

const PATIENCE: Duration = Duration::from_mins(2);
/// The broker itself must not grow by this while something is compiled; in its own process these inputs took gigabytes.
const GROWTH_MAX: usize = 64 << 20;
/// What a command may take while something is compiled, on a machine that does other things as well.
const COMMAND_MAX: Duration = Duration::from_secs(5);

/// A plugin folder with one plugin that allows everything.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("plugins")).expect("make a folder");
    std::fs::copy(wasmqtt_guests::component("misbehave"), folder.path().join("plugins/m.wasm")).expect("built");
    folder
}

fn start(settings: &str) -> Broker {
    Broker::start_in(folder(), &format!("[plugins]\ndir = \"plugins\"\n{settings}"))
}

fn leb(mut n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let more = n > 0x7F;
        bytes.push((n & 0x7F) as u8 | u8::from(more) << 7);
        n >>= 7;
        if !more {
            return bytes;
        }
    }
}

fn section(id: u8, content: &[u8]) -> Vec<u8> {
    [&[id][..], &leb(content.len()), content].concat()
}

const COMPONENT: [u8; 8] = [0, b'a', b's', b'm', 0x0d, 0, 1, 0];

/// Components in components, each just its header, a section, and the one before.
fn nested(depth: usize) -> Vec<u8> {
    (0..depth).fold(COMPONENT.to_vec(), |inner, _| [&COMPONENT[..], &section(4, &inner)].concat())
}

/// A component with a module with one function of so many bytes: it counts, and leaves the block now and then.
fn one_function(bytes: usize) -> Vec<u8> {
    // local.get 0; i32.const 1; i32.add; local.tee 0; br_if 0
    const STEP: [u8; 11] = [0x20, 0, 0x41, 1, 0x6a, 0x22, 0, 0x0d, 0, 0x01, 0x01];
    let steps = STEP.repeat(bytes / STEP.len());
    // block … end; end
    let body = [&[0, 0x02, 0x40][..], &steps, &[0x0b, 0x0b]].concat();
    let function = [leb(body.len()), body].concat();
    let module = [
        vec![0, b'a', b's', b'm', 1, 0, 0, 0],
        section(1, &[1, 0x60, 1, 0x7f, 0]),
        section(3, &[1, 0]),
        section(10, &[vec![1], function].concat()),
    ];
    [&COMPONENT[..], &section(1, &module.concat())].concat()
}

/// A component with a module with a memory that begins with so many bytes: as many are in what is compiled.
fn one_memory(bytes: usize) -> Vec<u8> {
    let pages = bytes.div_ceil(1 << 16);
    // Active, at `i32.const 0; end`.
    let data = [vec![1, 0, 0x41, 0, 0x0b], leb(bytes), vec![b'x'; bytes]].concat();
    let module =
        [vec![0, b'a', b's', b'm', 1, 0, 0, 0], section(5, &[vec![1, 0], leb(pages)].concat()), section(11, &data)];
    [&COMPONENT[..], &section(1, &module.concat())].concat()
}

fn write(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let file = folder.join(name);
    std::fs::write(&file, bytes).expect("write");
    file
}

fn command(broker: &Broker, arguments: &[&str]) -> std::process::Command {
    let mut command = wasmqtt();
    command.arg("plugin").args(arguments).arg("--config").arg(broker.folder().join("wasmqtt.toml"));
    command
}

fn run(broker: &Broker, arguments: &[&str]) -> Output {
    command(broker, arguments).output().expect("runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Begins to deploy.
fn deploying(broker: &Broker, name: &str, bytes: &[u8]) -> Child {
    let file = write(broker.folder(), &format!("{name}.wasm"), bytes);
    let mut command = command(broker, &["deploy", file.to_str().expect("UTF-8")]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("runs")
}

/// Processes that a process has started.
fn children(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        after_name.split_whitespace().nth(1) == Some(&parent.to_string())
    };
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect()
}

fn wait<T>(what: &str, found: impl Fn() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(begun.elapsed() < PATIENCE, "still not: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

fn wait_for_compiler(broker: &Broker) -> u32 {
    wait("a compiler", || children(broker.pid()).first().copied())
}

/// Commands are answered and other plugins are deployed while something else is compiled for long.
fn check_not_held_up(broker: &Broker) {
    let begun = Instant::now();
    let listed = run(broker, &["list"]);
    let explained = run(broker, &["explain", "--client", "c", "--publish", "a"]);
    assert!(listed.status.success() && explained.status.success(), "{listed:?} {explained:?}");
    assert!(begun.elapsed() < 2 * COMMAND_MAX, "{:?}", begun.elapsed());
    broker.connect(&Options::new(Version::V5, "c")).disconnect();
}

/// 142 KB, for which a compiler without limits takes 3.3 GiB.
#[test]
fn components_nested_in_each_other_cost_the_broker_nothing() {
    let broker = start("compile_memory_mib = 1024\n");
    let input = nested(12_000);
    assert!((100_000..200_000).contains(&input.len()), "{}", input.len());
    let before = broker.rss();
    let mut deploy = deploying(&broker, "nested", &input);
    check_not_held_up(&broker);
    let (mut grown, begun) = (0, Instant::now());
    while deploy.try_wait().expect("our child").is_none() {
        grown = grown.max(broker.rss().saturating_sub(before));
        assert!(begun.elapsed() < PATIENCE, "still no answer");
        thread::sleep(Duration::from_millis(20));
    }
    let said = text(&deploy.wait_with_output().expect("ends").stderr);
    assert!(said.contains("[plugins] compile_memory_mib = 1024") && said.contains("nothing was changed"), "{said}");
    assert!(grown < GROWTH_MAX, "{grown} bytes more");
}

/// Whatever of a compiler's bounds a component reaches, it is refused by the name of the setting.
#[test]
fn each_bound_of_a_compiler_is_named() {
    let inputs = [
        ("compile_memory_mib = 512", nested(12_000)),
        ("compile_cpu_secs = 1", one_function(3 << 20)),
        ("compiled_mib_max = 1", one_memory(2 << 20)),
    ];
    for (setting, input) in inputs {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("plugins")).expect("make a folder");
        let broker = Broker::start_in(folder, &format!("[plugins]\ndir = \"plugins\"\n{setting}\n"));
        let deployed = deploying(&broker, "large", &input).wait_with_output().expect("ends");
        let said = text(&deployed.stderr);
        assert!(said.contains(&format!("[plugins] {setting}")) && said.contains("nothing was changed"), "{said}");
        assert!(!deployed.status.success());
    }
}

/// It takes minutes: meanwhile everything else goes on, until the client of the command goes away.
#[test]
fn a_component_that_compiles_for_long_holds_up_nobody_and_can_be_cancelled() {
    let broker = start("compile_memory_mib = 4096\ncompile_at_once = 2\n");
    let before = broker.rss();
    let mut deploy = deploying(&broker, "large", &one_function(3 << 20));
    let compiler = wait_for_compiler(&broker);
    check_not_held_up(&broker);
    let listed = text(&run(&broker, &["list"]).stdout);
    assert!(listed.contains("large: a build of 31457") && listed.contains("is being compiled"), "{listed}");
    let mut other = std::fs::read(wasmqtt_guests::component("misbehave")).expect("the guest is built");
    other.extend([0, 2, 1, b'x']);
    let file = write(broker.folder(), "m.wasm", &other);
    let deployed = run(&broker, &["deploy", file.to_str().expect("UTF-8")]);
    assert!(deployed.status.success(), "{deployed:?}");
    let back = run(&broker, &["rollback", "m"]);
    assert!(back.status.success(), "{back:?}");
    assert!(children(broker.pid()).contains(&compiler), "it goes on");
    check_compiler(compiler);
    assert!(broker.rss().saturating_sub(before) < GROWTH_MAX, "{} bytes", broker.rss());
    // As an interrupt does it.
    deploy.kill().expect("our child");
    deploy.wait().expect("our child");
    wait("the compiler is gone", || children(broker.pid()).is_empty().then_some(()));
    assert!(!broker.folder().join("plugins/large.wasm").exists());
    broker.stop();
}

/// It has no environment, and nothing of the broker is open but what it reads, writes and says.
fn check_compiler(pid: u32) {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).expect("it runs");
    assert!(environment.is_empty(), "{}", text(&environment));
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").flatten();
    // What whoever started this test left open for all is none of the broker's.
    let is_inherited = |name: &String| {
        let target = |process: &str| std::fs::read_link(format!("/proc/{process}/fd/{name}")).ok();
        target("self").is_some() && target("self") == target(&pid.to_string())
    };
    let open: Vec<String> = open.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    let mut own: Vec<&String> = open.iter().filter(|name| name.len() == 1 || !is_inherited(name)).collect();
    own.sort();
    assert_eq!(own, ["0", "1", "2"]);
}

/// SIGTERM ends the broker within seconds, also when it is still starting; the compiler ends with it.
#[test]
fn a_compiler_does_not_keep_the_broker_from_ending() {
    let mut broker = start("compile_memory_mib = 4096\n");
    let deploy = deploying(&broker, "large", &one_function(3 << 20));
    let compiler = wait_for_compiler(&broker);
    let begun = Instant::now();
    broker.signal(Signal::TERM);
    assert!(broker.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    assert!(!Path::new(&format!("/proc/{compiler}")).exists(), "the compiler is still there");
    assert!(!deploy.wait_with_output().expect("ends").status.success());

    let folder = folder();
    write(&folder.path().join("plugins"), "large.wasm", &one_function(3 << 20));
    let mut command = wasmqtt();
    let child = command.args(["serve", "--listen", "127.0.0.1:0"]).current_dir(folder.path());
    let mut starting = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("runs");
    wait("a compiler", || children(starting.id()).first().copied());
    let pid = i32::try_from(starting.id()).ok().and_then(rustix::process::Pid::from_raw).expect("process id");
    rustix::process::kill_process(pid, Signal::TERM).expect("signal");
    let begun = Instant::now();
    while starting.try_wait().expect("our child").is_none() {
        assert!(begun.elapsed() < Duration::from_secs(15), "it does not end");
        thread::sleep(Duration::from_millis(20));
    }
}

/// The message says why, and the status is the same each time: no thread outlives `main`.
#[test]
fn a_start_that_a_plugin_refuses_ends_with_status_1() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    write(folder.path(), "users", b"ann:plain\n");
    let component = wasmqtt_guests::component("auth-file");
    let config = format!(
        "[[listener]]\nbind = \"127.0.0.1:0\"\n[[plugin]]\nname = \"auth-file\"\npath = \"{}\"\n\
         config = {{ file = \"/users\" }}\ngrants = {{ files = [{{ host = \"users\", guest = \"/users\" }}] }}\n",
        component.display()
    );
    let file = write(folder.path(), "wasmqtt.toml", config.as_bytes());
    for round in 0..30 {
        let output = wasmqtt().arg("serve").arg("--config").arg(&file).output().expect("runs");
        assert_eq!(output.status.code(), Some(1), "start {round}: {output:?}");
        assert!(text(&output.stderr).contains("auth-file"), "{output:?}");
    }
}

/// A revoked user must not stay in because the password file is behind a link.
#[test]
fn a_password_file_behind_a_link_is_looked_at() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("secrets")).expect("make a folder");
    std::os::unix::fs::symlink("secrets/pw", folder.path().join("pw")).expect("can link");
    let passwd = |directory: &Path, password: &str| {
        let mut command = wasmqtt();
        let command = command.args(["passwd", "--memory-kib", "8", "--iterations", "1", "pw", "ann"]);
        let mut child = command.current_dir(directory).stdin(Stdio::piped()).spawn().expect("runs");
        std::io::Write::write_all(&mut child.stdin.take().expect("a pipe"), password.as_bytes()).expect("is read");
        assert!(child.wait().expect("ends").success());
    };
    passwd(&folder.path().join("secrets"), "first\n");
    let component = wasmqtt_guests::component("auth-file");
    let config = format!(
        "[[plugin]]\nname = \"auth-file\"\npath = \"{}\"\nconfig = {{ file = \"/pw\" }}\n\
         grants = {{ files = [{{ host = \"pw\", guest = \"/pw\" }}] }}\n",
        component.display()
    );
    let broker = Broker::start_in(folder, &config);
    let login = |password: &str| {
        let password = Some(password.into());
        Options { username: Some("ann".into()), password, ..Options::new(Version::V5, "c") }
    };
    broker.connect(&login("first")).disconnect();
    passwd(broker.folder(), "second\n");
    broker.await_log("plugin replaced", 1);
    broker.check_refused(&login("first"), 0x86);
    broker.connect(&login("second")).disconnect();
}
