//! Plugins change while the broker serves.

mod common;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Broker, allowed, another_build, denied, misbehave, plugin, replace, request};
use wasmqtt_host::{Cancel, Compiler, FileGrant, Grants, HostConfig, Mode, PluginConfig, PluginLimits, inspect};
use wasmqtt_protocol::ports::AuthOutcome;

/// A broker whose folder holds the misbehaving guest as `m.wasm`.
fn with_folder() -> (Broker, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("plugins/m.wasm");
    std::fs::create_dir(folder.path().join("plugins")).expect("can make a folder");
    std::fs::copy(wasmqtt_guests::component("misbehave"), &file).expect("the guest is built");
    (Broker::try_start(folder, Vec::new()).expect("loads"), file)
}

fn check_keeps_running(bytes: &[u8]) {
    let (broker, file) = with_folder();
    replace(&file, bytes);
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(broker.generation("m"), 1);
    assert_eq!(broker.ask("c", ""), allowed("allow"));
    // The loader is alive, and has no grudge.
    replace(&file, &another_build("misbehave"));
    broker.wait("the new build serves", |broker| broker.generation("m") == 2);
    assert_eq!(broker.ask("c", ""), allowed("allow"));
}

/// What a plugin keeps in buckets is there for the next build.
#[test]
fn buckets_outlive_a_build() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("count.wasm");
    std::fs::copy(wasmqtt_guests::component("misbehave"), &file).expect("the guest is built");
    let grants = Grants { keyvalue_mib: 1, ..Grants::default() };
    let config = PluginConfig { grants, ..plugin("count", &file, &[]) };
    let broker = Broker::try_start(folder, vec![config]).expect("plugins load");
    assert_eq!((broker.ask("a", "count"), broker.ask("b", "count")), (allowed("1"), allowed("2")));
    replace(&file, &another_build("misbehave"));
    broker.wait("the new build", |broker| broker.generation("count") == 2);
    assert_eq!(broker.ask("a", "count"), allowed("3"));
    assert_eq!(broker.ask("c", "fill"), allowed("yes"), "it is bounded");
    assert!(broker.status("count").is_some_and(|status| (1 << 19..=1 << 20).contains(&status.keyvalue_bytes)));
}

#[test]
fn a_new_build_serves_and_calls_under_way_end_on_the_old_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("m.wasm");
    std::fs::copy(wasmqtt_guests::component("misbehave"), &file).expect("the guest is built");
    let limits = PluginLimits { deadline_ms: 60_000, cpu_ms: 60_000, ..PluginLimits::default() };
    let config = PluginConfig { probation: Duration::from_millis(100), limits, ..plugin("m", &file, &[]) };
    let broker = Broker::try_start(folder, vec![config]).expect("loads");
    let mut old = broker.shard.authenticate(Arc::new(request("old", "work", "")));
    assert!(broker.poll(&mut old).is_pending());
    replace(&file, &std::fs::read(wasmqtt_guests::component("auth-demo")).expect("the guest is built"));
    broker.wait("the new build serves", |broker| {
        assert!(matches!(broker.ask("c", "alice"), AuthOutcome::Allow(_) | AuthOutcome::Deny(_)));
        broker.generation("m") == 2
    });
    assert_eq!(broker.ask("c", "alice"), denied(0x86), "this is the other plugin");
    assert_eq!(broker.run(old), allowed("allow"), "and this the first");
    broker.wait("old instances are gone", |broker| broker.status("m").is_some_and(|status| status.instances == 1));
    assert_eq!(broker.status("m").map(|status| status.failures), Some(0));
}

#[test]
fn no_call_fails_through_many_reloads() {
    let (broker, file) = with_folder();
    let builds = [another_build("misbehave"), std::fs::read(wasmqtt_guests::component("misbehave")).expect("built")];
    for round in 0..10 {
        replace(&file, &builds[round % 2]);
        broker.wait("the next build serves", |broker| {
            assert_eq!(broker.ask("c", ""), allowed("allow"));
            broker.generation("m") == round as u64 + 2
        });
    }
    assert_eq!(broker.status("m").map(|status| status.failures), Some(0));
}

#[test]
fn a_touched_file_changes_nothing() {
    let (broker, file) = with_folder();
    let bytes = std::fs::read(&file).expect("can read");
    replace(&file, &bytes);
    std::thread::sleep(Duration::from_millis(150));
    assert_eq!(broker.generation("m"), 1);
}

#[test]
fn rubbish_keeps_the_old_one() {
    check_keeps_running(b"");
    check_keeps_running(b"\0asm");
    check_keeps_running(&[0xFF; 4096]);
}

#[test]
fn a_half_written_file_keeps_the_old_one() {
    let bytes = another_build("misbehave");
    check_keeps_running(&bytes[..bytes.len() / 2]);
}

#[test]
fn a_component_of_another_world_keeps_the_old_one() {
    check_keeps_running(&wat::parse_str("(component)").expect("is valid text"));
    let import = r#"(component (import "acme:rocket/launch@1.0.0" (instance (export "go" (func)))))"#;
    check_keeps_running(&wat::parse_str(import).expect("is valid text"));
}

/// The settings are those of the running build, so the same guest can be told by a granted file.
#[test]
fn a_build_that_cannot_start_keeps_the_old_one() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let users = folder.path().join("users");
    let hash = "$argon2id$v=19$m=8,t=1,p=1$c2l4dGVlbiBieXRlIHNhbHQ$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    std::fs::write(&users, format!("alice:{hash}\n")).expect("can write");
    let files = vec![FileGrant { host: users.clone(), guest: "/users".into(), mode: Mode::Read }];
    let auth_file = plugin("auth-file", wasmqtt_guests::component("auth-file"), &[("file", "/users")]);
    let broker = Broker::try_start(folder, vec![PluginConfig { files, ..auth_file }]).expect("loads");
    assert_eq!(broker.authenticate(request("c", "alice", "wrong")), denied(0x86));
    std::fs::write(&users, "alice:rubbish\n").expect("can write");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(broker.generation("auth-file"), 1);
    assert_eq!(broker.authenticate(request("c", "alice", "wrong")), denied(0x86));
    std::fs::write(&users, format!("bob:{hash}\n")).expect("can write");
    broker.wait("the changed file is loaded", |broker| broker.generation("auth-file") == 2);
    assert_eq!(broker.authenticate(request("c", "bob", "wrong")), denied(0x86));
}

#[test]
fn files_come_and_go() {
    let (broker, file) = with_folder();
    let other = file.with_file_name("other.wasm");
    replace(&other, &std::fs::read(wasmqtt_guests::component("auth-demo")).expect("the guest is built"));
    broker.wait("the new plugin serves", |broker| broker.generation("other") == 1);
    std::fs::remove_file(&file).expect("can remove");
    broker.wait("the old plugin is gone", |broker| broker.generation("m") == 0);
    assert_eq!(broker.ask("c", "alice"), denied(0x86));
    std::fs::remove_file(&other).expect("can remove");
    broker.wait("nobody is left", |broker| !broker.shard.has_auth());
    assert_eq!(broker.ask("c", "alice"), AuthOutcome::Next);
}

/// What it would have denied might be allowed without it.
#[test]
fn a_file_in_the_folder_that_cannot_be_loaded_refuses_the_start() {
    let bytes = std::fs::read(wasmqtt_guests::component("misbehave")).expect("the guest is built");
    for (bad, why) in [(&b"bad"[..], "not WebAssembly"), (&bytes[..bytes.len() / 2], "not a component")] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir(folder.path().join("plugins")).expect("can make a folder");
        std::fs::write(folder.path().join("plugins/bad.wasm"), bad).expect("can write");
        let error = Broker::try_start(folder, vec![misbehave("m", &[])]).err().expect("is refused").to_string();
        assert!(error.contains("bad.wasm") && error.contains(why), "{error}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let nowhere = folder.path().join("nowhere");
    let started = Broker::try_start_with(folder, vec![], |config| HostConfig { dir: Some(nowhere), ..config });
    let error = started.err().expect("is refused").to_string();
    assert!(error.contains("cannot read the plugin folder") && error.contains("nowhere"), "{error}");
}

fn make_fifo(path: &Path) {
    let status = std::process::Command::new("mkfifo").arg(path).status().expect("mkfifo is there");
    assert!(status.success());
}

/// A FIFO would be waited for, a file of 10 GiB would be read.
#[test]
fn files_that_are_no_components_hold_up_nobody() {
    let (broker, file) = with_folder();
    make_fifo(&file.with_file_name("fifo.wasm"));
    std::os::unix::fs::symlink("/dev/zero", file.with_file_name("device.wasm")).expect("can link");
    let huge = std::fs::File::create(file.with_file_name("huge.wasm")).expect("can create");
    huge.set_len(10 << 30).expect("a sparse file");
    std::fs::create_dir(file.with_file_name("folder.wasm")).expect("can make a folder");
    replace(&file, &another_build("misbehave"));
    broker.wait("the new build serves", |broker| broker.generation("m") == 2);
    assert_eq!(broker.host.status().len(), 1);
    let folder = tempfile::tempdir().expect("a temporary folder");
    std::fs::create_dir(folder.path().join("plugins")).expect("can make a folder");
    make_fifo(&folder.path().join("plugins/fifo.wasm"));
    let error = Broker::try_start(folder, vec![]).err().expect("is refused").to_string();
    assert!(error.contains("it is a FIFO, not a regular file"), "{error}");
}

/// The file system tells nothing of it, where the name is.
#[test]
fn what_a_link_leads_to_is_looked_at() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for name in ["plugins", "target", "secrets"] {
        std::fs::create_dir(folder.path().join(name)).expect("can make a folder");
    }
    let (target, secret) = (folder.path().join("target/m.wasm"), folder.path().join("secrets/word"));
    std::fs::copy(wasmqtt_guests::component("misbehave"), &target).expect("the guest is built");
    std::os::unix::fs::symlink("../target/m.wasm", folder.path().join("plugins/m.wasm")).expect("can link");
    std::fs::write(&secret, "first").expect("can write");
    let link = folder.path().join("word");
    std::os::unix::fs::symlink(&secret, &link).expect("can link");
    let files = vec![FileGrant { host: link, guest: "/word".into(), mode: Mode::Read }];
    let reader = PluginConfig { files, order: -1, ..misbehave("reader", &[]) };
    let broker = Broker::try_start(folder, vec![reader]).expect("loads");
    replace(&target, &another_build("misbehave"));
    broker.wait("the build behind the link serves", |broker| broker.generation("m") == 2);
    assert_eq!(broker.ask("c", "read:/word"), allowed("first"));
    replace(&secret, b"other");
    broker.wait("the file behind the link is read", |broker| broker.ask("c", "read:/word") == allowed("other"));
}

/// Each has room for a replacement on all shards; and there is one bit for each in what a route knows of hooks.
#[test]
fn there_can_be_sixty_four_plugins_and_each_can_be_replaced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().join("plugins");
    std::fs::create_dir(&dir).expect("can make a folder");
    let add = |n: usize| {
        let path = dir.join(format!("p{n:02}.wasm"));
        std::fs::copy(wasmqtt_guests::component("misbehave"), &path).expect("the guest is built");
        path
    };
    (0..64).for_each(|n| drop(add(n)));
    let two_shards = |config| HostConfig { shards: 2, ..config };
    let broker = Broker::try_start_with(folder, vec![], two_shards).expect("they all load");
    assert_eq!(broker.host.status().len(), 64);
    broker.host.deploy(vec![("p63".into(), another_build("misbehave"))]).expect("there is room");
    let over = add(64);
    broker.host.rescan();
    let refused = broker.host.deploy(vec![("p65".into(), another_build("misbehave"))]).expect_err("is refused");
    assert!(refused.to_string().contains("64 plugins already"), "{refused}");
    assert!(over.exists() && broker.host.status().len() == 64);
    let Broker { host, shard, folder, .. } = broker;
    drop(shard);
    host.stop();
    let error = Broker::try_start(folder, vec![]).err().expect("65 are too many").to_string();
    assert!(error.contains("65 plugins, and there can be 64") && error.contains("p64"), "{error}");
}

/// As by an editor, or `rm` and `cp`: for a moment nobody would be asked.
#[test]
fn a_file_that_is_gone_for_a_moment_does_not_unload_its_plugin() {
    let (broker, file) = with_folder();
    std::fs::remove_file(&file).expect("can remove");
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(broker.generation("m"), 1);
    std::fs::write(&file, another_build("misbehave")).expect("can write");
    broker.wait("the new build serves", |broker| {
        assert_eq!(broker.ask("c", ""), allowed("allow"));
        broker.generation("m") == 2
    });
}

#[test]
fn compiled_components_are_kept_and_damaged_ones_are_compiled_again() {
    let cwasm = |folder: &std::path::Path| {
        let entries = std::fs::read_dir(folder.join("cache")).expect("the cache is there");
        let mut entries: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        entries.retain(|path| path.extension().is_some_and(|extension| extension == "cwasm"));
        assert_eq!(entries.len(), 1);
        let modified = std::fs::metadata(&entries[0]).and_then(|metadata| metadata.modified()).expect("has a time");
        (entries.remove(0), modified)
    };
    let restart = |broker: Broker| {
        let Broker { host, shard, folder, .. } = broker;
        drop(shard);
        host.stop();
        let broker = Broker::try_start(folder, vec![misbehave("m", &[])]).expect("loads");
        assert_eq!(broker.ask("c", ""), allowed("allow"));
        broker
    };
    let broker = Broker::start(vec![misbehave("m", &[])]);
    let (path, first) = cwasm(broker.folder.path());
    let broker = restart(broker);
    assert_eq!(cwasm(broker.folder.path()).1, first, "not written again");
    let mut bytes = std::fs::read(&path).expect("can read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, &bytes).expect("can write");
    let broker = restart(broker);
    assert_ne!(std::fs::read(&path).expect("can read"), bytes, "made again");
    let mode = |name: &str| {
        let found = std::fs::metadata(broker.folder.path().join(name)).expect("is there");
        found.permissions().mode() & 0o777
    };
    assert_eq!((mode("cache"), mode("cache.key")), (0o700, 0o600));
    // Another broker's, or somebody's who has no key at all.
    let key = broker.folder.path().join("cache.key");
    let others = std::fs::read(&key).expect("can read").iter().rev().copied().collect::<Vec<u8>>();
    std::fs::write(&key, others).expect("can write");
    let foreign = std::fs::read(&path).expect("can read");
    let _broker = restart(broker);
    assert_ne!(std::fs::read(&path).expect("can read"), foreign, "made again");
}

#[test]
fn inspect_tells_what_a_component_is() {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let inspect = |file: &Path| inspect(file, &Compiler::InProcess, cache.path());
    let inspection = inspect(&wasmqtt_guests::component("auth-demo")).expect("is a component");
    assert_eq!(inspection.plug_points, ["auth@0.1.0"]);
    assert!(inspection.exports.iter().any(|name| name == "wasmqtt:plugin/lifecycle@0.1.0"));
    assert!(inspection.imports.iter().any(|name| name.starts_with("wasi:")));
    assert!(inspection.size > 10_000);
    assert!(inspect(Path::new("/nowhere")).is_err());
}

/// As a folder that is a link, and is made to point elsewhere, or one that was removed and made again.
#[test]
fn a_folder_that_is_another_one_by_now_is_watched_again() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = |name: &str, bytes: &[u8]| {
        let dir = folder.path().join(name);
        std::fs::create_dir(&dir).expect("can make a folder");
        std::fs::write(dir.join("m.wasm"), bytes).expect("can write");
        dir
    };
    let good = std::fs::read(wasmqtt_guests::component("misbehave")).expect("built");
    let one = dir("one", &good);
    let two = dir("two", &another_build("misbehave"));
    let link = folder.path().join("plugins");
    std::os::unix::fs::symlink(&one, &link).expect("can link");
    let broker = Broker::try_start(folder, Vec::new()).expect("loads");
    let other = link.with_extension("new");
    std::os::unix::fs::symlink(&two, &other).expect("can link");
    std::fs::rename(&other, &link).expect("can rename");
    broker.wait("the build behind the new link serves", |broker| broker.generation("m") == 2);
    // And that folder is watched: this is noticed at once.
    replace(&two.join("m.wasm"), &good);
    broker.wait("the next build serves", |broker| broker.generation("m") == 3);
    // Deleted and made again at once.
    std::fs::remove_dir_all(&two).expect("can remove");
    std::fs::create_dir(&two).expect("can make a folder");
    std::thread::sleep(Duration::from_secs(4));
    std::fs::write(two.join("m.wasm"), another_build("misbehave")).expect("can write");
    broker.wait("what lies in the new folder serves", |broker| broker.generation("m") > 0);
}

/// The loader does other things while components are compiled for new settings, and who gave the order can end it.
#[test]
fn other_settings_are_compiled_beside_the_loader() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let with = |file: &str| plugin("m", wasmqtt_guests::component(file), &[("user", "x")]);
    let broker = Broker::try_start(folder, vec![with("misbehave")]).expect("loads");
    let cancel = Cancel::default();
    cancel.cancel();
    let refused = broker.host.reconfigure_with(vec![with("auth-demo")], &cancel).expect_err("was cancelled");
    assert!(refused.to_string().contains("cancelled") && broker.generation("m") == 1, "{refused}");
    std::thread::scope(|scope| {
        let reload = scope.spawn(|| broker.host.reconfigure(vec![with("auth-jwt")]));
        broker.wait("it is compiled", |broker| !broker.host.compiling().is_empty());
        broker.host.promote("m").expect_err("nothing is on trial");
        assert!(!broker.host.compiling().is_empty(), "the loader has waited for the compiler");
        let failed = reload.join().expect("ends").expect_err("other settings are wrong for it").to_string();
        assert!(failed.contains("`user`"), "{failed}");
    });
    broker.host.reconfigure(vec![with("auth-demo")]).expect("it serves");
    assert_eq!((broker.generation("m"), broker.ask("c", "alice")), (2, denied(0x86)));
}

/// It was a warning when it came, and has nothing to do with other settings.
#[test]
fn a_file_in_the_folder_that_is_no_plugin_keeps_nobody_from_other_settings() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dir = folder.path().join("plugins");
    std::fs::create_dir(&dir).expect("can make a folder");
    let config = |order: i32| PluginConfig { order, ..misbehave("m", &[]) };
    let broker = Broker::try_start(folder, vec![config(1)]).expect("loads");
    std::fs::write(dir.join("junk.wasm"), "junk").expect("can write");
    std::thread::sleep(Duration::from_secs(1));
    broker.host.reconfigure(vec![config(2)]).expect("it serves");
    assert_eq!((broker.generation("m"), broker.status("junk").is_none()), (2, true));
}

/// Its places would be taken for ever, by plugins that never were.
#[test]
fn settings_that_were_refused_leave_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = Broker::try_start(folder, vec![misbehave("m", &[])]).expect("loads");
    for n in 0..70 {
        let missing = plugin(&format!("p{n}"), format!("/nowhere/{n}.wasm"), &[]);
        let error = broker.host.reconfigure(vec![misbehave("m", &[]), missing]).expect_err("is refused").to_string();
        assert!(error.contains("cannot read"), "{error}");
    }
}

/// What it is put into would be another topic.
#[test]
fn a_file_whose_name_is_none_for_a_plugin_is_not_loaded() {
    let (broker, file) = with_folder();
    for name in ["a+#.wasm", "a b.wasm", "a.b.wasm", &format!("{}.wasm", "x".repeat(65))] {
        std::fs::copy(&file, file.with_file_name(name)).expect("can copy");
    }
    replace(&file, &another_build("misbehave"));
    broker.wait("the new build serves", |broker| broker.generation("m") == 2);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(broker.host.status().len(), 1);
    let Broker { host, shard, folder, .. } = broker;
    drop(shard);
    host.stop();
    let error = Broker::try_start(folder, Vec::new()).err().expect("is refused").to_string();
    assert!(error.contains("\"a+#\"") && error.contains("letters, digits"), "{error}");
}

/// Settings are part of what a build is made from; what cannot serve changes nothing.
#[test]
fn other_settings_make_another_build_and_wrong_ones_none() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("m.wasm");
    std::fs::copy(wasmqtt_guests::component("misbehave"), &file).expect("the guest is built");
    let config = |order: i32| PluginConfig { order, ..plugin("m", &file, &[]) };
    let broker = Broker::try_start(folder, vec![config(1)]).expect("loads");
    let reconfigure = |plugins: Vec<PluginConfig>| broker.host.reconfigure(plugins);
    reconfigure(vec![config(1)]).expect("nothing is different");
    assert_eq!(broker.generation("m"), 1);
    reconfigure(vec![config(2)]).expect("it serves");
    assert_eq!((broker.generation("m"), broker.ask("c", "")), (2, allowed("allow")));
    let missing = plugin("other", file.with_file_name("missing.wasm"), &[]);
    let error = reconfigure(vec![config(3), missing]).expect_err("there is no such file").to_string();
    assert!(error.contains("other"), "{error}");
    assert_eq!((broker.generation("m"), broker.status("other").is_some()), (2, false));
    broker.host.rescan();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(broker.generation("m"), 2, "and a look at the files does not change that");
    reconfigure(Vec::new()).expect("it goes");
    broker.wait("it is gone", |broker| broker.status("m").is_none());
}
