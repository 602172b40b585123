//! Commands for authors of plugins.

use std::path::Path;
use std::process::{Command, Output};

use wasmqtt_tests::wasmqtt;

fn run(arguments: &[&str], folder: &Path) -> Output {
    wasmqtt().arg("plugin").args(arguments).current_dir(folder).output().expect("runs")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn component(name: &str) -> String {
    wasmqtt_guests::component(name).to_str().expect("UTF-8").to_owned()
}

#[test]
fn check_shows_plug_points_and_grants() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = run(&["check", &component("probe"), "--set", "filters=a/#", "--set", "before=true"], folder.path());
    let shown = stdout(&output);
    assert!(output.status.success(), "{output:?}");
    for expected in
        ["acl@0.1.0", "registers filters: a/#", "registers before-store: yes", "disconnect = true", "publish = ["]
    {
        assert!(shown.contains(expected), "{expected:?} is not in {shown}");
    }
    let refused = run(&["check", &component("probe"), "--set", "init=trap"], folder.path());
    assert!(!refused.status.success());
    // What the panic says, and which component said it.
    for expected in ["unreachable", "component (warn): ", "panicked at", "as told", "plugin \"probe\""] {
        assert!(stderr(&refused).contains(expected), "{expected:?} is not in {}", stderr(&refused));
    }
}

/// Each with a sentence that names the cure, and not in the words of a parser or a linker.
#[test]
fn what_is_no_plugin_is_refused_with_its_cure() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("mine.wasm");
    let component = |text: &str| wat::parse_str(format!("(component {text})")).expect("a component");
    let acl = |function: &str| {
        component(&format!(
            r#"(core module $m (func (export "f") (result i32) i32.const 0))
               (core instance $i (instantiate $m))
               (func $f (result u32) (canon lift (core func $i "f")))
               (instance $acl (export "{function}" (func $f)))
               (export "wasmqtt:plugin/acl@0.1.0" (instance $acl))"#
        ))
    };
    for (bytes, expected) in [
        (
            b"\x7fELF\x02\x01\x01".to_vec(),
            "a native library or program, not WebAssembly: build it with --target wasm32-wasip2",
        ),
        (wat::parse_str("(module)").expect("a module"), "a core module, not a component: build it with --target"),
        (
            component(r#"(instance $i) (export "wasmqtt:plugin/acl@0.2.0" (instance $i))"#),
            "it exports wasmqtt:plugin/acl@0.2.0: it was built against another version of wit/",
        ),
        (
            component(r#"(import "wasi:cli/environment@0.3.0" (instance (export "f" (func))))"#),
            "it imports wasi:cli/environment@0.3.0, which is WASI 0.3, and this broker has WASI 0.2",
        ),
        (
            acl("authorize"),
            "`authorize` of wasmqtt:plugin/acl@0.1.0 takes or returns something else than in this broker's contract: it was \
             built against another wit/",
        ),
        (acl("decide"), "it exports wasmqtt:plugin/acl@0.1.0 without all of its functions"),
        (
            component("(core module $m (memory 300)) (core instance (instantiate $m))"),
            "limits.memory_mib = 16; raise it with limits = { memory_mib = 32 } in its [[plugin]] entry, and with --limit \
             memory_mib=32",
        ),
    ] {
        std::fs::write(&file, bytes).expect("write");
        for command in ["check", "bench"] {
            let refused = run(&[command, "mine.wasm"], folder.path());
            assert!(!refused.status.success());
            let said = stderr(&refused);
            assert!(said.contains(expected) && said.contains("plugin \"mine\""), "{expected:?} is not in {said}");
        }
    }
    // The last one begins with more memory than there is without the limit.
    let raised = stderr(&run(&["check", "mine.wasm", "--limit", "memory_mib=32"], folder.path()));
    assert!(raised.contains("it exports nothing") && !raised.contains("memory_mib"), "{raised}");
    let wrong = stderr(&run(&["check", "mine.wasm", "--limit", "memory_mib=0"], folder.path()));
    assert!(wrong.contains("--limit") && wrong.contains("memory_mib"), "{wrong}");
}

/// The reason, and no figures: those of refused calls are quick.
#[test]
fn a_bench_of_calls_that_fail_says_why() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let failed = run(&["bench", &component("probe"), "--set", "acl=fail"], folder.path());
    assert!(!failed.status.success(), "{failed:?}");
    let row = stdout(&failed).lines().find(|line| line.starts_with("authorize")).map(str::to_owned);
    assert!(row.as_ref().is_some_and(|row| row.ends_with("call 1 failed: unavailable: as told")), "{failed:?}");
    let json = stdout(&run(&["bench", &component("probe"), "--set", "acl=fail", "--json"], folder.path()));
    assert!(json.contains("as told") && !json.contains("p50_us"), "{json}");
    let events = run(&["bench", &component("presence")], folder.path());
    assert!(events.status.success(), "{events:?}");
    assert!(stdout(&events).contains("nothing that a client waits for"), "{events:?}");
}

/// A case without an answer says why there is none, and what the component said.
#[test]
fn a_case_that_traps_shows_the_panic() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case =
        "[[case]]\nname = \"traps\"\ncall = \"authorize\"\npublish = \"a/trap\"\nexpect = { verdict = \"allow\" }\n";
    std::fs::write(folder.path().join("trap.toml"), case).expect("write");
    let output = run(&["test", &component("probe"), "trap.toml"], folder.path());
    assert!(!output.status.success());
    assert!(stdout(&output).contains("no answer: ") && stdout(&output).contains("unreachable"), "{output:?}");
    assert!(stderr(&output).contains("as told"), "{output:?}");
}

#[test]
fn cases_are_run_and_differences_are_shown() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let cases = r#"
[config]
filters = "a/#"
before = "true"
events = "client-connected"

[[case]]
name = "allowed"
call = "authorize"
publish = "a/b"
expect = { verdict = "allow", ttl = 60, scope = "a/#" }

[[case]]
name = "denied"
call = "authorize"
subscribe = "a/secret"
expect = { verdict = "deny", reason = 0x87 }

[[case]]
name = "replaced"
call = "before-store"
topic = "a/upper"
payload = "x"
expect = { outcome = "keep", payload = "X" }

[[case]]
name = "told"
call = "observed"
kind = "client-connected"
expect = { outcome = "told", failures = 0 }
"#;
    std::fs::write(folder.path().join("good.toml"), cases).expect("write");
    let output = run(&["test", &component("probe"), "good.toml"], folder.path());
    assert!(output.status.success(), "{output:?}");
    assert!(stdout(&output).ends_with("4 cases, 0 failed\n"), "{output:?}");

    std::fs::write(folder.path().join("bad.toml"), cases.replace("ttl = 60", "ttl = 61")).expect("write");
    let output = run(&["test", &component("probe"), "bad.toml"], folder.path());
    assert!(!output.status.success());
    let shown = stdout(&output);
    assert!(shown.contains("FAIL allowed\n     - ttl: 61\n     + ttl: 60\n"), "{shown}");

    std::fs::write(folder.path().join("wrong.toml"), "[[case]]\nname = \"x\"\ncall = \"ask\"\nexpect = {}\n")
        .expect("write");
    let output = run(&["test", &component("probe"), "wrong.toml"], folder.path());
    assert!(String::from_utf8_lossy(&output.stderr).contains("authenticate"), "{output:?}");
}

#[test]
fn bench_measures_what_clients_wait_for() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = run(&["bench", &component("auth-demo"), "--set", "ann=secret", "--json"], folder.path());
    assert!(output.status.success(), "{output:?}");
    let shown = stdout(&output);
    assert!(shown.contains("\"authenticate\"") && shown.contains("\"p99_us\""), "{shown}");
}

/// Each kind of project builds, passes its own test, and its component passes its cases.
#[test]
fn new_projects_build_and_pass_their_tests() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    // One target folder for all, beside that of the tests, so that a warm run is short.
    let test = std::env::current_exe().expect("path of the test");
    let target = test.ancestors().nth(3).expect("target/PROFILE/deps").join("new-plugins");
    let cargo = |project: &Path, arguments: &[&str]| {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.args(arguments).arg("--quiet").current_dir(project).env("CARGO_TARGET_DIR", &target);
        for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "CARGO_BUILD_TARGET"] {
            cargo.env_remove(name);
        }
        let output = cargo.output().expect("cargo runs");
        assert!(
            output.status.success(),
            "{arguments:?} in {}: {}",
            project.display(),
            String::from_utf8_lossy(&output.stderr)
        );
    };
    for kind in ["auth", "acl", "storage-hook", "events"] {
        let name = format!("my-{kind}");
        let output = run(&["new", &name, "--lang", "rust", "--kind", kind], folder.path());
        assert!(output.status.success(), "{output:?}");
        let deploy = format!("wasmqtt plugin deploy {}", folder.path().join(&name).display());
        assert!(stdout(&output).contains(&deploy), "{output:?}");
        let project = folder.path().join(&name);
        cargo(&project, &["test"]);
        cargo(&project, &["build", "--release", "--target", "wasm32-wasip2"]);
        let file = target.join(format!("wasm32-wasip2/release/{}.wasm", name.replace('-', "_")));
        let output = run(&["test", file.to_str().expect("UTF-8"), "cases.toml"], &project);
        assert!(output.status.success(), "{output:?}");
    }
    let again = run(&["new", "my-acl", "--kind", "acl"], folder.path());
    assert!(String::from_utf8_lossy(&again.stderr).contains("is there already"), "{again:?}");
    let language = run(&["new", "x", "--kind", "acl", "--lang", "cobol"], folder.path());
    assert!(String::from_utf8_lossy(&language.stderr).contains("[possible values: rust]"), "{language:?}");
}
