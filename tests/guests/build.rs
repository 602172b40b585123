//! Builds the plugins and the misbehaving guest as components, so that no test needs a manual step first.
//!
//! A nested cargo with a target folder of its own: the outer one holds the lock of its folder while this runs.

use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "wasm32-wasip2";
const PACKAGES: [&str; 11] = [
    "acl-rules",
    "auth-demo",
    "auth-file",
    "auth-http",
    "auth-jwt",
    "payload-seal",
    "presence",
    "topic-tap",
    "hoard",
    "misbehave",
    "probe",
];

fn main() {
    let here = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let workspace = here.ancestors().nth(2).expect("the workspace is two folders up").to_owned();
    for watched in
        ["plugins", "sdk", "wit", "tests/guests/hoard", "tests/guests/misbehave", "tests/guests/probe", "Cargo.toml"]
    {
        println!("cargo:rerun-if-changed={}", workspace.join(watched).display());
    }
    let target_dir = outer_target_dir().join("wasm-plugins");
    build(&workspace, &target_dir);
    println!("cargo:rustc-env=WASMQTT_PLUGINS_DIR={}", target_dir.join(TARGET).join("plugin").display());
}

/// The folder that cargo marks as its own; `OUT_DIR` lies somewhere below.
fn outer_target_dir() -> PathBuf {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it"));
    let marked = out.ancestors().find(|folder| folder.join("CACHEDIR.TAG").is_file());
    marked.or_else(|| out.ancestors().nth(4)).unwrap_or(&out).to_owned()
}

fn build(workspace: &Path, target_dir: &Path) {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(workspace).args(["build", "--quiet", "--profile", "plugin", "--target", TARGET]);
    cargo.arg("--target-dir").arg(target_dir);
    for package in PACKAGES {
        cargo.args(["-p", package]);
    }
    // What was meant for the outer build would break this one: sanitizers, coverage, clippy as the compiler.
    let meant_for_outer = |name: &str| {
        matches!(name, "RUSTFLAGS" | "RUSTDOCFLAGS" | "RUSTC" | "RUSTC_WRAPPER" | "RUSTC_WORKSPACE_WRAPPER" | "TARGET")
            || matches!(name, "CARGO_ENCODED_RUSTFLAGS" | "CARGO_TARGET_DIR" | "CARGO_BUILD_TARGET" | "CARGO_MAKEFLAGS")
            || name.starts_with("CARGO_CFG_")
            || name.starts_with("CARGO_FEATURE_")
            || name.starts_with("CARGO_PROFILE_")
    };
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(meant_for_outer) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status().expect("cargo runs");
    assert!(status.success(), "building the plugins failed{}", hint());
}

fn hint() -> &'static str {
    let sysroot = Command::new("rustc").args(["--print", "target-libdir", "--target", TARGET]).output();
    let has_target = sysroot.is_ok_and(|output| Path::new(String::from_utf8_lossy(&output.stdout).trim()).is_dir());
    if has_target { "" } else { "; the target is missing: run `rustup target add wasm32-wasip2`" }
}
