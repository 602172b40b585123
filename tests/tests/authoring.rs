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
    assert!(String::from_utf8_lossy(&refused.stderr).contains("unreachable"), "{refused:?}");
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
